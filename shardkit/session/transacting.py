"""Sessions and their transactions: begun on one map version, admitted to write, turned from replicas to masters."""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakSet

from sqlalchemy import Connection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, SessionTransactionOrigin

from shardkit.cluster import Cluster
from shardkit.drivers import adopt
from shardkit.errors import ShardkitError, TransactionError
from shardkit.replicas.positions import Told
from shardkit.replicas.token import Mark, Token
from shardkit.routing.route import RouteOptions, ScatterPolicy
from shardkit.session.carrying import current_carrier
from shardkit.session.flush import Flush
from shardkit.session.homes import home_of
from shardkit.session.inplace import LoadedCopies
from shardkit.session.parallel import pause, run_blocking
from shardkit.session.transaction import ClusterTransaction, CommitMode
from shardkit.session.writtenalong import written_along
from shardkit.snapshots import View

T = TypeVar("T")
ReadFrom = Literal["master", "replica"]
#: Connections that the application has already, by shard.
GivenConnections: TypeAlias = Mapping[str, Connection | AsyncConnection]


class Target(NamedTuple):
    """Where one statement goes.

    :param master: it changes or locks rows.
    :param replica: it may read from a replica.
    :param max_lag: seconds that such a replica may be behind; None: as the cluster says.
    """

    shard: str
    master: bool
    replica: bool
    max_lag: float | None = None


#: Positions are read once so many have been told, or when they are asked for.
_MOST_TOLD = 32


