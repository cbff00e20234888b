"""The daemon's janitor: ends transactions over shards whose client died between PREPARE and COMMIT."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.decisions import Connection, Janitor
from shardkit.errors import ShardkitError
from shardkit.topology import Shard
from shardkit_cdc.connection import connect
from shardkit_cdc.election import Election, Unopposed

logger = logging.getLogger(__name__)

#: Seconds between two passes. A branch is ended in the pass after the one that first saw it.
PERIOD = 10.0
#: Seconds between two times that old decisions are deleted.
FORGET_PERIOD = 3600.0


class JanitorTask:
    """Sweeps the masters of a cluster, in a thread of the caller's.

    MySQL asks for ``XA_RECOVER_ADMIN``; without it a shard is skipped, which is logged once.

    :param shards: the shards of the newest map, asked at every pass.
    :param period: seconds between two passes.
    """

    def __init__(
        self,
        shards: Callable[[], Mapping[str, Shard]],
        credentials: CredentialSource,
        *,
        election: Election | None = None,
        period: float = PERIOD,
    ) -> None:
        self._shards = shards
        self._credentials = credentials
        self._election = election or Unopposed()
        self._period = period
        self._stop = threading.Event()
        self._unwell: set[str] = set()

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()
        self._election.cancel()

    def run(self) -> None:
        """Sweep until stopped. Two janitors at once do no harm: the decision rows settle what becomes of a branch."""
        while not self._stop.is_set():
            with self._election.lead(self._stop) as lost:
                janitors: dict[str, Janitor] = {}
                forgotten = time.monotonic() - FORGET_PERIOD
                while lost is not None and not lost.is_set() and not self._stop.wait(self._period):
                    for name in self._masters():
                        self._sweep(name, janitors.setdefault(name, Janitor(self._connect)))
                    if time.monotonic() - forgotten >= FORGET_PERIOD:
                        forgotten = time.monotonic()
                        self._forget()

    def _sweep(self, shard: str, janitor: Janitor) -> None:
        """One shard by itself: a server that is down must not keep the others' branches waiting."""
        try:
            janitor.sweep([shard])
        except (ShardkitError, pymysql.MySQLError, OSError) as error:
            level = logging.DEBUG if shard in self._unwell else logging.WARNING
            logger.log(level, "the prepared transactions of %s could not be looked through: %s", shard, error)
            self._unwell.add(shard)
        else:
            self._unwell.discard(shard)

    def _masters(self) -> list[str]:
        """The shards whose masters know prepared transactions: not SQLite's."""
        return [name for name, shard in self._shards().items() if shard.master.dialect == "mysql"]

    def _forget(self) -> None:
        try:
            deleted = Janitor(self._connect).forget(self._masters())
        except (ShardkitError, pymysql.MySQLError, OSError) as error:
            logger.info("old decisions are kept: not every master could be asked (%s)", error)
        else:
            if deleted:
                logger.info("%d old decisions of transactions over shards were deleted", deleted)

    def _connect(self, shard: str) -> Connection:
        return connect(self._shards()[shard].master, self._credentials, autocommit=True)
