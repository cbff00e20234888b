"""What every map store does alike: in memory, in a file, in ZooKeeper."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shardkit.errors import MapConflict, MapNotFound, ShardMapError
from shardkit.mapstore import FileMapStore, MapStore, MemoryMapStore, ZooKeeperMapStore, open_store
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalZooKeeper

BUCKETS = 16
_clusters = (f"mapstore-{number}" for number in itertools.count(1))


def layout(cluster: str) -> ShardMap:
    return ShardMap.parse(
        f"""
format: 1
cluster: {cluster}
keyspaces:
  orders:
    partition: {{by: hash, buckets: {BUCKETS}, exceptions: {{42: own}}}}
    tables: {{users: id}}
    placement: {{a: "0-{BUCKETS - 1}, own"}}
shards: {{a: {{master: mysql://h/a}}, b: {{master: mysql://h/b}}}}
"""
    )


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


class Place:
    """A kind of store, and its one cluster: opens any number of stores on it."""

    def __init__(self, kind: str, cluster: str, opener: Callable[[], MapStore]) -> None:
        self.kind = kind
        self.first = layout(cluster)
        self._opener = opener
        self._opened: list[MapStore] = []

    def open(self) -> MapStore:
        store = self._opener()
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


@pytest.fixture(params=["memory", "file", "zookeeper"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    cluster = next(_clusters)
    opener: Callable[[], MapStore]
    if request.param == "memory":
        shared = MemoryMapStore()
        opener = lambda: shared  # noqa: E731 - one store is all there is
    elif request.param == "file":
        opener = lambda: FileMapStore(tmp_path / "shardmap.yaml", poll=0.02)  # noqa: E731
    else:
        zookeeper: LocalZooKeeper = request.getfixturevalue("zookeeper")
        opener = lambda: open_store(zookeeper.url(cluster))  # noqa: E731
    made = Place(request.param, cluster, opener)
    yield made
    made.close()


def moved(base: ShardMap, *buckets: int | str) -> ShardMap:
    return base.with_placement("orders", dict.fromkeys(buckets, "b"))


def test_nothing_is_there_before_the_first_publication(place: Place) -> None:
    store = place.open()
    with pytest.raises(MapNotFound):
        store.load()
    with pytest.raises(MapConflict, match="but none is published"):
        store.publish(place.first, expected_version=3)


def test_each_publication_gets_the_next_version(place: Place) -> None:
    store = place.open()
    first = store.publish(place.first.with_version(77), expected_version=0)
    second = store.publish(moved(first, 0), expected_version=1)
    assert [first.version, second.version] == [1, 2]
    assert place.open().load() == second
    assert second.keyspace("orders").placement[0] == "b"


def test_a_publication_on_top_of_an_old_version_changes_nothing(place: Place) -> None:
    one, other = place.open(), place.open()
    base = one.publish(place.first, expected_version=0)
    one.publish(moved(base, 0), expected_version=1)
    for stale in (0, 1, 3):
        with pytest.raises(MapConflict, match=r"is at version 2.*nothing was written"):
            other.publish(moved(base, 1), expected_version=stale)
    assert other.load().version == 2
    assert other.load().keyspace("orders").placement[1] == "a"
    assert len(one.history()) == 2


def test_publishers_that_race_lose_no_change(place: Place) -> None:
    """Everybody moves buckets of their own, and tries again on top of whoever was faster."""
    place.open().publish(place.first, expected_version=0)
    groups = [range(4), range(4, 8), range(8, 12), range(12, 16)]
    failures: list[BaseException] = []

    def publish_all(store: MapStore, mine: range) -> None:
        try:
            for bucket in mine:
                while True:
                    current = store.load()
                    try:
                        store.publish(moved(current, bucket), expected_version=current.version)
                        break
                    except MapConflict:
                        continue
        except BaseException as failure:  # noqa: BLE001 - shown by the main thread
            failures.append(failure)

    threads = [threading.Thread(target=publish_all, args=(place.open(), mine)) for mine in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    final = place.open().load()
    assert final.version == 1 + BUCKETS
    assert set(final.keyspace("orders").buckets_on("b")) == set(range(BUCKETS))


def test_watchers_see_newer_versions_only(place: Place) -> None:
    publisher, watcher = place.open(), place.open()
    base = publisher.publish(place.first, expected_version=0)
    seen: list[int] = []
    late: list[int] = []
    with_all = watcher.watch(lambda new: seen.append(new.version))
    with_new = watcher.watch(lambda new: late.append(new.version), after=1)
    until(lambda: seen == [1])
    for expected in range(1, 4):
        publisher.publish(moved(base, expected), expected_version=expected)
        until(lambda expected=expected: seen[-1] == expected + 1)  # type: ignore[misc]
    assert seen == [1, 2, 3, 4]
    assert late == [2, 3, 4]
    with_new.close()
    publisher.publish(base, expected_version=4)
    until(lambda: seen[-1] == 5)
    assert late == [2, 3, 4]
    with_all.close()


def test_a_watcher_may_come_before_the_first_map(place: Place) -> None:
    watcher = place.open()
    seen: list[int] = []
    watcher.watch(lambda new: seen.append(new.version))
    place.open().publish(place.first, expected_version=0)
    until(lambda: seen == [1])


def test_a_watcher_that_fails_is_logged_and_the_others_go_on(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    store = place.open()
    seen: list[int] = []

    def fail(new: ShardMap) -> None:
        raise ValueError(f"no room for {new.version}")

    store.watch(fail)
    store.watch(lambda new: seen.append(new.version))
    with caplog.at_level(logging.ERROR):
        store.publish(place.first, expected_version=0)
        until(lambda: seen == [1])
        store.publish(place.first, expected_version=1)
        until(lambda: seen == [1, 2])
    assert "a watcher of the shard map failed on version 1" in caplog.text
    assert "ValueError: no room for 2" in caplog.text


def test_a_watcher_may_publish(place: Place) -> None:
    """As a job does that reacts to a map."""
    store = place.open()
    done = threading.Event()

    def react(new: ShardMap) -> None:
        if new.version == 1:
            store.publish(moved(new, 5), expected_version=1)
        else:
            done.set()

    store.watch(react)
    store.publish(place.first, expected_version=0)
    assert done.wait(20)
    assert place.open().load().keyspace("orders").placement[5] == "b"


def test_every_version_can_be_loaded_again(place: Place) -> None:
    store = place.open()
    before = datetime.now(UTC).replace(microsecond=0)
    first = store.publish(place.first, expected_version=0)
    second = store.publish(moved(first, "own"), expected_version=1)
    entries = place.open().history()
    assert [entry.version for entry in entries] == [1, 2]
    assert all(before <= entry.published_at <= datetime.now(UTC) for entry in entries)
    assert [entry.version for entry in store.history(1)] == [2]
    assert all("@" in entry.published_by for entry in entries)
    assert [place.open().load_version(version) for version in (1, 2)] == [first, second]
    with pytest.raises(MapNotFound, match="version 3"):
        store.load_version(3)


def test_this_process_is_seen_with_the_version_it_runs_on(place: Place) -> None:
    store = place.open()
    store.publish(place.first, expected_version=0)
    store.announce(1)
    until(lambda: [client.version for client in store.clients()] == [1])
    (first,) = store.clients()
    store.announce(2)
    until(lambda: [client.version for client in store.clients()] == [2])
    assert first.pid > 0
    assert first.since <= datetime.now(UTC)


def test_closing_twice_is_fine(place: Place) -> None:
    store = place.open()
    store.watch(lambda _new: None)
    store.close()
    store.close()


# --- sources


def test_sources(tmp_path: Path) -> None:
    assert isinstance(open_store("zookeeper://127.0.0.1:2181,[::1]:2182/shop"), ZooKeeperMapStore)
    assert open_store("zookeeper://127.0.0.1:2181/shop").source == "zookeeper://127.0.0.1:2181/shop"
    assert open_store(f"file:{tmp_path}/m.map").source == f"file:{tmp_path}/m.map"
    for path in ("m.yaml", "m.yml", Path("m.yaml")):
        assert isinstance(open_store(path), FileMapStore)
    memory = open_store(layout("shop"))
    assert memory.load().version == 1
    assert all(isinstance(store, MapStore) for store in (memory, open_store("m.yaml"), open_store("zookeeper://h/c")))


@pytest.mark.parametrize(
    "source",
    ["", "shop", "zookeeper://", "zookeeper://h", "zookeeper://h:2181/a/b", "zookeeper:/h/c", "https://h/c", "m.json"],
)
def test_a_source_that_makes_no_sense_is_refused(source: str) -> None:
    with pytest.raises(ShardMapError, match=r"is not a (map|ZooKeeper) source") as refused:
        open_store(source)
    assert "zookeeper://host:2181" in (refused.value.hint or "")


def test_a_source_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ShardMapError) as refused:
        open_store("zookeeper://me:secret@h:2181/shop")
    assert "secret" not in str(refused.value)
