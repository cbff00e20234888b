"""Identity tokens: the shard that an object carries in its identity, and the options by which the ORM gives it."""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sqlalchemy.orm import FromStatement, Mapper, Session, loading
from sqlalchemy.orm.context import QueryContext
from sqlalchemy.sql.schema import Column
from sqlalchemy.util import immutabledict

from shardkit.errors import StaleShardMap
from shardkit.routing.expressions import may_select
from shardkit.routing.route import Route, StatementKind
from shardkit.snapshots import View

#: The execution option that holds the ORM's own load options.
LOAD_OPTIONS = "_sa_orm_load_options"
#: The execution option on the statements of selectin and other loaders: the context of the statement they belong to.
PARENT_LOAD = "sa_top_level_orm_context"
#: The execution option on the statements of ``subqueryload()``, beside all those of the statement they belong to.
SUBQUERY_LOAD: Any = ("subquery_rewritten_path", None)


def tokened(view: View, route: Route) -> bool:
    """Whether objects of this statement carry their shard in their identity."""
    return tokened_rows(view, route.tables or _tables_of_entities(view, route.statement))


def tokened_rows(view: View, tables: tuple[str, ...]) -> bool:
    """Whether objects made of these tables' rows do."""
    try:
        return view.tokens[tables]
    except KeyError:
        placed = any(view.map.table(name).kind != "reference" for name in tables)
        answer = view.tokens[tables] = placed and view.map.sole_host is None
        return answer


def _tables_of_entities(view: View, statement: Any) -> tuple[str, ...]:
    """The tables of the classes whose objects are made of raw SQL's rows, where the router has not read it."""
    columns = statement._raw_columns if isinstance(statement, FromStatement) else ()
    mappers = [each._annotations["parententity"].mapper for each in columns if "parententity" in each._annotations]
    names = (str(getattr(table, "fullname", "")) for mapper in mappers for table in mapper.tables)
    return tuple(dict.fromkeys(name for name in names if name in view.map.tables))


@lru_cache(maxsize=4096)
def load_options_of(shard: str) -> immutabledict[str, Any]:
    """What makes the ORM give the objects it loads this shard as their identity token."""
    loading: Any = QueryContext.default_load_options + {"_identity_token": shard}
    return immutabledict({LOAD_OPTIONS: loading})


def with_token(options: Mapping[str, Any], shard: str, kind: StatementKind) -> immutabledict[str, Any]:
    if kind is StatementKind.SELECT:
        return as_immutable(options).union({"identity_token": shard}) if options else load_options_of(shard)
    tokened: immutabledict[str, Any] = as_immutable(options).union({"identity_token": shard, **load_options_of(shard)})
    return tokened


def as_immutable(options: Mapping[str, Any]) -> immutabledict[str, Any]:
    return options if isinstance(options, immutabledict) else immutabledict(options)


def identity_of(options: Mapping[str, Any]) -> Any:
    """The shard that a load by identity asks for; None for every other statement."""
    load = options.get(LOAD_OPTIONS)
    if load is None or PARENT_LOAD in options:
        return None
    state = load._refresh_state
    if load._identity_token is None and state is not None and state.key is not None:
        return state.key[2]  # the rest of an object that is loaded in part, such as a joined subclass's own columns
    return load._identity_token


def is_wide(view: View, statement: Any) -> bool:
    """Whether a load by identity may read other rows along with the object's own: by joined eager loads, or by
    subqueries among its columns and conditions."""
    if statement._with_options:
        return True
    subject = statement._propagate_attrs["plugin_subject"]
    try:
        return view.wide[subject]
    except KeyError:
        answer = view.wide[subject] = any(map(_loads_more, subject.mapper.self_and_descendants))
        return answer


def _loads_more(mapper: Mapper[Any]) -> bool:
    columns = [column for attribute in mapper.column_attrs for column in attribute.columns]
    made = [each for each in (*columns, mapper.polymorphic_on) if each is not None and not isinstance(each, Column)]
    return any(each.lazy in {"joined", False} for each in mapper.relationships) or any(map(may_select, made))


def existing(view: View, shard: Any) -> str:
    if view.only is not None:
        return view.only  # whatever else an identity token may stand for
    if shard not in view.map.shards:
        if view.map.sole_host is not None:
            return view.map.sole_host
        raise StaleShardMap(
            f"shard {shard!r} is not in the shard map (version {view.map.version})",
            hint="load the object again: its rows have moved",
        )
    return str(shard)


def load_with_token(
    session: Session,
    statement: Any,
    identity: Any,
    *,
    load_options: Any,
    identity_token: Any,
    execution_options: Any,
    bind_arguments: Any,
) -> Any:
    """SQLAlchemy's ``_load_on_pk_identity`` with load options that were made before."""
    if identity_token is not None and load_options is QueryContext.default_load_options:
        load_options, identity_token = load_options_of(identity_token)[LOAD_OPTIONS], None
    return loading._load_on_pk_identity(
        session,
        statement,
        identity,
        load_options=load_options,
        identity_token=identity_token,
        execution_options=execution_options,
        bind_arguments=bind_arguments,
    )
