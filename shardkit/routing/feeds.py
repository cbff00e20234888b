"""Subqueries that are read before the statement around them: their rows may stand on other shards than its own.

``orders.user_id IN (SELECT id FROM users WHERE ...)`` cannot be pushed down where users and orders are not tied by
their keys. As long as such a subquery says nothing of the rows around it, it has one result, and that result can be
put in its place: a list of values for IN, true or false for EXISTS, one value for a comparison. Only where the server
would compare a value as it compares the column that it came from.

What a subquery is correlated to is settled when SQLAlchemy compiles it, so that is what is compared: the FROM lists of
the subquery inside its statement, and alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import lazyload
from sqlalchemy.orm.util import LoaderCriteriaOption
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BooleanClauseList,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    Grouping,
    Label,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement, count
from sqlalchemy.sql.selectable import CompoundSelect, Exists, Join, ScalarSelect, SelectStatementGrouping
from sqlalchemy.types import TypeEngine

from shardkit.errors import RoutingError
from shardkit.partition import KeyType, key_type_of
from shardkit.routing.anatomy import anatomy_of
from shardkit.routing.keyvalues import sends_alike, stored_type

if TYPE_CHECKING:
    from shardkit.routing.route import Route

#: The values of a subquery that are put into a statement; more would make a statement of more than a megabyte.
MOST_VALUES: Final = 10_000

#: Makes the condition that takes the place of the one with the subquery, from the subquery's values.
_Replacing: TypeAlias = Callable[[Sequence[Any]], ColumnElement[bool]]

#: Stands for a value that is not known yet. It pins nothing: no column stores it.
_UNKNOWN: Final = object()

_COMPARISONS: Final = frozenset({operators.eq, operators.ne, operators.lt, operators.le, operators.gt, operators.ge})
_MIRRORED: Final[Mapping[Any, Any]] = {
    operators.eq: operators.eq,
    operators.ne: operators.ne,
    operators.lt: operators.gt,
    operators.le: operators.ge,
    operators.gt: operators.lt,
    operators.ge: operators.le,
}
#: Aggregates whose value is exactly one that their column could hold, or an exact number.
_EXACT_AGGREGATES: Final = frozenset({"max", "min", "sum", "count"})


@dataclass(frozen=True)
class Feed:
    """A subquery that runs first.

    :param statement: what is run: a SELECT of one column.
    :param single: one row is wanted, and two are an error.
    :param purpose: what becomes of its values, for `explain`.
    :param condition: where it stands.
    :param replacing: makes what stands there once its values are known.
    :param assumed: what stands there while a plan is made without them.
    """

    statement: sa.Select[Any]
    single: bool
    purpose: str
    condition: ClauseElement
    replacing: _Replacing
    assumed: ColumnElement[bool]

    def values_of(self, found: Iterable[Any]) -> list[Any]:
        """The values of its result, each of them once.

        :raises RoutingError: when they are too many.
        """
        values: dict[Any, Any] = {}
        for number, value in enumerate(found):
            try:
                values[value] = value
            except TypeError:  # a type of the application's makes lists, say: each counts for itself
                values[_Row(number)] = value
            if self.single and number:
                raise RoutingError(
                    f"a subquery that runs first ({self.purpose}) gave more than one row",
                    hint="give it a condition that one row fulfils, or use IN",
                )
            if len(values) > MOST_VALUES:
                raise RoutingError(
                    f"a subquery that runs first ({self.purpose}) gave more than {MOST_VALUES:,} values",
                    hint="narrow it, or tie it to the statement around it by their keys, so that it runs on each shard",
                )
        return list(values.values())


class _Row(NamedTuple):
    """Stands for a value that cannot be told from others by its hash."""

    number: int


@dataclass(frozen=True)
class Feeding:
    """A statement whose subqueries run first.

    :param feeds: the subqueries.
    :param routes: where each of them runs.
    """

    statement: Any
    feeds: tuple[Feed, ...]
    routes: tuple[Route, ...] = ()

    def fed(self, answers: Sequence[Sequence[Any]]) -> Any:
        """The statement with each subquery's values in its place."""
        return self._with(
            {id(feed.condition): feed.replacing(values) for feed, values in zip(self.feeds, answers, strict=True)}
        )

    def assumed(self) -> Any:
        """The statement as it would be planned for values that pin nothing."""
        return self._with({id(feed.condition): feed.assumed for feed in self.feeds})

    def _with(self, instead: Mapping[int, ColumnElement[bool]]) -> Any:
        return _rebuilt(self.statement, lambda condition: _replaced(condition, instead))


