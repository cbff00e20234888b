"""The SQL path: decoded rows as statements, where a target does not take row events as they are.

Rows of one table stay in the log's order, so that unique keys never collide on the way; neighbours of one kind become
one statement. Tables that no foreign key links are written one after the other, whatever their order in the log: within
one target transaction nobody can tell. Only what stands before a row of the position table stays before it. Every
statement has to find exactly the rows that it is for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pymysql
from pymysql.constants import CLIENT

from shardkit import own_tables
from shardkit.errors import BadEvent, Drift, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.topology import Endpoint
from shardkit_cdc.connection import DENIED, PASSING, READ_ONLY, code_of, text_of
from shardkit_cdc.events import ROWS_FLAGS_AT, UPDATE_ROWS, WRITE_ROWS
from shardkit_cdc.row_image import Image, RowDecoder
from shardkit_cdc.schema import SchemaCheck, without_hashes
from shardkit_cdc.sql_table import NotCarried, NotLogged, SqlTable, sql_columns
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Rows

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

#: What the connection is opened with: several statements in one packet, and an UPDATE counts the rows that it finds.
CONNECTION_FLAGS = CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS

#: Bytes after which a statement, and a packet of statements, is closed: past this, larger ones gain nothing. Where the
#: target takes less in a packet, that counts.
STATEMENT_BYTES = 1 << 18
#: Statements in one packet, and keys in one DELETE.
MOST_STATEMENTS = 200
_FRAME_BYTES = 1 << 16

_INSERT, _UPDATE, _DELETE = "insert", "update", "delete"
#: Flags of a row event: the source did not check foreign keys, or (MariaDB) CHECK constraints.
_NO_FOREIGN_KEYS, _NO_CHECKS = 0x02, 0x80

#: Exact or refused: zero and partial dates are taken, anything that would be cut or rounded is not.
_SQL_MODE = "STRICT_ALL_TABLES,ALLOW_INVALID_DATES,NO_AUTO_VALUE_ON_ZERO,NO_ENGINE_SUBSTITUTION"

_TRIGGER_HINT = (
    "statements would fire them, and the log holds what they did already: drop them on the target, or let row events "
    "pass as they are (`--apply raw`, which needs one server family, equal columns and the privileges of "
    "docs/how-to/relay.md)"
)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """A table that has been looked at.

    :param linked: by a foreign key to another table or to itself: order counts.
    """

    qualified: str
    decoder: RowDecoder
    sql: SqlTable
    linked: bool


@dataclass(slots=True)
class _Step:
    """Neighbouring rows of one table and one kind."""

    table: _Known
    kind: str
    images: list[Image] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Statement:
    """One statement of a step, and how many rows it has to find."""

    text: bytes
    expected: int
    step: _Step


class SqlWriter:
    """Writes rows as statements in the transaction that is open. Not thread-safe.

    :param connection: opened with `CONNECTION_FLAGS`.
    :param source: the family that wrote the log.
    :param flavour: the target's.
    :param largest: bytes of a packet to the target (its max_allowed_packet).
    """

    def __init__(
        self,
        connection: Connection,
        endpoint: Endpoint,
        check: SchemaCheck,
        *,
        source: Flavour,
        flavour: Flavour,
        largest: int,
    ) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._check = check
        self._sighted = False
        self._source = source
        self._flavour = flavour
        self._largest = max(0, largest - _FRAME_BYTES)
        self._usual = min(STATEMENT_BYTES, self._largest)
        self._known: dict[TableMap, _Known] = {}
        self._flags: int | None = None  # what the session is set to; None: not known

    def forget(self) -> None:
        """A schema change has run: tables may be others, and the session's settings are gone."""
        self._known.clear()
        self._flags = None

    def interrupted(self) -> None:
        """Row events were applied on this connection: what they left the session at is not known."""
        self._flags = None

    def write(self, rows: Sequence[Rows], *, at: str) -> int:
        """Write rows; the bytes that were sent.

        :param at: the transactions that they are of.
        :raises Drift: the target's tables or rows are not what the log says.
        :raises BadEvent: a value cannot be carried exactly, or a row cannot be read or sent.
        :raises pymysql.MySQLError: the connection was lost, or a right is missing.
        """
        sent = 0
        queues: dict[str, list[_Step]] = {}
        for table, event in rows:
            flags = event.data[ROWS_FLAGS_AT] & (_NO_FOREIGN_KEYS | _NO_CHECKS)
            if flags != self._flags:
                sent += self._flush(queues, at)
                self._set(flags)
            known = self._known.get(table) or self._look(table, at)
            kind = _INSERT if event.kind in WRITE_ROWS else _UPDATE if event.kind in UPDATE_ROWS else _DELETE
            if table.table == own_tables.position.name:
                sent += self._flush(queues, at)  # it tells what stands before it in this server's own log
            queue = queues.setdefault("" if known.linked else known.qualified, [])
            if not queue or queue[-1].table is not known or queue[-1].kind != kind:
                queue.append(_Step(known, kind))
            try:
                queue[-1].images += known.decoder.images(event)
            except BadEvent as error:
                raise BadEvent(error.text, at=at, hint=error.hint) from None
        return sent + self._flush(queues, at)

    # --- the session

    def _set(self, flags: int) -> None:
        """Check what the source has checked, and be exact."""
        if self._flags is None:
            self._connection.query(f"SET SESSION sql_mode = '{_SQL_MODE}', time_zone = '+00:00', sql_safe_updates = 0")
        self._connection.query(f"SET SESSION foreign_key_checks = {0 if flags & _NO_FOREIGN_KEYS else 1}")
        if self._flavour is Flavour.MARIADB:
            self._connection.query(f"SET SESSION check_constraint_checks = {0 if flags & _NO_CHECKS else 1}")
        self._flags = flags

    # --- tables

    def _look(self, table: TableMap, at: str) -> _Known:
        if not self._sighted:
            require_sight(self._connection, self._endpoint)
            self._sighted = True
        self._check.check(table, at=at)
        decoder = RowDecoder(table)
        targets = self._check.target_columns(table)
        logged_columns = without_hashes(decoder.columns)
        self._refuse_kind(table, at, period=len(logged_columns) != len(targets))
        self._refuse_triggers(table, at)
        columns = sql_columns(logged_columns, targets, source=self._source, flavour=self._flavour)
        name = "`{}`.`{}`".format(table.database.replace("`", "``"), table.table.replace("`", "``"))
        known = _Known(table.qualified, decoder, SqlTable(name, columns, self._key(table)), self._is_linked(table))
        if len(self._known) >= 10_000:
            self._known.clear()
        self._known[table] = known
        return known

    def _rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, values)
            return list(cursor.fetchall())

    def _refuse_kind(self, table: TableMap, at: str, *, period: bool) -> None:
        kinds = self._rows(
            "SELECT table_type FROM information_schema.tables WHERE table_schema = %s AND table_name = %s",
            table.database,
            table.table,
        )
        if period or ("SYSTEM VERSIONED",) in kinds:
            raise Drift(
                f"{table.qualified} keeps its history (SYSTEM VERSIONING), which statements would write anew",
                at=at,
                hint="let row events pass as they are: `--apply raw`",
            )

    def _refuse_triggers(self, table: TableMap, at: str) -> None:
        found = self._rows(
            "SELECT trigger_name FROM information_schema.triggers "
            "WHERE event_object_schema = %s AND event_object_table = %s ORDER BY 1",
            table.database,
            table.table,
        )
        if found:
            names = ", ".join(str(name) for (name,) in found)
            raise Drift(f"{table.qualified} has triggers on the target ({names})", at=at, hint=_TRIGGER_HINT)

    def _key(self, table: TableMap) -> list[str]:
        """The primary key's columns, or those of a unique key that cannot hold NULL; empty where there is none."""
        indexes: dict[str, list[tuple[Any, ...]]] = {}
        for index, *column in self._rows(
            "SELECT index_name, column_name, sub_part, nullable FROM information_schema.statistics "
            "WHERE table_schema = %s AND table_name = %s AND non_unique = 0 "
            "ORDER BY index_name <> 'PRIMARY', index_name, seq_in_index",
            table.database,
            table.table,
        ):
            indexes.setdefault(index, []).append(tuple(column))
        for columns in indexes.values():
            if all(name is not None and part is None and nullable != "YES" for name, part, nullable in columns):
                return [name for name, _, _ in columns]
        return []

    def _is_linked(self, table: TableMap) -> bool:
        return bool(
            self._rows(
                "SELECT 1 FROM information_schema.key_column_usage WHERE referenced_table_name IS NOT NULL AND "
                "((table_schema = %s AND table_name = %s) OR "
                "(referenced_table_schema = %s AND referenced_table_name = %s)) LIMIT 1",
                *(table.database, table.table) * 2,
            )
        )

    # --- statements

    def _flush(self, queues: dict[str, list[_Step]], at: str) -> int:
        sent = 0
        pack: list[_Statement] = []
        size = 0
        for queue in queues.values():
            for step in queue:
                for statement in self._statements(step, at):
                    if pack and (size + len(statement.text) > self._usual or len(pack) >= MOST_STATEMENTS):
                        sent += self._send(pack, at)
                        pack, size = [], 0
                    pack.append(statement)
                    size += len(statement.text) + 1
        queues.clear()
        return sent + (self._send(pack, at) if pack else 0)

    def _statements(self, step: _Step, at: str) -> Iterator[_Statement]:
        try:
            for text, expected in _written(step, self._usual):
                if len(text) > self._largest:
                    raise BadEvent(
                        f"a row of {step.table.qualified} takes a statement of {len(text)} bytes, more than the "
                        "target takes",
                        at=at,
                        hint=f"set max_allowed_packet on the target to at least {len(text) + 2 * _FRAME_BYTES}, then "
                        "start the hop again",
                    )
                yield _Statement(text, expected, step)
        except NotLogged as error:
            raise BadEvent(
                f"a row of {step.table.qualified} cannot be written: {error}",
                at=at,
                hint="the source did not log the row in full: set binlog_row_image=FULL there, in every session, "
                "then write the row by hand and `shardkit relay skip --at GTID`; or it computes the column and the "
                "target does not: make the target's table like the source's",
            ) from None
        except NotCarried as error:
            raise BadEvent(
                f"a value of {step.table.qualified} cannot be carried exactly: {error}",
                at=at,
                hint="change it on the source and then `shardkit relay skip --at GTID` after writing the row by hand, "
                "or use one server family and `--apply raw`",
            ) from None

    def _send(self, pack: Sequence[_Statement], at: str) -> int:
        """Send statements in one packet; each has to change as many rows as it is for."""
        packet = b";".join(statement.text for statement in pack)
        wrong: tuple[_Statement, int] | None = None
        done = 0
        try:
            for number, statement in enumerate(pack):
                changed = self._connection.query(packet) if number == 0 else self._connection.next_result()
                done += 1
                if changed != statement.expected and wrong is None:
                    wrong = statement, changed
        except pymysql.MySQLError as error:
            self._flags = None
            if wrong is None:
                raise self._refused(error, pack[done], at) from error
        if wrong is not None:
            raise _missing(*wrong, at=at)
        return len(packet)

    def _refused(self, error: pymysql.MySQLError, statement: _Statement, at: str) -> Exception:
        code = code_of(error)
        if code in PASSING or code in DENIED or code in READ_ONLY:
            return error
        return Drift(
            f"the target refused rows of {statement.step.table.qualified}: {text_of(error)} ({code})",
            at=at,
            hint="somebody wrote to the target, it was not filled from this source, or it cannot hold the value "
            "exactly: compare it (shardkit relay verify), then repair, reseed, or `shardkit relay skip --at GTID`",
        )


