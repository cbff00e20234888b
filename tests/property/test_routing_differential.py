"""Generated statements: over shards they give what one database gives, or a RoutingError. Never anything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from shardkit.errors import RoutingError
from tests.routing_shop import ROWS, Country, Invoice, Line, Member, Order, Read, Shop, Store, User, Visit

TABLES = [User, Order, Line, User, Order, Line, User, Order, Country, Country, Read, Store, Visit, Member, Invoice]
#: Statements that must not be refused too often: a router that refuses everything is never wrong.
ANSWERED = 0.4


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    made = Shop()
    made.fill(ROWS)
    yield made
    made.close()


@dataclass
class Relation:
    """Something to select from, and its columns."""

    clause: Any
    columns: list[Any]

    def of(self, kind: type[sa.types.TypeEngine[Any]]) -> list[Any]:
        return [column for column in self.columns if isinstance(column.type, kind)]


KEYS = {"id", "user_id", "region", "tenant", "country", "code"}
WORDS = ["seoul", "busan", "ann", "bob", "a", "A", "kr", "de", ""]


@st.composite
def relations(draw: st.DrawFn, depth: int = 1) -> Relation:
    if depth and draw(st.integers(0, 3)) == 0:
        return draw(derived(depth - 1))
    table: Any = draw(st.sampled_from(TABLES)).__table__
    clause = table.alias() if draw(st.booleans()) else table
    return Relation(clause, list(clause.c))


@st.composite
def derived(draw: st.DrawFn, depth: int) -> Relation:
    """A subquery or CTE whose columns may carry each other's names."""
    inner = draw(relations(depth))
    shown = draw(st.lists(st.sampled_from(inner.columns), min_size=1, max_size=3, unique_by=id))
    names = draw(st.permutations(["id", "user_id", "value"]))
    statement = sa.select(*(column.label(name) for column, name in zip(shown, names, strict=False)))
    statement = statement.select_from(inner.clause)
    if draw(st.booleans()):
        statement = statement.where(draw(predicates(inner, 0)))
    extra = draw(st.integers(0, 6))
    if extra == 0:
        statement = statement.distinct()
    elif extra == 1:
        statement = statement.order_by(*shown, *inner.columns).limit(draw(st.integers(1, 6)))
    elif extra == 2:
        statement = statement.group_by(*shown)
    clause: Any = statement.cte() if draw(st.integers(0, 3)) == 0 else statement.subquery()
    return Relation(clause, list(clause.c))


