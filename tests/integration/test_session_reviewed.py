"""Writes that a hostile reader found lost, doubled or misplaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event, func, insert, inspect, select, text, update
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    contains_eager,
    foreign,
    immediateload,
    joinedload,
    lazyload,
    make_transient_to_detached,
    mapped_column,
    object_session,
    relationship,
    selectinload,
    subqueryload,
    undefer,
    with_loader_criteria,
)

import shardkit
from shardkit.cluster import Cluster
from shardkit.errors import KeyChange, RoutingError, SecondShardWritten, TransactionError
from shardkit.session.homes import home_of
from shardkit.shardmap import ShardMap
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, Country, Invoice, Message, Note, Order, User


@pytest.fixture
def users(shop: Shop) -> dict[str, int]:
    """A user with an order on each shard, and a country."""
    found = {shard: shop.users_on(shard, 1)[0] for shard in SHARDS}
    with shop.session() as session:
        for number, user in enumerate(found.values(), 1):
            session.add(User(id=user, name=f"u{user}", orders=[Order(id=number, item="i", country_code="kr")]))
        session.add(Country(code="kr", name="Korea"))
        session.commit()
    return found


# --- statements over several shards -------------------------------------------------------------------------------


def test_half_a_statement_is_not_committed(shop: Shop, users: dict[str, int]) -> None:
    one, other = users["shop-0"], users["shop-1"]
    rows = [{"id": 50, "user_id": one, "item": "new"}, {"id": 2, "user_id": other, "item": "taken"}]
    with shop.session() as session:
        with pytest.raises(IntegrityError):
            session.execute(insert(Order.__table__), rows)
        with pytest.raises(PendingRollbackError):
            session.commit()
        session.rollback()
    assert shop.where("orders") == {"shop-0": [1], "shop-1": [2], "shop-2": [3]}


def test_a_handler_that_changes_a_key_is_found_out(shop: Shop, users: dict[str, int]) -> None:
    here, elsewhere = users["shop-0"], users["shop-1"]
    with shop.session() as session:
        session.add(Message(id=1, sender_id=here, recipient_id=here, text="t"))
        session.commit()

    def change(_mapper: Any, _connection: Any, message: Message) -> None:
        message.sender_id = elsewhere

    event.listen(Message, "before_update", change)
    try:
        with shop.session() as session:
            message = session.scalars(select(Message).where(Message.sender_id == here)).one()
            message.text = "changed"
            with pytest.raises(KeyChange):
                session.commit()
    finally:
        event.remove(Message, "before_update", change)
    assert shop.rows("shop-0", "messages", "id, sender_id, text") == [(1, here, "t")]


# --- objects ------------------------------------------------------------------------------------------------------


def test_a_reference_row_is_one_object(shop: Shop, users: dict[str, int]) -> None:
    with shop.session() as session:
        orders = session.scalars(select(Order).options(joinedload(Order.country))).all()
        countries = {id(order.country) for order in orders}
        assert len(orders) == 3
        assert len(countries) == 1
        country = session.scalars(select(Country)).one()
        assert {id(country)} == countries
        assert session.get(Country, "kr") is country
        country.name += "!"
        session.flush()
        orders[2].country.name += "!"
        session.commit()
    assert shop.where("countries", "name") == {shard: ["Korea!!"] for shard in SHARDS}
    with shop.session() as session:
        country = session.get_one(Country, "kr")
        session.scalars(select(Order).options(joinedload(Order.country))).all()
        session.delete(country)
        session.flush()
        assert session.get(Country, "kr") is None
        session.commit()
    assert shop.where("countries", "name") == {shard: [] for shard in SHARDS}


def test_a_row_of_a_whole_table_is_one_object(shop: Shop) -> None:
    with shop.session() as session:
        session.add(Invoice(id=1, total=1))
        session.commit()
        invoice = session.get_one(Invoice, 1)
        assert session.scalars(select(Invoice)).one() is invoice
        assert inspect(invoice).identity_token == "shop-2"


def test_a_row_that_is_deleted_and_added_again_in_one_flush(shop: Shop) -> None:
    (number,) = shop.users_on("shop-1", 1)
    with shop.session() as session:
        session.add(User(id=number, name="old", age=3))
        session.commit()
        session.delete(session.get_one(User, number))
        session.add(User(id=number, name="new"))
        session.commit()
    assert shop.rows("shop-1", "users", "id, name") == [(number, "new")]


# --- moves --------------------------------------------------------------------------------------------------------


def test_a_move_that_is_taken_back_leaves_the_object_where_it_was(shop: Shop, users: dict[str, int]) -> None:
    (new,) = shop.users_on("shop-1", 2)[1:]
    with shop.session() as session:
        order = session.scalars(select(Order).where(Order.user_id == users["shop-0"])).one()
        session.move(order, users["shop-1"])
        session.rollback()
        order.item = "x"
        session.commit()
        session.delete(order)
        session.commit()
    assert shop.where("orders")["shop-0"] == []
    assert new not in shop.where("users")["shop-1"]


def test_only_the_object_that_is_moved_is_renamed(shop: Shop, users: dict[str, int]) -> None:
    """Orders of two users may have one id: the primary key does not hold the shard key."""
    with shop.session() as session:
        session.execute(insert(Order.__table__), {"id": 1, "user_id": users["shop-1"], "item": "other"})
        session.commit()
        mine = session.scalars(select(Order).where(Order.user_id == users["shop-0"])).one()
        other = session.scalars(select(Order).where(Order.user_id == users["shop-1"], Order.id == 1)).one()
        session.move(mine, users["shop-2"])
        other.item = "changed"
        session.commit()
    assert (1, users["shop-1"], "changed") in shop.rows("shop-1", "orders", "id, user_id, item")
    assert (1, users["shop-2"], "i") in shop.rows("shop-2", "orders", "id, user_id, item")


class Base(DeclarativeBase):
    """Tables with what a move may lose."""


class Page(Base):
    __tablename__ = "pages"
    owner: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    data: Mapped[Any] = mapped_column(sa.JSON(none_as_null=False), nullable=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    __mapper_args__ = {  # noqa: RUF012
        "primary_key": [number, owner],
        "polymorphic_on": kind,
        "polymorphic_identity": "page",
    }


class Album(Page):
    __mapper_args__ = {"polymorphic_identity": "album"}  # noqa: RUF012
    pictures: Mapped[list[Picture]] = relationship(
        primaryjoin="and_(foreign(Picture.owner) == Album.owner, foreign(Picture.page) == Album.number)"
    )


class Picture(Base):
    __tablename__ = "pictures"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    owner: Mapped[int] = mapped_column(sa.BigInteger)
    page: Mapped[int] = mapped_column(sa.BigInteger)


class Comment(Base):
    """Points at pages, which know nothing of it."""

    __tablename__ = "comments"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    owner: Mapped[int] = mapped_column(sa.BigInteger)
    page: Mapped[int] = mapped_column(sa.BigInteger)
    __table_args__ = (sa.ForeignKeyConstraint(["owner", "page"], ["pages.owner", "pages.number"], ondelete="CASCADE"),)


@pytest.fixture
def pages(shop: Shop) -> Iterator[Cluster]:
    cluster = shop.open(
        ShardMap.parse(
            {
                "format": 1,
                "cluster": "pages",
                "keyspaces": {
                    "pages": {
                        "partition": {"by": "range", "buckets": {"low": [None, 100], "high": [100, None]}},
                        "tables": dict.fromkeys(
                            ("pages", "pictures", "comments", "tickets", "seats", "shelves"), "owner"
                        ),
                        "reference": ["rates"],
                        "placement": {"shop-0": ["low"], "shop-1": ["high"]},
                    }
                },
                "shards": {shard: {"master": shop.masters[shard].url} for shard in SHARDS[:2]},
            }
        )
    )
    cluster.create_all(Base.metadata)
    yield cluster
    cluster.drop_all(Base.metadata)


def session_of(cluster: Cluster) -> Session:
    made: Session = shardkit.sessionmaker(cluster, transactions="best_effort")()
    return made


def test_a_move_takes_along_what_belongs_to_a_subclass_and_changes_no_value(shop: Shop, pages: Cluster) -> None:
    with session_of(pages) as session:
        session.add(Album(owner=5, number=1, data=None, pictures=[Picture(id=1)]))
        session.add(Page(owner=1, number=5, data={"a": None}))
        session.commit()
    shop.execute(shop.masters["shop-0"], "UPDATE pages SET data = NULL WHERE owner = 5")
    with session_of(pages) as session:
        session.move(session.get_one(Page, (1, 5)), 105)
        session.commit()
    assert shop.rows("shop-1", "pages", "owner, number, data, kind") == [(105, 1, None, "album")]
    assert shop.rows("shop-1", "pictures", "id, owner, page") == [(1, 105, 1)]
    assert shop.rows("shop-0", "pages", "owner, number") == [(1, 5)]


def test_rows_that_would_go_with_the_old_row_are_not_lost(shop: Shop, pages: Cluster) -> None:
    with session_of(pages) as session:
        session.add(Page(owner=5, number=1))
        session.flush()
        session.add(Comment(id=1, owner=5, page=1))
        session.commit()
        with pytest.raises(RoutingError, match="rows of comments point at rows of pages"):
            session.move(session.get_one(Page, (1, 5)), 105)
        session.commit()
    assert shop.rows("shop-0", "comments", "id") == [(1,)]
    assert shop.rows("shop-0", "pages", "owner") == [(5,)]


# --- rows whose key is not what it seems --------------------------------------------------------------------------


class Ticket(Base):
    """Its attributes are called like each other's columns, and its key has a default."""

    __tablename__ = "tickets"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    tenant: Mapped[int | None] = mapped_column("owner", sa.BigInteger, default=105)
    owner: Mapped[int | None] = mapped_column("seller", sa.BigInteger)


