"""The heartbeat: one row on every master, written a few times a second, that travels the whole pipeline.

Lag is then now minus the newest heartbeat that a replica holds: end to end, whatever lies between, and infinite where
there is none.
"""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import ShardkitError
from shardkit.topology import Endpoint
from shardkit_cdc import own_schema
from shardkit_cdc.connection import connect, server_errors
from shardkit_cdc.election import Election, Unopposed

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

logger = logging.getLogger(__name__)

INTERVAL = 0.25  # seconds
_RETRY = 2.0  # seconds

_TABLE = own_tables.heartbeat.name
_NOW = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS UNSIGNED)"


class Heartbeat:
    """Writes one shard's heartbeat on its master, in a thread of the caller's.

    :param interval: seconds between two beats.
    """

    def __init__(
        self,
        shard: str,
        master: Endpoint,
        credentials: CredentialSource,
        *,
        election: Election | None = None,
        interval: float = INTERVAL,
    ) -> None:
        self.shard = shard
        self._master = master
        self._credentials = credentials
        self._election = election or Unopposed()
        self._interval = interval
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()
        self._election.cancel()

    def run(self) -> None:
        """Beat until stopped. Two writers at once do no harm."""
        well = True
        while not self._stop.is_set():
            with self._election.lead(self._stop) as lost:
                while lost is not None and not self._stop.is_set() and not lost.is_set():
                    try:
                        self._beat(lost)
                        well = True
                    except (ShardkitError, pymysql.MySQLError) as error:
                        # Said once: the lag of every replica tells the rest.
                        logger.log(logging.WARNING if well else logging.DEBUG, "heartbeat of %s: %s", self.shard, error)
                        well = False
                        self._stop.wait(_RETRY)

    def _beat(self, lost: threading.Event) -> None:
        connection = connect(self._master, self._credentials, autocommit=True)
        own_schema.upgrade(self._master, self._credentials)
        with closing(connection), server_errors(self._master, self.shard, doing="writing the heartbeat"):
            while not self._stop.is_set() and not lost.is_set():
                if not _is_closed(connection):
                    beat(connection, self.shard)
                self._stop.wait(self._interval)


def _is_closed(connection: Connection) -> bool:
    """Whether somebody has closed this master to writes: then its log is to have an end, whatever our own rights."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT @@global.read_only")
        found = cursor.fetchone()
    return found is not None and found[0] not in {0, "OFF"}


def beat(connection: Connection, shard: str) -> None:
    """Write one beat."""
    with connection.cursor() as cursor:
        if not cursor.execute(f"UPDATE {_TABLE} SET beat = beat + 1, written_at = {_NOW} WHERE shard = %s", (shard,)):
            cursor.execute(f"INSERT INTO {_TABLE} (shard, beat, written_at) VALUES (%s, 1, {_NOW})", (shard,))
