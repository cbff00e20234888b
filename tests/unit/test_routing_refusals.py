"""Every construct that is refused over several shards: with an error that says what, where and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import aliased, contains_eager, joinedload, selectinload
from sqlalchemy.schema import CreateTable

from shardkit.errors import CrossShardJoin, KeyChange, MissingKey, RoutingError, ScatterRefused, UnknownTable
from shardkit.routing.planner import Planner
from shardkit.routing.route import RouteOptions
from shardkit.shardmap import ShardMap
from tests.routing_shop import (
    Base,
    Country,
    Currency,
    Invoice,
    Line,
    Member,
    Order,
    Payment,
    Read,
    Store,
    User,
    shop_map,
)  # fmt: skip

u, o, ln = User, Order, Line
PLANNER = Planner(shop_map(), dialect_name="mysql")
elsewhere = sa.Table("elsewhere", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
recursive = sa.select(o.id).where(o.amount == 1).cte(recursive=True)
recursive = recursive.union_all(sa.select(o.id).join(recursive, recursive.c.id == o.amount))
other = aliased(u)
count = sa.func.count

READS: dict[str, tuple[Any, type[RoutingError]]] = {
    "a join on another column": (sa.select(u.id).join(o, o.giver == u.id), CrossShardJoin),
    "a join without condition": (sa.select(u.id, o.id), CrossShardJoin),
    "an outer join on another column": (sa.select(u.id).outerjoin(o, o.giver == u.id), CrossShardJoin),
    "a self join on another column": (sa.select(u.id).join(other, other.age == u.age), CrossShardJoin),
    "keyspaces joined": (sa.select(u.id).join(Member, Member.id == u.id), CrossShardJoin),
    "a vertical table joined": (sa.select(u.id).join(Invoice, Invoice.user_id == u.id), CrossShardJoin),
    "a reference table that is kept": (sa.select(Country.code).outerjoin(u, u.country == Country.code), CrossShardJoin),
    "a full join": (sa.select(u.id).join(o, o.user_id == u.id, full=True), CrossShardJoin),
    "a reference table around a subquery": (
        sa.select(Country.code).where(sa.exists().where(u.country == Country.code)),
        CrossShardJoin,
    ),
    "EXISTS that is not tied by the key": (sa.select(u.id).where(sa.exists().where(o.giver == u.id)), CrossShardJoin),
    "IN a subquery tied by another column": (
        sa.select(u.id).where(u.age.in_(sa.select(o.amount).where(o.giver == u.id))),
        CrossShardJoin,
    ),
    "two columns IN a subquery": (
        sa.select(u.id).where(sa.tuple_(u.age, u.id).in_(sa.select(o.amount, o.giver))),
        CrossShardJoin,
    ),
    "IN a subquery in a subquery": (
        sa.select(sa.select(u.id).where(u.age.in_(sa.select(o.amount))).subquery()),
        CrossShardJoin,
    ),
    "IN a subquery of another type": (sa.select(u.id).where(u.name.in_(sa.select(o.amount))), CrossShardJoin),
    "IN a subquery of another collation": (
        sa.select(u.id).where(sa.collate(u.name, "utf8mb4_bin").in_(sa.select(o.note))),
        CrossShardJoin,
    ),
    "a comparison with an average": (
        sa.select(u.id).where(u.age > sa.select(sa.func.avg(o.amount)).scalar_subquery()),
        CrossShardJoin,
    ),
    "IN a subquery that itself is refused": (
        sa.select(u.id).where(u.age.in_(sa.select(o.amount).join(other, other.age == o.amount))),
        CrossShardJoin,
    ),
    "a scalar subquery": (sa.select(u.id, sa.select(count(o.id)).scalar_subquery()), CrossShardJoin),
    "a subquery without FROM around it": (sa.select(sa.select(count(o.id)).scalar_subquery()), CrossShardJoin),
    "a joined eager load on another column": (sa.select(o).options(joinedload(o.present_of)), CrossShardJoin),
    "contains_eager of a collection that LIMIT would cut": (
        sa.select(u).join(u.orders).options(contains_eager(u.orders)).limit(3),
        RoutingError,
    ),
    "LIMIT in a subquery": (sa.select(sa.select(u.id).limit(3).subquery()), RoutingError),
    "an aggregate in a subquery": (sa.select(sa.select(count(u.id)).subquery()), RoutingError),
    "groups in a subquery": (sa.select(sa.select(u.age, count()).group_by(u.age).subquery()), RoutingError),
    "DISTINCT in a subquery": (sa.select(sa.select(u.age).distinct().subquery()), RoutingError),
    "a window in a subquery": (
        sa.select(sa.select(u.id, sa.func.row_number().over(order_by=u.id).label("n")).subquery()),
        RoutingError,
    ),
    "one window of two without the key": (
        sa.select(
            count().over(partition_by=o.user_id).label("own"), sa.func.row_number().over(order_by=o.id).label("all")
        ),
        RoutingError,
    ),
    "a window by a column called like the key": (
        sa.select(count().over(partition_by=(o.giver % 3).label("user_id"))),
        RoutingError,
    ),
    "a window over groups of several shards": (
        sa.select(o.note, sa.func.sum(count()).over(partition_by=o.user_id)).group_by(o.note),
        RoutingError,
    ),
    "a window": (sa.select(u.id, sa.func.row_number().over(order_by=u.id)), RoutingError),
    "a recursive CTE": (sa.select(recursive.c.id), RoutingError),
    "FOR UPDATE": (sa.select(u).with_for_update(), RoutingError),
    "UNION of texts of unknown length": (
        sa.union(sa.select(u.id, sa.literal("u")), sa.select(o.id, sa.literal("o"))),
        RoutingError,
    ),
    "EXCEPT": (sa.except_(sa.select(u.id), sa.select(o.user_id)), RoutingError),
    "UNION ALL sorted by columns of two types": (
        sa.union_all(sa.select(u.id), sa.select(u.name)).order_by("id"),
        RoutingError,
    ),
    "UNION ALL of spread and reference rows": (
        sa.union_all(sa.select(u.name), sa.select(Country.title)),
        CrossShardJoin,
    ),
    "UNION ALL FOR UPDATE": (sa.union_all(sa.select(u.id), sa.select(o.id)).with_for_update(), RoutingError),
    "UNION ALL of a limited part": (sa.union_all(sa.select(u.id).limit(3), sa.select(o.id)), RoutingError),
    "an array of values": (sa.select(sa.func.json_arrayagg(u.name)), RoutingError),
    "STDDEV of different values": (sa.select(sa.func.stddev(sa.distinct(u.age))), RoutingError),
    "GROUP_CONCAT of two columns": (
        sa.select(sa.func.group_concat(sa.distinct(u.age), u.name, ";")),
        RoutingError,
    ),
    "an expression over aggregates that are texts": (sa.select(sa.func.max(u.name) + "!"), RoutingError),
    "a function over aggregates": (sa.select(sa.func.round(sa.func.avg(u.age), 2)), RoutingError),
    "HAVING over a string": (sa.select(u.age).group_by(u.age).having(sa.func.max(u.name) > "a"), RoutingError),
    "a column that is not grouped": (sa.select(u.name, count()).group_by(u.age), RoutingError),
    "an entity beside aggregates": (sa.select(u, count()).group_by(u.age), RoutingError),
    "an unknown function": (sa.select(sa.func.my_own(u.id)), RoutingError),
    "an unknown function in a condition": (sa.select(u.id).where(sa.func.my_own(u.age) == 1), RoutingError),
    "a function of another schema": (sa.select(sa.func.audit.lower(u.name)), RoutingError),
    "a function of the connection": (sa.select(sa.func.last_insert_id()), RoutingError),
    "ORDER BY a random value": (sa.select(u.id).order_by(sa.func.rand()), RoutingError),
    "ORDER BY raw SQL": (sa.select(u.id).order_by(sa.text("name")), RoutingError),
    "ORDER BY long text": (sa.select(u.id).order_by(sa.type_coerce(u.name, sa.Text)), RoutingError),
    "ORDER BY a concatenation": (sa.select(u.id).order_by(u.name + "x"), RoutingError),
    "ORDER BY a JSON value": (sa.select(u.id).order_by(sa.type_coerce(u.name, sa.JSON)), RoutingError),
    "DISTINCT sorted by what is not shown": (sa.select(u.age).distinct().order_by(u.name), RoutingError),
    "LIMIT that is an expression": (sa.select(u.id).limit(sa.func.abs(3)), RoutingError),
    "FETCH": (sa.select(u.id).order_by(u.id).fetch(3), RoutingError),
    "raw SQL in a condition": (sa.select(u.id).where(sa.text("age = 1 OR age = 2")), RoutingError),
    "raw SQL as a column": (sa.select(sa.text("id, name")).select_from(u), RoutingError),
    "a star": (sa.select(sa.literal_column("*")).select_from(u), RoutingError),
    "an operator of one's own": (sa.select(u.id).where(u.age.op("OR 1 =")(1)), RoutingError),
    "a suffix": (sa.select(u.id).suffix_with("OR 1 = 1"), RoutingError),
    "a prefix": (sa.select(u.id).prefix_with("SQL_CALC_FOUND_ROWS"), RoutingError),
    "a statement hint": (sa.select(u.id).with_statement_hint("LIMIT 3"), RoutingError),
    "raw SQL": (sa.text("SELECT * FROM users"), RoutingError),
    "raw SQL as entities": (sa.select(u).from_statement(sa.text("SELECT * FROM users")), RoutingError),
    "raw SQL with columns": (sa.text("SELECT id FROM users").columns(u.id), RoutingError),
}

WRITES: dict[str, tuple[Any, Any, type[Exception]]] = {
    "INSERT without the key": (sa.insert(u).values(name="x"), None, MissingKey),
    "INSERT without any value": (sa.insert(u), None, MissingKey),
    "INSERT of many, one without the key": (sa.insert(u), [{"id": 1}, {"name": "x"}], MissingKey),
    "INSERT with a key of another type": (sa.insert(u).values(id="5"), None, MissingKey),
    "INSERT with a key that is an expression": (sa.insert(u).values(id=sa.func.uuid_short()), None, MissingKey),
    "INSERT with a key from a subquery": (
        sa.insert(u).values(id=sa.select(sa.func.max(o.id)).scalar_subquery()), None, MissingKey,
    ),
    "INSERT of NULL into a primary key": (sa.insert(u).values(id=None), None, MissingKey),
    "INSERT of a key that no bucket takes": (sa.insert(Store).values(id=1, region="jeju"), None, MissingKey),
    "INSERT of half a key": (sa.insert(Read).values(id=1, tenant=1), None, MissingKey),
    "INSERT ... SELECT": (sa.insert(o).from_select(["id", "user_id"], sa.select(u.id, u.id)), None, MissingKey),
    "INSERT ... SELECT of another shard's rows": (
        sa.insert(o).from_select(["user_id", "id"], sa.select(sa.literal(5), u.id)), None, RoutingError,
    ),
    "INSERT ... SELECT into a vertical table": (
        sa.insert(Invoice).from_select(["id", "user_id"], sa.select(u.id, u.id)), None, RoutingError,
    ),
    "INSERT with a subquery on other shards": (
        sa.insert(o).values(id=1, user_id=5, amount=sa.select(count(u.id)).scalar_subquery()), None, RoutingError,
    ),
    "INSERT with a prefix of raw SQL": (sa.insert(u).values(id=1).prefix_with("/* x */ FOO"), None, RoutingError),
    "upsert whose unique index lacks the key": (
        mysql.insert(o).values(id=1, user_id=5).on_duplicate_key_update(note="x"), None, RoutingError,
    ),
    "INSERT IGNORE, the same": (sa.insert(o).values(id=1, user_id=5).prefix_with("IGNORE"), None, RoutingError),
    "ON CONFLICT, the same": (
        sqlite_insert(o).values(id=1, user_id=5).on_conflict_do_nothing(), None, RoutingError,
    ),
    "upsert that changes the key": (
        mysql.insert(u).values(id=1).on_duplicate_key_update(id=2), None, KeyChange,
    ),
    "RETURNING in order from several shards": (
        sa.insert(u).returning(u.id, sort_by_parameter_order=True), [{"id": n} for n in range(9)], RoutingError,
    ),
    "INSERT into a reference table without its number": (sa.insert(Currency).values(code="x"), None, RoutingError),
    "INSERT into a reference table with a default of the server": (
        sa.insert(Currency).values(id=1, code="x"), None, RoutingError,
    ),
    "INSERT into a reference table with a random value": (
        sa.insert(Country).values(code=sa.func.uuid()), None, RoutingError,
    ),
    "INSERT ... SELECT into a reference table": (
        sa.insert(Country).from_select(["code"], sa.select(u.country)), None, RoutingError,
    ),
    "UPDATE of everything": (sa.update(u).values(age=1), None, ScatterRefused),
    "UPDATE by another column": (sa.update(o).where(o.id == 1).values(note="x"), None, ScatterRefused),
    "UPDATE by a key of another type": (sa.update(u).where(u.id == "5").values(age=1), None, ScatterRefused),
    "UPDATE of the key": (sa.update(u).where(u.id == 5).values(id=6), None, KeyChange),
    "UPDATE of the key by parameters": (sa.update(u.__table__).where(u.age == 5), {"id": 6}, KeyChange),
    "UPDATE of part of the key": (
        sa.update(Read).where(Read.tenant == 1, Read.day == 1).values(day=2), None, KeyChange,
    ),
    "UPDATE in bulk by a primary key without the key": (sa.update(o), [{"id": 1, "note": "x"}], ScatterRefused),
    "UPDATE of many, one of them everywhere": (
        sa.update(o.__table__).where(o.__table__.c.id == sa.bindparam("n")).values(note="x"),
        [{"n": 1}, {"n": 2}],
        ScatterRefused,
    ),
    "UPDATE with raw SQL": (sa.update(u).where(u.id == 5).values(name=sa.text("'x', id = 7")), None, RoutingError),
    "UPDATE from another shard's rows": (
        sa.update(u).where(u.id == 5).values(age=sa.select(count(o.id)).scalar_subquery()), None, CrossShardJoin,
    ),
    "UPDATE of a reference table with a time": (sa.update(Country).values(title=sa.func.now()), None, RoutingError),
    "UPDATE of a reference table from sharded rows": (
        sa.update(Country).values(title=sa.select(sa.func.max(u.name)).scalar_subquery()), None, CrossShardJoin,
    ),
    "DELETE of everything": (sa.delete(u), None, ScatterRefused),
    "DELETE by a joined table": (sa.delete(u).where(u.id == o.giver), None, CrossShardJoin),
    "DDL in raw SQL": (sa.DDL("ALTER TABLE users ADD x INT"), None, RoutingError),
    "DDL of an unknown table": (CreateTable(elsewhere), None, UnknownTable),
    "an unknown table": (sa.select(elsewhere), None, UnknownTable),
}  # fmt: skip

WITH_SCATTER: dict[str, Any] = {
    "UPDATE with LIMIT": sa.update(u).values(age=1).with_dialect_options(mysql_limit=3),
    "UPDATE with an extension's LIMIT": sa.update(u).values(age=1).ext(mysql.limit(3)),
    "DELETE with LIMIT": sa.delete(u).with_dialect_options(mysql_limit=3),
    "DELETE by a subquery on other shards": sa.delete(u).where(sa.exists().where(o.giver == u.id)),
    "UPDATE joined to other shards": sa.update(u).where(u.id == o.giver).values(age=1),
}


def checked(raised: pytest.ExceptionInfo[Any]) -> None:
    error = raised.value
    assert isinstance(error, sa_exc.InvalidRequestError)
    assert error.hint
    assert len(error.message) > 10


@pytest.mark.parametrize("name", READS)
def test_reads_that_are_refused(name: str) -> None:
    statement, error = READS[name]
    with pytest.raises(error) as raised:
        PLANNER.plan(statement)
    assert type(raised.value) is error
    checked(raised)


@pytest.mark.parametrize("name", WRITES)
def test_writes_that_are_refused(name: str) -> None:
    statement, parameters, error = WRITES[name]
    with pytest.raises(error) as raised:
        PLANNER.plan(statement, parameters)
    assert type(raised.value) is error
    checked(raised)


@pytest.mark.parametrize("name", WITH_SCATTER)
def test_writes_that_are_refused_even_with_scatter(name: str) -> None:
    with pytest.raises(RoutingError) as raised:
        PLANNER.plan(WITH_SCATTER[name], None, RouteOptions(scatter=True))
    assert not isinstance(raised.value, ScatterRefused)
    checked(raised)


def test_the_error_names_the_table_the_key_and_how_many_shards() -> None:
    with pytest.raises(ScatterRefused) as raised:
        PLANNER.plan(sa.update(o).values(note="x"))
    assert (raised.value.table, raised.value.key, raised.value.shards) == ("orders", ("user_id",), 3)


def test_joins_name_both_tables() -> None:
    with pytest.raises(CrossShardJoin, match=r"users and orders are not joined by their keys") as raised:
        PLANNER.plan(sa.select(u.id).join(o, o.giver == u.id))
    assert "join by users.id and orders.user_id" in str(raised.value)


def test_a_read_over_shards_follows_the_policy() -> None:
    statement = sa.select(u).where(u.age == 3)
    assert PLANNER.plan(statement).warning is None
    warned = PLANNER.plan(statement, None, RouteOptions(policy="warn"))
    assert warned.warning == "users is read on 3 shards: nothing pins id"
    with pytest.raises(ScatterRefused, match="users is read on 3 shards"):
        PLANNER.plan(statement, None, RouteOptions(policy="refuse"))
    assert len(PLANNER.plan(statement, None, RouteOptions(policy="refuse", scatter=True)).shards) == 3
    with pytest.raises(ScatterRefused):
        PLANNER.plan(statement, None, RouteOptions(scatter=False))
    pinned = PLANNER.plan(sa.select(u).where(u.id == 3), None, RouteOptions(policy="refuse", scatter=False))
    assert len(pinned.shards) == 1


def one_shard(shards: dict[str, Any]) -> ShardMap:
    tables = {name: table.name for name, table in Base.metadata.tables.items()}
    keyed = {"users": "id", "orders": "user_id", "lines": "user_id"}
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "one",
            "keyspaces": {
                "shop": {"partition": {"by": "hash", "buckets": 4}, "tables": keyed, "placement": {"s0": "0-3"}},
                "rest": {"tables": sorted(set(tables) - set(keyed)), "placement": "s0"},
            },
            "shards": shards,
        }
    )


ONE = {"s0": {"master": "mysql://10.0.0.1/shop"}}
TWO = {**ONE, "s1": {"master": "mysql://10.0.0.2/shop"}}


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_nothing_is_refused_on_a_cluster_of_one_shard(name: str) -> None:
    statement, parameters = READS[name][0] if name in READS else WRITES[name][0], WRITES.get(name, (0, None))[1]
    found = Planner(one_shard(ONE)).plan(statement, parameters, RouteOptions(policy="refuse"))
    assert found.shards == ("s0",)
    assert found.merge is None
    assert not found.shard_statements


def test_on_one_shard_warn_says_what_would_be_refused() -> None:
    planner = Planner(one_shard(ONE))
    warn = RouteOptions(policy="warn")
    joined = planner.plan(sa.select(u.id).join(o, o.giver == u.id), None, warn)
    assert joined.shards == ("s0",)
    assert joined.warning is not None
    assert joined.warning.startswith("over several shards this would be refused: users and orders are not joined")
    assert planner.plan(sa.select(u), None, warn).warning == "users is read on 2 shards: nothing pins id"
    assert planner.plan(sa.select(u).where(u.id == 5), None, warn).warning is None
    assert planner.plan(sa.select(Invoice), None, warn).warning is None
    unknown = planner.plan(sa.select(elsewhere), None, warn)
    assert unknown.warning is not None
    assert "does not name the table 'elsewhere'" in unknown.warning


NOT_ABOUT_TABLES = {
    "raw SQL", "raw SQL as entities", "raw SQL with columns", "a function of the connection", "DDL in raw SQL",
    "DDL of an unknown table", "an unknown table",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({*READS, *WRITES} - NOT_ABOUT_TABLES))
def test_nothing_is_refused_when_one_shard_has_all_the_tables(name: str) -> None:
    statement, parameters = READS[name][0] if name in READS else WRITES[name][0], WRITES.get(name, (0, None))[1]
    found = Planner(one_shard(TWO)).plan(statement, parameters, RouteOptions(policy="refuse"))
    assert found.shards == ("s0",)
    assert found.merge is None
    assert not found.shard_statements


def test_raw_sql_beside_a_whole_table_is_refused_where_half_tables_stand() -> None:
    """The text may read users: on s0 it would see a part of them."""
    shard_map = shop_map()
    document = shard_map.dump().replace("placement: s3", "placement: s0")
    shared = Planner(ShardMap.parse(document))
    text = sa.text("user_id IN (SELECT id FROM users)")
    for statement in (
        sa.select(Invoice).where(text),
        sa.update(Invoice).where(text).values(user_id=1),
        sa.delete(Invoice).where(text),
        sa.insert(Invoice).values(id=1, user_id=sa.text("(SELECT max(id) FROM users)")),
    ):
        with pytest.raises(RoutingError, match="it may read half a table"):
            shared.plan(statement)
        assert PLANNER.plan(statement).shards == ("s3",)
    assert shared.plan(sa.select(Invoice).where(text), None, RouteOptions(shard="s0")).shards == ("s0",)


def test_selectin_loads_and_payments_are_here_only_to_be_named() -> None:
    """Statements that must not be refused although they look like some that are."""
    for statement in (
        sa.select(u).options(selectinload(u.orders)),
        sa.select(Payment).join(Invoice, Invoice.id == Payment.invoice_id).order_by(Payment.id).limit(3),
        sa.select(Invoice.user_id, sa.func.group_concat(Invoice.id)).group_by(Invoice.user_id),
        sa.select(Country).with_for_update(),
    ):
        assert PLANNER.plan(statement).shards


@pytest.mark.parametrize("placed_elsewhere", [False, True])
def test_a_key_that_no_bucket_takes_is_found_where_its_keyspace_stands_whole(placed_elsewhere: bool) -> None:
    """It was not refused there; so it must not be looked for on no shard at all."""
    document: dict[str, Any] = {
        "format": 1,
        "cluster": "x",
        "keyspaces": {
            "stores": {
                "partition": {"by": "list", "buckets": {"north": ["seoul"], "south": ["busan"]}},
                "tables": {"stores": "region"},
                "placement": {"s0": ["north", "south"]},
            }
        },
        "shards": TWO,
    }
    if placed_elsewhere:
        document["keyspaces"]["billing"] = {"tables": ["invoices"], "placement": "s1"}
    planner = Planner(ShardMap.parse(document))
    for statement in (
        sa.insert(Store).values(id=1, region="jeju"),
        sa.select(Store).where(Store.region == "jeju"),
        sa.select(Store).where(Store.region == "jeju", Store.region == "seoul"),
        sa.update(Store).where(Store.region == "jeju").values(size=1),
        sa.delete(Store).where(Store.region == "jeju"),
    ):
        assert planner.plan(statement).shards == ("s0",)


def _of_the_statement_before() -> dict[str, Any]:
    last = sa.func.last_insert_id()
    return {
        "read": sa.select(u.id, last).where(u.id == 5),
        "compared": sa.select(o.id).where(o.user_id == 5, o.giver == sa.func.row_count()),
        "in a subquery": sa.select(o.id).where(o.user_id == 5, o.id.in_(sa.select(sa.func.found_rows()))),
        "inserted": sa.insert(o).values(id=1, user_id=5, giver=last),
        "inserted, among many": sa.insert(o).values([{"id": 1, "user_id": 5, "giver": last}]),
        "inserted by a SELECT": sa.insert(o).from_select(["id", "user_id"], sa.select(last, sa.literal(5))),
        "an upsert's": mysql.insert(u).values(id=5).on_duplicate_key_update(age=last),
        "set": sa.update(o).values(giver=last).where(o.user_id == 5),
        "deleted by": sa.delete(o).where(o.user_id == 5, o.id == last),
        "in a vertical table": sa.insert(Invoice).values(id=last),
        "in raw SQL": sa.text("INSERT INTO orders (id, user_id, giver) VALUES (1, 5, LAST_INSERT_ID())"),
        "a variable in raw SQL": sa.text("UPDATE orders SET giver = @it WHERE user_id = 5"),
    }


@pytest.mark.parametrize("name", _of_the_statement_before())
def test_what_the_statement_before_has_left_on_its_connection(name: str) -> None:
    """On another shard it is what some earlier statement has left there, or 0."""
    statement = _of_the_statement_before()[name]
    planner = Planner(shop_map(), tables=User.metadata.tables.get)
    with pytest.raises(RoutingError, match="connection"):
        planner.plan(statement)
    home = "s3" if "vertical" in name else shop_map().locate("users", [5]).shard
    assert planner.plan(statement, None, RouteOptions(shard=home)).shards == (home,)


def test_words_in_quotes_are_no_variables() -> None:
    planner = Planner(shop_map(), tables=User.metadata.tables.get)
    text = sa.text("UPDATE orders SET note = 'a@b, last_insert_id()' WHERE user_id = 5")
    assert len(planner.plan(text).shards) == 1


def test_what_an_insert_returns_reads_no_other_shards() -> None:
    for row in (
        sa.insert(u).values(id=5),
        sa.insert(u).values([{"id": 5}, {"id": 6}]),
        sa.insert(Country).values(code="x"),
    ):
        for counted in (
            sa.select(sa.func.count(o.id)).scalar_subquery(),
            sa.select(sa.func.count(o.id)).where(o.user_id == 999).scalar_subquery() + 1,
            sa.exists().where(o.amount > 3),
        ):
            with pytest.raises(RoutingError):
                PLANNER.plan(row.returning(counted))
    here = sa.select(sa.func.count(o.id)).where(o.user_id == 5).scalar_subquery()
    assert len(PLANNER.plan(sa.insert(u).values(id=5).returning(u, here)).shards) == 1
    assert PLANNER.plan(sa.insert(Country).values(code="x").returning(Country, sa.func.upper(Country.code))).replicated
