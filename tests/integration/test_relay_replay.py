"""What a master's clients do arrives on staging and replica, byte for byte and once."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pymysql
import pytest

from shardkit.errors import Drift, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Role
from shardkit_cdc.relay import Hop, HopSpec, State
from tests.conftest import FLAVOUR
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]

# column definition -> its value in a row of extremes, and in a row of small things
COLUMNS: list[tuple[str, str, str]] = [
    ("id INT PRIMARY KEY", "1", "3"),
    ("tiny TINYINT", "-128", "0"),
    ("utiny TINYINT UNSIGNED", "255", "0"),
    ("small SMALLINT", "-32768", "1"),
    ("medium MEDIUMINT", "-8388608", "0"),
    ("whole INT UNSIGNED", "4294967295", "0"),
    ("big BIGINT", "-9223372036854775808", "0"),
    ("ubig BIGINT UNSIGNED", "18446744073709551615", "0"),
    ("price DECIMAL(12,2)", "-9999999999.99", "0.01"),
    ("exact DECIMAL(65,30)", "12345678901234567890123456789012345.123456789012345678901234567890", "0"),
    ("single FLOAT", "-1.5", "0"),
    ("twice DOUBLE", "2.718281828459045", "-0.0"),
    ("thin DOUBLE", "-3.3339745473042614e-121", "-1.4074705188261364e113"),
    ("flags BIT(13)", "b'1010101010101'", "b'0'"),
    ("born YEAR", "2155", "0"),
    ("day DATE", "'9999-12-31'", "'1000-01-01'"),
    ("clock TIME", "'-838:59:59'", "'-00:00:01'"),
    ("clock6 TIME(6)", "'838:59:58.999999'", "'-00:00:00.000001'"),
    ("moment DATETIME", "'1000-01-01 00:00:00'", "'2026-11-22 12:34:56'"),
    ("moment3 DATETIME(3)", "'9999-12-31 23:59:59.999'", "'2000-01-01 00:00:00.001'"),
    ("stamp TIMESTAMP NULL", "'2038-01-18 03:14:07'", "'1971-01-01 00:00:01'"),
    ("stamp6 TIMESTAMP(6) NULL", "'1970-01-02 00:00:01.000001'", "'2000-01-01'"),
    ("fixed CHAR(10)", "'char'", "''"),
    ("fixed_long CHAR(200)", "'한글'", "''"),
    ("name VARCHAR(300)", "'naïve 😀'", "''"),
    ("latin VARCHAR(40) CHARACTER SET latin1", "'éü'", "''"),
    ("korean VARCHAR(40) CHARACTER SET euckr", "'서울'", "''"),
    ("wide VARCHAR(40) CHARACTER SET utf16", "'utf16 글자'", "''"),
    ("raw BINARY(8)", "x'00ff00ff'", "''"),
    ("raws VARBINARY(300)", "x'0001020304ff'", "''"),
    ("small_text TINYTEXT", "'tiny'", "''"),
    ("words TEXT", "'text'", "''"),
    ("more MEDIUMTEXT", "'medium'", "''"),
    ("small_blob TINYBLOB", "x'00'", "''"),
    ("body BLOB", "x'deadbeef'", "''"),
    ("large LONGBLOB", "REPEAT('x', 70000)", "''"),
    ("document JSON", """'{"a": [1, 2.5, null, "한"]}'""", "'[]'"),
    ("colour ENUM('red','green','it''s')", "'it''s'", "'red'"),
    ("tags SET('a','b','c','d','e','f','g','h','i')", "'a,i'", "''"),
    ("colour16 ENUM('red','green') CHARACTER SET utf16", "'green'", "'red'"),
    ("tags16 SET('a','b') CHARACTER SET ucs2", "'a,b'", "''"),
    ("place POINT", "ST_GeomFromText('POINT(1 2)')", "ST_GeomFromText('POINT(0 0)')"),
]
GENERATED = "plus_one BIGINT AS (medium + 1) STORED, minus_one BIGINT AS (medium - 1) VIRTUAL"


def test_every_type_arrives_as_it_was_written(chain: Chain) -> None:
    chain.start()
    names = ", ".join(definition.split()[0] for definition, _, _ in COLUMNS)
    insert = f"INSERT INTO types ({names}) VALUES"
    chain.sql(
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in COLUMNS)}, {GENERATED})",
        f"{insert} ({', '.join(extreme for _, extreme, _ in COLUMNS)})",
        f"{insert} (2{', NULL' * (len(COLUMNS) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in COLUMNS)})",
        "UPDATE types SET medium = 7, name = 'changed', document = '{}' WHERE id = 1",
        "UPDATE types SET tiny = 5 WHERE id = 2",
        "INSERT INTO types (id) VALUES (4)",
        "DELETE FROM types WHERE id = 4",
    )
    chain.settle()
    chain.assert_equal()
    hexes = ", ".join(f"HEX({definition.split()[0]})" for definition, _, _ in COLUMNS)
    query = f"SELECT {hexes}, clock6, stamp6, exact, plus_one, minus_one FROM types ORDER BY id"
    master, *copies = [server.execute(query, database=chain.database) for server in chain.servers]
    assert len(master) == 3
    for copy in copies:
        assert copy == master


@pytest.mark.skipif(FLAVOUR != "mariadb", reason="MySQL names what it has of these in status variables of their own")
def test_schema_changes_run_under_the_options_of_their_session(chain: Chain) -> None:
    chain.start()
    chain.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "INSERT INTO t VALUES (1, -1)",
        "SET explicit_defaults_for_timestamp = OFF",
        "ALTER TABLE t ADD first TIMESTAMP, ADD second TIMESTAMP",
        "SET explicit_defaults_for_timestamp = ON",
        "ALTER TABLE t ADD third TIMESTAMP",
        "SET check_constraint_checks = OFF",
        "ALTER TABLE t ADD CHECK (n > 0)",
        "SET check_constraint_checks = ON, sql_if_exists = ON",
        "ALTER TABLE nothing ADD m INT",
        "SET sql_if_exists = OFF",
        "CREATE TABLE u (id INT PRIMARY KEY)",
    )
    chain.settle()
    chain.assert_equal()


def test_new_numbers_are_the_sources_whatever_steps_the_target_takes(own_pair: Chain) -> None:
    pair = own_pair
    pair.sql("SET GLOBAL auto_increment_increment = 7", "SET GLOBAL auto_increment_offset = 3", server=pair.last)
    pair.start()
    pair.sql(
        "CREATE TABLE t (n INT)",
        "INSERT INTO t VALUES (1), (2), (3)",
        "ALTER TABLE t ADD id INT AUTO_INCREMENT PRIMARY KEY",
        "CREATE TABLE u (n INT)",
        "INSERT INTO u VALUES (1), (2)",
        "SET auto_increment_increment = 5, auto_increment_offset = 2",
        "ALTER TABLE u ADD id INT AUTO_INCREMENT PRIMARY KEY",
    )
    pair.settle()
    pair.assert_equal()


#: What only one family has, or describes in its own way.
PECULIAR = {
    Flavour.MARIADB: [
        "CREATE TABLE net (id UUID PRIMARY KEY, six INET6, four INET4)",
        "INSERT INTO net VALUES (UUID(), '2001:db8::1', '10.0.0.1'), (UUID(), NULL, NULL)",
        "CREATE TABLE packed (id INT PRIMARY KEY, body VARCHAR(1000) COMPRESSED, more TEXT COMPRESSED)",
        "INSERT INTO packed VALUES (1, REPEAT('a', 900), REPEAT('b', 9000))",
        "CREATE TABLE versioned (id INT PRIMARY KEY, n INT) WITH SYSTEM VERSIONING",
        "INSERT INTO versioned VALUES (1, 1)",
        "UPDATE versioned SET n = 2",
        "CREATE SEQUENCE counter START WITH 5",
        "SELECT NEXTVAL(counter)",
        "CREATE TABLE seen (id INT PRIMARY KEY, secret INT INVISIBLE DEFAULT 7, KEY (secret))",
        "INSERT INTO seen (id) VALUES (1)",
        "CREATE TABLE longs (id INT PRIMARY KEY, body TEXT UNIQUE, raw BLOB, n INT, UNIQUE (raw, n))",
        "INSERT INTO longs VALUES (1, 'a', 'b', 1), (2, REPEAT('c', 9000), 'b', 2), (3, NULL, NULL, NULL)",
        "UPDATE longs SET body = CONCAT(body, 'x'), n = n + 10",
        "DELETE FROM longs WHERE id = 1",
        "CREATE TABLE checked (id INT PRIMARY KEY, n INT CHECK (n > 0), j JSON CHECK (JSON_VALID(j)))",
        "INSERT INTO checked VALUES (1, 1, '{}')",
        "CREATE OR REPLACE TABLE checked (id INT PRIMARY KEY)",
    ],
    Flavour.MYSQL: [
        "CREATE TABLE vectors (id INT PRIMARY KEY, v VECTOR(3))",
        "INSERT INTO vectors VALUES (1, STRING_TO_VECTOR('[1,2,3]'))",
        "CREATE TABLE functional (id INT PRIMARY KEY, name VARCHAR(20), KEY ((LOWER(name))))",
        "INSERT INTO functional VALUES (1, 'ABC')",
        # no multi-valued index: CHECKSUM TABLE of such a table gives another number each time (MySQL 9.7)
        "CREATE TABLE seen (id INT PRIMARY KEY, secret INT INVISIBLE DEFAULT 7, KEY (secret))",
        "INSERT INTO seen (id) VALUES (1)",
        "SET sql_generate_invisible_primary_key = ON",
        "CREATE TABLE keyless (n INT)",
        "INSERT INTO keyless VALUES (1), (1)",
        "UPDATE keyless SET n = 2 LIMIT 1",
        "CREATE TABLE checked (id INT PRIMARY KEY, n INT CHECK (n > 0))",
        "INSERT INTO checked VALUES (1, 1)",
        "CREATE TABLE places (id INT PRIMARY KEY, p POINT NOT NULL SRID 4326, SPATIAL KEY (p))",
        "INSERT INTO places VALUES (1, ST_GeomFromText('POINT(1 2)', 4326))",
    ],
}


def test_what_only_one_family_has(chain: Chain) -> None:
    chain.start()
    chain.sql(*PECULIAR[chain.flavour])
    chain.settle()
    chain.assert_equal()


def test_texts_of_many_character_sets_beside_geometry(chain: Chain) -> None:
    """The families list the collations of different columns in their logs."""
    chain.start()
    chain.sql(
        "CREATE TABLE places (spot GEOMETRY, a VARCHAR(9) CHARACTER SET latin1, b TEXT, at POINT, "
        "c CHAR(5) CHARACTER SET utf16, raw BLOB, e ENUM('x') CHARACTER SET latin2)",
        "INSERT INTO places VALUES (ST_GeomFromText('POINT(1 2)'), 'é', '한', NULL, 'z', 'r', 'x')",
        "CREATE TABLE few (spot GEOMETRY, raw VARBINARY(9), more BLOB, name VARCHAR(9) CHARACTER SET utf8mb3)",
        "INSERT INTO few VALUES (ST_GeomFromText('POINT(1 2)'), 'r', 's', 'n')",
    )
    chain.settle()
    chain.assert_equal()


def test_zero_dates_and_zero_ids_survive_the_targets_sql_mode(chain: Chain) -> None:
    chain.start()
    connection = chain.master.connect(chain.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET sql_mode = 'NO_AUTO_VALUE_ON_ZERO'")
        cursor.execute(
            "CREATE TABLE odd (id INT AUTO_INCREMENT PRIMARY KEY, day DATE, at DATETIME, stamp TIMESTAMP NULL)"
        )
        cursor.execute(
            "INSERT INTO odd VALUES (0, '0000-00-00', '0000-00-00', '0000-00-00'), (-1, '2026-00-00', NULL, NULL)"
        )
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT id FROM odd ORDER BY id", database=chain.database) == [(-1,), (0,)]


def test_tables_without_a_primary_key_and_with_extra_indexes(chain: Chain) -> None:
    chain.start()
    chain.sql(
        "CREATE TABLE loose (a INT, b VARCHAR(10))",
        "CREATE TABLE kept (id INT PRIMARY KEY, city VARCHAR(20))",
        "INSERT INTO loose VALUES (1, 'x'), (1, 'x'), (2, NULL)",
    )
    chain.settle()
    chain.sql("ALTER TABLE kept ADD INDEX here (city)", server=chain.last)
    chain.sql(
        "DELETE FROM loose WHERE a = 1 LIMIT 1",
        "UPDATE loose SET b = 'y' WHERE a = 2",
        "INSERT INTO kept VALUES (1, 'Seoul')",
    )
    chain.settle()
    assert chain.last.execute("SELECT a, b FROM loose ORDER BY a", database=chain.database) == [(1, "x"), (2, "y")]
    assert chain.last.execute("SELECT city FROM kept", database=chain.database) == [("Seoul",)]


def test_rows_changed_in_the_transaction_that_loads_an_empty_table_without_checks(chain: Chain) -> None:
    chain.start()
    chain.sql("CREATE TABLE loaded (id INT PRIMARY KEY, n INT, KEY (n))", "CREATE TABLE loose (id INT, n INT)")
    chain.sql(
        "SET unique_checks = 0, foreign_key_checks = 0, autocommit = 0",
        "INSERT INTO loaded VALUES (1, 1), (2, 2), (3, 3)",
        "UPDATE loaded SET n = 20 WHERE id = 2",
        "DELETE FROM loaded WHERE id = 3",
        "INSERT INTO loose VALUES (1, 1), (1, 1)",
        "UPDATE loose SET n = 2",
        "COMMIT",
    )
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT id, n FROM loaded ORDER BY id", database=chain.database) == [(1, 1), (2, 20)]


def test_a_table_without_transactions_stops_the_hop_instead_of_being_written_twice(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE plain (n INT) ENGINE=MyISAM", "INSERT INTO plain VALUES (1)")
    error = pair.failed()
    assert isinstance(error, Drift)
    assert "MyISAM" in error.message
    assert pair.last.execute("SELECT COUNT(*) FROM plain", database=pair.database) == [(0,)]
    pair.stop()
    pair.sql("ALTER TABLE plain ENGINE=InnoDB", server=pair.last)  # as the hint says
    pair.run(pair.hop(0))
    pair.sql("ALTER TABLE plain ENGINE=InnoDB")
    pair.settle()
    pair.assert_equal()


def test_a_target_that_passes_over_missing_rows_is_refused(pair: Chain) -> None:
    if pair.flavour is Flavour.MYSQL:
        pytest.skip("MySQL's BINLOG is strict, whatever its replication is told")
    pair.last.execute("SET GLOBAL slave_exec_mode = 'IDEMPOTENT'")
    try:
        pair.run(pair.hop(0))
        error = pair.failed()
    finally:
        pair.last.execute("SET GLOBAL slave_exec_mode = 'STRICT'")
    assert isinstance(error, PreconditionFailed)
    assert "slave_exec_mode=STRICT" in str(error.hint)


SCHEMA_CHANGES = {
    "alter": [
        "CREATE TABLE t (id INT PRIMARY KEY)",
        "INSERT INTO t VALUES (1)",
        "ALTER TABLE t ADD note TEXT",
        "INSERT INTO t VALUES (2, 'x')",
        "ALTER TABLE t RENAME TO u",
        "INSERT INTO u VALUES (3, NULL)",
        "RENAME TABLE u TO v",
        "DELETE FROM v WHERE id = 1",
        "TRUNCATE v",
        "INSERT INTO v VALUES (4, '4')",
    ],
    "create": [
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "INSERT INTO t VALUES (1, 1)",
        "CREATE TABLE copy AS SELECT * FROM t",
        "CREATE TABLE alike LIKE t",
        "INSERT INTO alike VALUES (9, 9)",
        "CREATE INDEX n ON t (n)",
        "DROP INDEX n ON t",
        "DROP TABLE IF EXISTS missing, alike",
    ],
    "objects": [
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "CREATE VIEW totals AS SELECT SUM(n) FROM t",
        "CREATE VIEW sums AS SELECT SUM(n) FROM t",
        "CREATE TABLE log (n INT)",
        "CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.n)",
        "CREATE FUNCTION twice (n INT) RETURNS INT DETERMINISTIC RETURN 2 * n",
        "CREATE PROCEDURE p () SELECT 1",
        "INSERT INTO t VALUES (1, twice(4))",
        "DROP PROCEDURE p",
        "DROP VIEW totals",
    ],
    "partitions": [
        "CREATE TABLE parts (id INT PRIMARY KEY) PARTITION BY HASH (id) PARTITIONS 3",
        "INSERT INTO parts VALUES (1), (2), (3)",
        "ALTER TABLE parts ADD PARTITION PARTITIONS 2",
        "CREATE TEMPORARY TABLE scratch (id INT)",
        "DROP TEMPORARY TABLE scratch",
        "ANALYZE TABLE parts",
        "OPTIMIZE TABLE parts",
    ],
    "modes": [
        "SET time_zone = '+09:00', sql_mode = 'ANSI_QUOTES', character_set_client = latin1, timestamp = 2e9",
        'CREATE TABLE "quoted" (id INT PRIMARY KEY, "say ""hi" INT DEFAULT 1, at TIMESTAMP(3) DEFAULT NOW(3))',
        'INSERT INTO "quoted" (id) VALUES (1)',
        'ALTER TABLE "quoted" ADD added DATETIME DEFAULT NOW()',
        "ALTER TABLE quoted ADD stamp TIMESTAMP NOT NULL DEFAULT '2000-01-01 00:00:00'",
    ],
}


@pytest.mark.parametrize("statements", SCHEMA_CHANGES.values(), ids=SCHEMA_CHANGES)
def test_schema_changes_arrive_in_their_place(chain: Chain, statements: list[str]) -> None:
    chain.start()
    chain.sql(*statements)
    chain.settle()
    chain.assert_equal()


def test_a_row_without_a_key_that_is_changed_again_and_again(chain: Chain) -> None:
    """All of it is one batch on staging. From there it has to go on to the replica, although values come back."""
    values = [1, 2, 3, 4, 1, 2, 3, 4, 1, 3, 5, 3, 1, 5, 7, 1, 9]
    chain.sql("CREATE TABLE t (n INT)", "INSERT INTO t VALUES (0)", *[f"UPDATE t SET n = {value}" for value in values])
    chain.start()
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT n FROM t", database=chain.database) == [(9,)]


def test_a_hop_begins_with_the_first_of_several_files(pair: Chain) -> None:
    """Tables are not taken for older than the log because it goes on in a younger file."""
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    time.sleep(1.1)  # the log's times are seconds
    pair.sql("FLUSH BINARY LOGS", "INSERT INTO t VALUES (2)")
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def test_a_drop_that_found_some_of_its_tables_takes_them_from_the_copies_too(chain: Chain) -> None:
    """MariaDB drops those that are there, complains of the rest, and logs the whole; MySQL drops none and logs none."""
    chain.start()
    chain.sql("CREATE TABLE here (id INT)", "CREATE VIEW seen AS SELECT 1")
    for statement in ("DROP TABLE missing, here", "DROP VIEW seen, unseen"):
        with pytest.raises(pymysql.MySQLError, match=r"seen|missing"):
            chain.sql(statement)
    chain.settle()
    chain.assert_equal()


def test_a_trigger_fires_on_the_master_alone(chain: Chain) -> None:
    chain.start()
    chain.sql(
        "CREATE TABLE t (id INT PRIMARY KEY)",
        "CREATE TABLE log (id INT)",
        "CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.id)",
        "INSERT INTO t VALUES (1), (2)",
    )
    chain.settle()
    for server in chain.servers:
        assert server.execute("SELECT COUNT(*) FROM log", database=chain.database) == [(2,)], server.name


def test_foreign_keys_and_cascades(chain: Chain) -> None:
    chain.start()
    chain.sql(
        "CREATE TABLE parent (id INT PRIMARY KEY)",
        "CREATE TABLE child (id INT PRIMARY KEY, parent INT, "
        "FOREIGN KEY (parent) REFERENCES parent (id) ON DELETE CASCADE)",
        "INSERT INTO parent VALUES (1), (2)",
        "INSERT INTO child VALUES (1, 1), (2, 2), (3, 2)",
        "DELETE FROM parent WHERE id = 2",
    )
    connection = chain.master.connect(chain.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET foreign_key_checks = 0")
        cursor.execute("INSERT INTO child VALUES (9, 99)")
    chain.settle()
    chain.assert_equal()


def test_a_rolled_back_transaction_and_savepoints_leave_what_they_left_on_the_master(chain: Chain) -> None:
    chain.start()
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    connection = chain.master.connect(chain.database)
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (1)")
        connection.rollback()
        cursor.execute("INSERT INTO t VALUES (2)")
        cursor.execute("SAVEPOINT here")
        cursor.execute("INSERT INTO t VALUES (3)")
        cursor.execute("ROLLBACK TO here")
        cursor.execute("INSERT INTO t VALUES (4)")
        connection.commit()
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT id FROM t ORDER BY id", database=chain.database) == [(2,), (4,)]


def test_a_transaction_larger_than_any_buffer_arrives_whole(chain: Chain) -> None:
    chain.start()
    chain.sql("CREATE TABLE wide (id INT PRIMARY KEY, body LONGTEXT)")
    connection = chain.master.connect(chain.database)
    with connection, connection.cursor() as cursor:
        for number in range(24):
            cursor.execute("INSERT INTO wide VALUES (%s, REPEAT('x', 1000000))", (number,))
        cursor.execute("UPDATE wide SET body = CONCAT(id, body) WHERE id < 8")
        connection.commit()
    chain.settle()
    chain.assert_equal()


def test_prepared_xa_branches_wait_for_their_decision(chain: Chain) -> None:
    chain.start()
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    for xid, number in (("commit", 1), ("rollback", 2)):
        connection = chain.master.connect(chain.database, autocommit=True)
        with connection, connection.cursor() as cursor:
            cursor.execute(f"XA START '{xid}'")
            cursor.execute(f"INSERT INTO t VALUES ({number})")
            cursor.execute(f"XA END '{xid}'")
            cursor.execute(f"XA PREPARE '{xid}'")
    chain.settle()
    assert chain.last.execute("SELECT id FROM t", database=chain.database) == []
    chain.stop()  # a branch survives the relay
    chain.start()
    chain.sql("XA COMMIT 'commit'", "XA ROLLBACK 'rollback'")
    connection = chain.master.connect(chain.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        for statement in ("XA START 'one'", "INSERT INTO t VALUES (3)", "XA END 'one'", "XA COMMIT 'one' ONE PHASE"):
            cursor.execute(statement)
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT id FROM t ORDER BY id", database=chain.database) == [(1,), (3,)]


def test_a_target_may_call_its_database_differently(chain: Chain) -> None:
    other = f"{chain.database}_elsewhere"
    target = chain.servers[1]
    target.execute(f"CREATE DATABASE {other} CHARACTER SET utf8mb4")
    try:
        spec = replace(chain.specs[0], target=target.endpoint(other))
        chain.run(Hop(spec, chain.master.credentials, cluster="test", runner="pytest", options=chain.options))
        chain.sql(
            "CREATE TABLE t (id INT PRIMARY KEY)",
            f"CREATE TABLE {chain.database}.u "
            f"(id INT PRIMARY KEY, t INT, FOREIGN KEY (t) REFERENCES {chain.database}.t (id))",
            "INSERT INTO t VALUES (1)",
            "INSERT INTO u VALUES (1, 1)",
            f"ALTER TABLE {chain.database}.u ADD n INT",
            "UPDATE u SET n = 3",
        )
        wait_for(lambda: _rows(target, other) == [(1, 1, 3)], lambda: f"the row arrives; {chain.story()}")
    finally:
        chain.stop()
        target.execute(f"DROP DATABASE {other}")


def _rows(server: LocalDatabaseServer, database: str) -> list[tuple[int, ...]]:
    try:
        return server.execute("SELECT * FROM u", database=database)
    except pymysql.MySQLError:
        return []


def test_other_databases_of_the_same_server_are_left_alone(chain: Chain) -> None:
    chain.master.execute("DROP DATABASE IF EXISTS elsewhere")
    chain.start()
    chain.master.execute("CREATE DATABASE elsewhere")
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE TABLE elsewhere.t (id INT PRIMARY KEY)")
    chain.sql("INSERT INTO t VALUES (1)", "INSERT INTO elsewhere.t VALUES (1)", "ALTER TABLE elsewhere.t ADD n INT")
    chain.sql("CREATE USER IF NOT EXISTS somebody@localhost", "DROP USER somebody@localhost")
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SHOW DATABASES LIKE 'elsewhere'") == []
    chain.master.execute("DROP DATABASE elsewhere")


def test_a_transaction_over_two_databases_brings_its_own_half(chain: Chain) -> None:
    chain.master.execute("DROP DATABASE IF EXISTS elsewhere")
    chain.master.execute("CREATE DATABASE elsewhere")
    chain.start()
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE TABLE elsewhere.t (id INT PRIMARY KEY)")
    connection = chain.master.connect(chain.database)
    with connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO elsewhere.t VALUES (1)")
        cursor.execute("INSERT INTO t VALUES (1)")
        connection.commit()
    chain.settle()
    chain.assert_equal()
    chain.master.execute("DROP DATABASE elsewhere")


def test_hops_on_crossed_servers_do_not_feed_each_other(pair: Chain) -> None:
    """Each moves its position on the other's source: were that passed on at once, both logs would grow for ever."""
    forth, back = pair.servers
    other = f"{pair.database}_back"
    for server in pair.servers:
        server.execute(f"CREATE DATABASE {other} CHARACTER SET utf8mb4")
    try:
        pair.run(pair.hop(0))
        spec = HopSpec("shop-1", back.endpoint(other), forth.endpoint(other), Role.STAGING, True)
        pair.run(Hop(spec, pair.master.credentials, cluster="test", runner="pytest", options=pair.options))
        pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        pair.settle()
        wait_for(lambda: all(hop.report.state is State.RUNNING for hop in pair.hops), "both hops run")
        threading.Event().wait(0.5)  # what is under way arrives
        before = [pair.end_of_log(server) for server in pair.servers]
        threading.Event().wait(1.0)  # the time in which nothing may happen
        assert [pair.end_of_log(server) for server in pair.servers] == before
    finally:
        pair.stop()
        for server in pair.servers:
            server.execute(f"DROP DATABASE {other}")


