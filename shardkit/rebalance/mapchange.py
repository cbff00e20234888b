"""What a job changes in the shard map: it names the move, places the buckets on the target, forgets the move. Pure.

Each function gives the new map, or None where the map is so already.
"""

from __future__ import annotations

from shardkit.errors import PreconditionFailed
from shardkit.rebalance.fence import describe
from shardkit.rebalance.job import Job
from shardkit.shardmap import Move, ShardMap


def is_named(current: ShardMap, job: Job) -> bool:
    """Whether the map names the job's move."""
    return any(move.job == job.id for move in current.moves)


def name_move(current: ShardMap, job: Job) -> ShardMap | None:
    """The map that says that the buckets are moving. They stay where they are.

    :raises PreconditionFailed: when they are elsewhere by now, or another job moves them.
    """
    if is_named(current, job):
        return None
    placement = current.keyspace(job.keyspace).placement
    busy = {bucket for move in current.moves_of(job.keyspace) for bucket in move.buckets}
    wrong = [bucket for bucket in job.buckets if placement.get(bucket) != job.source or bucket in busy]
    if wrong:
        raise PreconditionFailed(
            f"job {job.id}: the map does not place bucket {describe(wrong)} on {job.source} (any more), or another job "
            "moves it",
            hint=f"cancel the job ('shardkit rebalance cancel {job.id}') and make a new plan",
        )
    return current.with_moves([*current.moves, Move(job.id, job.keyspace, job.buckets, job.source, job.target)])


def place_on_target(current: ShardMap, job: Job) -> ShardMap | None:
    """The map in which the buckets are the target's. The move stays named: the source still has their rows."""
    placement = current.keyspace(job.keyspace).placement
    if all(placement[bucket] == job.target for bucket in job.buckets):
        return None
    return current.with_placement(job.keyspace, dict.fromkeys(job.buckets, job.target))


def forget_move(current: ShardMap, job: Job) -> ShardMap | None:
    """The map without the move."""
    kept = [move for move in current.moves if move.job != job.id]
    return None if len(kept) == len(current.moves) else current.with_moves(kept)
