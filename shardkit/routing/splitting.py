"""A SELECT over several shards -> what each shard runs, and how the rows are merged.

The statement's own columns stay as they are and where they are; hidden columns are added behind them. So an ORM
statement still makes its objects, and the result's names are the statement's own.
"""

from __future__ import annotations

import operator as python_operators
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ClauseElement,
    ColumnElement,
    Null,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from shardkit.errors import RoutingError
from shardkit.routing.conditions import Binds
from shardkit.routing.expressions import contents_of, is_distinct
from shardkit.routing.merge import Aggregate, Combine, Groups, Having, MergePlan
from shardkit.routing.queries import Occurrence, Query
from shardkit.routing.shapes import Shape
from shardkit.routing.sorting import Comparison, SortKey, bare, raw, sort_column
from shardkit.routing.spread import Refused


@dataclass(frozen=True)
class SplitContext:
    """What splitting a statement needs to know besides it.

    :param query: its top level, LIMIT and OFFSET taken off, as it is kept for its shape.
    :param repeated: where joined eager loads repeat the rows that LIMIT counts: the tables that those rows are made of.
    :param own: the shape of this very statement: its elements may be put into it.
    :param keyed_groups: groups do not stand on two shards.
    :param keyed_rows: equal rows of the result do not stand on two shards.
    """

    query: Query
    repeated: Callable[[], Sequence[Occurrence]] | None
    own: Callable[[], Shape]
    binds: Binds
    dialect: Dialect
    keyed_groups: bool
    keyed_rows: bool


def merge_plan(statement: sa.Select[Any], context: SplitContext) -> MergePlan:
    """How a SELECT runs over several shards.

    :raises Refused: when its result cannot be put together from theirs.
    """
    return _Splitting(statement, context).plan()


