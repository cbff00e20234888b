"""One connection to one database server, with what a promotion asks of any of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeAlias

import pymysql
from pymysql.constants import ER

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed, ShardkitError, Unreachable
from shardkit.gtid import Flavour, Position
from shardkit.topology import Endpoint
from shardkit_cdc.connection import DENIED, code_of, connect, text_of
from shardkit_cdc.preflight import end_of_log

Row: TypeAlias = tuple[Any, ...]

#: Seconds that a server gets to answer.
ANSWER_SECONDS = 10.0
_LOST = frozenset({0, 2006, 2013, 2014, 2055, 1053, 1077, 1079, 1317, 1927, 3169, 4031})
#: A lock that was not given in time: the caller tries again.
LOCK_WAIT = ER.LOCK_WAIT_TIMEOUT
#: Seconds that a copy gets to follow a new master: writes wait for it.
FOLLOW_SECONDS = 3.0
_PAUSE = 0.01  # seconds between two looks
_SERVERS_OWN = ("system user", "event_scheduler", "binlog dump", "binlog dump gtid", "daemon")


class Server:
    """A connection in autocommit mode, known to every server as one of shardkit's own.

    :raises Unreachable: when the server does not answer.
    :raises PreconditionFailed: when it does not let us in.
    """

    def __init__(self, endpoint: Endpoint, credentials: CredentialSource, *, seconds: float = ANSWER_SECONDS) -> None:
        self.endpoint = endpoint
        self.connection = connect(endpoint, credentials, autocommit=True, read_timeout=seconds)
        version, self.id = self.row("SELECT VERSION(), CONNECTION_ID()")
        self.flavour = Flavour.of_version(str(version))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        try:
            self.connection.close()
        except (pymysql.MySQLError, OSError):
            return

    # --- statements

    def rows(self, sql: str, *values: object) -> list[Row]:
        """Run a statement. Without values a ``%`` in it stands for itself.

        :raises Unreachable: the connection is lost.
        :raises PreconditionFailed: this account may not.
        """
        return self._run(sql, values)[1]

    def named_rows(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """`rows`, by column."""
        names, rows = self._run(sql, values)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _run(self, sql: str, values: tuple[object, ...]) -> tuple[list[str], list[Row]]:
        try:
            with closing(self.connection.cursor()) as cursor:
                cursor.execute(sql, values or None)
                return [column[0] for column in cursor.description or ()], list(cursor.fetchall())
        except pymysql.MySQLError as error:
            if code_of(error) in _LOST:
                raise self._lost(text_of(error)) from error
            if code_of(error) in DENIED | {ER.KILL_DENIED_ERROR}:
                raise PreconditionFailed(
                    f"{self.endpoint.address}: this account may not: {text_of(error)}",
                    hint="grant what docs/how-to/promote.md lists under 'The account'",
                ) from error
            raise
        except OSError as error:
            raise self._lost(str(error)) from error

    def row(self, sql: str, *values: object) -> Row:
        """The one row of a query that has one."""
        return self.rows(sql, *values)[0]

    def patiently(self, sql: str, *, seconds: float) -> None:
        """Run a statement that takes its time.

        :param seconds: it gets.
        :raises Unreachable: as `rows`.
        """
        usual = self.connection._read_timeout  # type: ignore[attr-defined]  # noqa: SLF001 - the driver has no setter
        self.connection._read_timeout = seconds  # type: ignore[attr-defined]  # noqa: SLF001
        try:
            self.rows(sql)
        finally:
            self.connection._read_timeout = usual  # type: ignore[attr-defined]  # noqa: SLF001

    def _lost(self, text: str) -> Unreachable:
        return Unreachable(
            f"{self.endpoint.address}: the connection was lost ({text or 'closed'})",
            hint="check the server, then run the same command again",
        )

    # --- what every server knows

    @property
    def end_of_log(self) -> Position:
        """The position of the last transaction in this server's own log."""
        return end_of_log(self.connection, self.flavour)

    def setting(self, name: str) -> str:
        """A global variable; empty where the server does not know it."""
        found = self.rows("SHOW GLOBAL VARIABLES WHERE Variable_name = %s", name)
        return str(found[0][1]) if found else ""

    def is_on(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.setting(name).upper() in {"ON", "1"}

    def has_table(self, table: str) -> bool:
        """Whether the endpoint's database has one of shardkit's tables."""
        return bool(self.rows("SHOW TABLES LIKE %s", table))

    def close_to_writes(self) -> None:
        """Let nobody write, accounts with special rights left aside on MariaDB, which knows no such setting.

        :raises pymysql.OperationalError: `LOCK_WAIT`, when statements at work do not end in time.
        """
        self.rows("SET GLOBAL read_only = 1")
        if self.flavour is Flavour.MYSQL:
            self.rows("SET GLOBAL super_read_only = 1")

    def open_to_ourselves(self) -> None:
        """Let accounts with special rights write, as this one; the others stay shut out."""
        if self.flavour is Flavour.MYSQL:
            self.rows("SET GLOBAL super_read_only = 0")

    def open_to_writes(self) -> None:
        """Let everybody write."""
        self.open_to_ourselves()
        self.rows("SET GLOBAL read_only = 0")

    # --- connections of others

    def clients(self) -> dict[int, str]:
        """Who else is connected: id -> user. Replication and shardkit's own machinery left out."""
        found = [
            (int(connection), str(user))
            for connection, user, _host, _database, command, *_ in self.rows("SHOW PROCESSLIST")
            if int(connection) != self.id
            and str(user).lower() not in _SERVERS_OWN
            and str(command).lower() not in _SERVERS_OWN
        ]
        return {connection: user for connection, user in found if not self._is_system(connection)}

    def appliers(self) -> list[int]:
        """The threads of this server that apply what it has received."""
        return [int(thread) for thread, user, *_ in self.rows("SHOW PROCESSLIST") if user == "system user"]

    def _is_system(self, connection: int) -> bool:
        (holder,) = self.row("SELECT IS_USED_LOCK(%s)", f"{own_tables.SYSTEM_LOCK}{connection}")
        return holder is not None and int(holder) == connection

    def kill(self, connection: int) -> None:
        """Close somebody's connection; nothing happens when it is gone already."""
        try:
            self.rows(f"KILL CONNECTION {connection:d}")
        except pymysql.MySQLError as error:
            if code_of(error) != ER.NO_SUCH_THREAD:
                raise


def fault_of(endpoint: Endpoint, credentials: CredentialSource, ask: Callable[[Server], str]) -> str:
    """What a server answers to ``ask``, or why it cannot be asked; empty where all is well."""
    try:
        with Server(endpoint, credentials) as server:
            return ask(server)
    except (ShardkitError, pymysql.MySQLError) as error:
        return str(error)


def fault_in_the_end(look: Callable[[], str]) -> str:
    """Look until there is no fault any more; the fault that is left after `FOLLOW_SECONDS`."""
    deadline = time.monotonic() + FOLLOW_SECONDS
    while (fault := look()) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return fault
