"""The few binlog events that the relay reads, from bytes. Pure: no I/O, and nothing past an event's own end is read.

Layouts: MySQL source ``libs/mysql/binlog/event/``, MariaDB Knowledge Base "Replication Protocol" and
``sql/log_event.h`` of both servers. Row images are never decoded here: they pass through as they are.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from uuid import UUID

from shardkit.errors import BadEvent
from shardkit.gtid import MariaDBGtid, MySQLGtid

# The event kinds that the relay knows (enum Log_event_type). Plain integers: they are compared for every event.
QUERY = 2
STOP = 3
ROTATE = 4
INTVAR = 5
RAND = 13
USER_VAR = 14
FORMAT_DESCRIPTION = 15
XID = 16
BEGIN_LOAD_QUERY = 17
EXECUTE_LOAD_QUERY = 18
TABLE_MAP = 19
INCIDENT = 26
HEARTBEAT = 27
IGNORABLE = 28
ROWS_QUERY = 29
GTID = 33
ANONYMOUS_GTID = 34
PREVIOUS_GTIDS = 35
XA_PREPARE = 38
TRANSACTION_PAYLOAD = 40
HEARTBEAT_V2 = 41
GTID_TAGGED = 42
MARIADB_ANNOTATE_ROWS = 160
MARIADB_BINLOG_CHECKPOINT = 161
MARIADB_GTID = 162
MARIADB_GTID_LIST = 163
MARIADB_START_ENCRYPTION = 164
MARIADB_QUERY_COMPRESSED = 165

WRITE_ROWS = frozenset({20, 23, 30})
UPDATE_ROWS = frozenset({21, 24, 31, 39})
DELETE_ROWS = frozenset({22, 25, 32})
ROWS = WRITE_ROWS | UPDATE_ROWS | DELETE_ROWS
ROWS_V2 = frozenset({30, 31, 32, 39})
#: MariaDB's compressed row events and what they are once inflated.
COMPRESSED_ROWS = {166: 23, 167: 24, 168: 25, 169: 30, 170: 31, 171: 32}

HEADER_BYTES = 19
CHECKSUM_BYTES = 4
#: Where a row event's flags stand, and the flag that ends a statement (it makes the server close its tables).
ROWS_FLAGS_AT = 25
STMT_END = 0x01
#: The source did not check its unique keys (``unique_checks=0``).
RELAXED_UNIQUE_CHECKS = 0x04
#: Row events with this table id are placeholders of the server: they carry no rows.
DUMMY_TABLE_ID = b"\xff\xff\xff\x00\x00\x00"

#: The largest event that the relay takes (bytes), the servers' own limit: what claims more is corrupt.
MAX_EVENT_BYTES = 1 << 30


class Event(NamedTuple):
    """One event: its kind, and its bytes from the header on, without the checksum.

    The length in its header is the log's: with the checksum. `with_length` mends that where it matters.
    """

    kind: int
    data: bytes

    @property
    def timestamp(self) -> int:
        """When it was written: seconds since the epoch, by the source's clock."""
        return int.from_bytes(self.data[0:4], "little")


def with_length(data: bytes) -> bytes:
    """An event's bytes with a header that says their length, for a log without checksums."""
    return data[:9] + len(data).to_bytes(4, "little") + data[13:]


