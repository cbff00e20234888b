"""All hops of a shard or of a cluster in one process, following the map as it changes."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed, ShardkitError, UnknownTable
from shardkit.mapstore import MapStore, ZooKeeperMapStore
from shardkit.shardmap import ShardMap
from shardkit.telemetry import RelayMetrics
from shardkit.topology import ReplicationKind, Role, Shard
from shardkit_cdc.election import Election, Unopposed, ZooKeeperElection
from shardkit_cdc.heartbeat import Heartbeat
from shardkit_cdc.janitor import JanitorTask
from shardkit_cdc.livestate import LiveStateTask
from shardkit_cdc.relay import Hop, HopOptions, HopSpec, State

logger = logging.getLogger(__name__)

#: Hops apply and read in threads. Python's usual 5 ms between thread switches would add up to several per batch.
_SWITCH_INTERVAL = 0.0005  # seconds
#: How long a hop may wait for its election before it counts as another daemon's, in seconds.
_STANDBY_GRACE = 3.0
#: Events are made and dropped by the hundred thousand and never in cycles: looking for those costs a third of reading.
_COLLECT_AFTER = 100_000  # objects
#: What a hop does when nothing is wrong.
_WELL = frozenset({State.RUNNING, State.STANDBY})
_ENDED = frozenset({State.FAILED, State.FENCED, State.STOPPED})


def tune_process() -> None:
    """Settings of the whole process that suit relaying. For whoever owns the process: nothing here calls it."""
    sys.setswitchinterval(_SWITCH_INTERVAL)
    gc.set_threshold(_COLLECT_AFTER, 20, 20)


def hops_of(shard: Shard) -> tuple[HopSpec, ...]:
    """The relay links of a shard: master -> staging -> each replica, or master -> each replica without staging.

    None with native replication, none without replicas, and none for SQLite.
    """
    if shard.replication is not ReplicationKind.RELAY or shard.master.dialect != "mysql":
        return ()
    if shard.staging is None:
        return tuple(HopSpec(shard.name, shard.master, each, Role.REPLICA, True) for each in shard.replicas)
    first = HopSpec(shard.name, shard.master, shard.staging, Role.STAGING, True)
    return (first, *(HopSpec(shard.name, shard.staging, each, Role.REPLICA, False) for each in shard.replicas))


def _has_copies(shard: Shard) -> bool:
    return shard.master.dialect == "mysql" and (shard.staging is not None or bool(shard.replicas))


class _Task(Protocol):
    """Something that runs in a thread of its own until it is asked to stop."""

    def run(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(slots=True)
class _Running:
    task: _Task
    thread: threading.Thread


class Relay:
    """The relay of this process: hops and heartbeats of some or all shards.

    Daemons on other machines may run the same hops: with a map in ZooKeeper one of them is elected per hop, and with
    any map the position in each target fences the others.

    :param shards: names of the shards to serve; all of the map's by default.
    :param on_change: called with a hop, in its thread, whenever its state changes.
    """

    def __init__(
        self,
        store: MapStore,
        credentials: CredentialSource,
        *,
        shards: Collection[str] = (),
        options: HopOptions | None = None,
        metrics: RelayMetrics | None = None,
        on_change: Callable[[Hop], None] | None = None,
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._shards = frozenset(shards)
        self._options = options or HopOptions()
        self.metrics = metrics or RelayMetrics()
        self._on_change = on_change
        self._runner = f"{socket.gethostname()}:{os.getpid()}"
        self._running: dict[object, _Running] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._current: ShardMap | None = None
        self._changed = threading.Condition()

    def start(self) -> None:
        """Start every hop of the map and follow the map from then on.

        :raises MapStoreUnavailable: when there is no map to be had.
        :raises UnknownTable: for a shard that the map does not have.
        :raises PreconditionFailed: when there is nothing to relay.
        """
        current = self._store.load()
        unknown = self._shards - set(current.shards)
        if unknown:
            raise UnknownTable(
                f"the shard map has no shard {', '.join(sorted(unknown))}",
                hint=f"its shards are {', '.join(sorted(current.shards))}",
            )
        if not any(map(_has_copies, self._served(current))):
            raise PreconditionFailed(
                "no shard that is served here has a staging database or replicas",
                hint="name them in the shard map: staging: mysql://host/database, replicas: [mysql://...]",
            )
        for shard in self._served(current):
            self._credentials(shard.master)  # a stand-by that could never log on would be found out too late
        self._current = current
        self._follow(current)
        self._watch = self._store.watch(self._follow, after=current.version)

    def stop(self, *, timeout: float = 30.0) -> None:
        """Ask every hop to commit what it has at hand, and wait for it.

        :param timeout: seconds to wait in all; threads that are still busy then end with the process.
        """
        with self._lock:
            self._stopping = True
            running = list(self._running.values())
        self._watch.close()
        for each in running:
            each.task.stop()
        end = time.monotonic() + timeout
        for each in running:
            each.thread.join(max(0.0, end - time.monotonic()))

    @property
    def hops(self) -> tuple[Hop, ...]:
        """The hops of this process, running or ended."""
        with self._lock:
            return tuple(each.task for each in self._running.values() if isinstance(each.task, Hop))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every hop has ended by itself; false when the time is up first."""
        with self._changed:
            return self._changed.wait_for(self._all_ended, timeout)

    def unready(self) -> list[str]:
        """Why this process does not do all that it should, a line each: hops that neither run nor wait for election.

        A paused hop is named too: its target gets older, whoever wants it so.
        """
        with self._lock:
            if self._stopping:
                return ["stopping"]
            if self._current is None:
                return ["starting: the map has not been loaded"]
        reports = [(hop.spec.name, hop.report.state, hop.report.pause or hop.report.error) for hop in self.hops]
        return [
            f"{name}: {why if state is State.PAUSED and why else f'{state.value}: {why}' if why else state.value}"
            for name, state, why in reports
            if state not in _WELL
        ]

    def refused(self, *, timeout: float = 20.0, stop: threading.Event | None = None) -> list[ShardkitError]:
        """Wait for every hop's first attempt; the errors, if not one of them could start.

        :param timeout: seconds to wait at most.
        :param stop: ends the waiting.

        Hops that cannot start while others do are no reason to end: they are tried again, and their state says why.
        """
        grace = time.monotonic() + _STANDBY_GRACE

        def settled(hop: Hop) -> bool:
            if hop.report.state is State.STANDBY:
                return time.monotonic() >= grace
            return hop.report.state not in {State.NEW, State.STARTING}

        end = time.monotonic() + timeout
        with self._changed:
            while time.monotonic() < end and not all(map(settled, self.hops)) and not (stop and stop.is_set()):
                self._changed.wait(0.1)
        errors = [hop.report.error for hop in self.hops]
        # A connection lost while starting is no refusal: the next attempt may well find everything in order.
        refusals = [error for error in errors if error is not None and not isinstance(error, Interrupted)]
        return refusals if len(refusals) == len(errors) else []

    def _all_ended(self) -> bool:
        hops = self.hops
        return bool(hops) and all(hop.report.state in _ENDED for hop in hops)

    # --- following the map

    def _served(self, current: ShardMap) -> list[Shard]:
        return [shard for name, shard in current.shards.items() if not self._shards or name in self._shards]

    def _follow(self, current: ShardMap) -> None:
        """Start what the map has and this process does not run yet; end what the map has no more."""
        wanted: dict[object, Callable[[], _Task]] = {}
        for shard in self._served(current):
            for spec in hops_of(shard):
                wanted[spec] = partial(self._hop, spec, current.cluster)
            if _has_copies(shard):
                wanted[shard.name, shard.master] = partial(self._heartbeat, shard)
                if isinstance(self._store, ZooKeeperMapStore):
                    wanted[shard] = partial(self._live_state, shard, self._store)
        wanted["janitor"] = self._janitor
        with self._lock:
            self._current = current
            if self._stopping:
                return
            gone = [self._running.pop(each) for each in list(self._running) if each not in wanted]
            for each, make in wanted.items():
                if each not in self._running:
                    self._running[each] = self._started(make())
        for ended in gone:
            ended.task.stop()

    def _started(self, task: _Task) -> _Running:
        name = task.spec.name if isinstance(task, Hop) else type(task).__name__
        thread = threading.Thread(target=task.run, name=name, daemon=True)
        thread.start()
        return _Running(task, thread)

    def _hop(self, spec: HopSpec, cluster: str) -> Hop:
        return Hop(
            spec,
            self._credentials,
            cluster=cluster,
            runner=self._runner,
            election=self._election("relay", spec.name, "leader"),
            options=self._options,
            metrics=self.metrics,
            on_change=self._noticed,
        )

    def _heartbeat(self, shard: Shard) -> Heartbeat:
        election = self._election("relay", shard.name, "heartbeat")
        return Heartbeat(shard.name, shard.master, self._credentials, election=election)

    def _live_state(self, shard: Shard, store: ZooKeeperMapStore) -> LiveStateTask:
        election = self._election("relay", shard.name, "live")
        return LiveStateTask(shard, self._credentials, store, by=self._runner, election=election)

    def _janitor(self) -> JanitorTask:
        """One for the whole cluster: a branch on one shard may be decided on any other."""
        return JanitorTask(
            lambda: self._current.shards if self._current else {},
            self._credentials,
            election=self._election("relay", "janitor"),
        )

    def _election(self, *place: str) -> Election:
        if isinstance(self._store, ZooKeeperMapStore):
            return ZooKeeperElection(self._store.client, self._store.path(*place), self._runner)
        return Unopposed()

    def _noticed(self, hop: Hop) -> None:
        if self._on_change is not None:
            self._on_change(hop)
        with self._changed:
            self._changed.notify_all()
