"""Which replica may serve reads, and which of those does."""

from __future__ import annotations

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