def feeding_of(statement: Any, names: Sequence[str], dialect: Dialect, *, locked: bool) -> Feeding | None:
    """Find the subqueries in a WHERE, and EXISTS asked for as columns, that can run before the statement; None where
    there are none.

    :param names: the names of the parameters that it is executed with.
    :param locked: the statement changes rows by what its subqueries say, so what they read must stay as it is.
    """
    finder = _Finder(statement, names, dialect, locked=locked)
    feeds = tuple(finder.feeds())
    return Feeding(statement, feeds) if feeds else None


# --- finding them ------------------------------------------------------------------------------------------------


class _Finder:
    def __init__(self, statement: Any, names: Sequence[str], dialect: Dialect, *, locked: bool) -> None:
        self._statement = statement
        self._dialect = dialect
        self._locked = locked
        changes = isinstance(statement, sa.Update | sa.Delete)
        self._around = anatomy_of(statement, dialect, column_keys=names if changes else ())
        self._criteria = [each for single in (statement, *_singles(statement)) for each in _criteria(single)]

    def feeds(self) -> Iterator[Feed]:
        for single in _singles(self._statement):
            for condition in single._where_criteria:  # noqa: SLF001 - whereclause joins them into one
                for part in _parts(condition):
                    feed = self._feed(part)
                    if feed is not None:
                        yield feed
            yield from self._answers(single)

    def _answers(self, single: Any) -> Iterator[Feed]:
        """What ``select(exists(...))`` and ``Query.exists()`` ask: EXISTS as a column, beside no table."""
        if not isinstance(single, sa.Select) or single._order_by_clauses or single._group_by_clauses:  # noqa: SLF001 - no public reader
            return
        around = self._around.parts_of(single)
        if around is None or around.froms:
            return
        for column in single._raw_columns:  # noqa: SLF001
            for part in _parts(column):
                feed = self._existence(part) if isinstance(part, Exists) else None
                if feed is not None:
                    yield feed

    def _feed(self, part: ClauseElement) -> Feed | None:
        if isinstance(part, Exists):
            return self._existence(part)
        if not isinstance(part, BinaryExpression):
            return None
        if part.operator in {operators.in_op, operators.not_in_op}:
            return self._list(part)
        if part.operator in _COMPARISONS:
            return self._comparison(part, part.left, part.right, part.operator) or self._comparison(
                part, part.right, part.left, _MIRRORED[part.operator]
            )
        return None

    def _existence(self, part: Exists) -> Feed | None:
        select = self._free(part.element, _for_existence)
        if select is None:
            return None
        if not select._has_row_limiting_clause:  # noqa: SLF001 - no public reader
            select = select.limit(1)
        return Feed(select, False, "EXISTS", part, lambda values: sa.true() if values else sa.false(), sa.true())

    def _list(self, part: BinaryExpression[Any]) -> Feed | None:
        select = self._free(part.right)
        column = None if select is None else _only_column(select)
        if select is None or column is None or not self._alike(column, part.left):
            return None
        operator = "IN" if part.operator is operators.in_op else "NOT IN"

        def replacing(values: Sequence[Any], column_type: TypeEngine[Any] = column.type) -> ColumnElement[bool]:
            given: Any = sa.bindparam(None, list(values), type_=column_type, expanding=True)
            given.expand_op = part.operator  # what in_() does, without a type's own idea of in_()
            return BinaryExpression(part.left, given, part.operator, type_=part.type, negate=part.negate)

        purpose = f"{_said(part.left)}{operator} its values"
        return Feed(select, False, purpose, part, replacing, replacing([_UNKNOWN], sa.types.NULLTYPE))

    def _comparison(self, part: ClauseElement, left: Any, right: Any, operator: Any) -> Feed | None:
        select = self._free(right)
        column = None if select is None else _only_column(select)
        if select is None or column is None or not self._alike(column, left):
            return None

        def replacing(values: Sequence[Any], column_type: TypeEngine[Any] = column.type) -> ColumnElement[bool]:
            value = sa.bindparam(None, values[0] if values else None, type_=column_type)
            return BinaryExpression(left, value, operator, type_=sa.Boolean())

        purpose = f"{_said(left)}compared with its value"
        return Feed(select, True, purpose, part, replacing, replacing([_UNKNOWN], sa.types.NULLTYPE))

    # --- what may be taken out

    def _free(self, element: Any, made: Callable[[Any], Any] = lambda select: select) -> sa.Select[Any] | None:
        """A subquery's SELECT, made to run alone, where it says nothing of the rows around it."""
        while isinstance(element, Grouping):
            element = element.element
        inner = element.element if isinstance(element, ScalarSelect) else None
        if not isinstance(inner, sa.Select):
            return None
        select: sa.Select[Any] = made(inner)
        alone = anatomy_of(select, self._dialect)
        for each in alone.selects():
            here, itself = self._around.parts_of(inner if each is select else each), alone.parts_of(each)
            if here is None or itself is None or _leaves(here.froms) != _leaves(itself.froms):
                return None
        if self._criteria:
            select = select.options(*self._criteria)
        for outer in (*reversed(list(_singles(self._statement))), self._statement):
            if given := getattr(outer, "_params", None):  # what params() has said holds for subqueries, too
                select = select.params(**given)
        return select.with_for_update(read=True) if self._locked else select

    def _alike(self, inner: ColumnElement[Any], outer: ColumnElement[Any]) -> bool:
        """Whether a value of the one is compared with the other as their columns are compared."""
        if not (_exact(inner) and sends_alike(inner.type, outer.type)):
            return False
        kinds = [self._kind(each.type) for each in (inner, outer)]
        if None in kinds:
            return False
        if KeyType.STRING in kinds:
            plain = all(isinstance(_plain(each), ColumnClause) for each in (inner, outer))
            return plain and kinds[0] == kinds[1] and self._collation(inner) == self._collation(outer)
        return True

    def _kind(self, column_type: TypeEngine[Any]) -> KeyType | None:
        """The kind of a type whose values come back and are sent again as they are; None for others."""
        stored = stored_type(column_type, self._dialect)
        if isinstance(stored, mysql.SET):
            return None  # a set of words, which sorts and compares as a number
        kind = KeyType.STRING if isinstance(stored, sa.Enum) else key_type_of(stored)
        server = self._dialect.name != "sqlite"
        if kind is KeyType.DECIMAL and not (server and getattr(stored, "asdecimal", True)):
            return None  # a REAL's digits do not all come back, nor do those of a DECIMAL that is made a float
        if isinstance(stored, sa.TIMESTAMP) and server:
            return None  # the hour that a clock runs through twice
        return kind

    def _collation(self, column: ColumnElement[Any]) -> str | None:
        """As far as it is declared; what is not declared is taken to be the database's own."""
        declared: str | None = getattr(stored_type(column.type, self._dialect), "collation", None)
        table: Any = getattr(_plain(column), "table", None)
        while declared is None and table is not None and not isinstance(table, sa.Table):
            table = getattr(table, "element", None)
        if declared is None and table is not None:
            options = table.dialect_kwargs
            declared = options.get("mysql_collate") or options.get("mariadb_collate")
        return declared


