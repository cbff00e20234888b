"""Comparing and repairing a hop between MariaDB and MySQL: what differs is named, to the last bit, and nothing else."""

from __future__ import annotations

import random
import struct
import threading
from pathlib import Path

import pytest

from shardkit.errors import Drift, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.rowtext import Digest
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc.checksums import digest
from shardkit_cdc.comparison import Difference, Verdict
from shardkit_cdc.database import Database
from shardkit_cdc.repair import repair, repair_at
from shardkit_cdc.tables import Table
from tests.integration.test_relay_replay import COLUMNS, GENERATED
from tests.integration.test_relay_seed import bank, fill, load, map_file, shardkit
from tests.integration.test_relay_verify import MEDDLED, MEDDLING, compare, found, unlogged
from tests.relay_chain import Chain, chain_over

pytest_plugins = ["tests.relay_fixtures"]
pytestmark = [pytest.mark.mariadb, pytest.mark.mysql]


def mend(chain: Chain, differences: list[Difference]) -> int:
    return repair(chain.specs[0], chain.master.credentials, differences)


def whole(verdict: Verdict) -> bool:
    """Nothing was left aside."""
    return not verdict.undecided and not verdict.left_out


def test_planted_differences_are_named_under_load_and_repaired(abroad: Chain) -> None:
    bank(abroad, 5000)
    abroad.run(abroad.hop(0))
    abroad.settle()
    with load(abroad):
        for _ in range(2):
            verdict = compare(abroad, chunk=500)
            assert found(verdict) == []
            assert whole(verdict)
        unlogged(abroad, *MEDDLING)
        verdict = compare(abroad, chunk=500)
        assert found(verdict) == MEDDLED
        assert whole(verdict)
        assert verdict.rows > 5000
        assert mend(abroad, verdict.differences) == 5
        assert found(compare(abroad)) == []
    abroad.settle()
    assert found(compare(abroad)) == []


def test_types_are_compared_to_the_last_bit_and_repaired(abroad: Chain) -> None:
    # MariaDB's JSON is a LONGTEXT, which MySQL's JSON is not.
    columns = [each for each in COLUMNS if abroad.flavour is Flavour.MYSQL or " JSON" not in each[0]]
    names = ", ".join(definition.split()[0] for definition, _, _ in columns)
    insert = f"INSERT INTO types ({names}) VALUES"
    abroad.sql(
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in columns)}, {GENERATED})",
        f"{insert} ({', '.join(extreme for _, extreme, _ in columns)})",
        f"{insert} (2{', NULL' * (len(columns) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in columns)})",
        "SET sql_mode = 'ALLOW_INVALID_DATES'",
        "INSERT INTO types (id, day, moment, stamp) VALUES (5, '0000-00-00', '0000-00-00', '0000-00-00')",
        "INSERT INTO types (id, day, moment) VALUES (6, '2026-00-00', '2026-02-31 01:02:03')",
        "CREATE TABLE words (k VARCHAR(20), b VARBINARY(9), at DATETIME(3), n DECIMAL(9,3), e ENUM('x','y'), "
        "s SET('p','q'), t BIT(5), c CHAR(5) CHARACTER SET latin1, PRIMARY KEY (k, b, at, n, e, s, t, c))",
        "INSERT INTO words VALUES ('a', x'00', '2026-01-01', -1.5, 'x', 'p,q', b'101', 'é'), "
        "('가', x'FF', '2026-01-02 00:00:00.125', 2, 'y', '', b'0', 'b ')",
        "CREATE TABLE loose (a DOUBLE, b VARCHAR(10))",
        "INSERT INTO loose VALUES (0.1, 'x'), (0.1, 'x'), (2e-9, NULL)",
    )
    abroad.run(abroad.hop(0))
    abroad.settle()
    verdict = compare(abroad)
    assert found(verdict) == []
    assert whole(verdict)
    for definition, _, _ in columns[1:]:
        name = definition.split()[0]
        for number in (1, 3):
            unlogged(abroad, f"UPDATE types SET {name} = NULL WHERE id = {number}")
            verdict = compare(abroad)
            assert found(verdict)[-1] == ("types", "different", f"id={number}"), name
            mend(abroad, verdict.differences)
            assert found(compare(abroad)) == [], name
    unlogged(abroad, "DELETE FROM types", "DELETE FROM words")
    verdict = compare(abroad)
    assert mend(abroad, verdict.differences) == 7
    assert found(compare(abroad)) == []
    unlogged(abroad, "UPDATE loose SET a = 0.1000000000000001 WHERE a = 0.1 LIMIT 1")
    assert [kind for _, kind, _ in found(compare(abroad))] == ["extra", "missing"]


