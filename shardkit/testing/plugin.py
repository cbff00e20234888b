"""The pytest plugin: clusters for the tests of applications that use shardkit.

Name your shard map in pytest's settings (``shardkit_map = "shardmap.yaml"``, from the root directory), or override the
fixture `shardkit_map`. Then::

    def test_orders(shardkit_cluster):               # SQLite: instant
        shardkit_cluster.create_all(Base.metadata)
        Session = sessionmaker(shardkit_cluster)

    def test_orders_on_mariadb(shardkit_mariadb_cluster):    # a real server, started once per test process
        ...

    def test_shop(shardkit_cluster, shardkit_use):   # the application's own sessions, on the test's cluster
        shardkit_use(application.Session, shardkit_cluster)

    def test_page(shardkit_rollback):                # what sessions of this factory commit is undone after the test
        shardkit_rollback(application.Session)

    def test_keys(no_scatter, assert_single_shard):  # no read of several shards in this test
        assert_single_shard(select(Order).where(Order.user_id == 1))

pytest loads this file in every environment that has shardkit installed, so nothing but pytest is imported here until a
fixture is used, and logging is left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sqlalchemy import Executable, MetaData
    from sqlalchemy.orm import sessionmaker

    from shardkit.cluster import Cluster
    from shardkit.session import ClusterSession
    from shardkit.shardmap import ShardMap
    from shardkit.testing.database import LocalDatabaseServer

_LOG_LINES = 20
_tails = pytest.StashKey[dict[str, str]]()
_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The setting ``shardkit_map``."""
    parser.addini("shardkit_map", "shard map (YAML) of the application, for shardkit's fixtures", default="")


@pytest.fixture
def shardkit_map(pytestconfig: pytest.Config) -> ShardMap:
    """The application's shard map. Override it to make one in Python."""
    from shardkit.shardmap import ShardMap

    name = pytestconfig.getini("shardkit_map")
    if not name:
        pytest.fail(
            "shardkit does not know your shard map: set shardkit_map = path/of/shardmap.yaml in pytest's settings,"
            " or override the fixture shardkit_map",
            pytrace=False,
        )
    return ShardMap.load(pytestconfig.rootpath / name)


@pytest.fixture
def shardkit_metadata() -> MetaData | None:
    """Override it to return your models' metadata: their tables are then there when a test begins."""
    return None


@pytest.fixture
def shardkit_cluster(shardkit_map: ShardMap, shardkit_metadata: MetaData | None, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the map's shards, each a SQLite file of this test: routing without a server."""
    from shardkit.cluster import create_cluster
    from shardkit.topology import Endpoint, Shard

    shards = {
        name: Shard(name, Endpoint("", 0, str(tmp_path / f"{name}.sqlite"), "sqlite")) for name in shardkit_map.shards
    }
    with create_cluster(shardkit_map.with_shards(shards)) as cluster:
        if shardkit_metadata is not None:
            cluster.create_all(shardkit_metadata)
        yield cluster


@pytest.fixture(scope="session")
def shardkit_mariadb_server() -> Iterator[LocalDatabaseServer]:
    """A MariaDB for this test process, or the one that SHARDKIT_TEST_MARIADB_URL names."""
    from shardkit.testing.named import mariadb_server

    with mariadb_server() as server:
        yield server


@pytest.fixture
def shardkit_mariadb_cluster(
    shardkit_map: ShardMap, shardkit_metadata: MetaData | None, shardkit_mariadb_server: LocalDatabaseServer
) -> Iterator[Cluster]:
    """A cluster of the map's shards, each a database of its own on one MariaDB, dropped afterwards."""
    from shardkit.cluster import create_cluster
    from shardkit.topology import Shard

    server = shardkit_mariadb_server
    prefix = f"test_{os.getpid()}_{next(_numbers)}"
    databases = {name: f"{prefix}_{number}" for number, name in enumerate(shardkit_map.shards)}
    shards = {name: Shard(name, server.endpoint(database)) for name, database in databases.items()}
    try:
        for database in databases.values():
            server.execute(f"CREATE DATABASE {database}")
        with create_cluster(shardkit_map.with_shards(shards), credentials=server.credentials) as cluster:
            if shardkit_metadata is not None:
                cluster.create_all(shardkit_metadata)
            yield cluster
    finally:
        for database in databases.values():
            server.execute(f"DROP DATABASE IF EXISTS {database}")


@pytest.fixture
def shardkit_use() -> Iterator[Callable[[Any, Cluster], Any]]:
    """Called with a session factory and a cluster, it has the factory's sessions go there until the test ends."""
    from shardkit.testing.rollback import pointed_at

    with contextlib.ExitStack() as stack:
        yield lambda factory, cluster: stack.enter_context(pointed_at(factory, cluster))


@pytest.fixture
def shardkit_rollback() -> Iterator[Callable[[sessionmaker[ClusterSession]], sessionmaker[ClusterSession]]]:
    """Called with a session factory, it undoes after the test what the factory's sessions commit.

    For asyncio: `shardkit.testing.rollback.async_rolled_back`, on the test's own event loop.
    """
    from shardkit.testing.rollback import rolled_back

    with contextlib.ExitStack() as stack:
        yield lambda factory: stack.enter_context(rolled_back(factory))


# --- which shards statements touch -----------------------------------------------------------------------------------


@pytest.fixture
def no_scatter() -> Iterator[None]:
    """In this test a read of several shards raises `ScatterRefused`, unless it says ``shardkit_scatter=True``."""
    from shardkit.routing.policy import no_scatter as forbidden

    with forbidden():
        yield


@pytest.fixture
def assert_single_shard(shardkit_map: ShardMap) -> Iterator[Callable[..., None]]:
    """``assert_single_shard(statement, params=None)`` fails where a statement would touch several shards.

    Nothing is sent: the statement is planned on the application's map.
    """
    from shardkit.cluster import create_cluster

    with create_cluster(shardkit_map) as cluster:

        def check(statement: Executable, params: Mapping[str, Any] | None = None) -> None:
            route = cluster.explain(statement, params)
            shards = dict.fromkeys(route.shards)
            for subquery in route.first.routes if route.first else ():
                shards.update(dict.fromkeys(subquery.shards))
            if len(shards) > 1:
                pytest.fail(
                    f"{len(shards)} shards would be asked: {', '.join(shards)} ({'; '.join(route.reasons)})",
                    pytrace=False,
                )

        yield check


# --- the servers' logs, where a test fails -----------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remember what the servers had logged before the test."""
    item.stash[_tails] = _log_tails()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the servers logged during a test that failed."""
    report = yield
    if report.failed:
        before = item.stash.get(_tails, {})
        for name, text in _log_tails().items():
            if text and text != before.get(name):
                report.sections.append((f"end of the log of {name}", text))
    return report


def _log_tails() -> dict[str, str]:
    servers = sys.modules.get("shardkit.testing.server")
    if servers is None:
        return {}
    return {server.name: server.log_tail(_LOG_LINES) for server in servers.open_servers()}
