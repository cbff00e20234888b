"""The tree of a statement: its queries, the tables that they mention, and which column is which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from sqlalchemy.sql.elements import ClauseElement, ClauseList, ColumnClause, Grouping, Label
from sqlalchemy.sql.selectable import FromClause

from shardkit.routing.anatomy import SelectParts
from shardkit.routing.keys import Facts, KnownColumn, Term
from shardkit.shardmap import TableInfo

#: Facts that hold together.
Context: TypeAlias = tuple[Facts, ...]


@dataclass(frozen=True, eq=False)
class Occurrence:
    """One mention of a table.

    :param context: what holds for those of its rows that matter.
    """

    number: int
    info: TableInfo
    clause: FromClause
    context: Context

    @property
    def key(self) -> tuple[Term, ...]:
        """Its key columns."""
        return tuple((self.number, column) for column in self.info.key)


@dataclass(frozen=True, eq=False)
class TableNode:
    """A table in a FROM list."""

    occurrence: Occurrence


@dataclass(frozen=True, eq=False)
class DerivedNode:
    """A subquery or CTE in a FROM list."""

    query: Query


@dataclass(frozen=True, eq=False)
class ConstantNode:
    """Rows that are written in the statement itself."""


@dataclass(frozen=True, eq=False)
class JoinNode:
    """A join.

    :param context: what holds for the rows that it puts together.
    """

    left: Node
    right: Node
    kind: Literal["inner", "left", "full"]
    context: Context


Node: TypeAlias = TableNode | DerivedNode | ConstantNode | JoinNode


@dataclass(eq=False)
class Query:
    """A SELECT, or a set operation of several (then ``branches``).

    :param facts: what is true of every row that passes its WHERE.
    :param context: the same, and what holds around it: conditions on a result may be asked of its tables.
    :param nodes: its FROM list.
    :param nested: the subqueries in its expressions.
    :param windows: for each window function, the columns that it is partitioned by.
    :param random: whether its rows are another time others.
    :param aggregates: whether an aggregate stands in its columns, HAVING or ORDER BY.
    """

    scope: Scope
    facts: Facts
    context: Context
    parts: SelectParts | None = None
    nodes: list[Node] = field(default_factory=list)
    nested: list[Query] = field(default_factory=list)
    branches: list[Query] = field(default_factory=list)
    operation: str | None = None
    recursive: bool = False
    limited: bool = False
    ordered: bool = False
    random: bool = False
    windows: tuple[tuple[KnownColumn | None, ...], ...] = ()
    aggregates: bool = False
    grouped_by: tuple[KnownColumn | None, ...] = ()
    grouped: bool = False
    distinct: bool = False

    @property
    def collapses(self) -> bool:
        """Whether it makes one row of many, or of none."""
        return self.aggregates and not self.grouped

    def output(self, name: str) -> KnownColumn | None:
        """The lineage of one of its columns, by its name in SQL."""
        if self.parts is None:
            return None
        named = [column for label, column in self.parts.columns if _sql_name(label, column) == name]
        return self._visible(self.scope.resolve(named[0])) if len(named) == 1 else None

    def first_output(self) -> KnownColumn | None:
        """The lineage of its only column."""
        if self.parts is None or len(self.parts.columns) != 1:
            return None
        return self._visible(self.scope.resolve(self.parts.columns[0][1]))

    def outputs(self) -> Iterator[KnownColumn]:
        """The lineages of its columns, of those that are known."""
        for _, column in () if self.parts is None else self.parts.columns:
            known = self._visible(self.scope.resolve(column))
            if known is not None:
                yield known

    def _visible(self, known: KnownColumn | None) -> KnownColumn | None:
        if known is None or self.collapses:
            return None
        if self.grouped and all(column is None or column.term != known.term for column in self.grouped_by):
            return None  # the value of any row of the group
        return known


def _sql_name(label: str | None, column: ClauseElement) -> str | None:
    return label if label is not None else getattr(column, "name", None)


@dataclass(eq=False)
class Scope:
    """The FROM clauses that column expressions can refer to, innermost first.

    :param column: finds a column of an occurrence by its name in SQL.
    """

    column: Callable[[Occurrence, str], KnownColumn | None]
    parent: Scope | None = None
    members: dict[FromClause, Occurrence | Query | None] = field(default_factory=dict)

    def resolve(self, element: Any) -> KnownColumn | None:
        """The lineage of a column expression; None for everything that is not a plain column of a known table."""
        while isinstance(element, Label | Grouping):
            element = element.element
        if not isinstance(element, ColumnClause) or element.is_literal or element.table is None:
            return None
        member = self._member(plain(element.table))
        if isinstance(member, Query):
            return member.output(element.name)
        return None if member is None else self.column(member, element.name)

    def _member(self, clause: FromClause) -> Occurrence | Query | None:
        if clause in self.members:
            return self.members[clause]
        return None if self.parent is None else self.parent._member(clause)  # noqa: SLF001 - the same class


def plain(clause: FromClause) -> FromClause:
    """A FROM clause without ORM annotations."""
    bare: FromClause = clause._deannotate(clone=False)  # noqa: SLF001 - ORM annotations, which have no public way off
    return bare


def each_of(clause: Any) -> Sequence[Any]:
    """The elements of GROUP BY: SQLAlchemy puts those of a mapped class into a list of their own."""
    if isinstance(clause, ClauseList):
        return [each for inner in clause.clauses for each in each_of(inner)]
    return [clause]


def limited_tables(query: Query) -> list[Occurrence]:
    """The tables of the subquery in FROM that holds the LIMIT; those of a subquery within that are not looked into."""
    for node in query.nodes:
        for each in _leaves(node):
            if isinstance(each, DerivedNode) and each.query.limited:
                inner = [leaf for top in each.query.nodes for leaf in _leaves(top)]
                return [leaf.occurrence for leaf in inner if isinstance(leaf, TableNode)]
    return []


def loses_limited_rows(query: Query) -> bool:
    """Whether an inner join around the subquery with the LIMIT may leave out rows that the LIMIT has counted."""
    for node in query.nodes:
        while isinstance(node, JoinNode):
            if node.kind == "inner" and any(isinstance(e, DerivedNode) and e.query.limited for e in _leaves(node.left)):
                return True
            node = node.left
    return False


def _leaves(node: Node) -> Iterator[Node]:
    if isinstance(node, JoinNode):
        yield from _leaves(node.left)
        yield from _leaves(node.right)
    else:
        yield node
