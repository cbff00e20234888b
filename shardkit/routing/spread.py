"""Whether a statement's result is the sum of what each shard answers for itself.

It is, where every joined row stands on the shard of the row that it is joined to: tables of one keyspace put together
by their key, with reference tables beside them. Everything else over several shards would miss or repeat rows, and is
refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shardkit.errors import CrossShardJoin, RoutingError
from shardkit.routing.functions import OF_THE_STATEMENT_BEFORE
from shardkit.routing.keys import Facts
from shardkit.routing.lineage import Lineage
from shardkit.routing.queries import ConstantNode, DerivedNode, JoinNode, Node, Occurrence, Query, TableNode
from shardkit.shardmap import Keyspace, ShardMap


@dataclass(frozen=True, slots=True)
class Everywhere:
    """The same rows on each of these shards (None: on any); ``names``: the reference tables it reads."""

    shards: frozenset[str] | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parted:
    """Each row on one shard of the keyspace only.

    :param anchors: occurrences of which every row of the relation holds a row: where that stands, it stands.
    """

    keyspace: Keyspace
    anchors: tuple[Occurrence, ...]


Spread: TypeAlias = Everywhere | Parted


class Refused(Exception):
    """Why a statement cannot run over several shards. It never leaves the planner: it becomes a `RoutingError`."""

    def __init__(self, error: type[RoutingError], message: str, hint: str, *, table: str | None = None) -> None:
        super().__init__(message)
        self.error = error
        self.message = message
        self.hint = hint
        self.table = table

    def over(self, shards: int, key: Sequence[str] = ()) -> RoutingError:
        """The error to raise."""
        return self.error(self.message, hint=self.hint, table=self.table, key=key, shards=shards)


def spread_of(lineage: Lineage, query: Query, *, as_they_come: bool = False) -> Spread:
    """Where the rows of a query's FROM list stand, its subqueries checked; its own LIMIT, GROUP BY, ... not regarded.

    :param as_they_come: whether the rows of subqueries in FROM are meant as one shard has them, whatever it has made
        of them.
    :raises Refused: when the shards' own answers do not add up to it.
    """
    return _Spreading(lineage, as_they_come=as_they_come).rows(query)


def keyed_groups(lineage: Lineage, query: Query, spread: Parted) -> bool:
    """Whether rows of one group have one key, so that no group stands on two shards."""
    return _Spreading(lineage).keyed_groups(query, spread)


def keyed_rows(lineage: Lineage, query: Query, spread: Parted) -> bool:
    """Whether equal rows of the result have one key, so that they stand on one shard."""
    return _Spreading(lineage).keyed_rows(query, spread)


def keyed_windows(lineage: Lineage, query: Query, spread: Parted) -> bool:
    """Whether each window function sees rows of one key at a time, so that all that it sees stand on one shard."""
    return _Spreading(lineage).keyed_windows(query, spread)


class _Spreading:
    def __init__(self, lineage: Lineage, *, as_they_come: bool = False) -> None:
        self._lineage = lineage
        self._as_they_come = as_they_come

    # --- queries

    def rows(self, query: Query) -> Spread:
        if query.recursive or (query.branches and query.operation != "UNION_ALL"):
            what = "a recursive CTE" if query.recursive else (query.operation or "").replace("_", " ")
            return self._only_reference(query, what)
        if query.branches:
            return self._union(query)
        found: Spread = Everywhere()
        for node in query.nodes:
            found = self._inner(found, self._node(node), query.context)
        for nested in query.nested:
            self._nested(nested, found)
        return found

    def _only_reference(self, query: Query, what: str) -> Spread:
        sharded = next((each for each in _occurrences(query) if each.info.kind != "reference"), None)
        if sharded is not None:
            raise Refused(
                RoutingError,
                f"{what} over several shards",
                _PIN.format(_key(sharded)),
                table=sharded.info.name,
            )
        found: Spread = Everywhere()
        parts = [self._derived(branch) for branch in query.branches] or map(_of_table, _occurrences(query))
        for part in parts:
            found = self._inner(found, part, ())
        return found

    def _union(self, query: Query) -> Spread:
        branches = [self._derived(branch) for branch in query.branches]
        if all(isinstance(branch, Everywhere) for branch in branches):
            found: Spread = Everywhere()
            for branch in branches:
                found = self._inner(found, branch, ())
            return found
        first = next(branch for branch in branches if isinstance(branch, Parted))
        # rows of two keyspaces add up too, where every shard of the one has the other's tables
        if not all(
            isinstance(each, Parted) and set(each.keyspace.shards) == set(first.keyspace.shards) for each in branches
        ):
            raise Refused(
                CrossShardJoin,
                f"UNION ALL of rows that are spread differently: {_names(query)}",
                "run its parts as statements of their own",
            )
        return Parted(first.keyspace, ())

    def _derived(self, query: Query) -> Spread:
        """A subquery in FROM: its result has to be the sum of the shards' results before anything is done to it."""
        found = self.rows(query)
        if self._as_they_come:
            return found
        if isinstance(found, Everywhere):
            _settled(query, found)
            return found
        what = next(
            (
                name
                for name, present in (
                    ("LIMIT inside a subquery", query.limited),
                    (
                        "a window function without the key in PARTITION BY inside a subquery",
                        not self.keyed_windows(query, found),
                    ),
                    ("an aggregate inside a subquery", query.collapses),
                    (
                        "GROUP BY without the key inside a subquery",
                        query.grouped and not self.keyed_groups(query, found),
                    ),
                    (
                        "DISTINCT without the key inside a subquery",
                        query.distinct and not self.keyed_rows(query, found),
                    ),
                )
                if present
            ),
            None,
        )
        if what is None:
            return found
        table = next(_occurrences(query))
        raise Refused(RoutingError, f"{what} over several shards", _PIN.format(_key(table)), table=table.info.name)

    def keyed_groups(self, query: Query, spread: Parted) -> bool:
        return self._holds_key(query, spread, [column.term for column in query.grouped_by if column is not None])

    def keyed_rows(self, query: Query, spread: Parted) -> bool:
        return self._holds_key(query, spread, [column.term for column in query.outputs()])

    def keyed_windows(self, query: Query, spread: Parted) -> bool:
        return all(
            self._holds_key(query, spread, [column.term for column in partition if column is not None])
            for partition in query.windows
        )

    def _holds_key(self, query: Query, spread: Parted, terms: Iterable[tuple[int, str]]) -> bool:
        if spread.keyspace.partition is None:
            return True
        closed = self._lineage.closed(query.context)
        held = {closed.find(term) for term in terms}
        return any(anchor.key and all(closed.find(term) in held for term in anchor.key) for anchor in spread.anchors)

    # --- FROM

    def _node(self, node: Node) -> Spread:
        match node:
            case TableNode():
                return _of_table(node.occurrence)
            case DerivedNode():
                return self._derived(node.query)
            case ConstantNode():
                return Everywhere()
            case JoinNode():
                return self._join(node)

    def _join(self, node: JoinNode) -> Spread:
        left, right = self._node(node.left), self._node(node.right)
        if node.kind == "inner":
            return self._inner(left, right, node.context)
        if isinstance(left, Everywhere) and isinstance(right, Everywhere):
            return self._inner(left, right, node.context)
        if node.kind == "full" or isinstance(left, Everywhere):
            preserved = left.names if isinstance(left, Everywhere) and left.names else ("the left side",)
            raise Refused(
                CrossShardJoin,
                f"an outer join that keeps every row of {', '.join(preserved)} would keep it on each shard, "
                f"beside {_table_of(right)}",
                "turn the join round, make it an inner join, or pin one key",
                table=_table_of(right),
            )
        joined = self._inner(left, right, node.context)
        return Parted(left.keyspace, left.anchors) if isinstance(joined, Parted) else joined

    def _inner(self, left: Spread, right: Spread, context: Sequence[Facts]) -> Spread:
        if isinstance(left, Everywhere) and isinstance(right, Everywhere):
            return _both(left, right)
        if isinstance(left, Parted) and isinstance(right, Parted):
            return self._together(left, right, context)
        parted, reference = (left, right) if isinstance(left, Parted) else (right, left)
        if isinstance(parted, Parted) and isinstance(reference, Everywhere):
            _hosted(parted, reference)
        return parted

    def _together(self, left: Parted, right: Parted, context: Sequence[Facts]) -> Parted:
        if left.keyspace.name == right.keyspace.name and (
            left.keyspace.partition is None
            or any(self._colocated(one, other, context) for one in left.anchors for other in right.anchors)
        ):
            return Parted(left.keyspace, left.anchors + right.anchors)
        raise _apart(left, right)

    def _colocated(self, one: Occurrence, other: Occurrence, context: Sequence[Facts]) -> bool:
        closed = self._lineage.closed(context)
        pairs = list(zip(one.key, other.key, strict=False))
        return (
            bool(pairs)
            and len(one.key) == len(other.key)
            and all(closed.find(first) == closed.find(second) for first, second in pairs)
            and all(self._lineage.column(each, term[1]) for each in (one, other) for term in each.key)
        )

    # --- subqueries in expressions

    def _nested(self, nested: Query, outer: Spread) -> None:
        if nested.branches:
            for branch in nested.branches:
                self._nested(branch, outer)
            if nested.recursive:
                self._only_reference(nested, "a recursive CTE")
            read = {occurrence.info.name: occurrence.info.kind for occurrence in _occurrences(nested)}
            if set(read.values()) == {"reference"}:
                _settled(nested, Everywhere(names=tuple(read)))
            return
        inner = self.rows(nested)
        if isinstance(inner, Everywhere):
            _settled(nested, inner)
            if isinstance(outer, Parted):
                _hosted(outer, inner)
            return
        if isinstance(outer, Parted) and outer.keyspace.name == inner.keyspace.name:
            if outer.keyspace.partition is None:
                return
            if any(self._colocated(one, other, nested.context) for one in outer.anchors for other in inner.anchors):
                return
        around = ", ".join(outer.names) if isinstance(outer, Everywhere) else _table_of(outer)
        raise Refused(
            CrossShardJoin,
            f"a subquery on {_table_of(inner)} whose rows may stand on other shards than those of "
            f"{around or 'the statement around it'}",
            "tie the two by their keys, or run the subquery first and pass its values",
            table=_table_of(inner),
        )


