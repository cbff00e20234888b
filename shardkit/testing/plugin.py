"""The pytest plugin: clusters for the tests of applications that use shardkit.

Name your shard map in pytest's settings (``shardkit_map = "shardmap.yaml"``, from the root directory), or override the
fixture `shardkit_map`. Then::

    def test_orders(shardkit_cluster):               # SQLite: instant
        shardkit_cluster.create_all(Base.metadata)
        Session = sessionmaker(shardkit_cluster)

    def test_orders_on_mariadb(shardkit_mariadb_cluster):    # a real server, started once per test process
        ...

pytest loads this file in every environment that has shardkit installed, so nothing but pytest is imported here until a
fixture is used, and logging is left alone.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy import MetaData

    from shardkit.cluster import Cluster
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
