"""Where jobs are recorded: beside the shard map, in ZooKeeper or next to its file. Every write is a compare-and-set.

A job's record is also the lock on its buckets: jobs are created together or not at all, and never beside an unfinished
job that moves one of the same buckets.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from kazoo.exceptions import (
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    NodeExistsError,
    NoNodeError,
    OperationTimeoutError,
    RolledBackError,
    SessionExpiredError,
)
from kazoo.handlers.threading import KazooTimeoutError

from shardkit.errors import MapStoreUnavailable, PreconditionFailed, RebalanceError
from shardkit.mapstore import FileMapStore, MapStore, ZooKeeperMapStore
from shardkit.partition import format_buckets
from shardkit.rebalance.job import Job

TIMEOUT = 10.0  # seconds for one call
_AWAY = (ConnectionLoss, ConnectionClosedError, SessionExpiredError, OperationTimeoutError, KazooTimeoutError)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}")


class JobStore(Protocol):
    """Records of jobs, each with a revision that grows with every write."""

    def create(self, jobs: Sequence[Job]) -> None:
        """Record new jobs, all or none.

        :raises PreconditionFailed: when an unfinished job moves one of their buckets.
        """
        ...

    def load(self, job: str) -> tuple[Job, int]:
        """A job and its revision.

        :raises PreconditionFailed: when there is none of this name.
        """
        ...

    def save(self, job: Job, revision: int) -> int:
        """Replace a job's record, if it still has this revision.

        :returns: the new revision.
        :raises RebalanceError: when another coordinator has written it.
        """
        ...

    def jobs(self) -> Sequence[Job]:
        """Every job on record, oldest first."""
        ...


def open_job_store(store: MapStore) -> JobStore:
    """The place for jobs beside a map.

    :raises PreconditionFailed: for a map in memory: a job has to outlive its process.
    """
    if isinstance(store, ZooKeeperMapStore):
        return ZooKeeperJobStore(store)
    if isinstance(store, FileMapStore):
        return FileJobStore(store.path)
    raise PreconditionFailed(
        "buckets cannot be moved under a shard map that is in memory: a job has to outlive its process",
        hint="keep the map in ZooKeeper or in a file (file:shardmap.yaml)",
    )


def _checked_id(job: str) -> str:
    if not _ID.fullmatch(job):
        raise PreconditionFailed(f"{job!r} is not the name of a job", hint="see 'shardkit rebalance status'")
    return job


def _no_such_job(job: str) -> PreconditionFailed:
    return PreconditionFailed(f"there is no rebalance job {job}", hint="see 'shardkit rebalance status'")


def _displaced(job: Job) -> RebalanceError:
    return RebalanceError(
        f"job {job.id} was changed by another process: this one stops",
        job=job.id,
        hint="see 'shardkit rebalance status'; one process at a time works on a job",
    )


def _refuse_conflicts(new: Sequence[Job], there: Sequence[Job]) -> None:
    for job in new:
        for other in there:
            buckets = job.conflict(other)
            if buckets:
                raise PreconditionFailed(
                    f"job {other.id} ({other.state}) is moving bucket {format_buckets(buckets)} of {job.keyspace}",
                    hint=f"finish it ('shardkit rebalance apply' with plan {other.plan}), or cancel it: "
                    f"'shardkit rebalance cancel {other.id}'",
                )


class ZooKeeperJobStore:
    """``/shardkit/<cluster>/jobs/<id>``. The parent's version changes with every new job, which makes creation a
    compare-and-set over all jobs."""

    def __init__(self, store: ZooKeeperMapStore) -> None:
        self._store = store
        self._parent = store.path("jobs")

    def create(self, jobs: Sequence[Job]) -> None:
        """See `JobStore.create`."""
        client = self._store.client
        with self._available():
            self._wait(client.ensure_path_async(self._parent))
        while True:
            with self._available():
                _, stat = self._wait(client.get_async(self._parent))
            _refuse_conflicts(jobs, self.jobs())
            transaction = client.transaction()
            transaction.set_data(self._parent, b"", version=stat.version)
            for job in jobs:
                transaction.create(f"{self._parent}/{_checked_id(job.id)}", job.to_json().encode())
            with self._available():
                outcomes = self._wait(transaction.commit_async())
            failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            if not failures:
                return
            if any(isinstance(failure, NodeExistsError) for failure in failures):
                raise PreconditionFailed(
                    f"plan {jobs[0].plan} has been applied already", hint="see 'shardkit rebalance status'"
                )
            if not any(isinstance(failure, BadVersionError | RolledBackError) for failure in failures):
                raise failures[0]

    def load(self, job: str) -> tuple[Job, int]:
        """See `JobStore.load`."""
        with self._available():
            try:
                data, stat = self._wait(self._store.client.get_async(f"{self._parent}/{_checked_id(job)}"))
            except NoNodeError:
                raise _no_such_job(job) from None
        return Job.from_json(data), int(stat.version)

    def save(self, job: Job, revision: int) -> int:
        """See `JobStore.save`."""
        with self._available():
            try:
                stat = self._wait(
                    self._store.client.set_async(f"{self._parent}/{job.id}", job.to_json().encode(), version=revision)
                )
            except BadVersionError:
                raise _displaced(job) from None
            except NoNodeError:
                raise _no_such_job(job.id) from None
        return int(stat.version)

    def jobs(self) -> Sequence[Job]:
        """See `JobStore.jobs`."""
        client = self._store.client
        found: list[Job] = []
        with self._available():
            try:
                names = self._wait(client.get_children_async(self._parent))
            except NoNodeError:
                return ()
            for name in names:
                with contextlib.suppress(NoNodeError):
                    found.append(Job.from_json(self._wait(client.get_async(f"{self._parent}/{name}"))[0]))
        return tuple(sorted(found, key=lambda job: (job.created_at, job.id)))

    def _wait(self, result: Any) -> Any:
        return result.get(timeout=TIMEOUT)

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except _AWAY:
            raise MapStoreUnavailable(
                f"{self._store.source} does not answer: the job stops where it is",
                hint="run the same command again once ZooKeeper is back: it goes on from there",
            ) from None


class FileJobStore:
    """``shardmap.yaml.jobs/<id>.json`` beside the map's file, under one lock file.

    :param path: the map's file.
    """

    def __init__(self, path: Path) -> None:
        self._directory = path.with_name(f"{path.name}.jobs")

    def create(self, jobs: Sequence[Job]) -> None:
        """See `JobStore.create`. After a crash in the middle some of the jobs may be there; resuming adds the rest."""
        with self._locked():
            there = self.jobs()
            _refuse_conflicts(jobs, there)
            known = {job.id for job in there}
            if any(job.id in known for job in jobs):
                raise PreconditionFailed(
                    f"plan {jobs[0].plan} has been applied already", hint="see 'shardkit rebalance status'"
                )
            for job in jobs:
                self._write(job, 1)

    def load(self, job: str) -> tuple[Job, int]:
        """See `JobStore.load`."""
        try:
            return self._read(self._path(job))
        except FileNotFoundError:
            raise _no_such_job(job) from None

    def save(self, job: Job, revision: int) -> int:
        """See `JobStore.save`."""
        with self._locked():
            if self.load(job.id)[1] != revision:
                raise _displaced(job)
            self._write(job, revision + 1)
        return revision + 1

    def jobs(self) -> Sequence[Job]:
        """See `JobStore.jobs`."""
        found = [self._read(path)[0] for path in self._directory.glob("*.json")]
        return tuple(sorted(found, key=lambda job: (job.created_at, job.id)))

    def _path(self, job: str) -> Path:
        return self._directory / f"{_checked_id(job)}.json"

    def _read(self, path: Path) -> tuple[Job, int]:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Job.from_json(json.dumps(record["job"])), int(record["revision"])

    def _write(self, job: Job, revision: int) -> None:
        text = json.dumps({"revision": revision, "job": json.loads(job.to_json())}, indent=1)
        path = self._path(job.id)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=self._directory)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(Path(name).unlink, missing_ok=True)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._directory.mkdir(exist_ok=True)
            lock = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise MapStoreUnavailable(
                f"{self._directory} cannot be written: {error.strerror}", hint="mend the path or its permissions"
            ) from None
        deadline = time.monotonic() + TIMEOUT
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise MapStoreUnavailable(
                            f"another process has held {self._directory} for {TIMEOUT:g} s", hint="end it and try again"
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(lock)  # gives the lock back, too
