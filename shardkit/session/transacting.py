"""Sessions and their transactions: begun on one map version, admitted to write, turned from replicas to masters."""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakSet

from sqlalchemy import Connection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import InstanceState, Session, SessionTransaction, SessionTransactionOrigin

from shardkit.cluster import Cluster
from shardkit.errors import ShardkitError, TransactionError
from shardkit.routing.route import RouteOptions, ScatterPolicy
from shardkit.session.flush import Flush
from shardkit.session.homes import home_of
from shardkit.session.parallel import run_blocking
from shardkit.session.transaction import ClusterTransaction, CommitMode
from shardkit.snapshots import View

T = TypeVar("T")
ReadFrom = Literal["master", "replica"]
#: Connections that the application has already, by shard.
GivenConnections: TypeAlias = Mapping[str, Connection | AsyncConnection]


class Target(NamedTuple):
    """Where one statement goes.

    :param master: it changes or locks rows.
    :param replica: it may read from a replica.
    """

    shard: str
    master: bool
    replica: bool


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
        **options: Any,
    ) -> None:
        self.cluster = cluster
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
        self._flush_at_work: Flush | None = None
        self._map_version = 0
        self._unplaced: WeakSet[InstanceState[Any]] = WeakSet()
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

    def begun(self, transaction: ClusterTransaction) -> None:
        """Take a new outermost transaction."""
        self._root = transaction
        self.committed = False

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
        for state in self.identity_map.all_states():
            if not state.modified and not turning.isdisjoint(self._shards_of(state, transaction.view)):
                state._expire(state.dict, self.identity_map._modified)

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
    return connections
