"""Schema changes on the target: run once, although they commit by themselves.

A schema change cannot be in one transaction with the position. So its intent is noted first; it then runs under an
identity of the hop's own in the target's log; and whether it ran before a crash is for that log to say. Comparing
tables could not tell: an index, a default or a TRUNCATE leaves them looking equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.errors import BadEvent, Drift
from shardkit.gtid import Flavour, Gtid, MariaDBPosition
from shardkit_cdc.connection import DENIED, PASSING, READ_ONLY, code_of, text_of
from shardkit_cdc.position import Claim
from shardkit_cdc.query import Query, SessionState
from shardkit_cdc.selection import SchemaChange
from shardkit_cdc.statement import Effect, Name

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

#: Lock wait timeout and deadlock: the statement did not run.
_NOT_GIVEN = frozenset({1205, 1213})
#: Stands before the GTID in the note of a change that the target's log will not know as this hop's.
_UNMARKED = "unmarked:"

#: What passes between server families: what these statements make is compared with the log before the first rows.
_ABROAD = frozenset({"TABLE", "INDEX"})
#: Bits of sql_mode with one meaning in both families (sql/system_variables.h, sql/sql_class.h).
_COMMON_MODES = sum(1 << bit for bit in (0, 1, 2, 3, 5, 6, 7, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 29, 30, 31))
#: Bits that the other family may do without: NO_AUTO_CREATE_USER.
_IDLE_MODES = 1 << 28

#: MySQL logs CREATE TABLE ... SELECT as a CREATE TABLE with this at its end, followed by rows.
_ATOMIC_CREATE = re.compile(rb"\s+START\s+TRANSACTION\s*$", re.IGNORECASE)

#: What removes, or exchanges, the rows of a partition.
_ROWS_OF_PARTITIONS = re.compile(rb"\b(DROP|TRUNCATE|EXCHANGE)\s+PARTITION\b", re.IGNORECASE)

#: ER_BAD_TABLE_ERROR, and MariaDB's ER_UNKNOWN_SEQUENCES and ER_UNKNOWN_VIEW.
_UNKNOWN = frozenset({1051, 4091, 4092})


#: Only set where they differ: not every server has them all, or lets every account set them.
_OPTIONS = ("explicit_defaults_for_timestamp", "check_constraint_checks", "sql_if_exists")
_STEPS = ("auto_increment_increment", "auto_increment_offset")


class SchemaChanger:
    """Runs schema changes on one target, each exactly once.

    :param source: the family that wrote the log.
    :param flavour: the target's.
    :param charsets: of a source of the other family: its collations' character sets by id.
    """

    def __init__(
        self,
        connection: Connection,
        claim: Claim,
        *,
        source: Flavour,
        flavour: Flavour,
        charsets: Mapping[int, str] | None,
        hop: str,
    ) -> None:
        self._connection = connection
        self._source = source
        self._flavour = flavour
        self._charsets = charsets or {}
        self._marks: bool | None = None
        self._entered: list[str] = []  # the session variables of the statement at hand
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
        if self._claim.ddl_gtid == _UNMARKED + at:
            raise BadEvent(
                "a schema change was cut short, and the target's log cannot tell whether it ran: "
                f"{_shown(change.query)}",
                hop=self._hop,
                at=at,
                hint="look at the target, run the statement there if it did not run, then `shardkit relay skip --at "
                f"GTID`; {_mark_hint(self._flavour)} lets the relay tell by itself",
            )
        if self._source is not self._flavour:
            self._refuse_abroad(change, at)
        marked = self._may_mark()
        number = self._claim.intend(at if marked else _UNMARKED + at)
        try:
            with self._connection.cursor() as cursor:
                self._enter(cursor, change.query, number, marked=marked)
                self._execute(change, at)
        except (pymysql.MySQLError, Drift) as error:
            cause = error.__cause__ if isinstance(error, Drift) else error
            if not marked and cause is not None and (code_of(cause) not in PASSING or code_of(cause) in _NOT_GIVEN):
                self._claim.withdraw()  # it was refused: there is nothing to be in doubt about
            raise
        finally:
            self._leave(marked=marked)

    def _may_mark(self) -> bool:
        """Whether the account may give the hop's own identity to what it logs."""
        if self._marks is None:
            self._connection.rollback()
            try:
                if self._flavour is Flavour.MARIADB:
                    self._query(f"SET SESSION gtid_domain_id = {int(self._claim.ddl_origin)}")
                    self._query("SET SESSION gtid_domain_id = DEFAULT")
                else:
                    self._query("SET SESSION gtid_next = 'AUTOMATIC'")
                self._marks = True
            except pymysql.MySQLError as error:
                if code_of(error) not in DENIED:
                    raise
                self._marks = False
        return self._marks

    def _refuse_abroad(self, change: SchemaChange, at: str) -> None:
        """Stop at what means something else, or nothing, to the other server family."""
        outline, session = change.outline, change.query.session
        reason = ""
        if outline.kind not in _ABROAD:
            reason = f"{outline.verb} {outline.kind} does not pass between server families"
        elif (session.sql_mode or 0) & ~(_COMMON_MODES | _IDLE_MODES):
            reason = f"a statement ran under an sql_mode that the target's family does not have ({session.sql_mode})"
        elif session.character_set_client is not None and session.character_set_client not in self._charsets:
            reason = f"a statement is in an unknown character set ({session.character_set_client})"
        elif _ROWS_OF_PARTITIONS.search(change.query.text) and self._is_partitioned_by_text(outline.names):
            reason = "which partition a text is in depends on its collation, and the families' differ"
        if reason:
            raise BadEvent(
                f"{reason}: {_shown(change.query)}",
                hop=self._hop,
                at=at,
                hint="run on the target by hand what does the same there, if anything; then `shardkit relay skip --at "
                "GTID`",
            )

    def _is_partitioned_by_text(self, names: Sequence[Name]) -> bool:
        """Whether one of the target's tables places rows by what its collation makes of a text (KEY and COLUMNS)."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                "SELECT 1 FROM information_schema.partitions p JOIN information_schema.columns c "
                "USING (table_schema, table_name) "
                "WHERE p.table_schema = DATABASE() AND p.table_name IN %s AND c.collation_name IS NOT NULL "
                "AND c.collation_name NOT LIKE %s AND p.partition_method REGEXP 'KEY|COLUMNS' "
                "AND (p.partition_expression IS NULL OR p.partition_expression = '' "
                "OR p.partition_expression LIKE CONCAT('%%', c.column_name, '%%')) LIMIT 1",
                ([name.name for name in names] or [""], r"%\_bin"),
            )
            return cursor.fetchone() is not None

    def _execute(self, change: SchemaChange, at: str) -> None:
        query = change.query
        text = query.text
        if self._source is Flavour.MYSQL:
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

    def _enter(self, cursor: pymysql.cursors.Cursor, query: Query, number: int, *, marked: bool) -> None:
        """Become the session that the statement ran in, and mark what it logs as this hop's change number so-and-so."""
        session = query.session
        names = ["timestamp", "foreign_key_checks", "unique_checks"]
        values: list[object] = [
            query.timestamp + session.microseconds / 1_000_000,
            int(session.foreign_key_checks),
            int(session.unique_checks),
        ]
        if self._source is self._flavour:
            said = _said(session, self._flavour)
        else:
            said = _said_abroad(session, self._source, self._charsets)
        for name, value in _differing(cursor, said):
            names.append(name)
            values.append(value)
        if query.database:  # before the character set changes: the name is sent in it
            self._connection.select_db(query.database)
        cursor.execute("SET " + ", ".join(f"SESSION {name} = %s" for name in names), values)
        self._entered = names
        if not marked:
            return
        if self._flavour is Flavour.MARIADB:
            # One after the other: the number is checked against the domain that is set by then.
            cursor.execute("SET SESSION gtid_domain_id = %s", (int(self._claim.ddl_origin),))
            cursor.execute("SET SESSION gtid_seq_no = %s", (number,))
        else:
            cursor.execute("SET SESSION gtid_next = %s", (f"{self._claim.ddl_origin}:{number}",))

    def _leave(self, *, marked: bool) -> None:
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
        if marked and self._flavour is Flavour.MARIADB:
            self._query("SET SESSION gtid_seq_no = 0")
            self._query("SET SESSION gtid_domain_id = DEFAULT")
        elif marked:
            self._query("SET SESSION gtid_next = 'AUTOMATIC'")
        # To set these takes a privilege, which an account that did not have to set them may lack.
        guarded = ("default_collation_for_utf8mb4", *_OPTIONS)
        defaults += [name for name in guarded if name in self._entered]
        self._entered = []
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
    found += zip(_STEPS, session.auto_increment or (1, 1), strict=True)  # said only where it is another than 1
    if session.explicit_defaults_for_timestamp is not None:
        found.append(("explicit_defaults_for_timestamp", int(session.explicit_defaults_for_timestamp)))
    if flavour is Flavour.MARIADB:
        found += session.mariadb_options().items()
    elif session.default_collation_for_utf8mb4 is not None:
        found.append(("default_collation_for_utf8mb4", session.default_collation_for_utf8mb4))
    return found


