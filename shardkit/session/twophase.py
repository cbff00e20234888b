"""Transactions over several servers that end everywhere alike: prepare, decide, commit.

The first master that a transaction uses is the *decider* and holds an ordinary transaction, so a transaction on one
shard pays nothing. Every later master begins with ``XA START``, because XA cannot join a transaction that has already
read (server error 1400). Who wrote is known only at the end: branches that only read are dropped, one writer alone is
committed in one phase, and only several writers are prepared and decided over (`shardkit.decisions`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from sqlalchemy import Connection, exc
from sqlalchemy.engine.base import Transaction

from shardkit.decisions import TABLE, BranchId, Verdict, abort_undecided, new_transaction
from shardkit.decisions import Connection as PlainConnection
from shardkit.errors import CommitUnknown, ShardkitError

logger = logging.getLogger(__name__)

#: Runs calls on several connections at once and gives their answers in order.
Runner = Callable[[Sequence[Callable[[], None]]], Any]


class _State(Enum):
    ACTIVE = auto()  # between XA START and XA END
    ENDED = auto()
    PREPARED = auto()
    DONE = auto()  # committed or rolled back by us, or left to the janitor


@dataclass
class _Branch:
    """One shard's part."""

    id: BranchId
    connection: Connection
    state: _State = _State.ACTIVE

    def end(self) -> None:
        self._execute("END")
        self.state = _State.ENDED

    def prepare(self) -> None:
        self.end()
        self._execute("PREPARE")
        self.state = _State.PREPARED

    def commit(self) -> None:
        self._execute("COMMIT")
        self.state = _State.DONE

    def commit_in_one_phase(self) -> None:
        self.end()
        self._execute("COMMIT", " ONE PHASE")
        self.state = _State.DONE

    def rollback(self) -> None:
        if self.state is _State.ACTIVE:
            self.end()
        self._execute("ROLLBACK")
        self.state = _State.DONE

    def _execute(self, verb: str, ending: str = "") -> None:
        self.connection.exec_driver_sql(f"XA {verb} {self.id.literal}{ending}")

    def abandon(self, error: BaseException | None = None) -> None:
        """Let go of the connection: the server drops what is not prepared, the janitor ends what is."""
        self.state = _State.DONE
        if not self.connection.invalidated:
            self.connection.invalidate(error)


