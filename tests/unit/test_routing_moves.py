"""While buckets move, rows stand on two shards: a statement takes each row once, or is refused with the job's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import aliased, joinedload

from shardkit.errors import RoutingError
from shardkit.routing.planner import Planner
from shardkit.shardmap import Move
from tests.routing_shop import ROWS, Country, Line, Member, Order, Read, Shop, Store, User

u, o, ln = User, Order, Line
count = sa.func.count

JOBS = (
    ("orders", (0, 1, 6, 7, 12), "s0", "s1"),
    ("reads", (0, 1), "s0", "s2"),
    ("stores", ("north",), "s0", "s2"),
    ("members", ("twenties",), "s1", "s0"),
)
MODELS = {"orders": (User, Order, Line), "reads": (Read,), "stores": (Store,), "members": (Member,)}


@pytest.fixture(scope="module", params=["copied", "published"])
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """The rows of the moving buckets are on both shards: copied and not yet published, or published and not cleaned."""
    made = Shop()
    made.fill(ROWS)
    for keyspace, buckets, _, target in JOBS:
        for model in MODELS[keyspace]:
            key = made.map.table(model.__tablename__).key
            rows = [
                row
                for row in ROWS[model]
                if made.map.locate(model.__tablename__, [row[column] for column in key]).bucket in buckets
            ]
            made.copy_to(target, model, rows)
    moved = made.map
    if request.param == "published":
        for keyspace, buckets, _, target in JOBS:
            moved = moved.with_placement(keyspace, dict.fromkeys(buckets, target))
    moved = moved.with_moves(Move(f"job-{job[0]}", *job) for job in JOBS)
    made.map = moved
    made.planner = Planner(moved, dialect_name="sqlite")
    yield made
    made.close()


alias = aliased(u)
STATEMENTS: dict[str, Any] = {
    "all rows": sa.select(u.id),
    "entities": sa.select(u).order_by(u.id),
    "an alias": sa.select(alias.id).where(alias.age == 11),
    "counts": sa.select(count(), sa.func.sum(o.amount), sa.func.avg(o.amount)).select_from(o),
    "groups": sa.select(o.note, count()).group_by(o.note),
    "groups by the key": sa.select(o.user_id, count()).group_by(o.user_id).having(count() > 1),
    "distinct": sa.select(u.country).distinct(),
    "sorted with a limit": sa.select(u.name, u.id).order_by(u.name, u.id).limit(7).offset(2),
    "several keys": sa.select(u.id).where(u.id.in_(range(12))),
    "one key": sa.select(u.id).where(u.id == 5),
    "an inner join": sa.select(u.id, o.id).join(u.orders),
    "an outer join": sa.select(u.id, o.id).outerjoin(u.orders),
    "an anti join": sa.select(u.id).outerjoin(u.orders).where(o.id.is_(None)),
    "three tables": sa.select(u.id, ln.id).join(o, o.user_id == u.id).outerjoin(ln, ln.user_id == o.user_id),
    "a joined eager load under a limit": sa.select(u).options(joinedload(u.orders)).order_by(u.id).limit(9),
    "a reference table": sa.select(u.id, Country.title).outerjoin(Country, Country.code == u.country),
    "EXISTS": sa.select(u.id).where(u.orders.any(o.note == "a")),
    "NOT EXISTS": sa.select(u.id).where(~u.orders.any()),
    "IN a subquery": sa.select(u.id).where(u.id.in_(sa.select(o.user_id).where(o.amount > 1))),
    "a composite key": sa.select(Read.id),
    "a list partition": sa.select(Store.id),
    "a range partition": sa.select(Member.id),
    "a range of a range partition": sa.select(Member.id).where(Member.age > 15),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_every_row_is_taken_once(shop: Shop, name: str) -> None:
    statement = STATEMENTS[name]
    for _ in range(2):  # the second time the shape is known
        assert Counter(shop.over_shards(statement)) == Counter(shop.at_once(statement))


def test_another_alias_of_a_known_shape(shop: Shop) -> None:
    for _ in range(3):
        fresh = aliased(u)
        statement = sa.select(count()).select_from(fresh).where(fresh.age == 11)
        assert shop.over_shards(statement) == shop.at_once(statement)


def test_a_shard_that_is_named_answers_for_its_own_buckets(shop: Shop) -> None:
    rows = [row for shard in ("s0", "s1", "s2") for row in shop.over_shards(sa.select(u.id), shard=shard)]
    assert Counter(rows) == Counter(shop.at_once(sa.select(u.id)))


def test_keyed_statements_carry_no_condition(shop: Shop) -> None:
    statement = sa.select(u.id).where(u.id == 5)
    route = shop.route(statement)
    assert not route.shard_statements
    assert not shop.route(statement, shard=route.shards[0]).shard_statements


SUBQUERY = sa.select(u.id).where(u.age > 3).subquery()


@pytest.mark.parametrize(
    "statement",
    [
        sa.select(SUBQUERY.c.id),
        sa.union_all(sa.select(u.id), sa.select(o.id)),
        sa.select(sa.select(u.id).cte()),
    ],
    ids=["a subquery in FROM", "UNION ALL", "a CTE"],
)
def test_what_cannot_carry_the_condition_is_refused(shop: Shop, statement: Any) -> None:
    with pytest.raises(RoutingError, match="rebalance job job-orders is moving rows"):
        shop.route(statement)


def test_raw_sql_and_ddl_are_refused(shop: Shop) -> None:
    with pytest.raises(RoutingError, match="rebalance job job-"):
        shop.route(sa.text("SELECT count(*) FROM users"), shard="s0")
    with pytest.raises(RoutingError, match="rebalance job job-orders"):
        shop.route(sa.schema.DropTable(User.__table__))
    assert shop.route(sa.text("SELECT 1"), key={"user_id": 5}).shards
    assert shop.route(sa.text("SELECT 1"), shard="s3").shards == ("s3",)


def test_scattered_writes_change_each_row_once(shop: Shop) -> None:
    """Each shard changes the rows of its own buckets: the copies elsewhere are the job's."""
    for statement in (sa.update(u).values(age=1), sa.delete(o).where(o.amount == 1)):
        route = shop.route(statement, scatter=True)
        total = 0
        for shard in route.shards:
            with shop.shards[shard].connect() as connection:
                total += connection.execute(route.statement_for(shard), route.parameters_for(shard)).rowcount
                connection.rollback()
        with shop.whole.connect() as connection:
            assert total == connection.execute(statement).rowcount
            connection.rollback()
