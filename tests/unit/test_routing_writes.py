"""Where writes go, and that the rows over shards are then those of one database."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import DeclarativeBase, Mapped, aliased, mapped_column
from sqlalchemy.schema import CreateTable, DropTable

from shardkit.errors import CrossShardJoin, KeyChange, MissingKey, RoutingError, ScatterRefused
from shardkit.routing.planner import Planner
from shardkit.routing.route import RouteOptions, StatementKind
from shardkit.session.shared import touched_values
from shardkit.shardmap import ShardMap
from tests.routing_shop import MAP, ROWS, Country, Currency, Invoice, Member, Order, Read, Shop, Store, User, shop_map

u, o = User, Order


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    made.fill(ROWS)
    yield made
    made.close()


def same(shop: Shop, *models: Any) -> None:
    for model in models:
        over, once = shop.contents(model)
        assert over == once


NEW = [{"id": n, "name": f"n{n}"} for n in range(100, 130)]


def test_a_row_goes_to_the_shard_of_its_key(shop: Shop) -> None:
    for row in NEW:
        found = shop.change(sa.insert(u).values(**row))
        place = shop.map.locate("users", [row["id"]])
        assert (found.shards, found.buckets) == ((place.shard,), frozenset({place.bucket}))
        assert found.writes
    same(shop, u)


def test_many_sets_of_parameters_are_split_by_shard(shop: Shop) -> None:
    found = shop.change(sa.insert(u.__table__), NEW)
    assert found.shards == ("s0", "s1", "s2")
    assert sorted(row["id"] for shard in found.shards for row in found.parameters_for(shard)) == [r["id"] for r in NEW]
    same(shop, u)


@pytest.mark.parametrize("rows", [NEW, [(row["id"], row["name"], None, None, None, None) for row in NEW]])
def test_rows_in_one_values_clause_are_split_by_shard(shop: Shop, rows: list[Any]) -> None:
    found = shop.change(sa.insert(u.__table__).values(rows))
    assert found.shards == ("s0", "s1", "s2")
    same(shop, u)


def test_orm_inserts_go_by_attribute_names(shop: Shop) -> None:
    class Base(DeclarativeBase):
        pass

    class Person(Base):
        __tablename__ = "users"
        number: Mapped[int] = mapped_column("id", primary_key=True)

    planner = Planner(shop.map)
    found = planner.plan(sa.insert(Person), [{"number": row["id"]} for row in NEW])
    assert found.shards == ("s0", "s1", "s2")
    for shard in found.shards:
        for row in found.parameters_for(shard):
            assert shop.map.locate("users", [row["number"]]).shard == shard
    assert planner.plan(sa.insert(Person).values(number=100)).shards == (shop.map.locate("users", [100]).shard,)


def test_tables_of_one_mapped_class_go_together() -> None:
    class Base(DeclarativeBase):
        pass

    class Employee(Base):
        __tablename__ = "employees"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(5))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "e"}  # noqa: RUF012 - as the ORM reads it

    class Manager(Employee):
        __tablename__ = "managers"
        id: Mapped[int] = mapped_column(sa.ForeignKey("employees.id"), primary_key=True)
        level: Mapped[int]
        __mapper_args__ = {"polymorphic_identity": "m"}  # noqa: RUF012 - as the ORM reads it

    shard_map = two_shards({"employees": "id", "managers": "id"})
    planner = Planner(shard_map)
    found = planner.plan(sa.insert(Manager), [{"id": n, "level": 1} for n in range(1, 21)])
    assert found.tables == ("employees", "managers")
    for shard in found.shards:
        assert {shard_map.locate("managers", [row["id"]]).shard for row in found.parameters_for(shard)} == {shard}
    assert len(planner.plan(sa.select(Manager).where(Manager.id == 5)).shards) == 1
    assert len(planner.plan(sa.update(Manager), [{"id": 5, "level": 2}]).shards) == 1


def two_shards(tables: dict[str, Any]) -> ShardMap:
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "two",
            "keyspaces": {
                "all": {
                    "partition": {"by": "hash", "buckets": 8},
                    "tables": tables,
                    "placement": {"s0": "0-1, 4-5", "s1": "2-3, 6-7"},
                }
            },
            "shards": {name: {"master": f"mysql://{name}/shop"} for name in ("s0", "s1")},
        }
    )


def test_null_is_a_key_where_the_column_takes_it(shop: Shop) -> None:
    found = shop.change(sa.insert(o).values(id=900, user_id=None))
    assert found.buckets == frozenset({0})
    assert shop.change(sa.insert(Store).values(id=900, region=sa.null())).shards == ("s2",)
    same(shop, o, Store)


def test_keys_of_every_partition(shop: Shop) -> None:
    assert shop.change(sa.insert(Store).values(id=901, region="busan")).shards == ("s1",)
    assert shop.change(sa.insert(Member).values(id=901, age=25)).shards == ("s1",)
    assert shop.change(sa.insert(Read).values(id=901, tenant=1, day=None)).shards == (
        shop.map.locate("reads", [1, None]).shard,
    )
    assert shop.change(sa.insert(Invoice).values(id=901)).shards == ("s3",)
    same(shop, Store, Member, Read, Invoice)


def test_bound_parameters_inside_values(shop: Shop) -> None:
    statement = sa.insert(u.__table__).values(id=sa.bindparam("number"), name="x")
    found = shop.change(statement, [{"number": n} for n in range(200, 220)])
    assert len(found.shards) == 3
    same(shop, u)


def test_a_plain_default_of_the_model_is_a_value() -> None:
    table = sa.Table("t", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("tenant", sa.Integer, default=7))
    shard_map = two_shards({"t": "tenant"})
    assert Planner(shard_map).plan(sa.insert(table).values(id=1)).shards == (shard_map.locate("t", [7]).shard,)


def test_reference_tables_are_written_everywhere(shop: Shop) -> None:
    for statement in (
        sa.insert(Country).values(code="jp", title="Japan"),
        sa.update(Country).where(Country.code == "jp").values(title=sa.func.upper(Country.title)),
        sa.delete(Country).where(Country.code == "de"),
    ):
        found = shop.change(statement)
        assert (found.shards, found.replicated, found.scattered) == (("s0", "s1", "s2"), True, False)
    rows = {
        shard: shop.answer(shop.route(sa.select(Country.code, Country.title).order_by(Country.code), shard=shard))
        for shard in found.shards
    }
    assert rows["s0"] == rows["s1"] == rows["s2"] == [("jp", "JAPAN"), ("kr", "Korea"), ("no", None)]
    now = datetime(2024, 1, 1)  # noqa: DTZ001 - DATETIME has no zone
    assert shop.change(sa.insert(Currency).values(id=1, code="KRW", changed=now)).replicated
    same(shop, Country, Currency)


CLOCKS: dict[str, Any] = {
    "current_timestamp as text": sa.text("CURRENT_TIMESTAMP"),
    "current_timestamp as a name": sa.literal_column("current_timestamp"),
    "what the column's default makes up": sa.text("DEFAULT"),
    "the seconds of now": sa.func.from_unixtime(sa.func.unix_timestamp()),
    "SQLite's word for now": sa.func.date("now"),
    "SQLite's now, with a format": sa.func.strftime("%s", sa.literal("now")),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_reference_table_takes_no_time_from_its_servers_by_any_name(shop: Shop, name: str) -> None:
    now = CLOCKS[name]
    if "default" in name:
        assert shop.route(sa.update(u).values(name=now).where(u.id == 5)).shards
        assert shop.route(sa.update(u).values(name=now), scatter=True).shards
    then = datetime(2024, 1, 1)  # noqa: DTZ001 - DATETIME has no zone
    for statement in (
        sa.insert(Currency).values(id=1, code="KRW", changed=now),
        sa.update(Currency).values(changed=now),
        sa.update(Currency).values(code="x").where(Currency.changed < now),
        sa.delete(Currency).where(Currency.changed < now),
        mysql.insert(Currency).values(id=1, code="x", changed=then).on_duplicate_key_update(changed=now),
    ):
        with pytest.raises(RoutingError, match="another value on each shard"):
            shop.route(statement)
    born = sa.update(Currency).values(code=sa.func.strftime("%Y", Currency.changed), changed=sa.func.now())
    with pytest.raises(RoutingError, match=r"now\(\)"):
        shop.route(born)
    assert shop.route(sa.update(Currency).values(code=sa.func.strftime("%Y", Currency.changed))).replicated


def test_a_text_with_a_clocks_name_does_not_change_a_reference_table() -> None:
    planner = Planner(shop_map())
    with pytest.raises(RoutingError, match="another value on each shard"):
        planner.plan(sa.delete(Currency).where(sa.text("changed < CURRENT_TIMESTAMP")))
    assert planner.plan(sa.delete(Currency).where(sa.text("code = 'KRW'"))).replicated


def test_an_upsert_of_a_reference_table_sets_the_same_on_every_shard(shop: Shop) -> None:
    then = datetime(2024, 1, 1)  # noqa: DTZ001 - DATETIME has no zone
    row = mysql.insert(Currency).values(id=1, code="x", changed=then)
    lite = sqlite_insert(Currency).values(id=1, code="x", changed=then)
    for statement in (
        row.on_duplicate_key_update(changed=sa.func.now()),
        row.on_duplicate_key_update(id=sa.func.rand()),
        lite.on_conflict_do_update(index_elements=["id"], set_={"changed": sa.func.now()}),
        lite.on_conflict_do_update(index_elements=["id"], set_={"code": "y"}, where=Currency.changed < sa.func.now()),
    ):
        with pytest.raises(RoutingError, match="another value on each shard"):
            shop.route(statement)
    assert shop.route(row.on_duplicate_key_update(code=row.inserted.code, changed=then)).replicated
    assert shop.change(lite.on_conflict_do_update(index_elements=["id"], set_={"code": "y"})).replicated
    same(shop, Currency)


STAMPED = sa.Table(
    "currencies",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("code", sa.String(3)),
    sa.Column(
        "changed", sa.TIMESTAMP, server_default=sa.text("CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP"), nullable=False
    ),
)


class Stamped(DeclarativeBase):
    pass


class StampedCurrency(Stamped):
    __table__ = STAMPED.to_metadata(Stamped.metadata)


def test_a_reference_table_whose_servers_stamp_each_change(shop: Shop) -> None:
    """MySQL's ON UPDATE CURRENT_TIMESTAMP is written where SQLAlchemy's manual writes it: into the server's default."""
    then = datetime(2024, 1, 1)  # noqa: DTZ001 - DATETIME has no zone
    planner = Planner(shop.map)
    row = mysql.insert(STAMPED).values(id=1, code="x", changed=then)
    for statement in (sa.update(STAMPED).values(code="y"), row.on_duplicate_key_update(code="y")):
        with pytest.raises(RoutingError, match="would choose its own changed"):
            planner.plan(statement)
    for statement in (
        sa.update(STAMPED).values(code="y", changed=then),
        row.on_duplicate_key_update(code="y", changed=then),
        sa.delete(STAMPED).where(STAMPED.c.id == 1),
    ):
        assert planner.plan(statement).replicated
    mapper = sa.inspect(StampedCurrency)
    with pytest.raises(RoutingError, match="changed"):
        touched_values(mapper, shop.map.table("currencies"), {"code": "y"})
    assert touched_values(mapper, shop.map.table("currencies"), {"code": "y", "changed": then}) == {}


