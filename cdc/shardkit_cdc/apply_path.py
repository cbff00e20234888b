"""How a hop's rows reach its target: as the row events that they are, or as statements; and the note that says so.

Row events are exact and fast, and the choice wherever they are possible. The note stands in a table of its own for the
reasons of `shardkit_cdc.pause`: rows of the position table travel, and a column more would stop replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pymysql
from pymysql.constants import ER

from shardkit import own_tables
from shardkit.errors import PreconditionFailed
from shardkit.gtid import Flavour
from shardkit_cdc.connection import code_of
from shardkit_cdc.preflight import ServerFacts

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

_TABLE = own_tables.apply_path.name
#: BINLOG needs a privilege that the account lacks.
_NO_PRIVILEGE = 1227


class ApplyPath(StrEnum):
    """A way for rows into a target."""

    #: Row events as they are, in BINLOG statements.
    RAW = "raw"
    #: Decoded rows as INSERT, UPDATE and DELETE.
    SQL = "sql"


class AskedPath(StrEnum):
    """What an operator wants."""

    #: Row events wherever they are possible, statements elsewhere.
    AUTO = "auto"
    RAW = "raw"
    SQL = "sql"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The path of a hop.

    :param reason: why it is not the usual one; empty for row events.
    """

    path: ApplyPath
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.path.value} ({self.reason})" if self.reason else self.path.value


def choose(asked: AskedPath, source: ServerFacts, target: ServerFacts) -> Chosen:
    """The path as far as two servers' families and the operator decide it.

    :raises PreconditionFailed: when row events are asked for between families.
    """
    if asked is AskedPath.SQL:
        return Chosen(ApplyPath.SQL, "asked for with --apply sql")
    if source.flavour is not target.flavour:
        families = f"{source.endpoint.address} is {source.flavour} and {target.endpoint.address} is {target.flavour}"
        if asked is AskedPath.RAW:
            raise PreconditionFailed(
                families,
                hint="row events pass between servers of one family only: leave --apply raw out, or use the same on "
                "both ends",
            )
        return Chosen(ApplyPath.SQL, families)
    return Chosen(ApplyPath.RAW)


def without_privilege(error: pymysql.MySQLError, asked: AskedPath, target: ServerFacts) -> Chosen:
    """The path where BINLOG was refused to the account.

    :raises pymysql.MySQLError: the error, where it was refused for another reason, or row events are asked for.
    """
    if asked is not AskedPath.AUTO or code_of(error) != _NO_PRIVILEGE:
        raise error
    wanted = "BINLOG REPLAY" if target.flavour is Flavour.MARIADB else "BINLOG_ADMIN or REPLICATION_APPLIER"
    return Chosen(ApplyPath.SQL, f"the relay's user lacks {wanted} on {target.endpoint.address}")


def read_path(connection: Connection, key: str) -> Chosen | None:
    """What the hop's runner has noted; None where it never did, or shardkit's tables are older or not there yet.

    :param key: the hop's key in the target's position table.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT path, reason FROM {_TABLE} WHERE hop = %s", (key,))
            found = cursor.fetchone()
    except pymysql.MySQLError as error:
        if code_of(error) == ER.NO_SUCH_TABLE:
            return None
        raise
    return None if found is None else Chosen(ApplyPath(found[0]), found[1])


def note_path(connection: Connection, key: str, chosen: Chosen) -> None:
    """Leave word in the target of the path in use, and commit."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"REPLACE INTO {_TABLE} (hop, path, reason) VALUES (%s, %s, %s)",
            (key, chosen.path.value, chosen.reason[:4000]),
        )
    connection.commit()
