"""What the relay will not do: refused before anything is changed, or stopped with the place and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shardkit.credentials import CredentialSource, fixed
from shardkit.errors import BadEvent, Drift, PreconditionFailed, Unreachable
from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from shardkit.testing.ports import free_port
from shardkit.topology import Endpoint, Role
from shardkit_cdc.apply_path import AskedPath
from shardkit_cdc.relay import Hop, HopOptions, HopSpec, State
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]


@contextmanager
def setting(server: LocalDatabaseServer, name: str, value: str) -> Iterator[None]:
    before = server.execute(f"SELECT @@global.{name}")[0][0]
    server.execute(f"SET GLOBAL {name} = {value}")
    try:
        yield
    finally:
        server.execute(f"SET GLOBAL {name} = %s", before)


def refusal(pair: Chain) -> Exception:
    """What a hop that cannot start says, having changed nothing on the target."""
    pair.run(pair.hop(0))
    error = pair.failed()
    pair.stop()
    tables = pair.last.execute("SHOW TABLES", database=pair.database)
    assert tables == [], f"the refused hop left {tables}"
    assert isinstance(error, Exception)
    return error


@pytest.mark.parametrize(
    ("name", "value"),
    [("binlog_format", "'STATEMENT'"), ("binlog_row_metadata", "'MINIMAL'"), ("binlog_row_image", "'MINIMAL'")],
)
def test_a_source_whose_log_cannot_be_replayed(pair: Chain, name: str, value: str) -> None:
    with setting(pair.master, name, value):
        error = refusal(pair)
    assert isinstance(error, PreconditionFailed)
    assert name in error.message
    assert pair.master.endpoint(pair.database).address in error.message
    assert error.hint is not None
    assert f"{name}=" in error.hint


def test_a_wrong_password(pair: Chain) -> None:
    error = _refused_with(pair, fixed("root", "secret-and-wrong"))
    assert isinstance(error, PreconditionFailed)
    assert "password" in error.message
    assert "secret-and-wrong" not in str(error)


def _refused_with(pair: Chain, credentials: CredentialSource) -> Exception:
    hop = Hop(pair.specs[0], credentials, cluster="test", runner="pytest", options=pair.options)
    pair.run(hop)
    error = pair.failed()
    assert isinstance(error, Exception)
    return error


def test_a_server_that_is_not_there_is_tried_again(pair: Chain) -> None:
    nowhere = Endpoint("127.0.0.1", free_port(), pair.database)
    spec = HopSpec(pair.shard, nowhere, pair.last.endpoint(pair.database), Role.STAGING, True)
    hop = Hop(spec, pair.master.credentials, cluster="test", runner="pytest", options=pair.options)
    pair.run(hop)
    wait_for(lambda: hop.report.state is State.RETRYING, "the hop says that it tries again")
    error = hop.report.error
    assert isinstance(error, Unreachable)
    assert nowhere.address in error.message


def test_an_account_without_the_right_to_read_the_log(pair: Chain) -> None:
    pair.master.execute("CREATE USER IF NOT EXISTS reader@'%' IDENTIFIED BY ''")
    pair.master.execute(f"GRANT SELECT, INSERT, UPDATE, CREATE ON {pair.database}.* TO reader@'%'")
    try:
        error = _refused_with(
            pair, lambda endpoint: fixed("reader" if endpoint.port == pair.master.port else "root")(endpoint)
        )
    finally:
        pair.stop()
        pair.master.execute("DROP USER reader@'%'")
    assert isinstance(error, PreconditionFailed)
    assert "REPLICATION SLAVE" in str(error.hint)


def test_an_account_that_may_not_apply_row_events(pair: Chain) -> None:
    pair.options = HopOptions(apply=AskedPath.RAW)
    pair.last.execute("CREATE USER IF NOT EXISTS writer@'%' IDENTIFIED BY ''")
    pair.last.execute(f"GRANT ALL ON {pair.database}.* TO writer@'%'")
    try:
        error = _refused_with(
            pair, lambda endpoint: fixed("writer" if endpoint.port == pair.last.port else "root")(endpoint)
        )
    finally:
        pair.stop()
        pair.last.execute("DROP USER writer@'%'")
    assert isinstance(error, PreconditionFailed)
    assert "privilege" in error.message
    assert pair.last.execute("SHOW TABLES", database=pair.database) == []


def test_a_target_that_holds_tables_already(pair: Chain) -> None:
    pair.sql("CREATE TABLE here_before (id INT PRIMARY KEY)", server=pair.last)
    pair.run(pair.hop(0))
    error = pair.failed()
    assert isinstance(error, PreconditionFailed)
    assert "here_before" in error.message
    assert "seed" in str(error.hint)


def test_a_database_with_another_default_character_set(pair: Chain) -> None:
    pair.last.execute(f"ALTER DATABASE {pair.database} CHARACTER SET latin1")
    error = refusal(pair)
    assert isinstance(error, PreconditionFailed)
    assert "ALTER DATABASE" in str(error.hint)


def test_rows_changed_by_a_statement(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)", "INSERT INTO t VALUES (1, 1)")
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION binlog_format = 'STATEMENT'")
        cursor.execute("UPDATE t SET n = 2 WHERE id = 1")
    error = pair.failed()
    assert isinstance(error, BadEvent)
    assert "UPDATE t SET n = 2" in error.message
    assert error.at is not None
    assert "binlog_format=ROW" in str(error.hint)
    assert pair.last.execute("SELECT n FROM t", database=pair.database) == [(1,)]


@pytest.mark.parametrize(
    ("meddling", "change"),
    [
        pytest.param("DELETE FROM t WHERE id = 1", "UPDATE t SET n = 5 WHERE id = 1", id="row missing"),
        pytest.param("INSERT INTO t VALUES (3, 3)", "INSERT INTO t VALUES (3, 4)", id="duplicate"),
        pytest.param("ALTER TABLE t DROP COLUMN n", "INSERT INTO t VALUES (3, 4)", id="column missing"),
        pytest.param("ALTER TABLE t MODIFY n BIGINT", "INSERT INTO t VALUES (3, 4)", id="column type"),
        pytest.param("DROP TABLE t", "INSERT INTO t VALUES (3, 4)", id="table missing"),
        pytest.param("CREATE TABLE u (id INT PRIMARY KEY)", "CREATE TABLE u (id INT PRIMARY KEY)", id="table there"),
    ],
)
def test_a_target_that_somebody_wrote_to(pair: Chain, meddling: str, change: str) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)", "INSERT INTO t VALUES (1, 1), (2, 2)")
    pair.settle()
    pair.stop()
    pair.sql(meddling, server=pair.last)
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE good (id INT PRIMARY KEY)", "INSERT INTO good VALUES (1)", change, "INSERT INTO good VALUES (2)"
    )
    error = pair.failed()
    assert isinstance(error, Drift)
    assert error.at is not None
    assert error.hint is not None
    # Everything before the change is there, nothing of what follows it.
    assert pair.last.execute("SELECT id FROM good", database=pair.database) == [(1,)]
    noted = pair.last.execute("SELECT error FROM shardkit_position WHERE hop = 'hop:shop-0'", database=pair.database)
    assert noted[0][0] == str(error)


def test_a_row_larger_than_the_target_takes_names_the_setting(pair: Chain) -> None:
    pair.options = HopOptions(apply=AskedPath.RAW)
    megabyte = 1 << 20
    with (
        setting(pair.master, "max_allowed_packet", str(64 * megabyte)),
        setting(pair.last, "max_allowed_packet", str(16 * megabyte)),
    ):
        pair.run(pair.hop(0))
        pair.sql(
            "CREATE TABLE t (id INT PRIMARY KEY, body LONGTEXT)",
            f"INSERT INTO t VALUES (1, REPEAT('x', {11 * megabyte}))",
            f"INSERT INTO t VALUES (2, REPEAT('x', {13 * megabyte}))",
        )
        error = pair.failed()
        pair.stop()
        assert isinstance(error, BadEvent)
        assert "max_allowed_packet" in str(error.hint)
        assert pair.last.execute("SELECT id FROM t", database=pair.database) == [(1,)]
        pair.last.execute(f"SET GLOBAL max_allowed_packet = {18 * megabyte}")
        pair.run(pair.hop(0))
        pair.settle()
        pair.assert_equal()


def test_a_compressed_transaction_of_mysql_names_the_setting(own_pair: Chain) -> None:
    pair = own_pair  # its log cannot be read by other tests afterwards
    if pair.flavour is not Flavour.MYSQL:
        pytest.skip("MariaDB compresses single events, which the relay inflates")
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION binlog_transaction_compression = ON")
        cursor.execute("INSERT INTO t VALUES (1), (2), (3)")
    error = pair.failed()
    assert isinstance(error, BadEvent)
    assert "binlog_transaction_compression" in str(error)


def test_compressed_events_of_mariadb_are_inflated(pair: Chain) -> None:
    if pair.flavour is not Flavour.MARIADB:
        pytest.skip("MySQL compresses whole transactions")
    with setting(pair.master, "log_bin_compress", "1"), setting(pair.master, "log_bin_compress_min_len", "10"):
        pair.run(pair.hop(0))
        pair.sql(
            "CREATE TABLE t (id INT PRIMARY KEY, body TEXT)",
            *(f"INSERT INTO t VALUES ({number}, REPEAT('squeeze', 1000))" for number in range(5)),
            "UPDATE t SET body = REPEAT('again', 2000) WHERE id < 3",
            "DELETE FROM t WHERE id = 4",
        )
        pair.settle()
    pair.assert_equal()


def test_a_purged_log(own_pair: Chain) -> None:
    own_pair.run(own_pair.hop(0))
    own_pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    own_pair.settle()
    own_pair.stop()
    own_pair.sql("INSERT INTO t VALUES (1)")
    own_pair.master.execute("FLUSH BINARY LOGS")
    last = own_pair.master.execute("SHOW BINARY LOGS")[-1][0]
    wait_for(lambda: _purged(own_pair, last), "the log is purged")
    own_pair.run(own_pair.hop(0))
    error = own_pair.failed()
    assert "purged" in str(error)
    assert "reseed" in str(error)


def _purged(own_pair: Chain, last: str) -> bool:
    own_pair.master.execute(f"PURGE BINARY LOGS TO '{last}'")
    return len(own_pair.master.execute("SHOW BINARY LOGS")) == 1