def test_floating_point_is_compared_by_its_bits(abroad: Chain) -> None:
    """Each family writes very small and very large numbers in its own way; MySQL cuts some of them."""
    dice = random.Random(7)
    doubles = [value for (value,) in (struct.unpack("<d", dice.randbytes(8)) for _ in range(2000)) if value == value]
    doubles += [10.0**power for power in range(-30, 30)] + [5e-324, 1.7976931348623157e308, 1 / 3]
    values = ", ".join(
        f"({number}, '{value!r}', '{value!r}')" for number, value in enumerate(doubles) if 1e-37 < abs(value) < 1e38
    )
    abroad.sql(
        "CREATE TABLE numbers (id INT PRIMARY KEY, d DOUBLE, f FLOAT, g DOUBLE AS (d / 3))",
        f"INSERT INTO numbers (id, d, f) VALUES {values}",
        f"INSERT INTO numbers (id, d) VALUES ({len(doubles)}, -1.7976931348623157e308)",
    )
    abroad.run(abroad.hop(0))
    abroad.settle()
    verdict = compare(abroad)
    assert found(verdict) == []
    assert whole(verdict)
    unlogged(abroad, "UPDATE numbers SET d = d * (1 + 2.3e-16) WHERE d NOT BETWEEN -1 AND 1 LIMIT 1")
    differences = compare(abroad).differences
    assert len(differences) == 1
    unlogged(abroad, "UPDATE numbers SET d = 0, f = 0 WHERE id % 3 = 0")
    assert mend(abroad, compare(abroad).differences) > 50
    assert found(compare(abroad)) == []


def test_documents_are_compared_by_their_text(families: dict[str, LocalDatabaseServer]) -> None:
    for chain in chain_over([families["mysql"], families["mariadb"]]):
        chain.run(chain.hop(0))
        chain.sql(
            "CREATE TABLE documents (id INT PRIMARY KEY, doc JSON)",
            "INSERT INTO documents VALUES (1, JSON_OBJECT('price', 1.10, 'day', DATE'2020-01-02', 'at', "
            "TIME'-12:00:01.5', 'when', TIMESTAMP'2020-01-01 01:02:03', 'raw', x'00ff', 'text', '\"\\\\ 한\\n'))",
            "INSERT INTO documents VALUES (2, '[1, -1, 18446744073709551615, 1.5, 1e300, 1e-7, true, null, {}, []]')",
        )
        chain.settle()
        verdict = compare(chain)
        assert found(verdict) == []
        assert whole(verdict)
        unlogged(chain, "UPDATE documents SET doc = REPLACE(doc, '1.5', '1.50')")
        verdict = compare(chain)
        assert (
            found(verdict)
            == [("documents", "different", "id=1"), ("documents", "different", "id=2")][-len(found(verdict)) :]
        )
        mend(chain, verdict.differences)
        assert found(compare(chain)) == []


#: Keys whose order, and which of whom are one, is another to each family's default collation, and to binary ones.
PREFIXES = ("a", "B", "_", "~", ":", "-", "é", "ß", "Ω", "가", "0", "😀")


