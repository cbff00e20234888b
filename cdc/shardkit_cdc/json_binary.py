"""MySQL's binary JSON as the text that the server itself makes of it. Pure.

Layout: the comment at the head of MySQL's sql-common/json_binary.h; the text as ``Json_wrapper::to_string`` writes it
(sql-common/json_dom.cc), numbers as ``my_gcvt`` does (strings/dtoa.cc).
"""

from __future__ import annotations

import base64
import struct

from shardkit.errors import BadEvent
from shardkit_cdc.row_image import decimal_text
from shardkit_cdc.table_map import ColumnType

_SMALL_OBJECT, _LARGE_OBJECT, _SMALL_ARRAY, _LARGE_ARRAY = range(4)
_LITERAL, _INT16, _UINT16, _INT32, _UINT32, _INT64, _UINT64, _DOUBLE = range(4, 12)
_STRING, _OPAQUE = 0x0C, 0x0F

_LITERALS = {0: "null", 1: "true", 2: "false"}
_INTEGERS = {_INT16: (2, True), _UINT16: (2, False), _INT32: (4, True), _UINT32: (4, False)}
_INTEGERS |= {_INT64: (8, True), _UINT64: (8, False)}
_DEPTH = 100  # the server's own limit
_ESCAPES = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
_ESCAPES |= {code: f"\\u{code:04x}" for code in range(0x20) if code not in _ESCAPES}
#: How many digits a whole number, and how many zeros a fraction may have to be written without an exponent
#: (strings/dtoa.cc, MAX_DECPT_FOR_F_FORMAT).
_PLAIN_DIGITS = 15


class Opaque(ValueError):
    """A document holds a value of a type that JSON text has no word for (DECIMAL, dates, binary strings)."""


def json_text(document: bytes, *, as_document: bool = False) -> str:
    """A document's text.

    :param as_document: the text is to become the same document again: refuse values that would come back as another
        type.
    :raises BadEvent: when it is truncated or contradicts itself.
    :raises Opaque: with ``as_document``.
    """
    if not document:
        return "null"  # what the server reads out of a column that was filled without a value
    reader = _Reader(len(document), as_document)
    try:
        # Views: a container's values would else be copied with all that stands behind them, each time.
        return reader.value(document[0], memoryview(document)[1:], _DEPTH)
    except (IndexError, struct.error, UnicodeDecodeError):
        raise BadEvent("a JSON document is truncated") from None


class _Reader:
    def __init__(self, most: int, as_document: bool) -> None:
        self._left = most  # each value takes a byte at least: more of them than bytes point at one another
        self._as_document = as_document

    def value(self, kind: int, data: memoryview, depth: int) -> str:
        self._left -= 1
        if self._left < 0 or depth < 0:
            raise BadEvent("a JSON document contradicts itself")
        if kind in {_SMALL_OBJECT, _LARGE_OBJECT}:
            return self._container(data, 4 if kind == _LARGE_OBJECT else 2, True, depth)
        if kind in {_SMALL_ARRAY, _LARGE_ARRAY}:
            return self._container(data, 4 if kind == _LARGE_ARRAY else 2, False, depth)
        if kind == _LITERAL:
            if data[0] not in _LITERALS:
                raise BadEvent("a JSON document holds a literal that is none")
            return _LITERALS[data[0]]
        if kind in _INTEGERS:
            width, signed = _INTEGERS[kind]
            return str(int.from_bytes(_take(data, 0, width), "little", signed=signed))
        if kind == _DOUBLE:
            return double_text(struct.unpack_from("<d", data)[0])
        if kind == _STRING:
            size, at = _length(data, 0)
            return _quoted(str(_take(data, at, size), "utf-8"))
        if kind == _OPAQUE:
            size, at = _length(data, 1)
            return self._opaque(data[0], _take(data, at, size))
        raise BadEvent(f"a JSON document holds a value of the unknown kind {kind}")

    def _container(self, data: memoryview, width: int, is_object: bool, depth: int) -> str:
        count = int.from_bytes(_take(data, 0, width), "little")
        data = _take(data, 0, int.from_bytes(_take(data, width, width), "little"))
        keys_at = 2 * width
        values_at = keys_at + (count * (width + 2) if is_object else 0)
        if values_at + count * (width + 1) > len(data):
            raise BadEvent("a JSON document is truncated")
        parts = []
        for number in range(count):
            at = values_at + number * (width + 1)
            kind = data[at]
            inline = kind in {_LITERAL, _INT16, _UINT16} or (width == 4 and kind in {_INT32, _UINT32})
            start = at + 1 if inline else int.from_bytes(data[at + 1 : at + 1 + width], "little")
            text = self.value(kind, data[start:], depth - 1)
            if is_object:
                key_at = keys_at + number * (width + 2)
                place = int.from_bytes(data[key_at : key_at + width], "little")
                size = int.from_bytes(data[key_at + width : key_at + width + 2], "little")
                text = f"{_quoted(str(_take(data, place, size), 'utf-8'))}: {text}"
            parts.append(text)
        return ("{%s}" if is_object else "[%s]") % ", ".join(parts)

    def _opaque(self, kind: int, data: memoryview) -> str:
        if self._as_document:
            raise Opaque(f"a JSON document holds a value of the SQL type {_type_name(kind)}")
        if kind == ColumnType.NEWDECIMAL:
            return decimal_text(data[0], data[1], bytes(data[2:]))
        if kind in {ColumnType.DATE, ColumnType.DATETIME, ColumnType.TIMESTAMP, ColumnType.TIME}:
            return f'"{_temporal(kind, int.from_bytes(_take(data, 0, 8), "little", signed=True))}"'
        return f'"base64:type{kind}:{base64.b64encode(data).decode()}"'


