"""Replicas are taken in and out and die while processes read: each of them notices, and no read fails."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD
from tests.faults.readers import Stage, open_stage, when

PROCESSES = 3
#: Seconds that may pass on a slow machine; `make bench ONLY=replicas` measures.
AT_MOST = 15.0

pytestmark = [pytest.mark.zookeeper, getattr(pytest.mark, FLAVOUR)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with open_stage(FLAVOUR, PROCESSES, tmp_path_factory.mktemp("readers")) as made:
        yield made


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
