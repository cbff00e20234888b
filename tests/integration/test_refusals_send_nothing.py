"""What is refused is refused before any database hears of it: not even a connection is opened.

The shards' masters are a socket that counts who calls.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, make_transient_to_detached

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.credentials import fixed
from shardkit.errors import KeyChange, MissingKey, RoutingError, SecondShardWritten, UnknownTable
from shardkit.testing.ports import LOOPBACK
from tests.routing_shop import Country, Invoice, Order, User, shop_map
from tests.unit.test_routing_refusals import READS, WITH_SCATTER, WRITES

SCATTER = {"shardkit_scatter": True}
STATEMENTS: dict[str, tuple[Any, Any, Any]] = {
    **{name: (statement, None, {}) for name, (statement, _) in READS.items()},
    **{name: (statement, parameters, {}) for name, (statement, parameters, _) in WRITES.items()},
    **{name: (statement, None, SCATTER) for name, statement in WITH_SCATTER.items()},
    "a shard that is not there": (sa.select(User), None, {"shardkit_shard": "s9"}),
    "a shard that does not hold the table": (sa.select(Invoice), None, {"shardkit_shard": "s0"}),
    "a key that fits no table": (sa.select(User), None, {"shardkit_key": {"nothing": 1}}),
    "a hint of the wrong kind": (sa.select(User), None, {"shardkit_scatter": "yes"}),
    "a read over shards that the statement forbids": (sa.select(User), None, {"shardkit_scatter": False}),
    "a role that is not there": (sa.select(User).where(User.id == 1), None, {"shardkit_read_from": "slave"}),
}


class Switchboard:
    """Accepts connections, hangs up, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self._socket = socket.create_server((LOOPBACK, 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            self.calls += 1
            caller.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture(scope="module")
def switchboard() -> Iterator[Switchboard]:
    made = Switchboard()
    yield made
    made.close()


@pytest.fixture(scope="module")
def cluster(switchboard: Switchboard) -> Iterator[Cluster]:
    shards = {f"s{number}": {"master": f"mysql://{LOOPBACK}:{switchboard.port}/shop{number}"} for number in range(4)}
    with create_cluster(shop_map(shards=shards), credentials=fixed("root")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nobody_calls(switchboard: Switchboard) -> Iterator[None]:
    switchboard.calls = 0
    yield
    assert switchboard.calls == 0


def test_the_switchboard_counts(cluster: Cluster, switchboard: Switchboard) -> None:
    """What is not refused does call, with threads and with asyncio: a silent switchboard says something."""
    before = switchboard.calls
    with pytest.raises(sa.exc.OperationalError), shardkit.sessionmaker(cluster)() as session:
        session.execute(sa.select(User).where(User.id == 1))
    assert switchboard.calls > before
    before = switchboard.calls

    async def ask() -> None:
        async with shardkit.async_sessionmaker(cluster)() as session:
            await session.execute(sa.select(User).where(User.id == 1))

    with pytest.raises(sa.exc.OperationalError):
        asyncio.run(ask())
    assert switchboard.calls > before
    switchboard.calls = 0


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_refused_statement(cluster: Cluster, name: str) -> None:
    statement, parameters, options = STATEMENTS[name]
    with shardkit.sessionmaker(cluster)() as session, pytest.raises(InvalidRequestError) as raised:
        session.execute(statement, parameters, execution_options=options)
    assert isinstance(raised.value, RoutingError | UnknownTable)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_refused_statement_with_asyncio(cluster: Cluster, name: str) -> None:
    statement, parameters, options = STATEMENTS[name]

    async def ask() -> None:
        async with shardkit.async_sessionmaker(cluster)() as session:
            await session.execute(statement, parameters, execution_options=options)

    with pytest.raises(InvalidRequestError) as raised:
        asyncio.run(ask())
    assert isinstance(raised.value, RoutingError | UnknownTable)


@pytest.mark.parametrize("name", READS)
def test_what_waits_to_be_flushed_is_not_sent_for_a_refused_read(cluster: Cluster, name: str) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        session.add(User(id=1))
        with pytest.raises(RoutingError):
            session.execute(READS[name][0])
        assert session.new


def loaded(session: Session, entity: Any, shard: str) -> Any:
    """An object as if it had been loaded from a shard."""
    make_transient_to_detached(entity)
    state = sa.inspect(entity)
    state.key = (*state.key[:2], shard)
    state.identity_token = shard
    session.add(entity)
    return entity


def test_a_new_object_without_its_key(cluster: Cluster) -> None:
    for first in ([], [User(id=1)]):
        with shardkit.sessionmaker(cluster)() as session:
            session.add_all([*first, Order(id=5)])
            with pytest.raises(MissingKey):
                session.flush()


def test_an_object_whose_key_is_changed(cluster: Cluster) -> None:
    home = cluster.locate("orders", user_id=5).shard
    with shardkit.sessionmaker(cluster)() as session:
        order = loaded(session, Order(id=1, user_id=5), home)
        order.user_id = 6
        session.add(User(id=1))
        with pytest.raises(KeyChange):
            session.flush()


def test_bulk_inserts_without_a_key(cluster: Cluster) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        with pytest.raises(MissingKey):
            session.bulk_insert_mappings(Order, [{"id": 1, "user_id": 5}, {"id": 2}])
        with pytest.raises(MissingKey):
            session.bulk_save_objects([Order(id=1, user_id=5), Order(id=2)])


def test_a_second_shard_under_single(cluster: Cluster) -> None:
    ids = [next(n for n in range(100) if cluster.locate("users", id=n).shard == shard) for shard in ("s0", "s1")]
    with shardkit.sessionmaker(cluster, transactions="single")() as session:
        session.add_all(User(id=number) for number in ids)
        with pytest.raises(SecondShardWritten):
            session.flush()
    with shardkit.sessionmaker(cluster, transactions="single")() as session:
        session.add(Country(code="kr"))
        with pytest.raises(SecondShardWritten):
            session.flush()


def test_reads_over_shards_where_they_are_refused(cluster: Cluster) -> None:
    with shardkit.sessionmaker(cluster, scatter="refuse")() as session:
        with pytest.raises(RoutingError):
            session.scalars(sa.select(User)).all()
        with pytest.raises(RoutingError):
            session.get(Order, 1)


def test_a_connection_without_a_shard(cluster: Cluster) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        for ask in (session.connection, session.get_bind):
            with pytest.raises(RoutingError):
                ask()


def test_options_that_sessions_cannot_have(cluster: Cluster) -> None:
    for options in ({"twophase": True}, {"binds": {User: object()}}, {"read_from": "slave"}, {"transactions": "xa"}):
        with pytest.raises(shardkit.ShardkitError):
            shardkit.sessionmaker(cluster, **options)
