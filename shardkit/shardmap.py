"""The shard map: which tables are sharded by which key, and which shard holds which bucket. Immutable, no I/O.

A map is read from YAML (people) or JSON (stores), checked as a whole, and never changed: `ShardMap.with_placement` and
its like make a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from shardkit.errors import InvalidShardMap, MissingKey, UnknownTable
from shardkit.mapcheck import MapDocument, build_document
from shardkit.mapdiff import MapDiff, diff_of
from shardkit.mapschema import document_of, from_json, to_json
from shardkit.normalization import Normalization
from shardkit.partition import WHOLE, Bucket, DirectoryLookup, DirectoryPartition, Key, Partition
from shardkit.topology import Shard

TableKind = Literal["sharded", "reference", "vertical"]


@dataclass(frozen=True)
class Keyspace:
    """Tables that are sharded together by one key, or, without a partition, whole tables on one shard.

    :param tables: table -> its key columns; no columns in a vertical keyspace.
    :param reference: tables that stand in full on every shard of the keyspace.
    :param placement: bucket -> shard; a vertical keyspace has the one bucket ``all``.
    :param generated_ids: whether a missing integer key is filled at flush.
    :param local: tables whose unique indexes and AUTO_INCREMENT ids are meant to be unique on each shard only.
    """

    name: str
    partition: Partition | None
    tables: Mapping[str, tuple[str, ...]]
    placement: Mapping[Bucket, str]
    reference: tuple[str, ...] = ()
    generated_ids: bool = False
    local: tuple[str, ...] = ()

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The shards that hold buckets of this keyspace, in order of their first bucket."""
        return tuple(dict.fromkeys(self.placement.values()))

    @property
    def directory(self) -> DirectoryPartition | None:
        """The partition, where it is a lookup table, in which every key that a row has must stand."""
        return self.partition if isinstance(self.partition, DirectoryPartition) else None

    @property
    def normalize(self) -> Normalization | None:
        """What is done to string keys before their bucket is looked for."""
        return None if self.partition is None else self.partition.normalize

    def buckets_on(self, shard: str) -> tuple[Bucket, ...]:
        """The buckets that the map places on this shard."""
        return tuple(bucket for bucket, holder in self.placement.items() if holder == shard)


