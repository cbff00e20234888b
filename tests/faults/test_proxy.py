"""The fault proxy: every fault that it claims to make really reaches client and server."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pymysql
import pytest
from kazoo.client import KazooClient

from shardkit.errors import PreconditionFailed
from shardkit.testing import LocalZooKeeper, TcpProxy
from shardkit.testing.database import LocalDatabaseServer
from shardkit.testing.proxy import Action, Direction

COM_QUERY = 3


@pytest.fixture
def proxy(database_server: LocalDatabaseServer) -> Iterator[TcpProxy]:
    with TcpProxy(database_server.host, database_server.port) as proxy:
        yield proxy


@pytest.fixture
def table(database_server: LocalDatabaseServer, fresh_database: str) -> str:
    database_server.execute("CREATE TABLE t (id INT PRIMARY KEY)", database=fresh_database)
    return f"{fresh_database}.t"


def connect(proxy: TcpProxy, **options: Any) -> pymysql.Connection[Any]:
    # Packets can only be told apart without TLS, which PyMySQL uses wherever the server offers it (MySQL does).
    settings: dict[str, Any] = {"host": proxy.host, "port": proxy.port, "user": "root", "ssl_disabled": True}
    return pymysql.connect(**settings | options)


def ask(connection: pymysql.Connection[Any], sql: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def is_query(direction: Direction, packet: bytes, text: bytes) -> bool:
    return direction is Direction.TO_SERVER and packet[4:5] == bytes([COM_QUERY]) and packet[5:].startswith(text)


def test_statements_pass_unchanged(proxy: TcpProxy) -> None:
    with closing(connect(proxy)) as connection:
        assert ask(connection, "SELECT REPEAT('x', 200000)") == (("x" * 200000,),)
    assert proxy.accepted == 1
    assert proxy.forwarded(Direction.TO_CLIENT) > 200000


def test_a_cut_loses_open_connections_and_lets_new_ones_in(proxy: TcpProxy) -> None:
    with closing(connect(proxy)) as first:
        assert proxy.cut() == 1
        with pytest.raises(pymysql.OperationalError):
            ask(first, "SELECT 1")
    with closing(connect(proxy)) as second:
        assert ask(second, "SELECT 2") == ((2,),)


def test_the_server_sees_the_cut_too(proxy: TcpProxy, database_server: LocalDatabaseServer, table: str) -> None:
    """An open transaction is rolled back, so its lock is free for the next writer."""
    with closing(connect(proxy)) as connection:
        ask(connection, f"INSERT INTO {table} VALUES (1)")
        proxy.cut()
        database_server.execute(f"INSERT INTO {table} VALUES (1)")
    assert database_server.execute(f"SELECT * FROM {table}") == [(1,)]


def test_a_black_hole_answers_nothing_and_goes_on_where_it_was(proxy: TcpProxy) -> None:
    with closing(connect(proxy, read_timeout=0.3)) as connection:
        proxy.blackhole(Direction.TO_CLIENT)
        with pytest.raises(pymysql.OperationalError, match="timed out"):
            ask(connection, "SELECT 1")
    proxy.blackhole()
    with pytest.raises(pymysql.OperationalError):
        connect(proxy, connect_timeout=0.3, read_timeout=0.3)
    proxy.restore()
    with closing(connect(proxy)) as connection:
        assert ask(connection, "SELECT 1") == ((1,),)


def test_a_delay_slows_both_ways(proxy: TcpProxy) -> None:
    with closing(connect(proxy)) as connection:
        proxy.delay(0.1)
        started = time.monotonic()
        ask(connection, "SELECT 1")
        assert time.monotonic() - started >= 0.2
        proxy.delay(0)


def test_the_answer_to_a_commit_can_be_lost(proxy: TcpProxy, database_server: LocalDatabaseServer, table: str) -> None:
    with closing(connect(proxy)) as connection:
        ask(connection, f"INSERT INTO {table} VALUES (1)")
        proxy.cut_after(packets=1, direction=Direction.TO_SERVER)
        with pytest.raises(pymysql.OperationalError):
            connection.commit()
    assert proxy.tripped.wait(10)
    eventually(lambda: database_server.execute(f"SELECT * FROM {table}") == [(1,)])


def test_a_commit_can_be_lost_on_its_way(proxy: TcpProxy, database_server: LocalDatabaseServer, table: str) -> None:
    with closing(connect(proxy)) as connection:
        ask(connection, f"INSERT INTO {table} VALUES (1)")
        proxy.cut_after(packets=0, direction=Direction.TO_SERVER)
        with pytest.raises(pymysql.OperationalError):
            connection.commit()
    # Waits for the lock of the transaction that was lost.
    assert database_server.execute(f"SELECT * FROM {table} FOR UPDATE") == []


def test_a_cut_counted_in_bytes_cuts_to_the_byte(proxy: TcpProxy) -> None:
    with closing(connect(proxy)) as connection:
        before = proxy.forwarded(Direction.TO_CLIENT)
        proxy.cut_after(size=1000, direction=Direction.TO_CLIENT)
        with pytest.raises(pymysql.OperationalError):
            ask(connection, "SELECT REPEAT('x', 5000)")
        assert proxy.forwarded(Direction.TO_CLIENT) - before == 1000


@pytest.mark.parametrize(("action", "kept"), [(Action.CUT_BEFORE, []), (Action.CUT_AFTER, [(1,)])])
def test_a_hook_cuts_at_the_packet_that_it_chooses(
    database_server: LocalDatabaseServer, table: str, action: Action, kept: list[tuple[int]]
) -> None:
    def cut_at_commit(direction: Direction, packet: bytes) -> Action:
        return action if is_query(direction, packet, b"COMMIT") else Action.FORWARD

    with (
        TcpProxy(database_server.host, database_server.port, on_packet=cut_at_commit) as proxy,
        closing(connect(proxy)) as connection,
    ):
        ask(connection, f"INSERT INTO {table} VALUES (1)")
        with pytest.raises(pymysql.OperationalError):
            connection.commit()
    eventually(lambda: database_server.execute(f"SELECT * FROM {table} FOR UPDATE") == kept)


@pytest.fixture
def offers_tls(database_server: LocalDatabaseServer) -> None:
    if database_server.flavour != "mysql":
        pytest.skip("the MariaDB of these tests offers no TLS")


@pytest.mark.usefixtures("offers_tls")
def test_tls_passes(proxy: TcpProxy) -> None:
    with closing(connect(proxy, ssl_disabled=False)) as connection:
        ((_, cipher),) = ask(connection, "SHOW STATUS LIKE 'Ssl_cipher'")
        assert cipher
        assert ask(connection, "SELECT REPEAT('x', 200000)") == (("x" * 200000,),)


@pytest.mark.usefixtures("offers_tls")
def test_packets_of_tls_are_not_counted_by_guess(database_server: LocalDatabaseServer) -> None:
    proxy = TcpProxy(database_server.host, database_server.port).start()
    with closing(connect(proxy, ssl_disabled=False)) as connection:
        proxy.cut_after(packets=1)
        with pytest.raises(pymysql.OperationalError):
            ask(connection, "SELECT 1")
    with pytest.raises(PreconditionFailed, match="uses TLS"):
        proxy.close()


def test_an_error_in_a_hook_is_not_lost(database_server: LocalDatabaseServer) -> None:
    def broken(_direction: Direction, _packet: bytes) -> Action:
        raise LookupError("a mistake in the test")

    def use() -> None:
        with (
            TcpProxy(database_server.host, database_server.port, on_packet=broken) as proxy,
            pytest.raises(pymysql.OperationalError),
        ):
            connect(proxy)

    with pytest.raises(LookupError, match="a mistake in the test"):
        use()


def test_connections_are_refused_until_the_proxy_listens_again(proxy: TcpProxy) -> None:
    proxy.refuse()
    with pytest.raises(pymysql.OperationalError, match="refused"):
        connect(proxy)
    proxy.start()
    connect(proxy).close()


def test_the_number_of_connections_is_bounded(database_server: LocalDatabaseServer) -> None:
    proxy = TcpProxy(database_server.host, database_server.port, max_connections=1).start()
    with closing(connect(proxy)), pytest.raises(pymysql.OperationalError):
        connect(proxy)
    with pytest.raises(PreconditionFailed, match="already carries 1"):
        proxy.close()


def test_nothing_listens_after_the_end(database_server: LocalDatabaseServer) -> None:
    with TcpProxy(database_server.host, database_server.port) as proxy:
        connection = connect(proxy)
    assert proxy.connections == 0
    with closing(connection), pytest.raises(pymysql.OperationalError):
        ask(connection, "SELECT 1")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), timeout=1)


def test_zookeeper_packets_are_told_apart(zookeeper: LocalZooKeeper) -> None:
    seen: list[int] = []

    def note(direction: Direction, packet: bytes) -> Action:
        if direction is Direction.TO_SERVER:
            assert int.from_bytes(packet[:4], "big") == len(packet) - 4
            seen.append(len(packet))
        return Action.FORWARD

    with TcpProxy(zookeeper.host, zookeeper.port, framing="zookeeper", on_packet=note) as proxy:
        client = KazooClient(f"{proxy.host}:{proxy.port}")
        client.start(timeout=10)
        client.create("/through-the-proxy", b"x" * 1000)
        client.stop()
        client.close()
    assert max(seen) > 1000


def eventually(holds: Any, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
