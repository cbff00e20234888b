"""``shardkit shard``: what it shows, what it refuses, what it undoes, and transactions that wait for a new master."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pymysql
import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.credentials import Credentials
from shardkit.decisions import BranchId, new_transaction
from shardkit.errors import PreconditionFailed, ShardUnreachable, StaleShardMap
from shardkit.failover import make_plan, promote
from shardkit.failover import promote as promote_module
from shardkit.mapstore import open_store
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalCluster
from shardkit.topology import ReplicationKind, Role
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD, Base, Entry, lists_map
from tests.promotion_stage import APP, DATABASE, Stage, cut_short, open_stage, refused, wait_until

pytestmark = [getattr(pytest.mark, FLAVOUR)]


@pytest.fixture(scope="module", params=[ReplicationKind.RELAY, ReplicationKind.NATIVE])
def steady(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """For tests that leave the master where it is."""
    with open_stage(request.param, tmp_path_factory.mktemp("steady")) as made:
        yield made


@pytest.fixture(params=[ReplicationKind.RELAY, ReplicationKind.NATIVE])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    with open_stage(request.param, tmp_path) as made:
        yield made


def insert(stage: Stage, owner: int) -> None:
    """A write by an application's account, past shardkit."""
    server = stage.server_at(stage.shard.master)
    with closing(server.connect(DATABASE, user=APP, password=APP, autocommit=True)) as connection:
        connection.cursor().execute("INSERT INTO entries VALUES (%s, 1)", (owner,))


# --- what it shows and refuses


def test_list_shows_every_database(steady: Stage) -> None:
    code, document, said = steady.run("list")
    assert code == 0, said
    found = {(each["role"], each["endpoint"]): each for each in document["databases"]}
    assert set(found) == {(role.value, endpoint.url) for role, endpoint in steady.shard.endpoints()}
    for (role, _), each in found.items():
        assert each["reachable"]
        assert each["position"]
        assert each["replicating"] == (role != "master")
        assert (each["lag_seconds"] is None) == (role == "master")


def test_a_database_that_does_not_let_us_in_is_not_called_writable(steady: Stage) -> None:
    steady.account = Credentials("nobody-there", "wrong")
    try:
        code, document, _ = steady.run("list")
        promote_code, refusal, _ = steady.run(
            "promote", SHARD, f"mysql://root:Geheim@{steady.shard.replicas[0].address}/x"
        )
    finally:
        steady.account = None
    assert code == 1
    assert {each["read_only"] for each in document["databases"]} == {None}
    assert all("refused the user" in each["error"] for each in document["databases"])
    assert promote_code == 4
    assert "no user and no password" in refusal["error"]["message"]
    assert "Geheim" not in str(refusal)


def test_a_dry_run_changes_nothing(steady: Stage) -> None:
    before = steady.source.read_text()
    code, document, _ = steady.run("promote", SHARD, "--dry-run")
    assert code == 0
    assert document["promoted"] is False
    assert document["new"] in {each.url for each in steady.shard.replicas}
    assert list(document["removed"]) == [steady.shard.master.url]
    staging = [steady.shard.staging.url] if steady.shard.staging else []
    assert document["follow"] == [
        *staging,
        *(each.url for each in steady.shard.replicas if each.url != document["new"]),
    ]
    assert steady.source.read_text() == before
    insert(steady, 100)
    wait_until(lambda: (100, 1) in steady.entries(steady.replica(0)) & steady.entries(steady.replica(1)))


def test_nobody_else_is_promoted(steady: Stage) -> None:
    code, document, _ = steady.run("promote", SHARD, "mysql://127.0.0.1:1/nowhere", "--yes")
    assert code == 4
    assert "is no replica" in document["error"]["message"]
    code, document, _ = steady.run("promote", SHARD)  # and nobody is asked without a terminal
    assert code == 4
    code, document, _ = steady.run("promote", SHARD, steady.shard.master.address, "--yes")
    assert code == 0
    assert document["promoted"] is False
    code, document, _ = steady.run("promote", SHARD, "--yes", "--app-user", "nobody-there")
    assert code == 4
    assert "nobody-there" in document["error"]["message"]
    insert(steady, 101)


