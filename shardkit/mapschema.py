"""The written form of a shard map: its fields, and the way from a map back to them.

One schema serves YAML files and the JSON in stores. What the fields mean together is checked in `shardkit.mapcheck`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shardkit.partition import (
    HASH_BUCKETS,
    WHOLE,
    DirectoryPartition,
    HashPartition,
    ListPartition,
    Partition,
    RangePartition,
    format_buckets,
)
from shardkit.topology import DEFAULT_WEIGHT, MAX_WEIGHT, Endpoint, ReplicationKind, Shard

if TYPE_CHECKING:
    from shardkit.shardmap import Keyspace, ShardMap

FORMAT = 1
MAX_BYTES = 512 * 1024  # ZooKeeper refuses a node over 1 MiB, and drops the connection while at it
MAX_HASH_BUCKETS = 65536
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$"

Name = Annotated[str, Field(pattern=_NAME)]


#: The words of `shardkit.normalization.Normalization`.
WrittenNormalization = Literal["lower"]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WrittenHash(_Schema):
    """``{by: hash, buckets: 4096, exceptions: {42: hot-1}, normalize: lower}``"""

    by: Literal["hash"]
    buckets: Annotated[int, Field(ge=1, le=MAX_HASH_BUCKETS)] = HASH_BUCKETS
    exceptions: dict[Any, Name] = Field(default_factory=dict)
    normalize: WrittenNormalization | None = None


class WrittenList(_Schema):
    """``{by: list, buckets: {seoul: [서울]}, normalize: lower}``"""

    by: Literal["list"]
    buckets: Annotated[dict[Name, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
    normalize: WrittenNormalization | None = None


class WrittenRange(_Schema):
    """``{by: range, buckets: {teens: [10, 20]}}``: ``[low, high)``, null is an open end."""

    by: Literal["range"]
    buckets: Annotated[dict[Name, Annotated[list[Any], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    normalize: Any = None  # refused with the reason


class WrittenDirectory(_Schema):
    """``{by: directory, buckets: [a, b], home: shop-0, normalize: lower}``"""

    by: Literal["directory"]
    buckets: Annotated[list[Name], Field(min_length=1)]
    home: Name
    normalize: WrittenNormalization | None = None


class WrittenKeyspace(_Schema):
    """One keyspace."""

    partition: (
        Annotated[WrittenHash | WrittenList | WrittenRange | WrittenDirectory, Field(discriminator="by")] | None
    ) = None
    tables: dict[str, str | list[str]] | list[str]
    reference: list[str] = Field(default_factory=list)
    local: list[str] = Field(default_factory=list)
    ids: Literal["generated"] | None = None
    placement: str | dict[Name, str | list[int | str]]


class WrittenReplica(_Schema):
    """``{url: mysql://host:3306/database, weight: 3}``; a replica of the usual weight is its URL alone."""

    url: str
    weight: Annotated[int, Field(ge=0, le=MAX_WEIGHT)] = DEFAULT_WEIGHT


class WrittenShard(_Schema):
    """One shard."""

    master: str
    staging: str | None = None
    replicas: list[str | WrittenReplica] = Field(default_factory=list)
    replication: Literal["relay", "native"] = "relay"
    epoch: Annotated[int, Field(ge=0)] = 0


class WrittenMove(_Schema):
    """One rebalance job at work."""

    job: str
    keyspace: Name
    buckets: str | list[int | str]
    source: Name
    target: Name


class WrittenMap(_Schema):
    """A whole map."""

    format: Literal[1]
    cluster: Name
    version: Annotated[int, Field(ge=0)] = 0
    keyspaces: Annotated[dict[Name, WrittenKeyspace], Field(min_length=1)]
    shards: Annotated[dict[Name, WrittenShard], Field(min_length=1)]
    moves: list[WrittenMove] = Field(default_factory=list)


# --- back to the written form ------------------------------------------------------------------------------------


def document_of(shard_map: ShardMap) -> dict[str, Any]:
    """The plain data that a map is written as: what `shardkit.mapcheck.build_document` reads."""
    document: dict[str, Any] = {"format": FORMAT, "cluster": shard_map.cluster, "version": shard_map.version}
    document["keyspaces"] = {name: dict(_keyspace_fields(keyspace)) for name, keyspace in shard_map.keyspaces.items()}
    document["shards"] = {name: dict(_shard_fields(shard)) for name, shard in shard_map.shards.items()}
    if shard_map.moves:
        document["moves"] = [
            {
                "job": move.job,
                "keyspace": move.keyspace,
                "buckets": format_buckets(move.buckets),
                "source": move.source,
                "target": move.target,
            }
            for move in shard_map.moves
        ]
    return document


def _keyspace_fields(keyspace: Keyspace) -> Iterator[tuple[str, Any]]:
    if keyspace.partition is None:
        yield "tables", list(keyspace.tables)
    else:
        yield "partition", _partition_fields(keyspace.partition)
        yield "tables", {table: key[0] if len(key) == 1 else list(key) for table, key in keyspace.tables.items()}
    if keyspace.reference:
        yield "reference", list(keyspace.reference)
    if keyspace.local:
        yield "local", list(keyspace.local)
    if keyspace.generated_ids:
        yield "ids", "generated"
    if keyspace.partition is None:
        yield "placement", keyspace.placement[WHOLE]
    else:
        yield "placement", {shard: format_buckets(keyspace.buckets_on(shard)) for shard in keyspace.shards}


def _partition_fields(partition: Partition) -> dict[str, Any]:
    fields = _fields_of(partition)
    return fields if partition.normalize is None else {**fields, "normalize": str(partition.normalize)}


def _fields_of(partition: Partition) -> dict[str, Any]:
    match partition:
        case HashPartition():
            fields: dict[str, Any] = {"by": "hash", "buckets": partition.count}
            if partition.exceptions:
                fields["exceptions"] = {key: bucket for (key,), bucket in partition.exceptions.items()}
            return fields
        case ListPartition():
            return {"by": "list", "buckets": {bucket: list(values) for bucket, values in partition.values.items()}}
        case RangePartition():
            return {"by": "range", "buckets": {bucket: list(ends) for bucket, ends in partition.bounds.items()}}
        case DirectoryPartition():
            return {"by": "directory", "buckets": list(partition.names), "home": partition.home}
    raise TypeError(f"{type(partition).__name__} has no written form")


def _shard_fields(shard: Shard) -> Iterator[tuple[str, Any]]:
    yield "master", shard.master.url
    if shard.staging is not None:
        yield "staging", shard.staging.url
    if shard.replicas:
        yield "replicas", [_replica_fields(replica, shard.weight(replica)) for replica in shard.replicas]
    if shard.replication is not ReplicationKind.RELAY:
        yield "replication", str(shard.replication)
    if shard.epoch:
        yield "epoch", shard.epoch


def _replica_fields(replica: Endpoint, weight: int) -> str | dict[str, Any]:
    return replica.url if weight == DEFAULT_WEIGHT else {"url": replica.url, "weight": weight}


# JSON has neither dates nor keys that are not strings, and a key 42 must never come back as "42": it is another key.
_DATE, _DATETIME, _PAIRS = "$date", "$datetime", "$pairs"


def to_json(document: dict[str, Any]) -> str:
    """A written map as compact JSON; `from_json` gives equal data back, types included."""
    return json.dumps(_plain(document), ensure_ascii=False, separators=(",", ":"))


def from_json(text: str | bytes) -> Any:
    """The opposite of `to_json`.

    :raises ValueError: for text that is not JSON, or not written by `to_json`.
    """
    try:
        return json.loads(text, object_hook=_typed)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not written by shardkit: {error}") from None


def _plain(value: Any) -> Any:
    match value:
        case dict() if any(not isinstance(key, str) for key in value):
            return {_PAIRS: [[_plain(key), _plain(item)] for key, item in value.items()]}
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case datetime():
            return {_DATETIME: value.isoformat()}
        case date():
            return {_DATE: value.isoformat()}
        case _:
            return value


def _typed(fields: dict[str, Any]) -> Any:
    match fields:
        case {"$pairs": list(pairs)}:
            return dict(pairs)
        case {"$datetime": str(text)}:
            return datetime.fromisoformat(text)
        case {"$date": str(text)}:
            return date.fromisoformat(text)
        case _:
            return fields
