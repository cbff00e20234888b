"""A consistent snapshot of a server together with its position in the server's log.

Transactions that see the same data are begun while nothing can commit; that takes milliseconds. What holds the commits:

- MariaDB: ``BACKUP STAGE BLOCK_COMMIT``, which neither waits for statements that write to transactional tables nor
  holds them up, only their commits (MariaDB Knowledge Base, "BACKUP STAGE": everything committed when it returns is in
  the backup; "Storage Snapshots and BACKUP STAGE Commands").
- MySQL: ``FLUSH TABLES WITH READ LOCK``, as mysqldump does for ``--single-transaction --source-data`` (MySQL Reference
  Manual, "FLUSH Statement", "mysqldump"). ``LOCK INSTANCE FOR BACKUP`` lets commits through, and ``@@gtid_executed``
  without a lock may lack a transaction that the snapshot shows: it is added after the engine's commit. The flush waits
  for running statements, and everybody else waits behind it: so it is tried only while no statement is long at work.

No XA branch may be prepared at that moment: the snapshot would lack its rows, and the log behind the snapshot would
hold only its XA COMMIT.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed
from shardkit.gtid import Flavour, Position
from shardkit.topology import Endpoint
from shardkit_cdc.database import Database
from shardkit_cdc.preflight import end_of_log

#: Seconds that the lock may take to be given: writers wait behind it for as long.
_LOCK_SECONDS = 1
#: Seconds for which a statement may have been at work when MySQL's tables are flushed.
_LONG_STATEMENT = 1
#: Seconds over which a moment without prepared branches and long statements is looked for.
PATIENCE = 60.0


@dataclass(frozen=True)
class Snapshot:
    """Open transactions that see the same data.

    :param position: the source's log up to here is in the data, and nothing behind it.
    :param held: seconds for which the source's commits waited.
    """

    position: Position
    sessions: Sequence[Database]
    held: float

    def close(self) -> None:
        """End the transactions."""
        for session in self.sessions:
            session.close()


def take_snapshot(
    endpoint: Endpoint, credentials: CredentialSource, *, hop: str, sessions: int = 1, patience: float = PATIENCE
) -> Snapshot:
    """Open a snapshot.

    :param sessions: how many connections are to see it.
    :param patience: seconds to try.
    :raises PreconditionFailed: when there is no moment without prepared branches, or the lock is not given.
    """
    with ExitStack() as opened, ExitStack() as locked:
        readers: list[Database] = []
        for _ in range(sessions):
            reader = Database(endpoint, credentials, hop=hop)
            opened.callback(reader.close)
            reader.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            readers.append(reader)
        lock = Database(endpoint, credentials, hop=hop)
        locked.callback(lock.close)
        lock.run(f"SET SESSION lock_wait_timeout = {_LOCK_SECONDS}")
        end = time.monotonic() + patience
        while True:
            obstacle = _quick_look(lock)
            if not obstacle:
                began = time.monotonic()
                try:
                    position, obstacle = _open_all(lock, readers)
                finally:
                    _release(lock)
                if position is not None:
                    opened.pop_all()
                    return Snapshot(position, readers, time.monotonic() - began)
            if time.monotonic() > end:
                raise PreconditionFailed(
                    f"no snapshot of {endpoint} could be taken within {patience:.0f} s: {obstacle}",
                    hint="commit or roll back prepared transactions (XA RECOVER lists them; shardkit doctor "
                    "--transactions ends shardkit's own), end long statements (SHOW PROCESSLIST), then run this again",
                )
            time.sleep(0.05)


def _quick_look(lock: Database) -> str:
    """What stands in the way, seen without a lock; empty when nothing does."""
    obstacle = _prepared(lock)
    if obstacle or lock.flavour is Flavour.MARIADB:
        return obstacle
    for thread, _user, _host, _database, command, seconds, *_, text in lock.rows("SHOW PROCESSLIST"):
        if command in {"Query", "Execute"} and int(seconds or 0) > _LONG_STATEMENT:
            return f"a statement has been at work for {seconds} s (connection {thread}: {str(text)[:60]})"
    return ""


def _open_all(lock: Database, readers: Sequence[Database]) -> tuple[Position | None, str]:
    """The position at which all readers stand; None, and why, when this was no good moment."""
    try:
        if lock.flavour is Flavour.MARIADB:
            lock.run("BACKUP STAGE START")
            lock.run("BACKUP STAGE BLOCK_COMMIT")
        else:
            lock.run("FLUSH TABLES WITH READ LOCK")
    except Interrupted as error:
        return None, error.text
    obstacle = _prepared(lock)
    if obstacle:
        return None, obstacle
    for reader in readers:
        reader.run("START TRANSACTION WITH CONSISTENT SNAPSHOT")
    return end_of_log(lock.connection, lock.flavour), ""


def _release(lock: Database) -> None:
    # A lock that was never given, or went with its connection, needs no release.
    with suppress(pymysql.MySQLError, Interrupted):
        lock.run("BACKUP STAGE END" if lock.flavour is Flavour.MARIADB else "UNLOCK TABLES")


def _prepared(lock: Database) -> str:
    branches = lock.rows("XA RECOVER")
    if not branches:
        return ""
    return f"{len(branches)} transaction{'s' if len(branches) > 1 else ''} prepared and not decided (XA RECOVER)"
