"""Statements that a hostile reader found answered wrongly: each is answered as one database answers it, or refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import joinedload
from sqlalchemy.types import TypeDecorator

from shardkit.errors import RoutingError
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.formulas import value_of
from shardkit.routing.planner import Planner, plan
from shardkit.routing.route import RouteOptions
from shardkit.routing.sorting import Comparison, sort_column
from shardkit.routing.spread import Refused
from shardkit.session.renamed import refuse_shared_schema
from shardkit.shardmap import ShardMap
from tests.routing_shop import ROWS, Country, Order, Shop, User, shop_map


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    made = Shop()
    made.fill(ROWS)
    yield made
    made.close()


count, total = sa.func.count, sa.func.sum
u, o = User, Order
users_of_nobody = sa.select(count(u.id)).scalar_subquery()

ANSWERED: dict[str, Any] = {
    "different keys beside other different values": sa.select(count(o.user_id.distinct()), count(o.amount.distinct())),
    "different keys beside a sum of different values": sa.select(
        o.note, count(o.user_id.distinct()), total(o.amount.distinct())
    ).group_by(o.note),
    "distinct, sorted by what is selected": sa.select(u).distinct().order_by(u.name, u.id),
    "a subquery's parameter said with params()": sa.select(u.id)
    .where(u.id.in_(sa.select(o.giver).where(o.amount >= sa.bindparam("least", 5))))
    .params(least=0),
    "groups of an expression without a name": sa.select(sa.func.length(u.name), count()).group_by(
        sa.func.length(u.name)
    ),
    "a quotient over no rows": sa.select(count(o.amount.distinct()) / 2).where(o.amount > 10_000),
    "a window function to sort groups by": sa.select(u.id)
    .group_by(u.id)
    .order_by(sa.func.row_number().over(partition_by=u.id, order_by=u.id), u.id),
}

many, most, mean = count().label("many"), sa.func.max(o.amount).label("most"), sa.func.avg(o.amount).label("mean")
ANSWERED |= {
    f"{name} given by {how}": statement
    for how, named in {
        "column()": sa.column,
        "a column() with a type": lambda name: sa.column(name, sa.Integer),
        "literal_column()": sa.literal_column,
    }.items()
    for name, statement in {
        "HAVING a label": sa.select(o.note, many).group_by(o.note).having(named("many") > 12),
        "HAVING several labels": sa.select(o.note, many, mean, most)
        .group_by(o.note)
        .having(sa.or_(named("mean") > 2.5, named("MOST") < named("many") / 2)),
        "HAVING a label of all rows": sa.select(many).select_from(o).having(named("many") > 10_000),
        "HAVING a group": sa.select(o.amount, many).group_by(o.amount).having(named("amount") > 2),
        "ORDER BY a label": sa.select((-o.amount).label("less"), o.id).order_by(named("less"), o.id),
        "ORDER BY a label like a column": sa.select((-o.amount).label("amount"), o.id)
        .order_by(named("amount").desc(), o.id)
        .limit(7),
        "GROUP BY a label": sa.select((o.amount + 1).label("more"), many).group_by(named("more")),
    }.items()
}
ANSWERED["groups of joined tables by a label"] = (
    sa.select((label := (o.amount + 1).label("more")), many)
    .select_from(u)
    .outerjoin(o, o.user_id == u.id)
    .group_by(label)
    .having(many > 1)
)
ANSWERED["sums that are whole numbers on some shards only"] = sa.select(
    u.country, total(sa.case((u.age == 12, u.id * 0.5), else_=0))
).group_by(u.country)
ANSWERED["aggregates of two classes"] = (
    sa.select(u.country, count(u.age.distinct()), count(o.note.distinct()) + count(), total(o.amount) * 2)
    .select_from(u)
    .outerjoin(o, o.user_id == u.id)
    .group_by(u.country)
)
ANSWERED["HAVING a label and a condition on equal texts"] = (
    sa.select(o.note, many).group_by(o.note).having(o.note == "a", sa.column("many") > 12)
)

one_country = sa.select(Country.code).order_by(sa.func.random()).limit(1).subquery()
REFUSED: dict[str, Any] = {
    "HAVING a label that is a column's name": sa.select(sa.func.sum(o.amount).label("giver"), o.note)
    .group_by(o.note)
    .having(sa.column("giver") > 3),
    "a label's name inside of ORDER BY": sa.select((-o.amount).label("less")).order_by(-sa.column("less", sa.Integer)),
    "a random row of a reference table, another on each shard": sa.select(u.id).join(one_country, sa.true()),
    "HAVING a random value": sa.select(o.note).group_by(o.note).having(sa.func.random() > 0),
    "an inner join that leaves out what LIMIT has counted": sa.select(u)
    .options(joinedload(u.orders, innerjoin=True))
    .order_by(u.id.desc())
    .limit(4),
    "different texts added up": sa.select(total(u.name.distinct())),
    "a subquery among the columns of an aggregate over nothing": sa.select(count(o.id), users_of_nobody).where(
        sa.false()
    ),
    "distinct, sorted by what is not selected": sa.select(o.user_id).distinct().order_by(o.amount),
    "distinct entities, sorted by another table": sa.select(u).join(u.orders).distinct().order_by(o.amount),
    "distinct joined tables with eager loads under a limit": sa.select(u)
    .join(u.orders)
    .distinct()
    .options(joinedload(u.orders))
    .order_by(u.id)
    .limit(4),
    "groups by a label that is a column's name": sa.select(sa.func.coalesce(u.age, 11).label("age"), count()).group_by(
        "age"
    ),
    "groups by a label object that is the key's name": sa.select((label := u.age.label("id")), count()).group_by(label),
    "distinct with a default for an aggregate": sa.select(sa.func.coalesce(sa.func.max(o.note), "a"))
    .group_by(o.amount)
    .distinct(),
    "having without an aggregate over nothing": sa.select(count(o.amount.distinct())).having(sa.literal(1) == 2),
    "groups by a label that is a column's name but for its case": sa.select(
        sa.func.coalesce(u.age, 11).label("Age"), count()
    ).group_by("Age"),
    "a case of a constant over nothing": sa.select(
        sa.case((sa.literal("x") == "x", count(o.amount.distinct())), else_=5)
    ).where(o.amount > 10_000),
    "having a constant or an aggregate over nothing": sa.select(count(o.amount.distinct()))
    .where(o.amount > 10_000)
    .having(sa.or_(sa.literal(1) == 1, count(o.amount.distinct()) > 5)),
    "sorted by a value, which a driver sends as a column's number": sa.select(u.id, u.age).order_by(sa.literal(2)),
}

REFUSED |= {
    "DISTINCT with the time itself": sa.select(o.note, sa.func.now()).distinct(),
    "different times": sa.select(count(sa.func.now().distinct())).select_from(o),
    "groups by the time itself": sa.select(sa.func.current_timestamp(), count(o.id)).group_by(
        sa.func.current_timestamp()
    ),
    "a union of rows with the time itself": sa.union(
        sa.select(u.id, sa.func.now().label("t")), sa.select(o.user_id, sa.func.now())
    ),
    "groups by the day": sa.select(count(o.id)).group_by(sa.cast(sa.func.now(), sa.Date)),
}
for text in ("/*+ SET_VAR(sql_select_limit=2) */", "/*+ MAX_EXECUTION_TIME(1000) set_var(timestamp=5) */"):
    REFUSED[f"a hint that sets a variable: {text}"] = sa.select(u.id).prefix_with(text)
    REFUSED[f"a statement hint that sets a variable: {text}"] = sa.select(u.id).with_statement_hint(text)


ANSWERED |= {
    f"a union of {name}": union(
        sa.select(*columns), sa.select(*(sa.type_coerce(u.id, column.type) for column in columns))
    )
    for union in (sa.union, sa.union_all)
    for name, columns in {
        "sums": (u.age + 1, u.id, u.age + 1),
        "negative numbers": (-u.id,),
        "casts": (sa.cast(u.id, sa.Integer),),
        "conditions": (u.id > 3, u.age.is_(None)),
        "cases": (sa.case((u.id > 3, 1), else_=0),),
    }.items()
}
of_user = sa.select(sa.func.count()).where(o.user_id == u.id).scalar_subquery()
ANSWERED |= {
    "ORDER BY a subquery": sa.select(u.id).order_by(of_user.desc(), u.id).limit(5).offset(2),
    "ORDER BY an expression over a subquery": sa.select(u.id, of_user).order_by(sa.func.coalesce(of_user, 0) + 1, u.id),
    "ORDER BY EXISTS": sa.select(u.id).order_by(sa.exists().where(o.user_id == u.id, o.amount > 4), u.id),
}
REFUSED["ORDER BY a subquery of groups"] = sa.select(u.age).group_by(u.age).order_by(sa.func.max(of_user))
REFUSED["ORDER BY a subquery that no key ties"] = sa.select(u.id).order_by(
    sa.select(sa.func.count()).where(o.giver == u.age).scalar_subquery(), u.id
)
ANSWERED["a number that is too large for an integer"] = sa.select(sa.func.count(u.id) * 2**60, -sa.func.count(u.id))


class Words(TypeDecorator[list[str]]):
    """A list, which has no hash."""

    impl = sa.String(20)
    cache_ok = True

    def process_bind_param(self, value: list[str] | None, dialect: Any) -> str | None:  # noqa: ARG002 - the signature
        return None if value is None else " ".join(value)

    def process_result_value(self, value: str | None, dialect: Any) -> list[str] | None:  # noqa: ARG002 - the signature
        return None if value is None else value.split()


class Negated(TypeDecorator[int]):
    """Selects an expression of its column."""

    impl = sa.Integer
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return -column


typed = sa.Table(
    "users",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", Words),
    sa.Column("age", Negated),
)
others = typed.alias()
ANSWERED["IN a subquery of lists"] = sa.select(typed.c.id).where(
    typed.c.name.in_(sa.select(others.c.name).where(others.c.id < 5))
)
ANSWERED["a union of what a type selects"] = sa.union_all(sa.select(typed.c.age), sa.select(typed.c.age))
REFUSED["a sorted union of what a type selects"] = sa.union_all(
    sa.select(typed.c.age, typed.c.id), sa.select(typed.c.age, typed.c.id)
).order_by("age", "id")


from_id, listed_ids = sa.bindparam("least", 3), sa.bindparam("ids", [1, 2], expanding=True)
ANSWERED |= {
    "a union's parameter said with params()": sa.union(
        sa.select(u.id).where(u.id > from_id), sa.select(o.user_id).where(o.user_id > from_id).params(least=4)
    ).params(least=9),
    "a union's list said with params()": sa.union_all(
        sa.select(u.id).where(u.id.in_(listed_ids)), sa.select(u.id).where(u.id == 3)
    ).params(ids=[3, 7, 8]),
}
ANSWERED["groups of an entity"] = sa.select(u, count(o.id), total(o.amount) - 1).join(u.orders).group_by(u)
codes = sa.select(Country.code)
REFUSED |= {
    "IN a union of reference rows that LIMIT cuts": sa.select(u.id).where(
        u.country.in_(sa.union_all(codes, codes).limit(1))
    ),
    "a union of reference rows with a random value": sa.select(u.id).join(
        (some := sa.union(codes.where(sa.func.random() > 0), codes).subquery()), some.c.code == u.country
    ),
    "a union of reference rows of which one part is cut": sa.select(u.id).join(
        (few := sa.union(sa.select(codes.limit(1).subquery()), codes.where(Country.code == "no")).subquery()),
        few.c.code == u.country,
    ),
}
ANSWERED |= {
    "IN a union of reference rows that LIMIT cuts in order": sa.select(u.id).where(
        u.country.in_(sa.union_all(codes, codes).order_by("code").limit(3))
    ),
    "a window function with a frame, by the key": sa.select(
        o.id, total(o.amount).over(partition_by=o.user_id, order_by=o.id, rows=(-1, 1))
    ),
    "a window function with a frame, on one shard": sa.select(
        o.id, total(o.amount).over(order_by=o.id, rows=(None, 0))
    ).where(o.user_id == 3),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_answered_as_one_database_does(shop: Shop, name: str) -> None:
    statement = ANSWERED[name]
    over, once = shop.over_shards(statement), shop.at_once(statement)
    assert Counter(map(repr, over)) == Counter(map(repr, once))
    if name.startswith("ORDER BY"):
        assert over == once


@pytest.mark.parametrize("name", REFUSED)
def test_refused(shop: Shop, name: str) -> None:
    shop.at_once(REFUSED[name])
    with pytest.raises(RoutingError):
        shop.over_shards(REFUSED[name])


class Negated(sa.types.TypeDecorator[int]):
    """Selected as another value than the column's."""

    impl = sa.Integer
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        return -sa.type_coerce(column, sa.Integer)


