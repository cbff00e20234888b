"""session.move: another shard key for an object and for what belongs to it."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

import shardkit
from shardkit.errors import KeyChange, RoutingError, SecondShardWritten
from shardkit.shardmap import ShardMap
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Base, Country, Note, Order, User, Visit, shop_document


@pytest.fixture
def old(shop: Shop) -> int:
    """A user on the first shard with two orders, beside one who stays."""
    number, stays = shop.users_on("shop-0", 2)
    with shop.session() as session:
        session.add(
            User(id=number, name="mover", age=3, bio="long", orders=[Order(id=n, item=f"i{n}") for n in (1, 2)])
        )
        session.add(User(id=stays, name="stays", age=4, orders=[Order(id=3, item="i3")]))
        session.commit()
    return number


def test_a_user_moves_with_its_orders(shop: Shop, old: int) -> None:
    (new,) = shop.users_on("shop-1", 1)
    with shop.session(transactions="atomic" if shop.kind != "sqlite" else "best_effort") as session:
        user = session.get_one(User, old)
        (first, _) = user.orders
        user.name = "renamed"  # flushed before
        session.move(user, new)
        assert (user.id, user.name, user.bio) == (new, "renamed", "long")
        assert session.get(User, new) is user
        assert session.get(User, old) is None
        assert first.user_id == new
        assert [order.id for order in user.orders] == [1, 2]
        user.age = 9
        first.amount = 5
        session.commit()
        assert user.age == 9
    assert shop.rows("shop-1", "users", "id, name, age, bio") == [(new, "renamed", 9, "long")]
    assert shop.rows("shop-1", "orders", "id, user_id, item, amount") == [(1, new, "i1", 5), (2, new, "i2", 1)]
    assert [name for (name,) in shop.rows("shop-0", "users", "name")] == ["stays"]
    assert shop.rows("shop-0", "orders", "id") == [(3,)]


def test_within_one_shard(shop: Shop, old: int) -> None:
    new = shop.users_on("shop-0", 3)[2]
    with shop.session() as session:
        user = session.get_one(User, old)
        session.move(user, new)
        session.commit()
        assert (user.id, [order.user_id for order in user.orders]) == (new, [new, new])
    assert sorted(shop.where("users")["shop-0"]) == sorted([new, shop.users_on("shop-0", 2)[1]])


def test_a_rollback_takes_it_back(shop: Shop, old: int) -> None:
    (new,) = shop.users_on("shop-2", 1)
    with shop.session() as session:
        user = session.get_one(User, old)
        orders = list(user.orders)
        session.move(user, new)
        assert user.id == new
        session.rollback()
        assert (user.id, user.name) == (old, "mover")
        assert session.get(User, old) is user
        assert [order.user_id for order in orders] == [old, old]
        user.age = 7
        session.commit()
    assert shop.where("users")["shop-2"] == []
    assert (old, 7) in shop.rows("shop-0", "users", "id, age")


def test_one_order_moves_to_another_user(shop: Shop, old: int) -> None:
    (new,) = shop.users_on("shop-1", 1)
    with shop.session() as session:
        session.add(User(id=new, name="other"))
        order = session.scalars(sa.select(Order).where(Order.user_id == old, Order.id == 1)).one()
        session.move(order, new)
        session.commit()
        assert (order.id, order.user_id, order.user.name) == (1, new, "other")
    assert shop.where("orders") == {"shop-0": [2, 3], "shop-1": [1], "shop-2": []}


def test_a_key_that_is_a_text(shop: Shop) -> None:
    with shop.session() as session:
        visit = Visit(id=1, region="서울", count=3)
        session.add(visit)
        session.commit()
        session.move(visit, "부산")
        session.commit()
        assert (visit.region, visit.count) == ("부산", 3)
    assert shop.where("visits") == {"shop-0": [], "shop-1": [], "shop-2": [1]}


def test_what_cannot_be_moved_is_refused_and_nothing_is_written(shop: Shop, old: int) -> None:
    before = {table: shop.where(table, "*") for table in ("users", "orders")}
    (new,) = shop.users_on("shop-1", 1)
    with shop.session() as session:
        user = session.get_one(User, old)
        with pytest.raises(KeyChange, match="already"):
            session.move(user, old)
        with pytest.raises(RoutingError, match="not a loaded object"):
            session.move(User(id=1), new)
        country = Country(code="kr", name="Korea")
        session.add(country)
        session.flush()
        with pytest.raises(RoutingError, match="no shard key"):
            session.move(country, "de")
        session.rollback()
        with pytest.raises(RoutingError, match="sharded by id"):
            session.move(user, {"name": 1})
        user.id = new
        with pytest.raises(KeyChange, match=r"session\.move"):
            session.flush()
        session.rollback()
    assert {table: shop.where(table, "*") for table in before} == before


def test_a_place_that_is_taken(shop: Shop, old: int) -> None:
    (new,) = shop.users_on("shop-1", 1)
    with shop.session() as session:
        session.add(User(id=new, name="there"))
        session.commit()
        user = session.get_one(User, old)
        with pytest.raises(IntegrityError):
            session.move(user, new)
        session.rollback()
        assert (user.id, user.name) == (old, "mover")
    assert len(shop.where("orders")["shop-0"]) == 3


def test_a_column_that_the_model_does_not_know_is_not_lost(shop: Shop, old: int) -> None:
    for shard in SHARDS:
        shop.execute(shop.masters[shard], "ALTER TABLE orders ADD COLUMN extra INT")
    try:
        (new,) = shop.users_on("shop-1", 1)
        with shop.session() as session, pytest.raises(RoutingError, match="extra"):
            session.move(session.get_one(User, old), new)
    finally:
        for shard in SHARDS:
            shop.execute(shop.masters[shard], "ALTER TABLE orders DROP COLUMN extra")
    assert old in shop.where("users")["shop-0"]


def test_single_writes_one_shard(shop: Shop, old: int) -> None:
    with shop.session(transactions="single") as session:
        user = session.get_one(User, old)
        with pytest.raises(SecondShardWritten):
            session.move(user, shop.users_on("shop-1", 1)[0])
        session.rollback()
        session.move(user, shop.users_on("shop-0", 3)[2])
        session.commit()


def test_with_asyncio(shop: Shop, old: int) -> None:
    (new,) = shop.users_on("shop-1", 1)

    async def work() -> None:
        async with shop.open(shop.map()) as cluster, shardkit.async_sessionmaker(cluster)() as session:
            await moved(session)

    async def moved(session: AsyncSession) -> None:
        user = await session.get_one(User, old)

        def move(inner: Session) -> None:
            shardkit_session: Any = inner
            shardkit_session.move(user, new)

        await session.run_sync(move)
        await session.commit()
        assert (await session.get_one(User, new)).name == "mover"

    asyncio.run(work())
    assert shop.where("orders")["shop-1"] == [1, 2]


class Own(DeclarativeBase):
    """Another view of two of the shop's tables."""

    type_annotation_map = Base.type_annotation_map


