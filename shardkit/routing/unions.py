"""UNION and UNION ALL over several shards: the same as a SELECT (DISTINCT) from all their rows together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import CompoundSelect

from shardkit.errors import RoutingError
from shardkit.routing.grouping import refuse_clock
from shardkit.routing.sorting import LONGEST_TEXT
from shardkit.routing.spread import Refused


def as_select(statement: CompoundSelect[Any]) -> sa.Select[Any]:
    """``SELECT [DISTINCT] ... FROM (a UNION ALL b) ORDER BY ... LIMIT ...``, with the union's own column names.

    :raises Refused: where the columns that have to be compared are not of one type in all parts.
    """
    every = statement.keyword.name == "UNION_ALL"
    if statement._group_by_clauses or statement._fetch_clause is not None:  # noqa: SLF001 - no public reader
        raise _refused("a union with GROUP BY or FETCH over several shards")
    if statement._for_update_arg is not None:  # noqa: SLF001 - it would be lost on the way
        raise _refused("a union FOR UPDATE over several shards")
    rows = sa.union_all(*statement.selects).subquery("shardkit_union")
    shown = list(rows.c)
    names = _names_of(statement)
    order = [_of_rows(each, statement, shown) for each in statement._order_by_clauses]  # noqa: SLF001
    sorted_by = {id(element) for each in order for element in visitors.iterate(each)}
    for place, column in enumerate(shown):
        if not every or id(column) in sorted_by:
            _check_alike(statement.selects, place)
    select = sa.select(*(c if c.key == name else c.label(name) for c, name in zip(shown, names, strict=True)))
    select = select.order_by(*order)
    select._limit_clause, select._offset_clause = statement._limit_clause, statement._offset_clause  # noqa: SLF001 - as they are
    select._params, select._execution_options = statement._params, statement._execution_options  # noqa: SLF001 - as they are
    return select if every else select.distinct()


def _names_of(statement: CompoundSelect[Any]) -> list[str]:
    """What the columns of a union are called in its result."""
    names: list[Any] = [column.key or getattr(column, "name", None) for column in statement.selected_columns]
    if None not in names:
        return names
    # for expressions without a name SQLAlchemy makes one up, when it compiles
    compiled: Any = statement.compile()
    return [column.keyname for column in compiled._result_columns]  # noqa: SLF001 - no public reader


def _of_rows(clause: Any, statement: CompoundSelect[Any], shown: Sequence[Any]) -> Any:
    """An element of the union's ORDER BY, said of the subquery's columns."""
    columns: list[Any] = list(statement.selected_columns)
    names = [column.key for column in columns]

    def replaced(element: Any, **_: Any) -> Any:
        if element.__visit_name__ == "textual_label_reference":
            if names.count(element.element) != 1:
                raise _refused(f"ORDER BY {element.element!r} as text, which is not the name of one selected column")
            return shown[names.index(element.element)]
        if element.__visit_name__ == "label_reference":
            inner: Any = element.element
            return visitors.replacement_traverse(inner, {}, replaced)
        for column, ours in zip(columns, shown, strict=True):
            if element is column:
                return ours
        return None

    return visitors.replacement_traverse(clause, {}, replaced)


def _check_alike(selects: Sequence[Any], place: int) -> None:
    columns = [list(select.selected_columns)[place] for select in selects]
    for column in columns:
        refuse_clock(column)
    types = [column.type for column in columns]
    if any(each._has_column_expression for each in types):  # noqa: SLF001 - the only way to see that another value is selected
        raise _refused("a union that is sorted or made distinct by a column whose type selects an expression of it")
    exact = all(isinstance(each, sa.Integer | sa.Numeric) and not isinstance(each, sa.Float) for each in types)
    texts = all(isinstance(each, sa.String) and not isinstance(each, sa.Enum) for each in types)
    if texts:
        lengths = [each.length for each in types]
        if all(length is not None and length <= LONGEST_TEXT for length in lengths):
            exact = len({each.collation for each in types}) == 1
    if not exact and (texts or len({type(each) for each in types}) > 1):
        raise _refused("a union that is sorted or made distinct by columns of different types, over several shards")


def _refused(what: str) -> Refused:
    return Refused(RoutingError, what, "run its parts as statements of their own, or pin them to one shard")