def _said_abroad(session: SessionState, source: Flavour, charsets: Mapping[int, str]) -> list[tuple[str, object]]:
    """The same for the other server family: what both have, by name. Numbers of collations and modes differ."""
    found: list[tuple[str, object]] = []
    if session.sql_mode is not None:
        found.append(("sql_mode", session.sql_mode & _COMMON_MODES))
    if session.character_set_client is not None:
        charset = charsets[session.character_set_client]
        found += [("character_set_client", charset), ("character_set_connection", charset)]
    if session.time_zone is not None:
        found.append(("time_zone", session.time_zone))
    found += zip(_STEPS, session.auto_increment or (1, 1), strict=True)  # said only where it is another than 1
    explicit = "explicit_defaults_for_timestamp"
    if source is Flavour.MARIADB:
        found += [(name, value) for name, value in session.mariadb_options().items() if name == explicit]
    elif session.explicit_defaults_for_timestamp is not None:
        found.append((explicit, int(session.explicit_defaults_for_timestamp)))
    return found


def _differing(cursor: pymysql.cursors.Cursor, said: Sequence[tuple[str, object]]) -> list[tuple[str, object]]:
    """What is said, without options that the session has so already."""
    asked = [name for name, _ in said if name in _OPTIONS or name in _STEPS]
    cursor.execute("SELECT " + ", ".join(f"@@session.{name}" for name in asked))
    have = dict(zip(asked, cursor.fetchone() or (), strict=True))
    return [(name, value) for name, value in said if name not in have or have[name] != value]


def _mark_hint(flavour: Flavour) -> str:
    return "GRANT BINLOG REPLAY" if flavour is Flavour.MARIADB else "GRANT REPLICATION_APPLIER"


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
