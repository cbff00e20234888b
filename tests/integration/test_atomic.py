"""transactions="atomic": a transaction over several servers ends everywhere alike, on both flavours."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from sqlalchemy import String, event, orm, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shardkit import Cluster, create_cluster, fixed, retry, sessionmaker
from shardkit.decisions import Janitor, Outcome, prepared_branches
from shardkit.engines import LOCK_WAIT_SECONDS
from shardkit.errors import CommitPending, CommitUnknown, PartRolledBack
from shardkit.session.retrying import is_retryable
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer

SHARDS = ("north", "south", "west")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    region: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    amount: Mapped[int]


class Currency(Base):
    __tablename__ = "currencies"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(20))


@pytest.fixture(scope="module")
def cluster(database_server: LocalDatabaseServer) -> Iterator[Cluster]:
    names = {shard: f"atomic_{shard}" for shard in SHARDS}
    for name in names.values():
        database_server.execute(f"DROP DATABASE IF EXISTS {name}")
        database_server.execute(f"CREATE DATABASE {name}")
    shard_map = ShardMap.parse(
        {
            "format": 1,
            "cluster": "bank",
            "keyspaces": {
                "bank": {
                    "partition": {
                        "by": "list",
                        "buckets": {shard: [number] for number, shard in enumerate(SHARDS)},
                    },
                    "tables": {"accounts": "region"},
                    "reference": ["currencies"],
                    "placement": {shard: [shard] for shard in SHARDS},
                }
            },
            "shards": {shard: {"master": database_server.endpoint(name).url} for shard, name in names.items()},
        }
    )
    with create_cluster(shard_map, credentials=fixed("root")) as opened:
        opened.create_all(Base.metadata)
        yield opened
    for name in names.values():
        database_server.execute(f"DROP DATABASE {name}")


@pytest.fixture
def factory(cluster: Cluster) -> orm.sessionmaker[Session]:
    """Sessions on three accounts of 100 each."""
    made = sessionmaker(cluster, transactions="atomic")
    for number, shard in enumerate(SHARDS):
        with cluster.engine(shard).begin() as connection:
            connection.execute(Account.__table__.delete())
            connection.execute(Currency.__table__.delete())
            connection.execute(Account.__table__.insert().values(region=number, amount=100))
    return made


def amounts(cluster: Cluster) -> list[int]:
    found = []
    for shard in SHARDS:
        with cluster.engine(shard).connect() as connection:
            found.append(connection.scalar(select(Account.amount)))
    return found


def connect(cluster: Cluster, shard: str) -> object:
    pooled = cluster.engine(shard).raw_connection()
    connection = pooled.driver_connection
    pooled.detach()
    connection.autocommit(True)  # type: ignore[union-attr]
    return connection


def left_prepared(cluster: Cluster) -> list[str]:
    with closing(connect(cluster, "north")) as connection:  # type: ignore[type-var]
        return [branch.shard for branch in prepared_branches(connection)]  # type: ignore[arg-type]


def transfer(session: Session, *regions: int) -> None:
    for region in regions:
        session.get_one(Account, region).amount += 1 if region else -1
        session.flush()


class Statements:
    """What is sent to the servers while it is listening."""

    def __init__(self, cluster: Cluster) -> None:
        self.sent: list[str] = []
        for shard in SHARDS:
            event.listen(cluster.engine(shard), "before_cursor_execute", self._note)

    def _note(self, _connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        self.sent.append(statement)

    def xa(self) -> list[str]:
        return [" ".join(statement.split()[:2]) for statement in self.sent if statement.startswith("XA")]


def test_one_shard_pays_nothing(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    statements = Statements(cluster)
    with factory.begin() as session:
        transfer(session, 1)
    assert amounts(cluster) == [100, 101, 100]
    assert statements.xa() == []


def test_three_shards_commit_together(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    statements = Statements(cluster)
    with factory.begin() as session:
        transfer(session, 0, 1, 2)
    assert amounts(cluster) == [99, 101, 101]
    assert sorted(statements.xa()) == sorted(["XA START", "XA END", "XA PREPARE", "XA COMMIT"] * 2)
    assert left_prepared(cluster) == []


def test_one_writer_among_readers_commits_in_one_phase(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    statements = Statements(cluster)
    with factory.begin() as session:
        assert session.get_one(Account, 0).amount == 100
        transfer(session, 1)
        assert session.get_one(Account, 2).amount == 100
    assert amounts(cluster) == [100, 101, 100]
    assert "XA PREPARE" not in statements.xa()


def test_rollback_undoes_every_shard_and_frees_its_rows(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with factory() as session:
        transfer(session, 0, 1, 2)
        session.rollback()
        assert amounts(cluster) == [100, 100, 100]
    with factory.begin() as session:  # the connections are fit for another transaction
        transfer(session, 2, 1, 0)
    assert amounts(cluster) == [99, 101, 101]


def test_an_error_in_a_later_shard_undoes_the_first(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with pytest.raises(DBAPIError), factory.begin() as session:  # noqa: PT012 - the whole transaction is the claim
        transfer(session, 0, 1)
        session.add(Account(region=2, amount=5))  # is there already
    assert amounts(cluster) == [100, 100, 100]
    assert left_prepared(cluster) == []


def test_savepoints_inside_branches(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with factory.begin() as session:
        transfer(session, 0, 1)
        savepoint = session.begin_nested()
        transfer(session, 2)
        savepoint.rollback()
        transfer(session, 1)
    assert amounts(cluster) == [99, 102, 100]


def test_a_reference_row_is_written_everywhere(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with factory.begin() as session:
        session.add(Currency(id=1, name="KRW"))
    for shard in SHARDS:
        with cluster.engine(shard).connect() as connection:
            assert connection.scalars(select(Currency.name)).all() == ["KRW"]


def kill_connection(cluster: Cluster, shard: str, number: int) -> None:
    with closing(connect(cluster, shard)) as connection, connection.cursor() as cursor:  # type: ignore[type-var, attr-defined]
        cursor.execute(f"KILL {number}")


def kill_before(cluster: Cluster, session: Session, shard: str, word: str) -> None:
    """Kill the session's connection to a shard when it is about to send a statement that begins with ``word``."""
    held = session.connection(bind_arguments={"bind": cluster.engine(shard)})

    @event.listens_for(held, "before_cursor_execute")
    def kill(_connection: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement.startswith(word):
            kill_connection(cluster, shard, held.connection.driver_connection.thread_id())  # type: ignore[union-attr]


def test_a_branch_lost_before_prepare_undoes_all(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with factory() as session:
        transfer(session, 0, 1)
        kill_before(cluster, session, "south", "XA PREPARE")
        with pytest.raises(DBAPIError):
            session.commit()
        session.rollback()
    assert amounts(cluster) == [100, 100, 100]
    assert left_prepared(cluster) == []


def test_a_branch_lost_after_the_decision_is_pending_and_the_janitor_commits_it(
    cluster: Cluster, factory: orm.sessionmaker[Session]
) -> None:
    with factory() as session:
        transfer(session, 0, 1)
        kill_before(cluster, session, "south", "XA COMMIT")
        with pytest.raises(CommitPending) as caught:
            session.commit()
        assert caught.value.shards == ("south",)
    assert amounts(cluster) == [99, 100, 100]
    outcomes = Janitor(lambda shard: connect(cluster, shard)).sweep(SHARDS, patient=False)  # type: ignore[arg-type, return-value]
    assert list(outcomes.values()) == [Outcome.COMMITTED]
    assert amounts(cluster) == [99, 101, 100]


def test_the_decider_lost_before_its_commit_undoes_all(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with factory() as session:
        transfer(session, 0, 1)
        kill_before(cluster, session, "north", "INSERT INTO shardkit_decision")
        with pytest.raises(DBAPIError):
            session.commit()
        session.rollback()
    assert amounts(cluster) == [100, 100, 100]
    assert left_prepared(cluster) == []


def test_a_lost_answer_to_the_decision_is_looked_up(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    """The decider's connection dies at COMMIT: nothing was decided, a tombstone keeps it so, and all is undone."""
    with factory() as session:
        transfer(session, 0, 1)
        held = session.connection(bind_arguments={"bind": cluster.engine("north")})

        @event.listens_for(held.engine, "commit", once=True)
        def kill(connection: object) -> None:
            if connection is held:
                kill_connection(cluster, "north", held.connection.driver_connection.thread_id())  # type: ignore[union-attr]

        with pytest.raises((DBAPIError, CommitUnknown)):
            session.commit()
        session.rollback()
    assert amounts(cluster) == [100, 100, 100]
    assert left_prepared(cluster) == []


@pytest.mark.parametrize("first", [None, "south"])
def test_a_lost_answer_to_the_commit_of_one_shard(
    cluster: Cluster, factory: orm.sessionmaker[Session], first: str | None
) -> None:
    """Whether or not another master was read before, so that the one that was written to is a branch."""
    with factory() as session:
        if first is not None:
            session.execute(select(Account.amount).where(Account.region == SHARDS.index(first))).all()
        session.get_one(Account, 0).amount = 7
        session.flush()
        held = session.connection(bind_arguments={"bind": cluster.engine("north")})
        kill_connection(cluster, "north", held.connection.driver_connection.thread_id())  # type: ignore[union-attr]
        with pytest.raises(CommitUnknown, match="COMMIT on shard north was lost: it may or may not be durable"):
            session.commit()
        session.rollback()
    assert amounts(cluster) == [100, 100, 100]
    assert left_prepared(cluster) == []
    with factory() as session:  # nothing can be lost of what only read
        session.execute(select(Account.amount).where(Account.region == 0)).all()
        held = session.connection(bind_arguments={"bind": cluster.engine("north")})
        kill_connection(cluster, "north", held.connection.driver_connection.thread_id())  # type: ignore[union-attr]
        with pytest.raises(DBAPIError):
            session.commit()


@pytest.mark.parametrize("first", ["north", "south"])
def test_going_on_after_a_deadlock_commits_nothing(
    cluster: Cluster, factory: orm.sessionmaker[Session], first: str
) -> None:
    """The server has undone its part: what is on the other shards must not stay. Whether the part was the decider's or
    a branch."""
    with factory() as session, cluster.engine("north").connect() as other:
        numbers = [SHARDS.index(first), 0, 1]
        for number in dict.fromkeys(numbers):
            session.execute(update(Account).where(Account.region == number).values(amount=1))
        other.exec_driver_sql("CREATE TABLE IF NOT EXISTS locked (id INT PRIMARY KEY) ENGINE InnoDB")
        other.exec_driver_sql("INSERT IGNORE INTO locked VALUES (1), (2), (3)")
        other.commit()
        other.exec_driver_sql("UPDATE locked SET id = id + 10")  # heavier: the other one is the victim
        with ThreadPoolExecutor() as pool:
            waits = pool.submit(other.exec_driver_sql, "UPDATE accounts SET amount = 5 WHERE region = 0")
            eventually_waiting(cluster, "north")
            options = {"shardkit_shard": "north"}
            with pytest.raises(DBAPIError, match="1213"):
                session.execute(text("UPDATE locked SET id = 20 WHERE id = 11"), execution_options=options)
            waits.result(20)
        other.rollback()
        other.exec_driver_sql("DROP TABLE locked")
        session.execute(update(Account).where(Account.region == 1).values(amount=2))
        with pytest.raises((PartRolledBack, DBAPIError)) as raised:
            session.commit()
        assert is_retryable(raised.value)
        session.rollback()
    assert amounts(cluster) == [100, 100, 100]
    assert left_prepared(cluster) == []


def eventually_waiting(cluster: Cluster, shard: str) -> None:
    for _ in range(200):
        with cluster.engine(shard).connect() as connection:
            found = connection.exec_driver_sql(
                "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
            )
            if found.scalar():
                return
        time.sleep(0.05)
    raise AssertionError("nobody waits for a lock")


def test_bulk_update_over_all_shards(cluster: Cluster, factory: orm.sessionmaker[Session]) -> None:
    with factory.begin() as session:
        session.execute(update(Account).values(amount=Account.amount * 2), execution_options={"shardkit_scatter": True})
    assert amounts(cluster) == [200, 200, 200]


def lock_waits(cluster: Cluster) -> set[int]:
    """What the connections that lie in the pools have set."""
    found = set()
    for shard in SHARDS:
        with cluster.engine(shard).connect() as connection:
            found.add(connection.exec_driver_sql("SELECT @@innodb_lock_wait_timeout").scalar())
    return found


def test_locks_are_waited_for_briefly_in_transactions_over_shards_only(
    cluster: Cluster, factory: orm.sessionmaker[Session]
) -> None:
    usual = lock_waits(cluster)
    assert min(usual) > LOCK_WAIT_SECONDS
    with factory() as session:
        transfer(session, 0)
        asked = "SELECT @@innodb_lock_wait_timeout"
        held = session.connection(bind_arguments={"bind": cluster.engine("north")})
        assert held.exec_driver_sql(asked).scalar() in usual
        transfer(session, 1)
        other = session.connection(bind_arguments={"bind": cluster.engine("south")})
        assert {each.exec_driver_sql(asked).scalar() for each in (held, other)} == {LOCK_WAIT_SECONDS}
        session.rollback()
    assert lock_waits(cluster) == usual


def test_a_deadlock_over_two_servers_ends_soon_and_is_run_again(
    cluster: Cluster, factory: orm.sessionmaker[Session]
) -> None:
    """Each server sees one transaction wait for another, and no circle."""
    both_hold_one = threading.Barrier(2)
    attempts: Counter[int] = Counter()

    @retry(factory, within=60)
    def crossing(session: Session, first: int, second: int) -> None:
        attempts[first] += 1
        session.get_one(Account, first, with_for_update=True).amount += 1
        session.flush()
        if attempts[first] == 1:
            both_hold_one.wait(20)
        session.get_one(Account, second, with_for_update=True).amount += 1

    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(crossing, 0, 1), pool.submit(crossing, 1, 0)]:
            done.result()
    assert time.monotonic() - begun < 40
    assert attempts.total() > 2
    assert amounts(cluster) == [102, 102, 100]
    assert left_prepared(cluster) == []
