"""Servers in containers: `make test-docker`, where a Docker engine runs.

SHARDKIT_MARIADB_IMAGE, SHARDKIT_MYSQL_IMAGE and SHARDKIT_ZOOKEEPER_IMAGE name other images than the official ones.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import docker
import pymysql
import pytest
from kazoo.client import KazooClient

from shardkit.errors import MissingServer, ServerFailed
from shardkit.testing import LocalCluster, LocalMariaDB, LocalMySQL, LocalZooKeeper, binaries
from shardkit.testing.database import LocalDatabaseServer
from shardkit.testing.docker import engine_answers

pytestmark = pytest.mark.docker


@pytest.mark.parametrize("kind", [LocalMariaDB, LocalMySQL])
def test_a_database_server_in_a_container(kind: Callable[..., LocalDatabaseServer]) -> None:
    with kind(docker=True) as server:
        settings = "SELECT @@log_bin, @@binlog_format, @@binlog_row_metadata, @@server_id"
        assert server.execute(settings) == [(1, "ROW", "FULL", server.port)]
        server.execute("CREATE DATABASE shop")
        server.execute("CREATE TABLE shop.t (id INT PRIMARY KEY)")
        server.execute("INSERT INTO shop.t VALUES (1)")

        server.restart()
        assert server.execute("SELECT id FROM shop.t") == [(1,)]
        server.kill()
        assert not server.running
        server.start()
        assert server.execute("SELECT id FROM shop.t") == [(1,)]

        waiting = server.connect(read_timeout=0.5)
        server.pause()
        with pytest.raises(pymysql.OperationalError, match="timed out"):
            waiting.ping(reconnect=False)
        server.resume()
        assert server.execute("SELECT 1") == [(1,)]
    assert names_of_containers() == []


def test_zookeeper_in_a_container() -> None:
    with LocalZooKeeper(docker=True) as zookeeper:
        client = KazooClient(zookeeper.hosts)
        client.start(timeout=10)
        client.create("/kept", b"1")
        zookeeper.kill()
        zookeeper.start()
        assert client.retry(client.get, "/kept")[0] == b"1"
        client.stop()
        client.close()


def test_ports_are_published_on_the_loopback_address_only() -> None:
    with LocalMariaDB(docker=True) as server:
        client = docker.from_env()
        (container,) = client.containers.list(filters={"name": f"shardkit-{server.name}"})
        assert [binding["HostIp"] for binding in container.ports[f"{server.port}/tcp"]] == ["127.0.0.1"]
        client.close()


def test_containers_are_used_where_the_programs_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_arguments: object) -> binaries.Program:
        raise MissingServer("not installed")

    monkeypatch.setattr("shardkit.testing.mariadb.find_mariadb", nowhere)
    with LocalCluster(1, replicas=0, staging=False, zookeeper=False) as cluster:
        assert cluster.server("local-0").identity is None
        assert len(names_of_containers()) == 1
    with pytest.raises(MissingServer):
        LocalMariaDB(docker=False).start()


def test_a_container_that_does_not_start_shows_its_log() -> None:
    with pytest.raises(ServerFailed, match="no-such-option"):
        LocalMariaDB(docker=True, options={"no_such_option": 1}).__enter__()
    assert names_of_containers() == []


def test_a_process_that_is_killed_leaves_no_container() -> None:
    code = """
import time
from shardkit.testing import LocalMariaDB
with LocalMariaDB(docker=True):
    print("up", flush=True)
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout as output:
        assert output.readline() == "up\n"
    assert len(names_of_containers()) == 1
    holder.send_signal(signal.SIGKILL)
    holder.wait(20)
    deadline = time.monotonic() + 30
    while names_of_containers():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def names_of_containers() -> list[str]:
    assert engine_answers()
    client = docker.from_env()
    try:
        found = client.containers.list(all=True, filters={"name": "shardkit-"}, ignore_removed=True)
        return [container.name for container in found]
    finally:
        client.close()
