"""What prunes and what must not: keys are followed by lineage, never by name."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import aliased, joinedload, with_loader_criteria

from shardkit.routing.planner import Planner
from shardkit.routing.route import Route
from tests.routing_shop import Country, Line, Member, Order, Read, Store, User, shop_map

PLANNER = Planner(shop_map(), dialect_name="mysql")
u, o, ln = User, Order, Line


def home(table: str, *key: Any) -> str:
    return PLANNER.shard_map.locate(table, key).shard


def route(statement: Any, parameters: Any = None) -> Route:
    return PLANNER.plan(statement, parameters)


FIVE = home("users", 5)


@pytest.mark.parametrize(
    "statement",
    [
        sa.select(u).where(u.id == 5),
        sa.select(u).where(sa.literal(5) == u.id),
        sa.select(u).where(u.id.in_([5, 5])),
        sa.select(u).where(u.id.in_([sa.literal(5)])),
        sa.select(u).where(u.id.is_not_distinct_from(5)),
        sa.select(u).where(u.name == "x", sa.or_(u.id == 5, sa.and_(u.id == 5, u.age > 3))),
        sa.select(u).where(u.id.in_([5, 6]), u.id.in_([5, 7])),
        sa.select(aliased(u)).where(u.id == 5) if False else sa.select(a := aliased(u)).where(a.id == 5),
        sa.select(u, o).join(u.orders).where(u.id == 5),
        sa.select(u, o).join(u.orders).where(o.user_id == 5),
        sa.select(u, o).where(u.id == o.user_id, o.user_id == 5),
        sa.select(u, o).outerjoin(u.orders).where(u.id == 5),
        sa.select(u, o).outerjoin(u.orders).where(o.user_id == 5),
        sa.select(u, o, ln).outerjoin(u.orders).outerjoin(ln, ln.user_id == o.user_id).where(u.id == 5),
        sa.select(u).options(joinedload(u.orders)).where(u.id == 5).limit(3),
        sa.select(u).options(with_loader_criteria(u, u.id == 5)),
        sa.select(u).where(u.orders.any()).where(u.id == 5),
        sa.select(u).where(u.orders.any(o.user_id == 5)),
        sa.select(u).where(~u.orders.any(), u.id == 5),
        sa.select(u).where(u.id.in_(sa.select(o.user_id).where(o.user_id == 5))),
        sa.select(sq).where(sq.c.number == 5)
        if (sq := sa.select(u.id.label("number")).subquery()) is not None
        else None,
        sa.select(g).where(g.c.user_id == 5)
        if (g := sa.select(o.user_id, sa.func.count()).group_by(o.user_id).subquery()) is not None
        else None,
        sa.select(c).where(c.c.id == 5) if (c := sa.select(u.id).cte()) is not None else None,
        sa.select(u.id, sa.func.row_number().over(order_by=u.name)).where(u.id == 5),
        sa.select(sa.select(u.id).where(u.id == 5).limit(3).subquery()),
        sa.union(sa.select(u.id).where(u.id == 5), sa.select(o.id).where(o.user_id == 5)),
        sa.select(u).where(u.id == 5, sa.text("name = :x").bindparams(x=1)),
        sa.select(u).where(u.id == 5).with_for_update(),
        sa.select(u).where(u.id == 5).with_hint(u, "USE INDEX (PRIMARY)"),
    ],
    ids=str,
)
def test_one_key_is_one_shard(statement: Any) -> None:
    found = route(statement)
    assert found.shards == (FIVE,)
    assert found.merge is None


def trap(statement: Any) -> tuple[str, ...]:
    return route(statement).shards


ALL = ("s0", "s1", "s2")


def test_an_alias_that_is_called_like_the_key_is_not_the_key() -> None:
    amounts = sa.select(o.amount.label("user_id")).subquery()
    assert trap(sa.select(amounts).where(amounts.c.user_id == 5)) == ALL


def test_two_columns_that_trade_names_are_told_apart() -> None:
    traded = sa.select(o.amount.label("user_id"), o.user_id.label("amount")).subquery()
    assert trap(sa.select(traded).where(traded.c.user_id == 5)) == ALL
    assert trap(sa.select(traded).where(traded.c.amount == 5)) == (home("orders", 5),)


def test_an_or_with_a_branch_without_key_does_not_prune() -> None:
    assert trap(sa.select(u).where(sa.or_(u.id == 5, u.age < 95))) == ALL


def test_an_or_of_keys_asks_each_shard_once() -> None:
    same = [n for n in range(60) if home("users", n) == FIVE][:3]
    assert trap(sa.select(u).where(sa.or_(*(u.id == n for n in same)))) == (FIVE,)


@pytest.mark.parametrize(
    "condition",
    [
        sa.not_(u.id == 5),
        sa.not_(sa.and_(u.id == 5, u.age == 3)),
        u.id != 5,
        u.id.not_in([5]),
        u.id > 5,
        u.id + 0 == 5,
        sa.func.abs(u.id) == 5,
        u.id == u.age,
        u.id.is_not(None),
        sa.case((u.id == 5, True), else_=True),
    ],
    ids=str,
)
def test_conditions_that_say_nothing_of_the_key(condition: Any) -> None:
    assert trap(sa.select(u).where(condition)) == ALL


@pytest.mark.parametrize("value", ["5", 5.0, b"5", sa.literal("5"), sa.literal(5.0)])
def test_a_value_of_another_type_does_not_prune(value: Any) -> None:
    assert trap(sa.select(u).where(u.id == value)) == ALL


def test_a_string_key_is_not_pruned_by_a_number() -> None:
    assert trap(sa.select(Store).where(Store.region == 5)) == ALL
    assert trap(sa.select(Store).where(Store.region == "busan")) == ("s1",)


def test_the_equality_of_text_that_is_no_key_says_nothing_on_a_server() -> None:
    """'ANN' = 'ann' under most collations: the name of a country does not pin a region."""
    statement = sa.select(Store).join(Country, Country.title == Store.region).where(Country.title == "busan")
    assert trap(statement) == ALL
    assert Planner(shop_map(), dialect_name="sqlite").plan(statement).shards == ("s1",)


def test_the_on_of_an_outer_join_does_not_prune_the_side_that_it_keeps() -> None:
    on = sa.and_(u.id == o.user_id, u.id == 5)
    assert trap(sa.select(u.id).outerjoin(o, on)) == ALL
    assert trap(sa.select(u.id).outerjoin(o, sa.and_(u.id == o.user_id, o.user_id == 5))) == ALL


def test_the_nulls_of_an_outer_join_are_not_the_null_key() -> None:
    assert trap(sa.select(u.id).outerjoin(u.orders).where(o.user_id.is_(None))) == ALL


def test_an_anti_join_needs_the_other_side_whole() -> None:
    """The NULL key's shard is the one that user 5's shard is compared with: neither may stand for all orders."""
    nobody = next(n for n in range(60) if home("users", n) == home("orders", None))
    anti = sa.select(u.id).outerjoin(o, o.giver == u.id).where(u.id == nobody, o.user_id.is_(None))
    with pytest.raises(sa.exc.InvalidRequestError, match="not joined by their keys"):
        route(anti)


def test_the_value_of_any_row_of_a_group_is_not_the_groups() -> None:
    grouped = sa.select(o.user_id, sa.func.count()).group_by(o.note).subquery()
    with pytest.raises(sa.exc.InvalidRequestError, match="GROUP BY without the key"):
        route(sa.select(grouped).where(grouped.c.user_id == 5))


def test_a_limit_in_a_subquery_is_not_pruned_from_outside() -> None:
    first = sa.select(o.user_id).order_by(o.id).limit(5).subquery()
    with pytest.raises(sa.exc.InvalidRequestError, match="LIMIT inside a subquery"):
        route(sa.select(first).where(first.c.user_id == 5))


def test_each_mention_of_a_cte_is_pinned_for_itself() -> None:
    cte = sa.select(u.id, u.name).cte()
    other = cte.alias()
    assert trap(sa.select(cte.c.id).join(other, other.c.id == cte.c.id).where(cte.c.id == 5)) == (FIVE,)
    with pytest.raises(sa.exc.InvalidRequestError, match="not joined by their keys"):
        route(sa.select(cte.c.id).join(other, other.c.name == cte.c.name).where(cte.c.id == 5))


def test_not_in_a_subquery_does_not_prune() -> None:
    assert len(route(sa.select(u).where(u.id.not_in(sa.select(o.user_id)))).shards) == 3


def test_raw_sql_beside_a_key_is_not_trusted() -> None:
    """AND does not put parentheses around it: ``id = 5 AND a = 1 OR b = 2`` matches rows of every key."""
    with pytest.raises(sa.exc.InvalidRequestError, match="cannot look into text"):
        route(sa.select(u).where(u.id == 5, sa.text("name = 'x' OR name = 'y'")))


def test_nothing_is_sent_when_no_row_can_match() -> None:
    for statement in (
        sa.select(u).where(u.id.in_([])),
        sa.select(u).where(u.id == 1, u.id == 2),
        sa.select(u).where(u.id == sa.bindparam("n", None, type_=sa.Integer)),
        sa.select(u.age, sa.func.count()).where(u.id.in_([])).group_by(u.age),
        sa.select(Member).where(sa.false()),
    ):
        assert route(statement).shards == ()


def test_an_aggregate_over_nothing_still_asks_one_shard_for_its_row() -> None:
    assert len(route(sa.select(sa.func.count()).select_from(u).where(u.id.in_([]))).shards) == 1


def test_null_is_a_key() -> None:
    assert trap(sa.select(o).where(o.user_id.is_(None))) == (home("orders", None),)


def test_composite_keys_prune_only_when_whole() -> None:
    assert trap(sa.select(Read).where(Read.tenant == 1, Read.day == 2)) == (home("reads", 1, 2),)
    assert trap(sa.select(Read).where(Read.tenant == 1)) == ALL
    found = route(sa.select(Read).where(sa.tuple_(Read.tenant, Read.day).in_([(1, 2), (1, 3)])))
    assert found.buckets is not None
    assert len(found.buckets) <= 4


def test_ranges_prune_on_range_partitions() -> None:
    assert trap(sa.select(Member).where(Member.age < 20)) == ("s0", "s1")  # 20 itself is the widened end
    assert trap(sa.select(Member).where(Member.age.between(31, 40))) == ("s2",)
    assert trap(sa.select(Member).where(Member.age > 25, Member.age < 28)) == ("s1",)
    assert trap(sa.select(Member).where(Member.age == 25)) == ("s1",)


def test_the_end_of_a_range_that_is_of_another_type_says_nothing() -> None:
    odd = sa.literal(25.5, sa.Integer)
    assert trap(sa.select(Member).where(Member.age >= odd)) == ALL
    assert trap(sa.select(Member).where(Member.age.between(odd, 40))) == ALL


def test_a_value_that_no_bucket_takes_matches_no_row() -> None:
    assert trap(sa.select(Store).where(Store.region == "jeju")) == ()


def test_parameters_of_the_execution_win() -> None:
    statement = sa.select(u).where(u.id == sa.bindparam("n", 5))
    assert route(statement).shards == (FIVE,)
    other = next(n for n in range(50) if home("users", n) != FIVE)
    assert route(statement, {"n": other}).shards == (home("users", other),)
    assert route(statement.params(n=other)).shards == (home("users", other),)
    assert route(sa.select(u).where(u.id.in_(sa.bindparam("ns", expanding=True))), {"ns": [5]}).shards == (FIVE,)


def test_a_missing_parameter_is_said_so() -> None:
    with pytest.raises(sa.exc.InvalidRequestError, match="A value is required for bind parameter"):
        route(sa.select(u).where(u.id == sa.bindparam("n")))


LAMBDAS: dict[str, Any] = {
    "a statement": lambda n: sa.lambda_stmt(lambda: sa.select(u).where(u.id == n)),
    "a statement with more added": lambda n: sa.lambda_stmt(lambda: sa.select(u)) + (lambda s: s.where(u.id == n)),
    "a condition": lambda n: sa.select(u).where(lambda: u.id == n),
    "a criterion of an option": lambda n: sa.select(u).options(with_loader_criteria(u, lambda cls: cls.id == n)),
    "a criterion of a relationship": lambda n: sa.select(u).join(u.orders.and_(o.user_id == n)),
}


@pytest.mark.parametrize("name", LAMBDAS)
def test_lambdas_are_read_with_the_values_of_their_closure(name: str) -> None:
    for n in range(12):
        assert route(LAMBDAS[name](n)).shards == (home("users", n),)


def test_one_shape_serves_all_values() -> None:
    for n in range(40):
        assert route(sa.select(u).where(u.id == n)).shards == (home("users", n),)
        assert trap(sa.select(o).where(o.user_id.in_([n, None]))) == (home("orders", n),)


def test_the_route_says_why() -> None:
    assert route(sa.select(u, o).join(u.orders).where(u.id == 5)).reasons == ("users.id = value pins users, orders",)
    assert route(sa.select(u)).reasons == ("no condition pins users.id",)
