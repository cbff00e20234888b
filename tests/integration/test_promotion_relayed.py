"""Promotion of a relayed shard that is cut short, begun twice, or leaves copies behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shardkit import own_tables
from shardkit.errors import Interrupted, PartlyApplied, PreconditionFailed, ShardkitError, Unreachable
from shardkit.failover import make_plan, promote
from shardkit.failover.servers import Server
from shardkit.failover.standing import position_of
from shardkit.gtid import Flavour
from shardkit.mapstore import open_store
from shardkit.topology import Endpoint, ReplicationKind, Role
from shardkit_cdc.connection import connect
from shardkit_cdc.position import Claim
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.seed import seed
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD
from tests.promotion_stage import DATABASE, Stage, cut_short, open_stage, refused, wait_until

pytestmark = [getattr(pytest.mark, FLAVOUR)]

HOP = own_tables.HOP_PREFIX + SHARD
module: Any = __import__("shardkit.failover.promote", fromlist=["_Run"])


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with open_stage(ReplicationKind.RELAY, tmp_path) as made:
        yield made


def follows(stage: Stage, owner: int) -> None:
    """Whoever is in the map still gets what is written."""
    new = stage.server_at(stage.shard.master)
    new.execute(f"INSERT INTO entries VALUES ({owner}, 1)", database=DATABASE)
    assert stage.shard.replicas
    wait_until(
        lambda: all((owner, 1) in stage.entries(stage.server_at(each)) for each in stage.shard.replicas), seconds=20
    )


def leave_prepared(stage: Stage) -> None:
    """A branch whose end staging does not know: as the relay keeps it."""
    assert stage.shard.staging is not None
    stage.server_at(stage.shard.staging).execute(
        f"INSERT INTO shardkit_prepared VALUES ('{HOP}', 'X''aa'',X''bb'',7', 0, '0-1-1', 'x')", database=DATABASE
    )


def test_without_the_old_master_cut_short_before_the_map(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies have been moved: the same command does not take them off again, and names what it named before."""
    leave_prepared(stage)
    stage.master.kill()
    staging, target = stage.shard.staging, stage.shard.replicas[0].url
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target, force=True)
        cut_short(monkeypatch, store, stage, plan)
        again = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target, force=True)
        done = promote(store, stage.local.credentials, again, timeout=5.0)
    assert stage.shard.staging == staging
    assert len(done.follow) == 2
    assert [each for each in done.undecided if "X'aa'" in each]
    assert staging is not None
    kept = stage.server_at(staging).execute(f"SELECT 1 FROM shardkit_prepared WHERE hop = '{HOP}'", database=DATABASE)
    assert not kept, "a branch of the new master with this name could not be stored"
    follows(stage, 400)


def test_a_plan_that_something_has_overtaken_changes_nothing(stage: Stage) -> None:
    first, second = (each.url for each in stage.shard.replicas)
    with closing(open_store(str(stage.source))) as store:
        plans = [make_plan(store.load(), SHARD, stage.local.credentials, wanted=wanted) for wanted in (first, second)]
        promote(store, stage.local.credentials, plans[0])
        with pytest.raises(PreconditionFailed, match="since"):
            promote(store, stage.local.credentials, plans[1], timeout=5.0)
    follows(stage, 401)


