"""Statements that have to be answered by a certain time: past it they are killed on their servers.

The connection of a killed statement is discarded, so that a KILL which arrives late can never hit the next statement.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection

from shardkit.cluster import Cluster
from shardkit.errors import DeadlineExceeded, RoutingError

logger = logging.getLogger(__name__)

#: Seconds that a killed statement has to end; then its connection is cut.
_GRACE = 1.0


def checked_seconds(seconds: Any) -> float | None:
    """What the execution option ``shardkit_deadline`` says.

    :raises RoutingError: for what is no number of seconds.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise RoutingError(f"shardkit_deadline is {seconds!r}", hint="give a number of seconds above 0")
    return float(seconds)


class Deadline:
    """A time limit for statements on several connections.

    :param seconds: from now; None: there is no limit, and nothing is done.
    :param cluster: knows how to reach the servers of its connections.
    """

    def __init__(self, seconds: float | None, cluster: Cluster) -> None:
        self._seconds = seconds
        self._cluster = cluster
        self._lock = threading.Lock()
        self._running: dict[Connection, str] = {}
        self._late: set[Connection] = set()
        self._expired = False
        self._ended = threading.Event()
        self._timer = None if seconds is None else threading.Timer(seconds, self._expire)

    def __enter__(self) -> Self:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.name = "shardkit-deadline"
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._ended.set()

    @contextlib.contextmanager
    def over(self, shard: str, connection: Connection) -> Iterator[None]:
        """A statement on this connection.

        :raises DeadlineExceeded: when it ran past its time, however it ended.
        """
        if self._timer is None:
            yield
            return
        with self._lock:
            if self._expired:
                raise self._exceeded(shard)
            self._running[connection] = shard
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
            raise
        finally:
            with self._lock:
                del self._running[connection]
                late = connection in self._late
            if late:
                connection.invalidate(error)
                raise self._exceeded(shard) from error

    def _exceeded(self, shard: str) -> DeadlineExceeded:
        self._cluster.metrics.late.labels(shard).inc()
        return DeadlineExceeded(
            f"shard {shard} did not answer within {self._seconds:g} s: the statement was killed",
            shard=shard,
            hint="roll back; narrow the statement, or give it more time with shardkit_deadline",
        )

    # --- on the timer's thread

    def _expire(self) -> None:
        with self._lock:
            self._expired = True
            victims = dict(self._running)
            self._late |= set(victims)
        for connection, shard in victims.items():
            try:
                self._kill(connection)
            except Exception as error:  # noqa: BLE001 - it is cut off below
                logger.warning("a statement on shard %s could not be killed: %s", shard, error)
        if self._ended.wait(_GRACE):
            return
        with self._lock:
            for connection in victims:
                if connection in self._running:
                    _cut(connection)

    def _kill(self, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        if connection.dialect.name == "sqlite":
            getattr(driver, "_conn", driver).interrupt()  # aiosqlite keeps the real one inside
            return
        helper = self._cluster.helper_of(connection.engine)
        if helper is not None:
            with helper.connect() as other:
                other.exec_driver_sql(f"KILL QUERY {driver.thread_id():d}")


def _cut(connection: Connection) -> None:
    """Close the socket under a driver that waits for an answer which does not come."""
    driver: Any = connection.connection.driver_connection
    transport = getattr(driver, "_transport", None)  # asyncmy's, which belongs to the event loop's thread
    if isinstance(transport, asyncio.Transport):
        with contextlib.suppress(RuntimeError):  # the loop has ended
            driver._loop.call_soon_threadsafe(transport.abort)  # noqa: SLF001 - has no public name
        return
    own = getattr(driver, "_sock", None)
    if isinstance(own, socket.socket):
        with contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)
