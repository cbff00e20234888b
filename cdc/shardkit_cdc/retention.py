"""How much of its log a source still has: whether a hop's position is in it, and for how long it will be.

What a server keeps is in ``gtid_purged`` (MySQL Reference Manual, "Global Transaction ID System Variables": a reader
that lacks anything of it is refused), and on MariaDB in the GTID list at the head of its oldest log file, which
``BINLOG_GTID_POS`` gives (MariaDB Knowledge Base, "BINLOG_GTID_POS"; the server's own check is
``contains_all_slave_gtid`` in sql/sql_repl.cc).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit.errors import PositionLost
from shardkit.gtid import Flavour, Position, parse_position
from shardkit_cdc.connection import DENIED, code_of
from shardkit_cdc.preflight import end_of_log

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

SEED_HINT = "this target needs a reseed: fill it anew with `shardkit relay seed`"

_DAY = 86400.0  # seconds
_ASKED = ("binlog_expire_logs_seconds", "binlog_expire_logs_auto_purge", "expire_logs_days")


@dataclass(frozen=True, slots=True)
class KeptLog:
    """What a server has of its log.

    :param begin: the position just before its oldest transaction; None where the account may not see that
        (MariaDB: ``BINLOG MONITOR``).
    :param end: the position of its newest transaction.
    :param seconds: for how long the server keeps a transaction at least; None where it has no limit in time.
    """

    begin: Position | None
    end: Position
    seconds: float | None

    def has_lost(self, position: Position) -> bool:
        """Whether a reader at this position would miss transactions that are purged; false where nobody can tell."""
        return self.begin is not None and not position.covers(self.begin)

    def seconds_left(self, lag: float | None) -> float | None:
        """How long a hop may stand still before the server may purge what it needs; None where nobody can tell.

        At least that: files are purged whole, by the time of their newest transaction. Purging by hand or by size
        comes sooner.

        :param lag: age of the newest data that the hop has applied, in seconds.
        """
        return None if lag is None or self.seconds is None else max(0.0, self.seconds - lag)


def kept_log(connection: Connection, flavour: Flavour) -> KeptLog:
    """Ask a server what it has of its log."""
    return KeptLog(_begin(connection, flavour), end_of_log(connection, flavour), _seconds(connection))


def position_lost(source: str, *, hop: str) -> PositionLost:
    """The error of a hop whose position is purged from its source's log.

    :param source: the source's address.
    """
    return PositionLost(f"the hop's position is purged from the log of {source}", hop=hop, hint=SEED_HINT)


def _begin(connection: Connection, flavour: Flavour) -> Position | None:
    with connection.cursor() as cursor:
        if flavour is Flavour.MYSQL:
            cursor.execute("SELECT @@global.gtid_purged")
        else:
            try:
                cursor.execute("SHOW BINARY LOGS")
            except pymysql.MySQLError as error:
                if code_of(error) in DENIED:
                    return None
                raise
            files = cursor.fetchall()
            if not files:
                return None
            cursor.execute("SELECT BINLOG_GTID_POS(%s, 4)", (files[0][0],))  # 4: behind the file's magic number
        found = cursor.fetchone()
    # NULL: the file was purged between the two questions
    return None if found is None or found[0] is None else parse_position(flavour, str(found[0]))


def _seconds(connection: Connection) -> float | None:
    """After how long a server purges by itself. MariaDB before 10.6 knows days only."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW GLOBAL VARIABLES WHERE Variable_name IN (%s, %s, %s)", _ASKED)
        said = {name.lower(): str(value) for name, value in cursor.fetchall()}
    if said.get("binlog_expire_logs_auto_purge", "ON").upper() in {"OFF", "0"}:
        return None
    seconds = float(said.get("binlog_expire_logs_seconds", 0)) or float(said.get("expire_logs_days", 0)) * _DAY
    return seconds or None