def test_what_was_closed_in_vain_is_opened_again(steady: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sessions, too: the map version that they were asked for does not come."""
    module: Any = __import__("shardkit.failover.promote", fromlist=["wait_for"])
    waits = iter([True, False])
    real = module.wait_for

    def fails_the_second_time(*arguments: Any, **options: Any) -> Any:
        if next(waits):
            return real(*arguments, **options)
        assert refused(steady.master)
        with steady.clients(failover_wait=0.0) as cluster, shardkit.sessionmaker(cluster)() as session:
            session.add(Entry(owner=1, number=1))
            with pytest.raises((StaleShardMap, ShardUnreachable)):  # the latter: its account is locked
                session.flush()
        raise PreconditionFailed("it does not come up")

    monkeypatch.setattr(module, "wait_for", fails_the_second_time)
    with closing(open_store(str(steady.source))) as store, steady.clients() as cluster:
        plan = make_plan(store.load(), SHARD, steady.local.credentials, app_users=[APP])
        with pytest.raises(PreconditionFailed, match="come up"):
            promote(store, steady.local.credentials, plan)
        insert(steady, 102)
        with shardkit.sessionmaker(cluster)() as session:
            session.add(Entry(owner=103, number=1))
            session.commit()
    steady.caught_up()
    assert steady.shard.epoch == 0


# --- what it does


def test_it_ends_prepared_transactions_and_locks_accounts(stage: Stage) -> None:
    """The branch of a client that died, and whose transaction was decided: it was acknowledged."""
    branch = BranchId(SHARD, new_transaction(), SHARD, 1, 1)
    with closing(stage.master.connect(DATABASE)) as connection, connection.cursor() as cursor:
        for statement in ("XA START {}", "INSERT INTO entries VALUES (7, 7)", "XA END {}", "XA PREPARE {}"):
            cursor.execute(statement.format(branch.literal))
    decision = f"INSERT INTO shardkit_decision (transaction_id, verdict) VALUES ('{branch.transaction}', 'commit')"
    stage.master.execute(decision, database=DATABASE)
    document = stage.promoted("--app-user", APP)
    assert document["ended_branches"] == {branch.transaction: "committed"}
    assert (7, 7) in stage.entries(stage.server_at(stage.shard.master))
    assert not stage.master.execute("XA RECOVER")
    with pytest.raises(pymysql.MySQLError, match="locked"):
        pymysql.connect(host=stage.master.host, port=stage.master.port, user=APP, password=APP)
    insert(stage, 200)  # only there


def test_the_last_writes_are_waited_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replication stands still while the master is closed, and goes on a moment later."""
    module: Any = __import__("shardkit.failover.promote", fromlist=["_Run"])
    target, real = stage.shard.replicas[0], module._Run._closed

    def closed(*arguments: Any, **options: Any) -> Any:
        stand_still(stage)
        for owner in range(300, 320):
            insert(stage, owner)
        threading.Timer(1.5, go_on, [stage]).start()
        return real(*arguments, **options)

    monkeypatch.setattr(module._Run, "_closed", closed)
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target.url)
        promote(store, stage.local.credentials, plan)
    assert {(owner, 1) for owner in range(300, 320)} <= stage.entries(stage.server_at(target))


def stand_still(stage: Stage) -> None:
    if stage.kind is ReplicationKind.RELAY:
        assert stage.relay.pid is not None
        os.kill(stage.relay.pid, signal.SIGSTOP)
    else:
        stage.replica().execute(f"STOP {'SLAVE' if FLAVOUR == 'mariadb' else 'REPLICA'} SQL_THREAD")


def go_on(stage: Stage) -> None:
    if stage.kind is ReplicationKind.RELAY:
        assert stage.relay.pid is not None
        os.kill(stage.relay.pid, signal.SIGCONT)
    else:
        stage.replica().execute(f"START {'SLAVE' if FLAVOUR == 'mariadb' else 'REPLICA'} SQL_THREAD")


def test_a_promotion_that_stops_before_the_map_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert promote_module is promote

    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials)
        cut_short(monkeypatch, store, stage, plan)
        assert refused(stage.master)
        assert stage.shard.epoch == 0
        again = make_plan(store.load(), SHARD, stage.local.credentials)
        assert again.candidate.endpoint == plan.candidate.endpoint
        done = promote(store, stage.local.credentials, again)
    assert done.loss is None
    assert stage.shard.master == plan.candidate.endpoint
    assert refused(stage.master)
    insert(stage, 201)


