"""Promotion under load: what was acknowledged is there, nobody writes to the old master, and a loss is told exactly."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pymysql
import pytest

from shardkit.cluster import Cluster
from shardkit.gtid import Flavour, parse_position
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import ReplicationKind
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD, run
from tests.promotion_stage import APP, DATABASE, Stage, Writers, open_stage, refused, wait_until

pytestmark = [getattr(pytest.mark, FLAVOUR)]


@pytest.fixture(params=[ReplicationKind.RELAY, ReplicationKind.NATIVE])
def stage(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Stage]:
    with open_stage(request.param, tmp_path) as made:
        yield made


def test_no_acknowledged_write_is_lost(stage: Stage) -> None:
    with stage.clients() as cluster, Writers(cluster) as writers:
        writers.go_on()
        done = stage.promoted()
        writers.go_on()
        assert refused(stage.master)
    new = stage.server_at(stage.shard.master)
    assert new is not stage.master
    missing = writers.acknowledged - stage.entries(new)
    assert not missing, (len(missing), sorted(missing)[:5], done)
    assert writers.longest_gap < 10.0
    assert done["loss"] is None
    assert stage.shard.epoch == 1
    (follower,) = stage.shard.replicas
    wait_until(lambda: writers.acknowledged <= stage.entries(stage.server_at(follower)))
    assert stage.entries(stage.server_at(follower)) == stage.entries(new)
    assert (stage.shard.staging is not None) == (stage.kind is ReplicationKind.RELAY)


def test_what_a_dead_master_takes_along_is_told(stage: Stage) -> None:
    with stage.clients() as cluster, Writers(cluster) as writers:
        writers.go_on()
        hold_back(stage)
        writers.go_on()
        stage.master.kill()
        let_go(stage)
        code, refusal, _ = stage.run("promote", SHARD, "--yes")
        assert code == 4
        assert "does not answer" in refusal["error"]["message"]
        assert stage.shard.epoch == 0
        done = stage.promoted("--force")
        writers.go_on()
    new = stage.server_at(stage.shard.master)
    loss = done["loss"]
    flavour = Flavour(FLAVOUR)
    has = parse_position(flavour, loss["has_position"])
    assert loss["missing"] == 0
    assert has.covers(parse_position(flavour, loss["known_position"]))
    (follower,) = stage.shard.replicas
    wait_until(lambda: stage.entries(new) == stage.entries(stage.server_at(follower)))
    # what the dead master's own log says of it
    lost = writers.acknowledged - stage.entries(new)
    stage.master.start()
    after = stage.entries(stage.master)
    end = _end(stage.master)
    assert lost <= after
    assert end.covers(has)
    assert 0 < len(lost) <= end.ahead_of(has)


def test_a_master_that_dies_while_it_sends_a_transaction(tmp_path: Any) -> None:
    with open_stage(ReplicationKind.NATIVE, tmp_path) as stage:
        stage.master.execute("CREATE TABLE big (text LONGTEXT)", database=DATABASE)
        replica = stage.replica()
        wait_until(lambda: bool(replica.execute("SHOW TABLES LIKE 'big'", database=DATABASE)))
        sender = threading.Thread(target=_send_much, args=(stage.master,))
        sender.start()
        with closing(replica.connect()) as connection:
            while _received(connection) < 10_000_000:
                pass
            stage.master.kill()
            sender.join()
            assert _received(connection) < 145_000_000, "the whole transaction was received"
        done = stage.promoted("--force")
        new = stage.server_at(stage.shard.master)
        assert new.execute("SELECT COUNT(*) FROM big", database=DATABASE) == [(0,)]
        assert done["follow"] == [stage.shard.replicas[0].url]
        new.execute("INSERT INTO entries VALUES (999, 1)", database=DATABASE)
        wait_until(lambda: (999, 1) in stage.entries(stage.server_at(stage.shard.replicas[0])))


def _send_much(master: LocalDatabaseServer) -> None:
    """One transaction of 150 MB."""
    rows = "SELECT REPEAT('x', 1000000) FROM information_schema.columns LIMIT 150"
    with suppress(pymysql.MySQLError):
        master.execute(f"INSERT INTO big {rows}", database=DATABASE)


def _received(connection: Any) -> int:
    """Bytes in a replica's relay log."""
    with connection.cursor(pymysql.cursors.DictCursor) as cursor:
        cursor.execute("SHOW SLAVE STATUS" if FLAVOUR == "mariadb" else "SHOW REPLICA STATUS")
        (row,) = cursor.fetchall()
        return int(row["Relay_Log_Space"])


