"""Subqueries that run first: the answer is one database's, and what is not certain to be is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased, joinedload, with_loader_criteria

from shardkit.errors import CrossShardJoin, RoutingError, ScatterRefused
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.feeds import MOST_VALUES, feeding_of
from shardkit.routing.planner import Planner
from shardkit.routing.route import RouteOptions
from tests.routing_shop import ROWS, Country, Invoice, Member, Order, Shop, Store, User, Visit, shop_map

u, o = User, Order
other = aliased(User)
PLANNER = Planner(shop_map())
DIALECT = dialect_of("mysql")


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    made = Shop()
    made.fill(ROWS)
    yield made
    made.close()


ANSWERED: dict[str, Any] = {
    "IN": sa.select(u.id).where(u.age.in_(sa.select(o.amount))),
    "NOT IN": sa.select(u.id).where(u.id.not_in(sa.select(o.giver).where(o.giver.is_not(None)))),
    "NOT IN with a NULL among the values": sa.select(u.id).where(u.id.not_in(sa.select(o.giver))),
    "IN nothing": sa.select(u.id).where(u.id.in_(sa.select(o.giver).where(o.amount > 10_000))),
    "NOT IN nothing": sa.select(u.id).where(u.age.not_in(sa.select(o.amount).where(o.amount > 10_000))),
    "the key IN another key": sa.select(u.id).where(u.id.in_(sa.select(o.giver).where(o.amount > 3))),
    "texts": sa.select(u.id).where(u.country.in_(sa.select(Country.code).join(u, u.country == Country.code))),
    "dates": sa.select(u.id).where(u.born.in_(sa.select(other.born).where(other.age > 20))),
    "the same table": sa.select(u.id).where(u.age.in_(sa.select(other.age).where(other.name.like("%a%")))),
    "the same table, no alias": sa.select(u.id).where(u.age == sa.select(sa.func.max(u.age)).scalar_subquery()),
    "another keyspace": sa.select(u.id).where(u.age.in_(sa.select(Member.age))),
    "a vertical table": sa.select(u.id).where(u.id.in_(sa.select(Invoice.user_id))),
    "around a vertical table": sa.select(Invoice.id).where(Invoice.user_id.in_(sa.select(u.id).where(u.age > 20))),
    "around a reference table": sa.select(Country.code).where(Country.code.in_(sa.select(u.country))),
    "EXISTS": sa.select(u.id).where(sa.exists().where(Member.age > 20)),
    "EXISTS of objects": sa.select(u.id).where(sa.select(Member).where(Member.age > 20).exists()),
    "EXISTS of objects with eager loads": (
        sa.select(Member.id).where(sa.select(u).options(joinedload(u.orders)).where(u.age > 20).exists())
    ),
    "EXISTS of an aggregate over nothing": (
        sa.select(u.id).where(sa.exists(sa.select(sa.func.max(Member.id)).where(Member.age > 10_000)))
    ),
    "EXISTS as a column": sa.select(sa.exists().where(u.age > 20)),
    "EXISTS of nothing as a column": sa.select(sa.exists(sa.select(u.id).where(u.age > 10_000))),
    "NOT EXISTS as a column": sa.select(~sa.exists().where(u.age > 20)),
    "EXISTS as columns": sa.select(
        sa.exists().where(u.age > 20).label("users"), sa.and_(sa.exists().where(Member.age > 10_000), sa.true())
    ),
    "EXISTS of a union": sa.union_all(
        sa.select(sa.exists().where(u.age > 20)), sa.select(sa.exists().where(Member.age > 10_000))
    ),
    "NOT EXISTS": sa.select(u.id).where(~sa.exists().where(Member.age > 10_000)),
    "NOT EXISTS of some": sa.select(u.id).where(~sa.exists().where(Member.age > 20)),
    "EXISTS under OR": sa.select(u.id).where(sa.or_(u.age > 30, sa.exists().where(Member.age > 10_000))),
    "a comparison": sa.select(u.id).where(u.age >= sa.select(sa.func.max(o.amount)).scalar_subquery()),
    "a comparison, the other way round": (
        sa.select(u.id).where(sa.select(sa.func.min(o.amount)).scalar_subquery() < u.age)
    ),
    "a comparison with a count": sa.select(u.id).where(u.age > sa.select(sa.func.count(Store.id)).scalar_subquery()),
    "a comparison with no row": (
        sa.select(u.id).where(u.age != sa.select(o.amount).where(o.amount > 10_000).scalar_subquery())
    ),
    "under NOT and OR": sa.select(u.id).where(
        ~sa.or_(u.age.in_(sa.select(o.amount)), sa.and_(u.id > 3, u.age.in_(sa.select(Store.size))))
    ),
    "several": sa.select(u.id).where(u.age.in_(sa.select(o.amount)), u.id.in_(sa.select(o.giver))),
    "one inside another": sa.select(u.id).where(
        u.age.in_(sa.select(o.amount).where(o.giver.in_(sa.select(Invoice.user_id))))
    ),
    "a groups' HAVING inside": sa.select(u.id).where(
        u.age.in_(sa.select(o.amount).group_by(o.amount).having(sa.func.count() > 1))
    ),
    "a limit inside": sa.select(u.id).where(u.id.in_(sa.select(o.giver).order_by(o.id.desc()).limit(4))),
    "a UNION inside is left to its parts": sa.union(
        sa.select(u.id).where(u.age.in_(sa.select(o.amount))), sa.select(o.giver).where(o.amount.in_(sa.select(u.age)))
    ),
    "beside one that is tied": sa.select(u.id).where(u.age.in_(sa.select(o.amount)), u.orders.any(o.amount > 3)),
    "groups around": sa.select(u.country, sa.func.count()).where(u.age.in_(sa.select(o.amount))).group_by(u.country),
    "joins around": sa.select(u.id, o.id).join(u.orders).where(u.age.in_(sa.select(Store.size))),
    "a keyed statement around": sa.select(u.id).where(u.id == 5, u.age.not_in(sa.select(o.amount))),
    "criteria of an option": (
        sa.select(u.id).where(u.age.in_(sa.select(o.amount))).options(with_loader_criteria(o, o.amount > 3))
    ),
    "objects": sa.select(u).where(u.age.in_(sa.select(o.amount))).order_by(u.id).limit(3),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_the_answer_is_that_of_one_database(shop: Shop, name: str) -> None:
    statement = ANSWERED[name]
    assert shop.route(statement).first is not None
    if name == "objects":  # each session has objects of its own
        assert [each.id for (each,) in shop.over_shards(statement)] == [each.id for (each,) in shop.at_once(statement)]
    else:
        assert Counter(shop.over_shards(statement)) == Counter(shop.at_once(statement))


def test_these_cases_are_not_all_alike(shop: Shop) -> None:
    sizes = {len(shop.at_once(statement)) for statement in ANSWERED.values()}
    assert {0, 1} < sizes
    assert len(sizes) > 8


def test_parameters_of_the_statement_are_those_of_its_subqueries(shop: Shop) -> None:
    statement = sa.select(u.id).where(
        u.age > sa.bindparam("age"), u.age.in_(sa.select(o.amount).where(o.amount < sa.bindparam("most")))
    )
    given = {"age": 1, "most": 30}
    assert Counter(shop.over_shards(statement, given)) == Counter(shop.at_once(statement, given))


def test_the_values_of_a_key_pin_its_shards(shop: Shop) -> None:
    route = shop.route(sa.select(u.id).where(u.id.in_(sa.select(Invoice.user_id))))
    assert route.first is not None
    assert len(route.shards) == 3
    fed = shop.route(route.first.fed([[5]]))
    assert fed.shards == (shop.map.locate("users", [5]).shard,)
    assert shop.route(route.first.fed([[]])).shards == ()


def test_a_subquery_that_is_tied_by_the_key_is_pushed_down() -> None:
    assert PLANNER.plan(sa.select(u.id).where(u.id.in_(sa.select(o.user_id).where(o.user_id == u.id)))).first is None


def test_correlation_is_what_the_compiler_makes_of_it() -> None:
    """The inner SELECT names users, which stands in the FROM outside: it has orders alone in its own."""
    inner = sa.select(o.amount).where(o.giver == u.id)
    assert feeding_of(sa.select(u.id).where(u.age.in_(inner)), (), DIALECT, locked=False) is None
    assert feeding_of(sa.select(Member.id).where(Member.age.in_(inner)), (), DIALECT, locked=False) is not None
    deeper = sa.select(Store.size).where(Store.id.in_(inner.correlate(u)))
    assert feeding_of(sa.select(u.id).where(u.age.in_(deeper)), (), DIALECT, locked=False) is None


def test_too_many_values_are_an_error_with_the_fix() -> None:
    route = PLANNER.plan(sa.select(u.id).where(u.age.in_(sa.select(o.amount))))
    assert route.first is not None
    (feed,) = route.first.feeds
    assert feed.values_of([1, 2, 1]) == [1, 2]
    assert len(feed.values_of(range(MOST_VALUES))) == MOST_VALUES
    with pytest.raises(RoutingError, match="more than 10,000 values") as caught:
        feed.values_of(range(MOST_VALUES + 1))
    assert "tie it" in str(caught.value)


def test_a_comparison_takes_one_row() -> None:
    route = PLANNER.plan(sa.select(u.id).where(u.age == sa.select(o.amount).scalar_subquery()))
    assert route.first is not None
    (feed,) = route.first.feeds
    with pytest.raises(RoutingError, match="more than one row"):
        feed.values_of([1, 1])


def test_the_policy_holds_for_subqueries() -> None:
    statement = sa.select(Invoice.id).where(Invoice.user_id.in_(sa.select(u.id).where(u.age > 20)))
    with pytest.raises(ScatterRefused, match="users is read on 3 shards"):
        PLANNER.plan(statement, None, RouteOptions(policy="refuse"))
    keyed = sa.select(Invoice.id).where(Invoice.user_id.in_(sa.select(u.id).where(u.id == 5)))
    assert PLANNER.plan(keyed, None, RouteOptions(policy="refuse")).shards == ("s3",)


def test_a_change_locks_what_its_subqueries_read() -> None:
    route = PLANNER.plan(sa.delete(o).where(o.user_id.in_(sa.select(Invoice.user_id))))
    assert route.first is not None
    (own,) = route.first.routes
    assert own.locking
    assert route.first.feeds[0].statement._for_update_arg.read


def test_a_change_by_what_many_shards_say_is_refused() -> None:
    """Their rows cannot all be locked at one moment."""
    with pytest.raises(CrossShardJoin, match=r"would have to run first .*FOR UPDATE over several shards"):
        PLANNER.plan(sa.delete(o).where(o.amount.in_(sa.select(u.age))), None, RouteOptions(scatter=True))


def test_stores_and_visits(shop: Shop) -> None:
    statement = sa.select(Visit.id).where(Visit.store_id.in_(sa.select(Store.id).where(Store.size > 1)))
    assert Counter(shop.over_shards(statement)) == Counter(shop.at_once(statement))


def test_a_query_of_the_older_style_asks_whether_there_are_any(shop: Shop) -> None:
    with Session(shop.whole) as session:
        statement = sa.select(u.id).where(session.query(Member).filter(Member.age > 20).exists())
    assert Counter(shop.over_shards(statement)) == Counter(shop.at_once(statement))


def test_decimals_that_come_as_floats_do_not_come_as_they_are() -> None:
    """Two DECIMAL(20,10) may be one float: IN would find what the server does not take as equal."""
    told = sa.MetaData()
    ones, others = (
        sa.Table(name, told, sa.Column("id", sa.Integer), sa.Column("x", sa.Numeric(20, 10, asdecimal=False)))
        for name in ("users", "members")
    )
    with pytest.raises(RoutingError):
        PLANNER.plan(sa.select(ones.c.id).where(ones.c.x.in_(sa.select(others.c.x))))


def test_columns_that_are_answered_first_keep_their_names(shop: Shop) -> None:
    old, grown = sa.exists().where(u.age > 20), sa.exists().where(o.amount > 2)
    for statement in (
        sa.select(old),
        sa.select(old, grown),
        sa.select(~old, grown.label("grown"), sa.not_(grown), old),
    ):
        first = shop.route(statement).first
        assert first is not None
        with shop.whole.connect() as connection:
            names = list(connection.execute(statement).keys())
            assert list(connection.execute(first.fed([[1] for _ in first.feeds])).keys()) == names
    bracketed = sa.select(u, sa.and_(u.age > 3, u.id > 2).self_group()).where(u.id.in_(sa.select(o.giver)))
    assert Counter(shop.over_shards(bracketed)) == Counter(shop.at_once(bracketed))
