"""Handlers of a flush's events write and read by themselves, on the connection they are given or with the session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session, object_session

import shardkit
from shardkit.errors import MissingKey, RoutingError, ScatterRefused
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Country, Invoice, Order, User

Handler = Callable[[Any, Any, Any], None]
users, orders, countries, invoices = (each.__table__ for each in (User, Order, Country, Invoice))


@pytest.fixture
def ids(shop: Shop) -> list[int]:
    """A user on each shard."""
    made = [shop.users_on(shard, 1)[0] for shard in SHARDS]
    with shop.session() as session:
        session.add_all([User(id=number, name="old") for number in made])
        session.add(Country(code="KR", name="Korea"))
        session.commit()
    return made


@pytest.fixture
def session(shop: Shop) -> Iterator[Session]:
    with shop.session(transactions="best_effort" if shop.kind == "sqlite" else "atomic") as opened:
        yield opened


@contextmanager
def handling(target: Any, name: str, handler: Any) -> Iterator[None]:
    event.listen(target, name, handler)
    try:
        yield
    finally:
        event.remove(target, name, handler)


def names(shop: Shop) -> list[str]:
    return [row for rows in shop.where("users", "name").values() for row in rows]


@pytest.mark.parametrize(
    "statement",
    [
        lambda number: users.update().where(users.c.id == number).values(name="new"),
        lambda number: sa.update(User).where(User.id == number).values(name="new"),
    ],
)
def test_a_handler_changes_a_row_of_another_shard(
    shop: Shop, session: Session, ids: list[int], statement: Callable[[int], Any]
) -> None:
    counts = []

    def change_next(_mapper: Any, connection: Any, order: Order) -> None:
        counts.append(connection.execute(statement(ids[(ids.index(order.user_id) + 1) % 3])).rowcount)

    with handling(Order, "after_insert", change_next):
        session.add_all([Order(id=number, user_id=number, item="book") for number in ids])
        session.commit()
    assert counts == [1, 1, 1]
    assert names(shop) == ["new"] * 3


def test_a_handler_inserts_rows_where_their_keys_say(shop: Shop, session: Session, ids: list[int]) -> None:
    def log(_mapper: Any, connection: Any, country: Country) -> None:
        rows = [{"id": number, "user_id": number, "item": country.code, "amount": 1} for number in ids]
        connection.execute(orders.insert(), rows)
        connection.execute(invoices.insert().values(id=1, total=3))

    with handling(Country, "after_insert", log):
        session.add(Country(code="FI", name="Finland"))
        session.commit()
    assert shop.where("orders", "user_id") == {shard: [number] for shard, number in zip(SHARDS, ids, strict=True)}
    assert shop.rows(SHARDS[2], "invoices", "total") == [(3,)]


def test_a_handler_writes_reference_tables_everywhere(shop: Shop, session: Session, ids: list[int]) -> None:
    def rename(_mapper: Any, connection: Any, user: User) -> None:
        connection.execute(countries.update().where(countries.c.code == "KR").values(name=user.name))

    with handling(User, "before_update", rename):
        session.get_one(User, ids[1]).name = "Corea"
        session.commit()
    assert shop.where("countries", "name") == {shard: ["Corea"] for shard in SHARDS}


def test_a_handler_reads_all_rows(session: Session, ids: list[int]) -> None:
    def count(_mapper: Any, connection: Any, order: Order) -> None:
        number = connection.scalar(sa.select(sa.func.count()).select_from(users))
        with_options = connection.execution_options(compiled=1)
        other = with_options.execute(sa.select(User.name).where(User.id == ids[0])).scalar()
        order.item = f"{number} {other}"

    with handling(Order, "before_insert", count):
        session.add(Order(id=1, user_id=ids[2]))
        session.commit()
    assert session.scalars(sa.select(Order.item)).all() == ["3 old"]


def test_raw_sql_of_a_handler_stays_beside_its_object(shop: Shop, session: Session, ids: list[int]) -> None:
    def touch(_mapper: Any, connection: Any, order: Order) -> None:
        connection.execute(sa.text("UPDATE users SET name = 'raw' WHERE id = :id"), {"id": order.user_id})

    with handling(Order, "after_insert", touch):
        session.add(Order(id=1, user_id=ids[1], item=""))
        session.commit()
    assert names(shop) == ["old", "raw", "old"]


def test_raw_sql_of_a_handler_does_not_change_one_copy(session: Session, ids: list[int]) -> None:
    def touch(_mapper: Any, connection: Any, _order: Order) -> None:
        connection.execute(sa.text("UPDATE countries SET name = 'raw'"))

    with handling(Order, "after_insert", touch):
        session.add(Order(id=1, user_id=ids[1], item=""))
        with pytest.raises(RoutingError, match="reference table"):
            session.commit()


def test_a_savepoint_of_a_handler(shop: Shop, session: Session, ids: list[int]) -> None:
    if shop.kind == "sqlite":
        pytest.skip("its driver begins too late for savepoints")
    renamed = users.update().values(name="new")

    def try_beside(_mapper: Any, connection: Any, order: Order) -> None:
        savepoint = connection.begin_nested()
        connection.execute(renamed.where(users.c.id == order.user_id))
        savepoint.rollback()
        connection.execute(renamed.where(users.c.id == ids[1]))

    def try_elsewhere(_mapper: Any, connection: Any, order: Order) -> None:
        with connection.begin_nested():
            connection.execute(renamed.where(users.c.id == ids[order.id % 3]))

    with handling(Order, "after_insert", try_beside):
        session.add(Order(id=1, user_id=ids[0], item=""))
        session.commit()
    assert names(shop) == ["old", "new", "old"]
    with handling(Order, "after_insert", try_elsewhere):
        session.add(Order(id=2, user_id=ids[0], item=""))
        with pytest.raises(RoutingError, match="savepoint"):
            session.commit()


@pytest.mark.parametrize("changed", [True, False])
def test_what_a_handler_is_given_is_a_connection(shop: Shop, session: Session, ids: list[int], changed: bool) -> None:
    """Also of an object whose row stays as it is."""
    seen = []

    def look(_mapper: Any, connection: Any, user: User) -> None:
        assert isinstance(connection, sa.Connection)
        assert sa.inspect(connection).has_table("users")
        with Session(bind=connection) as inner:
            seen.append(inner.scalar(sa.select(User.id).where(User.id == user.id)))

    with handling(User, "before_update", look):
        user = session.get_one(User, ids[1])
        user.name = "new" if changed else "old"
        session.flush()
        assert seen == [ids[1]]
        session.commit()
    assert names(shop) == ["old", "new" if changed else "old", "old"]


def test_a_handler_of_a_row_that_stays_writes_with_it(shop: Shop, session: Session, ids: list[int]) -> None:
    def log(_mapper: Any, connection: Any, user: User) -> None:
        connection.execute(orders.insert().values(id=user.id, user_id=user.id, item="log", amount=1))

    with handling(User, "after_update", log):
        for number in ids:
            session.get_one(User, number).name = "old"
        session.commit()
    assert shop.where("orders", "user_id") == {shard: [number] for shard, number in zip(SHARDS, ids, strict=True)}


@pytest.mark.parametrize("when", ["before_flush", "after_flush"])
def test_bulk_operations_of_handlers(shop: Shop, session: Session, ids: list[int], when: str) -> None:
    def log(session: Session, *_: Any) -> None:
        changed = [each.id for each in session.dirty]
        session.execute(sa.insert(Order), [{"id": number, "user_id": number, "item": "log"} for number in changed])
        session.execute(sa.insert(Country), {"code": "FI", "name": "Finland"})
        session.execute(sa.update(User), [{"id": number, "age": 5} for number in changed])

    with handling(session, when, log):
        for user in session.scalars(sa.select(User)):
            user.name = "new"
        session.commit()
    assert shop.where("orders", "user_id") == {shard: [number] for shard, number in zip(SHARDS, ids, strict=True)}
    assert shop.where("countries", "code") == {shard: ["FI", "KR"] for shard in SHARDS}
    assert shop.where("users", "name, age") == {shard: [("new", 5)] for shard in SHARDS}


def test_a_handler_reads_objects_with_the_session(session: Session, ids: list[int]) -> None:
    def read(_mapper: Any, connection: Any, order: Order) -> None:
        with pytest.raises(RoutingError, match="mapped classes"):
            connection.execute(sa.select(User.name))
        own = object_session(order)
        assert own is not None
        order.item = str(len(own.scalars(sa.select(User)).all()))

    with handling(Order, "before_insert", read):
        session.add(Order(id=1, user_id=ids[0]))
        session.commit()
    assert session.scalars(sa.select(Order.item)).all() == ["3"]


@pytest.mark.parametrize("of_class", [True, False])
def test_a_handler_names_the_row_of_its_object_by_the_primary_key_alone(
    session: Session, ids: list[int], of_class: bool
) -> None:
    """Which does not hold the shard key: no other shard is asked for it, or written."""
    rename = (sa.update(Order) if of_class else orders.update()).values(item="new")

    def change(_mapper: Any, connection: Any, order: Order) -> None:
        assert connection.execute(rename.where(orders.c.id == order.id)).rowcount == 1

    with handling(Order, "after_insert", change):
        session.add(Order(id=7, user_id=ids[1], item="old"))
        session.flush()
        assert session.get_transaction().written == (SHARDS[1],)  # type: ignore[union-attr]
        session.commit()
    assert session.scalars(sa.select(Order.item)).all() == ["new"]


def test_a_handler_copies_the_row_of_its_object(shop: Shop, session: Session, ids: list[int]) -> None:
    """As histories are written; the copy has the key of its row. Copies with other keys are refused."""
    number, item = sa.literal(100), sa.literal("copy")
    columns = ["id", "user_id", "item", "amount"]

    def copy(_mapper: Any, connection: Any, order: Order) -> None:
        rows = sa.select(orders.c.id + number, orders.c.user_id, item, orders.c.amount).where(orders.c.id == order.id)
        assert connection.execute(orders.insert().from_select(columns, rows)).rowcount == 1
        by_key = sa.select(users.c.id + 200, users.c.id, item, 1).where(users.c.id == order.user_id)
        assert connection.execute(orders.insert().from_select(columns, by_key)).rowcount == 1
        with pytest.raises(MissingKey):
            connection.execute(orders.insert().from_select(columns, rows.with_only_columns(1, orders.c.id, item, 1)))

    with handling(Order, "after_insert", copy):
        session.add(Order(id=1, user_id=ids[1], item="book"))
        session.commit()
    assert shop.where("orders", "user_id") == {SHARDS[0]: [], SHARDS[1]: [ids[1]] * 3, SHARDS[2]: []}


def test_a_handler_changes_rows_without_their_keys_on_its_word(shop: Shop, session: Session, ids: list[int]) -> None:
    """As with a session: a change of all shards is asked for."""
    everywhere = users.update().values(name="new").where(users.c.name == "old")

    def change(_mapper: Any, connection: Any, order: Order) -> None:
        scatter = order.item == "everywhere"
        assert connection.execute(everywhere, execution_options={"shardkit_scatter": scatter}).rowcount == 3

    with handling(Order, "after_insert", change):
        session.add(Order(id=7, user_id=ids[1], item=""))
        with pytest.raises(ScatterRefused):
            session.commit()
        session.rollback()
        assert names(shop) == ["old"] * 3
        session.add(Order(id=7, user_id=ids[1], item="everywhere"))
        session.commit()
    assert names(shop) == ["new"] * 3


def test_handlers_under_asyncio(shop: Shop, ids: list[int]) -> None:
    def change(_mapper: Any, connection: Any, order: Order) -> None:
        order.item = str(connection.scalar(sa.select(sa.func.count()).select_from(users)))
        connection.execute(
            users.update().where(users.c.id == ids[(ids.index(order.user_id) + 1) % 3]).values(name="new")
        )

    async def work() -> None:
        sessions = partial(shardkit.async_sessionmaker, transactions="best_effort")
        async with shop.open(shop.map()) as cluster, sessions(cluster)() as own:
            own.add_all([Order(id=number, user_id=number) for number in ids])
            await own.commit()

    with handling(Order, "before_insert", change):
        asyncio.run(work())
    assert names(shop) == ["new"] * 3
    assert shop.where("orders", "item") == {shard: ["3"] for shard in SHARDS}
