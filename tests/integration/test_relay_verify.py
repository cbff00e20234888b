"""Comparing a hop's two ends under load: every planted difference is named and nothing else; repairing them."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardkit.errors import PreconditionFailed
from shardkit_cdc.comparison import Difference, Kind, Verdict
from shardkit_cdc.repair import repair
from shardkit_cdc.verify import verify
from tests.integration.test_relay_replay import COLUMNS, GENERATED
from tests.integration.test_relay_seed import bank, fill, load, map_file, shardkit
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]


def compare(chain: Chain, index: int = 0, **options: object) -> Verdict:
    return verify(chain.specs[index], chain.master.credentials, **options)


def found(verdict: Verdict) -> list[tuple[str, str, str]]:
    return sorted((each.table, each.kind.value, each.key) for each in verdict.differences)


def unlogged(chain: Chain, *statements: str) -> None:
    """Meddle with the last server, its log left out."""
    connection = chain.last.connect(chain.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET sql_log_bin = 0, foreign_key_checks = 0")
        for statement in statements:
            cursor.execute(statement)


MEDDLING = (
    "UPDATE accounts SET note = 'drift' WHERE id = 4711",
    "UPDATE accounts SET note = CONCAT(note, ' ') WHERE id = 4713",
    "DELETE FROM accounts WHERE id = 4712",
    "INSERT INTO accounts VALUES (99999, 1, 'extra')",
    "INSERT INTO accounts VALUES (-5, 1, 'extra')",
)
MEDDLED = [
    ("accounts", "different", "id=4711"),
    ("accounts", "different", "id=4713"),
    ("accounts", "extra", "id=-5"),
    ("accounts", "extra", "id=99999"),
    ("accounts", "missing", "id=4712"),
]


def test_planted_differences_are_named_under_load_and_nothing_else(pair: Chain) -> None:
    bank(pair, 5000)
    pair.run(pair.hop(0))
    pair.settle()
    with load(pair, xa=False):
        for _ in range(3):
            verdict = compare(pair, chunk=500)
            assert found(verdict) == []
            assert verdict.undecided == []
        unlogged(pair, *MEDDLING)
        verdict = compare(pair, chunk=500)
    assert found(verdict) == MEDDLED
    assert verdict.undecided == []
    assert verdict.rows > 5000
    assert verdict.tables == 3


@contextmanager
def busy(pair: Chain, *statements: str) -> Iterator[None]:
    """Clients that run these statements on ten rows of the table ``busy``, as fast as they can."""
    stop = threading.Event()
    errors: list[Exception] = []

    def work(first: int) -> None:
        try:
            connection = pair.master.connect(pair.database, autocommit=True)
            with connection, connection.cursor() as cursor:
                for number in itertools.count():
                    if stop.is_set():
                        return
                    for statement in statements:
                        cursor.execute(statement, (first + number % 5,))
        except Exception as error:  # noqa: BLE001 - asserted below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 5)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def busy_table(pair: Chain) -> None:
    rows = ", ".join(f"({number}, 0)" for number in range(10))
    pair.sql("CREATE TABLE busy (id INT PRIMARY KEY, n INT)", f"INSERT INTO busy VALUES {rows}, (50, 0)")
    pair.run(pair.hop(0))
    pair.settle()


def test_rows_that_change_all_the_time_are_decided_under_a_lock(pair: Chain) -> None:
    busy_table(pair)
    unlogged(pair, "UPDATE busy SET n = 9 WHERE id = 50")
    with busy(pair, "UPDATE busy SET n = n + 1 WHERE id = %s"):
        for _ in range(4):
            verdict = compare(pair)
            assert found(verdict) == [("busy", "different", "id=50")]
            assert verdict.undecided == []


def test_repaired_rows_are_the_sources_and_the_hop_goes_on(pair: Chain) -> None:
    bank(pair, 5000)
    pair.run(pair.hop(0))
    pair.settle()
    unlogged(pair, *MEDDLING)
    with load(pair, xa=False):
        verdict = compare(pair)
        assert found(verdict) == MEDDLED
        assert repair(pair.specs[0], pair.master.credentials, verdict.differences) == 5
        assert found(compare(pair)) == []
    pair.settle()
    pair.assert_equal()


def test_rows_that_are_at_work_are_repaired_without_a_clash(pair: Chain) -> None:
    """A row written too early or too late is there already, or missing, when its change arrives: the hop would stop."""
    busy_table(pair)
    faults = [Difference("busy", Kind.DIFFERENT, f"id={number}", (str(number),)) for number in range(10)]
    with busy(pair, "DELETE FROM busy WHERE id = %s", "INSERT INTO busy VALUES (%s, 1)"):
        for _ in range(5):
            repair(pair.specs[0], pair.master.credentials, faults)
    pair.settle()
    pair.assert_equal()


def test_types_are_compared_to_the_last_bit(pair: Chain) -> None:
    names = ", ".join(definition.split()[0] for definition, _, _ in COLUMNS)
    pair.sql(
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in COLUMNS)}, {GENERATED})",
        f"INSERT INTO types ({names}) VALUES ({', '.join(extreme for _, extreme, _ in COLUMNS)})",
        "CREATE TABLE words (k VARCHAR(20), b VARBINARY(9), at DATETIME, PRIMARY KEY (k, b, at))",
        "INSERT INTO words VALUES ('a', x'00', '2026-01-01'), ('가', x'FF', '2026-01-02')",
    )
    pair.run(pair.hop(0))
    pair.settle()
    assert found(compare(pair)) == []
    for definition, _, _ in COLUMNS[1:]:
        name = definition.split()[0]
        unlogged(pair, f"CREATE TABLE kept AS SELECT id, {name} AS v FROM types", f"UPDATE types SET {name} = NULL")
        assert found(compare(pair))[-1] == ("types", "different", "id=1"), name
        unlogged(pair, f"UPDATE types SET {name} = (SELECT v FROM kept)", "DROP TABLE kept")
    assert found(compare(pair)) == []
    unlogged(pair, "UPDATE words SET b = x'FE' WHERE b = x'FF'")
    verdict = compare(pair)
    assert [each.kind for each in verdict.differences] == [Kind.EXTRA, Kind.MISSING]
    assert all("'가'" in each.key for each in verdict.differences)
    repair(pair.specs[0], pair.master.credentials, verdict.differences)
    unlogged(pair, "UPDATE types SET words = NULL, twice = 1.5, document = NULL")
    repair(pair.specs[0], pair.master.credentials, compare(pair).differences)
    pair.assert_equal()


def test_tables_without_a_primary_key_and_tables_that_differ_themselves(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE loose (a INT, b VARCHAR(10))",
        "INSERT INTO loose VALUES (1, 'x'), (1, 'x'), (2, NULL)",
        "CREATE TABLE gone (id INT PRIMARY KEY)",
        "CREATE TABLE changed (id INT PRIMARY KEY, n INT)",
    )
    pair.settle()
    assert found(compare(pair)) == []
    unlogged(
        pair,
        "DROP TABLE gone",
        "CREATE TABLE own (id INT)",
        "ALTER TABLE changed MODIFY n BIGINT",
        "UPDATE loose SET a = 3 WHERE a = 1",  # two equal rows: an exclusive or would see no difference
    )
    verdict = compare(pair)
    by_table: dict[str, list[str]] = {}
    for table, kind, key in found(verdict):
        by_table.setdefault(table, []).append(kind if kind != "table" else key)
    assert by_table == {
        "changed": ["the table has other columns or another primary key"],
        "gone": ["the table is missing"],
        "loose": ["extra", "extra", "missing", "missing"],
        "own": ["the table is extra"],
    }
    with pytest.raises(PreconditionFailed, match="row by row"):
        repair(pair.specs[0], pair.master.credentials, verdict.differences)


def test_a_row_whose_key_is_a_float_with_a_long_text(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE measured (f FLOAT PRIMARY KEY, n INT)",
        "INSERT INTO measured VALUES ('-1.4792668866587293e-33', 1), ('-2.03510954832966e-13', 1), (1.5, 1), (0.1, 1)",
    )
    pair.settle()
    unlogged(pair, "UPDATE measured SET n = 2 WHERE f < 1", "DELETE FROM measured WHERE f = 1.5")
    verdict = compare(pair)
    assert [kind for _, kind, _ in found(verdict)] == ["different"] * 3 + ["missing"]
    assert "f='1.5'" in [each.key for each in verdict.differences]
    assert repair(pair.specs[0], pair.master.credentials, verdict.differences) == 4
    assert found(compare(pair)) == []


def test_a_target_that_was_never_filled_cannot_be_compared(pair: Chain) -> None:
    with pytest.raises(PreconditionFailed, match="no position"):
        compare(pair)


def test_a_row_that_is_too_long_to_be_compared_is_no_equal_one(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, body LONGBLOB)", "INSERT INTO t VALUES (1, REPEAT(x'00', 700000))")
    pair.settle()
    pair.stop()
    assert found(compare(pair)) == []
    before = [server.execute("SELECT @@global.max_allowed_packet")[0][0] for server in pair.servers]
    try:
        for server in pair.servers:
            server.execute("SET GLOBAL max_allowed_packet = 1048576")
        with pytest.raises(PreconditionFailed, match="a row of t does not fit") as caught:
            compare(pair)
    finally:
        for server, size in zip(pair.servers, before, strict=True):
            server.execute(f"SET GLOBAL max_allowed_packet = {size}")
    assert "raise max_allowed_packet" in str(caught.value.hint)


def test_a_target_that_is_seeded_meanwhile(pair: Chain) -> None:
    """While it is, it lacks rows: what is found is worth nothing."""
    bank(pair, 5000)
    fill(pair)
    with pytest.raises(PreconditionFailed, match="seeded meanwhile"):
        compare(pair, report=lambda *_: fill(pair, anew=True))


def test_a_row_in_the_way_of_a_repair(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, mail VARCHAR(9) UNIQUE)", "INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    pair.settle()
    unlogged(pair, "UPDATE t SET mail = 'x' WHERE id = 1")
    differences = compare(pair).differences
    unlogged(pair, "UPDATE t SET mail = 'a' WHERE id = 2")
    with pytest.raises(PreconditionFailed, match="Duplicate") as caught:
        repair(pair.specs[0], pair.master.credentials, differences)
    assert "compare again" in str(caught.value.hint)
    assert pair.last.execute("SELECT * FROM t ORDER BY id", database=pair.database) == [(1, "x"), (2, "a")]


def test_a_table_with_triggers_is_not_repaired(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "CREATE TABLE log (id INT)",
        "CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.id)",
        "INSERT INTO t VALUES (1, 1)",
    )
    pair.settle()
    unlogged(pair, "UPDATE t SET n = 2")
    verdict = compare(pair)
    assert found(verdict) == [("t", "different", "id=1")]
    with pytest.raises(PreconditionFailed, match="triggers"):
        repair(pair.specs[0], pair.master.credentials, verdict.differences)
    assert pair.last.execute("SELECT n FROM t", database=pair.database) == [(2,)]


def test_on_the_command_line(chain: Chain, tmp_path: Path) -> None:
    bank(chain, 5000)
    fill(chain, 0)
    fill(chain, 1)
    source = map_file(chain, tmp_path / "map.yaml")
    chain.start()
    chain.settle()
    words = ("verify", "--map", source, "--shard", "shop-0")
    done = shardkit(*words)
    assert done.returncode == 0, done.stderr
    unlogged(chain, *MEDDLING)
    done = shardkit(*words, "--json")
    assert done.returncode == 3, done.stderr
    staging, replica = json.loads(done.stdout)["hops"]
    assert staging["differences"] == []
    assert sorted((each["table"], each["kind"], each["key"]) for each in replica["differences"]) == MEDDLED
    done = shardkit(*words, "--repair")
    assert done.returncode == 4
    assert "accounts: id=4712 is missing" in done.stderr
    done = shardkit(*words, "--repair", "--yes")
    assert done.returncode == 0, done.stderr
    assert "repaired 5 rows" in done.stdout
    wait_for(lambda: shardkit(*words).returncode == 0, "equal again")
    chain.settle()
    chain.assert_equal()
    chain.stop()
    chain.sql("DELETE FROM shardkit_position WHERE hop LIKE 'hop:%'", server=chain.last)
    done = shardkit(*words, "--json")
    assert done.returncode == 4, done.stderr
    assert "was not compared" in done.stderr
    found = json.loads(done.stdout)
    assert [each["hop"] for each in found["hops"]] == [chain.specs[0].name]
    assert list(found["refused"]) == [chain.specs[1].name]


def test_a_column_that_has_a_name_of_the_comparisons_own(pair: Chain) -> None:
    """GROUP BY takes a column before an alias."""
    pair.sql(
        "CREATE TABLE loose (id INT, part INT, checksum INT)",
        "INSERT INTO loose VALUES (1, 1, 1), (2, 1, 1), (3, 1, 1)",
    )
    pair.run(pair.hop(0))
    pair.settle()
    unlogged(pair, "UPDATE loose SET id = 9 WHERE id = 2")
    assert [kind for _, kind, _ in found(compare(pair))] == ["extra", "missing"]


def test_people_are_shown_the_first_differences(pair: Chain, tmp_path: Path) -> None:
    numbers = ", ".join(f"({number})" for number in range(1500))
    for name in ("a", "b"):
        pair.sql(f"CREATE TABLE {name} (id INT PRIMARY KEY)", f"INSERT INTO {name} VALUES {numbers}")
    pair.run(pair.hop(0))
    pair.settle()
    unlogged(pair, "DELETE FROM a WHERE id < 1200", "DELETE FROM b WHERE id < 7")
    words = ("verify", "--map", map_file(pair, tmp_path / "map.yaml"))
    done = shardkit(*words)
    assert done.returncode == 3
    hop = pair.specs[0].name
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{hop}: ")]
    assert len(lines) == 22
    assert lines[-2:] == [f"{hop}: a: 1,180 more (--json has all)", f"{hop}: b: 7 more (--json has all)"]
    assert len(json.loads(shardkit(*words, "--json").stdout)["hops"][0]["differences"]) == 1207
