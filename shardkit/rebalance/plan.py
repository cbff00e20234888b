"""Plans: which buckets go where, chosen by what each holds; and the file that a plan is kept in. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from shardkit.errors import PreconditionFailed, UnknownTable
from shardkit.partition import Bucket, format_buckets, parse_buckets
from shardkit.shardmap import Keyspace, ShardMap

FORMAT = 1
#: Evening out is not worth a move below this share of a shard's fair load.
WORTH = 0.05

#: Bucket -> what it weighs: rows, or bytes.
Weights: TypeAlias = Mapping[Bucket, int]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Buckets that go from one shard to another, as one job.

    :param rows: in these buckets when the plan was made.
    :param size: bytes of their values.
    """

    keyspace: str
    buckets: tuple[Bucket, ...]
    source: str
    target: str
    rows: int
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What `apply_plan` does.

    :param map_version: the version of the map that it was made for; it is refused once that has changed.
    :param notes: what to know before applying it.
    """

    id: str
    cluster: str
    map_version: int
    created_at: datetime
    transfers: tuple[Transfer, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that will move."""
        return sum(transfer.rows for transfer in self.transfers)

    @property
    def size(self) -> int:
        """Bytes that will move."""
        return sum(transfer.size for transfer in self.transfers)

    def job_id(self, number: int) -> str:
        """The name of the job that does the transfer of this number, from 0."""
        return f"{self.id}-{number + 1}"

    def result(self, shard_map: ShardMap) -> ShardMap:
        """The map as it will be."""
        for transfer in self.transfers:
            shard_map = shard_map.with_placement(transfer.keyspace, dict.fromkeys(transfer.buckets, transfer.target))
        return shard_map

    # --- the file

    def dump(self) -> str:
        """As YAML."""
        text: str = yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=110)
        return text

    def document(self) -> dict[str, Any]:
        """As plain data: the file's content, and the ``--json`` of the command line."""
        return {
            "format": FORMAT,
            "id": self.id,
            "cluster": self.cluster,
            "map_version": self.map_version,
            "created_at": self.created_at.isoformat(),
            "transfers": [
                {
                    "keyspace": transfer.keyspace,
                    "buckets": format_buckets(transfer.buckets),
                    "source": transfer.source,
                    "target": transfer.target,
                    "rows": transfer.rows,
                    "bytes": transfer.size,
                }
                for transfer in self.transfers
            ],
            "notes": list(self.notes),
        }

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan's file, YAML or JSON.

        :raises PreconditionFailed: when it cannot be read, or is not a plan.
        """
        try:
            return cls.parse(Path(path).read_text(encoding="utf-8"), source=str(path))
        except OSError as error:
            raise PreconditionFailed(
                f"the plan {path} cannot be read: {error.strerror}", hint="make one with 'shardkit rebalance plan'"
            ) from None

    @classmethod
    def parse(cls, text: str, *, source: str = "the plan") -> Plan:
        """Read a plan's text.

        :raises PreconditionFailed: when it is not a plan.
        """
        try:
            fields = yaml.safe_load(text)
            return cls(
                id=_id(fields),
                cluster=str(fields["cluster"]),
                map_version=int(fields["map_version"]),
                created_at=_time(fields["created_at"]),
                transfers=tuple(
                    Transfer(
                        str(entry["keyspace"]),
                        tuple(parse_buckets(str(entry["buckets"]))),
                        str(entry["source"]),
                        str(entry["target"]),
                        int(entry["rows"]),
                        int(entry["bytes"]),
                    )
                    for entry in fields["transfers"]
                ),
                notes=tuple(str(note) for note in fields.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError, yaml.YAMLError, json.JSONDecodeError) as error:
            raise PreconditionFailed(
                f"{source} is not a plan that this shardkit reads: {type(error).__name__} {error}".splitlines()[0],
                hint="make a new one with 'shardkit rebalance plan'",
            ) from None


def _id(fields: Mapping[str, Any]) -> str:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']}")
    return str(fields["id"])


def _time(value: object) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(str(value))


# --- what is asked for -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MoveBuckets:
    """These buckets to this shard."""

    buckets: tuple[Bucket, ...]
    target: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Everything away from this shard, over the others."""

    shard: str


