"""Subqueries that run first, in sessions: in the same transaction, on the right shards, and nothing sent in vain."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import delete, event, exists, func, select, update

import shardkit
from shardkit.errors import CrossShardJoin, RoutingError
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Invoice, Message, Order, User


@pytest.fixture
def friends(shop: Shop) -> tuple[int, int]:
    """Two users on different shards; the first has written to the second."""
    first, second = shop.users_on(SHARDS[0], 1)[0], shop.users_on(SHARDS[1], 1)[0]
    with shop.session() as session:
        users = User(id=first, name="ann", age=30), User(id=second, name="bob", age=40)
        session.add_all([*users, Message(id=1, sender_id=first, recipient_id=second, text="hello")])
        session.add_all([Order(id=1, user_id=first, item="a"), Order(id=2, user_id=second, item="b")])
        session.add(Invoice(id=first, total=40))
        session.commit()
    return first, second


def names(session: Any, statement: Any) -> list[str]:
    return sorted(session.scalars(statement))


def test_who_was_written_to(shop: Shop, friends: Any) -> None:
    with shop.session() as session:
        assert names(session, select(User.name).where(User.id.in_(select(Message.recipient_id)))) == ["bob"]
        assert names(session, select(User.name).where(User.id.not_in(select(Message.recipient_id)))) == ["ann"]
        assert session.scalar(select(func.count(User.id)).where(User.id.in_(select(Message.recipient_id)))) == 1
        oldest = select(func.max(Invoice.total)).scalar_subquery()
        assert names(session, select(User.name).where(User.age == oldest)) == ["bob"]
        assert names(session, select(User.name).where(exists().where(Invoice.total > 40))) == []
        assert names(session, select(User.name).where(select(Invoice).exists())) == ["ann", "bob"]


def test_whether_there_is_anybody(shop: Shop, friends: Any) -> None:
    with shop.session() as session:
        assert session.query(session.query(User).filter(User.name == "bob").exists()).scalar() is True
        assert session.scalar(select(exists().where(User.name == "nobody"))) is False
        (row,) = session.execute(select(exists().where(User.age > 35).label("old"), ~exists().where(User.age > 50)))
        assert (row.old, row[1]) == (True, True)
        with pytest.raises(CrossShardJoin):
            session.scalars(select(select(Order.id).where(Order.item == User.name).exists()).select_from(User))


def test_only_the_shards_of_the_values_are_asked(shop: Shop, friends: Any) -> None:
    asked: list[str] = []
    for shard in SHARDS:
        engine = shop.cluster.engine(shard)
        event.listen(engine, "before_cursor_execute", lambda *_, shard=shard: asked.append(shard))
    with shop.session() as session:
        assert session.scalars(select(User).where(User.id.in_(select(Message.recipient_id)))).one().name == "bob"
    assert sorted(asked[:3]) == sorted(SHARDS)
    assert asked[3:] == [SHARDS[1]]


def test_what_the_session_has_not_yet_flushed_counts(shop: Shop, friends: Any) -> None:
    ann, _ = friends
    with shop.session() as session:
        session.add(Message(id=2, sender_id=ann, recipient_id=ann, text="to myself"))
        assert names(session, select(User.name).where(User.id.in_(select(Message.recipient_id)))) == ["ann", "bob"]


def test_an_event_handler_sees_one_statement(shop: Shop, friends: Any) -> None:
    """And what it makes of the statement is what runs."""
    seen: list[Any] = []
    with shop.session() as session:

        @event.listens_for(session, "do_orm_execute")
        def change(state: Any) -> None:
            seen.append(state)
            state.statement = state.statement.where(User.name != "bob")

        assert names(session, select(User.name).where(User.id.in_(select(Message.recipient_id)))) == []
    assert len(seen) == 1


def test_a_change_by_what_another_shard_says(shop: Shop, friends: Any) -> None:
    ann, bob = friends
    with shop.session() as session:
        billed = select(Invoice.id).where(Invoice.total == 40)
        assert session.execute(update(User).where(User.id.in_(billed)).values(age=31)).rowcount == 1
        assert session.execute(delete(Order).where(Order.user_id.in_(billed))).rowcount == 1
        session.commit()
    assert [row for rows in shop.where("orders").values() for row in rows] == [2]
    assert sorted(row for rows in shop.where("users", "id, age").values() for row in rows) == sorted(
        [(ann, 31), (bob, 40)]
    )


def test_a_refused_statement_sends_none_of_its_subqueries(shop: Shop, friends: Any) -> None:
    sent: list[Any] = []
    for shard in SHARDS:
        event.listen(shop.cluster.engine(shard), "before_cursor_execute", lambda *given: sent.append(given))
    fine = User.id.in_(select(Invoice.id))
    tied = exists().where(Message.recipient_id == User.id)
    with shop.session() as session:
        with pytest.raises(CrossShardJoin, match="a subquery on messages"):
            session.execute(select(User).where(fine, tied))
        average = User.age > select(func.avg(Message.id)).scalar_subquery()
        with pytest.raises(CrossShardJoin, match="a subquery on messages"):
            session.execute(select(User).where(fine, average))
    assert sent == []


def test_two_rows_where_one_is_compared(shop: Shop, friends: Any) -> None:
    both = select(Order.user_id).scalar_subquery()
    with shop.session() as session, pytest.raises(RoutingError, match="more than one row"):
        session.execute(select(Invoice).where(Invoice.id == both))


def test_a_change_goes_by_what_is_committed_now(shop: Shop, friends: Any) -> None:
    """As on one database, where an UPDATE reads its subqueries anew, whatever its transaction has read before."""
    if shop.kind == "sqlite":
        pytest.skip("SQLite has one writer at a time, and no snapshot that a change could be behind")
    _, bob = friends
    billed = select(Invoice.id).where(Invoice.total == 70)
    with shop.session() as session:
        assert session.scalars(billed).all() == []
        shop.execute(shop.masters[SHARDS[2]], f"INSERT INTO invoices (id, total) VALUES ({bob}, 70)")
        assert session.scalars(billed).all() == []
        assert session.execute(update(User).where(User.id.in_(billed)).values(age=41)).rowcount == 1
        session.rollback()


def test_with_async_sessions(shop: Shop, friends: Any) -> None:
    async def ask() -> list[str]:
        async with shardkit.async_sessionmaker(shop.cluster)() as session:
            found = await session.scalars(select(User.name).where(User.id.in_(select(Message.recipient_id))))
            answer = list(found)
        await shop.cluster.adispose()
        return answer

    assert asyncio.run(ask()) == ["bob"]


def test_they_are_read_in_the_schema_of_the_statement(sqlite_shop: Shop) -> None:
    first, second = sqlite_shop.users_on(SHARDS[0], 1)[0], sqlite_shop.users_on(SHARDS[1], 1)[0]
    statement = select(User.name).where(User.id.in_(select(Message.recipient_id)))
    options = {"schema_translate_map": {None: "other"}}
    with sqlite_shop.session() as session:
        session.add_all([User(id=first, name="ann"), User(id=second, name="bob")])
        session.add(Message(id=1, sender_id=first, recipient_id=second, text="hello"))
        session.commit()
        for shard in SHARDS:
            connection = session.connection(bind_arguments={"shardkit_shard": shard})
            connection.exec_driver_sql("ATTACH ':memory:' AS other")
            for table in ("users", "messages"):
                connection.exec_driver_sql(f"CREATE TABLE other.{table} AS SELECT * FROM {table}")
            connection.exec_driver_sql("UPDATE other.users SET name = 'other ' || name")
            connection.exec_driver_sql(f"UPDATE other.messages SET recipient_id = {first}")
        assert names(session, statement) == ["bob"]
        assert names(session, statement.execution_options(**options)) == ["other ann"]
        assert session.scalars(statement, execution_options=options).all() == ["other ann"]
