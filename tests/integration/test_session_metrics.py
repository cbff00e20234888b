"""What sessions count."""

from __future__ import annotations

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest

from shardkit.telemetry import RouterMetrics
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, User


def test_reads_of_several_shards_are_counted(shop: Shop) -> None:
    registry = CollectorRegistry()
    cluster = shop.open(shop.map(), metrics=RouterMetrics(registry))
    shop.cluster = cluster
    with shop.session() as session:
        session.get(User, 1)
        session.scalars(sa.select(User).where(User.id == 1)).all()
        assert registry.get_sample_value("shardkit_router_scattered_reads_total", {"table": "users"}) is None
        for _ in range(3):
            session.scalars(sa.select(User)).all()
    assert registry.get_sample_value("shardkit_router_scattered_reads_total", {"table": "users"}) == 3
    assert b"shardkit_router_scattered_reads_total" in generate_latest(registry)


def test_commits_over_shards_are_counted(server_shop: Shop) -> None:
    counted = server_shop.cluster.metrics.registry
    with server_shop.sessions(transactions="atomic").begin() as session:
        session.add(User(id=server_shop.users_on(SHARDS[0], 1)[0], name="x"))
    assert counted.get_sample_value("shardkit_router_commits_over_shards_total", {"outcome": "done"}) is None
    with server_shop.sessions(transactions="atomic").begin() as session:
        session.add_all(User(id=server_shop.users_on(shard, 2)[1], name="x") for shard in SHARDS)
    assert counted.get_sample_value("shardkit_router_commits_over_shards_total", {"outcome": "done"}) == 1
