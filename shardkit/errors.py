"""Every error that shardkit raises on purpose.

Each says what happened, where, and, in ``hint``, what to do about it. No message holds a password: endpoints print
without credentials (`shardkit.topology.Endpoint`), and what somebody has typed into a URL is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Self

from sqlalchemy import exc as sa_exc

#: What a URL, or what is left of one, says between its scheme and its host; people put passwords there.
_IN_URLS = re.compile(r"(?<=://)[^\s'\"]*@")
_WITHOUT_SCHEME = re.compile(r"(?<![\w/@.-])([\w.-]+):(?!//)[^\s/@'\"]+@(?=[\w\[])")


def _without_secrets(text: str) -> str:
    return _WITHOUT_SCHEME.sub(r"\1:***@", _IN_URLS.sub("***@", text))


class ShardkitError(Exception):
    """The root of the tree.

    :param message: what happened, and to what.
    :param hint: the fix, as one sentence that can be acted on; shown by the command line under the message.
    """

    #: What the command line exits with: 1 failed, 3 differences found, 4 precondition not met, 5 partly applied.
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _without_secrets(message)
        self.hint = hint
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


# --- shard map ---------------------------------------------------------------------------------------------------


class ShardMapError(ShardkitError):
    """Something is wrong with a shard map, or with where it is kept."""

    exit_code = 4


class InvalidShardMap(ShardMapError):
    """A shard map was refused. ``problems`` lists every fault found, each with its line and its fix."""

    def __init__(self, problems: Sequence[str], *, source: str | None = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        where = f"{source}: " if source else ""
        count = len(self.problems)
        head = f"{where}the shard map has {count} {'fault' if count == 1 else 'faults'}"
        super().__init__("\n  ".join([head + ":", *self.problems]))


class UnknownTable(ShardMapError, sa_exc.InvalidRequestError):
    """A table, keyspace, shard or bucket that the shard map does not name."""


class MapConflict(ShardMapError):
    """The map was changed by somebody else between reading and publishing it; nothing was written."""


class MapNotFound(ShardMapError):
    """No shard map, or no such version of it, has been published there."""


class MapStoreUnavailable(ShardMapError):
    """The place that holds the shard map could not be reached, and no map has been loaded yet."""


# --- routing -----------------------------------------------------------------------------------------------------


class RoutingError(ShardkitError, sa_exc.InvalidRequestError):
    """A statement that shardkit will not run as asked. Nothing was sent to any database.

    :param table: the table that could not be routed, where there is one.
    :param key: its key columns.
    :param shards: how many shards the statement would have touched.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        table: str | None = None,
        key: Sequence[str] = (),
        shards: int | None = None,
    ) -> None:
        ShardkitError.__init__(self, message, hint=hint)
        self.table = table
        self.key = tuple(key)
        self.shards = shards


class MissingKey(RoutingError):
    """A row to be inserted has no value, or none that can be trusted, for its key column."""


class KeyChange(RoutingError):
    """A key column would change: the row would have to move to another shard."""


class ScatterRefused(RoutingError):
    """A statement without a key would touch several shards where that is not allowed."""


class CrossShardJoin(RoutingError):
    """Two tables are put together whose rows live on different shards."""


# --- running statements and transactions -------------------------------------------------------------------------


