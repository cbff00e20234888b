"""Connections for migrations: one at a time, to a master, outside the application's pools."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from shardkit.credentials import Credentials
from shardkit.engines import Engines, EngineSettings
from shardkit.errors import PreconditionFailed
from shardkit.topology import Endpoint, Role

#: Shards that are worked on at a time.
PARALLEL = 4

#: Seconds that reaching a server may take.
CONNECT_TIMEOUT = 10

#: Seconds that an idle connection of ours must live: it may hold a lock while an ALTER runs on another shard.
#: https://dev.mysql.com/doc/refman/8.4/en/server-system-variables.html#sysvar_wait_timeout (at most a year)
IDLE_SECONDS = 7 * 24 * 3600


def single_engine(shard: str, endpoint: Endpoint, credentials: Credentials, *, driver: str) -> sa.Engine:
    """An engine without a pool. Connecting raises `ShardUnreachable`."""
    options: dict[str, Any] = {"poolclass": sa.NullPool}
    if endpoint.dialect != "sqlite":
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT}
    settings = EngineSettings(lambda _endpoint: credentials, driver=driver, options=options)
    return Engines(settings).sync(shard, Role.MASTER, endpoint)


def migration_engine(shard: str, endpoint: Endpoint, credentials: Credentials, *, driver: str = "pymysql") -> sa.Engine:
    """A `single_engine` whose connections are fit for migrations.

    On SQLite every transaction is opened with an explicit BEGIN, so that a revision is applied whole or not at all:
    the driver's own transactions leave DDL outside (``sqlite3`` documentation, "Transaction control").
    """
    engine = single_engine(shard, endpoint, credentials, driver=driver)
    if endpoint.dialect == "sqlite":
        event.listen(engine, "connect", _manual_transactions)
        event.listen(engine, "begin", _begin)
    else:
        event.listen(engine, "connect", _stay_connected)
    return engine


def error_line(error: BaseException) -> str:
    """An error in one line. Of a database error the server's code and text, without the statement and its values."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    elif isinstance(error, PreconditionFailed):
        return " ".join(str(error).split())
    words = ": ".join(str(part) for part in error.args) or type(error).__name__
    return " ".join(words.split())


def _manual_transactions(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _stay_connected(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET SESSION wait_timeout = {IDLE_SECONDS}")
