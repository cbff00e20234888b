"""MariaDB into MySQL and MySQL into MariaDB: rows as statements, schema changes where they mean the same."""

from __future__ import annotations

import logging
import os
import random
import threading
from pathlib import Path

import pytest

from shardkit.errors import BadEvent, Drift, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc import skip as skipping
from shardkit_cdc.apply_path import AskedPath
from shardkit_cdc.relay import HopOptions
from tests.faults.test_relay_kill9 import Load
from tests.integration.test_relay_replay import COLUMNS, GENERATED
from tests.relay_chain import Chain, chain_over, relay_command
from tests.relay_daemon import Daemon, map_of

logger = logging.getLogger(__name__)

KILLS = int(os.environ.get("SHARDKIT_TEST_KILLS", "3"))

pytest_plugins = ["tests.relay_fixtures"]
pytestmark = [pytest.mark.mariadb, pytest.mark.mysql]


def comparable(name: str, kind: str) -> str:
    """SQL for a column's value as both families show it, to the last byte."""
    base = kind.split("(")[0]
    if base in {"FLOAT", "DOUBLE"}:
        return f"CAST({name} AS DOUBLE)"
    if base in {"ENUM", "SET", "BIT", "YEAR"}:
        return f"{name} + 0"
    if base == "JSON":
        return f"HEX(CAST({name} AS CHAR))"
    if (base.endswith("INT") and base != "POINT") or base in {"DECIMAL", "DATE", "TIME", "DATETIME", "TIMESTAMP"}:
        return f"CAST({name} AS CHAR)"
    return f"HEX(CAST({name} AS BINARY))"


def rows(server: LocalDatabaseServer, chain: Chain, query: str) -> list[tuple[object, ...]]:
    return list(server.execute(query, database=chain.database))


def test_every_type_arrives_as_it_was_written(abroad: Chain) -> None:
    # MariaDB's JSON is a LONGTEXT, which MySQL's JSON is not.
    columns = [each for each in COLUMNS if abroad.flavour is Flavour.MYSQL or " JSON" not in each[0]]
    abroad.start()
    names = ", ".join(definition.split()[0] for definition, _, _ in columns)
    insert = f"INSERT INTO types ({names}) VALUES"
    abroad.sql(
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in columns)}, {GENERATED})",
        f"{insert} ({', '.join(extreme for _, extreme, _ in columns)})",
        f"{insert} (2{', NULL' * (len(columns) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in columns)})",
        "UPDATE types SET medium = 7, name = 'changed', large = x'5c27005c22ff' WHERE id = 1",
        "UPDATE types SET tiny = 5 WHERE id = 2",
        "INSERT INTO types (id) VALUES (4)",
        "DELETE FROM types WHERE id = 4",
        "SET sql_mode = ''",
        "INSERT INTO types (id, day, moment, stamp) VALUES (5, '0000-00-00', '0000-00-00', '0000-00-00')",
        "SET sql_mode = 'ALLOW_INVALID_DATES'",
        "INSERT INTO types (id, day, moment) VALUES (6, '2026-00-00', '2026-02-31 01:02:03')",
    )
    abroad.settle()
    query = ", ".join(comparable(*definition.split()[:2]) for definition, _, _ in columns)
    query = f"SELECT {query}, plus_one, minus_one FROM types ORDER BY id"
    master, copy = (rows(server, abroad, query) for server in abroad.servers)
    assert len(master) == 5
    assert copy == master


def test_documents_arrive_as_their_text(families: dict[str, LocalDatabaseServer]) -> None:
    for chain in chain_over([families["mysql"], families["mariadb"]]):
        chain.start()
        chain.sql(
            "CREATE TABLE documents (id INT PRIMARY KEY, doc JSON)",
            "INSERT INTO documents VALUES (1, JSON_OBJECT('price', 1.10, 'day', DATE'2020-01-02', 'at', "
            "TIME'-12:00:01.5', 'when', TIMESTAMP'2020-01-01 01:02:03', 'raw', x'00ff', 'text', '\"\\\\ 한\\n'))",
            "INSERT INTO documents VALUES (2, '[1, -1, 18446744073709551615, 1.5, 1e300, 1e-7, true, null, {}, []]')",
            "UPDATE documents SET doc = JSON_SET(doc, '$[0]', REPEAT('x', 70000)) WHERE id = 2",
        )
        chain.settle()
        query = "SELECT id, HEX(CAST(doc AS CHAR)) FROM documents ORDER BY id"
        master, copy = (rows(server, chain, query) for server in chain.servers)
        assert copy == master


