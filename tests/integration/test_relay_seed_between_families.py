"""Filling a target of the other family: its tables get the source's rows, and the hop goes on right after them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit.credentials import fixed
from shardkit.errors import PartlyApplied, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc import row_copy
from shardkit_cdc.relay import State
from shardkit_cdc.seed import seed
from tests.integration.test_relay_replay import COLUMNS, GENERATED
from tests.integration.test_relay_seed import bank, fill, load, map_file, shardkit
from tests.integration.test_relay_verify import MEDDLING, compare, found, unlogged
from tests.integration.test_relay_verify_between_families import unlogged_on
from tests.relay_chain import Chain, chain_over, wait_for

pytest_plugins = ["tests.relay_fixtures"]
pytestmark = [pytest.mark.mariadb, pytest.mark.mysql]


MOVES = "id BIGINT AUTO_INCREMENT PRIMARY KEY, account INT, amount INT"
#: The tables of `bank`.
ACCOUNTS = (
    "CREATE TABLE accounts (id INT PRIMARY KEY, balance BIGINT, note VARCHAR(40), KEY (note))",
    f"CREATE TABLE moves ({MOVES}, FOREIGN KEY (account) REFERENCES accounts (id) ON DELETE CASCADE)",
)


def test_a_target_filled_under_load_goes_on_right_after_the_snapshot(abroad: Chain) -> None:
    bank(abroad)
    abroad.sql(*ACCOUNTS, server=abroad.last)
    with load(abroad):
        done = seed(abroad.specs[0], abroad.master.credentials)  # nothing is asked: the tables are empty
        assert done.rows >= 20_000
        abroad.run(abroad.hop(0))
        wait_for(lambda: abroad.hops[0].report.transactions > 200, lambda: f"it follows: {abroad.hops[0].report}")
    abroad.settle()
    verdict = compare(abroad)
    assert found(verdict) == []
    assert verdict.rows > 20_000


def test_what_is_equal_is_kept_and_the_rest_becomes_the_snapshot(abroad: Chain) -> None:
    bank(abroad, 5000)
    abroad.sql("INSERT INTO moves (account, amount) VALUES (1, 2)")
    abroad.sql(*ACCOUNTS, server=abroad.last)
    fill(abroad)
    unlogged(abroad, *MEDDLING)
    with pytest.raises(PreconditionFailed, match="not empty"):
        seed(abroad.specs[0], abroad.master.credentials)
    done = fill(abroad, chunk=500)
    assert (done.rows, done.kept) == (3, 4998)  # 4711, 4712 and 4713
    assert done.remade == ()
    done = fill(abroad, anew=True)
    assert (done.rows, done.kept) == (5001, 0)
    abroad.run(abroad.hop(0))
    abroad.settle()
    assert found(compare(abroad)) == []
    assert abroad.last.execute("SELECT COUNT(*) FROM moves", database=abroad.database) == [(1,)]


def test_numbers_go_on_behind_those_that_the_source_gave(abroad: Chain) -> None:
    """A promoted target would else give those of deleted rows once more."""
    table = "CREATE TABLE t (id INT AUTO_INCREMENT PRIMARY KEY, n INT)"
    abroad.sql(table, "INSERT INTO t (n) VALUES (1), (2), (3)", "DELETE FROM t WHERE id > 1")
    abroad.sql(table, server=abroad.last)
    for _ in range(2):
        fill(abroad)
        abroad.sql("INSERT INTO t (n) VALUES (4)", server=abroad.last)
        assert abroad.last.execute("SELECT MAX(id) FROM t", database=abroad.database)[0][0] >= 4


def test_every_type_is_what_it_was(abroad: Chain) -> None:
    # MariaDB's JSON is a LONGTEXT, which MySQL's JSON is not.
    columns = [each for each in COLUMNS if abroad.flavour is Flavour.MYSQL or " JSON" not in each[0]]
    names = ", ".join(definition.split()[0] for definition, _, _ in columns)
    tables = (
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in columns)}, {GENERATED})",
        "CREATE TABLE loose (a DOUBLE, b VARCHAR(10))",
        "CREATE TABLE words (k VARCHAR(20) CHARACTER SET utf8mb4 PRIMARY KEY, n INT)",
    )
    insert = f"INSERT INTO types ({names}) VALUES"
    abroad.sql(
        *tables,
        f"{insert} ({', '.join(extreme for _, extreme, _ in columns)})",
        f"{insert} (2{', NULL' * (len(columns) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in columns)})",
        "SET sql_mode = 'ALLOW_INVALID_DATES'",
        "INSERT INTO types (id, day, moment, stamp) VALUES (5, '0000-00-00', '0000-00-00', '0000-00-00')",
        "INSERT INTO types (id, day, moment) VALUES (6, '2026-00-00', '2026-02-31 01:02:03')",
        "INSERT INTO loose VALUES (0.1, 'x'), (0.1, 'x'), (2e-9, NULL)",
        "INSERT INTO words VALUES ('_', 1), ('a', 2), ('B', 3), ('é', 4), ('가', 5)",
    )
    abroad.sql(*tables, server=abroad.last)
    fill(abroad)
    done = fill(abroad)
    assert (done.rows, done.kept) == (8, 5)  # what has no key, or keys of text, is copied each time
    abroad.run(abroad.hop(0))
    abroad.settle()
    verdict = compare(abroad)
    assert found(verdict) == []
    assert verdict.left_out == []
    assert verdict.tables == 4


def test_a_value_that_did_not_arrive_is_no_copy(abroad: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason; here the row is changed on its way. What is left is marked as filled in part."""
    table = "CREATE TABLE t (id INT PRIMARY KEY, word VARCHAR(9))"
    abroad.sql(table, "INSERT INTO t VALUES (1, 'one'), (2, 'two')")
    abroad.sql(table, server=abroad.last)
    real = row_copy.RowCopy._missing

    def changed(*arguments: object) -> Iterator[bytes]:
        for line in real(*arguments):  # type: ignore[arg-type]
            yield line.replace(b"two", b"too")

    with monkeypatch.context() as patch:
        patch.setattr(row_copy.RowCopy, "_missing", changed)
        with pytest.raises(PartlyApplied, match="rows of t did not become"):
            fill(abroad)
    abroad.run(abroad.hop(0))
    wait_for(lambda: abroad.hops[0].report.state is State.BLOCKED, "the hop does not start")
    abroad.stop()
    assert fill(abroad).kept == 1


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        ("CREATE TABLE gone (id INT PRIMARY KEY)", "DO 0", "has no table gone"),
        ("DO 0", "CREATE TABLE own (id INT PRIMARY KEY)", "own: the table is extra"),
        ("CREATE TABLE t (id INT PRIMARY KEY, n INT)", "CREATE TABLE t (id INT PRIMARY KEY, n BIGINT)", "t: n is int"),
        ("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE TABLE t (id INT UNIQUE NOT NULL)", "another primary key"),
        ("CREATE TABLE t (f FLOAT PRIMARY KEY)", "CREATE TABLE t (f FLOAT PRIMARY KEY)", "f is in its primary key"),
        ("CREATE TABLE t (n INT)", "CREATE TABLE t (n INT) ENGINE=MyISAM", "keeps t in MyISAM"),
    ],
)
def test_a_target_that_cannot_be_filled_is_left_as_it_is(abroad: Chain, source: str, target: str, told: str) -> None:
    both = "CREATE TABLE held (id INT PRIMARY KEY)"
    abroad.sql(both, source)
    unlogged_on(abroad, abroad.last, both, target)
    with pytest.raises(PreconditionFailed, match=told):
        fill(abroad)
    names = [name for (name,) in abroad.last.execute("SHOW TABLES", database=abroad.database)]
    assert not [name for name in names if str(name).startswith("shardkit_")]


