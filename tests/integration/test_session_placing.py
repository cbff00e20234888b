"""Rows land where their keys say, and reference rows are the same everywhere, however they are written."""

from __future__ import annotations

import itertools
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, make_transient_to_detached, mapped_column, relationship

import shardkit
from shardkit.errors import KeyChange, MissingKey, RoutingError
from shardkit.mapstore import MemoryMapStore
from shardkit.shardmap import ShardMap

_ticks = itertools.count()


def tick() -> int:
    """Another number every time."""
    return next(_ticks)


class Tagged(sa.TypeDecorator[str]):
    """Stored as a number, shown as 'u-number'."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else int(value.removeprefix("u-"))

    def process_result_value(self, value: Any, dialect: Any) -> str | None:  # noqa: ARG002
        return None if value is None else f"u-{value}"


class Base(DeclarativeBase):
    pass


class Currency(Base):
    """A reference table whose values are made up by default."""

    __tablename__ = "currencies"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    title: Mapped[str]
    made: Mapped[int | None] = mapped_column(default=tick)
    changed: Mapped[int | None] = mapped_column(onupdate=tick)


class Stamped(Base):
    """A reference table with a value that each shard would choose."""

    __tablename__ = "stamped"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str | None]
    made: Mapped[datetime] = mapped_column(server_default=sa.func.now())
    changed: Mapped[datetime | None] = mapped_column(onupdate=sa.func.now())


class Numbered(Base):
    """A reference table with generated ids."""

    __tablename__ = "numbered"
    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    title: Mapped[str]


class Item(Base):
    """With generated ids; sharded by its owner."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    owner: Mapped[int]


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[str] = mapped_column(Tagged, primary_key=True, autoincrement=False)
    value: Mapped[int]


class Animal(Base):
    """Sharded by its keeper."""

    __tablename__ = "animals"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    keeper: Mapped[int]
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Dog(Animal):
    """Its own table is sharded by the id: not by what the first one is sharded by."""

    __tablename__ = "dogs"
    id: Mapped[int] = mapped_column(sa.ForeignKey("animals.id"), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012


link = sa.Table(
    "links", Base.metadata, sa.Column("tag_id", sa.Integer, primary_key=True), sa.Column("owner", sa.Integer)
)


class Tag(Base):
    """Vertical."""

    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Owner(Base):
    """Vertical, with a many-to-many table that is sharded."""

    __tablename__ = "owners"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tags: Mapped[list[Tag]] = relationship(
        secondary=link, primaryjoin="Owner.id == links.c.owner", secondaryjoin="Tag.id == links.c.tag_id"
    )


class Farm:
    """Two shards on SQLite files."""

    def __init__(self, folder: Path) -> None:
        self.files = {name: folder / f"{name}.db" for name in ("left", "right")}
        halves = {"left": "0-7", "right": "8-15"}
        partition = {"by": "hash", "buckets": 16}
        self.map = ShardMap.parse(
            {
                "format": 1,
                "cluster": "farm",
                "keyspaces": {
                    "animals": {
                        "partition": partition,
                        "tables": {"animals": "keeper", "dogs": "id", "accounts": "id", "links": "owner"},
                        "reference": ["currencies", "stamped"],
                        "placement": halves,
                    },
                    "items": {
                        "partition": partition,
                        "tables": {"items": "owner"},
                        "reference": ["numbered"],
                        "ids": "generated",
                        "placement": halves,
                    },
                    "whole": {"tables": ["tags", "owners"], "placement": "left"},
                },
                "shards": {name: {"master": f"sqlite:///{file}"} for name, file in self.files.items()},
            }
        )
        self.store = MemoryMapStore(self.map)
        self.cluster = shardkit.create_cluster(self.store)
        self.cluster.create_all(Base.metadata)
        self.sessions = shardkit.sessionmaker(self.cluster, transactions="best_effort")

    def rows(self, shard: str, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.files[shard])) as connection:
            return sorted(connection.execute(sql).fetchall())

    def same_everywhere(self, sql: str) -> list[Any]:
        left, right = (self.rows(shard, sql) for shard in self.files)
        assert left == right
        return left


