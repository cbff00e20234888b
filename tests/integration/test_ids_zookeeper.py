"""Worker numbers leased in ZooKeeper."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardkit.errors import PreconditionFailed
from shardkit.ids import IdGenerator, ZooKeeperLease
from shardkit.mapstore import ZooKeeperMapStore
from shardkit.testing import LocalZooKeeper


@pytest.fixture
def stores(zookeeper: LocalZooKeeper, request: pytest.FixtureRequest) -> Iterator[list[ZooKeeperMapStore]]:
    cluster = request.node.name.removeprefix("test_")[:60]
    opened = [ZooKeeperMapStore(f"127.0.0.1:{zookeeper.port}", cluster) for _ in range(2)]
    yield opened
    for store in opened:
        store.close()


def test_two_processes_have_different_numbers(stores: list[ZooKeeperMapStore]) -> None:
    assert ZooKeeperLease(stores[0]).number != ZooKeeperLease(stores[1]).number


def test_a_number_given_back_remembers_what_was_issued_under_it(stores: list[ZooKeeperMapStore]) -> None:
    first = ZooKeeperLease(stores[0])
    first.reserve(12345)
    first.close()
    again = ZooKeeperLease(stores[1])
    assert (again.number, again.reserved_until) == (first.number, 12345)


def test_a_number_freed_with_its_holders_session_is_not_used_before_what_it_reserved(
    stores: list[ZooKeeperMapStore],
) -> None:
    ids = IdGenerator(lambda: ZooKeeperLease(stores[0]))
    number = ids.next_id() >> 12 & 1023
    stores[0].close()  # the session is gone, the reservation of ten seconds stands
    assert ZooKeeperLease(stores[1]).number != number


def test_a_holder_that_was_taken_for_dead_issues_nothing_under_a_number_of_somebody_else(
    stores: list[ZooKeeperMapStore],
) -> None:
    sleeper = ZooKeeperLease(stores[0])
    stores[1].client.delete(stores[1].path("workers", str(sleeper.number), "holder"))  # as ZooKeeper does
    other = ZooKeeperLease(stores[1])
    assert other.number == sleeper.number
    other.reserve(12345)
    with pytest.raises(PreconditionFailed, match="leased to another process"):
        sleeper.reserve(99999)
    other.reserve(23456)


def test_of_two_that_believe_to_hold_a_number_the_first_to_write_keeps_it(stores: list[ZooKeeperMapStore]) -> None:
    sleeper = ZooKeeperLease(stores[0])
    stores[1].client.delete(stores[1].path("workers", str(sleeper.number), "holder"))
    other = ZooKeeperLease(stores[1])
    sleeper.reserve(12345)
    with pytest.raises(PreconditionFailed):
        other.reserve(23456)
