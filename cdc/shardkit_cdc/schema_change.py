"""Schema changes on the target: run once, although they commit by themselves.

A schema change cannot be in one transaction with the position. So its intent is noted first; it then runs under an
identity of the hop's own in the target's log; and whether it ran before a crash is for that log to say. Comparing
tables could not tell: an index, a default or a TRUNCATE leaves them looking equal.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.errors import BadEvent, Drift
from shardkit.gtid import Flavour, Gtid, MariaDBPosition
from shardkit_cdc.connection import DENIED, PASSING, READ_ONLY, code_of, text_of
from shardkit_cdc.position import Claim
from shardkit_cdc.query import Query, SessionState
from shardkit_cdc.selection import SchemaChange
from shardkit_cdc.statement import Effect

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

#: MySQL logs CREATE TABLE ... SELECT as a CREATE TABLE with this at its end, followed by rows.
_ATOMIC_CREATE = re.compile(rb"\s+START\s+TRANSACTION\s*$", re.IGNORECASE)

#: ER_BAD_TABLE_ERROR, and MariaDB's ER_UNKNOWN_SEQUENCES and ER_UNKNOWN_VIEW.
_UNKNOWN = frozenset({1051, 4091, 4092})


class SchemaChanger:
    """Runs schema changes on one target, each exactly once."""

    def __init__(self, connection: Connection, flavour: Flavour, claim: Claim, *, hop: str) -> None:
        self._connection = connection
        self._flavour = flavour
        self._claim = claim
        self._hop = hop
        # The change that a runner before us had begun, if its place in the target's log says that it ran.
        self._done = claim.ddl_gtid if claim.ddl_gtid and has_run(connection, flavour, claim) else ""

    def run(self, change: SchemaChange, gtid: Gtid) -> None:
        """Run it, unless it has run before. The position is still before it afterwards.

        :raises Drift: the target refused it.
        :raises BadEvent: it must not be replayed.
        """
        at = str(gtid)
        if at == self._done:
            self._done = ""
            return
        if change.outline.effect is Effect.DATABASE and change.outline.verb == "DROP":
            self._refuse_drop(change.query, at)
            return
        number = self._claim.intend(at)
        try:
            with self._connection.cursor() as cursor:
                self._enter(cursor, change.query, number)
                self._execute(change, at)
        finally:
            self._leave()

    def _execute(self, change: SchemaChange, at: str) -> None:
        query = change.query
        text = query.text
        if self._flavour is Flavour.MYSQL:
            text = _ATOMIC_CREATE.sub(b"", text)
        try:
            self._connection.query(text)
        except pymysql.MySQLError as error:
            code = code_of(error)
            if code in PASSING or code in DENIED or code in READ_ONLY:
                raise
            self._connection.rollback()  # MySQL: give back the GTID that nothing was logged under
            if code == query.error:
                return  # it failed on the source in the same way
            if self._flavour is Flavour.MARIADB and change.outline.verb == "DROP" and code in _UNKNOWN:
                # MariaDB drops what is there and complains of the rest. It logs DROP TABLE without that error, so a
                # source where a name was unknown cannot be told from one where it was not; the outcome is the same.
                return
            raise Drift(
                f"the target refused a schema change: {text_of(error)} ({code}): {_shown(query)}",
                hop=self._hop,
                at=at,
                hint="make the target's tables like the source's before this statement, then start the hop again",
            ) from error

    def _refuse_drop(self, query: Query, at: str) -> None:
        """DROP DATABASE would take the position with it. Of an empty target it would take nothing else: left out."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE() "
                "AND table_name NOT LIKE %s",
                (own_tables.PREFIX.replace("_", r"\_") + "%",),
            )
            found = cursor.fetchone()
        if found != (0,):
            raise BadEvent(
                f"the database was dropped on the source: {_shown(query)}",
                hop=self._hop,
                at=at,
                hint="drop the tables one by one, or take the shard out of the map before dropping its database",
            )

    def _enter(self, cursor: pymysql.cursors.Cursor, query: Query, number: int) -> None:
        """Become the session that the statement ran in, and mark what it logs as this hop's change number so-and-so."""
        session = query.session
        names = ["timestamp", "foreign_key_checks", "unique_checks"]
        values: list[object] = [
            query.timestamp + session.microseconds / 1_000_000,
            int(session.foreign_key_checks),
            int(session.unique_checks),
        ]
        for name, value in _said(session, self._flavour):
            names.append(name)
            values.append(value)
        if query.database:  # before the character set changes: the name is sent in it
            self._connection.select_db(query.database)
        cursor.execute("SET " + ", ".join(f"SESSION {name} = %s" for name in names), values)
        if self._flavour is Flavour.MARIADB:
            # One after the other: the number is checked against the domain that is set by then.
            cursor.execute("SET SESSION gtid_domain_id = %s", (int(self._claim.ddl_origin),))
            cursor.execute("SET SESSION gtid_seq_no = %s", (number,))
        else:
            cursor.execute("SET SESSION gtid_next = %s", (f"{self._claim.ddl_origin}:{number}",))

    def _leave(self) -> None:
        """Be the applying session again. A connection that is gone needs nothing."""
        defaults = [
            "sql_mode",
            "time_zone",
            "lc_time_names",
            "timestamp",
            "foreign_key_checks",
            "unique_checks",
            "auto_increment_increment",
            "auto_increment_offset",
            "collation_server",
        ]
        if not self._connection.open:
            return
        if self._flavour is Flavour.MARIADB:
            self._query("SET SESSION gtid_seq_no = 0")
            self._query("SET SESSION gtid_domain_id = DEFAULT")
        else:
            self._query("SET SESSION gtid_next = 'AUTOMATIC'")
            defaults += ["default_collation_for_utf8mb4", "explicit_defaults_for_timestamp"]
        self._query("SET " + ", ".join(f"SESSION {name} = DEFAULT" for name in defaults))
        self._query("SET NAMES utf8mb4")

    def _query(self, sql: str) -> None:
        self._connection.query(sql)