@dataclass(frozen=True, slots=True)
class TableInfo:
    """Where a table stands in the map."""

    name: str
    kind: TableKind
    keyspaces: tuple[Keyspace, ...]
    key: tuple[str, ...] = ()

    @property
    def keyspace(self) -> Keyspace:
        """The table's keyspace; for a reference table that several share, the first of them."""
        return self.keyspaces[0]

    @property
    def shards(self) -> tuple[str, ...]:
        """Every shard that hosts the table."""
        return tuple(dict.fromkeys(shard for keyspace in self.keyspaces for shard in keyspace.shards))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one key lives."""

    keyspace: str
    bucket: Bucket
    shard: str


@dataclass(frozen=True, slots=True)
class Move:
    """Buckets that a rebalance job is moving: until they are published elsewhere they belong to ``source``.

    While a move stands in the map, rows of its buckets may be on both shards, so a statement that is not pinned to a
    bucket has to ask each shard for its own buckets only.
    """

    job: str
    keyspace: str
    buckets: tuple[Bucket, ...]
    source: str
    target: str


@dataclass(frozen=True)
class ShardMap:
    """One version of the cluster's layout.

    :param version: grows by one with every publication; 0 for a map that was never published.
    :param moves: rebalance jobs at work.
    """

    cluster: str
    keyspaces: Mapping[str, Keyspace]
    shards: Mapping[str, Shard]
    moves: tuple[Move, ...] = ()
    version: int = field(default=0)

    # --- reading and writing

    @classmethod
    def load(cls, path: str | Path) -> ShardMap:
        """Read a YAML file.

        :raises InvalidShardMap: naming the line and the fix of every fault, or that the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidShardMap([f"cannot be read: {error.strerror}"], source=str(path)) from None
        except UnicodeDecodeError as error:
            raise InvalidShardMap([f"is not UTF-8 text: byte {error.start}"], source=str(path)) from None
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, data: str | Mapping[str, Any], *, source: str | None = None) -> ShardMap:
        """Read YAML text (JSON is YAML too) or an already parsed document.

        :raises InvalidShardMap: naming every fault found.
        """
        return cls._from_document(build_document(data, source=source))

    @classmethod
    def from_json(cls, text: str | bytes) -> ShardMap:
        """Read what `to_json` wrote."""
        try:
            data = from_json(text)
        except ValueError as error:
            raise InvalidShardMap([f"is not JSON: {error}"]) from None
        return cls.parse(data)

    @classmethod
    def _from_document(cls, document: MapDocument) -> ShardMap:
        return cls(
            cluster=document.cluster,
            keyspaces=MappingProxyType(
                {
                    name: Keyspace(
                        name=name,
                        partition=keyspace.partition,
                        tables=MappingProxyType(dict(keyspace.tables)),
                        placement=MappingProxyType(dict(keyspace.placement)),
                        reference=keyspace.reference,
                        generated_ids=keyspace.generated_ids,
                        local=keyspace.local,
                    )
                    for name, keyspace in document.keyspaces.items()
                }
            ),
            shards=MappingProxyType(dict(document.shards)),
            moves=tuple(
                Move(move.job, move.keyspace, move.buckets, move.source, move.target) for move in document.moves
            ),
            version=document.version,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as JSON: read-only mappings have no form of their own in a pickle."""
        return ShardMap.from_json, (self.to_json(),)

    def dump(self) -> str:
        """The map as YAML, for people and for files. `parse` reads it back to an equal map."""
        text: str = yaml.safe_dump(document_of(self), sort_keys=False, allow_unicode=True, width=110)
        return text

    def to_json(self) -> str:
        """The map as compact JSON, for ZooKeeper."""
        return to_json(document_of(self))

    # --- asking

    @cached_property
    def _tables(self) -> Mapping[str, TableInfo]:
        tables: dict[str, TableInfo] = {}
        for keyspace in self.keyspaces.values():
            kind: TableKind = "vertical" if keyspace.partition is None else "sharded"
            for name, key in keyspace.tables.items():
                tables[name] = TableInfo(name, kind, (keyspace,), key)
            for name in keyspace.reference:
                before = tables[name].keyspaces if name in tables else ()
                tables[name] = TableInfo(name, "reference", (*before, keyspace))
        return tables

    @cached_property
    def sole_host(self) -> str | None:
        """The one shard that holds everything, so that every statement is for it; None where there are several.

        The others, if any, hold nothing yet, and no rebalance job is at work.
        """
        hosts = {shard for keyspace in self.keyspaces.values() for shard in keyspace.shards}
        if len(self.shards) == 1:
            return next(iter(self.shards))
        return next(iter(hosts)) if len(hosts) == 1 and not self.moves else None

    @cached_property
    def only(self) -> str | None:
        """The one shard of a cluster that is nothing but that database; None where there is more to know.

        A keyspace by directory wants its keys filed from the first row on, so that a second shard may come.
        """
        if len(self.shards) > 1 or any(keyspace.directory for keyspace in self.keyspaces.values()):
            return None
        return next(iter(self.shards))

    @property
    def tables(self) -> Mapping[str, TableInfo]:
        """Every table that the map names."""
        return self._tables

    def table(self, name: str) -> TableInfo:
        """Where this table stands.

        :raises UnknownTable: with the tables that come closest.
        """
        try:
            return self._tables[name]
        except KeyError:
            raise UnknownTable(
                f"the shard map of {self.cluster!r} does not name the table {name!r}",
                hint=_did_you_mean(name, self._tables)
                + f"add it to a keyspace; the map has {_some(sorted(self._tables))}",
            ) from None

    def keyspace(self, name: str) -> Keyspace:
        """A keyspace by name.

        :raises UnknownTable: when there is none.
        """
        try:
            return self.keyspaces[name]
        except KeyError:
            raise UnknownTable(
                f"the shard map of {self.cluster!r} has no keyspace {name!r}",
                hint=f"{_did_you_mean(name, self.keyspaces)}it has {_some(sorted(self.keyspaces))}",
            ) from None

    def shard(self, name: str) -> Shard:
        """A shard by name.

        :raises UnknownTable: when there is none.
        """
        try:
            return self.shards[name]
        except KeyError:
            raise UnknownTable(
                f"the shard map of {self.cluster!r} has no shard {name!r}",
                hint=f"{_did_you_mean(name, self.shards)}it has {_some(sorted(self.shards))}",
            ) from None

    def locate(self, table: str, key: Mapping[str, Any] | Sequence[Any] = ()) -> Placement:
        """The bucket and the shard of one key.

        :param key: the key columns' values, by name or in the map's order; of a column that is not a string, the
            value must have the column's Python type (``5`` and ``"5"`` are different keys).
        :raises UnknownTable: for a table that the map does not name, or a reference table (it is on every shard).
        :raises MissingKey: when a key column is missing, or no bucket takes the value.
        """
        info = self.table(table)
        if info.kind == "reference":
            raise UnknownTable(
                f"{table!r} is a reference table: it stands on every shard of {info.keyspace.name!r}",
                hint="ask for a sharded table",
            )
        if info.kind == "vertical":
            return self.placement_of(info.keyspace, ())
        if isinstance(key, Mapping):
            missing = [column for column in info.key if column not in key]
            extra = [column for column in key if column not in info.key]
            if missing or extra:
                raise MissingKey(
                    f"{table!r} is sharded by {', '.join(info.key)}, not by {', '.join(key) or 'nothing'}",
                    table=table,
                    key=info.key,
                    hint=f"give {', '.join(f'{column}=...' for column in info.key)}",
                )
            values = tuple(key[column] for column in info.key)
        else:
            values = tuple(key)
            if len(values) != len(info.key):
                raise MissingKey(
                    f"{table!r} is sharded by {', '.join(info.key)}: {len(values)} values were given",
                    table=table,
                    key=info.key,
                )
        try:
            return self.placement_of(info.keyspace, values)
        except MissingKey as error:
            raise MissingKey(error.message, table=table, key=info.key, hint=error.hint) from None

    def placement_of(self, keyspace: Keyspace, key: Key) -> Placement:
        """The bucket and shard of a key of this keyspace, given as values in the map's order.

        :raises MissingKey: when no bucket takes the value.
        """
        if keyspace.partition is None:
            return Placement(keyspace.name, WHOLE, keyspace.placement[WHOLE])
        try:
            bucket = keyspace.partition.bucket_of(key)
        except TypeError as error:
            raise MissingKey(f"keyspace {keyspace.name!r}: {error}") from None
        if bucket is None:
            shown = ", ".join(repr(value) for value in key)
            raise MissingKey(
                f"no bucket of keyspace {keyspace.name!r} takes the key {shown}",
                hint="file it first: cluster.assign(table, key, bucket)"
                if keyspace.directory
                else f"add it to a bucket of the {keyspace.partition.by} partition",
            )
        return Placement(keyspace.name, bucket, keyspace.placement[bucket])

    def moves_of(self, keyspace: str) -> tuple[Move, ...]:
        """The rebalance jobs at work in this keyspace."""
        return tuple(move for move in self.moves if move.keyspace == keyspace)

    # --- changing, into a new map

    def with_version(self, version: int) -> ShardMap:
        """The same layout under another version number."""
        return replace(self, version=version)

    def with_moves(self, moves: Iterable[Move]) -> ShardMap:
        """The same placement with other jobs at work."""
        return replace(self, moves=tuple(moves))

    def with_shards(self, shards: Mapping[str, Shard]) -> ShardMap:
        """The same keyspaces with other endpoints.

        :raises InvalidShardMap: when a placement names a shard that is gone.
        """
        return _checked(replace(self, shards=MappingProxyType(dict(shards))))

    def with_lookup(self, lookup: DirectoryLookup) -> ShardMap:
        """The same map, whose keyspaces by directory look up their keys with ``lookup``."""
        keyspaces = {
            name: replace(keyspace, partition=replace(keyspace.directory, lookup=lookup))
            for name, keyspace in self.keyspaces.items()
            if keyspace.directory
        }
        return replace(self, keyspaces=MappingProxyType({**self.keyspaces, **keyspaces})) if keyspaces else self

    def with_placement(self, keyspace: str, changes: Mapping[Bucket, str]) -> ShardMap:
        """The same map with some buckets of one keyspace placed elsewhere.

        :raises InvalidShardMap: for an unknown bucket or shard.
        """
        before = self.keyspace(keyspace)
        after = replace(before, placement=MappingProxyType({**before.placement, **changes}))
        return _checked(replace(self, keyspaces=MappingProxyType({**self.keyspaces, keyspace: after})))

    # --- comparing

    def diff(self, new: ShardMap) -> MapDiff:
        """What changes from this map to ``new``."""
        return diff_of(self, new)


def _checked(changed: ShardMap) -> ShardMap:
    return ShardMap.parse(document_of(changed))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"did you mean {close[0]!r}? " if close else ""


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{shown}, and {len(names) - most} more" if len(names) > most else shown