def test_staging_in_its_masters_place_and_then_a_replica_of_it(tmp_path: Any) -> None:
    with open_stage(ReplicationKind.RELAY, tmp_path) as stage:
        staging, replicas = stage.shard.staging, stage.shard.replicas
        assert staging is not None
        with stage.clients() as cluster, Writers(cluster) as writers:
            for wanted in (staging.url, replicas[0].url):
                writers.go_on()
                done = stage.promoted(wanted)
                assert done["new"] == wanted
                assert done["follow"] == [each.url for each in replicas if each.url != wanted]
                assert stage.shard.staging is None
                writers.go_on()
        new = stage.server_at(replicas[0])
        assert writers.acknowledged <= stage.entries(new)
        wait_until(lambda: stage.entries(stage.server_at(replicas[1])) == stage.entries(new))
        log = (tmp_path / "relay.log").read_text()
        assert "running" in log
        assert "failed" not in log
        assert "fenced" not in log


def test_clients_are_shown_nothing_older_through_a_promotion(stage: Stage) -> None:
    """The copies' positions are those of another log from then on: numbers that must not be taken for the old ones."""

    def promotion(done: threading.Event) -> None:
        done.wait(1.0)
        stage.promoted()

    if stage.kind is ReplicationKind.NATIVE and FLAVOUR == "mariadb":  # where it says what it has applied
        stage.master.execute(f"GRANT SELECT ON mysql.gtid_slave_pos TO '{APP}'")
    with stage.clients() as cluster:
        story = run(cluster, 3_000, faults=promotion, seconds=90.0)
        assert not story.violations, (story.violations[:5], story.counts)
        assert story.operations >= 3_000, story.counts
        assert _read_on_replicas(cluster) > 1_000
        before = _read_on_replicas(cluster)
        run(cluster, 500)
        assert _read_on_replicas(cluster) > before + 100
    assert stage.shard.epoch == 1


def _read_on_replicas(cluster: Cluster) -> float:
    return (
        cluster.metrics.registry.get_sample_value("shardkit_router_replica_transactions_total", {"shard": SHARD}) or 0.0
    )


def hold_back(stage: Stage) -> None:
    """From now on nothing that is written on the master leaves it."""
    if stage.kind is ReplicationKind.RELAY:
        stage.relay.kill()
        return
    for number in range(2):
        stage.replica(number).execute(f"STOP {'SLAVE' if FLAVOUR == 'mariadb' else 'REPLICA'} IO_THREAD")


def let_go(stage: Stage) -> None:
    if stage.kind is ReplicationKind.RELAY:
        stage.relay.start()
        return
    for number in range(2):
        stage.replica(number).execute(f"START {'SLAVE' if FLAVOUR == 'mariadb' else 'REPLICA'}")


def _end(server: LocalDatabaseServer) -> Any:
    variable = "gtid_binlog_pos" if FLAVOUR == "mariadb" else "gtid_executed"
    ((text,),) = server.execute(f"SELECT @@global.{variable}")
    return parse_position(Flavour(FLAVOUR), text)


def test_a_promotion_that_is_killed_goes_on_with_the_same_command(stage: Stage) -> None:
    chance = random.Random(FLAVOUR)
    target = stage.shard.replicas[0].url
    with stage.clients() as cluster, Writers(cluster) as writers:
        writers.go_on()
        kills = 0
        while stage.shard.epoch == 0 and kills < 8:
            process = stage.command("promote", SHARD, target, "--yes")
            end = time.monotonic() + chance.uniform(0.8, 2.2)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate()
        stage.promoted(target)
        writers.go_on()
        assert refused(stage.master)
    assert kills > 0
    assert stage.shard.master.url == target
    assert stage.shard.epoch == 1
    new = stage.server_at(stage.shard.master)
    assert writers.acknowledged <= stage.entries(new)
    (follower,) = stage.shard.replicas
    wait_until(lambda: stage.entries(stage.server_at(follower)) == stage.entries(new))


def test_promoted_twice(stage: Stage) -> None:
    """One after the other: the rest follows."""
    with stage.clients() as cluster, Writers(cluster) as writers:
        writers.go_on()
        stage.promoted()
        writers.go_on()
        stage.promoted()
        writers.go_on()
    assert stage.shard.epoch == 2
    assert writers.acknowledged <= stage.entries(stage.server_at(stage.shard.master))
