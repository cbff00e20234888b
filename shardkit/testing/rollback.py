"""Tests on another cluster than the application's, and tests that leave nothing behind.

`pointed_at` has the application's own session factory make sessions of a test cluster. `rolled_back` undoes what
sessions commit when the test ends.

Each shard's master gets one connection with a transaction that is never committed. Sessions run inside it: their
commits release savepoints. So all sessions of a test see one state, and two of them never block each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import sessionmaker

from shardkit.cluster import Cluster
from shardkit.errors import ShardkitError
from shardkit.session.factory import sessionmaker as make_factory
from shardkit.session.session import ClusterSession

Factory = TypeVar("Factory", bound="sessionmaker[ClusterSession] | async_sessionmaker[AsyncSession]")


@contextmanager
def pointed_at(factory: Factory, cluster: Cluster) -> Iterator[Factory]:
    """Meanwhile the sessions that a factory makes go to this cluster, and not to the one that it was made for.

    The factory itself is changed, so that an application that imported it is tested as it is.

    :param factory: made by `shardkit.sessionmaker` or `shardkit.async_sessionmaker`.
    :raises ShardkitError: for another factory.
    """
    _cluster_of(factory)
    # on SQLite a transaction cannot be what the factory of the application's servers asks for
    transactions = make_factory(cluster, transactions=factory.kw["transactions"]).kw["transactions"]
    with _configured(factory, cluster=cluster, transactions=transactions):
        yield factory


@contextmanager
def rolled_back(factory: sessionmaker[ClusterSession]) -> Iterator[sessionmaker[ClusterSession]]:
    """Meanwhile the sessions that a factory makes write nothing that lasts.

    The factory itself is changed, so that an application that imported it is tested as it is. What other connections
    do is not undone, nor what the servers commit by themselves (DDL).

    :param factory: made by `shardkit.sessionmaker`.
    :raises ShardkitError: for another factory.
    :raises TypeError: for a factory of asyncio sessions.
    """
    if isinstance(factory, async_sessionmaker):
        raise TypeError("this factory makes sessions for asyncio: use async_rolled_back (async with)")
    cluster = _cluster_of(factory)
    with ExitStack() as stack:
        connections = {}
        for shard in cluster.map.shards:
            connection = stack.enter_context(cluster.engine(shard).connect())
            stack.callback(connection.begin().rollback)
            _hold_open(connection)
            connections[shard] = connection
        with _configured(factory, connections=connections, join_transaction_mode="create_savepoint"):
            yield factory


@asynccontextmanager
async def async_rolled_back(
    factory: async_sessionmaker[AsyncSession],
) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """`rolled_back` for a factory made by `shardkit.async_sessionmaker`."""
    if not isinstance(factory, async_sessionmaker):
        raise TypeError("this factory makes no sessions for asyncio: use rolled_back (with)")
    cluster = _cluster_of(factory)
    async with AsyncExitStack() as stack:
        connections = {}
        for shard in cluster.map.shards:
            connection = await stack.enter_async_context(cluster.async_engine(shard).connect())
            stack.push_async_callback((await connection.begin()).rollback)
            await connection.run_sync(_hold_open)
            connections[shard] = connection
        with _configured(factory, connections=connections, join_transaction_mode="create_savepoint"):
            yield factory


@contextmanager
def _configured(factory: Any, **options: Any) -> Iterator[None]:
    before = {name: factory.kw[name] for name in options if name in factory.kw}
    factory.configure(**options)
    try:
        yield
    finally:
        for name in options:
            factory.kw.pop(name, None)
        factory.configure(**before)


def _hold_open(connection: Connection) -> None:
    """Python's sqlite3 begins no transaction for a SAVEPOINT: releasing the outermost would commit."""
    sqlite: Any = connection.connection.driver_connection
    if connection.dialect.name == "sqlite" and not sqlite.in_transaction:
        connection.exec_driver_sql("BEGIN")


def _cluster_of(factory: Any) -> Cluster:
    cluster = getattr(factory, "kw", {}).get("cluster")
    if not isinstance(cluster, Cluster):
        raise ShardkitError(
            f"{factory!r} makes no sessions of a cluster", hint="give what shardkit.sessionmaker(cluster) returned"
        )
    return cluster
