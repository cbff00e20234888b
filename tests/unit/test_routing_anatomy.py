"""What the router uses of SQLAlchemy's inside: a version that changes it fails here, and not in an answer."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import joinedload, with_loader_criteria

from shardkit.routing.anatomy import anatomy_of, dialect_of
from tests.routing_shop import Country, Order, User

SERVER = dialect_of("mysql")


def anatomy(statement: Any, **options: Any) -> Any:
    return anatomy_of(statement, SERVER, cache_key=statement._generate_cache_key(), **options)


def test_the_cache_key_is_computed_once() -> None:
    statement = sa.select(User).where(User.id == 5)
    assert statement._generate_cache_key() is statement._generate_cache_key()


def test_the_parts_of_a_select_are_those_of_core() -> None:
    statement = sa.select(User).join(User.orders).where(User.id == 5)
    parts = anatomy(statement).parts_of(statement)
    (join,) = parts.froms
    assert isinstance(join, sa.sql.selectable.Join)
    assert [column.name for _, column in parts.columns] == [column.name for column in User.__table__.c]
    assert len(parts.select._where_criteria) == 1


def test_joined_eager_loads_are_seen() -> None:
    statement = sa.select(User).options(joinedload(User.orders))
    found = anatomy(statement)
    assert sorted(found.tables) == ["orders", "users"]
    assert isinstance(found.parts_of(statement).froms[0], sa.sql.selectable.Join)
    assert found.repeats
    assert not anatomy(sa.select(Order).options(joinedload(Order.user))).repeats


def test_criteria_that_options_add_are_seen_in_subqueries_too() -> None:
    inner = sa.select(Order.id).where(Order.user_id == User.id)
    statement = sa.select(User).where(inner.exists()).options(with_loader_criteria(Order, Order.note == "a"))
    found = anatomy(statement)
    (exists,) = found.parts_of(statement).select._where_criteria
    select = exists.element
    while not isinstance(select, sa.Select):
        select = select.element
    assert len(found.parts_of(select).select._where_criteria) == 2


def test_correlated_tables_are_not_in_the_from_of_the_subquery() -> None:
    inner = sa.select(sa.func.count()).where(Order.user_id == User.id).select_from(Order)
    scalar = inner.scalar_subquery()
    found = anatomy(sa.select(User.id, scalar))
    assert found.parts_of(scalar.element).froms == (Order.__table__,)


def test_parameters_are_found_in_other_statements_of_the_shape() -> None:
    first, second = (sa.select(User).where(User.age > 1, User.id == key) for key in (5, 6))
    found = anatomy(first)
    slot = next(slot for slot in found.slots.values() if slot.bind.value == 5)
    assert slot.position is not None
    assert second._generate_cache_key().bindparams[slot.position].value == 6


def test_parameters_of_updates_are_found_too() -> None:
    statement = sa.update(User).where(User.id == 5).values(name="x")
    found = anatomy(statement)
    assert {slot.position for slot in found.slots.values()} == {0, 1}
    assert found.statement.table is User.__table__
    assert [str(each) for each in found.statement._where_criteria] == ["users.id = :id_1"]


def test_values_of_params_travel_in_the_cache_key() -> None:
    statement = sa.select(User).where(User.id == sa.bindparam("n")).params(n=5)
    assert statement._generate_cache_key().params == {"n": 5}


def test_a_select_that_is_rendered_in_two_ways_has_no_parts() -> None:
    scalar = sa.select(Order.id).where(Order.user_id == User.id).scalar_subquery()
    found = anatomy(sa.union_all(sa.select(User.id, scalar), sa.select(Country.code, scalar)))
    assert found.parts_of(scalar.element) is None
