"""Streams whose connection is used for something else before their last row: no row is lost in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pymysql
import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, selectinload

import shardkit
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Order, User

STREAM = select(User).order_by(User.id).execution_options(yield_per=3)


@pytest.fixture
def everyone(shop: Shop) -> list[int]:
    """Ten users on each shard, with an order each."""
    return fill(shop)


@pytest.fixture
def everyone_on_servers(server_shop: Shop) -> list[int]:
    """Ten users on each shard, with an order each."""
    return fill(server_shop)


def fill(shop: Shop) -> list[int]:
    ids = sorted(number for shard in SHARDS for number in shop.users_on(shard, 10))
    with shop.session() as session:
        session.add_all([User(id=number, name="u", orders=[Order(id=number, item="i")]) for number in ids])
        session.commit()
    return ids


def load(_session: Session, user: User) -> None:
    assert [order.id for order in user.orders] == [user.id]


def change(session: Session, user: User) -> None:
    user.name = "changed"
    session.flush()


def ask(session: Session, user: User) -> None:
    assert session.scalar(select(Order.item).where(Order.user_id == user.id)) == "i"


def save(session: Session, user: User) -> None:
    with session.begin_nested() as savepoint:
        user.name = "changed"
        session.flush()
        savepoint.rollback()


@pytest.mark.parametrize("meanwhile", [load, change, ask, save])
@pytest.mark.parametrize("shards", ["one", "all"])
def test_a_stream_goes_on_whatever_else_its_connection_is_used_for(
    shop: Shop, everyone: list[int], meanwhile: Callable[[Session, User], None], shards: str
) -> None:
    ids = everyone if shards == "all" else shop.users_on("shop-1", 10)
    with shop.session() as session:
        seen = []
        for user in session.scalars(STREAM.where(User.id.in_(ids))):
            seen.append(user.id)
            meanwhile(session, user)
        session.commit()
    assert seen == ids


def test_a_stream_goes_on_while_its_relationships_are_loaded(shop: Shop, everyone: list[int]) -> None:
    with shop.session() as session:
        users = list(session.scalars(STREAM.options(selectinload(User.orders))))
        assert [(user.id, [order.id for order in user.orders]) for user in users] == [(n, [n]) for n in everyone]


@pytest.mark.parametrize("end", [Session.commit, Session.rollback])
@pytest.mark.parametrize("transactions", ["atomic", "best_effort"])
def test_a_stream_that_its_transaction_has_left_behind_does_not_seem_to_end(
    server_shop: Shop, end: Callable[[Session], None], transactions: str
) -> None:
    ids = sorted(number for shard in SHARDS for number in server_shop.users_on(shard, 10))
    with server_shop.session(transactions=transactions) as session:
        session.add_all([User(id=number, name="u") for number in ids])
        session.commit()
        stream = iter(session.execute(select(User.id).order_by(User.id).execution_options(yield_per=3)))
        next(stream)
        end(session)
        with pytest.raises(ProgrammingError, match="has ended before the last of them"):
            list(stream)


def test_a_stream_whose_rows_have_all_been_read_ends(server_shop: Shop) -> None:
    ids = server_shop.users_on("shop-1", 3)
    with server_shop.session() as session:
        session.add_all([User(id=number, name="u") for number in ids])
        session.commit()
        stream = session.execute(select(User.id).where(User.id.in_(ids)).execution_options(yield_per=3))
        assert len(stream.fetchmany(3)) == 3
        session.commit()
        assert stream.fetchmany(3) == []


def test_what_fails_in_a_stream_fails_there(server_shop: Shop) -> None:
    """Its sixth row is an error, and is read while another statement waits for its turn."""
    ids = server_shop.users_on("shop-1", 10)
    with server_shop.session() as session:
        session.add_all([User(id=number, name="u", age=int(number == ids[5])) for number in ids])
        session.commit()
        broken = text("SELECT id, CASE age WHEN 1 THEN (SELECT 1 UNION SELECT 2) ELSE 0 END FROM users ORDER BY id")
        options = {"shardkit_shard": "shop-1", "yield_per": 2}
        try:
            stream = session.execute(broken, execution_options=options)
            stream.fetchmany(2)
        except Exception:  # noqa: BLE001 - the server may look at all rows before it sends the first
            pytest.skip("the server fails before the first row")
        assert session.scalar(select(User.name).where(User.id == ids[0])) == "u"
        with pytest.raises(Exception, match="more than 1 row"):
            stream.fetchall()


ASYNC_WORK: list[Callable[[AsyncSession, list[int]], Awaitable[None]]] = []


@ASYNC_WORK.append
async def ask_async(session: AsyncSession, ids: list[int]) -> None:
    assert await session.scalar(select(User.name).where(User.id == ids[-1])) == "u"


@ASYNC_WORK.append
async def stream_async(session: AsyncSession, ids: list[int]) -> None:
    other = await session.stream_scalars(select(User.id).order_by(User.id).execution_options(yield_per=4))
    assert [number async for number in other] == ids


@ASYNC_WORK.append
async def begin_stream_async(session: AsyncSession, ids: list[int]) -> None:
    other = await session.stream_scalars(select(User.id).order_by(User.id).execution_options(yield_per=4))
    assert await anext(other) == ids[0]


@ASYNC_WORK.append
async def change_async(session: AsyncSession, ids: list[int]) -> None:
    (await session.get_one(User, ids[0])).age = 7
    await session.flush()


def run_async(shop: Shop, work: Callable[[Any], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with shop.open(shop.map(), **options) as cluster:
            await work(shardkit.async_sessionmaker(cluster, transactions="best_effort"))

    asyncio.run(run())


@pytest.mark.parametrize("meanwhile", ASYNC_WORK)
def test_asyncio_streams_go_on_whatever_else_their_connections_are_used_for(
    shop: Shop, everyone: list[int], meanwhile: Callable[[AsyncSession, list[int]], Awaitable[None]]
) -> None:
    async def work(factory: Any) -> None:
        async with factory() as session:
            stream = await session.stream_scalars(select(User.id).order_by(User.id).execution_options(yield_per=3))
            seen = []
            async for number in stream:
                seen.append(number)
                await meanwhile(session, everyone)
            assert seen == everyone
            users = await session.stream_scalars(STREAM.options(selectinload(User.orders)))
            assert [(user.id, len(user.orders)) async for user in users] == [(number, 1) for number in everyone]

    run_async(shop, work)


@pytest.mark.parametrize("end", [AsyncSession.commit, AsyncSession.rollback])
def test_an_asyncio_stream_that_its_transaction_has_left_behind_does_not_seem_to_end(
    server_shop: Shop, end: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    ids = sorted(number for shard in SHARDS for number in server_shop.users_on(shard, 10))
    with server_shop.session() as session:
        session.add_all([User(id=number, name="u") for number in ids])
        session.commit()

    async def work(factory: Any) -> None:
        async with factory() as session:
            stream = await session.stream_scalars(select(User.id).order_by(User.id).execution_options(yield_per=3))
            await anext(stream)
            await end(session)
            with pytest.raises(ProgrammingError, match="has ended before the last of them"):
                await stream.all()
            assert await session.scalar(select(User.name).where(User.id == ids[-1])) == "u"
            stream = await session.stream_scalars(
                select(User.id).where(User.id == ids[0]).execution_options(yield_per=3)
            )
            assert await stream.fetchmany(1) == [ids[0]]
            await end(session)
            assert await stream.all() == []

    run_async(server_shop, work)


def opener(server: LocalDatabaseServer, database: str | None) -> Callable[[], Any]:
    """Opens connections as an application may, for ``create_engine(creator=...)``."""
    credentials = server.credentials(server.endpoint(database))

    def connect() -> Any:
        return pymysql.connect(
            host=server.host,
            port=server.port,
            user=credentials.user,
            password=credentials.password or "",
            database=database,
            ssl_disabled=True,
            client_flag=pymysql.constants.CLIENT.FOUND_ROWS,
        )

    return connect


@pytest.mark.parametrize("how", ["opened before", "a creator"])
def test_streams_of_given_engines_are_kept_alike(
    server_shop: Shop, database_server: LocalDatabaseServer, everyone_on_servers: list[int], how: str
) -> None:
    engines = {}
    for shard in SHARDS:
        given = server_shop.cluster.engine(shard)
        own = {"creator": opener(database_server, given.url.database)} if how == "a creator" else {}
        engine = create_engine(given.url, connect_args={"ssl_disabled": True}, **own)
        engine.connect().close()
        engines[shard, "master"] = engine
    cluster = server_shop.open(server_shop.map(), engines)
    with shardkit.sessionmaker(cluster, transactions="best_effort")() as session:
        users = list(session.scalars(STREAM.options(selectinload(User.orders))))
        assert [(user.id, len(user.orders)) for user in users] == [(number, 1) for number in everyone_on_servers]
        stream = session.scalars(STREAM)
        next(stream)
        session.rollback()
        with pytest.raises(ProgrammingError, match="has ended before the last of them"):
            stream.all()
    for engine in engines.values():
        engine.dispose()


def test_streams_on_given_connections_are_kept_alike(server_shop: Shop, everyone_on_servers: list[int]) -> None:
    with ExitStack() as stack:
        connections = {}
        for shard in SHARDS:
            engine = create_engine(server_shop.cluster.engine(shard).url, connect_args={"ssl_disabled": True})
            stack.callback(engine.dispose)
            connections[shard] = stack.enter_context(engine.connect())
        with server_shop.session(connections=connections) as session:
            users = list(session.scalars(STREAM.options(selectinload(User.orders))))
            assert [(user.id, len(user.orders)) for user in users] == [(number, 1) for number in everyone_on_servers]


def test_streams_of_given_asyncio_engines_are_kept_alike(server_shop: Shop, everyone_on_servers: list[int]) -> None:
    async def work() -> None:
        engines: dict[tuple[str, str], Any] = {}
        async with server_shop.open(server_shop.map()) as own:
            for shard in SHARDS:
                engine = create_async_engine(own.async_engine(shard).url)
                async with engine.connect():
                    engines[shard, "master"] = engine
        cluster = server_shop.open(server_shop.map(), engines)
        async with cluster, shardkit.async_sessionmaker(cluster, transactions="best_effort")() as session:
            users = await session.stream_scalars(STREAM.options(selectinload(User.orders)))
            seen = [(user.id, len(user.orders)) async for user in users]
        assert seen == [(number, 1) for number in everyone_on_servers]
        for engine in engines.values():
            await engine.dispose()

    asyncio.run(work())
