"""Prepared branches whose client has gone are ended as the decider's row says, on both flavours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pymysql
import pytest

from shardkit import own_tables
from shardkit.cluster import Cluster, create_cluster
from shardkit.credentials import fixed
from shardkit.decisions import (
    BranchId,
    Janitor,
    Outcome,
    Verdict,
    abort_undecided,
    new_transaction,
    prepared_branches,
    verdict,
)
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer

SHARDS = ("left", "right")


@contextmanager
def two_shards(server: LocalDatabaseServer, prefix: str) -> Iterator[dict[str, str]]:
    """Two shards as two databases of one server, with shardkit's own tables and a table of accounts."""
    names = {shard: f"{prefix}_{shard}" for shard in SHARDS}
    for name in names.values():
        server.execute(f"DROP DATABASE IF EXISTS {name}")
        server.execute(f"CREATE DATABASE {name}")
        server.execute(f"CREATE TABLE {name}.accounts (id INT PRIMARY KEY, amount INT NOT NULL)")
    with cluster_of(server, names) as cluster:
        for shard in SHARDS:
            own_tables.upgrade(cluster.engine(shard))
    yield names
    for name in names.values():
        server.execute(f"DROP DATABASE {name}")


@pytest.fixture(scope="module")
def databases(database_server: LocalDatabaseServer) -> Iterator[dict[str, str]]:
    with two_shards(database_server, "decisions") as names:
        yield names


def cluster_of(server: LocalDatabaseServer, names: dict[str, str]) -> Cluster:
    return create_cluster(
        ShardMap.parse(
            {
                "format": 1,
                "cluster": "bank",
                "keyspaces": {
                    "bank": {
                        "partition": {"by": "list", "buckets": {"left": [1], "right": [2]}},
                        "tables": {"accounts": "id"},
                        "placement": {"left": ["left"], "right": ["right"]},
                    }
                },
                "shards": {shard: {"master": server.endpoint(name).url} for shard, name in names.items()},
            }
        ),
        credentials=fixed("root"),
    )


class Bench:
    """Connections to the two shards, by hand."""

    def __init__(self, server: LocalDatabaseServer, names: dict[str, str]) -> None:
        self._server = server
        self._names = names

    def connect(self, shard: str) -> pymysql.connections.Connection:
        return self._server.connect(self._names[shard], autocommit=True)

    def amounts(self, shard: str) -> list[int]:
        with closing(self.connect(shard)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT amount FROM accounts")
            return [row[0] for row in cursor.fetchall()]

    def prepare(self, *, keep: bool = False, deciding: int = 0) -> tuple[BranchId, pymysql.connections.Connection]:
        """A branch on ``right``, prepared; its client hangs up unless it is kept."""
        connection = self.connect("right")
        branch = BranchId("left", new_transaction(), "right", connection.thread_id(), deciding)
        with connection.cursor() as cursor:
            cursor.execute(f"XA START {branch.literal}")
            cursor.execute("INSERT INTO accounts VALUES (2, 50)")
            cursor.execute(f"XA END {branch.literal}")
            cursor.execute(f"XA PREPARE {branch.literal}")
        if not keep:
            connection.close()
        return branch, connection

    def decide(self, branch: BranchId) -> None:
        with closing(self.connect("left")) as connection, connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO shardkit_decision (transaction_id, verdict) VALUES (%s, 'commit')", (branch.transaction,)
            )

    def left_prepared(self) -> set[BranchId]:
        with closing(self.connect("right")) as connection:
            return set(prepared_branches(connection))


@pytest.fixture
def bench(database_server: LocalDatabaseServer, databases: dict[str, str]) -> Bench:
    for name in databases.values():
        database_server.execute(f"DELETE FROM {name}.accounts")
        database_server.execute(f"DELETE FROM {name}.shardkit_decision")
    return Bench(database_server, databases)


def test_a_decided_branch_is_committed(bench: Bench) -> None:
    branch, _ = bench.prepare()
    bench.decide(branch)
    assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {branch: Outcome.COMMITTED}
    assert bench.amounts("right") == [50]
    assert bench.left_prepared() == set()


def test_an_undecided_branch_is_rolled_back_and_can_never_be_decided_again(bench: Bench) -> None:
    branch, _ = bench.prepare()
    assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {branch: Outcome.ROLLED_BACK}
    assert bench.amounts("right") == []
    with pytest.raises(pymysql.err.IntegrityError):
        bench.decide(branch)


def test_a_living_transaction_is_left_in_peace_for_one_pass(bench: Bench) -> None:
    branch, connection = bench.prepare(keep=True)
    janitor = Janitor(bench.connect)
    assert janitor.sweep(SHARDS) == {}
    with connection.cursor() as cursor:
        cursor.execute(f"XA COMMIT {branch.literal}")
    connection.close()
    assert janitor.sweep(SHARDS) == {}
    assert bench.amounts("right") == [50]


def test_a_branch_whose_owner_stalls_is_taken_from_it(bench: Bench) -> None:
    branch, connection = bench.prepare(keep=True)
    janitor = Janitor(bench.connect)
    assert janitor.sweep(SHARDS, patient=False) == {branch: Outcome.ROLLED_BACK}
    assert bench.left_prepared() == set()
    assert bench.amounts("right") == []
    connection.close()


