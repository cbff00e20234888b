"""Sessions on connections that the application has already, and tests that are rolled back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.orm import Session

import shardkit
from shardkit.errors import RoutingError, ShardkitError
from shardkit.testing.rollback import async_rolled_back, rolled_back
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Country, User


@pytest.fixture
def connections(shop: Shop) -> Iterator[dict[str, Connection]]:
    with ExitStack() as stack:
        yield {shard: stack.enter_context(shop.cluster.engine(shard).connect()) for shard in SHARDS}


def one_user_a_shard(shop: Shop) -> list[User]:
    return [User(id=shop.users_on(shard, 1)[0], name=shard) for shard in SHARDS]


def test_everything_goes_through_the_given_connections(shop: Shop, connections: dict[str, Connection]) -> None:
    with shop.session(connections=connections) as session:
        session.add_all([*one_user_a_shard(shop), Country(code="kr", name="Korea")])
        session.flush()
        for shard, connection in connections.items():
            assert connection.scalar(sa.text("SELECT name FROM users")) == shard
            assert connection.scalar(sa.text("SELECT count(*) FROM countries")) == 1
        session.commit()
    assert all(len(ids) == 1 for ids in shop.where("users").values())


@pytest.mark.parametrize("mode", ["rollback_only", "control_fully", "create_savepoint", "conditional_savepoint"])
def test_a_transaction_that_was_there_before_is_its_owners(
    shop: Shop, connections: dict[str, Connection], mode: str
) -> None:
    for connection in connections.values():
        connection.begin()
    with shop.session(connections=connections, join_transaction_mode=mode) as session:
        session.add_all(one_user_a_shard(shop))
        session.commit()
    if mode == "control_fully":
        assert all(len(ids) == 1 for ids in shop.where("users").values())
        return
    assert all(connection.in_transaction() for connection in connections.values())
    for connection in connections.values():
        connection.commit()
    assert all(len(ids) == 1 for ids in shop.where("users").values())


def test_a_shard_without_a_connection_cannot_be_used(shop: Shop, connections: dict[str, Connection]) -> None:
    del connections["shop-1"]
    with shop.session(connections=connections) as session:
        session.get(User, shop.users_on("shop-0", 1)[0])
        with pytest.raises(RoutingError, match="none to shard shop-1"):
            session.get(User, shop.users_on("shop-1", 1)[0])


def test_bad_connections_are_refused(shop: Shop, connections: dict[str, Connection]) -> None:
    first = connections["shop-0"]
    for given, said in (
        ({"shop-0": shop.cluster.engine("shop-0")}, "no open connection: Engine"),
        ({"shop-9": first}, "no shard is named 'shop-9'"),
        ({"shop-0": first, "shop-1": first}, "shard shop-1 has the connection of another shard"),
    ):
        with pytest.raises(ShardkitError, match=said):
            shop.session(connections=given)


def test_what_is_committed_in_a_rolled_back_test_is_undone(shop: Shop) -> None:
    factory = shop.sessions(transactions="best_effort", join_transaction_mode="control_fully")
    with rolled_back(factory):
        with factory.begin() as session:
            session.add_all([*one_user_a_shard(shop), Country(code="kr", name="Korea")])
        with factory() as session:
            assert len(session.scalars(sa.select(User)).all()) == 3
            session.execute(sa.delete(User), execution_options={"shardkit_scatter": True})
            session.rollback()
            assert len(session.scalars(sa.select(User)).all()) == 3
    assert all(not ids for ids in shop.where("users").values())
    assert all(not ids for ids in shop.where("countries", "code").values())
    with factory.begin() as session:
        assert session.join_transaction_mode == "control_fully"
        session.add_all(one_user_a_shard(shop))
    assert all(len(ids) == 1 for ids in shop.where("users").values())


def test_the_same_with_asyncio(shop: Shop) -> None:
    async def work() -> None:
        async with shop.open(shop.map()) as cluster:
            factory = shardkit.async_sessionmaker(cluster)
            async with async_rolled_back(factory):
                async with factory.begin() as session:
                    session.add_all(one_user_a_shard(shop))
                async with factory() as session:
                    assert len((await session.scalars(sa.select(User))).all()) == 3
            async with factory() as session:
                assert (await session.scalars(sa.select(User))).all() == []

    asyncio.run(work())
    assert all(not ids for ids in shop.where("users").values())


def test_only_factories_of_clusters_can_be_rolled_back() -> None:
    with pytest.raises(ShardkitError, match="makes no sessions of a cluster"), rolled_back(Session):  # type: ignore[arg-type]
        pass
