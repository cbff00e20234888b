"""A session's transaction: one map version, one endpoint a shard, and the commit over what was written.

The methods that replace SQLAlchemy's own are pinned by tests/unit/test_session_hooks.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, Engine, exc
from sqlalchemy.engine.base import Transaction
from sqlalchemy.orm import SessionTransaction, SessionTransactionOrigin
from sqlalchemy.orm.session import SessionTransactionState
from sqlalchemy.orm.state_changes import _StateChange, _StateChangeStates

from shardkit.cluster import Cluster
from shardkit.engines import MAP_VERSION_STAMP, ROLLED_BACK, has_rolled_back, is_down
from shardkit.errors import (
    CommitPending,
    CommitUnknown,
    PartialCommit,
    PartRolledBack,
    RoutingError,
    SecondShardWritten,
    ShardUnreachable,
    StaleShardMap,
)
from shardkit.gtid import Position
from shardkit.replicas.health import Replica
from shardkit.replicas.positions import Told, flavour_of, position_query
from shardkit.replicas.seeing import Seen, unwatch, watch
from shardkit.replicas.token import Mark
from shardkit.session.twophase import TwoPhaseTransaction, two_phase_for
from shardkit.snapshots import Pin, View
from shardkit.topology import ReplicationKind, Role

if TYPE_CHECKING:
    from shardkit.session.transacting import TransactingSession

logger = logging.getLogger(__name__)


class CommitMode(StrEnum):
    """What a transaction over several shards may do (``transactions=`` of `shardkit.sessionmaker`)."""

    SINGLE = "single"
    BEST_EFFORT = "best_effort"
    ATOMIC = "atomic"


class ReplanNeeded(StaleShardMap):
    """A server asked for a newer map before anything was sent, and the transaction has it now: plan again."""


class RoutedTransaction(SessionTransaction):
    """A savepoint, or what a flush runs in."""

    @_StateChange.declare_states((SessionTransactionState.ACTIVE,), _StateChangeStates.NO_CHANGE)
    def _begin(self, nested: bool = False) -> SessionTransaction:
        kind = SessionTransactionOrigin.BEGIN_NESTED if nested else SessionTransactionOrigin.SUBTRANSACTION
        return RoutedTransaction(self.session, kind, self)

    def connection(self, bindkey: Any, execution_options: Any = None, **options: Any) -> Any:
        """What a flush writes the rows of many-to-many tables on: it asks by the class that they lead to."""
        flush = cast("TransactingSession", self.session).flush_at_work
        if flush is not None and flush.over_several and self.session.connection_callable is not None:
            return flush.association
        return super().connection(bindkey, execution_options, **options)


class ClusterTransaction(RoutedTransaction):
    """The outermost transaction of a `ClusterSession`."""

    def __init__(self, session: TransactingSession, origin: SessionTransactionOrigin) -> None:
        self._cluster: Cluster = session.cluster
        self._asynchronous = session.asynchronous
        self._mode = session.commit_mode
        self._pin: Pin | None = None
        self._written: dict[str, None] = {}  # in order of the first write
        self._on_master: set[str] = set()
        self._replicas: dict[str, tuple[Replica, Engine]] = {}  # shard -> the replica that it reads
        self._lost: set[str] = set()  # shards that were read on a replica that was lost
        self._shard_of: dict[Engine | Connection, str] = {}
        self._masters: dict[str, Engine | Connection] = {}
        self._began_empty = True
        #: whether the statement at hand may wait for a shard to get another master
        self.patient = True
        #: shards on which this transaction has entered keys into a directory
        self.filed: set[str] = set()
        self._seen: dict[str, tuple[Connection, Seen]] = {}  # on replicas, by shard
        self._told: set[str] = set()  # shards whose commit's position is known
        self._closed = False
        #: (shard, whether from a replica) -> the connection that such reads go on
        self.reading: dict[tuple[str, bool], Connection] = {}
        self._given = session.connections
        # a connection that is given has its transaction already, which is its owner's to end
        atomic = self._mode is CommitMode.ATOMIC and self._given is None
        self._two_phase = two_phase_for(session) if atomic else None
        session.begun(self)  # before SQLAlchemy's own events, whose handlers may use the session
        super().__init__(session, origin)

    # --- the map

    @property
    def view(self) -> View:
        """The map that this transaction runs on, from its first use to its end."""
        if self._pin is None:
            self._pin = self._cluster.pin()
            self._session.use_view(self._pin.view)
        return self._pin.view

    def begin_statement(self) -> None:
        """Note whether anything has been sent before this statement: if not, it may be planned again."""
        self._began_empty = not self._connections
        self.patient = True

    # --- endpoints

    @property
    def written(self) -> tuple[str, ...]:
        """The shards written to so far."""
        return tuple(self._written)

    def shards_in_use(self) -> frozenset[str]:
        """The shards that this transaction talks to already."""
        return frozenset(self._shard_of.values())

    def admit_writes(self, shards: Iterable[str]) -> None:
        """Take note that these shards are written, before anything is sent.

        :raises SecondShardWritten: under ``single``, for a shard other than the first.
        """
        wanted = [shard for shard in shards if shard not in self._written]
        if not wanted:
            return
        if self._mode is CommitMode.SINGLE and len(self._written) + len(wanted) > 1:
            touched = [*self._written, *wanted]
            raise SecondShardWritten(
                f"the transaction would write to {len(touched)} shards: {', '.join(touched)}",
                hint="use a transaction for each shard, or sessionmaker(transactions='best_effort'); "
                "nothing has been committed",
            )
        if self._two_phase is not None and len(self._written) + len(wanted) > 1:
            self._check_can_be_undone(wanted)
        for shard in wanted:
            self._written[shard] = None

    def _check_can_be_undone(self, wanted: Iterable[str]) -> None:
        engines = [self._cluster.core_engine(shard, Role.MASTER, asynchronous=self._asynchronous) for shard in wanted]
        dialects: list[Any] = [engine.dialect for engine in engines]
        if any(dialect._on_connect_isolation_level == "AUTOCOMMIT" for dialect in dialects) or (  # noqa: SLF001 - see twophase
            self._two_phase is not None and self._two_phase.impossible
        ):
            raise SecondShardWritten(
                "the transaction would write to several shards, whose engines commit each statement by itself "
                "(AUTOCOMMIT): it could not be undone",
                hint="use engines without AUTOCOMMIT, or sessionmaker(transactions='best_effort'); nothing has been "
                "committed",
            )

    def bind_for(
        self, shard: str, *, master: bool, read_from_replica: bool, max_lag: float | None = None
    ) -> Engine | Connection:
        """The endpoint of a shard for one statement.

        A shard's reads stay on one replica until the transaction uses its master, and then on the master.

        :raises RoutingError: when the session was given connections, and none to this shard.
        """
        if self._given is not None:
            return self._given_to(shard, master=master)
        engine: Engine | Connection | None = None
        if master:
            self.turn_to_master(shard)
        elif read_from_replica and shard not in self._on_master and shard not in self._masters:
            engine = self._replica_of(shard, max_lag)
        if engine is None:
            # the same one to its end: after a promotion, what was written would be on another server than the rest
            engine = self._masters.get(shard) or self._master_of(shard)
            self._masters[shard] = engine
            self.reading.pop((shard, True), None)  # what is read from now on is no older than what the master shows
        self._shard_of[engine] = shard
        return engine

    def _master_of(self, shard: str) -> Engine:
        return self._cluster.core_engine(shard, Role.MASTER, asynchronous=self._asynchronous)

    def _replica_of(self, shard: str, max_lag: float | None) -> Engine | None:
        if shard not in self._replicas:
            chosen = None
            if self.view.map.shard(shard).replicas:
                chosen = self._cluster.choose_replica(
                    shard,
                    mark=self._session.mark_for(shard),
                    max_lag=max_lag,
                    asynchronous=self._asynchronous,
                    run_blocking=self._session.run_blocking,
                )
            if chosen is None:
                self._on_master.add(shard)
                return None
            self._replicas[shard] = chosen
        return self._replicas[shard][1]

    def _given_to(self, shard: str, *, master: bool) -> Connection:
        assert self._given is not None  # noqa: S101 - asked by the caller
        connection = self._given.get(shard)
        if connection is None:
            raise RoutingError(
                f"the session was given connections, and none to shard {shard}",
                hint="sessionmaker(cluster, connections={shard: connection}): name every shard that is used",
                shards=1,
            )
        if master:
            self.turn_to_master(shard)
        self._shard_of[connection] = shard
        self._masters[shard] = connection
        return connection

    @property
    def has_read_replicas(self) -> bool:
        """Whether rows were read from replicas of shards that are not used on their masters yet."""
        return bool(self._replicas or self._lost)

    def turn_to_master(self, shard: str) -> bool:
        """From now on this shard is used on its master; True when its rows were read from a replica before."""
        self._on_master.add(shard)
        self.reading.pop((shard, True), None)
        lost = shard in self._lost
        self._lost.discard(shard)
        return self._replicas.pop(shard, None) is not None or lost

    def _connection_for_bind(self, bind: Any, execution_options: Any) -> Connection:
        if bind in self._connections:
            return super()._connection_for_bind(bind, execution_options)
        unused = not self._connections or (self._began_empty and not self._written)
        try:
            connection = super()._connection_for_bind(bind, execution_options)
        except ShardUnreachable as error:
            if not unused or not is_down(error) or not self._has_new_master(bind):
                raise
            return self._connection_for_bind(self._new_master(bind), execution_options)
        connection.info.pop(ROLLED_BACK, None)
        required = connection.info.get(MAP_VERSION_STAMP, 0)
        if required > self.view.map.version:
            self._renew_map(required, bind, unused=unused)
            # only a master that was replaced comes here, before anything was sent
            self._let_go_of(bind)
            return self._connection_for_bind(self._new_master(bind), execution_options)
        if self._two_phase is not None:
            self._join_two_phase(bind, connection, self._two_phase)
        shard = self._shard_of.get(bind)
        if shard in self._replicas and self._masters.get(shard) is not bind:
            self._join_reading(shard, connection)
            self._watch(shard, connection)
        else:
            driver: Any = connection.connection.driver_connection
            if getattr(driver, "committed", None) is not None:
                driver.committed = None  # of whoever had this connection before
        return connection

    def _watch(self, shard: str, connection: Connection) -> None:
        """From now on note what is seen on a replica."""
        if connection.dialect.name != "sqlite":
            kind, flavour = self.view.map.shard(shard).replication, flavour_of(connection.dialect)
            seen = watch(connection, position_query(shard, Role.REPLICA, kind, flavour))
            self._seen[shard] = (connection, seen)

    def _join_reading(self, shard: str, connection: Connection) -> None:
        """A replica's part of the transaction is no reason for it to fail at its end."""
        replica, engine = self._replicas[shard]
        _, transaction, *rest = self._connections[engine]
        reading = _Reading(connection, transaction, lambda: self._cluster.eject(replica))
        entry = (connection, cast("Transaction", reading), *rest)
        self._connections[connection] = self._connections[engine] = cast("Any", entry)

    def leave_lost_replicas(self) -> bool:
        """Let go of replicas whose connections were lost, or never came to be; False where there are none."""
        lost = []
        for shard, (replica, engine) in self._replicas.items():
            entry = self._connections.get(engine)
            if entry is not None and not entry[0].invalidated:
                continue
            lost.append(shard)
            self._cluster.eject(replica)
            self._let_go_of(engine)
        for shard in lost:
            if shard in self._seen:
                self._tell_what_was_seen(shard, self._seen.pop(shard)[1])
            del self._replicas[shard]
            self.reading.pop((shard, True), None)
        self._lost.update(lost)  # what they have shown is still there
        return bool(lost)

    def _let_go_of(self, engine: Engine) -> None:
        entry = self._connections.pop(engine, None)
        if entry is not None:
            self._connections.pop(entry[0], None)
            entry[0].close()

    # --- a new master

    def _has_new_master(self, bind: Any) -> bool:
        """Whether the shard of a master that cannot be used has another one now; waits for it."""
        shard = self._shard_of.get(bind)
        if shard is None or self._masters.get(shard) is not bind or self._given is not None or not self.patient:
            return False
        return self._cluster.await_failover(shard, lambda: self._master_of(shard) is not bind, self._session.pause)

    def _new_master(self, bind: Any) -> Engine:
        """Go on by the newest map, at the master that it names.

        :raises StaleShardMap: where it has other rows on the shard, too.
        """
        shard, before = self._shard_of.pop(bind), self.view.map
        pin = self._cluster.pin()
        if (pin.view.map.keyspaces, pin.view.map.moves) != (before.keyspaces, before.moves):
            pin.release()
            raise StaleShardMap(
                f"shard {shard} has another master, and the shard map has changed otherwise, too",
                hint="roll back and run the transaction again",
            )
        if self._pin is not None:
            self._pin.release()
        self._pin = pin
        self._session.use_view(pin.view)
        engine = self._masters[shard] = self._master_of(shard)
        self._shard_of[engine] = shard
        logger.info("shard %s has a new master: the transaction goes on there", shard)
        return engine

    # --- what was written and seen

    def seen_so_far(self, may_ask: Callable[[Connection], bool]) -> Iterator[tuple[str, Mark, bool]]:
        """What has been read: positions of replicas, and of masters as they are now. With whether that covers all that
        was seen.

        :param may_ask: whether a master may be asked in passing, on this connection; without it the position is None,
            and the end of the transaction will tell.
        """
        if self._pin is None:
            return
        for shard, (_, seen) in self._seen.items():
            if seen.known:
                yield shard, Mark(self._epoch(shard), seen.position), False
        for shard, connection in self._masters_to_ask().items():
            yield shard, Mark(self._epoch(shard), position_of_master(connection) if may_ask(connection) else None), True

    def _tell_what_was_seen(self, shard: str, seen: Seen) -> None:
        if seen.known:
            self._session.tell(Told(shard, self._epoch(shard), seen.query, seen.text, all_of_it=False))

    def _epoch(self, shard: str) -> int:
        return self.view.map.shard(shard).epoch

    def _tell_what_was_committed(self, pending: CommitPending | None) -> None:
        for shard in self._written:
            engine = self._masters.get(shard)
            entry = None if engine is None else self._connections.get(engine)
            if entry is None or entry[0].dialect.name == "sqlite" or self._given is not None:
                continue
            connection = entry[0]
            if connection.closed or connection.invalidated or (pending is not None and shard in pending.shards):
                self._session.raise_token(shard, Mark(self._epoch(shard), None), all_of_it=True)
                continue
            asks = bool(self.view.map.shard(shard).replicas)
            told = position_of_commit(connection, shard, self._epoch(shard), asks=asks)
            if told is not None:
                self._session.tell(told)
                self._told.add(shard)

    def _tell_what_masters_showed(self) -> None:
        """Where a master was read: what was seen there is no newer than the master is now. A session that reads masters
        does not ask: whoever reads replicas afterwards, on its word, begins on the master."""
        for shard, connection in self._masters_to_ask().items():
            before = self._session.carried(shard)
            position = position_of_master(connection) if self._session.reads_replicas else None
            mark = Mark(self._epoch(shard), position)
            self._session.raise_token(shard, mark, all_of_it=True, instead_of=before)

    def _masters_to_ask(self) -> dict[str, Connection]:
        if self._given is not None:
            return {}
        found = {}
        for shard, engine in self._masters.items():
            entry = None if isinstance(engine, Connection) else self._connections.get(engine)
            if entry is None or shard in self._told or entry[0].dialect.name == "sqlite":
                continue
            if self.view.map.shard(shard).replicas:
                found[shard] = entry[0]
        return found

    def _join_two_phase(self, engine: Engine, connection: Connection, two_phase: TwoPhaseTransaction) -> None:
        shard = self._shard_of[engine]
        if self._masters.get(shard) is not engine:
            return  # a replica is no part of the commit
        held, transaction, *rest = self._connections[engine]
        entry = (held, cast("Transaction", two_phase.join(shard, connection, transaction)), *rest)
        self._connections[connection] = self._connections[engine] = cast("Any", entry)

    def _renew_map(self, required: int, bind: Any, *, unused: bool) -> None:
        """A server asks for a newer map than this transaction's.

        :param unused: nothing was sent yet: returns if there is a new master in place of this one, at which to go on.
        """
        began_with, shard = self.view.map.version, self._shard_of.get(bind)
        try:
            self._session.run_blocking(lambda: self._cluster.require(required))
        except StaleShardMap:  # a promotion asks for a map that is about to be published
            if (
                not (unused and self.patient)
                or shard is None
                or not self._cluster.await_failover(
                    shard, lambda: self._cluster.map.version >= required, self._session.pause
                )
            ):
                raise
        if unused and shard is not None and self._masters.get(shard) is bind is not self._master_of(shard):
            return
        if self._began_empty and not self._written:
            if self._pin is not None:
                self._pin.release()
            self._pin = None
            raise ReplanNeeded(
                f"a server asks for version {required} of the shard map; {began_with} was used",
                hint="run the transaction again: the map has been refreshed",
            )
        raise StaleShardMap(
            f"a server asks for version {required} of the shard map; this transaction began with {began_with}",
            hint="roll back and run the transaction again: the map has been refreshed",
        )

    @property
    def _session(self) -> TransactingSession:
        return cast("TransactingSession", self.session)

    # --- ending

    @_StateChange.declare_states(
        (SessionTransactionState.ACTIVE, SessionTransactionState.PREPARED), SessionTransactionState.CLOSED
    )
    def commit(self, _to_root: bool = False) -> None:
        """As SQLAlchemy's, but what was written is committed first and in order, and a failure says what is durable.

        :raises PartRolledBack: when one of several shards has undone what was written there.
        :raises PartialCommit: under ``best_effort``, when some shards committed and others did not.
        :raises CommitUnknown: when the answer of the one shard written to was lost, or the first one's with others
            still to be committed; under ``atomic``, when the deciding answer was lost and cannot be looked up.
        :raises CommitPending: under ``atomic``, when it is decided, but a shard could not be told.
        """
        if self._state is not SessionTransactionState.PREPARED:
            with self._expect_state(SessionTransactionState.PREPARED):
                self._prepare_impl()
        pending = self._commit_connections()
        self._session.note_commit(wrote=bool(self._written))
        self._tell_what_was_committed(pending)
        self._state = SessionTransactionState.COMMITTED
        self.session.dispatch.after_commit(self.session)
        self._remove_snapshot()
        with self._expect_state(SessionTransactionState.CLOSED):
            self.close()
        if pending is not None:
            raise pending

    def _commit_connections(self) -> CommitPending | None:
        held = {entry for entry in self._connections.values() if entry[2]}  # the others are their owner's to commit
        if not held:
            return None
        if len(self._written) > 1:
            self._check_no_part_is_gone()
        if len(held) == 1:
            ((_, transaction, *_),) = held
            with self._told_whether_committed():
                transaction.commit()
            return None
        if self._two_phase is not None and self._two_phase.spans:
            return self._commit_two_phase(self._two_phase, held)
        writers: list[tuple[str, Transaction]] = []
        # a key's entry before its rows: without it nobody finds them by their key
        for shard in sorted(self._written, key=lambda shard: shard not in self.filed):
            entry = self._connections.get(self._masters[shard]) if shard in self._masters else None
            if entry in held:
                writers.append((shard, entry[1]))
                held.discard(entry)
        self._commit_writers(writers)
        for connection, transaction, *_ in held:
            _end_reading(connection, transaction, by_commit=not connection.invalidated)
        return None

    def _check_no_part_is_gone(self) -> None:
        """An application may have gone on after a deadlock, which has undone what it had written there before."""
        for shard in self._written:
            engine = self._masters.get(shard)
            entry = None if engine is None else self._connections.get(engine)
            if entry is not None and has_rolled_back(entry[0]):
                raise PartRolledBack(
                    f"shard {shard} has rolled back its part of the transaction, because of a deadlock or a lock that "
                    "was waited for in vain: nothing has been committed",
                    hint="roll back and run the transaction again, from its beginning",
                )

    def _commit_two_phase(self, two_phase: TwoPhaseTransaction, held: set[Any]) -> CommitPending | None:
        outcome = "failed"
        try:
            with self._told_whether_committed():
                pending = two_phase.commit(self._written)
            outcome = "pending" if pending else "done"
        except CommitUnknown:
            outcome = "unknown"
            raise
        finally:
            self._cluster.metrics.commits.labels(outcome).inc()
        for connection, transaction, *_ in held:
            if transaction.is_active:  # the decider's has ended
                _end_reading(connection, transaction)
        return CommitPending(two_phase.name, pending) if pending else None

    def _commit_writers(self, writers: list[tuple[str, Transaction]]) -> None:
        committed: list[str] = []
        failed: dict[str, BaseException] = {}
        for shard, transaction in writers:
            try:
                transaction.commit()
            except exc.DBAPIError as error:
                if not committed and not failed:
                    if error.connection_invalidated:
                        raise _unknown(shard, error, others=len(writers) > 1) from error
                    raise  # nothing is durable
                failed[shard] = error
            else:
                committed.append(shard)
        if failed:
            for shard in committed:
                self._mark_ended(shard)
            raise PartialCommit(committed, failed)

    def _mark_ended(self, shard: str) -> None:
        """So that the rollback which follows a partial commit leaves alone what is durable."""
        connection, _, should_commit, autoclose = self._connections[self._masters[shard]]
        entry = (connection, cast("Transaction", _Ended()), should_commit, autoclose)
        self._connections[connection] = self._connections[connection.engine] = entry

    @contextmanager
    def _told_whether_committed(self) -> Iterator[None]:
        """The one shard that was written to is told to commit."""
        try:
            yield
        except exc.DBAPIError as error:
            if len(self._written) == 1 and error.connection_invalidated:
                (shard,) = self._written
                raise _unknown(shard, error, others=False) from error
            raise

    def close(self, invalidate: bool = False) -> None:
        """End the transaction and let go of its map."""
        try:
            if not self._closed:
                self._closed = True
                for shard, (_, seen) in self._seen.items():
                    self._tell_what_was_seen(shard, seen)
                self._tell_what_masters_showed()
                if self._replicas or self._seen or self._lost:
                    self._session.keep_in_mind({*self._replicas, *self._seen, *self._lost}, self.view)
                for connection, _ in self._seen.values():
                    unwatch(connection)
            super().close(invalidate)
        finally:
            if self._pin is not None:
                self._pin.release()