def test_an_upsert_reads_no_other_rows_in_its_where(shop: Shop) -> None:
    statement = sqlite_insert(u).values(id=5, name="new")
    elsewhere = sa.select(o.giver).where(o.giver.is_not(None))
    with pytest.raises(RoutingError, match="reads a subquery"):
        shop.route(
            statement.on_conflict_do_update(index_elements=["id"], set_={"name": "new"}, where=u.id.in_(elsewhere))
        )


def test_an_update_of_joined_tables_sets_no_reference_table_on_one_shard(shop: Shop) -> None:
    """MySQL's UPDATE of several tables: the copies of the reference table on other shards would keep the old value."""
    planner = Planner(shop.map)
    joined = (o.user_id == u.id, u.country == Country.code)
    for where in ((u.id == 5,), (u.id.in_(range(20)),)):
        for values in ({u.name: "x", Country.title: "y"}, {Country.title: "y"}):
            for options in (RouteOptions(), RouteOptions(shard=shop.map.locate("users", [5]).shard)):
                with pytest.raises(RoutingError, match="countries is a reference table"):
                    planner.plan(sa.update(u).values(values).where(*joined[1:], *where), None, options)
    there = aliased(Country)
    with pytest.raises(RoutingError, match="countries is a reference table"):
        planner.plan(sa.update(o).values({there.title: "y"}).where(o.user_id == 5, there.code == o.note))
    assert planner.plan(sa.update(o).values({o.note: Country.title, u.name: "y"}).where(*joined, u.id == 5)).shards


