"""A hop's first position: the beginning of its source's log, where that is safe.

A target that is not empty, or a log that does not reach back to the first table, needs the data first: that is what
seeding does.
"""

from __future__ import annotations

import secrets
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.gtid import Flavour, MariaDBPosition
from shardkit.topology import Endpoint
from shardkit_cdc import own_schema
from shardkit_cdc.connection import connect
from shardkit_cdc.position import insert_row, read_row
from shardkit_cdc.preflight import ServerFacts

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

_SEED = "fill the target from a snapshot first (shardkit relay seed)"


class Link(Protocol):
    """What is asked of a hop's specification here."""

    @property
    def name(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def shard(self) -> str: ...
    @property
    def source(self) -> Endpoint: ...
    @property
    def target(self) -> Endpoint: ...


def begin_from_start(
    link: Link,
    source: ServerFacts,
    target: Connection,
    credentials: CredentialSource,
    *,
    flavour: Flavour,
    log_began: int,
    vouched: bool,
) -> None:
    """Write the hop's first position row: before the source's first transaction.

    The stream has been opened there, so the source still has its log from the beginning.

    :param flavour: the target's.
    :param log_began: when the oldest log file was begun, seconds since the epoch by the source's clock.
    :param vouched: the operator says that the log holds every table (``--from-start``).
    :raises PreconditionFailed: when the target is not empty, or is being filled, or the source has tables that are
        older than its log.
    """
    if read_row(target, own_tables.SEED_PREFIX + link.shard) is not None:
        raise PreconditionFailed(
            f"hop {link.name} has no position yet: {link.target} is being filled, or an attempt to was not finished",
            hint="let shardkit relay seed end, or run it again",
        )
    found = user_objects(target, link.target.database)
    if found:
        raise PreconditionFailed(
            f"hop {link.name} has no position yet, but {link.target} holds {_listed(found)} already",
            hint=f"empty it, or {_SEED}",
        )
    if not vouched:
        _refuse_older_tables(link, credentials, log_began)
    insert_row(
        target,
        link.key,
        gtid="",
        source=source.identity,
        ddl_origin=new_origin(target, flavour),
    )
    target.commit()


def user_objects(connection: Connection, database: str) -> list[str]:
    """The tables, views and routines in a database, shardkit's own left out."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = %s "
            "UNION ALL SELECT routine_name FROM information_schema.routines WHERE routine_schema = %s",
            (database, database),
        )
        return [name for (name,) in cursor.fetchall() if not name.startswith(own_tables.PREFIX)]


def _refuse_older_tables(link: Link, credentials: CredentialSource, log_began: int) -> None:
    connection = connect(link.source, credentials, autocommit=True)
    with closing(connection), connection.cursor() as cursor:
        filled_by_relay = own_schema.exists(connection) and read_row(connection, link.key) is not None
        cursor.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = %s "
            "AND UNIX_TIMESTAMP(create_time) < %s",
            (link.source.database, log_began),
        )
        older = [name for (name,) in cursor.fetchall()]
    if filled_by_relay:
        # Its tables carry the times of its own source (MySQL). All of them are younger than its position table.
        older = [name for name in older if name == own_tables.position.name]
    else:
        older = [name for name in older if not name.startswith(own_tables.PREFIX)]
    if older:
        raise PreconditionFailed(
            f"hop {link.name} has no position yet, and {link.source} has tables older than its log: {_listed(older)}",
            hint=f"{_SEED}; or, if the log does hold everything, start with --from-start",
        )


def new_origin(target: Connection, flavour: Flavour) -> str:
    """What the schema changes of a new hop are known by in its target's log: a GTID domain, or a UUID."""
    return _free_domain(target) if flavour is Flavour.MARIADB else str(uuid4())


def _free_domain(target: Connection) -> str:
    """A GTID domain that nobody has used on this server: the hop's schema changes are logged in it."""
    with target.cursor() as cursor:
        cursor.execute("SELECT @@global.gtid_binlog_pos, @@global.gtid_slave_pos")
        row = cursor.fetchone() or ("", "")
    taken = {domain for text in row for domain in MariaDBPosition.parse(str(text)).domains}
    while True:
        domain = 1 << 31 | secrets.randbits(31)
        if domain not in taken:
            return str(domain)


def _listed(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