def test_rows_of_others_and_triggers_are_refused(abroad: Chain) -> None:
    table = "CREATE TABLE t (id INT PRIMARY KEY, n INT)"
    abroad.sql(table, "INSERT INTO t VALUES (1, 1)")
    abroad.sql(table, "INSERT INTO t VALUES (7, 7)", server=abroad.last)
    with pytest.raises(PreconditionFailed, match="holds rows in t"):
        fill(abroad)
    assert abroad.last.execute("SELECT id FROM t", database=abroad.database) == [(7,)]
    abroad.sql("DELETE FROM t", "CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW SET @n = 1", server=abroad.last)
    with pytest.raises(PreconditionFailed, match="trigger noted"):
        fill(abroad)


def test_an_account_that_cannot_see_triggers(abroad: Chain) -> None:
    user = f"seeing_{abroad.database}"
    abroad.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    abroad.sql("CREATE TABLE t (id INT PRIMARY KEY)", server=abroad.last)
    for server in abroad.servers:
        server.create_user(user, "secret")
    abroad.last.execute(f"REVOKE ALL PRIVILEGES, GRANT OPTION FROM {user}@'%'")
    abroad.last.execute(
        f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX ON `{abroad.database}`.* TO {user}@'%'"
    )
    try:
        with pytest.raises(PreconditionFailed, match="cannot see whether") as caught:
            seed(abroad.specs[0], fixed(user, "secret"))
        assert "GRANT TRIGGER" in str(caught.value.hint)
    finally:
        for server in abroad.servers:
            server.execute(f"DROP USER {user}@'%'")