def _written(step: _Step, most: int) -> Iterator[tuple[bytes, int]]:
    """A step's statements, and how many rows each has to find.

    :param most: bytes of a statement for several rows.
    """
    table, images = step.table.sql, step.images
    if step.kind == _UPDATE:
        for before, after in zip(images[::2], images[1::2], strict=True):
            yield table.update(before, after), 1
        return
    insert = step.kind == _INSERT
    one_by_one = not insert and (not table.key or step.table.linked)  # a child may refer to its own table
    head, between = (table.insert_head, b",") if insert else (table.delete_head, b" OR ")
    parts: list[bytes] = []
    size = 0
    for image in images:
        part = table.row(image) if insert else table.where(image) if one_by_one else b"(" + table.where(image) + b")"
        full = len(head) + size + len(part) > most or (not insert and len(parts) >= MOST_STATEMENTS) or one_by_one
        if parts and full:
            yield head + between.join(parts), len(parts)
            parts, size = [], 0
        parts.append(part)
        size += len(part) + len(between)
    if parts:
        yield head + between.join(parts), len(parts)


def _missing(statement: _Statement, changed: int, *, at: str) -> Drift:
    step = statement.step
    condition = statement.text.partition(b" WHERE ")[2][:200].decode("utf-8", "replace")
    return Drift(
        f"the target's data is not what the log says: {step.kind} of {step.table.qualified} found {changed} of "
        f"{statement.expected} rows{f' where {condition}' if condition else ''}",
        at=at,
        hint="somebody wrote to the target, or it was not filled from this source: compare it "
        "(shardkit relay verify), then repair or reseed it",
    )


