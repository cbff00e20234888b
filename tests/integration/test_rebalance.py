"""Moving buckets between two shards: what arrives, what is refused meanwhile, what is refused from the start."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pymysql
import pytest
import sqlalchemy as sa
import yaml
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.credentials import fixed
from shardkit.errors import BucketClosed, PreconditionFailed, RebalanceError, StaleShardMap
from shardkit.mapstore import MapStore, MemoryMapStore
from shardkit.rebalance import Job, Progress, Settings, State, apply_plan, cancel_job, copy, plan_move, stages
from shardkit.rebalance import MoveBuckets as Move
from shardkit.rebalance.copy import Chunk, Copy, Key, read_chunk
from shardkit.rebalance.cutover import Lease
from shardkit.rebalance.servers import Server
from shardkit.rebalance.tables import Table, read_table
from shardkit.rebalance.throttle import Throttle
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalZooKeeper
from shardkit.testing.database import LocalDatabaseServer
from tests.conftest import FLAVOUR
from tests.rebalance_shop import DDL, FIRST, SECOND, USERS, Shop, open_shop, wait_until


class Base(DeclarativeBase):
    """The application's models; they know of no shard."""


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(60))
    balance: Mapped[float] = mapped_column(sa.Numeric(12, 2))


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True)
    user_id: Mapped[int | None] = mapped_column(sa.BigInteger)
    amount: Mapped[int]


@pytest.fixture
def shop(database_server: LocalDatabaseServer, tmp_path: Path) -> Iterator[Shop]:
    with open_shop(database_server, f"file:{tmp_path}/map.yaml") as shop:
        yield shop


@pytest.fixture
def coordinated_shop(database_server: LocalDatabaseServer, zookeeper: LocalZooKeeper) -> Iterator[Shop]:
    """Under ZooKeeper, where every process tells which map it runs on."""
    cluster = f"move-{time.monotonic_ns()}"
    with open_shop(database_server, f"zookeeper://{zookeeper.host}:{zookeeper.port}/{cluster}", cluster) as shop:
        yield shop


@dataclass
class At:
    """Does something in the middle of a job: when it enters a state."""

    actions: dict[State, Callable[[], object]]
    states: list[State] = field(default_factory=list)

    def entered(self, job: Job) -> None:
        self.states.append(job.state)
        if job.state in self.actions:
            self.actions[job.state]()

    def progressed(self, job: Job, progress: Progress) -> None: ...

    def noted(self, job: Job, text: str) -> None: ...


def cluster_of(shop: Shop, source: MapStore | ShardMap | str | None = None) -> Cluster:
    return create_cluster(source or shop.source, credentials=shop.server.credentials)


def refusal(shop: Shop, shard: str, statement: str) -> str:
    """What the server says to a raw statement; empty when it lets it through."""
    with closing(shop.connect(shard)) as connection, connection.cursor() as cursor:
        try:
            cursor.execute(statement)
        except pymysql.OperationalError as error:
            if error.args[0] != 1644:
                raise
            return str(error.args[1])
    return ""


# --- what arrives --------------------------------------------------------------------------------------------------


def test_every_row_arrives_once_and_leaves_its_old_shard(shop: Shop) -> None:
    before = shop.contents()
    plan = shop.plan()
    watched = At({})
    (job,) = shop.apply(plan, observer=watched)
    assert shop.contents() == before
    assert shop.misplaced() == []
    assert watched.states == [
        *(State.PREPARED, State.FREEZING, State.FROZEN, State.COPYING, State.VERIFYING),
        *(State.ACTIVATED, State.PUBLISHED, State.CLEANING, State.COMPLETED),
    ]
    assert shop.map.version == plan.map_version + 3, "named, published, forgotten"
    assert shop.map.moves == ()
    assert (job.moving_version, job.published_version) == (plan.map_version + 1, plan.map_version + 2)
    assert shop.rows(FIRST, "SELECT COUNT(*) FROM shardkit_job_cursor") == [(0,)]


def test_named_buckets_and_keys_that_are_null_move_as_well(shop: Shop) -> None:
    shop.execute(FIRST, "INSERT INTO orders VALUES (1, NULL, X'00', 1), (2, NULL, NULL, 2)")
    before = shop.contents()
    shop.apply(shop.plan("seoul"))
    shop.apply(shop.plan(0))
    assert shop.contents() == before
    assert shop.misplaced() == []
    assert shop.rows(SECOND, "SELECT COUNT(*) FROM stores WHERE region = '서울'") == [(29,)]
    assert shop.rows(SECOND, "SELECT id FROM orders WHERE user_id IS NULL ORDER BY id") == [(1,), (2,)]