class Seat(Base):
    """The default of its key is the server's."""

    __tablename__ = "seats"
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    owner: Mapped[int | None] = mapped_column(sa.BigInteger, server_default="105")


class Rate(Base):
    """A reference table with a default that Python computes."""

    __tablename__ = "rates"
    code: Mapped[str] = mapped_column(sa.String(3), primary_key=True)
    percent: Mapped[int | None] = mapped_column(default=lambda: 7)


shelves = sa.Table(
    "shelves",
    Base.metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("owner", sa.BigInteger, primary_key=True, autoincrement=False, key="tenant"),
    sa.Column("books", sa.Integer),
)


def on_shards(shop: Shop, table: str, columns: str) -> list[Any]:
    return [shop.rows(shard, table, columns) for shard in SHARDS[:2]]


def test_rows_of_the_orm_are_known_by_their_attributes(shop: Shop, pages: Cluster) -> None:
    """What only the column is called is another attribute here: the row has no key but its default."""
    with session_of(pages) as session:
        session.execute(insert(Ticket), [{"id": 1, "owner": 5}, {"id": 2, "tenant": 5, "owner": 105}])
        session.commit()
    assert on_shards(shop, "tickets", "id, owner, seller") == [[(2, 5, 105)], [(1, 105, 5)]]


@pytest.mark.parametrize("how", ["execute", "one", "mappings", "objects", "flush"])
def test_none_is_left_to_a_keys_default_where_the_orm_leaves_it(shop: Shop, pages: Cluster, how: str) -> None:
    rows = [{"id": 1, "tenant": None}, {"id": 2, "tenant": 5}, {"id": 3}]

    def write(session: Session, model: Any, rows: Any) -> None:
        match how:
            case "execute":
                session.execute(insert(model), rows)
            case "one":
                for row in rows:
                    session.execute(insert(model), row)
            case "mappings":
                session.bulk_insert_mappings(model, rows)
            case "objects":
                session.bulk_save_objects([model(**row) for row in rows])
            case _:
                session.add_all([model(**row) for row in rows])
                session.flush()

    with session_of(pages) as session:
        write(session, Ticket, rows)
        session.commit()
        with pytest.raises(RoutingError, match="no value for its key"):
            write(session, Seat, [{"id": 1, "owner": None}])
    assert on_shards(shop, "tickets", "id, owner") == [[(2, 5)], [(1, 105), (3, 105)]]