@dataclass
class _Splitting:
    statement: sa.Select[Any]
    context: SplitContext
    hidden: list[ColumnElement[Any]] = field(default_factory=list)

    def plan(self) -> MergePlan:
        query = self.context.query
        if query.windows:
            raise _refused("a window function over several shards")
        self._check_columns()
        limit, offset = self._cut()
        if query.collapses or (query.grouped and not self.context.keyed_groups):
            return self._grouped(limit, offset)
        distinct = self._distinct() if query.distinct and not self.context.keyed_rows else ()
        order = tuple(self._order(each) for each in self._order_by())
        if self.context.repeated is not None:
            self._hide_identity(self.context.repeated())
        split = self._with_hidden(self.statement)
        if any(key.comparison is Comparison.WEIGHTS for key in distinct):
            # texts that are equal may have other bytes ('a' and 'a '): a shard's LIMIT would count them twice
            return MergePlan(split.limit(None).offset(None), self._visible, order, distinct, None, limit, offset)
        if limit is not None or offset:
            split = split.limit(None if limit is None else limit + offset).offset(None)
        repeated = self.context.repeated is not None
        return MergePlan(split, self._visible, order, distinct, None, limit, offset, unique=repeated)

    # --- columns

    @property
    def _visible(self) -> int:
        return len(self.statement.column_descriptions)

    def _check_columns(self) -> None:
        for column in self.statement._raw_columns:  # noqa: SLF001 - no public reader
            if getattr(column, "is_literal", False) and "*" in getattr(column, "name", ""):
                raise _refused("SELECT * as raw SQL over several shards: the number of its columns is not known")
            if isinstance(column, sa.TextClause):
                raise _refused("a column of raw SQL over several shards: it may be more than one column")

    def _hide(self, column: ColumnElement[Any]) -> int:
        """Add a hidden column; returns its place in the row."""
        self.hidden.append(column)
        return self._visible + len(self.hidden) - 1

    def _hide_identity(self, tables: Sequence[Occurrence]) -> None:
        """Hidden columns by which rows that LIMIT counts are told from their repetitions: all primary keys."""
        if len(tables) < 2:
            return  # rows of one table are told apart by the entity itself
        for table in tables:
            keys = [column for column in table.clause.c if column.primary_key]
            if not keys:
                raise _refused(f"joined eager loads under LIMIT beside {table.info.name}, which has no primary key")
            for column in keys:
                self._hide(raw(column))

    def _with_hidden(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        if not self.hidden:
            return statement
        named = (column.label(f"shardkit_{number}") for number, column in enumerate(self.hidden))
        return statement.add_columns(*named)

    # --- ORDER BY, DISTINCT, LIMIT

    def _order_by(self) -> Sequence[_Sorted]:
        return [self._sorted(each) for each in self.statement._order_by_clauses]  # noqa: SLF001 - no public reader

    def _sorted(self, element: Any) -> _Sorted:
        """ORDER BY's element without its direction, and the direction."""
        descending, nulls_first = False, None
        while True:
            if element.__visit_name__ == "label_reference":
                element = element.element
            elif element.__visit_name__ == "textual_label_reference":
                element = self._named(element.element)
            elif isinstance(element, UnaryExpression) and element.modifier in _DIRECTIONS:
                if element.modifier in (operators.desc_op, operators.asc_op):
                    descending = element.modifier is operators.desc_op
                else:
                    nulls_first = element.modifier is operators.nulls_first_op
                element = element.element
            else:
                break
        if not isinstance(element, ColumnElement) or getattr(element, "is_literal", False):
            raise _refused("ORDER BY with raw SQL over several shards")
        contents = contents_of([element])
        if contents.subqueries:
            raise _refused("ORDER BY with a subquery over several shards")
        if contents.functions & {"rand", "random", "uuid"}:
            raise _refused("ORDER BY with a random value over several shards")
        return _Sorted(element, descending, (not descending) if nulls_first is None else nulls_first)

    def _named(self, name: str) -> Any:
        named = [each for each in _columns_of(self.statement) if getattr(each, "name", None) == name]
        if len(named) != 1:
            raise _refused(f"ORDER BY {name!r} as text, which is not the name of one selected column")
        return named[0]

    def _order(self, wanted: _Sorted) -> SortKey:
        if self.context.query.distinct and not self._is_selected(wanted.expression):
            raise _refused("DISTINCT with ORDER BY on what is not selected, over several shards")
        column, comparison = sort_column(wanted.expression, self.context.dialect)
        if self.context.query.grouped and not contents_of([wanted.expression]).aggregates:
            column = _least(column)  # one value a group: MIN says so to ONLY_FULL_GROUP_BY
        return SortKey(self._hide(column), comparison, wanted.descending, wanted.nulls_first)

    def _is_selected(self, expression: ClauseElement) -> bool:
        if self.context.keyed_rows:
            return True  # nothing is dropped after the merge, and each shard's server checks its own part
        shown = [_undistinct(column) for column in _columns_of(self.statement) if isinstance(column, ColumnElement)]
        return any(column.compare(bare(expression)) for column in shown)

    def _distinct(self) -> tuple[SortKey, ...]:
        parts = self.context.own().query.parts
        if parts is None:
            raise _refused("DISTINCT over several shards")
        keys = []
        for _, shown in parts.columns:
            if not isinstance(shown, ColumnElement):
                raise _refused("DISTINCT with raw SQL over several shards")
            column, comparison = sort_column(_undistinct(shown), self.context.dialect)
            keys.append(SortKey(self._hide(column), comparison))
        return tuple(keys)

    def _cut(self) -> tuple[int | None, int]:
        statement = self.statement
        if statement._fetch_clause is not None:  # noqa: SLF001 - no public reader
            raise _refused("FETCH over several shards", "use limit() and offset()")
        limit = self._number(statement._limit_clause, "LIMIT")  # noqa: SLF001
        offset = self._number(statement._offset_clause, "OFFSET")  # noqa: SLF001
        return limit, offset or 0

    def _number(self, clause: ClauseElement | None, name: str) -> int | None:
        if clause is None:
            return None
        value = self.context.binds.of(clause) if isinstance(clause, BindParameter) else None
        if type(value) is not int or value < 0:
            raise _refused(f"{name} that is not a number over several shards")
        return value

    # --- aggregates and groups

    def _grouped(self, limit: int | None, offset: int) -> MergePlan:
        if self.context.query.distinct:
            raise _refused("DISTINCT with aggregates over several shards")
        groups = [self._sorted(each).expression for each in self.statement._group_by_clauses]  # noqa: SLF001 - no public reader
        keys = []
        for expression in groups:
            column, comparison = sort_column(expression, self.context.dialect)
            keys.append(SortKey(self._hide(_least(column)), comparison))
        combines: list[Combine] = []
        for place, column in enumerate(_columns_of(self.statement)):
            combine = self._output(column, place, groups)
            if combine is not None:
                combines.append(combine)
        order = tuple(self._group_order(each, groups, keys, combines) for each in self._order_by()) if groups else ()
        tests = [test for each in self.statement._having_criteria for test in _ands(each)]  # noqa: SLF001 - no public reader
        having = tuple(self._having(test, combines) for test in tests)
        split = self.statement.limit(None).offset(None).order_by(None)
        split._having_criteria = ()  # noqa: SLF001 - on the copy just made; there is no generative way
        plan = Groups(tuple(keys), tuple(combines), having)
        return MergePlan(self._with_hidden(split), self._visible, order, (), plan, limit, offset)

    def _output(self, column: Any, place: int, groups: Sequence[ClauseElement]) -> Combine | None:
        expression = bare(column)
        if not isinstance(expression, ColumnElement):
            raise _refused("an ORM entity or a bundle beside aggregates, over several shards", "select its columns")
        if any(expression.compare(bare(group)) for group in groups):
            return None
        if isinstance(expression, BindParameter | Null) or getattr(expression, "is_literal", False):
            return None
        if _is_function(expression, "coalesce"):
            first, *others = expression.clauses
            if all(isinstance(bare(other), BindParameter | Null) for other in others):
                expression = bare(first)
        return self._aggregate(expression, place)

    def _aggregate(self, expression: Any, place: int | None) -> Combine:
        name = getattr(expression, "name", "").lower() if isinstance(expression, FunctionElement) else ""
        arguments = [bare(each) for each in expression.clauses] if name else []
        if name not in _COMBINED or len(arguments) > 1:
            raise _refused(
                f"{name.upper() or 'a column'} beside aggregates, over several shards",
                "select aggregates, GROUP BY columns and constants only, or group by the key",
            )
        how = Aggregate(name)
        if any(isinstance(each, UnaryExpression) and each.operator is operators.distinct_op for each in arguments):
            self._check_distinct(how, bare(arguments[0].element))
        if isinstance(expression.type, TypeDecorator) and how in (Aggregate.SUM, Aggregate.AVG):
            raise _refused(f"{name.upper()} of a column with a type of its own, over several shards")
        own = self._hide(raw(expression))
        match how:
            case Aggregate.MIN | Aggregate.MAX:
                column, comparison = sort_column(expression, self.context.dialect)
                return Combine(how, place, own, order=self._hide(column), comparison=comparison)
            case Aggregate.AVG:
                total, count = self._hide(raw(sa.func.sum(arguments[0]))), self._hide(raw(sa.func.count(arguments[0])))
                return Combine(how, place, own, total, count)
            case _:
                return Combine(how, place, own)

    def _check_distinct(self, how: Aggregate, argument: ClauseElement) -> None:
        if how is not Aggregate.COUNT or not self.context.own().is_key(argument):
            raise _refused(f"{how.upper()}(DISTINCT ...) over several shards", "count distinct keys, or pin one shard")

    def _group_order(
        self, wanted: _Sorted, groups: Sequence[Any], keys: Sequence[SortKey], combines: list[Combine]
    ) -> SortKey:
        expression = bare(wanted.expression)
        for group, key in zip(groups, keys, strict=True):
            if bare(group).compare(expression):
                return SortKey(key.index, key.comparison, wanted.descending, wanted.nulls_first)
        combine = self._aggregate(expression, None)
        combines.append(combine)
        place = combine.raw if combine.order is None else combine.order
        comparison = combine.comparison or Comparison.NUMBER
        return SortKey(place, comparison, wanted.descending, wanted.nulls_first)

    def _having(self, test: ClauseElement, combines: list[Combine]) -> Having:
        if isinstance(test, BinaryExpression) and test.operator in _COMPARISONS:
            value = bare(test.right)
            given = self.context.binds.of(value) if isinstance(value, BindParameter) else None
            if isinstance(given, int | float | Decimal):
                combine = self._aggregate(bare(test.left), None)
                if combine.order is None:
                    combines.append(combine)
                    return Having(combine.raw, _COMPARISONS[test.operator], given)
        raise _refused(
            "HAVING over several shards",
            "compare COUNT, SUM or AVG with a number, group by the key, or filter in the application",
        )


@dataclass(frozen=True, slots=True)
class _Sorted:
    expression: Any
    descending: bool
    nulls_first: bool


_DIRECTIONS: Final = (operators.desc_op, operators.asc_op, operators.nulls_first_op, operators.nulls_last_op)
_COMBINED: Final = frozenset(each.value for each in Aggregate)
_COMPARISONS: Final[Mapping[Any, Callable[[Any, Any], Any]]] = {
    operators.gt: python_operators.gt,
    operators.ge: python_operators.ge,
    operators.lt: python_operators.lt,
    operators.le: python_operators.le,
    operators.eq: python_operators.eq,
    operators.ne: python_operators.ne,
}


def _undistinct(column: Any) -> Any:
    """A column without the ``distinct()`` that makes its SELECT a DISTINCT."""
    return bare(bare(column).element) if is_distinct(column) else bare(column)


def _least(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return raw(sa.func.min(column))


def _ands(test: ClauseElement) -> Sequence[ClauseElement]:
    test = bare(test)
    if isinstance(test, BooleanClauseList) and test.operator is operators.and_:
        return [inner for clause in test.clauses for inner in _ands(clause)]
    return [test]


def _is_function(expression: Any, name: str) -> bool:
    return isinstance(expression, FunctionElement) and getattr(expression, "name", "").lower() == name


def _columns_of(statement: sa.Select[Any]) -> Sequence[Any]:
    """The elements of a row as the statement gives them: expressions, or ORM entities."""
    return [_clause(each["expr"]) for each in statement.column_descriptions]


def _clause(given: Any) -> Any:
    return given.__clause_element__() if isinstance(given, QueryableAttribute) else given


def _refused(what: str, hint: str = "pin the statement to one shard, or do this part in the application") -> Refused:
    return Refused(RoutingError, what, hint)