def test_a_reference_table_that_reads_itself_is_refused_for_that(shop: Shop) -> None:
    most = sa.select(sa.func.max(Currency.id)).scalar_subquery()
    with pytest.raises(RoutingError, match="another table may have another value"):
        shop.route(sa.update(Currency).values({Currency.id: most}))


def test_the_key_of_another_table_is_not_set_by_an_alias_either(shop: Shop) -> None:
    planner = Planner(shop.map)
    for _ in range(2):  # what was learned of the shape holds another alias
        other = aliased(User)
        with pytest.raises(KeyChange):
            planner.plan(sa.update(o).values({other.id: 7}).where(o.user_id == other.id, o.user_id == 5))


def test_a_delete_that_uses_another_table_goes_where_their_keys_are(shop: Shop) -> None:
    planner = Planner(shop.map)
    home = (shop.map.locate("users", [5]).shard,)
    joined = sa.delete(o).where(o.user_id == u.id)
    assert planner.plan(joined.where(u.id == 5)).shards == home
    assert planner.plan(sa.delete(o).where(o.user_id == 5, o.note == Country.code)).shards == home
    earlier = aliased(Order)
    twice = sa.delete(o).where(o.user_id == earlier.user_id, earlier.id < o.id)
    for statement in (joined.where(u.age > 3), twice):
        assert planner.plan(statement, None, RouteOptions(scatter=True)).shards == ("s0", "s1", "s2")
        with pytest.raises(ScatterRefused):
            planner.plan(statement)
    with pytest.raises(CrossShardJoin):
        planner.plan(sa.delete(o).where(o.amount == u.id), None, RouteOptions(scatter=True))