def test_a_vertical_keyspace_moves_as_a_whole(shop: Shop) -> None:
    said: list[str] = []
    closed = {State.COPYING: lambda: said.append(refusal(shop, FIRST, "INSERT INTO invoices (total) VALUES (9)"))}
    shop.apply(shop.plan("all"), observer=At(closed))
    assert said == [f"shardkit: bucket all of keyspace billing is frozen; moved_to={SECOND}"]
    assert shop.rows(SECOND, "SELECT COUNT(*), SUM(total) FROM invoices") == [(3, 4)]
    assert shop.rows(FIRST, "SELECT COUNT(*) FROM invoices") == [(0,)]
    assert shop.map.locate("invoices").shard == SECOND
    assert refusal(shop, SECOND, "INSERT INTO invoices (total) VALUES (9)") == ""


def test_there_and_back_again(shop: Shop) -> None:
    before = shop.contents()
    shop.apply(shop.plan(3, 4))
    shop.apply(shop.plan(3, target=FIRST))
    shop.apply(shop.plan(3))
    assert shop.contents() == before
    assert shop.misplaced() == []
    assert {bucket: owners for bucket, owners in shop.owners().items() if len(owners) != 1} == {}
    epochs = {
        shard: shop.rows(shard, "SELECT epoch, state FROM shardkit_ownership WHERE keyspace='orders' AND bucket='3'")
        for shard in (FIRST, SECOND)
    }
    assert epochs[SECOND][0][0] > epochs[FIRST][0][0], "the owner's epoch is the highest"


def test_a_shard_without_the_tables_gets_them(shop: Shop) -> None:
    shop.add_shard("shop-2")
    shop.apply(shop.plan("seoul", target="shop-2"))
    assert shop.rows("shop-2", "SELECT COUNT(*), SUM(sales) FROM stores") == [(29, sum(range(1, 30)) * 7)]
    assert shop.rows(FIRST, "SELECT DISTINCT region FROM stores") == [("대구",)]
    same = "SELECT column_name, column_type, collation_name FROM information_schema.columns WHERE table_name = 'stores'"
    in_database = " AND table_schema = DATABASE() ORDER BY ordinal_position"
    assert shop.rows("shop-2", same + in_database) == shop.rows(FIRST, same + in_database)


# --- while it runs -------------------------------------------------------------------------------------------------


def test_the_databases_themselves_refuse_writes_to_the_moving_buckets(shop: Shop) -> None:
    """Every kind of statement, on both shards, from a connection that knows nothing of shardkit."""
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    bucket = shop.map.locate("users", [user]).bucket
    staying = shop.users_in(range(4))[0]
    newcomer = next(n for n in range(10_000, 20_000) if shop.map.locate("users", [n]).bucket == bucket)
    frozen = f"shardkit: bucket {bucket} of keyspace orders is frozen; moved_to={SECOND}"
    importing = f"shardkit: bucket {bucket} of keyspace orders is importing; moved_to={FIRST}"
    said: dict[str, str] = {}
    writes = {
        "insert": f"INSERT INTO orders VALUES (7, {user}, X'00', 1)",
        "insert ignore": f"INSERT IGNORE INTO orders VALUES (7, {user}, X'00', 1)",
        "replace": f"REPLACE INTO orders VALUES ({user}0, {user}, X'00', 1)",
        "upsert": f"INSERT INTO orders VALUES ({user}0, {user}, X'00', 1) ON DUPLICATE KEY UPDATE amount = 9",
        "update": f"UPDATE users SET name = 'x' WHERE id = {user}",
        "update into it": f"UPDATE orders SET user_id = {user} WHERE id = {staying}0",
        "update out of it": f"UPDATE orders SET user_id = {staying} WHERE user_id = {user}",
        "update of all": "UPDATE orders SET amount = amount + 1",
        "delete": f"DELETE FROM orders WHERE user_id = {user}",
        "delete with cascade": f"DELETE FROM users WHERE id = {user}",
        "join delete": f"DELETE users, orders FROM users JOIN orders ON user_id = users.id WHERE user_id = {user}",
    }

    def try_writes() -> None:
        for kind, statement in writes.items():
            said[kind] = refusal(shop, FIRST, statement)
        said["insert at the target"] = refusal(shop, SECOND, f"INSERT INTO users (id, name) VALUES ({newcomer}, 'x')")
        said["another bucket"] = refusal(shop, FIRST, f"UPDATE users SET name = 'free' WHERE id = {staying}")
        with closing(shop.connect(FIRST)) as connection, connection.cursor() as cursor:
            cursor.execute("SET SESSION lock_wait_timeout = 1, foreign_key_checks = 0")
            for ddl in ("TRUNCATE TABLE orders", "ALTER TABLE users ADD COLUMN x INT"):
                with pytest.raises(pymysql.OperationalError, match="Lock wait timeout"):
                    cursor.execute(ddl)

    shop.apply(plan, observer=At({State.VERIFYING: try_writes}))
    at_target, elsewhere = said.pop("insert at the target"), said.pop("another bucket")
    everything = said.pop("update of all")
    assert said == dict.fromkeys(said, frozen)
    assert "is frozen" in everything
    assert at_target == importing
    assert elsewhere == ""
    # afterwards the source refuses still, and the target takes them
    assert refusal(shop, FIRST, f"INSERT INTO orders VALUES (7, {user}, X'00', 1)") == (
        f"shardkit: bucket {bucket} of keyspace orders is moved; moved_to={SECOND}"
    )
    assert refusal(shop, SECOND, f"INSERT INTO orders VALUES (7, {user}, X'00', 1)") == ""