def test_a_client_in_the_middle_of_deciding_is_waited_for(bench: Bench) -> None:
    branch, _ = bench.prepare()
    with closing(bench.connect("left")) as decider, decider.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute(
            "INSERT INTO shardkit_decision (transaction_id, verdict) VALUES (%s, 'commit')", (branch.transaction,)
        )
        janitor = Janitor(bench.connect)
        assert janitor.sweep(SHARDS, patient=False) == {branch: Outcome.UNDECIDED}
        cursor.execute("COMMIT")
        assert janitor.sweep(SHARDS, patient=False) == {branch: Outcome.COMMITTED}
    assert bench.amounts("right") == [50]


def test_a_client_that_stands_still_before_its_decision_is_overruled(bench: Bench) -> None:
    """Its row is written and not committed, and nobody knows whether it ever will be."""
    with closing(bench.connect("left")) as decider, decider.cursor() as cursor:
        branch, owner = bench.prepare(keep=True, deciding=decider.thread_id())
        cursor.execute("BEGIN")
        cursor.execute(
            "INSERT INTO shardkit_decision (transaction_id, verdict) VALUES (%s, 'commit')", (branch.transaction,)
        )
        assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {branch: Outcome.ROLLED_BACK}
        with pytest.raises(pymysql.err.OperationalError):
            cursor.execute("COMMIT")
        owner.close()
    assert bench.amounts("right") == []
    with closing(bench.connect("left")) as connection:
        assert verdict(connection, branch.transaction) is Verdict.ABORT


def test_a_connection_that_has_got_the_number_of_another_is_left_alone(
    bench: Bench, database_server: LocalDatabaseServer
) -> None:
    with closing(database_server.connect("information_schema")) as stranger:
        branch, _ = bench.prepare(deciding=stranger.thread_id())
        with closing(bench.connect("left")) as decider, decider.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute(
                "INSERT INTO shardkit_decision (transaction_id, verdict) VALUES (%s, 'commit')", (branch.transaction,)
            )
            assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {branch: Outcome.UNDECIDED}
            cursor.execute("ROLLBACK")
        stranger.ping(reconnect=False)
        assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {branch: Outcome.ROLLED_BACK}


def test_a_tombstone_and_a_decision_exclude_each_other(bench: Bench) -> None:
    with closing(bench.connect("left")) as connection:
        assert abort_undecided(connection, "t1") is Verdict.ABORT
        assert verdict(connection, "t1") is Verdict.ABORT
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO shardkit_decision (transaction_id, verdict) VALUES ('t2', 'commit')")
        assert abort_undecided(connection, "t2") is Verdict.COMMIT
        assert verdict(connection, "t3") is None


def test_old_decisions_are_forgotten_unless_somebody_may_ask_for_them(bench: Bench) -> None:
    asked_for, _ = bench.prepare()
    ages = {
        "new": ("commit", 1),
        "old": ("commit", 3),
        asked_for.transaction: ("commit", 3),
        "stone": ("abort", 3),
        "old stone": ("abort", 31),
    }
    with closing(bench.connect("left")) as connection, connection.cursor() as cursor:
        for name, (what, days) in ages.items():
            cursor.execute("INSERT INTO shardkit_decision VALUES (%s, %s, NOW() - INTERVAL %s DAY)", (name, what, days))
        cursor.executemany(
            "INSERT INTO shardkit_decision VALUES (%s, 'commit', NOW() - INTERVAL 9 DAY)",
            [(f"many {number}",) for number in range(2500)],
        )
        assert Janitor(bench.connect).forget(SHARDS) == 2502
        cursor.execute("SELECT transaction_id FROM shardkit_decision")
        assert {name for (name,) in cursor.fetchall()} == {"new", asked_for.transaction, "stone"}
        assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {asked_for: Outcome.COMMITTED}
        assert Janitor(bench.connect).forget(SHARDS) == 1


def test_nothing_is_forgotten_while_a_master_cannot_be_asked(bench: Bench) -> None:
    with closing(bench.connect("left")) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO shardkit_decision VALUES ('old', 'commit', NOW() - INTERVAL 9 DAY)")

        def connect(shard: str) -> pymysql.connections.Connection:
            if shard == "right":
                raise OSError("it is down")
            return bench.connect(shard)

        with pytest.raises(OSError, match="down"):
            Janitor(connect).forget(SHARDS)
        cursor.execute("SELECT COUNT(*) FROM shardkit_decision")
        assert cursor.fetchone() == (1,)


def test_branches_of_others_are_not_touched(bench: Bench) -> None:
    with closing(bench.connect("right")) as connection, connection.cursor() as cursor:
        cursor.execute("XA START 'somebody','else'")
        cursor.execute("INSERT INTO accounts VALUES (9, 9)")
        cursor.execute("XA END 'somebody','else'")
        cursor.execute("XA PREPARE 'somebody','else'")
        assert Janitor(bench.connect).sweep(SHARDS, patient=False) == {}
        cursor.execute("XA ROLLBACK 'somebody','else'")