def keyed(abroad: Chain, collations: tuple[str, str], rows: int = 3000) -> list[str]:
    """A table ``keyed`` with keys of text, of another collation on each end."""
    keys = [f"{prefix}{number:x}" for number in range(rows // len(PREFIXES)) for prefix in PREFIXES]
    abroad.run(abroad.hop(0))
    abroad.settle()
    for server, collation in zip(abroad.servers, collations, strict=True):
        unlogged_on(
            abroad,
            server,
            f"CREATE TABLE keyed (k VARCHAR(20) CHARACTER SET utf8mb4 COLLATE {collation}, n INT, m INT, "
            "PRIMARY KEY (k, n))",
        )
    abroad.sql("INSERT INTO keyed VALUES " + ", ".join(f"('{key}', 1, {len(key)})" for key in keys))
    abroad.settle()
    return keys


def unlogged_on(chain: Chain, server: LocalDatabaseServer, *statements: str) -> None:
    connection = server.connect(chain.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET sql_log_bin = 0")
        for statement in statements:
            cursor.execute(statement)


@pytest.mark.parametrize("kind", ["default", "binary source", "binary target"])
def test_keys_that_each_family_puts_into_an_order_of_its_own(abroad: Chain, kind: str) -> None:
    defaults = {"mariadb": "utf8mb4_general_ci", "mysql": "utf8mb4_0900_ai_ci"}
    mine, other = (defaults[server.flavour] for server in abroad.servers)
    keyed(
        abroad,
        {"binary source": ("utf8mb4_bin", other), "binary target": (mine, "utf8mb4_bin")}.get(kind, (mine, other)),
    )
    verdict = compare(abroad, chunk=100)
    assert found(verdict) == []
    assert whole(verdict)
    unlogged(
        abroad,
        "UPDATE keyed SET m = -1 WHERE k = '_7'",
        "DELETE FROM keyed WHERE k = 'é9'",
        "INSERT INTO keyed VALUES ('!', 1, 1)",
        "INSERT INTO keyed VALUES ('zzz', 1, 1)",
        "UPDATE keyed SET k = '~A' WHERE k = '~a'",
    )
    verdict = compare(abroad, chunk=100)
    planted = [
        ("keyed", "different", "k='_7', n=1"),
        ("keyed", "extra", "k='!', n=1"),
        ("keyed", "extra", "k='zzz', n=1"),
        ("keyed", "extra", "k='~A', n=1"),
        ("keyed", "missing", "k='é9', n=1"),
        ("keyed", "missing", "k='~a', n=1"),
    ]
    assert found(verdict) == sorted(planted)
    assert whole(verdict)
    abroad.stop()
    abroad.sql("INSERT INTO settled VALUES ()")
    still = compare(abroad, chunk=100, patience=0.5)
    assert still.stopped is not None
    assert found(still) == sorted(planted)
    abroad.sql("INSERT INTO keyed VALUES ('new', 1, 1)")
    still = compare(abroad, chunk=100, patience=0.5)
    assert still.stopped is not None
    assert found(still) == []
    assert "keyed has changed on the source since the hop stopped" in still.undecided
    abroad.start()
    abroad.settle()
    mend(abroad, verdict.differences)
    assert found(compare(abroad, chunk=100)) == []


def test_keys_of_text_under_load(abroad: Chain) -> None:
    """Rows come and go, and get keys that are the old ones to a collation."""
    keys = keyed(abroad, ("utf8mb4_general_ci", "utf8mb4_bin"), rows=1200)
    stop = threading.Event()
    errors: list[Exception] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        mine = [key for key in keys[number::2] if key != "_7"]
        try:
            connection = abroad.master.connect(abroad.database, autocommit=True)
            with connection, connection.cursor() as cursor:
                while not stop.wait(0.002):
                    key = dice.choice(mine)
                    cursor.execute("UPDATE keyed SET m = m + 1, k = UPPER(k) WHERE k = %s", (key,))
                    cursor.execute("DELETE FROM keyed WHERE k = %s", (dice.choice(mine),))
                    cursor.execute("INSERT IGNORE INTO keyed VALUES (%s, 1, 0)", (dice.choice(mine),))
        except Exception as error:  # noqa: BLE001 - asserted below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            verdict = compare(abroad, chunk=60)
            assert found(verdict) == []
            assert whole(verdict)
        unlogged(abroad, "UPDATE keyed SET m = -1 WHERE k = '_7'")
        assert found(compare(abroad, chunk=60)) == [("keyed", "different", "k='_7', n=1")]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_row_that_is_another_one_only_by_the_sources_collation_is_in_the_way(abroad: Chain) -> None:
    """It is not deleted along with the one that is missing."""
    keyed(abroad, ("utf8mb4_bin", "utf8mb4_general_ci"), rows=12)
    unlogged(abroad, "INSERT INTO keyed VALUES ('X', 1, 1)")
    unlogged_on(abroad, abroad.master, "INSERT INTO keyed VALUES ('x', 1, 2), ('X', 1, 1)")
    verdict = compare(abroad)
    assert found(verdict) == [("keyed", "missing", "k='x', n=1")]
    with pytest.raises(PreconditionFailed, match="Duplicate"):
        mend(abroad, verdict.differences)
    assert found(compare(abroad)) == [("keyed", "missing", "k='x', n=1")]


def test_what_cannot_be_compared_is_named(abroad: Chain, tmp_path: Path) -> None:
    abroad.run(abroad.hop(0))
    abroad.settle()
    for server in abroad.servers:
        uuid = "UUID" if server.flavour == "mariadb" else "BINARY(16)"
        kind = (
            "JSON"
            if abroad.flavour is Flavour.MYSQL and server.flavour == "mysql"
            else "LONGTEXT CHARACTER SET utf8mb4"
        )
        history = "WITH SYSTEM VERSIONING" if server.flavour == "mariadb" else ""
        unlogged_on(
            abroad,
            server,
            f"CREATE TABLE tokens (id INT PRIMARY KEY, n INT, token {uuid})",
            f"CREATE TABLE named (token {uuid} PRIMARY KEY)",
            "CREATE TABLE measured (f FLOAT PRIMARY KEY)",
            f"CREATE TABLE alike (id INT PRIMARY KEY, n INT, doc {kind} AS (JSON_OBJECT('n', n)), m INT AS (n + 1))",
            "CREATE TABLE computed (id INT PRIMARY KEY, n INT, share DECIMAL(9,6) AS (n / 3), m INT AS (n + 1) STORED)",
            f"CREATE TABLE kept (id INT PRIMARY KEY, n INT) {history}",
            "INSERT INTO tokens (id, n) VALUES (1, 1)",
            "INSERT INTO computed (id, n) VALUES (1, 1)",
            "INSERT INTO alike (id, n) VALUES (1, 1), (2, NULL)",
        )
    verdict = compare(abroad)
    assert found(verdict) == []
    assert [each.split()[0] for each in verdict.left_out] == [
        "kept",
        "measured:",
        "named:",
        "tokens.token:",
        "computed.share,",
    ]
    done = shardkit("verify", "--map", map_file(abroad, tmp_path / "map.yaml"))
    assert done.returncode == 1, done.stderr
    assert "tokens.token: uuid is a type of one family only" in " ".join(done.stderr.split())
    unlogged(abroad, "UPDATE tokens SET n = 2", "UPDATE computed SET n = 2")
    verdict = compare(abroad)
    assert found(verdict) == [("computed", "different", "id=1"), ("tokens", "different", "id=1")]
    with pytest.raises(PreconditionFailed, match="tokens cannot be repaired"):
        mend(abroad, verdict.differences)
    assert mend(abroad, [each for each in verdict.differences if each.table == "computed"]) == 1
    assert [table for table, _, _ in found(compare(abroad))] == ["tokens"]
    abroad.stop()
    abroad.sql("INSERT INTO alike (id, n) VALUES (3, 3)")
    still = compare(abroad, patience=0.5)
    assert still.stopped is not None
    assert "computed.share, m: the target computes other values" in still.left_out[-1]


def test_columns_that_never_can_be_compared_are_no_failure(
    abroad: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those that rows changing all the time have hidden are, and so is a whole table."""
    abroad.run(abroad.hop(0))
    abroad.settle()
    for server in abroad.servers:
        uuid = "UUID" if server.flavour == "mariadb" else "BINARY(16)"
        unlogged_on(
            abroad,
            server,
            f"CREATE TABLE tokens (id INT PRIMARY KEY, token {uuid})",
            "CREATE TABLE computed (id INT PRIMARY KEY, n INT, share DECIMAL(9,6) AS (n / 3), m DOUBLE AS (n / 7))",
        )
    abroad.sql(
        "INSERT INTO computed (id, n) VALUES (1, 1), (2, 2), (3, 3)",
        "CREATE TABLE other (id INT PRIMARY KEY, word VARCHAR(9) AS ('source'))",
        "INSERT INTO other (id) VALUES (1), (2), (3)",
    )
    abroad.settle()
    unlogged(abroad, "ALTER TABLE other DROP word, ADD word VARCHAR(9) AS (IF(id = 2, 'target', 'source'))")
    words = ("verify", "--map", map_file(abroad, tmp_path / "map.yaml"))
    done = shardkit(*words)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "tokens.token: uuid is a type of one family only" in said
    assert "not compared: other.word: the target computes other values than the source" in said
    unlogged(abroad, "DELETE FROM other WHERE id = 1")
    assert shardkit(*words).returncode == 3
    unlogged(abroad, "INSERT INTO other (id) VALUES (1)")

    def changing(database: Database, table: Table, where: str) -> Digest:
        read = digest(database, table, where)
        if table.name == "other":
            abroad.sql("UPDATE other SET id = id + 1 WHERE id >= 3")
        return read

    with monkeypatch.context() as patch:
        patch.setattr("shardkit_cdc.verify.digest", changing)
        verdict = compare(abroad)
    assert found(verdict) == []
    assert [each for each in verdict.left_out if each.startswith("other")] == []
    assert "other.word" in verdict.undecided
    for server in abroad.servers:
        unlogged_on(abroad, server, "CREATE TABLE measured (f FLOAT PRIMARY KEY)")
    assert compare(abroad).tables_left_out == ["measured"]
    assert shardkit(*words).returncode == 1


def test_a_column_that_the_target_alone_computes_is_another_one(abroad: Chain) -> None:
    abroad.run(abroad.hop(0))
    abroad.settle()
    unlogged_on(abroad, abroad.master, "CREATE TABLE t (id INT PRIMARY KEY, n INT, m INT)")
    unlogged_on(abroad, abroad.last, "CREATE TABLE t (id INT PRIMARY KEY, n INT, m INT AS (n + 1))")
    abroad.sql("INSERT INTO t VALUES (1, 1, 77)")
    abroad.settle()
    assert found(compare(abroad)) == [("t", "table", "m is generated on the target, and not on the source")]
    abroad.stop()
    with pytest.raises(PreconditionFailed, match="m is generated on the target, and not on the source"):
        fill(abroad)


def test_tables_that_differ_themselves(abroad: Chain) -> None:
    abroad.run(abroad.hop(0))
    abroad.sql(
        "CREATE TABLE gone (id INT PRIMARY KEY)",
        "CREATE TABLE same (id INT UNSIGNED PRIMARY KEY, flag TINYINT(1), e ENUM('é','it''s','b\\\\'), y YEAR, "
        "z INT(7) ZEROFILL, w TINYINT ZEROFILL, t TEXT CHARACTER SET latin1, g GEOMETRYCOLLECTION, d DECIMAL(5,1), "
        "f FLOAT(7,3))",
        "INSERT INTO same (id, z, f, e) VALUES (1, 5, 1.5, 'é'), (2, 6, 2.25, 'b\\\\')",
        *(f"CREATE TABLE t{number} (id INT PRIMARY KEY, c {kind})" for number, (kind, _) in enumerate(CHANGES)),
    )
    abroad.settle()
    assert found(compare(abroad)) == []
    unlogged(
        abroad,
        "DROP TABLE gone",
        "CREATE TABLE own (id INT)",
        "ALTER TABLE same MODIFY d DECIMAL(5,1) FIRST, ADD KEY (y)",
        *(f"ALTER TABLE t{number} MODIFY c {kind}" for number, (_, kind) in enumerate(CHANGES)),
    )
    told = {table: key for table, kind, key in found(compare(abroad)) if kind == "table"}
    assert told.pop("gone") == "the table is missing"
    assert told.pop("own") == "the table is extra"
    assert sorted(told) == [f"t{number}" for number in range(len(CHANGES))]
    assert told["t0"].startswith("c is int")


CHANGES = [
    ("INT", "BIGINT"),
    ("INT", "INT UNSIGNED"),
    ("VARCHAR(9)", "VARCHAR(10)"),
    ("VARCHAR(9)", "VARCHAR(36) CHARACTER SET latin1"),  # as many bytes
    ("DECIMAL(5,1)", "DECIMAL(5,2)"),
    ("DATETIME", "DATETIME(3)"),
    ("ENUM('a','b')", "ENUM('b','a')"),
    ("ENUM('é','b')", "ENUM('ê','b')"),
    ("INT", "INT NOT NULL"),
    ("INT(5) ZEROFILL", "INT(6) ZEROFILL"),
]


def test_a_hop_that_drift_has_stopped_is_compared_and_repaired_where_it_stands(abroad: Chain) -> None:
    bank(abroad, 5000)
    abroad.sql("ALTER TABLE moves DROP FOREIGN KEY moves_ibfk_1", "ALTER TABLE accounts ADD share DOUBLE DEFAULT 1e-9")
    abroad.run(abroad.hop(0))
    abroad.settle()
    unlogged(
        abroad,
        "DELETE FROM accounts WHERE id IN (4712, 4800)",
        "UPDATE accounts SET share = 1.1e-9 WHERE id = 4711",
        "INSERT INTO accounts VALUES (99999, 1, 'extra', 0)",
        "INSERT INTO accounts VALUES (5000, 1, 'too early', 0)",
    )
    abroad.sql(
        "UPDATE accounts SET balance = balance + 1 WHERE id = 4712",
        "INSERT INTO accounts VALUES (5000, 7, 'new', -1e-300)",
        "UPDATE accounts SET note = 'since' WHERE id < 20",
    )
    assert isinstance(abroad.failed(), Drift)
    verdict = compare(abroad, chunk=500)
    assert verdict.stopped is not None
    assert found(verdict) == [
        ("accounts", "different", "id=4711"),
        ("accounts", "extra", "id=5000"),
        ("accounts", "extra", "id=99999"),
        ("accounts", "missing", "id=4712"),
        ("accounts", "missing", "id=4800"),
    ]
    assert repair_at(abroad.specs[0], abroad.master.credentials, verdict) == 5
    abroad.stop()
    abroad.run(abroad.hop(0))
    abroad.settle()
    assert found(compare(abroad)) == []


def test_on_the_command_line(abroad: Chain, tmp_path: Path) -> None:
    bank(abroad, 5000)
    abroad.run(abroad.hop(0))
    abroad.settle()
    words = ("verify", "--map", map_file(abroad, tmp_path / "map.yaml"))
    done = shardkit(*words)
    assert done.returncode == 0, done.stderr
    unlogged(abroad, *MEDDLING)
    done = shardkit(*words)
    assert done.returncode == 3, done.stderr
    done = shardkit(*words, "--repair", "--yes")
    assert done.returncode == 0, done.stderr
    assert "repaired 5 rows" in done.stdout
    assert shardkit(*words).returncode == 0
