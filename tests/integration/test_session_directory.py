"""Keyspaces by directory: a lookup table says where each key is, and is written in the transaction of the row."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    make_transient_to_detached,
    mapped_column,
    relationship,
)

import shardkit
from shardkit import directory
from shardkit.cluster import Cluster
from shardkit.errors import KeyChange, MissingKey, PreconditionFailed, RoutingError, SecondShardWritten, StaleShardMap
from shardkit.shardmap import ShardMap
from shardkit.topology import Role
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, key_text
from tests.routing_shop import memory_engine

HOME = "shop-1"
BUCKETS = {"small": "shop-0", "medium": "shop-1", "large": "shop-2"}


class Base(DeclarativeBase):
    """Tenants and what they have, each on the shard that the directory says."""


class Tenant(Base):
    __tablename__ = "tenants"
    code: Mapped[str] = mapped_column(key_text(40), primary_key=True)
    seats: Mapped[int] = mapped_column(default=1)
    projects: Mapped[list[Project]] = relationship(back_populates="tenant", order_by="Project.id")


class Project(Base):
    """The primary key does not say where a project is."""

    __tablename__ = "projects"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    tenant_code: Mapped[str] = mapped_column(key_text(40), sa.ForeignKey("tenants.code"))
    tenant: Mapped[Tenant] = relationship(back_populates="projects")


def map_of(shop: Shop, buckets: dict[str, str] = BUCKETS, shards: tuple[str, ...] = SHARDS) -> ShardMap:
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "tenants",
            "keyspaces": {
                "tenants": {
                    "partition": {"by": "directory", "buckets": list(buckets), "home": HOME},
                    "tables": {"tenants": "code", "projects": "tenant_code"},
                    "placement": {
                        shard: [bucket for bucket, holder in buckets.items() if holder == shard]
                        for shard in dict.fromkeys(buckets.values())
                    },
                },
            },
            "shards": {shard: {"master": shop.masters[shard].url} for shard in shards},
        }
    )


class Tenancy:
    """The shop's databases with tenants in them."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.cluster = self.open(map_of(shop))
        self.cluster.create_all(Base.metadata)

    def open(self, shard_map: ShardMap) -> Cluster:
        return self.shop.open(shard_map, metadata=Base.metadata)

    def session(self, **options: Any) -> Session:
        atomic = "atomic" if self.shop.kind == "server" else "best_effort"
        made: Session = shardkit.sessionmaker(self.cluster, **{"transactions": atomic, **options})()
        return made

    def entries(self) -> dict[str, str]:
        if not sa.inspect(self.cluster.engine(HOME)).has_table("shardkit_directory"):
            return {}
        rows = self.shop.rows(HOME, "shardkit_directory", "keyspace, key_text, bucket")
        assert {keyspace for keyspace, _, _ in rows} <= {"tenants"}
        return {bytes(text).decode(): bucket for _, text, bucket in rows}

    def check(self) -> None:
        """Every row is where its key's entry says, and has one."""
        entries = self.entries()
        for table, column in (("tenants", "code"), ("projects", "tenant_code")):
            for shard, keys in self.shop.where(table, column).items():
                for key in keys:
                    assert BUCKETS[entries[key]] == shard, (table, key)


@pytest.fixture
def tenancy(shop: Shop) -> Iterator[Tenancy]:
    made = Tenancy(shop)
    yield made
    with shop.open(map_of(shop)) as cluster:
        cluster.drop_all(Base.metadata)


def codes_in(bucket: str, count: int) -> list[str]:
    """Codes that are given this bucket where nobody has chosen."""
    partition = directory.DirectoryPartition(tuple(BUCKETS), HOME, "tenants")
    every = (f"t{number}" for number in range(1000))
    return [code for code in every if partition.first_bucket_of(code) == bucket][:count]


