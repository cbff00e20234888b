"""The differential check sees a router that is wrong: each of these faults makes it wrong in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from shardkit.routing import combining, conditions, keys, merge, queries, shapes, sorting, spread
from tests.differential.check import Different, Tally, check_select
from tests.differential.selects import Question, questions
from tests.differential.world import PARTITIONS, World, sqlite_world

Plant = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Plant] = {}


def fault(plant: Plant) -> Plant:
    FAULTS[plant.__name__] = plant
    return plant


@fault
def nulls_are_sorted_last(patch: pytest.MonkeyPatch) -> None:
    def order(keys: Sequence[Any]) -> Any:
        return sorting.ordering(tuple(replace(key, nulls_first=not key.nulls_first) for key in keys))

    patch.setattr(merge, "ordering", order)


@fault
def descending_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def order(keys: Sequence[Any]) -> Any:
        return sorting.ordering(tuple(replace(key, descending=False) for key in keys))

    patch.setattr(merge, "ordering", order)


@fault
def limit_is_cut_by_each_shard_only(patch: pytest.MonkeyPatch) -> None:
    _after_planning(patch, lambda plan: replace(plan, limit=None))


@fault
def offset_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    _after_planning(patch, lambda plan: replace(plan, offset=0))


@fault
def distinct_is_left_to_each_shard(patch: pytest.MonkeyPatch) -> None:
    _after_planning(patch, lambda plan: replace(plan, distinct=()))


def _after_planning(patch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    original = merge.merge_rows

    def merge_rows(plan: Any, streams: Any) -> Iterator[Any]:
        return original(change(plan), streams)

    patch.setattr("shardkit.session.results.merge_rows", merge_rows)


@fault
def averages_are_averaged(patch: pytest.MonkeyPatch) -> None:
    def put(self: combining.Average, parts: Sequence[Any], whole: list[Any]) -> None:
        present = [row for row in parts if row[self.raw] is not None]
        if present:
            combining._set(self, present[0], whole, sum(float(row[self.raw]) for row in present) / len(present))

    patch.setattr(combining.Average, "put", put)


@fault
def sums_take_one_shard(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(combining, "total", lambda values: values[0])


@fault
def groups_are_left_to_each_shard(patch: pytest.MonkeyPatch) -> None:
    def keyed_groups(*_arguments: Any) -> bool:
        return True

    patch.setattr(shapes, "keyed_groups", keyed_groups)


@fault
def one_branch_of_an_or_prunes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(keys, "_either", lambda branches: branches[0])


@fault
def the_end_of_between_is_left_out(patch: pytest.MonkeyPatch) -> None:
    original = conditions._within

    def within(value: Any, span: tuple[Any, Any]) -> bool:
        return original(value, span) and value != span[1]

    patch.setattr(conditions, "_within", within)


@fault
def the_last_shard_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = shapes.shards_of

    def shards_of(*arguments: Any) -> tuple[str, ...]:
        found = original(*arguments)
        return found[:-1] if len(found) > 1 else found

    patch.setattr(shapes, "shards_of", shards_of)


@fault
def a_shard_is_asked_twice(patch: pytest.MonkeyPatch) -> None:
    original = shapes.shards_of

    def shards_of(*arguments: Any) -> tuple[str, ...]:
        found = original(*arguments)
        return (*found, found[0]) if len(found) > 1 else found

    patch.setattr(shapes, "shards_of", shards_of)


@fault
def any_join_is_co_located(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(spread._Spreading, "_colocated", lambda *_arguments: True)


@fault
def a_reference_table_may_be_preserved(patch: pytest.MonkeyPatch) -> None:
    original = spread._Spreading._join

    def join(self: Any, node: Any) -> Any:
        left = self._node(node.left)
        if node.kind == "left" and isinstance(left, spread.Everywhere):
            return self._inner(left, self._node(node.right), node.context)
        return original(self, node)

    patch.setattr(spread._Spreading, "_join", join)


@fault
def any_column_counts_as_the_key_of_a_group(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(spread._Spreading, "_holds_key", lambda *_arguments: True)


@fault
def an_alias_is_taken_for_the_key(patch: pytest.MonkeyPatch) -> None:
    """A column of a subquery is followed by its name, whatever it is inside."""
    original = queries.Query.output

    def output(self: Any, name: str) -> Any:
        inner = [each for each in self.scope.members.values() if isinstance(each, queries.Occurrence)]
        known = [found for found in (self.scope.column(each, name) for each in inner) if found is not None]
        return known[0] if known else original(self, name)

    patch.setattr(queries.Query, "output", output)


@fault
def having_is_left_to_each_shard(patch: pytest.MonkeyPatch) -> None:
    original = combining.Groups.combined

    def combined(self: Any, rows: Any) -> Any:
        return original(replace(self, having=()), rows)

    patch.setattr(combining.Groups, "combined", combined)


def caught(examples: int) -> bool:
    """Whether the check finds something among the statements that the suite asks."""
    for seed in range(len(PARTITIONS)):
        world = sqlite_world(seed)
        try:
            _ask(world, examples)
        except Different:
            return True
        finally:
            world.close()
    return False


def _ask(world: World, examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
        report_multiple_bugs=False,
    )
    @given(questions(world))
    def ask(question: Question) -> None:
        check_select(world, question, Tally())

    ask()


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name](monkeypatch)
    assert caught(560)


def test_there_are_ten() -> None:
    assert len(FAULTS) >= 10
