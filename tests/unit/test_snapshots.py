"""What a process tells the map store about the version it runs on: never ahead of an open transaction."""

from __future__ import annotations

import gc
import threading

import pytest

from shardkit.shardmap import ShardMap
from shardkit.snapshots import Snapshots

FIRST = ShardMap.parse(
    {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {
            "orders": {
                "partition": {"by": "hash", "buckets": 4},
                "tables": {"users": "id"},
                "placement": {"shop-0": "0-3"},
            }
        },
        "shards": {"shop-0": {"master": "sqlite:///shop-0.db"}},
    }
).with_version(1)


class Store:
    """Keeps what was announced."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self._changed = threading.Condition()

    def announce(self, version: int) -> None:
        with self._changed:
            self.told.append(version)
            self._changed.notify_all()

    def wait_for(self, version: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.told[-1:] == [version], timeout=5), self.told


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def snapshots(store: Store) -> Snapshots:
    return Snapshots(FIRST, "sqlite", store.announce)


def test_the_first_map_is_announced_at_once(snapshots: Snapshots, store: Store) -> None:
    assert snapshots.current.map is FIRST
    assert store.told == [1]


def test_a_newer_map_is_announced_at_once_when_nothing_is_open(snapshots: Snapshots, store: Store) -> None:
    assert snapshots.accept(FIRST.with_version(2))
    assert store.told == [1, 2]


def test_a_lower_or_equal_version_is_never_accepted(snapshots: Snapshots, store: Store) -> None:
    snapshots.accept(FIRST.with_version(3))
    assert not snapshots.accept(FIRST.with_version(2))
    assert not snapshots.accept(FIRST.with_version(3))
    assert snapshots.current.map.version == 3
    assert store.told == [1, 3]


def test_an_open_transaction_keeps_its_map_and_holds_the_announcement_back(snapshots: Snapshots, store: Store) -> None:
    pin = snapshots.pin()
    snapshots.accept(FIRST.with_version(2))
    assert pin.view.map.version == 1
    assert snapshots.oldest() == 1
    assert store.told == [1]

    pin.release()
    store.wait_for(2)


def test_the_oldest_of_several_open_transactions_counts(snapshots: Snapshots, store: Store) -> None:
    first = snapshots.pin()
    snapshots.accept(FIRST.with_version(2))
    second = snapshots.pin()
    snapshots.accept(FIRST.with_version(3))
    second.release()
    assert store.told == [1]
    second = snapshots.pin()  # of version 3: holds nothing back
    first.release()
    store.wait_for(3)
    second.release()


def test_each_step_is_announced_as_older_transactions_end(snapshots: Snapshots, store: Store) -> None:
    first = snapshots.pin()
    snapshots.accept(FIRST.with_version(2))
    second = snapshots.pin()
    snapshots.accept(FIRST.with_version(3))
    first.release()
    store.wait_for(2)
    second.release()
    store.wait_for(3)
    assert store.told == [1, 2, 3]


def test_a_transaction_that_was_dropped_without_an_end_does_not_hold_back_for_ever(
    snapshots: Snapshots, store: Store
) -> None:
    pin = snapshots.pin()
    snapshots.accept(FIRST.with_version(2))
    del pin
    gc.collect()
    store.wait_for(2)


def test_releasing_twice_releases_once(snapshots: Snapshots) -> None:
    other = snapshots.pin()
    pin = snapshots.pin()
    pin.release()
    pin.release()
    snapshots.accept(FIRST.with_version(2))
    assert snapshots.oldest() == 1
    other.release()
    assert snapshots.oldest() == 2


def test_a_map_that_comes_in_the_middle_of_pinning_is_the_one_pinned(snapshots: Snapshots, store: Store) -> None:
    """Between reading the current map and noting the hold, the newer map was announced: the older must not be used."""

    class Interrupted(dict[int, int]):
        def __setitem__(self, token: int, version: int) -> None:
            snapshots.accept(FIRST.with_version(2))
            super().__setitem__(token, version)

    snapshots._holds = Interrupted()
    pin = snapshots.pin()
    assert store.told == [1, 2]
    assert pin.view.map.version == 2
    assert snapshots.oldest() == 2


def test_a_child_process_does_not_wait_for_its_parents_transactions(snapshots: Snapshots, store: Store) -> None:
    pin = snapshots.pin()
    snapshots.accept(FIRST.with_version(2))
    snapshots.after_fork()
    assert snapshots.oldest() == 2
    assert store.told[-1] == 2
    pin.release()
