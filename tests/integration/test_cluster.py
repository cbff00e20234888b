"""Clusters: the map they run on, the engines they make, the tables they create, what they say when it goes wrong."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import StaticPool

import shardkit
from shardkit.credentials import fixed
from shardkit.errors import (
    CrossShardJoin,
    PreconditionFailed,
    ShardkitError,
    ShardUnreachable,
    StaleShardMap,
    UnknownTable,
)
from shardkit.mapstore import FileMapStore, MemoryMapStore, ZooKeeperMapStore
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalZooKeeper, free_port
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Base, User, sqlite_databases


def wait_until(true: Callable[[], bool], timeout: float = 10.0) -> None:
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


# --- tables


def test_each_table_is_created_on_the_shards_that_host_it(shop: Shop) -> None:
    hosts = {
        table: {shard for shard in SHARDS if sa.inspect(shop.cluster.engine(shard)).has_table(table)}
        for table in ("users", "countries", "visits", "invoices")
    }
    everywhere = set(SHARDS)
    assert hosts == {"users": everywhere, "countries": everywhere, "visits": everywhere, "invoices": {"shop-2"}}


def test_an_unknown_table_is_an_error_before_anything_is_created(tmp_path: Path) -> None:
    databases = sqlite_databases(tmp_path)
    metadata = sa.MetaData()
    sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True))
    sa.Table("strangers", metadata, sa.Column("id", sa.Integer, primary_key=True))
    with shardkit.create_cluster(databases.map()) as cluster:
        with pytest.raises(UnknownTable, match="strangers"):
            cluster.create_all(metadata)
        assert not any(sa.inspect(cluster.engine(shard)).get_table_names() for shard in SHARDS)


def test_a_foreign_key_to_a_table_of_another_shard_is_an_error_before_anything_is_created(tmp_path: Path) -> None:
    databases = sqlite_databases(tmp_path)
    metadata = sa.MetaData()
    sa.Table("invoices", metadata, sa.Column("id", sa.Integer, primary_key=True))
    sa.Table(
        "users",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("invoice_id", sa.ForeignKey("invoices.id")),
    )
    with shardkit.create_cluster(databases.map()) as cluster:
        with pytest.raises(CrossShardJoin, match=r"'users' has a foreign key to 'invoices', which is not on shop-0"):
            cluster.create_all(metadata)
        assert not any(sa.inspect(cluster.engine(shard)).get_table_names() for shard in SHARDS)


def test_drop_all_drops_on_every_shard(sqlite_shop: Shop) -> None:
    sqlite_shop.cluster.drop_all(Base.metadata)
    assert not any(sa.inspect(sqlite_shop.cluster.engine(shard)).get_table_names() for shard in SHARDS)


# --- asking


def test_locate_says_where_a_key_lives(shop: Shop) -> None:
    placement = shop.cluster.locate("users", id=5)
    assert placement.shard in SHARDS
    assert shop.cluster.locate("visits", region="서울").shard == "shop-0"
    assert shop.cluster.locate("invoices").shard == "shop-2"


def test_explain_touches_no_database(tmp_path: Path) -> None:
    with shardkit.create_cluster(sqlite_databases(tmp_path).map()) as cluster:
        route = cluster.explain(sa.select(User).where(User.id == 5))
        assert route.shards == (cluster.locate("users", id=5).shard,)
        assert set(cluster.explain(sa.select(User)).shards) == set(SHARDS)
    assert not list(tmp_path.glob("*.db"))


def test_an_engine_of_a_shard_or_role_that_is_not_there_is_an_error(sqlite_shop: Shop) -> None:
    with pytest.raises(UnknownTable, match="shop-9"):
        sqlite_shop.cluster.engine("shop-9")
    with pytest.raises(UnknownTable, match="0 endpoints with the role replica"):
        sqlite_shop.cluster.engine("shop-0", "replica")


def test_engines_are_made_once_for_each_endpoint(sqlite_shop: Shop) -> None:
    assert sqlite_shop.cluster.engine("shop-0") is sqlite_shop.cluster.engine("shop-0")
    assert sqlite_shop.cluster.engine("shop-0") is not sqlite_shop.cluster.engine("shop-1")


def test_given_engines_are_used_and_left_alone() -> None:
    engines = {
        (shard, "master"): sa.create_engine(
            "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        for shard in SHARDS
    }
    shard_map = sqlite_databases(Path("nowhere")).map()
    with shardkit.create_cluster(shard_map, engines=engines) as cluster:
        cluster.create_all(Base.metadata)
        with shardkit.sessionmaker(cluster)() as session:
            session.add(User(id=5, name="five"))
            session.commit()
        where = cluster.locate("users", id=5).shard
    with engines[where, "master"].connect() as connection:  # not disposed with the cluster
        assert connection.scalar(sa.text("SELECT name FROM users")) == "five"
        assert connection.scalar(sa.text("SELECT crc32('5')")) == 2226203566
    for engine in engines.values():
        engine.dispose()


def test_a_given_engine_for_an_unknown_shard_is_an_error() -> None:
    engine = sa.create_engine("sqlite://")
    with pytest.raises(PreconditionFailed, match="shop-9"):
        shardkit.create_cluster(sqlite_databases(Path("nowhere")).map(), engines={("shop-9", "master"): engine})


# --- the map


def test_a_published_map_is_taken_and_a_lower_one_is_not(tmp_path: Path) -> None:
    store = MemoryMapStore(sqlite_databases(tmp_path).map())
    with shardkit.create_cluster(store) as cluster:
        first = cluster.map
        store.publish(first, expected_version=1)
        assert cluster.map.version == 2
        cluster._accept(first)
        assert cluster.map.version == 2


def test_engines_of_endpoints_that_the_map_drops_are_disposed(tmp_path: Path) -> None:
    databases = sqlite_databases(tmp_path)
    store = MemoryMapStore(databases.map())
    with shardkit.create_cluster(store) as cluster:
        with cluster.engine("shop-0").connect():
            pass
        before = cluster.engine("shop-0")
        pool = before.pool
        moved = {**databases.masters, "shop-0": databases.masters["shop-0"].parse(f"sqlite:///{tmp_path}/new.db")}
        other = type(databases)(moved, databases.connect)
        store.publish(other.map(), expected_version=1)
        assert cluster.engine("shop-0") is not before
        assert str(cluster.engine("shop-0").url).endswith("new.db")
        assert before.pool is not pool  # disposed
        assert cluster.engine("shop-1") is cluster.engine("shop-1")


def test_the_map_in_a_file_is_watched(tmp_path: Path) -> None:
    path = tmp_path / "shardmap.yaml"
    path.write_text(sqlite_databases(tmp_path).map().dump(), encoding="utf-8")
    with shardkit.create_cluster(f"file:{path}") as cluster:
        FileMapStore(path).publish(cluster.map, expected_version=1)
        wait_until(lambda: cluster.map.version == 2)


def test_the_version_in_use_is_announced_once_no_open_transaction_is_older(tmp_path: Path) -> None:
    store = MemoryMapStore(sqlite_databases(tmp_path).map())
    with shardkit.create_cluster(store) as cluster:
        cluster.create_all(Base.metadata)
        with shardkit.sessionmaker(cluster)() as session:
            session.get(User, 1)
            store.publish(cluster.map, expected_version=1)
            assert [client.version for client in store.clients()] == [1]
            session.get(User, 2)
            assert session.in_transaction()
            assert [client.version for client in store.clients()] == [1]
            session.rollback()
            wait_until(lambda: [client.version for client in store.clients()] == [2])


def test_with_zookeeper_away_a_cluster_runs_on_and_takes_the_new_map_when_it_is_back(tmp_path: Path) -> None:
    databases = sqlite_databases(tmp_path)
    with LocalZooKeeper() as zookeeper:
        source = f"zookeeper://127.0.0.1:{zookeeper.port}/shop"
        publisher = ZooKeeperMapStore.from_source(source)
        publisher.publish(databases.map(), expected_version=0)
        with shardkit.create_cluster(source) as cluster:
            cluster.create_all(Base.metadata)
            sessions = shardkit.sessionmaker(cluster)
            zookeeper.stop()
            with sessions() as session:
                session.add(User(id=1, name="one"))
                session.commit()
                assert session.get(User, 1) is not None
            assert cluster.map.version == 1
            zookeeper.start()
            wait_until(lambda: publisher.client.connected, 30)
            publisher.publish(cluster.map, expected_version=1)
            wait_until(lambda: cluster.map.version == 2, 30)
            wait_until(lambda: [client.version for client in publisher.clients()] == [2], 30)
        publisher.close()


def test_a_store_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(ShardkitError, match="no ZooKeeper server"):
        shardkit.create_cluster(f"zookeeper://127.0.0.1:{free_port()}/shop", store_timeout=0.5)


# --- stale maps


def require_version(server: LocalDatabaseServer, shop: Shop, shard: str, version: int) -> None:
    database = shop.masters[shard].database
    server.execute(
        f"CREATE TABLE IF NOT EXISTS {database}.shardkit_map_version (id TINYINT PRIMARY KEY, min_map_version BIGINT)"
    )
    server.execute(f"REPLACE INTO {database}.shardkit_map_version VALUES (1, {version})")


def test_a_server_that_asks_for_a_newer_map_gets_nothing_planned_on_an_older_one(
    server_shop: Shop, database_server: LocalDatabaseServer
) -> None:
    user = server_shop.users_on("shop-1", 1)[0]
    require_version(database_server, server_shop, "shop-1", 7)
    with server_shop.session() as session, pytest.raises(StaleShardMap, match="version 7"):
        session.get(User, user)
    with server_shop.session() as session:
        session.add(User(id=user, name="x"))
        with pytest.raises(StaleShardMap):
            session.commit()
    assert server_shop.rows("shop-1", "users") == []


def test_with_the_newer_map_at_hand_the_statement_is_planned_again(
    server_shop: Shop, database_server: LocalDatabaseServer
) -> None:
    """The watch has not told yet, but the store has the map in which the user lives elsewhere."""
    user = server_shop.users_on("shop-1", 1)[0]
    server_shop.execute(server_shop.masters["shop-2"], f"INSERT INTO users (id, name) VALUES ({user}, 'moved')")
    store = _Lagging(server_shop.map())
    cluster = server_shop.open(store)  # type: ignore[arg-type]
    bucket = cluster.locate("users", id=user).bucket
    store.newest = cluster.map.with_placement("orders", {bucket: "shop-2"}).with_version(7)
    require_version(database_server, server_shop, "shop-1", 7)
    with shardkit.sessionmaker(cluster)() as session:
        found = session.get(User, user)
        assert found is not None
        assert found.name == "moved"
        assert session.scalars(sa.select(User).where(User.id == user)).one() is found


class _Lagging(MemoryMapStore):
    """A store whose watch is late: only `load` gives the newest map."""

    newest: ShardMap | None = None

    def load(self) -> ShardMap:
        return self.newest or super().load()


def test_a_transaction_that_has_begun_on_the_older_map_ends_with_a_clear_error(
    server_shop: Shop, database_server: LocalDatabaseServer
) -> None:
    here, there = server_shop.users_on("shop-0", 1)[0], server_shop.users_on("shop-1", 1)[0]
    store = _Lagging(server_shop.map())
    cluster = server_shop.open(store)  # type: ignore[arg-type]
    with shardkit.sessionmaker(cluster)() as session:
        session.get(User, here)
        store.newest = cluster.map.with_version(7)
        require_version(database_server, server_shop, "shop-1", 7)
        with pytest.raises(StaleShardMap, match="began with 1"):
            session.get(User, there)
        session.rollback()
        session.get(User, there)


# --- servers that do not answer


def test_an_unreachable_server_is_named_with_the_fix(tmp_path: Path) -> None:
    endpoint = f"mysql://127.0.0.1:{free_port()}/shop"
    document = {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {"all": {"tables": ["users"], "placement": "shop-0"}},
        "shards": {"shop-0": {"master": endpoint}},
    }
    with shardkit.create_cluster(ShardMap.parse(document), credentials=fixed("app", "s3cret")) as cluster:
        with shardkit.sessionmaker(cluster)() as session, pytest.raises(ShardUnreachable) as caught:
            session.execute(sa.select(User))
        assert isinstance(caught.value, OperationalError)
        assert isinstance(caught.value, ShardkitError)
        assert caught.value.shard == "shop-0"
        assert endpoint in str(caught.value)
        assert caught.value.hint
        assert "s3cret" not in repr(caught.value) + str(caught.value) + repr(cluster) + repr(cluster.engine("shop-0"))


def test_a_wrong_password_is_named_without_showing_it(server_shop: Shop, database_server: LocalDatabaseServer) -> None:
    database_server.create_user("teller", "right")
    cluster = server_shop.open(server_shop.map(), credentials=fixed("teller", "wr0ng-s3cret"))
    with (
        shardkit.sessionmaker(cluster)() as session,
        pytest.raises(ShardUnreachable, match="refused the log-on") as caught,
    ):
        session.get(User, 1)
    assert "wr0ng-s3cret" not in str(caught.value)
    assert "SHARDKIT_PASSWORD" in str(caught.value.hint)


def test_a_database_that_does_not_exist_is_named(server_shop: Shop, database_server: LocalDatabaseServer) -> None:
    document = {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {"all": {"tables": ["users"], "placement": "shop-0"}},
        "shards": {"shop-0": {"master": database_server.endpoint("nowhere").url}},
    }
    cluster = server_shop.open(ShardMap.parse(document))
    with shardkit.sessionmaker(cluster)() as session, pytest.raises(ShardUnreachable, match="does not exist"):
        session.get(User, 1)


def test_a_connection_lost_in_the_middle_is_an_operational_error_that_names_the_shard(
    server_shop: Shop, database_server: LocalDatabaseServer
) -> None:
    user = server_shop.users_on("shop-1", 1)[0]
    with server_shop.session() as session:
        session.get(User, user)
        connection = session.connection(bind_arguments={"shardkit_shard": "shop-1"})
        number = connection.connection.driver_connection.thread_id()  # type: ignore[union-attr]
        database_server.execute(f"KILL {number}")
        with pytest.raises(OperationalError, match="shop-1"):
            session.get(User, user, populate_existing=True)
        session.rollback()
        session.get(User, user)


def test_a_write_refused_because_its_bucket_is_moving_says_where_to(server_shop: Shop) -> None:
    user = server_shop.users_on("shop-1", 1)[0]
    server_shop.execute(
        server_shop.masters["shop-1"],
        "CREATE TRIGGER refuse BEFORE INSERT ON users FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = "
        "'shardkit: bucket 12 of keyspace orders is frozen; moved_to=shop-2'",
    )
    try:
        with server_shop.session() as session:
            session.add(User(id=user, name="x"))
            with pytest.raises(shardkit.errors.BucketClosed, match="bucket 12 of keyspace orders is frozen") as caught:
                session.commit()
            assert caught.value.moved_to == "shop-2"
            assert isinstance(caught.value, StaleShardMap)
    finally:
        server_shop.execute(server_shop.masters["shop-1"], "DROP TRIGGER refuse")


# --- forks


def _count_users(cluster: shardkit.Cluster, queue: multiprocessing.Queue[int]) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        queue.put(session.scalar(sa.select(sa.func.count()).select_from(User)) or 0)


def test_a_child_process_opens_its_own_connections_and_leaves_its_parents_alone(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all([User(id=number, name="x") for number in range(1, 10)])
        session.commit()
        session.get(User, 1)
        context = multiprocessing.get_context("fork")
        queue: multiprocessing.Queue[int] = context.Queue()
        children = [context.Process(target=_count_users, args=(shop.cluster, queue)) for _ in range(3)]
        for child in children:
            child.start()
        assert [queue.get(timeout=20) for _ in children] == [9, 9, 9]
        for child in children:
            child.join(20)
            assert child.exitcode == 0
        session.expire_all()
        assert session.scalar(sa.select(sa.func.count()).select_from(User)) == 9  # in the transaction of before


def test_many_threads_share_one_cluster(shop: Shop) -> None:
    sessions = shop.sessions()
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 10):
                with sessions.begin() as session:
                    session.add(User(id=number, name=str(number)))
                with sessions() as session:
                    assert session.get_one(User, number).name == str(number)
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1 + 10 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sum(len(ids) for ids in shop.where("users").values()) == 40
