"""The ZooKeeper store: servers that go away, sessions that expire, answers that get lost, forks."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from kazoo.client import KazooClient
from kazoo.handlers.threading import KazooTimeoutError

from shardkit.errors import InvalidShardMap, MapConflict, MapNotFound, MapStoreUnavailable, ShardMapError
from shardkit.mapstore import ZooKeeperMapStore
from shardkit.mapstore import zookeeper as module
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalZooKeeper, free_port
from shardkit.testing.proxy import Action, Direction, TcpProxy

_clusters = (f"zk-{number}" for number in itertools.count(1))


def layout(cluster: str, *extra: str) -> ShardMap:
    tables = ", ".join(f"{table}: id" for table in ("users", *extra))
    return ShardMap.parse(
        f"""
format: 1
cluster: {cluster}
keyspaces:
  orders: {{partition: {{by: hash, buckets: 16}}, tables: {{{tables}}}, placement: {{a: 0-15}}}}
shards: {{a: {{master: mysql://h/a}}, b: {{master: mysql://h/b}}}}
"""
    )


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


class Opener:
    """Opens stores and closes them again."""

    def __init__(self, hosts: str, cluster: str) -> None:
        self.hosts = hosts
        self.cluster = cluster
        self._opened: list[ZooKeeperMapStore] = []

    def __call__(
        self, *, hosts: str | None = None, timeout: float = 10.0, session_timeout: float = 10.0, poll: float = 3600.0
    ) -> ZooKeeperMapStore:
        store = ZooKeeperMapStore(
            hosts or self.hosts, self.cluster, timeout=timeout, session_timeout=session_timeout, poll=poll
        )
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


@pytest.fixture
def opened(zookeeper: LocalZooKeeper) -> Iterator[Opener]:
    opener = Opener(zookeeper.hosts, next(_clusters))
    yield opener
    opener.close()


@pytest.fixture
def own_zookeeper() -> Iterator[LocalZooKeeper]:
    """A server that the test may stop."""
    with LocalZooKeeper(durable=True) as server:
        yield server


@pytest.fixture
def opened_own(own_zookeeper: LocalZooKeeper) -> Iterator[Opener]:
    opener = Opener(own_zookeeper.hosts, next(_clusters))
    yield opener
    opener.close()


@pytest.mark.zookeeper
def test_clients_run_on_while_zookeeper_is_away_and_get_the_new_map_when_it_is_back(
    own_zookeeper: LocalZooKeeper, opened_own: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store, other = opened_own(timeout=5), opened_own(timeout=2)
    first = store.publish(layout(opened_own.cluster), expected_version=0)
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    store.announce(1)
    other.load()
    until(lambda: seen == [1] and [client.version for client in other.clients()] == [1])

    own_zookeeper.stop()
    with caplog.at_level(logging.WARNING):
        until(lambda: "the connection to ZooKeeper" in caplog.text)
        assert store.load() == first
        with pytest.raises(MapStoreUnavailable, match="nothing was written"):
            other.publish(first.with_placement("orders", {0: "b"}), expected_version=1)
        with pytest.raises(MapStoreUnavailable):
            other.history()
    assert seen == [1]

    own_zookeeper.start()
    writer = opened_own()
    assert writer.load() == first
    second = writer.publish(first.with_placement("orders", {0: "b"}), expected_version=1)
    until(lambda: seen == [1, 2])
    assert store.load() == second
    until(lambda: [client.pid for client in writer.clients()] == [os.getpid()])


@pytest.mark.zookeeper
def test_a_crash_of_zookeeper_loses_no_published_map(own_zookeeper: LocalZooKeeper, opened_own: Opener) -> None:
    store = opened_own()
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    current = store.publish(layout(opened_own.cluster), expected_version=0)
    for bucket in range(2):
        current = store.publish(current.with_placement("orders", {bucket: "b"}), expected_version=current.version)
        own_zookeeper.kill()
        own_zookeeper.start()
        assert opened_own().load() == current
    until(lambda: seen[-1] == 3)
    assert seen == sorted(set(seen))


def test_an_unreachable_zookeeper_is_said_so_in_time(opened: Opener) -> None:
    hosts = f"127.0.0.1:{free_port()}"
    store = opened(hosts=hosts, timeout=1)
    for call in (store.load, lambda: store.client):
        began = time.monotonic()
        with pytest.raises(MapStoreUnavailable, match=r"no ZooKeeper server of 127\.0\.0\.1") as refused:
            call()
        assert time.monotonic() - began < 5
    assert "check that ZooKeeper runs" in (refused.value.hint or "")
    with pytest.raises(MapStoreUnavailable, match="nothing was written"):
        store.publish(layout(opened.cluster), expected_version=0)


def test_a_server_that_takes_a_connection_and_never_greets_it_costs_one_try(
    zookeeper: LocalZooKeeper, opened: Opener
) -> None:
    """As one that is just starting may do."""
    first = opened().publish(layout(opened.cluster), expected_version=0)
    lost: list[bytes] = []

    def lose_the_first_greeting(direction: Direction, packet: bytes) -> Action:
        if direction is Direction.TO_CLIENT and not lost:
            lost.append(packet)
            return Action.DROP
        return Action.FORWARD

    with TcpProxy(zookeeper.host, zookeeper.port, framing="zookeeper", on_packet=lose_the_first_greeting) as proxy:
        store = opened(hosts=f"{proxy.host}:{proxy.port}")
        assert store.load() == first
        assert len(lost) == 1
        store.close()


def test_a_watch_that_begins_while_zookeeper_is_away_gets_its_map_later(
    own_zookeeper: LocalZooKeeper, opened_own: Opener
) -> None:
    opened_own().publish(layout(opened_own.cluster), expected_version=0)
    own_zookeeper.stop()
    early = opened_own(timeout=0.5, poll=0.2)
    seen: list[int] = []
    early.watch(lambda new: seen.append(new.version))
    early.announce(0)
    with pytest.raises(MapStoreUnavailable):
        early.load()
    own_zookeeper.start()
    until(lambda: seen == [1])
    until(lambda: len(early.clients()) == 1)


def test_an_expired_session_is_replaced(zookeeper: LocalZooKeeper, opened: Opener) -> None:
    store, writer = opened(), opened()
    first = writer.publish(layout(opened.cluster), expected_version=0)
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    store.announce(1)
    until(lambda: seen == [1] and len(writer.clients()) == 1)
    session = store.client.client_id[0]

    for _ in range(10):
        # a second connection under the same session, closed in order, ends the session for the first one too; the
        # first one may be quicker, and have the session back before the second one closes it
        thief = KazooClient(hosts=zookeeper.hosts, client_id=(session, store.client.client_id[1]))
        with suppress(KazooTimeoutError):  # the two may take the session from each other for long
            thief.start()
        thief.stop()
        thief.close()
        with suppress(AssertionError):
            until(lambda: store.client.connected and store.client.client_id[0] != session, seconds=3)
            break
    assert store.client.client_id[0] != session

    until(lambda: len(writer.clients()) == 1)
    writer.publish(first.with_placement("orders", {0: "b"}), expected_version=1)
    until(lambda: seen == [1, 2])


def test_a_paused_server_does_not_hold_a_caller_for_long(own_zookeeper: LocalZooKeeper, opened_own: Opener) -> None:
    store = opened_own(timeout=1, session_timeout=30)
    first = store.publish(layout(opened_own.cluster), expected_version=0)
    own_zookeeper.pause()
    began = time.monotonic()
    assert store.load() == first
    with pytest.raises(MapStoreUnavailable):
        store.publish(first, expected_version=1)
    assert time.monotonic() - began < 8
    own_zookeeper.resume()


def test_a_lower_version_is_never_accepted(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    store, writer = opened(), opened()
    first = writer.publish(layout(opened.cluster), expected_version=0)
    old_node, _ = writer.client.get(writer.path("map"))
    second = writer.publish(first.with_placement("orders", {0: "b"}), expected_version=1)
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    until(lambda: seen == [2])
    with caplog.at_level(logging.WARNING):
        writer.client.set(writer.path("map"), old_node)  # as a restored backup does
        until(lambda: "ignored version 1: version 2 was seen before" in caplog.text)
    assert store.load() == second
    with pytest.raises(MapConflict, match="is at version 1"):
        store.publish(second, expected_version=2)
    # a newcomer has nothing else to go by; publishing on top of it replaces the other past's history
    newcomer = opened()
    assert newcomer.load() == first
    newcomer.publish(first.with_placement("orders", {1: "b"}), expected_version=1)
    assert newcomer.load_version(2).keyspace("orders").buckets_on("b") == (1,)


def test_a_zookeeper_restored_from_nothing_is_taken_up_again(own_zookeeper: LocalZooKeeper, opened_own: Opener) -> None:
    """It refuses connections that have seen later transactions than it has; processes must not stay away for ever."""
    store = opened_own(session_timeout=1, poll=0.2)
    current = store.publish(layout(opened_own.cluster), expected_version=0)
    for _ in range(20):
        current = store.publish(current, expected_version=current.version)
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    until(lambda: seen == [21])

    own_zookeeper.stop()
    assert own_zookeeper.directory is not None
    shutil.rmtree(own_zookeeper.directory / "data" / "version-2")
    own_zookeeper.start()
    until(lambda: store.client.connected)
    assert store.load() == current

    newcomer = opened_own()
    renewed = newcomer.publish(layout(opened_own.cluster), expected_version=0)
    while renewed.version < 22:
        renewed = newcomer.publish(renewed, expected_version=renewed.version)
    until(lambda: seen == [21, 22])


def test_what_cannot_be_read_does_not_take_the_map_away(opened: Opener, caplog: pytest.LogCaptureFixture) -> None:
    store = opened()
    first = store.publish(layout(opened.cluster), expected_version=0)
    with caplog.at_level(logging.WARNING):
        store.client.set(store.path("map"), b"nonsense")
        assert store.load() == first
        assert "cannot be read now, version 1 stays in use" in caplog.text
        store.client.delete(store.path("map"))
        assert store.load() == first
    with pytest.raises(MapNotFound):
        opened().load()


def test_a_lost_answer_is_looked_up(zookeeper: LocalZooKeeper, opened: Opener) -> None:
    """The transaction arrives, its answer does not: the publication counts once, and its publisher knows."""
    opened().publish(layout(opened.cluster), expected_version=0)

    cuts = []

    def cut_the_answer(direction: Direction, packet: bytes) -> Action:
        # a request is its length, a number, its type (14 is a multi-op), and its body
        if direction is Direction.TO_SERVER and packet[8:12] == (14).to_bytes(4, "big") and not cuts:
            cuts.append(packet)
            proxy.blackhole(Direction.TO_CLIENT)
            threading.Timer(0.5, release).start()
        return Action.FORWARD

    def release() -> None:
        proxy.cut()
        proxy.restore()

    with TcpProxy(zookeeper.host, zookeeper.port, framing="zookeeper", on_packet=cut_the_answer) as proxy:
        store = opened(hosts=f"{proxy.host}:{proxy.port}")
        second = store.publish(store.load().with_placement("orders", {0: "b"}), expected_version=1)
        assert second.version == 2
        assert opened().load() == second
        assert len(cuts) == 1
        assert [entry.version for entry in opened().history()] == [1, 2]
        store.close()


def test_a_map_that_is_too_large_is_refused_before_sending(opened: Opener) -> None:
    store = opened()
    noise = [os.urandom(24).hex() for _ in range(18_000)]
    huge = ShardMap.parse(
        {
            "format": 1,
            "cluster": opened.cluster,
            "keyspaces": {
                "k": {
                    "partition": {"by": "list", "buckets": {"x": noise}},
                    "tables": {"t": "id"},
                    "placement": {"a": "x"},
                }
            },
            "shards": {"a": {"master": "mysql://h/a"}},
        }
    )
    with pytest.raises(ShardMapError, match=r"takes \d+ bytes, a ZooKeeper node at most 500000") as refused:
        store.publish(huge, expected_version=0)
    assert "spans" in (refused.value.hint or "")
    assert not store.client.exists(store.path("map"))
    assert store.client.connected


def test_the_largest_map_fits_twice_into_one_packet(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """500,000 bytes of map and as many of history stay under ZooKeeper's 1 MiB."""
    store = opened()
    noise = os.urandom(499_000)
    monkeypatch.setattr(module, "_pack", lambda _text: noise)
    monkeypatch.setattr(module, "_unpack", lambda _data: layout(opened.cluster).with_version(1).to_json().encode())
    store.publish(layout(opened.cluster), expected_version=0)
    assert store.client.get(store.path("map"))[0] == noise


@pytest.mark.parametrize("node", [b"", b"format: 1", zlib.compress(b"{}"), zlib.compress(b"x" * 100)[:20]])
def test_what_is_not_a_map_is_refused(opened: Opener, node: bytes) -> None:
    store = opened()
    store.client.create(store.path("map"), node, makepath=True)
    with pytest.raises(InvalidShardMap):
        store.load()


def test_a_node_that_unpacks_to_gigabytes_is_refused(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_TEXT_BYTES", 1000)
    store = opened()
    store.client.create(store.path("map"), zlib.compress(b" " * 1001), makepath=True)
    with pytest.raises(InvalidShardMap, match="is not a shard map written by shardkit"):
        store.load()


def test_the_map_of_another_cluster_is_refused(opened: Opener) -> None:
    with pytest.raises(ShardMapError, match="is of cluster 'other'"):
        opened().publish(layout("other"), expected_version=0)


def test_old_history_is_dropped(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_VERSIONS", 3)
    store = opened()
    current = store.publish(layout(opened.cluster), expected_version=0)
    for _ in range(5):
        current = store.publish(current, expected_version=current.version)
    assert [entry.version for entry in store.history()] == [4, 5, 6]
    with pytest.raises(MapNotFound):
        store.load_version(3)


def test_others_use_the_same_session_and_paths(opened: Opener) -> None:
    store = opened()
    assert store.path("jobs", "7") == f"/shardkit/{opened.cluster}/jobs/7"
    store.client.create(store.path("jobs", "7"), b"planned", makepath=True)
    assert opened().client.get(store.path("jobs", "7"))[0] == b"planned"


def test_clients_that_end_are_gone(opened: Opener) -> None:
    one, other = opened(), opened()
    one.announce(3)
    other.announce(4)
    until(lambda: sorted(client.version for client in one.clients()) == [3, 4])
    other.close()
    until(lambda: [client.version for client in one.clients()] == [3])


def test_a_closed_store_says_so(opened: Opener) -> None:
    store = opened()
    store.close()
    with pytest.raises(MapStoreUnavailable, match="is closed"):
        store.load()


def test_a_forked_child_has_a_session_of_its_own(opened: Opener) -> None:
    store, writer = opened(), opened()
    first = writer.publish(layout(opened.cluster), expected_version=0)
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    store.announce(1)
    until(lambda: seen == [1] and len(writer.clients()) == 1)
    session = store.client.client_id[0]
    told, tell = os.pipe()

    child = os.fork()
    if child == 0:
        try:
            assert store.client.client_id[0] != session
            until(lambda: len(store.clients()) == 2)
            os.write(tell, b"!")
            until(lambda: seen == [1, 2])
            store.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.read(told, 1) == b"!"
    writer.publish(first.with_placement("orders", {0: "b"}), expected_version=1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(told)
    os.close(tell)

    # the child's end did not touch the parent's session
    assert store.client.client_id[0] == session
    until(lambda: seen == [1, 2])
    until(lambda: [client.pid for client in writer.clients()] == [os.getpid()])
