"""Binlog events made by hand, for the tests that need no server."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from uuid import UUID

from shardkit_cdc import events
from shardkit_cdc.events import Event

SERVER_ID = 11
TIMESTAMP = 1_700_000_000


def event(kind: int, body: bytes, *, flags: int = 0) -> Event:
    """An event without a checksum."""
    return Event(kind, struct.pack("<IBIIIH", TIMESTAMP, kind, SERVER_ID, 19 + len(body), 0, flags) + body)


def sealed(plain: Event) -> bytes:
    """The event as a log with checksums has it."""
    data = plain.data[:9] + (len(plain.data) + 4).to_bytes(4, "little") + plain.data[13:]
    return data + zlib.crc32(data).to_bytes(4, "little")


def format_event(*, checksums: bool = True) -> bytes:
    """A Format_description event as it comes over the wire."""
    body = struct.pack("<H", 4) + b"10.11.6-MariaDB-log".ljust(50, b"\0") + bytes(4) + bytes([19]) + bytes(range(165))
    body += bytes([int(checksums)])
    head = struct.pack("<IBIIIH", TIMESTAMP, events.FORMAT_DESCRIPTION, SERVER_ID, 19 + len(body) + 4, 0, 0)
    return head + body + zlib.crc32(head + body).to_bytes(4, "little")


def mariadb_gtid(domain: int, sequence: int, *, flags: int = 0, more: bytes = b"") -> Event:
    return event(events.MARIADB_GTID, struct.pack("<QIB", sequence, domain, flags) + more)


def mysql_gtid(source: str, number: int) -> Event:
    return event(events.GTID, b"\x01" + UUID(source).bytes + struct.pack("<Q", number) + bytes(17))


def query(database: str, text: str, status: bytes = b"", *, error: int = 0) -> Event:
    name = database.encode()
    body = struct.pack("<IIBHH", 1, 0, len(name), error, len(status)) + status + name + b"\0" + text.encode()
    return event(events.QUERY, body)


def table_map(table_id: bytes, database: str, table: str) -> Event:
    """A map of a table with one INT column, without optional metadata."""
    names = b"".join(bytes([len(name)]) + name.encode() + b"\0" for name in (database, table))
    return event(events.TABLE_MAP, table_id + b"\x01\x00" + names + b"\x01\x03\x00\x00")


def column_map(database: str, table: str, columns: Sequence[tuple[int, bytes]], names: Sequence[str] | None) -> Event:
    """A table map with column types and their metadata, all but the first column nullable."""
    described = b"".join(metadata for _, metadata in columns)
    nullable = sum(1 << index for index in range(1, len(columns))).to_bytes((len(columns) + 7) // 8, "little")
    body = bytes([42, 0, 0, 0, 0, 0]) + b"\x01\x00"
    body += b"".join(bytes([len(name)]) + name.encode() + b"\0" for name in (database, table))
    body += bytes([len(columns)]) + bytes(kind for kind, _ in columns) + bytes([len(described)]) + described + nullable
    if names is not None:
        packed = b"".join(bytes([len(name)]) + name.encode() for name in names)
        body += b"\x01\x01\x00" + b"\x02\x01\x2d" + bytes([4, len(packed)]) + packed
    return event(events.TABLE_MAP, body)


def write_rows(
    table_id: bytes, image: bytes, *, kind: int = 23, flags: int = events.STMT_END, columns: int = 1
) -> Event:
    body = table_id + struct.pack("<H", flags) + (b"\x02\x00" if kind in events.ROWS_V2 else b"")
    bitmap = b"\xff" * ((columns + 7) // 8)
    return event(kind, body + bytes([columns]) + bitmap * (2 if kind in events.UPDATE_ROWS else 1) + image)


def xid() -> Event:
    return event(events.XID, bytes(8))


def xa_prepare(*, one_phase: bool = False) -> Event:
    return event(events.XA_PREPARE, bytes([int(one_phase)]) + struct.pack("<III", 1, 1, 0) + b"a")
