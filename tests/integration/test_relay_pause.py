"""Hops that an operator pauses and resumes, and hops whose position the source has purged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shardkit import own_tables
from shardkit.gtid import Flavour
from shardkit.shardmap import ShardMap
from shardkit.topology import Shard
from shardkit_cdc import own_schema
from shardkit_cdc.heartbeat import Heartbeat
from shardkit_cdc.pause import LOOK_SECONDS, pause, read_pause, resume
from shardkit_cdc.relay import State
from shardkit_cdc.status import HopStatus, hop_status
from tests.relay_chain import Chain, relay_command, wait_for

pytest_plugins = ["tests.relay_fixtures"]

KEY = "hop:shop-0"


def shard_map(chain: Chain) -> ShardMap:
    master, *copies = [server.endpoint(chain.database).url for server in chain.servers]
    described: dict[str, object] = {"master": master, "replicas": copies[1:] or copies}
    if len(copies) > 1:
        described["staging"] = copies[0]
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "relaypause",
            "version": 1,
            "keyspaces": {"all": {"tables": ["t"], "placement": chain.shard}},
            "shards": {chain.shard: described},
        }
    )


def status(chain: Chain) -> list[HopStatus]:
    shard: Shard = shard_map(chain).shards[chain.shard]
    return hop_status([shard], chain.master.credentials)


def map_file(chain: Chain, path: Path) -> str:
    path.write_text(shard_map(chain).dump())
    return f"file:{path}"


def paused(chain: Chain, index: int = 0) -> None:
    """Pause one hop, as the command does."""
    connection = chain.servers[index + 1].connect(chain.database, autocommit=True)
    with connection:
        assert pause(connection, KEY, by="ops@here")


def resumed(chain: Chain, index: int = 0) -> None:
    connection = chain.servers[index + 1].connect(chain.database, autocommit=True)
    with connection:
        was = resume(connection, KEY)
        assert was is not None
        assert was.by == "ops@here"
        assert resume(connection, KEY) is None


def ids(chain: Chain, index: int) -> list[int]:
    rows = chain.servers[index].execute("SELECT id FROM t ORDER BY id", database=chain.database)
    return [row[0] for row in rows]


def position(chain: Chain, index: int = 1) -> tuple[object, ...]:
    (row,) = chain.servers[index].execute(
        "SELECT gtid, counter, epoch FROM shardkit_position WHERE hop = %s", KEY, database=chain.database
    )
    return row


def test_a_running_hop_is_paused_within_a_second_and_resumed(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()
    hop = pair.hops[0]
    paused(pair)
    began = time.monotonic()
    wait_for(lambda: hop.report.state is State.PAUSED, "the hop rests")
    assert time.monotonic() - began < LOOK_SECONDS + 1.0  # half a second by itself; the rest is a busy machine's
    assert "ops@here" in str(hop.report.pause)
    before = position(pair)
    pair.sql("INSERT INTO t VALUES (2)")
    time.sleep(3 * LOOK_SECONDS)
    assert (ids(pair, 1), position(pair)) == ([1], before)
    (found,) = status(pair)
    assert (found.state, found.paused_by) == ("paused", "ops@here")
    assert found.paused_at is not None
    assert abs(found.paused_at.timestamp() - time.time()) < 60
    assert found.behind is not None
    assert found.behind >= 1
    resumed(pair)
    pair.settle()
    pair.assert_equal()
    assert status(pair)[0].state == "running"
    assert status(pair)[0].paused_by is None


def test_a_pause_outlives_the_runner_and_another_one_keeps_it(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()
    paused(pair)
    wait_for(lambda: pair.hops[0].report.state is State.PAUSED, "the hop rests")
    pair.stop()
    before = position(pair)
    pair.sql("INSERT INTO t VALUES (2)")
    later = pair.hop(0, runner="another")
    pair.run(later)
    wait_for(lambda: later.report.state is State.PAUSED, "the new runner rests too")
    time.sleep(2 * LOOK_SECONDS)
    assert (ids(pair, 1), position(pair)) == ([1], before)  # not even taken over
    resumed(pair)
    pair.settle()
    pair.assert_equal()


def test_a_hop_is_paused_before_it_ever_ran(pair: Chain) -> None:
    own_schema.upgrade(pair.specs[0].target, pair.master.credentials)
    paused(pair)
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    wait_for(lambda: pair.hops[0].report.state is State.PAUSED, "the hop rests")
    assert status(pair)[0].state == "paused"
    assert pair.last.execute("SELECT * FROM shardkit_position", database=pair.database) == []
    resumed(pair)
    pair.settle()
    pair.assert_equal()


def test_pausing_the_hop_into_staging_leaves_the_hop_behind_it_running(chain: Chain) -> None:
    """Both have the same key, each in its own target; the pause of the first stands in the second one's source."""
    chain.start()
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    chain.settle()
    paused(chain, 0)
    wait_for(lambda: chain.hops[0].report.state is State.PAUSED, "the first hop rests")
    chain.sql("INSERT INTO t VALUES (2)", server=chain.servers[1])  # goes on from staging to the replica
    wait_for(lambda: ids(chain, 2) == [1, 2], "the second hop relays")
    assert chain.hops[1].report.state is State.RUNNING
    assert [hop.state for hop in status(chain)] == ["paused", "running"]
    assert chain.last.execute("SELECT * FROM shardkit_pause", database=chain.database) == []