@dataclass(frozen=True, slots=True)
class Add:
    """A fair share to this shard, from all others."""

    shard: str


@dataclass(frozen=True, slots=True)
class Split:
    """A part of one shard's load to another.

    :param fraction: the part, between 0 and 1.
    """

    shard: str
    target: str
    fraction: float = 0.5


@dataclass(frozen=True, slots=True)
class Even:
    """The same load on every shard that has buckets of the keyspace."""


Wish: TypeAlias = MoveBuckets | Drain | Add | Split | Even


def choose(keyspace: Keyspace, weights: Weights, wish: Wish, shards: Iterable[str]) -> Mapping[Bucket, str]:
    """Which buckets move, and to which shard. Neighbours stay together, so that the map stays short.

    :param weights: what each bucket holds; buckets that it does not name hold nothing.
    :param shards: every shard of the map.
    :raises UnknownTable: for a bucket or a shard that the map does not have.
    :raises PreconditionFailed: when what is asked for cannot be.
    """
    known = tuple(shards)
    for shard in _shards_of(wish):
        if shard not in known:
            raise UnknownTable(f"the map has no shard {shard!r}", hint=f"it has {', '.join(known)}")
    match wish:
        case MoveBuckets():
            return _explicit(keyspace, wish)
        case Split():
            if not 0 < wish.fraction <= 1:
                raise PreconditionFailed(f"a fraction of {wish.fraction:g} is not between 0 and 1")
            return _spread(keyspace, weights, {wish.shard: wish.fraction}, {wish.target: 1.0})
        case Drain():
            others = [shard for shard in keyspace.shards if shard != wish.shard] or [
                shard for shard in known if shard != wish.shard
            ]
            if not others:
                raise PreconditionFailed(
                    f"there is no other shard to take {wish.shard}'s buckets", hint="add one to the map first"
                )
            return _spread(keyspace, weights, {wish.shard: 1.0}, _room(keyspace, weights, others))
        case Add():
            if keyspace.buckets_on(wish.shard):
                return _even(keyspace, weights, keyspace.shards)
            return _even(keyspace, weights, (*keyspace.shards, wish.shard))
        case Even():
            return _even(keyspace, weights, keyspace.shards, worth=WORTH)


def _shards_of(wish: Wish) -> tuple[str, ...]:
    match wish:
        case MoveBuckets():
            return (wish.target,)
        case Split():
            return (wish.shard, wish.target)
        case Drain() | Add():
            return (wish.shard,)
        case Even():
            return ()


def _explicit(keyspace: Keyspace, wish: MoveBuckets) -> Mapping[Bucket, str]:
    unknown = [bucket for bucket in wish.buckets if bucket not in keyspace.placement]
    if unknown:
        raise UnknownTable(
            f"keyspace {keyspace.name!r} has no bucket {format_buckets(unknown)}",
            hint=f"it has {_short(format_buckets(keyspace.placement))}",
        )
    return {bucket: wish.target for bucket in wish.buckets if keyspace.placement[bucket] != wish.target}


def _loads(keyspace: Keyspace, weights: Weights) -> dict[str, float]:
    """What each shard holds. Where nothing is stored yet, a bucket counts as one."""
    loads = dict.fromkeys(keyspace.shards, 0.0)
    for bucket, shard in keyspace.placement.items():
        loads[shard] += _weight(weights, bucket)
    return loads


def _weight(weights: Weights, bucket: Bucket) -> float:
    return float(weights.get(bucket, 0)) if any(weights.values()) else 1.0


def _room(keyspace: Keyspace, weights: Weights, others: Sequence[str]) -> Mapping[str, float]:
    """What part of the drained load each other shard takes, so that they end up level."""
    loads = _loads(keyspace, weights)
    goal = sum(loads.values()) / len(others)
    room = {shard: max(goal - loads.get(shard, 0.0), 0.0) for shard in others}
    total = sum(room.values())
    return {shard: part / total for shard, part in room.items()} if total else {others[0]: 1.0}


