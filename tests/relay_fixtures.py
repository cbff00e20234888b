"""Fixtures of the relay's tests: three servers for a test process, and chains of hops over them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from shardkit.testing import LocalMariaDB, LocalMySQL
from shardkit.testing.database import LocalDatabaseServer
from tests.relay_chain import Chain

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def relay_servers(flavour: str) -> Iterator[list[LocalDatabaseServer]]:
    """Three servers of the flavour under test."""
    kind = LocalMariaDB if flavour == "mariadb" else LocalMySQL
    with ExitStack() as stack:
        servers: list[LocalDatabaseServer] = [kind() for _ in range(3)]
        for server in servers:
            stack.callback(server.close)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: server.start(), servers))
        yield servers


def _chain(servers: Sequence[LocalDatabaseServer]) -> Iterator[Chain]:
    database = f"relay_{next(_numbers)}"
    for server in servers:
        server.execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
    chain = Chain(servers, database)
    try:
        yield chain
    finally:
        chain.stop()
        for server in servers:
            server.execute(f"DROP DATABASE IF EXISTS {database}")


@pytest.fixture
def chain(relay_servers: list[LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> staging -> replica, not started."""
    yield from _chain(relay_servers)


@pytest.fixture
def pair(relay_servers: list[LocalDatabaseServer]) -> Iterator[Chain]:
    """master -> one target, not started."""
    yield from _chain(relay_servers[:2])