def test_ddl_that_waits_for_a_held_table_delays_the_move_and_gives_up(shop: Shop) -> None:
    """While it waits, nobody gets at the table, the job neither."""
    outcomes: list[str] = []
    threads: list[threading.Thread] = []

    def truncate(shard: str, table: str) -> None:
        with closing(shop.connect(shard)) as connection, connection.cursor() as cursor:
            cursor.execute("SET SESSION lock_wait_timeout = 2, foreign_key_checks = 0")
            try:
                cursor.execute(f"TRUNCATE TABLE {table}")
                outcomes.append("truncated")
            except pymysql.OperationalError as error:
                outcomes.append(str(error.args[1]))

    def begin(shard: str, table: str) -> None:
        thread = threading.Thread(target=truncate, args=(shard, table))
        thread.start()
        threads.append(thread)
        waiting = "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'TRUNCATE%' AND state LIKE '%metadata%'"
        wait_until(lambda: shop.rows(shard, waiting), "the TRUNCATE waits")

    before = shop.contents()
    actions = {State.COPYING: lambda: begin(FIRST, "orders"), State.VERIFYING: lambda: begin(SECOND, "users")}
    shop.apply(shop.plan(), observer=At(actions))
    for thread in threads:
        thread.join()
    assert ["Lock wait timeout" in outcome for outcome in outcomes] == [True, True]
    assert shop.contents() == before
    assert shop.misplaced() == []


def test_an_auto_increment_key_cannot_slip_into_a_closed_bucket(shop: Shop) -> None:
    """Before the INSERT its value is 0; the row that comes out of it is what counts."""
    outcome: list[str] = []

    def insert() -> None:
        outcome.extend(refusal(shop, FIRST, "INSERT INTO users (name) VALUES ('whoever')") for _ in range(40))

    plan = shop.plan()
    moving = {str(bucket) for bucket in plan.transfers[0].buckets}
    shop.apply(plan, observer=At({State.VERIFYING: insert}))
    ids = [number for (number,) in shop.rows(FIRST, "SELECT id FROM users WHERE name = 'whoever'")]
    assert 0 < len(ids) == outcome.count("") < len(outcome)
    assert not {str(shop.map.locate("users", [number]).bucket) for number in ids} & moving


def test_sessions_go_on_and_every_scattered_answer_is_right(coordinated_shop: Shop) -> None:
    """A reader counts and sums over both shards, one writer works on what stays, one on what moves."""
    shop = coordinated_shop
    plan = shop.plan()
    moving = shop.users_in(plan.transfers[0].buckets)
    staying = [number for number in range(1, USERS + 1) if number not in moving]
    done = threading.Event()
    failures: list[BaseException] = []
    answers: list[tuple[int, int, int, int]] = []
    started = [0]  # written, maybe acknowledged
    acknowledged = [0]
    refused = [0]
    lock = threading.Lock()

    def read(sessions: Callable[[], sa.orm.Session]) -> None:
        while not done.is_set():
            low = acknowledged[0]
            with sessions() as session:
                count, total = session.execute(select(func.count(), func.sum(Order.amount)).select_from(Order)).one()
            answers.append((int(count), low, int(total), started[0]))

    def write(sessions: Callable[[], sa.orm.Session], users: list[int]) -> None:
        for turn in range(10**9):
            if done.is_set():
                return
            with lock:
                started[0] += 1
            try:
                with sessions() as session, session.begin():
                    order = session.scalars(select(Order).where(Order.user_id == users[turn % len(users)])).first()
                    assert order is not None
                    order.amount += 1
            except sa.exc.OperationalError as error:
                with lock:
                    started[0] -= 1
                # MySQL only: its DDL cannot but wait, which makes a deadlock of a reader that goes on to write
                if FLAVOUR != "mysql" or "1213" not in str(error):
                    raise
            except StaleShardMap:
                with lock:
                    started[0] -= 1
                refused[0] += 1
                assert users is moving, "what stays is never refused"
                time.sleep(0.01)
            else:
                with lock:
                    acknowledged[0] += 1

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - told to the test below
                failures.append(error)
                done.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    (before,) = (
        sum(int(row[0][0]) for row in (shop.rows(s, "SELECT SUM(amount) FROM orders") for s in (FIRST, SECOND))),
    )
    with cluster_of(shop) as cluster:
        sessions = shardkit.sessionmaker(cluster, read_from="master")
        threads = [
            guarded(lambda: read(sessions)),
            guarded(lambda: write(sessions, staying)),
            guarded(lambda: write(sessions, moving)),
        ]
        wait_until(lambda: len(answers) > 5 or failures, "answers")
        (job,) = shop.apply(plan, settings=Settings(rows_per_second=300))
        settled = acknowledged[0]
        wait_until(lambda: acknowledged[0] > settled + 20 or failures, "writes after the move")
        done.set()
        for thread in threads:
            thread.join(30)
    if failures:
        raise failures[0]
    assert job.state is State.COMPLETED
    assert refused[0] > 0
    assert len(answers) > 20
    for count, low, total, high in answers:
        assert count == 2 * USERS
        assert before + low <= total <= before + high
    after = sum(int(row[0][0]) for row in (shop.rows(s, "SELECT SUM(amount) FROM orders") for s in (FIRST, SECOND)))
    assert after == before + acknowledged[0], "every acknowledged write once"
    assert shop.misplaced() == []


