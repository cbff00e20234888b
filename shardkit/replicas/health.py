"""The background poller: asks every replica for its lag, so that sessions know where they may read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from shardkit.errors import ShardkitError
from shardkit.own_tables import applied_position, heartbeat
from shardkit.replicas.lag import Reading, is_fresh
from shardkit.topology import Endpoint

logger = logging.getLogger(__name__)

#: Seconds between two looks at a replica.
POLL_SECONDS = 0.2
#: Seconds after which a look that has not been repeated says nothing any more.
STALE_AFTER = 2.0
#: Looks at the same time, so that a server that hangs does not hold up the others.
_PARALLEL = 8

#: A replica: its shard, its number among the shard's replicas, its endpoint.
Replica = tuple[str, int, Endpoint]


class ReplicaHealth:
    """The lag of every replica of a cluster, as this process sees it.

    The thread starts with the first question, and again in a child process after a fork.

    :param replicas: the replicas of the current map.
    :param engine_of: the engine to ask one with.
    :param max_lag: seconds.
    """

    def __init__(
        self,
        replicas: Callable[[], Iterable[Replica]],
        engine_of: Callable[[Replica], Engine],
        max_lag: float,
        interval: float = POLL_SECONDS,
    ) -> None:
        self._replicas = replicas
        self._engine_of = engine_of
        self._max_lag = max_lag
        self._interval = interval
        self._readings: dict[Replica, Reading] = {}
        self._fresh: set[Replica] = set()
        self._asked: set[Replica] = set()
        self._lock = threading.Lock()
        self._seen = threading.Condition()
        self._closed = threading.Event()
        self._pid = 0

    def start(self) -> None:
        """Begin to poll, unless it is being done."""
        if self._pid == os.getpid() or self._closed.is_set():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            self._pid = os.getpid()
            self._asked = set()
            threading.Thread(target=self._run, name="shardkit-replica-lag", daemon=True).start()

    def after_fork(self) -> None:
        """In a child process: locks that nobody holds; the thread starts with the next question."""
        self._lock = threading.Lock()
        self._seen = threading.Condition()
        self._readings = {}
        self._fresh = set()

    def reading(self, replica: Replica) -> Reading | None:
        """The last look at a replica."""
        return self._readings.get(replica)

    def fresh(self, replicas: Sequence[Replica]) -> list[Replica]:
        """Those of these replicas that may serve reads now."""
        self.start()
        now = time.monotonic()
        return [replica for replica in replicas if replica in self._fresh and self._judge(replica, now)]

    def _judge(self, replica: Replica, now: float) -> bool:
        return is_fresh(
            self._readings.get(replica),
            was_fresh=replica in self._fresh,
            max_lag=self._max_lag,
            now=now,
            stale_after=STALE_AFTER,
        )

    def wait(self, timeout: float = 5.0) -> bool:
        """Wait until every replica of the map has been looked at once, and say whether all are fresh."""
        self.start()
        wanted = set(self._replicas())
        with self._seen:
            self._seen.wait_for(lambda: wanted <= self._readings.keys(), timeout)
        return wanted <= self._fresh

    def close(self) -> None:
        """Stop polling."""
        self._closed.set()

    def _run(self) -> None:
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="shardkit-lag") as pool:
            while not self._closed.wait(self._interval if self._readings else 0):
                for replica in list(self._replicas()):
                    if replica not in self._asked:  # else its last look still hangs
                        self._asked.add(replica)
                        try:
                            pool.submit(self._look, replica)
                        except RuntimeError:  # the interpreter is ending
                            return

    def _look(self, replica: Replica) -> None:
        began = time.monotonic()
        try:
            reading = _read(self._engine_of(replica), replica[0], began)
        except (SQLAlchemyError, ShardkitError, OSError) as error:
            reading = Reading(None, None, began, error=str(getattr(error, "orig", None) or error))
        before = self._readings.get(replica)
        self._readings[replica] = reading
        if self._judge(replica, time.monotonic()):
            self._fresh.add(replica)
        else:
            self._fresh.discard(replica)
        if reading.error and (before is None or not before.error):
            logger.warning("replica %s of shard %s gets no reads: %s", replica[2], replica[0], reading.error)
        self._asked.discard(replica)
        with self._seen:
            self._seen.notify_all()


def _read(engine: Engine, shard: str, began: float) -> Reading:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":  # same machine, same clock
            written = connection.scalar(select(heartbeat.c.written_at).where(heartbeat.c.shard == shard))
            lag = None if written is None else time.time() - written / 1e6
            return Reading(lag, None, began)
        row: Any = connection.execute(applied_position(shard)).one()
    lag = None if row.written_at is None else max(0.0, (row.now - row.written_at) / 1e6)
    return Reading(lag, row.position, began)
