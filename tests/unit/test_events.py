"""Event headers from bytes: read rightly, and refused when they are not what they claim."""

from __future__ import annotations

import struct
import zlib

import pytest

from shardkit.errors import BadEvent
from shardkit.gtid import MariaDBGtid, MySQLGtid
from shardkit_cdc import events
from shardkit_cdc.events import Event, Format
from shardkit_cdc.query import Query, keyword
from shardkit_cdc.table_map import Column, ColumnType, TableMap
from tests.binlog_bytes import (
    SERVER_ID,
    column_map,
    event,
    format_event,
    mariadb_gtid,
    mysql_gtid,
    query,
    sealed,
    write_rows,
)


def test_the_format_says_whether_events_carry_checksums() -> None:
    assert Format.parse(format_event(checksums=True)).checksums
    assert not Format.parse(format_event(checksums=False)).checksums
    assert Format.parse(format_event()).server_version == "10.11.6-MariaDB-log"


def test_the_format_for_the_target_declares_checksums_off() -> None:
    plain = Format.parse(format_event(checksums=True)).data
    assert plain[-5] == 0
    assert zlib.crc32(plain[:-4]) == int.from_bytes(plain[-4:], "little")
    assert not Format.parse(plain).checksums


def test_the_flag_of_a_log_in_use_does_not_spoil_its_formats_checksum() -> None:
    raw = bytearray(format_event(checksums=True))
    raw[17] |= 1
    assert Format.parse(bytes(raw)).checksums


@pytest.mark.parametrize("length", [0, 10, 19, 60, 80])
def test_a_truncated_format_is_refused(length: int) -> None:
    with pytest.raises(BadEvent):
        Format.parse(format_event()[:length])


def test_an_events_checksum_is_verified_and_taken_off() -> None:
    form = Format.parse(format_event(checksums=True))
    plain = event(events.XID, bytes(8))
    taken = events.checked_event(sealed(plain), form)
    assert taken.kind == plain.kind
    assert events.with_length(taken.data) == plain.data


@pytest.mark.parametrize("at", [0, 4, 12, 20, 26, 27, 30])
def test_one_changed_byte_is_noticed(at: int) -> None:
    form = Format.parse(format_event(checksums=True))
    raw = bytearray(sealed(event(events.XID, bytes(8))))
    raw[at] ^= 0x40
    with pytest.raises(BadEvent):
        events.checked_event(bytes(raw), form)


def test_a_length_that_is_not_the_events_is_refused() -> None:
    form = Format.parse(format_event(checksums=False))
    with pytest.raises(BadEvent, match="length"):
        events.checked_event(event(events.XID, bytes(8)).data + b"!", form)


def test_mariadb_groups() -> None:
    assert events.mariadb_group(mariadb_gtid(0, 42)) == events.GroupStart(MariaDBGtid(0, SERVER_ID, 42))
    assert events.mariadb_group(mariadb_gtid(7, 1, flags=0x21)).standalone
    grouped = mariadb_gtid(0, 1, flags=0x02, more=struct.pack("<Q", 99))
    assert not events.mariadb_group(grouped).standalone
    xa = mariadb_gtid(0, 1, flags=0x40, more=struct.pack("<I", 1) + b"\x02\x01" + b"ab" + b"c")
    assert events.mariadb_group(xa).xid == "x'6162',x'63',1"
    finished = mariadb_gtid(0, 1, flags=0x81, more=struct.pack("<I", 1) + b"\x02\x00" + b"ab")
    assert events.mariadb_group(finished).xid == ""


def test_an_alter_table_in_two_phases_is_refused_with_the_setting() -> None:
    with pytest.raises(BadEvent) as refused:
        events.mariadb_group(mariadb_gtid(0, 1, flags=0, more=b"\x02"))
    assert "binlog_alter_two_phase" in str(refused.value)


def test_mysql_groups() -> None:
    assert events.mysql_group(mysql_gtid("11111111-1111-1111-1111-111111111111", 5)).gtid == MySQLGtid(
        "11111111-1111-1111-1111-111111111111", 5
    )