def test_the_freeze_waits_for_a_writer_that_is_still_open(shop: Shop) -> None:
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    committed: list[float] = []

    def open_writer() -> None:
        writer = shop.connect(FIRST, autocommit=False)
        with writer.cursor() as cursor:
            cursor.execute(f"UPDATE users SET name = 'last word' WHERE id = {user}")

        def commit() -> None:
            time.sleep(0.5)
            committed.append(time.monotonic())
            writer.commit()
            writer.close()

        threading.Thread(target=commit).start()

    frozen: list[float] = []
    actions = {State.FREEZING: open_writer, State.FROZEN: lambda: frozen.append(time.monotonic())}
    shop.apply(plan, observer=At(actions))
    assert frozen[0] > committed[0]
    assert shop.rows(SECOND, f"SELECT name FROM users WHERE id = {user}") == [("last word",)]
    assert shop.misplaced() == []


def test_the_freeze_waits_for_a_prepared_branch(shop: Shop) -> None:
    """MariaDB drops the writer's shared lock at XA PREPARE; the branch may be committed long after."""
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    frozen: list[float] = []
    committed: list[float] = []
    branch = f"'b{time.monotonic_ns()}'"

    def prepare() -> None:
        writer = shop.connect(FIRST)
        with writer.cursor() as cursor:
            cursor.execute(f"XA START {branch}")
            cursor.execute(f"UPDATE users SET name = 'prepared' WHERE id = {user}")
            cursor.execute(f"XA END {branch}")
            cursor.execute(f"XA PREPARE {branch}")

        def commit() -> None:
            time.sleep(0.7)
            with writer.cursor() as cursor:
                committed.append(time.monotonic())
                cursor.execute(f"XA COMMIT {branch}")
            writer.close()

        threading.Thread(target=commit).start()

    actions = {State.FREEZING: prepare, State.FROZEN: lambda: frozen.append(time.monotonic())}
    shop.apply(plan, observer=At(actions))
    assert frozen[0] > committed[0]
    assert shop.rows(SECOND, f"SELECT name FROM users WHERE id = {user}") == [("prepared",)]
    assert shop.misplaced() == []


# --- clients -------------------------------------------------------------------------------------------------------


def test_a_client_that_never_hears_of_the_move_is_refused_and_never_wrong(shop: Shop) -> None:
    """As a process that slept, or lost the map's store: its map stays as it was; its connections are from before."""
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    outcomes: list[str] = []
    with cluster_of(shop, MemoryMapStore(shop.map)) as stale:  # type: ignore[arg-type]
        sessions = shardkit.sessionmaker(stale, read_from="master")
        with sessions() as session:
            assert session.scalar(select(func.count()).select_from(User)) == USERS

        def ask() -> None:
            for _ in range(3):
                try:
                    with sessions() as session:
                        found = session.scalar(select(func.count()).select_from(User))
                    outcomes.append(f"answered {found}")
                except (StaleShardMap, sa.exc.OperationalError) as error:
                    outcomes.append(type(error).__name__)

        shop.apply(
            plan, observer=At(dict.fromkeys([State.COPYING, State.VERIFYING, State.PUBLISHED, State.CLEANING], ask))
        )
        ask()
        assert set(outcomes) <= {"StaleShardMap", "OperationalError", f"answered {USERS}"}
        assert outcomes[-1] == "StaleShardMap"
        with sessions() as session, pytest.raises(StaleShardMap):
            session.get_one(User, user)
    assert shop.misplaced() == []


