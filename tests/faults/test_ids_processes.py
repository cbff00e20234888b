"""Ids of many processes on one ZooKeeper: unique, whatever happens to the processes and to ZooKeeper."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest

from shardkit.errors import PreconditionFailed
from shardkit.ids import IdGenerator, ZooKeeperLease
from shardkit.mapstore import ZooKeeperMapStore
from shardkit.testing import LocalZooKeeper

pytestmark = pytest.mark.zookeeper
PROCESSES = 8
#: ZooKeeper forgets a client that is silent for so long, in seconds.
SESSION = 2.0
BATCH = 500


def issue(pipe: Connection, hosts: str, cluster: str) -> None:
    """Send ids in batches until told to stop."""
    store = ZooKeeperMapStore(hosts, cluster, session_timeout=SESSION)
    ids = IdGenerator(lambda: ZooKeeperLease(store))
    while not pipe.poll():
        issued: list[int] = []
        try:
            issued.extend(ids.next_id() for _ in range(BATCH))  # what came before an error stays
        except PreconditionFailed:
            time.sleep(0.05)  # the number was lost: the next call takes another
        pipe.send(issued)
        time.sleep(0.005)
    pipe.send(None)
    store.close()


class Fleet:
    """Processes that issue ids."""

    def __init__(self, hosts: str, cluster: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.test_ids_processes"])
        self._arguments = (hosts, cluster)
        self.ids: list[int] = []
        self.members: list[tuple[Any, Connection]] = []

    def add(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=issue, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        self.members.append((process, ours))

    def collect(self, seconds: float) -> int:
        """Take what is sent; how many ids that were."""
        before, end = len(self.ids), time.monotonic() + seconds
        while time.monotonic() < end:
            for process, pipe in list(self.members):
                try:
                    while pipe.poll():
                        self.ids += pipe.recv() or []
                except EOFError:
                    self.members.remove((process, pipe))
            time.sleep(0.01)
        return len(self.ids) - before

    def signal(self, member: int, number: signal.Signals) -> None:
        os.kill(self.members[member][0].pid, number)

    def close(self) -> None:
        for process, pipe in self.members:
            os.kill(process.pid, signal.SIGCONT)
            pipe.send("stop")
        for process, pipe in self.members:
            while (batch := pipe.recv()) is not None:
                self.ids += batch
            process.join(10)


def workers(ids: list[int]) -> set[int]:
    return {number >> 12 & 1023 for number in ids}


def test_ids_of_processes_that_stand_still_and_die_are_unique(zookeeper: LocalZooKeeper) -> None:
    fleet = Fleet(f"127.0.0.1:{zookeeper.port}", "ids_of_processes")
    for _ in range(PROCESSES):
        fleet.add()
    try:
        assert fleet.collect(2) > 0
        assert len(workers(fleet.ids)) == PROCESSES
        fleet.signal(0, signal.SIGSTOP)  # ZooKeeper takes it for dead, and its number is free
        fleet.signal(1, signal.SIGKILL)
        for _ in range(2):
            fleet.add()
        fleet.collect(SESSION * 2 + 1)
        for process, _ in fleet.members:
            os.kill(process.pid, signal.SIGCONT)  # and back: it must not go on under a number of somebody else
        assert fleet.collect(2) > 0
    finally:
        fleet.close()
    assert len(set(fleet.ids)) == len(fleet.ids) > PROCESSES * BATCH
    assert all(0 < number < 1 << 63 for number in fleet.ids)


def test_ids_while_zookeeper_is_away(zookeeper: LocalZooKeeper) -> None:
    """What was reserved is used up; then nothing is issued until ZooKeeper is back."""
    with LocalZooKeeper() as own:
        fleet = Fleet(f"127.0.0.1:{own.port}", "ids_while_away")
        for _ in range(3):
            fleet.add()
        try:
            assert fleet.collect(2) > 0
            own.kill()
            fleet.collect(3)
            own.start()
            deadline = time.monotonic() + 60
            while not fleet.collect(1) and time.monotonic() < deadline:
                pass
            assert fleet.collect(1) > 0
        finally:
            fleet.close()
    assert len(set(fleet.ids)) == len(fleet.ids)