def _singles(statement: Any) -> Iterator[Any]:
    """The statement, or the SELECTs that a UNION is made of."""
    match statement:
        case CompoundSelect():
            for each in statement.selects:
                yield from _singles(each)
        case SelectStatementGrouping():
            yield from _singles(statement.element)
        case _:
            yield statement


def _rebuilt(statement: Any, change: Callable[[Any], Any]) -> Any:
    """A statement whose `_singles` have other conditions, and columns."""
    match statement:
        case SelectStatementGrouping():
            return SelectStatementGrouping(_rebuilt(statement.element, change))
        case CompoundSelect():
            changed = statement._generate()  # noqa: SLF001 - what every method of a statement begins with
            changed.selects = [_rebuilt(each, change) for each in statement.selects]
        case _:
            changed = statement._generate()  # noqa: SLF001
            changed._where_criteria = tuple(change(each) for each in statement._where_criteria)  # noqa: SLF001
            if isinstance(statement, sa.Select):
                changed._raw_columns = _renewed(statement, change)  # noqa: SLF001
    return changed


def _renewed(select: sa.Select[Any], change: Callable[[Any], Any]) -> list[Any]:
    """A SELECT's columns, those that change under the names that SQLAlchemy gives them."""
    before: list[Any] = select._raw_columns  # noqa: SLF001 - no public reader
    after = [change(each) for each in before]
    if all(new is old for new, old in zip(after, before, strict=True)):
        return after
    compiled: Any = select.compile()
    names = [column.keyname for column in compiled._result_columns]  # noqa: SLF001 - no public reader
    triples = zip(after, before, names, strict=True)
    return [new if new is old or isinstance(new, Label) else Label(name, new) for new, old, name in triples]


