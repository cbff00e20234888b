"""Plain raw SQL goes to the one shard that its rows are on; everything else has to be told."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from shardkit.errors import KeyChange, MissingKey, RoutingError, UnknownTable
from shardkit.routing.planner import Planner
from shardkit.routing.route import RouteOptions
from shardkit.shardmap import Move
from tests.routing_shop import Base, User, shop_map

MAP = shop_map()
PLANNER = Planner(MAP, dialect_name="mysql", tables=Base.metadata.tables.get)
UNTYPED = Planner(MAP, dialect_name="mysql")


def at(table: str, *key: Any) -> tuple[str, ...]:
    return (MAP.locate(table, list(key)).shard,)


FIVE, SIX = at("users", 5), at("users", 6)
assert FIVE != SIX

PLAIN: dict[str, tuple[str, ...]] = {
    "SELECT * FROM users WHERE id = 5": FIVE,
    "select name from users where 5 = id": FIVE,
    "SELECT * FROM users AS u WHERE u.id = 5 AND u.age > 3": FIVE,
    "SELECT * FROM users WHERE ID = 5": FIVE,
    "SELECT * FROM `users` WHERE `id` = 5": FIVE,
    "SELECT * FROM users WHERE (id = 5 AND name LIKE '%x%') AND my_own(name) > 3": FIVE,
    "SELECT * FROM users WHERE id IN (5)": FIVE,
    "SELECT * FROM users WHERE id = 5 OR id IN (5, 5)": FIVE,
    "SELECT * FROM users WHERE id = -5": at("users", -5),
    "SELECT age, COUNT(*) FROM users WHERE id = 5 GROUP BY age HAVING COUNT(*) > 1 ORDER BY RAND() LIMIT 3": FIVE,
    "SELECT u.name, o.note FROM users u JOIN orders o ON o.user_id = u.id WHERE u.id = 5": FIVE,
    "SELECT u.name, o.note FROM users u LEFT JOIN orders o ON o.user_id = u.id WHERE u.id = 5": FIVE,
    "SELECT u.name, o.note FROM users u, orders o WHERE o.user_id = u.id AND o.user_id = 5": FIVE,
    "SELECT * FROM users u JOIN orders o ON o.giver = u.age WHERE u.id = 5 AND o.user_id = 5": FIVE,
    "SELECT note FROM orders JOIN countries ON code = note WHERE user_id = 5": FIVE,
    "SELECT * FROM users WHERE id = 5 FOR UPDATE": FIVE,
    "SELECT * FROM stores WHERE region = 'busan'": ("s1",),
    "SELECT * FROM members WHERE age BETWEEN 21 AND 25": ("s1",),
    "SELECT * FROM members WHERE age >= 20 AND age < 29": ("s1",),
    "SELECT * FROM reads WHERE tenant = 1 AND day = 2": at("reads", 1, 2),
    "SELECT * FROM invoices": ("s3",),
    "SELECT * FROM invoices JOIN payments ON invoice_id = invoices.id": ("s3",),
    "UPDATE users SET age = age + 1 WHERE id = 5": FIVE,
    "DELETE FROM users WHERE id = 5 AND age = 3 LIMIT 1": FIVE,
    "UPDATE invoices SET user_id = 3": ("s3",),
    "INSERT INTO users (name, ID) VALUES ('x', 5)": FIVE,
    "INSERT INTO orders (id, user_id, amount) VALUES (1, 5, 1 + 1), (2, 5, my_own())": FIVE,
    "INSERT INTO stores (id, region) VALUES (1, 'busan')": ("s1",),
    "INSERT INTO stores (id, region) VALUES (1, NULL)": ("s2",),
    "INSERT INTO invoices (id) VALUES (1), (2)": ("s3",),
    "INSERT INTO users SET id = 5, name = 'x'": FIVE,
}


@pytest.mark.parametrize("text", PLAIN)
def test_plain_sql_finds_its_shard(text: str) -> None:
    statement = sa.text(text)
    route = PLANNER.plan(statement)
    assert route.shards == PLAIN[text]
    assert route.statement_for(route.shards[0]) is statement
    assert route.merge is None
    assert route.writes == (text.startswith(("UPDATE", "DELETE", "INSERT")) or "FOR UPDATE" in text)


REFUSED = {
    "SELECT * FROM users": "would run on 3 shards",
    "SELECT * FROM users WHERE id = 5 OR age = 3": "would run on 3 shards",
    "SELECT * FROM users WHERE NOT id = 5": "would run on 3 shards",
    "SELECT * FROM users WHERE id <> 5": "would run on 3 shards",
    "SELECT * FROM users WHERE id = '5'": "would run on 3 shards",
    "SELECT * FROM users WHERE id = 5.0": "would run on 3 shards",
    "SELECT * FROM users WHERE id = 4 + 1": "would run on 3 shards",
    "SELECT * FROM users WHERE ABS(id) = 5": "would run on 3 shards",
    "SELECT * FROM users WHERE id <=> 5": "would run on 3 shards",
    "SELECT * FROM users WHERE id = 5 = 1": "would run on 3 shards",
    "SELECT * FROM stores WHERE region = 'bu' 'san'": "would run on 3 shards",
    "SELECT * FROM stores WHERE region = 5": "would run on 3 shards",
    "SELECT * FROM stores WHERE region COLLATE utf8mb4_general_ci = 'busan'": "would run on 3 shards",
    "SELECT age AS id FROM users u JOIN orders o ON o.user_id = u.id WHERE o.id = 5": "would run on 3 shards",
    "SELECT * FROM users JOIN orders ON user_id = users.id WHERE id = 5": "would run on 3 shards",
    "SELECT * FROM users u JOIN orders o ON o.giver = u.id WHERE u.id = 5": "not joined by their keys",
    "SELECT * FROM users u LEFT JOIN orders o ON o.user_id = 6 WHERE u.id = 5": "not joined by their keys",
    "UPDATE users SET age = 3": "would run on 3 shards",
    "UPDATE countries SET title = 'x'": "would change it on one shard only",
    "SELECT * FROM users WHERE id = 5 UNION SELECT * FROM users": "does not say which",
    "SELECT * FROM users WHERE id = 5; DELETE FROM users": "does not say which",
    "SELECT * FROM users WHERE id = 5 AND age IN (SELECT amount FROM orders)": "does not say which",
    "SELECT (SELECT MAX(id) FROM orders) FROM users WHERE id = 5": "does not say which",
    "SELECT * FROM (SELECT * FROM users) AS u WHERE u.id = 5": "does not say which",
    "WITH u AS (SELECT * FROM users) SELECT * FROM u WHERE id = 5": "does not say which",
    "SELECT * FROM users WHERE id = 5 /*! OR 1 = 1 */": "does not say which",
    "SELECT * FROM users WHERE id = 5 -- x": "does not say which",
    "SELECT * FROM users WHERE id = 5 # x": "does not say which",
    'SELECT * FROM users WHERE id = 5 OR name = "id"': "does not say which",
    "SELECT * FROM users WHERE id = 5 || age = 3": "does not say which",
    r"SELECT * FROM stores WHERE region = 'busan' AND size = 'a\' OR 1 = 1'": "does not say which",
    "SELECT * FROM users u RIGHT JOIN orders o ON o.user_id = u.id WHERE u.id = 5": "does not say which",
    "SELECT * FROM users NATURAL JOIN orders WHERE id = 5": "does not say which",
    "SELECT * FROM users JOIN orders USING (id) WHERE id = 5": "does not say which",
    "SELECT * FROM shop.users WHERE id = 5": "does not say which",
    "SELECT * FROM users WHERE id = 5 INTO OUTFILE 'x'": "does not say which",
    "INSERT INTO users (id) VALUES (5), (6)": "would run on 2 shards",
    "INSERT INTO users (name) VALUES ('x')": "has no value for its key",
    "INSERT INTO users (id) VALUES ('5')": "is bound with another type",
    "INSERT INTO users (id) VALUES (5 + 1)": "does not say which",
    "INSERT INTO users VALUES (5, 'x')": "does not say which",
    "INSERT IGNORE INTO users (id) VALUES (5)": "does not say which",
    "INSERT INTO users (id) VALUES (5) ON DUPLICATE KEY UPDATE id = 6": "does not say which",
    "INSERT INTO users (id) SELECT id FROM users": "does not say which",
    "INSERT INTO users (id, age) VALUES (5, (SELECT MAX(age) FROM users))": "does not say which",
    "REPLACE INTO users (id) VALUES (5)": "does not say which",
    "INSERT INTO countries (code) VALUES ('kr')": "would change it on one shard only",
    "UPDATE users JOIN orders ON user_id = users.id SET age = 3 WHERE users.id = 5": "does not say which",
    "UPDATE users SET age = (SELECT 1) WHERE id = 5": "does not say which",
    "SELECT 1": "does not say which",
    "SET @a = 1": "does not say which",
    "CALL my_own(5)": "does not say which",
    "this is no SQL": "does not say which",
    "": "does not say which",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_plain_or_not_of_one_shard_is_refused(text: str) -> None:
    with pytest.raises(RoutingError, match=REFUSED[text]) as raised:
        PLANNER.plan(sa.text(text))
    assert raised.value.hint


def test_parameters_pin_keys() -> None:
    text = sa.text("SELECT * FROM users WHERE id = :number AND name = :name")
    assert PLANNER.plan(text, {"number": 5, "name": "x"}).shards == FIVE
    assert PLANNER.plan(text, {"number": 6, "name": "x"}).shards == SIX
    assert PLANNER.plan(text.bindparams(number=5, name="x")).shards == FIVE
    assert PLANNER.plan(text.bindparams(number=5), {"number": 6}).shards == SIX
    for other in ("5", 5.0):
        with pytest.raises(RoutingError):
            PLANNER.plan(text, {"number": other, "name": "x"})
    with pytest.raises(RoutingError):
        PLANNER.plan(sa.text("SELECT * FROM users WHERE id IN :n").bindparams(sa.bindparam("n", [5], expanding=True)))


def test_rows_of_parameters() -> None:
    text = sa.text("INSERT INTO users (id, name) VALUES (:id, :name)")
    assert PLANNER.plan(text, {"id": 6, "name": "x"}).shards == SIX
    assert PLANNER.plan(text, [{"id": 5, "name": "x"}, {"id": 7, "name": "y"}]).shards == at("users", 7) == FIVE
    with pytest.raises(RoutingError, match="would run on 2 shards"):
        PLANNER.plan(text, [{"id": 5, "name": "x"}, {"id": 6, "name": "y"}])
    with pytest.raises(RoutingError, match="several sets of parameters"):
        PLANNER.plan(sa.text("DELETE FROM users WHERE id = :id"), [{"id": 5}, {"id": 6}])


def test_a_number_that_the_server_makes_up() -> None:
    metadata = sa.MetaData()
    sa.Table("users", metadata, sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("name", sa.String(20)))
    planner = Planner(MAP, tables=metadata.tables.get)
    assert planner.plan(sa.text("INSERT INTO users (id) VALUES (5)")).shards == FIVE
    for text in (sa.text("INSERT INTO users (id) VALUES (0)"), sa.text("INSERT INTO users (id) VALUES (:n)")):
        with pytest.raises(MissingKey, match="the next number"):
            planner.plan(text, {"n": 0})


def test_no_row_can_match() -> None:
    """Its columns are wanted all the same: one shard answers that there is none."""
    route = PLANNER.plan(sa.text("SELECT * FROM users WHERE id = 5 AND id = 7"))
    assert len(route.shards) == 1


def test_entities_from_raw_sql() -> None:
    statement = sa.select(User).from_statement(sa.text("SELECT * FROM users WHERE id = 5"))
    assert PLANNER.plan(statement).shards == FIVE


def test_the_key_cannot_be_changed() -> None:
    for text in (
        "UPDATE users SET age = 3, ID = 7 WHERE id = 5",
        "UPDATE reads SET day = 3 WHERE tenant = 1 AND day = 2",
    ):
        with pytest.raises(KeyChange):
            PLANNER.plan(sa.text(text))


def test_without_the_types_of_its_columns_a_key_pins_nothing() -> None:
    """5 may be '5', '05' and '5x' of a text."""
    with pytest.raises(RoutingError, match=r"create_cluster\(metadata="):
        UNTYPED.plan(sa.text("SELECT * FROM users WHERE id = 5"))
    assert UNTYPED.plan(sa.text("SELECT * FROM invoices WHERE id = 5")).shards == ("s3",)
    assert len(UNTYPED.plan(sa.text("SELECT * FROM countries")).shards) == 1


def test_unknown_tables() -> None:
    with pytest.raises(UnknownTable):
        PLANNER.plan(sa.text("SELECT * FROM elsewhere WHERE id = 5"))


AGREEING: dict[str, RouteOptions] = {
    "SELECT * FROM users": RouteOptions(shard="s2"),
    "SELECT * FROM users WHERE age = 5": RouteOptions(key={"id": 5}),
    "SELECT * FROM users WHERE id = 5": RouteOptions(shard=FIVE[0]),
    "SELECT * FROM users WHERE id IN (5, 6)": RouteOptions(shard=SIX[0]),
    "SELECT * FROM users WHERE id = 5 AND id = 6": RouteOptions(shard="s0"),
    "SELECT * FROM users u JOIN orders o ON o.giver = u.id": RouteOptions(shard="s0"),
    "UPDATE users SET age = 3 WHERE id = 5": RouteOptions(key={"id": 5}),
    "DELETE FROM orders WHERE id = 5": RouteOptions(key={"user_id": 6}),
    "INSERT INTO orders (id, user_id) VALUES (1, 5)": RouteOptions(key={"user_id": 5}),
    "INSERT INTO orders (id) VALUES (1)": RouteOptions(shard="s0"),
    "INSERT INTO orders (id, user_id) VALUES (1, '5')": RouteOptions(shard="s0"),
    "INSERT INTO invoices (id) VALUES (1)": RouteOptions(shard="s3"),
    "SELECT * FROM countries": RouteOptions(shard="s1"),
    "SELECT * FROM elsewhere JOIN users ON users.id = 5": RouteOptions(shard=SIX[0]),
    "SELECT * FROM users WHERE id = 5 /* not read */": RouteOptions(shard=SIX[0]),
    "INSERT INTO users (id) VALUES (5) ON DUPLICATE KEY UPDATE age = 6": RouteOptions(shard=SIX[0]),
}


@pytest.mark.parametrize("text", AGREEING)
def test_hints_count_where_the_text_does_not_say_otherwise(text: str) -> None:
    options = AGREEING[text]
    shard = options.shard or at("users", *(options.key or {}).values())[0]
    assert PLANNER.plan(sa.text(text), None, options).shards == (shard,)


CONTRADICTED = {
    "SELECT * FROM users WHERE id = 5": (RouteOptions(shard=SIX[0]), f"the key in the statement is on {FIVE[0]}"),
    "SELECT * FROM users u JOIN orders o ON o.user_id = u.id WHERE o.user_id = 5": (
        RouteOptions(key={"id": 6}),
        f"the key in the statement is on {FIVE[0]}",
    ),
    "SELECT * FROM users": (RouteOptions(key={"user_id": 5}), "none of users is sharded by that"),
    "SELECT * FROM countries": (RouteOptions(key={"id": 5}), "none of countries is sharded by that"),
    "SELECT * FROM users WHERE age = 3": (RouteOptions(key={"id": "5"}), "says nothing about its bucket"),
    "SELECT * FROM invoices": (RouteOptions(shard="s0"), "no part of 'invoices' on shard 's0'"),
    "UPDATE users SET age = 3 WHERE id = 5": (RouteOptions(key={"id": 6}), f"is on {FIVE[0]}"),
    "UPDATE users SET id = 7 WHERE id = 5": (RouteOptions(shard=FIVE[0]), "would change id"),
    "UPDATE countries SET title = 'x'": (RouteOptions(shard="s0"), "on one shard only"),
    "DELETE FROM users WHERE id = 5": (RouteOptions(shard=SIX[0]), f"is on {FIVE[0]}"),
    "INSERT INTO orders (id, user_id) VALUES (999, 5)": (RouteOptions(shard=SIX[0]), f"belongs on {FIVE[0]}"),
    "INSERT INTO orders (id, user_id) VALUES (1, 6), (2, 5)": (RouteOptions(shard=SIX[0]), f"belongs on {FIVE[0]}"),
    "INSERT INTO orders (id, user_id) VALUES (3, 5)": (RouteOptions(key={"user_id": 6}), f"belongs on {FIVE[0]}"),
    "INSERT INTO orders (id, user_id) VALUES (4, 5)": (RouteOptions(key={"id": 5}), "none of orders is sharded by"),
    "INSERT INTO invoices (id) VALUES (1)": (RouteOptions(shard="s0"), "no part of 'invoices' on shard 's0'"),
    "INSERT INTO countries (code) VALUES ('kr')": (RouteOptions(shard="s0"), "on one shard only"),
}


@pytest.mark.parametrize("text", CONTRADICTED)
def test_a_hint_that_the_text_contradicts_is_refused(text: str) -> None:
    options, message = CONTRADICTED[text]
    with pytest.raises(RoutingError, match=message):
        PLANNER.plan(sa.text(text), None, options)


def test_a_hint_that_parameters_contradict_is_refused() -> None:
    there = RouteOptions(shard=SIX[0])
    insert = sa.text("INSERT INTO orders (id, user_id) VALUES (:id, :user)")
    change = sa.text("UPDATE users SET age = :age WHERE id = :user")
    for text in (insert, change):
        assert PLANNER.plan(text, {"id": 1, "age": 1, "user": 6}, there).shards == SIX
        assert PLANNER.plan(text, None, there).shards == SIX  # no values yet, as explain() asks
        for sets in ({"id": 1, "age": 1, "user": 5}, [{"id": n, "age": 1, "user": n} for n in (6, 5)]):
            with pytest.raises(RoutingError, match=f"on {FIVE[0]}"):
                PLANNER.plan(text, sets, there)


def test_without_the_types_of_its_columns_hints_count() -> None:
    options = RouteOptions(shard=SIX[0])
    assert UNTYPED.plan(sa.text("SELECT * FROM users WHERE id = 5"), None, options).shards == SIX
    assert UNTYPED.plan(sa.text("SELECT * FROM users"), None, RouteOptions(key={"id": 5})).shards == FIVE
    with pytest.raises(RoutingError, match="none of users is sharded by that"):
        UNTYPED.plan(sa.text("SELECT * FROM users"), None, RouteOptions(key={"user_id": 5}))


def test_hinted_rows_are_known_by_their_own_buckets() -> None:
    """They decide what may run while rows move: the key that was named may be in another bucket of the shard."""
    own = MAP.locate("users", [5]).bucket
    other = next(n for n in range(6, 99) if at("users", n) == FIVE and MAP.locate("users", [n]).bucket != own)
    for text in ("INSERT INTO users (id) VALUES (5)", "DELETE FROM users WHERE id = 5"):
        for options in (RouteOptions(shard=FIVE[0]), RouteOptions(key={"id": other})):
            assert PLANNER.plan(sa.text(text), None, options).buckets == {own}


def test_while_rows_move() -> None:
    buckets = (MAP.locate("users", [5]).bucket,)
    moving = Move("job", "orders", buckets, FIVE[0], "s3" if FIVE[0] != "s3" else "s0")
    planner = Planner(MAP.with_moves([moving]), tables=Base.metadata.tables.get)
    assert planner.plan(sa.text("SELECT * FROM users WHERE id = 5")).shards == FIVE
    with pytest.raises(RoutingError, match="rebalance job job"):
        planner.plan(sa.text("SELECT * FROM invoices"))


def test_types_that_are_stored_otherwise_pin_nothing() -> None:
    class Shouted(sa.TypeDecorator[str]):
        impl = sa.String
        cache_ok = True

    metadata = sa.MetaData()
    sa.Table("stores", metadata, sa.Column("id", sa.Integer), sa.Column("region", Shouted(20)))
    planner = Planner(MAP, tables=metadata.tables.get)
    with pytest.raises(RoutingError, match="would run on"):
        planner.plan(sa.text("SELECT * FROM stores WHERE region = 'busan'"))
