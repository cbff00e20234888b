"""Reads over shards that do not answer in time, or not at all, and reads of more rows than memory should hold."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

import shardkit
from shardkit.errors import DeadlineExceeded, RoutingError
from tests.integration.conftest import DistantShop, Shop
from tests.integration.shop import SHARDS, Message, User

SOON = {"shardkit_deadline": 0.5}


@contextmanager
def locked(shop: Shop, shard: str) -> Iterator[None]:
    """Another client holds the users of one shard: reads of them wait."""
    with closing(shop.connect(shop.masters[shard])) as connection:
        connection.cursor().execute("LOCK TABLES users WRITE")
        yield


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < seconds


def waiting(shop: Shop) -> list[Any]:
    """Statements about users that the server is at work on."""
    asked = "SELECT INFO FROM information_schema.PROCESSLIST WHERE COMMAND = 'Query' AND INFO LIKE '%FROM users%'"
    found = shop.execute(shop.masters["shop-0"], asked)
    return [row for row in found if "PROCESSLIST" not in row[0]]


@pytest.fixture
def users(server_shop: Shop) -> list[int]:
    """Two users on each shard."""
    ids = [number for shard in SHARDS for number in server_shop.users_on(shard, 2)]
    with server_shop.session() as session:
        session.add_all(User(id=number, name=f"user {number}", age=number) for number in ids)
        session.commit()
    return sorted(ids)


def test_a_shard_that_is_late_fails_the_read(server_shop: Shop, users: list[int]) -> None:
    with server_shop.session() as session:
        with locked(server_shop, "shop-1"):
            with at_most(5), pytest.raises(DeadlineExceeded, match=r"shop-1 did not answer within 0\.5 s") as raised:
                session.scalars(sa.select(User), execution_options=SOON).all()
            assert raised.value.shard == "shop-1"
            late = ("shardkit_router_deadlines_exceeded_total", {"shard": "shop-1"})
            assert server_shop.cluster.metrics.registry.get_sample_value(*late) == 1
            assert waiting(server_shop) == []
        session.rollback()
        assert sorted(user.id for user in session.scalars(sa.select(User), execution_options=SOON)) == users


def test_the_same_with_asyncio(server_shop: Shop, users: list[int]) -> None:
    async def work() -> None:
        async with server_shop.open(server_shop.map()) as cluster, shardkit.async_sessionmaker(cluster)() as session:
            with locked(server_shop, "shop-1"):
                with at_most(5), pytest.raises(DeadlineExceeded):
                    await session.scalars(sa.select(User), execution_options=SOON)
                assert waiting(server_shop) == []
            await session.rollback()
            found = await session.scalars(sa.select(User), execution_options=SOON)
            assert sorted(user.id for user in found) == users

    asyncio.run(work())


def test_a_read_of_one_shard_has_a_deadline_too(server_shop: Shop, users: list[int]) -> None:
    (number, *_) = server_shop.users_on("shop-1", 1)
    with server_shop.session() as session:
        with locked(server_shop, "shop-1"):
            for statement in (sa.select(User).where(User.id == number), sa.select(User.name).where(User.id == number)):
                with at_most(5), pytest.raises(DeadlineExceeded):
                    session.execute(statement, execution_options=SOON)
                session.rollback()
            with at_most(5), pytest.raises(DeadlineExceeded):
                session.get(User, number, execution_options=SOON)
            session.rollback()
            assert waiting(server_shop) == []
        assert session.get_one(User, number, execution_options=SOON).id == number


def test_a_subquery_that_runs_first_has_the_time_of_its_statement(server_shop: Shop, users: list[int]) -> None:
    statement = sa.select(Message).where(Message.recipient_id.in_(sa.select(User.id).where(User.age > 1)))
    with server_shop.session() as session:
        with locked(server_shop, "shop-1"):
            with at_most(5), pytest.raises(DeadlineExceeded):
                session.scalars(statement, execution_options=SOON)
            assert waiting(server_shop) == []
        session.rollback()
        assert session.scalars(statement, execution_options=SOON).all() == []


def test_a_statement_that_does_not_mind_being_killed(server_shop: Shop) -> None:
    """SLEEP() returns 1 when it is killed, as if nothing had happened."""
    options = {**SOON, "shardkit_shard": "shop-0"}
    with server_shop.session() as session, at_most(5), pytest.raises(DeadlineExceeded):
        session.execute(sa.text("SELECT SLEEP(30)"), execution_options=options)


def test_a_server_that_nothing_comes_back_from(distant_shop: DistantShop) -> None:
    with distant_shop.session() as session:
        session.scalars(sa.select(User)).all()
        distant_shop.proxies[1].blackhole()
        with at_most(8), pytest.raises(DeadlineExceeded):
            session.scalars(sa.select(User), execution_options=SOON).all()
        distant_shop.proxies[1].restore()
        session.rollback()
        assert session.scalars(sa.select(User), execution_options=SOON).all() == []


def test_in_asyncio_a_server_that_nothing_comes_back_from(distant_shop: DistantShop) -> None:
    async def whole() -> None:
        async with (
            distant_shop.open(distant_shop.map()) as cluster,
            shardkit.async_sessionmaker(cluster)() as session,
        ):
            await session.scalars(sa.select(User))
            distant_shop.proxies[1].blackhole()
            with at_most(8), pytest.raises(DeadlineExceeded):
                await session.scalars(sa.select(User), execution_options=SOON)
            distant_shop.proxies[1].restore()
            await session.rollback()
            assert (await session.scalars(sa.select(User), execution_options=SOON)).all() == []

    asyncio.run(whole())


def test_sqlite_is_interrupted(shop: Shop) -> None:
    if shop.kind != "sqlite":
        pytest.skip("about SQLite")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    options = {**SOON, "shardkit_shard": "shop-0"}
    with shop.session() as session, at_most(5), pytest.raises(DeadlineExceeded):
        session.execute(sa.text(endless), execution_options=options)


def test_what_is_answered_in_time_is_not_touched(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all(User(id=number, name="x") for number in range(20))
        session.commit()
        for _ in range(3):
            assert len(session.scalars(sa.select(User), execution_options={"shardkit_deadline": 60}).all()) == 20
        assert session.get_one(User, 3, execution_options={"shardkit_deadline": 60}).id == 3
        assert session.scalar(sa.select(sa.func.count(User.id)), execution_options={"shardkit_deadline": 60}) == 20


@pytest.mark.parametrize("seconds", [0, -1, "5", True])
def test_deadlines_that_are_none(shop: Shop, seconds: Any) -> None:
    with shop.session() as session:
        for statement in (sa.select(User), sa.select(User).where(User.id == 1)):
            with pytest.raises(RoutingError, match="shardkit_deadline"):
                session.execute(statement, execution_options={"shardkit_deadline": seconds})
        with pytest.raises(RoutingError, match="shardkit_partial_ok"):
            session.execute(sa.select(User), execution_options={"shardkit_partial_ok": 1})


# --- shards that are missing ------------------------------------------------------------------------------------------


def test_the_rows_of_the_shards_that_are_there(distant_shop: DistantShop) -> None:
    there = [distant_shop.users_on(shard, 2) for shard in SHARDS]
    with distant_shop.session() as session:
        session.add_all(User(id=number, name="x", age=number) for ids in there for number in ids)
        session.commit()
    wanted = sorted(there[0] + there[2])
    partial = {"shardkit_partial_ok": True}
    for already_connected in (True, False):
        with distant_shop.session() as session:
            if already_connected:
                session.scalars(sa.select(User)).all()
            distant_shop.proxies[1].refuse()
            distant_shop.proxies[1].cut()
            result: Any = session.execute(sa.select(User.id).order_by(User.id), execution_options=partial)
            assert result.missing_shards == ("shop-1",)
            assert result.scalars().all() == wanted
            session.rollback()
            counted: Any = session.execute(sa.select(sa.func.count(User.id)), execution_options=partial)
            assert counted.missing_shards == ("shop-1",)
            assert counted.scalar() == 4
            session.rollback()
            with pytest.raises(OperationalError):
                session.scalars(sa.select(User)).all()
        distant_shop.proxies[1].start()
    with distant_shop.session() as session:
        whole: Any = session.execute(sa.select(User.id), execution_options=partial)
        assert (whole.missing_shards, len(whole.all())) == ((), 6)
        for proxy in distant_shop.proxies:
            proxy.refuse()
            proxy.cut()
        with pytest.raises(OperationalError):
            session.execute(sa.select(User.id), execution_options=partial)


def test_a_late_shard_may_be_missing(server_shop: Shop, users: list[int]) -> None:
    with server_shop.session() as session, locked(server_shop, "shop-1"), at_most(5):
        late: Any = session.execute(sa.select(User.id), execution_options={**SOON, "shardkit_partial_ok": True})
        assert late.missing_shards == ("shop-1",)
        assert len(late.all()) == 4


def test_an_error_is_no_missing_shard(server_shop: Shop) -> None:
    server_shop.execute(server_shop.masters["shop-1"], "ALTER TABLE users RENAME TO people")
    with server_shop.session() as session, pytest.raises(DBAPIError):
        session.execute(sa.select(User.id), execution_options={"shardkit_partial_ok": True})
    server_shop.execute(server_shop.masters["shop-1"], "ALTER TABLE people RENAME TO users")


# --- streams ----------------------------------------------------------------------------------------------------------


WIDE = sa.select(User.id, sa.func.repeat(User.name, 1_000_000).label("wide")).order_by(User.id)


@pytest.fixture
def impatient(server_shop: Shop) -> Iterator[Shop]:
    """A server that hangs up on a client that does not take its rows for a second."""
    anywhere = server_shop.masters["shop-0"]
    ((usual,),) = server_shop.execute(anywhere, "SELECT @@GLOBAL.net_write_timeout")
    server_shop.execute(anywhere, "SET GLOBAL net_write_timeout = 1")
    for shard in SHARDS:
        ids = ", ".join(f"({number}, 'abcdefghij')" for number in server_shop.users_on(shard, 6))
        server_shop.execute(server_shop.masters[shard], f"INSERT INTO users (id, name) VALUES {ids}")
    yield server_shop
    server_shop.execute(anywhere, f"SET GLOBAL net_write_timeout = {usual}")


def test_a_shard_whose_rows_wait_is_not_hung_up_on(impatient: Shop) -> None:
    """60 MB a shard, read with a long pause: more than the buffers between server and client hold."""
    with impatient.session() as session:
        rows = session.execute(WIDE, execution_options={"yield_per": 1})
        found = [row.id for row in itertools.islice(rows, 1)]
        time.sleep(4)
        found += [row.id for row in rows]
    assert found == sorted(number for shard in SHARDS for number in impatient.users_on(shard, 6))
    with impatient.cluster.engine("shop-0").connect() as connection:
        assert connection.exec_driver_sql("SELECT @@net_write_timeout").scalar() == 1


def test_asyncio_streams_too(impatient: Shop) -> None:
    async def work() -> None:
        async with impatient.open(impatient.map()) as cluster, shardkit.async_sessionmaker(cluster)() as session:
            found = await _streamed(session)
            assert found == sorted(number for shard in SHARDS for number in impatient.users_on(shard, 6))

    asyncio.run(work())


async def _streamed(session: AsyncSession) -> list[int]:
    found = []
    async for row in await session.stream(WIDE, execution_options={"yield_per": 1}):
        if not found:
            await asyncio.sleep(4)
        found.append(row.id)
    return found