def statements(cluster: Cluster) -> tuple[list[str], Any]:
    """What this cluster sends from now on."""
    sent: list[str] = []

    def note(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        sent.append(statement)

    engines: list[Engine] = [cluster.engine(shard) for shard in SHARDS]
    beside = cluster.helper_of(cluster.core_engine(HOME, Role.MASTER))
    engines += [beside] if beside is not None else []
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    return sent, note


# --- writing -----------------------------------------------------------------------------------------------------


def test_a_flush_files_new_keys_with_their_rows(tenancy: Tenancy) -> None:
    codes = [code for bucket in BUCKETS for code in codes_in(bucket, 2)]
    with tenancy.session() as session:
        for number, code in enumerate(codes):
            session.add(Tenant(code=code, projects=[Project(id=number), Project(id=number + 100)]))
        session.commit()
    assert set(tenancy.entries()) == set(codes)
    tenancy.check()
    assert {shard: len(rows) for shard, rows in tenancy.shop.where("tenants", "code").items()} == dict.fromkeys(
        SHARDS, 2
    )
    assert {shard: len(rows) for shard, rows in tenancy.shop.where("projects").items()} == dict.fromkeys(SHARDS, 4)


def test_one_lookup_and_one_entry_for_a_whole_flush(tenancy: Tenancy) -> None:
    with tenancy.session() as session:
        session.add(Tenant(code="first"))
        session.commit()
    sent, _ = statements(tenancy.cluster)
    with tenancy.session() as session:
        session.add_all(Tenant(code=f"many{number}") for number in range(200))
        session.commit()
    of_directory = [each for each in sent if "shardkit_directory" in each and "has_table" not in each]
    asked = [each for each in of_directory if each.startswith("SELECT shardkit_directory")]
    assert len(asked) <= 2, asked
    assert len([each for each in of_directory if each.startswith("INSERT")]) == 1
    tenancy.check()
    assert sum(map(len, tenancy.shop.where("tenants", "code").values())) == 201


@pytest.mark.parametrize("how", ["statement", "many", "multi-row", "bulk", "core", "raw"])
def test_every_way_to_insert_files_the_key(tenancy: Tenancy, how: str) -> None:
    codes = [code for bucket in BUCKETS for code in codes_in(bucket, 3)]
    rows = [{"code": code, "seats": 2} for code in codes]
    with tenancy.session() as session:
        match how:
            case "statement":
                for row in rows:
                    session.execute(insert(Tenant).values(**row))
            case "many":
                session.execute(insert(Tenant), rows)
            case "multi-row":
                session.execute(insert(Tenant).values(rows))
            case "bulk":
                session.bulk_insert_mappings(sa.inspect(Tenant), rows)
            case "core":
                session.execute(sa.insert(Base.metadata.tables["tenants"]), rows)
            case _:
                for row in rows:
                    session.execute(text("INSERT INTO tenants (code, seats) VALUES (:code, :seats)"), row)
        session.commit()
    assert set(tenancy.entries()) == set(codes)
    tenancy.check()
    with tenancy.session() as session:
        assert sorted(session.scalars(select(Tenant.code))) == sorted(codes)
        assert [session.get_one(Tenant, code).seats for code in codes] == [2] * len(codes)


def test_a_rollback_takes_the_entries_back(tenancy: Tenancy) -> None:
    with tenancy.session() as session:
        session.add(Tenant(code="gone"))
        session.flush()
        assert session.get(Tenant, "gone") is not None
        session.rollback()
    assert tenancy.entries() == {}
    with tenancy.session() as session:
        assert session.get(Tenant, "gone") is None


def test_an_entry_that_a_savepoint_took_back_is_filed_again(tenancy: Tenancy) -> None:
    (code,) = codes_in("large", 1)
    with tenancy.session() as session:
        session.add(Tenant(code="before"))
        session.flush()
        savepoint = session.begin_nested()
        session.add(Tenant(code=code))
        session.flush()
        session.expunge_all()
        assert session.get_one(Tenant, code).seats == 1
        savepoint.rollback()
        session.add(Tenant(code=code))
        session.commit()
    assert set(tenancy.entries()) == {"before", code}
    tenancy.check()


def test_what_a_transaction_filed_it_finds(tenancy: Tenancy) -> None:
    with tenancy.session() as session:
        session.add_all([Tenant(code=code) for code in codes_in("large", 2)])
        session.flush()
        session.expunge_all()
        for code in codes_in("large", 2):
            assert session.scalars(select(Tenant).where(Tenant.code == code)).one().code == code
            assert session.execute(update(Tenant).where(Tenant.code == code).values(seats=7)).rowcount == 1
        session.commit()
    assert tenancy.shop.rows("shop-2", "tenants", "seats") == [(7,), (7,)]


def test_of_two_who_enter_one_key_the_first_says_where(tenancy: Tenancy) -> None:
    """One writes its first row, the other wants it elsewhere; sessions of other clusters write beside them."""
    if tenancy.shop.kind == "sqlite":
        pytest.skip("SQLite lets one write at a time")
    codes = codes_in("large", 20)
    meet = threading.Barrier(3)
    others = [tenancy.open(map_of(tenancy.shop)) for _ in range(2)]

    def write(cluster: Cluster, seats: int) -> int:
        @shardkit.retry(shardkit.sessionmaker(cluster))
        def add(session: Session, code: str) -> None:
            session.add(Tenant(code=code, seats=seats))

        written = 0
        for code in codes:
            meet.wait(30)
            with suppress(IntegrityError):  # the other one has written the row
                add(code)
                written += 1
        return written

    def want(bucket: str) -> int:
        placed = 0
        for code in codes:
            meet.wait(30)
            with suppress(PreconditionFailed):
                tenancy.cluster.assign("tenants", code, bucket)
                placed += 1
        return placed

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, cluster, number) for number, cluster in enumerate(others)]
        placed = pool.submit(want, "small")
        assert sum(writer.result(120) for writer in writers) == len(codes)
        assert placed.result() == list(tenancy.entries().values()).count("small")
    tenancy.check()
    assert sorted(code for found in tenancy.shop.where("tenants", "code").values() for code in found) == sorted(codes)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tenancy: Tenancy) -> dict[str, str]:
    """One tenant in each bucket, written through another cluster: this one has not heard of them."""
    found = {bucket: codes_in(bucket, 1)[0] for bucket in BUCKETS}
    other = tenancy.open(map_of(tenancy.shop))
    factory = shardkit.sessionmaker(other, transactions="best_effort")
    with factory() as session:
        session.add_all(
            Tenant(code=code, projects=[Project(id=number)]) for number, code in enumerate(found.values(), 1)
        )
        session.commit()
    return found


