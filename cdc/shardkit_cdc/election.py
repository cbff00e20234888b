"""Who runs a hop: elected in ZooKeeper, or, with a map in a file, whoever was started last.

An election only keeps daemons out of each other's way. What keeps them from doing harm is the compare-and-set in the
target (`shardkit_cdc.position`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from kazoo.exceptions import KazooException
from kazoo.protocol.states import KazooState

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether to go on waiting.
_PATIENCE = 1.0


class Election(Protocol):
    """Decides when this process runs one thing."""

    #: Whether others may be waiting to take over.
    shared: bool

    def lead(self, stop: threading.Event) -> AbstractContextManager[threading.Event | None]:
        """Wait until elected; give an event that is set when leadership is lost, or None when ``stop`` came first."""
        ...

    def cancel(self) -> None:
        """Wake a waiting `lead` after its ``stop`` has been set."""
        ...


class Unopposed:
    """No election: this process runs it."""

    shared = False

    @contextmanager
    def lead(self, stop: threading.Event) -> Iterator[threading.Event | None]:
        """Lead at once."""
        yield None if stop.is_set() else threading.Event()

    def cancel(self) -> None:
        """Nothing waits."""


class ZooKeeperElection:
    """Election by kazoo's lock recipe. A suspended connection counts as lost leadership.

    :param client: a started kazoo client.
    :param path: the lock's node.
    :param candidate: who this is, for people who look at the node.
    """

    shared = True

    def __init__(self, client: Any, path: str, candidate: str) -> None:
        self._client = client
        self._path = path
        # One lock object for good: after a suspended connection its node may still be there, under a name that only
        # this object knows, and a new one would wait behind it for ever.
        self._lock = client.Lock(path, candidate)

    @contextmanager
    def lead(self, stop: threading.Event) -> Iterator[threading.Event | None]:
        """Wait for the lock, hold it for as long as the block runs, and tell when it may have been lost."""
        lost = threading.Event()

        def listen(state: Any) -> None:
            # Runs in kazoo's own thread: only a flag may be set here, a ZooKeeper call would dead-lock.
            if state != KazooState.CONNECTED:
                lost.set()

        self._client.add_listener(listen)
        try:
            yield lost if self._acquired(stop, lost) else None
        finally:
            self._client.remove_listener(listen)
            if self._client.state == KazooState.CONNECTED:
                self._release()

    def cancel(self) -> None:
        """Wake a waiting `lead`."""
        self._lock.cancel()

    def _acquired(self, stop: threading.Event, lost: threading.Event) -> bool:
        while not stop.is_set():
            if self._client.state != KazooState.CONNECTED:
                stop.wait(_PATIENCE)
                continue
            lost.clear()
            try:
                self._lock.release()  # what an earlier, suspended leadership may have left
                if self._lock.acquire() and not lost.is_set():
                    return True
            except KazooException as error:
                if not stop.is_set():
                    logger.info("election at %s: %r; trying again", self._path, error)
                    stop.wait(_PATIENCE)
        return False

    def _release(self) -> None:
        try:
            self._lock.release()
        except KazooException as error:
            logger.info("could not give up %s: %r", self._path, error)