def check_readable(unreadable: Sequence[str], shard_map: ShardMap, shard: str, table: str) -> None:
    """What cannot be looked into may read any table: on one shard it may, unless other tables stand there in part.

    :raises Refused: when the shard holds a part of a keyspace that others hold the rest of.
    """
    partial = next(
        (each for each in shard_map.keyspaces.values() if len(each.shards) > 1 and shard in each.shards), None
    )
    if unreadable and partial is not None:
        raise Refused(
            RoutingError,
            f"the router cannot look into {', '.join(unreadable)}: on shard {shard!r}, which holds only a part of "
            f"keyspace {partial.name!r}, it may read half a table",
            "write it as SQLAlchemy expressions, or name the shard with shardkit_shard",
            table=table,
        )


def check_connection(functions: Iterable[str], table: str | None) -> None:
    """What tells of the statement before tells of the last one on the same shard.

    :raises Refused: for functions that do, where nobody has named the shard.
    """
    told = sorted(OF_THE_STATEMENT_BEFORE.intersection(functions))
    if told:
        raise Refused(
            RoutingError,
            f"{', '.join(told)}() is about the statement before on the same connection, and each shard has its own",
            "take the value from the result of that statement (inserted_primary_key, rowcount), or name its shard with "
            "shardkit_shard",
            table=table,
        )


