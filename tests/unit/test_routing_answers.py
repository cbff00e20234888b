"""The answer over shards is the answer of one database with all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Bundle, aliased, contains_eager, joinedload, with_parent

from tests.routing_shop import ROWS, Country, Line, Member, Order, Read, Shop, Store, User, Visit


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    made = Shop()
    made.fill(ROWS)
    yield made
    made.close()


count = sa.func.count
u, o, ln = User, Order, Line

ORDERED: dict[str, Any] = {
    "strings, NULLs first": sa.select(u.name, u.id).order_by(u.name, u.id),
    "descending, NULLs last": sa.select(u.name, u.id).order_by(u.name.desc(), u.id.desc()),
    "nulls_last": sa.select(u.name, u.id).order_by(u.name.nulls_last(), u.id),
    "nulls_first descending": sa.select(u.name, u.id).order_by(u.name.desc().nulls_first(), u.id),
    "several columns": sa.select(u.id, u.age).order_by(u.age.desc(), u.country, u.id),
    "decimals": sa.select(u.balance, u.id).order_by(u.balance.desc(), u.id),
    "dates": sa.select(u.born, u.id).order_by(u.born, u.id),
    "a column that is not selected": sa.select(u.name).order_by(u.id.desc()),
    "an expression": sa.select(u.id).order_by(u.id % 5, u.id),
    "a label": sa.select((u.id * 2).label("twice")).order_by(sa.desc("twice")),
    "limit": sa.select(u.id).order_by(u.id.desc()).limit(5),
    "limit and offset": sa.select(u.id).order_by(u.id).limit(5).offset(3),
    "offset alone": sa.select(u.id).order_by(u.id).offset(20),
    "limit 0": sa.select(u.id).order_by(u.id).limit(0),
    "offset past the end": sa.select(u.id).order_by(u.id).limit(5).offset(500),
    "entities": sa.select(u).order_by(u.name, u.id).limit(7),
    "an entity and a column": sa.select(u, u.age).order_by(u.id).limit(7),
    "joined eager loads under a limit": sa.select(u).options(joinedload(u.orders)).order_by(u.name, u.id).limit(6),
    "a join by the key": sa.select(u.id, o.id).join(u.orders).order_by(o.id).limit(9),
    "groups by the key": sa.select(o.user_id, count().label("n")).group_by(o.user_id).order_by(sa.desc("n"), o.user_id),
    "groups by another column": sa.select(o.note, count().label("n")).group_by(o.note).order_by(o.note.desc()),
    "groups ordered by an aggregate": sa.select(o.amount, count(), sa.func.sum(o.id))
    .group_by(o.amount)
    .order_by(sa.func.sum(o.id).desc())
    .limit(3)
    .offset(1),
    "distinct": sa.select(u.country).distinct().order_by(u.country),
    "distinct under a limit": sa.select(o.amount, o.note).distinct().order_by(o.amount, o.note).limit(4).offset(2),
}

latest = sa.func.row_number().over(partition_by=o.user_id, order_by=o.id.desc()).label("place")
numbered = sa.select(o.id, o.user_id, latest).subquery()

AS_SETS: dict[str, Any] = {
    "all rows": sa.select(u),
    "a window for each key": sa.select(o.id, sa.func.sum(o.amount).over(partition_by=o.user_id, order_by=o.id)),
    "windows for each key and more": sa.select(
        o.id, sa.func.rank().over(partition_by=(o.note, o.user_id), order_by=o.amount)
    )
    .join(o.user)
    .where(u.age > 10),
    "the latest of each key": sa.select(numbered.c.id, numbered.c.user_id).where(numbered.c.place == 1),
    "a window over a join by the key": sa.select(
        o.id, count().over(partition_by=u.id), sa.func.min(o.id).over(partition_by=[o.user_id])
    ).join(o, o.user_id == u.id),
    "a window over groups by the key": sa.select(
        o.user_id, o.note, sa.func.sum(count(o.id)).over(partition_by=o.user_id)
    ).group_by(o.user_id, o.note),
    "IN over shards": sa.select(u).where(u.id.in_([1, 2, 3, 4, 5, 5])),
    "no condition on the key": sa.select(u.id).where(u.age == 11),
    "an alias": sa.select(aliased(u)),
    "groups": sa.select(o.note, count(o.id), count(o.amount), sa.func.avg(o.amount)).group_by(o.note),
    "having": sa.select(o.note, count()).group_by(o.note).having(count() > 14, sa.func.sum(o.amount) >= 1),
    "having by the key": sa.select(o.user_id, count()).group_by(o.user_id).having(count() > 2),
    "min and max": sa.select(sa.func.min(u.name), sa.func.max(u.name), sa.func.min(u.born), sa.func.max(u.id)),
    "aggregates over nothing": sa.select(count(u.id), sa.func.sum(u.id), sa.func.avg(u.id)).where(u.age == 99),
    "aggregates over no bucket": sa.select(count(), sa.func.max(u.id)).where(u.id.in_([])),
    "coalesce": sa.select(sa.func.coalesce(sa.func.sum(o.amount), 0)).where(o.note == "nowhere"),
    "coalesce of some": sa.select(sa.func.coalesce(sa.func.sum(o.amount), 0)),
    "sum of decimals": sa.select(sa.func.sum(u.balance)),
    "distinct keys": sa.select(count(sa.distinct(o.user_id))),
    "distinct": sa.select(o.note).distinct(),
    "distinct with the key": sa.select(o.user_id, o.note).distinct(),
    "a left join by the key": sa.select(u.id, o.id).outerjoin(u.orders),
    "a left join with a condition on the right": sa.select(u.id, o.id).outerjoin(
        o, sa.and_(o.user_id == u.id, o.note == "a")
    ),
    "an anti join": sa.select(u.id).outerjoin(u.orders).where(o.id.is_(None)),
    "three tables": sa.select(u.id, o.id, ln.id).join(o, o.user_id == u.id).join(ln, ln.user_id == o.user_id),
    "a reference table": sa.select(u.id, Country.title).join(Country, Country.code == u.country),
    "a reference table on the nullable side": sa.select(u.id, Country.title).outerjoin(
        Country, Country.code == u.country
    ),
    "only a reference table": sa.select(Country.code),
    "no table": sa.select(sa.literal(1)),
    "EXISTS by the key": sa.select(u.id).where(u.orders.any(o.note == "a")),
    "NOT EXISTS by the key": sa.select(u.id).where(~u.orders.any()),
    "IN a subquery by the key": sa.select(u.id).where(u.id.in_(sa.select(o.user_id).where(o.amount > 2))),
    "a scalar subquery by the key": sa.select(
        u.id, sa.select(count()).select_from(o).where(o.user_id == u.id).scalar_subquery()
    ),
    "a subquery on a reference table": sa.select(u.id).where(u.country.in_(sa.select(Country.code))),
    "a subquery in FROM": sa.select(sa.select(u.id, u.name).where(u.age == 11).subquery()),
    "a CTE": sa.select(sa.select(u.id).where(u.age == 11).cte("young")),
    "grouped rows in FROM": sa.select(u.id, sq.c.n).join(sq, sq.c.user_id == u.id)
    if (sq := sa.select(o.user_id, count().label("n")).group_by(o.user_id).subquery()) is not None
    else None,
    "UNION ALL": sa.union_all(sa.select(u.id).where(u.age == 11), sa.select(o.id).where(o.note == "a")),
    "list partition": sa.select(Store.id).where(Store.region.in_(["seoul", "busan"])),
    "list partition, NULL": sa.select(Store.id).where(Store.region.is_(None)),
    "list partition, joined": sa.select(Store.id, Visit.id).join(Visit, Visit.region == Store.region),
    "range partition": sa.select(Member.id).where(Member.age.between(15, 25)),
    "range partition, open": sa.select(Member.id).where(Member.age >= 20),
    "range partition, NULL": sa.select(Member.id).where(Member.age.is_(None)),
    "a composite key": sa.select(Read.id).where(Read.tenant == 1, Read.day.in_([1, 2, 3])),
    "a composite key as tuples": sa.select(Read.id).where(sa.tuple_(Read.tenant, Read.day).in_([(1, 2), (3, 0)])),
    "half a composite key": sa.select(Read.id).where(Read.tenant == 1),
    "a composite key with NULL": sa.select(Read.id).where(Read.tenant.is_(None), Read.day == 1),
}


ORM: dict[str, Any] = {
    "a bundle": sa.select(Bundle("b", u.id, u.name)).order_by(u.id),
    "contains_eager": sa.select(u).join(u.orders).options(contains_eager(u.orders)).order_by(u.id, o.id),
    "a joined eager load of one": sa.select(o).options(joinedload(o.user)).order_by(o.id).limit(7),
    "an inner joined eager load": sa.select(o).options(joinedload(o.user, innerjoin=True)).order_by(o.id).limit(7),
    "eager loads of eager loads": sa.select(o).options(joinedload(o.user).joinedload(u.orders)).order_by(o.id).limit(4),
    "a joined eager load beside a join, under a limit": sa.select(u, ln.id)
    .join(ln, ln.user_id == u.id)
    .options(joinedload(u.orders))
    .order_by(ln.id)
    .limit(7),
    "a joined eager load beside rows that are equal": sa.select(u)
    .join(ln, ln.user_id == u.id)
    .options(joinedload(u.orders))
    .order_by(u.id)
    .limit(7)
    .offset(2),
    "an entity out of a subquery": sa.select(young := aliased(u, sa.select(u).where(u.age == 11).subquery())).order_by(
        young.id
    ),
    "the same entity twice": sa.select(u, u).order_by(u.id).limit(3),
    "the same column twice": sa.select(u.id, u.id).order_by(u.id).limit(3),
    "an entity and a correlated count": sa.select(
        u, sa.select(count(o.id)).where(o.user_id == u.id).correlate(u).scalar_subquery()
    ).order_by(u.id),
    "an outer join of a join": sa.select(u.id, o.id, ln.id)
    .outerjoin(sa.join(o, ln, o.user_id == ln.user_id), u.id == o.user_id)
    .order_by(u.id, o.id, ln.id),
    "contains": sa.select(u).where(u.orders.contains(Order(id=3, user_id=3))),
    "has": sa.select(o.id).where(o.user.has(u.age == 11)).order_by(o.id),
    "with_parent": sa.select(o).where(with_parent(User(id=5), u.orders)).order_by(o.id),
    "a label in GROUP BY and ORDER BY": sa.select(u.age.label("k"), count().label("n")).group_by("k").order_by("k"),
    "a group of cases": sa.select(sa.case((u.age > 11, "old"), else_="young").label("k"), count())
    .group_by("k")
    .order_by("k"),
}


@pytest.mark.parametrize("name", ORM)
def test_objects_come_as_from_one_database(shop: Shop, name: str) -> None:
    for _ in range(2):  # the second time the shape is known
        assert shop.over_shards(ORM[name]) == shop.at_once(ORM[name])


@pytest.mark.parametrize("name", ORDERED)
def test_the_rows_come_in_the_order_of_one_database(shop: Shop, name: str) -> None:
    assert shop.over_shards(ORDERED[name]) == shop.at_once(ORDERED[name])


@pytest.mark.parametrize("name", AS_SETS)
def test_the_rows_are_those_of_one_database(shop: Shop, name: str) -> None:
    assert Counter(shop.over_shards(AS_SETS[name])) == Counter(shop.at_once(AS_SETS[name]))


@pytest.mark.filterwarnings("ignore:Column-expression-level unary distinct")
def test_distinct_as_a_column_is_distinct(shop: Shop) -> None:
    """SQLAlchemy warns, but renders SELECT DISTINCT."""
    for statement in (
        sa.select(sa.distinct(o.note)).order_by(o.note),
        sa.select(sa.distinct(u.country).label("c")).order_by(u.country).limit(3),
    ):
        assert shop.over_shards(statement) == shop.at_once(statement)


def test_a_limit_without_order_gives_that_many_rows_of_the_result(shop: Shop) -> None:
    rows = shop.over_shards(sa.select(u.id).limit(10).offset(5))
    assert len(rows) == 10
    assert len(set(rows)) == 10


def test_parameters_given_at_execution_count(shop: Shop) -> None:
    statement = sa.select(u.id).where(u.id.in_(sa.bindparam("ids", expanding=True))).order_by(u.id)
    assert shop.over_shards(statement, {"ids": [3, 1]}) == [(1,), (3,)]


def test_the_type_of_a_sum_is_that_of_one_database(shop: Shop) -> None:
    statement = sa.select(sa.func.sum(u.balance), sa.func.sum(u.id), sa.func.avg(u.id))
    (over,), (once,) = shop.over_shards(statement), shop.at_once(statement)
    assert [type(value) for value in over] == [type(value) for value in once]
    assert isinstance(over[0], Decimal)
