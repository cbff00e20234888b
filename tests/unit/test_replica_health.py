"""The poller goes on looking, however its looks and its rounds fall together."""

from __future__ import annotations

import threading
import time
from typing import Any

from shardkit.errors import ShardkitError
from shardkit.replicas.health import Replica, ReplicaHealth
from shardkit.topology import Endpoint

AT = Endpoint("127.0.0.1", 1, "shop")


def test_a_look_that_ends_while_the_next_round_asks_for_it_is_followed_by_others() -> None:
    """The poller compares names to see who is being looked at; after that, the look comes to its end."""
    going_on, many = threading.Event(), threading.Event()
    looks: list[int] = []
    compared: list[int] = []

    class Name(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            compared.append(1)
            return str.__eq__(self, other)

        def __hash__(self) -> int:
            if compared and not going_on.is_set():
                going_on.set()
                time.sleep(0.2)
            return str.__hash__(self)

    def fail(_replica: Replica) -> Any:
        looks.append(1)
        if len(looks) == 1:
            going_on.wait(10)
        if len(looks) > 5:
            many.set()
        raise ShardkitError("nobody answers")

    health = ReplicaHealth(lambda: [(Name("s"), 0, AT)], fail, lambda _name: None, 1.0, interval=0.01)  # type: ignore[arg-type, return-value]
    try:
        health.start()
        assert many.wait(5), f"{len(looks)} looks"
    finally:
        health.close()
    assert compared
