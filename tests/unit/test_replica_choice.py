"""Which replica may serve reads, and which of those does."""

from __future__ import annotations

import heapq
from collections import Counter
from random import Random

import pytest

from shardkit.replicas.balance import choose
from shardkit.replicas.lag import Reading, is_fresh


def judge(reading: Reading | None, *, was_fresh: bool = True, now: float = 100.0) -> bool:
    return is_fresh(reading, was_fresh=was_fresh, max_lag=1.0, now=now, stale_after=2.0)


def test_a_replica_under_the_limit_is_fresh() -> None:
    assert judge(Reading(0.9, None, 100.0))


@pytest.mark.parametrize(
    "reading",
    [
        None,
        Reading(None, None, 100.0),
        Reading(1.1, None, 100.0),
        Reading(0.1, None, 97.0),
        Reading(0.1, None, 100.0, error="connection refused"),
    ],
    ids=["never looked at", "no heartbeat", "too far behind", "looked at too long ago", "not answering"],
)
def test_what_is_not_known_to_be_fresh_is_not(reading: Reading | None) -> None:
    assert not judge(reading)


def test_a_replica_that_was_out_comes_back_only_well_under_the_limit() -> None:
    assert not judge(Reading(0.9, None, 100.0), was_fresh=False)
    assert judge(Reading(0.8, None, 100.0), was_fresh=False)


def test_of_none_none_is_chosen() -> None:
    assert choose([], lambda _: 0, Random(1)) is None


def test_the_busier_of_two_is_left_alone() -> None:
    busy = {"a": 5, "b": 0}
    assert {choose(["a", "b"], busy.__getitem__, Random(seed)) for seed in range(20)} == {"b"}


def test_idle_replicas_share_evenly() -> None:
    random = Random(7)
    counts = Counter(choose(["a", "b", "c"], lambda _: 0, random) for _ in range(3000))
    assert all(800 < count < 1200 for count in counts.values())


WEIGHTS = {"a": 3, "b": 1, "c": 1}


def test_idle_replicas_share_by_weight() -> None:
    random = Random(7)
    counts = Counter(choose(list(WEIGHTS), lambda _: 0, random, WEIGHTS.__getitem__) for _ in range(3000))
    assert 1650 < counts["a"] < 1950
    assert all(450 < counts[each] < 750 for each in "bc")


@pytest.mark.parametrize(
    ("busy", "taken"),
    [
        ({"a": 3, "b": 0}, {"b"}),
        ({"a": 2, "b": 1}, {"a"}),
        ({"a": 0, "b": 1}, {"a"}),
        ({"a": 6, "b": 2}, {"a", "b"}),
        ({"a": 1, "b": 0}, {"a", "b"}),  # one statement more on b would be more for it than a has
    ],
)
def test_the_busier_for_its_weight_is_left_alone(busy: dict[str, int], taken: set[str]) -> None:
    assert {choose(["a", "b"], busy.__getitem__, Random(seed), WEIGHTS.__getitem__) for seed in range(40)} == taken


@pytest.mark.parametrize("clients", [1, 2, 4, 8, 32])
def test_reads_follow_the_weights_however_many_clients_read(clients: int) -> None:
    """Clients that read again as soon as they have an answer; the replicas are equally quick."""
    random, busy, served = Random(7), Counter[str](), Counter[str]()
    answers = sorted((random.random(), "") for _ in range(clients))
    for _ in range(5000):
        now, done = heapq.heappop(answers)
        busy[done] -= 1
        chosen = choose(["a", "b"], busy.__getitem__, random, WEIGHTS.__getitem__)
        assert chosen is not None
        busy[chosen] += 1
        served[chosen] += 1
        heapq.heappush(answers, (now + random.expovariate(1), chosen))
    assert 0.7 < served["a"] / served.total() < 0.83