def _even(keyspace: Keyspace, weights: Weights, shards: Sequence[str], *, worth: float = 0.0) -> Mapping[Bucket, str]:
    loads = _loads(keyspace, weights)
    goal = sum(loads.values()) / len(shards)
    surplus = {shard: load - goal for shard, load in loads.items() if load > goal * (1 + worth)}
    lack = {shard: goal - loads.get(shard, 0.0) for shard in shards if loads.get(shard, 0.0) < goal}
    wanted = sum(lack.values())
    if not surplus or not wanted:
        return {}
    return _spread(
        keyspace,
        weights,
        {shard: extra / loads[shard] for shard, extra in surplus.items()},
        {shard: part / wanted for shard, part in lack.items()},
    )


def _spread(
    keyspace: Keyspace, weights: Weights, give: Mapping[str, float], take: Mapping[str, float]
) -> Mapping[Bucket, str]:
    """Take the last buckets of each giving shard up to its part of its load, and hand them out in order."""
    known = any(weights.values())

    def weight(bucket: Bucket) -> float:
        return float(weights.get(bucket, 0)) if known else 1.0

    leaving: list[Bucket] = []
    for shard, fraction in give.items():
        held = keyspace.buckets_on(shard)
        due = sum(weight(bucket) for bucket in held) * fraction
        last: list[Bucket] = []
        for bucket in reversed(held):
            if fraction < 1 and weight(bucket) / 2 >= due:  # closer to the goal without it
                break
            last.append(bucket)
            due -= weight(bucket)
        leaving += reversed(last)
    total = sum(weight(bucket) for bucket in leaving)
    chosen: dict[Bucket, str] = {}
    targets = list(take.items())
    filled = 0.0
    for bucket in leaving:
        while len(targets) > 1 and filled + weight(bucket) / 2 >= targets[0][1] * total:
            targets.pop(0)
            filled = 0.0
        filled += weight(bucket)
        chosen[bucket] = targets[0][0]
    return {bucket: shard for bucket, shard in chosen.items() if keyspace.placement[bucket] != shard}


# --- transfers ---------------------------------------------------------------------------------------------------


def transfers_of(
    keyspace: Keyspace,
    chosen: Mapping[Bucket, str],
    rows: Weights,
    size: Weights,
    *,
    group: int | None = None,
) -> tuple[Transfer, ...]:
    """The chosen moves as transfers, one for each pair of shards.

    :param group: at most so many buckets in one transfer: each job closes only its own buckets, but scans whole tables.
    """
    pairs: dict[tuple[str, str], list[Bucket]] = {}
    for bucket, target in chosen.items():
        pairs.setdefault((keyspace.placement[bucket], target), []).append(bucket)
    transfers: list[Transfer] = []
    for (source, target), buckets in pairs.items():
        step = group or len(buckets)
        for start in range(0, len(buckets), step):
            part = tuple(buckets[start : start + step])
            transfers.append(
                Transfer(
                    keyspace.name,
                    part,
                    source,
                    target,
                    sum(rows.get(bucket, 0) for bucket in part),
                    sum(size.get(bucket, 0) for bucket in part),
                )
            )
    return tuple(transfers)


def check_against(plan: Plan, shard_map: ShardMap) -> None:
    """Whether the plan still fits the map.

    :raises PreconditionFailed: when the map has changed since, or is another cluster's.
    """
    if plan.cluster != shard_map.cluster:
        raise PreconditionFailed(
            f"the plan is for cluster {plan.cluster!r}, the map is of {shard_map.cluster!r}", hint="check --map"
        )
    if plan.map_version != shard_map.version:
        raise PreconditionFailed(
            f"the plan was made for version {plan.map_version} of the map, which is at {shard_map.version} now",
            hint="make a new plan with 'shardkit rebalance plan'",
        )
    for transfer in plan.transfers:
        keyspace = shard_map.keyspace(transfer.keyspace)
        shard_map.shard(transfer.target)
        elsewhere = [bucket for bucket in transfer.buckets if keyspace.placement.get(bucket) != transfer.source]
        if elsewhere or transfer.source == transfer.target:
            raise PreconditionFailed(
                f"the plan moves bucket {_short(format_buckets(elsewhere or transfer.buckets))} of {transfer.keyspace} "
                f"from {transfer.source} to {transfer.target}, but the map does not place it on {transfer.source}",
                hint="make a new plan with 'shardkit rebalance plan'",
            )


def now() -> datetime:
    """The time that plans carry, in UTC to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
