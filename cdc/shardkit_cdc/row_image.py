"""Row events as typed values: the decoder of the SQL path. Pure: no I/O, and nothing past an event's own end is read.

A decoder is made once for a table map and used for all of its row events. It is strict: a row that does not end where
its event ends, a column that its table map does not describe in full, or a type that it does not know is a BadEvent.

Layouts: ``Rows_event`` in MySQL's libs/mysql/binlog/event/rows_event.h; the values as ``Field::pack`` writes them
(sql/field.cc of both servers), decimals in strings/decimal.cc, temporal values in ``my_time_packed_from_binary`` and
its kin (mysys/my_time.cc), MariaDB's compressed columns in ``Field_longstr::compress``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from datetime import date, timedelta
from enum import Enum
from functools import lru_cache, partial
from typing import Final, TypeAlias

from shardkit.errors import BadEvent
from shardkit_cdc.events import MAX_EVENT_BYTES, ROWS_V2, UPDATE_ROWS, Cursor, Event
from shardkit_cdc.table_map import Column, ColumnType, TableMap


class Absent(Enum):
    """In the place of a value that the event does not hold: of a column that the server computes."""

    ABSENT = 0


ABSENT: Final = Absent.ABSENT

#: One column's value. Integers: int, also YEAR, BIT, ENUM (its number) and SET (its bits). FLOAT and DOUBLE: float, a
#: FLOAT being the very number that it stands for. DECIMAL and temporal types: their exact text with all digits, a
#: TIMESTAMP's in UTC. Everything else: bytes as they are stored, in the column's character set; JSON in MySQL's binary
#: form (`shardkit_cdc.json_binary`).
Value: TypeAlias = int | float | str | bytes | Absent | None
Image: TypeAlias = tuple[Value, ...]
Reader: TypeAlias = Callable[[bytes, int], tuple[Value, int]]

#: A partial update of JSON (MySQL's binlog_row_value_options).
_PARTIAL_UPDATE = 39
_BINARY_COLLATION = 63


class RowDecoder:
    """Reads the rows of one table's row events.

    :param table: the table map, with full metadata: without it signedness and character sets are not known.
    :raises BadEvent: for a column of a type that cannot be read.
    """

    def __init__(self, table: TableMap) -> None:
        self.columns = table.columns()
        self._table = table
        self._readers = [self._reader(column) for column in self.columns]
        self._present: dict[bytes, list[tuple[int, Reader]]] = {}

    def _reader(self, column: Column) -> Reader:
        try:
            return _reader(column)
        except BadEvent as error:
            raise BadEvent(f"column {column.name} of {self._table.qualified}: {error.text}", hint=error.hint) from None

    def images(self, event: Event) -> list[Image]:
        """The rows of an event, one value a column; of an update each row before and after it, in turn.

        :raises BadEvent: when the event is truncated or contradicts its table map, or updates JSON in parts.
        """
        if event.kind == _PARTIAL_UPDATE:
            raise BadEvent(
                f"an update of {self._table.qualified} holds parts of JSON documents",
                hint="set binlog_row_value_options='' on the source, in every session; what is in its log already "
                "needs a reseed",
            )
        data = event.data
        cursor = Cursor(data, "row")
        cursor.take(8)
        if event.kind in ROWS_V2:
            cursor.take(cursor.integer(2) - 2)
        count = cursor.packed_integer()
        if count != len(self._readers):
            raise BadEvent(
                f"a row event of {self._table.qualified} has {count} columns, its table map {len(self._readers)}"
            )
        width = (count + 7) // 8
        before = self._chosen(cursor.take(width))
        after = self._chosen(cursor.take(width)) if event.kind in UPDATE_ROWS else before
        at, end = len(data) - cursor.left, len(data)
        found: list[Image] = []
        try:
            while at < end:
                image, at = self._image(data, at, before)
                found.append(image)
                if after is not before:
                    image, at = self._image(data, at, after)
                    found.append(image)
        except (IndexError, struct.error):
            at = end + 1
        if at != end or (event.kind in UPDATE_ROWS and len(found) % 2):
            raise BadEvent(f"a row event of {self._table.qualified} does not end with a row")
        return found

    def _chosen(self, bits: bytes) -> list[tuple[int, Reader]]:
        """The columns that an event holds: all, or all but some that the server computes."""
        chosen = self._present.get(bits)
        if chosen is None:
            chosen = [(n, read) for n, read in enumerate(self._readers) if bits[n // 8] >> n % 8 & 1]
            if not chosen:
                raise BadEvent(f"a row event of {self._table.qualified} holds no columns")
            self._present[bits] = chosen
        # A list of its own for the second bitmap of an update, so that the two can be told apart.
        return [*chosen]

    def _image(self, data: bytes, at: int, chosen: list[tuple[int, Reader]]) -> tuple[Image, int]:
        width = (len(chosen) + 7) // 8
        nulls = int.from_bytes(data[at : at + width], "little")
        at += width
        row: list[Value] = [ABSENT] * len(self._readers)
        for number, read in chosen:
            if nulls & 1:
                row[number] = None
            else:
                row[number], at = read(data, at)
            nulls >>= 1
        return tuple(row), at


# --- readers, one for each type: from the bytes and a place in them to the value and the place behind it -------------


def _reader(column: Column) -> Reader:
    kind, metadata = column.type, column.metadata
    if kind in _INTEGER_BYTES:
        return partial(_integer, _INTEGER_BYTES[kind], not column.unsigned)
    if kind in _REAL:
        return partial(_real, _REAL[kind])
    if kind in {ColumnType.ENUM, ColumnType.SET} and 1 <= metadata <= 8:
        return partial(_integer, metadata, False)
    if kind == ColumnType.BIT:
        return partial(_bits, (metadata >> 8) + (metadata & 0xFF > 0))
    if kind == ColumnType.NEWDECIMAL:
        return _decimal(metadata >> 8, metadata & 0xFF)
    if kind in _FRACTIONAL and metadata <= 6:
        return partial(_FRACTIONAL[kind], metadata, (metadata + 1) // 2)
    if kind in {ColumnType.VARCHAR, ColumnType.VAR_STRING}:
        return partial(_octets, 2 if metadata > 255 else 1)
    if kind == ColumnType.STRING:
        # A BINARY's trailing zeros are left out of the log, and count when it is compared.
        fill = metadata if column.collation == _BINARY_COLLATION else 0
        return partial(_fixed, 2 if metadata > 255 else 1, fill)
    if kind in _WITH_LENGTH and 1 <= metadata <= 4:
        return partial(_octets, metadata)
    if kind == ColumnType.MARIADB_VARCHAR_COMPRESSED:
        return partial(_packed, 2 if metadata > 255 else 1)
    if kind == ColumnType.MARIADB_BLOB_COMPRESSED and 1 <= metadata <= 4:
        return partial(_packed, metadata)
    if kind == ColumnType.YEAR:
        return _year
    if kind == ColumnType.DATE:
        return _date
    if kind in {ColumnType.TIMESTAMP, ColumnType.DATETIME, ColumnType.TIME}:
        raise BadEvent(
            "it is stored in the temporal format of MariaDB 5.3",
            hint="on the source: SET GLOBAL mysql56_temporal_format=ON and ALTER TABLE ... FORCE",
        )
    raise BadEvent(f"values of type {kind} with metadata {metadata} cannot be read")


def _integer(width: int, signed: bool, data: bytes, at: int) -> tuple[Value, int]:
    end = at + width
    return int.from_bytes(data[at:end], "little", signed=signed), end


def _real(form: struct.Struct, data: bytes, at: int) -> tuple[Value, int]:
    return form.unpack_from(data, at)[0], at + form.size


def _bits(width: int, data: bytes, at: int) -> tuple[Value, int]:
    end = at + width
    return int.from_bytes(data[at:end], "big"), end


def _octets(prefix: int, data: bytes, at: int) -> tuple[Value, int]:
    start = at + prefix
    end = start + int.from_bytes(data[at:start], "little")
    return data[start:end], end


def _fixed(prefix: int, fill: int, data: bytes, at: int) -> tuple[Value, int]:
    start = at + prefix
    end = start + int.from_bytes(data[at:start], "little")
    return data[start:end].ljust(fill, b"\0"), end


def _year(data: bytes, at: int) -> tuple[Value, int]:
    return data[at] and 1900 + data[at], at + 1


def _date(data: bytes, at: int) -> tuple[Value, int]:
    end = at + 3
    packed = int.from_bytes(data[at:end], "little")
    return f"{packed >> 9:04d}-{packed >> 5 & 15:02d}-{packed & 31:02d}", end


def _time(digits: int, width: int, data: bytes, at: int) -> tuple[Value, int]:
    end = at + 3 + width
    packed = int.from_bytes(data[at:end], "big") - (0x800000 << 8 * width)
    sign, packed = ("-", -packed) if packed < 0 else ("", packed)
    whole = packed >> 8 * width
    return f"{sign}{whole >> 12:02d}:{whole >> 6 & 63:02d}:{whole & 63:02d}{_fraction(packed, digits, width)}", end


def _datetime(digits: int, width: int, data: bytes, at: int) -> tuple[Value, int]:
    end = at + 5 + width
    packed = int.from_bytes(data[at:end], "big") - (0x8000000000 << 8 * width)
    if packed < 0:
        raise BadEvent("a row event holds a negative DATETIME")
    whole = packed >> 8 * width
    year, month = divmod(whole >> 22, 13)
    day = f"{year:04d}-{month:02d}-{whole >> 17 & 31:02d}"
    clock = f"{whole >> 12 & 31:02d}:{whole >> 6 & 63:02d}:{whole & 63:02d}"
    return f"{day} {clock}{_fraction(packed, digits, width)}", end


def _timestamp(digits: int, width: int, data: bytes, at: int) -> tuple[Value, int]:
    end = at + 4 + width
    packed = int.from_bytes(data[at:end], "big")
    whole = packed >> 8 * width
    if not packed:
        day, second = "0000-00-00", 0
    else:
        days, second = divmod(whole, 86_400)
        day = _day(days)
    clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    return f"{day} {clock}{_fraction(packed, digits, width)}", end


@lru_cache(maxsize=4096)
def _day(number: int) -> str:
    return (date(1970, 1, 1) + timedelta(number)).isoformat()


def _fraction(packed: int, digits: int, width: int) -> str:
    """The digits behind the point; the lowest ``width`` bytes hold two for each byte."""
    if not digits:
        return ""
    return "." + f"{packed & (1 << 8 * width) - 1:0{2 * width}d}"[:digits]


#: Bytes that this many decimal digits take (strings/decimal.cc, dig2bytes).
_DIGIT_BYTES = (0, 1, 1, 2, 2, 3, 3, 4, 4, 4)


def _decimal(precision: int, scale: int) -> Reader:
    if not 0 < precision <= 65 or scale > precision:
        raise BadEvent(f"DECIMAL({precision},{scale}) is no type")
    whole = precision - scale
    groups = [(whole % 9, False)] + [(9, False)] * (whole // 9) + [(9, True)] * (scale // 9) + [(scale % 9, True)]
    parts = [(_DIGIT_BYTES[digits], digits, behind) for digits, behind in groups if digits]
    size = sum(width for width, _, _ in parts)

    def read(data: bytes, at: int) -> tuple[Value, int]:
        end = at + size
        number = int.from_bytes(data[at:end], "big") ^ 1 << 8 * size - 1  # the sign's bit is inverted
        negative = number >> 8 * size - 1
        if negative:
            number ^= (1 << 8 * size) - 1
        front = behind = ""
        rest = 8 * size
        for width, digits, is_behind in parts:
            rest -= 8 * width
            text = f"{number >> rest & (1 << 8 * width) - 1:0{digits}d}"
            if is_behind:
                behind += text
            else:
                front += text
        text = front.lstrip("0") or "0"
        return ("-" if negative else "") + (f"{text}.{behind}" if behind else text), end

    return read


def decimal_text(precision: int, scale: int, data: bytes) -> str:
    """A DECIMAL's text.

    :raises BadEvent: when there is no such type, or the bytes are not as many as it has.
    """
    text, end = _decimal(precision, scale)(data, 0)
    if end != len(data):
        raise BadEvent("a DECIMAL has another length than its type")
    return str(text)


def _packed(prefix: int, data: bytes, at: int) -> tuple[Value, int]:
    found, end = _octets(prefix, data, at)
    return inflated(found) if isinstance(found, bytes) else found, end


def inflated(stored: bytes) -> bytes:
    """A value of one of MariaDB's COMPRESSED columns.

    :raises BadEvent: when it is packed in an unknown way, or does not inflate to the length that it says.
    """
    if not stored:
        return b""
    method, width = stored[0] >> 4, stored[0] & 0x07
    if not stored[0]:
        return stored[1:]
    if method != 8 or not 1 <= width <= 4 or len(stored) <= width:
        raise BadEvent("a value of a compressed column is not packed in a known way")
    size = int.from_bytes(stored[1 : 1 + width], "big")
    if size > MAX_EVENT_BYTES:
        raise BadEvent(f"a value of a compressed column claims {size} bytes")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS if stored[0] & 0x08 else zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(stored[1 + width :], size + 1)
    except zlib.error as error:
        raise BadEvent(f"a value of a compressed column cannot be inflated: {error}") from None
    if len(plain) != size:
        raise BadEvent("a value of a compressed column inflates to another length than it says")
    return plain


_INTEGER_BYTES: dict[int, int] = {
    ColumnType.TINY: 1,
    ColumnType.SHORT: 2,
    ColumnType.INT24: 3,
    ColumnType.LONG: 4,
    ColumnType.LONGLONG: 8,
}
_REAL: dict[int, struct.Struct] = {ColumnType.FLOAT: struct.Struct("<f"), ColumnType.DOUBLE: struct.Struct("<d")}
_FRACTIONAL: dict[int, Callable[[int, int, bytes, int], tuple[Value, int]]] = {
    ColumnType.TIME2: _time,
    ColumnType.DATETIME2: _datetime,
    ColumnType.TIMESTAMP2: _timestamp,
}
_WITH_LENGTH = frozenset(
    {
        ColumnType.BLOB,
        ColumnType.TINY_BLOB,
        ColumnType.MEDIUM_BLOB,
        ColumnType.LONG_BLOB,
        ColumnType.GEOMETRY,
        ColumnType.JSON,
        ColumnType.VECTOR,
    }
)