def test_who_was_taken_out_and_left_behind_is_not_promoted(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promotion stops, the operator opens the old master again, and it goes on."""
    target = stage.shard.replicas[0].url
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target)
        cut_short(monkeypatch, store, stage, plan)
    stage.master.execute("SET GLOBAL read_only = 0")
    insert(stage, 202)
    code, document, _ = stage.run("promote", SHARD, target, "--yes")
    assert code == 4
    assert "nothing brings it further" in document["error"]["message"]
    insert(stage, 203)


# --- transactions that wait for a new master


@pytest.fixture(scope="module")
def pair() -> Iterator[LocalCluster]:
    """Two servers, nothing between them: the second has the same empty tables."""
    with LocalCluster(shards=[SHARD], replicas=1, staging=False, zookeeper=False, flavour=FLAVOUR) as local:
        shard = local.shards[SHARD]
        for server, endpoint in (
            (local.server(SHARD), shard.master),
            (local.server(SHARD, Role.REPLICA), *shard.replicas),
        ):
            one = layout(local).with_shards({SHARD: replace(shard, master=endpoint, replicas=())})
            with create_cluster(one, credentials=server.credentials) as cluster:
                Base.metadata.create_all(cluster.engine(SHARD))
        yield local


def layout(local: LocalCluster) -> ShardMap:
    return lists_map(local.shards[SHARD])


@pytest.fixture
def waiting(pair: LocalCluster) -> Iterator[Cluster]:
    pair.server(SHARD).start()
    with create_cluster(layout(pair), credentials=pair.credentials, failover_wait=5.0) as cluster:
        yield cluster


def name_another_master(cluster: Cluster) -> None:
    shard = cluster.map.shard(SHARD)
    after = replace(shard, master=shard.replicas[0], replicas=(), epoch=shard.epoch + 1)
    cluster.store.publish(cluster.map.with_shards({SHARD: after}), expected_version=cluster.map.version)


def masters(cluster: Cluster) -> Any:
    return shardkit.sessionmaker(cluster, read_from="master")


def read(session: Session) -> None:
    session.get(Entry, (1, 1))


def write(session: Session) -> None:
    session.add(Entry(owner=1, number=time.time_ns() % 2**31))
    session.commit()


@pytest.mark.parametrize("work", [read, write])
def test_a_new_transaction_waits_for_the_new_master(pair: LocalCluster, waiting: Cluster, work: Any) -> None:
    pair.server(SHARD).kill()
    threading.Timer(1.0, name_another_master, [waiting]).start()
    began = time.monotonic()
    with masters(waiting)() as session:
        work(session)
    assert 0.9 < time.monotonic() - began < 4.0


def test_an_event_loop_goes_on_while_its_session_waits(pair: LocalCluster, waiting: Cluster) -> None:
    pair.server(SHARD).kill()

    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.05)
                ticks += 1

        ticking = asyncio.create_task(tick())
        asyncio.get_running_loop().call_later(1.0, name_another_master, waiting)
        async with shardkit.async_sessionmaker(waiting, read_from="master")() as session:
            await session.get(Entry, (1, 1))
        ticking.cancel()
        await waiting.adispose()
        return ticks

    assert asyncio.run(main()) > 8


def test_it_fails_when_no_master_comes(pair: LocalCluster) -> None:
    pair.server(SHARD).kill()
    with create_cluster(layout(pair), credentials=pair.credentials, failover_wait=0.5) as cluster:
        began = time.monotonic()
        with masters(cluster)() as session, pytest.raises(ShardUnreachable):
            read(session)
        assert 0.4 < time.monotonic() - began < 3.0


def test_only_so_many_wait(pair: LocalCluster, waiting: Cluster) -> None:
    waiting._patience._places = threading.BoundedSemaphore(1)
    pair.server(SHARD).kill()
    first = threading.Thread(target=lambda: read(masters(waiting)()))
    first.start()
    wait_until(lambda: waiting._patience._places._value == 0)
    began = time.monotonic()
    with masters(waiting)() as session, pytest.raises(ShardUnreachable):
        read(session)
    assert time.monotonic() - began < 2.0
    name_another_master(waiting)
    first.join()


@pytest.mark.parametrize("mode", ["atomic", "best_effort"])
def test_a_transaction_that_has_begun_fails_at_once(pair: LocalCluster, waiting: Cluster, mode: str) -> None:
    """And never goes on at the new master, where its first half is not."""
    with shardkit.sessionmaker(waiting, read_from="master", transactions=mode)() as session:
        session.add(Entry(owner=5, number=5))
        session.flush()
        pair.server(SHARD).kill()
        name_another_master(waiting)
        began = time.monotonic()
        session.add(Entry(owner=5, number=6))
        with pytest.raises(DBAPIError, match="lists-0"):
            session.commit()
        assert time.monotonic() - began < 2.0
    with masters(waiting)() as session:
        assert session.get(Entry, (5, 6)) is None


def test_a_new_map_never_comes_with_an_old_master(
    pair: LocalCluster, waiting: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the old engines takes its time; whoever begins meanwhile is on the new master."""
    with masters(waiting)() as session:
        read(session)
    seen: list[int | None] = []
    keep = waiting._engines.keep

    def slowly(*arguments: Any) -> None:
        with masters(waiting)() as session:
            read(session)
            seen.append(session.connection(bind_arguments={"shardkit_shard": SHARD}).engine.url.port)
        keep(*arguments)

    monkeypatch.setattr(waiting._engines, "keep", slowly)
    name_another_master(waiting)
    assert seen == [waiting.map.shard(SHARD).master.port]


def test_a_transaction_waits_out_a_promotion_that_has_closed_the_master(pair: LocalCluster, waiting: Cluster) -> None:
    """The closed master asks for the map that is about to be published."""
    waiting.ensure_own_tables(SHARD)
    pair.server(SHARD).execute(
        f"REPLACE INTO shardkit_map_version VALUES (1, {waiting.map.version + 1})", database=DATABASE
    )
    waiting._engines.renew()
    threading.Timer(1.0, name_another_master, [waiting]).start()
    try:
        with masters(waiting)() as session:
            write(session)
            connection = session.connection(bind_arguments={"shardkit_shard": SHARD})
            assert connection.engine.url.port == waiting.map.shard(SHARD).master.port
    finally:
        pair.server(SHARD).execute("DELETE FROM shardkit_map_version", database=DATABASE)
