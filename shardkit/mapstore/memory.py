"""A map kept in the process: for tests, and for applications that build their map in code."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime

from shardkit.errors import MapNotFound
from shardkit.mapstore.store import ClientState, MapCallback, MapVersion, next_version, publisher, this_client
from shardkit.mapstore.watches import CallbackWatch
from shardkit.shardmap import ShardMap


class MemoryMapStore:
    """Keeps every version in memory. Watchers are called by the publishing thread.

    :param initial: the first map; it counts as version 1 where it has none.
    """

    def __init__(self, initial: ShardMap | None = None) -> None:
        self._lock = threading.Lock()
        self._versions: dict[int, tuple[ShardMap, MapVersion]] = {}
        self._current = 0
        self._watches: tuple[CallbackWatch, ...] = ()
        self._client: ClientState | None = None
        if initial is not None:
            self._put(initial.with_version(max(initial.version, 1)))

    def __repr__(self) -> str:
        return f"MemoryMapStore(version={self._current})"

    def _put(self, new: ShardMap) -> None:
        self._versions[new.version] = (new, MapVersion(new.version, datetime.now(UTC), publisher()))
        self._current = new.version

    @property
    def source(self) -> str:
        """Not a source that could be opened again."""
        return "memory:"

    def load(self) -> ShardMap:
        """The newest map.

        :raises MapNotFound: when nothing has been published yet.
        """
        return self.load_version(self._current)

    def publish(self, new: ShardMap, *, expected_version: int) -> ShardMap:
        """See `MapStore.publish`."""
        with self._lock:
            new = next_version(new, current=self._current, expected=expected_version)
            self._put(new)
            watches = self._watches
        for watch in watches:
            watch.offer(new)
        return new

    def watch(self, callback: MapCallback, *, after: int = 0) -> CallbackWatch:
        """See `MapStore.watch`."""
        watch = CallbackWatch(callback, after, self._remove)
        with self._lock:
            self._watches = (*self._watches, watch)
            current = self._versions.get(self._current)
        if current is not None:
            watch.offer(current[0])
        return watch

    def _remove(self, watch: CallbackWatch) -> None:
        with self._lock:
            self._watches = tuple(other for other in self._watches if other is not watch)

    def history(self, limit: int | None = None) -> Sequence[MapVersion]:
        """See `MapStore.history`."""
        return tuple(entry for _, entry in list(self._versions.values()))[-limit if limit else 0 :]

    def load_version(self, version: int) -> ShardMap:
        """See `MapStore.load_version`."""
        try:
            return self._versions[version][0]
        except KeyError:
            raise MapNotFound(
                f"version {version} of the shard map was never published" if version else "no shard map is published",
                hint="publish one with MapStore.publish(new, expected_version=0)",
            ) from None

    def announce(self, version: int) -> None:
        """Noted for `clients`."""
        self._client = this_client(version)

    def clients(self) -> Sequence[ClientState]:
        """This process, where it has announced itself."""
        return () if self._client is None else (self._client,)

    def close(self) -> None:
        """End all watches; the maps stay."""
        with self._lock:
            self._watches = ()
