"""A hop that an operator has paused: a row in the hop's target, looked for by whoever runs the hop.

It stands in the target because everything else that a runner obeys does: it is there with a map in a file as with one
in ZooKeeper, it outlives daemons, and a backup or a copy of the target takes it along. It has a table of its own
instead of columns in ``shardkit_position`` for two reasons. A runner in the middle of a big transaction holds the
position row's lock, and pausing must not wait for it. And rows of the position table travel from staging to the
replicas column by column, so a column more would stop every replica that has yet to apply what was logged before.
Rows of this table stay on their server (`own_tables.LOCAL_TABLES`): a paused staging database pauses no replica.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pymysql
from pymysql.constants import ER

from shardkit import own_tables
from shardkit_cdc.connection import code_of
from shardkit_cdc.position import is_held, lock_name

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

#: How often a runner looks whether its hop is paused or resumed, in seconds.
LOOK_SECONDS = 0.5

_TABLE = own_tables.pause.name
_NOW = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS UNSIGNED)"


@dataclass(frozen=True, slots=True)
class Pause:
    """Who paused a hop, and when, by the target's clock."""

    by: str
    at: datetime

    def __str__(self) -> str:
        return f"paused by {self.by} since {self.at.isoformat(timespec='seconds')}"


def read_pause(connection: Connection, key: str) -> Pause | None:
    """The hop's pause; None when it is not paused, also where shardkit's tables are older or not there yet.

    Leaves a transaction open on a connection without autocommit.

    :param key: the hop's key in the target's position table.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT paused_by, paused_at FROM {_TABLE} WHERE hop = %s", (key,))
            found = cursor.fetchone()
    except pymysql.MySQLError as error:
        if code_of(error) == ER.NO_SUCH_TABLE:
            return None
        raise
    return None if found is None else Pause(found[0], datetime.fromtimestamp(found[1] / 1_000_000, UTC))


def pause(connection: Connection, key: str, *, by: str) -> bool:
    """Pause a hop, durably; false when it was paused already, and that pause stays as it is.

    :param connection: in autocommit, to a target whose own tables are up to date.
    """
    with connection.cursor() as cursor:
        return bool(
            cursor.execute(
                f"INSERT IGNORE INTO {_TABLE} (hop, paused_by, paused_at) VALUES (%s, %s, {_NOW})", (key, by[:190])
            )
        )


def resume(connection: Connection, key: str) -> Pause | None:
    """End a hop's pause and give back what it was; None when there was none.

    :param connection: in autocommit.
    """
    found = read_pause(connection, key)
    if found is not None:
        with connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM {_TABLE} WHERE hop = %s", (key,))
    return found


def is_at_rest(connection: Connection, database: str, key: str) -> bool:
    """Whether nobody holds the hop now: of a paused one this means that nothing more is applied."""
    return not is_held(connection, lock_name(database, key))
