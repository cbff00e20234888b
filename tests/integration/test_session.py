"""Sessions over shards: every row lands on, and is read from, the shard of its key. Rows are counted outside."""

from __future__ import annotations

import gc
import itertools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import delete, event, func, insert, select, union_all, update
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.exc import InvalidRequestError, MultipleResultsFound, PendingRollbackError
from sqlalchemy.orm import immediateload, joinedload, selectinload

import shardkit
from shardkit.errors import KeyChange, MissingKey, RoutingError, ScatterRefused, ShardkitError, UnknownTable
from tests.integration.conftest import FLAVOUR, DistantShop, Shop
from tests.integration.shop import SHARDS, Country, Invoice, Message, Note, Order, User, Visit


class Sent:
    """The statements that reached the databases, by shard."""

    def __init__(self, shop: Shop) -> None:
        self.statements: list[tuple[str, str]] = []
        for shard in SHARDS:
            self._listen(shop, shard)

    def _listen(self, shop: Shop, shard: str) -> None:
        def note(_c: Any, _k: Any, statement: str, _p: Any, _x: Any, _m: Any) -> None:
            self.statements.append((shard, statement))

        event.listen(shop.cluster.engine(shard), "before_cursor_execute", note)

    @contextmanager
    def expected(self, *shards: str) -> Iterator[None]:
        """Exactly these shards are asked, each as often as it is named."""
        before = len(self.statements)
        yield
        assert sorted(shard for shard, _ in self.statements[before:]) == sorted(shards), self.statements[before:]


@pytest.fixture
def sent(shop: Shop) -> Sent:
    return Sent(shop)


@pytest.fixture
def users(shop: Shop) -> dict[str, list[int]]:
    """Three users on each shard, each with two orders; written outside."""
    found = {shard: shop.users_on(shard, 3) for shard in SHARDS}
    for shard, ids in found.items():
        for number in ids:
            master = shop.masters[shard]
            shop.execute(master, f"INSERT INTO users (id, name, age) VALUES ({number}, 'user {number}', {number % 5})")
            for order in (number * 10, number * 10 + 1):
                shop.execute(
                    master,
                    "INSERT INTO orders (id, user_id, item, amount, country_code) "
                    f"VALUES ({order}, {number}, 'item {order}', {order % 7}, 'kr')",
                )
        shop.execute(shop.masters[shard], "INSERT INTO countries VALUES ('kr', 'Korea'), ('jp', 'Japan')")
    return found


# --- writing


