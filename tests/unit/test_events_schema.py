"""When a target's table is the logged one, column by column."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardkit_cdc.schema import TargetColumn, differences
from shardkit_cdc.table_map import Column, ColumnType

UTF8MB4 = 45
LOGGED = [
    Column(ColumnType.LONG, 0, False, False, None, "id"),
    Column(ColumnType.VARCHAR, 80, True, False, UTF8MB4, "name"),
    Column(ColumnType.NEWDECIMAL, 12 << 8 | 2, True, False, None, "price"),
    Column(ColumnType.ENUM, 1, True, False, UTF8MB4, "colour", (b"red", b"it's")),
    Column(ColumnType.DATETIME2, 6, True, False, None, "at"),
]
TARGET = [
    TargetColumn("id", "int", "int(11)", False, None, 10, 0, None, None),
    TargetColumn("name", "varchar", "varchar(20)", True, 80, None, None, None, UTF8MB4),
    TargetColumn("price", "decimal", "decimal(12,2)", True, None, 12, 2, None, None),
    TargetColumn("colour", "enum", "enum('red','it''s')", True, 16, None, None, None, UTF8MB4),
    TargetColumn("at", "datetime", "datetime(6)", True, None, None, None, 6, None),
]


def test_the_same_table_has_no_differences() -> None:
    assert differences(LOGGED, TARGET) == []


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (0, {"name": "key"}, "column 1 is id on the source and key on the target"),
        (0, {"data_type": "bigint", "column_type": "bigint"}, "id is bigint on the target and long"),
        (0, {"column_type": "int(10) unsigned"}, "id is signed on one side only"),
        (1, {"octets": 84, "column_type": "varchar(21)"}, "name is varchar(21)"),
        (1, {"collation": 46}, "name has another collation"),
        (1, {"nullable": False}, "name is NOT NULL on the target only"),
        (2, {"scale": 3, "column_type": "decimal(12,3)"}, "price is decimal(12,3)"),
        (3, {"column_type": "enum('it''s','red')"}, "colour has other enum values"),
        (3, {"column_type": "enum('red')"}, "colour has other enum values"),
        (4, {"fraction": 3, "column_type": "datetime(3)"}, "at is datetime(3)"),
    ],
)
def test_each_difference_is_named(place: int, change: dict[str, object], says: str) -> None:
    target = [*TARGET]
    target[place] = replace(target[place], **change)
    (found,) = differences(LOGGED, target)
    assert says in found


def test_a_missing_column_is_named() -> None:
    assert "5 columns and the target 4" in differences(LOGGED, TARGET[:4])[0]
    assert "4 columns and the target 5" in differences(LOGGED[:4], TARGET)[0]


def test_a_target_that_allows_null_where_the_source_does_not_is_fine() -> None:
    assert differences(LOGGED, [replace(TARGET[0], nullable=True), *TARGET[1:]]) == []


def test_types_that_a_log_describes_in_its_own_way_are_compared_by_name() -> None:
    logged = [Column(ColumnType.STRING, 16, True, False, None, "id")]
    assert differences(logged, [TargetColumn("id", "uuid", "uuid", True, None, None, None, None, None)]) == []
    assert differences(logged, [TargetColumn("key", "uuid", "uuid", True, None, None, None, None, None)]) != []
