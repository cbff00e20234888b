"""What a replica has shown and the master has otherwise by now is not written, in whichever way it would be."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, attributes, mapped_column, relationship, sessionmaker

import shardkit
from shardkit import own_tables
from shardkit.cluster import create_cluster
from shardkit.errors import StaleReadError
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Endpoint
from tests.integration.shop import Databases, User, sqlite_databases
from tests.integration.test_cluster import wait_until
from tests.integration.test_replica_reads import ReplicatedShop, replicated  # noqa: F401 - a fixture


class Base(DeclarativeBase):
    """Tables for these tests."""


class Doc(Base):
    __tablename__ = "docs"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(sa.JSON))
    plain: Mapped[list[Any] | None] = mapped_column(sa.JSON)
    name: Mapped[str] = mapped_column(sa.String(50))
    kids: Mapped[list[Kid]] = relationship(cascade="all, delete-orphan")
    tags: Mapped[list[Tag]] = relationship()


class Kid(Base):
    __tablename__ = "kids"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    doc_id: Mapped[int] = mapped_column(sa.ForeignKey("docs.id"))
    text: Mapped[str] = mapped_column(sa.String(50))
    toys: Mapped[list[Toy]] = relationship(
        cascade="all, delete-orphan", primaryjoin="Kid.id == foreign(Toy.kid_id)", lazy="selectin"
    )


class Toy(Base):
    __tablename__ = "toys"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    doc_id: Mapped[int]
    kid_id: Mapped[int]
    text: Mapped[str] = mapped_column(sa.String(50))


class Tag(Base):
    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    doc_id: Mapped[int | None] = mapped_column(sa.ForeignKey("docs.id"))
    text: Mapped[str] = mapped_column(sa.String(50))


class Label(Base):
    """The database takes its name for the same in whatever case."""

    __tablename__ = "labels"
    doc_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.String(50, collation="NOCASE"), primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(50))


@dataclass
class Library:
    """One shard with a replica, which nobody fills: both begin with the same rows."""

    sessions: sessionmaker[Any]
    databases: Databases

    def change(self, sql: str) -> None:
        """Somebody changes the master."""
        self.databases.execute(self.databases.masters["shop-0"], sql)

    def rows(self, table: str, columns: str) -> list[tuple[Any, ...]]:
        return self.databases.rows("shop-0", table, columns)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    databases = sqlite_databases(tmp_path)
    replica = Endpoint("", 0, str(tmp_path / "replica.db"), "sqlite")
    shard_map = ShardMap.parse(
        {
            "format": 1,
            "cluster": "library",
            "keyspaces": {
                "docs": {
                    "partition": {"by": "hash", "buckets": 4},
                    "tables": {"docs": "id", "kids": "doc_id", "toys": "doc_id", "tags": "doc_id", "labels": "doc_id"},
                    "placement": {"shop-0": "0-3"},
                }
            },
            "shards": {"shop-0": {"master": databases.masters["shop-0"].url, "replicas": [replica.url]}},
        }
    )
    with create_cluster(shard_map, max_lag=60.0) as cluster:
        for role in ("master", "replica"):
            Base.metadata.create_all(cluster.engine("shop-0", role))
            own_tables.upgrade(cluster.engine("shop-0", role))
        for endpoint in (databases.masters["shop-0"], replica):
            databases.execute(endpoint, """INSERT INTO docs VALUES (1, '{"a": 1}', '[1]', 'n')""")
            databases.execute(endpoint, "INSERT INTO kids VALUES (1, 1, 'k')")
            databases.execute(endpoint, "INSERT INTO labels VALUES (1, 'kim', 'l'), (1, 'lee', 'l')")
            databases.execute(endpoint, "INSERT INTO toys VALUES (1, 1, 1, 't')")
            databases.execute(endpoint, "INSERT INTO tags VALUES (1, 1, 't')")
        written = int(time.time() * 1_000_000)
        databases.execute(
            replica, f"INSERT INTO shardkit_heartbeat (shard, beat, written_at) VALUES ('shop-0', 1, {written})"
        )
        wait_until(cluster.health.wait)
        yield Library(shardkit.sessionmaker(cluster), databases)


# --- columns whose values are changed in place


def test_a_value_that_is_changed_in_place_is_compared(library: Library) -> None:
    library.change("""UPDATE docs SET data = '{"a": 1, "paid": true}'""")
    with library.sessions() as session:
        doc = session.get_one(Doc, 1)
        doc.data["b"] = 2
        with pytest.raises(StaleReadError, match="data was not yet"):
            session.commit()
    assert library.rows("docs", "data") == [('{"a": 1, "paid": true}',)]


def test_a_row_whose_key_has_another_spelling_on_the_master_is_not_written(library: Library) -> None:
    library.change("UPDATE labels SET name = 'KIM', text = 'theirs' WHERE name = 'kim'")
    with library.sessions() as session:
        session.get_one(Label, (1, "lee")).text = "ours"
        session.commit()
        session.get_one(Label, (1, "kim")).text = "ours"
        with pytest.raises(StaleReadError, match="may have got another spelling"):
            session.commit()
    assert sorted(library.rows("labels", "name, text")) == [("KIM", "theirs"), ("lee", "ours")]


def test_a_value_that_is_flagged_as_changed_is_compared(library: Library) -> None:
    library.change("UPDATE docs SET plain = '[1, 2]'")
    with library.sessions() as session:
        doc = session.get_one(Doc, 1)
        assert doc.plain is not None
        doc.plain.append(3)
        attributes.flag_modified(doc, "plain")
        with pytest.raises(StaleReadError, match="plain was not yet"):
            session.commit()
    assert library.rows("docs", "plain") == [("[1, 2]",)]


def test_a_value_that_is_refreshed_from_a_replica_is_compared(library: Library) -> None:
    library.change("""UPDATE docs SET data = '{"a": 1, "paid": true}'""")
    with library.sessions() as session:
        doc = session.scalars(select(Doc).options(sa.orm.defer(Doc.data))).one()
        assert doc.data == {"a": 1}
        doc.data["b"] = 2
        with pytest.raises(StaleReadError, match="data was not yet"):
            session.commit()


def test_a_value_that_is_as_on_the_master_is_changed_in_place_again_and_again(library: Library) -> None:
    with library.sessions(expire_on_commit=False) as session:
        doc = session.get_one(Doc, 1)
        for number in range(3):
            doc.data[str(number)] = number
            session.flush()
            doc.data["last"] = number
            session.commit()
            session.scalars(select(Doc.name)).all()
    assert [json.loads(data) for (data,) in library.rows("docs", "data")] == [
        {"a": 1, "0": 0, "1": 1, "2": 2, "last": 2}
    ]


# --- objects that a flush writes without their having been changed


def test_an_orphan_that_a_flush_deletes_is_compared(library: Library) -> None:
    library.change("UPDATE kids SET text = 'acknowledged'")
    with library.sessions() as session:
        doc = session.get_one(Doc, 1)
        doc.kids.remove(doc.kids[0])
        with pytest.raises(StaleReadError, match=r"Kid .* text was not yet"):
            session.commit()
    assert library.rows("kids", "text") == [("acknowledged",)]


def test_what_goes_with_an_orphan_is_compared(library: Library) -> None:
    library.change("UPDATE toys SET text = 'acknowledged'")
    with library.sessions() as session:
        session.get_one(Doc, 1).kids = []
        with pytest.raises(StaleReadError, match=r"Toy .* text was not yet"):
            session.commit()
    assert library.rows("toys", "text") == [("acknowledged",)]


def test_an_orphan_is_compared_though_the_shard_was_written_before(library: Library) -> None:
    library.change("UPDATE kids SET text = 'acknowledged'")
    with library.sessions(autoflush=False) as session:
        doc = session.get_one(Doc, 1)
        doc.kids.remove(doc.kids[0])
        session.execute(sa.update(Doc).values(name="other"))
        with pytest.raises(StaleReadError, match=r"Kid .* text was not yet"):
            session.commit()
    assert library.rows("kids", "text") == [("acknowledged",)]


@pytest.mark.parametrize("delete", [False, True])
def test_a_child_that_loses_its_parent_is_compared(library: Library, delete: bool) -> None:
    library.change("UPDATE tags SET doc_id = 7")
    with library.sessions() as session:
        doc = session.get_one(Doc, 1)
        assert len(doc.tags) == 1
        if delete:
            session.delete(doc)
        else:
            doc.tags = []
        with pytest.raises(StaleReadError, match=r"Tag .* doc_id was not yet"):
            session.commit()
    assert library.rows("tags", "doc_id") == [(7,)]


def test_an_orphan_that_is_as_on_the_master_is_deleted(library: Library) -> None:
    with library.sessions() as session:
        session.get_one(Doc, 1).kids = []
        session.commit()
    assert library.rows("kids", "id") == library.rows("toys", "id") == []


# --- after a StaleReadError


@pytest.mark.parametrize("again", ["update", "delete"])
def test_after_a_savepoint_the_object_is_read_on_the_master(library: Library, again: str) -> None:
    library.change("UPDATE docs SET name = 'acknowledged'")
    with library.sessions() as session:
        doc = session.get_one(Doc, 1)
        savepoint = session.begin_nested()
        session.delete(doc)
        with pytest.raises(StaleReadError):
            session.flush()
        savepoint.rollback()
        assert doc.name == "acknowledged"
        if again == "update":
            doc.name += "+"
        else:
            session.delete(doc)
        session.commit()
    assert library.rows("docs", "name") == ([("acknowledged+",)] if again == "update" else [])


def test_a_unit_of_work_is_run_again(library: Library) -> None:
    """Until the replica has what the master has; here that is at once."""
    library.change("UPDATE docs SET name = 'acknowledged'")
    runs = []

    @shardkit.retry(library.sessions)
    def work(session: Session) -> None:
        runs.append(1)
        read_from = "replica" if len(runs) == 1 else "master"
        session.get_one(Doc, 1, execution_options={"shardkit_read_from": read_from}).name += "+"

    work()
    assert library.rows("docs", "name") == [("acknowledged+",)]
    assert len(runs) == 2


def test_a_unit_of_work_that_is_run_again_reads_what_the_master_has(replicated: ReplicatedShop) -> None:  # noqa: F811
    """Its replicas stay behind."""
    if replicated.shop.kind == "sqlite":
        pytest.skip("SQLite has no positions")
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    seen = []

    @shardkit.retry(shardkit.sessionmaker(replicated.cluster))
    def work(session: Session) -> None:
        user = session.get_one(User, replicated.user)
        seen.append(user.name.split()[0])
        user.age = 30

    work()
    assert seen == ["replica", "master"]
    sessions = shardkit.async_sessionmaker(replicated.cluster)
    seen.clear()
    replicated.catch_up()

    @shardkit.retry(sessions)
    async def work_async(session: AsyncSession) -> None:
        user = await session.get_one(User, replicated.user)
        seen.append(user.name.split()[0])
        user.age = 31

    async def run() -> None:
        await work_async()
        await replicated.cluster.adispose()

    asyncio.run(run())
    assert seen == ["replica", "master"]
    assert replicated.shop.rows("shop-0", "users", "age") == [(31,)]


# --- objects that are written in bulk


def test_an_object_is_saved_in_bulk(library: Library) -> None:
    with library.sessions() as session:
        doc = session.get_one(Doc, 1)
        doc.name = "other"
        session.bulk_save_objects([doc])
        session.commit()
    assert library.rows("docs", "name") == [("other",)]


def test_an_object_that_is_saved_in_bulk_is_compared(library: Library) -> None:
    library.change("UPDATE docs SET name = 'acknowledged'")
    with library.sessions(autoflush=False) as session:
        doc = session.get_one(Doc, 1)
        doc.name += "+"
        with pytest.raises(StaleReadError, match="name was not yet"):
            session.bulk_save_objects([doc])
        session.rollback()
    assert library.rows("docs", "name") == [("acknowledged",)]


# --- a replica that is lost


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_lost_replica_has_shown_is_compared(
    replicated: ReplicatedShop,  # noqa: F811
    request: pytest.FixtureRequest,
    kept: bool,
) -> None:
    """Of this transaction, and of the one before."""
    if replicated.shop.kind == "sqlite":
        pytest.skip("SQLite has no connections that could be lost")
    server: LocalDatabaseServer = request.getfixturevalue("database_server")
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    with shardkit.sessionmaker(replicated.cluster, expire_on_commit=not kept)() as session:
        user = session.get_one(User, replicated.user)
        assert user.name.startswith("replica")
        names = [f"'{replica.database}'" for replica in replicated.replicas]
        connections = f"SELECT id FROM information_schema.processlist WHERE db IN ({', '.join(names)})"
        for (number,) in server.execute(connections):
            server.execute(f"KILL {number}")
        assert session.scalar(select(User.name).where(User.id == replicated.user)) is not None
        if kept:
            session.commit()
        user.age = 30
        with pytest.raises(StaleReadError, match="name was not yet as on the master"):
            session.commit()
    assert replicated.shop.rows("shop-0", "users", "name, age") == [("master", None)]
