"""Fixtures of the relay's tests: three servers for a test process, and chains of hops over them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from shardkit.errors import MissingServer
from shardkit.testing import LocalMariaDB, LocalMySQL
from shardkit.testing.database import LocalDatabaseServer
from tests.relay_chain import Chain, chain_over


@contextmanager
def servers(flavour: str, count: int) -> Iterator[list[LocalDatabaseServer]]:
    """Servers started together."""
    kind = LocalMariaDB if flavour == "mariadb" else LocalMySQL
    with ExitStack() as stack:
        started: list[LocalDatabaseServer] = [kind() for _ in range(count)]
        for server in started:
            stack.callback(server.close)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: server.start(), started))
        yield started


@pytest.fixture(scope="session")
def relay_servers(flavour: str) -> Iterator[list[LocalDatabaseServer]]:
    """Three servers of the flavour under test, shared: a test leaves their logs as they are."""
    with servers(flavour, 3) as started:
        yield started


@pytest.fixture
def own_pair(flavour: str) -> Iterator[Chain]:
    """master -> one target on servers of the test's own, to be stopped, killed and purged."""
    with servers(flavour, 2) as started:
        yield from chain_over(started)


@pytest.fixture
def own_chain(flavour: str) -> Iterator[Chain]:
    """master -> staging -> replica on servers of the test's own."""
    with servers(flavour, 3) as started:
        yield from chain_over(started)


@pytest.fixture(scope="module")
def families() -> Iterator[dict[str, LocalDatabaseServer]]:
    """A server of each family, for the tests of a file."""
    try:
        with servers("mariadb", 1) as mariadb, servers("mysql", 1) as mysql:
            yield {"mariadb": mariadb[0], "mysql": mysql[0]}
    except MissingServer as error:
        pytest.skip(f"needs both families: {error.message}")


@pytest.fixture(params=[("mariadb", "mysql"), ("mysql", "mariadb")], ids="-to-".join)
def abroad(request: pytest.FixtureRequest, families: dict[str, LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> one target of the other family, not started."""
    yield from chain_over([families[name] for name in request.param])


@pytest.fixture
def chain(relay_servers: list[LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> staging -> replica, not started."""
    yield from chain_over(relay_servers)


@pytest.fixture
def pair(relay_servers: list[LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> one target, not started."""
    yield from chain_over(relay_servers[:2])