def test_a_plan_from_before_another_promotion_began(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (each.url for each in stage.shard.replicas)
    with closing(open_store(str(stage.source))) as store:
        plans = [make_plan(store.load(), SHARD, stage.local.credentials, wanted=wanted) for wanted in (first, second)]
        cut_short(monkeypatch, store, stage, plans[0])
        with pytest.raises(PreconditionFailed, match="since"):
            promote(store, stage.local.credentials, plans[1], timeout=5.0)
    stage.promoted(first)
    follows(stage, 402)


def test_two_promotions_at_the_same_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (each.url for each in stage.shard.replicas)
    refusals: list[ShardkitError] = []
    real = module._Run._closed
    with closing(open_store(str(stage.source))) as store:
        plans = [make_plan(store.load(), SHARD, stage.local.credentials, wanted=wanted) for wanted in (first, second)]

        def closed(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(module._Run, "_closed", real)
            try:
                promote(store, stage.local.credentials, plans[1], timeout=5.0)
            except ShardkitError as error:
                refusals.append(error)
            return real(*arguments, **options)

        monkeypatch.setattr(module._Run, "_closed", closed)
        promote(store, stage.local.credentials, plans[0])
    assert "at work" in str(refusals[0])
    assert stage.shard.master.url == first
    follows(stage, 403)


def test_a_copy_left_behind_does_not_pass_for_one_that_has_what_the_new_master_wrote(stage: Stage) -> None:
    """Its position is one of the old master's log: put back into the map, readers would compare it with the new."""
    for owner in range(500, 600):  # the copies' logs have fewer transactions than their source's
        stage.master.execute(f"INSERT INTO entries VALUES ({owner}, 1)", database=DATABASE)
    stage.caught_up()
    left = stage.shard.replicas[1]
    stage.server_at(left).execute(f"INSERT INTO shardkit_pause VALUES ('{HOP}', 'test', 0)", database=DATABASE)
    done = stage.promoted(stage.shard.replicas[0].url)
    assert str(left) in done["removed"]
    new = stage.server_at(stage.shard.master)
    new.execute("INSERT INTO entries VALUES (404, 1)", database=DATABASE)
    shard = stage.shard
    with Server(left, stage.local.credentials) as server, Server(shard.master, stage.local.credentials) as master:
        stands = position_of(server, shard, Role.REPLICA)
        assert stands is not None
        assert not stands.covers(master.end_of_log)
        if server.flavour is Flavour.MARIADB:
            ((last,),) = new.execute("SELECT @@global.gtid_binlog_pos")
            written = type(stands).parse(",".join(each for each in last.split(",") if each.startswith("0-")))
            assert not stands.covers(written)


def test_a_runner_does_not_take_over_what_a_promotion_has_taken(stage: Stage) -> None:
    """It had looked at the row just before."""
    stage.relay.stop()
    target: Endpoint = stage.shard.replicas[0]
    ((source,),) = stage.server_at(target).execute(
        f"SELECT source FROM shardkit_position WHERE hop = '{HOP}'", database=DATABASE
    )
    words: dict[str, Any] = {"database": DATABASE, "key": HOP, "runner": "test", "history": None}
    with closing(connect(target, stage.local.credentials)) as connection:
        for moved_by, error in ((own_tables.PROMOTED_BY, PreconditionFailed), ("somebody", Interrupted)):
            stage.server_at(target).execute(
                f"UPDATE shardkit_position SET source = 'mariadb:77', runner = '{moved_by}' WHERE hop = '{HOP}'",
                database=DATABASE,
            )
            connection.rollback()
            with pytest.raises(error):
                Claim.take(connection, Flavour(FLAVOUR), **words, source=source)


def test_an_old_master_that_was_started_again_before_the_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has written since, if only heartbeats: the promotion says how it can be finished, and can be."""
    target = stage.shard.replicas[0].url
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target)
        cut_short(monkeypatch, store, stage, plan)
        before = stage.master.execute("SELECT beat FROM shardkit_heartbeat", database=DATABASE)
        stage.master.execute("SET GLOBAL read_only = 0")
        wait_until(lambda: stage.master.execute("SELECT beat FROM shardkit_heartbeat", database=DATABASE) > before)
        again = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target)
        with pytest.raises(PreconditionFailed, match="stop the old master"):
            promote(store, stage.local.credentials, again)
    stage.master.kill()
    done = stage.promoted(target, "--force")
    assert len(done["follow"]) == 2
    follows(stage, 405)


def test_a_later_attempt_that_fails_does_not_say_that_nothing_was_changed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials)
        cut_short(monkeypatch, store, stage, plan)

        def refuse(*_arguments: object, **_options: object) -> None:
            raise PreconditionFailed("it cannot be ended")

        again = make_plan(store.load(), SHARD, stage.local.credentials)
        with monkeypatch.context() as patch:
            patch.setattr(module.Fence, "resolve", refuse)
            with pytest.raises(PartlyApplied, match="is closed"):
                promote(store, stage.local.credentials, again)


def test_a_candidate_that_dies_before_it_lets_go(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old master takes writes again: the other is still a copy of it."""
    target = stage.shard.replicas[0]
    real = module._Run._closed

    def closed(*arguments: Any, **options: Any) -> Any:
        final = real(*arguments, **options)
        stage.server_at(target).kill()
        return final

    monkeypatch.setattr(module._Run, "_closed", closed)
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target.url)
        with pytest.raises(Unreachable):
            promote(store, stage.local.credentials, plan)
    assert not refused(stage.master)


def test_a_copy_that_got_what_was_written_past_the_closing_does_not_stay(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program with special rights writes to the old master once the candidate is off it: the copies would differ."""
    staging, real = stage.shard.staging, module.detach
    assert staging is not None

    def detach(*arguments: Any) -> None:
        real(*arguments)
        if FLAVOUR == "mysql":
            stage.master.execute("SET GLOBAL super_read_only = 0")
        stage.master.execute("INSERT INTO entries VALUES (600, 1)", database=DATABASE)
        wait_until(lambda: (600, 1) in stage.entries(stage.server_at(staging)))

    monkeypatch.setattr(module, "detach", detach)
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials)
        done = promote(store, stage.local.credentials, plan)
    assert (600, 1) not in stage.entries(stage.server_at(stage.shard.master))
    assert done.follow == ()
    assert "took over at" in done.removed[str(staging)]


def test_an_old_master_that_was_started_again_before_the_copies_moved(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, target = stage.shard.staging, stage.shard.replicas[0].url
    assert staging is not None
    beat = "SELECT beat FROM shardkit_heartbeat"
    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target)
        cut_short(monkeypatch, store, stage, plan, of=module.relayed, step="follow_all")
    before = stage.master.execute(beat, database=DATABASE)
    stage.master.execute("SET GLOBAL read_only = 0")
    wait_until(lambda: stage.server_at(staging).execute(beat, database=DATABASE) > before)
    stage.master.kill()
    done = stage.promoted(target, "--force", "--timeout", "3")
    assert done["loss"]["missing"] > 0
    assert done["follow"] == []


def seeding(stage: Stage, target: Endpoint, **options: Any) -> None:
    """Fill a target as the command does, by the map as it is now, after asking."""
    shard = stage.shard
    assert shard.staging is not None
    role, source = (Role.STAGING, shard.master) if target == shard.staging else (Role.REPLICA, shard.staging)
    spec = HopSpec(SHARD, source, target, role, source == shard.master)
    seed(spec, stage.local.credentials, confirm=lambda _found: None, shard_epoch=shard.epoch, **options)


def test_what_a_promotion_is_at_work_on_is_not_seeded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new master would lose its position, and its rows; a copy of it would be one of the old master again."""
    staging, target = stage.shard.staging, stage.shard.replicas[0]
    assert staging is not None
    refusals: list[ShardkitError] = []
    real = module._Run._closed

    def closed(*arguments: Any, **options: Any) -> Any:
        with pytest.raises(PreconditionFailed, match="a promotion of") as caught:
            seeding(stage, target)
        refusals.append(caught.value)
        return real(*arguments, **options)

    with closing(open_store(str(stage.source))) as store:
        plan = make_plan(store.load(), SHARD, stage.local.credentials, wanted=target.url)
        with monkeypatch.context() as patch:
            patch.setattr(module._Run, "_closed", closed)
            cut_short(monkeypatch, store, stage, plan)
    assert refusals, "it was looked at while the promotion was at work"
    for taken in (target, staging):
        stands = stage.server_at(taken).execute("SELECT * FROM shardkit_position", database=DATABASE)
        with pytest.raises(PreconditionFailed, match="a promotion of") as refusal:
            seeding(stage, taken, anew=True)
        assert "run the same shardkit shard promote again" in str(refusal.value.hint)
        assert stage.server_at(taken).execute("SELECT * FROM shardkit_position", database=DATABASE) == stands
    stage.promoted(target.url)
    follows(stage, 406)


def test_an_old_master_is_filled_anew_as_a_replica(stage: Stage) -> None:
    """By what docs/how-to/promote.md says; also one that was a replica before, which a promotion once took."""
    first, second = stage.shard.master, stage.shard.replicas[0]
    stage.promoted(second.url)
    old = stage.server_at(first)
    if FLAVOUR == "mysql":
        old.execute("SET GLOBAL super_read_only = 0")
    old.execute(f"DROP DATABASE {DATABASE}")
    old.execute(f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4")
    seeding(stage, first)
    assert stage.entries(old) == stage.entries(stage.server_at(stage.shard.master))
    stage.promoted(stage.shard.replicas[0].url)
    if FLAVOUR == "mysql":
        stage.server_at(second).execute("SET GLOBAL super_read_only = 0")
    seeding(stage, second)
    assert stage.entries(stage.server_at(second)) == stage.entries(stage.server_at(stage.shard.master))
