"""A second shard in the map that holds nothing yet: everything is for the first, so nothing has to be refused."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.errors import RoutingError, UnknownTable
from shardkit.shardmap import ShardMap
from tests.integration.shop import Base, Order, User


def document(directory: Path, placement: dict[str, str]) -> dict[str, object]:
    return {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {
            "orders": {
                "partition": {"by": "hash", "buckets": 60},
                "tables": {"users": "id", "orders": "user_id"},
                "placement": placement,
            }
        },
        "shards": {name: {"master": f"sqlite:///{directory / name}.db"} for name in ("old", "new")},
    }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with create_cluster(ShardMap.parse(document(tmp_path, {"old": "0-59"}))) as opened:
        tables = [Base.metadata.tables[name] for name in ("users", "orders")]
        for table in tables:
            table.create(opened.engine("old"))
        with shardkit.sessionmaker(opened).begin() as session:
            session.add_all(User(id=number, name=f"user {number}", age=number % 3) for number in range(6))
        yield opened


def test_raw_sql_needs_no_hint(cluster: Cluster) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        assert session.scalar(sa.text("SELECT count(*) FROM users")) == 6
        assert (
            session.scalars(sa.select(User).from_statement(sa.text("SELECT * FROM users WHERE id = 3"))).one().id == 3
        )


def test_a_connection_can_be_had_without_a_name(cluster: Cluster, tmp_path: Path) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        session.connection().execute(sa.text("DELETE FROM users WHERE id = 5"))
        session.commit()
    with closing(sqlite3.connect(tmp_path / "old.db")) as outside:
        assert outside.execute("SELECT count(*) FROM users").fetchone() == (5,)


def test_what_would_be_refused_over_shards_is_answered(cluster: Cluster) -> None:
    ranked = sa.select(User.id, sa.func.rank().over(order_by=User.age)).order_by(User.id)
    with shardkit.sessionmaker(cluster)() as session:
        assert [tuple(row) for row in session.execute(ranked)] == [(0, 1), (1, 3), (2, 5), (3, 1), (4, 3), (5, 5)]
        assert session.execute(sa.update(User).values(age=1)).rowcount == 6  # type: ignore[attr-defined]
        assert session.scalars(sa.select(User).join(Order, Order.id == User.age)).all() == []
    assert cluster.explain(ranked).shards == ("old",)
    assert "old is the only shard that holds anything" in cluster.explain(sa.text("SELECT 1")).reasons[0]


def test_a_wrong_hint_and_an_unknown_table_are_still_errors(cluster: Cluster) -> None:
    with shardkit.sessionmaker(cluster)() as session:
        with pytest.raises(UnknownTable):
            session.execute(sa.text("SELECT 1"), execution_options={"shardkit_shard": "neu"})
        with pytest.raises(RoutingError):
            session.execute(sa.text("SELECT 1"), execution_options={"shardkit_key": {"nothing": 1}})
        with pytest.raises(UnknownTable):
            session.execute(sa.select(sa.table("elsewhere", sa.column("id"))))


def test_with_the_first_bucket_on_the_new_shard_it_is_over(tmp_path: Path) -> None:
    ranked = sa.select(User.id, sa.func.rank().over(order_by=User.age))
    with create_cluster(ShardMap.parse(document(tmp_path, {"old": "0-58", "new": "59"}))) as opened:
        session = shardkit.sessionmaker(opened)()
        for statement in (ranked, sa.text("SELECT count(*) FROM users"), sa.update(User).values(age=1)):
            with pytest.raises(RoutingError):
                session.execute(statement)
        with pytest.raises(RoutingError):
            session.connection()