class TransactingSession(Session):
    """A session whose transactions are `ClusterTransaction`s."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        read_from: ReadFrom = "master",
        transactions: str = "atomic",
        scatter: ScatterPolicy = "allow",
        asynchronous: bool = False,
        connections: GivenConnections | None = None,
        token: Token | None = None,
        recheck: bool = True,
        **options: Any,
    ) -> None:
        self.cluster = cluster
        self._token = token or Token()
        self._carrier = current_carrier()
        self._told: list[Told] = []
        self._recheck = recheck
        self.asynchronous = asynchronous
        self.commit_mode = CommitMode(transactions)
        self.connections = None if connections is None else _checked(connections, cluster)
        self._from_replica = read_from == "replica"
        self._route_options = RouteOptions(policy=scatter)
        self._root: ClusterTransaction | None = None
        #: Whether the last transaction has been committed, whatever handlers of its end did afterwards.
        self.committed = False
        self._carried: Target | None = None
        self._given_options: Any = None
        #: the flush that runs now
        self.flush_at_work: Flush | None = None
        self._map_version = 0
        self._unplaced: WeakSet[InstanceState[Any]] = WeakSet()
        self._from_replicas: WeakSet[InstanceState[Any]] = WeakSet()
        self.loaded_copies = LoadedCopies()
        super().__init__(**options)

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._transaction is not None:
            return self._transaction
        if not begin and not self.autobegin:
            raise InvalidRequestError(
                "Autobegin is disabled on this Session; please call session.begin() to start a new transaction"
            )
        origin = SessionTransactionOrigin.BEGIN if begin else SessionTransactionOrigin.AUTOBEGIN
        return ClusterTransaction(self, origin)

    @property
    def token(self) -> Token:
        """What this session has written and seen: another session that is given it sees nothing older.

        Under asyncio, a transaction that has read a master should be ended first: until then its token asks for the
        master.
        """
        self._take_in()
        token = self._token if self._carrier is None else self._token.merged(self._carrier.token)
        asks = self.reads_replicas and not self.asynchronous
        for shard, mark, all_of_it in self.seen_so_far(lambda _: asks):
            token = (Token.replaced if all_of_it else Token.raised)(token, shard, mark)
        return token

    def seen_so_far(self, may_ask: Callable[[Connection], bool]) -> Iterable[tuple[str, Mark, bool]]:
        """What the open transaction has read. See `ClusterTransaction.seen_so_far`."""
        root = self._root
        return () if root is None or self._transaction is None else root.seen_so_far(may_ask)

    def mark_for(self, shard: str) -> Mark | None:
        """What a read of this shard has to show; None: anything will do."""
        if not self._told and not self._token and self._carrier is None:
            return None  # the usual case
        return self.token.mark(shard)

    def tell(self, told: Told) -> None:
        """Take note of what was written or seen; read when it is asked for."""
        self._told.append(told)
        if self._carrier is not None or len(self._told) > _MOST_TOLD:
            self._take_in()

    def _take_in(self) -> None:
        told, self._told = self._told, []
        for each in told:
            self.raise_token(each.shard, each.mark, all_of_it=each.all_of_it)

    def raise_token(self, shard: str, mark: Mark, *, all_of_it: bool, instead_of: Mark | None = None) -> None:
        """Take note of what was written or seen.

        :param all_of_it: whether the mark covers everything that this session has written and seen on the shard.
        :param instead_of: what the work that this session belongs to had noted before; covered, too, in that case.
        """
        if self._told:
            self._take_in()
        take = Token.replaced if all_of_it else Token.raised
        self._token = take(self._token, shard, mark)
        if self._carrier is not None:
            self._carrier.note(shard, mark, all_of_it=all_of_it, instead_of=instead_of)

    def carried(self, shard: str) -> Mark | None:
        """What the work that this session belongs to has noted of a shard."""
        return None if self._carrier is None else self._carrier.token.marks.get(shard)

    @property
    def reads_replicas(self) -> bool:
        """Whether this session reads from replicas unless told otherwise."""
        return self._from_replica

    @contextmanager
    def reading_masters(self) -> Iterator[None]:
        """Meanwhile nothing is read from replicas, unless a statement says so."""
        before, self._from_replica = self._from_replica, False
        try:
            yield
        finally:
            self._from_replica = before

    def begun(self, transaction: ClusterTransaction) -> None:
        """Take a new outermost transaction."""
        self._root = transaction
        self.committed = False
        if self._carrier is not None:
            self._carrier.join(self)

    def note_commit(self, *, wrote: bool) -> None:
        """The outermost transaction has been committed."""
        self.committed = True
        if wrote and self._carrier is not None:
            self._carrier.wrote = True

    def _outermost(self) -> ClusterTransaction:
        if self._transaction is None:
            self._autobegin_t()
        return cast("ClusterTransaction", self._root)

    def admit_writes(self, shards: Collection[str]) -> None:
        """Take note that the transaction writes to these shards; where it may not, roll it back.

        :raises SecondShardWritten: under ``transactions="single"``.
        """
        try:
            self._outermost().admit_writes(shards)
        except TransactionError:
            if not self._flushing:  # a flush rolls back by itself
                self._deactivate()
            raise
        self._turn_to_masters(shards)

    def connection_to_write(self, shard: str) -> Connection:
        """The connection of this transaction to a shard's master; the shard counts as written."""
        self.admit_writes((shard,))
        return self._connection_for_bind(self.get_bind(shardkit_target=Target(shard, master=True, replica=False)))

    def _turn_to_masters(self, shards: Iterable[str]) -> None:
        """Objects that were read from a replica may be older than the master's rows: read them again there."""
        transaction = self._outermost()
        turning = {shard for shard in shards if transaction.turn_to_master(shard)}
        if not turning:
            return
        written = {*self._deleted, *self._written_along()}
        for state in self.identity_map.all_states():
            if turning.isdisjoint(self._shards_of(state, transaction.view)):
                continue
            if state.modified or state in written:
                self._from_replicas.add(state)
            else:
                state._expire(state.dict, self.identity_map._modified)

    def _written_along(self) -> set[InstanceState[Any]]:
        """Loaded objects that the next flush writes because of their relationships to others."""
        return written_along([*self._new, *self._dirty_states, *self._deleted], self._deleted)

    def keep_in_mind(self, shards: Collection[str], view: View) -> None:
        """A transaction ends that has read these shards on replicas: what stays loaded may be behind the masters."""
        if self.expire_on_commit:
            return
        for state in self.identity_map.all_states():
            if not self._from_replicas.isdisjoint((state,)) or not state.dict:
                continue
            if not set(shards).isdisjoint(self._shards_of(state, view)):
                self._from_replicas.add(state)

    def to_recheck(self, states: Iterable[InstanceState[Any]]) -> list[InstanceState[Any]]:
        """Those of these objects whose values came from a replica."""
        if not self._recheck or not self._from_replicas:
            return []
        return [state for state in states if state in self._from_replicas]

    def copy_loaded(self, state: InstanceState[Any], names: Collection[str]) -> None:
        """These values of an object have just been loaded, and may be changed in place."""
        if not self._recheck or not names:
            return
        reads_replicas = self._root is not None and self._root.has_read_replicas
        if reads_replicas or state in self.loaded_copies:
            self.loaded_copies.take(state, names)

    def forget_replicas(self, states: Iterable[InstanceState[Any]]) -> None:
        """The values of these objects are those of the master."""
        self._from_replicas.difference_update(states)

    def _shards_of(self, state: InstanceState[Any], view: View) -> tuple[str, ...]:
        token = None if state.key is None else state.key[2]
        return home_of(view, state.mapper).info.shards if token is None else (token,)

    def _deactivate(self) -> None:
        """Roll back as a failed flush does: the session asks for `rollback` before it goes on."""
        transaction = self._transaction
        if transaction is not None:
            transaction._begin().rollback(_capture_exception=True)

    def use_view(self, view: View) -> None:
        """A transaction begins on this map."""

    def wait_for_masters(self, patient: bool) -> None:
        """Whether the statement at hand waits for a shard without a master to get another one."""
        self._outermost().patient = patient

    def pause(self, seconds: float) -> None:
        """Sleep; an event loop goes on meanwhile."""
        pause(seconds, asynchronous=self.asynchronous)

    def run_blocking(self, call: Callable[[], T]) -> T:
        """A call that waits for something other than a database; an event loop goes on meanwhile."""
        return run_blocking(call, asynchronous=self.asynchronous)


def _checked(given: GivenConnections, cluster: Cluster) -> dict[str, Connection]:
    """:raises ShardkitError: for what is no connection to a shard, or is the connection to two of them."""
    connections: dict[str, Connection] = {}
    for shard, each in given.items():
        connection = each.sync_connection if isinstance(each, AsyncConnection) else each
        if not isinstance(connection, Connection):
            raise ShardkitError(
                f"connections: what is given for shard {shard} is no open connection: {type(each).__name__}",
                hint="give cluster.engine(shard).connect()",
            )
        if shard not in cluster.map.shards:
            raise ShardkitError(
                f"connections: no shard is named {shard!r}", hint=f"the shards are {', '.join(cluster.map.shards)}"
            )
        if connection in connections.values():
            raise ShardkitError(
                f"connections: shard {shard} has the connection of another shard", hint="give each shard one of its own"
            )
        connections[shard] = connection
        if not connection.closed and not connection.invalidated:
            adopt(connection.connection)
    return connections