def test_none_is_a_key_where_it_is_sent(shop: Shop, pages: Cluster) -> None:
    with session_of(pages) as session:
        session.execute(insert(Ticket).values(id=1, tenant=None))
        session.execute(insert(Ticket), [{"id": 2, "tenant": None}], execution_options={"render_nulls": True})
        session.execute(insert(Ticket.__table__), [{"id": 3, "owner": None}])
        session.bulk_insert_mappings(Ticket, [{"id": 4, "tenant": None}], render_nulls=True)
        session.commit()
    assert on_shards(shop, "tickets", "id, owner") == [[(1, None), (2, None), (3, None), (4, None)], []]


@pytest.mark.parametrize("given", [sa.bindparam("chosen"), sa.null()], ids=["parameter", "null"])
def test_a_parameter_does_not_move_what_the_statement_says_itself(shop: Shop, pages: Cluster, given: Any) -> None:
    statement = insert(Ticket.__table__).values(owner=given)
    with session_of(pages) as session:
        session.execute(statement, {"id": 1, "chosen": 5, "owner": 105})
        session.execute(statement, [{"id": 2, "chosen": 5, "owner": 105}, {"id": 3, "chosen": 6, "owner": 105}])
        session.commit()
    first, second = on_shards(shop, "tickets", "id")
    assert (first, second) == ([(1,), (2,), (3,)], [])


def test_an_upsert_of_a_key_by_its_columns_other_name_is_refused(shop: Shop, pages: Cluster) -> None:
    values = {"id": 1, "tenant": 5, "books": 1}
    if shop.kind == "sqlite":
        one = sqlite.insert(shelves).values(values)
        changes = [one.on_conflict_do_update(index_elements=["id", "owner"], set_={name: 105}) for name in ("tenant",)]
    else:
        other = mysql.insert(shelves).values(values)
        changes = [other.on_duplicate_key_update(tenant=105), other.on_duplicate_key_update([("tenant", 105)])]
    with session_of(pages) as session:
        session.execute(insert(shelves), values)
        session.commit()
        for change in changes:
            with pytest.raises(KeyChange):
                session.execute(change)
    assert on_shards(shop, "shelves", "id, owner") == [[(1, 5)], []]


def test_a_reference_table_gets_the_values_that_the_statement_says(shop: Shop, pages: Cluster) -> None:
    with session_of(pages) as session:
        session.execute(insert(Rate).values(code="a", percent=None))
        session.execute(insert(Rate).values(percent=3), [{"code": "b"}])
        session.execute(insert(Rate), [{"code": "c"}, {"code": "d", "percent": None}, {"code": "e", "percent": 1}])
        session.commit()
    every = [("a", None), ("b", 3), ("c", 7), ("d", 7), ("e", 1)]
    assert on_shards(shop, "rates", "code, percent") == [every, every]


# --- ids, engines, statements that end transactions ---------------------------------------------------------------


@pytest.mark.parametrize("how", ["value", "rows", "null"])
def test_an_id_of_none_is_one_that_is_missing(shop: Shop, how: str) -> None:
    owners = [shop.users_on(shard, 1)[0] for shard in SHARDS[:2]]
    given: Any = sa.null() if how == "null" else None
    with shop.session() as session:
        if how == "rows":
            rows = [{"id": given, "owner_id": owner, "text": "t"} for owner in owners]
            session.execute(insert(Note.__table__).values(rows))
        else:
            for owner in owners:
                session.execute(insert(Note.__table__).values(id=given, owner_id=owner, text="t"))
        session.commit()
    ids = [number for numbers in shop.where("notes").values() for number in numbers]
    assert len(set(ids)) == 2
    assert min(ids) > 1_000_000


def test_engines_that_commit_each_statement_write_one_shard_only(server_shop: Shop) -> None:
    options = {**server_shop.options["engine_options"], "isolation_level": "AUTOCOMMIT"}
    cluster = server_shop.open(server_shop.map(), engine_options=options)
    one, other = server_shop.users_on("shop-0", 1)[0], server_shop.users_on("shop-1", 1)[0]
    with shardkit.sessionmaker(cluster)() as session:
        session.execute(insert(User), {"id": one, "name": "x"})
        with pytest.raises(SecondShardWritten, match="AUTOCOMMIT"):
            session.execute(insert(User), {"id": other, "name": "x"})
        session.rollback()
        assert len(session.scalars(select(User)).all()) == 1  # reading several is fine


@pytest.mark.parametrize("statement", ["ANALYZE TABLE users", "CREATE TABLE IF NOT EXISTS more (id INT)", "COMMIT"])
def test_nothing_is_committed_around_a_transaction_over_shards(server_shop: Shop, statement: str) -> None:
    one = server_shop.users_on("shop-0", 1)[0]
    with server_shop.session(transactions="atomic") as session:
        session.execute(insert(User), {"id": one, "name": "x"})
        with pytest.raises(TransactionError, match="commits before and after"):
            session.execute(text(statement), execution_options={"shardkit_shard": "shop-0"})
        session.rollback()
    assert server_shop.where("users")["shop-0"] == []


