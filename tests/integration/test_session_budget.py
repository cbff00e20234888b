"""Connections are bounded: however many threads read from however many shards, no pool grows beyond its limit."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Self

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

import shardkit
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, User

LIMITS = {"pool_size": 2, "max_overflow": 1, "pool_timeout": 60}
#: The pool's, and one for a word aside: is a table there, where is a key, KILL QUERY.
BOUND = 3 + 1
READERS = 24


class Census:
    """Counts the connections to each shard's database, again and again."""

    def __init__(self, shop: Shop) -> None:
        self.most = dict.fromkeys(SHARDS, 0)
        self._shop = shop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count)

    def _count(self) -> None:
        names = {self._shop.masters[shard].database: shard for shard in SHARDS}
        asked = "SELECT DB, COUNT(*) FROM information_schema.PROCESSLIST WHERE ID <> CONNECTION_ID() GROUP BY DB"
        with closing(self._shop.connect(self._shop.masters["shop-0"])) as connection:
            cursor = connection.cursor()
            while not self._ended.is_set():
                cursor.execute(asked)
                for name, count in cursor.fetchall():
                    if name in names:
                        self.most[names[name]] = max(self.most[names[name]], count)
                time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()


def test_threads_share_the_pools(server_shop: Shop) -> None:
    options = {**server_shop.options["engine_options"], **LIMITS}
    cluster = server_shop.open(server_shop.map(), engine_options=options)
    factory = shardkit.sessionmaker(cluster)
    with factory.begin() as session:
        session.add_all(User(id=number, name="x") for number in range(30))

    def read(_number: int) -> int:
        with factory() as session:
            return sum(len(session.scalars(sa.select(User)).all()) for _ in range(4))

    with Census(server_shop) as census, ThreadPoolExecutor(READERS) as readers:
        assert set(readers.map(read, range(READERS))) == {120}
    assert max(census.most.values()) >= 2
    assert all(most <= BOUND for most in census.most.values()), census.most


def test_tasks_share_the_pools(server_shop: Shop) -> None:
    async def read(factory: async_sessionmaker[AsyncSession]) -> int:
        async with factory() as session:
            return sum([len((await session.scalars(sa.select(User))).all()) for _ in range(4)])

    async def work() -> None:
        cluster = server_shop.open(server_shop.map(), async_engine_options=LIMITS)
        async with cluster:
            factory = shardkit.async_sessionmaker(cluster, transactions="best_effort")
            async with factory.begin() as session:
                session.add_all(User(id=number, name="x") for number in range(30))
            with Census(server_shop) as census:
                assert set(await asyncio.gather(*(read(factory) for _ in range(READERS)))) == {120}
            assert max(census.most.values()) >= 2
            assert all(most <= BOUND for most in census.most.values()), census.most

    asyncio.run(work())