def test_schema_changes_and_transactions_of_every_kind(abroad: Chain) -> None:
    abroad.start()
    abroad.sql(
        "CREATE TABLE parent (id INT PRIMARY KEY, n INT UNIQUE)",
        "CREATE TABLE child (id INT PRIMARY KEY AUTO_INCREMENT, parent INT, "
        "FOREIGN KEY (parent) REFERENCES parent (id) ON DELETE CASCADE)",
        "INSERT INTO parent VALUES (1, 10), (2, 20), (3, 30)",
        "INSERT INTO child (parent) VALUES (1), (1), (2)",
        "DELETE FROM parent WHERE id = 1",
        "ALTER TABLE parent ADD COLUMN note VARCHAR(20) DEFAULT 'x', ADD INDEX (note)",
        "UPDATE parent SET note = 'y' WHERE id = 2",
        "BEGIN",
        "UPDATE parent SET n = 0 WHERE id = 2",
        "UPDATE parent SET n = 20 WHERE id = 3",
        "UPDATE parent SET n = 30 WHERE id = 2",
        "COMMIT",
        "CREATE TABLE copied AS SELECT * FROM parent",
        "XA START 'branch'",
        "INSERT INTO parent (id) VALUES (9)",
        "XA END 'branch'",
        "XA PREPARE 'branch'",
        "XA COMMIT 'branch'",
        "CREATE TABLE gone (id INT PRIMARY KEY)",
        "RENAME TABLE gone TO went",
        "DROP TABLE went",
    )
    abroad.settle()
    for table in ("parent", "child", "copied"):
        master, copy = (rows(server, abroad, f"SELECT * FROM {table} ORDER BY id") for server in abroad.servers)
        assert copy == master, table
    assert rows(abroad.last, abroad, "SHOW TABLES LIKE 'went'") == []


def test_a_timestamp_without_a_default_is_what_its_session_made_of_it(abroad: Chain) -> None:
    abroad.start()
    abroad.sql(
        "SET sql_mode = '', explicit_defaults_for_timestamp = OFF, time_zone = '+00:00'",
        "CREATE TABLE stamped (id INT PRIMARY KEY)",
        "INSERT INTO stamped VALUES (1)",
        "ALTER TABLE stamped ADD first TIMESTAMP",
        "ALTER TABLE stamped ADD second TIMESTAMP",
        "SET explicit_defaults_for_timestamp = ON",
        "ALTER TABLE stamped ADD third TIMESTAMP",
    )
    abroad.settle()
    master, copy = (rows(server, abroad, "SELECT * FROM stamped") for server in abroad.servers)
    assert copy == master


def test_the_path_and_the_position_are_told(abroad: Chain, tmp_path: Path) -> None:
    abroad.start()
    abroad.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    abroad.settle()
    shown = relay_command("status", "--map", map_of(abroad, tmp_path / "map.yaml"))
    assert shown.returncode == 0, shown.stderr
    assert "rows are applied as statements" in " ".join(shown.stderr.split() + shown.stdout.split())
    told = relay_command("status", "--json", "--map", map_of(abroad, tmp_path / "map.yaml")).stdout
    assert '"apply": "sql"' in told
    assert str(abroad.end_of_log()) in told


def test_row_events_cannot_be_asked_for(abroad: Chain) -> None:
    abroad.options = HopOptions(apply=AskedPath.RAW)
    abroad.run(abroad.hop(0))
    error = abroad.failed()
    assert isinstance(error, PreconditionFailed)
    assert "one family" in str(error.hint)