class Person(Own):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    age: Mapped[int | None]
    bio: Mapped[str | None]
    received: Mapped[list[Letter]] = relationship(primaryjoin="foreign(Letter.recipient_id) == Person.id")


class Letter(Own):
    """Sharded by its sender."""

    __tablename__ = "messages"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sender_id: Mapped[int]
    recipient_id: Mapped[int]
    text: Mapped[str]


def test_rows_that_point_at_the_old_key_from_elsewhere_are_not_left_behind(shop: Shop, old: int) -> None:
    with shop.session() as session:
        person = session.get_one(Person, old)
        with pytest.raises(RoutingError, match=r"Person\.received leads to rows that do not move along"):
            session.move(person, shop.users_on("shop-1", 1)[0])
    assert old in shop.where("users")["shop-0"]


def test_generated_ids_stay(shop: Shop) -> None:
    with shop.session() as session:
        note = Note(owner_id=shop.users_on("shop-0", 1)[0], text="x")
        session.add(note)
        session.commit()
        number = note.id
        session.move(note, shop.users_on("shop-1", 1)[0])
        session.commit()
        assert note.id == number
    assert shop.where("notes")["shop-1"] == [number]


class Holder(Own):
    __table__ = Person.__table__
    held: Mapped[list[Held]] = relationship(
        primaryjoin="and_(foreign(Held.user_id) == Holder.id, foreign(Held.country_code) == Holder.bio)"
    )


