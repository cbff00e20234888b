"""The checks of a written shard map: every fault with its line and its fix.

The structure (which fields, of which types) is the schema of `shardkit.mapschema`; what the fields mean together (every
bucket placed once, no gap between ranges, known shards) is checked after it. All faults found are raised as one error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from shardkit.errors import InvalidShardMap
from shardkit.mapfaults import schema_faults, shown
from shardkit.mapschema import (
    MAX_BYTES,
    WrittenDirectory,
    WrittenHash,
    WrittenKeyspace,
    WrittenList,
    WrittenMap,
    WrittenMove,
    WrittenRange,
    WrittenReplica,
    WrittenShard,
)
from shardkit.mapyaml import Path, read_yaml
from shardkit.normalization import Normalization
from shardkit.partition import (
    WHOLE,
    Bucket,
    DirectoryPartition,
    HashPartition,
    ListPartition,
    Partition,
    RangePartition,
    canonical_text,
    format_buckets,
    key_text,
    parse_buckets,
)
from shardkit.topology import DEFAULT_WEIGHT, Endpoint, ReplicationKind, Shard

_NUMBERS = re.compile(r"[0-9]+(-[0-9]+)?")


@dataclass(frozen=True)
class KeyspaceDocument:
    """One keyspace, checked."""

    partition: Partition | None
    tables: Mapping[str, tuple[str, ...]]
    reference: tuple[str, ...]
    placement: Mapping[Bucket, str]
    generated_ids: bool
    local: tuple[str, ...] = ()


@dataclass(frozen=True)
class MoveDocument:
    """One rebalance job at work, checked."""

    job: str
    keyspace: str
    buckets: tuple[Bucket, ...]
    source: str
    target: str


@dataclass(frozen=True)
class MapDocument:
    """A whole map, checked."""

    cluster: str
    version: int
    keyspaces: Mapping[str, KeyspaceDocument]
    shards: Mapping[str, Shard]
    moves: tuple[MoveDocument, ...]


def build_document(data: str | Mapping[str, Any], *, source: str | None = None) -> MapDocument:
    """Parse and check a map.

    :param data: YAML text, or the mapping that it would parse to.
    :raises InvalidShardMap: with every fault found, each with its line where ``data`` is text.
    """
    return _Checker(source).check(data)


@dataclass
class _Checker:
    source: str | None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def check(self, data: str | Mapping[str, Any]) -> MapDocument:
        written = self._read(data) if isinstance(data, str) else data
        self._raise_problems()
        try:
            schema = WrittenMap.model_validate(written)
        except ValidationError as error:
            for path, message in schema_faults(error, written):
                self._fault(path, message)
            self._raise_problems()
            raise AssertionError("pydantic refused the map without saying why") from error
        document = self._build(schema)
        self._raise_problems()
        return document

    def _raise_problems(self) -> None:
        if self.problems:
            in_order = sorted(self.problems, key=lambda problem: problem[0])
            raise InvalidShardMap(list(dict.fromkeys(text for _, text in in_order)), source=self.source)

    def _fault(self, path: Path, message: str) -> None:
        """Note a fault at the line of ``path``, or of its closest parent that has one."""
        line = next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        where = ".".join(str(part) for part in path) or "the map"
        self.problems.append((line or 0, f"line {line}: {where}: {message}" if line else f"{where}: {message}"))

    def _read(self, text: str) -> Any:
        if len(text.encode(errors="replace")) > MAX_BYTES:
            self._fault(
                (), f"is over {MAX_BYTES // 1024} KiB: write placements as spans, move long lists into a directory"
            )
            return None
        document = read_yaml(text)
        self.lines = document.lines
        for fault in document.faults:
            self._fault(fault.path, fault.message)
        return document.data

    # --- meaning

    def _build(self, schema: WrittenMap) -> MapDocument:
        shards = {name: shard for name, written in schema.shards.items() if (shard := self._shard(name, written))}
        self._one_owner(schema)
        keyspaces = {
            name: keyspace
            for name, written in schema.keyspaces.items()
            if (keyspace := self._keyspace(name, written, schema.shards)) is not None
        }
        self._endpoints_once(shards)
        moves = tuple(
            move
            for index, written in enumerate(schema.moves)
            if (move := self._move(index, written, keyspaces, schema.shards)) is not None
        )
        return MapDocument(schema.cluster, schema.version, keyspaces, shards, moves)

    def _shard(self, name: str, written: WrittenShard) -> Shard | None:
        path: Path = ("shards", name)
        master = self._endpoint((*path, "master"), written.master)
        staging = None if written.staging is None else self._endpoint((*path, "staging"), written.staging)
        replicas = [self._replica((*path, "replicas", index), each) for index, each in enumerate(written.replicas)]
        if master is None:
            return None
        return Shard(
            name,
            master,
            staging,
            tuple(endpoint for endpoint, _ in replicas if endpoint is not None),
            ReplicationKind(written.replication),
            written.epoch,
            {endpoint: weight for endpoint, weight in replicas if endpoint is not None and weight != DEFAULT_WEIGHT},
        )

    def _replica(self, path: Path, written: str | WrittenReplica) -> tuple[Endpoint | None, int]:
        if isinstance(written, str):
            return self._endpoint(path, written), DEFAULT_WEIGHT
        return self._endpoint((*path, "url"), written.url), written.weight

    def _endpoint(self, path: Path, url: str) -> Endpoint | None:
        try:
            return Endpoint.parse(url)
        except ValueError as error:
            self._fault(path, str(error))
            return None

    def _endpoints_once(self, shards: Mapping[str, Shard]) -> None:
        holder: dict[Endpoint, str] = {}
        for shard in shards.values():
            for role, endpoint in shard.endpoints():
                if endpoint in holder:
                    self._fault(
                        ("shards", shard.name, str(role)),
                        f"{endpoint} already serves {holder[endpoint]}: give each its own database",
                    )
                holder.setdefault(endpoint, f"{shard.name} as {role}")

    def _one_owner(self, schema: WrittenMap) -> None:
        owner: dict[str, str] = {}
        for name, keyspace in schema.keyspaces.items():
            for table in keyspace.tables:
                if table in owner:
                    self._fault(
                        ("keyspaces", name, "tables", table), f"is in keyspace {owner[table]!r} already: keep one"
                    )
                owner.setdefault(table, name)
        for name, keyspace in schema.keyspaces.items():
            for index, table in enumerate(keyspace.reference):
                if table in owner:
                    self._fault(
                        ("keyspaces", name, "reference", index),
                        f"{table!r} is sharded in keyspace {owner[table]!r}: it cannot be a reference table too",
                    )

    def _keyspace(
        self, name: str, written: WrittenKeyspace, shards: Mapping[str, WrittenShard]
    ) -> KeyspaceDocument | None:
        path: Path = ("keyspaces", name)
        before = len(self.problems)
        partition = self._partition(path, name, written)
        tables = self._tables(path, written, partition)
        if not tables and not written.reference:
            self._fault((*path, "tables"), "names no table")
        for index, table in enumerate(written.local):
            if table not in tables:
                fault = f"{table!r} is no table of this keyspace: it has {', '.join(tables)}"
                self._fault((*path, "local", index), fault)
        if len(self.problems) > before:
            return None
        if isinstance(partition, DirectoryPartition) and partition.home not in shards:
            self._fault((*path, "partition", "home"), _unknown_shard(partition.home, shards))
        placement = self._placement(path, written, partition, shards)
        return KeyspaceDocument(
            partition,
            tables,
            tuple(dict.fromkeys(written.reference)),
            placement,
            written.ids == "generated",
            tuple(dict.fromkeys(written.local)),
        )

    def _tables(
        self, path: Path, written: WrittenKeyspace, partition: Partition | None
    ) -> Mapping[str, tuple[str, ...]]:
        if isinstance(written.tables, list):
            if partition is not None:
                self._fault(
                    (*path, "tables"), "a horizontal keyspace names each table's key: write {table: key_column}"
                )
            if not all(written.tables):
                self._fault((*path, "tables"), "a table has no name")
            return dict.fromkeys(written.tables, ())
        if written.partition is None:
            self._fault(
                (*path, "tables"),
                "tables with keys need a partition: add 'partition: {by: hash}', or write the tables as a list",
            )
        tables = {table: (key,) if isinstance(key, str) else tuple(key) for table, key in written.tables.items()}
        widths = {table: len(key) for table, key in tables.items()}
        for table, key in tables.items():
            if not table:
                self._fault((*path, "tables", table), "a table has no name")
            elif not key or len(set(key)) != len(key) or not all(key):
                self._fault((*path, "tables", table), "needs key columns, each once")
            elif partition is not None and len(key) > 1 and not isinstance(partition, HashPartition):
                self._fault((*path, "tables", table), f"a {partition.by} partition has one key column, not {len(key)}")
            elif len(key) > 1 and isinstance(partition, HashPartition) and partition.exceptions:
                self._fault(
                    (*path, "partition", "exceptions"), "single keys can be pinned only where the key is one column"
                )
            elif len(key) != next(iter(widths.values())):
                first = next(iter(widths))
                self._fault(
                    (*path, "tables", table),
                    f"has {len(key)} key columns, {first} has {widths[first]}: tables of a keyspace share one key",
                )
        return tables

    def _partition(self, path: Path, name: str, written: WrittenKeyspace) -> Partition | None:
        here = (*path, "partition")
        match written.partition:
            case None:
                return None
            case WrittenHash() as by:
                self._bucket_names(here, by.exceptions.values())
                normalize = _normalization(by.normalize)
                values = [(str(key), key) for key in by.exceptions]
                if not self._key_values((*here, "exceptions"), values, normalize) or not self._pinned_once(
                    (*here, "exceptions"), by, normalize
                ):
                    return None
                pinned = {(_plain(key),): bucket for key, bucket in by.exceptions.items()}
                return HashPartition(by.buckets, pinned, normalize)
            case WrittenList() as by:
                self._bucket_names(here, by.buckets)
                normalize = _normalization(by.normalize)
                if not self._list_values(here, by, normalize):
                    return None
                listed = {bucket: tuple(map(_plain, values)) for bucket, values in by.buckets.items()}
                return ListPartition(listed, normalize)
            case WrittenRange() as by:
                self._bucket_names(here, by.buckets)
                if by.normalize is not None:
                    self._fault(
                        (*here, "normalize"),
                        "a range partition cannot normalize: its ranges follow the bytes of the texts, another order "
                        "than the collation's; use hash, list or directory, or a binary collation without padding",
                    )
                if not self._ranges(here, by) or by.normalize is not None:
                    return None
                return RangePartition({bucket: (low, high) for bucket, (low, high) in by.buckets.items()})
            case WrittenDirectory() as by:
                self._bucket_names(here, by.buckets)
                return DirectoryPartition(tuple(by.buckets), by.home, name, normalize=_normalization(by.normalize))

    def _bucket_names(self, path: Path, names: Iterable[str]) -> None:
        for name in names:
            if _NUMBERS.fullmatch(name):
                self._fault(
                    (*path, "buckets", name),
                    f"the bucket name {name!r} reads like numbered buckets: put a letter into it",
                )

    def _pinned_once(self, path: Path, written: WrittenHash, normalize: Normalization | None) -> bool:
        """Whether no two pinned keys are one to the normalization."""
        before: dict[str | None, Any] = {}
        good = True
        for key in written.exceptions:
            text = key_text((key,), normalize)
            if normalize is not None and text in before:
                self._fault((*path, str(key)), f"is the same key as {shown(before[text])} to 'normalize': keep one")
                good = False
            before.setdefault(text, key)
        return good

    def _key_values(
        self, path: Path, values: Iterable[tuple[str | int, Any]], normalize: Normalization | None = None
    ) -> bool:
        """Whether these are values of one key column.

        :param values: each with the place under ``path`` where it stands.
        """
        kinds: dict[str, None] = {}
        good = True
        for place, value in values:
            try:
                key_text((value,), normalize)
            except TypeError as error:
                self._fault((*path, place), f"{shown(value)}: {error}")
                good = False
            else:
                kinds |= {} if value is None else {_kind(value): None}
        if len(kinds) > 1:
            self._fault(path, f"mixes {' and '.join(kinds)}: key values are of the column's one type; quote strings")
        return good and len(kinds) <= 1

    def _list_values(self, path: Path, written: WrittenList, normalize: Normalization | None) -> bool:
        here = (*path, "buckets")
        if not self._key_values(
            here, ((bucket, value) for bucket in written.buckets for value in written.buckets[bucket]), normalize
        ):
            return False
        holder: dict[str | None, str] = {}
        for bucket, values in written.buckets.items():
            for index, value in enumerate(values):
                text = key_text((value,), normalize)
                if text in holder:
                    self._fault(
                        (*path, "buckets", bucket, index),
                        f"the value {shown(value)} is in bucket {holder[text]!r} already: keep one",
                    )
                holder.setdefault(text, bucket)
        return True

    def _ranges(self, path: Path, written: WrittenRange) -> bool:
        here = (*path, "buckets")
        if not self._key_values(here, ((bucket, end) for bucket in written.buckets for end in written.buckets[bucket])):
            return False
        ends = [end for bounds in written.buckets.values() for end in bounds]
        strange = next((end for end in ends if not isinstance(end, None | int | str | date)), None)
        if strange is not None or any(isinstance(end, bool) for end in ends):
            self._fault(here, "a range begins and ends at integers, strings, dates or date-times")
            return False
        previous: tuple[str, Any] | None = None
        for index, (bucket, (low, high)) in enumerate(written.buckets.items()):
            place = (*here, bucket)
            if low is not None and high is not None and not low < high:
                self._fault(place, f"[{low}, {high}) is empty: the low end must be below the high end")
            if low is None and index > 0:
                self._fault(place, "only the first range may be open below: order the ranges from low to high")
            if previous is not None and low is not None:
                self._adjoin(place, previous, low)
            previous = (bucket, high)
        return True

    def _adjoin(self, path: Path, previous: tuple[str, Any], low: Any) -> None:
        name, high = previous
        if high is None:
            self._fault(path, f"comes after {name!r}, which is open above: order the ranges from low to high")
        elif low > high:
            self._fault(path, f"leaves a gap: {name!r} ends before {high}, this starts at {low}")
        elif low < high:
            self._fault(path, f"overlaps {name!r}, which ends before {high}: start at {high}")

    def _placement(
        self, path: Path, written: WrittenKeyspace, partition: Partition | None, shards: Mapping[str, WrittenShard]
    ) -> Mapping[Bucket, str]:
        here = (*path, "placement")
        if partition is None:
            if not isinstance(written.placement, str):
                self._fault(here, "a vertical keyspace lives on one shard: write 'placement: shard-name'")
                return {}
            if written.placement not in shards:
                self._fault(here, _unknown_shard(written.placement, shards))
            return {WHOLE: written.placement}
        if isinstance(written.placement, str):
            self._fault(here, "say which shard has which buckets: {shard: buckets}")
            return {}
        return self._horizontal_placement(here, written.placement, partition, shards)

    def _horizontal_placement(
        self,
        path: Path,
        written: Mapping[str, str | list[int | str]],
        partition: Partition,
        shards: Mapping[str, WrittenShard],
    ) -> Mapping[Bucket, str]:
        known = set(partition.buckets)
        placed: dict[Bucket, str] = {}
        for shard, text in written.items():
            here = (*path, shard)
            if shard not in shards:
                self._fault(here, _unknown_shard(shard, shards))
            buckets = self._buckets(here, text)
            unknown = [bucket for bucket in buckets if bucket not in known]
            if unknown:
                self._fault(
                    here,
                    f"the partition has no bucket {_short_list(format_buckets(unknown))}: {_known_buckets(partition)}",
                )
            twice: dict[str, list[Bucket]] = {}
            for bucket in buckets:
                if bucket in placed:
                    twice.setdefault(placed[bucket], []).append(bucket)
                elif bucket in known:
                    placed[bucket] = shard
            for other, again in twice.items():
                self._fault(here, f"{_buckets_are(again)} placed on {other} already: place every bucket once")
        gap = [bucket for bucket in partition.buckets if bucket not in placed]
        if gap:
            self._fault(path, f"{_buckets_are(gap)} on no shard: place every bucket once")
        return {bucket: placed[bucket] for bucket in partition.buckets if bucket in placed}

    def _buckets(self, path: Path, written: str | list[int | str]) -> list[Bucket]:
        try:
            if isinstance(written, str):
                return parse_buckets(written)
            return [bucket for part in written for bucket in ([part] if isinstance(part, int) else parse_buckets(part))]
        except ValueError as error:
            self._fault(path, str(error))
            return []

    def _move(
        self,
        index: int,
        written: WrittenMove,
        keyspaces: Mapping[str, KeyspaceDocument],
        shards: Mapping[str, WrittenShard],
    ) -> MoveDocument | None:
        path: Path = ("moves", index)
        keyspace = keyspaces.get(written.keyspace)
        if keyspace is None:
            self._fault((*path, "keyspace"), f"there is no keyspace {written.keyspace!r}")
            return None
        for end, shard in (("source", written.source), ("target", written.target)):
            if shard not in shards:
                self._fault((*path, end), _unknown_shard(shard, shards))
        buckets = self._buckets((*path, "buckets"), written.buckets)
        strange = [
            bucket for bucket in buckets if keyspace.placement.get(bucket) not in {written.source, written.target}
        ]
        if strange:
            self._fault((*path, "buckets"), f"{_buckets_are(strange)} on neither end of the move")
        return MoveDocument(written.job, written.keyspace, tuple(buckets), written.source, written.target)


def _normalization(written: str | None) -> Normalization | None:
    return None if written is None else Normalization(written)


def _plain(value: Any) -> Any:
    """A key value as YAML can write it; what YAML has no form for becomes its canonical text."""
    if value is None or isinstance(value, int | date) or type(value) is str:
        return value
    return canonical_text(value)


def _kind(value: Any) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "booleans"),
        (int, "integers"),
        (str | bytes | UUID | Decimal | Enum, "strings"),
        (datetime, "date-times"),
        (date, "dates"),
    )
    for types, name in kinds:
        if isinstance(value, types):
            return name
    return f"{type(value).__name__} values"


def _unknown_shard(name: str, shards: Mapping[str, Any]) -> str:
    return f"there is no shard {name!r}: the map has {', '.join(shards)}"


def _buckets_are(buckets: Sequence[Bucket]) -> str:
    text = _short_list(format_buckets(buckets))
    return f"bucket {text} is" if len(buckets) == 1 else f"buckets {text} are"


def _known_buckets(partition: Partition) -> str:
    return f"it has {_short_list(format_buckets(partition.buckets))}"


def _short_list(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
