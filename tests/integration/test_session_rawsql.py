"""Raw SQL without a word about shards: plain statements of one key go where its rows are."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

import shardkit
from shardkit.errors import RoutingError
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Base, Order, User


@pytest.fixture
def session(shop: Shop) -> Any:
    cluster = shop.open(shop.map(), metadata=Base.metadata)
    with shardkit.sessionmaker(cluster, transactions="best_effort")() as opened:
        for shard in SHARDS:
            (number,) = shop.users_on(shard, 1)
            opened.add(User(id=number, name=shard, age=1, orders=[Order(id=number * 10, item="x")]))
        opened.commit()
        yield opened


def test_each_key_is_found_read_and_written(shop: Shop, session: Session) -> None:
    for shard in SHARDS:
        (number,) = shop.users_on(shard, 1)
        assert session.scalar(sa.text("SELECT name FROM users WHERE id = :id"), {"id": number}) == shard
        assert session.scalar(sa.text(f"SELECT name FROM users WHERE id = {number} AND age < 5")) == shard
        joined = "SELECT item FROM users u JOIN orders o ON o.user_id = u.id WHERE o.user_id = :id"
        assert session.scalar(sa.text(joined), {"id": number}) == "x"
        session.execute(sa.text("UPDATE users SET age = 7 WHERE id = :id"), {"id": number})
    session.commit()
    assert all(ages == [7] for ages in shop.where("users", "age").values())
    session.execute(sa.text("DELETE FROM orders WHERE user_id = :id"), {"id": shop.users_on("shop-1", 1)[0]})
    session.commit()
    assert [len(ids) for ids in shop.where("orders").values()] == [1, 0, 1]


def test_objects_from_raw_sql_know_their_shard(shop: Shop, session: Session) -> None:
    (number,) = shop.users_on("shop-1", 1)
    asked = sa.select(User).from_statement(sa.text("SELECT * FROM users WHERE id = :id"))
    user = session.scalars(asked, {"id": number}).one()
    assert session.get(User, number) is user
    user.age = 9
    assert [order.id for order in user.orders] == [number * 10]
    session.commit()
    assert shop.where("users", "age")["shop-1"] == [9]


def test_whole_tables_need_no_key(shop: Shop, session: Session) -> None:
    session.execute(
        sa.text("INSERT INTO invoices (id, total) VALUES (1, 5)"), execution_options={"shardkit_shard": "shop-2"}
    )
    assert session.scalar(sa.text("SELECT SUM(total) FROM invoices")) == 5
    assert session.execute(sa.text("SELECT * FROM countries")).all() == []


def test_rows_go_where_their_key_says(shop: Shop, session: Session) -> None:
    insert = sa.text("INSERT INTO orders (id, user_id, item, amount) VALUES (:id, :user, 'raw', 1)")
    for position, shard in enumerate(SHARDS):
        (number,) = shop.users_on(shard, 1)
        session.execute(insert, [{"id": 100 * position + n, "user": number} for n in (1, 2)])
    session.commit()
    assert [len(ids) for ids in shop.where("orders").values()] == [3, 3, 3]
    with pytest.raises(RoutingError, match="would run on 3 shards"):
        session.execute(insert, [{"id": 900, "user": shop.users_on(shard, 1)[0]} for shard in SHARDS])


def test_what_is_on_several_shards_is_refused(session: Session) -> None:
    for text in ("SELECT * FROM users", "UPDATE users SET age = 1", "DELETE FROM users WHERE age = 1"):
        with pytest.raises(RoutingError, match="would run on 3 shards"):
            session.execute(sa.text(text))