def test_reads_by_key_ask_one_shard(tenancy: Tenancy, filled: dict[str, str]) -> None:
    for bucket, code in filled.items():
        route = tenancy.cluster.explain(select(Tenant).where(Tenant.code == code))
        assert route.shards == (BUCKETS[bucket],)
        assert tenancy.cluster.locate("tenants", code=code).shard == BUCKETS[bucket]
        with tenancy.session() as session:
            tenant = session.get_one(Tenant, code)
            assert [project.tenant_code for project in tenant.projects] == [code]
            assert session.scalar(select(sa.func.count()).select_from(Project).where(Project.tenant_code == code)) == 1
            raw = text("SELECT code FROM tenants WHERE code = :code")
            assert session.execute(raw, {"code": code}).scalars().all() == [code]
    with tenancy.session() as session:
        two = list(filled.values())[:2]
        assert sorted(session.scalars(select(Tenant.code).where(Tenant.code.in_(two)))) == sorted(two)


def test_a_key_is_looked_up_once(tenancy: Tenancy, filled: dict[str, str]) -> None:
    if tenancy.shop.kind == "sqlite":
        pytest.skip("on SQLite a look costs nothing, and nothing is remembered")
    code = filled["large"]
    sent, _ = statements(tenancy.cluster)
    for _ in range(3):
        with tenancy.session() as session:
            assert session.get_one(Tenant, code).code == code
    assert len([each for each in sent if "FROM shardkit_directory" in each]) == 1
    assert len([each for each in sent if "FROM tenants" in each]) == 3


