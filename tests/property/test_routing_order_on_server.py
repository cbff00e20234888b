"""Strings, numbers and dates sort, group and differ over shards as the server itself sorts and tells them apart."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError

from shardkit.errors import RoutingError
from shardkit.routing.merge import merge_rows
from shardkit.routing.planner import Planner
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer

SHARDS = ("s0", "s1", "s2")
#: Collations that both servers have: padding and not, case and accents told apart or not.
COMMON = ["utf8mb4_general_ci", "utf8mb4_unicode_ci", "utf8mb4_unicode_520_ci", "utf8mb4_bin", "utf8mb4_swedish_ci"]
OF_FLAVOUR = {
    "mariadb": ["utf8mb4_nopad_bin", "utf8mb4_unicode_nopad_ci", "latin1_german2_ci"],
    "mysql": ["utf8mb4_0900_ai_ci", "utf8mb4_0900_as_cs", "utf8mb4_0900_bin", "latin1_german2_ci"],
}
WORDS = [
    None, "", " ", "a", "a ", "a\t", "a\x01", "A", "á", "ä", "ae", "b", "B", "ß", "ss", "z", "Z", "zz", "é", "e", "E",
    "10", "9", "ab", "a b", "a-b", "aB", "o", "ö", "oe", "a  ", "\t", "_", "~",
]  # fmt: skip


class Databases:
    """One database with all rows, three with a part each."""

    def __init__(self, server: LocalDatabaseServer, flavour: str) -> None:
        self.server = server
        self.names = {shard: f"order_{os.getpid()}_{shard}" for shard in (*SHARDS, "whole")}
        self.metadata = sa.MetaData()
        collations = COMMON + OF_FLAVOUR[flavour]
        self.texts = {
            name: sa.Column(
                f"t_{name}",
                sa.String(20, collation=name).with_variant(
                    mysql.VARCHAR(20, charset=name.split("_")[0], collation=name), "mysql", "mariadb"
                ),
            )
            for name in collations
        }
        self.table = sa.Table(
            "things",
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            *self.texts.values(),
            sa.Column("amount", sa.Numeric(12, 3)),
            sa.Column("fine", sa.Numeric(12, 5)),
            sa.Column("ratio", sa.Float),
            sa.Column("exact", sa.Double),
            sa.Column("day", sa.Date),
            sa.Column("moment", sa.DateTime),
            sa.Column("hour", sa.Time),
            sa.Column("size", sa.Enum("small", "large", "medium")),
            sa.Column("raw", sa.VARBINARY(20)),
            sa.Column("long", sa.Text),
            sa.Column("flag", sa.Boolean),
        )
        self.engines = {}
        for shard, name in self.names.items():
            server.execute(f"DROP DATABASE IF EXISTS {name}")
            server.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
            self.engines[shard] = sa.create_engine(server.dsn(name))
            self.metadata.create_all(self.engines[shard])
        self.map = ShardMap.parse(
            {
                "format": 1,
                "cluster": "order",
                "keyspaces": {
                    "things": {
                        "partition": {"by": "hash", "buckets": 3},
                        "tables": {"things": "id"},
                        "placement": {"s0": "0", "s1": "1", "s2": "2"},
                    }
                },
                "shards": {shard: {"master": f"mysql://127.0.0.1:1/{shard}"} for shard in SHARDS},
            }
        )
        self.planner = Planner(self.map, dialect_name="mysql")

    def fill(self) -> None:
        rows = []
        for n, word in enumerate(WORDS * 2):
            row: dict[str, Any] = {"id": n}
            for name, column in self.texts.items():
                row[column.name] = (
                    None if word is None else word.encode("latin1").decode("latin1") if "latin1" in name else word
                )
            row |= {
                "amount": None if n % 7 == 0 else Decimal(n % 11) * 10**6 + Decimal("0.125") * (n % 5),
                "fine": Decimal(n * n) / 7 if n % 3 else None,
                "ratio": None if n % 9 == 0 else (n * 0.1) ** 3 / 7,
                "exact": n / 7,
                "day": None if n % 8 == 0 else date(1000 + n * 37 % 900, 1 + n % 12, 1 + n % 28),
                "moment": None if n % 6 == 0 else datetime(2000 + n % 3, 1, 1, n % 24, n % 60),  # noqa: DTZ001 - DATETIME has no zone
                "hour": None if n % 5 == 0 else time(n % 24, n % 60),
                "size": (None, "small", "large", "medium")[n % 4],
                "raw": None if n % 10 == 0 else bytes([n % 256, 0, n * 3 % 256]),
                "long": word,
                "flag": (None, True, False)[n % 3],
            }
            rows.append(row)
        by_shard: dict[str, list[dict[str, Any]]] = {"whole": rows}
        for row in rows:
            by_shard.setdefault(self.map.locate("things", [row["id"]]).shard, []).append(row)
        for shard, own in by_shard.items():
            with self.engines[shard].begin() as connection:
                connection.execute(self.table.insert(), own)

    def at_once(self, statement: Any) -> list[tuple[Any, ...]]:
        with self.engines["whole"].connect() as connection:
            return [tuple(row) for row in connection.execute(statement)]

    def over_shards(self, statement: Any, planner: Planner | None = None) -> list[tuple[Any, ...]]:
        route = (planner or self.planner).plan(statement)
        assert route.shards == SHARDS
        assert route.merge is not None
        streams = []
        for shard in route.shards:
            with self.engines[shard].connect() as connection:
                streams.append([tuple(row) for row in connection.execute(route.statement_for(shard))])
        return list(merge_rows(route.merge, streams))

    def close(self) -> None:
        for shard, name in self.names.items():
            self.engines[shard].dispose()
            self.server.execute(f"DROP DATABASE {name}")


@pytest.fixture(scope="module")
def databases(database_server: LocalDatabaseServer, flavour: str) -> Iterator[Databases]:
    made = Databases(database_server, flavour)
    try:
        made.fill()
        yield made
    finally:
        made.close()


def text_columns() -> list[str]:
    return [*COMMON, *OF_FLAVOUR[os.environ.get("SHARDKIT_TEST_FLAVOUR", "mariadb")]]


OTHERS = ["amount", "ratio", "exact", "day", "moment", "hour", "size", "raw", "flag"]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("name", [*text_columns(), *OTHERS])
def test_rows_are_sorted_as_the_server_sorts(databases: Databases, name: str, descending: bool) -> None:
    column = databases.table.c[name if name in OTHERS else f"t_{name}"]
    by = column.desc() if descending else column
    statement = sa.select(databases.table.c.id, column).order_by(by, databases.table.c.id).limit(60).offset(3)
    assert databases.over_shards(statement) == databases.at_once(statement)


@pytest.mark.parametrize("name", text_columns())
def test_groups_and_distinct_values_are_the_servers_own(databases: Databases, name: str) -> None:
    column = databases.table.c[f"t_{name}"]
    groups = sa.select(sa.func.count(), sa.func.min(databases.table.c.id)).group_by(column).order_by(column)
    assert databases.over_shards(groups) == databases.at_once(groups)
    # which of the equal spellings is shown is the server's free choice: only their number is fixed
    distinct = sa.select(column).distinct()
    assert len(databases.over_shards(distinct)) == len(databases.at_once(distinct))
    if name.endswith("_bin") and "nopad" in name:
        assert Counter(databases.over_shards(distinct)) == Counter(databases.at_once(distinct))


@pytest.mark.parametrize("name", text_columns())
def test_the_least_and_the_greatest_text_are_the_servers_own(databases: Databases, name: str) -> None:
    column = databases.table.c[f"t_{name}"]
    with databases.engines["whole"].connect() as connection:
        for function in (sa.func.min, sa.func.max):
            (over,) = databases.over_shards(sa.select(function(column)))[0]
            equal = sa.select(sa.func.count()).where(
                sa.select(function(column)).scalar_subquery() == sa.literal(over, column.type)
            )
            assert connection.scalar(equal) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_distinct_values_of_other_types(databases: Databases, name: str) -> None:
    statement = sa.select(databases.table.c[name]).distinct()
    assert Counter(databases.over_shards(statement)) == Counter(databases.at_once(statement))


def test_numbers_are_combined_exactly(databases: Databases) -> None:
    c = databases.table.c
    statement = sa.select(
        sa.func.sum(c.amount), sa.func.avg(c.amount), sa.func.avg(c.id), sa.func.count(), sa.func.sum(c.id),
        sa.func.min(c.day), sa.func.max(c.moment), sa.func.min(c.amount), sa.func.max(c.raw), sa.func.max(c.hour),
    )  # fmt: skip
    (over,), (once,) = databases.over_shards(statement), databases.at_once(statement)
    assert over == once
    assert [str(value) for value in over] == [str(value) for value in once]


def test_decimals_are_divided_in_words_of_nine_digits(databases: Databases) -> None:
    """2 / 3 of a DECIMAL(12,5) is 0.666666666, not ...667."""
    table = sa.Table("thirds", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("x", sa.Numeric(12, 5)))
    for engine in databases.engines.values():
        table.drop(engine, checkfirst=True)
        table.create(engine)
    rows = {"s0": [1], "s1": [1], "s2": [0], "whole": [1, 1, 0]}
    for name, values in rows.items():
        with databases.engines[name].begin() as connection:
            connection.execute(table.insert(), [{"id": n, "x": value} for n, value in enumerate(values)])
    planner = Planner(ShardMap.parse(databases.map.dump().replace("things: id", "thirds: id")), dialect_name="mysql")
    statement = sa.select(sa.func.avg(table.c.x), sa.func.sum(table.c.x) / sa.func.count(), sa.func.avg(table.c.id))
    (over,), (once,) = databases.over_shards(statement, planner), databases.at_once(statement)
    assert str(over[0]) == str(once[0]) == "0.666666666"
    assert str(over[1]) == str(once[1])


def _expressions(c: Any) -> list[Any]:
    f = sa.func
    return [
        f.sum(c.amount) / f.count(),
        f.sum(c.fine) / f.count(c.fine),
        f.avg(c.fine),
        -f.sum(c.fine) / 7,
        (f.sum(c.id) + 1) / f.count(c.amount),
        f.sum(c.amount) * f.max(c.id) - f.min(c.amount),
        f.sum(c.amount) * f.sum(c.fine),
        f.coalesce(f.sum(c.amount), 0) + f.count(),
        f.coalesce(f.sum(c.fine) / f.sum(c.amount), -1),
        f.max(c.id) - f.min(c.id),
        sa.case((f.count() > 3, f.sum(c.fine)), else_=0),
        f.sum(sa.distinct(c.amount)),
        f.avg(sa.distinct(c.fine)),
        f.count(sa.distinct(c.day)),
        f.count(sa.distinct(c.size)),
        f.bit_xor(c.id),
        f.bit_or(c.id),
    ]


@pytest.mark.parametrize("grouped", [False, True])
def test_expressions_over_aggregates_have_the_servers_digits(databases: Databases, grouped: bool) -> None:
    c = databases.table.c
    for expression in _expressions(c):
        statement = (
            sa.select(c.flag, expression).group_by(c.flag).order_by(c.flag) if grouped else sa.select(expression)
        )
        over, once = databases.over_shards(statement), databases.at_once(statement)
        assert [[str(value) for value in row] for row in over] == [[str(value) for value in row] for row in once]


def test_an_aggregate_of_different_values_of_nothing(databases: Databases) -> None:
    c = databases.table.c
    statement = sa.select(
        sa.func.count(sa.distinct(c.amount)), sa.func.sum(sa.distinct(c.amount)), sa.func.count(), sa.literal(7),
        sa.func.coalesce(sa.func.max(c.raw), b"-"), sa.func.count() + 1, sa.func.bit_and(c.id),
    ).where(c.amount < -5)  # fmt: skip
    assert databases.over_shards(statement) == databases.at_once(statement)


@pytest.mark.parametrize("name", ["std", "stddev_samp", "var_pop", "var_samp"])
def test_deviations_agree_to_twelve_digits(databases: Databases, name: str) -> None:
    c = databases.table.c
    for column in (c.id, c.amount, c.exact):
        function = getattr(sa.func, name)(column)
        statement = sa.select(c.size, function).group_by(c.size).order_by(c.size)
        over, once = databases.over_shards(statement), databases.at_once(statement)
        assert [row[0] for row in over] == [row[0] for row in once]
        assert [row[1] for row in over] == pytest.approx([row[1] for row in once], rel=1e-12)


@pytest.mark.parametrize(
    "expression",
    [
        sa.func.count() * 2**57,
        sa.func.count() * 3e306,
        sa.literal(2**62) + sa.func.count() * 2**56,
        sa.func.count() / sa.literal(3e-307),
        -sa.func.count() * 2**58,
    ],
)
def test_what_is_too_large_for_the_server_is_no_number(databases: Databases, expression: Any) -> None:
    """Each shard's own share still is one."""
    statement = sa.select(expression, sa.func.count()).select_from(databases.table)
    with pytest.raises(DBAPIError, match="1690"):
        databases.at_once(statement)
    with pytest.raises(RoutingError, match="out of range"):
        databases.over_shards(statement)


