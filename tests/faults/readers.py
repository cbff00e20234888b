"""Processes that read a shard's replicas without a pause, and tell when they have noticed what of its replicas.

All times are of `time.monotonic`, which on Linux is one clock for all processes of a machine.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

import shardkit
from shardkit import create_cluster
from shardkit.credentials import CredentialSource, fixed
from shardkit.demo.relay_process import RelayProcess
from shardkit.errors import ShardkitError
from shardkit.mapstore import MapStore, open_store
from shardkit.testing import LocalCluster
from shardkit.testing.database import Flavour, LocalDatabaseServer
from shardkit.topology import Endpoint, Role
from tests.faults.lists import SHARD, Base, Entry, lists_map

#: Seconds that processes are given to notice.
_PATIENCE = 60.0
#: Which server answers.
PORT = sa.select(sa.literal_column("@@port")).where(sa.exists().where(Entry.owner == 1))


@dataclass
class Report:
    """What one process has done since its report before.

    :ivar fresh: the ports of the replicas that may be read.
    :ivar since: when these have become so.
    :ivar reads: by the port that answered.
    :ivar failed: what reads have failed with.
    """

    version: int = 0
    fresh: frozenset[int] = frozenset()
    since: float = 0.0
    reads: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


def read(pipe: Connection, source: str, user: str, password: str) -> None:
    """Read until told to stop; a report for each word that comes."""
    with create_cluster(source, credentials=fixed(user, password), max_lag=30.0) as cluster:
        sessions = shardkit.sessionmaker(cluster)
        report = Report()
        while True:
            if pipe.poll():
                if not pipe.recv():
                    return
                report.version = cluster.map.version
                pipe.send(report)
                report = Report(fresh=report.fresh, since=report.since)
            replicas = [(SHARD, number, each) for number, each in enumerate(cluster.map.shard(SHARD).replicas)]
            fresh = frozenset(each.port for _, _, each in cluster.health.fresh(replicas))
            if fresh != report.fresh:
                report.fresh, report.since = fresh, time.monotonic()
            try:
                with sessions() as session:
                    report.reads[session.execute(PORT).scalar_one()] += 1
            except (DBAPIError, ShardkitError):
                import traceback

                report.failed.append(traceback.format_exc())


class Readers:
    """So many processes that read.

    :param source: the map's store.
    """

    def __init__(self, processes: int, source: str, credentials: CredentialSource, endpoint: Endpoint) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.readers"])
        account = credentials(endpoint)
        self._members: list[tuple[Any, Connection]] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=read, args=(theirs, source, account.user, account.password), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, pipe in self._members:
            pipe.send(False)
            process.join(30)
            process.kill()
            process.join()
            pipe.close()

    def ask(self) -> list[Report]:
        """What each has done since the last time that they were asked."""
        for _, pipe in self._members:
            pipe.send(True)
        return [pipe.recv() for _, pipe in self._members]

    def all_read(self, replicas: Iterable[Endpoint], since: float, *, master: Endpoint | None = None) -> float:
        """Wait until each process takes these replicas, and no others, for readable, and reads them.

        :param master: what is read where there are none.

        :param since: when what they are to notice has happened.
        :returns: seconds until the last of them had noticed.
        :raises AssertionError: when a read has failed, or it does not come about.
        """
        wanted = frozenset(each.port for each in replicas)
        answering = wanted if master is None else {master.port}
        end = time.monotonic() + _PATIENCE
        while True:
            time.sleep(0.02)
            reports = self.ask()
            assert not any(report.failed for report in reports), [report.failed for report in reports]
            if all(report.fresh == wanted and set(report.reads) == answering for report in reports):
                return max(report.since for report in reports) - since
            assert time.monotonic() < end, f"not within {_PATIENCE:g} s: {reports}"


def when(happens: Callable[[], object]) -> float:
    """Have something happen, and the time just before."""
    before = time.monotonic()
    happens()
    return before


@dataclass
class Stage:
    """One shard with two replicas, its map in ZooKeeper."""

    local: LocalCluster
    store: MapStore
    readers: Readers

    @property
    def replicas(self) -> tuple[Endpoint, ...]:
        return self.local.shards[SHARD].replicas

    def server(self, number: int) -> LocalDatabaseServer:
        return self.local.server(SHARD, Role.REPLICA, number)

    def publish(self, *replicas: Endpoint) -> None:
        shard = replace(self.local.shards[SHARD], replicas=replicas)
        self.store.publish(lists_map(shard), expected_version=self.store.load().version)


@contextmanager
def open_stage(flavour: Flavour, processes: int, folder: Path) -> Iterator[Stage]:
    """A stage whose readers read."""
    with ExitStack() as stack:
        local = stack.enter_context(LocalCluster([SHARD], 2, staging=False, flavour=flavour))
        source, shard = local.zookeeper_url("lists"), local.shards[SHARD]
        store = open_store(source)
        stack.callback(store.close)
        store.publish(lists_map(shard), expected_version=0)
        cluster = stack.enter_context(create_cluster(source, credentials=local.credentials, max_lag=30.0))
        Base.metadata.create_all(cluster.engine(SHARD))
        with shardkit.sessionmaker(cluster).begin() as session:
            session.add(Entry(owner=1, number=1))
        relay = RelayProcess(source, local.credentials(shard.master), log=folder / "relay.log")
        relay.start()
        stack.callback(relay.stop)
        end = time.monotonic() + 60
        while not cluster.health.wait(1.0):
            relay.check()
            assert time.monotonic() < end, "the replicas do not come near their master"
        readers = stack.enter_context(Readers(processes, source, local.credentials, shard.master))
        yield Stage(local, store, readers)
