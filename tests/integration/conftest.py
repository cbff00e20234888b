"""The shop, on SQLite and on servers, for tests of clusters and sessions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.engines import GivenEngines
from shardkit.shardmap import ShardMap
from shardkit.testing import TcpProxy
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Endpoint
from tests.integration.shop import SHARDS, Base, Databases, sqlite_databases

FLAVOUR = os.environ.get("SHARDKIT_TEST_FLAVOUR", "mariadb")
_numbers = itertools.count(1)


class Shop(Databases):
    """The shop's databases with a cluster over them."""

    def __init__(self, databases: Databases, kind: str, options: dict[str, Any]) -> None:
        super().__init__(databases.masters, databases.connect)
        self.kind = kind
        self.options = options
        self._open: list[Cluster] = []
        self.cluster = self.open(self.map())

    def open(self, source: ShardMap | str, engines: GivenEngines | None = None, **options: Any) -> Cluster:
        """A further cluster, closed after the test."""
        cluster = create_cluster(source, engines=engines, **{**self.options, **options})
        self._open.append(cluster)
        return cluster

    def sessions(self, **options: Any) -> sessionmaker[Any]:
        """A session factory on the shop's cluster."""
        return shardkit.sessionmaker(self.cluster, **options)

    def session(self, **options: Any) -> Session:
        """One session; transactions may write to several shards, since most tests do."""
        made: Session = self.sessions(**{"transactions": "best_effort", **options})()
        return made

    def shard_of(self, user_id: int) -> str:
        """Where a user lives, as the map says."""
        return self.cluster.locate("users", id=user_id).shard

    def users_on(self, shard: str, count: int) -> list[int]:
        """The first ``count`` user ids that live on this shard."""
        found = (number for number in itertools.count(1) if self.shard_of(number) == shard)
        return list(itertools.islice(found, count))

    def close(self) -> None:
        for cluster in self._open:
            cluster.dispose()


@pytest.fixture(scope="session")
def server_databases(request: pytest.FixtureRequest) -> Iterator[tuple[LocalDatabaseServer, Databases]]:
    """The shop's three databases on the shared server, with their tables."""
    server: LocalDatabaseServer = request.getfixturevalue("database_server")
    names = {shard: f"shop_{next(_numbers)}_{os.getpid()}" for shard in SHARDS}
    for name in names.values():
        server.execute(f"CREATE DATABASE {name}")
    databases = Databases(
        {shard: server.endpoint(name) for shard, name in names.items()},
        lambda endpoint: server.connect(endpoint.database, ssl_disabled=True),  # making a TLS context takes 30 ms
    )
    with create_cluster(databases.map(), credentials=server.credentials, driver=driver()) as cluster:
        cluster.create_all(Base.metadata)
    yield server, databases
    for name in names.values():
        server.execute(f"DROP DATABASE IF EXISTS {name}")


@pytest.fixture(scope="session")
def server_replicas(request: pytest.FixtureRequest) -> Iterator[list[Endpoint]]:
    """Two more databases on the shared server, to stand for replicas of the first shard."""
    server: LocalDatabaseServer = request.getfixturevalue("database_server")
    names = [f"replica_{next(_numbers)}_{os.getpid()}" for _ in range(2)]
    for name in names:
        server.execute(f"CREATE DATABASE {name}")
    yield [server.endpoint(name) for name in names]
    for name in names:
        server.execute(f"DROP DATABASE IF EXISTS {name}")


def driver() -> str:
    """The tables name collations by flavour, so SQLAlchemy has to know which it is."""
    return "mariadb+pymysql" if FLAVOUR == "mariadb" else "pymysql"


@pytest.fixture(params=["sqlite", pytest.param("server", marks=getattr(pytest.mark, FLAVOUR))])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """An empty shop on SQLite files, and again on the shared server."""
    if request.param == "sqlite":
        made = Shop(sqlite_databases(tmp_path), "sqlite", {})
        made.cluster.create_all(Base.metadata)
    else:
        made = _server_shop(request)
    yield made
    made.close()


@pytest.fixture
def sqlite_shop(tmp_path: Path) -> Iterator[Shop]:
    """An empty shop on SQLite files."""
    made = Shop(sqlite_databases(tmp_path), "sqlite", {})
    made.cluster.create_all(Base.metadata)
    yield made
    made.close()


@pytest.fixture
def server_shop(request: pytest.FixtureRequest, database_server: LocalDatabaseServer) -> Iterator[Shop]:
    """An empty shop on the shared server."""
    made = _server_shop(request)
    yield made
    made.close()


class DistantShop(Shop):
    """A shop behind proxies."""

    proxies: list[TcpProxy]

    def go_far(self) -> None:
        """From now on each shard is 0.2 s away, there and back."""
        for proxy in self.proxies:
            proxy.delay(0.1)


@pytest.fixture
def distant_shop(server_shop: Shop, database_server: LocalDatabaseServer) -> Iterator[DistantShop]:
    """The shop on the shared server, each of its databases behind a proxy of its own."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(TcpProxy(database_server.host, database_server.port)) for _ in SHARDS]
        masters = {
            shard: proxy.endpoint(str(server_shop.masters[shard].database))
            for shard, proxy in zip(SHARDS, proxies, strict=True)
        }
        made = DistantShop(Databases(masters, server_shop.connect), "server", server_shop.options)
        made.proxies = proxies
        yield made
        made.close()


def empty(server: LocalDatabaseServer, endpoint: Endpoint) -> None:
    """Delete every row of a database."""
    with closing(server.connect(endpoint.database, ssl_disabled=True)) as connection, connection.cursor() as cursor:
        cursor.execute("SET foreign_key_checks = 0")
        cursor.execute("SHOW TABLES")
        for (table,) in cursor.fetchall():
            if table == "shardkit_schema_version":
                continue  # it says which of shardkit's tables are there
            if cursor.execute(f"SELECT 1 FROM `{table}` LIMIT 1"):
                cursor.execute(f"DELETE FROM `{table}`")
        connection.commit()


def _server_shop(request: pytest.FixtureRequest) -> Shop:
    server, databases = request.getfixturevalue("server_databases")
    for endpoint in databases.masters.values():
        empty(server, endpoint)
    async_driver = "mariadb+asyncmy" if FLAVOUR == "mariadb" else "asyncmy"
    options = {
        "credentials": server.credentials,
        "driver": driver(),
        "async_driver": async_driver,
        "engine_options": {"connect_args": {"ssl_disabled": True}},
        "async_engine_options": {},
    }
    return Shop(databases, "server", options)
