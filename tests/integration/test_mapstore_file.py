"""The file store: what people and other processes do to the file."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardkit.errors import InvalidShardMap, MapConflict, MapNotFound, MapStoreUnavailable
from shardkit.mapstore import FileMapStore
from shardkit.shardmap import ShardMap

BY_HAND = """\
# our map
format: 1
cluster: shop
keyspaces:
  orders: {partition: {by: hash, buckets: 64}, tables: {users: id}, placement: {a: 0-63}}
shards: {a: {master: mysql://h/a}, b: {master: mysql://h/b}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "shardmap.yaml"
    path.write_text(BY_HAND, encoding="utf-8")
    return path


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def test_a_file_written_by_hand_is_version_1(path: Path) -> None:
    store = FileMapStore(path)
    first = store.load()
    assert first.version == 1
    second = store.publish(first.with_placement("orders", {0: "b"}), expected_version=1)
    assert FileMapStore(path).load() == second
    # the comments are kept in the history
    assert (path.parent / "shardmap.yaml.history" / "1.yaml").read_text(encoding="utf-8") == BY_HAND
    assert [entry.version for entry in store.history()] == [1, 2]
    assert store.load_version(1) == first


def test_a_published_file_says_who_and_when(path: Path) -> None:
    FileMapStore(path).publish(ShardMap.parse(BY_HAND), expected_version=1)
    assert path.read_text(encoding="utf-8").startswith("# version 2 of this shard map, published 20")


def test_a_file_keeps_its_mode(path: Path) -> None:
    path.chmod(0o640)
    FileMapStore(path).publish(ShardMap.parse(BY_HAND), expected_version=1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def _move(path: Path, buckets: range) -> None:
    store = FileMapStore(path)
    for bucket in buckets:
        while True:
            current = store.load()
            try:
                store.publish(current.with_placement("orders", {bucket: "b"}), expected_version=current.version)
                break
            except MapConflict:
                continue


def test_processes_that_race_lose_no_change(path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_move, args=(path, range(first, first + 8))) for first in range(0, 32, 8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    final = FileMapStore(path).load()
    assert final.version == 33
    assert set(final.keyspace("orders").buckets_on("b")) == set(range(32))


def test_a_reader_never_sees_half_a_file(path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_move, args=(path, range(40)))
    process.start()
    reader, versions = FileMapStore(path), [1]
    while process.is_alive():
        versions.append(reader.load().version)
    process.join(60)
    assert versions == sorted(versions)
    assert reader.load().version == 41


def test_a_publisher_waits_for_the_lock_no_longer_than_asked(path: Path) -> None:
    with (path.parent / ".shardmap.yaml.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(MapStoreUnavailable, match=r"another process has been publishing.*nothing was written"):
            FileMapStore(path, timeout=0.2).publish(ShardMap.parse(BY_HAND), expected_version=1)
        assert time.monotonic() - began < 5
    assert FileMapStore(path).load().version == 1


def test_a_publication_that_died_half_way_never_was(path: Path) -> None:
    store = FileMapStore(path)
    history = path.parent / "shardmap.yaml.history"
    history.mkdir()
    (history / "2.yaml").write_text(BY_HAND.replace("0-63", "0-63 # never published"), encoding="utf-8")
    assert [entry.version for entry in store.history()] == [1]
    with pytest.raises(MapNotFound):
        store.load_version(2)
    assert store.publish(store.load(), expected_version=1).version == 2
    assert "never published" not in (history / "2.yaml").read_text(encoding="utf-8")


def test_a_change_by_hand_is_seen_when_its_version_is_higher(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FileMapStore(path, poll=0.02)
    seen: list[tuple[int, str]] = []
    store.watch(lambda new: seen.append((new.version, new.cluster)))
    until(lambda: seen == [(1, "shop")])
    with caplog.at_level(logging.WARNING):
        path.write_text(BY_HAND.replace("0-63", "0-62").replace("{a: 0-62}", "{a: 0-62, b: '63'}"), encoding="utf-8")
        until(lambda: "ignored a change under the same version 1: raise the version" in caplog.text)
        path.write_text("format: [", encoding="utf-8")
        until(lambda: "cannot be read now" in caplog.text)
        path.write_text(BY_HAND + "version: 5\n", encoding="utf-8")
        until(lambda: seen[-1] == (5, "shop"))
        path.write_text(BY_HAND + "version: 4\n", encoding="utf-8")
        until(lambda: "ignored version 4: version 5 was seen before" in caplog.text)
    assert seen == [(1, "shop"), (5, "shop")]
    assert store.load().version == 5
    store.close()


def test_the_last_map_stays_while_the_file_is_away(path: Path) -> None:
    store = FileMapStore(path, poll=0.02)
    store.load()
    path.rename(path.with_suffix(".away"))
    assert store.load().version == 1
    with pytest.raises(MapNotFound, match=r"there is no shard map at .*shardmap.yaml"):
        FileMapStore(path).load()
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version), after=1)
    path.write_text(BY_HAND + "version: 2\n", encoding="utf-8")
    until(lambda: seen == [2])
    store.close()


def test_a_faulty_file_is_named(path: Path) -> None:
    path.write_text(BY_HAND.replace("0-63", "0-62"), encoding="utf-8")
    with pytest.raises(
        InvalidShardMap, match=r"shardmap.yaml: the shard map has 1 fault:\n  line 5: .*bucket 63 is on no shard"
    ):
        FileMapStore(path).load()


def test_a_relative_path_stays_where_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    store = FileMapStore(path.name)
    monkeypatch.chdir("/")
    assert store.load().version == 1


def test_a_forked_child_watches_too(path: Path) -> None:
    store = FileMapStore(path, poll=0.02)
    seen: list[int] = []
    store.watch(lambda new: seen.append(new.version))
    until(lambda: seen == [1])
    child = os.fork()
    if child == 0:
        try:
            until(lambda: seen[-1] == 2)
            os._exit(0)
        finally:
            os._exit(1)
    FileMapStore(path).publish(ShardMap.parse(BY_HAND), expected_version=1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    until(lambda: seen == [1, 2])
    store.close()