def test_a_reference_table_is_changed_by_others_only_where_they_stand_beside_it() -> None:
    reads = {**MAP["keyspaces"]["reads"], "placement": {"s0": "0-3", "s1": "4-7"}, "reference": ["currencies"]}
    orders = {**MAP["keyspaces"]["orders"], "reference": ["countries"]}
    planner = Planner(shop_map(keyspaces={**MAP["keyspaces"], "orders": orders, "reads": reads}))
    for statement in (
        sa.update(Country).values(title="x").where(Country.code == Currency.code),
        sa.delete(Country).where(Country.code == Currency.code),
    ):
        with pytest.raises(RoutingError, match="currencies"):
            planner.plan(statement)
    assert planner.plan(sa.update(Currency).values(code="x").where(Country.code == Currency.code)).shards == (
        "s0",
        "s1",
    )


def test_upserts_whose_unique_indexes_hold_the_key(shop: Shop) -> None:
    statement = sqlite_insert(u).values(id=5, name="new")
    found = shop.change(statement.on_conflict_do_update(index_elements=["id"], set_={"name": "new"}))
    assert len(found.shards) == 1
    same(shop, u)
    many = [{"id": n, "name": "again"} for n in range(10)]
    shop.change(sqlite_insert(u.__table__).on_conflict_do_nothing(), many)
    same(shop, u)
    on_server = mysql.insert(u).values(id=5).on_duplicate_key_update(name="x")
    assert len(Planner(shop.map).plan(on_server).shards) == 1


def test_insert_from_select_with_everything_on_one_shard(shop: Shop) -> None:
    rows = sa.select(sa.literal(5), u.id + 1000).where(u.id == 5)
    assert len(shop.change(sa.insert(o).from_select(["user_id", "id"], rows)).shards) == 1
    same(shop, o)


