"""A whole local cluster, from Python and from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import PreconditionFailed, ServerFailed
from shardkit.mapstore import open_store
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalCluster, record
from shardkit.testing.database import Flavour
from shardkit.testing.record import Health
from shardkit.testing.server import open_servers
from shardkit.testing.watchdog import start_time
from shardkit.topology import Role

pytestmark = [pytest.mark.mariadb, pytest.mark.zookeeper]

MAP = """
format: 1
cluster: shop
keyspaces:
  orders:
    partition: {by: hash, buckets: 4}
    tables: {orders: user_id}
    placement: {north: 0-1, south: 2-3}
shards:
  north: {master: mysql://10.0.0.1:3306/shop}
  south: {master: mysql://10.0.0.2:3306/shop}
"""


@pytest.fixture(scope="module")
def local() -> Iterator[LocalCluster]:
    with LocalCluster(("north", "south"), replicas=2) as cluster:
        yield cluster


def test_every_shard_has_all_its_servers_with_an_empty_database(local: LocalCluster) -> None:
    assert list(local.shards) == ["north", "south"]
    ports = set()
    for name, shard in local.shards.items():
        assert [role for role, _ in shard.endpoints()] == ["master", "staging", "replica", "replica"]
        for _role, endpoint in shard.endpoints():
            ports.add(endpoint.port)
            assert endpoint.database == name
    assert len(ports) == 8
    assert local.server("south", "replica", 1).execute("SHOW DATABASES LIKE 'south'") == [("south",)]
    assert len(set(local.server("north").execute("SELECT @@server_id"))) == 1


def test_a_map_over_its_servers_can_be_published(local: LocalCluster) -> None:
    published = local.publish(ShardMap.parse(MAP).with_shards(local.shards))
    with closing(open_store(local.zookeeper_url("shop"))) as store:
        assert store.load() == published
    assert local.publish(published).version == published.version + 1


def test_the_status_tells_what_runs_what_hangs_and_what_is_gone(local: LocalCluster) -> None:
    def health(name: str) -> Health:
        return {state.name: state.health for state in local.status()}[name]

    assert {state.health for state in local.status()} == {Health.RUNNING}
    replica = local.server("north", Role.REPLICA, 1)
    replica.pause()
    assert health("north/replica-1") is Health.SILENT
    replica.kill()
    assert health("north/replica-1") is Health.GONE
    local.start()
    assert health("north/replica-1") is Health.RUNNING
    assert replica.execute("SHOW DATABASES LIKE 'north'") == [("north",)]


def test_a_server_that_the_cluster_does_not_have(local: LocalCluster) -> None:
    with pytest.raises(KeyError, match="north/replica-7"):
        local.server("north", "replica", 7)


def test_a_cluster_that_cannot_start_leaves_nothing() -> None:
    before = open_servers()
    with pytest.raises(ServerFailed, match="no-such-option"):
        LocalCluster(1, replicas=1, options={"no_such_option": 1}).__enter__()
    assert open_servers() == before


# --- shardkit local ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own for the records, with the prepared data of the usual one."""
    from shardkit.testing.binaries import cache_directory

    templates = cache_directory() / "templates"
    templates.mkdir(parents=True, exist_ok=True)
    (tmp_path / "templates").symlink_to(templates)
    monkeypatch.setenv("SHARDKIT_CACHE", str(tmp_path))
    return tmp_path


def shardkit(*words: str) -> tuple[int, dict[str, Any], str]:
    """Run a command with --json; its exit code, its document, and what it said beside that."""
    done = subprocess.run(
        [sys.executable, "-m", "shardkit", "local", *words, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture
def taken_down(cache: Path) -> Iterator[None]:
    yield
    for name in record.names():
        kept = record.load(name)
        assert kept is not None
        kept.remove()


@pytest.mark.usefixtures("taken_down")
def test_up_leaves_a_cluster_running_and_down_removes_it(tmp_path: Path) -> None:
    model = tmp_path / "model.yaml"
    model.write_text(MAP, encoding="utf-8")
    code, up, _ = shardkit("up", "--like", str(model), "--replicas", "0", "--no-staging")
    assert code == 0
    assert [server["name"] for server in up["servers"]] == ["zookeeper", "north/master", "south/master"]
    with closing(open_store(up["map"])) as store:
        assert store.load().shards["north"].master.url == up["shards"]["north"]["master"]

    code, again, _ = shardkit("up")
    assert (code, again["error"]["type"]) == (4, "PreconditionFailed")

    code, status, _ = shardkit("status")
    assert code == 0
    assert {server["health"] for server in status["servers"]} == {"running"}

    kept = record.load("local")
    assert kept is not None
    told = subprocess.run(
        [sys.executable, "-m", "shardkit", "local", "status"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert f"\nexport SHARDKIT_MAP={kept.map_source}\nexport SHARDKIT_USER=root\n" in told
    assert all(server.url in told for server in kept.servers)
    code, down, _ = shardkit("down")
    assert (code, down["stopped"]) == (0, ["zookeeper", "north/master", "south/master"])
    for server in kept.servers:
        assert all(start_time(pid) != started for pid, started in server.processes)
        assert not any(Path(directory).exists() for directory in server.directories)
    code, _, _ = shardkit("down")
    assert code == 4


@pytest.mark.usefixtures("taken_down")
def test_a_cluster_left_running_is_not_forgotten_for_another_of_its_name() -> None:
    def left_running() -> LocalCluster:
        return LocalCluster(1, replicas=0, staging=False, zookeeper=False, name="kept")

    with left_running() as first:
        first.detach()
    with left_running() as second, pytest.raises(PreconditionFailed, match="left running already"):
        second.detach()
    assert not second.server("kept-0").running
    assert first.server("kept-0").execute("SELECT 1") == [(1,)]


@pytest.mark.usefixtures("taken_down")
def test_status_says_which_server_is_gone() -> None:
    _, up, _ = shardkit("up", "--shards", "1", "--replicas", "0", "--no-staging")
    os.kill(up["servers"][1]["pid"], signal.SIGKILL)
    code, status, said = shardkit("status")
    assert code == 3
    assert [server["health"] for server in status["servers"]] == ["running", "gone"]
    assert "local-0/master" in said


@pytest.mark.usefixtures("taken_down")
def test_down_never_kills_a_process_that_got_the_number_of_a_dead_server(cache: Path) -> None:
    _, up, _ = shardkit("up", "--shards", "1", "--replicas", "0", "--no-staging", "--no-zookeeper")
    (server,) = up["servers"]
    os.kill(server["pid"], signal.SIGKILL)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    path = cache / "local" / "local.json"
    path.write_text(path.read_text().replace(f"{server['pid']},", f"{bystander.pid},", 1))
    try:
        code, _, _ = shardkit("down")
        assert code == 0
        assert bystander.poll() is None
    finally:
        bystander.communicate(b"\n", timeout=10)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("words", [("status",), ("down",), ("down", "--name", "../etc")])
def test_without_a_cluster_the_fix_is_named(words: tuple[str, ...]) -> None:
    code, answer, _ = shardkit(*words)
    assert code == 4
    assert answer["error"]["hint"]


def test_a_record_of_another_format_is_not_guessed_at(cache: Path) -> None:
    (cache / "local").mkdir()
    (cache / "local" / "local.json").write_text('{"format": 99}')
    code, answer, _ = shardkit("down")
    assert code == 4
    assert "another version" in answer["error"]["message"]


@pytest.mark.mysql
def test_a_cluster_of_mysql_servers(flavour: Flavour) -> None:
    if flavour != "mysql":
        pytest.skip("runs with SHARDKIT_TEST_FLAVOUR=mysql")
    with LocalCluster(1, replicas=1, staging=False, zookeeper=False, flavour="mysql") as cluster:
        for role in ("master", "replica"):
            assert "MariaDB" not in cluster.server("local-0", role).execute("SELECT VERSION()")[0][0]