def test_what_means_something_else_there_stops_the_hop(abroad: Chain) -> None:
    abroad.run(abroad.hop(0))
    abroad.sql("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE VIEW v AS SELECT * FROM t")
    error = abroad.failed()
    assert isinstance(error, BadEvent)
    assert "CREATE VIEW" in error.message
    assert "skip" in str(error.hint)
    assert error.at is not None
    abroad.stop()
    credentials = abroad.master.credentials
    skipping.skip(skipping.look(abroad.specs[0], credentials, error.at, cluster="test"), credentials, by="pytest")
    abroad.start()
    abroad.sql("INSERT INTO t VALUES (1)")
    abroad.settle()
    assert rows(abroad.last, abroad, "SELECT id FROM t") == [(1,)]


def test_partitions_lose_their_rows_where_both_families_place_rows_alike(abroad: Chain) -> None:
    abroad.run(abroad.hop(0))
    for name, kind in (("numbers", "INT"), ("bytes", "VARBINARY(9)"), ("bits", "VARCHAR(9) COLLATE utf8mb4_bin")):
        abroad.sql(
            f"CREATE TABLE {name} (k {kind} PRIMARY KEY, word VARCHAR(9)) PARTITION BY KEY (k) PARTITIONS 4",
            f"INSERT INTO {name} (k) VALUES {','.join(f'({number})' for number in range(60))}",
            f"ALTER TABLE {name} TRUNCATE PARTITION p1",
        )
    abroad.settle()
    for name in ("numbers", "bytes", "bits"):
        master, copy = (rows(server, abroad, f"SELECT k FROM {name} ORDER BY k") for server in abroad.servers)
        assert copy == master, name
        assert 0 < len(copy) < 60
    abroad.sql(
        "CREATE TABLE words (k VARCHAR(9) PRIMARY KEY) PARTITION BY KEY (k) PARTITIONS 4",
        f"INSERT INTO words VALUES {','.join(f'({number})' for number in range(60))}",
        "ALTER TABLE words TRUNCATE PARTITION p1",
    )
    error = abroad.failed()
    assert isinstance(error, BadEvent)
    assert "collation" in error.message
    assert len(rows(abroad.last, abroad, "SELECT * FROM words")) == 60


def test_a_table_that_came_out_differently_stops_the_hop(families: dict[str, LocalDatabaseServer]) -> None:
    for chain in chain_over([families["mariadb"], families["mysql"]]):
        chain.run(chain.hop(0))
        chain.sql("CREATE TABLE documents (id INT PRIMARY KEY, doc JSON)", "INSERT INTO documents VALUES (1, '{}')")
        error = chain.failed()
        assert isinstance(error, Drift)
        assert "doc is" in error.message
        assert chain.database in error.message


def test_killed_in_the_middle_of_a_mixed_load(abroad: Chain, tmp_path: Path) -> None:
    seed = random.randrange(10**9)
    logger.info("seed %d", seed)  # shown when the test fails
    dice = random.Random(seed)
    daemon = Daemon(map_of(abroad, tmp_path / "map.yaml"), tmp_path / "relay.log")
    abroad.story = lambda: f"the daemon says {daemon.log()[-3000:]}"
    load = Load(abroad, seed)
    load.start()
    try:
        for _ in range(KILLS):
            daemon.start()
            daemon.wait_for_log(*(f"hop {spec.name}: running" for spec in abroad.specs))
            threading.Event().wait(dice.uniform(0, 0.7))  # the moment of the kill is the test's random input
            daemon.kill()
        load.stop()
        daemon.start()
        abroad.settle()
    finally:
        load.stop()
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.kill()
    tables = [name for (name,) in rows(abroad.master, abroad, "SHOW TABLES") if not str(name).startswith("shardkit_")]
    assert len(tables) > 4
    for table in tables:
        if table == "settled":
            continue
        columns = ", ".join(
            f"`{name}`"
            for (name,) in abroad.master.execute(
                "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s "
                "ORDER BY column_name",
                abroad.database,
                str(table),
            )
        )
        query = f"SELECT {columns} FROM `{table}` ORDER BY {columns}"
        master, copy = (rows(server, abroad, query) for server in abroad.servers)
        assert copy == master, table
    assert rows(abroad.last, abroad, "SELECT SUM(balance) FROM accounts") == [(100_000,)]
