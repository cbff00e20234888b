"""A route in words and in JSON."""

from __future__ import annotations

import json
import timeit
from typing import Any

import sqlalchemy as sa

from shardkit.routing.explain import explain_json, explain_text
from shardkit.routing.planner import Planner, plan
from tests.routing_shop import Country, Order, User, shop_map

PLANNER = Planner(shop_map())


def test_a_keyed_statement() -> None:
    place = PLANNER.shard_map.locate("users", [5])
    found = explain_json(PLANNER.plan(sa.select(User.id).where(User.id == 5)))
    assert found == {
        "statement": "select",
        "shards": [place.shard],
        "role": "any",
        "keyspace": "orders",
        "tables": ["users"],
        "buckets": [place.bucket],
        "scattered": False,
        "replicated": False,
        "alternatives": [],
        "reasons": ["users.id = value pins users"],
        "merge": [],
        "sql": {place.shard: "SELECT users.id \nFROM users \nWHERE users.id = %s"},
        "first": [],
    }
    json.dumps(found)


def test_a_route_is_printed_as_it_is_explained() -> None:
    route = PLANNER.plan(sa.select(User.id).where(User.id == 5))
    assert str(route) == f"{route}" == explain_text(route)
    assert str(route).startswith(f"select on {route.shards[0]} (any)")


def test_a_statement_over_shards_says_how_it_is_merged() -> None:
    route = PLANNER.plan(sa.select(Order.note, sa.func.count()).group_by(Order.note).order_by(Order.note).limit(3))
    text = explain_text(route)
    assert text.splitlines()[:6] == [
        "select on s0, s1, s2 (any)",
        "  because: no condition pins orders.user_id",
        "  merge: group: combine COUNT",
        "  merge: sort the groups",
        "  merge: take 3",
        "  s0, s1, s2:",
    ]


def test_subqueries_that_run_first_are_shown_with_their_own_routes() -> None:
    buyers = sa.select(Order.user_id).where(Order.amount > 100)
    route = PLANNER.plan(sa.select(User.name).where(User.age.in_(buyers)))
    assert explain_text(route).splitlines() == [
        "first, for users.age IN its values:",
        "  select on s0, s1, s2 (any)",
        "    because: no condition pins orders.user_id",
        "    merge: one shard after the other",
        "    s0, s1, s2:",
        "      SELECT orders.user_id",
        "      FROM orders",
        "      WHERE orders.amount > %s",
        "select on s0, s1, s2 at most (any)",
        "  because: no condition pins users.id",
        "  merge: one shard after the other",
        "  s0, s1, s2:",
        "    SELECT users.name",
        "    FROM users",
        "    WHERE users.age IN (__[POSTCOMPILE_param_1])",
    ]
    (first,) = explain_json(route)["first"]
    assert first["purpose"] == "users.age IN its values"
    assert first["tables"] == ["orders"]
    json.dumps(explain_json(route))


def test_values_do_not_appear() -> None:
    route = PLANNER.plan(sa.select(User).where(User.id == 987654, User.name == "secret"))
    assert "987654" not in explain_text(route)
    assert "secret" not in explain_text(route)


def test_writes_and_locks_need_the_master() -> None:
    assert explain_json(PLANNER.plan(sa.delete(User).where(User.id == 5)))["role"] == "master"
    assert explain_json(PLANNER.plan(sa.select(User).where(User.id == 5).with_for_update()))["role"] == "master"


def test_a_reference_table_is_read_anywhere() -> None:
    found = explain_text(PLANNER.plan(sa.select(Country.code)))
    assert "or any of: s0, s1, s2" in found


def test_nothing_to_send_is_said_so() -> None:
    assert "nothing is sent" in explain_text(PLANNER.plan(sa.select(User).where(User.id.in_([]))))


def test_planning_once_needs_no_planner() -> None:
    assert plan(sa.select(User).where(User.id == 5), None, shop_map(), dialect_name="sqlite").shards


def test_a_known_shape_is_planned_in_microseconds() -> None:
    """Far above what it takes (a busy machine must not fail the test), far below a compilation (about 1 ms)."""
    statement = sa.select(User).where(User.id == 5)
    PLANNER.plan(statement)
    assert min(timeit.repeat(lambda: PLANNER.plan(statement), number=200, repeat=5)) / 200 < 100e-6


def test_parameters_say_which_columns_are_written() -> None:
    """Without them an INSERT is shown with all columns of its table, though it is not sent with them."""
    planner = Planner(shop_map())
    table: Any = User.__table__
    rows = [{"id": 5, "name": "a"}, {"id": 6, "name": "b"}]
    shown = explain_json(planner.plan(sa.insert(table), rows))["sql"]
    assert shown
    assert set(shown.values()) == {"INSERT INTO users (id, name) VALUES (%s, %s)"}
    (shown,) = explain_json(planner.plan(sa.update(table).where(table.c.id == 5), {"age": 3}))["sql"].values()
    assert shown == "UPDATE users SET age=%s WHERE users.id = %s"
    statement = sa.update(table).where(table.c.id == sa.bindparam("which")).values(age=sa.bindparam("how_old"))
    (shown,) = explain_json(planner.plan(statement, [{"which": 5, "how_old": 3}]))["sql"].values()
    assert shown == "UPDATE users SET age=%s WHERE users.id = %s"
    assert all(explain_json(planner.plan(sa.insert(User), rows))["sql"].values())
