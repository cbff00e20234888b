"""Statements of the SQL path that need no server: literals, and who may see triggers."""

from __future__ import annotations

from contextlib import suppress

import pytest

from shardkit.errors import BadEvent
from shardkit.gtid import Flavour
from shardkit_cdc.apply_sql import grants_trigger
from shardkit_cdc.payload import payloads, unpacked
from shardkit_cdc.row_image import ABSENT, Image
from shardkit_cdc.schema import TargetColumn, in_log_order
from shardkit_cdc.sql_table import NotCarried, SqlTable, sql_column
from shardkit_cdc.table_map import Column, ColumnType, TableMap
from shardkit_cdc.transactions import Rows
from tests.binlog_bytes import table_map, write_rows

LOGGED = [
    Column(ColumnType.LONG, 0, False, name="id"),
    Column(ColumnType.VARCHAR, 80, True, collation=45, name="name"),
    Column(ColumnType.FLOAT, 4, True, name="weight"),
    Column(ColumnType.DATETIME2, 3, True, name="at"),
]
TARGET = [
    TargetColumn("at", "datetime", "datetime(3)", True, None, None, None, 3, None, extra="on update CURRENT_TIMESTAMP"),
    TargetColumn("id", "int", "int(11)", False, None, 10, 0, None, None),
    TargetColumn("weight", "float", "float", True, None, 12, None, None, None),
    TargetColumn("name", "varchar", "varchar(20)", True, 80, None, None, None, 45, "utf8mb4"),
]


def table(flavour: Flavour = Flavour.MYSQL, key: tuple[str, ...] = ("ID",)) -> SqlTable:
    ordered = in_log_order(LOGGED, TARGET)
    assert ordered is not None
    columns = [
        sql_column(place, logged, target, charset=target.charset, source=Flavour.MYSQL, flavour=flavour)
        for place, (logged, target) in enumerate(zip(LOGGED, ordered, strict=True))
    ]
    return SqlTable("`shop`.`t`", columns, key)


ROW: Image = (1, b"it's \\ \x00", 0.10000000149011612, "2026-01-01 00:00:00.125")


def test_values_become_literals_that_give_them_back() -> None:
    assert table().insert_head == b"INSERT INTO `shop`.`t` (`id`,`name`,`weight`,`at`) VALUES "
    assert table().row(ROW) == b"(1,_binary'it\\'s \\\\ \x00','0.10000000149011612','2026-01-01 00:00:00.125')"
    assert table().row((1, None, None, None)) == b"(1,NULL,NULL,NULL)"


def test_an_update_writes_what_differs_and_what_the_target_would_touch_by_itself() -> None:
    assert table().update(ROW, (1, b"n", *ROW[2:])) == (
        b"UPDATE `shop`.`t` SET `name`=_binary'n',`at`='2026-01-01 00:00:00.125' WHERE `id`=1"
    )


def test_without_a_key_every_column_is_compared_by_its_bytes() -> None:
    assert table(key=()).where((1, b"a", 0.5, None)) == (
        b"`id`=1 AND CAST(`name` AS BINARY)=X'61' AND `weight`=0.5e0 AND `at` IS NULL LIMIT 1"
    )
    assert table(key=("name",)).where(ROW) == b"`name`=_utf8mb4 X'69742773205c2000'"


def test_what_cannot_be_carried_names_its_column() -> None:
    with pytest.raises(NotCarried, match="`weight`"):
        table(Flavour.MARIADB).row((1, b"", -0.0, None))
    assert b"'-0.0'" in table().row((1, b"", -0.0, None))
    with pytest.raises(NotCarried, match="`name`"):
        table().row((1, ABSENT, 1.0, None))
    with pytest.raises(NotCarried, match="`name`"):
        table(key=()).where((1, ABSENT, 1.0, None))


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("GRANT ALL PRIVILEGES ON *.* TO `root`@`%` WITH GRANT OPTION", True),
        ("GRANT SELECT, TRIGGER, CREATE ON `shop`.* TO `relay`@`%`", True),
        ("GRANT ALL PRIVILEGES ON `sh%`.* TO `relay`@`%`", True),
        ("GRANT ALL PRIVILEGES ON `sh_p`.* TO `relay`@`%`", True),
        ("GRANT ALL PRIVILEGES ON `sh\\_p`.* TO `relay`@`%`", False),
        ("GRANT SELECT, INSERT ON `shop`.* TO `relay`@`%`", False),
        ("GRANT ALL PRIVILEGES ON `other`.* TO `relay`@`%`", False),
        ("GRANT TRIGGER ON `shop`.`orders` TO `relay`@`%`", False),
        ("GRANT `admin`@`%` TO `relay`@`%`", False),
    ],
)
def test_who_may_see_triggers(line: str, seen: bool) -> None:
    assert grants_trigger(line, "shop") is seen


def test_stored_row_events_come_back_with_one_table_map_for_equal_ones() -> None:
    shop = TableMap.parse(table_map(b"\x01" + bytes(5), "shop", "t"))
    rows = [Rows(shop, write_rows(shop.table_id, bytes([0, number, 0, 0, 0]))) for number in range(3)]
    (payload,) = payloads(rows, largest=1 << 20)
    maps: dict[bytes, TableMap] = {}
    found = unpacked(payload, maps) + unpacked(payload, maps)
    assert [row.event.data[-5:] for row in found] == [row.event.data[-5:] for row in rows * 2]
    assert len({row.table for row in found}) == 1
    for cut in range(1, len(payload)):
        with suppress(BadEvent):
            assert len(unpacked(payload[:cut], {})) < len(rows)
