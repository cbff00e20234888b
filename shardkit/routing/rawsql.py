"""Plain raw SQL -> a SELECT on the same tables under the same conditions, to find out where it belongs.

The text itself is sent as it is, to one shard. So only what decides over rows has to be understood (FROM, ON, WHERE),
and what is not understood there says nothing: it pins no key. Text that two parsers could read differently is not read
at all: comments (the servers execute some of them), double quotes, backslashes and ``||``, whose meaning depends on
``sql_mode``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
import sqlglot
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.selectable import FromClause
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine
from sqlglot import exp
from sqlglot.errors import SqlglotError

from shardkit.routing.keyvalues import stored_type
from shardkit.shardmap import ShardMap

#: Table name -> the table as the application declares it; None where it is not known.
Tables = Callable[[str], sa.Table | None]


def no_tables(_name: str) -> sa.Table | None:
    """For those who do not know the application's tables."""
    return None


_AMBIGUOUS: Final = re.compile(r"/\*|--|#|\"|\\|\|\||&&|:=")
_MOST_CHARACTERS: Final = 20_000
_SELECT_PARTS: Final = frozenset(
    {"expressions", "from", "from_", "joins", "where"}
    | {"group", "having", "order", "limit", "offset", "distinct", "locks"}
)
_CHANGE_PARTS: Final = frozenset({"this", "expressions", "where", "order", "limit"})
_TABLE_PARTS: Final = frozenset({"this", "alias"})
_JOIN_PARTS: Final = frozenset({"this", "on", "side", "kind"})
_COMPARISONS: Final[Mapping[type[exp.Expression], Callable[[Any, Any], ColumnElement[bool]]]] = {
    exp.EQ: lambda left, right: left == right,
    exp.LT: lambda left, right: left < right,
    exp.LTE: lambda left, right: left <= right,
    exp.GT: lambda left, right: left > right,
    exp.GTE: lambda left, right: left >= right,
}


@dataclass(frozen=True)
class RawStatement:
    """What raw SQL is about.

    :param source: its tables; of an INSERT the one that it writes to.
    :param condition: what its rows fulfil; None for all of them.
    :param changes: the table that it changes; None for a SELECT.
    :param assigned: the columns that it assigns, by name.
    :param inserted: the rows that an INSERT writes, as far as their key is concerned; empty for other statements.
    """

    source: Any
    condition: ColumnElement[bool] | None = None
    changes: str | None = None
    assigned: tuple[str, ...] = ()
    inserted: tuple[Mapping[str, Any], ...] = ()

    @property
    def select(self) -> sa.Select[Any]:
        """Reads the rows that it reads or changes."""
        select = sa.select(sa.literal(1)).select_from(self.source)
        return select if self.condition is None else select.where(self.condition)


class _NotPlain(Exception):
    """The text is not one that can be read for certain."""


def read_raw(
    text: str, binds: Mapping[str, sa.BindParameter[Any]], shard_map: ShardMap, tables: Tables, dialect: Dialect
) -> RawStatement | None:
    """Read raw SQL; None where it is not plain: several statements, subqueries, CTEs, UNION, upserts, ...

    :param binds: the text's parameters, by name.
    """
    if len(text) > _MOST_CHARACTERS or _AMBIGUOUS.search(text):
        return None
    try:
        parsed = sqlglot.parse(text, dialect="sqlite" if dialect.name == "sqlite" else "mysql")
    except (SqlglotError, RecursionError):
        return None
    if len(parsed) != 1:
        return None
    try:
        return _Reading(binds, shard_map, tables, dialect).statement(parsed[0])
    except _NotPlain:
        return None


