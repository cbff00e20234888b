"""What a shard's own table says of a revision that stopped in the middle. `shardkit.migrate.journal` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from shardkit.own_tables import migration_steps as STEPS  # noqa: N812 - a table, used as a constant


class StepState(StrEnum):
    """How far a noted statement has come."""

    STARTED = "started"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A revision that stopped in the middle.

    :param direction: ``up`` or ``down``.
    :param done: how many of its statements stand in the database.
    :param statement: the one that failed or was cut off, where there is one.
    :param cut_off: whether it is unknown if that statement was completed.
    :param error: what the database or the revision said; none where the process was killed.
    """

    revision: str
    direction: str
    done: int = 0
    statement: str | None = None
    cut_off: bool = False
    error: str | None = None

    @property
    def half_applied(self) -> bool:
        """Whether something of the revision is, or may be, in the database."""
        return self.done > 0 or self.cut_off

    def describe(self) -> str:
        """One line for people."""
        verb = "upgrade to" if self.direction == "up" else "downgrade of"
        if self.error is None:
            where = f" in: {self.statement}" if self.statement else ""
            stopped = f"was cut off{where}"
        else:
            stopped = f"failed: {self.error}"
        if self.done:
            stands = f"{self.done} {'statement' if self.done == 1 else 'statements'} of it applied"
        elif self.cut_off:
            stands = "its first statement may have been completed"
        else:
            stands = "nothing of it applied"
        return f"the {verb} {self.revision} {stopped} ({stands})"


def unfinished(connection: sa.Connection, version_table: str) -> Unfinished | None:
    """The revision that stopped in the middle on this shard, if there is one."""
    if not sa.inspect(connection).has_table(STEPS.name):
        return None
    rows = connection.execute(
        sa.select(STEPS).where(STEPS.c.version_table == version_table).order_by(STEPS.c.ordinal)
    ).all()
    if not rows:
        return None
    stopped = next((row for row in reversed(rows) if row.state != StepState.DONE), None)
    return Unfinished(
        revision=rows[-1].revision,
        direction=rows[-1].direction,
        done=sum(row.state == StepState.DONE for row in rows),
        statement=stopped.statement if stopped is not None else None,
        cut_off=any(row.state == StepState.STARTED for row in rows),
        error=stopped.error if stopped is not None else None,
    )


def forget(connection: sa.Connection, version_table: str) -> None:
    """Delete a shard's notes: its revision will run from its first statement."""
    connection.execute(STEPS.delete().where(STEPS.c.version_table == version_table))
    connection.commit()
