"""Fixtures of the relay's tests: three servers for a test process, and chains of hops over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from shardkit.testing import LocalMariaDB, LocalMySQL
from shardkit.testing.database import LocalDatabaseServer
from tests.relay_chain import Chain

_numbers = itertools.count(1)


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


def chain_over(links: Sequence[LocalDatabaseServer]) -> Iterator[Chain]:
    """A chain over these servers on a new database, dropped afterwards. For fixtures to yield from."""
    database = f"relay_{next(_numbers)}"
    for server in links:
        server.execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
    chain = Chain(links, database)
    try:
        yield chain
    finally:
        chain.stop()
        for server in links:
            if server.running:
                _forget_prepared(server)
                server.execute(f"DROP DATABASE IF EXISTS {database}")


def _forget_prepared(server: LocalDatabaseServer) -> None:
    """Roll back the branches that a failed test left prepared: their locks would hold up DROP DATABASE for ever."""
    for format_id, length, _, data in server.execute("XA RECOVER"):
        raw = data if isinstance(data, bytes) else data.encode("latin-1")
        server.execute(f"XA ROLLBACK X'{raw[:length].hex()}',X'{raw[length:].hex()}',{format_id}")


@pytest.fixture
def chain(relay_servers: list[LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> staging -> replica, not started."""
    yield from chain_over(relay_servers)


@pytest.fixture
def pair(relay_servers: list[LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> one target, not started."""
    yield from chain_over(relay_servers[:2])
