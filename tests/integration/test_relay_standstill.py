"""Comparing the ends of a hop that stands still while the source goes on: drift is named, what came since is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardkit.errors import Drift, PositionLost, PreconditionFailed
from shardkit_cdc import touched
from shardkit_cdc.comparison import Kind, Verdict
from shardkit_cdc.repair import repair_at
from shardkit_cdc.standstill import Standstill
from shardkit_cdc.touched import Touched
from tests.integration.test_relay_pause import purge
from tests.integration.test_relay_replay import COLUMNS, GENERATED
from tests.integration.test_relay_seed import bank, fill, load, map_file, shardkit
from tests.integration.test_relay_verify import compare, found, unlogged
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]


def followed(pair: Chain) -> None:
    """The bank without the cascade of its moves, on both ends, and the hop at work."""
    bank(pair, 5000)
    pair.sql("ALTER TABLE moves DROP FOREIGN KEY moves_ibfk_1")
    pair.run(pair.hop(0))
    pair.settle()


def stopped(pair: Chain) -> None:
    assert isinstance(pair.failed(), Drift)
    assert pair.last.execute("SELECT error <> '' FROM shardkit_position WHERE error <> ''", database=pair.database)


def mend(pair: Chain, verdict: Verdict) -> int:
    return repair_at(pair.specs[0], pair.master.credentials, verdict)


def go_on(pair: Chain) -> None:
    """As a daemon does that is started again."""
    pair.stop()
    pair.run(pair.hop(0))


def test_a_missing_row_that_stopped_the_hop_and_a_silent_difference_under_load(pair: Chain) -> None:
    followed(pair)
    unlogged(
        pair,
        "DELETE FROM accounts WHERE id = 4712",
        "UPDATE accounts SET note = 'drift' WHERE id = 4711",
        "INSERT INTO accounts VALUES (99999, 1, 'extra')",
        "DELETE FROM accounts WHERE id = 4800",
    )
    with load(pair):
        pair.sql("UPDATE accounts SET balance = 77 WHERE id = 4712")
        stopped(pair)
        for chunk in (300, 2000):
            verdict = compare(pair, chunk=chunk)
            assert found(verdict) == [
                ("accounts", "different", "id=4711"),
                ("accounts", "extra", "id=99999"),
                ("accounts", "missing", "id=4712"),
                ("accounts", "missing", "id=4800"),
            ]
            assert verdict.stopped is not None
            assert "accounts" in verdict.stopped.error or "find record" in verdict.stopped.error
            assert any("accounts changed on the source since the hop stopped" in each for each in verdict.undecided)
        assert mend(pair, verdict) == 4
        go_on(pair)
    pair.settle()
    pair.assert_equal()
    assert compare(pair).stopped is None


def test_a_row_that_is_there_already_and_one_that_was_deleted_again(pair: Chain) -> None:
    followed(pair)
    unlogged(pair, "INSERT INTO accounts VALUES (7000, 5, 'x')", "DELETE FROM accounts WHERE id IN (12, 13)")
    pair.sql("INSERT INTO accounts VALUES (6000, 1, 'y'), (7000, 5, 'x')")  # the very same row: no checksum tells
    stopped(pair)
    pair.sql(
        "DELETE FROM accounts WHERE id = 12",
        "UPDATE accounts SET id = 8000 WHERE id = 13",
        "DELETE FROM accounts WHERE id = 6000",
        "UPDATE accounts SET balance = 3 WHERE id = 14",
        "DELETE FROM accounts WHERE id IN (15, 16)",
        "INSERT INTO accounts VALUES (15, 15, 'again'), (9000, 0, 'new')",
        "UPDATE accounts SET note = 'new' WHERE id = 9000",
    )
    verdict = compare(pair)
    assert found(verdict) == [
        ("accounts", "extra", "id=7000"),
        ("accounts", "missing", "id=12"),
        ("accounts", "missing", "id=13"),
    ]
    # 14 to 16, 8000 and 9000
    assert verdict.undecided == ["5 rows of accounts changed on the source since the hop stopped"]
    assert mend(pair, verdict) == 3
    go_on(pair)
    pair.settle()
    pair.assert_equal()


def test_a_seed_puts_a_stopped_hop_right(pair: Chain) -> None:
    followed(pair)
    unlogged(pair, "DELETE FROM accounts WHERE id = 4712")
    with load(pair):
        pair.sql("UPDATE accounts SET balance = 77 WHERE id = 4712")
        stopped(pair)
        assert fill(pair).kept > 4000
        go_on(pair)
    pair.settle()
    pair.assert_equal()


def test_what_has_changed_since_it_was_compared_is_not_repaired(pair: Chain) -> None:
    followed(pair)
    pair.sql("CREATE TABLE names (name VARCHAR(9) PRIMARY KEY)", "INSERT INTO names VALUES ('a'), ('b')")
    pair.settle()
    unlogged(pair, "DELETE FROM names WHERE name = 'b'", "DELETE FROM accounts WHERE id = 12")
    unlogged(pair, "UPDATE accounts SET note = 'drift' WHERE id = 14")
    pair.sql("UPDATE accounts SET balance = 77 WHERE id = 12")
    stopped(pair)
    verdict = compare(pair)
    assert len(verdict.differences) == 3
    pair.sql("UPDATE accounts SET note = 'new' WHERE id = 14")
    with pytest.raises(PreconditionFailed, match="changed on the source meanwhile"):
        mend(pair, verdict)
    verdict = compare(pair)
    assert found(verdict) == [("accounts", "missing", "id=12"), ("names", "missing", "name='b'")]
    pair.sql("DELETE FROM names WHERE name = 'b'", "DELETE FROM accounts WHERE id = 12")
    assert found(compare(pair)) == found(verdict)  # the log behind the position tells what they were
    assert mend(pair, verdict) == 2
    go_on(pair)
    pair.settle()
    pair.assert_equal()  # the row that drifted has got its new value
    with pytest.raises(PreconditionFailed, match="stood"):
        mend(pair, verdict)


def test_a_hop_that_goes_on_while_it_is_repaired(pair: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    followed(pair)
    unlogged(pair, "DELETE FROM accounts WHERE id = 12")
    pair.sql("UPDATE accounts SET balance = 77 WHERE id = 12")
    stopped(pair)
    verdict = compare(pair)
    read_log = Standstill.read_log

    def and_the_hop_goes_on(still: Standstill, *given: Any) -> Touched:
        pair.sql("UPDATE shardkit_position SET gtid = '' WHERE hop LIKE 'hop:%'", server=pair.last)
        return read_log(still, *given)

    monkeypatch.setattr(Standstill, "read_log", and_the_hop_goes_on)
    with pytest.raises(PreconditionFailed, match="does not stand where it stood"):
        mend(pair, verdict)
    assert pair.last.execute("SELECT id FROM accounts WHERE id = 12", database=pair.database) == []


def test_rows_of_every_type_are_written_as_the_log_has_them(pair: Chain) -> None:
    names = ", ".join(definition.split()[0] for definition, _, _ in COLUMNS)
    insert = f"INSERT INTO types ({names}) VALUES"
    pair.run(pair.hop(0))
    pair.sql(
        "SET sql_mode = 'NO_AUTO_VALUE_ON_ZERO'",
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in COLUMNS)}, {GENERATED})",
        f"{insert} ({', '.join(extreme for _, extreme, _ in COLUMNS)})",
        f"{insert} (2{', NULL' * (len(COLUMNS) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in COLUMNS)})",
    )
    pair.settle()
    unlogged(pair, "CREATE TABLE kept LIKE types", f"INSERT INTO kept ({names}) SELECT {names} FROM types")
    unlogged(pair, "DELETE FROM types")
    pair.sql("UPDATE types SET medium = 9")
    stopped(pair)
    verdict = compare(pair)
    verdict.differences = [each for each in verdict.differences if each.table == "types"]
    assert [each.kind for each in verdict.differences] == [Kind.MISSING] * 3
    assert mend(pair, verdict) == 3
    kept, types = pair.last.execute("CHECKSUM TABLE kept, types", database=pair.database)
    assert kept[1] == types[1]
    unlogged(pair, "DROP TABLE kept")
    go_on(pair)
    pair.settle()
    pair.assert_equal()


def test_a_row_in_the_way_of_a_repair(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, mail VARCHAR(9) UNIQUE)", "INSERT INTO t VALUES (1, 'a'), (2, 'b')")
    pair.settle()
    unlogged(pair, "DELETE FROM t WHERE id = 1", "UPDATE t SET mail = 'a' WHERE id = 2")
    pair.sql("UPDATE t SET mail = 'c' WHERE id = 1")
    stopped(pair)
    pair.sql("UPDATE t SET mail = 'd' WHERE id = 2")
    verdict = compare(pair)
    assert found(verdict) == [("t", "missing", "id=1")]
    with pytest.raises(PreconditionFailed, match="Duplicate") as caught:
        mend(pair, verdict)
    assert "relay seed" in str(caught.value.hint)
    assert pair.last.execute("SELECT id FROM t", database=pair.database) == [(2,)]


def test_tables_that_cannot_be_repaired(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
        "CREATE TABLE log (id INT PRIMARY KEY)",
        "CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.id)",
        "CREATE TABLE loose (n INT)",
        "INSERT INTO t VALUES (1, 1), (2, 2)",
        "INSERT INTO loose VALUES (1), (2)",
    )
    pair.settle()
    unlogged(pair, "DELETE FROM t WHERE id = 1", "DELETE FROM loose WHERE n = 1")
    pair.sql("UPDATE t SET n = 9 WHERE id = 1")
    stopped(pair)
    verdict = compare(pair)
    everything = verdict.differences
    assert len(everything) == 2
    for table, reason in (("t", "triggers"), ("loose", "no primary key")):
        verdict.differences = [each for each in everything if each.table == table]
        with pytest.raises(PreconditionFailed, match=reason):
            mend(pair, verdict)


def test_rows_that_change_while_the_ends_are_compared(pair: Chain) -> None:
    followed(pair)
    unlogged(pair, "DELETE FROM accounts WHERE id = 12")
    pair.sql("UPDATE accounts SET balance = 77 WHERE id = 12", "INSERT INTO accounts VALUES (7000, 5, 'new')")
    stopped(pair)
    changes = ["DELETE FROM accounts WHERE id IN (7, 7000)", "INSERT INTO accounts VALUES (7001, 5, 'newer')"]

    def meanwhile(table: str, rows: int) -> None:
        if table == "accounts" and rows > 5000 and changes:  # all of them have been looked at
            pair.sql(*changes)
            changes.clear()

    assert found(compare(pair, chunk=500, report=meanwhile)) == [("accounts", "missing", "id=12")]
    assert changes == []


def test_keys_that_are_written_in_another_way(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE names (name VARCHAR(20), day DATE, n FLOAT, v INT, PRIMARY KEY (name, day, n))",
        *(f"INSERT INTO names VALUES ('Name {number}', '2026-01-01', 0.1, {number})" for number in range(20)),
        "CREATE TABLE t (id INT PRIMARY KEY)",
    )
    pair.settle()
    unlogged(pair, "INSERT INTO t VALUES (1)", "UPDATE names SET v = 99 WHERE v = 17", "DELETE FROM names WHERE v = 18")
    pair.sql(
        "INSERT INTO t VALUES (1)",
        "UPDATE names SET name = UPPER(name) WHERE v < 5",
        "DELETE FROM names WHERE v = 6",
        "INSERT INTO names VALUES ('NAME 6', '2026-01-01', 0.1, 6)",
        "UPDATE names SET name = 'NAME 18' WHERE v = 18",
    )
    stopped(pair)
    verdict = compare(pair, chunk=3)
    assert found(verdict) == [
        ("names", "different", "name='Name 17', day='2026-01-01', n='0.10000000149011612'"),
        ("names", "missing", "name='NAME 18', day='2026-01-01', n='0.10000000149011612'"),
        ("t", "extra", "id=1"),
    ]


def test_images_without_what_has_not_changed(pair: Chain) -> None:
    followed(pair)
    unlogged(pair, "DELETE FROM accounts WHERE id IN (12, 13)", "UPDATE accounts SET note = 'drift' WHERE id = 14")
    pair.sql("UPDATE accounts SET balance = 77 WHERE id = 12")
    stopped(pair)
    pair.sql(
        "SET binlog_row_image = MINIMAL",
        "UPDATE accounts SET balance = 78 WHERE id IN (13, 15)",
        "DELETE FROM accounts WHERE id = 18",
    )
    verdict = compare(pair)
    assert found(verdict) == [
        ("accounts", "different", "id=14"),
        ("accounts", "missing", "id=12"),
        ("accounts", "missing", "id=13"),
    ]
    with pytest.raises(PreconditionFailed, match="the log does not hold column"):
        mend(pair, verdict)


def test_tables_whose_changes_cannot_be_told_row_by_row(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql(
        "CREATE TABLE parent (id INT PRIMARY KEY, n INT)",
        "CREATE TABLE child (id INT PRIMARY KEY, p INT, FOREIGN KEY (p) REFERENCES parent (id) ON DELETE CASCADE)",
        "CREATE TABLE grandchild (id INT PRIMARY KEY, c INT, FOREIGN KEY (c) REFERENCES child (id) ON DELETE SET NULL)",
        "CREATE TABLE loose (a INT)",
        "CREATE TABLE quiet (a INT)",
        "INSERT INTO parent VALUES (1, 1), (2, 2), (3, 3)",
        "INSERT INTO child VALUES (1, 1), (2, 2)",
        "INSERT INTO grandchild VALUES (1, 1), (2, 2)",
        "INSERT INTO loose VALUES (1), (2)",
        "INSERT INTO quiet VALUES (1), (2)",
    )
    pair.settle()
    unlogged(pair, "DELETE FROM parent WHERE id = 3", "DELETE FROM quiet WHERE a = 2")
    pair.sql("UPDATE parent SET n = 9 WHERE id = 3", "DELETE FROM parent WHERE id = 1", "INSERT INTO loose VALUES (3)")
    pair.sql("INSERT INTO child VALUES (1, 2)")  # gone by the cascade, and made anew
    stopped(pair)
    verdict = compare(pair)
    assert [each[:2] for each in found(verdict)] == [("parent", "missing"), ("quiet", "missing")]
    assert verdict.undecided == [
        "child has changed on the source since the hop stopped",
        "grandchild has changed on the source since the hop stopped",
        "loose has changed on the source since the hop stopped",
        "1 row of parent changed on the source since the hop stopped",
    ]


def test_branches_that_were_prepared_before_and_after(pair: Chain) -> None:
    followed(pair)
    connection = pair.master.connect(pair.database, autocommit=True)

    @contextmanager
    def prepared(name: str, *statements: str) -> Iterator[None]:
        with pair.master.connect(pair.database, autocommit=True).cursor() as cursor:
            for statement in (f"XA START '{name}'", *statements, f"XA END '{name}'", f"XA PREPARE '{name}'"):
                cursor.execute(statement)
            yield
            cursor.execute(f"XA COMMIT '{name}'")

    name = pair.database
    early = "UPDATE accounts SET balance = 55 WHERE id = 100", "INSERT INTO accounts VALUES (6001, 0, 'by XA')"
    late = "UPDATE accounts SET balance = 56 WHERE id = 101", "INSERT INTO accounts VALUES (6002, 0, 'by XA')"
    with connection, prepared(f"{name}-1", *early):
        pair.settle()
        unlogged(pair, "DELETE FROM accounts WHERE id = 4712")
        pair.sql("UPDATE accounts SET balance = 77 WHERE id = 4712")
        stopped(pair)
        with prepared(f"{name}-2", *late):
            assert found(compare(pair)) == [("accounts", "missing", "id=4712")]
    pair.sql("UPDATE accounts SET balance = 57 WHERE id = 6001")
    assert found(compare(pair)) == [("accounts", "missing", "id=4712")]


def test_a_hop_that_nobody_runs(pair: Chain) -> None:
    followed(pair)
    pair.stop()
    unlogged(pair, "UPDATE accounts SET note = 'drift' WHERE id = 4711")
    pair.sql("UPDATE accounts SET balance = 3 WHERE id = 4")
    verdict = compare(pair, patience=0.2)
    assert verdict.stopped is not None
    assert verdict.stopped.error == ""
    assert found(verdict) == [("accounts", "different", "id=4711")]
    assert verdict.undecided == ["1 row of accounts changed on the source since the hop stopped"]


def test_a_hop_that_goes_on_and_is_too_far_behind(pair: Chain) -> None:
    followed(pair)
    pair.stop()
    pair.sql("UPDATE accounts SET balance = 3 WHERE id = 4")
    hop = pair.hop(0)

    def begin(*_: object) -> None:
        if hop not in pair.hops:
            pair.run(hop)
            wait_for(lambda: hop.report.transactions > 0, "it goes on")

    with pytest.raises(PreconditionFailed, match="has gone on"):
        compare(pair, patience=0.2, report=begin)


def test_what_stands_in_the_way(own_pair: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = own_pair
    followed(pair)
    pair.stop()
    pair.sql("UPDATE accounts SET balance = 3 WHERE id < 100")
    with monkeypatch.context() as patch:
        patch.setattr(touched, "MOST_KEYS", 50)
        with pytest.raises(PreconditionFailed, match="more than 50 rows have changed") as caught:
            compare(pair, patience=0.2)
        assert "relay seed" in str(caught.value.hint)
    pair.sql("CREATE TABLE young (id INT PRIMARY KEY)")
    with pytest.raises(PreconditionFailed, match="schema has changed") as caught:
        compare(pair, patience=0.2)
    assert "relay seed" in str(caught.value.hint)
    purge(pair)
    with pytest.raises(PositionLost, match="purged") as lost:
        compare(pair, patience=0.2)
    assert "relay seed" in str(lost.value.hint)


def test_on_the_command_line(chain: Chain, tmp_path: Path) -> None:
    bank(chain, 5000)
    fill(chain, 0)
    fill(chain, 1)
    source = map_file(chain, tmp_path / "map.yaml")
    chain.start()
    chain.settle()
    unlogged(chain, "DELETE FROM accounts WHERE id = 4712", "UPDATE accounts SET note = 'drift' WHERE id = 4711")
    chain.sql("UPDATE accounts SET balance = 77 WHERE id IN (5, 4712)")
    chain.failed(1)
    words = ("verify", "--map", source, "--shard", "shop-0")
    done = shardkit(*words, "--json")
    assert done.returncode == 3, done.stderr
    staging, replica = json.loads(done.stdout)["hops"]
    assert staging["stopped"] is None
    assert replica["stopped"]["error"]
    assert [(each["kind"], each["key"]) for each in replica["differences"]] == [
        ("different", "id=4711"),
        ("missing", "id=4712"),
    ]
    done = shardkit(*words, "--repair", "--yes")
    assert done.returncode == 1, done.stderr  # one row could not be compared
    told = " ".join((done.stdout + done.stderr).split())
    assert "stands still at" in told
    assert "accounts: id=4712 is missing" in told
    assert "1 row of accounts changed on the source since" in told
    assert "repaired 2 rows" in told
    assert "start the relay's daemon again" in told
    chain.stop()
    chain.start()
    chain.settle()
    chain.assert_equal()
