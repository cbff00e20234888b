"""Servers that the environment names: used, checked, and neither started nor stopped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardkit.errors import PreconditionFailed, Unreachable
from shardkit.testing import LocalZooKeeper, free_port
from shardkit.testing.database import Flavour, LocalDatabaseServer
from shardkit.testing.named import NamedDatabaseServer, NamedServer, mariadb_server, mysql_server, zookeeper_server
from shardkit.testing.ports import release_port

OPEN = {"mariadb": mariadb_server, "mysql": mysql_server}


@pytest.fixture
def url(database_server: LocalDatabaseServer) -> Iterator[str]:
    database_server.create_user("named", "p@ss/word", grants="ALL PRIVILEGES ON *.*")
    yield f"mysql://named:p%40ss%2Fword@{database_server.host}:{database_server.port}"
    database_server.execute("DROP USER named")


def test_a_named_server_is_used_and_left_running(url: str, database_server: LocalDatabaseServer, flavour: str) -> None:
    with OPEN[flavour]({f"SHARDKIT_TEST_{flavour.upper()}_URL": url}) as server:
        assert isinstance(server, NamedServer)
        assert server.execute("SELECT 1") == [(1,)]
        assert server.port == database_server.port
        assert "word" not in repr(server)
    assert database_server.execute("SELECT 1") == [(1,)]


@pytest.mark.parametrize("deed", ["stop", "kill", "restart", "pause"])
def test_a_named_server_is_not_ours_to_stop(url: str, flavour: Flavour, deed: str) -> None:
    with (
        NamedDatabaseServer(url, flavour) as server,
        pytest.raises(PreconditionFailed, match="named by the environment"),
    ):
        getattr(server, deed)()


def test_the_wrong_flavour_is_refused(url: str, flavour: str) -> None:
    other: Flavour = "mysql" if flavour == "mariadb" else "mariadb"
    with pytest.raises(PreconditionFailed, match=f"not {other}"):
        NamedDatabaseServer(url, other).start()


def test_a_server_without_full_row_metadata_is_refused(
    url: str, flavour: Flavour, database_server: LocalDatabaseServer
) -> None:
    database_server.execute("SET GLOBAL binlog_row_metadata = 'MINIMAL'")
    try:
        with pytest.raises(PreconditionFailed, match="binlog_row_metadata=MINIMAL") as refused:
            NamedDatabaseServer(url, flavour).start()
    finally:
        database_server.execute("SET GLOBAL binlog_row_metadata = 'FULL'")
    assert "--binlog-row-metadata=FULL" in (refused.value.hint or "")


def test_a_server_that_does_not_answer_is_an_error_and_not_replaced() -> None:
    port = free_port()
    try:
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}"):
            NamedDatabaseServer(f"mysql://root@127.0.0.1:{port}", "mariadb").start()
    finally:
        release_port(port)


@pytest.mark.parametrize("url", ["127.0.0.1:3306", "mysql://127.0.0.1:3306", "postgres://root:s3cret@127.0.0.1"])
def test_a_url_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(PreconditionFailed) as refused:
        NamedDatabaseServer(url, "mariadb")
    assert "s3cret" not in str(refused.value)


def test_a_named_zookeeper_is_used(zookeeper: LocalZooKeeper) -> None:
    with zookeeper_server({"SHARDKIT_TEST_ZOOKEEPER": zookeeper.hosts}) as named:
        assert named.hosts == zookeeper.hosts
    assert zookeeper.running
    with pytest.raises(PreconditionFailed, match="names no ZooKeeper"):
        zookeeper_server({"SHARDKIT_TEST_ZOOKEEPER": "2181"})
