"""The newest map that a store has seen, and the thread that hands newer ones to whoever watches."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable

from shardkit.errors import ShardMapError
from shardkit.mapstore.store import MapCallback
from shardkit.shardmap import ShardMap

logger = logging.getLogger(__name__)


class CallbackWatch:
    """One callback, and the newest version that it was given."""

    def __init__(self, callback: MapCallback, after: int, remove: Callable[[CallbackWatch], None]) -> None:
        self._callback = callback
        self._seen = after
        self._remove = remove
        self._closed = False

    def close(self) -> None:
        """End the subscription."""
        self._closed = True
        self._remove(self)

    def offer(self, newest: ShardMap) -> None:
        """Hand the map over if it is newer than all before it."""
        if self._closed or newest.version <= self._seen:
            return
        self._seen = newest.version
        try:
            self._callback(newest)
        except Exception:  # a watcher's fault must not keep the others from their map
            logger.exception("a watcher of the shard map failed on version %d", newest.version)


class Watches:
    """The newest map of one store and its watchers.

    A daemon thread, started when there is something to do, calls ``refresh`` when woken and every ``interval``
    seconds, then hands the newest map to the watchers. After a fork the child gets a thread of its own.

    :param refresh: looks for a newer map and passes it to `see`; `ShardMapError` and `OSError` are logged once an
        outage, and tried again.
    :param interval: seconds between two looks where nobody wakes the thread.
    :param forked: called first in a child process, to drop what belongs to the parent.
    """

    def __init__(
        self, name: str, refresh: Callable[[], None], interval: float, forked: Callable[[], None] | None = None
    ) -> None:
        self._name = name
        self._refresh = refresh
        self._interval = interval
        self._forked = forked
        self._watches: tuple[CallbackWatch, ...] = ()
        self._newest: ShardMap | None = None
        self._complaint = ""
        self._running = False
        self._closed = False
        self._new_locks()
        _on_fork(self)

    def _new_locks(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def newest(self) -> ShardMap | None:
        """The newest map seen."""
        return self._newest

    def see(self, found: ShardMap) -> ShardMap:
        """Take note of a map that was read; the newest one seen is returned. A lower version is never accepted."""
        with self._lock:
            newest = self._newest
            if newest is None or found.version > newest.version:
                self._newest = found
                return found
        if found.version < newest.version:
            self._complain(f"ignored version {found.version}: version {newest.version} was seen before")
        elif found != newest:
            self._complain(f"ignored a change under the same version {found.version}: raise the version")
        return newest

    def instead(self, error: ShardMapError) -> ShardMap:
        """The newest map seen, in place of one that cannot be read now.

        :raises ShardMapError: the error itself, when none has been seen.
        """
        if self._newest is None or self._closed:
            raise error
        self._complain(f"cannot be read now, version {self._newest.version} stays in use: {error}")
        return self._newest

    def add(self, callback: MapCallback, after: int) -> CallbackWatch:
        """A new watcher; starts the thread."""
        watch = CallbackWatch(callback, after, self._remove)
        with self._lock:
            self._watches = (*self._watches, watch)
        self.start()
        return watch

    def _remove(self, watch: CallbackWatch) -> None:
        with self._lock:
            self._watches = tuple(other for other in self._watches if other is not watch)

    def start(self) -> None:
        """Start the thread, or wake it."""
        with self._lock:
            if not self._closed and self._thread is None:
                self._running = True
                self._thread = threading.Thread(target=self._run, name=f"shardkit-map-{self._name}", daemon=True)
                self._thread.start()
        self._wake.set()

    def wake(self) -> None:
        """Have the thread look at once. Safe in any callback: it only sets an event."""
        self._wake.set()

    def close(self) -> None:
        """Stop the thread, waiting for it unless called from a watcher."""
        with self._lock:
            self._closed = True
            self._watches = ()
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=10)

    def _run(self) -> None:
        wake = self._wake
        while not self._closed:
            wake.wait(self._interval)
            wake.clear()
            if self._closed:
                break
            try:
                self._refresh()
                self._complaint = ""
            except (ShardMapError, OSError) as error:
                self._complain(f"cannot be read now: {error}")
            except Exception:
                logger.exception("the watch of the shard map %s goes on after an unexpected error", self._name)
            self.deliver()

    def deliver(self) -> None:
        """Hand the newest map to every watcher that has not had it."""
        newest = self._newest
        if newest is not None:
            for watch in self._watches:
                watch.offer(newest)

    def _complain(self, message: str) -> None:
        if message != self._complaint:
            self._complaint = message
            logger.warning("the shard map %s %s", self._name, message)

    def after_fork(self) -> None:
        """In a child process: locks that nobody holds, and a thread of its own where there was one."""
        self._new_locks()
        if self._forked is not None:
            self._forked()
        if self._running and not self._closed:
            self.start()


_alive: weakref.WeakSet[Watches] = weakref.WeakSet()
_registered = threading.Event()


def _on_fork(watches: Watches) -> None:
    _alive.add(watches)
    if not _registered.is_set():
        _registered.set()
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for watches in list(_alive):
        watches.after_fork()
