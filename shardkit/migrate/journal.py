"""What a revision has done so far on one shard, noted statement by statement, so that it can be taken up again.

MySQL and MariaDB commit at every DDL statement: a revision of three statements that fails in the second leaves the
first behind, and running the revision again trips over it. So each writing statement of a revision is noted in the
shard's own table ``shardkit_migration_steps``, in the transaction that it runs in:

- a DDL statement commits what stands before it, so its note ``started`` is durable before it begins; ``done`` is noted
  and committed right after it;
- the note of an INSERT, UPDATE or DELETE is durable exactly when its rows are.

Run again, a revision skips what is noted as done and goes on with the rest. A DDL statement that is noted as started
and no more was cut off (a killed process, a lost server). Each is atomic on both servers, so it is run again, and
"exists already" means that it had been completed. A revision's notes are deleted in the transaction that moves the
shard to it.

On SQLite a revision is one transaction; only why it failed is noted there.

Atomic DDL: https://dev.mysql.com/doc/refman/8.4/en/atomic-ddl.html, https://mariadb.com/kb/en/atomic-ddl/
Statements that commit: https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from shardkit.errors import PreconditionFailed
from shardkit.migrate.connect import error_line
from shardkit.migrate.notes import StepState, Unfinished, unfinished
from shardkit.own_tables import migration_steps as STEPS  # noqa: N812 - a table, used as a constant

#: As much of a statement as a note keeps, in characters: enough to know it by.
STATEMENT_LENGTH = 500

#: Statements that leave no trace, or one in the session only: run every time.
_REPEATED = frozenset(
    {"SELECT", "SHOW", "SET", "EXPLAIN", "DESCRIBE", "DESC", "USE", "DO", "WITH", "BEGIN", "COMMIT", "ROLLBACK"}
    | {"START", "SAVEPOINT", "RELEASE", "LOCK", "UNLOCK", "KILL", "PRAGMA", "VALUES", "TABLE", "HELP", "CHECK"}
    | {"PREPARE", "DEALLOCATE"}
)
#: Statements that belong to a transaction. Every other one commits.
_ROWS = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE", "CALL", "LOAD"})
_ROWS_BEHIND_WITH = re.compile(r"\)\s*(?:UPDATE|DELETE)\b", re.IGNORECASE)
_COMMENTS = re.compile(r"\A(?:\s+|--[^\n]*(?:\n|\Z)|#[^\n]*(?:\n|\Z)|/\*(?![!M]).*?\*/|\()*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+")

#: DDL that can be run twice without an error and does something else the second time: another index or constraint under
#: a generated name, or rows that have come since.
_NOT_TWICE = re.compile(
    r"\bADD\s+(?:CONSTRAINT\s+)?(?:(?:UNIQUE|FULLTEXT|SPATIAL)\s*)?(?:INDEX|KEY|FOREIGN\s+KEY|CHECK|UNIQUE)?\s*\("
    r"|\ATRUNCATE\b",
    re.IGNORECASE,
)

#: What the servers answer to DDL whose work is done: table exists, unknown table, duplicate column, duplicate key name,
#: multiple primary key, cannot drop what does not exist, table does not exist, unknown column, duplicate foreign key,
#: unknown or duplicate constraint, view, trigger, procedure or event.
#: https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html
_DONE_ALREADY = frozenset(
    {1050, 1051, 1060, 1061, 1068, 1091, 1146, 1054, 1826, 3821, 3822, 3940, 1304, 1305, 1359, 1360, 1537, 1539, 4092}
)
#: The connection was lost: nobody knows whether the statement was completed.
_LOST = frozenset({1053, 1927, 2003, 2006, 2013, 2055, 4031})


@dataclass
class _Step:
    ordinal: int
    state: StepState
    statement_digest: str | None
    values_digest: str | None
    statement: str | None
    row_count: int = -1
    last_row_id: int = 0
    rows: bool = False
    matched: bool = field(default=False)


class Journal:
    """Notes the statements of the revisions that run on one connection.

    :param connection: the connection that migrates; its statements are watched from `watch` on.
    :param report: called with (statements done, the statement's text, whether it was skipped) after each.
    """

    def __init__(
        self, connection: sa.Connection, version_table: str, report: Callable[[int, str, bool], None] | None = None
    ) -> None:
        self._connection = connection
        self._version_table = version_table
        self._report = report
        self._transactional = connection.dialect.name == "sqlite"
        self._revision: tuple[str, str] | None = None
        self._steps: list[_Step] = []
        self._durable = 0
        self._prepared = ""
        self._running: _Step | None = None
        self._skipping: _Step | None = None

    @property
    def revision(self) -> str | None:
        """The revision at work."""
        return self._revision[0] if self._revision else None

    @property
    def done(self) -> int:
        """How many statements of the revision at work stand in the database."""
        return sum(step.state is StepState.DONE for step in self._steps)

    def watch(self) -> None:
        """Begin to note, and to skip, statements."""
        event.listen(self._connection, "before_cursor_execute", self._before, retval=True)
        event.listen(self._connection, "after_cursor_execute", self._after)

    def begin(self, revision: str, direction: str) -> None:
        """A revision is about to run. Outside of a transaction of its own.

        :raises PreconditionFailed: when another one stopped in the middle.
        """
        where = STEPS.c.version_table == self._version_table
        rows = self._connection.execute(sa.select(STEPS).where(where).order_by(STEPS.c.ordinal)).all()
        left = {(row.revision, row.direction) for row in rows if row.state != StepState.FAILED}
        if other := left - {(revision, direction)}:
            name, way = other.pop()
            raise PreconditionFailed(
                f"revision {revision} cannot run: {name} stopped in the middle of its {way}grade",
                hint=f"complete {name} first, or repair the shard by hand and run with --restart-revision",
            )
        self._connection.execute(STEPS.delete().where(where, STEPS.c.state == StepState.FAILED))
        self._connection.commit()
        self._revision = (revision, direction)
        self._steps = [
            _Step(
                row.ordinal,
                StepState(row.state),
                row.statement_digest,
                row.values_digest,
                row.statement,
                row.row_count if row.row_count is not None else -1,
                row.last_row_id or 0,
            )
            for row in rows
            if row.state != StepState.FAILED
        ]
        self._running = None
        self._durable = self.done

    def finish(self) -> None:
        """The revision is complete: drop its notes, in the transaction that notes the shard's new revision."""
        self._revision = None
        self._connection.execute(STEPS.delete().where(STEPS.c.version_table == self._version_table))
        self._steps = []

    def fail(self, error: BaseException) -> Unfinished | None:
        """The revision at work has failed, and its transaction is rolled back: note why.

        :returns: what is known, also where the database can no longer be told.
        """
        if self._revision is None:
            return None
        (revision, direction), self._revision = self._revision, None
        running = self._running
        lost = isinstance(error, DBAPIError) and (error.connection_invalidated or _code(error) in _LOST)
        words = error_line(error)
        if self._connection.closed or self._connection.invalidated or lost:
            # the note "started", where there is one, stays: the next run finds out whether the statement was completed
            return Unfinished(
                revision,
                direction,
                done=self._durable,
                statement=running.statement if running else None,
                cut_off=running is not None and not (self._transactional or running.rows),
                error=words,
            )
        self._connection.rollback()
        where = STEPS.c.version_table == self._version_table
        if running is not None:
            self._connection.execute(STEPS.delete().where(where, STEPS.c.ordinal == running.ordinal))
        last = self._connection.scalar(sa.select(sa.func.max(STEPS.c.ordinal)).where(where)) or 0
        self._connection.execute(
            STEPS.insert().values(
                version_table=self._version_table,
                ordinal=last + 1,
                revision=revision,
                direction=direction,
                state=StepState.FAILED,
                statement=running.statement if running else None,
                error=words,
            )
        )
        self._connection.commit()
        return unfinished(self._connection, self._version_table)

    # --- the connection's statements

    def _before(
        self, _connection: sa.Connection, cursor: Any, statement: str, parameters: Any, context: Any, _many: bool
    ) -> tuple[str, Any]:
        self._skipping = None
        if self._revision is None or self._mine(statement):
            return statement, parameters
        kind = statement_kind(statement)
        if kind == "PREPARE":
            self._prepared = statement
        if kind in _REPEATED:
            return statement, parameters
        rows = kind in _ROWS
        text = _digest(statement)
        # what EXECUTE does stands in the PREPARE before it
        values = _digest(repr(parameters) + (self._prepared if kind == "EXECUTE" else ""))
        known = self._known(text, values, rows=rows)
        if known is None:
            self._running = self._start(statement, text, values, rows=rows)
            return statement, parameters
        if known.state is StepState.STARTED:
            if rows or _NOT_TWICE.search(statement):
                raise self._not_resumable(
                    "it was cut off in a statement of which nobody can tell whether it was completed", known
                )
            if not self._completed_before(cursor, statement, parameters):
                self._running = known
                return statement, parameters
            self._complete(cursor, known, commit=True)
        if getattr(getattr(context, "compiled", None), "effective_returning", None):
            raise self._not_resumable("the rows that this statement returned are not kept", known)
        self._skipping = known
        return "DO 0", ()

    def _start(self, statement: str, text: str, values: str, *, rows: bool) -> _Step:
        ordinal = max((step.ordinal for step in self._steps), default=0) + 1
        shown = " ".join(statement.split())[:STATEMENT_LENGTH]
        step = _Step(ordinal, StepState.STARTED, text, values, shown, rows=rows, matched=True)
        if not self._transactional:
            self._steps.append(step)
            self._note(step)
        return step

    def _after(
        self, _connection: sa.Connection, cursor: Any, statement: str, _parameters: Any, _context: Any, _many: bool
    ) -> None:
        if self._skipping is not None:
            skipped, self._skipping = self._skipping, None
            # the revision may look at what its statement did
            cursor.rowcount = skipped.row_count
            cursor.lastrowid = skipped.last_row_id
            self._tell(skipped, skipped=True)
            return
        if self._running is None or self._revision is None or self._mine(statement):
            return
        running = self._running
        if _digest(statement) != running.statement_digest:
            return
        running.row_count, running.last_row_id = int(cursor.rowcount), int(cursor.lastrowid or 0)
        if self._transactional:
            running.state = StepState.DONE
        else:
            self._complete(cursor, running, commit=not running.rows)
        self._running = None
        self._tell(running, skipped=False)

    def _known(self, text: str, values: str, *, rows: bool) -> _Step | None:
        """The note of this statement from an earlier run."""
        same_text = [step for step in self._steps if not step.matched and step.statement_digest == text]
        for step in same_text:
            if step.values_digest == values:
                step.matched = True
                return step
        if rows and same_text:
            raise self._not_resumable("it has run this statement with other values", same_text[0])
        return None

    def _not_resumable(self, why: str, step: _Step) -> PreconditionFailed:
        return PreconditionFailed(
            f"revision {self.revision} cannot be taken up where it stopped, {why}: {step.statement}",
            hint="undo by hand what it did and run with --restart-revision",
        )

    def _completed_before(self, cursor: Any, statement: str, parameters: Any) -> bool:
        """Run a statement that was cut off. Whether the server says that its work is there already."""
        try:
            cursor.execute(statement, parameters)
        except self._connection.dialect.loaded_dbapi.Error as error:
            # anything else comes up again, with its context, when the statement now runs in the ordinary way
            return bool(error.args) and error.args[0] in _DONE_ALREADY
        return True

    def _note(self, step: _Step) -> None:
        revision, direction = self._revision or ("", "")
        with self._raw_cursor() as cursor:
            cursor.execute(
                f"INSERT INTO {STEPS.name} (version_table, ordinal, revision, direction, state, statement_digest,"
                " values_digest, statement) VALUES (%s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    self._version_table,
                    step.ordinal,
                    revision,
                    direction,
                    str(step.state),
                    step.statement_digest,
                    step.values_digest,
                    step.statement,
                ),
            )

    def _complete(self, cursor: Any, step: _Step, *, commit: bool) -> None:
        step.state = StepState.DONE
        step.row_count, step.last_row_id = int(cursor.rowcount), int(cursor.lastrowid or 0)
        with self._raw_cursor() as own:
            own.execute(
                f"UPDATE {STEPS.name} SET state = %s, row_count = %s, last_row_id = %s"
                " WHERE version_table = %s AND ordinal = %s",
                (str(step.state), step.row_count, step.last_row_id, self._version_table, step.ordinal),
            )
            if commit:
                own.execute("COMMIT")
                self._durable = self.done

    def _raw_cursor(self) -> Any:
        # beside SQLAlchemy's events, on the same connection and in the same transaction
        return self._connection.connection.cursor()

    def _mine(self, statement: str) -> bool:
        return STEPS.name in statement or re.search(rf"\b{re.escape(self._version_table)}\b", statement) is not None

    def _tell(self, step: _Step, *, skipped: bool) -> None:
        if self._report is not None:
            self._report(self.done, step.statement or "", skipped)


def statement_kind(statement: str) -> str:
    """A statement's first word; of ``WITH ... UPDATE``, the second."""
    leading = _COMMENTS.match(statement)
    word = _WORD.match(statement, leading.end() if leading else 0)
    kind = word.group().upper() if word else ""
    return "UPDATE" if kind == "WITH" and _ROWS_BEHIND_WITH.search(statement) else kind


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _code(error: DBAPIError) -> int | None:
    args = getattr(error.orig, "args", ())
    return args[0] if args and isinstance(args[0], int) else None
