"""Generated SELECTs over generated schemas: the shards' answer is the one database's, or a RoutingError."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings

import shardkit
from shardkit.testing.database import LocalDatabaseServer
from tests.differential.changes import Change, changes, check_change
from tests.differential.check import Ask, Tally, check_select, rows_of
from tests.differential.selects import Question, questions
from tests.differential.world import PARTITIONS, World, server_world, sqlite_world

#: How many of the statements must be answered at least: a router that refuses everything is never wrong.
ANSWERED = 0.9


@pytest.fixture(scope="module")
def tally() -> Tally:
    """What became of all statements of this module."""
    return Tally()


def check(world: World, examples: int, tally: Tally, through: Ask | None = None) -> None:

    @settings(max_examples=examples, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
    @given(questions(world))
    def ask(question: Question) -> None:
        note(str(question.statement))
        check_select(world, question, tally, through)

    ask()


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_on_sqlite(seed: int, tally: Tally) -> None:
    with closing(sqlite_world(seed)) as world:
        check(world, 560, tally)


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_on_a_server(seed: int, database_server: LocalDatabaseServer, flavour: str, tally: Tally) -> None:
    with closing(server_world(seed, database_server, flavour, f"world_{os.getpid()}_{seed}")) as world:
        check(world, 60, tally)


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_on_a_server_with_asyncio(seed: int, database_server: LocalDatabaseServer, flavour: str) -> None:
    """The same statements through an AsyncSession: whatever a Session answers, it answers."""
    tally = Tally()
    made = server_world(seed, database_server, flavour, f"async_{os.getpid()}_{seed}")
    with closing(made) as world, asyncio.Runner() as runner:
        factory = shardkit.async_sessionmaker(world.cluster)

        async def rows(statement: Any) -> list[tuple[Any, ...]]:
            async with factory() as session:
                return await session.run_sync(rows_of, statement)

        try:
            check(world, 30, tally, lambda statement: runner.run(rows(statement)))
        finally:
            runner.run(world.cluster.adispose())
    assert tally.answered > tally.total / 2


def check_changes(world: World, examples: int, tally: Tally) -> None:

    @settings(max_examples=examples, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
    @given(changes(world))
    def make(change: Change) -> None:
        note(f"{change.statement} {change.parameters} {change.options}")
        check_change(world, change, tally)

    make()


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_changes_on_sqlite(seed: int) -> None:
    tally = Tally()
    with closing(sqlite_world(seed)) as world:
        check_changes(world, 200, tally)
    assert tally.answered > tally.total / 2, tally.refused.most_common(5)


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_changes_on_a_server(seed: int, database_server: LocalDatabaseServer, flavour: str) -> None:
    tally = Tally()
    with closing(server_world(seed, database_server, flavour, f"changed_{os.getpid()}_{seed}")) as world:
        check_changes(world, 30, tally)
    assert tally.answered > tally.total / 2, tally.refused.most_common(5)


def test_nine_of_ten_are_answered(tally: Tally) -> None:
    if not tally.total:
        pytest.skip("the tests above have not run")
    assert tally.answered >= ANSWERED * tally.total, tally.refused.most_common(5)
