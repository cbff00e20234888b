"""Engines: one for each endpoint, prepared for shardkit, given up with the endpoint; errors in shardkit's words."""

from __future__ import annotations

import pickle
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import StaticPool

from shardkit.credentials import fixed
from shardkit.engines import Engines, EngineSettings, bucket_closed
from shardkit.errors import PreconditionFailed, ShardUnreachable, StaleShardMap, Unreachable
from shardkit.partition import HashPartition
from shardkit.topology import Endpoint, Role, Shard

SERVER = Endpoint("db.example", 3307, "shop")


def sqlite_endpoint(directory: Path, name: str = "a") -> Endpoint:
    return Endpoint("", 0, str(directory / f"{name}.db"), "sqlite")


def settings(**options: object) -> EngineSettings:
    return EngineSettings(fixed("app", "s3cret"), **options)  # type: ignore[arg-type]


def test_a_url_is_made_of_the_endpoint_and_this_process_driver_and_account() -> None:
    url = settings().url(SERVER)
    assert (url.drivername, url.host, url.port, url.database, url.username, url.password) == (
        "mysql+pymysql", "db.example", 3307, "shop", "app", "s3cret",
    )  # fmt: skip
    assert settings(driver="mariadb+mysqldb").url(SERVER).drivername == "mariadb+mysqldb"
    assert settings().url(SERVER, asynchronous=True).drivername == "mysql+asyncmy"
    assert "s3cret" not in repr(Engines(settings()).sync("shop-0", Role.MASTER, SERVER))


def test_a_sqlite_endpoint_needs_no_account(tmp_path: Path) -> None:
    url = settings().url(sqlite_endpoint(tmp_path))
    assert (url.drivername, url.username) == ("sqlite", None)


def test_a_driver_that_is_not_installed_is_named() -> None:
    engines = Engines(settings(driver="mariadbconnector"))
    with pytest.raises(PreconditionFailed, match="mysql\\+mariadbconnector is not installed") as caught:
        engines.sync("shop-0", Role.MASTER, SERVER)
    assert "pip install" in str(caught.value.hint)


def test_options_reach_the_engine(tmp_path: Path) -> None:
    engines = Engines(settings(options={"pool_size": 3}))
    engine = engines.sync("shop-0", Role.MASTER, SERVER)
    assert engine.pool.size() == 3  # type: ignore[attr-defined]
    assert engine.pool._recycle == 3600
    other = Engines(settings(options={"pool_recycle": 60})).sync("shop-0", Role.MASTER, SERVER)
    assert other.pool._recycle == 60
    apart = Engines(settings(options={"pool_size": 3}, async_options={"pool_size": 4}))
    assert apart.asynchronous("shop-0", Role.MASTER, SERVER).pool.size() == 4  # type: ignore[attr-defined]


def test_sqlite_has_the_servers_crc32(tmp_path: Path) -> None:
    engine = Engines(settings()).sync("shop-0", Role.MASTER, sqlite_endpoint(tmp_path))
    with engine.connect() as connection:
        for text in ("5", "", "서울"):
            number = connection.scalar(sa.select(sa.func.crc32(text)))
            assert number % 4096 == HashPartition().bucket_of((text,))
        assert connection.scalar(sa.text("SELECT crc32(NULL)")) is None
        assert connection.scalar(sa.text("SELECT crc32(5)")) == connection.scalar(sa.text("SELECT crc32('5')"))
    engine.dispose()


def test_a_given_sqlite_engine_gets_it_on_connections_that_it_has_already() -> None:
    given = sa.create_engine("sqlite://", poolclass=StaticPool)
    with given.connect() as connection, pytest.raises(OperationalError):
        connection.scalar(sa.text("SELECT crc32('5')"))
    Engines(settings(), {("shop-0", "master"): given})
    with given.connect() as connection:
        assert connection.scalar(sa.text("SELECT crc32('5')")) == 2226203566
    given.dispose()


def test_given_engines_are_found_by_role_and_number(tmp_path: Path) -> None:
    first, second = sa.create_engine("sqlite://"), sa.create_engine("sqlite://")
    engines = Engines(settings(), {("a", "replica-0"): first, ("a", "replica-1"): second, ("b", "replica"): first})
    endpoint = sqlite_endpoint(tmp_path)
    assert engines.sync("a", Role.REPLICA, endpoint, 0) is first
    assert engines.sync("a", Role.REPLICA, endpoint, 1) is second
    assert engines.sync("b", Role.REPLICA, endpoint) is first
    made = engines.sync("a", Role.MASTER, endpoint)
    assert made not in {first, second}


def test_engines_of_dropped_endpoints_are_given_up(tmp_path: Path) -> None:
    engines = Engines(settings())
    kept, dropped = sqlite_endpoint(tmp_path, "kept"), sqlite_endpoint(tmp_path, "dropped")
    first, second = engines.sync("a", Role.MASTER, kept), engines.sync("b", Role.MASTER, dropped)
    engines.probe("b", Role.MASTER, dropped)
    engines.keep([Shard("a", kept)])
    assert engines.sync("a", Role.MASTER, kept) is first
    assert engines.sync("b", Role.MASTER, dropped) is not second
    assert len(engines._made) == 2
    engines.dispose()


def test_an_error_names_its_shard_and_endpoint(tmp_path: Path) -> None:
    endpoint = sqlite_endpoint(tmp_path)
    engine = Engines(settings()).sync("shop-0", Role.MASTER, endpoint)
    with engine.connect() as connection, pytest.raises(OperationalError, match=r"shard shop-0, master sqlite:///"):
        connection.execute(sa.text("SELECT * FROM nothing"))
    engine.dispose()


def test_a_database_that_cannot_be_opened_is_unreachable_in_every_handlers_terms(tmp_path: Path) -> None:
    engine = Engines(settings()).sync("shop-0", Role.MASTER, sqlite_endpoint(tmp_path / "missing"))
    with pytest.raises(ShardUnreachable) as caught:
        engine.connect()
    error = caught.value
    assert isinstance(error, OperationalError)
    assert isinstance(error, Unreachable)
    assert error.shard == "shop-0"
    assert isinstance(error.orig, sqlite3.OperationalError)
    assert error.exit_code == 4
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.shard, copy.hint) == (str(error), error.shard, error.hint)


@pytest.mark.parametrize(
    ("message", "moved_to"),
    [
        ("shardkit: bucket 12 of keyspace orders is frozen; moved_to=shop-1", "shop-1"),
        ("shardkit: bucket seoul of keyspace visits is importing; moved_to=", None),
        ("shardkit: bucket 12 of keyspace orders is frozen", None),
    ],
)
def test_a_refusal_of_the_triggers_is_read(message: str, moved_to: str | None) -> None:
    error = bucket_closed(message, "shard shop-0, master")
    assert isinstance(error, StaleShardMap)
    assert error.moved_to == moved_to
    assert str(error).startswith("bucket ")
    assert "shard shop-0" in str(error)
