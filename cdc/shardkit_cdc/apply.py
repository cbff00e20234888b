"""Transactions of the source as transactions of the target, with the position.

A target transaction is: the position's compare-and-set, the row events of as many source transactions as were waiting
(in BINLOG statements, or where that is impossible as statements of the SQL path), the master's history, COMMIT. Its end
is always the end of a source transaction.
"""

from __future__ import annotations

import binascii
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.errors import BadEvent, Drift, RelayError
from shardkit.gtid import Flavour, Gtid, Position
from shardkit.topology import Endpoint
from shardkit_cdc.apply_path import ApplyPath, Chosen
from shardkit_cdc.apply_sql import SqlWriter, prepare_statements
from shardkit_cdc.connection import DENIED, PASSING, READ_ONLY, answer, ask, code_of, server_errors, text_of
from shardkit_cdc.events import Format
from shardkit_cdc.payload import binlog_statement, largest_payload, payloads, unpacked
from shardkit_cdc.position import Claim
from shardkit_cdc.schema import SchemaCheck
from shardkit_cdc.schema_change import SchemaChanger
from shardkit_cdc.selection import Selected
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Outcome, Rows

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

_PREPARED = own_tables.prepared.name

#: The target's rows are not what the log says: not found, duplicate, foreign key, no such table, column mismatch ...
_DRIFT = frozenset({1032, 1062, 1146, 1216, 1217, 1451, 1452, 1535, 1677, 1048, 1364, 1366, 1406, 1264, 1054, 13146})


@dataclass(slots=True)
class Counts:
    """What has been applied since it was last drained."""

    transactions: int = 0
    row_events: int = 0
    bytes: int = 0
    commits: int = 0
    commit_seconds: float = 0.0
    largest_batch: int = 0

    def drained(self) -> Counts:
        """A copy; counting begins again."""
        copy = replace(self)
        for each in fields(self):
            setattr(self, each.name, each.default)
        return copy


@dataclass(slots=True)
class _Parts:
    """The big transaction at hand: its target transaction is open."""

    gtid: Gtid
    after: Position
    stored: int = 0