def test_mysql_groups_with_a_tag() -> None:
    """The bytes of a real event: 77d1902c-01da-11f1-9a41-908d6e5f6e8d:test_tag:1."""
    body = bytes.fromhex(
        "027c00000202ee450341025802690322c5036902824102350 2dcbedc350204040610746573745f746167".replace(" ", "")
    )
    found = events.mysql_group(event(events.GTID_TAGGED, body + bytes(20)))
    assert found.gtid == MySQLGtid("77d1902c-01da-11f1-9a41-908d6e5f6e8d:test_tag", 1)


def test_compressed_events_of_mariadb() -> None:
    plain = write_rows(b"\x2a" + bytes(5), b"\xfe" + b"row image" * 50)
    head, image = plain.data[19 : 19 + 8 + 1 + 1], plain.data[29:]
    packed = bytes([0x80 | 2]) + len(image).to_bytes(2, "big") + zlib.compress(image)
    assert events.inflated_rows(event(166, head + packed)) == plain
    statement = query("shop", "INSERT INTO t VALUES (1)")
    at = statement.data.index(b"INSERT")
    text = statement.data[at:]
    packed = bytes([0x80 | 1, len(text)]) + zlib.compress(text)
    assert events.inflated_query(event(165, statement.data[19:at] + packed)) == statement


@pytest.mark.parametrize(
    "packed", [b"", b"\x81", b"\x91\x05xxxxx", b"\x81\x05" + zlib.compress(b"six..."), b"\x81\x05abc"]
)
def test_compressed_events_that_lie_are_refused(packed: bytes) -> None:
    head = write_rows(b"\x2a" + bytes(5), b"").data[19:29]
    with pytest.raises(BadEvent):
        events.inflated_rows(event(166, head + packed))


def test_queries_with_their_session() -> None:
    status = (
        b"\x00" + struct.pack("<I", 1 << 26)
        + b"\x01" + struct.pack("<Q", 1 << 2)
        + b"\x06\x03std"
        + b"\x03" + struct.pack("<HH", 2, 1)
        + b"\x04" + struct.pack("<HHH", 8, 8, 45)
        + b"\x05\x06+09:00"
        + b"\x0c\x01shop\0"
        + b"\x0d" + (123456).to_bytes(3, "little")
        + b"\x7f" + b"an unknown variable ends the list"
    )  # fmt: skip
    found = Query.parse(query("shop", "CREATE TABLE t (id INT)", status))
    assert (found.database, found.text) == ("shop", b"CREATE TABLE t (id INT)")
    session = found.session
    assert not session.foreign_key_checks
    assert session.unique_checks
    assert session.sql_mode == 4
    assert session.auto_increment == (2, 1)
    assert (session.character_set_client, session.collation_connection, session.collation_server) == (8, 8, 45)
    assert session.time_zone == "+09:00"
    assert session.microseconds == 123456


@pytest.mark.parametrize("text", ["BEGIN", "commit", "  XA START x'61'", "ALTER TABLE t"])
def test_the_first_word_of_a_query(text: str) -> None:
    assert keyword(query("shop", text, b"\x06\x03std")) == text.split()[0].upper().encode()


def test_table_maps() -> None:
    table = TableMap.parse(
        column_map("shop", "t", [(ColumnType.LONG, b""), (ColumnType.VARCHAR, b"\x50\x00")], ["id", "na"])
    )
    assert table.qualified == "shop.t"
    assert table.columns() == (
        Column(ColumnType.LONG, 0, False, False, None, "id"),
        Column(ColumnType.VARCHAR, 80, True, False, 45, "na"),
    )


def test_a_table_map_can_be_told_another_database() -> None:
    table = TableMap.parse(column_map("shop", "t", [(ColumnType.LONG, b"")], ["id"]))
    moved = table.in_database("a_longer_name")
    again = TableMap.parse(Event(events.TABLE_MAP, moved.data))
    assert (again.database, again.table, again.columns()) == ("a_longer_name", "t", table.columns())
    assert int.from_bytes(moved.data[9:13], "little") == len(moved.data)


def test_a_table_map_without_full_metadata_has_no_names() -> None:
    table = TableMap.parse(column_map("shop", "t", [(ColumnType.LONG, b"")], None))
    assert table.columns()[0].name is None


def test_the_leading_text_of_a_row() -> None:
    image = b"\x00\x00" + b"\x0bhop:shop-00" + bytes(30)
    assert events.leading_text(write_rows(b"\x2a" + bytes(5), image, columns=12)) == b"hop:shop-00"