@pytest.mark.parametrize(
    ("state", "moment"), [(State.PREPARED, "prepared.named"), (State.PUBLISHED, "published.named")]
)
def test_a_connection_made_while_the_map_is_published_is_not_overlooked(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, state: State, moment: str
) -> None:
    """By a process that has lost the store: when the next map is out already, and the shards do not ask for it yet."""
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    counted: list[int] = []
    with ExitStack() as stack:
        stale: list[Cluster] = []

        def lose_the_store() -> None:
            stale.append(stack.enter_context(cluster_of(shop, MemoryMapStore(shop.map))))  # type: ignore[arg-type]

        def count() -> None:
            with shardkit.sessionmaker(stale[0], read_from="master")() as session:
                counted.append(session.scalars(select(func.count()).select_from(User)).one())

        def count_again() -> None:
            if stale:
                with suppress(StaleShardMap, sa.exc.OperationalError):
                    count()

        monkeypatch.setattr(stages, "reach", lambda point: count() if point == moment else None)
        actions: dict[State, Callable[[], object]] = {State.VERIFYING: count_again, state: lose_the_store}
        shop.apply(plan, observer=At(actions))
        sessions = shardkit.sessionmaker(stale[0], read_from="master")
        with sessions() as session, pytest.raises((StaleShardMap, sa.exc.OperationalError)):
            session.execute(sa.update(User).where(User.id == user).values(name="lost"))
    assert set(counted) == {USERS}


def test_a_process_that_stays_behind_is_named_and_the_job_waits(coordinated_shop: Shop) -> None:
    shop = coordinated_shop
    plan = shop.plan()
    with cluster_of(shop) as cluster:
        sessions = shardkit.sessionmaker(cluster, read_from="master")
        with sessions() as session:
            # its transaction holds the old map
            session.execute(sa.text("SELECT 1 FROM stores"), execution_options={"shardkit_shard": FIRST})
            wait_until(lambda: shop.store().clients(), "the process is registered")
            with pytest.raises(
                RebalanceError, match=r"still work by an older map than version 2: .* process \d+ \(version 1\)"
            ):
                shop.apply(plan, settings=Settings(client_patience=0.3))
            assert refusal(shop, FIRST, "UPDATE users SET name = 'still open' WHERE id < 50") == ""
        (job,) = shop.apply(plan)
    assert job.state is State.COMPLETED
    assert shop.misplaced() == []


def test_a_session_that_meets_a_closed_bucket_says_so(shop: Shop) -> None:
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    met: list[BaseException] = []
    with cluster_of(shop) as cluster:

        def write() -> None:
            with suppress(StaleShardMap), shardkit.sessionmaker(cluster, read_from="master")() as session:
                try:
                    session.get_one(User, user).name = "now"
                    session.commit()
                except StaleShardMap as error:
                    met.append(error)

        shop.apply(plan, observer=At({State.VERIFYING: write}))
        assert isinstance(met[0], BucketClosed)
        assert met[0].moved_to == SECOND
        cluster.refresh()
        with shardkit.sessionmaker(cluster, read_from="master")() as session:
            session.get_one(User, user).name = "after"
            session.commit()
    assert shop.rows(SECOND, f"SELECT name FROM users WHERE id = {user}") == [("after",)]


# --- what stops a job ----------------------------------------------------------------------------------------------


def test_a_row_of_the_buckets_that_the_target_has_already_stops_the_job(shop: Shop) -> None:
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    shop.execute(SECOND, f"INSERT INTO users (id, name) VALUES ({user}, 'who put this here?')")
    with pytest.raises(RebalanceError, match=f"users on {SECOND} already has rows of the moving buckets: id={user}"):
        shop.apply(plan)
    assert refusal(shop, FIRST, f"UPDATE users SET name = 'still open' WHERE id = {user}") == ""
    shop.execute(SECOND, "SET @shardkit_coordinator = 'by hand'", f"DELETE FROM users WHERE id = {user}")
    shop.apply(plan)
    assert shop.misplaced() == []


def test_cancelling_deletes_what_the_job_has_copied_and_nothing_else(shop: Shop) -> None:
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[0]
    shop.execute(SECOND, f"INSERT INTO users (id, name) VALUES ({user}, 'the only copy')")
    with pytest.raises(RebalanceError, match="already has rows"):
        shop.apply(plan)
    cancel_job(shop.source, plan.job_id(0), credentials=shop.server.credentials)
    assert shop.rows(SECOND, f"SELECT name FROM users WHERE id = {user}") == [("the only copy",)]