def test_a_label_of_a_value_that_is_selected_otherwise_does_not_sort_as_its_column() -> None:
    table = sa.table("users", sa.column("id", sa.Integer), sa.column("n", Negated))
    label = table.c.n.label("m")
    for statement in (
        sa.select(label).order_by(label),
        sa.select(label).order_by("m"),
        sa.select(label, count()).group_by(label),
    ):
        with pytest.raises(RoutingError):
            plan(statement, None, shop_map(), dialect_name="sqlite")
    plan(sa.select(table.c.n).order_by(table.c.n), None, shop_map(), dialect_name="sqlite")


@pytest.mark.parametrize(
    "expression",
    [
        total(o.amount) / count() * 100,
        sa.func.avg(o.amount) * 100,
        sa.func.avg(o.amount) / 3,
        sa.func.avg(o.amount) - sa.func.avg(o.id),
        sa.func.coalesce(sa.func.avg(o.amount), 0) + 1,
        -(total(o.amount) / count()) * 2,
    ],
)
def test_servers_have_more_digits_of_a_quotient_than_they_show(expression: Any) -> None:
    for statement in (
        sa.select(expression),
        sa.select(o.note).group_by(o.note).having(expression > Decimal("413.3311")),
    ):
        with pytest.raises(RoutingError, match="quotient or an AVG"):
            plan(statement, None, shop_map(), dialect_name="mysql")
    for fine in (total(o.amount) * 100 / count(), sa.func.avg(o.amount)):
        plan(sa.select(fine), None, shop_map(), dialect_name="mysql")