class TwoPhaseTransaction:
    """The masters of one session transaction under ``transactions="atomic"``.

    :param ready: called with the decider's shard before anything is prepared: makes sure that it can hold decisions.
    :param plain: shard -> a new DBAPI connection in autocommit mode, to look a decision up with.
    :param together: how statements on several connections run at once.
    """

    def __init__(
        self,
        *,
        ready: Callable[[str], None],
        plain: Callable[[str], PlainConnection],
        together: Callable[[Sequence[Connection]], Runner],
    ) -> None:
        self._ready = ready
        self._plain = plain
        self._together = together
        self._name = new_transaction()
        self._decider: tuple[str, Connection] | None = None
        self._branches: dict[str, _Branch] = {}
        self._decided = False

    def join(self, shard: str, connection: Connection) -> None:
        """Take in a master's connection on which nothing has run yet."""
        if self._decider is None:
            self._decider = (shard, connection)
            return
        branch = _Branch(BranchId(self._decider[0], self._name, shard, _connection_id(connection)), connection)
        connection.exec_driver_sql(f"XA START {branch.id.literal}")
        self._branches[shard] = branch

    def rollback(self) -> None:
        """Drop every branch that is still open. What has been decided stays decided."""
        if self._decided:
            return
        for branch in self._branches.values():
            if branch.state is _State.DONE:
                continue
            try:
                branch.rollback()
            except exc.DBAPIError as error:
                logger.info("a branch on %s was lost at rollback: %s", branch.id.shard, error)
                branch.abandon(error)

    def commit(self, written: Collection[str], decider: Transaction) -> tuple[str, ...]:
        """Commit what was written, everywhere or nowhere.

        :param written: the shards that were written to.
        :param decider: the decider's transaction.
        :returns: shards that are decided but could not be told; empty when all is done.
        :raises CommitUnknown: when the decider's answer was lost and it cannot be asked.
        """
        writers = [branch for shard, branch in self._branches.items() if shard in written]
        self._drop(branch for shard, branch in self._branches.items() if shard not in written)
        if self._decider is None:
            return ()  # no master took part
        shard, connection = self._decider
        if not writers:
            decider.commit()
            return ()
        if len(writers) == 1 and shard not in written:
            writers[0].commit_in_one_phase()
            decider.rollback()
            return ()
        self._prepare(shard, writers)
        self._decide(shard, connection, decider)
        return self._tell(writers)

    def _drop(self, readers: Iterable[_Branch]) -> None:
        for branch in readers:
            try:
                branch.rollback()
            except exc.DBAPIError as error:
                branch.abandon(error)

    def _prepare(self, decider: str, writers: Sequence[_Branch]) -> None:
        self._ready(decider)
        together = self._together([branch.connection for branch in writers])
        together([branch.prepare for branch in writers])

    def _decide(self, shard: str, connection: Connection, decider: Transaction) -> None:
        connection.exec_driver_sql(
            f"INSERT INTO {TABLE} (transaction_id, verdict) VALUES ('{self._name}', '{Verdict.COMMIT.value}')"
        )
        self._decided = True  # from here on nobody but the decision row says what becomes of the branches
        try:
            decider.commit()
        except exc.DBAPIError as error:
            if not error.connection_invalidated:
                self._decided = False  # the server answered: it did not commit
                raise
            self._look_up(shard, error)

    def _look_up(self, shard: str, error: exc.DBAPIError) -> None:
        """The answer to the deciding COMMIT was lost. A tombstone under its key settles it either way."""
        try:
            with closing(self._plain(shard)) as connection:
                found = abort_undecided(connection, self._name)
        except (exc.SQLAlchemyError, OSError, ShardkitError, *_driver_errors(error)) as again:
            logger.warning("the decision of transaction %s could not be looked up on %s: %s", self._name, shard, again)
            found = None
        if found is Verdict.COMMIT:
            return
        if found is Verdict.ABORT:
            self._decided = False
            raise error
        for branch in self._branches.values():
            branch.abandon(error)
        raise CommitUnknown(
            f"the answer to the COMMIT on shard {shard} that decides transaction {self._name} was lost",
            hint=f"it is durable everywhere if {TABLE} on {shard} holds it, and nowhere if not: the relay's janitor "
            "ends it within its period; look there before running it again",
        ) from error

    def _tell(self, writers: Sequence[_Branch]) -> tuple[str, ...]:
        pending: list[str] = []

        def tell(branch: _Branch) -> None:
            try:
                branch.commit()
            except exc.DBAPIError as error:
                logger.warning("transaction %s is decided, but %s: %s", self._name, branch.id.shard, error)
                branch.abandon(error)
                pending.append(branch.id.shard)

        def telling(branch: _Branch) -> Callable[[], None]:
            return lambda: tell(branch)

        self._together([branch.connection for branch in writers])([telling(branch) for branch in writers])
        return tuple(pending)

    def let_go(self) -> None:
        """Before the connections go back to their pools: none may carry an open branch."""
        for branch in self._branches.values():
            if branch.state is not _State.DONE:
                branch.abandon()


def _driver_errors(error: exc.DBAPIError) -> tuple[type[BaseException], ...]:
    """The driver's own error classes, as far as this error's class tells them: PEP 249's ``Error`` is the root."""
    return tuple(kind for kind in type(error.orig).__mro__ if kind.__name__ == "Error")


def _connection_id(connection: Connection) -> int:
    driver: Any = connection.connection.driver_connection
    number: int = driver.thread_id()  # known to the client since the handshake: no round trip, no transaction begun
    return number
