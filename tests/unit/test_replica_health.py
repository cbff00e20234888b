"""The poller: a replica that is out is looked at again, whatever came in between."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine

from shardkit.errors import ShardUnreachable
from shardkit.replicas.health import Replica, ReplicaHealth
from shardkit.topology import Endpoint, Shard

PLACE = Endpoint("10.0.0.1", 3306, "shop")
REPLICA: Replica = ("shop-0", 0, PLACE)


@contextmanager
def polling(look: Callable[[int], Engine]) -> Iterator[tuple[ReplicaHealth, threading.Semaphore]]:
    """A poller of one replica, and what counts its looks. ``look`` is given the number of the look."""
    looks, number = threading.Semaphore(0), itertools.count()

    def engine_of(_replica: Replica) -> Engine:
        looks.release()
        return look(next(number))

    shard = Shard("shop-0", Endpoint("10.0.0.2", 3306, "shop"), replicas=(PLACE,))
    health = ReplicaHealth(lambda: [REPLICA], engine_of, lambda _: shard, max_lag=1.0, interval=0.01)
    try:
        yield health, looks
    finally:
        health.close()


def away(_number: int) -> Engine:
    raise ShardUnreachable("it does not answer", shard="shop-0", orig=OSError())


def test_a_look_that_ends_while_the_next_one_is_due_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class EndsWhenAsked(set[Replica]):
        """Who asks whether a look is under way is told so, and then the look ends."""

        def __contains__(self, replica: object) -> bool:
            found = super().__contains__(replica)
            self.discard(REPLICA)
            return found

    with polling(away) as (health, looks):
        monkeypatch.setattr(health, "start", lambda: None)
        health._asked = EndsWhenAsked([REPLICA])
        threading.Thread(target=health._run, daemon=True).start()
        for _ in range(3):
            assert looks.acquire(timeout=30)


def test_a_look_that_fails_in_an_unknown_way_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    def fail(number: int) -> Engine:
        if number == 0:
            raise RuntimeError("the driver is at a loss")
        return away(number)

    with polling(fail) as (health, looks):
        assert health.fresh([REPLICA]) == []
        for _ in range(3):
            assert looks.acquire(timeout=30)
    assert "at a loss" in caplog.text
