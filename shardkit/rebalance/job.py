"""A rebalance job: what it moves, its states, and which state may follow which. Pure.

A state is recorded before its effect: a record that says ``copying`` means that rows may have been copied, all, some or
none. So every effect can be run again, and a job whose coordinator died goes on by running the effect of the recorded
state once more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from shardkit.errors import RebalanceError
from shardkit.partition import Bucket, format_buckets, parse_buckets

FORMAT = 1


class State(StrEnum):
    """Where a job stands: the state whose effect is at work or done."""

    PLANNED = "planned"
    """Recorded, its buckets locked against other jobs; nothing has been touched."""
    PREPARED = "prepared"
    """Tables, ownership rows and triggers on both shards; every client knows of the move."""
    FREEZING = "freezing"
    """The source stops taking writes for the buckets."""
    FROZEN = "frozen"
    """No open transaction can write them any more; the tables are held against TRUNCATE and DDL."""
    COPYING = "copying"
    """Rows are copied in chunks, the cursor in the transaction of each."""
    VERIFYING = "verifying"
    """Checksums of both sides are compared."""
    ACTIVATED = "activated"
    """The decision: the target owns the buckets. From here it only goes forward."""
    PUBLISHED = "published"
    """The map names the target; when every client has it, the target takes writes."""
    CLEANING = "cleaning"
    """The source's rows are deleted in chunks; then the move leaves the map."""
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    """Being undone: the source takes writes again, the target's copy is deleted."""
    CANCELLED = "cancelled"


#: The one table of what may follow what. The first of each is the usual way.
TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    State.PLANNED: (State.PREPARED, State.CANCELLED),
    State.PREPARED: (State.FREEZING, State.CANCELLING),
    State.FREEZING: (State.FROZEN, State.CANCELLING),
    State.FROZEN: (State.COPYING, State.CANCELLING),
    State.COPYING: (State.VERIFYING, State.CANCELLING),
    State.VERIFYING: (State.ACTIVATED, State.CANCELLING),
    # back, when its coordinator died before the decision: what was verified then may have changed since
    State.ACTIVATED: (State.PUBLISHED, State.VERIFYING),
    State.PUBLISHED: (State.CLEANING,),
    State.CLEANING: (State.COMPLETED,),
    State.COMPLETED: (),
    State.CANCELLING: (State.CANCELLED,),
    State.CANCELLED: (),
}
FINAL = frozenset(state for state, following in TRANSITIONS.items() if not following)
#: States in which writes to the moving buckets may be refused by both shards.
CLOSED = frozenset(
    {State.FREEZING, State.FROZEN, State.COPYING, State.VERIFYING, State.ACTIVATED, State.PUBLISHED, State.CANCELLING}
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the job is in its state.

    :param table: the table at work.
    :param done: rows so far, of ``total``.
    """

    table: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Job:
    """One transfer of buckets from one shard to another.

    :param plan: the plan that it is part of.
    :param state: see `State`.
    :param map_version: the version that the plan was made for.
    :param moving_version: the version that names the move; None before.
    :param published_version: the version that places the buckets on the target; None before.
    :param rows: counted by the plan: rows to move.
    :param size: counted by the plan: bytes of their values.
    :param problem: why the last coordinator stopped; empty where it did not.
    """

    id: str
    plan: str
    keyspace: str
    buckets: tuple[Bucket, ...]
    source: str
    target: str
    state: State
    map_version: int
    rows: int
    size: int
    created_at: datetime
    updated_at: datetime
    moving_version: int | None = None
    published_version: int | None = None
    coordinator: str = ""
    progress: Progress | None = None
    problem: str = ""

    @property
    def final(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in FINAL

    @property
    def summary(self) -> str:
        """One line for people."""
        count = len(self.buckets)
        return (
            f"{self.id}: {count} {'bucket' if count == 1 else 'buckets'} of {self.keyspace} "
            f"{self.source} -> {self.target}, {self.state}"
        )

    def to(self, state: State) -> Job:
        """The job in another state.

        :raises RebalanceError: when that state may not follow.
        """
        if state not in TRANSITIONS[self.state]:
            raise RebalanceError(
                f"job {self.id} is {self.state}: it cannot become {state}",
                job=self.id,
                hint="see 'shardkit rebalance status'",
            )
        return replace(self, state=state, progress=None, problem="")

    @property
    def next(self) -> State:
        """The state that usually follows."""
        return TRANSITIONS[self.state][0]

    def conflict(self, other: Job) -> tuple[Bucket, ...]:
        """The buckets that both jobs move, when both are unfinished."""
        if self.final or other.final or self.id == other.id or self.keyspace != other.keyspace:
            return ()
        theirs = set(other.buckets)
        return tuple(bucket for bucket in self.buckets if bucket in theirs)

    # --- as JSON

    def document(self) -> dict[str, Any]:
        """As plain data: the record's content, and the ``--json`` of the command line."""
        progress = self.progress
        return {
            "format": FORMAT,
            "id": self.id,
            "plan": self.plan,
            "keyspace": self.keyspace,
            "buckets": format_buckets(self.buckets),
            "source": self.source,
            "target": self.target,
            "state": str(self.state),
            "map_version": self.map_version,
            "rows": self.rows,
            "bytes": self.size,
            "created_at": self.created_at.isoformat(),
            "updated_at": self.updated_at.isoformat(),
            "moving_version": self.moving_version,
            "published_version": self.published_version,
            "coordinator": self.coordinator,
            "progress": None
            if progress is None
            else {"table": progress.table, "done": progress.done, "total": progress.total},
            "problem": self.problem,
        }

    def to_json(self) -> str:
        """For a store."""
        return json.dumps(self.document())

    @classmethod
    def from_json(cls, text: str | bytes) -> Job:
        """The opposite of `to_json`.

        :raises RebalanceError: for what is not a job of this version of shardkit.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields["format"] != FORMAT:
                raise RebalanceError(
                    f"job {fields['id']} was written in format {fields['format']}, this shardkit reads {FORMAT}",
                    job=fields["id"],
                    hint="run it with the version of shardkit that began it",
                )
            progress = fields["progress"]
            return cls(
                id=fields["id"],
                plan=fields["plan"],
                keyspace=fields["keyspace"],
                buckets=tuple(parse_buckets(fields["buckets"])),
                source=fields["source"],
                target=fields["target"],
                state=State(fields["state"]),
                map_version=fields["map_version"],
                rows=fields["rows"],
                size=fields["bytes"],
                created_at=datetime.fromisoformat(fields["created_at"]),
                updated_at=datetime.fromisoformat(fields["updated_at"]),
                moving_version=fields["moving_version"],
                published_version=fields["published_version"],
                coordinator=fields["coordinator"],
                progress=None if progress is None else Progress(**progress),
                problem=fields["problem"],
            )
        except (KeyError, ValueError, TypeError) as error:
            raise RebalanceError(f"a rebalance job cannot be read: {error!r}") from error


def now() -> datetime:
    """The time that records carry, in UTC."""
    return datetime.now(UTC)