def test_tables_that_a_migration_has_made(abroad: Chain) -> None:
    """They come with the rows that the migration has written, the source's as well."""
    migrated = (
        "CREATE TABLE t (id INT PRIMARY KEY)",
        "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('5f1')",
    )
    for server in abroad.servers:
        unlogged_on(abroad, server, *migrated)
    abroad.sql("INSERT INTO t VALUES (1)")
    assert seed(abroad.specs[0], abroad.master.credentials).rows == 2
    abroad.run(abroad.hop(0))
    abroad.settle()
    assert found(compare(abroad)) == []


def test_a_sequence_is_refused(families: dict[str, LocalDatabaseServer]) -> None:
    for chain in chain_over([families["mariadb"], families["mysql"]]):
        chain.sql("CREATE SEQUENCE numbers")
        with pytest.raises(PreconditionFailed, match="sequence numbers"):
            fill(chain)


def test_two_texts_that_are_one_to_the_targets_collation(abroad: Chain) -> None:
    unlogged_on(
        abroad, abroad.master, "CREATE TABLE t (k VARCHAR(9) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin PRIMARY KEY)"
    )
    unlogged_on(
        abroad,
        abroad.last,
        "CREATE TABLE t (k VARCHAR(9) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci PRIMARY KEY)",
    )
    abroad.sql("INSERT INTO t VALUES ('a'), ('A')")
    with pytest.raises(PartlyApplied, match="refused a row of t") as caught:
        fill(abroad)
    assert "collation" in str(caught.value.hint)
    unlogged_on(abroad, abroad.last, "ALTER TABLE t MODIFY k VARCHAR(9) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
    assert fill(abroad).rows == 2


def test_on_the_command_line(abroad: Chain, tmp_path: Path) -> None:
    bank(abroad, 5000)
    abroad.sql(*ACCOUNTS, server=abroad.last)
    source = map_file(abroad, tmp_path / "map.yaml")
    words = ("seed", "--map", source, "--shard", "shop-0", "--staging")
    done = shardkit(*words)
    assert done.returncode == 0, done.stderr
    assert "5,000 rows copied" in " ".join(done.stdout.split())
    done = shardkit(*words)
    assert done.returncode == 4
    assert "tables with rows" in " ".join(done.stderr.split())
    done = shardkit(*words, "--yes")
    assert done.returncode == 0, done.stderr
    assert "5,000 rows kept" in " ".join(done.stdout.split())