_PIN = "pin it to one shard with {}, or with shardkit_shard"


def _of_table(occurrence: Occurrence) -> Spread:
    info = occurrence.info
    if info.kind == "reference":
        return Everywhere(frozenset(info.shards), (info.name,))
    return Parted(info.keyspace, (occurrence,))


def _both(left: Everywhere, right: Everywhere) -> Everywhere:
    names = tuple(dict.fromkeys((*left.names, *right.names)))
    if left.shards is None or right.shards is None:
        return Everywhere(right.shards if left.shards is None else left.shards, names)
    shards = left.shards & right.shards
    if not shards:
        raise Refused(
            CrossShardJoin,
            f"the reference tables {', '.join(names)} stand on no shard together",
            "add them to the same keyspace",
            table=names[0],
        )
    return Everywhere(shards, names)


def _hosted(parted: Parted, reference: Everywhere) -> None:
    if reference.shards is not None and not reference.shards.issuperset(parted.keyspace.shards):
        raise Refused(
            CrossShardJoin,
            f"the reference table {reference.names[0]} does not stand on every shard of keyspace "
            f"{parted.keyspace.name!r}",
            f"add it under 'reference' of {parted.keyspace.name!r}",
            table=reference.names[0],
        )


def _settled(query: Query, reference: Everywhere) -> None:
    if query.random and reference.names:
        raise Refused(
            RoutingError,
            f"a random value inside a subquery on {', '.join(reference.names)} is another on each shard",
            "read the subquery first and pass its values, or name one shard with shardkit_shard",
            table=reference.names[0],
        )
    if query.limited and not query.ordered and reference.names:
        raise Refused(
            RoutingError,
            f"LIMIT without ORDER BY inside a subquery on {', '.join(reference.names)} may choose other rows on each "
            "shard",
            "add an ORDER BY to the subquery, or name one shard with shardkit_shard",
            table=reference.names[0],
        )