def test_a_function_that_writes_is_committed(server_shop: Shop) -> None:
    """Wherever it runs: on the first master that a transaction uses, or on a later one that otherwise only reads."""
    one, other = server_shop.users_on("shop-0", 1)[0], server_shop.users_on("shop-1", 1)[0]
    for shard, user in (("shop-0", one), ("shop-1", other)):
        server_shop.execute(server_shop.masters[shard], f"INSERT INTO users (id, name, age) VALUES ({user}, 'x', 0)")
        server_shop.execute(server_shop.masters[shard], "DROP FUNCTION IF EXISTS bump")
        server_shop.execute(
            server_shop.masters[shard],
            "CREATE FUNCTION bump() RETURNS INT MODIFIES SQL DATA DETERMINISTIC "
            "BEGIN UPDATE users SET age = age + 1; RETURN 1; END",
        )
    for first, then in (("shop-0", "shop-1"), ("shop-1", "shop-0")):
        with server_shop.session(transactions="atomic") as session:
            for shard in (first, then):
                session.execute(select(sa.func.bump()), execution_options={"shardkit_shard": shard}).all()
            session.commit()
    with server_shop.session(transactions="atomic") as session:
        session.execute(select(sa.func.bump()), execution_options={"shardkit_shard": "shop-0"}).all()
        session.execute(update(User).where(User.id == other).values(name="y"))
        session.commit()
    assert server_shop.rows("shop-0", "users", "age") == [(3,)]
    assert server_shop.rows("shop-1", "users", "age, name") == [(2, "y")]


def test_what_a_handler_of_the_end_raises_runs_nothing_again(shop: Shop) -> None:
    factory = shop.sessions(transactions="best_effort")
    (user,) = shop.users_on("shop-0", 1)

    def fail(_session: Any, transaction: Any) -> None:
        if transaction.parent is None:
            raise DBAPIError("INSERT INTO audit", {}, Exception(1213, "Deadlock"))

    @shardkit.retry(factory)
    def add(session: Session) -> None:
        session.add(User(id=user, name="once"))
        event.listen(session, "after_transaction_end", fail)

    with pytest.raises(DBAPIError):
        add()
    assert shop.rows("shop-0", "users", "name") == [("once",)]


def test_rows_of_a_reference_table_are_returned_as_objects(shop: Shop) -> None:
    """Many at once, which the ORM puts together from several statements."""
    if shop.kind == "server" and shop.cluster.view.planner.dialect_name == "mysql":
        pytest.skip("MySQL has no RETURNING")
    rows = [{"code": "kr", "name": "Korea"}, {"code": "de", "name": "Germany"}]
    with shop.session() as session:
        returned = session.scalars(insert(Country).returning(Country), rows).all()
        assert sorted((country.code, country.name) for country in returned) == [("de", "Germany"), ("kr", "Korea")]
        assert session.get(Country, "kr") in returned
        names = session.execute(insert(Country).returning(Country.name), [{"code": "fr", "name": "France"}])
        assert names.scalars().all() == ["France"]
        session.execute(insert(Country), [{"code": "it", "name": "Italy"}])
        session.commit()
    assert shop.where("countries", "code") == {shard: ["de", "fr", "it", "kr"] for shard in SHARDS}


def test_a_database_that_shards_of_one_server_share_is_not_asked_for_each_of_them(server_shop: Shop) -> None:
    """``schema_translate_map`` leads all of them to the same rows."""
    (user,) = server_shop.users_on("shop-0", 1)
    options = {"schema_translate_map": {None: server_shop.masters["shop-0"].database}}
    with server_shop.session() as session:
        session.add(User(id=user, name="u"))
        session.commit()
        for statement in (select(User.id), insert(Country).values(code="kr", name="Korea")):
            with pytest.raises(RoutingError, match="share"):
                session.execute(statement, execution_options=options)
        found = session.scalars(select(User.id), execution_options={**options, "shardkit_shard": "shop-1"})
        assert found.all() == [user]
        assert session.scalars(select(User.id).where(User.id == user), execution_options=options).all() == [user]
        options = {"schema_translate_map": {None: None, "elsewhere": "other"}}  # not these tables
        assert session.scalars(select(User.id), execution_options=options).all() == [user]


def by_hand(order: int, **values: Any) -> Order:
    """An object that stands for a row which is said to be there."""
    made = Order(id=order, **values)
    make_transient_to_detached(made)
    return made


def test_an_object_that_was_never_loaded_is_written_where_its_row_stands(shop: Shop, users: dict[str, int]) -> None:
    """The fixture's orders are 1 to 3, one on each shard."""
    with shop.session() as session:
        changed, gone = by_hand(2), by_hand(3, user_id=users["shop-2"])
        session.add_all([changed, gone])
        changed.item = "new"
        session.delete(gone)
        session.commit()
        assert (changed.user_id, changed.item) == (users["shop-1"], "new")
    assert shop.where("orders", "id, item") == {"shop-0": [(1, "i")], "shop-1": [(2, "new")], "shop-2": []}


def test_an_object_that_was_never_loaded_has_to_have_a_row(shop: Shop, users: dict[str, int]) -> None:
    with shop.session() as session:
        known = session.get_one(Order, 2)
        for number, said in ((7, "is on no shard"), (2, "is in this session already")):
            made = by_hand(number)
            session.add(made)
            made.item = "new"
            with pytest.raises(RoutingError, match=said):
                session.flush()
            session.rollback()
            session.expunge(made)
            assert known.item == "i"


def test_a_bulk_update_of_a_reference_table_is_refused_for_what_it_is(shop: Shop) -> None:
    with shop.session() as session, pytest.raises(RoutingError, match="stands on every shard"):
        session.execute(update(Country), [{"code": "kr", "name": "Korea"}])


def test_a_connection_that_renames_schemas_is_not_asked_for_each_shard_of_its_server(server_shop: Shop) -> None:
    renamed = {"schema_translate_map": {None: server_shop.masters["shop-0"].database}}
    (user,) = server_shop.users_on("shop-0", 1)
    with server_shop.session() as session:
        session.add_all([User(id=user, name="u"), Country(code="de", name="Germany")])
        session.commit()
        for work in (
            lambda: session.scalars(select(User.id)).all(),
            lambda: session.execute(update(User).values(age=1), execution_options={"shardkit_scatter": True}),
            lambda: session.execute(insert(Country).values(code="kr", name="Korea")),
            lambda: session.bulk_insert_mappings(inspect(Country), [{"code": "kr", "name": "Korea"}]),
            lambda: session.flush(session.add(Country(code="fr", name="France"))),  # type: ignore[func-returns-value]
        ):
            for shard in SHARDS:
                session.connection(bind_arguments={"shardkit_shard": shard}, execution_options=renamed)
            with pytest.raises(RoutingError, match="share"):
                work()
            session.rollback()
    with server_shop.session(execution_options=renamed) as session:
        session.add(Country(code="kr", name="Korea"))
        with pytest.raises(RoutingError, match="share"):
            session.flush()