MOMENT = datetime(2026, 1, 1)  # noqa: DTZ001 - DATETIME columns store no time zone


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    made = Farm(tmp_path)
    yield made
    made.cluster.dispose()


@pytest.fixture
def session(farm: Farm) -> Iterator[Session]:
    with farm.sessions() as made:
        yield made


ALL = "SELECT id, title, made, changed FROM currencies"


def test_defaults_of_reference_rows_are_made_up_once(farm: Farm, session: Session) -> None:
    session.add(Currency(title="won"))
    session.bulk_save_objects([Currency(title="yen")])
    session.bulk_insert_mappings(Currency, [{"title": "euro"}, {"title": "pound", "made": None}])
    session.execute(sa.insert(Currency), [{"title": "rupee", "made": None}])
    session.commit()
    rows = farm.same_everywhere(ALL)
    assert len(rows) == 5
    assert all(made is not None for _, _, made, _ in rows)  # the ORM leaves None to the default


def test_onupdate_of_reference_rows_is_made_up_once(farm: Farm, session: Session) -> None:
    currency, other = Currency(title="won"), Currency(title="yen")
    session.add_all([currency, other])
    session.commit()
    currency.title = "new won"
    assert other.title == "yen"
    other.title = "yen"  # as it was: nothing is written
    session.commit()
    assert [changed is None for _, _, _, changed in sorted(farm.same_everywhere(ALL), key=lambda row: row[1])] == [
        False,
        True,
    ]
    session.bulk_update_mappings(Currency, [{"id": other.id, "title": "new yen"}])
    session.commit()
    assert all(changed is not None for _, _, _, changed in farm.same_everywhere(ALL))


def test_an_explicit_null_in_a_reference_row_stays_null(farm: Farm, session: Session) -> None:
    table: Any = Currency.__table__
    session.execute(sa.insert(table), [{"title": "won", "made": None}])
    session.execute(sa.insert(Currency).execution_options(render_nulls=True), [{"title": "yen", "made": None}])
    session.commit()
    assert [made for _, _, made, _ in farm.same_everywhere(ALL)] == [None, None]


def test_a_reference_row_that_each_shard_would_complete_is_refused(farm: Farm, session: Session) -> None:
    session.add(Stamped(id=1))
    with pytest.raises(RoutingError, match="each shard would choose its own made"):
        session.flush()
    session.rollback()
    session.add(Stamped(id=1, made=MOMENT))
    session.commit()
    session.get_one(Stamped, 1).title = "new"
    with pytest.raises(RoutingError, match="each shard would choose its own changed"):
        session.flush()
    session.rollback()
    with pytest.raises(RoutingError, match="each shard would choose its own made"):
        session.bulk_insert_mappings(Stamped, [{"id": 2}])
    session.rollback()
    assert len(farm.same_everywhere("SELECT id FROM stamped")) == 1


def test_legacy_bulk_inserts_get_generated_ids(farm: Farm, session: Session) -> None:
    session.bulk_insert_mappings(Item, [{"owner": owner} for owner in range(20)])
    session.bulk_insert_mappings(Numbered, [{"title": "one"}])
    session.commit()
    ids = [number for shard in farm.files for (number,) in farm.rows(shard, "SELECT id FROM items")]
    assert len(set(ids)) == 20
    assert len(farm.same_everywhere("SELECT id FROM numbered")) == 1


def test_a_bulk_insert_of_reference_rows_without_id_is_refused(session: Session) -> None:
    with pytest.raises(MissingKey):
        session.bulk_insert_mappings(Stamped, [{"made": MOMENT}])


def test_bulk_save_refuses_a_changed_key(farm: Farm, session: Session) -> None:
    session.add(Animal(id=1, keeper=1))
    session.commit()
    animal = session.scalars(sa.select(Animal)).one()
    animal.keeper = next(n for n in range(2, 99) if _shard(farm, "animals", n) != _shard(farm, "animals", 1))
    session.expunge(animal)
    with pytest.raises(KeyChange):
        session.bulk_save_objects([animal])


