"""Where the shard map is kept: in ZooKeeper, in a file, or in memory."""

from __future__ import annotations

from pathlib import Path

from shardkit.errors import ShardMapError
from shardkit.mapstore.file import FileMapStore
from shardkit.mapstore.memory import MemoryMapStore
from shardkit.mapstore.store import ClientState, MapCallback, MapStore, MapVersion, Watch
from shardkit.mapstore.zookeeper import ZooKeeperMapStore
from shardkit.shardmap import ShardMap

__all__ = [
    "ClientState",
    "FileMapStore",
    "MapCallback",
    "MapStore",
    "MapVersion",
    "MemoryMapStore",
    "Watch",
    "ZooKeeperMapStore",
    "open_store",
]


def open_store(source: str | Path | ShardMap, *, timeout: float = 10.0) -> MapStore:
    """The store that a source names. Nothing is read or connected yet.

    :param source: ``zookeeper://h1:2181,h2:2181/cluster``, ``file:path``, a path that ends in ``.yaml`` or ``.yml``, or
        a `ShardMap` (kept in memory).
    :param timeout: seconds that reaching the store may take.
    :raises ShardMapError: for anything else, with the forms that there are.
    """
    match source:
        case ShardMap():
            return MemoryMapStore(source)
        case Path():
            return FileMapStore(source, timeout=timeout)
        case str() if source.startswith("zookeeper:"):
            return ZooKeeperMapStore.from_source(source, timeout=timeout)
        case str() if source.startswith("file:"):
            return FileMapStore(source.removeprefix("file:"), timeout=timeout)
        case str() if source.endswith((".yaml", ".yml")):
            return FileMapStore(source, timeout=timeout)
    raise ShardMapError(
        f"{source!r} is not a map source",
        hint="write zookeeper://host:2181/cluster, file:shardmap.yaml, or a path that ends in .yaml",
    )
