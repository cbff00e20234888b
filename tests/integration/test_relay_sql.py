"""The SQL path: rows as statements, on one server family and between the two."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from shardkit.credentials import fixed
from shardkit.errors import BadEvent, Drift, PreconditionFailed
from shardkit.gtid import Flavour, MariaDBPosition
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc.apply_path import ApplyPath, AskedPath, read_path
from shardkit_cdc.relay import Hop, HopOptions
from tests.conftest import FLAVOUR
from tests.integration.test_relay_replay import COLUMNS, GENERATED
from tests.relay_chain import Chain, relay_command, wait_for
from tests.relay_daemon import Daemon, map_of

pytest_plugins = ["tests.relay_fixtures"]

#: How much the big transaction inserts whose memory is measured; it logs three quarters of that once more.
BIG_MEGABYTES = int(os.environ.get("SHARDKIT_TEST_BIG_MEGABYTES", "64"))
#: What a relay of one hop may take in all, and more for a big transaction: a few of its parts.
MOST_MEGABYTES, MOST_GROWTH_MEGABYTES = 150, 40


def by(path: AskedPath, chain: Chain) -> Chain:
    chain.options = HopOptions(retry_seconds=(0.05, 0.5), apply=path)
    return chain


@pytest.fixture
def sql_pair(pair: Chain) -> Chain:
    """master -> one target, rows as statements."""
    return by(AskedPath.SQL, pair)


@pytest.fixture
def sql_chain(chain: Chain) -> Chain:
    """master -> staging -> replica, rows as statements."""
    return by(AskedPath.SQL, chain)


def path_of(chain: Chain) -> tuple[ApplyPath, str]:
    """The path that the runner of the first hop has noted in its target."""
    with closing(chain.servers[1].connect(chain.database, autocommit=True)) as connection:
        found = read_path(connection, chain.specs[0].key)
    assert found is not None
    return found.path, found.reason


def test_every_type_arrives_as_it_was_written(sql_chain: Chain) -> None:
    chain = sql_chain
    chain.start()
    names = ", ".join(definition.split()[0] for definition, _, _ in COLUMNS)
    insert = f"INSERT INTO types ({names}) VALUES"
    chain.sql(
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in COLUMNS)}, {GENERATED})",
        f"{insert} ({', '.join(extreme for _, extreme, _ in COLUMNS)})",
        f"{insert} (2{', NULL' * (len(COLUMNS) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in COLUMNS)})",
        "UPDATE types SET medium = 7, name = 'changed', document = '{}', large = x'5c27005c22ff' WHERE id = 1",
        "UPDATE types SET tiny = 5 WHERE id = 2",
        "INSERT INTO types (id) VALUES (4)",
        "DELETE FROM types WHERE id = 4",
        "CREATE TABLE reals (id INT PRIMARY KEY, f FLOAT, d DOUBLE, c FLOAT(7,3))",
        "INSERT INTO reals VALUES (1, 0.1, 0.1, 1234.567), (2, 3.4028234e38, 1.7976931348623157e308, 0.001), "
        "(3, 1.17549435e-38, 5e-324, -9999.999), (4, 16777217, 1e15, 1), (5, -1e-40, -123456789.125, -0.5)",
        "CREATE TABLE stamped (id INT PRIMARY KEY, n INT, at TIMESTAMP DEFAULT CURRENT_TIMESTAMP ON UPDATE "
        "CURRENT_TIMESTAMP)",
        "INSERT INTO stamped VALUES (1, 1, '2001-01-01 00:00:00')",
        "UPDATE stamped SET n = 2, at = '2001-01-01 00:00:00'",
    )
    chain.settle()
    chain.assert_equal()
    assert path_of(chain) == (ApplyPath.SQL, "asked for with --apply sql")


#: What only one family has, or describes in its own way.
PECULIAR = {
    Flavour.MARIADB: [
        "CREATE TABLE net (id UUID PRIMARY KEY, six INET6, four INET4)",
        "INSERT INTO net VALUES (UUID(), '2001:db8::1', '10.0.0.1'), (UUID(), NULL, NULL)",
        "UPDATE net SET four = '255.0.0.1'",
        "CREATE TABLE packed (id INT PRIMARY KEY, body VARCHAR(1000) COMPRESSED, more TEXT COMPRESSED)",
        "INSERT INTO packed VALUES (1, REPEAT('a', 900), REPEAT('b', 9000)), (2, '', 'short')",
        "SET column_compression_zlib_wrap = ON",
        "UPDATE packed SET more = REPEAT('c', 9000)",
        "CREATE SEQUENCE counter START WITH 5",
        "SELECT NEXTVAL(counter)",
        "SET check_constraint_checks = OFF",
        "CREATE TABLE checked (id INT PRIMARY KEY, n INT CHECK (n > 0), j JSON CHECK (JSON_VALID(j)))",
        "INSERT INTO checked VALUES (1, -1, '{}')",
    ],
    Flavour.MYSQL: [
        "CREATE TABLE vectors (id INT PRIMARY KEY, v VECTOR(3))",
        "INSERT INTO vectors VALUES (1, STRING_TO_VECTOR('[1,2,3]'))",
        "CREATE TABLE functional (id INT PRIMARY KEY, name VARCHAR(20), UNIQUE KEY ((LOWER(name))))",
        "INSERT INTO functional VALUES (1, 'ABC')",
        "SET sql_generate_invisible_primary_key = ON",
        "CREATE TABLE keyless (n INT)",
        "INSERT INTO keyless VALUES (1), (1)",
        "UPDATE keyless SET n = 2 LIMIT 1",
        "CREATE TABLE places (id INT PRIMARY KEY, p POINT NOT NULL SRID 4326, SPATIAL KEY (p))",
        "INSERT INTO places VALUES (1, ST_GeomFromText('POINT(1 2)', 4326))",
        "CREATE TABLE zeros (id INT PRIMARY KEY, d DOUBLE)",
        "INSERT INTO zeros VALUES (1, -0e0)",
        "UPDATE zeros SET d = 0",
    ],
}


def test_what_only_one_family_has(sql_chain: Chain) -> None:
    sql_chain.start()
    sql_chain.sql(
        *PECULIAR[sql_chain.flavour],
        "CREATE TABLE seen (id INT PRIMARY KEY, secret INT INVISIBLE DEFAULT 7, KEY (secret))",
        "INSERT INTO seen (id) VALUES (1)",
        "SET sql_mode = 'NO_AUTO_VALUE_ON_ZERO,ALLOW_INVALID_DATES'",
        "CREATE TABLE odd (id INT AUTO_INCREMENT PRIMARY KEY, day DATE, at DATETIME, stamp TIMESTAMP NULL)",
        "INSERT INTO odd VALUES (0, '0000-00-00', '0000-00-00', '0000-00-00'), (-1, '2026-00-31', '2026-02-31', NULL)",
    )
    sql_chain.settle()
    sql_chain.assert_equal()


@pytest.mark.parametrize("path", [AskedPath.AUTO, AskedPath.SQL])
def test_columns_whose_names_differ_only_in_folded_case(pair: Chain, path: AskedPath) -> None:
    by(path, pair).start()
    pair.sql(
        "CREATE TABLE roads (`straße` INT NOT NULL, strasse INT PRIMARY KEY)",
        "INSERT INTO roads VALUES (1, 2), (2, 1)",
        "UPDATE roads SET `straße` = 7 WHERE strasse = 1",
        "DELETE FROM roads WHERE strasse = 2",
    )
    pair.settle()
    pair.assert_equal()
    assert path_of(pair)[1] == ("" if path is AskedPath.AUTO else "asked for with --apply sql")


def test_a_table_whose_columns_are_all_computed(sql_pair: Chain) -> None:
    sql_pair.start()
    sql_pair.sql("CREATE TABLE t (a INT AS (1) STORED)", "INSERT INTO t VALUES (), ()", "DELETE FROM t LIMIT 1")
    sql_pair.settle()
    sql_pair.assert_equal()


@pytest.mark.parametrize("path", [AskedPath.AUTO, AskedPath.SQL])
def test_enum_values_with_characters_that_are_shown_escaped(pair: Chain, path: AskedPath) -> None:
    by(path, pair).start()
    pair.sql(
        r"CREATE TABLE words (id INT PRIMARY KEY, e ENUM('d', 'b\\c', 'it''s', '\\'), s SET('a\nb', '\r', '\\\\n'))",
        "INSERT INTO words VALUES (1, 2, 7), (2, 4, 1)",
        "SET sql_mode = 'NO_BACKSLASH_ESCAPES'",
        r"CREATE TABLE more (id INT PRIMARY KEY, e ENUM('\', '\n'))",
        "INSERT INTO more VALUES (1, 2)",
    )
    pair.settle()
    pair.assert_equal()


def test_rows_that_a_key_does_not_tell_apart_and_keys_of_every_kind(sql_chain: Chain) -> None:
    chain = sql_chain
    chain.start()
    document = ", doc JSON" if chain.flavour is Flavour.MYSQL else ""
    value = ", '[1.5]'" if document else ""
    chain.sql(
        "CREATE TABLE loose (a INT, b VARCHAR(10), f FLOAT, w CHAR(3) CHARACTER SET utf16, d DATETIME(3), r BINARY(4), "
        f"e ENUM('x','y'), g POINT, p DECIMAL(8,3){document})",
        "INSERT INTO loose VALUES (1, 'x', 0.1, '글', '2026-01-01 00:00:00.125', x'00ff', 'y', "
        f"ST_GeomFromText('POINT(1 2)'), 1.25{value})",
        *["INSERT INTO loose SELECT * FROM loose"] * 2,
        "INSERT INTO loose (a, b) VALUES (1, 'X'), (1, 'x'), (NULL, NULL)",
        "UPDATE loose SET b = 'y' WHERE f IS NOT NULL LIMIT 2",
        "UPDATE loose SET a = 5 WHERE a IS NULL",
        "DELETE FROM loose WHERE b = 'x' AND f IS NULL ORDER BY BINARY b LIMIT 1",
        "DELETE FROM loose WHERE f IS NOT NULL LIMIT 1",
        "CREATE TABLE by_unique (a VARCHAR(20) NOT NULL, b INT NOT NULL, n INT, UNIQUE (n), UNIQUE (a, b))",
        "INSERT INTO by_unique VALUES ('k', 1, 1), ('k', 2, NULL), ('l', 1, 3)",
        "UPDATE by_unique SET a = 'K2' WHERE b = 2",
        "DELETE FROM by_unique WHERE n IS NULL",
    )
    kinds = {
        "by_time": ("DATETIME(6)", "'2026-01-01 00:00:00.000001'", "'0001-01-01'"),
        "by_stamp": ("TIMESTAMP(2)", "'2026-01-01 12:00:00.12'", "'1999-12-31 23:59:59'"),
        "by_text": ("VARCHAR(20) CHARACTER SET utf8mb3", "'한'", "'b '"),
        "by_korean": ("VARCHAR(20) CHARACTER SET euckr", "'서울'", "'x'"),
        "by_bytes": ("BINARY(6)", "x'00ff'", "x'01'"),
        "by_number": ("DECIMAL(20,5)", "-1.5", "99999999999999.99999"),
        "by_real": ("DOUBLE", "0.1", "1e300"),
        "by_single": ("FLOAT", "0.1", "1e-30"),
        "by_word": ("ENUM('a','b')", "'b'", "'a'"),
        "by_bits": ("BIT(9)", "b'101010101'", "0"),
        "by_year": ("YEAR", "2026", "1999"),
    }
    for name, (kind, first, second) in kinds.items():
        chain.sql(
            f"CREATE TABLE {name} (k {kind} PRIMARY KEY, n INT)",
            f"INSERT INTO {name} VALUES ({first}, 1), ({second}, 2)",
            f"UPDATE {name} SET n = n + 1",
            f"DELETE FROM {name} WHERE n = 3",
            f"INSERT INTO {name} VALUES ({second}, 4)",
        )
    chain.settle()
    chain.assert_equal()
    for name in kinds:
        assert chain.last.execute(f"SELECT COUNT(*), SUM(n) FROM {name}", database=chain.database) == [(2, 6)], name


def test_sets_of_64_members_are_found_by_their_last_one(sql_pair: Chain) -> None:
    pair = sql_pair
    pair.start()
    members = ",".join(f"'m{number}'" for number in range(64))
    pair.sql(
        f"CREATE TABLE keyed (tags SET({members}) PRIMARY KEY, n INT)",
        f"CREATE TABLE keyless (tags SET({members}), n INT)",
        "INSERT INTO keyed VALUES (18446744073709551615, 1), (9223372036854775808, 2), (9223372036854775807, 3)",
        "INSERT INTO keyed VALUES (0, 4), (5, 5)",
        "INSERT INTO keyless SELECT * FROM keyed",
        "UPDATE keyed SET n = n + 10",
        "UPDATE keyless SET n = n + 10",
        "DELETE FROM keyed WHERE n IN (11, 13)",
        "DELETE FROM keyless WHERE n IN (11, 13)",
    )
    pair.settle()
    pair.assert_equal()


@pytest.mark.skipif(FLAVOUR != "mysql", reason="MariaDB does not keep -0.0")
def test_negative_zeros_are_told_apart_where_there_is_no_key(sql_pair: Chain) -> None:
    pair = sql_pair
    pair.start()
    pair.sql(
        "CREATE TABLE loose (d DOUBLE, f FLOAT)",
        "INSERT INTO loose VALUES (0, 0), (-0e0, 0), (0, -0e0), (-0e0, -0e0), (0, 0)",
        "DELETE FROM loose WHERE CAST(d AS CHAR) = '-0' AND CAST(f AS CHAR) = '0'",
        "UPDATE loose SET f = 1 WHERE CAST(d AS CHAR) = '0' AND CAST(f AS CHAR) = '-0'",
        "UPDATE loose SET f = 2 WHERE CAST(d AS CHAR) = '0' AND CAST(f AS CHAR) = '0' LIMIT 1",
    )
    pair.settle()
    pair.assert_equal()


def test_unique_values_change_hands_and_foreign_keys_hold(sql_chain: Chain) -> None:
    chain = sql_chain
    chain.start()
    chain.sql(
        "CREATE TABLE places (id INT PRIMARY KEY, seat INT UNIQUE)",
        "CREATE TABLE people (id INT PRIMARY KEY, place INT, boss INT, "
        "FOREIGN KEY (place) REFERENCES places (id) ON DELETE CASCADE ON UPDATE CASCADE, "
        "FOREIGN KEY (boss) REFERENCES people (id))",
        "INSERT INTO places VALUES (1, 1), (2, 2), (3, 3), (4, 4)",
        "INSERT INTO people VALUES (1, 1, NULL), (2, 2, 1), (3, 2, 2), (4, 3, 3)",
        "UPDATE places SET seat = seat + 1 ORDER BY seat DESC",
        "BEGIN",
        "UPDATE places SET seat = NULL WHERE id = 1",
        "UPDATE places SET seat = 2 WHERE id = 2",
        "UPDATE places SET seat = 3 WHERE id = 1",
        "DELETE FROM places WHERE id = 4",
        "INSERT INTO places VALUES (5, 5)",
        "REPLACE INTO places VALUES (6, 5)",
        "COMMIT",
        "DELETE FROM people WHERE id > 2 ORDER BY id DESC",
        "UPDATE places SET id = 20 WHERE id = 2",
        "DELETE FROM places WHERE id = 20",
        "SET foreign_key_checks = 0",
        "INSERT INTO people VALUES (9, 99, NULL)",
        "SET foreign_key_checks = 1",
        "UPDATE people SET place = 1 WHERE id = 9",
    )
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT id FROM people ORDER BY id", database=chain.database) == [(1,), (9,)]


def test_a_big_transaction_and_branches(sql_chain: Chain) -> None:
    chain = sql_chain
    chain.start()
    chain.sql(
        "CREATE TABLE big (id INT PRIMARY KEY AUTO_INCREMENT, body VARCHAR(400))",
        "INSERT INTO big (body) VALUES (REPEAT('a', 400)), (REPEAT('b', 400)), (REPEAT('c', 400)), (REPEAT('d', 400))",
        "BEGIN",
        *["INSERT INTO big (body) SELECT body FROM big"] * 11,
        "UPDATE big SET body = CONCAT(id, 'u') WHERE id % 3 = 0",
        "DELETE FROM big WHERE id % 7 = 0",
        "COMMIT",
        "XA START 'kept'",
        "INSERT INTO big (id) VALUES (-1)",
        "UPDATE big SET body = 'branch' WHERE id = 1",
        "XA END 'kept'",
        "XA PREPARE 'kept'",
        "XA COMMIT 'kept'",
        "XA START 'dropped'",
        "INSERT INTO big (id) VALUES (-2)",
        "XA END 'dropped'",
        "XA PREPARE 'dropped'",
        "XA ROLLBACK 'dropped'",
    )
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT COUNT(*) FROM shardkit_prepared", database=chain.database) == [(0,)]


@pytest.mark.parametrize("path", ["sql", "raw"])
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_a_big_transaction(own_pair: Chain, tmp_path: Path, path: str) -> None:
    pair = own_pair  # a hop reads past other tests' large rows, which take memory as well
    daemon = Daemon(map_of(pair, tmp_path / "map.yaml"), tmp_path / "log", "--apply", path)
    daemon.start()
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status")

    def peak() -> float:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) / 1024

    try:
        pair.sql(
            "CREATE TABLE big (id INT PRIMARY KEY AUTO_INCREMENT, n INT, body VARCHAR(1000))",
            "INSERT INTO big (n, body) VALUES (0, REPEAT('a', 1000))",
            *["INSERT INTO big (n, body) SELECT n, body FROM big"] * 9,
            "CREATE TABLE copy LIKE big",
        )
        pair.settle()
        small = peak()
        pair.sql(
            "BEGIN",
            *["INSERT INTO copy (n, body) SELECT n, body FROM big"] * BIG_MEGABYTES,
            "UPDATE copy SET n = 1, body = REPEAT('b', 900) WHERE id % 4 = 0",
            "DELETE FROM copy WHERE id % 4 = 1",
            "COMMIT",
        )
        pair.settle(deadline=400)
        grown = peak()
    finally:
        daemon.kill()
    pair.assert_equal()
    assert grown < min(MOST_MEGABYTES, small + MOST_GROWTH_MEGABYTES), f"{small:.0f} MB before, {grown:.0f} MB after"


def test_columns_in_another_order_take_the_sql_path_by_themselves(pair: Chain, tmp_path: Path) -> None:
    pair.start()
    pair.sql(
        "CREATE TABLE turned (id INT PRIMARY KEY, a VARCHAR(20), b VARCHAR(20), total INT AS (id + 1) STORED)",
        "CREATE TABLE plain (id INT PRIMARY KEY, n INT)",
        "INSERT INTO turned (id, a, b) VALUES (1, 'a', 'b')",
    )
    pair.settle()
    assert path_of(pair) == (ApplyPath.RAW, "")
    pair.stop()
    pair.sql("ALTER TABLE turned MODIFY b VARCHAR(20) FIRST", server=pair.last)
    pair.sql(
        "BEGIN",
        "INSERT INTO plain VALUES (1, 1)",
        "INSERT INTO turned (id, a, b) VALUES (2, 'c', 'd')",
        "UPDATE plain SET n = 2",
        "UPDATE turned SET a = 'e' WHERE id = 1",
        "COMMIT",
    )
    pair.start()
    pair.settle()
    query = "SELECT id, a, b, total FROM turned ORDER BY id"
    assert pair.last.execute(query, database=pair.database) == [(1, "e", "b", 2), (2, "c", "d", 3)]
    assert pair.last.execute("SELECT * FROM plain", database=pair.database) == [(1, 2)]
    wait_for(lambda: path_of(pair)[1] != "", "the path is noted")
    assert path_of(pair) == (ApplyPath.RAW, "turned: its columns stand in another order on the target")
    shown = relay_command("status", "--map", map_of(pair, tmp_path / "map.yaml"))
    assert "turned: its columns" in " ".join((shown.stdout + shown.stderr).split())


def test_columns_in_another_order_stop_a_hop_that_may_only_pass_row_events(pair: Chain) -> None:
    pair.options = HopOptions(apply=AskedPath.RAW)
    pair.start()
    pair.sql("CREATE TABLE turned (id INT PRIMARY KEY, a INT, b INT)")
    pair.settle()
    pair.sql("ALTER TABLE turned MODIFY b INT FIRST", server=pair.last)
    pair.stop()
    pair.start()
    pair.sql("INSERT INTO turned VALUES (1, 2, 3)")
    assert isinstance(pair.failed(), Drift)
    assert pair.last.execute("SELECT * FROM turned", database=pair.database) == []


def test_a_row_event_past_the_targets_packets_takes_the_sql_path(own_pair: Chain) -> None:
    own_pair.sql("SET GLOBAL max_allowed_packet = 1048576", server=own_pair.last)
    own_pair.start()
    own_pair.sql(
        "CREATE TABLE large (id INT PRIMARY KEY, body LONGBLOB)",
        "INSERT INTO large VALUES (1, REPEAT('x', 900000))",
        "UPDATE large SET body = REPEAT('y', 900000)",
        "INSERT INTO large VALUES (2, 'small')",
    )
    own_pair.settle()
    own_pair.assert_equal()
    own_pair.sql("INSERT INTO large VALUES (3, REPEAT('z', 1100000))")
    error = own_pair.failed()
    assert isinstance(error, BadEvent)
    assert "max_allowed_packet" in str(error.hint)


def test_statements_keep_to_the_targets_packets(own_pair: Chain) -> None:
    by(AskedPath.SQL, own_pair)
    own_pair.sql("SET GLOBAL max_allowed_packet = 131072", server=own_pair.last)
    own_pair.start()
    own_pair.sql(
        "CREATE TABLE small (id INT PRIMARY KEY AUTO_INCREMENT, body VARCHAR(400))",
        "BEGIN",
        "INSERT INTO small (body) VALUES (REPEAT('a', 400)), (REPEAT('b', 400))",
        *["INSERT INTO small (body) SELECT body FROM small"] * 9,
        "COMMIT",
        "UPDATE small SET body = REPEAT('z', 390)",
        "DELETE FROM small WHERE id % 2 = 0",
    )
    own_pair.settle()
    own_pair.assert_equal()


@pytest.mark.parametrize("path", [AskedPath.SQL, AskedPath.RAW])
def test_a_branch_whose_rows_fit_the_targets_packets_is_kept(own_pair: Chain, path: AskedPath) -> None:
    pair = by(path, own_pair)
    pair.sql("SET GLOBAL max_allowed_packet = 1048576", server=pair.last)
    pair.start()
    pair.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, body LONGBLOB)",
        "XA START 'large'",
        "INSERT INTO t VALUES (1, REPEAT(x'00', 600000))",
        "INSERT INTO t VALUES (2, REPEAT('\\'', 350000))",
        "XA END 'large'",
        "XA PREPARE 'large'",
        "XA COMMIT 'large'",
    )
    pair.settle(20)
    pair.assert_equal()


@pytest.mark.skipif(FLAVOUR != "mariadb", reason="MySQL limits the time of SELECT alone")
@pytest.mark.parametrize("path", [AskedPath.SQL, AskedPath.RAW])
def test_a_target_that_limits_the_time_of_statements_lets_the_relay_finish(own_pair: Chain, path: AskedPath) -> None:
    pair = by(path, own_pair)
    pair.sql("SET GLOBAL max_statement_time = 1", server=pair.last)
    pair.start()
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)", "INSERT INTO t VALUES (1, 1)")
    pair.settle()
    with closing(pair.last.connect(pair.database)) as other, other.cursor() as cursor:
        cursor.execute("SELECT * FROM t FOR UPDATE")
        pair.sql("UPDATE t SET n = 2")
        # Held for longer than a statement may take: the relay's waits for it.
        threading.Event().wait(2)
        other.rollback()
    pair.settle()
    pair.assert_equal()


@contextmanager
def writer(server: LocalDatabaseServer, *rights: str) -> Iterator[None]:
    server.execute("CREATE USER writer@'%' IDENTIFIED BY ''")
    for right in rights:
        server.execute(f"GRANT {right} TO writer@'%'")
    try:
        yield
    finally:
        server.execute("DROP USER writer@'%'")


def hop_as_writer(pair: Chain) -> Hop:
    def credentials(endpoint: object) -> object:
        return fixed("writer" if endpoint.port == pair.last.port else "root")(endpoint)  # type: ignore[attr-defined]

    return Hop(pair.specs[0], credentials, cluster="test", runner="pytest", options=pair.options)  # type: ignore[arg-type]


def test_an_account_without_the_right_to_binlog_takes_the_sql_path(pair: Chain) -> None:
    with writer(pair.last, f"ALL ON {pair.database}.*"):
        pair.run(hop_as_writer(pair))
        pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)", "ALTER TABLE t ADD n INT DEFAULT 5")
        pair.settle()
        pair.assert_equal()
        path, reason = path_of(pair)
        assert path is ApplyPath.SQL
        assert "BINLOG" in reason
        # Whether a change that was cut short has run cannot be told without that right: the hop stops.
        pair.stop()
        pair.sql("ALTER TABLE t ADD m INT DEFAULT 6")
        pair.sql(
            f"UPDATE shardkit_position SET ddl_gtid = 'unmarked:{last_gtid(pair)}' WHERE hop LIKE 'hop:%'",
            server=pair.last,
        )
        pair.run(hop_as_writer(pair))
        error = pair.failed()
        pair.stop()
    assert isinstance(error, BadEvent)
    assert "cut short" in error.message
    assert "skip" in str(error.hint)


def last_gtid(chain: Chain) -> str:
    """The id of the transaction that the master has committed last."""
    end = chain.end_of_log()
    if isinstance(end, MariaDBPosition):
        return str(end.domains[0])
    source = str(chain.master.execute("SELECT @@server_uuid")[0][0])
    return f"{source}:{end.sources[source][-1][1]}"


def test_an_account_that_could_not_see_triggers_is_refused(pair: Chain) -> None:
    with writer(
        pair.last, f"SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX, DROP, REFERENCES ON {pair.database}.*"
    ):
        pair.run(hop_as_writer(pair))
        error = pair.failed()
        pair.stop()
    assert isinstance(error, PreconditionFailed)
    assert "GRANT TRIGGER" in str(error.hint)
    assert pair.last.execute("SHOW TABLES", database=pair.database) == []


def test_a_trigger_on_the_target_stops_the_hop_before_it_fires(sql_pair: Chain) -> None:
    pair = sql_pair
    pair.start()
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE TABLE log (id INT)")
    pair.settle()
    pair.sql("CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.id)")
    pair.sql("INSERT INTO t VALUES (1)")
    error = pair.failed()
    assert isinstance(error, Drift)
    assert "noted" in error.message
    assert f"{pair.database}.t" in error.message
    assert pair.last.execute("SELECT * FROM t", database=pair.database) == []
    pair.stop()
    pair.sql("DROP TRIGGER noted", server=pair.last)  # as the hint says
    pair.start()
    wait_for(lambda: pair.last.execute("SELECT * FROM log", database=pair.database) == [(1,)], "the log's own row")
    pair.stop()
    pair.sql("DROP TRIGGER noted")


@pytest.mark.parametrize(
    ("drift", "change", "says"),
    [
        ("DELETE FROM t WHERE id = 1", "UPDATE t SET n = 5 WHERE id = 1", "update of"),
        ("DELETE FROM t WHERE id = 1", "DELETE FROM t", "delete of"),
        ("INSERT INTO t VALUES (3, 3)", "INSERT INTO t VALUES (3, 4)", "Duplicate entry"),
        ("UPDATE loose SET n = 9", "DELETE FROM loose", "delete of"),
    ],
)
def test_a_target_that_somebody_wrote_to_stops_the_hop(sql_pair: Chain, drift: str, change: str, says: str) -> None:
    pair = sql_pair
    pair.start()
    pair.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "CREATE TABLE loose (n INT)",
        "INSERT INTO t VALUES (1, 1), (2, 2)",
        "INSERT INTO loose VALUES (1)",
    )
    pair.settle()
    pair.sql(drift, server=pair.last)
    pair.sql("UPDATE t SET n = 7 WHERE id = 2", change)
    error = pair.failed()
    assert isinstance(error, Drift)
    assert says in error.message
    # What came before the fault is good.
    assert pair.last.execute("SELECT n FROM t WHERE id = 2", database=pair.database) == [(7,)]


def test_a_value_that_cannot_be_carried_stops_the_hop(sql_pair: Chain) -> None:
    pair = sql_pair
    pair.start()
    if pair.flavour is Flavour.MYSQL:
        pair.sql("CREATE TABLE t (id INT PRIMARY KEY, doc JSON)")
        pair.sql("INSERT INTO t VALUES (1, JSON_OBJECT('price', 1.10))")
        column = "`doc`"
    else:
        pair.sql("CREATE TABLE t (id INT PRIMARY KEY, word ENUM('a'))")
        pair.sql("SET sql_mode = ''", "INSERT INTO t VALUES (1, 'b')")
        column = "word"
    error = pair.failed()
    assert isinstance(error, (BadEvent, Drift))
    assert f"{pair.database}.t" in error.message
    assert column in error.message
    assert f"(at {last_gtid(pair)})" in error.message
    assert pair.last.execute("SELECT * FROM t", database=pair.database) == []


@pytest.mark.parametrize("change", ["INSERT INTO t (id) VALUES (3)", "UPDATE t SET n = 7 WHERE id = 2"])
def test_rows_that_were_not_logged_in_full_stop_the_hop(sql_pair: Chain, change: str) -> None:
    sql_pair.start()
    sql_pair.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT DEFAULT 5)", "INSERT INTO t VALUES (1, 1), (2, 2)")
    sql_pair.sql("SET binlog_row_image = MINIMAL", change)
    error = sql_pair.failed()
    assert isinstance(error, BadEvent)
    assert "does not hold" in error.message
    assert "binlog_row_image=FULL" in str(error.hint)