def test_epochs_grow_over_three_shards(shop: Shop) -> None:
    shop.add_shard("shop-2")
    shop.execute("shop-2", *DDL, "INSERT INTO countries SELECT * FROM " + shop.databases[FIRST] + ".countries")
    epochs = [0]
    for target in (SECOND, "shop-2", FIRST):
        shop.apply(shop.plan(3, target=target))
        rows = {
            shard: shop.rows(shard, "SELECT epoch FROM shardkit_ownership WHERE keyspace='orders' AND bucket='3'")
            for shard in shop.databases
            if shop.rows(shard, "SHOW TABLES LIKE 'shardkit_ownership'")
        }
        epochs.append(rows[target][0][0])
        assert all(found[0][0] < epochs[-1] for shard, found in rows.items() if shard != target and found)
    assert epochs == sorted(set(epochs))


def test_a_unique_value_that_the_target_has_already_stops_the_job_and_names_both_rows(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def still_reading(source: Server, table: Table, where: str, after: Key | None, limit: int) -> Chunk:
        if after is not None:  # the next chunk is being read on the source's connection when this one clashes
            source.rows("SELECT SLEEP(0.3)")
        return read_chunk(source, table, where, after, limit)

    monkeypatch.setattr(copy, "read_chunk", still_reading)
    plan = shop.plan()
    user = shop.users_in(plan.transfers[0].buckets)[3]
    other = int(shop.rows(SECOND, "SELECT MIN(id) FROM users")[0][0])
    shop.execute(SECOND, f"UPDATE users SET email = 'u{user}@example.org' WHERE id = {other}")
    before = shop.contents()
    with pytest.raises(
        RebalanceError,
        match=f"row id={user} of {FIRST} and the row id={other} of {SECOND} share 'u{user}@example.org' in by_email",
    ):
        shop.apply(plan)
    assert shop.contents_once() == before
    shop.execute(SECOND, f"UPDATE users SET email = NULL WHERE id = {other}")
    shop.apply(plan)
    assert shop.misplaced() == []


def test_rows_written_past_the_fence_are_found_before_the_target_gets_the_buckets(shop: Shop) -> None:
    plan = shop.plan()
    user, lost, made_up = shop.users_in(plan.transfers[0].buckets)[:3]

    def tamper() -> None:
        past = "SET @shardkit_coordinator = 'tampering'"
        shop.execute(FIRST, past, f"UPDATE users SET balance = balance + 1 WHERE id = {user}")
        shop.execute(SECOND, past, f"DELETE FROM users WHERE id = {lost}")
        shop.execute(SECOND, past, f"INSERT INTO orders VALUES (99999, {made_up}, NULL, 1)")

    with pytest.raises(RebalanceError, match=f"users: .*id={lost} is missing on {SECOND}; id={user} differs"):
        shop.apply(plan, observer=At({State.VERIFYING: tamper}))
    assert shop.job().state is State.VERIFYING
    assert "is missing" in shop.job().problem
    past = "SET @shardkit_coordinator = 'mending'"
    shop.execute(FIRST, past, f"UPDATE users SET balance = balance - 1 WHERE id = {user}")
    row = f"SELECT {lost}, 'user {lost}', 'u{lost}@example.org', {lost}.25"
    shop.execute(SECOND, past, f"INSERT INTO users {row}")
    with pytest.raises(RebalanceError, match=f"orders: .*id=99999 is only on {SECOND}"):
        shop.apply(plan)


def test_a_dropped_trigger_is_missed_before_the_decision(shop: Shop) -> None:
    """The tables are held, so it can only have happened while nobody was at work."""
    plan = shop.plan()
    with pytest.raises(ZeroDivisionError):
        shop.apply(plan, observer=At({State.VERIFYING: lambda: 1 / 0}))
    (trigger, *_) = shop.rows(FIRST, "SHOW TRIGGERS LIKE 'orders'")[0]
    shop.execute(FIRST, f"DROP TRIGGER `{trigger}`")
    with pytest.raises(RebalanceError, match="triggers of the fence are gone: shardkit_fence_"):
        shop.apply(plan)


def test_two_jobs_on_one_bucket_are_refused_and_on_others_go_side_by_side(shop: Shop) -> None:
    first, second, other = shop.plan(1, 2), shop.plan(2, 3), shop.plan(20, target=FIRST)
    with pytest.raises(ZeroDivisionError):
        shop.apply(first, observer=At({State.COPYING: lambda: 1 / 0}))
    with pytest.raises(PreconditionFailed, match="made for version 1 of the map, which is at 2 now"):
        shop.apply(second)
    with pytest.raises(PreconditionFailed, match=f"job {first.id}-1 is moving some of these buckets"):
        shop.plan(2, 3)
    with pytest.raises(PreconditionFailed, match="made for version 1"):
        shop.apply(other)
    shop.apply(shop.plan(20, target=FIRST))
    shop.apply(first)
    assert shop.misplaced() == []
    assert {bucket: owners for bucket, owners in shop.owners().items() if len(owners) != 1} == {}


def test_two_processes_on_one_job_are_refused(shop: Shop) -> None:
    plan = shop.plan()
    said: list[str] = []

    def again() -> None:
        said.append(shop.run(plan)[1])

    shop.apply(plan, observer=At({State.COPYING: again}))
    assert "another process is at work on job" in said[0]
    assert shop.misplaced() == []


def test_a_coordinator_that_wakes_up_after_it_was_taken_over_changes_nothing(shop: Shop) -> None:
    """As after a long pause of the process: its named lock is gone, another has finished the work."""
    plan = shop.plan()

    def taken_over() -> None:
        mine = f"SELECT id FROM information_schema.processlist WHERE db = '{shop.databases[FIRST]}'"
        for (connection,) in shop.rows(FIRST, mine):
            with suppress(pymysql.MySQLError):
                shop.execute(FIRST, f"KILL {connection}")
        assert shop.run(plan) == (0, "done")

    with pytest.raises(RebalanceError, match=r"taken job .* over|connection was lost|changed by another process"):
        shop.apply(plan, observer=At({State.COPYING: taken_over}))
    assert shop.job().state is State.COMPLETED
    assert shop.job().problem == ""
    assert shop.misplaced() == []


def test_a_chunk_of_a_coordinator_that_was_taken_over_is_not_written(shop: Shop) -> None:
    """The last line of defence: the token in the chunk's own transaction."""
    plan = shop.plan()
    with pytest.raises(ZeroDivisionError):
        shop.apply(plan, observer=At({State.COPYING: lambda: 1 / 0}))
    late, of_now = Lease(plan.job_id(0), "a" * 32), Lease(plan.job_id(0), "b" * 32)
    ends = {shard: (shard, "master", shop.server.endpoint(name)) for shard, name in shop.databases.items()}
    with ExitStack() as stack:
        source, target, lookup = (
            stack.enter_context(closing(Server(*ends[shard], shop.server.credentials, binary=binary)))
            for shard, binary in ((FIRST, False), (SECOND, True), (SECOND, False))
        )
        target.run("SET @shardkit_coordinator = 'rebalance'")
        late.sign(target)
        of_now.sign(target)
        table = read_table(source, "users", ("id",))
        where = table.predicate(shop.map.keyspaces["orders"].partition, plan.transfers[0].buckets)
        quiet = At({})
        for lease, outcome in (
            (late, pytest.raises(RebalanceError, match=r"taken job .* over")),
            (of_now, nullcontext()),
        ):
            copy = Copy(
                plan.job_id(0),
                source,
                target,
                lookup,
                lease,
                Throttle(),
                quiet.states.clear,
                time.sleep,
                lambda *_: None,
            )
            with outcome:
                copy.run(table, where)
            count = shop.rows(SECOND, f"SELECT COUNT(*) FROM users WHERE {where}")[0][0]
            assert bool(count) is (lease is of_now)


def test_a_replica_that_is_not_fed_holds_the_job_and_is_named(shop: Shop) -> None:
    """A replica without the new version could serve an old client's connection."""
    database = f"{shop.databases[SECOND]}_replica"
    shop.server.execute(f"CREATE DATABASE {database}")
    try:
        with closing(shop.store()) as store:
            current = store.load()
            shard = current.shards[SECOND]
            replicated = type(shard)(shard.name, shard.master, None, (shop.server.endpoint(database),))
            store.publish(current.with_shards({**current.shards, SECOND: replicated}), expected_version=current.version)
        plan = shop.plan()
        with pytest.raises(RebalanceError, match=f"shard {SECOND}, replica .* has not applied its master's changes"):
            shop.apply(plan, settings=Settings(replica_patience=0.3))

        fed = threading.Event()

        def feed() -> None:
            """What a relay does with these rows."""
            tables = ("shardkit_map_version", "shardkit_journal")
            while not fed.wait(0.05):
                with closing(shop.connect(SECOND)) as connection, connection.cursor() as cursor:
                    for table in tables:
                        cursor.execute(f"REPLACE INTO {database}.{table} SELECT * FROM {table}")

        thread = threading.Thread(target=feed)
        thread.start()
        try:
            shop.apply(plan)
        finally:
            fed.set()
            thread.join()
        assert shop.misplaced() == []
    finally:
        shop.server.execute(f"DROP DATABASE {database}")


# --- what is refused from the start --------------------------------------------------------------------------------

FAULTS = {
    "ALTER TABLE orders DROP PRIMARY KEY": "orders has no primary key",
    "CREATE TRIGGER mine BEFORE INSERT ON users FOR EACH ROW SET NEW.name = ''": "users has triggers of its own (mine)",
    "CREATE TABLE elsewhere (id INT PRIMARY KEY, u BIGINT, FOREIGN KEY (u) REFERENCES users (id))": (
        "ties elsewhere to users, and only one of them moves"
    ),
    "ALTER TABLE users ADD COLUMN more INT": f"table users differs between {FIRST} and {SECOND}: `more` int",
    "UPDATE countries SET name = 'Korea' WHERE code = 'kr'": "reference table countries differs",
    "DROP TABLE countries": "reference table countries is missing",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_plan_is_refused_with_the_reason(fault: str, shop: Shop) -> None:
    on = SECOND if "countries" in fault else FIRST
    shop.execute(on, fault)
    with pytest.raises(PreconditionFailed) as refused:
        shop.plan()
    assert FAULTS[fault] in str(refused.value)
    assert shop.map.version == 1
    assert shop.rows(FIRST, "SHOW TABLES LIKE 'shardkit%'") == []


def test_ids_that_each_shard_gives_by_itself_are_refused(shop: Shop) -> None:
    shop.execute(FIRST, "ALTER TABLE orders MODIFY id BIGINT AUTO_INCREMENT")
    shop.execute(SECOND, "ALTER TABLE orders MODIFY id BIGINT AUTO_INCREMENT")
    assert shop.plan(1).transfers, "with 'ids: generated' shardkit gives them"
    with closing(shop.store()) as store:
        current = store.load()
        document = current.dump().replace("    ids: generated\n", "")
        store.publish(ShardMap.parse(document), expected_version=current.version)
    with pytest.raises(PreconditionFailed, match=r"orders\.id is AUTO_INCREMENT, so unique only on each shard"):
        shop.plan(1)


def test_a_plan_for_another_version_of_the_map_is_refused(shop: Shop) -> None:
    plan = shop.plan(1)
    with closing(shop.store()) as store:
        current = store.load()
        store.publish(current, expected_version=current.version)
    with pytest.raises(PreconditionFailed, match="made for version 1 of the map, which is at 2 now"):
        shop.apply(plan)


def test_an_account_without_the_rights_is_told_which(shop: Shop) -> None:
    server = shop.server
    server.execute("CREATE USER IF NOT EXISTS reader@'%'")
    for database in shop.databases.values():
        server.execute(f"GRANT SELECT ON {database}.* TO reader@'%'")
    with pytest.raises(PreconditionFailed) as refused:
        plan_move(shop.source, Move((1,), SECOND), keyspace="orders", credentials=fixed("reader"))
    named = {"mariadb": "ALTER, CONNECTION ADMIN, CREATE", "mysql": "ALTER, CONNECTION_ADMIN, CREATE"}[FLAVOUR]
    assert f"the account lacks {named}, DELETE, INDEX, INSERT, PROCESS, TRIGGER, UPDATE" in str(refused.value)


def test_an_account_with_these_rights_and_no_others_can_move_buckets(shop: Shop) -> None:
    """Not as root: what preflight asks for is enough."""
    server = shop.server
    for user in ("mover", "application"):
        server.execute(f"CREATE USER IF NOT EXISTS {user}@'%'")
    for database in shop.databases.values():
        server.execute(f"GRANT ALL ON {database}.* TO application@'%'")
        server.execute(
            f"GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX, TRIGGER ON {database}.* TO mover@'%'"
        )
    more = "CONNECTION ADMIN" if FLAVOUR == "mariadb" else "CONNECTION_ADMIN, XA_RECOVER_ADMIN"
    server.execute("GRANT PROCESS ON *.* TO mover@'%'")
    server.execute(f"GRANT {more} ON *.* TO mover@'%'")
    server.execute("SET GLOBAL log_bin_trust_function_creators = 1")
    try:
        plan = plan_move(shop.source, Move((14, 15), SECOND), keyspace="orders", credentials=fixed("mover"))
        with (
            create_cluster(MemoryMapStore(shop.map), credentials=fixed("application")) as cluster,
            shardkit.sessionmaker(cluster, read_from="master")() as session,
        ):
            session.scalar(select(func.count()).select_from(User))
            session.rollback()  # its connections wait in the pool: another account's, to be closed
            apply_plan(shop.source, plan, credentials=fixed("mover"))
    finally:
        server.execute("SET GLOBAL log_bin_trust_function_creators = 0")
    assert shop.misplaced() == []


def test_a_map_in_memory_and_a_shard_in_a_file_are_refused(shop: Shop, tmp_path: Path) -> None:
    plan = shop.plan(1)
    with pytest.raises(PreconditionFailed, match="map that is in memory"):
        apply_plan(MemoryMapStore(shop.map), plan)
    current = shop.map
    shards = {name: {"master": f"sqlite:///{tmp_path}/{name}.db"} for name in current.shards}
    document = {**yaml.safe_load(current.dump()), "shards": shards}
    with pytest.raises(PreconditionFailed, match="is a SQLite file"):
        plan_move(MemoryMapStore(ShardMap.parse(document)), Move((1,), SECOND), keyspace="orders")