def test_sets_sort_by_their_numbers_and_native_uuids_not_at_all() -> None:
    servers = dialect_of("mysql")
    _, comparison = sort_column(sa.column("s", mysql.SET("z", "a")), servers)
    assert comparison is Comparison.NUMBER
    with pytest.raises(Refused):
        sort_column(sa.column("u", sa.Uuid()), servers)
    sort_column(sa.column("u", sa.Uuid(native_uuid=False)), servers)


@pytest.mark.parametrize(
    ("expression", "lowered"),
    [
        (sa.column("t", sa.String(9, collation="NOCASE")), True),
        (sa.cast(sa.column("t", sa.String(9, collation="NOCASE")), sa.String), True),
        (sa.collate(sa.column("t", sa.String(9)), "NOCASE"), True),
        (sa.func.upper(sa.column("t", sa.String(9)), type_=sa.String()), False),
        (sa.func.coalesce(sa.column("t", sa.String(9, collation="NOCASE")), ""), None),
        (sa.column("t", sa.String(9, collation="NOCASE")) + "x", None),
    ],
)
def test_sqlite_compares_columns_by_their_collation_and_expressions_by_their_bytes(
    expression: Any, lowered: bool | None
) -> None:
    sqlite = dialect_of("sqlite")
    if lowered is None:
        with pytest.raises(Refused):
            sort_column(expression, sqlite)
        return
    column, _ = sort_column(expression, sqlite)
    assert ("lower(" in str(column)) is lowered


