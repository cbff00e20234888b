"""What a master's clients do arrives on staging and replica, byte for byte and once."""

from __future__ import annotations

import pytest

from tests.relay_chain import Chain

pytest_plugins = ["tests.relay_fixtures"]

TYPES = """
CREATE TABLE types (
  id INT PRIMARY KEY,
  tiny TINYINT, utiny TINYINT UNSIGNED, small SMALLINT, medium MEDIUMINT, whole INT UNSIGNED, big BIGINT,
  ubig BIGINT UNSIGNED, price DECIMAL(12,2), exact DECIMAL(65,30), single FLOAT, twice DOUBLE, flags BIT(13), born YEAR,
  day DATE, clock TIME, clock6 TIME(6), moment DATETIME, moment3 DATETIME(3), stamp TIMESTAMP NULL, stamp6 TIMESTAMP(6) NULL,
  fixed CHAR(10), fixed_long CHAR(200) CHARACTER SET utf8mb4, name VARCHAR(300), latin VARCHAR(40) CHARACTER SET latin1,
  korean VARCHAR(40) CHARACTER SET euckr, wide VARCHAR(40) CHARACTER SET utf16,
  raw BINARY(8), raws VARBINARY(300), small_text TINYTEXT, words TEXT, more MEDIUMTEXT, small_blob TINYBLOB, body BLOB,
  large LONGBLOB, document JSON, colour ENUM('red','green','blue'), tags SET('a','b','c','d','e','f','g','h','i'),
  place POINT, plus_one BIGINT AS (medium + 1) STORED, minus_one BIGINT AS (medium - 1) VIRTUAL
) CHARACTER SET utf8mb4
"""

ROWS = [
    "(1, -128, 255, -32768, -8388608, 4294967295, -9223372036854775808, 18446744073709551615, -9999999999.99,"
    " 12345678901234567890123456789012345.123456789012345678901234567890, -1.5, 2.718281828459045, b'1010101010101',"
    " 2026, '9999-12-31', '-838:59:59', '838:59:58.999999', '1000-01-01 00:00:00', '2026-11-22 12:34:56.789',"
    " '2038-01-19 03:14:07', '1970-01-02 00:00:01.000001', 'char', '한글', 'naïve 😀', 'éü', '서울', 'utf16 글자',"
    " x'00ff00ff', x'0001020304ff', 'tiny', 'text', 'medium', x'00', x'deadbeef', REPEAT('x', 70000),"
    """ '{"a": [1, 2.5, null, "한"]}', 'blue', 'a,i', ST_GeomFromText('POINT(1 2)'))""",
    "(2" + ", NULL" * 38 + ")",
    "(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '2000-01-01', '-00:00:01', '00:00:00.000001', '2000-01-01', '2000-01-01',"
    " '2000-01-01', '2000-01-01', '', '', '', '', '', '', '', '', '', '', '', '', '', '', '[]', 'red', '',"
    " ST_GeomFromText('POINT(0 0)'))",
]


def test_every_type_arrives_as_it_was_written(chain: Chain) -> None:
    chain.start()
    columns = (
        "id, tiny, utiny, small, medium, whole, big, ubig, price, exact, single, twice, flags, born, day, clock, clock6, "
        "moment, moment3, stamp, stamp6, fixed, fixed_long, name, latin, korean, wide, raw, raws, small_text, words, more, "
        "small_blob, body, large, document, colour, tags, place"
    )
    chain.sql(
        TYPES,
        *(f"INSERT INTO types ({columns}) VALUES {row}" for row in ROWS),
        "UPDATE types SET medium = 7, name = 'changed', document = '{}' WHERE id = 1",
        "UPDATE types SET tiny = 5 WHERE id = 2",
        "DELETE FROM types WHERE id = 0",
    )
    chain.settle()
    chain.assert_equal()
    rows = [
        server.execute(
            f"SELECT id, HEX(name), HEX(korean), HEX(wide), HEX(raws), plus_one, minus_one, HEX(flags), "
            "clock6, stamp6, exact FROM types ORDER BY id",
            database=chain.database,
        )
        for server in chain.servers
    ]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 2


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


@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(["CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)", "ALTER TABLE t ADD note TEXT",
                      "INSERT INTO t VALUES (2, 'x')", "ALTER TABLE t RENAME TO u", "INSERT INTO u VALUES (3, NULL)",
                      "RENAME TABLE u TO v", "DELETE FROM v WHERE id = 1", "TRUNCATE v", "INSERT INTO v VALUES (4, '4')"], id="alter"),
        pytest.param(["CREATE TABLE t (id INT PRIMARY KEY, n INT)", "INSERT INTO t VALUES (1, 1)",
                      "CREATE TABLE copy AS SELECT * FROM t", "CREATE TABLE alike LIKE t", "INSERT INTO alike VALUES (9, 9)",
                      "CREATE INDEX n ON t (n)", "DROP INDEX n ON t", "DROP TABLE IF EXISTS missing, alike"], id="create"),
        pytest.param(["CREATE TABLE t (id INT PRIMARY KEY, n INT)", "CREATE VIEW totals AS SELECT SUM(n) FROM t",
                      "CREATE TABLE log (n INT)", "CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.n)",
                      "CREATE FUNCTION twice (n INT) RETURNS INT DETERMINISTIC RETURN 2 * n", "CREATE PROCEDURE p () SELECT 1",
                      "INSERT INTO t VALUES (1, twice(4))", "DROP PROCEDURE p", "DROP VIEW totals"], id="objects"),
        pytest.param(["CREATE TABLE parts (id INT PRIMARY KEY) PARTITION BY HASH (id) PARTITIONS 3", "INSERT INTO parts VALUES (1), (2), (3)",
                      "ALTER TABLE parts ADD PARTITION PARTITIONS 2", "CREATE TEMPORARY TABLE scratch (id INT)", "DROP TEMPORARY TABLE scratch",
                      "ANALYZE TABLE parts", "OPTIMIZE TABLE parts"], id="partitions"),
    ],
)  # fmt: skip
def test_schema_changes_arrive_in_their_place(chain: Chain, statements: list[str]) -> None:
    chain.start()
    chain.sql(*statements)
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
        "CREATE TABLE child (id INT PRIMARY KEY, parent INT, FOREIGN KEY (parent) REFERENCES parent (id) ON DELETE CASCADE)",
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
