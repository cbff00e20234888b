"""kill -9 of the process that moves buckets, at every state: the same command goes on, no row is lost or doubled."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pymysql
import pytest

from shardkit.rebalance import State
from shardkit.testing import LocalZooKeeper
from shardkit.testing.database import LocalDatabaseServer
from tests.conftest import FLAVOUR
from tests.rebalance_shop import FIRST, KILLED, SECOND, Shop, open_shop

#: In the order in which a job comes by: recorded and not begun, somewhere inside, done and the next not recorded.
FAILPOINTS = [
    "planned",
    *("prepared", "prepared.fenced", "prepared.named", "prepared.done"),
    *("freezing", "freezing.done"),
    *("frozen", "frozen.done"),
    *("copying", "copying.chunk", "copying.done"),
    *("verifying", "verifying.done"),
    *("activated", "activated.decided", "activated.done"),
    *("published", "published.named", "published.done"),
    *("cleaning", "cleaning.chunk", "cleaning.deleted", "cleaning.done"),
]
#: On MySQL the same code runs: the points around each kind of transaction are enough.
FEWER = ["prepared.fenced", "freezing.done", "copying.chunk", "activated.decided", "published.named", "cleaning.chunk"]
#: States in which nobody may write the moving buckets anywhere.
CLOSED = {State.FROZEN, State.COPYING, State.VERIFYING}


@pytest.fixture
def shop(database_server: LocalDatabaseServer, tmp_path: Path) -> Iterator[Shop]:
    with open_shop(database_server, f"file:{tmp_path}/map.yaml") as shop:
        yield shop


def refused_everywhere(shop: Shop, user: int) -> bool:
    """Whether both shards refuse an UPDATE of a user's order, or have no such row to write."""
    for shard in (FIRST, SECOND):
        with closing(shop.connect(shard)) as connection, connection.cursor() as cursor:
            try:
                if cursor.execute(f"UPDATE orders SET amount = amount + 100 WHERE user_id = {user}"):
                    return False
            except pymysql.OperationalError as error:
                if error.args[0] != 1644:
                    raise
    return True


def test_every_state_is_a_failpoint() -> None:
    """So that a state added later is killed here, too."""
    on_the_way = {str(state) for state in State} - {"completed", "cancelling", "cancelled"}
    assert {point.partition(".")[0] for point in FAILPOINTS} == on_the_way


def test_killed_at_every_state_in_turn_the_same_command_finishes_the_move(shop: Shop) -> None:
    before = shop.contents()
    plan = shop.plan()
    users = shop.users_in(plan.transfers[0].buckets)

    for failpoint in FAILPOINTS if FLAVOUR == "mariadb" else FEWER:
        code, output = shop.run(plan, failpoint=f"{failpoint}:kill")
        assert code == KILLED, f"{failpoint}: {output}"
        assert shop.contents_once() == before, f"{failpoint}: a read by the map sees every row once"
        assert all(len(owners) == 1 for owners in shop.owners().values()), f"{failpoint}: one owner at most"
        if shop.job().state in CLOSED:
            assert refused_everywhere(shop, users[0]), f"{failpoint}: nobody writes a closed bucket"

    code, output = shop.run(plan)
    assert code == 0, output
    assert shop.contents() == before
    assert shop.misplaced() == []
    assert {number for (number,) in shop.rows(SECOND, "SELECT id FROM users")} >= set(users)
    assert {bucket: owners for bucket, owners in shop.owners().items() if len(owners) != 1} == {}
    assert shop.map.moves == ()
    assert shop.job().state is State.COMPLETED
    code, output = shop.run(plan)
    assert code == 0, f"once more changes nothing: {output}"


def test_killed_under_zookeeper_it_goes_on_as_well(
    database_server: LocalDatabaseServer, zookeeper: LocalZooKeeper
) -> None:
    cluster = f"kill-{os.getpid()}-{time.monotonic_ns()}"
    with open_shop(database_server, f"zookeeper://{zookeeper.host}:{zookeeper.port}/{cluster}", cluster) as shop:
        before = shop.contents()
        plan = shop.plan()
        for failpoint in ("planned", "copying.chunk", "activated.decided", "published.named", "cleaning"):
            code, output = shop.run(plan, failpoint=f"{failpoint}:kill")
            assert code == KILLED, output
        code, output = shop.run(plan)
        assert code == 0, output
        assert shop.contents() == before
        assert shop.misplaced() == []
        assert shop.map.moves == ()


@pytest.mark.parametrize("killed_at", ["prepared.fenced", "copying.chunk"])
def test_killed_before_the_decision_it_can_be_undone(killed_at: str, shop: Shop) -> None:
    before, placement = shop.contents(), shop.map.keyspaces["orders"].placement
    plan = shop.plan()
    buckets = plan.transfers[0].buckets
    assert shop.run(plan, failpoint=f"{killed_at}:kill")[0] == KILLED
    for failpoint in ("cancelling", "cancelling.thawed", "cancelling.done"):
        code, output = shop.run(plan, failpoint=f"{failpoint}:kill", undo=True)
        assert code == KILLED, output
    code, output = shop.run(plan, undo=True)
    assert code == 0, output
    assert shop.contents() == before
    assert shop.misplaced() == []
    assert shop.map.keyspaces["orders"].placement == placement
    assert shop.map.moves == ()
    for number in shop.users_in(buckets):
        shop.execute(FIRST, f"UPDATE users SET name = 'open again' WHERE id = {number}")
    # and nothing is left that would stand in the way of moving them after all
    shop.apply(shop.plan(*buckets))
    assert shop.misplaced() == []


def test_after_the_decision_it_cannot_be_undone(shop: Shop) -> None:
    plan = shop.plan()
    assert shop.run(plan, failpoint="activated.decided:kill")[0] == KILLED
    code, output = shop.run(plan, undo=True)
    assert code != 0
    assert "cannot become cancelling" in output
    assert shop.run(plan)[0] == 0
    assert shop.misplaced() == []
