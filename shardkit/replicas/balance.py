"""Which of several fresh replicas serves a read, and how many reads may go to the master where none does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def choose(
    candidates: Sequence[T], in_flight: Callable[[T], int], random: Random, weight: Callable[[T], int] = lambda _: 1
) -> T | None:
    """Of two drawn by weight, the one with less to do for its weight: nearly as even as asking all, and never a
    stampede to one.

    :param in_flight: how many statements of this process a candidate has to answer now.
    :param weight: a candidate's share, against the weights of the others; at least 1.
    :returns: None where there is no candidate.
    """
    if not candidates:
        return None
    if len(candidates) == 1:
        return candidates[0]
    weights = [weight(each) for each in candidates]
    (one,) = random.choices(range(len(candidates)), weights)
    drawn = weights[one]
    weights[one] = 0
    (other,) = random.choices(range(len(candidates)), weights)
    here, there = in_flight(candidates[one]), in_flight(candidates[other])
    # as things are and with this statement: by either alone, few statements at a time are far from the weights
    busier = here * weights[other] > there * drawn and (here + 1) * weights[other] > (there + 1) * drawn
    return candidates[other if busier else one]


class Spill:
    """How much of what replicas should read may go to the masters instead: their backlog must not take those down.

    :param share: of the reads of the last seconds, from 0 to 1; 1 is no limit.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: deque[list[float]] = deque()  # [second, reads, of them spilled]

    def on_replica(self) -> None:
        """A read that went to a replica."""
        if self._share < 1:
            with self._lock:
                self._slot()[1] += 1

    def to_master(self) -> bool:
        """A read that no replica can serve: whether the master may."""
        if self._share >= 1:
            return True
        with self._lock:
            slot = self._slot()
            reads = sum(each[1] for each in self._slots) + 1
            spilled = sum(each[2] for each in self._slots) + 1
            allowed = spilled <= max(_ALWAYS, self._share * reads)
            slot[1] += 1
            slot[2] += allowed
            return allowed

    def _slot(self) -> list[float]:
        second = int(self._clock())
        while self._slots and self._slots[0][0] <= second - _SPILL_SECONDS:
            self._slots.popleft()
        if not self._slots or self._slots[-1][0] != second:
            self._slots.append([second, 0, 0])
        return self._slots[-1]


#: The reads that `Spill` counts are those of so many seconds.
_SPILL_SECONDS = 10
#: So many of them may always spill: of a few reads a share says nothing.
_ALWAYS = 5