def test_returning_from_several_shards(shop: Shop) -> None:
    route = shop.route(sa.insert(u.__table__).returning(u.id), NEW)
    assert route.merge is not None
    rows = []
    for shard in route.shards:
        with shop.shards[shard].begin() as connection:
            rows += connection.execute(route.statement_for(shard), route.parameters_for(shard)).all()
    assert sorted(row[0] for row in rows) == [row["id"] for row in NEW]


def test_updates_and_deletes_by_key(shop: Shop) -> None:
    one = shop.change(sa.update(u).where(u.id == 5).values(name="five"))
    assert one.shards == (shop.map.locate("users", [5]).shard,)
    some = shop.change(sa.update(u).where(u.id.in_([1, 2, 3, 4])).values(name="some"))
    assert len(some.shards) > 1
    shop.change(sa.delete(o).where(o.user_id.in_([1, 2, 3])))
    assert shop.change(sa.delete(u).where(u.id.in_([]))).shards == ()
    same(shop, u, o)


def test_changes_everywhere_where_asked(shop: Shop) -> None:
    found = shop.change(sa.update(u).where(u.age == 11).values(name="eleven"), scatter=True)
    assert found.shards == ("s0", "s1", "s2")
    shop.change(sa.delete(u).where(~u.orders.any()), scatter=True)
    shop.change(sa.update(o).where(o.user_id == u.id, u.age == 12).values(note="twelve"), scatter=True)
    same(shop, u, o)


def test_many_sets_of_parameters_of_an_update(shop: Shop) -> None:
    table = u.__table__
    statement = sa.update(table).where(table.c.id == sa.bindparam("number")).values(name=sa.bindparam("new"))
    found = shop.change(statement, [{"number": n, "new": f"x{n}"} for n in range(12)])
    assert len(found.shards) == 3
    same(shop, u)


def test_a_bulk_update_by_a_primary_key_that_is_the_key(shop: Shop) -> None:
    sets = [{"id": n, "name": f"y{n}"} for n in range(12)]
    found = shop.route(sa.update(u), sets)
    assert len(found.shards) == 3
    for shard in found.shards:
        assert {shop.map.locate("users", [each["id"]]).shard for each in found.parameters_for(shard)} == {shard}


def test_ddl_runs_where_the_table_stands(shop: Shop) -> None:
    assert shop.route(CreateTable(u.__table__)).shards == ("s0", "s1", "s2")
    assert shop.route(DropTable(Invoice.__table__)).shards == ("s3",)
    assert shop.route(CreateTable(Country.__table__)).replicated
    index = sa.Index("by_age", u.__table__.c.age, _table=None)
    assert shop.route(sa.schema.CreateIndex(index)).shards == ("s0", "s1", "s2")
    u.__table__.indexes.discard(index)


def test_hints_say_where_raw_sql_goes(shop: Shop) -> None:
    text = sa.text("SELECT 1")
    assert shop.route(text, shard="s1").shards == ("s1",)
    found = shop.route(text, key={"user_id": 5})
    assert found.shards == (shop.map.locate("orders", [5]).shard,)
    assert found.buckets == frozenset({shop.map.locate("orders", [5]).bucket})
    assert shop.route(text, key={"tenant": 1, "day": 2}).shards == (shop.map.locate("reads", [1, 2]).shard,)
    with pytest.raises(RoutingError, match="no table of the map is sharded by that"):
        shop.route(text, key={"colour": 5})
    with pytest.raises(sa.exc.InvalidRequestError, match="has no shard 's9'"):
        shop.route(text, shard="s9")


@pytest.mark.parametrize(
    ("sql", "writes"),
    [
        ("SELECT 1", False),
        ("  ( select 1 )", False),
        ("SELECT 1 FOR UPDATE", True),
        ("select * from t lock in share mode", True),
        ("SELECT 1 INTO OUTFILE 'x'", True),
        ("UPDATE t SET a = 1", True),
        ("WITH a AS (SELECT 1) DELETE FROM t", True),
        ("CALL p()", True),
    ],
)
def test_raw_sql_that_may_write_needs_the_master(shop: Shop, sql: str, writes: bool) -> None:
    found = shop.route(sa.text(sql), shard="s0")
    assert (found.kind, found.writes) == (StatementKind.TEXT, writes)


