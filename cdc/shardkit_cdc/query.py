"""The Query event: one statement's text with the session that it ran in. Pure.

Layout: ``Query_event`` in MySQL's libs/mysql/binlog/event/statement_events.h and MariaDB's sql/log_event.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardkit_cdc.events import Cursor, Event

# Status variables (enum Query_event_status_vars). Each is written in ascending order; an unknown one ends the list,
# as it does in the servers themselves.
_FLAGS2 = 0
_SQL_MODE = 1
_AUTO_INCREMENT = 3
_CHARSET = 4
_TIME_ZONE = 5
_CATALOG_NZ = 6
_LC_TIME_NAMES = 7
_CHARSET_DATABASE = 8
_TABLE_MAP_FOR_UPDATE = 9
_MASTER_DATA_WRITTEN = 10
_INVOKER = 11
_UPDATED_DATABASES = 12
_MICROSECONDS = 13
_EXPLICIT_DEFAULTS_FOR_TIMESTAMP = 16
_DDL_XID = 17
_DEFAULT_COLLATION_FOR_UTF8MB4 = 18
_SQL_REQUIRE_PRIMARY_KEY = 19
_DEFAULT_TABLE_ENCRYPTION = 20
_MARIADB_MICROSECONDS = 128
_MARIADB_XID = 129

_NO_FOREIGN_KEY_CHECKS = 1 << 26
_RELAXED_UNIQUE_CHECKS = 1 << 27
#: MariaDB alone (sql/sql_priv.h, OPTIONS_WRITTEN_TO_BIN_LOG).
_NO_CHECK_CONSTRAINT_CHECKS = 1 << 15
_EXPLICIT_DEFAULTS = 1 << 24
_IF_EXISTS = 1 << 28
_TOO_MANY_DATABASES = 254


@dataclass(frozen=True, slots=True)
class SessionState:
    """The session variables that a statement's meaning depends on, as the event carries them; None: not said.

    Numbers stand for modes, character sets and collations, as the servers take them in SET.

    :param options: the event's flags, some of which only MariaDB has.
    """

    sql_mode: int | None = None
    character_set_client: int | None = None
    collation_connection: int | None = None
    collation_server: int | None = None
    time_zone: str | None = None
    lc_time_names: int | None = None
    foreign_key_checks: bool = True
    unique_checks: bool = True
    auto_increment: tuple[int, int] | None = None
    microseconds: int = 0
    explicit_defaults_for_timestamp: bool | None = None
    default_collation_for_utf8mb4: int | None = None
    options: int | None = None

    def mariadb_options(self) -> dict[str, int]:
        """What the flags of MariaDB's events say besides, by the variables' names."""
        if self.options is None:
            return {}
        return {
            "explicit_defaults_for_timestamp": int(bool(self.options & _EXPLICIT_DEFAULTS)),
            "check_constraint_checks": int(not self.options & _NO_CHECK_CONSTRAINT_CHECKS),
            "sql_if_exists": int(bool(self.options & _IF_EXISTS)),
        }


@dataclass(frozen=True, slots=True)
class Query:
    """One statement of the log.

    :param database: the session's default database; empty for none.
    :param text: the statement, in the bytes of its client's character set.
    :param error: the error that it ended with on the source; 0 for none.
    :param timestamp: seconds since the epoch, by the source's clock.
    """

    database: str
    text: bytes
    error: int
    timestamp: int
    session: SessionState

    @classmethod
    def parse(cls, event: Event) -> Query:
        """:raises BadEvent: when the event is truncated."""
        cursor = Cursor(event.data, "Query")
        cursor.take(8)  # thread id, execution time
        database_length = cursor.integer(1)
        error = cursor.integer(2)
        status = Cursor(cursor.take(cursor.integer(2)), "Query", 0)
        database = cursor.take(database_length).decode("utf-8", "replace")
        cursor.take(1)
        return cls(database, cursor.rest(), error, event.timestamp, _session(status))


def keyword(event: Event) -> bytes:
    """The first word of a Query event in upper case, without building the whole: it is asked for in every group."""
    data = event.data
    start = 19 + 13 + int.from_bytes(data[30:32], "little") + data[27] + 1 if len(data) >= 32 else len(data)
    return data[start : start + 16].split(None, 1)[0].upper() if len(data) > start else b""


def _session(status: Cursor) -> SessionState:
    state = SessionState()
    while status.left:
        code = status.integer(1)
        if code == _FLAGS2:
            flags = status.integer(4)
            state = replace(
                state,
                foreign_key_checks=not flags & _NO_FOREIGN_KEY_CHECKS,
                unique_checks=not flags & _RELAXED_UNIQUE_CHECKS,
                options=flags,
            )
        elif code == _SQL_MODE:
            state = replace(state, sql_mode=status.integer(8))
        elif code == _AUTO_INCREMENT:
            state = replace(state, auto_increment=(status.integer(2), status.integer(2)))
        elif code == _CHARSET:
            state = replace(
                state,
                character_set_client=status.integer(2),
                collation_connection=status.integer(2),
                collation_server=status.integer(2),
            )
        elif code == _TIME_ZONE:
            state = replace(state, time_zone=status.take(status.integer(1)).decode("ascii", "replace"))
        elif code == _LC_TIME_NAMES:
            state = replace(state, lc_time_names=status.integer(2))
        elif code in {_MICROSECONDS, _MARIADB_MICROSECONDS}:
            state = replace(state, microseconds=status.integer(3))
        elif code == _EXPLICIT_DEFAULTS_FOR_TIMESTAMP:
            state = replace(state, explicit_defaults_for_timestamp=bool(status.integer(1)))
        elif code == _DEFAULT_COLLATION_FOR_UTF8MB4:
            state = replace(state, default_collation_for_utf8mb4=status.integer(2))
        elif not _skipped(code, status):
            break
    return state


def _skipped(code: int, status: Cursor) -> bool:
    """Pass over a variable that replay does not need; false for an unknown one."""
    widths = {
        _CHARSET_DATABASE: 2,
        _TABLE_MAP_FOR_UPDATE: 8,
        _MASTER_DATA_WRITTEN: 4,
        _DDL_XID: 8,
        _SQL_REQUIRE_PRIMARY_KEY: 1,
        _DEFAULT_TABLE_ENCRYPTION: 1,
        _MARIADB_XID: 8,
    }
    if code in widths:
        status.take(widths[code])
    elif code == _CATALOG_NZ:
        status.take(status.integer(1))
    elif code == _INVOKER:
        status.take(status.integer(1))
        status.take(status.integer(1))
    elif code == _UPDATED_DATABASES:
        count = status.integer(1)
        for _ in range(0 if count >= _TOO_MANY_DATABASES else count):
            while status.integer(1):
                pass
    else:
        return False
    return True