# --- rows and values ----------------------------------------------------------------------------------------------


def test_the_first_row_says_which_columns_are_written(shop: Shop, users: dict[str, int]) -> None:
    """Also on the shards that it does not go to."""
    one, other = users["shop-0"], users["shop-1"]
    first = {"id": 50, "user_id": one, "item": "new"}
    second = {"id": 51, "user_id": other, "item": "new", "amount": 7}
    changes = [{"k": one, "item": "changed"}, {"k": other, "item": "changed", "amount": 7}]
    with shop.session() as session:
        session.execute(insert(Order.__table__), [first, second])
        session.execute(insert(Order.__table__).values([{**first, "id": 60}, {**second, "id": 61}]))
        session.execute(update(Order.__table__).where(Order.user_id == sa.bindparam("k")), changes)
        session.commit()
    amounts = [row for rows in shop.where("orders", "id, amount, item").values() for row in rows if row[1] == 7]
    assert amounts == []
    with shop.session() as session:
        for statement in (insert(Order.__table__), update(Order.__table__).where(Order.user_id == sa.bindparam("k"))):
            with pytest.raises(RoutingError, match="no value for amount, which the first has"):
                session.execute(statement, [{**second, "k": other}, {**first, "k": one}])
        with pytest.raises(RoutingError, match="lacks columns that its first row names"):
            session.execute(insert(Order.__table__).values([second, first]))


class _Everything(sa.ColumnElement[int]):
    type = sa.Integer()
    inherit_cache = True


@compiles(_Everything)
def _compiled(_element: Any, _compiler: Any, **_options: Any) -> str:
    return "(SELECT COUNT(*) FROM users)"


@pytest.mark.parametrize("new", [False, True])
def test_an_expression_of_an_object_reads_no_half_tables(shop: Shop, users: dict[str, int], new: bool) -> None:
    user = users["shop-0"]
    everywhere = select(sa.func.count(User.id)).scalar_subquery()
    its_own = select(sa.func.count(User.id)).where(User.id == user).scalar_subquery()
    with shop.session() as session:
        order = Order(id=50, user_id=user) if new else session.scalars(select(Order).where(Order.user_id == user)).one()
        session.add(order)
        order.amount, order.item = its_own + 10, sa.text("'t'")
        session.commit()
        assert (order.amount, order.item) == (11, "t")
    with shop.session() as session:
        order = Order(id=51, user_id=user) if new else session.scalars(select(Order).where(Order.user_id == user)).one()
        session.add(order)
        order.amount, order.item = everywhere, "all"
        with pytest.raises(RoutingError):
            session.commit()
    for unknown in (sa.text("(SELECT COUNT(*) FROM users)"), _Everything()):
        with shop.session() as session:
            found = select(Order).where(Order.user_id == user)
            order = Order(id=51, user_id=user) if new else session.scalars(found).one()
            session.add(order)
            order.amount, order.item = unknown, "all"  # type: ignore[assignment]
            with pytest.raises(RoutingError, match="cannot look into"):
                session.commit()
    assert all(item != "all" for items in shop.where("orders", "item").values() for item in items)


def test_a_default_of_the_model_reads_no_half_tables(shop: Shop, users: dict[str, int]) -> None:
    base: Any = sa.orm.declarative_base()

    class Counting(base):
        __tablename__ = "orders"
        id = sa.Column(sa.Integer, primary_key=True, autoincrement=False)
        user_id = sa.Column(sa.Integer)
        item = sa.Column(sa.String(100))
        amount = sa.Column(sa.Integer, default=select(sa.func.count(Order.id)).scalar_subquery())

    row = {"id": 50, "user_id": users["shop-0"], "item": "i"}
    ways: dict[str, Any] = {
        "core": lambda session: session.execute(insert(Counting.__table__), row),
        "orm": lambda session: session.execute(insert(Counting), [row]),
        "flush": lambda session: (session.add(Counting(**row)), session.flush()),
        "bulk": lambda session: session.bulk_save_objects([Counting(**row)]),
        "mappings": lambda session: session.bulk_insert_mappings(Counting, [row]),
    }
    with shop.session() as session:
        for way in ways.values():
            with pytest.raises(RoutingError, match="selects rows of other shards"):
                way(session)
            session.rollback()
        session.execute(insert(Counting.__table__), {**row, "amount": 3})
        session.commit()
    assert (50, 3) in shop.rows("shop-0", "orders", "id, amount")


def test_a_default_of_the_clock_is_not_looked_at_for_each_object(sqlite_shop: Shop) -> None:
    class Own(DeclarativeBase):
        pass

    class Plain(Own):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(default=sa.func.current_user(), onupdate=sa.func.now())

    class Reading(Own):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[int]
        item: Mapped[str] = mapped_column(default=select(sa.func.max(User.name)).scalar_subquery())

    view = sqlite_shop.cluster.view
    assert [home_of(view, sa.inspect(each)).by_sql for each in (Plain, Reading)] == [False, True]