def test_new_objects_land_on_the_shard_of_their_key(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all([User(id=number, name=f"user {number}") for number in range(40)])
        session.commit()
    where = shop.where("users")
    assert sorted(number for ids in where.values() for number in ids) == list(range(40))
    assert all(shop.shard_of(number) == shard for shard, ids in where.items() for number in ids)
    assert all(where.values())


def test_interleaved_new_objects_make_one_batch_a_shard(shop: Shop, sent: Sent) -> None:
    with shop.session() as session:
        session.add_all([User(id=number, name="x", age=1) for number in range(300)])
        with sent.expected(*SHARDS):
            session.flush()
        session.commit()
    assert sum(len(ids) for ids in shop.where("users").values()) == 300


def test_children_follow_their_parents_key(shop: Shop) -> None:
    with shop.session() as session:
        for number in range(20):
            user = User(id=number, name="x")
            user.orders.append(Order(id=number * 10, item="through the collection"))
            session.add_all([user, Order(id=number * 10 + 1, item="through the parent", user=user)])
        session.commit()
    where = shop.where("orders", "id, user_id")
    assert sum(map(len, where.values())) == 40
    assert all(shop.shard_of(user_id) == shard for shard, rows in where.items() for _, user_id in rows)


def test_bulk_insert_statements_are_split_by_shard(shop: Shop, sent: Sent) -> None:
    with shop.session() as session:
        with sent.expected(*SHARDS):
            session.execute(insert(User), [{"id": number, "name": "x"} for number in range(100)])
        session.commit()
    where = shop.where("users")
    assert sum(map(len, where.values())) == 100
    assert all(shop.shard_of(number) == shard for shard, ids in where.items() for number in ids)


def test_core_inserts_land_on_the_shard_of_their_key(shop: Shop) -> None:
    table = User.__table__
    with shop.session() as session:
        session.execute(insert(table).values(id=1, name="one"))
        session.execute(insert(table), [{"id": number, "name": "x"} for number in range(2, 12)])
        session.execute(insert(table).values([{"id": number, "name": "x"} for number in range(12, 22)]))
        session.commit()
    where = shop.where("users")
    assert sum(map(len, where.values())) == 21
    assert all(shop.shard_of(number) == shard for shard, ids in where.items() for number in ids)


def test_legacy_bulk_methods_land_on_the_shard_of_their_key(shop: Shop) -> None:
    with shop.session() as session:
        session.bulk_save_objects([User(id=number, name="x") for number in range(10)])
        session.bulk_insert_mappings(User, [{"id": number, "name": "x"} for number in range(10, 20)])
        session.bulk_update_mappings(User, [{"id": number, "name": "changed"} for number in range(0, 20, 2)])
        session.commit()
    where = shop.where("users", "id, name")
    assert sum(map(len, where.values())) == 20
    for shard, rows in where.items():
        assert all(shop.shard_of(number) == shard for number, _ in rows)
        assert all((name == "changed") == (number % 2 == 0) for number, name in rows)


def test_a_list_keyspace_places_by_value(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all(
            [Visit(id=number, region=region, count=1) for number, region in enumerate(["서울", "대구", "대전", "부산"])]
        )
        session.commit()
    assert shop.where("visits", "region") == {"shop-0": ["서울"], "shop-1": ["대구"], "shop-2": ["대전", "부산"]}


def test_vertical_tables_are_written_and_read_on_their_one_shard(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all([Invoice(total=5), Invoice(total=7)])
        session.commit()
        assert session.scalar(select(func.sum(Invoice.total))) == 12
        assert len(session.scalars(select(Invoice)).all()) == 2
    assert [total for _, total in shop.rows("shop-2", "invoices")] == [5, 7]


def test_reference_rows_are_written_on_every_shard_and_read_from_one(shop: Shop, sent: Sent) -> None:
    with shop.session() as session:
        session.add(Country(code="kr", name="Korea"))
        session.execute(insert(Country), [{"code": "jp", "name": "Japan"}])
        session.commit()
        with sent.expected("shop-0"):
            assert session.get_one(Country, "kr").name == "Korea"
        country = session.get_one(Country, "jp")
        country.name = "Nippon"
        session.commit()
        session.execute(update(Country).where(Country.code == "kr").values(name="Hanguk"))
        session.commit()
    assert {tuple(shop.rows(shard, "countries")) for shard in SHARDS} == {(("jp", "Nippon"), ("kr", "Hanguk"))}


def test_a_deleted_reference_row_is_gone_everywhere(shop: Shop, users: dict[str, list[int]]) -> None:
    with shop.session() as session:
        session.delete(session.get_one(Country, "kr"))
        session.commit()
    assert {tuple(shop.rows(shard, "countries")) for shard in SHARDS} == {(("jp", "Japan"),)}


def test_missing_ids_are_generated_where_the_map_says_so(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all([Note(owner_id=number, text="x") for number in range(30)])
        session.commit()
        session.execute(insert(Note), [{"owner_id": number, "text": "bulk"} for number in range(30)])
        session.execute(insert(Note).values(owner_id=1, text="one"))
        session.execute(insert(Note).values({Note.owner_id: 2, Note.text: "one by attributes"}))
        session.execute(insert(Note).values(owner_id=sa.bindparam("who"), text="one with parameters"), {"who": 3})
        session.execute(insert(Note).values([{"owner_id": number, "text": "many"} for number in range(30)]))
        session.execute(insert(Note.__table__), [{"owner_id": number, "text": "core"} for number in range(30)])
        session.bulk_save_objects([Note(owner_id=number, text="legacy") for number in range(5)])
        session.commit()
    where = shop.where("notes", "id, owner_id")
    ids = [number for rows in where.values() for number, _ in rows]
    assert len(set(ids)) == 60 + 3 + 30 + 30 + 5
    assert min(ids) > 2**32
    for shard, rows in where.items():
        assert all(shop.cluster.locate("notes", owner_id=owner).shard == shard for _, owner in rows)


def test_an_insert_without_a_key_is_refused_before_anything_is_sent(shop: Shop, sent: Sent) -> None:
    with shop.session() as session, sent.expected():
        for attempt in (
            lambda: session.execute(insert(Order), [{"id": 1, "item": "x"}]),
            lambda: session.execute(insert(Order).values(id=1, item="x")),
        ):
            with pytest.raises(MissingKey, match="user_id"):
                attempt()
        session.add(User(name="no id"))
        with pytest.raises(MissingKey, match="id"):
            session.flush()
        session.rollback()
    assert not any(shop.where("orders").values())


def test_a_changed_key_is_refused(shop: Shop, users: dict[str, list[int]]) -> None:
    ours, theirs = users["shop-0"][0], users["shop-1"][0]
    with shop.session() as session:
        order = session.scalars(select(Order).where(Order.user_id == ours)).first()
        assert order is not None
        order.user_id = theirs
        with pytest.raises(KeyChange, match=r"Order\.user_id"):
            session.flush()
        session.rollback()
        order.user = session.get_one(User, theirs)
        with pytest.raises(KeyChange):
            session.flush()
        session.rollback()
        with pytest.raises(KeyChange):
            session.execute(update(Order).where(Order.user_id == ours).values(user_id=theirs))
        session.rollback()
    assert shop.rows("shop-0", "orders", "count(*)") == [(6,)]


def test_a_key_changed_by_an_event_handler_while_it_is_written_is_an_error(sqlite_shop: Shop) -> None:
    here, there = sqlite_shop.users_on("shop-0", 1)[0], sqlite_shop.users_on("shop-1", 1)[0]

    def change(_mapper: Any, _connection: Any, user: User) -> None:
        user.id = there

    event.listen(User, "before_insert", change)
    try:
        with sqlite_shop.session() as session:
            session.add(User(id=here, name="x"))
            with pytest.raises(KeyChange, match="before_insert"):
                session.flush()
    finally:
        event.remove(User, "before_insert", change)
    assert not any(sqlite_shop.where("users").values())


def test_updates_and_deletes_of_objects_reach_their_rows(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = [number for ids in users.values() for number in ids]
    with shop.session() as session:
        for user in session.scalars(select(User).where(User.id.in_(everyone))):
            user.name = "changed"
        session.commit()
        for ids in users.values():
            session.delete(session.get_one(User, ids[0]))
        session.commit()
    for shard, ids in users.items():
        assert shop.rows(shard, "users", "id, name") == [(number, "changed") for number in ids[1:]]
        assert len(shop.rows(shard, "orders")) == 4  # the cascade


def test_update_and_delete_statements_by_key(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    one, other = users["shop-0"][0], users["shop-2"][1]
    with shop.session() as session:
        with sent.expected("shop-0", "shop-2"):
            result: Any = session.execute(update(User).where(User.id.in_([one, other])).values(name="new"))
        assert result.rowcount == 2
        with sent.expected("shop-0"):
            result = session.execute(delete(Order).where(Order.user_id == one))
        assert result.rowcount == 2
        session.commit()
    assert (one, "new") in shop.rows("shop-0", "users", "id, name")
    assert (other, "new") in shop.rows("shop-2", "users", "id, name")
    assert len(shop.rows("shop-0", "orders")) == 4


def test_objects_in_the_session_follow_update_statements(shop: Shop, users: dict[str, list[int]]) -> None:
    with shop.session() as session:
        loaded = [session.get_one(User, ids[0]) for ids in users.values()]
        session.execute(update(User).where(User.id.in_([user.id for user in loaded])).values(name="new"))
        assert [sa.inspect(user).dict["name"] for user in loaded] == ["new"] * 3
        session.execute(delete(Order).where(Order.user_id == loaded[0].id))
        assert session.scalars(select(Order).where(Order.user_id == loaded[0].id)).all() == []


def test_writes_without_a_key_need_to_be_allowed(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    with shop.session() as session:
        with sent.expected(), pytest.raises(ScatterRefused, match="3 shards"):
            session.execute(update(User).values(name="all"))
        result: Any = session.execute(update(User).values(name="all"), execution_options={"shardkit_scatter": True})
        assert result.rowcount == 9
        session.commit()
    assert {name for rows in shop.where("users", "id, name").values() for _, name in rows} == {"all"}


def test_merge_finds_the_row_on_its_shard(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    number = users["shop-1"][2]
    with shop.session() as session:
        with sent.expected("shop-1"):
            merged = session.merge(User(id=number, name="merged"))
        session.merge(User(id=number, name="merged twice"))
        session.commit()
        assert session.get(User, number) is merged
    assert (number, "merged twice") in shop.rows("shop-1", "users", "id, name")


def test_savepoints_roll_back_on_their_shard(shop: Shop, users: dict[str, list[int]]) -> None:
    number = users["shop-1"][0]
    with shop.session() as session:
        user = session.get_one(User, number)
        user.name = "kept"
        with session.begin_nested() as savepoint:
            user.name = "dropped"
            session.flush()
            savepoint.rollback()
        session.commit()
    assert (number, "kept") in shop.rows("shop-1", "users", "id, name")


def test_rollback_undoes_every_shard(shop: Shop) -> None:
    with shop.session() as session:
        session.add_all([User(id=number, name="x") for number in range(20)])
        session.flush()
        session.rollback()
    assert not any(shop.where("users").values())


# --- reading


def test_get_asks_one_shard_and_then_none(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    with shop.session() as session:
        for shard, ids in users.items():
            with sent.expected(shard):
                user = session.get_one(User, ids[0])
            assert user.name == f"user {ids[0]}"
            with sent.expected():
                assert session.get(User, ids[0]) is user
                assert session.get(User, {"id": ids[0]}) is user


def test_get_of_nothing_is_none(shop: Shop) -> None:
    with shop.session() as session:
        assert session.get(User, 12345) is None
        assert session.get(Order, 12345) is None
        assert session.get(Country, "xx") is None


def test_get_by_a_primary_key_without_the_shard_key_asks_everywhere(
    shop: Shop, users: dict[str, list[int]], sent: Sent
) -> None:
    number = users["shop-1"][0] * 10
    with shop.session() as session:
        with sent.expected(*SHARDS):
            order = session.get_one(Order, number)
        assert order.item == f"item {number}"
        with sent.expected():
            assert session.get(Order, number) is order


def test_get_that_finds_two_rows_raises(shop: Shop, users: dict[str, list[int]]) -> None:
    for shard in ("shop-0", "shop-2"):
        shop.execute(
            shop.masters[shard],
            f"INSERT INTO orders (id, user_id, item, amount) VALUES (7, {users[shard][0]}, 'twice', 1)",
        )
    with shop.session() as session:
        with pytest.raises(MultipleResultsFound):
            session.get(Order, 7)
        both = session.scalars(select(Order).where(Order.id == 7)).all()
        assert len({id(order) for order in both}) == 2
        with pytest.raises(MultipleResultsFound, match="does not hold the shard key"):
            session.get(Order, 7)


def test_a_keyed_select_asks_one_shard(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    number = users["shop-2"][1]
    with shop.session() as session:
        with sent.expected("shop-2"):
            assert session.scalars(select(User).where(User.id == number)).one().id == number
        with sent.expected("shop-2"):
            rows = session.execute(select(Order.item, Order.amount).where(Order.user_id == number)).all()
        assert len(rows) == 2
        with sent.expected("shop-2"):
            assert session.scalar(select(func.count()).select_from(Order).where(Order.user_id == number)) == 2


def test_in_over_several_keys_asks_their_shards_only(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    wanted = users["shop-0"][:2] + users["shop-1"][:1]
    with shop.session() as session, sent.expected("shop-0", "shop-1"):
        found = session.scalars(select(User).where(User.id.in_(wanted))).all()
    assert sorted(user.id for user in found) == sorted(wanted)


def test_order_by_and_limit_over_all_shards(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    everyone = sorted(number for ids in users.values() for number in ids)
    with shop.session() as session:
        with sent.expected(*SHARDS):
            found = session.scalars(select(User).order_by(User.id.desc()).limit(4)).all()
        assert [user.id for user in found] == everyone[::-1][:4]
        rows = session.execute(select(User.name).order_by(User.age, User.id).offset(2).limit(3)).all()
        expected = sorted(everyone, key=lambda number: (number % 5, number))[2:5]
        assert [name for (name,) in rows] == [f"user {number}" for number in expected]


def test_counts_and_sums_over_all_shards(shop: Shop, users: dict[str, list[int]]) -> None:
    orders = [number * 10 + extra for ids in users.values() for number in ids for extra in (0, 1)]
    with shop.session() as session:
        assert session.scalar(select(func.count()).select_from(User)) == 9
        assert session.scalar(select(func.count(Order.id))) == 18
        assert session.scalar(select(func.sum(Order.amount))) == sum(number % 7 for number in orders)
        assert session.execute(select(func.min(Order.id), func.max(Order.id))).one() == (min(orders), max(orders))
        assert session.query(User).count() == 9


def test_results_behave_as_sqlalchemys(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = sorted(number for ids in users.values() for number in ids)
    with shop.session() as session:
        result = session.execute(select(User.id, User.name.label("called")).order_by(User.id))
        assert list(result.keys()) == ["id", "called"]
        first = result.first()
        assert first is not None
        assert (first.id, first.called, first._mapping[User.id]) == (everyone[0], f"user {everyone[0]}", everyone[0])
        assert session.scalars(select(User.id).order_by(User.id)).all() == everyone
        assert [row.User.id for row in session.execute(select(User).order_by(User.id))] == everyone
        assert session.execute(select(User.age).distinct()).unique().all()
        both = session.execute(select(User, Order).join(Order, Order.user_id == User.id).order_by(Order.id)).all()
        assert len(both) == 18
        assert all(order.user_id == user.id for user, order in both)
        assert session.query(User).order_by(User.id).first() is session.get(User, everyone[0])
        with pytest.raises(MultipleResultsFound):
            session.scalars(select(User)).one()


def test_a_contradiction_sends_nothing(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    with shop.session() as session, sent.expected():
        assert session.scalars(select(User).where(User.id == 1, User.id == 2)).all() == []
        assert session.execute(select(User.id, User.name).where(User.id.in_([]))).all() == []
        assert session.query(User).filter(User.id == 1, User.id == 2).first() is None


def test_the_same_row_is_the_same_object_however_it_is_found(shop: Shop, users: dict[str, list[int]]) -> None:
    number = users["shop-1"][0]
    with shop.session() as session:
        user = session.get(User, number)
        assert session.scalars(select(User).where(User.id == number)).one() is user
        assert user in session.scalars(select(User)).all()
        assert session.scalars(select(User).where(User.id.in_([number]))).one() is user
        assert session.scalars(select(Order).where(Order.user_id == number)).first().user is user  # type: ignore[union-attr]


# --- objects and what belongs to them


def test_refresh_expire_and_deferred_stay_on_the_objects_shard(
    shop: Shop, users: dict[str, list[int]], sent: Sent
) -> None:
    number = users["shop-1"][0]
    with shop.session() as session:
        order = session.get_one(Order, number * 10)
        user = session.get_one(User, number)
        with sent.expected("shop-1"):
            session.refresh(order)
        session.commit()
        with sent.expected("shop-1"):
            assert order.item == f"item {number * 10}"
        session.expire(user)
        with sent.expected("shop-1"):
            assert user.name == f"user {number}"
        with sent.expected("shop-1"):
            assert user.bio is None


def test_lazy_loads_by_the_shared_key_ask_one_shard(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    number = users["shop-2"][0]
    with shop.session() as session:
        user = session.get_one(User, number)
        with sent.expected("shop-2"):
            assert [order.id for order in user.orders] == [number * 10, number * 10 + 1]
        with sent.expected():
            assert user.orders[0].user is user


def test_a_related_object_on_another_shard_is_found_there(shop: Shop, users: dict[str, list[int]]) -> None:
    """The parent's shard is not where its relatives are, unless the join says so."""
    sender, recipient = users["shop-0"][0], users["shop-1"][0]
    shop.execute(shop.masters["shop-0"], f"INSERT INTO messages VALUES (1, {sender}, {recipient}, 'hi')")
    with shop.session() as session:
        message = session.get_one(Message, 1)
        assert (message.sender.id, message.recipient.id) == (sender, recipient)
    handled = shop.sessions()
    event.listen(handled, "do_orm_execute", lambda _: None)
    for factory, loader in itertools.product((shop.sessions(), handled), (selectinload, immediateload)):
        with factory() as session:
            message = session.scalars(select(Message).options(loader(Message.recipient), loader(Message.sender))).one()
            assert sa.inspect(message).dict["recipient"].id == recipient
            assert sa.inspect(message).dict["sender"].id == sender


def test_a_joined_load_to_another_shard_is_refused_rather_than_wrong(shop: Shop, users: dict[str, list[int]]) -> None:
    sender, recipient = users["shop-0"][0], users["shop-1"][0]
    shop.execute(shop.masters["shop-0"], f"INSERT INTO messages VALUES (1, {sender}, {recipient}, 'hi')")
    with shop.session() as session, pytest.raises(RoutingError):
        session.scalars(select(Message).where(Message.sender_id == sender).options(joinedload(Message.recipient))).one()


def test_eager_loads_over_all_shards(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = sorted(number for ids in users.values() for number in ids)
    for loader in (selectinload, joinedload):
        with shop.session() as session:
            statement = select(User).options(loader(User.orders)).order_by(User.id)
            found = session.scalars(statement).unique().all()
            assert [user.id for user in found] == everyone
            assert all([order.id for order in user.orders] == [user.id * 10, user.id * 10 + 1] for user in found)


def test_a_joined_collection_still_asks_for_unique(shop: Shop, users: dict[str, list[int]]) -> None:
    with shop.session() as session, pytest.raises(InvalidRequestError, match="unique"):
        session.scalars(select(User).options(joinedload(User.orders))).all()


def test_reference_rows_are_loaded_from_any_shard(shop: Shop, users: dict[str, list[int]]) -> None:
    with shop.session() as session:
        orders = session.scalars(select(Order).options(selectinload(Order.country))).all()
        assert {order.country.name for order in orders if order.country is not None} == {"Korea"}
        assert len({id(order.country) for order in orders}) == 1


# --- options


def test_a_statement_can_be_pinned_to_a_shard_or_a_key(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    with shop.session() as session:
        with sent.expected("shop-1"):
            found = session.scalars(select(User), execution_options={"shardkit_shard": "shop-1"}).all()
        assert {user.id for user in found} == set(users["shop-1"])
        number = users["shop-2"][0]
        with sent.expected("shop-2"):
            session.scalars(select(User).execution_options(shardkit_key={"id": number})).all()
    with shop.sessions(execution_options={"shardkit_shard": "shop-0"})() as session, sent.expected("shop-0"):
        assert session.scalar(select(func.count()).select_from(User)) == 3


def test_options_of_the_wrong_kind_are_refused(sqlite_shop: Shop) -> None:
    for options in (
        {"shardkit_shard": 5},
        {"shardkit_key": 5},
        {"shardkit_scatter": "yes"},
        {"shardkit_read_from": "slave"},
        {"shardkit_shard": "shop-9"},
    ):
        with sqlite_shop.session() as session, pytest.raises((RoutingError, UnknownTable)):
            session.execute(select(User).where(User.id == 1), execution_options=options)


def test_text_needs_a_shard(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    statement = sa.text("SELECT count(*) FROM users /* by hand */")
    with shop.session() as session:
        with sent.expected("shop-1"):
            assert session.scalar(statement, execution_options={"shardkit_shard": "shop-1"}) == 3
        with sent.expected(), pytest.raises(RoutingError):
            session.execute(statement)


def test_scatter_can_be_refused_or_warned_about(shop: Shop, users: dict[str, list[int]], sent: Sent) -> None:
    with shop.session(scatter="refuse") as session:
        with sent.expected(), pytest.raises(ScatterRefused):
            session.scalars(select(User)).all()
        assert len(session.scalars(select(User), execution_options={"shardkit_scatter": True}).all()) == 9
        assert session.get(User, users["shop-0"][0]) is not None
    with shop.session() as session, sent.expected(), pytest.raises(ScatterRefused):
        session.scalars(select(User), execution_options={"shardkit_scatter": False}).all()
    with shop.session(scatter="warn") as session, pytest.warns(shardkit.ScatterWarning):
        session.scalars(select(User)).all()
    with shop.session() as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        session.scalars(select(User)).all()


def test_connection_asks_which_shard(shop: Shop, users: dict[str, list[int]]) -> None:
    with shop.session() as session:
        with pytest.raises(RoutingError, match="which shard"):
            session.connection()
        connection = session.connection(bind_arguments={"shardkit_shard": "shop-1"})
        assert connection.scalar(sa.text("SELECT count(*) FROM users")) == 3
        number = users["shop-2"][0]
        connection = session.connection(bind_arguments={"mapper": User, "shardkit_key": {"id": number}})
        assert connection.scalar(sa.text(f"SELECT count(*) FROM users WHERE id = {number}")) == 1


def test_unknown_options_are_refused_when_the_factory_is_made(sqlite_shop: Shop) -> None:
    for options in (
        {"read_from": "slave"},
        {"transactions": "eventual"},
        {"scatter": "maybe"},
        {"bind": sqlite_shop.cluster.engine("shop-0")},
        {"twophase": True},
    ):
        with pytest.raises(ShardkitError):
            sqlite_shop.sessions(**options)


def test_factories_are_sqlalchemys(sqlite_shop: Shop) -> None:
    class Ours(sa.orm.Session):
        """An application's own session class."""

        def hello(self) -> str:
            return "hello"

    factory = shardkit.sessionmaker(sqlite_shop.cluster, class_=Ours, expire_on_commit=False)
    assert isinstance(factory, sa.orm.sessionmaker)
    with factory.begin() as session:
        assert isinstance(session, sa.orm.Session)
        assert session.hello() == "hello"  # type: ignore[attr-defined]
        session.add(User(id=1, name="one"))
    assert session.expire_on_commit is False
    scoped = sa.orm.scoped_session(factory)
    assert scoped.get(User, 1) is not None
    scoped.remove()


def test_event_handlers_may_change_a_statement_and_it_is_planned_afterwards(
    shop: Shop, users: dict[str, list[int]], sent: Sent
) -> None:
    number = users["shop-1"][0]
    factory = shop.sessions()

    def narrow(state: sa.orm.ORMExecuteState) -> None:
        if state.is_select and not state.is_column_load and not state.is_relationship_load:
            state.statement = state.statement.where(User.id == number)

    event.listen(factory, "do_orm_execute", narrow)
    with factory() as session:
        with sent.expected("shop-1"):
            assert session.scalars(select(User)).one().id == number
        with sent.expected("shop-1"):
            session.execute(update(User).where(User.id == number).values(name="through a handler"))
        with sent.expected("shop-1"):
            session.execute(insert(User), [{"id": shop.users_on("shop-1", 4)[3], "name": "x"}])
        session.commit()
    assert len(shop.rows("shop-1", "users")) == 4


# --- transactions


def test_under_single_a_second_written_shard_raises_and_rolls_back(shop: Shop) -> None:
    here, there = shop.users_on("shop-0", 1)[0], shop.users_on("shop-1", 1)[0]
    with shop.session(transactions="single") as session:
        session.execute(insert(User).values(id=here, name="x"))
        with pytest.raises(shardkit.errors.SecondShardWritten, match="shop-0, shop-1") as caught:
            session.execute(insert(User).values(id=there, name="x"))
        assert isinstance(caught.value, InvalidRequestError)
        with pytest.raises(PendingRollbackError):
            session.commit()
        session.rollback()
    with shop.session(transactions="single") as session:
        session.add_all([User(id=here, name="x"), User(id=there, name="x")])
        with pytest.raises(shardkit.errors.SecondShardWritten):
            session.commit()
    assert not any(shop.where("users").values())


def test_under_single_a_flush_over_two_shards_sends_nothing(shop: Shop, sent: Sent) -> None:
    ids = [shop.users_on(shard, 1)[0] for shard in SHARDS]
    with shop.session(transactions="single") as session, sent.expected():
        session.add_all([User(id=number, name="x") for number in ids])
        with pytest.raises(shardkit.errors.SecondShardWritten):
            session.flush()


def test_under_single_reading_and_touching_other_shards_is_free(shop: Shop, users: dict[str, list[int]]) -> None:
    with shop.session(transactions="single") as session:
        other = session.get_one(User, users["shop-1"][0])
        session.scalars(select(User)).all()
        other.name = str(other.name)  # assigned, not changed
        session.get_one(User, users["shop-0"][0]).name = "new"
        session.commit()
    assert (users["shop-0"][0], "new") in shop.rows("shop-0", "users", "id, name")


def test_reference_tables_need_more_than_a_single_shard(shop: Shop, sent: Sent) -> None:
    with shop.session(transactions="single") as session, sent.expected():
        session.add(Country(code="kr", name="Korea"))
        with pytest.raises(shardkit.errors.SecondShardWritten, match="best_effort"):
            session.flush()


def test_a_partial_commit_says_what_is_durable(server_shop: Shop) -> None:
    here, there = server_shop.users_on("shop-0", 1)[0], server_shop.users_on("shop-1", 1)[0]
    with server_shop.session() as session:
        session.execute(insert(User).values(id=here, name="x"))
        session.execute(insert(User).values(id=there, name="x"))
        connection = session.connection(bind_arguments={"shardkit_shard": "shop-1"})
        number = connection.connection.driver_connection.thread_id()  # type: ignore[union-attr]
        server_shop.execute(server_shop.masters["shop-0"], f"KILL {number}")
        with pytest.raises(shardkit.errors.PartialCommit) as caught:
            session.commit()
        assert caught.value.committed == ("shop-0",)
        assert list(caught.value.failed) == ["shop-1"]
        session.rollback()
        assert session.get(User, here) is not None
    assert server_shop.where("users") == {"shop-0": [here], "shop-1": [], "shop-2": []}


def test_a_first_commit_that_fails_rolls_the_others_back(server_shop: Shop) -> None:
    here, there = server_shop.users_on("shop-0", 1)[0], server_shop.users_on("shop-1", 1)[0]
    with server_shop.session() as session:
        session.execute(insert(User).values(id=here, name="x"))
        connection = session.connection(bind_arguments={"shardkit_shard": "shop-0"})
        number = connection.connection.driver_connection.thread_id()  # type: ignore[union-attr]
        session.execute(insert(User).values(id=there, name="x"))
        server_shop.execute(server_shop.masters["shop-1"], f"KILL {number}")
        with pytest.raises(shardkit.errors.CommitUnknown, match="shop-0"):
            session.commit()
    assert not any(server_shop.where("users").values())


def test_a_failed_shard_fails_the_whole_statement_and_keeps_no_connection(server_shop: Shop) -> None:
    with server_shop.session() as session:
        session.scalars(select(User)).all()
        connection = session.connection(bind_arguments={"shardkit_shard": "shop-1"})
        number = connection.connection.driver_connection.thread_id()  # type: ignore[union-attr]
        server_shop.execute(server_shop.masters["shop-0"], f"KILL {number}")
        with pytest.raises(sa.exc.OperationalError, match="shop-1"):
            session.scalars(select(User)).all()
    pools: list[Any] = [server_shop.cluster.engine(shard).pool for shard in SHARDS]
    assert [pool.checkedout() for pool in pools] == [0, 0, 0]


def test_shards_are_asked_at_the_same_time(distant_shop: DistantShop) -> None:
    """Three shards, each 0.2 s away, answer in less time than two of them would one after the other."""
    with distant_shop.session() as session:
        session.execute(select(User.id)).all()
        distant_shop.go_far()
        began = time.monotonic()
        assert session.execute(select(User.id)).all() == []
        assert 0.2 <= time.monotonic() - began < 0.4


def test_connections_go_back_after_every_kind_of_end(shop: Shop, users: dict[str, list[int]]) -> None:
    pools: list[Any] = [shop.cluster.engine(shard).pool for shard in SHARDS]
    for end in ("commit", "rollback", "close"):
        session = shop.session()
        session.scalars(select(User)).all()
        getattr(session, end)()
        assert [pool.checkedout() for pool in pools] == [0, 0, 0]
        session.close()
    session = shop.session()
    session.scalars(select(User)).all()
    del session
    gc.collect()
    assert shop.cluster._snapshots._holds == {}


# --- more ways to write and to read


def test_orm_updates_by_primary_key_reach_their_rows(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = [number for ids in users.values() for number in ids]
    with shop.session() as session:
        loaded = session.get_one(User, everyone[0])
        session.execute(update(User), [{"id": number, "name": f"new {number}"} for number in everyone])
        assert loaded.name == f"new {everyone[0]}"
        session.commit()
    for shard, ids in users.items():
        assert shop.rows(shard, "users", "id, name") == sorted((number, f"new {number}") for number in ids)


@pytest.mark.parametrize("synchronize", ["fetch", "evaluate", False])
def test_synchronization_over_several_shards(shop: Shop, users: dict[str, list[int]], synchronize: str | bool) -> None:
    wanted = [users["shop-0"][0], users["shop-2"][0]]
    options = {"synchronize_session": synchronize}
    with shop.session() as session:
        loaded = {number: session.get_one(User, number) for ids in users.values() for number in ids}
        session.execute(update(User).where(User.id.in_(wanted)).values(name="new"), execution_options=options)
        if synchronize:
            assert {number for number, user in loaded.items() if sa.inspect(user).dict.get("name") == "new"} == set(
                wanted
            )
        session.execute(delete(Order).where(Order.user_id.in_(wanted)), execution_options=options)
        session.commit()
    assert len(shop.rows("shop-0", "orders")) == 4
    assert {name for rows in shop.where("users", "id, name").values() for number, name in rows if number in wanted} == {
        "new"
    }


def test_rows_returned_by_inserts_over_several_shards(shop: Shop) -> None:
    if shop.kind == "server" and FLAVOUR == "mysql":
        pytest.skip("MySQL has no RETURNING")
    rows = [{"id": number, "name": f"user {number}"} for number in range(12)]
    with shop.session() as session:
        found = session.scalars(insert(User).returning(User), rows).all()
        assert sorted((user.id, user.name) for user in found) == [(row["id"], row["name"]) for row in rows]
        assert all(sa.inspect(user).identity_key[2] == shop.shard_of(user.id) for user in found)
        session.commit()


def test_legacy_query_writes(shop: Shop, users: dict[str, list[int]]) -> None:
    number = users["shop-1"][0]
    with shop.session() as session:
        assert session.query(User).filter(User.id == number).update({"name": "new"}) == 1
        both = [number, users["shop-0"][0]]
        assert session.query(Order).filter(Order.user_id.in_(both)).delete() == 4
        assert session.query(User).filter_by(id=number).one().name == "new"
        assert {user.id for user in session.query(User).filter(User.id.in_(both))} == set(both)
        assert session.query(User).count() == 9
        assert session.query(User.name).order_by(User.id).limit(2).all()
        assert str(session.query(User)).startswith("SELECT")
        session.rollback()


def test_rows_are_read_in_parts(shop: Shop, users: dict[str, list[int]]) -> None:
    everyone = sorted(number for ids in users.values() for number in ids)
    with shop.session() as session:
        result = session.execute(select(User).order_by(User.id).execution_options(yield_per=2))
        assert [[user.id for (user,) in part] for part in result.partitions()] == [
            everyone[start : start + 2] for start in range(0, 9, 2)
        ]
        with session.scalars(select(User.id).order_by(User.id).execution_options(stream_results=True)) as numbers:
            assert list(numbers) == everyone
        assert session.scalars(select(User.id).order_by(User.id)).fetchmany(3) == everyone[:3]


def test_upserts_land_on_the_shard_of_their_key(shop: Shop, users: dict[str, list[int]]) -> None:
    rows = [{"id": ids[0], "name": "again"} for ids in users.values()]
    statement: Any
    if shop.kind == "sqlite":
        plain = sqlite.insert(User)
        statement = plain.on_conflict_do_update(index_elements=["id"], set_={"name": plain.excluded.name})
    else:
        other = mysql.insert(User)
        statement = other.on_duplicate_key_update(name=other.inserted.name)
    with shop.session() as session:
        session.execute(statement, rows)
        session.commit()
    for shard, ids in users.items():
        assert (ids[0], "again") in shop.rows(shard, "users", "id, name")
        assert len(shop.rows(shard, "users")) == 3


def test_unique_is_given_the_objects(shop: Shop) -> None:
    ids = [number for shard in SHARDS for number in shop.users_on(shard, 2)]
    with shop.session() as session:
        session.add_all([User(id=number, name=f"u{number % 2}") for number in ids])
        session.commit()
        for users in (select(User), select(User).order_by(User.id)):
            assert len(session.scalars(users).unique(lambda user: user.name).all()) == len({n % 2 for n in ids})
            assert {row.User.id for row in session.execute(users)} == set(ids)
        tuples = session.query(User).order_by(User.id).only_return_tuples(True).all()
        assert [user.id for (user,) in tuples] == sorted(ids)


def test_columns_of_a_union_are_called_as_by_one_database(shop: Shop) -> None:
    ids = [number for shard in SHARDS for number in shop.users_on(shard, 1)]
    union = union_all(select(User.id + 1, -User.id, User.id * 2), select(User.id, User.id, User.id))
    with shop.session() as session:
        session.add_all([User(id=number, name="u") for number in ids])
        session.commit()
        one = session.execute(union, execution_options={"shardkit_shard": "shop-1"})
        over = session.execute(union)
        assert list(over.keys()) == list(one.keys())
        assert len(over.all()) == 2 * len(ids)
