"""Rows of reference tables: what each shard would make up for itself is made up once, for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from sqlalchemy import Column
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.sql.elements import ClauseElement

from shardkit.errors import MissingKey, RoutingError
from shardkit.routing.inserts import changed_by_server, check_same_everywhere, is_constant
from shardkit.routing.rows import attribute_of
from shardkit.shardmap import TableInfo


def missing_values(
    mapper: Mapper[Any], info: TableInfo, values: Mapping[str, Any], *, nulls: bool = False
) -> dict[str, Any]:
    """What a new row lacks of the values that Python makes up by default.

    :param values: the row's, by attribute.
    :param nulls: whether None is sent as NULL, where the ORM would leave the column to its default.
    :raises RoutingError: for a value that each shard would choose by itself.
    :raises MissingKey: for a default that cannot be computed here.
    """
    check_same_everywhere(values.values(), info)
    found: dict[str, Any] = {}
    for column, attribute in _columns(mapper):
        given = attribute is not None and attribute in values
        if given and (values[str(attribute)] is not None or nulls or column.type.should_evaluate_none):
            continue
        default = column.default
        if default is not None and default.is_callable and attribute is not None:
            found.setdefault(attribute, computed(column, default))
        elif not (is_constant(column.server_default) if default is None else default.is_scalar):
            raise _chosen_by_each(info, column)
    return found


def touched_values(mapper: Mapper[Any], info: TableInfo, changed: Mapping[str, Any]) -> dict[str, Any]:
    """What an UPDATE of these attributes sets besides, by ``onupdate`` in Python.

    :param changed: the new values, by attribute.
    :raises RoutingError: for a value that each shard would choose by itself.
    :raises MissingKey: for a value that cannot be computed here.
    """
    check_same_everywhere(changed.values(), info)
    tables = {column.table for column, attribute in _columns(mapper) if attribute in changed}
    found: dict[str, Any] = {}
    for column, attribute in _columns(mapper):
        default = column.onupdate
        if attribute in changed or column.table not in tables:
            continue
        if default is None and changed_by_server(column):
            raise _chosen_by_each(info, column)
        if default is None or default.is_scalar:
            continue
        if not default.is_callable or attribute is None:
            raise _chosen_by_each(info, column)
        found.setdefault(attribute, computed(column, default))
    return found


def touches(mapper: Mapper[Any]) -> bool:
    """Whether an UPDATE may set columns besides those that it is given, each shard by itself."""
    return any(
        changed_by_server(column) or (column.onupdate is not None and not column.onupdate.is_scalar)
        for column, _ in _columns(mapper)
    )


def changed_values(state: InstanceState[Any]) -> dict[str, Any]:
    """The attributes of an object that an UPDATE would set, with their new values."""
    columns: Collection[str] = state.mapper.column_attrs.keys()
    now = state.dict
    return {
        name: now[name]
        for name, old in state.committed_state.items()
        if name in columns and name in now and _differ(old, now[name])
    }


def computed(column: Column[Any], default: Any) -> Any:
    """The value of a default that is a Python function.

    :raises MissingKey: when it asks for the statement that it is computed for.
    """
    try:
        return default.arg(None)
    except Exception as error:
        raise MissingKey(
            f"the default of {column} cannot be computed before its row is sent to every shard: {error}",
            hint="give the value, or use a default without a context",
        ) from error


def _differ(old: Any, new: Any) -> bool:
    try:
        return isinstance(new, ClauseElement) or bool(old != new)
    except (TypeError, ValueError):
        return True


def _columns(mapper: Mapper[Any]) -> Iterator[tuple[Column[Any], str | None]]:
    for table in mapper.tables:
        for column in table.columns:
            if isinstance(column, Column):
                yield column, attribute_of(mapper, column)


def _chosen_by_each(info: TableInfo, column: Column[Any]) -> RoutingError:
    return RoutingError(
        f"{info.name} is a reference table, and each shard would choose its own {column.name}",
        hint=f"give {column.key}=...",
        table=info.name,
        shards=len(info.shards),
    )