typed = sa.table(
    "users",
    sa.column("id", sa.Integer),
    sa.column("e", sa.Enum("z", "a", name="words")),
    sa.column("s", mysql.SET("z", "a")),
    sa.column("f", sa.Float),
    sa.column("d", sa.Double),
)


@pytest.mark.parametrize("column", [typed.c.e, typed.c.s], ids=["enum", "set"])
def test_words_of_a_union_or_an_expression_are_texts_to_the_server(column: Any) -> None:
    def by(rows: Any) -> tuple[Any, ...]:
        word = rows.c.word
        return sa.select(rows).order_by(word), sa.select(count(rows.c.id)).group_by(word)

    ids = typed.c.id
    word = column.label("word")
    passed_on = sa.select(sa.select(ids, word).subquery()).subquery()
    for fine in (*by(passed_on), *by(passed_on.alias()), sa.select(ids).order_by(column)):
        plan(fine, None, shop_map(), dialect_name="mysql")
    expression = sa.select(ids, sa.func.coalesce(column, "a").label("word"))
    both = sa.union(sa.select(ids, word), sa.select(ids, word))
    for made in (
        sa.union(sa.select(word), sa.select(word)),
        sa.union_all(sa.select(word), sa.select(word)).order_by("word"),
        *by(expression.subquery()),
        *by(sa.select(expression.cte()).subquery()),
        *by(both.subquery()),
    ):
        with pytest.raises(RoutingError):
            plan(made, None, shop_map(), dialect_name="mysql")
        plan(made, None, shop_map(), RouteOptions(shard="s0"), dialect_name="mysql")