def test_a_callable_is_asked_once(shop: Shop) -> None:
    """For the shard and for the row."""
    numbers = iter(range(100, 200))
    one, other = (sa.bindparam(name, callable_=lambda: next(numbers), type_=sa.BigInteger()) for name in "ab")
    row = insert(User).values(id=one, name="n")
    several = insert(User).values([{"id": one, "name": "n"}, {"id": other, "name": "n"}])
    with shop.session() as session:
        for statement in (row, row, row, several, several):
            session.execute(statement)
        session.commit()
        number = sa.bindparam("n", callable_=iter(range(100, 200)).__next__)
        read = select(User.id).where(User.id == number)
        assert [session.scalars(read).one() for _ in range(7)] == [*range(100, 107)]  # the first one plans
    placed = shop.where("users")
    assert sorted(each for ids in placed.values() for each in ids) == list(range(100, 107))
    assert all(shop.shard_of(each) == shard for shard, ids in placed.items() for each in ids)


@pytest.mark.parametrize("column", ["id", "age"])
def test_an_iterator_is_read_once(shop: Shop, users: dict[str, int], column: str) -> None:
    wanted = getattr(User, column)
    with shop.session() as session:
        session.execute(update(User).values(age=User.id), execution_options={"shardkit_scatter": True})
        statement = select(User.id).where(wanted.in_(sa.bindparam("ids", expanding=True))).order_by(User.id)
        ids = sorted(users.values())
        assert session.scalars(statement, {"ids": iter(ids)}).all() == ids
        assert session.scalars(statement.params(ids=iter(ids))).all() == ids


def test_an_expired_object_is_loaded_before_its_shards_are_asked(shop: Shop, users: dict[str, int]) -> None:
    """Not by each of the threads that ask them."""
    sender, recipient = users["shop-0"], users["shop-1"]
    with shop.session() as session:
        session.add(Message(id=1, sender_id=sender, recipient_id=recipient, text="t"))
        session.commit()
        user = session.get_one(User, recipient)
        for _ in range(5):
            session.expire(user)
            assert session.scalars(select(Message.id).where(Message.recipient == user)).all() == [1]


def test_an_object_that_is_merged_without_loading_stays_the_one_of_its_row(shop: Shop, users: dict[str, int]) -> None:
    user = users["shop-1"]
    with shop.session() as session:
        known = session.get_one(User, user)
    with shop.session() as session:
        merged = session.merge(known, load=False)
        merged.name = "merged"
        session.flush()
        assert session.get_one(User, user) is merged
        assert session.scalars(select(User).order_by(User.id)).all().count(merged) == 1
        session.commit()
    assert shop.rows("shop-1", "users", "id, name") == [(user, "merged")]


# --- from_statement() ---------------------------------------------------------------------------------------------


def test_raw_sql_gives_the_objects_that_are_there(shop: Shop, users: dict[str, int]) -> None:
    user = users["shop-1"]
    plain = select(User).from_statement(sa.text(f"SELECT * FROM users WHERE id = {user}"))
    other = select(User).from_statement(sa.text(f"SELECT * FROM users WHERE id IN (SELECT {user})"))
    with shop.session() as session:
        known = session.get_one(User, user)
        for statement in (plain, other):
            for said in ({"shardkit_shard": "shop-1"}, {"shardkit_key": {"id": user}}):
                assert session.scalars(statement, execution_options=said).one() is known
    with shop.session() as session:
        countries = select(Country).from_statement(sa.text("SELECT * FROM countries"))
        country = session.get_one(Country, "kr")
        assert session.scalars(countries, execution_options={"shardkit_shard": "shop-2"}).one() is country


def test_a_statement_inside_from_statement_is_read(shop: Shop, users: dict[str, int]) -> None:
    user = users["shop-1"]
    with shop.session() as session:
        known = session.get_one(User, user)
        assert session.scalars(select(User).from_statement(select(User).where(User.id == user))).one() is known
        with pytest.raises(RoutingError, match="not for one shard alone"):
            session.scalars(select(User).from_statement(select(User)))
        (elsewhere,) = shop.users_on("shop-0", 2)[1:]
        hinted = {"shardkit_shard": "shop-2"}
        for entity, row in ((Country, {"code": "de", "name": "n"}), (User, {"id": elsewhere, "name": "n"})):
            inserted: Any = select(entity).from_statement(insert(entity).values(row).returning(entity))
            with pytest.raises(RoutingError):
                session.scalars(inserted, execution_options=hinted)


# --- what a result tells ------------------------------------------------------------------------------------------


def test_an_alias_without_a_name_does_not_move_the_columns_behind_it(shop: Shop, users: dict[str, int]) -> None:
    user = sa.orm.aliased(User)
    with shop.session() as session:
        result = session.execute(select(user, user.id).order_by(user.age, user.name))
        assert list(result.keys()) == ["id"]
        assert {row.id for row in result} == set(users.values())


def test_columns_of_no_rows_are_known(shop: Shop) -> None:
    with shop.session() as session:
        for columns in ((User.id, User.name), (User.__table__.c.id, User.__table__.c.name)):
            empty = session.execute(select(*columns).where(User.id.in_([])))
            assert empty.columns(columns[1], "id").all() == []
            assert session.execute(select(*columns).where(User.id.in_([]))).scalars(columns[1]).all() == []
        both = sa.union_all(select(User.__table__.c.id), select(Order.__table__.c.user_id))
        assert session.execute(both).columns(Order.__table__.c.user_id).all() == []


def test_an_object_is_not_taken_for_one_that_nobody_holds_any_more(shop: Shop) -> None:
    ids = sorted(each for shard in SHARDS for each in shop.users_on(shard, 50))
    with shop.session() as session:
        session.add_all([User(id=each, name="n") for each in ids])
        session.commit()
    query = select(User).options(joinedload(User.orders))
    with shop.session() as session:
        assert sorted(user.id for user in session.scalars(query).unique()) == ids
    with shop.session() as session:
        assert sorted(user.id for user in session.query(User).options(joinedload(User.orders))) == ids
    with shop.session() as session:
        assert sorted(user.id for (user,) in session.execute(query.order_by(User.name)).unique()) == ids


