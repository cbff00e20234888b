"""Keys, their canonical texts, and bucket sets as text."""

# ruff: noqa: DTZ001 - key columns store no time zone

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from shardkit.partition import (
    DirectoryPartition,
    HashPartition,
    KeyType,
    ListPartition,
    Partition,
    RangePartition,
    canonical_text,
    format_buckets,
    key_text,
    key_type_of,
    parse_buckets,
    typed_value,
)


class Region(StrEnum):
    SEOUL = "서울"


class Grade(IntEnum):
    GOLD = 3


class Colour(Enum):
    RED = 1


# docs/reference/keys.md shows these; a change of any of them would lose rows
CANONICAL = [
    (0, "0"),
    (-42, "-42"),
    (18446744073709551615, "18446744073709551615"),
    (True, "1"),
    (False, "0"),
    ("서울", "서울"),
    ("", ""),
    (" a ", " a "),
    (UUID("550E8400-E29B-41D4-A716-446655440000"), "550e8400e29b41d4a716446655440000"),
    (b"\x00\xab", "00ab"),
    (b"", ""),
    (date(2024, 1, 31), "2024-01-31"),
    (date(1, 1, 1), "0001-01-01"),
    (datetime(2024, 1, 31, 12, 30), "2024-01-31 12:30:00.000000"),
    (datetime(2024, 1, 31, 12, 30, 0, 7), "2024-01-31 12:30:00.000007"),
    (Decimal("12.3400"), "12.34"),
    (Decimal("-0.00"), "0"),
    (Decimal("1E+2"), "100"),
    (Decimal("1E-3"), "0.001"),
    (Decimal(100), "100"),
    (Region.SEOUL, "서울"),
    (Grade.GOLD, "3"),
    (Colour.RED, "RED"),
    (None, None),
]


@pytest.mark.parametrize(("value", "text"), CANONICAL, ids=[repr(value) for value, _ in CANONICAL])
def test_canonical_text(value: object, text: str | None) -> None:
    assert canonical_text(value) == text


# CRC32 of the text modulo 4096, as SELECT CRC32(text) MOD 4096 answered
BUCKETS = [
    ((0,), 3873),
    ((42,), 136),
    (("42",), 136),
    ((-42,), 3798),
    (("",), 0),
    ((None,), 0),
    (("서울",), 766),
    ((UUID("550e8400-e29b-41d4-a716-446655440000"),), 1831),
    ((42, "서울"), 3594),
    ((None, None), 1932),
]


@pytest.mark.parametrize(("key", "bucket"), BUCKETS)
def test_the_bucket_of_a_key_never_changes(key: tuple[object, ...], bucket: int) -> None:
    assert HashPartition().bucket_of(key) == bucket


def test_the_documented_table_is_true() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "keys.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\|[^|]*\| `([^|]+)` \| (?:`([^|]+)`|\(empty\)) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 11
    for example, text, bucket in rows:
        value = eval(example, {"UUID": UUID, "date": date, "datetime": datetime, "Decimal": Decimal})
        assert canonical_text(value) == text
        assert HashPartition().bucket_of((value,)) == int(bucket), example


@pytest.mark.parametrize(
    "value",
    [1.5, float("nan"), Decimal("NaN"), Decimal("Infinity"), [1], {}, object(), datetime(2024, 1, 1, tzinfo=UTC)],
)
def test_what_cannot_be_a_key_is_refused(value: object) -> None:
    for partition in (HashPartition(), ListPartition({"x": [1]}), RangePartition({"x": (None, None)})):
        with pytest.raises(TypeError, match="cannot be a shard key"):
            partition.bucket_of((value,))


def test_text_that_no_column_can_hold_is_refused() -> None:
    for partition in (HashPartition(), RangePartition({"x": ("a", "z")})):
        with pytest.raises(TypeError, match="is not valid text"):
            partition.bucket_of(("\ud800",))


def test_the_parts_of_a_composite_key_stay_apart() -> None:
    texts = {key_text(key) for key in [("a", "b"), ("ab", ""), ("", "ab"), (None, "ab"), ("ab", None), (None, None)]}
    assert len(texts) == 6
    assert None not in texts