class Cursor:
    """Reads forward through one event's bytes; running past the end raises BadEvent."""

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: bytes, what: str, at: int = HEADER_BYTES) -> None:
        self._data = data
        self._at = at
        self._what = what

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count < 0 or count > self.left:
            raise BadEvent(f"a {self._what} event ends too early: {count} bytes wanted, {max(0, self.left)} left")
        start = self._at
        self._at += count
        return self._data[start : self._at]

    def integer(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def packed_integer(self) -> int:
        """A length-encoded integer of the client protocol."""
        first = self.integer(1)
        if first < 0xFB:
            return first
        if first in {0xFC, 0xFD, 0xFE}:
            return self.integer({0xFC: 2, 0xFD: 3, 0xFE: 8}[first])
        raise BadEvent(f"a {self._what} event holds a length that is none")

    def varint(self) -> int:
        """An integer of MySQL's serialization library: the low bits of the first byte say how many follow."""
        first = self.integer(1)
        extra = 0
        while extra < 8 and first >> extra & 1:
            extra += 1
        if extra == 8:
            return self.integer(8)
        return (first | int.from_bytes(self.take(extra), "little") << 8) >> extra + 1

    def rest(self) -> bytes:
        return self.take(self.left)


def header_of(data: bytes, what: str) -> None:
    """Refuse bytes that are too short for an event header."""
    if len(data) < HEADER_BYTES:
        raise BadEvent(f"a {what} event of {len(data)} bytes is too short for its header")


# --- format description ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Format:
    """What the Format_description event says about the log that follows it.

    :param checksums: whether each event ends with a CRC32 (the event says so; what was asked for does not count).
    :param server_version: of the server that wrote the log.
    :param data: the event itself with checksums declared off: what a BINLOG statement of ours begins with.
    """

    checksums: bool
    server_version: str
    data: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Format:
        """Read the event with its checksum, as it came.

        :raises BadEvent: when it is truncated, of an unknown version, or its checksum is wrong.
        """
        cursor = Cursor(raw, "Format_description")
        version = cursor.integer(2)
        if version != 4:
            raise BadEvent(f"binlog version {version} is not supported", hint="use MySQL 8.0+ or MariaDB 10.5+")
        server_version = cursor.take(50).split(b"\0")[0].decode("ascii", "replace")
        cursor.take(4)
        header_bytes = cursor.integer(1)
        if header_bytes != HEADER_BYTES:
            raise BadEvent(f"event headers of {header_bytes} bytes are not supported")
        lengths = cursor.rest()
        # The list of post-header lengths is followed by the checksum algorithm and always by a checksum.
        if len(lengths) < 30 + 1 + CHECKSUM_BYTES:
            raise BadEvent("a Format_description event ends too early")
        algorithm = lengths[-5]
        if algorithm not in {0, 1}:
            raise BadEvent(f"checksum algorithm {algorithm} is not supported", hint="set binlog_checksum=CRC32")
        if algorithm == 1:
            _verify(raw, crc_ignores_in_use=True)
        plain = raw[:-5] + b"\0"
        return cls(algorithm == 1, server_version, plain + struct.pack("<I", zlib.crc32(plain)))

    @property
    def timestamp(self) -> int:
        """When the log file was begun: seconds since the epoch, by the source's clock."""
        return int.from_bytes(self.data[0:4], "little")

    def same_layout(self, other: Format) -> bool:
        """Whether events of both logs can be applied behind one Format_description event."""
        at = HEADER_BYTES + 2 + 50 + 4
        return self.server_version == other.server_version and self.data[at:-5] == other.data[at:-5]


# A named tuple without its Python-level constructor: half the time.
_new = tuple.__new__
_LENGTH = struct.Struct("<I")


def _verify(raw: bytes, *, crc_ignores_in_use: bool = False) -> None:
    body = raw[:-CHECKSUM_BYTES]
    expected = int.from_bytes(raw[-CHECKSUM_BYTES:], "little")
    if zlib.crc32(body) == expected:
        return
    # The in-use flag of the log being written is set after the checksum was taken.
    if crc_ignores_in_use and zlib.crc32(body[:17] + bytes([body[17] & 0xFE]) + body[18:]) == expected:
        return
    raise BadEvent(
        f"an event of kind {raw[4]} is corrupt: its CRC32 does not match",
        hint="check the source's disk and the network; restart the hop to read it again",
    )


def checked_event(raw: bytes, form: Format) -> Event:
    """Verify an event as it came from the log and take its checksum off.

    :raises BadEvent: when its length or its checksum is wrong.
    """
    # The hottest lines of the reader: every event of the log passes here.
    size = len(raw)
    if size < HEADER_BYTES or _LENGTH.unpack_from(raw, 9)[0] != size:
        raise BadEvent(f"an event of {size} bytes does not have the length that its header says")
    if not form.checksums:
        return _new(Event, (raw[4], raw))
    end = size - CHECKSUM_BYTES
    if end < HEADER_BYTES:
        raise BadEvent(f"an event of {size} bytes is too short for its checksum")
    data = raw[:end]
    if zlib.crc32(data) != _LENGTH.unpack_from(raw, end)[0]:
        _verify(raw)
    return _new(Event, (raw[4], data))


# --- transaction ids ---------------------------------------------------------------------------------------------


class GroupStart(NamedTuple):
    """A GTID event: the group that follows it.

    :param standalone: it is one statement by itself (MariaDB says so; MySQL does not: always false).
    :param xid: the XA branch that it prepares, as ``x'6162',x'',1`` (MariaDB; on MySQL an XA START query says it).
    """

    gtid: MariaDBGtid | MySQLGtid
    standalone: bool = False
    xid: str = ""


_STANDALONE = 0x01
_GROUP_COMMIT_ID = 0x02
_PREPARED_XA = 0x40
_COMPLETED_XA = 0x80
_EXTRA_START_ALTER = 0x02
_EXTRA_COMMIT_ALTER = 0x04
_EXTRA_ROLLBACK_ALTER = 0x08
_MYSQL_GTID = struct.Struct("<19xx16sQ")  # header, flags; server, number
_MARIADB_GTID = struct.Struct("<5xI10xQIB")  # header with the server id; sequence, domain, flags


def mariadb_group(event: Event) -> GroupStart:
    """Read MariaDB's Gtid event (``Gtid_log_event`` in sql/log_event.h)."""
    data = event.data
    if len(data) < _MARIADB_GTID.size:
        raise BadEvent("a MariaDB Gtid event ends too early")
    server, sequence, domain, flags = _MARIADB_GTID.unpack_from(data)
    gtid = MariaDBGtid(domain, server, sequence)
    at = _MARIADB_GTID.size + (8 if flags & _GROUP_COMMIT_ID else 0)
    xid = ""
    if flags & (_PREPARED_XA | _COMPLETED_XA):
        cursor = Cursor(data, "Gtid", at)
        form, (first, second) = cursor.integer(4), cursor.take(2)
        xid = f"x'{cursor.take(first).hex()}',x'{cursor.take(second).hex()}',{form}"
        at = len(data) - cursor.left
    if len(data) > at and data[at]:
        _refuse_split_alter(data[at], gtid)
    return GroupStart(gtid, bool(flags & _STANDALONE), xid if flags & _PREPARED_XA else "")


def _refuse_split_alter(extra: int, gtid: MariaDBGtid) -> None:
    if extra & (_EXTRA_START_ALTER | _EXTRA_COMMIT_ALTER | _EXTRA_ROLLBACK_ALTER):
        raise BadEvent(
            "an ALTER TABLE was logged in two phases",
            at=str(gtid),
            hint="set binlog_alter_two_phase=OFF on the source, then seed this target again",
        )


def mysql_group(event: Event) -> GroupStart:
    """Read MySQL's Gtid event, the plain one or the one with a tag."""
    if event.kind == GTID_TAGGED:
        return GroupStart(_tagged_gtid(Cursor(event.data, "Gtid_tagged")))
    data = event.data
    if len(data) < _MYSQL_GTID.size:
        raise BadEvent("a Gtid event ends too early")
    server, number = _MYSQL_GTID.unpack_from(data)
    return GroupStart(MySQLGtid(_uuid(server), number))


@lru_cache(maxsize=256)  # a log names few servers, one of them in every transaction
def _uuid(octets: bytes) -> str:
    return str(UUID(bytes=octets))


def _tagged_gtid(cursor: Cursor) -> MySQLGtid:
    """The first fields of the tagged event, in MySQL's serialization format (libs/mysql/serialization/readme)."""
    for _ in range(3):  # format version, message size, last field that must be known
        cursor.varint()
    uuid, number, tag = b"", 0, b""
    for expected in range(4):
        if cursor.varint() != expected:
            raise BadEvent("a Gtid_tagged event does not hold the fields expected")
        if expected == 0:
            cursor.varint()
        elif expected == 1:
            octets = [cursor.varint() for _ in range(16)]
            if max(octets) > 0xFF:
                raise BadEvent("a Gtid_tagged event holds a UUID that is none")
            uuid = bytes(octets)
        elif expected == 2:
            number = cursor.varint() >> 1  # zigzag: transaction numbers are positive
        else:
            tag = cursor.take(cursor.varint())
    source = _uuid(uuid)
    try:
        return MySQLGtid(f"{source}:{tag.decode('ascii')}" if tag else source, number)
    except UnicodeDecodeError:
        raise BadEvent("a Gtid_tagged event holds a tag that is none") from None


# --- compressed events of MariaDB --------------------------------------------------------------------------------


def _inflated(packed: bytes, what: str) -> bytes:
    """Undo ``binlog_buf_compress`` of sql/log_event.cc: a byte that says how wide the length is, the length, zlib."""
    if not packed:
        raise BadEvent(f"a compressed {what} event is empty")
    algorithm, width = packed[0] >> 4 & 0x07, packed[0] & 0x07
    if not packed[0] & 0x80 or algorithm != 0 or not 1 <= width <= 4 or len(packed) <= width:
        raise BadEvent(f"a compressed {what} event is not packed in a known way")
    size = int.from_bytes(packed[1 : 1 + width], "big")
    if not 0 < size <= MAX_EVENT_BYTES:
        raise BadEvent(f"a compressed {what} event claims {size} bytes")
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(packed[1 + width :], size)
        surplus = inflater.decompress(inflater.unconsumed_tail, 1)
    except zlib.error as error:
        raise BadEvent(f"a compressed {what} event cannot be inflated: {error}") from None
    if len(plain) != size or surplus or not inflater.eof:
        raise BadEvent(f"a compressed {what} event inflates to another length than it says")
    return plain


def _rebuilt(event: Event, kind: int, keep: int, plain: bytes) -> Event:
    head = event.data[:keep]
    size = keep + len(plain)
    return Event(kind, head[:4] + bytes([kind]) + head[5:9] + size.to_bytes(4, "little") + head[13:] + plain)


def inflated_rows(event: Event) -> Event:
    """A MariaDB compressed row event as the plain one that BINLOG takes."""
    kind = COMPRESSED_ROWS[event.kind]
    cursor = Cursor(event.data, "row")
    cursor.take(8)
    if kind in ROWS_V2:
        extra = cursor.integer(2)
        cursor.take(extra - 2)
    columns = cursor.packed_integer()
    cursor.take((columns + 7) // 8 * (2 if kind in UPDATE_ROWS else 1))
    keep = len(event.data) - cursor.left
    return _rebuilt(event, kind, keep, _inflated(cursor.rest(), "row"))


def inflated_query(event: Event) -> Event:
    """A MariaDB compressed Query event as the plain one."""
    cursor = Cursor(event.data, "Query")
    cursor.take(8)
    database_length = cursor.integer(1)
    cursor.take(2)
    cursor.take(cursor.integer(2))
    cursor.take(database_length + 1)
    keep = len(event.data) - cursor.left
    return _rebuilt(event, QUERY, keep, _inflated(cursor.rest(), "Query"))


# --- row events --------------------------------------------------------------------------------------------------


def leading_text(event: Event) -> bytes:
    """The first column of a row event's first row, where that is a VARCHAR of at most 255 bytes and never NULL.

    The relay asks this of one table alone, whose layout is its own: `shardkit_position`.
    """
    cursor = Cursor(event.data, "row")
    cursor.take(8)
    if event.kind in ROWS_V2:
        cursor.take(cursor.integer(2) - 2)
    width = (cursor.packed_integer() + 7) // 8
    cursor.take(width * (2 if event.kind in UPDATE_ROWS else 1))
    cursor.take(width)  # the row's NULL bits
    return cursor.take(cursor.integer(1))