def test_objects_are_made_before_the_first_one_is_given_away(shop: Shop, users: dict[str, int]) -> None:
    with shop.session() as session:
        seen = []
        for user in session.scalars(select(User)):
            if not seen:
                session.execute(update(User).values(age=7), execution_options={"shardkit_scatter": True})
            seen.append((user.id, user.age))
        assert sorted(seen) == sorted((each, 7) for each in users.values())
    with shop.session() as session:
        for user in session.scalars(select(User)):
            user.age = 8
            session.commit()
    assert list(shop.where("users", "age").values()) == [[8], [8], [8]]


def test_a_new_row_of_a_reference_table_tells_its_primary_key(shop: Shop) -> None:
    with shop.session() as session:
        assert session.execute(insert(Country).values(code="kr", name="Korea")).inserted_primary_key == ("kr",)
        many = session.execute(update(Country).values(name="k"))
        assert (many.rowcount, many.last_updated_params()["name"]) == (1, "k")
        with pytest.raises(AttributeError):
            _ = many.other


class Reading(DeclarativeBase):
    """Other classes of the shop's tables."""


class Recipient(Reading):
    """A user with the messages to it, which stand on other shards, and its own, which stand beside it."""

    __table__ = User.__table__
    received: Mapped[list[Message]] = relationship(
        Message, primaryjoin=lambda: User.__table__.c.id == foreign(Message.recipient_id), viewonly=True
    )
    sent: Mapped[list[Message]] = relationship(
        Message, primaryjoin=lambda: User.__table__.c.id == foreign(Message.sender_id), viewonly=True
    )
    many_received: Mapped[int] = column_property(
        select(func.count()).where(Message.recipient_id == User.__table__.c.id).scalar_subquery(), deferred=True
    )
    many_sent: Mapped[int] = column_property(
        select(func.count()).where(Message.sender_id == User.__table__.c.id).scalar_subquery(), deferred=True
    )


class Addressee(Reading):
    """The same, always joined."""

    __table__ = User.__table__
    received: Mapped[list[Message]] = relationship(
        Message, primaryjoin=lambda: User.__table__.c.id == foreign(Message.recipient_id), viewonly=True, lazy="joined"
    )


@pytest.fixture
def messages(shop: Shop, users: dict[str, int]) -> dict[str, int]:
    """Each user has written to all of them."""
    with shop.session() as session:
        for number, (sender, recipient) in enumerate(itertools.product(users.values(), repeat=2), 1):
            session.add(Message(id=number, sender_id=sender, recipient_id=recipient, text="t"))
        session.commit()
    return users


TO_OTHERS: dict[str, Callable[[Session, int], Any]] = {
    "joined by an option": lambda session, user: session.get(Recipient, user, options=[joinedload(Recipient.received)]),
    "joined by the class": lambda session, user: session.get(Addressee, user),
    "a column of the class": lambda session, user: session.get_one(Recipient, user).many_received,
    "a column by an option": lambda session, user: session.get(
        Recipient, user, options=[undefer(Recipient.many_received)]
    ),
    "a column that is refreshed": lambda session, user: session.refresh(
        session.get_one(Recipient, user), ["many_received"]
    ),
    "a criterion": lambda session, user: session.get(
        Recipient,
        user,
        options=[with_loader_criteria(Recipient, Recipient.id.in_(select(Message.recipient_id)))],
    ),
}


@pytest.mark.parametrize("how", TO_OTHERS)
def test_an_object_by_its_identity_reads_no_half_tables(shop: Shop, messages: dict[str, int], how: str) -> None:
    with shop.session() as session, pytest.raises(RoutingError):
        TO_OTHERS[how](session, messages["shop-1"])


def test_an_object_by_its_identity_reads_what_stands_beside_it(shop: Shop, messages: dict[str, int]) -> None:
    user = messages["shop-1"]
    with shop.session() as session:
        options = [joinedload(Recipient.sent), undefer(Recipient.many_sent)]
        found = session.get_one(Recipient, user, options=options, with_for_update=shop.kind != "sqlite")
        assert (len(found.sent), found.many_sent) == (3, 3)
        session.commit()
        assert (found.name, found.many_sent, len(found.sent), len(found.received)) == (f"u{user}", 3, 3, 3)


@pytest.mark.parametrize("said", ["an option of the ORM's", "shardkit_key"])
def test_subqueryload_does_not_stay_on_the_shard_of_what_it_loads_for(
    shop: Shop, messages: dict[str, int], said: str
) -> None:
    """Its statements have all the options of the statement that they belong to."""
    user = messages["shop-1"]
    mine = select(Message).where(Message.sender_id == user).order_by(Message.id).limit(3)
    options = {"shardkit_key": {"sender_id": user}} if said == "shardkit_key" else {"populate_existing": True}
    with shop.session() as session:
        with pytest.raises(RoutingError):
            session.scalars(mine.options(subqueryload(Message.recipient)), execution_options=options).all()
        found = session.scalars(mine.options(subqueryload(Message.sender)), execution_options=options).all()
        session.expunge_all()
        assert [each.sender.id for each in found] == [user] * 3


# --- handlers of mapper events ------------------------------------------------------------------------------------


@contextmanager
def handling(model: Any, name: str, handler: Callable[[Any, Any], Any]) -> Iterator[None]:
    """:param handler: is given the connection and the object."""

    def handle(_mapper: Any, connection: Any, instance: Any) -> None:
        handler(connection, instance)

    event.listen(model, name, handle)
    try:
        yield
    finally:
        event.remove(model, name, handle)


def log(owner: int) -> Any:
    return insert(Message.__table__).values(id=99, sender_id=owner, recipient_id=owner, text="logged")


def flush_one(session: Session, model: Any, user: int) -> None:
    session.add(Country(code="fr", name="n") if model is Country else Order(id=77, user_id=user, item="n"))
    session.commit()


