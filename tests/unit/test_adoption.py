"""Which tables belong together: proposals from facts, without a database."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from shardkit.adoption.hazards import key_hazards, no_key
from shardkit.adoption.proposal import ProposedKeyspace, propose
from shardkit.adoption.tables import ColumnFacts, ForeignKeyFacts, TableFacts
from shardkit.adoption.writing import yaml_text
from shardkit.errors import PreconditionFailed
from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint

BIG = sa.BigInteger()


def column(name: str, column_type: Any = BIG, **facts: Any) -> ColumnFacts:
    return ColumnFacts(name, column_type, **{"nullable": False, **facts})


def table(name: str, *columns: str | ColumnFacts, rows: int | None = 50_000, **facts: Any) -> TableFacts:
    made = [column(one) if isinstance(one, str) else one for one in columns]
    return TableFacts(name, {one.name: one for one in made}, **{"primary_key": (made[0].name,), "rows": rows, **facts})


def points(column: str, table: str, referred: str = "id") -> ForeignKeyFacts:
    return ForeignKeyFacts((column,), table, (referred,))


def proposed(*tables: TableFacts, keys: tuple[str, ...] = ()) -> tuple[ProposedKeyspace, ...]:
    spaces = propose({one.name: one for one in tables}, keys)
    ShardMap.parse(yaml_text("c", "c-0", Endpoint("h", 3306, "c"), spaces))  # whatever is proposed validates
    return spaces


def keys_of(space: ProposedKeyspace) -> dict[str, str]:
    return {choice.table: choice.key for choice in space.tables}


USERS = table("users", "id", "email")
ORDERS = table("orders", "id", "user_id", foreign_keys=(points("user_id", "users"),))
COUNTRIES = table("countries", "code", rows=200)


def test_tables_that_point_at_users_are_sharded_with_them() -> None:
    (space,) = proposed(USERS, ORDERS, COUNTRIES)
    assert space.name == "users"
    assert keys_of(space) == {"users": "id", "orders": "user_id"}
    assert [choice.table for choice in space.reference] == ["countries"]
    assert {choice.table: choice.why for choice in space.tables}["orders"] == "foreign key to users.id"


def test_a_name_is_as_good_as_a_foreign_key() -> None:
    (space,) = proposed(table("user", "id"), table("visits", "id", "user_id"), table("carts", "id", "userid"))
    assert keys_of(space) == {"user": "id", "visits": "user_id", "carts": "userid"}


def test_a_column_that_many_share_needs_no_table_of_its_own() -> None:
    (space,) = proposed(
        table("orders", "id", "tenant_id"), table("invoices", "id", "tenant_id"), table("users", "id", "tenant_id")
    )
    assert space.name == "tenant"
    assert keys_of(space) == dict.fromkeys(["orders", "invoices", "users"], "tenant_id")


def test_owners_go_before_larger_families_of_things() -> None:
    products = table("products", "id")
    lines = [table(f"t{number}", "id", "user_id", "product_id") for number in range(3)]
    prices = table("prices", "id", "product_id")
    first, *_ = proposed(USERS, products, prices, *lines)
    assert first.name == "users"


def test_a_small_list_is_not_a_root() -> None:
    """Sharding by country would make as many buckets as there are countries."""
    users = table("users", "id", "country_id", foreign_keys=(points("country_id", "countries"),))
    countries = table("countries", "id", rows=200)
    towns = table("towns", "id", "country_id", rows=900)
    assert [space.name for space in proposed(users, countries, towns)] == ["main"]


def test_what_is_large_and_belongs_to_nobody_stays_whole() -> None:
    first, second = proposed(USERS, ORDERS, table("log", "at_day", rows=10**7))
    assert [choice.table for choice in second.tables] == ["log"]
    assert not second.sharded
    assert first.reference == ()


def test_a_database_without_shared_keys_stays_whole() -> None:
    (space,) = proposed(table("a", "id", rows=5), table("b", "name"))
    assert not space.sharded
    assert [choice.table for choice in space.tables] == ["a", "b"]


def test_a_second_large_family_gets_a_keyspace_of_its_own() -> None:
    devices = table("devices", "id", rows=10**5)
    readings = table("readings", "id", "device_id", rows=10**8)
    spaces = proposed(USERS, ORDERS, devices, readings)
    assert {space.name for space in spaces} == {"devices", "users"}


def test_of_two_columns_the_one_that_is_never_null_is_the_key() -> None:
    transfers = table(
        "transfers",
        "id",
        column("from_user", nullable=True),
        "to_user",
        foreign_keys=(points("from_user", "users"), points("to_user", "users")),
    )
    (space,) = proposed(USERS, transfers)
    assert keys_of(space)["transfers"] == "to_user"
    assert "it has from_user too" in {choice.table: choice.why for choice in space.tables}["transfers"]


def test_a_pointer_of_another_type_does_not_count() -> None:
    text = table("notes", "id", column("user_id", sa.String(36)))
    (space, rest) = proposed(USERS, ORDERS, text)
    assert "notes" not in keys_of(space)
    assert [choice.table for choice in rest.tables] == ["notes"]


def test_a_key_may_be_asked_for() -> None:
    shops = table("sales", "id", "shop", "user_id")
    spaces = proposed(USERS, ORDERS, shops, table("stock", "id", "shop"), keys=("sales.shop",))
    assert keys_of(spaces[0]) == {"sales": "shop", "stock": "shop"}
    (space, *_) = proposed(USERS, ORDERS, keys=("users.id",))
    assert keys_of(space) == {"users": "id", "orders": "user_id"}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("users", "the table users has no column ''"),
        ("users.name", "the table users has no column 'name'"),
        ("nobody.id", "there is no table 'nobody'"),
        ("users.score", "does not survive rounding"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused(key: str, message: str) -> None:
    with pytest.raises(PreconditionFailed, match=message):
        proposed(table("users", "id", column("score", sa.Float())), keys=(key,))


def test_an_empty_database_is_refused() -> None:
    with pytest.raises(PreconditionFailed, match="has no tables"):
        propose({})


def test_what_breaks_is_said() -> None:
    users = table(
        "users", column("id", sa.Integer(), autoincrement=True), "email", uniques=(("email",), ("id", "email"))
    )
    posts = table(
        "posts", "at", "user_id", column("region_id"), primary_key=(), foreign_keys=(points("region_id", "regions"),)
    )
    regions = table("regions", "id", rows=10**6)
    first, _ = proposed(users, posts, regions, table("likes", "id", "user_id"))
    said = [warning for choice in first.tables for warning in choice.warnings]
    assert first.generated_ids == ("users.id",)
    for part in (
        "users (email) is unique on each shard only: the index does not hold id",
        "users.id is INTEGER: generated ids need BIGINT",
        "posts has no primary key",
        "posts (region_id) points at regions, which may live elsewhere",
    ):
        assert any(part in warning for warning in said), part
    assert not any("(id, email)" in warning for warning in said)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (column("k"), None),
        (column("k", nullable=True), "may be NULL"),
        (column("k", sa.String(10), collation="utf8mb4_general_ci"), "binary collation without padding"),
        (column("k", sa.String(10), collation="utf8mb4_bin"), "binary collation without padding"),
        (column("k", sa.String(10), collation="utf8mb4_nopad_bin"), None),
        (column("k", sa.String(10), collation="utf8mb4_0900_bin"), None),
        (column("k", sa.CHAR(10), collation="utf8mb4_nopad_bin"), "pads what is stored"),
        (column("k", sa.BINARY(16)), "pads what is stored"),
        (column("k", mysql.VARBINARY(16)), None),
        (column("k", mysql.DATETIME()), "use DATETIME(6)"),
        (column("k", mysql.DATETIME(fsp=6)), None),
        (column("k", mysql.INTEGER(zerofill=True)), "ZEROFILL"),
        (column("k", mysql.TIMESTAMP()), "time zone"),
        (column("k", sa.Float()), "does not survive rounding"),
        (column("k", sa.JSON()), "has no exact text"),
    ],
)
def test_keys_that_go_wrong(facts: ColumnFacts, said: str | None) -> None:
    found = list(key_hazards(table("t", facts), facts))
    assert found == [] if said is None else any(said in hazard for hazard in found)
    if facts.kind is None:
        assert no_key(facts) is not None


def test_reasons_are_comments_and_names_are_quoted() -> None:
    odd = table("on", "id", rows=0)
    spaced = table("my table", "id", "on_id", foreign_keys=(points("on_id", "on"),))
    text = yaml_text("c", "c-0", Endpoint("localhost", 3306, "c"), proposed(odd, spaced, keys=("on.id",)))
    shard_map = ShardMap.parse(text)
    assert shard_map.table("my table").key == ("on_id",)
    assert shard_map.table("on").key == ("id",)
    assert "# the primary key" in text
    assert "# as other machines know it?" in text