def test_a_key_that_is_not_there(tenancy: Tenancy, filled: dict[str, str]) -> None:
    with tenancy.session() as session:
        assert session.get(Tenant, "nobody") is None
        assert session.scalars(select(Tenant).where(Tenant.code == "nobody")).all() == []
        assert session.execute(update(Tenant).where(Tenant.code == "nobody").values(seats=3)).rowcount == 0
        assert session.scalar(select(sa.func.count()).select_from(Tenant).where(Tenant.code == "nobody")) == 0
    assert set(tenancy.entries()) == set(filled.values())
    with tenancy.session() as session:  # and once it is there, it is found
        session.add(Tenant(code="nobody"))
        session.commit()
        assert session.get(Tenant, "nobody") is not None


def test_in_asyncio(tenancy: Tenancy, filled: dict[str, str]) -> None:
    async def whole() -> list[str]:
        async with tenancy.open(map_of(tenancy.shop)) as cluster:
            atomic = "atomic" if tenancy.shop.kind == "server" else "best_effort"
            factory = shardkit.async_sessionmaker(cluster, transactions=atomic)
            async with factory() as session:
                found = [(await session.get_one(Tenant, code)).code for code in filled.values()]
                session.add(Tenant(code="async", projects=[Project(id=50)]))
                await session.flush()
                await session.execute(insert(Tenant), [{"code": f"async{number}"} for number in range(9)])
                await session.commit()
                return found

    assert asyncio.run(whole()) == list(filled.values())
    assert "async" in tenancy.entries()
    tenancy.check()


def test_moving_to_a_new_key(tenancy: Tenancy, filled: dict[str, str]) -> None:
    (new,) = [code for code in codes_in("small", 2) if code not in filled.values()]
    with tenancy.session() as session:
        project = session.get_one(Project, 3)
        session.execute(insert(Tenant).values(code=new))
        session.move(project, new)
        session.commit()
    tenancy.check()
    assert tenancy.shop.where("projects")["shop-0"] == [1, 3]


def test_what_is_not_committed_is_not_remembered(tenancy: Tenancy) -> None:
    if tenancy.shop.kind == "sqlite":
        pytest.skip("SQLite shows nobody what is not committed")
    (code,) = codes_in("large", 1)
    reader = tenancy.shop.open(
        map_of(tenancy.shop),
        engine_options={**tenancy.shop.options["engine_options"], "isolation_level": "READ UNCOMMITTED"},
    )
    with tenancy.session() as writer, shardkit.sessionmaker(reader)() as session:
        writer.add(Tenant(code=code))
        writer.flush()
        assert session.get(Tenant, code) is None
        session.rollback()
        writer.rollback()
        tenancy.cluster.assign("tenants", code, "small")
        writer.add(Tenant(code=code))
        writer.commit()
        assert session.get_one(Tenant, code).code == code
    tenancy.check()


# --- choosing, and what is refused -------------------------------------------------------------------------------


def test_a_key_is_assigned_where_it_is_wanted(tenancy: Tenancy) -> None:
    (code, other) = codes_in("small", 2)
    assert tenancy.cluster.assign("tenants", code, "large").shard == "shop-2"
    assert tenancy.cluster.assign("projects", code, "large").bucket == "large"
    with pytest.raises(PreconditionFailed, match="in bucket 'large' already"):
        tenancy.cluster.assign("tenants", code, "small")
    with pytest.raises(PreconditionFailed, match="has no bucket 'huge'"):
        tenancy.cluster.assign("tenants", other, "huge")
    with pytest.raises(MissingKey, match="NULL"):
        tenancy.cluster.assign("tenants", None, "small")
    with pytest.raises(MissingKey, match="512 bytes"):
        tenancy.cluster.assign("tenants", "x" * 513, "small")
    with tenancy.session(transactions="single") as session:
        session.add(Tenant(code=code))
        session.commit()
    assert tenancy.shop.where("tenants", "code")["shop-2"] == [code]
    assert tenancy.entries() == {code: "large"}