class Applier:
    """Applies selected transactions to one target through one connection. Not thread-safe.

    :param connection: of the claim, opened with `apply_sql.CONNECTION_FLAGS`; nothing else may use it.
    :param source: the family that wrote the log.
    :param flavour: the target's.
    :param claim: the hop's position.
    :param form: the format of the source's log.
    :param chosen: the path of all rows; of row events, single tables and events may have to take the other one.
    :param detours: whether they may.
    :param charsets: of a source of the other family: its collations' character sets by id.
    """

    def __init__(
        self,
        connection: Connection,
        endpoint: Endpoint,
        claim: Claim,
        form: Format,
        *,
        source: Flavour,
        flavour: Flavour,
        chosen: Chosen,
        detours: bool,
        charsets: Mapping[int, str] | None,
        hop: str,
    ) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._claim = claim
        self._hop = hop
        self._chosen = chosen
        self._may_detour = detours
        self._all_sql = chosen.path is ApplyPath.SQL
        self._check = SchemaCheck(connection, by_name=self._all_sql or detours, charsets=charsets)
        self._changer = SchemaChanger(connection, claim, source=source, flavour=flavour, charsets=charsets, hop=hop)
        self._maps: dict[bytes, TableMap] = {}  # of stored XA branches
        #: Tables whose rows take the SQL path although the hop's do not, and why.
        self.detours: dict[str, str] = {}
        self._parts: _Parts | None = None
        self._passed: Position | None = None
        self.counts = Counts()
        with server_errors(endpoint, hop, doing="preparing the connection"):
            if self._all_sql:
                packet = prepare_statements(connection, flavour, endpoint)
            else:
                packet = prepare_session(connection, flavour, form)
        self._largest = largest_payload(packet)
        self._sql = SqlWriter(connection, endpoint, self._check, source=source, flavour=flavour, largest=packet)

    @property
    def position(self) -> Position:
        """How far the target is."""
        return self._claim.position

    @property
    def path(self) -> Chosen:
        """How rows are applied: the path chosen, with the tables that had to leave it."""
        if not self.detours:
            return self._chosen
        return Chosen(self._chosen.path, "; ".join(f"{table}: {why}" for table, why in sorted(self.detours.items())))

    @property
    def busy(self) -> bool:
        """Whether a transaction that comes in parts is in the middle."""
        return self._parts is not None

    @property
    def passing(self) -> bool:
        """Whether the position has yet to be told of transactions that held nothing for this hop."""
        return self._passed is not None

    def pass_over(self, gtids: Iterable[Gtid]) -> None:
        """Note transactions that hold nothing for this hop: the position moves past them with the next that does.

        Were each written down by itself, two hops on crossed servers would feed each other for ever.
        """
        self._passed = (self._passed or self._claim.position).advanced(gtids)

    def settle(self) -> None:
        """Move the position past what was passed over, in a transaction of its own.

        :raises Fenced, Interrupted: as `apply`.
        """
        if self._passed is not None and self._parts is None:
            with server_errors(self._endpoint, self._hop, doing="moving the position"):
                self._claim.begin(self._passed)
                self._commit(self._passed, 0)

    def _after(self, gtids: Iterable[Gtid]) -> Position:
        return (self._passed or self._claim.position).advanced(gtids)

    def apply(self, batch: Sequence[Selected]) -> None:
        """Apply consecutive transactions, each once, in order.

        :raises Fenced: another runner has taken over; nothing of the open transaction stays.
        :raises Drift: the target's data or tables are not the source's.
        :raises BadEvent: a transaction cannot be replayed.
        :raises Interrupted: the connection was lost or the server asks to try again; whether the last commit happened
            is for the position row to say.
        """
        run: list[Selected] = []
        with server_errors(self._endpoint, self._hop, doing="applying"):
            for selected in batch:
                if self._is_plain(selected):
                    run.append(selected)
                    continue
                self._apply_run(run)
                run = []
                self._apply_special(selected)
            self._apply_run(run)

    def _is_plain(self, selected: Selected) -> bool:
        transaction = selected.transaction
        return (
            transaction.first
            and transaction.last
            and selected.change is None
            and (transaction.outcome is Outcome.COMMIT or transaction.outcome is Outcome.ROLLBACK)
        )

    # --- small transactions, many at once

    def _apply_run(self, run: Sequence[Selected]) -> None:
        if not run:
            return
        try:
            self._apply_together(run)
        except (Drift, BadEvent):
            if len(run) == 1:
                raise
            # One of them does not fit: go as far as the data is good, and name the one at fault.
            for selected in run:
                self._apply_together([selected])

    def _apply_together(self, run: Sequence[Selected]) -> None:
        after = self._after(each.transaction.gtid for each in run)
        where = str(run[0].transaction.gtid)
        if len(run) > 1:
            where = f"{where} to {run[-1].transaction.gtid}"
        rows = [row for each in run if each.transaction.outcome is Outcome.COMMIT for row in each.transaction.rows]
        self._claim.begin(after)
        try:
            self._write(rows, where)
        except RelayError:
            self._connection.rollback()
            raise
        self._commit(after, len(run))

    def _write(self, rows: Sequence[Rows], where: str) -> None:
        tables = {row.table for row in rows}
        fits = {table: self._check.check(table, at=where) for table in tables}
        try:
            if self._all_sql:
                self.counts.bytes += self._sql.write(rows, at=where)
            elif not self._may_detour or (all(fits.values()) and self._all_fit(rows, tables)):
                self._write_raw(rows, where)
            else:
                for raw, run in itertools.groupby(rows, lambda row: fits[row.table] and not self._is_large(row)):
                    if raw:
                        self._write_raw(run, where)
                    else:
                        self._detour(list(run), fits, where)
        except (BadEvent, Drift) as error:
            raise error.of_hop(self._hop, at=where) from error.__cause__
        self.counts.row_events += len(rows)

    def _write_raw(self, rows: Iterable[Rows], where: str) -> None:
        """Send row events; the next statement is made while the server is at work on this one."""
        working = False
        try:
            for payload in payloads(rows, largest=self._largest):
                statement = binlog_statement(payload)
                if working:
                    working = False
                    self._answer(where)
                ask(self._connection, statement)
                working = True
                self.counts.bytes += len(payload)
        finally:
            if working:
                self._answer(where)

    def _all_fit(self, rows: Sequence[Rows], tables: Iterable[TableMap]) -> bool:
        """Whether no row is near the limit; without a look at each one's table, since this is asked of every row."""
        longest_map = max((len(table.data) for table in tables), default=0)
        return longest_map + max((len(row.event.data) for row in rows), default=0) <= self._largest

    def _is_large(self, row: Rows) -> bool:
        return len(row.event.data) + len(row.table.data) > self._largest

    def _detour(self, rows: Sequence[Rows], fits: Mapping[TableMap, bool], where: str) -> None:
        self._sql.interrupted()
        self.counts.bytes += self._sql.write(rows, at=where)
        for table in {row.table for row in rows}:
            self.detours.setdefault(
                table.table,
                "a row event too large for the target's max_allowed_packet"
                if fits[table]
                else "its columns stand in another order on the target",
            )

    def _answer(self, where: str) -> None:
        try:
            answer(self._connection)
        except pymysql.MySQLError as error:
            raise self._refused(error, where) from error

    def _refused(self, error: pymysql.MySQLError, where: str) -> Exception:
        code, text = code_of(error), text_of(error)
        if code in _DRIFT:
            return Drift(
                f"the target's data is not what the log says: {text} ({code})",
                hop=self._hop,
                at=where,
                hint="somebody wrote to the target, or it was not filled from this source: compare it "
                "(shardkit relay verify), then repair or reseed it",
            )
        if code in PASSING or code in DENIED or code in READ_ONLY:
            return error
        return BadEvent(
            f"the target refused row events: {text} ({code})",
            hop=self._hop,
            at=where,
            hint="`shardkit relay skip --at GTID` or `shardkit relay seed`, once it is clear why",
        )

    def _commit(self, after: Position, transactions: int) -> None:
        began = time.perf_counter()
        self._claim.finish(after)
        self._passed = None
        counts = self.counts
        counts.commit_seconds += time.perf_counter() - began
        counts.commits += 1
        counts.transactions += transactions
        counts.largest_batch = max(counts.largest_batch, transactions)

    # --- schema changes, big transactions, XA branches

    def _apply_special(self, selected: Selected) -> None:
        transaction = selected.transaction
        where = str(transaction.gtid)
        if selected.change is not None:
            self._changer.run(selected.change, transaction.gtid)
            self._check.forget()
            self._sql.forget()
            if transaction.last and not transaction.rows:
                self._apply_together([selected])
                return
        if transaction.outcome in {Outcome.XA_COMMIT, Outcome.XA_ROLLBACK}:
            self._end_branch(selected)
            return
        if transaction.first:
            after = self._after([transaction.gtid])
            self._parts = _Parts(transaction.gtid, after)
            self._claim.begin(after)
        parts = self._parts
        if parts is None or parts.gtid != transaction.gtid:
            raise BadEvent("a part of a transaction without its beginning", hop=self._hop, at=where)
        try:
            if transaction.xid:
                self._store(transaction.xid, transaction.rows, parts, where)
            else:
                self._write(transaction.rows, where)
            if transaction.last:
                self._end_parts(selected, parts)
        except RelayError:
            self._connection.rollback()
            self._parts = None
            raise

    def _end_parts(self, selected: Selected, parts: _Parts) -> None:
        transaction = selected.transaction
        self._parts = None
        if transaction.outcome is Outcome.ROLLBACK:
            self._connection.rollback()
            self._claim.begin(parts.after)
        elif transaction.xid and transaction.outcome is Outcome.COMMIT:  # XA COMMIT ... ONE PHASE
            self._apply_stored(transaction.xid, str(transaction.gtid))
        self._commit(parts.after, 1)

    def _store(self, xid: str, rows: Sequence[Rows], parts: _Parts, where: str) -> None:
        """Keep a branch's row events, as they came, until its XA COMMIT or XA ROLLBACK."""
        for table in {row.table for row in rows}:
            self._check.check(table, at=where)
        with self._connection.cursor() as cursor:
            for payload in payloads(rows, largest=self._largest):
                # Base64, which `largest` allows for: as a parameter bytes take twice their size.
                cursor.execute(
                    f"INSERT INTO {_PREPARED} (hop, xid, part, gtid, events) VALUES (%s, %s, %s, %s, FROM_BASE64(%s))",
                    (self._claim.key, xid, parts.stored, where, binascii.b2a_base64(payload, newline=False).decode()),
                )
                parts.stored += 1

    def _end_branch(self, selected: Selected) -> None:
        transaction = selected.transaction
        after = self._after([transaction.gtid])
        self._claim.begin(after)
        try:
            if transaction.outcome is Outcome.XA_COMMIT:
                self._apply_stored(transaction.xid, str(transaction.gtid))
            else:
                self._drop_stored(transaction.xid)
        except RelayError:
            self._connection.rollback()
            raise
        self._commit(after, 1)

    def _apply_stored(self, xid: str, where: str) -> None:
        part = 0
        while True:
            with self._connection.cursor() as cursor:
                cursor.execute(
                    f"SELECT events FROM {_PREPARED} WHERE hop = %s AND xid = %s AND part = %s",
                    (self._claim.key, xid, part),
                )
                found = cursor.fetchone()
            if found is None:
                break
            self._write(unpacked(found[0], self._maps), where)
            part += 1
        self._drop_stored(xid)

    def _drop_stored(self, xid: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM {_PREPARED} WHERE hop = %s AND xid = %s", (self._claim.key, xid))


def prepare_session(connection: Connection, flavour: Flavour, form: Format) -> int:
    """Make a connection ready for BINLOG; the server's ``max_allowed_packet`` in bytes.

    Harmless to the data: it doubles as the check that the account may use BINLOG.
    """
    connection.rollback()  # MySQL takes the format event only outside a transaction
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        if flavour is Flavour.MARIADB:
            cursor.execute("SET SESSION max_statement_time = 0")  # a limit is for clients: rows have to come in
            # Else each group logs the text of the whole BINLOG statement: the target's log would grow with the square
            # of the batch.
            cursor.execute("SET SESSION binlog_annotate_row_events = 0")
        else:
            cursor.execute("SET SESSION binlog_rows_query_log_events = 0")
        connection.query(binlog_statement(form.data))
        if flavour is Flavour.MYSQL:
            cursor.execute("SET SESSION gtid_next = 'AUTOMATIC'")  # the format event set it to NOT_YET_DETERMINED
        cursor.execute("SELECT @@max_allowed_packet")
        found = cursor.fetchone()
    connection.rollback()
    return int(found[0]) if found else 0