def _unknown(shard: str, error: exc.DBAPIError, *, others: bool) -> CommitUnknown:
    rest = ": its part may or may not be durable; the other shards are rolled back" if others else ""
    return CommitUnknown(
        f"the answer to COMMIT on shard {shard} was lost{rest or ': it may or may not be durable'} ({error.orig})",
        hint="look for the rows on that shard before running the transaction again",
    )


def position_of_commit(connection: Connection, shard: str, epoch: int, *, asks: bool) -> Told | None:
    """The position of the transaction that has just been committed here; None where it wrote nothing.

    It covers all that was seen before: servers number transactions in the order in which they commit them, and replicas
    commit them in that order (MariaDB: within each replication domain, which `Token.replaced` knows).

    :param asks: whether to ask a server that does not tell.
    """
    driver: Any = connection.connection.driver_connection
    flavour = flavour_of(connection.dialect)
    query = position_query(shard, Role.MASTER, ReplicationKind.RELAY, flavour)
    if getattr(driver, "tells", False):
        gtid, driver.committed = driver.committed, None
        return None if gtid is None else Told(shard, epoch, query, gtid, all_of_it=True)
    if not asks:
        return None
    try:
        gtid = connection.exec_driver_sql(f"SELECT {query.expression}").scalar()
    except exc.DBAPIError as error:
        logger.info("the position of a commit is not known: %s", error)
        gtid = None
    return Told(shard, epoch, query, gtid, all_of_it=True)


