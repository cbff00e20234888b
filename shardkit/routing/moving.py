"""Reads while buckets move: each shard is asked for the rows of its own buckets only.

While a rebalance job is at work, rows of the moving buckets may stand on two shards. A statement that touches more than
one shard therefore carries, for each, the condition that the rows are of the buckets which this map places there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa

from shardkit.errors import RoutingError
from shardkit.partition import KeyColumn, key_type_of
from shardkit.routing.keyvalues import stored_type
from shardkit.routing.lineage import Lineage
from shardkit.routing.queries import JoinNode, Node, Occurrence, Query, TableNode
from shardkit.routing.spread import Parted, Refused
from shardkit.shardmap import Keyspace, Move, ShardMap

_Statement = TypeVar("_Statement", sa.Select[Any], sa.Update, sa.Delete)


def moves_on(shard_map: ShardMap, keyspaces: Sequence[Keyspace], shards: Sequence[str]) -> tuple[Move, ...]:
    """The jobs at work that may have put rows of another shard's buckets on one of these."""
    return tuple(
        move
        for keyspace in keyspaces
        for move in shard_map.moves_of(keyspace.name)
        if move.source in shards or move.target in shards
    )


def restricted(
    statement: _Statement, lineage: Lineage, spread: Parted, shards: Sequence[str], job: str
) -> Mapping[str, _Statement]:
    """For each shard, the statement with the condition that its rows are of the shard's own buckets.

    The condition stands in the outermost WHERE, on a table of which every row of the result holds a row; all others
    are tied to that one by their keys.

    :param job: the rebalance job, for the message.
    :raises Refused: when there is no such table, or its key cannot be tested in SQL.
    """
    anchor = next((each for each in spread.anchors if each in _preserved(lineage.query)), None)
    if anchor is None:
        raise _refused(job, "its rows come out of a subquery")
    columns = [_key_column(anchor, name, lineage) for name in anchor.info.key]
    partition = spread.keyspace.partition
    known = [column for column in columns if column is not None]
    if partition is None or len(known) != len(columns):
        raise _refused(job, f"the key of {anchor.info.name} cannot be tested in SQL")
    try:
        return {
            shard: statement.where(partition.predicate(known, spread.keyspace.buckets_on(shard))) for shard in shards
        }
    except TypeError as error:
        raise _refused(job, str(error)) from None


def _key_column(occurrence: Occurrence, name: str, lineage: Lineage) -> KeyColumn | None:
    column = next((each for each in occurrence.clause.c if each.name == name), None)
    if column is None:
        return None
    kind = key_type_of(stored_type(column.type, lineage.dialect))
    return None if kind is None else KeyColumn(column, kind)


def _preserved(query: Query) -> list[Occurrence]:
    """The tables of the outermost FROM that stand on no outer join's nullable side."""
    found: list[Occurrence] = []

    def look(node: Node) -> None:
        if isinstance(node, TableNode):
            found.append(node.occurrence)
        elif isinstance(node, JoinNode) and node.kind != "full":
            look(node.left)
            if node.kind == "inner":
                look(node.right)

    for node in query.nodes:
        look(node)
    return found


def _refused(job: str, why: str) -> Refused:
    return Refused(
        RoutingError,
        f"rebalance job {job} is moving rows, and this statement cannot be told to take each row once: {why}",
        "pin it to one key, or run it again when the job has ended (shardkit rebalance status)",
    )