def _parts(condition: Any) -> Iterator[ClauseElement]:
    """What a condition, or a column, is put together from by AND, OR and NOT."""
    match condition:
        case BooleanClauseList():
            for each in condition.clauses:
                yield from _parts(each)
        case Grouping() | Label():
            yield from _parts(condition.element)
        case UnaryExpression() if condition.operator is operators.inv:
            yield from _parts(condition.element)
        case _:
            yield condition


def _replaced(condition: Any, instead: Mapping[int, ColumnElement[bool]]) -> Any:
    """A condition with some of its `_parts` replaced."""
    if id(condition) in instead:
        return instead[id(condition)]
    if not any(id(each) in instead for each in _parts(condition)):
        return condition
    match condition:
        case BooleanClauseList():
            join = sa.and_ if condition.operator is operators.and_ else sa.or_
            return join(*(_replaced(each, instead) for each in condition.clauses))
        case Grouping():
            return _replaced(condition.element, instead)
        case Label():
            return Label(condition.name, _replaced(condition.element, instead))
        case UnaryExpression() if condition.operator is operators.inv:
            return sa.not_(_replaced(condition.element, instead))
        case _:
            return condition


def _leaves(froms: Iterable[Any]) -> frozenset[Any]:
    return frozenset(each for clause in froms for each in clause._from_objects if not isinstance(each, Join))  # noqa: SLF001 - what a Select itself reads


def _criteria(statement: Any) -> list[LoaderCriteriaOption]:
    """What with_loader_criteria() has added: it holds for subqueries, too."""
    options = getattr(statement, "_with_options", ())  # no public reader; INSERT and the like have none
    return [each for each in options if isinstance(each, LoaderCriteriaOption)]


def _for_existence(select: Any) -> Any:
    """A SELECT that has rows where this one has."""
    columns = select._raw_columns  # noqa: SLF001 - as written: an entity is one
    if len(columns) == 1 and isinstance(columns[0], ColumnClause) and columns[0].name in {"*", "1"}:
        # what exists().where(...) and Query.exists() make
        return select.with_only_columns(sa.literal(1), maintain_column_froms=True)
    if all(isinstance(each, ColumnElement) for each in columns):
        return select
    bare = select._generate()  # noqa: SLF001
    bare._with_options = tuple(_criteria(select))  # noqa: SLF001 - options can be added, and not taken away
    return bare.options(lazyload("*"))  # collections would be loaded with the objects


def _only_column(select: sa.Select[Any]) -> ColumnElement[Any] | None:
    columns = list(select.selected_columns)
    only = columns[0] if len(columns) == 1 else None
    return only if isinstance(only, ColumnElement) else None


def _plain(column: Any) -> Any:
    while isinstance(column, Label | Grouping):
        column = column.element
    return column


def _exact(column: Any) -> bool:
    """Whether what a client is told of a value is all of it: an AVG has more digits on the server."""
    column = _plain(column)
    if isinstance(column, FunctionElement):
        name = getattr(column, "name", "").lower()
        arguments = list(column.clauses)
        counted = isinstance(column, count)
        return name in _EXACT_AGGREGATES and (counted or (len(arguments) == 1 and _exact(arguments[0])))
    return isinstance(column, ColumnClause) and not column.is_literal


def _said(column: Any) -> str:
    column = _plain(column)
    if not isinstance(column, ColumnClause):
        return ""
    table = getattr(column.table, "name", None)
    return f"{table}.{column.name} " if table else f"{column.name} "