def test_texts_that_are_equal_are_told_apart_by_their_weights_beside_the_key() -> None:
    def merge_of(statement: Any) -> Any:
        return plan(statement, None, shop_map(), dialect_name="mysql").merge

    rows = sa.select(o.user_id, o.note).distinct().order_by(o.user_id, o.note).limit(3)
    made = merge_of(rows)
    assert [key.comparison for key in made.distinct] == [Comparison.NUMBER, Comparison.WEIGHTS]
    assert made.statement._limit_clause is None
    assert made.limit == 3
    for alone in (
        rows.order_by(None).order_by(o.user_id),
        rows.distinct().with_only_columns(o.id, o.user_id, o.note),
        sa.select(u).join(u.orders).distinct().order_by(u.name).limit(3),
    ):
        assert merge_of(alone).distinct == ()
        assert merge_of(alone).statement._limit_clause is not None
    part = sa.select(o.id, o.user_id, o.note).subquery()
    assert merge_of(sa.select(part).distinct().order_by(part.c.note)).distinct


seventh = u.balance / 7


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        (sa.func.avg(seventh), False),
        (total(o.amount / 13), False),
        (total(1 / (o.amount + sa.literal(1))), False),
        (total(sa.case((o.amount > 3, o.amount / 13), else_=0)), False),
        (total(o.amount.op("/")(13)), False),
        (total(sa.select(seventh.label("part"), u.id).subquery().c.part), False),
        (sa.func.max(seventh) * 100, False),
        (total(typed.c.f / 7), True),
        (total(o.amount * sa.literal(0.1) / 13), True),
        (total(sa.func.coalesce(seventh, 0)), False),
        (total(sa.func.coalesce(u.balance, 0) * 2), True),
        (total(-u.balance), True),
        (total(sa.func.round(seventh, 2)), True),
        (total(sa.cast(seventh, sa.Numeric(10, 2))), True),
        (total(sa.case((seventh > 1, 1), else_=0)), True),
        (sa.func.max(seventh), True),
        (total(o.amount) / 13, True),
    ],
)
def test_sums_of_quotients_are_rounded_on_each_shard(expression: Any, fine: bool) -> None:
    _asked_of_servers(sa.select(expression), fine=fine)


balance = total(u.balance)


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        (sa.func.coalesce(balance, 1) / 3, False),
        (sa.func.coalesce(balance, 1) * 2 / 3, False),
        (sa.func.coalesce(balance, 0.5) / 3, False),
        (sa.case((count() > 1000, balance), else_=1) / 3, False),
        (sa.case((count() > 1000, balance), else_=total(u.age)) / 3, False),
        (sa.func.coalesce(balance, 0) / 3, True),
        (sa.func.coalesce(balance, Decimal("1.00")) / 3, True),
        (sa.func.coalesce(total(u.age), 1) / 3, True),
        (sa.case((count() > 1000, balance)) / 3, True),
        (balance / sa.func.coalesce(balance, 1), True),
    ],
)
def test_a_quotient_has_the_digits_of_its_dividends_type(expression: Any, fine: bool) -> None:
    _asked_of_servers(sa.select(expression), fine=fine)


def test_digits_of_a_default_are_not_known_where_no_shard_sends_a_row() -> None:
    different = count(u.age.distinct())
    _asked_of_servers(sa.select(sa.func.coalesce(balance, 0) / 3, different), fine=False)
    _asked_of_servers(sa.select(sa.func.coalesce(balance, 0) / 3, different).group_by(u.name), fine=True)
    _asked_of_servers(sa.select(sa.func.coalesce(total(u.age), 0) / 3, different), fine=True)


