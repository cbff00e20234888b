"""Skipping the one transaction that a hop has stopped at; refused wherever a hop does not stand exactly there."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from shardkit.errors import Fenced, PositionLost, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.shardmap import ShardMap
from shardkit_cdc import skip as skipping
from shardkit_cdc.position import Claim
from shardkit_cdc.relay import State
from shardkit_cdc.skip import Skippable, look
from tests.relay_chain import Chain, relay_command, wait_for

pytest_plugins = ["tests.relay_fixtures"]

KEY = "hop:shop-0"


def stopped_at(chain: Chain, index: int = 0) -> str:
    """The GTID at which a hop has stopped."""
    found = re.search(r"\(at (\S+)\)", str(chain.failed(index)))
    assert found is not None, chain.hops[index].report
    return found[1]


def seen(chain: Chain, gtid: str, index: int = 0) -> Skippable:
    return look(chain.specs[index], chain.master.credentials, gtid, cluster="test")


def skip(chain: Chain, gtid: str, index: int = 0) -> Skippable:
    chosen = seen(chain, gtid, index)
    skipping.skip(chosen, chain.master.credentials, by="ops@here")
    return chosen


def ids(chain: Chain, table: str = "t", index: int = -1) -> list[int]:
    rows = chain.servers[index].execute(f"SELECT id FROM {table} ORDER BY id", database=chain.database)
    return [row[0] for row in rows]


def row(chain: Chain) -> tuple[object, ...]:
    (found,) = chain.last.execute(
        "SELECT gtid, epoch, counter, error FROM shardkit_position WHERE hop = %s", KEY, database=chain.database
    )
    return found


def prepared(chain: Chain) -> None:
    """A relayed table on both ends, whose target somebody then writes to."""
    chain.run(chain.hop(0))
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)", "INSERT INTO t VALUES (1, 1)")
    chain.settle()


def in_the_way(chain: Chain) -> str:
    """Stop the hop with a duplicate key; the transactions before and behind it are good. Where it stopped."""
    prepared(chain)
    chain.stop()
    chain.sql("INSERT INTO t VALUES (3, 0)", server=chain.last)
    chain.sql("INSERT INTO t VALUES (2, 2)", "INSERT INTO t VALUES (3, 3)", "INSERT INTO t VALUES (4, 4)")
    chain.run(chain.hop(0))
    return stopped_at(chain)


def test_exactly_the_transaction_at_fault_is_skipped(pair: Chain, caplog: pytest.LogCaptureFixture) -> None:
    gtid = in_the_way(pair)
    pair.stop()
    assert ids(pair) == [1, 2, 3]
    chosen = seen(pair, gtid)
    assert chosen.transaction.tables == {f"{pair.database}.t": 1}
    plan = "\n".join(chosen.plan)
    assert gtid in plan
    assert f"{pair.database}.t: 1 row events" in plan
    assert "Duplicate" in plan or "1062" in plan
    before = row(pair)
    with caplog.at_level(logging.INFO, "shardkit.audit"):
        skipping.skip(chosen, pair.master.credentials, by="ops@here")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "shardkit.audit"]
    assert gtid in line
    assert "ops@here" in line
    after = row(pair)
    assert after[1] == before[1] + 1  # the epoch: an old runner that wakes up is fenced
    assert after[3] == ""
    pair.run(pair.hop(0))
    pair.settle()
    found = pair.last.execute("SELECT id, n FROM t ORDER BY id", database=pair.database)
    assert found == [(1, 1), (2, 2), (3, 0), (4, 4)]


def test_a_statement_that_changed_rows(pair: Chain) -> None:
    """The reader refuses it: the transaction never comes to be one."""
    prepared(pair)
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION binlog_format = 'STATEMENT'")
        cursor.execute("UPDATE t SET n = 2 WHERE id = 1")
        cursor.execute("SET SESSION binlog_format = 'ROW'")
        cursor.execute("INSERT INTO t VALUES (2, 2)")
    gtid = stopped_at(pair)
    pair.stop()
    chosen = skip(pair, gtid)
    assert any("UPDATE t SET n = 2" in statement for statement in chosen.transaction.statements)
    pair.run(pair.hop(0))
    pair.settle()
    assert pair.last.execute("SELECT id, n FROM t ORDER BY id", database=pair.database) == [(1, 1), (2, 2)]


def test_a_schema_change_that_the_target_refuses(pair: Chain) -> None:
    prepared(pair)
    pair.sql("CREATE TABLE u (id INT PRIMARY KEY)", server=pair.last)
    pair.sql("CREATE TABLE u (id INT PRIMARY KEY)", "INSERT INTO u VALUES (5)", "ALTER TABLE t ADD k INT")
    gtid = stopped_at(pair)
    pair.stop()
    chosen = skip(pair, gtid)
    assert chosen.transaction.statements == ["CREATE TABLE u (id INT PRIMARY KEY)"]
    assert not chosen.schema_changed
    assert chosen.transaction.whole
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()  # the table that was there is the same: nothing was lost


def test_a_big_transaction_is_skipped_as_a_whole(pair: Chain) -> None:
    prepared(pair)
    pair.sql("CREATE TABLE big (id INT PRIMARY KEY, body LONGTEXT)")
    pair.settle()
    pair.sql("INSERT INTO big VALUES (7, '')", server=pair.last)
    connection = pair.master.connect(pair.database)
    with connection, connection.cursor() as cursor:
        for number in range(10):  # 10 MB: it comes in parts
            cursor.execute("INSERT INTO big VALUES (%s, REPEAT('x', 1000000))", (number,))
        connection.commit()
    pair.sql("INSERT INTO big VALUES (100, '')")
    gtid = stopped_at(pair)
    pair.stop()
    chosen = skip(pair, gtid)
    assert chosen.transaction.tables == {f"{pair.database}.big": 10}
    pair.run(pair.hop(0))
    pair.settle()
    assert ids(pair, "big") == [7, 100]


def test_other_databases_transactions_before_it_are_no_obstacle(pair: Chain) -> None:
    prepared(pair)
    pair.stop()
    other = f"{pair.database}_other"
    pair.master.execute(f"CREATE DATABASE {other}")
    try:
        pair.master.execute(f"CREATE TABLE {other}.t (id INT PRIMARY KEY)")
        pair.sql("INSERT INTO t VALUES (2, 0)", server=pair.last)
        for number in range(5):
            pair.master.execute(f"INSERT INTO {other}.t VALUES ({number})")
        pair.sql("INSERT INTO t VALUES (2, 2)", "INSERT INTO t VALUES (3, 3)")
        pair.run(pair.hop(0))
        gtid = stopped_at(pair)
        pair.stop()
        skip(pair, gtid)
        pair.run(pair.hop(0))
        pair.settle()
        assert ids(pair) == [1, 2, 3]
    finally:
        pair.master.execute(f"DROP DATABASE {other}")


def test_the_end_of_an_xa_branch_takes_its_rows_along(pair: Chain) -> None:
    prepared(pair)
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        for statement in ("XA START 'a'", "INSERT INTO t VALUES (2, 2)", "XA END 'a'", "XA PREPARE 'a'"):
            cursor.execute(statement)
    pair.settle()
    assert pair.last.execute("SELECT COUNT(*) FROM shardkit_prepared", database=pair.database) == [(1,)]
    pair.sql("INSERT INTO t VALUES (2, 0)", server=pair.last)
    pair.master.execute("XA COMMIT 'a'")
    gtid = stopped_at(pair)
    pair.stop()
    assert skip(pair, gtid).transaction.ends_branch
    assert pair.last.execute("SELECT COUNT(*) FROM shardkit_prepared", database=pair.database) == [(0,)]
    pair.run(pair.hop(0))
    # the same name again: what was left of the first one would be in the way
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        for statement in (
            "XA START 'a'",
            "INSERT INTO t VALUES (9, 9)",
            "XA END 'a'",
            "XA PREPARE 'a'",
            "XA COMMIT 'a'",
        ):
            cursor.execute(statement)
    pair.settle()
    assert ids(pair) == [1, 2, 9]


def test_a_hop_into_staging_takes_the_replicas_along(chain: Chain) -> None:
    chain.start()
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)", "INSERT INTO t VALUES (1, 1)")
    chain.settle()
    chain.sql("INSERT INTO t VALUES (2, 0)", server=chain.servers[1])  # and by the log of staging on the replica
    wait_for(lambda: ids(chain) == [1, 2], "the second hop relays")
    chain.sql("INSERT INTO t VALUES (2, 2)", "INSERT INTO t VALUES (3, 3)")
    gtid = stopped_at(chain)
    assert "whatever is filled from this target" in "\n".join(skip(chain, gtid).plan)
    chain.hops.pop(0)
    chain.run(chain.hop(0))
    chain.settle()
    assert chain.contents(chain.servers[1])["t"] == chain.contents(chain.last)["t"]
    assert ids(chain) == [1, 2, 3]


# --- refused


def refused(chain: Chain, gtid: str, words: str) -> None:
    """Skipping is refused, and nothing has changed."""
    before = row(chain)
    with pytest.raises(PreconditionFailed, match=words) as caught:
        skip(chain, gtid)
    assert caught.value.exit_code == 4
    assert row(chain) == before


def some_gtid(chain: Chain) -> str:
    return "0-1-1" if chain.flavour is Flavour.MARIADB else "3e11fa47-71ca-11e1-9e33-c80aa9429562:1"


def test_refused_for_a_hop_that_never_ran(pair: Chain) -> None:
    with pytest.raises(PreconditionFailed, match="never run"):
        skip(pair, some_gtid(pair))


def test_refused_for_a_hop_that_runs(pair: Chain) -> None:
    prepared(pair)
    last = _newest(pair)
    refused(pair, last, "is run by pytest now")
    assert pair.hops[0].report.state is State.RUNNING


def _newest(pair: Chain) -> str:
    """The GTID of the newest transaction of the master."""
    text = str(pair.end_of_log())
    if pair.flavour is Flavour.MARIADB:
        return text.split(",")[0]
    return re.sub(r":(?:\d+-)?(\d+)$", r":\1", text.split(",")[0])


def test_refused_for_a_hop_that_was_stopped(pair: Chain) -> None:
    prepared(pair)
    pair.stop()
    pair.sql("INSERT INTO t VALUES (2, 2)")
    refused(pair, _newest(pair), "has not failed")


def test_refused_for_any_other_transaction(pair: Chain) -> None:
    gtid = in_the_way(pair)
    pair.stop()
    refused(pair, _newest(pair), f"did not stop at .*{re.escape(gtid)}")
    refused(pair, some_gtid(pair), "did not stop at")
    for text in ("", "nonsense", f"{gtid},{some_gtid(pair)}"):
        refused(pair, text, "give the GTID that|is not|twice")
    pair.sql(f"UPDATE shardkit_position SET error = 'x (at {_newest(pair)})' WHERE hop = '{KEY}'", server=pair.last)
    refused(pair, _newest(pair), f"what comes next for it is {re.escape(gtid)}")
    assert ids(pair) == [1, 2, 3]


def test_refused_where_the_source_has_nothing_more(pair: Chain) -> None:
    prepared(pair)
    pair.stop()
    gtid = _newest(pair)
    pair.sql(f"UPDATE shardkit_position SET error = 'x (at {gtid})' WHERE hop = '{KEY}'", server=pair.last)
    refused(pair, gtid, "nothing more")


def test_refused_where_the_log_is_purged(own_pair: Chain) -> None:
    gtid = in_the_way(own_pair)
    own_pair.stop()
    own_pair.master.execute("FLUSH BINARY LOGS")
    last = own_pair.master.execute("SHOW BINARY LOGS")[-1][0]

    def purged() -> bool:
        own_pair.master.execute(f"PURGE BINARY LOGS TO '{last}'")
        return len(own_pair.master.execute("SHOW BINARY LOGS")) == 1

    wait_for(purged, "the log is purged")
    with pytest.raises(PositionLost, match="relay seed"):
        skip(own_pair, gtid)


def test_fenced_when_a_runner_came_between_looking_and_skipping(pair: Chain) -> None:
    gtid = in_the_way(pair)
    pair.stop()
    chosen = seen(pair, gtid)
    pair.run(pair.hop(0, runner="another"))
    assert stopped_at(pair) == gtid  # it has failed at the same place, in an epoch of its own
    pair.stop()
    with pytest.raises(Fenced, match="another"):
        skipping.skip(chosen, pair.master.credentials, by="ops@here")
    assert "Duplicate" in str(row(pair)[3]) or "1062" in str(row(pair)[3])
    pair.sql("DELETE FROM t WHERE id = 3", server=pair.last)
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def test_refused_when_a_runner_runs_by_the_time_of_skipping(pair: Chain) -> None:
    gtid = in_the_way(pair)
    pair.stop()
    chosen = seen(pair, gtid)
    pair.sql("DELETE FROM t WHERE id = 3", server=pair.last)
    pair.run(pair.hop(0))
    pair.settle()
    with pytest.raises(PreconditionFailed, match="is run by"):
        skipping.skip(chosen, pair.master.credentials, by="ops@here")
    pair.settle()
    assert pair.hops[0].report.state is State.RUNNING
    pair.assert_equal()


def test_a_position_that_moved_without_the_epoch_stays(pair: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    gtid = in_the_way(pair)
    pair.stop()
    chosen = seen(pair, gtid)
    pair.sql(f"UPDATE shardkit_position SET gtid = '{chosen.after}' WHERE hop = '{KEY}'", server=pair.last)
    with pytest.raises(PreconditionFailed, match="has moved"):
        skipping.skip(chosen, pair.master.credentials, by="ops@here")
    take = Claim.take

    def taken_then_moved(*words: object, **settings: object) -> Claim:
        claim = take(*words, **settings)
        pair.sql(f"UPDATE shardkit_position SET epoch = epoch + 1 WHERE hop = '{KEY}'", server=pair.last)
        return claim

    pair.sql(f"UPDATE shardkit_position SET gtid = '{chosen.before}', epoch = {chosen.epoch}", server=pair.last)
    monkeypatch.setattr(Claim, "take", taken_then_moved)
    with pytest.raises(Fenced):
        skipping.skip(chosen, pair.master.credentials, by="ops@here")
    assert row(pair)[0] == str(chosen.before)


# --- the command line


def test_skip_on_the_command_line(pair: Chain, tmp_path: Path) -> None:
    gtid = in_the_way(pair)
    master, target = (server.endpoint(pair.database).url for server in pair.servers)
    source = tmp_path / "map.yaml"
    source.write_text(
        ShardMap.parse(
            {
                "format": 1,
                "cluster": "relayskip",
                "version": 1,
                "keyspaces": {"all": {"tables": ["t"], "placement": pair.shard}},
                "shards": {pair.shard: {"master": master, "replicas": [target]}},
            }
        ).dump()
    )
    words = ["skip", pair.specs[0].name, "--at", gtid, "--map", f"file:{source}"]
    asked = relay_command(*words)
    assert asked.returncode == 4, asked.stderr
    assert f"{pair.database}.t: 1 row events" in asked.stderr  # what would be skipped
    assert "nothing was changed" in asked.stderr
    done = relay_command(*words, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["skipped"], told["tables"]) == (gtid, {f"{pair.database}.t": 1})
    assert "skipped by " in done.stderr
    pair.stop()
    pair.run(pair.hop(0))
    pair.settle()
    assert ids(pair) == [1, 2, 3, 4]
    again = relay_command(*words, "--yes")
    assert again.returncode == 4
    assert "is run by" in again.stderr
