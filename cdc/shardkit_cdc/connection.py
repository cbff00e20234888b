"""Connections to the two servers of a hop, and what their errors mean to it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pymysql
from pymysql.constants import COMMAND, CR, ER

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed, ShardkitError, Unreachable
from shardkit.topology import Endpoint

CONNECT_TIMEOUT = 10.0  # seconds

#: The connection is gone, or the server asks to come again: lost connections (2006, 2013, 2014, 2055), KILL and
#: shutdown (1053, 1077, 1079, 1317, 1927, 3169, 4031), deadlock, lock wait and too many connections.
PASSING = frozenset(
    {
        2006,
        2013,
        2014,
        2055,
        1053,
        1077,
        1079,
        1317,
        1927,
        3169,
        4031,
        1205,
        1213,
        1040,
        1203,
        1158,
        1159,
        1160,
        1161,
        0,
    }
)
READ_ONLY = frozenset({1290, 1836})
#: The schema is another than it was a moment ago: unknown column, no such table, table definition has changed.
SCHEMA_CHANGED = frozenset({1054, 1146, 1412})
DENIED = frozenset({1044, 1142, 1143, 1227, 1370, 1419})

#: What a server's global settings, which are meant for applications, must not do to the relay's statements: cut off
#: their rows (sql_select_limit), refuse them for their size, begin another transaction or hang up behind a COMMIT
#: (completion_type), refuse writes.
_UNBOUND = (
    "SET SESSION sql_select_limit = 18446744073709551615, sql_big_selects = 1, completion_type = 0",
    "SET SESSION TRANSACTION READ WRITE",
)

if TYPE_CHECKING:
    _Driver = pymysql.Connection[Any]  # generic in the stubs only
else:
    _Driver = pymysql.Connection


class RelayConnection(_Driver):
    """The driver's connection. TLS where the server offers it, as the driver does, but with one context for all.

    The driver makes one for each connection and loads the machine's certificates into it, which it does not look at:
    17 ms, several times whenever a hop starts.
    """

    _context: ssl.SSLContext | None = None

    def _create_ssl_ctx(self, options: Mapping[str, object]) -> ssl.SSLContext:
        if RelayConnection._context is None:
            RelayConnection._context = super()._create_ssl_ctx(options)  # type: ignore[misc]  # the stubs leave it out
        return RelayConnection._context


C = TypeVar("C", bound=RelayConnection)


def connect(
    endpoint: Endpoint,
    credentials: CredentialSource,
    *,
    autocommit: bool = False,
    read_timeout: float | None = None,
    flags: int = 0,
    kind: type[C] | None = None,
) -> C | RelayConnection:
    """Open a connection to an endpoint's database.

    :param read_timeout: seconds to wait for an answer; None for as long as it takes.
    :param flags: of the client protocol, beyond the driver's usual ones (`pymysql.constants.CLIENT`).
    :raises PreconditionFailed: wrong password, unknown database, no right to it.
    :raises Unreachable: no server answers there.
    """
    account = credentials(endpoint)
    try:
        connection = (kind or RelayConnection)(
            host=endpoint.host,
            port=endpoint.port,
            user=account.user,
            password=account.password,
            database=endpoint.database,
            charset="utf8mb4",
            autocommit=autocommit,
            client_flag=flags,
            connect_timeout=CONNECT_TIMEOUT,
            # The driver's connect_timeout ends with the TCP handshake: a server that takes the connection and says
            # nothing (stopped, frozen) would never be given up.
            read_timeout=read_timeout or CONNECT_TIMEOUT,
            init_command=own_tables.MARK_AS_SYSTEM,
        )
        for statement in _UNBOUND:
            connection.query(statement)
    except pymysql.MySQLError as error:
        raise connect_failure(error, endpoint) from None
    except RuntimeError as error:  # the driver lacks the package for the account's authentication method
        raise PreconditionFailed(
            f"cannot log on to {endpoint.address}: {error}",
            hint="install the package named, or give the relay an account that authenticates without it",
        ) from None
    connection._read_timeout = read_timeout  # type: ignore[attr-defined]  # noqa: SLF001 - the driver has no setter
    return connection


def ask(connection: pymysql.Connection[Any], statement: bytes) -> None:
    """Send a statement. Nothing else may be sent before `answer`."""
    connection._execute_command(COMMAND.COM_QUERY, statement)  # type: ignore[attr-defined]  # noqa: SLF001 - the driver only does both at once


def answer(connection: pymysql.Connection[Any]) -> None:
    """Wait for the answer to what `ask` sent.

    :raises pymysql.MySQLError: as the server says, or when the connection is lost.
    """
    connection._read_query_result()  # type: ignore[attr-defined]  # noqa: SLF001 - as in `ask`


def connect_failure(error: pymysql.MySQLError, endpoint: Endpoint) -> ShardkitError:
    """What a failed connection attempt means, with the fix."""
    code, text = code_of(error), text_of(error)
    if code in {ER.ACCESS_DENIED_ERROR, 1698}:
        return PreconditionFailed(
            f"{endpoint.address} refused the user or the password",
            hint="set SHARDKIT_USER and SHARDKIT_PASSWORD (or SHARDKIT_PASSWORD_FILE) to an account of that server",
        )
    if code == ER.BAD_DB_ERROR:
        return PreconditionFailed(
            f"there is no database {endpoint.database} on {endpoint.address}",
            hint=f"create it there: CREATE DATABASE `{endpoint.database}`",
        )
    if code == ER.DBACCESS_DENIED_ERROR:
        return PreconditionFailed(
            f"the user has no rights on the database {endpoint.database} of {endpoint.address}",
            hint="grant the privileges listed under 'The relay's accounts' in docs/how-to/relay.md",
        )
    if code in {CR.CR_CONN_HOST_ERROR, CR.CR_SERVER_LOST, 2005, 2002} or code in PASSING:
        return Unreachable(
            f"no database server answers at {endpoint.address}: {text}",
            hint="start the server, or mend its address in the shard map",
        )
    return PreconditionFailed(f"cannot log on to {endpoint.address}: {text}")


def code_of(error: BaseException) -> int:
    """The server's or the driver's error number; 0 where the driver gives none (a broken socket)."""
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0


def text_of(error: BaseException) -> str:
    return str(error.args[1]) if len(error.args) > 1 else str(error)


@contextmanager
def server_errors(endpoint: Endpoint, hop: str, *, doing: str) -> Iterator[None]:
    """Turn what every statement can meet into the relay's errors: a lost connection, a missing right, a closed server.

    Errors that need to know the statement pass through as the driver's.

    :raises Interrupted: to be tried again from the position.
    :raises PreconditionFailed: a missing privilege, or a read-only server.
    """
    try:
        yield
    except pymysql.MySQLError as error:
        code, text = code_of(error), text_of(error)
        if code in PASSING:
            raise Interrupted(
                f"lost {endpoint.address} while {doing}: {text or 'connection closed'}", hop=hop
            ) from error
        if code in READ_ONLY:
            raise PreconditionFailed(
                f"hop {hop}: {endpoint.address} is read-only ({text})",
                hint="grant READ_ONLY ADMIN (MariaDB) or CONNECTION_ADMIN (MySQL) to the relay's user, "
                "and leave super_read_only off: it refuses BINLOG",
            ) from error
        if code in DENIED:
            raise PreconditionFailed(
                f"hop {hop}: the relay's user lacks a privilege on {endpoint.address} ({text})",
                hint="grant the privileges listed under 'The relay's accounts' in docs/how-to/relay.md",
            ) from error
        raise
    except OSError as error:
        raise Interrupted(f"lost {endpoint.address} while {doing}: {error}", hop=hop) from error
