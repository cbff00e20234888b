"""Jobs: their states, their records, and the locks that the records are."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import PreconditionFailed, RebalanceError
from shardkit.partition import HashPartition
from shardkit.rebalance.failpoint import VARIABLE, reach
from shardkit.rebalance.job import CLOSED, FINAL, TRANSITIONS, Job, Progress, State
from shardkit.rebalance.jobstore import FileJobStore
from shardkit.rebalance.mapchange import forget_move, name_move, place_on_target
from shardkit.rebalance.throttle import MOST_ROWS, ChunkSize, Throttle
from shardkit.shardmap import Keyspace, Move, ShardMap
from shardkit.topology import Endpoint, Shard

AT = datetime(2024, 5, 17, 12, 0, tzinfo=UTC)


def job(name: str = "r1-1", *buckets: int | str, **changes: object) -> Job:
    made = Job(
        *(name, name.rpartition("-")[0], "orders", buckets or (1, 2, 3), "a", "b", State.PLANNED),
        *(7, 100, 1000, AT, AT),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


# --- states --------------------------------------------------------------------------------------------------------


def test_the_usual_way_visits_every_state_of_a_move_once() -> None:
    way = [State.PLANNED]
    while way[-1] not in FINAL:
        way.append(TRANSITIONS[way[-1]][0])
    assert way == [state for state in State if state not in {State.CANCELLING, State.CANCELLED}]


def test_every_state_leads_to_an_end() -> None:
    def ends(state: State, seen: frozenset[State] = frozenset()) -> bool:
        return state in FINAL or any(ends(after, seen | {state}) for after in TRANSITIONS[state] if after not in seen)

    assert all(ends(state) for state in State)
    assert {State.COMPLETED, State.CANCELLED} == FINAL


def test_after_the_decision_there_is_no_way_to_undo() -> None:
    decided = {State.PUBLISHED, State.CLEANING, State.COMPLETED}
    for state in decided | {State.ACTIVATED}:
        assert not {State.CANCELLING, State.CANCELLED} & set(TRANSITIONS[state])
    assert {State.FROZEN, State.COPYING, State.VERIFYING} <= CLOSED


def test_only_what_the_table_says_may_follow() -> None:
    with pytest.raises(RebalanceError, match="job r1-1 is planned: it cannot become published"):
        job().to(State.PUBLISHED)
    stopped = job(problem="why", progress=Progress("t", 1, 2)).to(State.PREPARED)
    assert (stopped.state, stopped.problem, stopped.progress) == (State.PREPARED, "", None)


@given(
    st.lists(
        st.one_of(st.integers(0, 4095), st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)), unique=True, min_size=1
    )
)
def test_a_record_comes_back_as_it_was(buckets: list[int | str]) -> None:
    ordered = sorted(b for b in buckets if isinstance(b, int)), [b for b in buckets if isinstance(b, str)]
    made = job(
        *("r1-1", *ordered[0], *ordered[1]),
        progress=Progress("orders", 5, 10),
        problem="a 'quote'\nand é",
        moving_version=8,
    )
    assert Job.from_json(made.to_json()) == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "id": "x"}'])
def test_a_record_that_cannot_be_read_says_so(text: str) -> None:
    with pytest.raises(RebalanceError):
        Job.from_json(text)


# --- records as locks ----------------------------------------------------------------------------------------------


def test_jobs_are_recorded_together_or_not_at_all(tmp_path: Path) -> None:
    store = FileJobStore(tmp_path / "map.yaml")
    store.create([job("r1-1", 1, 2)])
    with pytest.raises(PreconditionFailed, match=r"job r1-1 \(planned\) is moving bucket 2 of orders"):
        store.create([job("r2-1", 5), job("r2-2", 2, 3)])
    assert [one.id for one in store.jobs()] == ["r1-1"]
    store.create([job("r2-1", 2, keyspace="other")])
    done, revision = store.load("r1-1")
    store.save(replace(done, state=State.CANCELLED), revision)
    store.create([job("r3-1", 2)])
    with pytest.raises(PreconditionFailed, match="plan r3 has been applied already"):
        store.create([job("r3-1", 9)])


def test_a_record_is_replaced_only_by_who_has_read_its_last_revision(tmp_path: Path) -> None:
    store = FileJobStore(tmp_path / "map.yaml")
    store.create([job()])
    found, revision = store.load("r1-1")
    newer = store.save(found.to(State.PREPARED), revision)
    with pytest.raises(RebalanceError, match="changed by another process"):
        store.save(found.to(State.CANCELLED), revision)
    assert store.load("r1-1") == (found.to(State.PREPARED), newer)


@pytest.mark.parametrize("name", ["nothing", "../map", "", "a/b", "x" * 100])
def test_a_job_that_there_is_not(name: str, tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match=r"is not the name of a job|there is no rebalance job"):
        FileJobStore(tmp_path / "map.yaml").load(name)


# --- the map -------------------------------------------------------------------------------------------------------


def shop(*moves: Move) -> ShardMap:
    shards = {name: Shard(name, Endpoint("h", 3306, name)) for name in "ab"}
    placement = {bucket: "a" if bucket < 4 else "b" for bucket in range(8)}
    keyspace = Keyspace("orders", HashPartition(8), {"users": ("id",)}, placement)
    return ShardMap("shop", {"orders": keyspace}, shards, moves, version=7)


def test_a_move_is_named_then_placed_then_forgotten_and_nothing_happens_twice() -> None:
    other = Move("r9-1", "orders", (0,), "a", "b")
    named = name_move(shop(other), job())
    assert named is not None
    assert named.moves == (other, Move("r1-1", "orders", (1, 2, 3), "a", "b"))
    assert named.keyspaces["orders"].buckets_on("a") == (0, 1, 2, 3), "where they are until they are handed over"
    assert name_move(named, job()) is None

    placed = place_on_target(named, job())
    assert placed is not None
    assert placed.keyspaces["orders"].buckets_on("a") == (0,)
    assert placed.moves == named.moves, "the source still has the rows"
    assert place_on_target(placed, job()) is None

    forgotten = forget_move(placed, job())
    assert forgotten is not None
    assert forgotten.moves == (other,)
    assert forget_move(forgotten, job()) is None


def test_a_move_is_not_named_where_the_map_has_changed_or_another_job_is_at_work() -> None:
    for current in (
        shop().with_placement("orders", {2: "b"}),
        shop(Move("r9-1", "orders", (3,), "a", "b")),
    ):
        with pytest.raises(PreconditionFailed, match=r"cancel the job \('shardkit rebalance cancel r1-1'\)"):
            name_move(current, job())


# --- pace ----------------------------------------------------------------------------------------------------------


def test_a_chunk_grows_towards_its_half_second_and_shrinks_at_once() -> None:
    size = ChunkSize(rows=1000)
    size.learn(1000, 100_000, 0.05)
    assert size.rows == 2000, "at most twofold"
    size.learn(2000, 200_000, 2.0)
    assert size.rows == 500
    size.learn(500, 0, 0.0)
    for _ in range(20):
        size.learn(size.rows, size.rows * 10, 0.01)
    assert size.rows == MOST_ROWS
    size.learn(100, 100 * 16 * 1024 * 1024, 0.01)
    assert size.rows == 2, "large rows: by their bytes"


def test_the_throttle_waits_for_what_the_work_itself_did_not_take() -> None:
    assert Throttle(None).pause_after(1000, 0.1) == 0
    assert Throttle(1000).pause_after(500, 0.1) == pytest.approx(0.4)
    assert Throttle(1000).pause_after(500, 3) == 0


# --- failpoints ----------------------------------------------------------------------------------------------------


def test_a_failpoint_kills_at_its_place_and_no_other() -> None:
    code = """
from shardkit.rebalance.failpoint import reach
for _ in range(5):
    reach("copying")
    print("passed", flush=True)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={VARIABLE: "copying:kill:3"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert run.stdout == "passed\n" * 2


def test_a_failpoint_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "frozen:explode")
    reach("copying")
    with pytest.raises(PreconditionFailed, match="frozen:explode"):
        reach("frozen")
