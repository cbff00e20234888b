"""A look ahead in a source's log: the first transaction behind a position that holds anything for a hop.

It is found by the rules by which the hop itself reads (`transactions`, `selection`), so a transaction that these refuse
counts as one: a hop stops there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from shardkit.errors import BadEvent
from shardkit.gtid import Flavour, Gtid, Position, parse_gtid
from shardkit_cdc import events, query
from shardkit_cdc.events import Event
from shardkit_cdc.query import Query
from shardkit_cdc.selection import Selector
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Assembler, Outcome

_GTIDS = frozenset({events.GTID, events.GTID_TAGGED, events.MARIADB_GTID})
_ENDS = frozenset({events.XID, events.XA_PREPARE, events.TRANSACTION_PAYLOAD})
_ROW_EVENTS = events.ROWS | events.COMPRESSED_ROWS.keys()
_FRAMES = frozenset({b"BEGIN", b"COMMIT", b"ROLLBACK"})
#: How long a transaction that cannot be read to its end is waited for, in seconds; it is in the log as a whole.
_QUIET_SECONDS = 2.0
#: After how many seconds without an event a log that should go on counts as ended.
_STILL_SECONDS = 10.0
#: How much of a transaction is looked at for what it holds, in bytes; what comes behind is not counted.
_MOST_BYTES = 64 << 20


@dataclass(slots=True)
class Found:
    """One transaction of a source's log, as its events show it.

    :param tables: table (``database.table``) -> row events.
    :param statements: the first characters of the statements in it.
    :param committed_at: by the source's clock.
    :param ends_branch: the XA branch that it commits or rolls back; empty for anything else.
    :param whole: whether all of it was looked at.
    """

    gtid: Gtid
    committed_at: datetime
    tables: dict[str, int] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    ends_branch: str = ""
    whole: bool = False
    _names: dict[bytes, str] = field(default_factory=dict)
    _bytes: int = 0

    def note(self, event: Event) -> None:
        """Add what one event of it shows. Never raises: the events of a faulty transaction come here."""
        self._bytes += len(event.data)
        try:
            if event.kind == events.TABLE_MAP:
                table = TableMap.parse(event)
                self._names[table.table_id] = f"{table.database}.{table.table}"
            elif event.kind in _ROW_EVENTS:
                name = self._names.get(event.data[19:25])
                if name is not None:
                    self.tables[name] = self.tables.get(name, 0) + 1
            elif event.kind == events.TRANSACTION_PAYLOAD:
                self.statements.append("(compressed: what it holds is not shown)")
            elif event.kind in {events.QUERY, events.MARIADB_QUERY_COMPRESSED}:
                plain = events.inflated_query(event) if event.kind == events.MARIADB_QUERY_COMPRESSED else event
                if query.keyword(plain) not in _FRAMES:
                    self.statements.append(_shown(Query.parse(plain)))
        except BadEvent:
            self.statements.append("(an event that cannot be read)")
        if event.kind in _ENDS or (event.kind == events.QUERY and query.keyword(event) in {b"COMMIT", b"ROLLBACK"}):
            self.whole = True

    @property
    def full(self) -> bool:
        """Whether enough was looked at."""
        return self.whole or self._bytes > _MOST_BYTES


def first_own(
    stream: BinlogStream, flavour: Flavour, selector: Selector, *, after: Position, end: Position
) -> tuple[Found | None, Position]:
    """The first transaction that holds anything for the hop or cannot be read, and the position just before it.

    None when there is none up to ``end``.

    :param stream: the source's log from ``after`` on.
    :param end: what the source's log has reached.
    :raises Interrupted, PositionLost, PreconditionFailed: as `BinlogStream.read`.
    :raises BadEvent: an event is corrupt.
    """
    assembler = Assembler(flavour)
    current: Found | None = None
    quiet = Quiet(_STILL_SECONDS)
    while not after.covers(end) and not quiet:
        arrived = stream.read()
        if arrived:
            quiet.over()
        passed: list[Gtid] = []
        for index, event in enumerate(arrived):
            if event.kind in _GTIDS:
                current = Found(_gtid(event, flavour), datetime.fromtimestamp(event.timestamp, UTC))
            elif current is not None:
                current.note(event)
            transaction = None
            try:
                transaction = assembler.push(event)
                selected = None if transaction is None else selector.select(transaction)
            except BadEvent:
                if current is None:
                    raise
                current.whole = transaction is not None and transaction.last
                return _completed(current, arrived[index + 1 :], stream), after.advanced(passed)
            if transaction is None or current is None:
                continue
            if selected is not None and selected.own:
                if transaction.outcome in {Outcome.XA_COMMIT, Outcome.XA_ROLLBACK}:
                    current.ends_branch = transaction.xid
                current.whole = transaction.last
                return _completed(current, arrived[index + 1 :], stream), after.advanced(passed)
            if transaction.last:
                passed.append(current.gtid)
        after = after.advanced(passed)
    return None, after


class Quiet:
    """True once nothing has come for a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.over()

    def over(self) -> None:
        """Something has come."""
        self._until = time.monotonic() + self._seconds

    def __bool__(self) -> bool:
        return time.monotonic() >= self._until


def _gtid(event: Event, flavour: Flavour) -> Gtid:
    try:
        return (events.mysql_group if flavour is Flavour.MYSQL else events.mariadb_group)(event).gtid
    except BadEvent as error:
        if not error.at:
            raise
        return parse_gtid(flavour, error.at)  # it could be read and is refused for what it says


def _completed(found: Found, arrived: Sequence[Event], stream: BinlogStream) -> Found:
    """Look at the rest of the transaction."""
    quiet = Quiet(_QUIET_SECONDS)
    while True:
        for event in arrived:
            if event.kind in _GTIDS:
                found.whole = True
            if found.full:
                return found
            found.note(event)
            quiet.over()
        if not found.full and quiet:
            found.whole = True  # the log has ended
        if found.full:
            return found
        arrived = stream.read()


def _shown(found: Query) -> str:
    text = " ".join(found.text[:400].decode("utf-8", "replace").split())
    return text[:120] + ("..." if len(text) > 120 or len(found.text) > 400 else "")
