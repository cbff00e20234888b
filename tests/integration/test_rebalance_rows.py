"""Rows arrive as they are stored: every column type, every extreme, on both flavours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from shardkit.errors import RebalanceError
from shardkit.rebalance.copy import Key, read_chunk, statements
from shardkit.rebalance.servers import Server
from shardkit.rebalance.tables import Table, quoted, read_table
from shardkit.rebalance.verify import digest
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Role

EVERY_TYPE = """
CREATE TABLE every_type (
  id BIGINT PRIMARY KEY,
  ti TINYINT, si SMALLINT, mi MEDIUMINT, i INT, bi BIGINT, ubi BIGINT UNSIGNED, zi INT(6) ZEROFILL,
  dec_wide DECIMAL(65, 30), dec_int DECIMAL(20, 0), f FLOAT, d DOUBLE, fd FLOAT(8, 3), b1 BIT(1), b64 BIT(64), y YEAR,
  dt DATE, tm TIME(6), dtm DATETIME(6), ts TIMESTAMP(3) NULL, ts0 TIMESTAMP NULL,
  c CHAR(20), vc VARCHAR(200), l1 VARCHAR(50) CHARACTER SET latin1, u16 VARCHAR(50) CHARACTER SET utf16,
  sj VARCHAR(50) CHARACTER SET sjis, ci VARCHAR(50) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci,
  bn BINARY(8), vb VARBINARY(300), tx TEXT, mt MEDIUMTEXT, bl BLOB, lb LONGBLOB,
  e ENUM('a', 'b', '', 'd''q'), s SET('x', 'y', 'z'), j JSON, g GEOMETRY, pt POINT,
  gv INT GENERATED ALWAYS AS (i + 1) VIRTUAL, gs VARCHAR(30) GENERATED ALWAYS AS (CONCAT('k', id)) STORED
) CHARACTER SET utf8mb4
"""
LOOSE = "SET SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO,ALLOW_INVALID_DATES', time_zone = '+00:00'"
ALL_BYTES = "X'" + bytes(range(256)).hex() + "'"
ROWS = [
    """(0, -128, -32768, -8388608, -2147483648, -9223372036854775808, 0, 42,
     '-99999999999999999999999999999999999.999999999999999999999999999999', '-99999999999999999999',
     -3.4028234e38, -1.7976931348623157e308, -1234.567, b'0', b'0', '0000',
     '0000-00-00', '-838:59:59.000000', '0000-00-00 00:00:00', '1970-01-01 00:00:01.000', '0000-00-00 00:00:00',
     '', '', '', '', '', '', X'0000000000000000', X'', '', '', X'', X'', 1, 0, '{}', NULL, POINT(0, 0))""",
    f"""(1, 127, 32767, 8388607, 2147483647, 9223372036854775807, 18446744073709551615, 999999,
     '99999999999999999999999999999999999.999999999999999999999999999999', '99999999999999999999',
     1.17549435e-38, 0.1, 0.001, b'1', X'FFFFFFFFFFFFFFFF', '2155',
     '9999-12-31', '-00:00:00.500000', '9999-12-31 23:59:59.999999', '2038-01-19 03:14:07.999', '2001-01-01 00:00:00',
     'trailing  ', 'quote''s \\\\ back\\nslash \\0 \\Z %s %% :x {{}}', _latin1 X'E9FF80', _utf16 X'D83DDE000041',
     _sjis X'835C8354', 'Größe', X'00FF27225C0A1A00', {ALL_BYTES}, REPEAT('한글😀', 500), 'x', {ALL_BYTES},
     REPEAT({ALL_BYTES}, 300), 'd''q', 'x,z', '{{"a": [1, 2.5, 1e100, "ü\\\\u0001", null, true], "b": -0.0}}',
     ST_GeomFromText('POLYGON((0 0, 1 0, 1 1, 0 0))'), POINT(1.5, -2.25))""",
    f"(2, {', '.join(['NULL'] * 37)})",
    """(3, 0, 0, 0, 0, 0, 9223372036854775808, 0, '0.000000000000000000000000000001', '0', 16777217, 5e-324, 0, b'1',
     X'8000000000000000', '1901', '2023-02-31', '838:59:59', '2023-00-00 00:00:00', '2000-06-15 12:00:00.001', NULL,
     ' lead', '\\t', _latin1 X'20', _utf16 X'0020', 'a', 'ẞ', X'2000000000000020', X'00', '\\r\\n', '', X'00', X'5C27',
     3, 7, '"text"', ST_GeomFromText('LINESTRING(0 0, 1e300 -1e-300)'), POINT(0.1, 0.2))""",
    """(-1, 1, 1, 1, 1, 1, 1, 1, 1, 1, '-0', '-0', -0.5, b'0', b'101', '2024', '2024-02-29', '00:00:00.000001',
     '1000-01-01 00:00:00.000001', '1999-12-31 23:59:59.5', NULL, 'x', 'ends with backslash\\\\', '', '', '', '',
     X'FF', X'27', '''', '"', X'22', X'60', 0, 4, '[]', ST_GeomFromText('MULTIPOINT(1 1, 2 2)'), NULL)""",
]


@pytest.fixture
def two_databases(database_server: LocalDatabaseServer, fresh_database: str) -> Iterator[tuple[str, str]]:
    other = f"{fresh_database}_b"
    database_server.execute(f"CREATE DATABASE {other}")
    yield fresh_database, other
    database_server.execute(f"DROP DATABASE {other}")


def open_server(server: LocalDatabaseServer, database: str, *, binary: bool = False) -> Server:
    return Server(database, Role.MASTER, server.endpoint(database), server.credentials, binary=binary)


def copy_table(server: LocalDatabaseServer, source: str, target: str, name: str, *, limit: int = 100) -> list[Key]:
    """Copy a whole table through literals, as a job does."""
    seen: list[Key] = []
    with closing(open_server(server, source)) as here, closing(open_server(server, target, binary=True)) as there:
        table = read_table(here, name)
        last: Key | None = None
        while (chunk := read_chunk(here, table, "TRUE", last, limit)).rows:
            for statement in statements(table, chunk.rows, 1_000_000):
                there.run_bytes(statement)
            seen += chunk.keys
            last = chunk.keys[-1]
    return seen


def stored(server: LocalDatabaseServer, database: str, name: str) -> tuple[list[object], list[tuple[object, ...]]]:
    """CHECKSUM TABLE, and every value in hexadecimal."""
    with closing(open_server(server, database)) as here:
        columns = [column.name for column in read_table(here, name).columns]
        values = ", ".join(f"HEX({quoted(column)})" for column in columns)
        rows = here.rows(f"SELECT {values} FROM {quoted(name)} ORDER BY 1")
        return [here.row(f"CHECKSUM TABLE {quoted(name)}")[1]], rows


def both(server: LocalDatabaseServer, databases: tuple[str, str], *statements_: str) -> None:
    for database in databases:
        with closing(server.connect(database, autocommit=True)) as connection, connection.cursor() as cursor:
            cursor.execute(LOOSE)
            for statement in statements_:
                cursor.execute(statement)


def test_every_type_is_copied_byte_for_byte(
    database_server: LocalDatabaseServer, two_databases: tuple[str, str]
) -> None:
    source, target = two_databases
    both(database_server, (source, target), EVERY_TYPE)
    both(database_server, (source,), *(f"INSERT INTO every_type ({PLAIN}) VALUES {row}" for row in ROWS))
    copy_table(database_server, source, target, "every_type", limit=2)
    assert stored(database_server, target, "every_type") == stored(database_server, source, "every_type")
    with closing(open_server(database_server, source)) as here, closing(open_server(database_server, target)) as there:
        table = read_table(here, "every_type")
        assert digest(here, table, "TRUE") == digest(there, table, "TRUE")
        assert digest(here, table, "TRUE").rows == len(ROWS)


PLAIN = (
    "id, ti, si, mi, i, bi, ubi, zi, dec_wide, dec_int, f, d, fd, b1, b64, y, dt, tm, dtm, ts, ts0, "
    "c, vc, l1, u16, sj, ci, bn, vb, tx, mt, bl, lb, e, s, j, g, pt"
)


def test_an_enum_that_holds_no_member_survives(
    database_server: LocalDatabaseServer, two_databases: tuple[str, str]
) -> None:
    source, target = two_databases
    both(database_server, (source, target), "CREATE TABLE t (id INT PRIMARY KEY, e ENUM('0', 'b'))")
    both(database_server, (source,), "INSERT IGNORE INTO t VALUES (1, 'nonsense'), (2, '0'), (3, 'b'), (4, NULL)")
    copy_table(database_server, source, target, "t")
    with closing(open_server(database_server, target)) as there:
        assert there.rows("SELECT id, e + 0 FROM t ORDER BY id") == [(1, 0.0), (2, 1.0), (3, 2.0), (4, None)]


KEYS = {
    "INT": ["-5", "0", "7", "2147483647"],
    "BIGINT UNSIGNED": ["0", "9007199254740993", "9007199254740992", "18446744073709551615"],
    "DECIMAL(30, 5)": ["12345678901234567890.00001", "12345678901234567890.00002", "-1.5", "0"],
    "VARCHAR(30) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci": ["'b'", "'A'", "'ä2'", "'c'", "'x''y'", "''"],
    "VARCHAR(30) CHARACTER SET latin1": ["'b'", "'A'", "_latin1 X'E9'", "''"],
    "VARBINARY(20)": ["X'00'", "X''", "X'FF00'", "X'275C'"],
    "BINARY(4)": ["X'00000001'", "X'FFFFFFFF'", "X'0000FF00'"],
    "DATE": ["'0000-00-00'", "'2024-02-29'", "'9999-12-31'"],
    "DATETIME(6)": ["'2024-01-01 00:00:00.000001'", "'2024-01-01 00:00:00'", "'1000-01-01 00:00:00'"],
    "TIMESTAMP": ["'2024-01-01 00:00:00'", "'1999-01-01 00:00:00'"],
    "TIME(3)": ["'-10:00:00.5'", "'00:00:00'", "'838:59:59'"],
    "ENUM('z', 'a', 'm')": ["'z'", "'a'", "'m'"],
    "BIT(40)": ["b'0'", "X'FFFFFFFFFF'", "b'101'"],
    "YEAR": ["'0000'", "'2024'", "'1901'"],
}


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.split()[0].split("(")[0].lower())
def test_chunks_follow_every_kind_of_primary_key(
    kind: str, database_server: LocalDatabaseServer, two_databases: tuple[str, str]
) -> None:
    """One row a chunk: each cursor is compared with the next key as the server orders them."""
    source, target = two_databases
    both(
        database_server,
        (source, target),
        f"CREATE TABLE k (a {kind} NOT NULL, b INT NOT NULL, v VARCHAR(9), PRIMARY KEY (a, b))",
    )
    rows = ", ".join(f"({key}, {number}, 'v{number}')" for key in KEYS[kind] for number in (-1, 2))
    both(database_server, (source,), f"INSERT INTO k VALUES {rows}")
    seen = copy_table(database_server, source, target, "k", limit=1)
    assert len(seen) == len(set(seen)) == 2 * len(KEYS[kind])
    assert stored(database_server, target, "k") == stored(database_server, source, "k")


def test_a_row_that_is_older_than_a_check_is_copied(
    database_server: LocalDatabaseServer, two_databases: tuple[str, str]
) -> None:
    if database_server.flavour == "mysql":
        pytest.skip("MySQL has no switch for it")
    both(database_server, two_databases, "CREATE TABLE t (id INT PRIMARY KEY, n INT CHECK (n > 0))")
    source, target = two_databases
    both(database_server, (source,), "SET check_constraint_checks = 0", "INSERT INTO t VALUES (1, 0)")
    copy_table(database_server, source, target, "t")
    assert stored(database_server, target, "t") == stored(database_server, source, "t")


def test_a_row_that_does_not_fit_into_a_packet_is_named(
    database_server: LocalDatabaseServer, two_databases: tuple[str, str]
) -> None:
    source, _ = two_databases
    both(database_server, (source,), "CREATE TABLE big (id INT PRIMARY KEY, v LONGBLOB)")
    packet = database_server.execute("SELECT @@global.max_allowed_packet")[0][0]
    both(database_server, (source,), f"INSERT INTO big VALUES (7, REPEAT('''', {packet * 2 // 3}))")
    with closing(open_server(database_server, source)) as here:
        table: Table = read_table(here, "big")
        with pytest.raises(RebalanceError, match="big with the primary key id=7 does not fit"):
            read_chunk(here, table, "TRUE", None, 10)
        with pytest.raises(RebalanceError, match="a row of big does not fit"):
            digest(here, table, "TRUE")