@contextmanager
def in_the_middle(pair: Chain) -> Iterator[None]:
    """A hop held up in the middle of a big transaction for as long as the block runs."""
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, body LONGTEXT)", "INSERT INTO t VALUES (0, '')")
    pair.settle()
    lock = pair.last.connect(pair.database)
    with lock, lock.cursor() as cursor:
        cursor.execute("INSERT INTO t VALUES (40, 'in the way')")
        connection = pair.master.connect(pair.database)
        with connection, connection.cursor() as big:
            for number in range(1, 61):
                big.execute("INSERT INTO t VALUES (%s, REPEAT('x', 500000))", (number,))
            connection.commit()
        wait_for(lambda: _waits_for_a_lock(pair), "the hop is in the middle of the big transaction")
        yield
        time.sleep(LOOK_SECONDS * 1.5)  # long enough that the runner looks as soon as it goes on
        lock.rollback()


def test_a_big_transaction_in_the_middle_is_rolled_back_and_applied_once_afterwards(pair: Chain) -> None:
    with in_the_middle(pair):
        paused(pair)  # does not wait for the position row, which the hop has locked
        assert status(pair)[0].state == "pausing"
    wait_for(lambda: pair.hops[0].report.state is State.PAUSED, "the hop rests")
    assert ids(pair, 1) == [0]
    resumed(pair)
    pair.settle()
    pair.assert_equal()


def test_looking_for_a_pause_leaves_a_big_transaction_whole(pair: Chain) -> None:
    with in_the_middle(pair):
        pass
    pair.settle()
    pair.assert_equal()


def _waits_for_a_lock(pair: Chain) -> bool:
    time.sleep(0.15)  # InnoDB shows the same picture again to whoever asks more often than every 0.1 s
    return bool(pair.last.execute("SELECT 1 FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"))


def test_own_tables_of_an_older_version_pause_nothing(pair: Chain) -> None:
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection:
        assert read_pause(connection, KEY) is None