def test_an_unsigned_number_does_not_become_negative(databases: Databases) -> None:
    """Servers refuse that, each shard by its own values."""
    id_ = sa.type_coerce(databases.table.c.id, mysql.INTEGER(unsigned=True))
    with pytest.raises(RoutingError, match="out of range"):
        databases.over_shards(sa.select(sa.func.min(id_) - sa.func.max(id_)))
    assert databases.over_shards(sa.select(sa.func.max(id_) - sa.func.min(id_))) == [(len(WORDS) * 2 - 1,)]


def test_texts_are_put_together_as_the_server_does(databases: Databases, flavour: str) -> None:
    c = databases.table.c
    text = c["t_utf8mb4_general_ci"]
    in_order = sa.func.aggregate_strings(text, "|").aggregate_order_by(c.id.desc())
    numbers = sa.func.aggregate_strings(c.amount, ",").aggregate_order_by(c.amount, c.id)
    different = sa.func.group_concat(sa.distinct(c.amount)).aggregate_order_by(c.amount.desc())
    statement = sa.select(c.size, in_order, numbers, different, sa.func.count()).group_by(c.size).order_by(c.size)
    assert databases.over_shards(statement) == databases.at_once(statement)
    bytes_ = sa.select(sa.func.group_concat(text))  # in any order, each spelling as often as it is there
    (over,), (once,) = databases.over_shards(bytes_), databases.at_once(bytes_)
    assert Counter(over[0].split(",")) == Counter(once[0].split(","))
    none = sa.select(sa.func.group_concat(text), sa.func.count()).where(c.id < 0)
    assert databases.over_shards(none) == databases.at_once(none) == [(None, 0)]