average = sa.func.avg(u.balance)


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        (average + 0.5, False),
        (sa.literal(7.5) / average, False),
        (average - sa.func.avg(typed.c.f), False),
        (balance / 3 * sa.literal(0.5), False),
        (sa.func.avg(u.balance, type_=sa.Float) + 1, False),
        (sa.func.coalesce(average, 0.5), False),
        (sa.func.ifnull(balance / 3, 0.5), False),
        (sa.func.coalesce(average, sa.func.avg(typed.c.f)), False),
        (sa.case((count() > 2, 0.5), else_=average), False),
        (sa.func.coalesce(sa.case((count() > 2, average)), 0.5), False),
        (sa.func.coalesce(average, 0), True),
        (sa.func.coalesce(average, Decimal("0.5")), True),
        (sa.func.coalesce(balance, 0.5), True),
        (sa.func.avg(typed.c.f) + 0.5, True),
        (sa.func.avg(typed.c.f.distinct()) + 1, True),
        (balance / 0.7, True),
        (balance / 0.7 + 1, True),
        (sa.func.coalesce(balance / 0.7, 0.5), True),
        (sa.func.std(u.balance) + 0.5, True),
    ],
)
def test_a_quotient_becomes_floating_point_with_digits_that_are_not_shown(expression: Any, fine: bool) -> None:
    _asked_of_servers(sa.select(expression), fine=fine)


quotient = balance / count()


@pytest.mark.parametrize(
    ("condition", "fine"),
    [
        (sa.func.coalesce(average, 0) > 1, False),
        (sa.func.coalesce(average, 0.5) > 1, False),
        (-average < -1, False),
        (sa.case((count() > 2, average), else_=0) > 1, False),
        (average.between(1, 2), False),
        (~average.between(1, 2), False),
        (average.in_([1, 2]), False),
        (sa.literal(3).between(average, 4), False),
        (quotient.between(1, 2), False),
        (quotient.in_([1, 2]), False),
        (quotient > 0.5, False),
        (quotient > sa.func.avg(typed.c.f), False),
        (sa.func.coalesce(quotient, 0) > 0.5, False),
        (sa.func.coalesce(balance / 3, 0.5) > 1, False),
        (average > 1, True),
        (average > 0.5, True),
        (average.is_(None), True),
        (sa.func.coalesce(sa.func.avg(typed.c.f), 0) > 1, True),
        (sa.func.avg(typed.c.f).between(1, 2), True),
        (sa.func.coalesce(quotient, 0) > 1, True),
        (quotient > Decimal("0.5"), True),
        (balance.between(1, 2), True),
    ],
)
def test_a_quotient_is_compared_with_digits_that_are_not_shown(condition: Any, fine: bool) -> None:
    _asked_of_servers(sa.select(u.name).group_by(u.name).having(condition), fine=fine)


def test_averages_are_told_apart_by_digits_that_are_not_shown() -> None:
    groups = sa.select(average).group_by(u.name)
    _asked_of_servers(groups, fine=True)
    _asked_of_servers(groups.distinct(), fine=False)
    _asked_of_servers(sa.select(sa.func.avg(typed.c.f)).group_by(typed.c.d).distinct(), fine=True)


@pytest.mark.parametrize(
    ("value", "fine"),
    [
        (sa.func.coalesce(average, 0), False),
        (-sa.func.coalesce(average, 0), False),
        (sa.func.coalesce(balance / 3, 0) + 0, False),
        (sa.func.coalesce(average, None), True),
        (sa.func.coalesce(balance, 0), True),
        (sa.func.coalesce(total(u.age), Decimal("2.50")), True),
    ],
)
def test_a_coalesce_in_a_case_has_the_digits_of_its_type(value: Any, fine: bool) -> None:
    _asked_of_servers(sa.select(sa.case((count() > 2, value), else_=1)).group_by(u.name), fine=fine)


def test_a_coalesce_shows_each_value_with_the_digits_of_its_type() -> None:
    chosen = sa.select(sa.case((count() > 2, sa.func.coalesce(total(u.age), Decimal("2.50"))), else_=1))
    merge = plan(chosen.group_by(u.name), None, shop_map(), dialect_name="mysql").merge
    assert merge
    assert merge.groups
    (computed,) = merge.groups.computed
    case: Any = computed.formula
    assert str(value_of(case.arguments[1], [7] * 20)) == "7.00"


