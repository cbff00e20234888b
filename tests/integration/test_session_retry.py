"""shardkit.retry: what was surely rolled back is run again, and nothing else is."""

from __future__ import annotations

import asyncio
import time

import pymysql
import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

import shardkit
from shardkit import is_retryable, retry
from shardkit.errors import CommitPending, CommitUnknown, StaleReadError, StaleShardMap
from tests.integration.conftest import DistantShop, Shop
from tests.integration.shop import User


def driver_error(number: int) -> DBAPIError:
    return OperationalError("UPDATE", {}, pymysql.err.OperationalError(number, "said so"))


@pytest.mark.parametrize(
    "error",
    [
        driver_error(1205),
        driver_error(1213),
        driver_error(1614),
        StaleShardMap("moved"),
        StaleReadError("changed"),
    ],
)
def test_what_was_rolled_back_is_run_again(shop: Shop, error: Exception) -> None:
    runs = []

    @retry(shop.sessions())
    def work(session: Session, number: int) -> int:
        runs.append(session)
        session.add(User(id=number, name="x"))
        session.flush()
        if len(runs) < 3:
            raise error
        return number * 2

    assert work(7) == 14
    assert len(set(map(id, runs))) == len(runs) == 3
    assert sum(len(ids) for ids in shop.where("users").values()) == 1


@pytest.mark.parametrize("error", [driver_error(1062), CommitUnknown("lost"), CommitPending("t", ["s"]), ValueError()])
def test_other_errors_are_raised_at_once(shop: Shop, error: Exception) -> None:
    runs = []

    @retry(shop.sessions())
    def work(session: Session) -> None:
        runs.append(1)
        session.add(User(id=7, name="x"))
        session.flush()
        raise error

    with pytest.raises(type(error)):
        work()
    assert len(runs) == 1
    assert not any(shop.where("users").values())


def test_a_commit_whose_answer_was_lost_is_not_run_again(shop: Shop) -> None:
    """The same error before the COMMIT would be."""
    factory = shop.sessions()
    lost = driver_error(2013)
    lost.connection_invalidated = True
    runs = []

    @retry(factory)
    def work(session: Session) -> None:
        runs.append(1)
        session.add(User(id=7, name="x"))

        @event.listens_for(session, "before_commit")
        def fail(_session: Session) -> None:
            raise lost

    with pytest.raises(OperationalError):
        work()
    assert len(runs) == 1
    assert is_retryable(lost)


def test_it_gives_up(shop: Shop) -> None:
    runs = []

    @retry(shop.sessions(), within=0.3)
    def work(session: Session) -> None:
        runs.append(1)
        raise driver_error(1213)

    begun = time.monotonic()
    with pytest.raises(OperationalError):
        work()
    assert len(runs) > 2
    assert 0.3 <= time.monotonic() - begun < 3


def test_the_same_with_asyncio(shop: Shop) -> None:
    runs = []

    async def whole() -> None:
        async with shop.open(shop.map()) as cluster:

            @retry(shardkit.async_sessionmaker(cluster))
            async def work(session: AsyncSession, number: int) -> int:
                runs.append(1)
                session.add(User(id=number, name="x"))
                await session.flush()
                if len(runs) < 3:
                    raise driver_error(1213)
                return number * 2

            assert await work(7) == 14

            @retry(shardkit.async_sessionmaker(cluster))
            async def twice(session: AsyncSession) -> None:
                runs.append(1)
                session.add(User(id=7, name="there already"))

            with pytest.raises(IntegrityError):
                await twice()

    asyncio.run(whole())
    assert len(runs) == 4
    assert sum(len(ids) for ids in shop.where("users").values()) == 1


def test_a_real_lost_connection(distant_shop: DistantShop) -> None:
    """Cut off in the middle of its work, and not at its commit."""
    runs = []

    @retry(distant_shop.sessions())
    def work(session: Session) -> None:
        runs.append(1)
        session.add(User(id=7, name="x"))
        session.flush()
        if len(runs) == 1:
            for proxy in distant_shop.proxies:
                proxy.cut()
        session.add(User(id=8, name="y"))

    work()
    assert len(runs) == 2
    assert sorted(number for ids in distant_shop.where("users").values() for number in ids) == [7, 8]