def test_single_refuses_a_new_key_away_from_home_before_anything_is_sent(tenancy: Tenancy) -> None:
    (away,), (home,) = codes_in("large", 1), codes_in("medium", 1)
    with tenancy.session(transactions="single") as session:
        session.add(Tenant(code=away))
        with pytest.raises(SecondShardWritten):
            session.commit()
    assert tenancy.entries() == {}
    with tenancy.session(transactions="single") as session:
        session.add(Tenant(code=home))
        session.commit()
    tenancy.check()


def test_a_key_cannot_be_changed_nor_come_from_a_select(tenancy: Tenancy, filled: dict[str, str]) -> None:
    code = filled["small"]
    with tenancy.session() as session:
        with pytest.raises(KeyChange):
            session.execute(update(Tenant).where(Tenant.code == code).values(code="other"))
        with pytest.raises(RoutingError):
            session.execute(insert(Tenant).from_select(["code"], select(sa.literal("other"))))
        with pytest.raises(MissingKey):
            session.execute(insert(Project).values(id=9, tenant_code=None))
    assert set(tenancy.entries()) == set(filled.values())


def test_an_unknown_bucket_asks_for_a_newer_map(tenancy: Tenancy) -> None:
    tenancy.cluster.assign("tenants", "early", "small")
    older = tenancy.open(map_of(tenancy.shop, {"medium": "shop-1", "large": "shop-2"}))
    with (
        shardkit.sessionmaker(older)() as session,
        pytest.raises(StaleShardMap, match="'small', which this version of the map does not have"),
    ):
        session.get(Tenant, "early")


def test_on_one_shard_keys_are_filed_too_so_that_a_second_may_come(tenancy: Tenancy) -> None:
    alone = tenancy.open(map_of(tenancy.shop, {"medium": HOME}, (HOME,)))
    factory = shardkit.sessionmaker(alone)
    with factory() as session:
        session.add(Tenant(code="a"))
        session.execute(insert(Tenant), [{"code": "b"}, {"code": "c"}])
        session.execute(text("INSERT INTO tenants (code, seats) VALUES ('d', 1)"))
        with pytest.raises(KeyChange):
            session.execute(update(Tenant).where(Tenant.code == "a").values(code="e"))
        session.commit()
        assert session.scalars(select(Tenant.code).order_by(Tenant.code)).all() == ["a", "b", "c", "d"]
    assert tenancy.entries() == dict.fromkeys("abcd", "medium")
    with tenancy.session() as session:
        assert session.get_one(Tenant, "d").seats == 1


def test_in_a_transaction_that_is_given(tenancy: Tenancy) -> None:
    """As tests do that are rolled back: nothing of it is remembered."""
    (code,) = codes_in("large", 1)
    connections = {shard: tenancy.cluster.engine(shard).connect() for shard in SHARDS}
    outer = [connection.begin() for connection in connections.values()]
    factory = shardkit.sessionmaker(tenancy.cluster, transactions="best_effort", connections=connections)
    with factory() as session:
        session.add(Tenant(code=code))
        session.commit()
    with factory() as session:
        assert session.get_one(Tenant, code).code == code
    for transaction in outer:
        transaction.rollback()
    for connection in connections.values():
        connection.close()
    with tenancy.session() as session:
        assert session.get(Tenant, code) is None
        session.add(Tenant(code=code))
        session.commit()
    tenancy.check()