def values(column: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(WORDS) if isinstance(column.type, sa.String) else st.integers(-1, 30)


def keyish(columns: list[Any]) -> st.SearchStrategy[Any]:
    """Columns, those with a key's name more often."""
    return st.sampled_from(columns + [column for column in columns if column.name in KEYS] * 3)


@st.composite
def comparisons(draw: st.DrawFn, relation: Relation) -> Any:
    columns = relation.of(sa.Integer) + relation.of(sa.String)
    if not columns:
        return sa.true()
    column = draw(keyish(columns))
    value = values(column)
    match draw(st.integers(0, 12)):
        case 0:
            return column.in_(draw(st.lists(value, max_size=6)))
        case 1:
            return column.is_(None)
        case 2:
            return column.between(draw(value), draw(value))
        case 3:
            return column >= draw(value)
        case 4:
            return column < draw(value)
        case 5:
            return column != draw(value)
        case 6:
            return sa.literal(draw(value), column.type) == column
        case 7:
            other = draw(st.sampled_from([c for c in columns if type(c.type) is type(column.type)]))
            return column == other
        case 8:
            return column.is_not_distinct_from(draw(value))
        case _:
            return column == draw(value)


@st.composite
def predicates(draw: st.DrawFn, relation: Relation, depth: int = 2) -> Any:
    if depth <= 0:
        return draw(comparisons(relation))
    match draw(st.integers(0, 9)):
        case 0 | 1:
            return sa.and_(draw(predicates(relation, depth - 1)), draw(predicates(relation, depth - 1)))
        case 2 | 3:
            return sa.or_(draw(predicates(relation, depth - 1)), draw(predicates(relation, depth - 1)))
        case 4:
            return sa.not_(draw(predicates(relation, depth - 1)))
        case 5 | 6:
            return draw(with_subquery(relation))
        case _:
            return draw(comparisons(relation))


@st.composite
def with_subquery(draw: st.DrawFn, outer: Relation) -> Any:
    table: Any = draw(st.sampled_from(TABLES)).__table__
    inner = Relation(table.alias(), [])
    inner.columns = list(inner.clause.c)
    mine, theirs = inner.of(sa.Integer), outer.of(sa.Integer)
    if not theirs or not mine:
        return sa.true()
    column, other = draw(keyish(mine)), draw(keyish(theirs))
    condition = draw(comparisons(inner))
    match draw(st.integers(0, 3)):
        case 0:
            return other.in_(sa.select(column).where(condition))
        case 1:
            return other.not_in(sa.select(column).where(condition))
        case 2:
            total = sa.select(sa.func.count()).select_from(inner.clause).where(column == other, condition)
            return total.scalar_subquery() > draw(st.integers(0, 2))
        case _:
            return sa.exists().where(column == other, condition)


@st.composite
def joined(draw: st.DrawFn) -> Relation:
    found = draw(relations())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        other = draw(relations())
        if other.clause is found.clause or any(column in found.columns for column in other.columns):
            continue
        kind = draw(st.sampled_from([sa.Integer, sa.Integer, sa.String]))
        left, right = found.of(kind), other.of(kind)
        if not left or not right:
            continue
        on = draw(keyish(left)) == draw(keyish(right))
        together = Relation(None, found.columns + other.columns)
        if draw(st.booleans()):
            on = sa.and_(on, draw(comparisons(together)))
        if draw(st.integers(0, 4)) == 0:
            found, other = other, found
        together.clause = sa.join(found.clause, other.clause, on, isouter=draw(st.booleans()))
        found = together
    return found


@st.composite
def statements(draw: st.DrawFn) -> tuple[Any, int | None]:
    """A SELECT, and how many of its first columns its rows must be sorted by (None: not at all)."""
    source = draw(joined())
    shown = draw(st.lists(st.sampled_from(source.columns), min_size=1, max_size=3, unique_by=id))
    kind = draw(st.integers(0, 9))
    wheres = [draw(predicates(source)) for _ in range(draw(st.integers(0, 2)))]
    if kind <= 5:
        columns, groups = shown, []
    else:
        numbers = source.of(sa.Integer) or [sa.literal(1)]
        functions = [sa.func.count, sa.func.sum, sa.func.min, sa.func.max, sa.func.avg]
        aggregates = [
            draw(st.sampled_from(functions))(draw(st.sampled_from(numbers))).label(f"a{n}")
            for n in range(draw(st.integers(1, 2)))
        ]
        groups = shown if kind >= 8 else []
        columns = [*groups, *aggregates]
    statement = sa.select(*columns).select_from(source.clause).where(*wheres)
    if groups:
        statement = statement.group_by(*groups)
        if draw(st.integers(0, 3)) == 0:
            statement = statement.having(sa.func.count() >= draw(st.integers(0, 4)))
    if not groups and kind == 5:
        statement = statement.distinct()
    sorted_by = None
    if kind <= 5 or groups:
        order = draw(st.integers(0, 2))
        if order:
            descending = draw(st.booleans())
            by = columns if order == 1 else columns[:1]
            statement = statement.order_by(*(each.desc() if descending else each for each in by))
            sorted_by = len(by)
            if order == 1 and draw(st.booleans()):
                statement = statement.limit(draw(st.integers(0, 8)))
                if draw(st.booleans()):
                    statement = statement.offset(draw(st.integers(0, 5)))
    return statement, sorted_by


class Tally:
    """How many generated statements were answered."""

    asked = 0
    answered = 0


@settings(max_examples=1000, suppress_health_check=list(HealthCheck), deadline=None)
@given(statements())
def check_one(made: Shop, drawn: tuple[Any, int | None]) -> None:
    statement, sorted_by = drawn
    note(str(statement.compile(compile_kwargs={"literal_binds": True})))
    Tally.asked += 1
    try:
        route = made.route(statement)
    except RoutingError as error:
        note(f"refused: {error}")
        return
    Tally.answered += 1
    note(f"{route.shards} {route.reasons} {route.merge and route.merge.steps}")
    over, once = made.over_shards(statement), made.at_once(statement)
    assert Counter(_comparable(over)) == Counter(_comparable(once))
    if sorted_by is not None:
        assert [row[:sorted_by] for row in _comparable(over)] == [row[:sorted_by] for row in _comparable(once)]


def _comparable(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [tuple(round(each, 9) if isinstance(each, float) else each for each in row) for row in rows]


def test_generated_selects_give_the_answer_of_one_database(shop: Shop) -> None:
    check_one(shop)
    assert Tally.answered >= ANSWERED * Tally.asked
