"""Reads on replicas where asked: fresh ones only, one a shard and transaction, never past the transaction's writes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import func, select

import shardkit
from shardkit import drivers, own_tables
from shardkit.cluster import Cluster, create_cluster
from shardkit.errors import NoFreshReplica, RoutingError, StaleReadError
from shardkit.mapstore import MemoryMapStore
from shardkit.replicas.health import Replica
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Endpoint
from tests.integration.conftest import FLAVOUR, Shop, empty
from tests.integration.shop import Base, User
from tests.integration.test_cluster import wait_until


class ReplicatedShop:
    """A shop whose first shard has two replicas. Nothing replicates: every database says in its rows which it is."""

    def __init__(self, shop: Shop, replicas: list[Endpoint], max_lag: float = 1.0) -> None:
        self.shop = shop
        self.replicas = replicas
        self.cluster: Cluster = shop.open(shop.map({"shop-0": replicas}), max_lag=max_lag)
        self.user = shop.users_on("shop-0", 1)[0]
        for number in range(len(replicas)):
            Base.metadata.create_all(self.cluster.engine("shop-0", "replica", number))
        for endpoint, name in (
            (shop.masters["shop-0"], "master"),
            *((r, f"replica {n}") for n, r in enumerate(replicas)),
        ):
            shop.execute(endpoint, f"INSERT INTO users (id, name) VALUES ({self.user}, '{name}')")
        own_tables.upgrade(self.cluster.engine("shop-0"))
        for number in range(len(replicas)):
            own_tables.upgrade(self.cluster.engine("shop-0", "replica", number))

    def beat(self, *behind: float | None) -> None:
        """Have each replica hold a heartbeat of so many seconds ago (from now on, for a minute), or none."""
        for replica, seconds in zip(self.replicas, behind, strict=True):
            self.shop.execute(replica, "DELETE FROM shardkit_heartbeat")
            if seconds is not None:
                written = int((time.time() - seconds) * 1_000_000)
                self.shop.execute(
                    replica, f"INSERT INTO shardkit_heartbeat (shard, beat, written_at) VALUES ('shop-0', 1, {written})"
                )
        self.cluster.health.wait()

    def catch_up(self) -> None:
        """Have each replica say that it has all of its master's log; nothing to do on SQLite, which has none."""
        if self.shop.kind == "sqlite":
            return
        variable = "gtid_binlog_pos" if FLAVOUR == "mariadb" else "gtid_executed"
        ((position,),) = self.shop.execute(self.shop.masters["shop-0"], f"SELECT @@global.{variable}")
        for replica in self.replicas:
            self.shop.execute(replica, "DELETE FROM shardkit_position")
            self.shop.execute(
                replica,
                "INSERT INTO shardkit_position VALUES ('history:shop-0', 0, 0, "
                f"'{position}', 'master', '', 0, '', '', 0, '', 0)",
            )

    def fresh(self) -> set[int]:
        """The replicas that may serve reads now."""
        return {replica[1] for replica in self.cluster.health.fresh(self.cluster._replicas_of("shop-0"))}

    def read(self, **options: object) -> str:
        """Which database answers a read of a new transaction."""
        with shardkit.sessionmaker(self.cluster, read_from="replica")() as session:
            return session.scalars(select(User.name).where(User.id == self.user), execution_options=options).one()


@pytest.fixture
def replicated(shop: Shop, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ReplicatedShop]:
    """With replicas that are never too far behind: a lag of up to a minute is allowed."""
    yield from _replicated(shop, tmp_path, request, max_lag=60.0)


@pytest.fixture
def strict(shop: Shop, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ReplicatedShop]:
    """With replicas that may be a second behind."""
    yield from _replicated(shop, tmp_path, request, max_lag=1.0)