def test_keys_that_differ_in_trailing_blanks_or_case(tenancy: Tenancy) -> None:
    codes = ["a", "A", "a ", "ä", "서울"]
    for number, code in enumerate(codes):
        tenancy.cluster.assign("tenants", code, list(BUCKETS)[number % 3])
    with tenancy.session() as session:
        session.add_all(Tenant(code=code, seats=number) for number, code in enumerate(codes))
        session.commit()
    with tenancy.session() as session:
        assert [session.get_one(Tenant, code).seats for code in codes] == [0, 1, 2, 3, 4]
    tenancy.check()


# --- found by a hostile reader ------------------------------------------------------------------------------------


def test_pending_rows_are_flushed_before_their_key_is_looked_up(tenancy: Tenancy) -> None:
    small, medium, large = (codes_in(bucket, 1)[0] for bucket in BUCKETS)
    tenancy.cluster.assign("tenants", small, "small")
    with tenancy.session() as session:
        session.add(Tenant(code=large))
        assert [tenant.code for tenant in session.scalars(select(Tenant).where(Tenant.code == large))] == [large]
        session.add(Tenant(code=medium))
        assert session.execute(update(Tenant).where(Tenant.code == medium).values(seats=4)).rowcount == 1
        session.add(Tenant(code=small))
        found = session.scalars(select(Tenant.code).where(Tenant.code.in_([small, large])))
        assert sorted(found) == sorted([small, large])
        with session.no_autoflush:
            session.add(Tenant(code="later"))
            assert session.get(Tenant, "later") is None
        assert session.get(Tenant, "later") is not None


def test_an_older_view_of_the_home_hides_no_entry(tenancy: Tenancy) -> None:
    if tenancy.shop.kind == "sqlite":
        pytest.skip("SQLite lets nobody write beside a reader")
    (here,), (away,) = codes_in("medium", 1), codes_in("large", 1)
    with tenancy.session() as writer:
        writer.add(Tenant(code=here))
        writer.commit()
    other = shardkit.sessionmaker(tenancy.open(map_of(tenancy.shop)))
    with other() as session:
        session.scalars(select(Tenant).where(Tenant.code == here)).one()  # the view of the home begins
        with tenancy.session() as writer:
            writer.add(Tenant(code=away))
            writer.commit()
        assert session.execute(update(Tenant).where(Tenant.code == away).values(seats=2)).rowcount == 1
        session.add(Project(id=1, tenant_code=away))
        session.flush()
        assert session.execute(select(Project.id).where(Project.tenant_code == away)).all() == [(1,)]
        session.commit()
    tenancy.check()


def test_an_error_while_filing_ends_the_transaction(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second) = codes_in("large", 2)

    def fails(connection: sa.Connection, wanted: Any) -> Any:
        connection.exec_driver_sql("SELECT nothing FROM nowhere")

    with tenancy.session() as session:
        session.add(Tenant(code=first))
        session.flush()
        monkeypatch.setattr(directory, "file", fails)
        session.add(Tenant(code=second))
        with pytest.raises(DBAPIError):
            session.flush()
        monkeypatch.undo()
        with pytest.raises(PendingRollbackError):
            session.commit()
    assert tenancy.entries() == {}
    assert tenancy.shop.where("tenants", "code") == {shard: [] for shard in SHARDS}


def test_under_best_effort_entries_are_committed_before_rows(tenancy: Tenancy, monkeypatch: pytest.MonkeyPatch) -> None:
    known, new = codes_in("large", 2)
    tenancy.cluster.assign("tenants", known, "large")
    committed: list[str] = []
    for shard in SHARDS:
        event.listen(tenancy.cluster.engine(shard), "commit", lambda _connection, shard=shard: committed.append(shard))
    with tenancy.session(transactions="best_effort") as session:
        session.add(Tenant(code=known))
        session.flush()
        session.add(Tenant(code=new))
        session.commit()
    assert committed == [HOME, "shop-2"]


