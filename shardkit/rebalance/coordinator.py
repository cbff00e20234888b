"""The process that carries a job through its states: its record, its stopping and waiting, and who watches.

The record is written first, then the effect of the new state runs (`shardkit.rebalance.stages`); every effect can run
again.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field, replace
from typing import Protocol

from shardkit.credentials import CredentialSource
from shardkit.errors import JobStopped, MapStoreUnavailable, ShardkitError
from shardkit.mapstore import MapStore
from shardkit.rebalance import cutover
from shardkit.rebalance.failpoint import reach
from shardkit.rebalance.job import CLOSED, Job, Progress, State, now
from shardkit.rebalance.jobstore import JobStore


@dataclass(frozen=True, slots=True)
class Settings:
    """How a job is run.

    :param rows_per_second: the most rows to copy, and to delete, in a second; None for as fast as it goes.
    :param client_patience: seconds that processes get to take up a new map.
    :param replica_patience: seconds that replicas get to apply a change of their master.
    :param freeze_patience: seconds over which the freeze is tried again behind open transactions.
    :param table_patience: seconds over which making a trigger is tried again behind open transactions.
    """

    rows_per_second: float | None = None
    client_patience: float = 60.0
    replica_patience: float = 60.0
    freeze_patience: float = 60.0
    table_patience: float = 60.0


class Observer(Protocol):
    """Whoever wants to know how a job goes."""

    def entered(self, job: Job) -> None:
        """The job is in another state."""
        ...

    def progressed(self, job: Job, progress: Progress) -> None:
        """So many rows are copied, compared or deleted."""
        ...

    def noted(self, job: Job, text: str) -> None:
        """Something worth a line."""
        ...


class Silence:
    """Nobody does."""

    def entered(self, job: Job) -> None:
        """Nothing."""

    def progressed(self, job: Job, progress: Progress) -> None:
        """Nothing."""

    def noted(self, job: Job, text: str) -> None:
        """Nothing."""


@dataclass
class Coordinator:
    """One run of a job: what its stages share.

    :param stop: when it is set, the job stops at the next safe point.
    """

    store: MapStore
    jobs: JobStore
    credentials: CredentialSource
    job: Job
    revision: int
    settings: Settings = field(default_factory=Settings)
    observer: Observer = field(default_factory=Silence)
    stop: threading.Event = field(default_factory=threading.Event)

    # --- the record

    def take(self, name: str) -> None:
        """Read the record again and put our name on it. Only for who holds the job's lock on the source."""
        job, self.revision = self.jobs.load(self.job.id)
        self.save(replace(job, coordinator=name))

    def advance(self, state: State) -> None:
        """Record the next state, before its effect."""
        self.save(self.job.to(state))
        self.observer.entered(self.job)
        reach(str(state))

    def save(self, job: Job) -> None:
        """Write the record."""
        changed = replace(job, updated_at=now())
        self.revision = self.jobs.save(changed, self.revision)
        self.job = changed

    def last_words(self, error: BaseException) -> None:
        """Note why the job stopped. Where even that cannot be written, the record keeps its state all the same."""
        if isinstance(error, MapStoreUnavailable):
            return
        problem = error.message if isinstance(error, ShardkitError) else f"{type(error).__name__}"
        with contextlib.suppress(ShardkitError):
            self.revision = self.jobs.save(replace(self.job, problem=problem, updated_at=now()), self.revision)

    # --- stopping and waiting

    def check(self) -> None:
        """A safe point: stop here if told to.

        :raises JobStopped: if so.
        """
        if self.stop.is_set():
            closed = f": {cutover.closed_text(self.job)}" if self.job.state in CLOSED else ""
            raise JobStopped(
                f"job {self.job.id} stopped while {self.job.state}{closed}",
                job=self.job.id,
                hint="run the same command again to go on",
            )

    def wait(self, seconds: float) -> None:
        """Wait, but not past a call to stop."""
        self.stop.wait(seconds)
        self.check()
