"""What a promotion makes of a shard."""

from __future__ import annotations

from shardkit.failover.plan import Plan
from shardkit.failover.standing import Standing
from shardkit.topology import Endpoint, Role, Shard


def test_replicas_that_stay_keep_their_weights() -> None:
    master, first, second, third = (Endpoint(f"10.0.0.{number}", 3306, "shop") for number in range(4))
    shard = Shard("shop-0", master, replicas=(first, second, third), weights={first: 2, second: 5, third: 0})
    plan = Plan(
        shard,
        version=1,
        old=Standing("shop-0", Role.MASTER, master),
        candidate=Standing("shop-0", Role.REPLICA, first),
        keeps=(second,),
        removes=(master, third),
    )
    assert plan.after == Shard("shop-0", first, replicas=(second,), epoch=1, weights={second: 5})
