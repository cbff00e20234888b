"""The background poller: asks every replica for its lag, so that sessions know where they may read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import Engine, literal_column, select
from sqlalchemy.exc import SQLAlchemyError

from shardkit.errors import ShardkitError
from shardkit.own_tables import heartbeat, now_microseconds
from shardkit.replicas.lag import Reading, is_fresh
from shardkit.replicas.positions import flavour_of, position_query
from shardkit.replicas.token import Mark
from shardkit.topology import Endpoint, Role, Shard

logger = logging.getLogger(__name__)

#: Seconds between two looks at a replica.
POLL_SECONDS = 0.2
#: Seconds after which a look that has not been repeated says nothing any more.
STALE_AFTER = 2.0
#: Looks at the same time, so that a server that hangs does not hold up the others.
_PARALLEL = 8

#: Seconds that the first look at a shard's replicas may take before its master is read instead.
_FIRST_LOOK = 1.0
#: Seconds between two looks at a replica that a reader waits for.
_HURRY = 0.002

#: A replica: its shard, its number among the shard's replicas, its endpoint.
Replica = tuple[str, int, Endpoint]


class ReplicaHealth:
    """The lag of every replica of a cluster, as this process sees it.

    The thread starts with the first question, and again in a child process after a fork.

    :param replicas: the replicas of the current map.
    :param engine_of: the engine to ask one with.
    :param shard_of: the shard of this name in the current map.
    :param max_lag: seconds.
    """

    def __init__(
        self,
        replicas: Callable[[], Iterable[Replica]],
        engine_of: Callable[[Replica], Engine],
        shard_of: Callable[[str], Shard],
        max_lag: float,
        interval: float = POLL_SECONDS,
    ) -> None:
        self._replicas = replicas
        self._engine_of = engine_of
        self._shard_of = shard_of
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

    def fresh(self, replicas: Sequence[Replica], max_lag: float | None = None) -> list[Replica]:
        """Those of these replicas that may serve reads now.

        :param max_lag: seconds that this reader allows; the cluster's unless given.
        """
        self.start()
        now = time.monotonic()
        if max_lag is not None:
            return [replica for replica in replicas if self._judge(replica, now, max_lag, was_fresh=True)]
        return [replica for replica in replicas if replica in self._fresh and self._judge(replica, now, self._max_lag)]

    def first(self, replicas: Sequence[Replica], max_lag: float | None = None) -> list[Replica]:
        """`fresh`; where nobody has looked at one of them yet, as in a process that has just begun, that is waited for.

        :param max_lag: as `fresh`.
        """

        def known() -> bool:
            return bool(self.fresh(replicas, max_lag)) or self.has_looked(replicas)

        with self._seen:
            self._seen.wait_for(known, _FIRST_LOOK)
        return self.fresh(replicas, max_lag)

    def has_looked(self, replicas: Sequence[Replica]) -> bool:
        """Whether every one of them has been looked at in this process."""
        return all(replica in self._readings for replica in replicas)

    def _judge(self, replica: Replica, now: float, max_lag: float, *, was_fresh: bool | None = None) -> bool:
        return is_fresh(
            self._readings.get(replica),
            was_fresh=replica in self._fresh if was_fresh is None else was_fresh,
            max_lag=max_lag,
            now=now,
            stale_after=STALE_AFTER,
        )

    def covering(self, replicas: Sequence[Replica], mark: Mark) -> list[Replica]:
        """Those of these replicas that have what the mark asks for, for all that is known here: maybe more have."""
        found = []
        for replica in replicas:
            reading = self._readings.get(replica)
            if reading is not None and mark.covered_by(reading.epoch, reading.position):
                found.append(replica)
        return found

    def wait_for(self, replicas: Sequence[Replica], mark: Mark, timeout: float) -> list[Replica]:
        """Wait until one of these replicas has what the mark asks for; those that have, none after the timeout.

        :param timeout: seconds.
        """
        end = time.monotonic() + timeout
        turn = 0
        while not (found := self.covering(replicas, mark)) and (left := end - time.monotonic()) > 0:
            replica = replicas[turn % len(replicas)]
            turn += 1
            if self._take(replica):
                self._look(replica)
                if not self.covering([replica], mark):
                    time.sleep(min(_HURRY, left))
            else:
                with self._seen:
                    self._seen.wait(min(_HURRY * 5, left))
        return found

    def eject(self, replica: Replica) -> None:
        """Take a replica out until it answers again."""
        self._fresh.discard(replica)
        before = self._readings.get(replica)
        if before is not None and not before.error:
            self._readings[replica] = Reading(None, None, time.monotonic(), error="its connection was lost")

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
                    if self._take(replica):  # else its last look still hangs
                        try:
                            pool.submit(self._look, replica)
                        except RuntimeError:  # the interpreter is ending
                            return

    def _take(self, replica: Replica) -> bool:
        """Whether this thread is to look at a replica: nobody else is doing so."""
        with self._lock:
            free = replica not in self._asked
            if free:
                self._asked.add(replica)
            return free

    def _look(self, replica: Replica) -> None:
        """Look at a replica that was taken."""
        try:
            self._note(replica)
        except Exception as error:  # whatever it was, the replica is to be looked at again
            logger.exception("replica %s of shard %s could not be looked at", replica[2], replica[0])
            self._fresh.discard(replica)
            self._readings[replica] = Reading(None, None, time.monotonic(), error=repr(error))
        finally:
            with self._lock:
                self._asked.discard(replica)
            with self._seen:
                self._seen.notify_all()

    def _note(self, replica: Replica) -> None:
        began = time.monotonic()
        try:
            reading = _read(self._engine_of(replica), self._shard_of(replica[0]), began)
        except (SQLAlchemyError, ShardkitError, OSError) as error:
            reading = Reading(None, None, began, error=str(getattr(error, "orig", None) or error))
        before = self._readings.get(replica)
        self._readings[replica] = reading
        if self._judge(replica, time.monotonic(), self._max_lag):
            self._fresh.add(replica)
        else:
            self._fresh.discard(replica)
        if reading.error and (before is None or not before.error):
            logger.warning("replica %s of shard %s gets no reads: %s", replica[2], replica[0], reading.error)


def _read(engine: Engine, shard: Shard, began: float) -> Reading:
    beat = select(heartbeat.c.written_at).where(heartbeat.c.shard == shard.name).scalar_subquery()
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":  # same machine, same clock
            written = connection.scalar(select(beat))
            lag = None if written is None else time.time() - written / 1e6
            return Reading(lag, None, began)
        query = position_query(shard.name, Role.REPLICA, shard.replication, flavour_of(engine.dialect))
        position, written, now = connection.execute(
            select(literal_column(query.expression), beat, now_microseconds())
        ).one()
    lag = None if written is None else max(0.0, (now - written) / 1e6)
    return Reading(lag, query.read(position), began, epoch=shard.epoch)
