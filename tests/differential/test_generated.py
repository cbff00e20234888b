"""Generated SELECTs over generated schemas: the shards' answer is the one database's, or a RoutingError."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, note, settings

from shardkit.testing.database import LocalDatabaseServer
from tests.differential.changes import Change, changes, check_change
from tests.differential.check import Tally, check_select
from tests.differential.selects import Question, questions
from tests.differential.world import PARTITIONS, World, server_world, sqlite_world

#: How many of the statements must be answered at least: a router that refuses everything is never wrong.
ANSWERED = 0.9


@pytest.fixture(scope="module")
def tally() -> Tally:
    """What became of all statements of this module."""
    return Tally()


def check(world: World, examples: int, tally: Tally) -> None:

    @settings(max_examples=examples, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
    @given(questions(world))
    def ask(question: Question) -> None:
        note(str(question.statement))
        check_select(world, question, tally)

    try:
        ask()
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_on_sqlite(seed: int, tally: Tally) -> None:
    check(sqlite_world(seed), 560, tally)


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_on_a_server(seed: int, database_server: LocalDatabaseServer, flavour: str, tally: Tally) -> None:
    check(server_world(seed, database_server, flavour, f"world_{os.getpid()}_{seed}"), 60, tally)


def check_changes(world: World, examples: int, tally: Tally) -> None:

    @settings(max_examples=examples, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None)
    @given(changes(world))
    def make(change: Change) -> None:
        note(f"{change.statement} {change.parameters} {change.options}")
        check_change(world, change, tally)

    try:
        make()
    finally:
        world.close()


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_changes_on_sqlite(seed: int) -> None:
    tally = Tally()
    check_changes(sqlite_world(seed), 200, tally)
    assert tally.answered > tally.total / 2, tally.refused.most_common(5)


@pytest.mark.parametrize("seed", range(len(PARTITIONS)))
def test_changes_on_a_server(seed: int, database_server: LocalDatabaseServer, flavour: str) -> None:
    tally = Tally()
    check_changes(server_world(seed, database_server, flavour, f"changed_{os.getpid()}_{seed}"), 30, tally)
    assert tally.answered > tally.total / 2, tally.refused.most_common(5)


def test_nine_of_ten_are_answered(tally: Tally) -> None:
    if not tally.total:
        pytest.skip("the tests above have not run")
    assert tally.answered >= ANSWERED * tally.total, tally.refused.most_common(5)
