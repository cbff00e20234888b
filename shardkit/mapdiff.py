"""What changes from one shard map to another, and whether rows would have to move for it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from shardkit.partition import (
    Bucket,
    DirectoryPartition,
    HashPartition,
    ListPartition,
    Partition,
    RangePartition,
    format_buckets,
)
from shardkit.topology import Shard

if TYPE_CHECKING:
    from shardkit.shardmap import Keyspace, ShardMap, TableInfo


class Effect(Enum):
    """What a change does to a running cluster."""

    ADDS = "adds"
    CHANGES = "changes"
    #: Something that statements use now is not there any more.
    REMOVES = "removes"
    #: Statements would look for rows where they are not.
    RELOCATES = "relocates"


@dataclass(frozen=True, slots=True)
class Change:
    """One change, as a line for people."""

    effect: Effect
    line: str


@dataclass(frozen=True)
class MapDiff:
    """What changes from one map to another.

    :param moved: keyspace -> (from shard, to shard) -> the buckets that change hands.
    :param changes: all of it, a line each.
    """

    moved: Mapping[str, Mapping[tuple[str, str], tuple[Bucket, ...]]]
    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def lines(self) -> tuple[str, ...]:
        """One line a change."""
        return tuple(change.line for change in self.changes)

    def with_effect(self, *effects: Effect) -> tuple[str, ...]:
        """The lines of the changes that have one of these effects."""
        return tuple(change.line for change in self.changes if change.effect in effects)


def diff_of(old: ShardMap, new: ShardMap) -> MapDiff:
    """What changes from ``old`` to ``new``; the version number alone is no change."""
    moved = {
        name: pairs
        for name in _kept(old.keyspaces, new.keyspaces)
        if (pairs := _moved(old.keyspaces[name], new.keyspaces[name]))
    }
    return MapDiff(moved, (*_move_changes(moved), *_other_changes(old, new)))


def _moved(old: Keyspace, new: Keyspace) -> dict[tuple[str, str], tuple[Bucket, ...]]:
    pairs: dict[tuple[str, str], list[Bucket]] = {}
    for bucket, shard in old.placement.items():
        after = new.placement.get(bucket, shard)
        if after != shard:
            pairs.setdefault((shard, after), []).append(bucket)
    return {pair: tuple(buckets) for pair, buckets in pairs.items()}


def _move_changes(moved: Mapping[str, Mapping[tuple[str, str], tuple[Bucket, ...]]]) -> Iterator[Change]:
    for keyspace, pairs in moved.items():
        for (source, target), buckets in pairs.items():
            count = f"{len(buckets)} {'bucket' if len(buckets) == 1 else 'buckets'}"
            line = f"keyspace {keyspace}: {count} {source} -> {target}: {format_buckets(buckets)}"
            yield Change(Effect.RELOCATES, line)


def _other_changes(old: ShardMap, new: ShardMap) -> Iterator[Change]:
    if old.cluster != new.cluster:
        yield Change(Effect.CHANGES, f"cluster {old.cluster} -> {new.cluster}")
    yield from _named("shard", old.shards, new.shards)
    for name in _kept(old.shards, new.shards):
        yield from _shard_changes(old.shards[name], new.shards[name])
    yield from _named("keyspace", old.keyspaces, new.keyspaces)
    for name in _kept(old.keyspaces, new.keyspaces):
        moving = bool(old.moves_of(name) or new.moves_of(name))
        yield from _keyspace_changes(old.keyspaces[name], new.keyspaces[name], moving=moving)
    for name in _kept(old.tables, new.tables):
        yield from _table_changes(old.tables[name], new.tables[name])
    jobs, new_jobs = ({move.job: move for move in layout.moves} for layout in (old, new))
    yield from _named("move", jobs, new_jobs)
    for job in _kept(jobs, new_jobs):
        if jobs[job] != new_jobs[job]:
            yield Change(Effect.CHANGES, f"move {job} changed")


def _kept(old: Mapping[str, object], new: Mapping[str, object]) -> Iterable[str]:
    return (name for name in old if name in new)


def _named(kind: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[Change]:
    yield from (Change(Effect.ADDS, f"{kind} {name} added") for name in new if name not in old)
    yield from (Change(Effect.REMOVES, f"{kind} {name} removed") for name in old if name not in new)


def _shard_changes(old: Shard, new: Shard) -> Iterator[Change]:
    before = [f"{role} {endpoint}" for role, endpoint in old.endpoints()]
    after = [f"{role} {endpoint}" for role, endpoint in new.endpoints()]
    if old.master != new.master:
        line = f"shard {old.name}: master {old.master} -> {new.master}: its rows have to be there already"
        yield Change(Effect.RELOCATES, line)
        before, after = before[1:], after[1:]
    yield from (Change(Effect.ADDS, f"shard {old.name}: {entry} added") for entry in after if entry not in before)
    yield from (Change(Effect.REMOVES, f"shard {old.name}: {entry} removed") for entry in before if entry not in after)
    for replica in (each for each in new.replicas if each in old.replicas):
        if old.weight(replica) != new.weight(replica):
            line = f"shard {old.name}: weight of {replica} {old.weight(replica)} -> {new.weight(replica)}"
            yield Change(Effect.CHANGES, line)
    if old.replication != new.replication:
        yield Change(Effect.CHANGES, f"shard {old.name}: replication {old.replication} -> {new.replication}")


def _keyspace_changes(old: Keyspace, new: Keyspace, *, moving: bool) -> Iterator[Change]:
    name = f"keyspace {old.name}"
    if old.partition != new.partition:
        if _rows_stay(old, new, moving=moving):
            yield Change(Effect.CHANGES, f"{name}: the partition changes, all rows stay where they are")
        else:
            yield Change(Effect.RELOCATES, f"{name}: the partition changes: rows would have to move")
    for table in sorted(old.tables.keys() | new.tables.keys()):
        if table not in new.tables:
            yield Change(Effect.REMOVES, f"{name}: table {table} removed")
        elif table not in old.tables:
            yield Change(Effect.ADDS, f"{name}: table {table} added")
    for table in sorted(set(old.reference) ^ set(new.reference)):
        added = table in new.reference
        line = f"{name}: reference table {table} {'added' if added else 'removed'}"
        yield Change(Effect.ADDS if added else Effect.REMOVES, line)
    for table in sorted(set(old.local) ^ set(new.local)):
        where = "each shard only" if table in new.local else "all shards"
        yield Change(Effect.CHANGES, f"{name}: what is unique in {table} is meant to be so on {where}")
    if old.generated_ids != new.generated_ids:
        yield Change(Effect.CHANGES, f"{name}: generated ids {'on' if new.generated_ids else 'off'}")


def _table_changes(old: TableInfo, new: TableInfo) -> Iterator[Change]:
    """A table that both maps have, but not in the same way."""
    one_shard = len({*old.shards, *new.shards}) == 1
    if old.kind == new.kind == "reference":
        if missing := [shard for shard in new.shards if shard not in old.shards]:
            yield Change(
                Effect.RELOCATES, f"reference table {old.name}: has to be copied to {', '.join(missing)} first"
            )
    elif (old.kind, old.keyspace.name) != (new.kind, new.keyspace.name):
        line = f"table {old.name}: {old.kind} in {old.keyspace.name} -> {new.kind} in {new.keyspace.name}"
        yield _relocation(line, stays=one_shard)
    elif old.key != new.key:
        line = f"table {old.name}: keyed by {', '.join(new.key)}, was {', '.join(old.key)}"
        yield _relocation(line, stays=one_shard)


def _relocation(line: str, *, stays: bool) -> Change:
    if stays:
        return Change(Effect.CHANGES, f"{line}, all rows stay where they are")
    return Change(Effect.RELOCATES, f"{line}: rows would have to move")


def _rows_stay(old: Keyspace, new: Keyspace, *, moving: bool) -> bool:
    """Whether every key that has a place now keeps its shard, bucket moves not regarded.

    :param moving: whether a job is moving buckets, as they are, to another shard.
    """
    renamed = old.normalize is not new.normalize  # keys with a capital get another bucket, or entry in the directory
    if renamed and old.directory and new.directory:
        return False  # also on one shard: keys that are filed would not be found, once there is another
    if len({*old.shards, *new.shards}) == 1 and not moving:
        return True
    if renamed:
        return False
    match old.partition, new.partition:
        case HashPartition() as before, HashPartition() as after:
            return before.count == after.count and _same_shards(old, new, [*before.exceptions, *after.exceptions])
        case ListPartition() as before, ListPartition():
            return _same_shards(old, new, [(value,) for values in before.values.values() for value in values])
        case RangePartition() as before, RangePartition() as after:
            # between two neighbouring ends of either map, all keys share their buckets with the lower end
            ends = {end for partition in (before, after) for bounds in partition.bounds.values() for end in bounds}
            return _same_shards(old, new, [(end,) for end in ends])
        case DirectoryPartition() as before, DirectoryPartition() as after:
            return before.home == after.home and set(before.names) <= set(after.names)
    return False


def _same_shards(old: Keyspace, new: Keyspace, keys: Iterable[tuple[Any, ...]]) -> bool:
    for key in keys:
        before, after = (_bucket(keyspace.partition, key) for keyspace in (old, new))
        if before is None:
            continue
        # a bucket that changes hands under its own name is a move, and said as one
        home = new.placement[before] if before in new.placement else old.placement[before]
        if after is None or new.placement[after] != home:
            return False
    return True


def _bucket(partition: Partition | None, key: tuple[Any, ...]) -> Bucket | None:
    try:
        return None if partition is None else partition.bucket_of(key)
    except TypeError:  # a key of another type than this partition's
        return None