def require_sight(connection: Connection, endpoint: Endpoint) -> None:
    """See that statements do no more than they say.

    :raises PreconditionFailed: when the account could not see a trigger, or the server would log statements.
    """
    with connection.cursor() as cursor:
        cursor.execute("SHOW GRANTS")
        if not any(grants_trigger(str(line), endpoint.database) for (line,) in cursor.fetchall()):
            raise PreconditionFailed(
                f"the relay's user cannot see whether tables of {endpoint} have triggers, which statements would fire",
                hint=f"grant it, to the user itself: GRANT TRIGGER ON `{endpoint.database}`.* TO ...",
            )
        cursor.execute("SELECT @@session.binlog_format")
        if cursor.fetchone() != ("ROW",):
            raise PreconditionFailed(
                f"{endpoint.address} would log the relay's statements instead of rows",
                hint=f"set binlog_format=ROW on {endpoint.address}",
            )


def prepare_statements(connection: Connection, flavour: Flavour, endpoint: Endpoint) -> int:
    """Make a connection ready for the SQL path; the server's ``max_allowed_packet`` in bytes. Harmless to the data.

    :raises PreconditionFailed: as `require_sight`.
    """
    connection.rollback()
    require_sight(connection, endpoint)
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        if flavour is Flavour.MARIADB:
            cursor.execute("SET SESSION max_statement_time = 0")  # a limit is for clients: rows have to come in
            # A statement's text beside its row events doubles the log; to leave it out needs BINLOG ADMIN.
            with contextlib.suppress(pymysql.OperationalError):
                cursor.execute("SET SESSION binlog_annotate_row_events = 0")
        cursor.execute("SELECT @@max_allowed_packet")
        found = cursor.fetchone()
    connection.rollback()
    return int(found[0]) if found else 0


_GRANT = re.compile(r"GRANT (?P<rights>.+) ON (?P<place>\*|[`\"].+[`\"])\.\* TO ", re.IGNORECASE)


def grants_trigger(line: str, database: str) -> bool:
    """Whether a line of SHOW GRANTS gives the TRIGGER right on a database."""
    found = _GRANT.match(line)
    if found is None or not {"TRIGGER", "ALL PRIVILEGES"} & {right.strip() for right in found["rights"].split(",")}:
        return False
    # In a grant an underscore stands for any character and a percent sign for any text, unless escaped.
    place = re.split(r"(\\.|[%_])", found["place"].strip('`"').replace("``", "`"))
    pattern = "".join({"%": ".*", "_": "."}.get(part) or re.escape(part.removeprefix("\\")) for part in place)
    return found["place"] == "*" or re.fullmatch(pattern, database) is not None