def _apart(left: Parted, right: Parted) -> Refused:
    one, other = _table_of(left), _table_of(right)
    if left.keyspace.name != right.keyspace.name:
        return Refused(
            CrossShardJoin,
            f"{one} and {other} are in different keyspaces ({left.keyspace.name}, {right.keyspace.name}): their rows "
            "stand on different shards",
            "read one after the other, or make one of them a reference table",
            table=other,
        )
    keys = " and ".join(_key(each.anchors[0]) for each in (left, right) if each.anchors)
    return Refused(
        CrossShardJoin,
        f"{one} and {other} are not joined by their keys: matching rows may stand on different shards",
        f"join by {keys}, or pin both to one key",
        table=other,
    )


def _table_of(spread: Spread) -> str:
    if isinstance(spread, Everywhere):
        return ", ".join(spread.names) or "no table"
    return spread.anchors[0].info.name if spread.anchors else f"a union in {spread.keyspace.name}"


def _key(occurrence: Occurrence) -> str:
    info = occurrence.info
    return " and ".join(f"{info.name}.{column}" for column in info.key) or info.name


def _names(query: Query) -> str:
    return ", ".join(dict.fromkeys(occurrence.info.name for occurrence in _occurrences(query)))


def _occurrences(query: Query) -> Iterator[Occurrence]:
    """Every table in a query, however deep."""
    for node in query.nodes:
        yield from _in_node(node)
    for each in (*query.nested, *query.branches):
        yield from _occurrences(each)


def _in_node(node: Node) -> Iterator[Occurrence]:
    match node:
        case TableNode():
            yield node.occurrence
        case DerivedNode():
            yield from _occurrences(node.query)
        case JoinNode():
            yield from _in_node(node.left)
            yield from _in_node(node.right)
        case _:
            return
