"""A connection whose session shows and takes values as they are stored: for copying and comparing rows."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import pymysql
from pymysql.cursors import SSCursor

from shardkit.credentials import CredentialSource
from shardkit.gtid import Flavour
from shardkit.topology import Endpoint
from shardkit_cdc.connection import connect, server_errors

Row: TypeAlias = tuple[Any, ...]

#: Seconds that a statement waits for a row, and for a table that a schema change holds.
LOCK_SECONDS = 5
#: Seconds that the server keeps an idle connection: the target's rests while tables are copied.
_IDLE_SECONDS = 7 * 86_400


class _Stream(SSCursor):
    """Rows as they come."""

    def leave(self) -> None:
        """Read no more of them; the connection is of no use any more."""
        self._result.unbuffered_active = False  # type: ignore[attr-defined]  # the stubs leave it out


class Database:
    """One connection to one endpoint. Statements are committed one by one outside `transaction`.

    Times are UTC, zero and partial dates are allowed, a zero in an AUTO_INCREMENT column is a zero, foreign keys are
    not followed, nor MariaDB's CHECK constraints (a row may be older than they are).

    :param binary: literals are bytes, for writing rows; else they are utf8mb4.
    :raises PreconditionFailed, Unreachable: as `connect`.
    """

    def __init__(self, endpoint: Endpoint, credentials: CredentialSource, *, hop: str, binary: bool = False) -> None:
        self.endpoint = endpoint
        self.connection: pymysql.Connection[Any] = connect(endpoint, credentials, autocommit=True)
        self._hop = hop
        try:
            self.flavour = Flavour.of_version(str(self.value("SELECT VERSION()")))
            self._prepare(binary)
        except BaseException:
            self.close()
            raise

    def _prepare(self, binary: bool) -> None:
        settings = {
            "sql_mode": "'ALLOW_INVALID_DATES,NO_AUTO_VALUE_ON_ZERO,NO_ENGINE_SUBSTITUTION'",
            "time_zone": "'+00:00'",
            "foreign_key_checks": "0",
            "sql_safe_updates": "0",
            "lock_wait_timeout": str(LOCK_SECONDS),
            "innodb_lock_wait_timeout": str(LOCK_SECONDS),
            "wait_timeout": str(_IDLE_SECONDS),
            "net_write_timeout": "3600",
        }
        if self.flavour is Flavour.MARIADB:
            settings |= {"max_statement_time": "0", "idle_transaction_timeout": "0", "check_constraint_checks": "0"}
        else:
            settings |= {"max_execution_time": "0"}
        self.run("SET NAMES " + ("binary" if binary else "utf8mb4"))
        self.run("SET SESSION " + ", ".join(f"{name} = {value}" for name, value in settings.items()))
        if binary and self.flavour is Flavour.MARIADB:
            # A statement's text beside its row events doubles the log; to leave it out needs BINLOG ADMIN.
            with contextlib.suppress(pymysql.OperationalError):
                self.run("SET SESSION binlog_annotate_row_events = 0")

    def __str__(self) -> str:
        return self.endpoint.address

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with server_errors(self.endpoint, self._hop, doing="copying or comparing"):
            yield

    def rows(self, sql: str, *values: object) -> list[Row]:
        """Run a query. Without values a ``%`` in it stands for itself.

        :raises Interrupted: the connection is lost, or a lock was not given in time.
        :raises PreconditionFailed: a missing privilege, or a read-only server.
        """
        with self._errors(), self.connection.cursor() as cursor:
            cursor.execute(sql, values or None)
            return list(cursor.fetchall())

    def value(self, sql: str, *values: object) -> Any:
        """The first column of a query's first row; None where there is no row."""
        found = self.rows(sql, *values)
        return found[0][0] if found else None

    def run(self, sql: str | bytes, *values: object) -> int:
        """Run a statement; text that is bytes already is sent as it is.

        :returns: the number of rows that it changed.
        :raises Interrupted, PreconditionFailed: as `rows`.
        """
        with self._errors():
            if isinstance(sql, bytes):
                return int(self.connection.query(sql))
            with self.connection.cursor() as cursor:
                return int(cursor.execute(sql, values or None))

    def stream(self, sql: str) -> Generator[Row]:
        """The rows of a query as they come: none is kept. Nothing else may be asked before the end.

        Where it is closed before, the connection is closed too: the driver would first read all that is left.
        """
        with self._errors(), self.connection.cursor(_Stream) as cursor:
            cursor.execute(sql)
            try:
                yield from cursor.fetchall_unbuffered()
            except GeneratorExit:
                cursor.leave()
                self.close()
                raise

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the statements inside, or none."""
        self.run("BEGIN")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            self.rollback()
            raise

    def rollback(self) -> None:
        """End a transaction without it. On a lost connection the server has done that already."""
        with contextlib.suppress(pymysql.MySQLError, OSError):
            self.connection.rollback()

    def close(self) -> None:
        """End the connection; what it had not committed is undone."""
        with contextlib.suppress(pymysql.MySQLError, OSError):
            self.connection.close()