class _Reading:
    def __init__(
        self, binds: Mapping[str, sa.BindParameter[Any]], shard_map: ShardMap, tables: Tables, dialect: Dialect
    ) -> None:
        self._binds = binds
        self._map = shard_map
        self._tables = tables
        self._dialect = dialect
        self._sources: dict[str, FromClause] = {}

    def statement(self, root: Any) -> RawStatement:
        if isinstance(root, exp.Insert):
            return self._insert(root)
        if not isinstance(root, exp.Select | exp.Update | exp.Delete):
            raise _NotPlain
        if len(list(root.find_all(exp.Query))) != isinstance(root, exp.Select):  # a subquery, wherever it stands
            raise _NotPlain
        if isinstance(root, exp.Select):
            _only(root, _SELECT_PARTS)
            return RawStatement(self._from(root), self._where(root))
        _only(root, _CHANGE_PARTS)
        source = self._table(root.this)
        assigned = []
        for each in root.expressions if isinstance(root, exp.Update) else ():
            if not isinstance(each, exp.EQ) or not isinstance(each.this, exp.Column):
                raise _NotPlain
            assigned.append(each.this.name)
        return RawStatement(source, self._where(root), root.this.name, tuple(assigned))

    def _insert(self, root: exp.Insert) -> RawStatement:
        _only(root, frozenset({"this", "expression"}))  # no IGNORE, no ON DUPLICATE KEY UPDATE
        schema, values = root.this, root.expression
        if not isinstance(schema, exp.Schema) or not isinstance(values, exp.Values) or root.find(exp.Query):
            raise _NotPlain
        source = self._table(schema.this)
        if not all(isinstance(each, exp.Identifier) for each in schema.expressions):
            raise _NotPlain
        columns = [each.name.lower() for each in schema.expressions]
        info = self._map.tables.get(schema.this.name)
        keys = {} if info is None else {name.lower(): name for name in info.key}
        rows = []
        for row in values.expressions:
            if not isinstance(row, exp.Tuple) or len(row.expressions) != len(columns):
                raise _NotPlain
            given = zip(columns, row.expressions, strict=True)
            rows.append({keys[name]: self._key_value(value) for name, value in given if name in keys})
        return RawStatement(source, changes=schema.this.name, inserted=tuple(rows))

    def _key_value(self, node: Any) -> Any:
        if isinstance(node, exp.Null):
            return None
        value = self._value(node)
        if value is None:
            raise _NotPlain
        return value

    def _where(self, root: exp.Expression) -> ColumnElement[bool] | None:
        """The condition of a statement whose tables have been read."""
        where = root.args.get("where")
        return None if where is None else self._condition(where.this)

    # --- FROM

    def _from(self, root: exp.Select) -> FromClause:
        first = root.args.get("from_") or root.args.get("from")
        if first is None:
            raise _NotPlain
        source = self._table(first.this)
        for join in root.args.get("joins") or ():
            _only(join, _JOIN_PARTS)
            side, kind, on = (join.args.get(name) for name in ("side", "kind", "on"))
            other = self._table(join.this)
            if str(side or "").upper() not in {"", "LEFT"} or str(kind or "").upper() not in {
                "",
                "INNER",
                "CROSS",
                "OUTER",
            }:
                raise _NotPlain
            condition = sa.true() if on is None else self._condition(on)
            source = source.join(other, condition, isouter=bool(side))
        return source

    def _table(self, node: Any) -> FromClause:
        if not isinstance(node, exp.Table) or not isinstance(node.this, exp.Identifier):
            raise _NotPlain
        _only(node, _TABLE_PARTS)
        alias = node.alias or node.name
        if alias.lower() in self._sources or (node.args.get("alias") and node.args["alias"].args.get("columns")):
            raise _NotPlain
        clause: FromClause = sa.table(node.name, *self._columns(node.name))
        if node.alias:
            clause = clause.alias(node.alias)
        self._sources[alias.lower()] = clause
        return clause

    def _columns(self, name: str) -> Iterator[sa.ColumnClause[Any]]:
        declared = self._tables(name)
        if declared is not None:
            for column in declared.c:
                yield sa.column(column.name, _plain_type(column.type, self._dialect))
            return
        for key in self._map.tables[name].key if name in self._map.tables else ():
            yield sa.column(key, NullType())

    # --- conditions

    def _condition(self, node: Any) -> ColumnElement[bool]:
        match node:
            case exp.Paren():
                return self._condition(node.this)
            case exp.And():
                return sa.and_(self._condition(node.this), self._condition(node.expression))
            case exp.Or():
                return sa.or_(self._condition(node.this), self._condition(node.expression))
            case exp.In():
                return self._in(node)
            case exp.Between():
                column, low, high = (
                    self._column(node.this),
                    self._value(node.args["low"]),
                    self._value(node.args["high"]),
                )
                return _unknown() if column is None or low is None or high is None else column.between(low, high)
            case exp.Is() if isinstance(node.expression, exp.Null):
                column = self._column(node.this)
                return _unknown() if column is None else column.is_(None)
            case _ if type(node) in _COMPARISONS:
                return self._comparison(node)
            case _:
                return _unknown()

    def _comparison(self, node: Any) -> ColumnElement[bool]:
        left, right = (self._operand(each) for each in (node.this, node.expression))
        return _unknown() if left is None or right is None else _COMPARISONS[type(node)](left, right)

    def _in(self, node: exp.In) -> ColumnElement[bool]:
        column = self._column(node.this)
        values = [self._value(each) for each in node.expressions]
        _only(node, frozenset({"this", "expressions"}))
        known = column is not None and values and all(value is not None for value in values)
        return column.in_(values) if known else _unknown()

    def _operand(self, node: Any) -> Any:
        column = self._column(node)
        return self._value(node) if column is None else column

    def _column(self, node: Any) -> Any:
        """The column that is meant; None for what is no plain column of one certain table."""
        if not isinstance(node, exp.Column) or node.args.get("db") or not isinstance(node.this, exp.Identifier):
            return None
        if node.table:
            source = self._sources.get(node.table.lower())
            candidates = [] if source is None else [source]
        else:
            candidates = list(self._sources.values())
            if len(candidates) > 1 and any(self._tables(_name(each)) is None for each in candidates):
                return None  # nobody knows whose column it is
        found = [column for each in candidates for column in each.c if column.name.lower() == node.name.lower()]
        return found[0] if len(found) == 1 else None

    def _value(self, node: Any) -> Any:
        """A value that is sent as it is written; None for everything else."""
        match node:
            case exp.Literal() if node.is_string:
                return sa.literal(node.this, sa.String())
            case exp.Literal() if re.fullmatch(r"[0-9]{1,19}", node.this):
                return sa.literal(int(node.this), sa.BigInteger())
            case exp.Neg() if isinstance(node.this, exp.Literal) and re.fullmatch(r"[0-9]{1,19}", node.this.this):
                return None if node.this.is_string else sa.literal(-int(node.this.this), sa.BigInteger())
            case exp.Placeholder() if node.name in self._binds:
                bind = self._binds[node.name]
                if bind.expanding:
                    return None
                if bind.required:
                    return sa.bindparam(node.name, type_=bind.type, required=True)
                return sa.bindparam(node.name, bind.effective_value, type_=bind.type)
            case _:
                return None


def _only(node: exp.Expression, parts: frozenset[str]) -> None:
    if any(value and name not in parts for name, value in node.args.items()):
        raise _NotPlain


def _name(clause: Any) -> str:
    return str(getattr(clause, "element", clause).name)


def _unknown() -> ColumnElement[bool]:
    """A condition that says nothing of any column."""
    return sa.literal(1) == sa.literal(1)


def _plain_type(declared: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """A type whose values are written in SQL as they are stored; for others, one that pins nothing."""
    stored = stored_type(declared, dialect)
    plain = isinstance(stored, sa.Integer) or (isinstance(stored, sa.String) and not isinstance(stored, sa.Enum))
    return stored if plain and not isinstance(declared, TypeDecorator) else NullType()
