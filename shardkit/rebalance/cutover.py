"""The steps that hand buckets over: each one transaction on one shard, each safe to run again.

Who writes is settled by the databases: every transaction of a job begins by locking the job's row in ``shardkit_job``
and comparing the token there with its own (`Lease`). A coordinator that was taken over, and wakes up late, changes
nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shardkit.errors import PreconditionFailed, RebalanceError
from shardkit.rebalance.fence import Owned, change_ownership, describe, read_ownership
from shardkit.rebalance.job import Job
from shardkit.rebalance.servers import LockWait, Server, in_list
from shardkit.rebalance.tables import quoted

#: Seconds that the freeze waits for one exclusive lock: while it waits, new writers of the buckets wait behind it.
FREEZE_LOCK_SECONDS = 2
#: Seconds that a new coordinator waits for a dying one to let go.
TAKE_OVER_SECONDS = 10
_XA_DENIED = 1401  # XAER_RMERR: on MySQL, XA RECOVER without XA_RECOVER_ADMIN


@dataclass(frozen=True, slots=True)
class Lease:
    """One coordinator's right to work on a job.

    :param token: differs for every run of every coordinator.
    """

    job: str
    token: str

    def lock(self, shard: str) -> str:
        """The named lock that a working coordinator holds on a shard; two shards may share a server."""
        return f"shardkit:job:{self.job}:{zlib.crc32(shard.encode()):08x}"

    def begin(self, server: Server) -> None:
        """Take the named lock on the source: the quick answer to "is somebody at work on this job?"

        :raises PreconditionFailed: when another coordinator is.
        """
        lock = self.lock(server.shard)
        if not server.take_lock(lock):
            raise PreconditionFailed(
                f"another process is at work on job {self.job}: connection {server.lock_holder(lock)} of {server}",
                hint="let it finish, or end it; see 'shardkit rebalance status'",
            )

    def follow(self, server: Server) -> None:
        """Take the named lock on the target. We hold the source's, so whoever holds this one is left from a dead run.

        :raises RebalanceError: when that connection does not go.
        """
        lock = self.lock(server.shard)
        if server.take_lock(lock):
            return
        holder = server.lock_holder(lock)
        if holder is not None:
            server.kill(holder)
        if not server.take_lock(lock, seconds=TAKE_OVER_SECONDS):
            raise RebalanceError(
                f"{server}: connection {holder} of an earlier run of job {self.job} does not end",
                job=self.job,
                hint="kill it there, then run the same command again",
            )

    def sign(self, server: Server) -> None:
        """Put our token in place of the last coordinator's. Waits for a transaction of his that is under way."""
        server.run(
            "INSERT INTO shardkit_job (job, coordinator) VALUES (%s, %s)"
            " ON DUPLICATE KEY UPDATE coordinator = VALUES(coordinator)",
            self.job,
            self.token,
        )

    def check(self, server: Server) -> None:
        """Hold the job's row for this transaction.

        :raises RebalanceError: when another coordinator has taken over.
        """
        mine = "SELECT 1 FROM shardkit_job WHERE job = %s AND coordinator = %s FOR UPDATE"
        if not server.rows(mine, self.job, self.token):
            raise RebalanceError(
                f"another process has taken job {self.job} over: this one stops",
                job=self.job,
                hint="see 'shardkit rebalance status'; one process at a time works on a job",
            )


# --- the journal -------------------------------------------------------------------------------------------------


def note(server: Server, job: str, event: str, epoch: int) -> None:
    """Write what the caller's transaction does into the journal; its row is how replicas show that they have it."""
    server.run(
        "INSERT INTO shardkit_journal (job, event, epoch, noted_at)"
        " VALUES (%s, %s, %s, CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS UNSIGNED))"
        " ON DUPLICATE KEY UPDATE epoch = VALUES(epoch), noted_at = VALUES(noted_at)",
        job,
        event,
        epoch,
    )


def noted(server: Server, job: str, event: str) -> int | None:
    """The epoch under which the job has done this here; None when it has not."""
    found = server.rows("SELECT epoch FROM shardkit_journal WHERE job = %s AND event = %s", job, event)
    return int(found[0][0]) if found else None


# --- the steps ---------------------------------------------------------------------------------------------------


def import_buckets(target: Server, job: Job, lease: Lease) -> None:
    """The target: refuses everybody's writes to the buckets but this job's.

    :raises LockWait: open transactions hold a row.
    :raises RebalanceError: when the target says that the buckets are not another shard's.
    """
    with target.transaction():
        lease.check(target)
        change_ownership(
            target,
            job.keyspace,
            job.buckets,
            was={Owned.MOVED, Owned.IMPORTING},
            to=Owned.IMPORTING,
            moved_to=job.source,
            job=job.id,
        )


def freeze(source: Server, target: Server, job: Job, lease: Lease) -> None:
    """The source: waits for the open writers of the buckets, then refuses all later ones.

    :raises LockWait: a writer is still open after two seconds, or a branch of a transaction over shards is prepared.
    """
    if noted(source, job.id, "frozen") is not None:
        return
    epoch = 1 + max(
        row.epoch for side in (source, target) for row in read_ownership(side, job.keyspace, job.buckets).values()
    )
    source.run(f"SET SESSION innodb_lock_wait_timeout = {FREEZE_LOCK_SECONDS}")
    with source.transaction():
        lease.check(source)
        change_ownership(
            source,
            job.keyspace,
            job.buckets,
            was={Owned.OWNED},
            to=Owned.FROZEN,
            epoch=epoch,
            moved_to=job.target,
            job=job.id,
        )
        # MariaDB lets go of shared locks at XA PREPARE: such a writer is not waited for, and may yet commit.
        prepared = prepared_branches(source)
        if prepared:
            raise LockWait(f"{prepared} prepared XA transactions")
        note(source, job.id, "frozen", epoch)