def test_the_position_moves_past_other_databases_after_a_while(pair: Chain) -> None:
    pair.options = replace(pair.options, settle_seconds=0.2)
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.settle()
    pair.master.execute("CREATE DATABASE elsewhere")
    pair.master.execute("DROP DATABASE elsewhere")
    end = pair.end_of_log()
    wait_for(lambda: pair.reached(pair.last).covers(end), "the position moves without a transaction of its own")


def test_a_replica_joins_a_staging_database_that_is_younger_than_the_tables_in_it(own_chain: Chain) -> None:
    """MySQL gives a relayed table the time of its creation on the master, which is before staging's log begins."""
    _, staging, replica = own_chain.servers
    own_chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    threading.Event().wait(2.1)  # creation times are whole seconds
    mariadb = own_chain.flavour is Flavour.MARIADB
    for server in (staging, replica):
        server.execute("RESET MASTER" if mariadb else "RESET BINARY LOGS AND GTIDS")
    own_chain.run(own_chain.hop(0))
    wait_for(lambda: own_chain.reached_or_none(staging) is not None, "staging has the master's first transactions")
    own_chain.run(own_chain.hop(1))
    own_chain.settle()
    own_chain.assert_equal()


def test_a_replica_does_not_join_a_staging_database_whose_log_is_younger_than_its_data(own_chain: Chain) -> None:
    _, staging, _ = own_chain.servers
    own_chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    own_chain.run(own_chain.hop(0))
    wait_for(lambda: own_chain.reached_or_none(staging) is not None, "staging has the master's first transactions")
    own_chain.stop()
    threading.Event().wait(2.1)  # creation times are whole seconds
    staging.execute("RESET MASTER" if own_chain.flavour is Flavour.MARIADB else "RESET BINARY LOGS AND GTIDS")
    own_chain.run(own_chain.hop(1))
    error = own_chain.failed()
    assert isinstance(error, PreconditionFailed)
    assert "older than its log" in error.message
