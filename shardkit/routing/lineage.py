"""Where every column of a statement comes from, and what is true of the rows of every table in it.

A statement becomes a tree of `Query`s over `Occurrence`s of tables. Columns are followed by lineage through aliases,
subqueries and CTEs (each mention of a CTE is a copy of its own), never by name: in ``SELECT amount AS user_id`` the
column is the amount.

For each occurrence, `Lineage.closed` collects the facts that its rows must fulfil to matter to the result. WHERE and
the ON of inner joins count for every table; the ON of an outer join only for its nullable side, and for the others once
a condition that no NULL passes shows that the join has matched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.elements import BindParameter, ClauseElement, Grouping
from sqlalchemy.sql.selectable import (
    CTE,
    Alias,
    CompoundSelect,
    FromClause,
    FromGrouping,
    Join,
    ScalarSelect,
    SelectStatementGrouping,
    Subquery,
    TableClause,
    Values,
)

from shardkit.partition import KeyType
from shardkit.routing.anatomy import Anatomy, SelectParts, Slot
from shardkit.routing.expressions import Contents, Place, contents_of, is_distinct, raw_clauses
from shardkit.routing.functions import RANDOM
from shardkit.routing.keys import Fact, Facts, KeyPin, KnownColumn, Readers, Term, facts_of
from shardkit.routing.keyvalues import exact_kind
from shardkit.routing.queries import (
    ConstantNode,
    Context,
    DerivedNode,
    JoinNode,
    Node,
    Occurrence,
    Query,
    Scope,
    TableNode,
    each_of,
    plain,
)
from shardkit.shardmap import ShardMap


@dataclass
class Closed:
    """Facts with everything that follows from them."""

    known: Sequence[Fact]
    impossible: bool
    _above: dict[Term, Term]

    def find(self, term: Term) -> Term:
        """The representative of all columns that equal this one."""
        while (above := self._above.get(term, term)) != term:
            term = above
        return term

    def equate(self, one: Term, other: Term) -> None:
        """Note that two columns are equal."""
        self._above[self.find(one)] = self.find(other)


class Lineage:
    """The tree of one statement, and what follows from its conditions.

    :param unreadable: what the router cannot see into (raw SQL, unknown elements): it may mean anything.
    :raises UnknownTable: for a table that the map does not name.
    """

    def __init__(self, anatomy: Anatomy, shard_map: ShardMap, dialect: Dialect, readers: Readers) -> None:
        self.occurrences: list[Occurrence] = []
        self.unreadable: list[str] = []
        self.functions: set[str] = set()
        self.slots: Mapping[BindParameter[Any], Slot] = anatomy.slots
        self.params: Mapping[str, Any] = anatomy.params
        self.repeats = anatomy.repeats
        self.collections = anatomy.collections
        self.dialect = dialect
        self.readers = readers
        self._anatomy = anatomy
        self._map = shard_map
        self._nullable: list[tuple[frozenset[int], Facts]] = []
        self._open_ctes: list[object] = []
        self._closed: dict[tuple[int, ...], Closed] = {}
        statement = anatomy.statement
        if isinstance(statement, sa.Update | sa.Delete):
            self.query = self._change(statement)
        else:
            self.query = self._query(statement, None, ())
        self._check_tables()

    # --- columns

    def column(self, occurrence: Occurrence, name: str) -> KnownColumn | None:
        """A column of a table, if equal values of it mean the same bucket."""
        column = next((each for each in _columns(occurrence.clause) if each.name == name), None)
        if column is None:
            return None
        is_key = name in occurrence.info.key
        normalize = occurrence.info.keyspace.normalize if is_key else None
        kind = exact_kind(column.type, self.dialect, is_key=is_key, normalize=normalize)
        if kind is None:
            return None
        normalize = normalize if kind is KeyType.STRING else None
        return KnownColumn((occurrence.number, name), column.type, kind, f"{occurrence.info.name}.{name}", normalize)

    # --- queries

    def _query(self, element: Any, parent: Scope | None, context: Context, *, derived: bool = False) -> Query:
        while isinstance(element, SelectStatementGrouping | ScalarSelect | Grouping):
            element = element.element
        if isinstance(element, CompoundSelect):
            return self._compound(element, parent, context)
        facts = Facts(within=_within(context))
        query = Query(Scope(self.column, parent), facts, (*context, facts))
        parts = self._anatomy.parts_of(element) if isinstance(element, sa.Select) else None
        if parts is None:
            self.unreadable.append(f"a {type(element).__name__}")
            return query
        windows = self._shape(query, parts)
        if derived and (query.limited or windows):
            query.context = (facts,)  # what is asked of its result may not be asked of its tables before the LIMIT
        for clause in parts.froms:
            query.nodes.append(self._node(clause, query, facts, query.context))
        self._expressions(query, parts.select._where_criteria, facts, "and", predicate=True)  # noqa: SLF001 - no public reader
        groups = (each for clause in parts.select._group_by_clauses for each in each_of(clause))  # noqa: SLF001
        query.grouped_by = tuple(query.scope.resolve(_unreferenced(each)) for each in groups)
        query.windows = tuple(tuple(query.scope.resolve(each) for each in partition) for partition in windows)
        self._expressions(query, (column for _, column in parts.columns), facts, "value")
        for clauses in _other_clauses(parts.select):
            self._expressions(query, clauses, facts, "value")
        return query

    def _shape(self, query: Query, parts: SelectParts) -> Sequence[Sequence[ClauseElement]]:
        """Note what kind of query it is; returns what its window functions are partitioned by."""
        select = parts.select
        query.parts = parts
        query.limited = select._has_row_limiting_clause  # noqa: SLF001 - no public reader
        query.ordered = bool(select._order_by_clauses)  # noqa: SLF001
        query.grouped = bool(select._group_by_clauses)  # noqa: SLF001
        shown = [column for _, column in parts.columns]
        query.distinct = bool(select._distinct) or any(map(is_distinct, shown))  # noqa: SLF001
        contents = contents_of([*shown, *(each for clauses in _other_clauses(select) for each in clauses)])
        query.aggregates = contents.may_aggregate
        query.random = bool((contents.functions | contents_of(select._where_criteria).functions) & RANDOM)  # noqa: SLF001
        self.unreadable += raw_clauses(select)
        return contents.windows

    def _compound(self, element: CompoundSelect[Any], parent: Scope | None, context: Context) -> Query:
        query = Query(Scope(self.column, parent), Facts(), context)
        query.operation = element.keyword.name
        query.limited = element._has_row_limiting_clause  # noqa: SLF001 - no public reader
        query.ordered = bool(element._order_by_clauses)  # noqa: SLF001
        query.branches = [self._query(branch, parent, context) for branch in element.selects]
        for clauses in (element._order_by_clauses, element._group_by_clauses):  # noqa: SLF001
            self.unreadable += contents_of(clauses).unreadable
        self.unreadable += raw_clauses(element)
        return query

    def _change(self, statement: sa.Update | sa.Delete) -> Query:
        facts = Facts()
        query = Query(Scope(self.column), facts, (facts,))
        for clause in (statement.table, *self._anatomy.froms):
            query.nodes.append(self._node(clause, query, facts, query.context))
        self._expressions(query, statement._where_criteria, facts, "and", predicate=True)  # noqa: SLF001 - no public reader
        values = [each for each in _set_values(statement) if isinstance(each, ClauseElement)]
        self._expressions(query, values, facts, "value")
        self._expressions(query, statement._returning, facts, "value")  # noqa: SLF001
        self.unreadable += raw_clauses(statement)
        return query

    # --- FROM

    def _node(self, clause: FromClause, query: Query, facts: Facts, context: Context) -> Node:
        """One member of a FROM list. What its inner joins and subqueries say goes into ``facts``."""
        clause = plain(clause)
        match clause:
            case FromGrouping():
                return self._node(clause.element, query, facts, context)
            case Join():
                return self._join(clause, query, facts, context)
            case CTE():
                return self._derived(clause, clause.element, query, facts, context)
            case Subquery():
                return self._derived(clause, clause.element, query, facts, context)
            case TableClause():
                return self._table(clause, clause, query, context)
            case Alias() if type(clause) is Alias:
                return self._alias(clause, query, facts, context)
            case Values():
                query.scope.members[clause] = None
                return ConstantNode()
            case _:
                self.unreadable.append(f"a {type(clause).__name__} in FROM")
                return ConstantNode()

    def _alias(self, clause: Alias[Any], query: Query, facts: Facts, context: Context) -> Node:
        element = plain(clause.element)
        if isinstance(element, TableClause):
            return self._table(clause, element, query, context)
        if isinstance(element, Subquery | CTE):
            return self._derived(clause, element.element, query, facts, context)
        self.unreadable.append(f"an alias of a {type(element).__name__}")
        return ConstantNode()

    def _table(self, clause: FromClause, table: TableClause, query: Query, context: Context) -> Node:
        info = self._map.table(table.fullname)
        occurrence = Occurrence(len(self.occurrences), info, clause, context)
        self.occurrences.append(occurrence)
        query.scope.members[clause] = occurrence
        return TableNode(occurrence)

    def _derived(self, clause: FromClause, element: Any, query: Query, facts: Facts, context: Context) -> Node:
        source = plain(clause.element) if type(clause) is Alias else clause
        if isinstance(source, CTE) and source.recursive:
            root = _root(source)
            if any(root is open_cte for open_cte in self._open_ctes):  # it reads itself
                query.scope.members[clause] = None
                return ConstantNode()
            self._open_ctes.append(root)
            inner = self._query(element, query.scope.parent, context, derived=True)
            self._open_ctes.pop()
            inner.recursive = True
        else:
            inner = self._query(element, query.scope.parent, context, derived=True)
        if not inner.collapses and not inner.branches:
            facts.add(inner.facts)
        query.scope.members[clause] = inner
        return DerivedNode(inner)

    def _join(self, clause: Join, query: Query, facts: Facts, context: Context) -> Node:
        on = () if clause.onclause is None else (clause.onclause,)
        if clause.full:
            return self._full_join(clause, query, context)
        left = self._node(clause.left, query, facts, context)
        if not clause.isouter:
            right = self._node(clause.right, query, facts, context)
            self._expressions(query, on, facts, "and", predicate=True)
            return JoinNode(left, right, "inner", context)
        own = Facts.of_nullable_side(_within(context))
        first = len(self.occurrences)
        right = self._node(clause.right, query, own, (*context, own))
        self._nullable.append((frozenset(range(first, len(self.occurrences))), own))
        self._expressions(query, on, own, "value", predicate=True)
        return JoinNode(left, right, "left", (*context, own))

    def _full_join(self, clause: Join, query: Query, context: Context) -> Node:
        sides = []
        for side in (clause.left, clause.right):
            own = Facts.of_nullable_side(_within(context))
            first = len(self.occurrences)
            sides.append(self._node(side, query, own, (*context, own)))
            self._nullable.append((frozenset(range(first, len(self.occurrences))), own))
        if clause.onclause is not None:
            self._expressions(query, (clause.onclause,), Facts(), "value", predicate=True)
        return JoinNode(sides[0], sides[1], "full", context)

    # --- expressions

    def _expressions(
        self, query: Query, elements: Iterable[ClauseElement], facts: Facts, place: Place, *, predicate: bool = False
    ) -> None:
        """Look through expressions: their subqueries join the tree, and what a predicate says goes into ``facts``."""
        elements = tuple(elements)
        if predicate:
            for element in elements:
                facts.add(facts_of(element, query.scope.resolve, self.slots))
        contents: Contents = contents_of(elements, place)
        self.unreadable += contents.unreadable
        self.functions |= contents.functions
        for inner in contents.subqueries:
            known = facts is query.facts
            # what is selected of no rows at all is still selected
            there = known and not (query.collapses and not predicate)
            nested = self._query(inner.select, query.scope, query.context if there else ())
            query.nested.append(nested)
            if inner.member is not None and not nested.limited and not nested.windows:
                column, output = query.scope.resolve(inner.member), nested.first_output()
                if column is not None and output is not None and column.tied_to(output):
                    nested.facts.equal.append((column, output))
            if known and inner.place == "and" and not nested.collapses and not nested.branches:
                facts.add(nested.facts)

    def _check_tables(self) -> None:
        seen = [occurrence.info.name for occurrence in self.occurrences]
        if isinstance(self._anatomy.statement, sa.Delete) and self._anatomy.froms:
            seen.append(seen[0])  # DELETE FROM a USING a, b
        for name in set(self._anatomy.tables):
            if self._anatomy.tables.count(name) > seen.count(name):
                self.unreadable.append(f"table {name} in a place that the router does not look into")

    # --- what follows

    def closed(self, context: Sequence[Facts]) -> Closed:
        """These facts, those of the outer joins that have matched for certain, and which columns are equal."""
        key = tuple(sorted({id(facts) for facts in context}))
        if key not in self._closed:
            self._closed[key] = self._close(context)
        return self._closed[key]

    def _close(self, context: Sequence[Facts]) -> Closed:
        together = list(context)
        grown = True
        while grown:
            present = {number for facts in together for number, _ in facts.not_null()}
            matched = [
                facts
                for numbers, facts in self._nullable
                if not any(facts is each for each in together) and not numbers.isdisjoint(present)
            ]
            together += matched
            grown = bool(matched)
        known = [fact for facts in together for fact in facts.known if self._holds(fact, facts)]
        closed = Closed(known, any(facts.impossible for facts in together), {})
        for facts in together:
            for one, other in facts.equal:
                closed.equate(one.term, other.term)
        return closed

    def _holds(self, fact: Fact, facts: Facts) -> bool:
        """Whether a fact is one about rows, not about the NULLs of an outer join that found none."""
        return fact.condition.rejects_null or all(
            own.join in facts.within for numbers, own in self._nullable if fact.column.term[0] in numbers
        )

    def pin(self, occurrence: Occurrence, context: Sequence[Facts] | None = None) -> tuple[KeyPin, tuple[str, ...]]:
        """What is known of an occurrence's key, and which conditions say so."""
        closed = self.closed(occurrence.context if context is None else context)
        keyspace = occurrence.info.keyspace
        columns = []
        said: list[str] = []
        for term in occurrence.key:
            conditions = []
            known = self.column(occurrence, term[1])
            for fact in closed.known if known is not None else ():
                if closed.find(fact.column.term) != closed.find(term):
                    continue
                read = self.readers.of(fact.column.type, fact.column.normalize)
                if read is not None:
                    conditions.append((read, fact.condition))
                    said.append(fact.text)
            columns.append(tuple(conditions))
        return KeyPin(keyspace, tuple(columns), closed.impossible), tuple(dict.fromkeys(said))


def _within(context: Context) -> frozenset[int]:
    return frozenset[int]().union(*(facts.within for facts in context))


def _root(cte: CTE) -> CTE:
    """The CTE that this one is an alias, or the recursive completion, of."""
    while (before := cte._cte_alias or cte._restates) is not None:  # noqa: SLF001 - no public reader
        cte = before
    return cte


def _columns(clause: FromClause) -> Iterable[Any]:
    return clause.c


def _unreferenced(element: ClauseElement) -> ClauseElement:
    return getattr(element, "element", element) if element.__visit_name__ == "label_reference" else element


def _other_clauses(select: sa.Select[Any]) -> tuple[Sequence[ClauseElement], ...]:
    return (select._group_by_clauses, select._having_criteria, select._order_by_clauses)  # noqa: SLF001 - no public reader


def _set_values(statement: sa.Update | sa.Delete) -> Iterator[Any]:
    if isinstance(statement, sa.Update):
        yield from (statement._values or {}).values()  # noqa: SLF001 - no public reader
