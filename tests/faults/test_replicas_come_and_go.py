"""Replicas are taken in and out and die while processes read: each of them notices, and no read fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

import shardkit
from shardkit import create_cluster
from shardkit.cluster import Cluster
from shardkit.demo.relay_process import RelayProcess
from shardkit.mapstore import MapStore, open_store
from shardkit.testing import LocalCluster
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Endpoint, Role
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD, Base, Entry, lists_map
from tests.faults.readers import Readers, when

PROCESSES = 3
#: Seconds that may pass on a slow machine; `make bench ONLY=replicas` measures.
AT_MOST = 15.0

pytestmark = [pytest.mark.zookeeper, getattr(pytest.mark, FLAVOUR)]


@dataclass
class Stage:
    """One shard with two replicas, its map in ZooKeeper."""

    cluster: Cluster
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


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with ExitStack() as stack:
        local = stack.enter_context(LocalCluster([SHARD], 2, staging=False, flavour=FLAVOUR))
        source, shard = local.zookeeper_url("lists"), local.shards[SHARD]
        store = open_store(source)
        stack.callback(store.close)
        store.publish(lists_map(shard), expected_version=0)
        cluster = stack.enter_context(create_cluster(source, credentials=local.credentials, max_lag=30.0))
        Base.metadata.create_all(cluster.engine(SHARD))
        with shardkit.sessionmaker(cluster).begin() as session:
            session.add(Entry(owner=1, number=1))
        relay = RelayProcess(source, local.credentials(shard.master), log=tmp_path_factory.mktemp("r") / "relay.log")
        relay.start()
        stack.callback(relay.stop)
        end = time.monotonic() + 60
        while not cluster.health.wait(1.0):
            relay.check()
            assert time.monotonic() < end, "the replicas do not come near their master"
        readers = stack.enter_context(Readers(PROCESSES, source, local.credentials, shard.master))
        yield Stage(cluster, local, store, readers)


@pytest.fixture(autouse=True)
def two_replicas(stage: Stage) -> None:
    stage.publish(*stage.replicas)
    stage.readers.all_read(stage.replicas, time.monotonic())


def test_a_replica_that_leaves_the_map_is_left_and_one_that_comes_is_read(stage: Stage) -> None:
    first, second = stage.replicas
    for _ in range(5):
        assert stage.readers.all_read([first], when(lambda: stage.publish(first))) < AT_MOST
        assert stage.readers.all_read([first, second], when(lambda: stage.publish(first, second))) < AT_MOST


def test_a_replica_that_dies_is_left_and_read_again_when_it_is_back(stage: Stage) -> None:
    first, second = stage.replicas
    for _ in range(2):
        assert stage.readers.all_read([first], when(stage.server(1).kill)) < AT_MOST
        stage.server(1).start()
        stage.readers.all_read([first, second], time.monotonic())


def test_without_any_replica_the_master_is_read(stage: Stage) -> None:
    assert stage.readers.all_read([], when(stage.publish), master=stage.local.shards[SHARD].master) < AT_MOST
