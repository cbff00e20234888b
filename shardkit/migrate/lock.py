"""One migration at a time: locks that live exactly as long as the connection, or the process, that holds them.

Two locks stand on every shard, both in the shard's own database, so that they hold whatever keeps the shard map:

- ``run``: taken by the command on all of its shards before it changes anything;
- ``shard``: taken by the very connection that runs the DDL. A process that is killed in the middle of an ALTER leaves
  the server at work; its session, and with it this lock, ends when the ALTER does, so nobody starts beside it.

On a server these are user locks (``GET_LOCK``: they outlive transactions and DDL and end with the session); on SQLite
they are ``flock`` locks on files beside the database.
https://dev.mysql.com/doc/refman/8.4/en/locking-functions.html, https://mariadb.com/kb/en/get_lock/
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TextIO

import sqlalchemy as sa

from shardkit.errors import PreconditionFailed

#: The longest name that GET_LOCK takes, in characters.
LOCK_NAME_LENGTH = 64
POLL_SECONDS = 0.1


class LockKind(StrEnum):
    """What is locked: the whole command, or one shard's DDL."""

    RUN = "run"
    SHARD = "shard"


class MigrationRunning(PreconditionFailed):
    """Another migration holds the lock of a shard."""


@contextmanager
def migration_lock(connection: sa.Connection, kind: LockKind, *, shard: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a shard's lock.

    :param connection: on a server, the lock is this connection's.
    :param wait: seconds to wait for whoever holds it.
    :raises MigrationRunning: naming the holder.
    """
    if connection.dialect.name == "sqlite":
        with _file_lock(Path(f"{connection.engine.url.database}.migrate-{kind}.lock"), shard, wait):
            yield
        return
    name = lock_name(kind, str(connection.engine.url.database))
    taken = connection.scalar(sa.text("SELECT GET_LOCK(:name, :wait)"), {"name": name, "wait": wait})
    if taken != 1:
        holder = _holder(connection, name)
        connection.rollback()
        raise _refusal(shard, holder)
    connection.rollback()
    try:
        yield
    finally:
        if not connection.closed and not connection.invalidated:
            connection.rollback()
            connection.execute(sa.text("DO RELEASE_LOCK(:name)"), {"name": name})
            connection.rollback()


def lock_name(kind: LockKind, database: str) -> str:
    """The user lock of a database."""
    # user locks are the server's, not the database's: several shards may live on one server
    name = f"shardkit.migrate.{kind}.{database}"
    if len(name) <= LOCK_NAME_LENGTH:
        return name
    digest = hashlib.blake2b(database.encode(), digest_size=16).hexdigest()
    return f"shardkit.migrate.{kind}.{digest}"


def _holder(connection: sa.Connection, name: str) -> str:
    session = connection.scalar(sa.text("SELECT IS_USED_LOCK(:name)"), {"name": name})
    row = connection.execute(
        sa.text("SELECT user, host, info FROM information_schema.processlist WHERE id = :id"), {"id": session}
    ).first()
    if row is None:
        return f"connection {session}"
    user, host, statement = row
    at_work = f", at work on: {' '.join(statement.split())[:80]}" if statement else ""
    return f"connection {session} of {user} from {host}{at_work}"


def _refusal(shard: str, holder: str) -> MigrationRunning:
    return MigrationRunning(
        f"another migration is at work on shard {shard}: {holder}",
        hint="wait for it (--wait SECONDS waits here); its lock ends with its connection",
    )


@contextmanager
def _file_lock(path: Path, shard: str, wait: float) -> Iterator[None]:
    deadline = time.monotonic() + wait
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise _refusal(shard, file.read().strip() or "a process that has not said its name") from None
                time.sleep(POLL_SECONDS)
                continue
            if not _is_at(file, path):
                continue  # whoever held it has removed it meanwhile: a lock on that file keeps nobody out
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