class Held(Own):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_id: Mapped[int]
    item: Mapped[str]
    amount: Mapped[int]
    country_code: Mapped[str | None]


def test_rows_of_no_owner_stay(sqlite_shop: Shop) -> None:
    (old,), (new,) = (sqlite_shop.users_on(shard, 1) for shard in SHARDS[:2])
    with sqlite_shop.session() as session:
        holder = Holder(id=old, name="holder")
        session.add_all([holder, Held(id=1, user_id=old, item="of nobody", amount=1)])
        session.commit()
        session.move(holder, new)
        session.commit()
    assert sqlite_shop.where("users") == {"shop-0": [], "shop-1": [new], "shop-2": []}
    assert sqlite_shop.where("orders")["shop-0"] == [1]


def test_many_rows_move_some_at_a_time(shop: Shop, old: int) -> None:
    (new,) = shop.users_on("shop-1", 1)
    with shop.session() as session:
        session.execute(sa.insert(Order), [{"id": n, "user_id": old, "item": "i"} for n in range(100, 1300)])
        lengths = []
        sa.event.listen(
            shop.cluster.engine("shop-0"),
            "before_cursor_execute",
            lambda _connection, _cursor, statement, *_: lengths.append(len(statement)),
        )
        session.move(session.get_one(User, old), new)
        session.commit()
    assert len(shop.where("orders")["shop-1"]) == 1202
    assert shop.where("orders")["shop-0"] == [3]
    assert max(lengths) < 20_000


class Forum(DeclarativeBase):
    """A tree of rows that point at each other, which a board leads to by more than one way."""

    type_annotation_map = Base.type_annotation_map


class Board(Forum):
    __tablename__ = "boards"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    answers: Mapped[list[Answer]] = relationship()
    topics: Mapped[list[Topic]] = relationship()


class Topic(Forum):
    __tablename__ = "topics"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    board_id: Mapped[int] = mapped_column(sa.ForeignKey("boards.id"))


class Answer(Forum):
    __tablename__ = "answers"
    id: Mapped[UUID] = mapped_column(sa.Uuid(native_uuid=False), primary_key=True)
    board_id: Mapped[int] = mapped_column(sa.ForeignKey("boards.id"))
    topic_id: Mapped[int] = mapped_column(sa.ForeignKey("topics.id"))
    to_id: Mapped[UUID | None] = mapped_column(sa.Uuid(native_uuid=False), sa.ForeignKey("answers.id"))


def test_rows_that_others_point_at_leave_last_and_come_first(server_shop: Shop) -> None:
    document = shop_document({shard: {"master": master.url} for shard, master in server_shop.masters.items()})
    document["keyspaces"]["orders"]["tables"] |= {"boards": "id", "topics": "board_id", "answers": "board_id"}
    with server_shop.open(ShardMap.parse(document)) as cluster:
        cluster.create_all(Forum.metadata)
        try:
            (old,), (new,) = (server_shop.users_on(shard, 1) for shard in SHARDS[:2])
            with shardkit.sessionmaker(cluster)() as session:
                board = Board(id=old, topics=[Topic(id=7)])
                session.add(board)
                session.flush()
                one, two, three, four = (UUID(int=n) for n in (1, 9, 8, 5))
                for answer, to in ((one, None), (two, one), (three, two), (four, three)):
                    session.add(Answer(id=answer, board_id=old, topic_id=7, to_id=to))
                    session.flush()
                session.commit()
                session.move(board, new)
                session.commit()
            assert server_shop.rows(SHARDS[1], "answers", "id, board_id, topic_id, to_id") == [
                (one.hex, new, 7, None),
                (four.hex, new, 7, three.hex),
                (three.hex, new, 7, two.hex),
                (two.hex, new, 7, one.hex),
            ]
            assert server_shop.where("answers")[SHARDS[0]] == server_shop.where("topics")[SHARDS[0]] == []
        finally:
            cluster.drop_all(Forum.metadata)
