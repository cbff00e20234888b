"""From events to transactions: where a group begins and ends on both server families. Sans I/O.

The rules (relay.md, "Facts about BINLOG", 9): a group begins with its GTID event and ends at XID, at a COMMIT query,
at XA PREPARE, or, where the GTID event says standalone, with its one statement. On MySQL a statement that does not
follow BEGIN is a group by itself. Nothing before a group's end may move the position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from shardkit.errors import BadEvent
from shardkit.gtid import Flavour, Gtid
from shardkit_cdc import events, query, statement
from shardkit_cdc.events import Event, GroupStart
from shardkit_cdc.query import Query
from shardkit_cdc.statement import Effect
from shardkit_cdc.table_map import TableMap

#: Row event bytes after which a transaction is handed over in parts; smaller ones share a commit on the target.
PART_BYTES = 1 << 22
_MOST_MAPS = 10_000


class Outcome(Enum):
    """How a group ended."""

    COMMIT = auto()
    #: The source logged it and took it back: only the position moves.
    ROLLBACK = auto()
    #: XA PREPARE: the rows wait for XA COMMIT or XA ROLLBACK of the same xid.
    PREPARE = auto()
    XA_COMMIT = auto()
    XA_ROLLBACK = auto()


class Rows(NamedTuple):
    """One row event and the table map that it refers to."""

    table: TableMap
    event: Event


@dataclass(slots=True)
class Transaction:
    """One group of the source's log, or a part of a big one.

    :param gtid: its id; the same for all parts.
    :param timestamp: when it was committed, by the source's clock (seconds since the epoch).
    :param rows: its row events in order.
    :param size: their bytes.
    :param statements: what it holds besides row events: the schema change that it is or begins with, mostly none.
    :param xid: of XA groups the branch's name, as ``x'6162',x'',1``.
    :param first: it is a whole group or the first part of one.
    :param last: it is a whole group or the last part of one; only then `outcome` holds.
    """

    gtid: Gtid
    timestamp: int
    rows: list[Rows] = field(default_factory=list)
    size: int = 0
    statements: list[Query] = field(default_factory=list)
    xid: str = ""
    first: bool = True
    last: bool = False
    outcome: Outcome = Outcome.COMMIT


class Assembler:
    """Takes events one at a time and gives back each transaction when it is complete.

    A transaction whose row events pass ``part_bytes`` comes in parts: memory stays bounded whatever its size.

    :raises BadEvent: from `push`, for an order or a kind of events that cannot be replayed. The object is spent then.
    """

    def __init__(self, flavour: Flavour, *, part_bytes: int = PART_BYTES) -> None:
        self._flavour = flavour
        self._part_bytes = part_bytes
        self._group: GroupStart | None = None
        self._transaction: Transaction | None = None
        self._begun = False
        self._tables: dict[bytes, TableMap] = {}
        self._maps: dict[bytes, TableMap] = {}
        self._rules: dict[int, Callable[[Event], Transaction | None]] = {
            events.TABLE_MAP: self._table_map,
            events.XID: self._xid,
            events.QUERY: self._query,
            events.GTID: self._begin,
            events.GTID_TAGGED: self._begin,
            events.MARIADB_GTID: self._begin,
            events.MARIADB_QUERY_COMPRESSED: lambda event: self._query(events.inflated_query(event)),
            events.XA_PREPARE: self._xa_prepare,
            events.TRANSACTION_PAYLOAD: self._payload,
            events.ANONYMOUS_GTID: self._anonymous,
            events.INCIDENT: self._incident,
        }
        self._rules.update(dict.fromkeys(events.ROWS, self._rows))
        self._rules.update(dict.fromkeys(events.COMPRESSED_ROWS, self._packed_rows))
        self._rules.update(dict.fromkeys(_STATEMENT_FORMAT, self._statement_format))
        self._rules.update(dict.fromkeys(_WITHOUT_EFFECT, self._pass))

    @property
    def at(self) -> str:
        """The group at hand, for messages; empty between groups."""
        return str(self._group.gtid) if self._group else ""

    def push(self, event: Event) -> Transaction | None:
        """Take the next event; a transaction, or a part of one, when this event completes it."""
        rule = self._rules.get(event.kind)
        if rule is None:
            raise BadEvent(
                f"an event of the unknown kind {event.kind}",
                at=self.at or None,
                hint="the source is newer than this relay: upgrade shardkit",
            )
        return rule(event)

    # --- the group's ends

    def _begin(self, event: Event) -> None:
        if self._transaction is not None:
            raise self._bad("a group begins before the one at hand has ended")
        if (event.kind == events.MARIADB_GTID) != (self._flavour is Flavour.MARIADB):
            raise self._bad("a GTID event of the other server family")
        mariadb = self._flavour is Flavour.MARIADB
        group = events.mariadb_group(event) if mariadb else events.mysql_group(event)
        self._group = group
        self._transaction = Transaction(group.gtid, event.timestamp, xid=group.xid)
        # MariaDB's GTID event stands for BEGIN; on MySQL a BEGIN query follows it, or a lone statement.
        self._begun = mariadb and not group.standalone
        self._tables.clear()

    def _end(self, outcome: Outcome) -> Transaction:
        transaction = self._open()
        transaction.last = True
        transaction.outcome = outcome
        self._transaction = self._group = None
        self._begun = False
        return transaction

    def _open(self) -> Transaction:
        if self._transaction is None:
            raise self._bad("an event outside any group: GTIDs have to be on")
        return self._transaction

    def _xid(self, _event: Event) -> Transaction:
        self._in_group("XID")
        return self._end(Outcome.COMMIT)

    def _xa_prepare(self, event: Event) -> Transaction:
        self._in_group("XA_PREPARE")
        one_phase = events.Cursor(event.data, "XA_prepare").integer(1)
        return self._end(Outcome.COMMIT if one_phase else Outcome.PREPARE)

    def _in_group(self, what: str) -> None:
        if self._transaction is None or not self._begun:
            raise self._bad(f"an {what} event outside a transaction")

    # --- rows

    def _table_map(self, event: Event) -> None:
        body = event.data[events.HEADER_BYTES :]
        table = self._maps.get(body)
        if table is None:
            if len(self._maps) >= _MOST_MAPS:
                self._maps.clear()
            table = self._maps[body] = TableMap.parse(event)
        self._tables[table.table_id] = table

    def _packed_rows(self, event: Event) -> Transaction | None:
        return self._rows(events.inflated_rows(event))

    def _rows(self, event: Event) -> Transaction | None:
        transaction = self._transaction
        if transaction is None or not self._begun:
            raise self._bad("a row event outside a transaction")
        data = event.data
        if len(data) < events.ROWS_FLAGS_AT + 2:
            raise self._bad("a row event ends too early")
        table_id = data[19:25]
        table = self._tables.get(table_id)
        if table is None:
            if table_id == events.DUMMY_TABLE_ID:
                return None
            raise self._bad("a row event whose table map did not come before it")
        transaction.rows.append(_new(Rows, (table, event)))
        transaction.size += len(data)
        return self._part() if transaction.size >= self._part_bytes else None

    def _part(self) -> Transaction:
        part = self._open()
        self._transaction = Transaction(part.gtid, part.timestamp, xid=part.xid, first=False)
        return part

    # --- statements

    def _query(self, event: Event) -> Transaction | None:
        transaction = self._transaction
        word = query.keyword(event)
        if transaction is None:
            raise self._bad("a statement outside any group: GTIDs have to be on")
        if word == b"BEGIN" and not self._begun:
            self._begun = True
            return None
        if word == b"COMMIT" and self._begun:
            return self._end(Outcome.COMMIT)
        found = Query.parse(event)
        if word == b"XA":
            return self._xa(found)
        if word == b"ROLLBACK" and self._begun and len(found.text.split()) == 1:
            return self._end(Outcome.ROLLBACK)
        if not self._begun:
            transaction.statements.append(found)
            return self._end(Outcome.COMMIT)
        effect = statement.outline(found.text.decode("utf-8", "surrogateescape")).effect
        if effect is Effect.PARTIAL_ROLLBACK:
            raise self._bad("a transaction was rolled back to a savepoint after its rows were logged")
        if effect not in {Effect.MARK, Effect.SERVER}:
            transaction.statements.append(found)
        return None

    def _xa(self, found: Query) -> Transaction | None:
        words = found.text.decode("latin-1").split(None, 2)
        verb = words[1].upper() if len(words) > 1 else ""
        transaction = self._open()
        if verb in {"START", "BEGIN"}:
            self._begun = True
        if verb in {"START", "BEGIN", "COMMIT", "ROLLBACK"}:
            transaction.xid = words[2].strip().lower() if len(words) > 2 else ""
        if verb in {"COMMIT", "ROLLBACK"}:
            if transaction.rows or not transaction.first:
                raise self._bad(f"XA {verb} behind rows")
            return self._end(Outcome.XA_COMMIT if verb == "COMMIT" else Outcome.XA_ROLLBACK)
        if verb not in {"START", "BEGIN", "END"}:
            raise self._bad(f"XA {verb} cannot be replayed")
        return None

    # --- what cannot be replayed

    def _pass(self, _event: Event) -> None:
        return None

    def _statement_format(self, event: Event) -> None:
        # These prepare a statement that changes rows by itself, or a schema change: the statement decides.
        if event.kind in {events.BEGIN_LOAD_QUERY, events.EXECUTE_LOAD_QUERY}:
            raise self._bad("LOAD DATA in statement format", hint=STATEMENT_FORMAT_HINT)

    def _payload(self, _event: Event) -> None:
        raise self._bad(
            "a compressed transaction (binlog_transaction_compression)",
            hint="set binlog_transaction_compression=OFF on the source; what is in its log already needs a reseed",
        )

    def _anonymous(self, _event: Event) -> None:
        raise self._bad("a transaction without a GTID", hint="set gtid_mode=ON on the source")

    def _incident(self, _event: Event) -> None:
        raise self._bad(
            "the source logged an incident: it lost events", hint="fill the target anew (shardkit relay seed)"
        )

    def _bad(self, message: str, *, hint: str | None = None) -> BadEvent:
        return BadEvent(message, at=self.at or None, hint=hint)


_new = tuple.__new__  # a named tuple without its Python-level constructor: there is one for each row event

STATEMENT_FORMAT_HINT = "set binlog_format=ROW on the source, globally and in every session, then reseed this target"

_STATEMENT_FORMAT = frozenset(
    {events.INTVAR, events.RAND, events.USER_VAR, events.BEGIN_LOAD_QUERY, events.EXECUTE_LOAD_QUERY}
)
_WITHOUT_EFFECT = frozenset(
    {
        events.ROWS_QUERY,
        events.IGNORABLE,
        events.MARIADB_ANNOTATE_ROWS,
        events.MARIADB_START_ENCRYPTION,
        events.FORMAT_DESCRIPTION,
        events.ROTATE,
        events.STOP,
        events.HEARTBEAT,
        events.HEARTBEAT_V2,
        events.PREVIOUS_GTIDS,
        events.MARIADB_GTID_LIST,
        events.MARIADB_BINLOG_CHECKPOINT,
    }
)