def position_of_master(connection: Connection) -> Position | None:
    """How far a master's log is; None where it cannot be asked, as while it sends the rows of a stream."""
    if connection.closed or connection.invalidated:
        return None
    driver: Any = connection.connection.driver_connection
    if getattr(getattr(driver, "_result", None), "unbuffered_active", False):
        return None
    query = position_query("", Role.MASTER, ReplicationKind.RELAY, flavour_of(connection.dialect))
    try:
        return query.read(connection.exec_driver_sql(f"SELECT {query.expression}").scalar())
    except (exc.DBAPIError, exc.PendingRollbackError) as error:  # the latter where the connection broke in a rollback
        logger.info("a master could not be asked for its position: %s", error)
        return None


class _Reading:
    """Stands for a transaction on a replica: it has nothing to lose when its server is gone at its end.

    :param lost: told of that.
    """

    def __init__(self, connection: Connection, transaction: Transaction, lost: Callable[[], None]) -> None:
        self._connection = connection
        self._transaction = transaction
        self._lost = lost

    @property
    def is_active(self) -> bool:
        return self._transaction.is_active

    def commit(self) -> None:
        """As one database would, since a function that a SELECT called may have written after all."""
        self._end(by_commit=not self._connection.invalidated)

    def rollback(self) -> None:
        self._end()

    close = rollback

    def _end(self, *, by_commit: bool = False) -> None:
        if not _end_reading(self._connection, self._transaction, by_commit=by_commit):
            self._lost()


class _Ended:
    """Stands for a transaction that has been committed."""

    is_active = False

    def rollback(self) -> None:
        """Nothing is left to be undone."""


def _end_reading(connection: Connection, transaction: Transaction, *, by_commit: bool = False) -> bool:
    """End a transaction that wrote nothing. Its server may be gone: what was read stays read.

    :param by_commit: as one database would, since a function that a SELECT called may have written after all.
    :returns: False where its connection was lost.
    """
    try:
        if by_commit:
            transaction.commit()
        else:
            transaction.rollback()
    except exc.DBAPIError as error:
        logger.info("a connection that only read was lost at the end of its transaction: %s", error)
        connection.invalidate(error)
        return False
    return True
