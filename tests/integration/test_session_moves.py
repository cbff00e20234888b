"""Sessions while buckets move, and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import func, insert, select

import shardkit
from shardkit.mapstore import MemoryMapStore
from shardkit.shardmap import Move
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Order, User


def test_rows_that_stand_on_both_shards_during_a_move_are_counted_once(shop: Shop) -> None:
    ids = range(60)
    with shop.session() as session:
        session.execute(insert(User), [{"id": number, "name": "x", "age": 1} for number in ids])
        session.commit()
    moving = shop.cluster.map.keyspaces["orders"].buckets_on("shop-0")[:10]
    copied = [number for number in ids if shop.cluster.locate("users", id=number).bucket in moving]
    assert copied
    for number in copied:
        shop.execute(shop.masters["shop-1"], f"INSERT INTO users (id, name, age) VALUES ({number}, 'copy', 1)")

    move = Move("job-1", "orders", tuple(moving), "shop-0", "shop-1")
    cluster = shop.open(MemoryMapStore(shop.map().with_moves([move])))  # type: ignore[arg-type]
    with shardkit.sessionmaker(cluster)() as session:
        assert session.scalar(select(func.count()).select_from(User)) == 60
        assert session.scalar(select(func.sum(User.age))) == 60
        found = session.scalars(select(User).order_by(User.id)).all()
        assert [user.id for user in found] == list(ids)
        assert "copy" not in {user.name for user in found}
        assert session.get_one(User, copied[0]).name == "x"


def test_objects_follow_their_rows_when_a_bucket_has_moved(tmp_path: Path, sqlite_shop: Shop) -> None:
    """One session across the publication: its objects are refreshed, and written, where the rows are now."""
    number = sqlite_shop.users_on("shop-0", 1)[0]
    store = MemoryMapStore(sqlite_shop.map())
    cluster = sqlite_shop.open(store)  # type: ignore[arg-type]
    with shardkit.sessionmaker(cluster)() as session:
        user = User(id=number, name="before", orders=[Order(id=1, item="x")])
        session.add(user)
        session.commit()
        order = user.orders[0]
        session.commit()

        bucket = cluster.locate("users", id=number).bucket
        for table in ("users", "orders"):
            (row,) = sqlite_shop.rows("shop-0", table)
            values = ", ".join("NULL" if value is None else repr(value) for value in row)
            sqlite_shop.execute(sqlite_shop.masters["shop-2"], f"INSERT INTO {table} VALUES ({values})")
            sqlite_shop.execute(sqlite_shop.masters["shop-0"], f"DELETE FROM {table}")
        store.publish(cluster.map.with_placement("orders", {bucket: "shop-2"}), expected_version=1)

        assert user.name == "before"
        assert sa.inspect(user).identity_key[2] == "shop-2"
        assert session.get(User, number) is user
        user.name = "after"
        session.commit()
        assert order.item == "x"
        assert session.scalars(select(Order).where(Order.user_id == number)).one() is order
    assert sqlite_shop.rows("shop-2", "users", "name") == [("after",)]
    assert sqlite_shop.rows("shop-0", "users") == []


def test_a_new_shard_is_used_as_soon_as_it_is_published(tmp_path: Path) -> None:
    document = {
        "format": 1,
        "cluster": "one",
        "keyspaces": {
            "orders": {
                "partition": {"by": "hash", "buckets": 4},
                "tables": {"users": "id"},
                "placement": {"shop-0": "0-3"},
            }
        },
        "shards": {shard: {"master": f"sqlite:///{tmp_path}/{shard}.db"} for shard in SHARDS[:2]},
    }
    store = MemoryMapStore(shardkit.ShardMap.parse(document))
    with shardkit.create_cluster(store) as cluster:
        for shard in SHARDS[:2]:
            User.metadata.create_all(cluster.engine(shard), tables=[User.__table__])  # type: ignore[list-item]
        store.publish(
            cluster.map.with_placement("orders", {0: "shop-1", 1: "shop-1"}).with_version(2), expected_version=1
        )
        with shardkit.sessionmaker(cluster, transactions="best_effort")() as session:
            session.execute(insert(User), [{"id": number, "name": "x"} for number in range(20)])
            session.commit()
            assert session.scalar(select(func.count()).select_from(User)) == 20
        with cluster.engine("shop-1").connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM users")) > 0


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_runs_to_its_end_on_the_map_that_it_began_with(sqlite_shop: Shop, end: str) -> None:
    number = sqlite_shop.users_on("shop-0", 1)[0]
    store = MemoryMapStore(sqlite_shop.map())
    cluster = sqlite_shop.open(store)  # type: ignore[arg-type]
    bucket = cluster.locate("users", id=number).bucket
    with shardkit.sessionmaker(cluster)() as session:
        session.get(User, number)
        store.publish(cluster.map.with_placement("orders", {bucket: "shop-2"}), expected_version=1)
        session.add(User(id=number, name="old map"))
        session.flush()
        getattr(session, end)()
        session.get(User, number)
        session.merge(User(id=number, name="new map"))
        session.commit()
    assert sqlite_shop.rows("shop-2", "users", "name") == [("new map",)]
    assert sqlite_shop.rows("shop-0", "users", "name") == ([("old map",)] if end == "commit" else [])