def _said(session: SessionState, flavour: Flavour) -> list[tuple[str, object]]:
    """The session variables that the event names, as SET takes them: numbers stand for modes and collations."""
    found: list[tuple[str, object]] = [
        (name, value)
        for name, value in (
            ("sql_mode", session.sql_mode),
            ("character_set_client", session.character_set_client),
            ("collation_connection", session.collation_connection),
            ("collation_server", session.collation_server),
            ("time_zone", session.time_zone),
            ("lc_time_names", session.lc_time_names),
        )
        if value is not None
    ]
    if session.auto_increment is not None:
        found += zip(("auto_increment_increment", "auto_increment_offset"), session.auto_increment, strict=True)
    if session.explicit_defaults_for_timestamp is not None:
        found.append(("explicit_defaults_for_timestamp", int(session.explicit_defaults_for_timestamp)))
    if flavour is Flavour.MYSQL and session.default_collation_for_utf8mb4 is not None:
        found.append(("default_collation_for_utf8mb4", session.default_collation_for_utf8mb4))
    return found


def has_run(connection: Connection, flavour: Flavour, claim: Claim) -> bool:
    """Whether the schema change that the position row announces stands in the target's own log.

    The old runner's connection is gone when this is asked, so the answer is final.
    """
    with connection.cursor() as cursor:
        if flavour is Flavour.MARIADB:
            cursor.execute("SELECT @@global.gtid_binlog_pos")
            found = cursor.fetchone()
            last = MariaDBPosition.parse(found[0] if found else "").domains.get(int(claim.ddl_origin))
            return last is not None and last.sequence >= claim.ddl_number
        cursor.execute("SELECT GTID_SUBSET(%s, @@global.gtid_executed)", (f"{claim.ddl_origin}:{claim.ddl_number}",))
        answer = cursor.fetchone()
    return answer is not None and answer[0] == 1


def _shown(query: Query) -> str:
    return " ".join(query.text[:200].decode("utf-8", "replace").split())
