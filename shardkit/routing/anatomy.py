"""A statement as it will be sent: what SQLAlchemy's compiler makes of it, clause by clause.

An ORM statement says little by itself: joined eager loads, inheritance, ``with_loader_criteria`` and the correlation of
subqueries are settled when it is compiled. So the statement is compiled once a shape, by a compiler that keeps what it
renders from: for every SELECT its FROM list and its clauses as Core elements. Nothing is read from the SQL text.

The hooks (``visit_select``, ``_compose_select_body``, ``visit_table``, the match of cache-key parameters to compiled
ones) are SQLAlchemy 2.1's; tests/unit/test_routing_anatomy.py pins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import RelationshipProperty
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.selectable import FromClause

if TYPE_CHECKING:
    _Compiler = SQLCompiler
else:
    _Compiler = object


@dataclass(frozen=True)
class SelectParts:
    """One SELECT, with the FROM list that is rendered (correlated tables taken out)."""

    select: sa.Select[Any]
    froms: tuple[FromClause, ...]
    #: The name in SQL and the expression of every column, in order.
    columns: tuple[tuple[str | None, ClauseElement], ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where the value of one bound parameter is found at execution, as the compiler would look it up.

    :param key: its name among the parameters given at execution.
    :param name: the name that the compiler gave it, under which it may be given too.
    :param position: its place among the parameters of the statement's cache key; None for a constant of the shape.
    """

    bind: BindParameter[Any]
    key: str
    name: str
    position: int | None


@dataclass(frozen=True)
class Anatomy:
    """What the compiler saw.

    :param statement: the outermost statement; UPDATE and DELETE in Core terms.
    :param froms: for UPDATE and DELETE, the tables besides the target.
    :param slots: bound parameter -> where its value is found.
    :param repeats: joined collections repeat the rows of an entity.
    :param collections: the relationships whose collections are made of joined rows.
    :param params: values given to ``statement.params()``, of a statement that has no cache key.
    :param tables: the name of every table rendered in a FROM, once an occurrence.
    """

    statement: Any
    froms: tuple[FromClause, ...]
    slots: Mapping[BindParameter[Any], Slot]
    params: Mapping[str, Any]
    repeats: bool
    collections: tuple[RelationshipProperty[Any], ...]
    tables: Sequence[str]
    _selects: Mapping[int, Sequence[SelectParts]] = field(repr=False)
    _kept: Sequence[object] = field(repr=False)  # keeps the ids above from being used again

    def selects(self) -> Sequence[object]:
        """Every SELECT that was rendered, as it stands in the statement."""
        return self._kept

    def parts_of(self, select: object) -> SelectParts | None:
        """What became of this SELECT; None where it was rendered in several ways, or not at all."""
        rendered = self._selects.get(id(select), ())
        first = rendered[0] if rendered else None
        if first is None or any(other.froms != first.froms for other in rendered[1:]):
            return None
        return first


class _Keeping(_Compiler):
    """Mixed into a dialect's compiler: keeps what it renders from."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.kept_selects: dict[int, list[SelectParts]] = {}
        self.kept_originals: list[object] = []
        self.kept_tables: list[str] = []
        self._being_rendered: list[object] = []
        super().__init__(*arguments, **options)

    def visit_select(self, select_stmt: Any, *arguments: Any, **options: Any) -> Any:
        self._being_rendered.append(select_stmt)
        try:
            return super().visit_select(select_stmt, *arguments, **options)  # type: ignore[no-untyped-call]
        finally:
            self._being_rendered.pop()

    def _compose_select_body(
        self,
        text: Any,
        select: Any,
        compile_state: Any,
        inner_columns: Any,
        froms: Any,
        *arguments: Any,
    ) -> Any:
        original = self._being_rendered[-1]
        columns = tuple((name, column) for name, _, _, column, _ in compile_state.columns_plus_names)
        self.kept_selects.setdefault(id(original), []).append(SelectParts(select, tuple(froms), columns))
        self.kept_originals.append(original)
        return super()._compose_select_body(  # type: ignore[no-untyped-call]
            text, select, compile_state, inner_columns, froms, *arguments
        )

    def visit_table(self, table: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("asfrom"):
            self.kept_tables.append(table.fullname)
        return super().visit_table(table, *arguments, **options)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=8)
def dialect_of(name: str) -> Dialect:
    """An unconnected dialect that compiles what the real one would.

    :param name: ``mysql``, ``mariadb`` or ``sqlite``.
    """
    # what MariaDB takes includes what MySQL takes; what the server refuses, it refuses itself
    made: Dialect = sqlite.dialect() if name == "sqlite" else mysql.dialect(is_mariadb=True)
    made.statement_compiler = type("Keeping", (_Keeping, made.statement_compiler), {})
    return made


def anatomy_of(
    statement: Executable,
    dialect: Dialect,
    *,
    cache_key: CacheKey | None = None,
    column_keys: Iterable[str] = (),
    executemany: bool = False,
) -> Anatomy:
    """Compile a statement and keep what it was rendered from.

    :param dialect: one of `dialect_of`.
    :param cache_key: the statement's; it links each bound parameter to its place in other statements of this shape.
    :param column_keys: the names of the parameters given at execution (they set columns in an UPDATE).
    :raises sqlalchemy.exc.CompileError: for a statement that cannot be executed either.
    """
    compiler: Any = dialect.statement_compiler(
        dialect,
        statement,  # type: ignore[arg-type]
        cache_key=cache_key,
        column_keys=list(column_keys) or None,
        for_executemany=executemany,
    )
    places = {} if cache_key is None else _places(compiler, cache_key)
    slots = {
        bind: Slot(bind, bind.key, name, places.get(bind))
        for bind, name in compiler.bind_names.items()
        if isinstance(bind, BindParameter)
    }
    state = compiler.compile_state
    return Anatomy(
        statement=state.statement if isinstance(statement, sa.Update | sa.Delete) else statement,
        froms=tuple(getattr(state, "_extra_froms", None) or ()),
        slots=slots,
        params=dict(compiler._collected_params) if compiler._collect_params else {},  # noqa: SLF001 - where the compiler keeps what params() was given
        repeats=bool(getattr(state, "multi_row_eager_loaders", False)),
        collections=_collections(getattr(state, "attributes", None) or {}),
        tables=compiler.kept_tables,
        _selects=compiler.kept_selects,
        _kept=compiler.kept_originals,
    )


def _collections(attributes: Mapping[Any, Any]) -> tuple[RelationshipProperty[Any], ...]:
    """:param attributes: what the ORM's compilation has noted, by kind and path."""
    paths = (key[1] for key in attributes if isinstance(key, tuple) and key[0] in _EAGER)
    last = ([each for each in path if isinstance(each, RelationshipProperty)][-1:] for path in paths)
    return tuple(dict.fromkeys(each for some in last for each in some if each.uselist))


#: joinedload() and contains_eager() of an alias, and contains_eager() of the class itself.
_EAGER = frozenset({"eager_row_processor", "user_defined_eager_row_processor"})


def _places(compiler: SQLCompiler, cache_key: CacheKey) -> Mapping[BindParameter[Any], int]:
    matched = compiler._cache_key_bind_match  # noqa: SLF001 - what construct_params() fills parameters from
    if matched is None:
        return {}
    rendered, _ = matched
    return {bind: place for place, original in enumerate(cache_key.bindparams) for bind in rendered.get(original, ())}
