"""Statements that a hostile reader found answered wrongly: each is answered as one database answers it, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import joinedload

from shardkit.errors import RoutingError
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.planner import plan
from shardkit.routing.sorting import Comparison, sort_column
from shardkit.routing.spread import Refused
from tests.routing_shop import ROWS, Order, Shop, User, shop_map


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

REFUSED: dict[str, Any] = {
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
}


@pytest.mark.parametrize("name", ANSWERED)
def test_answered_as_one_database_does(shop: Shop, name: str) -> None:
    statement = ANSWERED[name]
    assert Counter(map(repr, shop.over_shards(statement))) == Counter(map(repr, shop.at_once(statement)))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(shop: Shop, name: str) -> None:
    shop.at_once(REFUSED[name])
    with pytest.raises(RoutingError):
        shop.over_shards(REFUSED[name])


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
