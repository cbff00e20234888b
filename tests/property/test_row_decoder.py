"""Row events come out as the values that went in; damaged ones are refused, whatever they hold, and never loop."""

from __future__ import annotations

import struct
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import BadEvent
from shardkit_cdc.events import Event
from shardkit_cdc.json_binary import double_text, json_text
from shardkit_cdc.row_image import RowDecoder, decimal_text, inflated
from shardkit_cdc.table_map import ColumnType, TableMap
from tests.binlog_bytes import column_map, write_rows

#: A column of each shape: its type, its metadata in the table map, and where it can be NULL.
COLUMNS: list[tuple[int, bytes]] = [
    (ColumnType.LONGLONG, b""),
    (ColumnType.TINY, b""),
    (ColumnType.DOUBLE, b"\x08"),
    (ColumnType.VARCHAR, struct.pack("<H", 300)),
    (ColumnType.BLOB, b"\x02"),
    (ColumnType.NEWDECIMAL, b"\x0c\x02"),
    (ColumnType.TIME2, b"\x06"),
    (ColumnType.DATETIME2, b"\x03"),
    (ColumnType.TIMESTAMP2, b"\x00"),
    (ColumnType.BIT, b"\x05\x01"),
    (ColumnType.STRING, b"\xfe\x28"),
    (ColumnType.DATE, b""),
    (ColumnType.YEAR, b""),
]
TABLE = TableMap.parse(column_map("shop", "t", COLUMNS, [f"c{number}" for number in range(len(COLUMNS))]))
SIMPLE = TableMap.parse(column_map("shop", "s", [COLUMNS[0], COLUMNS[3], COLUMNS[2]], ["id", "text", "real"]))
ROWS = st.lists(
    st.tuples(
        st.integers(-(2**63), 2**63 - 1),
        st.none() | st.binary(max_size=300),
        st.none() | st.floats(allow_nan=False),
    ),
    max_size=5,
)


def packed(rows: list[tuple[int, bytes | None, float | None]]) -> bytes:
    out = b""
    for number, text, real in rows:
        nulls = (0 if text is not None else 2) | (0 if real is not None else 4)
        out += bytes([nulls]) + struct.pack("<q", number)
        out += b"" if text is None else struct.pack("<H", len(text)) + text
        out += b"" if real is None else struct.pack("<d", real)
    return out


@given(ROWS, st.sampled_from([23, 30]))
def test_rows_come_out_as_they_went_in(rows: list[tuple[int, bytes | None, float | None]], kind: int) -> None:
    found = RowDecoder(SIMPLE).images(write_rows(SIMPLE.table_id, packed(rows), kind=kind, columns=3))
    assert found == rows


@given(ROWS.filter(bool), st.integers(1, 40))
def test_a_row_cut_short_is_refused(rows: list[tuple[int, bytes | None, float | None]], cut: int) -> None:
    data = packed(rows)
    whole = {len(packed(rows[:count])) for count in range(len(rows) + 1)}
    end = max(0, len(data) - cut)
    event = write_rows(SIMPLE.table_id, data[:end], columns=3)
    if end in whole:
        assert RowDecoder(SIMPLE).images(event) == rows[: len(RowDecoder(SIMPLE).images(event))]
    else:
        with pytest.raises(BadEvent):
            RowDecoder(SIMPLE).images(event)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([23, 24, 25, 30, 31, 32, 39]), st.integers(0, 20))
def test_any_bytes_are_read_or_refused(image: bytes, kind: int, columns: int) -> None:
    with suppress(BadEvent):
        RowDecoder(TABLE).images(write_rows(TABLE.table_id, image, kind=kind, columns=columns))


@given(st.binary(max_size=60))
def test_any_event_is_read_or_refused(body: bytes) -> None:
    with suppress(BadEvent):
        RowDecoder(TABLE).images(Event(30, bytes(19) + body))


@settings(max_examples=500)
@given(st.binary(max_size=120) | st.binary(max_size=60).map(lambda data: bytes([data[0] % 4] if data else []) + data))
def test_any_document_is_read_or_refused(document: bytes) -> None:
    with suppress(BadEvent, ValueError):
        json_text(document)


def test_a_document_that_holds_itself_is_refused() -> None:
    array = struct.pack("<HH", 4, 16) + (b"\x02" + struct.pack("<H", 0)) * 4
    with pytest.raises(BadEvent):
        json_text(b"\x02" + array)


def test_the_time_for_a_document_grows_with_its_size() -> None:
    count = 1_000_000
    array = struct.pack("<II", count, 8 + 5 * count) + (b"\x05" + struct.pack("<H", 7) + bytes(2)) * count
    began = time.process_time()
    assert json_text(b"\x03" + array) == f"[{', '.join('7' * count)}]"
    assert time.process_time() - began < 15  # with the square of the size it took 43 s


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_of_a_document_is_the_number(number: float) -> None:
    text = double_text(number)
    assert float(text) == number
    assert "." in text or "e" in text


@given(st.binary(max_size=80))
def test_any_compressed_value_is_read_or_refused(stored: bytes) -> None:
    with suppress(BadEvent):
        inflated(stored)


@pytest.mark.parametrize(
    ("precision", "scale", "data", "text"),
    [
        (12, 2, "80 00 00 00 00 01", "0.01"),
        (12, 2, "7e c4 65 36 00 9c", "-1999999999.99"),
        (4, 0, "84 d2", "1234"),
        (4, 4, "84 d2", "0.1234"),
        (4, 4, "7b 2d", "-0.1234"),
    ],
)
def test_decimals(precision: int, scale: int, data: str, text: str) -> None:
    assert decimal_text(precision, scale, bytes.fromhex(data)) == text