@pytest.mark.parametrize("name", [*text_columns(), "amount", "flag", "raw"])
def test_texts_are_put_together_in_the_servers_order_of_nulls(databases: Databases, name: str) -> None:
    """Inside of GROUP_CONCAT both servers take NULL for 0 or an empty text."""
    c = databases.table.c
    column = c[name if name in OTHERS else f"t_{name}"]
    for by in (column, column.desc()):
        statement = sa.select(sa.func.aggregate_strings(c.id, ",").aggregate_order_by(by, c.id))
        assert databases.over_shards(statement) == databases.at_once(statement)


def test_texts_are_cut_off_where_the_server_cuts_them(databases: Databases) -> None:
    c = databases.table.c
    statement = sa.select(sa.func.aggregate_strings(c["t_utf8mb4_bin"], ",").aggregate_order_by(c.id))
    for engine in databases.engines.values():
        engine.dispose()

    @sa.event.listens_for(sa.Engine, "connect")
    def shorten(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION group_concat_max_len = 11")

    try:
        over, once = databases.over_shards(statement), databases.at_once(statement)
    finally:
        sa.event.remove(sa.Engine, "connect", shorten)
        for engine in databases.engines.values():
            engine.dispose()
    assert over == once
    assert len(once[0][0].encode()) <= 11


def test_groups_are_filtered_by_any_condition(databases: Databases) -> None:
    c = databases.table.c
    f = sa.func
    conditions = [
        sa.or_(f.sum(c.amount) > 5_000_000, c.size.is_(None)),
        sa.and_(f.count(c.amount).between(3, 20), sa.not_(f.max(c.id) == 60)),
        f.avg(c.fine) > f.min(c.fine) * 2,
        f.count().in_([17, 18]),
        f.sum(c.fine).is_not(None),
        f.count(sa.distinct(c.day)) > f.count(sa.distinct(c.hour)),
        f.max(c.day).is_(None),
        c.size == "large",
        f.stddev(c.amount) > 0,
    ]
    for condition in conditions:
        statement = sa.select(c.size, f.count()).group_by(c.size).having(condition).order_by(c.size)
        assert databases.over_shards(statement) == databases.at_once(statement), str(condition)
        statement = (
            sa.select(f.count(c.id)).group_by(c.size).having(condition).order_by(f.sum(c.id) / f.count(), c.size)
        )
        assert databases.over_shards(statement) == databases.at_once(statement), str(condition)


class Thirds:
    """A table of groups whose averages have no end, spread so that no shard has a whole group."""

    def __init__(self, databases: Databases) -> None:
        self.databases = databases
        self.table = sa.Table(
            "parts", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("g", sa.Integer), sa.Column("x", sa.Integer),
            sa.Column("d", sa.Numeric(10, 3)), sa.Column("size", sa.Enum("small", "large", name="sizes")),
            sa.Column("t", databases.texts[COMMON[1]].type),
        )  # fmt: skip
        rows = [
            {"id": n, "g": n % 4, "x": (5, 0, 0)[n // 4], "d": Decimal(n) / 8, "size": ("large", "small")[n % 2],
             "t": ("a", "á", "A ")[n // 4]}
            for n in range(12)
        ]  # fmt: skip
        by_shard = {shard: [row for row in rows if row["id"] // 4 == n] for n, shard in enumerate(SHARDS)}
        for name, own in {**by_shard, "whole": rows}.items():
            engine = databases.engines[name]
            self.table.drop(engine, checkfirst=True)
            self.table.create(engine)
            with engine.begin() as connection:
                connection.execute(self.table.insert(), own)
        document = databases.map.dump().replace("things: id", "parts: id")
        self.planner = Planner(ShardMap.parse(document), dialect_name="mysql")

    def over_and_once(self, statement: Any) -> tuple[list[list[str]], list[list[str]]]:
        over, once = self.databases.over_shards(statement, self.planner), self.databases.at_once(statement)
        return [[str(value) for value in row] for row in over], [[str(value) for value in row] for row in once]


@pytest.mark.parametrize("limit", [Decimal("1.6667"), Decimal("1.6666"), 1.6667, 5 / 3, 2, Decimal("1.666666666")])
def test_averages_are_compared_with_the_digits_that_the_server_has(databases: Databases, limit: Any) -> None:
    """MySQL compares an AVG before it is rounded; in some expressions both servers do, and that is refused."""
    thirds = Thirds(databases)
    g, average = thirds.table.c.g, sa.func.avg(thirds.table.c.x)
    alone = (average == limit, average < limit, limit <= average, sa.not_(average >= limit), average != limit)
    for plain in alone:
        if limit == 5 / 3:  # floating point, where the last digits decide
            with pytest.raises(RoutingError):
                thirds.over_and_once(sa.select(g).group_by(g).having(plain).order_by(g))
            continue
        shown = sa.select(g, average, sa.case((plain, 1), else_=0)).group_by(g).order_by(g)
        over, once = thirds.over_and_once(shown)
        assert over == once
        over, once = thirds.over_and_once(sa.select(g).group_by(g).having(plain).order_by(g))
        assert over == once
    for part in (
        sa.func.coalesce(average, 0) == limit,
        -average <= -limit,
        average.between(limit, 9),
        average.in_([limit, 9]),
        sa.case((sa.func.count() > 1, average), else_=0) < limit,
    ):
        with pytest.raises(RoutingError, match="HAVING"):
            thirds.planner.plan(sa.select(g).group_by(g).having(part).order_by(g))


@pytest.mark.parametrize("limit", [Decimal("1.6667"), Decimal("1.6666"), 2, Decimal("1.666666666")])
def test_quotients_are_compared_with_the_digits_that_the_server_has(databases: Databases, limit: Any) -> None:
    """MariaDB goes by others in BETWEEN, in IN and with floating point, and all of that is refused."""
    thirds = Thirds(databases)
    g, x = thirds.table.c.g, thirds.table.c.x
    quotient = sa.func.sum(x) / sa.func.count(x)
    for part in (
        quotient == limit,
        quotient < limit,
        -quotient <= -limit,
        sa.func.coalesce(quotient, 0) == limit,
        sa.case((sa.func.count() > 1, quotient), else_=0) >= limit,
    ):
        over, once = thirds.over_and_once(sa.select(g).group_by(g).having(part).order_by(g))
        assert over == once
    for part in (quotient.between(limit, 9), quotient.in_([limit, 9]), quotient >= float(limit)):
        with pytest.raises(RoutingError, match="HAVING"):
            thirds.planner.plan(sa.select(g).group_by(g).having(part).order_by(g))


def test_a_case_has_the_digits_of_the_value_that_it_chooses(databases: Databases) -> None:
    """No shard has more than one row of a group, all of them together have three."""
    thirds = Thirds(databases)
    g, d, x = (thirds.table.c[name] for name in ("g", "d", "x"))
    many = sa.func.count() > 2
    for expression in (
        sa.case((many, sa.func.sum(d)), else_=0),
        sa.case((many, sa.func.avg(x)), else_=0),
        sa.case((many, 1), else_=sa.func.sum(d)),
        sa.case((many, sa.func.sum(d) / 7)),
        sa.case((many, sa.func.sum(sa.distinct(x)))),
        sa.func.coalesce(sa.func.sum(sa.func.length(thirds.table.c.t)), Decimal("0.0")),
        sa.func.coalesce(sa.case((many, sa.func.sum(d))), 0),
        sa.case((many, sa.func.coalesce(sa.func.sum(x), Decimal("2.50"))), else_=0),
        sa.case((many, -sa.func.coalesce(sa.func.sum(x), sa.func.sum(d))), else_=0),
    ):
        over, once = thirds.over_and_once(sa.select(g, expression).group_by(g).order_by(g))
        assert over == once


def test_deviations_of_words_are_those_of_their_numbers(databases: Databases) -> None:
    c = databases.table.c
    for column in (c.size, c.day, c["t_utf8mb4_bin"]):
        statement = sa.select(sa.func.std(column), sa.func.var_samp(column))
        (over,), (once,) = databases.over_shards(statement), databases.at_once(statement)
        assert over == pytest.approx(once, rel=1e-9)


def test_texts_that_are_equal_and_yet_differ_are_one_group_for_having(databases: Databases) -> None:
    """A condition that not all of them fulfil takes the whole group, or nothing of it."""
    thirds = Thirds(databases)
    t = thirds.table.c.t
    statement = sa.select(sa.func.count()).select_from(thirds.table).group_by(t).having(sa.func.length(t) == 1)
    over = databases.over_shards(statement, thirds.planner)
    assert over in ([], [(12,)])


@pytest.mark.parametrize("name", text_columns())
def test_unions_are_sorted_and_told_apart_by_the_server(databases: Databases, name: str) -> None:
    c = databases.table.c
    text = c[f"t_{name}"]
    parts = sa.select(text.label("t")).where(c.id < 40), sa.select(text).where(c.id > 20)
    distinct = sa.union(*parts).order_by("t")
    over, once = databases.over_shards(distinct), databases.at_once(distinct)
    assert len(over) == len(once)
    every = sa.union_all(*(part.add_columns(c.id) for part in parts)).order_by(sa.desc("t"), "id").limit(30).offset(2)
    assert databases.over_shards(every) == databases.at_once(every)


def test_averages_of_groups_have_the_servers_digits(databases: Databases) -> None:
    c = databases.table.c
    statement = (
        sa.select(c.size, sa.func.avg(c.amount), sa.func.sum(c.amount))
        .group_by(c.size)
        .having(sa.func.count() > 2)
        .order_by(sa.func.sum(c.amount).desc())
    )
    over, once = databases.over_shards(statement), databases.at_once(statement)
    assert [[str(value) for value in row] for row in over] == [[str(value) for value in row] for row in once]


def test_dates_with_a_default_are_texts_to_the_server(databases: Databases) -> None:
    c = databases.table.c
    day, moment = date(2000, 1, 1), datetime(2001, 1, 1, 3)  # noqa: DTZ001 - DATETIME has no zone
    for expression in (
        sa.func.coalesce(c.day, day),
        sa.func.coalesce(c.moment, moment),
        sa.case((c.flag, c.day), else_=day),
        sa.func.coalesce(c.moment, c.day),
        sa.select(c.id, sa.func.coalesce(c.day, day).label("due")).subquery().c.due,
    ):
        by = expression.table.c.id if hasattr(expression, "table") else c.id
        ordered = sa.select(by).order_by(expression.desc(), by).limit(40)
        assert databases.over_shards(ordered) == databases.at_once(ordered)
        groups = sa.select(expression, sa.func.count(by)).group_by(expression)
        assert Counter(databases.over_shards(groups)) == Counter(databases.at_once(groups))
    for other in (
        sa.func.coalesce(c.day, sa.literal_column("'none'")),
        sa.func.coalesce(c.day, moment),
        sa.func.coalesce(c.hour, time(5)),
        sa.func.coalesce(c.moment, c.raw),
        sa.type_coerce(c.long, sa.Date),
    ):
        with pytest.raises(RoutingError):
            databases.planner.plan(sa.select(other).distinct())


@pytest.mark.parametrize("name", text_columns())
def test_functions_of_texts_sort_by_the_collation(databases: Databases, name: str) -> None:
    c = databases.table.c
    text = c[f"t_{name}"]
    for function in (
        sa.func.lower(text),
        sa.func.upper(text),
        sa.func.left(text, 1),
        sa.func.trim(sa.func.lower(text)),
    ):
        statement = sa.select(c.id).order_by(function.desc(), c.id).limit(50)
        assert databases.over_shards(statement) == databases.at_once(statement)
        groups = sa.select(sa.func.count(), sa.func.max(c.id)).select_from(databases.table).group_by(function)
        assert Counter(databases.over_shards(groups)) == Counter(databases.at_once(groups))


def test_moments_are_grouped_by_their_days(databases: Databases) -> None:
    c = databases.table.c
    for function in (sa.func.date(c.moment), sa.func.last_day(c.day)):
        statement = sa.select(function, sa.func.count()).group_by(function).order_by(function.desc())
        assert databases.over_shards(statement) == databases.at_once(statement)


@pytest.fixture
def clock_turned_back(databases: Databases) -> Iterator[None]:
    """Connections are in a zone whose clocks went back from 3 to 2 on 2020-10-25."""
    zone, turned = 9_001, 1_603_587_600
    values = {
        "time_zone": f"({zone}, 'N')",
        "time_zone_name": f"('Shardkit/Fold', {zone})",
        "time_zone_transition_type": f"({zone}, 0, 7200, 1, 'SUM'), ({zone}, 1, 3600, 0, 'WIN')",
        "time_zone_transition": f"({zone}, 0, 0), ({zone}, {turned}, 1)",
    }
    for table, rows in values.items():
        databases.server.execute(f"INSERT INTO mysql.{table} VALUES {rows}")

    @sa.event.listens_for(sa.Engine, "connect")
    def set_zone(connection: Any, record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET time_zone = 'Shardkit/Fold'")

    for engine in databases.engines.values():
        engine.dispose()
    yield
    sa.event.remove(sa.Engine, "connect", set_zone)
    for engine in databases.engines.values():
        engine.dispose()
    for table, column in [(table, "name" if table.endswith("name") else "time_zone_id") for table in values]:
        value = "'Shardkit/Fold'" if column == "name" else zone
        databases.server.execute(f"DELETE FROM mysql.{table} WHERE {column} = {value}")


def test_a_moment_of_the_hour_that_a_clock_runs_through_twice(databases: Databases, clock_turned_back: None) -> None:
    """A TIMESTAMP is a moment, whatever the clock shows of it."""
    table = sa.Table(
        "moments", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("at", sa.TIMESTAMP, nullable=True)
    )
    moments = {n: 1_603_587_600 + 600 * n for n in range(-5, 6)}  # from 2:10 to 2:50, and once more
    for name, engine in databases.engines.items():
        table.drop(engine, checkfirst=True)
        table.create(engine)
        with engine.begin() as connection:
            for n, moment in moments.items():
                if name in ("whole", SHARDS[n % 3]):
                    at = sa.func.from_unixtime(moment)
                    connection.exec_driver_sql("SET time_zone = '+00:00'")
                    connection.execute(table.insert().values(id=n, at=at))
            connection.exec_driver_sql("SET time_zone = 'Shardkit/Fold'")
    planner = Planner(ShardMap.parse(databases.map.dump().replace("things: id", "moments: id")), dialect_name="mysql")
    at = table.c.at
    for statement in (
        sa.select(table.c.id).order_by(at),
        sa.select(table.c.id, at).order_by(at.desc()).limit(6),
        sa.select(sa.func.max(at), sa.func.min(at)),
        sa.select(at, sa.func.count(), sa.func.min(table.c.id)).group_by(at).order_by(at, sa.func.min(table.c.id)),
        sa.select(at).distinct().order_by(at),
        sa.select(sa.func.count(at.distinct())),
        sa.union(sa.select(at), sa.select(at)).order_by("at"),
        sa.select(table.c.id).order_by(sa.func.coalesce(at, at), table.c.id),
        sa.select(table.c.id).order_by(sa.case((table.c.id > -3, at)), table.c.id),
        sa.select(table.c.id, sa.func.max(at)).group_by(table.c.id).order_by(sa.func.max(at).desc(), table.c.id),
    ):
        assert databases.over_shards(statement, planner) == databases.at_once(statement)


def test_text_that_is_compared_on_several_levels_is_refused(databases: Databases, flavour: str) -> None:
    if flavour == "mysql":
        pytest.skip("MySQL's collations of several levels do not pad: their weights compare as they are")
    table = sa.Table(
        "levels", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("t", sa.String(9))
    )
    for shard in SHARDS:
        with databases.engines[shard].begin() as connection:
            text = "VARCHAR(9) CHARACTER SET utf8mb4 COLLATE utf8mb4_thai_520_w2"
            connection.exec_driver_sql(f"CREATE TABLE levels (id INT PRIMARY KEY, t {text})")
            connection.execute(table.insert(), [{"id": n, "t": word} for n, word in enumerate(("a", "A", None))])
    document = databases.map.dump().replace("things: id", "levels: id")
    databases_map = ShardMap.parse(document)
    route = Planner(databases_map, dialect_name="mysql").plan(sa.select(table.c.t).order_by(table.c.t))
    streams = []
    for shard in SHARDS:
        with databases.engines[shard].connect() as connection:
            streams.append([tuple(row) for row in connection.execute(route.statement_for(shard))])
    assert route.merge is not None
    with pytest.raises(RoutingError, match="several levels"):
        list(merge_rows(route.merge, streams))


def test_text_that_may_be_longer_than_the_server_sorts_is_refused(databases: Databases) -> None:
    with pytest.raises(RoutingError, match="max_sort_length"):
        databases.planner.plan(sa.select(databases.table.c.id).order_by(databases.table.c.long))