def test_tables_of_one_class_that_are_sharded_differently_are_refused(session: Session) -> None:
    session.add(Dog(id=2, keeper=1))
    with pytest.raises(RoutingError, match="sharded by different columns"):
        session.flush()


def test_a_many_to_many_table_does_not_follow_the_classes_that_it_joins(farm: Farm, session: Session) -> None:
    session.add_all([Owner(id=number, tags=[Tag(id=number)]) for number in range(8)])
    session.commit()
    found = {shard: [owner for (owner,) in farm.rows(shard, "SELECT owner FROM links")] for shard in farm.files}
    assert all(_shard(farm, "links", owner) == shard for shard, owners in found.items() for owner in owners)
    assert sorted(found["left"] + found["right"]) == [*range(8)]


def test_keys_are_read_as_they_are_stored_when_objects_are_placed_again(farm: Farm, session: Session) -> None:
    names = [f"u-{number}" for number in range(20)]
    session.add_all([Account(id=name, value=1) for name in names])
    session.commit()
    for name in names:
        account = Account(id=name)
        make_transient_to_detached(account)
        with farm.sessions() as other:
            other.add(account)
            account.value = 2
            other.commit()
    accounts = session.scalars(sa.select(Account)).all()
    session.commit()
    bucket = next(b for b in range(16) if b not in {farm.map.locate("accounts", [n]).bucket for n in range(20)})
    farm.store.publish(farm.map.with_placement("animals", {bucket: "right"}), expected_version=1)
    assert {account.value for account in accounts} == {2}
    for account in accounts:
        account.value = 3
    session.commit()
    found = [value for shard in farm.files for (value,) in farm.rows(shard, "SELECT value FROM accounts")]
    assert found == [3] * 20


def _shard(farm: Farm, table: str, key: int) -> str:
    return farm.map.locate(table, [key]).shard


def test_a_detached_object_comes_in_where_its_row_is_now(farm: Farm, session: Session) -> None:
    """The old shard may still hold a copy of its row: nothing may be written there."""
    with farm.sessions() as before:
        before.add_all([Account(id=f"u-{number}", value=1) for number in range(20)])
        before.commit()
        added, deleted, merged, *_ = [
            account
            for account in before.scalars(sa.select(Account).order_by(Account.id))
            if sa.inspect(account).identity_token == "left"
        ]
    numbers = [int(account.id.removeprefix("u-")) for account in (added, deleted, merged)]
    buckets = {farm.map.locate("accounts", [number]).bucket: "right" for number in numbers}
    with farm.cluster.engine("right").begin() as connection:
        connection.execute(sa.insert(Account), [{"id": each.id, "value": 1} for each in (added, deleted, merged)])
    farm.store.publish(farm.map.with_placement("animals", buckets), expected_version=1)
    session.add(added)
    added.value = 2
    session.delete(deleted)
    session.merge(merged).value = 3
    session.commit()
    where = f"WHERE id IN {tuple(numbers)}"
    assert farm.rows("left", f"SELECT value FROM accounts {where}") == [(1,), (1,), (1,)]
    assert farm.rows("right", f"SELECT value FROM accounts {where}") == [(2,), (3,)]


@pytest.mark.filterwarnings("ignore:Column-expression-level unary distinct")
def test_distinct_as_a_column_is_a_distinct(session: Session) -> None:
    session.add_all([Animal(id=number, keeper=number) for number in range(20)])
    session.commit()
    assert session.scalars(sa.select(sa.distinct(Animal.kind))).all() == ["animal"]
    inner = sa.select(sa.distinct(Animal.kind).label("kind")).subquery()
    with pytest.raises(RoutingError, match="DISTINCT"):
        session.execute(sa.select(inner.c.kind))
    assert session.scalars(sa.select(sa.distinct(Animal.kind)).where(Animal.keeper == 1)).all() == ["animal"]