def test_a_hint_may_not_contradict_the_key_of_a_write(shop: Shop) -> None:
    home = shop.map.locate("users", [5]).shard
    wrong = next(shard for shard in ("s0", "s1", "s2") if shard != home)
    for statement in (
        sa.insert(u).values(id=5),
        sa.update(u).where(u.id == 5).values(name="x"),
        sa.delete(u).where(u.id == 5),
    ):
        with pytest.raises(RoutingError, match="shardkit_shard"):
            shop.route(statement, shard=wrong)
        assert shop.route(statement, shard=home).shards == (home,)
        assert shop.route(statement, key={"id": 5}).shards == (home,)
    with pytest.raises(RoutingError, match="one shard only"):
        shop.route(sa.update(Country).values(title="x"), shard="s0")
    with pytest.raises(RoutingError, match="contradict"):
        shop.route(sa.select(u), shard=wrong, key={"id": 5})
    with pytest.raises(RoutingError, match="places no part of 'invoices'"):
        shop.route(sa.select(Invoice), shard="s0")
    with pytest.raises(MissingKey, match="says nothing about its bucket"):
        shop.route(sa.select(u), key={"id": "5"})


def test_options_are_read_from_execution_options() -> None:
    found = RouteOptions.from_execution_options({"shardkit_shard": "s0", "stream_results": True}, policy="refuse")
    assert found == RouteOptions(shard="s0", policy="refuse")
    assert RouteOptions.from_execution_options({"yield_per": 5}) == RouteOptions()
    assert RouteOptions.from_execution_options({"shardkit_key": {"id": 1}, "shardkit_scatter": True}) == RouteOptions(
        key={"id": 1}, scatter=True
    )
    for wrong in ({"shardkit_shard": 1}, {"shardkit_key": 5}, {"shardkit_scatter": "yes"}):
        with pytest.raises(RoutingError):
            RouteOptions.from_execution_options(wrong)


def test_rows_of_objects_are_placed(shop: Shop) -> None:
    assert shop.planner.place(u.__table__, {"id": 5}) == shop.map.locate("users", [5])
    assert shop.planner.place(o.__table__, {"id": 5, "user_id": None}) == shop.map.locate("orders", [None])
    assert shop.planner.place(Country.__table__, {"code": "kr"}) is None
    assert shop.planner.place(Invoice.__table__, {"id": 1}) == shop.map.locate("invoices")
    with pytest.raises(MissingKey, match=r"no value for its key users\.id"):
        shop.planner.place(u.__table__, {"name": "x"})
    with pytest.raises(MissingKey, match="may be stored as another"):
        shop.planner.place(u.__table__, {"id": 5.0})


def test_the_key_zero_is_refused_where_the_server_would_count_it_up(shop: Shop) -> None:
    """MySQL and MariaDB store a 0 in an AUTO_INCREMENT column under the next number: on the wrong shard."""
    counted = sa.Table("users", sa.MetaData(), sa.Column("id", sa.BigInteger, primary_key=True))
    given = sa.Table("users", sa.MetaData(), sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False))
    server = Planner(shop.map, dialect_name="mysql")
    with pytest.raises(MissingKey, match="AUTO_INCREMENT"):
        server.place(counted, {"id": 0})
    for planner, table in ((server, given), (Planner(shop.map, dialect_name="sqlite"), counted)):
        place = planner.place(table, {"id": 0})
        assert place is not None
        assert place == shop.map.locate("users", [0])


class Staff(DeclarativeBase):
    """Joined inheritance, whose second table has its key under a name of its own."""


class Person(Staff):
    """The first table."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)


class Manager(Person):
    """The second table."""

    __tablename__ = "orders"
    person: Mapped[int] = mapped_column("user_id", sa.ForeignKey("users.id"), primary_key=True)


def test_a_joined_subclass_takes_its_key_from_the_first_table() -> None:
    """As the ORM does, also where its own attribute is not given, or is given something else."""
    planner = Planner(shop_map(), dialect_name="sqlite")
    for row in ({"id": 5}, {"id": 5, "person": 6}):
        assert planner.plan(sa.insert(Manager), [row]).shards == (shop_map().locate("users", [5]).shard,)
