"""Tests that leave nothing behind: what sessions commit is rolled back when the test ends.

Each shard's master gets one connection with a transaction that is never committed. Sessions run inside it: their
commits release savepoints. So all sessions of a test see one state, and two of them never block each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import sessionmaker

from shardkit.cluster import Cluster
from shardkit.errors import ShardkitError
from shardkit.session.session import ClusterSession

_OPTIONS = ("connections", "join_transaction_mode")


@contextmanager
def rolled_back(factory: sessionmaker[ClusterSession]) -> Iterator[sessionmaker[ClusterSession]]:
    """Meanwhile the sessions that a factory makes write nothing that lasts.

    The factory itself is changed, so that an application that imported it is tested as it is. What other connections
    do is not undone, nor what the servers commit by themselves (DDL).

    :param factory: made by `shardkit.sessionmaker`.
    :raises ShardkitError: for another factory.
    """
    cluster = _cluster_of(factory)
    with ExitStack() as stack:
        connections = {}
        for shard in cluster.map.shards:
            connection = stack.enter_context(cluster.engine(shard).connect())
            stack.callback(connection.begin().rollback)
            _hold_open(connection)
            connections[shard] = connection
        with _configured(factory, connections):
            yield factory


@asynccontextmanager
async def async_rolled_back(
    factory: async_sessionmaker[AsyncSession],
) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """`rolled_back` for a factory made by `shardkit.async_sessionmaker`."""
    cluster = _cluster_of(factory)
    async with AsyncExitStack() as stack:
        connections = {}
        for shard in cluster.map.shards:
            connection = await stack.enter_async_context(cluster.async_engine(shard).connect())
            stack.push_async_callback((await connection.begin()).rollback)
            await connection.run_sync(_hold_open)
            connections[shard] = connection
        with _configured(factory, connections):
            yield factory


@contextmanager
def _configured(factory: Any, connections: Any) -> Iterator[None]:
    before = {name: factory.kw[name] for name in _OPTIONS if name in factory.kw}
    factory.configure(connections=connections, join_transaction_mode="create_savepoint")
    try:
        yield
    finally:
        for name in _OPTIONS:
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
