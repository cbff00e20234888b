"""Row events as the payload of BINLOG statements. Pure.

Two things that the servers demand (relay.md, "Facts about BINLOG"): every statement carries the table maps of its own
rows, since later rows would vanish without an error otherwise; and it stays below ``max_allowed_packet``.
One thing that makes it fast: the tables are opened once per BINLOG statement instead of once per row event, because
only the last row event keeps its end-of-statement flag and no table map is repeated. Halves the target's work.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Iterable, Iterator

from shardkit.errors import BadEvent
from shardkit_cdc.events import HEADER_BYTES, RELAXED_UNIQUE_CHECKS, ROWS, ROWS_FLAGS_AT, STMT_END, TABLE_MAP, Event
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Rows

#: Bytes of events in one BINLOG statement: more gain nothing, and the next one is made while this one is applied.
STATEMENT_BYTES = 1 << 18
#: Bytes of a statement beside its payload, with a margin.
_FRAME_BYTES = 1 << 16
_MOST_MAPS = 10_000


_LENGTH = struct.Struct("<I")

#: UPDATE_ROWS_EVENT and PARTIAL_UPDATE_ROWS_EVENT, of MySQL alone.
_MYSQL_UPDATES = frozenset({31, 39})


def largest_payload(max_allowed_packet: int) -> int:
    """Bytes of events that one BINLOG statement may carry to a server: base64 makes four of three."""
    return max(0, max_allowed_packet - _FRAME_BYTES) // 4 * 3


def payloads(rows: Iterable[Rows], *, largest: int, usual: int = STATEMENT_BYTES) -> Iterator[bytes]:
    """Pack row events, in their order, into as few payloads as possible.

    A new one begins when this one is full, when the events' flags change (they say whether foreign keys were checked),
    when a table id comes to mean another table, and between two updates of a MySQL table without a primary key: the
    target would log both as one row event, and who replays that looks for all its rows in one pass over the table
    (sql/log_event.cc, ``do_hash_scan_and_update``), where a row that was changed twice is not found.

    Unique keys are always checked: without, MariaDB keeps the first rows of an empty table aside until the statement
    ends, and the row events behind them do not find them.

    :param largest: bytes that a payload may have at most, the target's limit.
    :param usual: bytes after which a payload is closed.
    :raises BadEvent: for a single row event past the limit.
    """
    limit = min(usual, largest)
    maps: dict[bytes, TableMap] = {}
    front = bytearray()
    body = bytearray()
    flags = last = -1
    updated: TableMap | None = None
    keyless: dict[TableMap, bool] = {}
    for table, event in rows:
        data = event.data
        event_flags = data[ROWS_FLAGS_AT] & ~(STMT_END | RELAXED_UNIQUE_CHECKS)
        known = maps.get(table.table_id)
        size = len(front) + len(body) + len(data) + (0 if known is table else len(table.data))
        updates = table if event.kind in _MYSQL_UPDATES else None
        again = updates is not None and updated is not None and table.qualified == updated.qualified
        if again and table not in keyless:
            keyless[table] = not table.has_primary_key()
        if body and (
            event_flags != flags
            or size > limit
            or (known is not None and known is not table)
            or (again and keyless[table])
        ):
            body[last] |= STMT_END
            yield b"".join((front, body))
            front.clear()
            body.clear()
            maps.clear()
            known = None
        if known is None:
            maps[table.table_id] = table
            front += table.data
        if len(front) + len(body) + len(data) > largest:
            raise BadEvent(
                f"a row event of {table.qualified} has {len(data)} bytes, more than the target takes in one statement",
                hint=f"set max_allowed_packet on the target to at least {len(data) // 3 * 4 + 2 * _FRAME_BYTES}, "
                "then start the hop again",
            )
        flags = event_flags
        updated = updates
        start = len(body)
        last = start + ROWS_FLAGS_AT
        body += data
        body[last] = event_flags
        _LENGTH.pack_into(body, start + 9, len(data))
    if body:
        body[last] |= STMT_END
        yield b"".join((front, body))


def unpacked(payload: bytes, maps: dict[bytes, TableMap]) -> list[Rows]:
    """The row events of a payload again.

    :param maps: table maps met before, by their bytes behind the header: equal ones stay one object.
    :raises BadEvent: when it is none.
    """
    tables: dict[bytes, TableMap] = {}
    found: list[Rows] = []
    at = 0
    while at < len(payload):
        size = int.from_bytes(payload[at + 9 : at + 13], "little")
        data = payload[at : at + size]
        if size < ROWS_FLAGS_AT or len(data) != size:
            raise BadEvent("stored row events are truncated")
        event = Event(data[4], data)
        if event.kind == TABLE_MAP:
            body = data[HEADER_BYTES:]  # the header holds the time
            table = maps.get(body)
            if table is None:
                if len(maps) >= _MOST_MAPS:
                    maps.clear()
                table = maps[body] = TableMap.parse(event)
            tables[table.table_id] = table
        elif event.kind in ROWS and data[19:25] in tables:
            found.append(Rows(tables[data[19:25]], event))
        else:
            raise BadEvent(f"stored row events hold an event of kind {event.kind}")
        at += size
    return found


def binlog_statement(payload: bytes) -> bytes:
    """The SQL statement that applies a payload."""
    return b"".join((b"BINLOG '", binascii.b2a_base64(payload, newline=False), b"'"))