class ShardError(ShardkitError):
    """A shard failed to answer. ``shard`` names it."""

    def __init__(self, message: str, *, shard: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.shard = shard


class DeadlineExceeded(ShardError):
    """A statement ran past its deadline; it was killed on the server and its connection discarded."""


class NoFreshReplica(ShardError):
    """Every replica is too far behind and the master may take no more reads."""


class InvalidToken(ShardkitError):
    """A text that should be a token is none, or not one that we signed."""


class StaleReadError(ShardkitError):
    """An object that was read from a replica is not as its row is on the master: writing it would undo a change.

    Retryable: roll back, read again, and write. `shardkit.retry` does.
    """


class StaleShardMap(ShardkitError):
    """The statement's bucket has moved, or is moving. Retryable: the map has been refreshed.

    ``moved_to`` names the new shard when the database said so.
    """

    def __init__(self, message: str, *, moved_to: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.moved_to = moved_to


class TransactionError(ShardkitError):
    """A transaction over shards did not end as asked."""


class PartRolledBack(TransactionError):
    """A server had rolled back its part of a transaction over shards; nothing has been committed anywhere.

    Retryable.
    """


class SecondShardWritten(TransactionError, sa_exc.InvalidRequestError):
    """With ``transactions="single"`` a transaction wrote to a second shard. Nothing was committed."""


class PartialCommit(TransactionError):
    """With ``transactions="best_effort"`` some shards committed and others did not.

    :param committed: shards whose part is durable.
    :param failed: shard -> the error of its commit.
    """

    exit_code = 5

    def __init__(self, committed: Sequence[str], failed: Mapping[str, BaseException]) -> None:
        self.committed = tuple(committed)
        self.failed = dict(failed)
        done = ", ".join(self.committed) or "none"
        causes = "; ".join(f"{shard}: {error}" for shard, error in self.failed.items())
        super().__init__(
            f"the transaction committed on {done} but not on {', '.join(self.failed)} ({causes})",
            hint="compare the rows on the shards named and repair them; transactions='atomic' cannot end like this",
        )


class CommitUnknown(TransactionError):
    """The answer to COMMIT was lost: the transaction may or may not be durable. Never replayed by shardkit."""


class CommitPending(TransactionError):
    """The transaction over shards is decided and will be committed everywhere, but some shards have yet to do it.

    The janitor (in the relay, or ``shardkit doctor --transactions``) finishes them; until then their rows stay locked
    and unseen. Do not run the transaction again.

    :param transaction: its name in ``shardkit_decision``.
    :param shards: the shards that have yet to commit.
    """

    exit_code = 5

    def __init__(self, transaction: str, shards: Sequence[str]) -> None:
        self.transaction = transaction
        self.shards = tuple(shards)
        super().__init__(
            f"transaction {transaction} is decided, but {', '.join(self.shards)} could not be told yet",
            hint="the relay's janitor commits it there; do not run it again",
        )


# --- servers and operations --------------------------------------------------------------------------------------


class PreconditionFailed(ShardkitError):
    """Something that has to hold before a command starts does not; nothing was changed."""

    exit_code = 4


class MissingServer(PreconditionFailed):
    """A server program (MariaDB, MySQL, ZooKeeper) that a local cluster needs is not installed."""


class ServerFailed(PreconditionFailed):
    """A server process of our own did not start, or ended by itself. ``log`` holds the last lines that it wrote."""

    def __init__(self, message: str, *, log: str, hint: str | None = None) -> None:
        self.log = log
        lines = "".join(f"\n  {line}" for line in log.splitlines())
        told = f"the end of its log:{lines}" if lines else "it logged nothing"
        super().__init__(f"{message}; {told}", hint=hint)


class Unreachable(PreconditionFailed):
    """A database server refused or did not answer a connection."""


class DifferencesFound(ShardkitError):
    """A comparison found differences."""

    exit_code = 3


class ShardUnreachable(ShardError, Unreachable, sa_exc.OperationalError):
    """A shard's server could not be reached, or refused the log-on.

    Also a `sqlalchemy.exc.OperationalError`, so that handlers written for one database go on working.

    :param orig: the driver's own error.
    """

    def __init__(self, message: str, *, shard: str, orig: BaseException, hint: str | None = None) -> None:
        sa_exc.OperationalError.__init__(self, None, None, orig)
        self.message = message
        self.hint = hint
        self.shard = shard

    def __str__(self) -> str:
        return ShardkitError.__str__(self)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_unreachable, (self.message, self.shard, self.orig, self.hint)


def _rebuild_unreachable(message: str, shard: str, orig: BaseException, hint: str | None) -> ShardUnreachable:
    return ShardUnreachable(message, shard=shard, orig=orig, hint=hint)


class PartlyApplied(ShardkitError):
    """A command did part of its work; running it again goes on from there."""

    exit_code = 5


# --- relay -------------------------------------------------------------------------------------------------------


class RelayError(ShardkitError):
    """The relay stopped a hop. ``hop`` names it; ``at`` gives the binlog coordinates where that helps."""

    def __init__(self, message: str, *, hop: str | None = None, at: str | None = None, hint: str | None = None) -> None:
        place = " ".join(part for part in (f"hop {hop}:" if hop else "", message, f"(at {at})" if at else "") if part)
        super().__init__(place, hint=hint)
        self.text = message
        self.hop = hop
        self.at = at

    def of_hop(self, hop: str, *, at: str | None = None) -> Self:
        """The same error naming its hop and its place, for those found where these are not known."""
        if self.hop and (self.at or not at):
            return self
        return type(self)(self.text, hop=self.hop or hop, at=self.at or at, hint=self.hint)


class BadEvent(RelayError):
    """A binlog event that is corrupt, truncated, or of a kind that cannot be replayed."""


class Drift(RelayError):
    """The target's rows or tables are not what the source's log says they were."""


class Interrupted(RelayError):
    """A server went away, or asked to try again: the hop goes on by itself from the position in its target."""


class PositionLost(RelayError):
    """The source no longer has the log from this hop's position on, or is not the server that the position is of."""

    exit_code = 4


class Fenced(RelayError):
    """Another runner has taken over this hop: the position is not where this runner left it."""


# --- rebalance ---------------------------------------------------------------------------------------------------


class RebalanceError(ShardkitError):
    """A rebalance job cannot go on. ``job`` names it."""

    exit_code = 5  # the same command goes on

    def __init__(self, message: str, *, job: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.job = job


class JobStopped(RebalanceError):
    """A rebalance job was told to stop, and did so at a safe point. The same command goes on from there."""

    exit_code = 130


class BucketClosed(StaleShardMap):
    """The database refused a write: the bucket is being moved, or has moved."""