def test_pause_and_resume_on_the_command_line(chain: Chain, tmp_path: Path) -> None:
    source = map_file(chain, tmp_path / "map.yaml")
    chain.start()
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    chain.settle()
    first, second = (spec.name for spec in chain.specs)
    done = relay_command("pause", second, "--map", source, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["hops"]
    assert (row["hop"], row["changed"], row["at_rest"]) == (second, True, True)
    assert f"hop {second} paused by " in done.stderr  # the audit log
    assert chain.hops[1].report.state in {State.STARTING, State.PAUSED}
    again = relay_command("pause", "--shard", chain.shard, "--map", source, "--json")
    assert [row["changed"] for row in json.loads(again.stdout)["hops"]] == [True, False]
    shown = relay_command("status", "--map", source)
    assert shown.returncode == 0
    assert shown.stdout.count("paused") == 2
    assert f"{first}: paused by " in shown.stderr
    done = relay_command("resume", "--shard", chain.shard, "--map", source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumed") == 2
    assert "resumed by" in done.stderr
    chain.settle()
    assert relay_command("resume", first, "--map", source).stdout.count("not paused") == 1
    unknown = relay_command("pause", "shop-0/nowhere:1", "--map", source)
    assert unknown.returncode == 4
    assert first in unknown.stderr
    assert relay_command("pause", "--map", source).returncode == 2
    assert relay_command("pause", first, "--shard", chain.shard, "--map", source).returncode == 2


def test_a_shard_that_is_paused_in_part_says_where_it_is_not(own_chain: Chain, tmp_path: Path) -> None:
    source = map_file(own_chain, tmp_path / "map.yaml")
    own_chain.last.stop()
    done = relay_command("pause", "--shard", own_chain.shard, "--map", source)
    assert done.returncode == 5, done.stderr
    assert f"not for {own_chain.specs[1].name}" in done.stderr
    connection = own_chain.servers[1].connect(own_chain.database, autocommit=True)
    with connection:
        assert read_pause(connection, KEY) is not None


# --- what the source still has


def purge(chain: Chain) -> None:
    """Purge everything that the master has logged so far."""
    chain.master.execute("FLUSH BINARY LOGS")
    last = chain.master.execute("SHOW BINARY LOGS")[-1][0]

    def purged() -> bool:
        chain.master.execute(f"PURGE BINARY LOGS TO '{last}'")
        return len(chain.master.execute("SHOW BINARY LOGS")) == 1

    wait_for(purged, "the log is purged")


def test_a_purged_position_needs_a_reseed(own_pair: Chain, tmp_path: Path) -> None:
    pair = own_pair
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.settle()
    pair.stop()
    purge(pair)
    assert status(pair)[0].state == "stopped"  # what is purged has been applied
    pair.sql("INSERT INTO t VALUES (1)")
    purge(pair)
    (found,) = status(pair)
    assert found.state == "needs reseed"
    assert "relay seed" in found.error
    assert pair.master.endpoint(pair.database).address in found.error
    assert found.retention_left is None
    shown = relay_command("status", "--map", map_file(pair, tmp_path / "map.yaml"))
    assert shown.returncode == 1
    assert "needs reseed" in shown.stdout
    pair.run(pair.hop(0))
    error = pair.failed()
    assert "relay seed" in str(error)
    assert "reseed" in str(error)
    assert status(pair)[0].state == "needs reseed"


def test_a_paused_hop_whose_position_is_purged_needs_a_reseed(own_pair: Chain) -> None:
    pair = own_pair
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.settle()
    paused(pair)
    wait_for(lambda: pair.hops[0].report.state is State.PAUSED, "the hop rests")
    pair.sql("INSERT INTO t VALUES (1)")
    purge(pair)
    (found,) = status(pair)
    assert (found.state, found.paused_by) == ("needs reseed", "ops@here")


def test_how_much_of_the_log_is_left(own_pair: Chain, tmp_path: Path) -> None:
    pair = own_pair
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    heartbeat = Heartbeat(pair.shard, pair.master.endpoint(pair.database), pair.master.credentials)
    pair.run_task(heartbeat)
    wait_for(lambda: status(pair)[0].lag_seconds is not None, "the heartbeat arrives")
    _keep(pair, 0)
    assert status(pair)[0].retention_left is None  # for ever: there is no limit in time
    _keep(pair, 100_000)
    (found,) = status(pair)
    assert found.retention_left is not None
    assert 99_900 < found.retention_left <= 100_000
    assert "1 d 3 h" in relay_command("status", "--map", map_file(pair, tmp_path / "map.yaml")).stdout
    pair.stop()
    # as if nothing had arrived for a day
    connection = pair.last.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        cursor.execute(f"UPDATE {own_tables.heartbeat.name} SET written_at = written_at - 86400 * 1000000")
    left = status(pair)[0].retention_left
    assert left is not None
    assert 13_000 < left < 13_600


def _keep(pair: Chain, seconds: int) -> None:
    pair.master.execute(f"SET GLOBAL binlog_expire_logs_seconds = {seconds}")


def test_an_account_that_may_not_see_the_log_files_gets_the_rest(pair: Chain) -> None:
    if pair.flavour is not Flavour.MARIADB:
        pytest.skip("MySQL shows gtid_purged to everybody")
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.settle()
    pair.master.execute("CREATE USER reader@'%' IDENTIFIED BY ''")
    pair.master.execute(f"GRANT SELECT ON {pair.database}.* TO reader@'%'")
    try:
        shard = shard_map(pair).shards[pair.shard]
        own = pair.master.credentials
        account = type(own(shard.master))("reader", "")
        (found,) = hop_status([shard], lambda endpoint: account if endpoint == shard.master else own(endpoint))
        assert found.state == "running"
        assert found.behind is not None
    finally:
        pair.master.execute("DROP USER reader@'%'")
