"""Columns that are given by name alone: ``column("n")``, ``literal_column("n")``.

Only the server knows what such a name means, and it depends on where it stands: ORDER BY takes a label of the statement
before a column, GROUP BY a column before a label, HAVING either (MySQL Reference Manual, "Problems with Column Aliases"
and "MySQL Handling of GROUP BY"; for SQLite, tried on 3.40). What a label stands for may be an aggregate, which no
shard alone can say anything about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import ColumnClause, ColumnElement
from sqlalchemy.sql.selectable import FromClause

from shardkit.errors import RoutingError
from shardkit.routing.expressions import same
from shardkit.routing.sorting import bare
from shardkit.routing.spread import Refused

_NAME: Final = re.compile(r"[^\W\d]\w*|`[^`]+`")


class Names:
    """What the names in one SELECT mean.

    :param froms: its FROM list.
    :param selected: its columns.
    :param groups: its GROUP BY.
    """

    def __init__(self, froms: Sequence[FromClause], selected: Sequence[Any], groups: Sequence[Any]) -> None:
        self._groups = groups
        self._selected: dict[str, list[ColumnElement[Any]]] = {}
        for column in selected:
            name = getattr(column, "name", None)
            if isinstance(column, ColumnElement) and isinstance(name, str):
                self._selected.setdefault(name.casefold(), []).append(column)
        #: The columns' names of its FROM list.
        self.columns = frozenset(column.name.casefold() for each in froms for column in each.c)

    def in_order_by(self, element: ColumnElement[Any]) -> ColumnElement[Any]:
        """What a name in ORDER BY stands for; other expressions stay as they are.

        :raises Refused: for a name that may mean several things.
        """
        name = _alone(element)
        if name is None:
            self._check_no_label_in(element)
        label = None if name is None else self._label(name)
        return element if label is None else label

    def in_group_by(self, element: ColumnElement[Any]) -> ColumnElement[Any]:
        """The same for GROUP BY.

        :raises Refused: for a name that may mean several things.
        """
        return element if _alone(element) in self.columns else self.in_order_by(element)

    def in_having(self, condition: Any) -> Any:
        """A condition of HAVING, with what its names stand for.

        :raises Refused: for a name that may mean several things.
        """

        def replaced(element: Any, **_: Any) -> Any:
            name = _alone(element)
            label = None if name is None else self._label(name)
            if name is None or label is None or _is_column(label, name):
                return None
            grouped = {getattr(bare(each), "name", "").casefold() for each in self._groups}
            if name in self.columns or (name in grouped and not any(same(bare(e), bare(label)) for e in self._groups)):
                raise _ambiguous(name)
            return bare(label).self_group()

        return visitors.replacement_traverse(condition, {}, replaced)

    def _label(self, name: str) -> ColumnElement[Any] | None:
        found = self._selected.get(name, [])
        if any(not same(bare(each), bare(found[0])) for each in found):
            raise _ambiguous(name)
        return found[0] if found else None

    def _check_no_label_in(self, element: Any) -> None:
        """Inside an expression, servers look for columns first, and not all of them for labels."""
        for name in _names_in(element):
            if any(not _is_column(each, name) for each in self._selected.get(name, ())):
                raise _ambiguous(name)


def _alone(element: Any) -> str | None:
    """The name that stands for a column all by itself."""
    if not isinstance(element, ColumnClause) or element.table is not None or not _NAME.fullmatch(element.name):
        return None
    return str(element.name).strip("`").casefold()


def _names_in(element: Any) -> Iterator[str]:
    for each in visitors.iterate(element):
        name = _alone(each)
        if name is not None:
            yield name


def _is_column(selected: Any, name: str) -> bool:
    """Whether a selected column is just the column of that name."""
    column = bare(selected)
    return isinstance(column, ColumnClause) and column.name.strip("`").casefold() == name


def _ambiguous(name: str) -> Refused:
    return Refused(
        RoutingError,
        f"the name {name!r} over several shards: it is a label, and may be a column as well",
        "write the label's expression or the table's column itself",
    )