def test_on_one_shard_a_bulk_update_changes_no_key(tenancy: Tenancy) -> None:
    alone = tenancy.open(map_of(tenancy.shop, {"medium": HOME}, (HOME,)))
    with shardkit.sessionmaker(alone)() as session:
        session.add(Tenant(code="a", projects=[Project(id=1)]))
        session.flush()
        with pytest.raises(KeyChange):
            session.execute(update(Project), [{"id": 1, "tenant_code": "b"}])
        session.execute(update(Tenant), [{"code": "a", "seats": 5}])
        assert session.scalar(select(Tenant.seats)) == 5


def test_a_new_version_of_the_map_leaves_objects_where_they_are(tenancy: Tenancy) -> None:
    (code,) = codes_in("large", 1)
    source = shardkit.mapstore.MemoryMapStore(map_of(tenancy.shop))
    with shardkit.create_cluster(source, **tenancy.shop.options) as cluster:
        atomic = "atomic" if tenancy.shop.kind == "server" else "best_effort"
        with shardkit.sessionmaker(cluster, transactions=atomic)() as session:
            tenant, project = Tenant(code=code), Project(id=1, tenant_code=code)
            session.add_all([tenant, project])
            session.commit()
            source.publish(cluster.map, expected_version=cluster.map.version)
            cluster.refresh()
            assert cluster.map.version > 1
            assert project.tenant_code == code
            project.tenant = tenant
            tenant.seats = 8
            session.commit()
            assert session.get_one(Tenant, code).seats == 8
    tenancy.check()


def test_an_object_made_by_hand_is_written_where_its_key_is(tenancy: Tenancy) -> None:
    (code,) = codes_in("large", 1)
    with tenancy.session() as session:
        session.add(Tenant(code=code))
        session.commit()
    tenant = Tenant(code=code)
    make_transient_to_detached(tenant)
    with tenancy.session() as session:
        session.add(tenant)
        tenant.seats = 6
        session.commit()
    assert tenancy.shop.rows("shop-2", "tenants", "seats") == [(6,)]


def test_a_look_beside_a_session_in_memory_leaves_its_transaction_alone(sqlite_shop: Shop) -> None:
    engines = {(shard, "master"): memory_engine() for shard in SHARDS}
    (code,) = codes_in("large", 1)
    cluster = sqlite_shop.open(map_of(sqlite_shop), engines)
    cluster.create_all(Base.metadata)
    with shardkit.sessionmaker(cluster, transactions="best_effort")() as session:
        session.add(Tenant(code=code))
        session.flush()
        assert cluster.locate("tenants", code=code).shard == "shop-2"
        cluster.explain(select(Tenant).where(Tenant.code == "nobody"))
        session.rollback()
        session.add(Tenant(code=code))
        session.flush()
        cluster.explain(select(Tenant).where(Tenant.code == code))
        session.commit()
        assert session.get_one(Tenant, code).code == code
    with engines[HOME, "master"].connect() as connection:
        assert connection.exec_driver_sql("SELECT bucket FROM shardkit_directory").scalars().all() == ["large"]


def test_a_pool_of_one_connection_is_enough_to_look_up(tenancy: Tenancy, filled: dict[str, str]) -> None:
    if tenancy.shop.kind == "sqlite":
        pytest.skip("about the connections to servers")
    options = {**tenancy.shop.options["engine_options"], "pool_size": 1, "max_overflow": 0, "pool_timeout": 3}
    narrow = tenancy.shop.open(map_of(tenancy.shop), engine_options=options)
    with shardkit.sessionmaker(narrow)() as session:
        assert len(session.scalars(select(Tenant)).all()) == 3
        for code in filled.values():
            assert session.scalars(select(Tenant.code).where(Tenant.code == code)).one() == code
        session.add(Tenant(code="new"))
        session.commit()
    tenancy.check()
