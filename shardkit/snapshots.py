"""The map as transactions see it: each runs on the version that it began with, and the store is told the oldest in use.

A rebalance job waits until every process has told that it runs on the job's version. So the version told must never be
ahead of a transaction that is still open.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

from shardkit.routing.planner import Planner
from shardkit.routing.rawsql import Tables, no_tables
from shardkit.shardmap import ShardMap


class View:
    """One version of the map, with what was worked out from it.

    :ivar planner: plans statements on this map.
    :ivar only: the one shard of a cluster that has no other; see `ShardMap.only`.
    :ivar homes: kept by sessions: where the objects of each mapped class live.
    :ivar cores: kept by clusters: the engines of this map's endpoints. They come with the map, so that nobody has a new
        map and an old master.
    :ivar tokens: kept by sessions: whether objects of these tables carry their shard in their identity.
    :ivar wide: kept by sessions: whether loading one object of a mapped class may read other rows along with its own.
    """

    __slots__ = ("cores", "homes", "map", "only", "planner", "tokens", "wide")

    def __init__(self, shard_map: ShardMap, dialect_name: str, tables: Tables = no_tables) -> None:
        self.map = shard_map
        self.planner = Planner(shard_map, dialect_name=dialect_name, tables=tables)
        self.only = shard_map.only
        self.homes: dict[Any, Any] = {}
        self.tokens: dict[tuple[str, ...], bool] = {}
        self.wide: dict[Any, bool] = {}
        self.cores: dict[Any, Any] = {}


class Pin:
    """One transaction's hold on a version of the map. Dropped by `release`, or with the object."""

    __slots__ = ("_snapshots", "_token", "view")

    def __init__(self, snapshots: Snapshots, token: int, pinned: View) -> None:
        self._snapshots = snapshots
        self._token = token
        self.view = pinned

    def release(self) -> None:
        """Let go. May be called twice."""
        self._snapshots.let_go(self._token, self.view.map.version)

    def __del__(self) -> None:
        self.release()


class Snapshots:
    """The current map and the versions that open transactions hold.

    `pin` and `Pin.release` take no lock: they run in every transaction, and a release may run inside the garbage
    collector. What they do to the dictionary of holds is atomic by itself.

    :param dialect_name: of the cluster's servers.
    :param announce: told the oldest version in use, each time that it rises; must not block.
    :param tables: the application's tables, by name.
    """

    def __init__(
        self,
        initial: ShardMap,
        dialect_name: str,
        announce: Callable[[int], None],
        tables: Tables = no_tables,
    ) -> None:
        self._dialect_name = dialect_name
        self._tables = tables
        self._current = View(initial, dialect_name, tables)
        self._announce = announce
        self._told = 0
        self._tokens = itertools.count()
        self._holds: dict[int, int] = {}  # token -> version
        self._new_locks()
        self._tell()

    def _new_locks(self) -> None:
        self._lock = threading.Lock()
        self._released: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting = False

    @property
    def current(self) -> View:
        """The newest map accepted."""
        return self._current

    def pin(self) -> Pin:
        """Hold the current map."""
        token = next(self._tokens)
        while True:
            pinned = self._current
            self._holds[token] = pinned.map.version
            if pinned is self._current:  # else a newer map came in between, and may have been announced already
                return Pin(self, token, pinned)

    def let_go(self, token: int, version: int) -> None:
        """End a hold."""
        if self._holds.pop(token, None) is not None and version < self._current.map.version:
            self._released.put(None)

    def accept(self, new: ShardMap) -> bool:
        """Take a map that is newer than the current one; False, and nothing done, for any other."""
        with self._lock:
            if new.version <= self._current.map.version:
                return False
            self._current = View(new, self._dialect_name, self._tables)
            self._tell()
            if self._told < new.version and not self._waiting:
                self._waiting = True
                threading.Thread(target=self._wait, name="shardkit-map-holds", daemon=True).start()
        return True

    def oldest(self) -> int:
        """The oldest version that an open transaction runs on; the current one where none is open."""
        current = self._current.map.version
        return min([*self._holds.values(), current])

    def _tell(self) -> None:
        oldest = self.oldest()
        if oldest > self._told:
            self._told = oldest
            self._announce(oldest)

    def _wait(self) -> None:
        """While transactions hold older maps: tell each time that the oldest version in use rises."""
        released = self._released
        while True:
            released.get()
            with self._lock:
                self._tell()
                if self._told >= self._current.map.version:
                    self._waiting = False
                    return

    def after_fork(self) -> None:
        """In a child process: the parent's transactions are not ours."""
        self._new_locks()
        self._holds = {}
        self._told = 0
        self._tell()
