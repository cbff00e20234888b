"""Runners that die, stall, or run twice: nothing is lost and nothing is applied twice."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from shardkit.errors import Fenced, Interrupted
from shardkit_cdc import schema_change
from shardkit_cdc.apply import Applier
from shardkit_cdc.position import Claim, lock_name
from shardkit_cdc.relay import State
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]


def rows(chain: Chain, table: str = "t") -> list[int]:
    return [row[0] for row in chain.last.execute(f"SELECT id FROM {table} ORDER BY id", database=chain.database)]


def test_of_two_runners_at_once_the_older_is_fenced(pair: Chain) -> None:
    older = pair.hop(0, runner="older")
    pair.run(older)
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()
    newer = pair.hop(0, runner="newer")
    pair.run(newer)
    wait_for(lambda: newer.report.state is State.RUNNING, "the newer runner runs")
    pair.sql("INSERT INTO t VALUES (2)")
    wait_for(lambda: older.report.state is State.FENCED, "the older runner notices")
    assert isinstance(older.report.error, Fenced)
    assert "newer" in str(older.report.error)
    pair.hops.remove(older)
    pair.settle()
    pair.assert_equal()


def test_a_runner_whose_position_moved_under_it_changes_nothing(pair: Chain) -> None:
    """The compare-and-set alone, without connections being killed: as if the old runner could not be reached."""
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()
    pair.sql("UPDATE shardkit_position SET epoch = epoch + 1 WHERE hop = 'hop:shop-0'", server=pair.last)
    pair.sql("INSERT INTO t VALUES (2)")
    assert isinstance(pair.failed(), Fenced)
    assert rows(pair) == [1]


def test_a_runner_stalled_inside_a_transaction_is_ended_by_the_next(
    pair: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the position row's lock; a successor that only waited would wait for hours."""
    stalled, resume = threading.Event(), threading.Event()
    finish = Claim.finish

    def stall(claim: Claim, after: object) -> None:
        if not stalled.is_set() and threading.current_thread().name == "stalling":
            stalled.set()
            resume.wait(30)
        finish(claim, after)

    monkeypatch.setattr(Claim, "finish", stall)
    old = pair.hop(0, runner="old")
    thread = threading.Thread(target=old.run, name="stalling")
    thread.start()
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    try:
        assert stalled.wait(30)
        began = time.monotonic()
        pair.run(pair.hop(0, runner="new"))
        pair.settle()
        assert time.monotonic() - began < 20
    finally:
        resume.set()
        old.stop()
        thread.join(30)
    assert not thread.is_alive()
    assert old.report.state in {State.FENCED, State.STOPPED}
    pair.assert_equal()


def test_a_lost_answer_to_commit_is_settled_by_the_position(pair: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit happened, its answer never came: applying the batch again would fail or double it."""
    finish = Claim.finish
    lost: list[int] = []

    def lose(claim: Claim, after: object) -> None:
        finish(claim, after)
        if len(lost) < 3 and threading.current_thread() is not threading.main_thread():
            lost.append(1)
            raise Interrupted("the answer to COMMIT was lost")

    monkeypatch.setattr(Claim, "finish", lose)
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE TABLE loose (id INT)")
    for number in range(20):
        pair.sql(f"INSERT INTO t VALUES ({number})", f"INSERT INTO loose VALUES ({number})")
    pair.settle()
    assert len(lost) == 3
    pair.assert_equal()


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE t ADD n INT DEFAULT 7", "TRUNCATE t", "ALTER TABLE t ADD INDEX twin (id)", "RENAME TABLE t TO u"],
)
def test_a_schema_change_runs_once_when_the_runner_dies_right_after_it(
    pair: Chain, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run = schema_change.SchemaChanger.run
    died: list[str] = []

    def die(changer: schema_change.SchemaChanger, what: object, gtid: object) -> None:
        run(changer, what, gtid)
        if not died and change.encode() == what.query.text:
            died.append(str(gtid))
            raise Interrupted("killed between the schema change and its position")

    monkeypatch.setattr(schema_change.SchemaChanger, "run", die)
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1), (2)", change)
    pair.sql("CREATE TABLE IF NOT EXISTS t (id INT PRIMARY KEY)", "INSERT INTO t (id) VALUES (5)")
    pair.settle()
    assert died
    pair.assert_equal()


def test_a_schema_change_that_did_not_run_is_run_by_the_next(pair: Chain) -> None:
    """The runner dies while its ALTER waits for a reader on the target: the intent is noted, the change is not done."""
    first = pair.hop(0)
    pair.run(first)
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()
    reader = pair.last.connect(pair.database)
    with closing(reader), reader.cursor() as cursor:
        cursor.execute("SELECT * FROM t")
        pair.sql("ALTER TABLE t ADD n INT DEFAULT 3", "INSERT INTO t VALUES (2, 2)")

        def waiting() -> bool:
            return bool(
                pair.last.execute("SELECT 1 FROM information_schema.processlist WHERE state LIKE '%metadata lock%'")
            )

        wait_for(waiting, "the ALTER waits for the reader")
        [(intent, holder)] = pair.last.execute(
            "SELECT ddl_gtid, IS_USED_LOCK(%s) FROM shardkit_position WHERE hop = 'hop:shop-0'",
            lock_name(pair.database, "hop:shop-0"),
            database=pair.database,
        )
        assert intent
        first.stop()
        pair.last.execute(f"KILL {holder}")
        reader.rollback()
    pair.stop()
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def test_servers_that_go_and_come_back(own_pair: Chain) -> None:
    own_pair.run(own_pair.hop(0))
    own_pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "CREATE TABLE loose (id INT)")
    for number, server in enumerate([own_pair.last, own_pair.master, own_pair.last, own_pair.master]):
        for each in range(20):
            own_pair.sql(f"INSERT INTO t VALUES ({number * 100 + each})", f"INSERT INTO loose VALUES ({each})")
        server.kill()
        server.start()
    own_pair.settle()
    own_pair.assert_equal()


def test_a_target_that_stands_still_is_waited_for(own_pair: Chain) -> None:
    own_pair.run(own_pair.hop(0))
    own_pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    own_pair.settle()
    own_pair.last.pause()
    try:
        own_pair.sql("INSERT INTO t VALUES (2)")
    finally:
        own_pair.last.resume()
    own_pair.settle()
    own_pair.assert_equal()


def test_applying_is_shown_to_be_counted_once(pair: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: with a batch applied twice they do."""
    apply = Applier._apply_together

    def twice(applier: Applier, run: object) -> None:
        if len(run) and run[0].transaction.rows and run[0].transaction.rows[0].table.table == "loose":
            run = [*run, *run]
        apply(applier, run)

    monkeypatch.setattr(Applier, "_apply_together", twice)
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE loose (id INT)")
    for number in range(5):
        pair.sql(f"INSERT INTO loose VALUES ({number})")
    pair.settle()
    with pytest.raises(AssertionError):
        pair.assert_equal()
