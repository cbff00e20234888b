"""A target that holds something already: what equals the snapshot stays, all else is put right, whatever it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import Fenced, PartlyApplied, ShardkitError
from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc import row_copy
from shardkit_cdc.position import lock_name
from shardkit_cdc.seed import Found
from tests.integration.test_relay_seed import bank, fill, load, map_file, shardkit
from tests.integration.test_relay_verify import compare, found, unlogged
from tests.killed_seed import ENOUGH, STATEMENT_BYTES
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]


def rows(chain: Chain, server: LocalDatabaseServer, table: str) -> set[tuple[Any, ...]]:
    return set(server.execute(f"SELECT * FROM {table}", database=chain.database))


def in_common(chain: Chain, *tables: str) -> int:
    """Rows that the master and the last server both have."""
    return sum(len(rows(chain, chain.master, name) & rows(chain, chain.last, name)) for name in tables)


def total(chain: Chain, *tables: str) -> int:
    return sum(len(rows(chain, chain.master, name)) for name in tables)


def begin_and_be_killed(chain: Chain, point: str) -> None:
    """Seed in another process, which SIGKILL ends on the way."""
    spec = chain.specs[0]
    account = chain.master.credentials(spec.source)
    given = {
        "source": spec.source.url,
        "target": spec.target.url,
        "user": account.user,
        "password": account.password,
        "point": point,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_seed"],
        input=json.dumps(given),
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr

    def alone() -> bool:
        others = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = %s AND id <> CONNECTION_ID()"
        return chain.last.execute(others, chain.database) == [(0,)]

    wait_for(alone, "the server has noticed")


KEYED = ("accounts", "members", "names")


def company(chain: Chain) -> None:
    """Tables with a number, a string and several columns as key, one without any, and a trigger."""
    bank(chain, 10_000)
    chain.sql(
        "CREATE TABLE members (tenant VARCHAR(20) COLLATE utf8mb4_bin, number INT, mail VARCHAR(40), "
        "PRIMARY KEY (tenant, number), UNIQUE (mail))",
        "CREATE TABLE names (name VARCHAR(40) PRIMARY KEY, n DOUBLE)",
        "CREATE TABLE loose (a INT, b VARCHAR(10))",
        "CREATE TABLE log (n INT)",
        "INSERT INTO members SELECT CHAR(97 + id % 26 USING utf8mb4), id, CONCAT('m', id) FROM accounts",
        "INSERT INTO members SELECT 'more', id, NULL FROM accounts WHERE id < 5000",
        "INSERT INTO names SELECT CONCAT('Name ', id), id / 7 FROM accounts",
        "INSERT INTO loose VALUES (1, 'x'), (1, 'x'), (2, NULL)",
        "CREATE TRIGGER noted AFTER INSERT ON names FOR EACH ROW INSERT INTO log VALUES (NEW.n)",
        "ANALYZE TABLE members, names, accounts",  # the largest is copied first: members
    )


#: Inserts, updates and deletes at the ends of the keys, in the middle, and where nothing was copied yet.
CHANGES = (
    "INSERT INTO accounts VALUES (-3, 0, 'before all'), (70000, 0, 'after all')",
    "UPDATE accounts SET balance = balance + 1 WHERE id IN (0, 1, 99, 100, 101, 4000, 9998, 9999)",
    "DELETE FROM accounts WHERE id IN (2, 98, 102, 5000, 9997)",
    "DELETE FROM members WHERE tenant = 'a'",
    "DELETE FROM members WHERE tenant = 'z' AND number > 9000",
    "INSERT INTO members VALUES ('', -1, NULL), ('~', 1, 'last'), ('k', 1, 'm0')",
    # unique values that change places: a copied row may meet another row's old one
    "UPDATE members SET mail = CONCAT('was ', mail) WHERE number IN (30, 9995) AND tenant <> 'more'",
    "UPDATE members SET mail = 'm30' WHERE number = 9995 AND tenant <> 'more'",
    "UPDATE members SET mail = 'm9995' WHERE number = 30 AND tenant <> 'more'",
    "UPDATE names SET n = n + 1 WHERE name IN ('Name 0', 'Name 1', 'Name 1000', 'Name 4567', 'Name 9999')",
    "DELETE FROM names WHERE name IN ('Name 10', 'Name 1001', 'Name 4568', 'Name 9998')",
    "UPDATE names SET name = UPPER(name) WHERE n < 10",
    "UPDATE names SET name = CONCAT(name, ' ') WHERE n > 1400",
    "INSERT INTO names VALUES ('', -0e0), ('zz', 0)",
    "INSERT INTO loose VALUES (1, 'x')",
)
#: By somebody who works on the half filled target by hand.
BY_HAND = (
    "UPDATE accounts SET note = CONCAT(note, ' ') WHERE id = 10",
    "INSERT INTO accounts VALUES (-9, 0, 'by hand'), (90000, 0, 'by hand')",
    "DELETE FROM accounts WHERE id = 11",
    "UPDATE members SET mail = 'by hand' WHERE number = 33 AND tenant <> 'more'",
    "DELETE FROM members WHERE number = 34",
    "INSERT INTO names VALUES ('Name 5x', 0)",
)


@pytest.mark.parametrize("point", ["transaction", "statement", "table"])
def test_a_killed_seed_is_gone_on_with(pair: Chain, point: str) -> None:
    company(pair)
    begin_and_be_killed(pair, point)
    copied = sum(len(rows(pair, pair.last, table)) for table in KEYED)
    assert ENOUGH - 2000 < copied < total(pair, *KEYED) - 1000
    assert len(rows(pair, pair.last, "members")) == 15_000
    pair.sql(*CHANGES)
    pair.sql(*BY_HAND, server=pair.last)
    common = in_common(pair, *KEYED)
    assert common > ENOUGH - 3000

    looked: list[Found] = []
    done = fill(pair, confirm=looked.append, chunk=300)
    assert looked[0].unfinished
    assert done.kept == common
    assert (
        done.rows
        == total(pair, *KEYED)
        - common
        + pair.master.execute(
            "SELECT (SELECT COUNT(*) FROM loose) + (SELECT COUNT(*) FROM log)", database=pair.database
        )[0][0]
    )
    assert done.remade == ()
    pair.assert_equal()

    pair.run(pair.hop(0))
    pair.sql("DELETE FROM accounts WHERE id < 5", "UPDATE members SET mail = NULL", "INSERT INTO names VALUES ('n', 1)")
    pair.settle()
    pair.assert_equal()


def test_a_seed_that_is_killed_again_and_again_gets_to_its_end_under_load(pair: Chain) -> None:
    company(pair)
    with load(pair):
        for point in ("statement", "transaction", "transaction", "table"):
            begin_and_be_killed(pair, point)
        done = fill(pair, jobs=2)
        assert done.kept > ENOUGH - 3000
        pair.run(pair.hop(0))
        wait_for(lambda: pair.hops[0].report.transactions > 100, lambda: f"it follows: {pair.hops[0].report}")
    pair.settle()
    pair.assert_equal()


@pytest.mark.parametrize("lost", ["source", "target"])
def test_a_seed_whose_server_was_lost_is_gone_on_with(
    own_pair: Chain, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = own_pair
    company(pair)
    server = pair.master if lost == "source" else pair.last
    monkeypatch.setattr(row_copy, "STATEMENT_BYTES", STATEMENT_BYTES)

    class Kill:
        done = 0

        def begin(self, table: str, estimate: int) -> None: ...
        def end(self, table: str) -> None: ...
        def advance(self, _: str, rows: int) -> None:
            self.done += rows
            if self.done > ENOUGH and server.running:
                server.kill()

    with pytest.raises(PartlyApplied, match="cut short") as caught:
        fill(pair, progress=Kill())
    assert "run the same command again" in str(caught.value.hint)
    server.start()
    pair.sql(*CHANGES)
    common = in_common(pair, *KEYED)
    done = fill(pair)
    assert done.kept == common > ENOUGH - 3000
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def test_a_copy_that_has_drifted_is_put_right_and_keeps_the_rest(pair: Chain) -> None:
    company(pair)
    fill(pair)
    unlogged(
        pair, *BY_HAND, "DELETE FROM members WHERE tenant = 'c'", "DROP TRIGGER noted", "CREATE VIEW v AS SELECT 1"
    )
    unlogged(pair, "CREATE TRIGGER by_hand AFTER DELETE ON members FOR EACH ROW INSERT INTO log VALUES (OLD.number)")
    pair.sql("INSERT INTO names VALUES ('one more', 1)")
    common = in_common(pair, *KEYED)
    with load(pair):
        done = fill(pair)
        assert common - 3000 < done.kept <= common
        pair.run(pair.hop(0))
        wait_for(lambda: pair.hops[0].report.transactions > 100, lambda: f"it follows: {pair.hops[0].report}")
    pair.settle()
    pair.assert_equal()


def test_a_target_without_any_difference_gets_no_row(pair: Chain) -> None:
    bank(pair, 5000)
    fill(pair)
    done = fill(pair)
    assert (done.kept, done.rows, done.bytes) == (5000, 0, 0)
    done = fill(pair, anew=True)
    assert (done.kept, done.rows) == (0, 5000)
    pair.assert_equal()


def test_replicas_of_a_staging_database_follow_what_is_put_right_in_it(chain: Chain) -> None:
    company(chain)
    chain.start()
    chain.settle()
    chain.stop()
    chain.sql(*BY_HAND, server=chain.servers[1])
    chain.sql(*CHANGES)
    chain.run(chain.hop(1))
    done = fill(chain, 0)
    assert done.kept > 30_000
    chain.run(chain.hop(0))
    chain.settle()
    chain.assert_equal()


def test_a_range_with_very_many_rows_too_much_is_emptied(pair: Chain) -> None:
    bank(pair, 5000)
    fill(pair)
    pair.sql("DELETE FROM accounts WHERE id BETWEEN 11 AND 4900")
    common = in_common(pair, "accounts")
    done = fill(pair, chunk=20)
    assert common - 20 <= done.kept < common
    pair.assert_equal()


def test_tables_that_were_changed_are_made_anew_and_the_others_kept(pair: Chain) -> None:
    company(pair)
    begin_and_be_killed(pair, "table")
    fill(pair)
    pair.sql(
        "ALTER TABLE accounts ADD extra INT FIRST",
        "ALTER TABLE names ADD KEY (n)",
        "RENAME TABLE loose TO looser",
        "CREATE TABLE young (id INT PRIMARY KEY)",
        "INSERT INTO young VALUES (1)",
    )
    done = fill(pair)
    assert done.remade == ("accounts", "names")
    assert done.kept == total(pair, "members")
    pair.assert_equal()
    pair.sql("ALTER TABLE members DROP PRIMARY KEY, ADD PRIMARY KEY (number, tenant)")
    assert fill(pair).remade == ("members",)
    pair.assert_equal()


def test_what_hides_from_a_second_seed(pair: Chain) -> None:
    pair.sql(
        "CREATE TABLE t (id INT AUTO_INCREMENT PRIMARY KEY) COMMENT 'an AUTO_INCREMENT=1'",
        "INSERT INTO t VALUES (1), (2)",
        "CREATE FUNCTION t () RETURNS INT DETERMINISTIC RETURN 1",
        "CREATE PROCEDURE t () SELECT 1",
    )
    fill(pair)
    pair.sql("INSERT INTO t VALUES (3)")
    assert fill(pair).kept == 2  # a function of a kept table's name is made anew
    pair.sql("ALTER TABLE t COMMENT 'an AUTO_INCREMENT=2'")
    assert fill(pair).remade == ("t",)
    pair.assert_equal()


def test_numbers_that_were_given_are_not_given_again(pair: Chain) -> None:
    bank(pair, 5000)
    pair.sql(*("INSERT INTO moves (account, amount) VALUES (1, 1)",) * 3)
    fill(pair)
    pair.sql(*("INSERT INTO moves (account, amount) VALUES (1, 1)",) * 3, "DELETE FROM moves WHERE id > 3")
    assert fill(pair).rows == 0
    pair.sql("INSERT INTO moves (account, amount) VALUES (1, 1)", server=pair.last)
    assert pair.last.execute("SELECT MAX(id) FROM moves", database=pair.database) == [(7,)]


def test_what_only_mariadb_has_is_copied_anew(pair: Chain) -> None:
    if pair.flavour is not Flavour.MARIADB:
        pytest.skip("MySQL has neither sequences nor system-versioned tables")
    pair.sql(
        "CREATE SEQUENCE counter",
        "CREATE TABLE numbered (id BIGINT DEFAULT NEXTVAL(counter) PRIMARY KEY, n INT)",
        "CREATE TABLE dated (id INT PRIMARY KEY, n INT) WITH SYSTEM VERSIONING",
        "INSERT INTO numbered (n) VALUES (1), (2)",
        "INSERT INTO dated VALUES (1, 1), (2, 2)",
    )
    fill(pair)
    pair.sql("UPDATE dated SET n = 3", "DELETE FROM dated WHERE id = 1", "INSERT INTO numbered (n) VALUES (3)")
    pair.sql(*("DO NEXTVAL(counter)",) * 1500, "UPDATE dated SET n = 9", server=pair.last)
    done = fill(pair)
    assert done.kept == 2
    assert done.remade == ()
    pair.assert_equal()
    history = "SELECT *, row_start, row_end FROM dated FOR SYSTEM_TIME ALL ORDER BY row_start, id"
    for query in (history, "SELECT * FROM counter"):
        master, copy = [server.execute(query, database=pair.database) for server in pair.servers]
        assert master == copy != []


#: Column, and two values of it that are easily taken for one another.
LOOKALIKES = (
    ("DOUBLE", "0e0", "-0e0"),
    ("DOUBLE", "0.1e0", "0.10000000000000002e0"),
    ("FLOAT", "0e0", "-0e0"),
    ("FLOAT", "0.1e0", "0.100000009e0"),
    ("DECIMAL(20, 10)", "0", "NULL"),
    ("DECIMAL(65, 30)", "0.000000000000000000000000000001", "0"),
    ("BIGINT UNSIGNED", "18446744073709551615", "18446744073709551614"),
    ("BIT(64)", "b'0'", "NULL"),
    ("YEAR", "0", "2000"),
    ("VARCHAR(20)", "''", "NULL"),
    ("VARCHAR(20)", "'NULL'", "NULL"),
    ("VARCHAR(20)", "'a'", "'a '"),
    ("VARCHAR(20)", "'a'", "'A'"),
    ("VARCHAR(20)", "_utf8mb4 X'C3A9'", "_utf8mb4 X'65CC81'"),
    ("VARCHAR(20)", "X'61'", "X'6100'"),
    ("VARCHAR(20) CHARACTER SET latin1", "'a'", "'a '"),
    ("VARCHAR(20) CHARACTER SET utf16", "'é'", "'e'"),
    ("CHAR(5)", "''", "NULL"),
    ("TEXT", "''", "NULL"),
    ("VARBINARY(20)", "''", "X'00'"),
    ("BLOB", "X'E9'", "X'C3A9'"),
    ("DATE", "'0000-00-00'", "NULL"),
    ("DATE", "'2026-00-00'", "'2026-01-00'"),
    ("DATETIME(6)", "'2026-01-01 00:00:00.000001'", "'2026-01-01'"),
    ("TIMESTAMP(6) NULL", "'0000-00-00'", "NULL"),
    ("TIME(6)", "'-00:00:00.000001'", "'00:00:00.000001'"),
    ("ENUM('a', '')", "''", "0"),
    ("ENUM('a', 'b')", "0", "NULL"),
    ("SET('a', 'b')", "''", "NULL"),
    ("JSON", "'1'", "'1.0'"),
    ("JSON", "'null'", "NULL"),
    ("JSON", "'\"1\"'", "'1'"),
    ("POINT", "ST_GeomFromText('POINT(1 1)', 0)", "ST_GeomFromText('POINT(1 1)', 4326)"),
    ("POINT", "ST_GeomFromText('POINT(0 1)')", "ST_GeomFromText('POINT(-0 1)')"),
)


def test_values_that_look_alike_are_told_apart(pair: Chain) -> None:
    """On the target they have changed places."""
    lax = "SET SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO,ALLOW_INVALID_DATES'"
    # MariaDB stores no minus zero
    pairs = [each for each in LOOKALIKES if pair.flavour is Flavour.MYSQL or each[2] != "-0e0"]
    for number, (kind, one, other) in enumerate(pairs):
        pair.sql(
            lax,
            f"CREATE TABLE t{number} (id INT PRIMARY KEY, v {kind}, w VARCHAR(9))",
            f"INSERT INTO t{number} VALUES (1, {one}, 'x'), (2, {other}, 'x'), (3, NULL, 'x')",
        )
    fill(pair)
    pair.assert_equal()
    for number, (_, one, other) in enumerate(pairs):
        pair.sql(lax, f"REPLACE t{number} VALUES (1, {other}, 'x'), (2, {one}, 'x')", server=pair.last)
    differing = [(f"t{number}", "different", f"id={key}") for number in range(len(pairs)) for key in (1, 2)]
    assert found(compare(pair)) == sorted(differing)
    done = fill(pair)
    assert (done.kept, done.rows) == (len(pairs), 2 * len(pairs))
    pair.assert_equal()


#: Type of a primary key, and values of it.
KEYS: tuple[tuple[str, Sequence[str]], ...] = (
    ("TINYINT", [str(number) for number in range(-128, 128, 5)]),
    ("BIGINT UNSIGNED", [str(2**64 - 1 - number) for number in range(50)]),
    ("DECIMAL(30, 10)", [f"{number - 20}.{number:010}" for number in range(50)]),
    ("DOUBLE", ["-0e0", *(f"{number - 25}.1e{number}" for number in range(50))]),
    ("FLOAT", [f"{number / 7 - 3}" for number in range(50)]),
    ("DATE", ["'0000-00-00'", "'2026-00-00'", *(f"'2026-01-{day:02}'" for day in range(1, 32))]),
    ("DATETIME(6)", [f"'2026-01-01 00:00:00.{number:06}'" for number in range(50)]),
    ("TIMESTAMP(3) DEFAULT '2026-01-01'", [f"'2026-03-29 02:30:00.{number:03}'" for number in range(50)]),
    ("TIME(2)", [f"'{hour}:00:00.5'" for hour in range(-25, 25)]),
    ("YEAR", ["0", *map(str, range(1990, 2030))]),
    ("ENUM('z', 'y', 'x', 'w', 'v', 'u', 'a')", ["0", *map(str, range(1, 8))]),
    ("SET('z', 'y', 'x', 'w', 'v', 'u')", list(map(str, range(64)))),
    (
        "SET('" + "', '".join(map(str, range(64))) + "')",
        [f"'{number}{last}'" for last in ("", ",63") for number in range(0, 60, 6)],
    ),
    ("BIT(6)", list(map(str, range(64)))),
    ("VARCHAR(20)", [f"'{'äÄbBcC'[number % 6]}{number // 2}'" for number in range(100)]),
    ("VARCHAR(20) CHARACTER SET latin1 COLLATE latin1_german1_ci", [f"'ü{number}'" for number in range(50)]),
    ("CHAR(9) CHARACTER SET utf16", [f"'a{number}'" for number in range(50)]),
    ("BINARY(4)", [f"X'00{number:02x}'" for number in range(50)]),
    ("VARBINARY(9)", ["''", *(f"X'{'00' * number}'" for number in range(1, 9))]),
)


def test_keys_of_every_type_are_gone_through(pair: Chain) -> None:
    lax = "SET SESSION time_zone = '+00:00', sql_mode = 'NO_AUTO_VALUE_ON_ZERO,ALLOW_INVALID_DATES'"
    kinds = [*KEYS]
    if pair.flavour is Flavour.MARIADB:
        kinds += [
            ("UUID", [f"'0000000{number % 10}-0000-0000-0000-0000000000{number}'" for number in range(10, 60)]),
            ("INET6", [f"'::{number}'" for number in range(50)]),
        ]
    for number, (kind, values) in enumerate(kinds):
        pair.sql(
            lax,
            f"CREATE TABLE k{number} (k {kind} NOT NULL, n INT, PRIMARY KEY (k))",
            *(f"INSERT IGNORE INTO k{number} VALUES ({value}, 0)" for value in values),
        )
        # both columns of a key, the first one with many rows of each value
        pair.sql(
            lax,
            f"CREATE TABLE c{number} (k {kind} NOT NULL, m INT, n INT, PRIMARY KEY (k, m))",
            f"INSERT INTO c{number} SELECT k, 1, 0 FROM k{number} UNION ALL SELECT k, 2, 0 FROM k{number}",
        )
    fill(pair, chunk=7)
    pair.assert_equal()
    for number, (_, values) in enumerate(kinds):
        pair.sql(
            lax,
            f"UPDATE k{number} SET n = 1 WHERE k = {values[0]} OR k = {values[-1]}",
            f"DELETE FROM k{number} WHERE k = {values[1]} OR k = {values[-2]}",
            f"DELETE FROM c{number} WHERE m = 1 AND k > {values[len(values) // 2]}",
            server=pair.last,
        )
        pair.sql(lax, f"DELETE FROM c{number} WHERE m = 2 AND k = {values[2]}")
    tables = [f"{kind}{number}" for number in range(len(kinds)) for kind in "kc"]
    common = in_common(pair, *tables)
    done = fill(pair, chunk=7)
    pair.assert_equal()
    assert done.kept == common
    assert done.rows == total(pair, *tables) - common


def test_a_seed_that_was_paused_cannot_write_after_the_next_one(pair: Chain) -> None:
    bank(pair, 20_000)
    paused, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    class Pause:
        def begin(self, table: str, _: int) -> None:
            if table == "accounts":
                paused.set()
                go_on.wait(60)

        def advance(self, table: str, rows: int) -> None: ...
        def end(self, table: str) -> None: ...

    def first() -> None:
        try:
            fill(pair, progress=Pause())
        except ShardkitError as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert paused.wait(60)
        held = pair.last.execute("SELECT IS_USED_LOCK(%s)", lock_name(pair.database, "seed:shop-0"))[0][0]
        pair.last.execute(f"KILL {held}")  # as its server does when nothing is heard of it for long
        pair.sql("UPDATE accounts SET balance = 5")
        fill(pair)
        unlogged(pair, "DELETE FROM accounts WHERE id > 100")  # room for what the first would write
    finally:
        go_on.set()
        thread.join()
    assert isinstance(errors[0], Fenced)
    assert pair.last.execute("SELECT COUNT(*) FROM accounts", database=pair.database) == [(101,)]


def test_on_the_command_line(chain: Chain, tmp_path: Path) -> None:
    bank(chain, 5000)
    source = map_file(chain, tmp_path / "map.yaml")
    words = ("seed", "--map", source, "--shard", "shop-0", "--staging")
    assert shardkit(*words).returncode == 0
    chain.sql("DELETE FROM accounts WHERE id = 7", server=chain.servers[1])
    done = shardkit(*words)
    assert done.returncode == 4
    assert "rows that are equal are kept" in done.stderr
    done = shardkit(*words, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    seeded = json.loads(done.stdout)["seeded"]
    assert (seeded["rows"], seeded["kept"], seeded["remade"]) == (1, 4999, [])
    chain.sql("ALTER TABLE accounts ADD extra INT")
    done = shardkit(*words, "--yes")
    assert "accounts" in done.stderr
    assert "5,000 rows copied" in done.stdout.replace("\n", " ")
    done = shardkit(*words, "--anew")
    assert done.returncode == 4
    assert "is emptied" in done.stderr
    done = shardkit(*words, "--anew", "--yes", "--json")
    assert json.loads(done.stdout)["seeded"]["kept"] == 0
