"""What migrations found and did, shard by shard. Values for people, for ``--json`` and for tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shardkit.errors import DifferencesFound, PartlyApplied, PreconditionFailed, ShardkitError
from shardkit.migrate.notes import Unfinished


class State(StrEnum):
    """Where a shard stands."""

    UP_TO_DATE = "up to date"
    BEHIND = "behind"
    UNFINISHED = "unfinished"
    UNKNOWN = "unknown"
    UNREACHABLE = "unreachable"


class Ending(StrEnum):
    """How a shard's part of a command ended."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Standing:
    """One shard's place in the tree.

    :param revisions: what its version table says; empty before the first revision.
    :param targets: what it is compared with.
    :param pending: the revisions in between, in order.
    :param unfinished: a revision that stopped in the middle.
    :param problem: why the rest is not known.
    """

    shard: str
    endpoint: str
    revisions: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    unfinished: Unfinished | None = None
    problem: str | None = None
    reachable: bool = True

    @property
    def half_done(self) -> bool:
        """Whether some statements of an unfinished revision are in its database."""
        return self.unfinished is not None and self.unfinished.done > 0

    @property
    def state(self) -> State:
        """In one word."""
        if not self.reachable:
            return State.UNREACHABLE
        if self.problem is not None:
            return State.UNKNOWN
        if self.unfinished is not None:
            return State.UNFINISHED
        return State.BEHIND if self.pending else State.UP_TO_DATE

    @property
    def detail(self) -> str:
        """What to know beside the state."""
        if self.problem is not None:
            return self.problem
        if self.unfinished is not None:
            return self.unfinished.describe()
        return f"{len(self.pending)} to run: {', '.join(self.pending)}" if self.pending else ""

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        stopped = self.unfinished
        return {
            "shard": self.shard,
            "endpoint": self.endpoint,
            "state": self.state,
            "revisions": self.revisions,
            "targets": self.targets,
            "pending": self.pending,
            "unfinished": None
            if stopped is None
            else {
                "revision": stopped.revision,
                "direction": stopped.direction,
                "half_applied": stopped.half_applied,
                "statements_done": stopped.done,
                "statement": stopped.statement,
                "cut_off": stopped.cut_off,
                "error": stopped.error,
            },
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class ShardResult:
    """One shard's part of an upgrade or downgrade.

    :param before: its revisions before.
    :param applied: the revisions that were applied, or reverted, in order.
    :param standing: where it stands afterwards, read from the shard.
    :param seconds: how long its process ran.
    """

    shard: str
    ending: Ending
    before: tuple[str, ...]
    applied: tuple[str, ...]
    standing: Standing
    error: str | None = None
    hint: str | None = None
    seconds: float = 0.0

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "shard": self.shard,
            "ending": self.ending,
            "before": self.before,
            "applied": self.applied,
            "error": self.error,
            "hint": self.hint,
            "seconds": round(self.seconds, 3),
            "standing": self.standing.document(),
        }


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """A whole upgrade or downgrade.

    :param command: ``upgrade`` or ``downgrade``.
    :param revision: as asked for.
    :param interrupted: Ctrl-C: the revisions that were under way have been completed, no other was begun.
    """

    command: str
    revision: str
    cluster: str
    results: tuple[ShardResult, ...]
    interrupted: bool = False

    def failure(self) -> ShardkitError | None:
        """`PartlyApplied` where some of it was done, another error where none of it was, None where all of it was."""
        failed = [result for result in self.results if result.ending is Ending.FAILED]
        left = [result for result in self.results if result.ending in {Ending.STOPPED, Ending.NOT_RUN}]
        if not failed and not left:
            return None
        done = [result.shard for result in self.results if result.ending is Ending.DONE]
        hint = failed[0].hint if failed and failed[0].hint else "mend what is named, then run the same command again"
        if failed:
            what = f"the {self.command} failed on " + "; ".join(f"{one.shard}: {one.error}" for one in failed)
        else:
            what, hint = f"the {self.command} was stopped", "run the same command again: it goes on from there"
        if left and failed:
            what += f"; not begun on {', '.join(one.shard for one in left)}"
        if done or any(result.applied or result.standing.half_done for result in self.results):
            return PartlyApplied(f"{what}; complete on {', '.join(done) or 'no shard'}", hint=hint)
        return ShardkitError(what, hint=hint)

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "command": self.command,
            "revision": self.revision,
            "cluster": self.cluster,
            "interrupted": self.interrupted,
            "shards": [result.document() for result in self.results],
        }


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """One shard compared with the tree and with the models.

    :param differences: one line each.
    """

    standing: Standing
    differences: tuple[str, ...] = ()
    error: str | None = None

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**self.standing.document(), "differences": self.differences, "error": self.error}


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Every shard compared."""

    cluster: str
    checks: tuple[ShardCheck, ...]

    def failure(self) -> ShardkitError | None:
        """`DifferencesFound`, or `PreconditionFailed` where a shard could not be compared; None where all is equal."""
        if broken := [check for check in self.checks if check.error is not None]:
            return PreconditionFailed(
                "not compared: " + "; ".join(f"{check.standing.shard}: {check.error}" for check in broken)
            )
        different = [check.standing.shard for check in self.checks if check.differences]
        if not different:
            return None
        return DifferencesFound(
            f"{', '.join(different)} {'differs' if len(different) == 1 else 'differ'} from the tree or the models",
            hint="`shardkit migrate upgrade` brings shards to the head; `shardkit migrate revision --autogenerate` "
            "writes the revision that the models need",
        )

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"cluster": self.cluster, "shards": [check.document() for check in self.checks]}
