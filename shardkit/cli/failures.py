"""From any error to what the command line shows of it. No traceback, no statement, no password."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import pymysql.err
from kazoo.exceptions import KazooException, NoAuthError
from kazoo.handlers.threading import KazooTimeoutError
from sqlalchemy import exc as sa_exc

from shardkit.cli.output import Failure
from shardkit.errors import InvalidShardMap, ShardkitError

#: Server and client error codes -> the fix. https://mariadb.com/kb/en/mariadb-error-code-reference/ and pymysql's CR.
_DATABASE_FIXES: Mapping[int, str] = {
    1044: "grant this user its rights on the database, or name another user with SHARDKIT_USER",
    1045: "set SHARDKIT_USER and SHARDKIT_PASSWORD (or SHARDKIT_PASSWORD_FILE) to an account of this server",
    1049: "create the database on this server, or mend its name in the shard map",
    1130: "create the account for this host, or grant it from '%'",
    1142: "grant this user its rights on the table",
    1143: "grant this user its rights on the column",
    1227: "grant this user the privilege that the message names",
    1698: "this account logs on by the operating system's user: use one with a password (SHARDKIT_USER)",
    2002: "check that the server runs and that the shard map has its host and port",
    2003: "check that the server runs and that the shard map has its host and port",
    2005: "check the host name in the shard map",
    2006: "the server closed the connection: check that it runs, then try again",
    2013: "the server closed the connection: check that it runs, then try again",
    2026: "the server and this client do not agree on TLS: set the TLS options in engine_options=",
    2061: "use an account whose authentication plugin this driver knows, e.g. mysql_native_password",
}
_CONNECTING = frozenset({1040, 1044, 1045, 1049, 1130, 1698, 2002, 2003, 2005, 2026, 2061})


def explain(error: BaseException) -> Failure:
    """What to show of an error, with the exit code that it ends the command with."""
    match error:
        case InvalidShardMap():
            return Failure(
                error.message.partition("\n")[0].rstrip(":"),
                error.hint or _map_hint(error),
                error.problems,
                error.exit_code,
                type(error).__name__,
            )
        case ShardkitError():
            return Failure(error.message, error.hint, (), error.exit_code, type(error).__name__)
        case sa_exc.DBAPIError() if error.orig is not None:
            return _database_failure(error.orig)
        case pymysql.err.MySQLError() | sqlite3.Error():
            return _database_failure(error)
        case sa_exc.SQLAlchemyError():
            return Failure(_first_line(error), kind=type(error).__name__)
        case NoAuthError():
            return Failure(
                "ZooKeeper refused this client: the node is protected by an ACL",
                "run as a client that the ACL lets in",
                exit_code=4,
                kind="NoAuthError",
            )
        case KazooException() | KazooTimeoutError():
            return Failure(
                f"the connection to ZooKeeper was lost: {_named(error)}",
                "check that ZooKeeper runs, then try again",
                kind=type(error).__name__,
            )
        case RuntimeError() if "cryptography" in str(error):  # PyMySQL, on MySQL's sha2 accounts without TLS
            return Failure(
                f"cannot log on: {_first_line(error)}",
                "install the package cryptography, or use an account that authenticates otherwise",
                exit_code=4,
                kind="PreconditionFailed",
            )
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return Failure(f"{where}{error.strerror or _named(error)}", kind=type(error).__name__)
    return Failure(
        f"unexpected error: {_named(error)}",
        "run it again with 'shardkit -v' to see where it comes from, and report it",
        kind=type(error).__name__,
    )


def _map_hint(error: InvalidShardMap) -> str:
    if any(problem.startswith("cannot be read") for problem in error.problems):
        return "check the path and its permissions"
    return "mend what is named, then check it with 'shardkit map validate FILE'"


def _database_failure(error: BaseException) -> Failure:
    code = error.args[0] if error.args and isinstance(error.args[0], int) else None
    if code is None:
        return Failure(f"the database failed: {_first_line(error)}", exit_code=1, kind=type(error).__name__)
    text = str(error.args[1]) if len(error.args) > 1 else ""
    return Failure(
        f"the database refused with error {code}: {text.strip() or type(error).__name__}",
        _DATABASE_FIXES.get(code),
        exit_code=4 if code in _CONNECTING else 1,
        kind=type(error).__name__,
    )


def _named(error: BaseException) -> str:
    text = _first_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