def _replicated(shop: Shop, tmp_path: Path, request: pytest.FixtureRequest, max_lag: float) -> Iterator[ReplicatedShop]:
    if shop.kind == "sqlite":
        yield ReplicatedShop(
            shop, [Endpoint("", 0, str(tmp_path / f"replica-{number}.db"), "sqlite") for number in range(2)], max_lag
        )
        return
    replicas: list[Endpoint] = request.getfixturevalue("server_replicas")
    for replica in replicas:
        empty(request.getfixturevalue("database_server"), replica)
    yield ReplicatedShop(shop, replicas, max_lag)


def test_reads_go_to_replicas_unless_told_otherwise(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster)() as session:
        assert session.get_one(User, replicated.user).name.startswith("replica")
    assert replicated.read(shardkit_read_from="master") == "master"
    masters = shardkit.sessionmaker(replicated.cluster, read_from="master")
    with masters() as session:
        assert session.get_one(User, replicated.user).name == "master"
    with masters() as session:
        statement = select(User.name).where(User.id == replicated.user).execution_options(shardkit_read_from="replica")
        assert session.scalars(statement).one().startswith("replica")
    with masters() as session:
        found = session.get_one(User, replicated.user, execution_options={"shardkit_read_from": "replica"})
        assert found.name.startswith("replica")


def test_the_first_read_of_a_process_waits_for_a_first_look_at_the_replicas(replicated: ReplicatedShop) -> None:
    """Its master may be away."""
    replicated.beat(0.0, 0.0)
    new = replicated.shop.open(replicated.cluster.map)
    with shardkit.sessionmaker(new)() as session:
        name = session.scalar(select(User.name).where(User.id == replicated.user))
        assert name in {"replica 0", "replica 1"}