def prepared_branches(server: Server) -> int:
    """Transactions between XA PREPARE and XA COMMIT on this server.

    :raises PreconditionFailed: when the account may not see them.
    """
    try:
        return len(server.rows("XA RECOVER"))
    except Exception as error:
        if error.args and error.args[0] == _XA_DENIED:
            raise PreconditionFailed(
                f"{server}: the account may not look for prepared XA transactions",
                hint="GRANT XA_RECOVER_ADMIN ON *.* to the account that SHARDKIT_USER names",
            ) from error
        raise


def activate(source: Server, target: Server, job: Job, lease: Lease) -> int:
    """The decision: from this commit on the target owns the buckets. It takes writes only after `open_buckets`.

    :returns: the target's epoch.
    """
    decided = noted(target, job.id, "activated")
    if decided is not None:
        return decided
    with target.transaction():
        lease.check(target)
        # Above both sides: a target that never had the buckets knows nothing of their earlier moves.
        epoch = 1 + max(
            row.epoch for side in (source, target) for row in read_ownership(side, job.keyspace, job.buckets).values()
        )
        change_ownership(
            target, job.keyspace, job.buckets, was={Owned.IMPORTING}, to=Owned.FROZEN, epoch=epoch, job=job.id
        )
        note(target, job.id, "activated", epoch)
    return epoch


def give_away(source: Server, job: Job, lease: Lease) -> None:
    """The source: the buckets are the target's for good."""
    with source.transaction():
        lease.check(source)
        change_ownership(
            source,
            job.keyspace,
            job.buckets,
            was={Owned.FROZEN, Owned.MOVED},
            to=Owned.MOVED,
            moved_to=job.target,
            job=job.id,
        )


def open_buckets(target: Server, job: Job, lease: Lease) -> None:
    """The target takes writes."""
    if noted(target, job.id, "opened") is not None:
        return
    with target.transaction():
        lease.check(target)
        change_ownership(target, job.keyspace, job.buckets, was={Owned.FROZEN}, to=Owned.OWNED, job=job.id)
        release(target, job)
        note(target, job.id, "opened", 0)


def release(server: Server, job: Job) -> None:
    """Take the job's name off its rows, in the caller's transaction. Touches no other row: they would be locked."""
    names = [str(bucket) for bucket in job.buckets]
    server.run(
        f"UPDATE shardkit_ownership SET job = NULL WHERE keyspace = %s AND bucket IN {in_list(names)} AND job = %s",
        job.keyspace,
        *names,
        job.id,
    )


def finish(server: Server, job: Job, lease: Lease, event: str) -> None:
    """The last note on one shard, behind everything that the job has written there."""
    with server.transaction():
        lease.check(server)
        release(server, job)
        server.run("DELETE FROM shardkit_job_cursor WHERE job = %s", job.id)
        note(server, job.id, event, 0)


# --- undoing -----------------------------------------------------------------------------------------------------


def give_up(target: Server, job: Job, lease: Lease) -> None:
    """The target: the buckets stay the source's.

    :raises RebalanceError: when the decision has fallen already.
    """
    with target.transaction():
        lease.check(target)
        if noted(target, job.id, "activated") is not None:
            raise RebalanceError(
                f"job {job.id}: {job.target} owns the buckets already: it can only be finished",
                job=job.id,
                hint="run 'shardkit rebalance apply' with its plan again",
            )
        change_ownership(
            target,
            job.keyspace,
            job.buckets,
            was={Owned.IMPORTING, Owned.MOVED},
            to=Owned.MOVED,
            moved_to=job.source,
            job=job.id,
        )


def thaw(source: Server, job: Job, lease: Lease) -> None:
    """The source takes writes again."""
    with source.transaction():
        lease.check(source)
        change_ownership(source, job.keyspace, job.buckets, was={Owned.FROZEN, Owned.OWNED}, to=Owned.OWNED, job=job.id)
        release(source, job)


# --- holding tables ----------------------------------------------------------------------------------------------


@contextmanager
def held(server: Server, tables: Iterable[str], wait: Callable[[float], None]) -> Iterator[Callable[[], None]]:
    """Keep tables from TRUNCATE and from all DDL, which triggers do not see: an open transaction that has read them.

    Yields a function that raises `RebalanceError` if the hold was lost.
    """

    def still() -> None:
        server.rows("SELECT 1")

    names: Sequence[str] = list(tables)
    while True:
        try:
            server.run("BEGIN")
            for name in names:
                server.rows(f"SELECT 1 FROM {quoted(name)} LIMIT 0")
            break
        except LockWait:  # somebody's DDL is under way
            wait(0.5)
    try:
        yield still
    finally:
        server.rollback()


def closed_text(job: Job) -> str:
    """What a stopped job leaves closed, for its last words."""
    return f"bucket {describe(job.buckets)} of {job.keyspace} takes no writes until it goes on or is cancelled"
