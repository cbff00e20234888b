"""Servers for the whole suite: one of each kind per test process, started when the first test asks for it.

A server that the environment names is used instead (`shardkit.testing.named`).
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from shardkit.testing import LocalZooKeeper
from shardkit.testing.database import LocalDatabaseServer
from shardkit.testing.named import mariadb_server, mysql_server, zookeeper_server

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: Ctrl-C is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# An example's time says nothing on a busy machine.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

FLAVOUR = os.environ.get("SHARDKIT_TEST_FLAVOUR", "mariadb")
if FLAVOUR not in {"mariadb", "mysql"}:
    raise pytest.UsageError(f"SHARDKIT_TEST_FLAVOUR is {FLAVOUR!r}: say mariadb or mysql")

# fixture -> the marker that a test using it gets
MARKER_OF_FIXTURE = {
    "mariadb": "mariadb",
    "mysql": "mysql",
    "database_server": FLAVOUR,
    "flavour": FLAVOUR,
    "zookeeper": "zookeeper",
}
# What runs only when asked for with -m: `make soak`, `make test-docker`, `make test-mysql`.
LEFT_OUT = {"soak", "docker"} | ({"mysql"} if FLAVOUR != "mysql" else set())

_databases = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test by the servers that it needs, so that none is forgotten when a kind is selected."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKER_OF_FIXTURE:
                item.add_marker(MARKER_OF_FIXTURE[fixture])
    if not config.option.markexpr:
        left_out = [item for item in items if LEFT_OUT & {mark.name for mark in item.iter_markers()}]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def mariadb() -> Iterator[LocalDatabaseServer]:
    """A MariaDB server shared by the tests of this process: use `fresh_database`, and do not stop it."""
    with mariadb_server() as server:
        yield server


@pytest.fixture(scope="session")
def mysql() -> Iterator[LocalDatabaseServer]:
    """A MySQL server shared by the tests of this process: use `fresh_database`, and do not stop it."""
    with mysql_server() as server:
        yield server


@pytest.fixture(scope="session")
def flavour() -> str:
    """``mariadb`` or ``mysql``: what `database_server` is in this run."""
    return FLAVOUR


@pytest.fixture(scope="session")
def database_server(request: pytest.FixtureRequest) -> LocalDatabaseServer:
    """The shared server of the flavour that SHARDKIT_TEST_FLAVOUR names, MariaDB by default."""
    server = request.getfixturevalue(FLAVOUR)
    assert isinstance(server, LocalDatabaseServer)
    return server


@pytest.fixture(scope="session")
def zookeeper() -> Iterator[LocalZooKeeper]:
    """A ZooKeeper shared by the tests of this process: use a cluster name of your own, and do not stop it."""
    with zookeeper_server() as server:
        yield server


@pytest.fixture
def fresh_database(database_server: LocalDatabaseServer) -> Iterator[str]:
    """The name of a new, empty database on `database_server`, dropped afterwards."""
    name = f"test_{os.getpid()}_{next(_databases)}"
    database_server.execute(f"CREATE DATABASE {name}")
    yield name
    database_server.execute(f"DROP DATABASE IF EXISTS {name}")