def test_both_replicas_take_part(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    assert {replicated.read() for _ in range(60)} == {"replica 0", "replica 1"}


def test_a_transaction_stays_on_one_replica(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    statements = [
        select(User.name).where(User.id == replicated.user),
        select(User.__table__.c.name).where(User.__table__.c.id == replicated.user),
        select(User.name),
    ]
    for _ in range(5):
        with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
            answers = {session.scalars(statement).one() for _ in range(10) for statement in statements}
            assert len(answers | {session.get_one(User, replicated.user).name}) == 1


def test_what_was_read_on_the_master_is_not_older_on_a_replica_afterwards(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    replicated.catch_up()
    wait_until(lambda: replicated.fresh() == {0, 1})
    name = select(User.name).where(User.id == replicated.user)
    on_master = name.execution_options(shardkit_read_from="master")
    with shardkit.sessionmaker(replicated.cluster)() as session:
        assert session.scalar(name) != "master"
        assert [session.scalar(each) for each in (on_master, name)] == ["master", "master"]
    with shardkit.sessionmaker(replicated.cluster)() as session:
        assert [session.scalar(each) for each in (on_master, name, on_master, name)] == ["master"] * 4


def test_a_session_that_reads_masters_hands_that_on(replicated: ReplicatedShop) -> None:
    if replicated.shop.kind == "sqlite":
        pytest.skip("SQLite has no positions")
    replicated.beat(0, 0)
    replicated.catch_up()
    wait_until(lambda: replicated.fresh() == {0, 1})
    name = select(User.name).where(User.id == replicated.user)
    with shardkit.sessionmaker(replicated.cluster, read_from="master")() as session:
        assert session.scalar(name) == "master"
        while_open = session.token
        session.commit()
        assert session.scalar(name, execution_options={"shardkit_read_from": "replica"}) == "master"
        tokens = while_open, session.token
    for token in tokens:
        with shardkit.sessionmaker(replicated.cluster)(token=token) as session:
            assert session.scalar(name) == "master"


def test_an_earlier_user_of_a_connection_does_not_lower_the_token(replicated: ReplicatedShop) -> None:
    if replicated.shop.kind == "sqlite":
        pytest.skip("SQLite has no positions")
    engine = replicated.cluster.engine("shop-0")
    engine.dispose()
    with engine.begin() as connection:  # leaves its position on the one connection of the pool
        connection.execute(sa.update(User).where(User.id == replicated.user).values(age=1))
    replicated.beat(0, 0)
    replicated.catch_up()
    wait_until(lambda: replicated.fresh() == {0, 1})
    replicated.shop.execute(replicated.shop.masters["shop-0"], f"UPDATE users SET age=2 WHERE id={replicated.user}")
    name = select(User.name).where(User.id == replicated.user)
    with shardkit.sessionmaker(replicated.cluster)() as session:
        assert session.scalar(name, execution_options={"shardkit_read_from": "master"}) == "master"
        session.commit()
        session.execute(sa.update(User).where(User.id == replicated.user, User.name == "nobody").values(age=9))
        session.commit()
        assert session.scalar(name) == "master"  # the replicas do not have the second update


@pytest.mark.parametrize("form", ["order", "group", "handler"])
def test_columns_by_number_and_changed_texts_are_as_they_were(
    replicated: ReplicatedShop, form: str, request: pytest.FixtureRequest
) -> None:
    replicated.beat(0, 0)
    replicated.catch_up()
    wait_until(lambda: replicated.fresh() == {0, 1})
    users = replicated.shop.users_on("shop-0", 3)
    for replica in replicated.replicas:
        for user in users[1:]:
            replicated.shop.execute(replica, f"INSERT INTO users (id, name) VALUES ({user}, 'other {user}')")
    everyone = User.id.in_(users)
    statement = {
        "order": select(User.id).where(everyone).order_by(sa.text("1 desc")),
        "group": select(User.id).where(everyone).group_by(sa.text("1")).order_by(User.id.desc()),
        "handler": select(User.id).where(everyone).order_by(User.id.desc()),
    }[form]
    seen = []

    def change(_: object, __: object, text: str, parameters: object, *___: object) -> tuple[str, object]:
        seen.append(text)
        return text.replace("SELECT users", "SELECT ALL users", 1), parameters

    if form == "handler":  # one of all engines, which comes before those of one
        sa.event.listen(sa.Engine, "before_cursor_execute", change, retval=True)
        request.addfinalizer(lambda: sa.event.remove(sa.Engine, "before_cursor_execute", change))
    for _ in range(2):
        with shardkit.sessionmaker(replicated.cluster)() as session:
            options = {"shardkit_shard": "shop-0"}
            for _ in range(2):  # the first statement of a transaction also asks for the position
                found = session.scalars(statement, execution_options=options).all()
                assert found == sorted(users, reverse=True)
    assert bool(seen) == (form == "handler")


def test_the_token_may_be_asked_for_in_a_stream(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    users = replicated.shop.users_on("shop-0", 3)
    for user in users[1:]:
        replicated.shop.execute(
            replicated.shop.masters["shop-0"], f"INSERT INTO users (id, name) VALUES ({user}, 'other')"
        )
    statement = select(User.id).where(User.id.in_(users)).execution_options(yield_per=1, shardkit_shard="shop-0")
    with shardkit.sessionmaker(replicated.cluster)() as session:
        found = []
        for user in session.scalars(statement, execution_options={"shardkit_read_from": "master"}):
            found.append(user)
            assert session.token or replicated.shop.kind == "sqlite"
    assert sorted(found) == sorted(users)


def test_a_scattered_read_uses_replicas_where_there_are_some(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    other = replicated.shop.users_on("shop-1", 1)[0]
    replicated.shop.execute(
        replicated.shop.masters["shop-1"], f"INSERT INTO users (id, name) VALUES ({other}, 'master')"
    )
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        names = sorted(session.scalars(select(User.name)).all())
    assert names[0] == "master"
    assert names[1].startswith("replica")


def test_after_a_write_that_shard_is_read_on_its_master(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster, read_from="replica", recheck=False)() as session:
        user = session.get_one(User, replicated.user)
        assert user.name.startswith("replica")
        user.age = 30
        session.flush()
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one() == "master"
        session.rollback()
        if replicated.shop.kind == "server":  # what the master has shown is not there yet
            assert session.scalars(select(User.name).where(User.id == replicated.user)).one() == "master"
            session.rollback()
        replicated.catch_up()
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one().startswith("replica")


@pytest.mark.parametrize("write", ["update", "delete"])
def test_an_object_that_a_replica_showed_otherwise_is_not_written(replicated: ReplicatedShop, write: str) -> None:
    """The master's row was changed meanwhile, and that was acknowledged."""
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        user = session.get_one(User, replicated.user)
        assert user.name.startswith("replica")
        if write == "update":
            user.age = 30
        else:
            session.delete(user)
        with pytest.raises(StaleReadError, match="name was not yet as on the master"):
            session.commit()
        session.rollback()
        merged = session.merge(User(id=replicated.user, name="master", age=30))  # reads the master
        assert merged.name == "master"
        session.commit()
    assert replicated.shop.rows("shop-0", "users", "name, age") == [("master", 30)]


def test_an_object_that_is_as_on_the_master_is_written(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    for replica in replicated.replicas:
        replicated.shop.execute(replica, "UPDATE users SET name = 'master'")
    kept = shardkit.sessionmaker(replicated.cluster, read_from="replica", expire_on_commit=False)
    with kept() as session:
        user = session.get_one(User, replicated.user)
        user.age = 31
        session.commit()
        replicated.catch_up()
        other = session.scalars(select(User.name)).all()  # of another transaction
        assert other == ["master"]
        user.age = 32
        session.commit()
    assert replicated.shop.rows("shop-0", "users", "age") == [(32,)]


def test_what_stays_loaded_after_a_commit_is_checked_too(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    kept = shardkit.sessionmaker(replicated.cluster, read_from="replica", expire_on_commit=False)
    with kept() as session:
        user = session.get_one(User, replicated.user)
        session.commit()
        user.age = 31
        with pytest.raises(StaleReadError):
            session.commit()
    assert replicated.shop.rows("shop-0", "users", "age") == [(None,)]


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_a_replica_that_is_lost_after_a_read_has_cost_nothing(
    replicated: ReplicatedShop, request: pytest.FixtureRequest, end: str
) -> None:
    if replicated.shop.kind == "sqlite":
        pytest.skip("SQLite has no connections that could be lost")
    server: LocalDatabaseServer = request.getfixturevalue("database_server")
    replicated.beat(0, 0)
    replicated.catch_up()
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster)() as session:
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one().startswith("replica")
        names = ", ".join(f"'{replica.database}'" for replica in replicated.replicas)
        for (number,) in server.execute(f"SELECT id FROM information_schema.processlist WHERE db IN ({names})"):
            server.execute(f"KILL {number}")
        getattr(session, end)()
        assert replicated.cluster.metrics.lost_replicas.labels("shop-0")._value.get() == 1
        wait_until(lambda: replicated.fresh() == {0, 1})
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one().startswith("replica")


def test_replicas_come_and_go_while_clients_run(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    shop, replicas = replicated.shop, replicated.replicas
    store = MemoryMapStore(shop.map())
    with create_cluster(store, max_lag=60.0, **shop.options) as cluster:
        sessions = shardkit.sessionmaker(cluster)

        def publish(now: list[Endpoint]) -> None:
            version = cluster.map.version
            store.publish(shop.map({"shop-0": now}), expected_version=version)
            wait_until(lambda: cluster.map.version > version)

        def read() -> str:
            with sessions() as session:
                return session.scalars(select(User.name).where(User.id == replicated.user)).one()

        assert read() == "master"
        for now, expected in ((replicas, {"replica 0", "replica 1"}), (replicas[1:], {"replica 1"})):
            publish(now)
            wait_until(cluster.health.wait)
            assert {read() for _ in range(40)} == expected
        publish([])
        assert read() == "master"


@pytest.mark.parametrize("now", [[0], [1, 0]], ids=["without it", "in another order"])
def test_the_map_may_change_while_a_replica_is_chosen(
    replicated: ReplicatedShop, monkeypatch: pytest.MonkeyPatch, now: list[int]
) -> None:
    replicated.beat(0, 0)
    shop, replicas = replicated.shop, replicated.replicas
    store = MemoryMapStore(shop.map({"shop-0": replicas}))
    after = shop.map({"shop-0": [replicas[number] for number in now]})

    def choose_before(candidates: list[Replica], *_: object) -> Replica:
        store.publish(after, expected_version=cluster.map.version)
        return next(replica for replica in candidates if replica[2] == replicas[1])

    with create_cluster(store, max_lag=60.0, **shop.options) as cluster:
        wait_until(cluster.health.wait)
        monkeypatch.setattr("shardkit.cluster.choose", choose_before)
        with shardkit.sessionmaker(cluster)() as session:
            assert session.scalars(select(User.name).where(User.id == replicated.user)).one() == "replica 1"


def test_reads_follow_the_weights_of_the_map(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    shop, replicas = replicated.shop, replicated.replicas
    plain = shop.map({"shop-0": replicas})
    store = MemoryMapStore(plain)
    with create_cluster(store, max_lag=60.0, **shop.options) as cluster:
        sessions = shardkit.sessionmaker(cluster)

        def reads(first: int, second: int) -> Counter[str]:
            weights = dict(zip(replicas, (first, second), strict=True))
            shards = {**plain.shards, "shop-0": replace(plain.shards["shop-0"], weights=weights)}
            version = cluster.map.version
            store.publish(plain.with_shards(shards), expected_version=version)
            wait_until(lambda: cluster.map.version > version)
            wait_until(cluster.health.wait)
            found = Counter[str]()
            for _ in range(200):
                with sessions() as session:
                    found[session.scalars(select(User.name).where(User.id == replicated.user)).one()] += 1
            return found

        found = reads(9, 1)
        assert set(found) == {"replica 0", "replica 1"}
        assert found["replica 0"] > 150
        assert reads(0, 1) == {"replica 1": 200}
        assert reads(0, 0) == {"master": 200}
        assert reads(1, 0) == {"replica 0": 200}


def test_a_driver_that_does_not_tell_is_asked(replicated: ReplicatedShop, monkeypatch: pytest.MonkeyPatch) -> None:
    if replicated.shop.kind == "sqlite":
        pytest.skip("SQLite has no positions")
    monkeypatch.setattr(drivers, "connect", lambda dialect, arguments, options: dialect.connect(*arguments, **options))
    shop = replicated.shop
    cluster = shop.open(shop.map({"shop-0": replicated.replicas}), max_lag=60.0)
    replicated.beat(0, 0)
    wait_until(cluster.health.wait)
    with shardkit.sessionmaker(cluster)() as session:
        session.execute(sa.update(User).where(User.id == replicated.user).values(age=5))
        session.commit()
        mark = session.token.mark("shop-0")
        assert mark is not None
        assert mark.position is not None
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one() == "master"
    replicated.catch_up()
    with shardkit.sessionmaker(cluster)(token=session.token) as session:
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one().startswith("replica")


def test_a_master_that_lagging_replicas_would_take_down_refuses(replicated: ReplicatedShop) -> None:
    shop = replicated.shop
    cluster = shop.open(shop.map({"shop-0": replicated.replicas}), max_lag=1.0, master_read_share=0.0)
    replicated.beat(3600, 3600)
    assert not cluster.health.wait()
    answers = []
    for _ in range(8):
        with shardkit.sessionmaker(cluster)() as session:
            try:
                answers.append(session.scalars(select(User.name).where(User.id == replicated.user)).one())
            except NoFreshReplica:
                answers.append("refused")
    assert answers == ["master"] * 5 + ["refused"] * 3
    with shardkit.sessionmaker(cluster, read_from="master")() as session:
        assert session.get_one(User, replicated.user).name == "master"


def test_a_lag_that_a_statement_allows(replicated: ReplicatedShop) -> None:
    replicated.beat(20, 20)
    assert replicated.read().startswith("replica")
    assert replicated.read(shardkit_max_lag=10) == "master"
    for wrong in ("soon", -1, True):
        with pytest.raises(RoutingError, match="shardkit_max_lag"):
            replicated.read(shardkit_max_lag=wrong)


def test_a_flush_that_a_read_causes_turns_that_read_to_the_master(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    new = replicated.shop.users_on("shop-0", 2)[1]
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        session.add(User(id=new, name="new"))
        assert session.scalar(select(func.count()).select_from(User).where(User.id == new)) == 1
        session.rollback()


def test_objects_read_before_the_first_write_are_read_again_on_the_master(replicated: ReplicatedShop) -> None:
    """Else an object would show the replica's values beside rows of the master's."""
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    new = replicated.shop.users_on("shop-0", 2)[1]
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        user = session.get_one(User, replicated.user)
        assert user.name.startswith("replica")
        session.add(User(id=new, name="new"))
        session.flush()
        assert user.name == "master"
        session.rollback()


def test_an_update_statement_turns_its_shard_to_the_master(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        user = session.get_one(User, replicated.user)
        session.execute(sa.update(User).where(User.id == replicated.user).values(age=31))
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one() == "master"
        assert user.name == "master"
        session.rollback()


def test_locking_reads_go_to_the_master(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        statement = select(User.name).where(User.id == replicated.user).with_for_update()
        assert session.scalars(statement).one() == "master"
        assert session.scalars(select(User.name).where(User.id == replicated.user)).one() == "master"
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        assert session.get_one(User, replicated.user, with_for_update=True).name == "master"


def test_a_replica_without_a_heartbeat_gets_no_reads(strict: ReplicatedShop) -> None:
    strict.beat(None, None)
    assert strict.fresh() == set()
    assert strict.read() == "master"


def test_a_replica_that_is_too_far_behind_gets_no_reads_until_it_is_back(replicated: ReplicatedShop) -> None:
    replicated.beat(3600, 0)
    wait_until(lambda: replicated.fresh() == {1})
    assert {replicated.read() for _ in range(20)} == {"replica 1"}
    replicated.beat(3600, 3600)
    wait_until(lambda: replicated.fresh() == set())
    assert replicated.read() == "master"
    replicated.beat(0, 3600)
    wait_until(lambda: replicated.fresh() == {0})
    assert replicated.read() == "replica 0"


def test_a_replica_that_cannot_be_asked_gets_no_reads(replicated: ReplicatedShop) -> None:
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    replicated.shop.execute(replicated.replicas[0], "ALTER TABLE shardkit_heartbeat RENAME TO shardkit_hidden")
    wait_until(lambda: replicated.fresh() == {1})
    reading = replicated.cluster.health.reading(replicated.cluster._replicas_of("shop-0")[0])
    assert reading is not None
    assert "shardkit_heartbeat" in reading.error
    replicated.shop.execute(replicated.replicas[0], "ALTER TABLE shardkit_hidden RENAME TO shardkit_heartbeat")


def test_lag_is_counted_in_seconds_by_the_servers_own_clock(replicated: ReplicatedShop) -> None:
    replicated.beat(20, 40)
    first, second = replicated.cluster._replicas_of("shop-0")

    def lags() -> list[float]:
        readings = [replicated.cluster.health.reading(replica) for replica in (first, second)]
        return [reading.lag for reading in readings if reading is not None and reading.lag is not None]

    wait_until(lambda: len(lags()) == 2 and 20 <= lags()[0] < 25 and 40 <= lags()[1] < 45)


def test_a_shard_without_replicas_is_read_on_its_master(replicated: ReplicatedShop) -> None:
    other = replicated.shop.users_on("shop-1", 1)[0]
    with shardkit.sessionmaker(replicated.cluster, read_from="replica")() as session:
        assert session.get(User, other) is None