@pytest.mark.parametrize(
    ("column_type", "kind"),
    [
        (sa.BigInteger(), KeyType.INTEGER),
        (sa.Boolean(), KeyType.INTEGER),
        (mysql.TINYINT(), KeyType.INTEGER),
        (sa.String(20), KeyType.STRING),
        (sa.Enum("a", "b"), KeyType.STRING),
        (mysql.ENUM("a"), KeyType.STRING),
        (sa.Uuid(), KeyType.UUID),
        (sa.LargeBinary(16), KeyType.BYTES),
        (mysql.VARBINARY(16), KeyType.BYTES),
        (sa.Date(), KeyType.DATE),
        (mysql.DATETIME(fsp=6), KeyType.DATETIME),
        (sa.Numeric(10, 2), KeyType.DECIMAL),
        (sa.Float(), None),
        (mysql.DOUBLE(), None),
        (mysql.REAL(), None),
        (sa.TIMESTAMP(), None),
        (mysql.TIMESTAMP(), None),
        (sa.JSON(), None),
        (sa.Time(), None),
        (mysql.YEAR(), None),
        (mysql.BIT(), None),
        (mysql.SET("a", "b"), None),
    ],
)
def test_the_kind_of_key_of_a_column(column_type: sa.types.TypeEngine[object], kind: KeyType | None) -> None:
    assert key_type_of(column_type) is kind


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [
        (KeyType.INTEGER, 42, 42),
        (KeyType.INTEGER, "42", 42),
        (KeyType.STRING, 42, "42"),
        (KeyType.UUID, "550e8400e29b41d4a716446655440000", UUID("550e8400-e29b-41d4-a716-446655440000")),
        (KeyType.BYTES, "00ab", b"\x00\xab"),
        (KeyType.DATE, date(2024, 1, 31), date(2024, 1, 31)),
        (KeyType.DECIMAL, "1.5", Decimal("1.5")),
        (KeyType.DECIMAL, 5, Decimal(5)),
        (KeyType.STRING, None, None),
    ],
)
def test_a_value_of_the_map_takes_the_columns_type(kind: KeyType, written: object, value: object) -> None:
    assert typed_value(kind, written) == value
    assert type(typed_value(kind, written)) is type(value)


@pytest.mark.parametrize(
    ("kind", "written"), [(KeyType.INTEGER, "x"), (KeyType.UUID, "x"), (KeyType.DECIMAL, "x"), (KeyType.DATE, 5)]
)
def test_a_value_of_another_type_is_refused(kind: KeyType, written: object) -> None:
    with pytest.raises(TypeError, match="is not a value that the key column can have"):
        typed_value(kind, written)


def test_ranges_that_may_hold_an_interval() -> None:
    ages = RangePartition({"low": (None, 10), "teens": (10, 20), "old": (20, None)})
    assert ages.overlapping(10, 19) == ("teens",)
    assert ages.overlapping(9, 10) == ("low", "teens")
    assert ages.overlapping(20, None) == ("old",)
    assert ages.overlapping(None, 9) == ("low",)
    assert ages.overlapping(None, None) == ("low", "teens", "old")


def test_strings_order_by_their_bytes() -> None:
    """U+FFFF sorts before an emoji in UTF-8, as in binary collations; in UTF-16 it would not."""
    letters = RangePartition({"low": (None, "\uffff"), "high": ("\uffff", None)})
    assert letters.bucket_of(("🛫",)) == "high"
    assert letters.bucket_of(("서울",)) == "low"


def test_a_directory_asks_its_lookup() -> None:
    seen = []

    def lookup(asked: DirectoryPartition, text: str) -> str | None:
        seen.append((asked.keyspace, text))
        return {"42": "x"}.get(text)

    directory = DirectoryPartition(("x", "y"), "home", "k", lookup)
    assert directory.bucket_of((42,)) == "x"
    assert directory.bucket_of((43,)) is None
    assert directory.bucket_of((None,)) is None
    assert seen == [("k", "42"), ("k", "43")]
    with pytest.raises(TypeError, match="ask a cluster"):
        DirectoryPartition(("x",), "home", "k").bucket_of((42,))
    with pytest.raises(TypeError, match="cannot be told apart in SQL"):
        directory.predicate([], ["x"])


def test_every_partition_is_one() -> None:
    for partition in (
        HashPartition(),
        ListPartition({"x": [1]}),
        RangePartition({"x": (1, 2)}),
        DirectoryPartition(("x",), "home", "k"),
    ):
        assert isinstance(partition, Partition)


@pytest.mark.parametrize(
    ("text", "buckets"),
    [
        ("0-3, 7", [0, 1, 2, 3, 7]),
        ("hot-1", ["hot-1"]),
        ("0 - 2,seoul", [0, 1, 2, "seoul"]),
        ("5", [5]),
    ],
)
def test_bucket_sets_as_text(text: str, buckets: list[int | str]) -> None:
    assert parse_buckets(text) == buckets


def test_bucket_sets_take_the_shortest_text() -> None:
    assert format_buckets([9, 1, 2, 3, "hot-1", 7]) == "1-3, 7, 9, hot-1"
    assert format_buckets([]) == ""


@pytest.mark.parametrize("text", ["", "1,,2", "3-1", " "])
def test_a_bucket_set_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"empty part|runs backwards"):
        parse_buckets(text)