def test_digits_of_a_case_are_not_known_where_no_shard_sends_a_row() -> None:
    different = count(u.age.distinct())
    _asked_of_servers(sa.select(sa.case((count() > 2, Decimal("1.50")), else_=1), different), fine=False)
    _asked_of_servers(sa.select(sa.case((count() > 2, -total(u.age)), else_=1), different), fine=True)
    hidden = -sa.func.coalesce(total(u.age), Decimal("1.50"))  # an integer to SQLAlchemy
    _asked_of_servers(sa.select(sa.case((count() > 2, hidden), else_=1), different), fine=False)


def _asked_of_servers(statement: Any, *, fine: bool) -> None:
    if not fine:
        with pytest.raises(RoutingError):
            plan(statement, None, shop_map(), dialect_name="mysql")
    options = RouteOptions() if fine else RouteOptions(shard="s0")
    plan(statement, None, shop_map(), options, dialect_name="mysql")


def test_different_floats_are_sent_as_they_are_told_apart() -> None:
    for column, sent in ((typed.c.f, "min(users.f + 0e0)"), (typed.c.d, "min(users.d)")):
        route = plan(sa.select(total(column.distinct())), None, shop_map(), dialect_name="mysql")
        assert str(route.merge and route.merge.statement).count(sent) == 2


@pytest.mark.parametrize(
    ("limit", "offset"),
    [(2**63 - 1, 3), (2**64 - 1, 5), (3, 2**63 - 1), (2**63 - 1, 2**63 - 1), (2**64 - 1, None), (None, 2**64 - 1)],
)
def test_a_limit_that_is_none(shop: Shop, limit: int | None, offset: int | None) -> None:
    """``LIMIT 18446744073709551615 OFFSET 5`` is how MySQL's manual leaves a LIMIT away; added up it is no number."""
    for statement in (sa.select(u.id).order_by(u.id), sa.union_all(sa.select(u.id), sa.select(o.id)).order_by("id")):
        everything = shop.over_shards(statement)
        route = shop.route(statement.limit(limit).offset(offset))
        assert shop.answer(route) == everything[offset or 0 : None if limit is None else (offset or 0) + limit]
        assert route.merge is not None
        sent = str(route.merge.statement.compile(compile_kwargs={"literal_binds": True}))
        assert all(int(number) < 2**63 for number in re.findall(r"\d+", sent))


def test_bits_of_binary_text_are_no_numbers() -> None:
    """MySQL answers with as many bytes as the texts have; MariaDB takes them for numbers."""
    raw = sa.Table("users", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("raw", sa.LargeBinary(4)))
    for how in (sa.func.bit_and, sa.func.bit_or, sa.func.bit_xor):
        with pytest.raises(RoutingError, match=r"BIT_\w+ of binary text"):
            plan(sa.select(how(raw.c.raw)), None, shop_map())
        assert plan(sa.select(how(raw.c.id)), None, shop_map()).merge is not None


def test_an_infinite_sum_that_is_no_number_is_null(shop: Shop) -> None:
    """SQLite has infinity, and makes NULL of what is no number."""
    endless = sa.case((u.id < 8, float("inf")), (u.id < 16, float("-inf")), else_=0.5)
    for how in (sa.func.sum, sa.func.avg):
        assert shop.over_shards(sa.select(how(endless))) == shop.at_once(sa.select(how(endless))) == [(None,)]


@pytest.mark.parametrize("hosts", [("10.0.0.1", "10.0.0.1"), ("db.example", "DB.example."), ("127.0.0.1", "localhost")])
def test_a_shard_that_is_led_to_the_database_of_another(hosts: tuple[str, str]) -> None:
    """Only one of the connections renames: to the database in which the other shard stands."""
    document: Any = {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {
            "orders": {
                "partition": {"by": "hash", "buckets": 2},
                "tables": {"users": "id"},
                "placement": {"s0": "0", "s1": "1"},
            }
        },
        "shards": {f"s{n}": {"master": f"mysql://{host}:3306/s{n}"} for n, host in enumerate(hosts)},
    }
    shard_map = ShardMap.parse(document)
    view: Any = SimpleNamespace(map=shard_map, planner=Planner(shard_map))
    with pytest.raises(RoutingError, match="share"):
        refuse_shared_schema(["users"], {"s0": {}, "s1": {None: "s0"}}, view)
    for renamed in ({"s0": {}, "s1": {None: "other"}}, {"s0": {}, "s1": {"elsewhere": "s0"}}, {"s0": {}, "s1": {}}):
        refuse_shared_schema(["users"], renamed, view)
