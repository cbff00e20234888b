"""Which of several fresh replicas serves a read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def choose(candidates: Sequence[T], in_flight: Callable[[T], int], random: Random) -> T | None:
    """Of two taken at random, the one with less to do: nearly as even as asking all, and never a stampede to one.

    :param in_flight: how many statements of this process a candidate has to answer now.
    :returns: None where there is no candidate.
    """
    if not candidates:
        return None
    if len(candidates) == 1:
        return candidates[0]
    first, second = random.sample(candidates, 2)
    return first if in_flight(first) <= in_flight(second) else second
