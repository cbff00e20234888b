"""Transactions over several servers that end everywhere alike: prepare, decide, commit.

The first master that a transaction uses is the *decider* and holds an ordinary transaction, so a transaction on one
shard pays nothing. Every later master begins with ``XA START``, because XA cannot join a transaction that has already
read (server error 1400). Who wrote is known only at the end: branches that only read are dropped, one writer alone is
committed in one phase, and only several writers are prepared and decided over (`shardkit.decisions`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, Engine, exc
from sqlalchemy.engine.base import Transaction

from shardkit.decisions import TABLE, BranchId, Verdict, abort_undecided, new_transaction
from shardkit.decisions import Connection as PlainConnection
from shardkit.engines import wait_briefly
from shardkit.errors import CommitUnknown
from shardkit.session.parallel import runner_for

if TYPE_CHECKING:
    from shardkit.session.transacting import TransactingSession

logger = logging.getLogger(__name__)

_LOOK_UPS = 5  # each waits a second for the decider's row lock

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
    :param settle: shard and transaction -> what holds there, after putting a tombstone where nothing was decided.
    :param together: how statements on several connections run at once.
    """

    def __init__(
        self,
        *,
        ready: Callable[[str], None],
        settle: Callable[[str, str], Verdict | None],
        together: Callable[[Sequence[Connection]], Runner],
    ) -> None:
        self._ready = ready
        self._settle = settle
        self._together = together
        self._decider: tuple[str, Connection, Transaction] | None = None
        self._branches: dict[str, _Branch] = {}
        self._decided = False
        #: Whether a connection commits each statement by itself, so that nothing can be undone.
        self.impossible = False

    def join(self, shard: str, connection: Connection, transaction: Transaction) -> Transaction | BranchTransaction:
        """Take in a master's connection on which nothing has run yet.

        :returns: what the session is to end in place of ``transaction``.
        """
        if self._decider is None:
            self._decider = (shard, connection, transaction)
            return transaction
        if commits_by_itself(connection) or commits_by_itself(self._decider[1]):
            self.impossible = True
            return transaction
        decider, deciding, _ = self._decider
        for each in (deciding, connection):
            wait_briefly(each)
        identity = BranchId(decider, self.name, shard, _connection_id(connection), _connection_id(deciding))
        branch = _Branch(identity, connection)
        connection.exec_driver_sql(f"XA START {branch.id.literal}")
        self._branches[shard] = branch
        return BranchTransaction(self, branch, transaction)

    @cached_property
    def name(self) -> str:
        """Its name in ``shardkit_decision``; made up when a second master takes part."""
        return new_transaction()

    @property
    def decided(self) -> bool:
        """Whether the deciding COMMIT has been sent: from there on no branch is rolled back from here."""
        return self._decided

    @property
    def spans(self) -> bool:
        """Whether more than one master takes part."""
        return bool(self._branches)

    def commit(self, written: Collection[str]) -> tuple[str, ...]:
        """Commit what was written, everywhere or nowhere.

        :param written: the shards that were written to.
        :returns: shards that are decided but could not be told; empty when all is done.
        :raises CommitUnknown: when the decider's answer was lost and it cannot be asked.
        """
        writers = [branch for shard, branch in self._branches.items() if shard in written]
        readers = [branch for shard, branch in self._branches.items() if shard not in written]
        if self._decider is None:
            return ()  # no master took part
        shard, connection, decider = self._decider
        pending: tuple[str, ...] = ()
        if not writers:
            decider.commit()
        elif len(writers) == 1 and shard not in written:
            writers[0].commit_in_one_phase()
            self._end_reading(shard, connection, decider.commit)
        else:
            self._prepare(shard, writers)
            self._decide(shard, connection, decider)
            pending = self._tell(writers)
        for branch in readers:
            self._end_reading(branch.id.shard, branch.connection, branch.commit_in_one_phase)
        return pending

    def _end_reading(self, shard: str, connection: Connection, commit: Callable[[], None]) -> None:
        """End what only read, by COMMIT: a function that a SELECT called may have written after all."""
        try:
            commit()
        except exc.DBAPIError as error:
            logger.info("the part of %s, which only read, was lost at the end of its transaction: %s", shard, error)
            if not connection.invalidated:
                connection.invalidate(error)

    def _prepare(self, decider: str, writers: Sequence[_Branch]) -> None:
        self._ready(decider)
        together = self._together([branch.connection for branch in writers])
        together([branch.prepare for branch in writers])

    def _decide(self, shard: str, connection: Connection, decider: Transaction) -> None:
        connection.exec_driver_sql(
            f"INSERT INTO {TABLE} (transaction_id, verdict) VALUES ('{self.name}', '{Verdict.COMMIT.value}')"
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
            found = self._settle(shard, self.name)
        except Exception as again:  # noqa: BLE001 - whatever it was, the decision is not known, and the caller is told
            logger.warning("the decision of transaction %s could not be looked up on %s: %s", self.name, shard, again)
            found = None
        if found is Verdict.COMMIT:
            return
        if found is Verdict.ABORT:
            self._decided = False
            raise error
        for branch in self._branches.values():
            branch.abandon(error)
        raise CommitUnknown(
            f"the answer to the COMMIT on shard {shard} that decides transaction {self.name} was lost",
            hint=f"it is durable everywhere if {TABLE} on {shard} holds it, and nowhere if not: the relay's janitor, "
            "or shardkit doctor --transactions, ends it; look there before running it again",
        ) from error

    def _tell(self, writers: Sequence[_Branch]) -> tuple[str, ...]:
        pending: list[str] = []

        def tell(branch: _Branch) -> None:
            try:
                branch.commit()
            except exc.DBAPIError as error:
                logger.warning("transaction %s is decided, but %s: %s", self.name, branch.id.shard, error)
                branch.abandon(error)
                pending.append(branch.id.shard)

        def telling(branch: _Branch) -> Callable[[], None]:
            return lambda: tell(branch)

        self._together([branch.connection for branch in writers])([telling(branch) for branch in writers])
        return tuple(pending)


def commits_by_itself(connection: Connection) -> bool:
    """Whether each statement on this connection is a transaction of its own."""
    dialect: Any = connection.dialect
    level = connection._execution_options.get("isolation_level") or dialect._on_connect_isolation_level  # noqa: SLF001 - what its public reader would ask the server for
    return bool(level == "AUTOCOMMIT")


class BranchTransaction:
    """Stands for a branch's SQLAlchemy transaction where a session ends it: XA has to be ended first.

    A plain ROLLBACK inside a branch is refused by the server (1399).
    """

    def __init__(self, owner: TwoPhaseTransaction, branch: _Branch, transaction: Transaction) -> None:
        self._owner = owner
        self._branch = branch
        self._transaction = transaction

    @property
    def is_active(self) -> bool:
        """As of the transaction that it stands for."""
        return self._transaction.is_active

    def rollback(self) -> None:
        """Roll the branch back, unless it is done or decided."""
        self._leave()
        self._transaction.rollback()

    def close(self) -> None:
        """The same, where the session is closed."""
        self._leave()
        self._transaction.close()

    def commit(self) -> None:
        """The branch has been committed or dropped already: end the transaction that it stands for."""
        self._leave()
        self._transaction.commit()

    def _leave(self) -> None:
        if self._branch.state is _State.DONE:
            return
        if self._owner.decided or self._branch.connection.invalidated:
            self._branch.abandon()
            return
        try:
            self._branch.rollback()
        except exc.DBAPIError as error:
            logger.info("a branch on %s was lost at rollback: %s", self._branch.id.shard, error)
            self._branch.abandon(error)


def two_phase_for(session: TransactingSession) -> TwoPhaseTransaction:
    """The two-phase side of a session's new transaction. Costs nothing until a second master takes part."""
    cluster = session.cluster

    def settle(shard: str, transaction: str) -> Verdict | None:
        with closing(_plain_connection(cluster.engine(shard))) as connection:
            for _ in range(_LOOK_UPS):  # the server may still be at work on the very COMMIT
                found = abort_undecided(connection, transaction)
                if found is not None:
                    return found
        return None

    return TwoPhaseTransaction(
        ready=lambda shard: session.run_blocking(lambda: cluster.ensure_own_tables(shard)),
        settle=lambda shard, transaction: session.run_blocking(lambda: settle(shard, transaction)),
        together=lambda connections: runner_for(connections, asynchronous=session.asynchronous),
    )


def _plain_connection(engine: Engine) -> PlainConnection:
    """A DBAPI connection of its own, in autocommit mode."""
    pooled = engine.raw_connection()
    connection: Any = pooled.driver_connection
    pooled.detach()
    connection.autocommit(True)
    return cast("PlainConnection", connection)


def _connection_id(connection: Connection) -> int:
    driver: Any = connection.connection.driver_connection
    number: int = driver.thread_id()  # known to the client since the handshake: no round trip, no transaction begun
    return number
