"""A shard's failover: who stands where, and putting another database in its master's place."""

from shardkit.failover.plan import Plan, make_plan
from shardkit.failover.promote import Promotion, promote
from shardkit.failover.standing import Standing, look

__all__ = ["Plan", "Promotion", "Standing", "look", "make_plan", "promote"]
