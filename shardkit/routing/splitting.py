"""A SELECT over several shards -> what each shard runs, and how the rows are merged.

The statement's own columns stay as they are and where they are; hidden columns are added behind them. So an ORM
statement still makes its objects, and the result's names are the statement's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BindParameter,
    BooleanClauseList,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    TypeCoerce,
    UnaryExpression,
)
from sqlalchemy.sql.elements import Grouping as Parentheses

from shardkit.routing.combining import Groups, Texts
from shardkit.routing.conditions import Binds
from shardkit.routing.expressions import contents_of, is_distinct, same
from shardkit.routing.formulas import Formula
from shardkit.routing.functions import RANDOM
from shardkit.routing.grouping import Grouping, Sorted, least, refuse_clock, refused
from shardkit.routing.merge import MergePlan
from shardkit.routing.naming import Names
from shardkit.routing.queries import Occurrence, Query, each_of
from shardkit.routing.shapes import Shape
from shardkit.routing.sorting import Comparison, SortKey, bare, raw, row_column, sort_column


@dataclass(frozen=True)
class SplitContext:
    """What splitting a statement needs to know besides it.

    :param query: its top level, LIMIT and OFFSET taken off, as it is kept for its shape.
    :param repeated: where joined eager loads repeat the rows that LIMIT counts: the tables that those rows are made of.
    :param own: the shape of this very statement: its elements may be put into it.
    :param keyed_groups: groups do not stand on two shards.
    :param keyed_rows: equal rows of the result do not stand on two shards.
    :param keyed_windows: the rows that a window function sees at once do not, either.
    """

    query: Query
    repeated: Callable[[], Sequence[Occurrence]] | None
    own: Callable[[], Shape]
    binds: Binds
    dialect: Dialect
    keyed_groups: bool
    keyed_rows: bool
    keyed_windows: bool


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
        if query.windows and not self.context.keyed_windows:
            raise refused("a window function over several shards: PARTITION BY does not hold the key")
        self._check_columns()
        limit, offset = self._cut()
        if query.collapses or (query.grouped and not self.context.keyed_groups):
            if query.windows:
                raise refused("a window function over aggregates of several shards")
            return self._grouped(limit, offset)
        distinct = self._distinct() if query.distinct and not self.context.keyed_rows else ()
        sorted_by = self._order_by()
        order = tuple(self._order(each) for each in sorted_by)
        if query.distinct and not distinct and self._tells_apart(sorted_by, order):
            distinct = self._distinct()
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
                raise refused("SELECT * as raw SQL over several shards: the number of its columns is not known")
            if isinstance(column, sa.TextClause):
                raise refused("a column of raw SQL over several shards: it may be more than one column")

    def _hide(self, column: ColumnElement[Any]) -> int:
        """Add a hidden column; returns its place in the row."""
        self.hidden.append(column)
        return self._visible + len(self.hidden) - 1

    def _hide_identity(self, tables: Sequence[Occurrence]) -> None:
        """Hidden columns by which rows that LIMIT counts are told from their repetitions: all primary keys."""
        if len(tables) < 2:
            return  # rows of one table are told apart by the entity itself
        if self.statement._distinct:  # noqa: SLF001 - no public reader; the query around the LIMIT has none
            raise refused(
                "DISTINCT of joined tables with joined eager loads under LIMIT, over several shards",
                "use selectinload(), or EXISTS in place of the join and DISTINCT",
            )
        for table in tables:
            keys = [column for column in table.clause.c if column.primary_key]
            if not keys:
                raise refused(f"joined eager loads under LIMIT beside {table.info.name}, which has no primary key")
            for column in keys:
                self._hide(raw(column))

    def _with_hidden(self, statement: sa.Select[Any]) -> sa.Select[Any]:
        if not self.hidden:
            return statement
        named = (column.label(f"shardkit_{number}") for number, column in enumerate(self.hidden))
        return statement.add_columns(*named)

    # --- ORDER BY, DISTINCT, LIMIT

    def _order_by(self) -> Sequence[Sorted]:
        return [self._sorted(each, self._names.in_order_by) for each in self.statement._order_by_clauses]  # noqa: SLF001 - no public reader

    def _sorted(self, element: Any, meaning: Callable[[Any], Any] = lambda element: element) -> Sorted:
        """ORDER BY's element without its direction, and the direction.

        :param meaning: tells what names stand for.
        """
        labelled = False
        descending, nulls_first = False, None
        while True:
            if element.__visit_name__ == "label_reference":
                element = element.element
            elif element.__visit_name__ == "textual_label_reference":
                element, labelled = self._named(element.element), True
            elif isinstance(element, UnaryExpression) and element.modifier in _DIRECTIONS:
                if element.modifier in (operators.desc_op, operators.asc_op):
                    descending = element.modifier is operators.desc_op
                else:
                    nulls_first = element.modifier is operators.nulls_first_op
                element = element.element
            else:
                break
        if isinstance(element, ColumnElement):
            named, element = element, meaning(element)
            labelled = labelled or named is not element or isinstance(element, sa.Label)
        if labelled and element.type._has_column_expression:  # noqa: SLF001 - the only way to see that another value is selected
            raise refused(f"ORDER BY or GROUP BY a label whose type {element.type!r} selects an expression of it")
        if not isinstance(element, ColumnElement) or getattr(element, "is_literal", False):
            raise refused("ORDER BY with raw SQL over several shards")
        if _is_value(element):
            raise refused("ORDER BY a value over several shards: a driver may send it as a column's number")
        contents = contents_of([element])
        query = self.context.query
        alone = not (query.grouped or query.distinct or query.collapses) and self.context.repeated is None
        if contents.subqueries and not alone:
            raise refused(
                "ORDER BY with a subquery beside groups, DISTINCT or eager loads under LIMIT, over several shards"
            )
        if contents.functions & RANDOM:
            raise refused("ORDER BY or GROUP BY with a random value over several shards")
        return Sorted(element, descending, (not descending) if nulls_first is None else nulls_first)

    def _named(self, name: str) -> Any:
        columns = _columns_of(self.statement)
        named = [each for each in columns if _folded(getattr(each, "name", None)) == name.casefold()]
        if len(named) != 1:
            raise refused(f"ORDER BY {name!r} as text, which is not the name of one selected column")
        return named[0]

    def _order(self, wanted: Sorted) -> SortKey:
        if self.context.query.distinct and not self._is_selected(wanted.expression):
            raise refused("DISTINCT with ORDER BY on what is not selected, over several shards")
        query = self.context.query
        how = sort_column if query.grouped or query.distinct else row_column
        column, comparison = how(wanted.expression, self.context.dialect)
        contents = contents_of([wanted.expression])
        if query.grouped and not contents.aggregates and not contents.windows:
            column = least(column)  # one value a group: MIN says so to ONLY_FULL_GROUP_BY
        return SortKey(self._hide(column), comparison, wanted.descending, wanted.nulls_first)

    def _tells_apart(self, wanted: Sequence[Sorted], order: Sequence[SortKey]) -> bool:
        """Whether the hidden columns of ORDER BY tell rows apart that are equal for DISTINCT: equal texts may have
        other weights ('a' and 'a '), unless they are those of one row of a table, whose primary key is selected.
        """
        texts = [bare(e.expression) for e, k in zip(wanted, order, strict=True) if k.comparison is Comparison.WEIGHTS]
        return not all(self._is_of_one_row(text) for text in texts)

    def _is_of_one_row(self, column: Any) -> bool:
        table = getattr(column, "table", None)
        stored = table
        while isinstance(stored, sa.Alias):
            stored = stored.element
        if table is None or not isinstance(stored, sa.Table):
            return False
        keys = [each for each in table.c if each.primary_key]
        return bool(keys) and all(self._is_selected(key) for key in keys)

    def _is_selected(self, expression: ClauseElement) -> bool:
        shown = [_undistinct(column) for column in _columns_of(self.statement) if isinstance(column, ColumnElement)]
        if any(same(column, bare(expression)) for column in shown):
            return True
        parts = self.context.own().query.parts  # the columns of entities
        return parts is not None and any(_same_column(column, bare(expression)) for _, column in parts.columns)

    def _distinct(self) -> tuple[SortKey, ...]:
        parts = self.context.own().query.parts
        if parts is None:
            raise refused("DISTINCT over several shards")
        keys = []
        for _, shown in parts.columns:
            if not isinstance(shown, ColumnElement):
                raise refused("DISTINCT with raw SQL over several shards")
            if shown.type._has_column_expression:  # noqa: SLF001 - the only way to see that another value is selected
                raise refused(f"DISTINCT with a column whose type {shown.type!r} selects an expression of it")
            refuse_clock(shown)
            column, comparison = sort_column(_undistinct(shown), self.context.dialect)
            keys.append(SortKey(self._hide(column), comparison))
        return tuple(keys)

    def _cut(self) -> tuple[int | None, int]:
        statement = self.statement
        if statement._fetch_clause is not None:  # noqa: SLF001 - no public reader
            raise refused("FETCH over several shards", "use limit() and offset()")
        limit = self._number(statement._limit_clause, "LIMIT")  # noqa: SLF001
        offset = self._number(statement._offset_clause, "OFFSET")  # noqa: SLF001
        return limit, offset or 0

    def _number(self, clause: ClauseElement | None, name: str) -> int | None:
        if clause is None:
            return None
        value = self.context.binds.of(clause) if isinstance(clause, BindParameter) else None
        if type(value) is not int or value < 0:
            raise refused(f"{name} that is not a number over several shards")
        return min(value, _MOST_ROWS)

    # --- aggregates and groups

    def _group(self, clause: Any) -> ColumnElement[Any]:
        """An element of GROUP BY.

        :raises Refused: for a label that is a column's name, too: servers take the column.
        """
        wanted: ColumnElement[Any] = self._sorted(clause, self._names.in_group_by).expression
        name = wanted.name if isinstance(wanted, sa.Label) else None
        folded = _folded(name)  # servers tell no names apart by case
        if folded is not None and folded in self._names.columns and _folded(_name_of(bare(wanted))) != folded:
            raise refused(
                f"GROUP BY the label {name!r}, which is also a column's name: servers take the column",
                "give the label another name",
            )
        return wanted

    @cached_property
    def _names(self) -> Names:
        groups = [_unreferenced(each) for clause in self.statement._group_by_clauses for each in each_of(clause)]  # noqa: SLF001 - no public reader
        parts = self.context.query.parts  # a Select of the ORM does not always know its own FROM list
        return Names(() if parts is None else parts.froms, _columns_of(self.statement), groups)

    def _collect(self, groups: Sequence[ColumnElement[Any]], is_key: Callable[[ClauseElement], bool]) -> _Collected:
        context, statement = self.context, self.statement
        grouping = Grouping(
            groups, context.binds, context.dialect, self._hide, self._sorted, is_key, distinct=context.query.distinct
        )
        keys = [grouping.output(column, place) for place, column in enumerate(_columns_of(statement))]
        order = tuple(grouping.order(each) for each in self._order_by()) if groups else ()
        own: list[Any] = []
        tests: list[Formula] = []
        for test in (test for each in statement._having_criteria for test in _ands(each)):  # noqa: SLF001 - no public reader
            meant = self._names.in_having(test)
            contents = contents_of([meant])
            if contents.subqueries:
                raise refused("HAVING with a subquery over several shards")
            if contents.functions & RANDOM:
                raise refused("HAVING with a random value over several shards")
            # of a group's own columns every shard says the same, unless they are texts that are equal and yet differ
            if contents.aggregates or any(key.comparison not in _ONE_VALUE for key in grouping.keys):
                tests.append(grouping.test(meant))
            else:
                own.append(test)
        return _Collected(grouping, keys, order, own, tests)

    def _grouped(self, limit: int | None, offset: int) -> MergePlan:
        statement = self.statement
        groups = [self._group(each) for clause in statement._group_by_clauses for each in each_of(clause)]  # noqa: SLF001 - no public reader
        context = self.context

        def is_key(element: ClauseElement) -> bool:
            return context.own().is_key(element)  # the statement is read once more for it: only where DISTINCT asks

        collected = self._collect(groups, is_key)
        if collected.grouping.counts_keys and collected.grouping.finer:
            self.hidden.clear()
            collected = self._collect(groups, lambda _element: False)
        grouping, keys, order, own, tests = collected
        columns = _columns_of(statement)
        split = statement.limit(None).offset(None).order_by(None).group_by(*grouping.finer)
        split._having_criteria = tuple(own)  # noqa: SLF001 - on the copy just made; there is no generative way
        blank = None
        if grouping.finer and not groups:
            if own:
                raise refused("HAVING without an aggregate beside DISTINCT aggregates, over several shards")
            if grouping.asks_shards is not None:  # none says so where none sends a row
                raise refused(f"{grouping.asks_shards} beside DISTINCT aggregates, over several shards")
            blank = grouping.blank(columns, self._visible + len(self.hidden))
        distinct = tuple(key for key in keys if key is not None) if self.context.query.distinct else ()
        for key in distinct:
            grouping.check_sorts(key)
        if any(isinstance(each, Texts) for each in grouping.combines) and distinct:
            raise refused("DISTINCT with GROUP_CONCAT over several shards")
        plan = Groups(tuple(grouping.keys), tuple(grouping.combines), tuple(tests), tuple(grouping.computed), blank)
        return MergePlan(self._with_hidden(split), self._visible, order, distinct, plan, limit, offset)


class _Collected(NamedTuple):
    """What a grouped statement asks of the shards.

    :param own: conditions of HAVING that each shard checks by itself.
    """

    grouping: Grouping
    keys: list[SortKey | None]
    order: tuple[SortKey, ...]
    own: list[Any]
    tests: list[Formula]


def _same_column(one: Any, other: Any) -> bool:
    one = bare(one)
    if isinstance(one, ColumnElement) and same(one, other):
        return True
    return (
        isinstance(one, sa.Column)
        and isinstance(other, sa.Column)
        and one.table is other.table
        and one.key == other.key
    )


#: A larger LIMIT or OFFSET is as good as this one, and their sum is still a number to servers and to Python.
_MOST_ROWS: Final = 2**61

#: How values compare of which equal ones are the same.
_ONE_VALUE: Final = frozenset({Comparison.NUMBER, Comparison.BYTES})
_DIRECTIONS: Final = (operators.desc_op, operators.asc_op, operators.nulls_first_op, operators.nulls_last_op)


def _undistinct(column: Any) -> Any:
    """A column without the ``distinct()`` that makes its SELECT a DISTINCT."""
    return bare(bare(column).element) if is_distinct(column) else bare(column)


def _ands(test: ClauseElement) -> Sequence[ClauseElement]:
    test = bare(test)
    if isinstance(test, BooleanClauseList) and test.operator is operators.and_:
        return [inner for clause in test.clauses for inner in _ands(clause)]
    return [test]


def _unreferenced(element: Any) -> Any:
    return getattr(element, "element", element) if element.__visit_name__ == "label_reference" else element


def _name_of(column: Any) -> str | None:
    return column.name if isinstance(column, ColumnClause) else None


def _folded(name: Any) -> str | None:
    return name.casefold() if isinstance(name, str) else None


def _is_value(element: Any) -> bool:
    while isinstance(element, Parentheses | TypeCoerce):
        element = element.clause if isinstance(element, TypeCoerce) else element.element
    return isinstance(element, BindParameter)


def _columns_of(statement: sa.Select[Any]) -> Sequence[Any]:
    """The elements of a row as the statement gives them: expressions, or ORM entities."""
    return [_clause(each["expr"]) for each in statement.column_descriptions]


def _clause(given: Any) -> Any:
    return given.__clause_element__() if isinstance(given, QueryableAttribute) else given
