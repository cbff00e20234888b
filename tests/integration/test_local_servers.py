"""The servers of shardkit.testing: started, stopped, crashed, paused, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pymysql
import pytest
from kazoo.client import KazooClient

from shardkit.errors import MissingServer, PreconditionFailed, ServerFailed, Unreachable
from shardkit.testing import LocalMariaDB, LocalMySQL, LocalServer, LocalZooKeeper, free_port, start_together
from shardkit.testing.binaries import find_mariadb, find_mysql, find_zookeeper
from shardkit.testing.database import LocalDatabaseServer
from shardkit.testing.ports import release_port
from shardkit.testing.server import open_servers
from shardkit.testing.watchdog import start_time

KINDS = {"mariadb": LocalMariaDB, "mysql": LocalMySQL}


@pytest.fixture(scope="module")
def own_database(request: pytest.FixtureRequest, flavour: str) -> Iterator[LocalDatabaseServer]:
    """A database server that the tests of this file may stop and kill."""
    with KINDS[flavour]() as server:
        server.execute("CREATE DATABASE shop")
        server.execute("CREATE TABLE shop.t (id INT PRIMARY KEY)")
        yield server


@pytest.fixture
def server(own_database: LocalDatabaseServer) -> Iterator[LocalDatabaseServer]:
    own_database.execute("DELETE FROM shop.t")
    yield own_database
    own_database.resume()
    own_database.start()


def eventually(holds: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


# --- what a server offers ----------------------------------------------------------------------------------------


def test_a_database_server_logs_rows_with_full_metadata(database_server: LocalDatabaseServer) -> None:
    (row,) = database_server.execute("SELECT @@log_bin, @@binlog_format, @@binlog_row_image, @@binlog_row_metadata")
    assert row == (1, "ROW", "FULL", "FULL")


def test_every_transaction_has_a_gtid(database_server: LocalDatabaseServer, fresh_database: str) -> None:
    position = "@@gtid_executed" if database_server.flavour == "mysql" else "@@gtid_binlog_pos"
    before = database_server.execute(f"SELECT {position}")
    database_server.execute("CREATE TABLE t (id INT PRIMARY KEY)", database=fresh_database)
    assert database_server.execute(f"SELECT {position}") != before


def test_a_fresh_database_is_empty(database_server: LocalDatabaseServer, fresh_database: str) -> None:
    assert database_server.execute("SHOW TABLES", database=fresh_database) == []


def test_it_is_durable_only_where_asked(server: LocalDatabaseServer, flavour: str) -> None:
    settings = "SELECT @@sync_binlog, @@innodb_flush_log_at_trx_commit"
    assert server.execute(settings) == [(0, 2)]
    with KINDS[flavour](durable=True, options={"max_connections": 42}) as durable:
        assert durable.execute(settings) == [(1, 1)]
        assert durable.execute("SELECT @@max_connections") == [(42,)]


def test_a_user_with_a_password_can_log_on_and_a_wrong_password_is_refused(server: LocalDatabaseServer) -> None:
    server.create_user("app", "s3cret", grants="SELECT ON shop.*")
    with closing(server.connect("shop", user="app", password="s3cret")) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM t")
        assert cursor.fetchone() == (0,)
    with pytest.raises(Unreachable, match="Access denied") as refused:
        server.connect(user="app", password="wrong")
    assert "s3cret" not in str(refused.value)


def test_the_text_is_utf8(server: LocalDatabaseServer) -> None:
    assert server.execute("SELECT %s, CHAR_LENGTH(%s)", "서울 🗼", "서울 🗼") == [("서울 🗼", 4)]


def test_zookeeper_serves(zookeeper: LocalZooKeeper) -> None:
    assert "Mode: standalone" in zookeeper.ask("srvr")


# --- life cycle --------------------------------------------------------------------------------------------------


def test_what_was_committed_outlives_a_stop_and_a_start_on_the_same_port(server: LocalDatabaseServer) -> None:
    server.execute("INSERT INTO shop.t VALUES (1)")
    port = server.port
    server.stop()
    assert not server.running
    with pytest.raises(Unreachable, match="start the server first"):
        server.connect()
    server.start()
    assert server.port == port
    assert server.execute("SELECT id FROM shop.t") == [(1,)]


def test_what_was_committed_outlives_a_crash(server: LocalDatabaseServer) -> None:
    server.execute("INSERT INTO shop.t VALUES (1)")
    with closing(server.connect("shop")) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (2)")  # never committed
        server.kill()
    assert not server.running
    server.start()
    assert server.execute("SELECT id FROM shop.t") == [(1,)]


def test_a_paused_server_keeps_its_connections_and_answers_nothing(server: LocalDatabaseServer) -> None:
    with closing(server.connect(read_timeout=0.3)) as waiting, closing(server.connect()) as patient:
        server.pause()
        assert server.running
        with pytest.raises(pymysql.OperationalError, match="timed out"):
            waiting.ping(reconnect=False)
        server.resume()
        patient.ping(reconnect=False)


def test_a_paused_server_can_be_stopped_and_killed(server: LocalDatabaseServer) -> None:
    server.pause()
    server.stop()
    assert not server.running
    server.start()
    server.pause()
    server.kill()
    assert not server.running


def test_zookeeper_keeps_its_data_over_a_restart_and_a_crash() -> None:
    with LocalZooKeeper() as zookeeper:
        with connected(zookeeper) as client:
            client.create("/kept", b"1")
        zookeeper.restart()
        with connected(zookeeper) as client:
            client.set("/kept", b"2")
        zookeeper.kill()
        zookeeper.start()
        with connected(zookeeper) as client:
            assert client.get("/kept")[0] == b"2"


def test_zookeeper_sessions_may_be_short(zookeeper: LocalZooKeeper) -> None:
    with connected(zookeeper, timeout=0.6) as client:
        assert client._session_timeout == 600
    with connected(zookeeper, timeout=30.0) as client:
        assert client._session_timeout == 30_000


def test_closing_removes_everything(flavour: str) -> None:
    server = KINDS[flavour]().start()
    directory, port, identity = server.directory, server.port, server.identity
    assert directory is not None
    assert identity is not None
    assert server in open_servers()
    server.close()
    assert start_time(identity[0]) is None
    assert not directory.exists()
    assert server not in open_servers()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((server.host, port), timeout=1)


def test_several_servers_start_together(flavour: str) -> None:
    servers: list[LocalServer] = [KINDS[flavour](), KINDS[flavour](), LocalZooKeeper()]
    try:
        start_together(servers)
        assert all(server.running for server in servers)
        assert len({server.port for server in servers}) == 3
    finally:
        for server in servers:
            server.close()


def test_when_one_of_several_fails_none_stays(flavour: str) -> None:
    good, bad = KINDS[flavour](), KINDS[flavour](options={"no_such_option": 1})
    with pytest.raises(ServerFailed):
        start_together([good, bad])
    assert not good.running
    assert good.directory is None


# --- failures ----------------------------------------------------------------------------------------------------


def test_a_server_that_does_not_start_shows_its_log(flavour: str) -> None:
    with pytest.raises(ServerFailed, match="unknown variable 'no-such-option=1'") as failed:
        KINDS[flavour](options={"no_such_option": 1}).__enter__()
    assert "ended by itself" in str(failed.value)


def test_a_server_that_takes_too_long_shows_its_log_and_is_stopped() -> None:
    server = LocalZooKeeper(start_timeout=0.0)
    with pytest.raises(ServerFailed, match="did not answer within 0 seconds"):
        server.start()
    assert not server.running
    server.close()


def test_a_stopped_server_cannot_be_paused() -> None:
    with pytest.raises(PreconditionFailed, match="does not run"):
        LocalZooKeeper().pause()


@pytest.mark.parametrize(
    ("find", "package"),
    [(find_mariadb, "mariadb-server"), (find_mysql, "shardkit.testing.mysql_root"), (find_zookeeper, "zookeeper")],
)
def test_missing_programs_are_named_with_the_way_to_get_them(
    find: Callable[[dict[str, str]], object], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardkit.testing.binaries._SBIN", "")
    monkeypatch.setattr("shardkit.testing.binaries._JARS", tmp_path)
    with pytest.raises(MissingServer) as missing:
        find({"PATH": str(tmp_path), "SHARDKIT_CACHE": str(tmp_path)})
    assert package in (missing.value.hint or "")


def test_java_missing_is_told_apart_from_zookeeper_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardkit.testing.binaries._SBIN", "")
    with pytest.raises(MissingServer, match="needs Java"):
        find_zookeeper({"PATH": str(tmp_path), "SHARDKIT_ZOOKEEPER_CLASSPATH": "zookeeper.jar"})


@pytest.mark.parametrize(("variable", "find"), [("SHARDKIT_MARIADBD", find_mariadb), ("SHARDKIT_MYSQLD", find_mysql)])
def test_a_program_named_wrongly_is_not_replaced_by_another(
    variable: str, find: Callable[[dict[str, str]], object]
) -> None:
    with pytest.raises(MissingServer, match=f"{variable} names /bin/true"):
        find({**os.environ, variable: "/bin/true"})


# --- nothing is left behind --------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from shardkit.testing import {kind}
with {kind}() as server:
    {first}
    print(*server.identity, server.directory, flush=True)
    {then}
"""


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGKILL, "LocalZooKeeper"),
        (signal.SIGTERM, "LocalZooKeeper"),
        (signal.SIGINT, "LocalZooKeeper"),
        (signal.SIGKILL, "database"),
    ],
)
def test_a_process_that_dies_leaves_no_server_and_no_data(number: signal.Signals, kind: str, flavour: str) -> None:
    kind = KINDS[flavour].__name__ if kind == "database" else kind
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(kind=kind, first="pass", then="time.sleep(600)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid, started, directory = read_line(holder).split()
    assert start_time(int(pid)) == started
    holder.send_signal(number)
    holder.wait(20)
    eventually(lambda: start_time(int(pid)) != started)
    eventually(lambda: not Path(directory).exists())


def test_a_process_that_ends_without_closing_its_servers_leaves_nothing_and_says_nothing() -> None:
    code = """
from shardkit.testing import LocalZooKeeper
server = LocalZooKeeper().start()
print(*server.identity, server.directory)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    pid, started, directory = done.stdout.split()
    assert start_time(int(pid)) != started
    assert not Path(directory).exists()
    assert done.stderr == ""


def test_a_forked_child_that_lives_on_does_not_keep_the_servers_of_its_dead_parent() -> None:
    first = "if os.fork() == 0: time.sleep(60); os._exit(0)"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(kind="LocalZooKeeper", first=first, then="time.sleep(600)")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    pid, started, directory = read_line(holder).split()
    holder.kill()
    holder.wait(20)
    try:
        eventually(lambda: start_time(int(pid)) != started)
        eventually(lambda: not Path(directory).exists())
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_forked_child_that_ends_leaves_the_servers_of_its_parent_alone() -> None:
    first = "if (child := os.fork()) == 0: sys.exit()"
    then = "os.waitpid(child, 0); print(server.running, server.directory.exists())"
    done = subprocess.run(
        [sys.executable, "-c", HOLDER.format(kind="LocalZooKeeper", first=first, then=then)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "True True"


def test_ports_are_not_given_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even to processes that begin their search at the same place."""
    code = """
from shardkit.testing import free_port, ports
ports.random.randrange = lambda low, high: low
print(*(free_port() for _ in range(200)), flush=True)
input()
"""
    monkeypatch.setattr("random.randrange", lambda low, _high: low)
    others = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    mine = [free_port() for _ in range(200)]
    try:
        ports = mine + [int(port) for other in others for port in read_line(other).split()]
        assert len(set(ports)) == 600
    finally:
        for other in others:
            other.communicate("\n", timeout=20)
        for port in mine:
            release_port(port)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with process.stdout as output:
        return output.readline()


@contextmanager
def connected(zookeeper: LocalZooKeeper, timeout: float = 5.0) -> Iterator[KazooClient]:
    client = KazooClient(zookeeper.hosts, timeout=timeout)
    client.start(timeout=10)
    try:
        yield client
    finally:
        client.stop()
        client.close()
