"""Which Python values a key column stores as they are: only those may steer."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from shardkit.partition import KeyType
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.keyvalues import Untrusted, exact_kind, reader_of, sends_alike


class Number(enum.IntEnum):
    ONE = 1


class Letter(enum.Enum):
    A = "a"


class Name(enum.StrEnum):
    X = "x"


class Lowered(sa.TypeDecorator[str]):
    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else value.lower()


class Wrapped(sa.types.UserDefinedType[str]):
    def get_col_spec(self) -> str:
        return "VARCHAR(5)"


class Shouting(sa.String):
    def bind_processor(self, dialect: Any) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        return lambda value: value.upper()


class Hexed(sa.String):
    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.hex(bindvalue)


NOON = datetime(2024, 1, 1, 12)  # noqa: DTZ001 - DATETIME has no zone
SOME = UUID(int=7)
TRUSTED: list[tuple[Any, Any, Any]] = [
    (sa.Integer(), 5, 5),
    (sa.Integer(), True, 1),
    (sa.Integer(), None, None),
    (sa.BigInteger(), 2**62, 2**62),
    (mysql.INTEGER(unsigned=True), 2**32 - 1, 2**32 - 1),
    (sa.String(5), "abc", "abc"),
    (sa.String(5), "abc ", "abc "),
    (sa.String(5, collation="utf8mb4_0900_bin"), "a", "a"),
    (sa.CHAR(5), "abc", "abc"),
    (sa.Uuid(), SOME, SOME),
    (sa.Uuid(as_uuid=False), str(SOME), SOME),
    (sa.Date(), date(2024, 1, 1), date(2024, 1, 1)),
    (sa.DateTime(), NOON, NOON),
    (mysql.DATETIME(fsp=6), NOON.replace(microsecond=1), NOON.replace(microsecond=1)),
    (sa.Numeric(10, 2), Decimal("1.50"), Decimal("1.50")),
    (sa.Numeric(10, 2), 5, 5),
    (sa.LargeBinary(), b"\x00", b"\x00"),
    (sa.BINARY(2), b"ab", b"ab"),
    (sa.Enum(Letter), Letter.A, "A"),
    (sa.Enum(Letter, values_callable=lambda kind: [each.value for each in kind]), Letter.A, "a"),
    (sa.Enum("x", "y"), "x", "x"),
    (Lowered(), "ABC", "abc"),
    (sa.Integer().with_variant(sa.String(5), "mysql"), "5", "5"),
]
UNTRUSTED: list[tuple[Any, Any]] = [
    (sa.Integer(), "5"),
    (sa.Integer(), 5.0),
    (sa.Integer(), Decimal(5)),
    (sa.Integer(), Number.ONE),
    (sa.Integer(), 2**31),
    (sa.SmallInteger(), 40_000),
    (mysql.INTEGER(unsigned=True), -1),
    (sa.String(5), 5),
    (sa.String(5), b"abc"),
    (sa.String(5), "abcdef"),
    (sa.String(5), Name.X),
    (sa.CHAR(5), "abc "),
    (sa.Uuid(), str(SOME)),
    (sa.Uuid(as_uuid=False), "no"),
    (sa.Date(), NOON),
    (sa.Date(), "2024-01-01"),
    (sa.DateTime(), date(2024, 1, 1)),
    (sa.DateTime(), NOON.replace(microsecond=1)),
    (sa.DateTime(), NOON.replace(tzinfo=UTC)),
    (mysql.DATETIME(fsp=3), NOON.replace(microsecond=1)),
    (sa.Numeric(10, 2), Decimal("1.505")),
    (sa.Numeric(4, 2), Decimal(100)),
    (sa.Numeric(10, 2), 1.5),
    (sa.Numeric(10, 2), Decimal("NaN")),
    (sa.Numeric(), Decimal("1.5")),
    (sa.BINARY(4), b"ab"),
    (sa.VARBINARY(1), b"ab"),
    (sa.Enum(Letter), "a"),
    (sa.Enum("x", "y"), "z"),
    (Lowered(), 5),
]
NEVER = [
    sa.Float(), sa.Double(), sa.JSON(), sa.Time(), mysql.BIT(), mysql.TIMESTAMP(), Wrapped(), Shouting(), Hexed(),
    sa.String(5, collation="utf8mb4_general_ci"), sa.String(5, collation="utf8mb4_bin"), sa.PickleType(),
]  # fmt: skip

SERVER = dialect_of("mysql")


@pytest.mark.parametrize(("column_type", "value", "stored"), TRUSTED, ids=repr)
def test_values_that_are_stored_as_they_are(column_type: Any, value: Any, stored: Any) -> None:
    read = reader_of(column_type, SERVER)
    assert read is not None
    assert read(value) == stored
    assert type(read(value)) is type(stored)


@pytest.mark.parametrize(("column_type", "value"), UNTRUSTED, ids=repr)
def test_values_that_may_be_stored_as_others(column_type: Any, value: Any) -> None:
    read = reader_of(column_type, SERVER)
    assert read is not None
    assert isinstance(read(value), Untrusted)


@pytest.mark.parametrize("column_type", NEVER, ids=repr)
def test_types_that_cannot_be_keys(column_type: Any) -> None:
    assert reader_of(column_type, SERVER) is None


def test_sqlite_stores_what_a_server_would_cut() -> None:
    sqlite = dialect_of("sqlite")
    for column_type, value in (
        (sa.String(5), "abcdef"),
        (sa.CHAR(5), "a "),
        (sa.DateTime(), NOON.replace(microsecond=1)),
    ):
        read = reader_of(column_type, sqlite)
        assert read is not None
        assert read(value) == value


@pytest.mark.parametrize(
    ("bound", "column_type", "alike"),
    [
        (sa.Integer(), sa.BigInteger(), True),
        (sa.String(3), sa.Text(), True),
        (sa.types.NullType(), sa.Integer(), True),
        (sa.Integer(), sa.Numeric(5, 2), True),
        (Lowered(), Lowered(), True),
        (sa.String(), sa.Integer(), False),
        (sa.Integer(), sa.String(), False),
        (sa.String(), Lowered(), False),
        (Lowered(), sa.String(), False),
        (sa.types.NullType(), sa.Enum("a"), False),
        (sa.Enum("a"), sa.Enum("b"), False),
        (sa.DateTime(), sa.Date(), False),
        (Shouting(), sa.String(), False),
    ],
    ids=repr,
)
def test_which_bound_types_send_the_same(bound: Any, column_type: Any, alike: bool) -> None:
    assert sends_alike(bound, column_type) is alike


def test_which_columns_are_equal_exactly() -> None:
    assert exact_kind(sa.String(5), SERVER, is_key=True) is KeyType.STRING
    assert exact_kind(sa.String(5), SERVER, is_key=False) is None
    assert exact_kind(sa.String(5), dialect_of("sqlite"), is_key=False) is KeyType.STRING
    assert exact_kind(sa.String(5, collation="utf8mb4_nopad_bin"), SERVER, is_key=False) is KeyType.STRING
    assert exact_kind(sa.String(5, collation="NOCASE"), dialect_of("sqlite"), is_key=True) is None
    assert exact_kind(sa.BigInteger(), SERVER, is_key=False) is KeyType.INTEGER
    assert exact_kind(mysql.TIMESTAMP(), SERVER, is_key=True) is None
    assert exact_kind(sa.Float(), SERVER, is_key=True) is None
