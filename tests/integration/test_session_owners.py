"""A new object that takes its key from the object whose collection it is in, where only that side knows of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.errors import MissingKey
from shardkit.shardmap import ShardMap

SHARDS = ("s0", "s1")


class Base(DeclarativeBase):
    pass


class Box(Base):
    __tablename__ = "boxes"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    things: Mapped[list[Thing]] = relationship(primaryjoin="Box.id == foreign(Thing.box_id)")


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    box_id: Mapped[int | None]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    document = {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {
            "boxes": {
                "partition": {"by": "hash", "buckets": 8},
                "tables": {"boxes": "id", "things": "box_id"},
                "placement": {"s0": "0-3", "s1": "4-7"},
            }
        },
        "shards": {shard: {"master": f"sqlite:///{tmp_path / shard}.db"} for shard in SHARDS},
    }
    with create_cluster(ShardMap.parse(document)) as opened:
        opened.create_all(Base.metadata)
        yield opened


@pytest.fixture
def session(cluster: Cluster) -> Iterator[Session]:
    with shardkit.sessionmaker(cluster, transactions="best_effort")() as opened:
        yield opened


def things(directory: Path) -> dict[str, list[int]]:
    found = {}
    for shard in SHARDS:
        with closing(sqlite3.connect(directory / f"{shard}.db")) as outside:
            found[shard] = sorted(row[0] for row in outside.execute("SELECT id FROM things"))
    return found


def test_things_land_where_their_box_is(cluster: Cluster, session: Session, tmp_path: Path) -> None:
    session.add_all(Box(id=number, things=[Thing(id=number * 10)]) for number in range(8))
    session.commit()
    wanted: dict[str, list[int]] = {shard: [] for shard in SHARDS}
    for number in range(8):
        wanted[cluster.locate("boxes", id=number).shard].append(number * 10)
    assert things(tmp_path) == wanted
    for number in range(8):  # and into the collection of a box that is there already
        box = session.get_one(Box, number)
        box.things.append(Thing(id=number * 10 + 1))
    session.commit()
    assert things(tmp_path) == {shard: sorted([*ids, *(each + 1 for each in ids)]) for shard, ids in wanted.items()}


def test_a_thing_in_no_box_is_refused_before_anything_is_written(session: Session, tmp_path: Path) -> None:
    session.add_all([Box(id=1, things=[Thing(id=10)]), Thing(id=11)])
    with pytest.raises(MissingKey, match="things"):
        session.flush()
    session.rollback()
    assert not any(things(tmp_path).values())