def _type_name(kind: int) -> str:
    try:
        return ColumnType(kind).name
    except ValueError:
        return str(kind)


def _take(data: memoryview, at: int, size: int) -> memoryview:
    if at + size > len(data):
        raise BadEvent("a JSON document is truncated")
    return data[at : at + size]


def _length(data: memoryview, at: int) -> tuple[int, int]:
    """A length in groups of seven bits, the lowest first, and the place behind it."""
    size = 0
    for number in range(5):
        size |= (data[at + number] & 0x7F) << 7 * number
        if not data[at + number] & 0x80:
            return size, at + number + 1
    raise BadEvent("a JSON document holds a length that is none")


def _quoted(text: str) -> str:
    return f'"{text.translate(_ESCAPES)}"'


def _temporal(kind: int, packed: int) -> str:
    sign, packed = ("-", -packed) if packed < 0 else ("", packed)
    whole, micros = packed >> 24, packed & 0xFFFFFF
    clock = f"{whole >> 12 & (0x3FF if kind == ColumnType.TIME else 31):02d}:{whole >> 6 & 63:02d}:{whole & 63:02d}"
    if kind == ColumnType.TIME:
        return f"{sign}{clock}.{micros:06d}"
    year, month = divmod(whole >> 22, 13)
    day = f"{year:04d}-{month:02d}-{whole >> 17 & 31:02d}"
    return day if kind == ColumnType.DATE else f"{day} {clock}.{micros:06d}"


def double_text(number: float) -> str:
    """A DOUBLE as MySQL writes it in JSON: the shortest digits that give it back, with a point or an exponent."""
    mantissa, _, exponent = f"{number!r}".partition("e")
    sign, mantissa = ("-", mantissa[1:]) if mantissa.startswith("-") else ("", mantissa)
    front, _, behind = mantissa.partition(".")
    digits = (front + behind).lstrip("0")
    # The number is 0.digits times ten to the power of place.
    place = len(front.lstrip("0")) or len(digits) - len(behind)
    place += int(exponent or 0)
    digits = digits.rstrip("0")
    if not digits:
        return f"{sign}0.0"
    if place <= -_PLAIN_DIGITS or (place > _PLAIN_DIGITS and len(digits) <= place):
        tail = f".{digits[1:]}" if len(digits) > 1 else ""
        return f"{sign}{digits[0]}{tail}e{place - 1}"
    if place <= 0:
        return f"{sign}0.{'0' * -place}{digits}"
    if len(digits) <= place:
        return f"{sign}{digits.ljust(place, '0')}.0"
    return f"{sign}{digits[:place]}.{digits[place:]}"
