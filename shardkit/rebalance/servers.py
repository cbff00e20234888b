"""A job's connections to the masters, replicas and staging databases of its two shards."""

from __future__ import annotations

import contextlib
import secrets
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import pymysql
from pymysql.constants import CLIENT, ER

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed, RebalanceError, Unreachable
from shardkit.topology import Endpoint

Flavour: TypeAlias = Literal["mariadb", "mysql"]
Row: TypeAlias = tuple[Any, ...]

CONNECT_TIMEOUT = 10.0  # seconds
#: Seconds that a job waits for a row lock, and for a table's metadata lock: behind a waiting DDL every other statement
#: on the table waits too, so it must give up soon.
ROW_LOCK_SECONDS = 5
DDL_LOCK_SECONDS = 1

_LOCK_WAIT = frozenset({ER.LOCK_WAIT_TIMEOUT, ER.LOCK_DEADLOCK})
_LOST = frozenset({0, 2006, 2013, 2014, 2055, 1053, 1077, 1079, 1317, 1927, 3169, 4031})


class LockWait(Exception):
    """A lock was not given in time, and the transaction has been rolled back: try again. Never leaves this package."""


class Server:
    """One connection to one endpoint, with a session in which values are what they are stored as.

    Times are UTC, zero and partial dates are allowed, a zero in an AUTO_INCREMENT column is a zero, foreign keys are
    not followed: a parent and its children move by themselves; nor MariaDB's CHECK constraints: a row may be older.

    :param shard: the name that messages use.
    :param binary: literals are bytes, for writing copied rows; else they are utf8mb4.
    """

    def __init__(
        self, shard: str, role: str, endpoint: Endpoint, credentials: CredentialSource, *, binary: bool = False
    ) -> None:
        self.shard = shard
        self.role = role
        self.endpoint = endpoint
        self._connection = _connect(shard, endpoint, credentials)
        version, self.id, database = self.rows("SELECT VERSION(), CONNECTION_ID(), DATABASE()")[0]
        self.database = str(database)
        self.version = str(version)
        self.flavour: Flavour = "mariadb" if "mariadb" in self.version.lower() else "mysql"
        self._prepare(binary)

    def _prepare(self, binary: bool) -> None:
        self.run("SET NAMES " + ("binary" if binary else "utf8mb4"))
        # Copied rows are not refused for what the source holds already (an ENUM without a member): they are compared.
        strict = "" if binary else "STRICT_ALL_TABLES,"
        settings = {
            "sql_mode": f"'{strict}ALLOW_INVALID_DATES,NO_AUTO_VALUE_ON_ZERO,NO_ENGINE_SUBSTITUTION'",
            "time_zone": "'+00:00'",
            "foreign_key_checks": "0",
            "sql_safe_updates": "0",
            "lock_wait_timeout": str(DDL_LOCK_SECONDS),
            "innodb_lock_wait_timeout": str(ROW_LOCK_SECONDS),
            "wait_timeout": "86400",
            "net_write_timeout": "600",
        }
        if self.flavour == "mariadb":
            settings |= {"max_statement_time": "0", "idle_transaction_timeout": "0", "check_constraint_checks": "0"}
        self.run("SET SESSION " + ", ".join(f"{name} = {value}" for name, value in settings.items()))
        self.run("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        if binary and self.flavour == "mariadb":
            # a statement's text beside its row events doubles the binary log; to leave it out needs BINLOG ADMIN
            with contextlib.suppress(pymysql.OperationalError):
                self.run("SET SESSION binlog_annotate_row_events = 0")
        self.rows(own_tables.MARK_AS_SYSTEM)

    def __str__(self) -> str:
        return f"shard {self.shard}, {self.role} {self.endpoint.address}"

    # --- statements

    def rows(self, sql: str, *values: object) -> list[Row]:
        """Run a query. Without values a ``%`` in it stands for itself.

        :raises LockWait: a lock was not given in time.
        :raises RebalanceError: the connection is lost.
        """
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(sql, values or None)
            return list(cursor.fetchall())

    def row(self, sql: str, *values: object) -> Row:
        """The one row of a query that has one."""
        return self.rows(sql, *values)[0]

    def run(self, sql: str, *values: object) -> int:
        """Run a statement.

        :returns: the number of rows that it found, changed or not.
        """
        with self._errors(), self._connection.cursor() as cursor:
            return int(cursor.execute(sql, values or None))

    def run_bytes(self, sql: bytes) -> int:
        """Run a statement that is bytes already."""
        with self._errors():
            return int(self._connection.query(sql))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the statements inside, or none."""
        self.run("BEGIN")
        try:
            yield
        except BaseException:
            self.rollback()
            raise
        self.run("COMMIT")

    def rollback(self) -> None:
        """End a transaction without it. On a lost connection the server has done that already."""
        try:
            self._connection.rollback()
        except (pymysql.MySQLError, OSError):
            return

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except pymysql.MySQLError as error:
            code, text = code_of(error)
            if code in _LOCK_WAIT:
                self.rollback()
                raise LockWait(text) from error
            if code in _LOST:
                raise self._lost(text) from error
            raise
        except OSError as error:
            raise self._lost(str(error)) from error

    def _lost(self, text: str) -> RebalanceError:
        return RebalanceError(
            f"{self}: the connection was lost ({text or 'closed'})",
            hint="check the server, then run the same command again: it goes on where it stopped",
        )

    # --- named locks

    def take_lock(self, name: str, *, seconds: float = 0) -> bool:
        """Take a named lock of the server; it is freed with this connection."""
        return bool(self.row("SELECT GET_LOCK(%s, %s)", name, seconds)[0])

    def lock_holder(self, name: str) -> int | None:
        """The connection that holds a named lock."""
        holder = self.row("SELECT IS_USED_LOCK(%s)", name)[0]
        return None if holder is None else int(holder)

    def kill(self, connection: int) -> None:
        """Close somebody's connection; nothing happens when it is gone already.

        :raises PreconditionFailed: when this account may not.
        """
        try:
            self.run(f"KILL CONNECTION {int(connection)}")
        except pymysql.MySQLError as error:
            code, text = code_of(error)
            if code == ER.NO_SUCH_THREAD:
                return
            if code in {ER.KILL_DENIED_ERROR, ER.SPECIFIC_ACCESS_DENIED_ERROR}:
                privilege = "CONNECTION ADMIN" if self.flavour == "mariadb" else "CONNECTION_ADMIN (and SYSTEM_USER)"
                raise PreconditionFailed(
                    f"{self}: this account may not close connection {connection} ({text})",
                    hint=f"end it by hand, or GRANT {privilege} ON *.* to the account that SHARDKIT_USER names; then "
                    "run the same command again",
                ) from error
            raise

    def close(self) -> None:
        """End the connection; what it had not committed is undone."""
        try:
            self._connection.close()
        except (pymysql.MySQLError, OSError):
            return


class _Connection(pymysql.Connection):
    """Reads the system's certificates once for all connections, not for each: that takes longer than logging on."""

    _context: ClassVar[ssl.SSLContext | None] = None

    def _create_ssl_ctx(self, options: Any) -> ssl.SSLContext:
        if options:
            made: ssl.SSLContext = super()._create_ssl_ctx(options)  # type: ignore[misc]
            return made
        if _Connection._context is None:
            _Connection._context = super()._create_ssl_ctx(options)  # type: ignore[misc]
        return _Connection._context


def _connect(shard: str, endpoint: Endpoint, credentials: CredentialSource) -> pymysql.Connection[Any]:
    account = credentials(endpoint)
    try:
        return _Connection(
            host=endpoint.host,
            port=endpoint.port,
            user=account.user,
            password=account.password,
            database=endpoint.database,
            charset="utf8mb4",
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT,
            client_flag=CLIENT.FOUND_ROWS,
        )
    except pymysql.MySQLError as error:
        code, text = code_of(error)
        if code in {ER.ACCESS_DENIED_ERROR, 1698}:
            raise PreconditionFailed(
                f"shard {shard}: {endpoint.address} refused the user or the password",
                hint="set SHARDKIT_USER and SHARDKIT_PASSWORD (or SHARDKIT_PASSWORD_FILE) to an account of that server",
            ) from None
        if code in {ER.BAD_DB_ERROR, ER.DBACCESS_DENIED_ERROR}:
            raise PreconditionFailed(
                f"shard {shard}: the database {endpoint.database} on {endpoint.address} does not let us in: {text}",
                hint=f"create it and grant the account its rights there: CREATE DATABASE `{endpoint.database}`",
            ) from None
        raise Unreachable(
            f"shard {shard}: no database server answers at {endpoint.address}: {text}",
            hint="start the server, or mend its address in the shard map",
        ) from None
    except RuntimeError as error:  # the driver lacks the package for the account's authentication method
        raise PreconditionFailed(
            f"shard {shard}: cannot log on to {endpoint.address}: {error}",
            hint="install the package named, or use an account that authenticates without it",
        ) from None


def code_of(error: BaseException) -> tuple[int, str]:
    """The server's or the driver's error number (0 where there is none) and text."""
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    return code, str(error.args[1]) if len(error.args) > 1 else str(error)


def new_token() -> str:
    """What a coordinator signs its work with: never the same twice."""
    return secrets.token_hex(16)


def in_list(values: Sequence[object]) -> str:
    """``(%s,%s,%s)`` for so many values."""
    return "(" + ",".join(["%s"] * len(values)) + ")"
