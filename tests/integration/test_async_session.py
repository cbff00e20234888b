"""The same over asyncio: the claims of test_session.py, through AsyncSession on aiosqlite and asyncmy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

import shardkit
from shardkit.errors import (
    BucketClosed,
    KeyChange,
    MissingKey,
    PartialCommit,
    PreconditionFailed,
    RoutingError,
    SecondShardWritten,
)
from tests.integration.conftest import DistantShop, Shop
from tests.integration.shop import SHARDS, Country, Note, Order, User

Work = Callable[[AsyncSession], Awaitable[None]]


def run(shop: Shop, work: Work, **options: Any) -> None:
    """Run one session's work in an event loop of its own, and close the loop's connections in it."""

    async def whole() -> None:
        async with shop.open(shop.map()) as cluster:
            factory = shardkit.async_sessionmaker(cluster, **{"transactions": "best_effort", **options})
            async with factory() as session:
                await work(session)

    asyncio.run(whole())


@pytest.fixture
def users(shop: Shop) -> dict[str, list[int]]:
    """Three users on each shard with an order each; written outside."""
    found = {shard: shop.users_on(shard, 3) for shard in SHARDS}
    for shard, ids in found.items():
        for number in ids:
            master = shop.masters[shard]
            shop.execute(master, f"INSERT INTO users (id, name, age) VALUES ({number}, 'user {number}', 1)")
            shop.execute(
                master,
                f"INSERT INTO orders (id, user_id, item, amount) VALUES ({number * 10}, {number}, 'item', {number})",
            )
    return found


def test_new_objects_land_on_the_shard_of_their_key(shop: Shop) -> None:
    async def work(session: AsyncSession) -> None:
        session.add_all([User(id=number, name="x", orders=[Order(id=number, item="x")]) for number in range(40)])
        await session.commit()
        await session.execute(insert(User), [{"id": number, "name": "x"} for number in range(40, 80)])
        session.add_all([Note(owner_id=number, text="x") for number in range(10)])
        session.add(Country(code="kr", name="Korea"))
        await session.commit()

    run(shop, work)
    where = shop.where("users")
    assert sorted(number for ids in where.values() for number in ids) == list(range(80))
    assert all(shop.shard_of(number) == shard for shard, ids in where.items() for number in ids)
    orders = shop.where("orders", "user_id")
    assert all(shop.shard_of(number) == shard for shard, ids in orders.items() for number in ids)
    assert len({number for ids in shop.where("notes").values() for number in ids}) == 10
    assert set(map(tuple, shop.where("countries", "code").values())) == {("kr",)}


def test_reads_by_key_and_over_all_shards(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = sorted(number for ids in users.values() for number in ids)

    async def work(session: AsyncSession) -> None:
        for shard, ids in users.items():
            user = await session.get_one(User, ids[0])
            assert sa.inspect(user).identity_key[2] == shard
            assert await session.get(User, ids[0]) is user
        order = await session.get_one(Order, everyone[0] * 10)
        assert order.user_id == everyone[0]
        found = await session.scalars(select(User).order_by(User.id.desc()).limit(4))
        assert [user.id for user in found] == everyone[::-1][:4]
        assert await session.scalar(select(func.count()).select_from(User)) == 9
        assert await session.scalar(select(func.sum(Order.amount))) == sum(everyone)
        wanted = users["shop-0"][:2] + users["shop-2"][:1]
        assert {user.id for user in await session.scalars(select(User).where(User.id.in_(wanted)))} == set(wanted)
        eager = await session.scalars(select(User).options(selectinload(User.orders)).order_by(User.id))
        assert [[order.id for order in user.orders] for user in eager] == [[number * 10] for number in everyone]
        assert (await session.scalars(select(User).where(User.id == 1, User.id == 2))).all() == []

    run(shop, work)


def test_streams_over_all_shards(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = sorted(number for ids in users.values() for number in ids)

    async def work(session: AsyncSession) -> None:
        stream = await session.stream_scalars(select(User.id).order_by(User.id))
        assert [number async for number in stream] == everyone
        one = await session.stream_scalars(select(User).where(User.id == everyone[0]))
        assert [user.id async for user in one] == everyone[:1]

    run(shop, work)


def test_updates_deletes_and_refresh(shop: Shop, users: dict[str, list[int]]) -> None:
    number = users["shop-1"][0]

    async def work(session: AsyncSession) -> None:
        user = await session.get_one(User, number)
        user.name = "new"
        await session.commit()
        await session.refresh(user)
        assert user.name == "new"
        assert (
            [order.id for order in await user.awaitable_attrs.orders] == [number * 10]
            if hasattr(user, "awaitable_attrs")
            else True
        )
        result: Any = await session.execute(update(User).values(age=5), execution_options={"shardkit_scatter": True})
        assert result.rowcount == 9
        other = await session.get_one(User, users["shop-2"][0], options=[selectinload(User.orders)])
        await session.delete(other)
        await session.commit()

    run(shop, work)
    assert (number, "new", 5) in shop.rows("shop-1", "users", "id, name, age")
    assert shop.rows("shop-2", "users", "id") == [(number,) for number in users["shop-2"][1:]]


def test_refusals_are_the_same(shop: Shop, users: dict[str, list[int]]) -> None:
    ours, theirs = users["shop-0"][0], users["shop-1"][0]

    async def work(session: AsyncSession) -> None:
        with pytest.raises(MissingKey):
            await session.execute(insert(Order), [{"id": 1, "item": "x"}])
        with pytest.raises(RoutingError):
            await session.execute(sa.text("SELECT 1 /* by hand */ FROM users u, users v"))
        order = await session.get_one(Order, ours * 10)
        order.user_id = theirs
        with pytest.raises(KeyChange):
            await session.flush()
        await session.rollback()

    run(shop, work)


def test_under_single_a_second_written_shard_raises_and_rolls_back(shop: Shop) -> None:
    here, there = shop.users_on("shop-0", 1)[0], shop.users_on("shop-1", 1)[0]

    async def work(session: AsyncSession) -> None:
        await session.execute(insert(User).values(id=here, name="x"))
        with pytest.raises(SecondShardWritten):
            await session.execute(insert(User).values(id=there, name="x"))
        await session.rollback()

    run(shop, work, transactions="single")
    assert not any(shop.where("users").values())


def test_a_partial_commit_says_what_is_durable(server_shop: Shop) -> None:
    here, there = server_shop.users_on("shop-0", 1)[0], server_shop.users_on("shop-1", 1)[0]

    async def work(session: AsyncSession) -> None:
        await session.execute(insert(User).values(id=here, name="x"))
        await session.execute(insert(User).values(id=there, name="x"))
        connection = await session.connection(bind_arguments={"shardkit_shard": "shop-1"})
        number = (await connection.exec_driver_sql("SELECT connection_id()")).scalar_one()
        server_shop.execute(server_shop.masters["shop-0"], f"KILL {number}")
        with pytest.raises(PartialCommit) as caught:
            await session.commit()
        assert (caught.value.committed, list(caught.value.failed)) == (("shop-0",), ["shop-1"])
        await session.rollback()

    run(server_shop, work)
    assert server_shop.where("users")["shop-0"] == [here]
    assert server_shop.where("users")["shop-1"] == []


def test_shards_are_asked_at_the_same_time(distant_shop: DistantShop) -> None:
    """Three shards, each 0.2 s away, answer in less time than two of them would one after the other."""

    async def work(session: AsyncSession) -> None:
        await session.execute(select(User.id))
        distant_shop.go_far()
        began = asyncio.get_running_loop().time()
        assert (await session.execute(select(User.id))).all() == []
        assert 0.2 <= asyncio.get_running_loop().time() - began < 0.4

    run(distant_shop, work)


def test_many_tasks_share_one_cluster(shop: Shop) -> None:
    async def whole() -> None:
        async with shop.open(shop.map()) as cluster:
            factory = shardkit.async_sessionmaker(cluster)

            async def one(number: int) -> None:
                async with factory.begin() as session:
                    session.add(User(id=number, name=str(number)))
                async with factory() as session:
                    assert (await session.get_one(User, number)).name == str(number)
                    assert await session.scalar(select(func.count()).select_from(User).where(User.id == number)) == 1

            limit = asyncio.Semaphore(8)

            async def limited(number: int) -> None:
                async with limit:
                    await one(number)

            await asyncio.gather(*(limited(number) for number in range(40)))

    asyncio.run(whole())
    assert sum(map(len, shop.where("users").values())) == 40


def test_errors_of_the_server_arrive_as_ours(server_shop: Shop) -> None:
    user = server_shop.users_on("shop-1", 1)[0]
    server_shop.execute(
        server_shop.masters["shop-1"],
        "CREATE TRIGGER refuse BEFORE INSERT ON users FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = "
        "'shardkit: bucket 12 of keyspace orders is frozen; moved_to=shop-2'",
    )

    async def work(session: AsyncSession) -> None:
        session.add(User(id=user, name="x"))
        with pytest.raises(BucketClosed) as caught:
            await session.commit()
        assert caught.value.moved_to == "shop-2"

    try:
        run(server_shop, work)
    finally:
        server_shop.execute(server_shop.masters["shop-1"], "DROP TRIGGER refuse")


def test_a_wrong_password_is_named_without_showing_it(server_shop: Shop) -> None:
    async def whole() -> None:
        cluster = server_shop.open(server_shop.map(), credentials=shardkit.fixed("nobody", "wr0ng-s3cret"))
        async with cluster, shardkit.async_sessionmaker(cluster)() as session:
            with pytest.raises(PreconditionFailed, match=r"refused the log-on|lacks a package") as caught:
                await session.get(User, 1)
            assert "wr0ng-s3cret" not in str(caught.value)

    asyncio.run(whole())