def test_a_handler_finds_every_shard_through_the_session(shop: Shop, messages: dict[str, int]) -> None:
    other = messages["shop-2"]

    def handle(_connection: Any, instance: Any) -> None:
        session = object_session(instance)
        assert session is not None
        instance.name = str(session.scalar(select(func.count(Message.id))))
        session.execute(log(other))

    with shop.session() as session, handling(Country, "before_insert", handle):
        flush_one(session, Country, other)
    assert shop.where("countries", "name") == {key: ["9", "Korea"] for key in SHARDS}
    assert [99 in ids for ids in shop.where("messages").values()] == [False, False, True]


BULK: dict[str, Callable[[Session, list[dict[str, Any]]], Any]] = {
    "insert": lambda session, rows: session.execute(insert(Message), rows),
    "mappings": lambda session, rows: session.bulk_insert_mappings(Message, rows),
    "objects": lambda session, rows: session.bulk_save_objects([Message(**row) for row in rows]),
}


@pytest.mark.parametrize("how", BULK)
@pytest.mark.parametrize("when", ["before_flush", "after_flush", "after_flush_postexec"])
def test_rows_are_inserted_in_bulk_in_an_event_of_a_flush(
    shop: Shop, users: dict[str, int], when: str, how: str
) -> None:
    rows = [{"id": user, "sender_id": user, "recipient_id": user, "text": "logged"} for user in users.values()]
    with shop.session() as session:
        event.listen(session, when, lambda session, *_: BULK[how](session, rows), once=True)
        session.add(Order(id=77, user_id=users["shop-0"], item="i"))
        session.commit()
    assert shop.where("messages") == {shard: [user] for shard, user in users.items()}
    assert 77 in shop.where("orders")["shop-0"]


def test_selectinload_over_several_shards_goes_on_with_joined_collections(shop: Shop, messages: dict[str, int]) -> None:
    loaders = selectinload(Message.recipient).joinedload(User.orders)
    with shop.session() as session:
        found = session.scalars(select(Message).options(loaders).order_by(Message.id)).all()
        session.expunge_all()
        assert [[order.id for order in each.recipient.orders] for each in found] == [[1], [2], [3]] * 3


class Market(Reading):
    """A country, which every shard has, with its orders, of which each has some."""

    __table__ = Country.__table__
    orders: Mapped[list[Order]] = relationship(
        Order,
        primaryjoin=lambda: Country.__table__.c.code == foreign(Order.country_code),
        viewonly=True,
        order_by=lambda: Order.id.desc(),
    )


def test_a_collection_of_a_reference_row_is_whole(shop: Shop, users: dict[str, int]) -> None:
    joined = select(Market).join(Market.orders)
    with shop.session() as session:
        for statement in (
            joined.options(contains_eager(Market.orders)),
            joined.where(Order.user_id.in_([users["shop-0"], users["shop-1"]])).options(contains_eager(Market.orders)),
            select(Market).options(joinedload(Market.orders, innerjoin=True)),
        ):
            with pytest.raises(RoutingError, match=r"each shard has a part of the collection"):
                session.scalars(statement).unique().all()
        mine = joined.where(Order.user_id == users["shop-1"]).options(contains_eager(Market.orders))
        assert [order.id for order in session.scalars(mine).unique().one().orders] == [2]
        session.expunge_all()
        assert len(session.scalars(select(Market).options(selectinload(Market.orders))).one().orders) == 3


@pytest.mark.parametrize("loader", [subqueryload, selectinload, lazyload, immediateload])
def test_a_collection_from_several_shards_is_in_the_order_of_its_relationship(
    shop: Shop, users: dict[str, int], loader: Any
) -> None:
    with shop.session() as session:
        session.add_all(
            Order(id=number, user_id=user, item="i", country_code="kr")
            for number, user in zip(range(10, 22), itertools.cycle(users.values()), strict=False)
        )
        session.commit()
        market = session.scalars(select(Market).options(loader(Market.orders))).one()
        assert [order.id for order in market.orders] == [*range(21, 9, -1), 3, 2, 1]


# --- what params() says -------------------------------------------------------------------------------------------


def _of_text(default: int) -> Any:
    return text("SELECT id FROM users WHERE id = :id").bindparams(id=default)


@pytest.mark.parametrize(
    "made",
    [
        lambda here, _: text("SELECT id FROM users WHERE id = :id").params(id=here),
        lambda here, other: _of_text(other).params(id=here),
        lambda here, other: _of_text(other).columns(User.id).params(id=here),
        lambda here, other: select(User.id).from_statement(_of_text(other).params(id=other)).params(id=here),
        lambda here, other: select(User.id).from_statement(_of_text(other).params(id=here)),
        lambda here, other: (
            select(User.id)
            .from_statement(select(User.id).where(User.id == sa.bindparam("id", other)).params(id=other))
            .params(id=here)
        ),
    ],
    ids=["text", "instead of another", "columns", "from_statement", "within from_statement", "select"],
)
def test_params_say_where_a_statement_goes(shop: Shop, users: dict[str, int], made: Callable[[int, int], Any]) -> None:
    cluster = shop.open(shop.map(), metadata=User.metadata)
    with shardkit.sessionmaker(cluster)() as session:
        for here, other in itertools.permutations(users.values(), 2):
            assert session.scalars(made(here, other)).all() == [here]


def test_params_say_where_a_row_is_inserted(sqlite_shop: Shop) -> None:
    here, elsewhere = (sqlite_shop.users_on(shard, 1)[0] for shard in ("shop-0", "shop-1"))
    row = insert(User).values(id=sa.bindparam("new", elsewhere), name="a").returning(User)
    with sqlite_shop.session() as session:
        assert session.scalars(select(User).from_statement(row).params(new=here)).one().id == here
        session.commit()
    assert sqlite_shop.where("users") == {"shop-0": [here], "shop-1": [], "shop-2": []}


def test_a_union_flows_in_parts_of_the_size_that_it_asks_for(shop: Shop, users: dict[str, int]) -> None:
    both = sa.union_all(select(User.id), select(Order.user_id)).execution_options(yield_per=2)
    with shop.session() as session:
        parts = [len(list(part)) for part in session.execute(both).partitions()]
    assert parts == [2] * len(users)
