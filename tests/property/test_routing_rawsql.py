"""Generated raw SQL: where it is sent to one shard, that shard answers as one database with all rows would."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from shardkit.errors import RoutingError
from shardkit.routing.planner import Planner
from tests.routing_shop import ROWS, Base, Shop

TABLES = {
    "users": "id",
    "orders": "user_id",
    "lines": "user_id",
    "stores": "region",
    "members": "age",
    "reads": "tenant",
    "countries": "code",
    "invoices": "id",
}
WORDS = ["'seoul'", "'busan'", "'kr'", "'a'", "''"]


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    made = Shop()
    made.fill(ROWS)
    yield made
    made.close()


@st.composite
def conditions(draw: st.DrawFn, aliases: dict[str, str], depth: int = 2) -> str:
    if depth and draw(st.booleans()):
        inner = [draw(conditions(aliases, depth - 1)) for _ in range(2)]
        joined = f"({inner[0]} {draw(st.sampled_from(['AND', 'AND', 'OR']))} {inner[1]})"
        return f"NOT {joined}" if draw(st.integers(0, 5)) == 0 else joined
    alias = draw(st.sampled_from(sorted(aliases)))
    table = Base.metadata.tables[aliases[alias]]
    name = draw(st.sampled_from([TABLES[table.name]] * 4 + [column.name for column in table.c]))
    text = isinstance(table.c[name].type, sa.String)
    value = st.sampled_from(WORDS) if text and draw(st.integers(0, 5)) else st.integers(-1, 30).map(str)
    column = draw(st.sampled_from([name, f"{alias}.{name}", f"{alias}.{name}"]))
    match draw(st.integers(0, 8)):
        case 0:
            return f"{column} IN ({', '.join(draw(st.lists(value, min_size=1, max_size=3)))})"
        case 1:
            return f"{column} BETWEEN {draw(value)} AND {draw(value)}"
        case 2:
            return f"{column} IS NULL"
        case 3:
            return f"{column} {draw(st.sampled_from(['<', '<=', '>', '>=', '<>']))} {draw(value)}"
        case 4:
            return f"{draw(value)} = {column}"
        case _:
            return f"{column} = {draw(value)}"


@st.composite
def statements(draw: st.DrawFn) -> str:
    names = sorted(TABLES)
    aliases = {"a": draw(st.sampled_from(names))}
    source = f"{aliases['a']} a"
    if draw(st.booleans()):
        aliases["b"] = draw(st.sampled_from(names))
        tie = f"a.{TABLES[aliases['a']]} = b.{TABLES[aliases['b']]}"
        on = tie if draw(st.integers(0, 3)) else draw(conditions(aliases, 1))
        source += f" {draw(st.sampled_from(['JOIN', 'LEFT JOIN']))} {aliases['b']} b ON {on}"
    shown = ", ".join(f"{alias}.{TABLES[table]}" for alias, table in aliases.items())
    shown = draw(st.sampled_from(["*", shown, "COUNT(*)"]))
    return f"SELECT {shown} FROM {source} WHERE {draw(conditions(aliases))}"


class Tally:
    """How many were sent."""

    asked = 0
    sent = 0


@settings(max_examples=1500, suppress_health_check=list(HealthCheck), deadline=None)
@given(statements())
def check(shop: Shop, planner: Planner, text: str) -> None:
    note(text)
    with shop.whole.connect() as whole:
        try:
            once = Counter(map(tuple, whole.execute(sa.text(text))))
        except sa.exc.OperationalError:  # a column that two tables have
            return
    Tally.asked += 1
    try:
        route = planner.plan(sa.text(text))
    except RoutingError:
        return
    Tally.sent += 1
    (shard,) = route.shards
    with shop.shards[shard].connect() as one:
        assert Counter(map(tuple, one.execute(sa.text(text)))) == once


def test_one_shard_answers_as_all_of_them_would(shop: Shop) -> None:
    check(shop, Planner(shop.map, dialect_name="sqlite", tables=Base.metadata.tables.get))
    assert Tally.sent > Tally.asked / 10
