"""A SQLAlchemy Session over the shards of a cluster.

What differs from `sqlalchemy.orm.Session`: each statement is planned and sent to the shards that its rows are on; each
object is written on the shard of its key. The methods that replace SQLAlchemy's own are pinned by
tests/unit/test_session_hooks.py.
"""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, TypeVar, cast
from weakref import WeakSet

from sqlalchemy import Connection, Engine, Executable, Result, Select, select
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.exc import InvalidRequestError, MultipleResultsFound, UnboundExecutionError
from sqlalchemy.orm import (
    InstanceState,
    Mapper,
    ORMExecuteState,
    Session,
    SessionTransaction,
    SessionTransactionOrigin,
    loading,
)
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.base import PassiveFlag
from sqlalchemy.orm.context import QueryContext
from sqlalchemy.sql import coercions, roles
from sqlalchemy.sql.base import CompileState
from sqlalchemy.util import EMPTY_DICT, immutabledict

from shardkit.cluster import Cluster
from shardkit.errors import RoutingError, StaleShardMap, TransactionError
from shardkit.routing.merge import merge_rows
from shardkit.routing.route import Route, RouteOptions, ScatterPolicy, StatementKind
from shardkit.session.flush import Flush
from shardkit.session.homes import home_of
from shardkit.session.inserts import filled
from shardkit.session.parallel import run_blocking
from shardkit.session.results import WriteResult, empty, merged
from shardkit.session.scatter import select_from_several
from shardkit.session.transaction import ClusterTransaction, CommitMode, ReplanNeeded
from shardkit.snapshots import View

T = TypeVar("T")
ReadFrom = Literal["master", "replica"]

#: The bind argument that says where a statement goes, once that is decided.
TARGET = "shardkit_target"
_LOAD_OPTIONS = "_sa_orm_load_options"
_ORM_SELECT: Any = CompileState.plugins["orm", "select"]
_PARENT_LOAD = "sa_top_level_orm_context"  # set on the statements of selectin and other loaders


class ScatterWarning(UserWarning):
    """A read touched several shards under ``scatter="warn"``."""


class NoSingleBind(RoutingError, UnboundExecutionError):
    """A bind was asked for, and several shards may be meant."""


class Target(NamedTuple):
    """Where one statement goes.

    :param master: it changes or locks rows.
    :param replica: it may read from a replica.
    """

    shard: str
    master: bool
    replica: bool


class ClusterSession(Session):
    """A `sqlalchemy.orm.Session` whose statements and objects go to the shards of their keys.

    Made by `shardkit.sessionmaker`, which documents the options.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        read_from: ReadFrom = "master",
        transactions: str = "atomic",
        scatter: ScatterPolicy = "allow",
        asynchronous: bool = False,
        **options: Any,
    ) -> None:
        self.cluster = cluster
        self.asynchronous = asynchronous
        self.commit_mode = CommitMode(transactions)
        self._read_from = read_from
        self._route_options = RouteOptions(policy=scatter)
        self._root: ClusterTransaction | None = None
        self._carried: Target | None = None
        self._flush_at_work: Flush | None = None
        self._map_version = 0
        self._unplaced: WeakSet[InstanceState[Any]] = WeakSet()
        super().__init__(**options)

    # --- transactions

    def _autobegin_t(self, begin: bool = False) -> SessionTransaction:
        if self._transaction is not None:
            return self._transaction
        if not begin and not self.autobegin:
            raise InvalidRequestError(
                "Autobegin is disabled on this Session; please call session.begin() to start a new transaction"
            )
        origin = SessionTransactionOrigin.BEGIN if begin else SessionTransactionOrigin.AUTOBEGIN
        self._root = ClusterTransaction(self, origin)
        return self._root

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

    def run_blocking(self, call: Callable[[], T]) -> T:
        """A call that waits for something other than a database; an event loop goes on meanwhile."""
        return run_blocking(call, asynchronous=self.asynchronous)

    # --- statements

    def _execute_internal(
        self,
        statement: Executable,
        params: Any = None,
        *,
        execution_options: Any = EMPTY_DICT,
        bind_arguments: Any = None,
        _parent_execute_state: ORMExecuteState | None = None,
        _add_event: Any = None,
        _scalar_result: bool = False,
    ) -> Any:
        if bind_arguments and (TARGET in bind_arguments or "bind" in bind_arguments):
            return super()._execute_internal(
                statement,
                params,
                execution_options=execution_options,
                bind_arguments=bind_arguments,
                _parent_execute_state=_parent_execute_state,
                _add_event=_add_event,
                _scalar_result=_scalar_result,
            )
        if self.dispatch.do_orm_execute or _parent_execute_state is not None or _add_event is not None:
            # handlers may change the statement: it is planned after the last of them
            return super()._execute_internal(
                statement,
                params,
                execution_options=execution_options,
                bind_arguments=bind_arguments,
                _parent_execute_state=_parent_execute_state,
                _add_event=self._planned_after(_add_event),
                _scalar_result=_scalar_result,
            )
        if not isinstance(statement, Executable):
            statement = coercions.expect(roles.StatementRole, statement)
        return self._route(statement, params, execution_options, bind_arguments, None, _scalar_result)

    def _planned_after(self, event: Callable[[ORMExecuteState], Any] | None) -> Callable[[ORMExecuteState], Any]:
        def plan_and_run(state: ORMExecuteState) -> Any:
            answer = None if event is None else event(state)
            if answer is not None or TARGET in state.bind_arguments or "bind" in state.bind_arguments:
                return answer
            options = immutabledict(state.local_execution_options).union(state._update_execution_options)
            return self._route(state.statement, state.parameters, options, state.bind_arguments, state, scalar=False)

        return plan_and_run

    def _route(
        self,
        statement: Any,
        params: Any,
        options: Mapping[str, Any],
        bind_arguments: Mapping[str, Any] | None,
        parent: ORMExecuteState | None,
        scalar: bool,
    ) -> Any:
        try:
            return self._plan_and_run(statement, params, options, bind_arguments, parent, scalar)
        except ReplanNeeded:
            if _identity_of(options) is not None:
                raise  # whoever chose the shard has to choose again
            return self._plan_and_run(statement, params, options, bind_arguments, parent, scalar)

    def _plan_and_run(
        self,
        statement: Any,
        params: Any,
        options: Mapping[str, Any],
        bind_arguments: Mapping[str, Any] | None,
        parent: ORMExecuteState | None,
        scalar: bool,
    ) -> Any:
        transaction = self._outermost()
        transaction.begin_statement()
        view = transaction.view
        route_options, read_from = self._route_options, self._read_from
        if options or statement._execution_options or self.execution_options:
            token = _identity_of(options)
            if token is not None:  # get() and refresh of an object whose shard is known
                refreshed = options[_LOAD_OPTIONS]._refresh_state
                if refreshed is not None:
                    shard = self.find_shard(refreshed) if refreshed in self._unplaced else refreshed.key[2]
                    if shard != token:  # its row has moved since the statement was made
                        token, options = shard, _given(options).union({"identity_token": shard})
                if "shardkit_read_from" in options:
                    read_from = options["shardkit_read_from"]
                elif "shardkit_read_from" in statement._execution_options:
                    read_from = statement._execution_options["shardkit_read_from"]
                elif self.execution_options:
                    read_from = self.execution_options.get("shardkit_read_from", read_from)
                target = Target(_existing(view, token), statement._for_update_arg is not None, read_from == "replica")
                return self._run(statement, params, options, bind_arguments, target, parent, scalar)
            combined = self._merged_options(statement, options)
            read_from = combined.get("shardkit_read_from", read_from)
            route_options = RouteOptions.from_execution_options(combined, policy=route_options.policy)
            if "identity_token" in combined and route_options.shard is None:
                route_options = replace(route_options, shard=combined["identity_token"])
        if statement.is_insert:
            statement, params = filled(statement, params, view, self.cluster.next_id)
        route = view.planner.plan(statement, params, route_options)
        if len(route.shards) != 1 or route.merge is not None:
            answer = self._run_on_several(route, view, options, bind_arguments, parent, read_from)
            return answer.scalar() if scalar else answer
        shard = route.shards[0]
        if route.alternatives:
            shard = self._stay(transaction, route)
        target = Target(shard, route.writes or route.locking, read_from == "replica")
        if statement._propagate_attrs and _tokened(view, route):
            options = _with_token(options, shard, route.kind)
        if route.shard_statements:
            statement, params = route.statement_for(shard), route.parameters_for(shard)
        if not route.writes:
            return self._run(statement, params, options, bind_arguments, target, parent, scalar)
        self.admit_writes(route.shards)
        with self._carrying(target):
            return self._run(statement, params, options, bind_arguments, target, parent, scalar)

    def _run(
        self,
        statement: Any,
        params: Any,
        options: Mapping[str, Any],
        bind_arguments: Mapping[str, Any] | None,
        target: Target,
        parent: ORMExecuteState | None,
        scalar: bool,
    ) -> Any:
        arguments = {**bind_arguments, TARGET: target} if bind_arguments else {TARGET: target}
        if target.master:
            self._turn_to_masters((target.shard,))
        if (
            type(statement) is Select
            and parent is None
            and not self.execution_options
            and statement._propagate_attrs.get("compile_state_plugin") == "orm"
        ):
            # what Session.execute does with a SELECT of mapped classes once its handlers have run: the usual case
            select, options, params = _ORM_SELECT.orm_pre_session_exec(
                self, statement, params, options, arguments, False
            )
            connection = self._reading_connection(target)
            result = _ORM_SELECT.orm_execute_statement(self, select, params or {}, options, arguments, connection)
            return result.scalar() if scalar else result
        return super()._execute_internal(
            statement,
            params,
            execution_options=options,
            bind_arguments=arguments,
            _parent_execute_state=parent,
            _scalar_result=scalar,
        )

    def _merged_options(self, statement: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the session, the statement and the call, the later over the earlier. Loaders inherit the read
        options of the statement that they belong to."""
        inherited: Mapping[str, Any] = EMPTY_DICT
        if (context := options.get(_PARENT_LOAD)) is not None:
            outer = {**context.query._execution_options, **context.execution_options}
            inherited = {name: outer[name] for name in ("shardkit_read_from", "shardkit_scatter") if name in outer}
        return {**self.execution_options, **inherited, **statement._execution_options, **options}

    def _stay(self, transaction: ClusterTransaction, route: Route) -> str:
        """A shard of several that would do: one that the transaction talks to already, where there is one."""
        in_use = transaction.shards_in_use()
        for shard in route.alternatives:
            if shard in in_use:
                return shard
        return route.shards[0]

    @contextmanager
    def _carrying(self, target: Target) -> Iterator[None]:
        """Bulk operations ask for their bind again, without the arguments that they were called with."""
        before, self._carried = self._carried, target
        try:
            yield
        finally:
            self._carried = before

    def _run_on_several(
        self,
        route: Route,
        view: View,
        options: Mapping[str, Any],
        bind_arguments: Mapping[str, Any] | None,
        parent: ORMExecuteState | None,
        read_from: ReadFrom,
    ) -> Any:
        if route.warning:
            warnings.warn(route.warning, ScatterWarning, stacklevel=5)
        if not route.shards:
            self._autoflush()
            if route.kind is not StatementKind.SELECT:
                return WriteResult(0)
            return empty(route.statement, iter(()) if route.merge is None else merge_rows(route.merge, ()))
        orm = route.statement._propagate_attrs.get("compile_state_plugin") == "orm"
        tokened = orm and _tokened(view, route)
        given = immutabledict(options)

        def options_for(shard: str) -> immutabledict[str, Any]:
            return _with_token(given, shard, route.kind) if tokened else given

        def target_for(shard: str) -> Target:
            return Target(shard, route.writes or route.locking, read_from == "replica")

        def arguments_for(shard: str) -> dict[str, Any]:
            return {**(bind_arguments or {}), TARGET: target_for(shard)}

        if route.kind is StatementKind.SELECT and not route.writes:
            session_options = immutabledict(
                {
                    name: value
                    for name, value in self.execution_options.items()
                    if name not in route.statement._execution_options
                }
            )
            return select_from_several(
                self, route, lambda shard: session_options.union(options_for(shard)), arguments_for
            )
        self.admit_writes(route.shards)
        results: list[Result[Any]] = []
        for shard in route.shards:
            target = target_for(shard)
            own = options_for(shard)
            if route.replicated and results:
                own = own.union({"synchronize_session": False})  # objects follow the first shard's rows
            with self._carrying(target):
                statement, params = route.statement_for(shard), route.parameters_for(shard)
                results.append(self._run(statement, params, own, bind_arguments, target, parent, False))
        return _combined_write(route, results)

    # --- binds

    def get_bind(
        self,
        mapper: Any = None,
        *,
        clause: Any = None,
        bind: Engine | Connection | None = None,
        shardkit_target: Target | None = None,
        shardkit_shard: str | None = None,
        shardkit_key: Mapping[str, Any] | None = None,
        **_others: Any,
    ) -> Engine | Connection:
        """The engine that a statement goes to. Bind arguments of ours: ``shardkit_shard``, or ``shardkit_key`` together
        with a mapper."""
        if bind is not None:
            return bind
        target = shardkit_target or self._carried
        if target is None:
            target = self._target_without_route(mapper, clause, shardkit_shard, shardkit_key)
            if target.master and self._transaction is not None:
                self.admit_writes((target.shard,))
        return self._outermost().engine_for(target.shard, master=target.master, read_from_replica=target.replica)

    def _target_without_route(
        self, mapper: Any, clause: Any, shard: str | None, key: Mapping[str, Any] | None
    ) -> Target:
        """Who asks for a bind without a statement may do anything with it: so it is a master, and counts as written."""
        view = self._outermost().view
        if shard is not None:
            return Target(_existing(view, shard), master=True, replica=False)
        if len(view.map.shards) == 1:
            return Target(next(iter(view.map.shards)), master=True, replica=False)
        if clause is not None:
            options = replace(self._route_options, key=key)
            route = view.planner.plan(clause, None, options)
            if len(route.shards) == 1:
                return Target(route.shards[0], master=route.writes or route.locking, replica=False)
        elif mapper is not None:
            home = home_of(view, sa_inspect(mapper).mapper)
            if key is not None:
                return Target(view.map.locate(home.info.name, key).shard, master=True, replica=False)
            if len(home.info.shards) == 1:
                return Target(home.info.shards[0], master=True, replica=False)
        raise NoSingleBind(
            "a connection was asked for without saying to which shard",
            hint="session.connection(bind_arguments={'shardkit_shard': 'shop-0'}); "
            "a many-to-many table over several shards: map it as a class of its own",
        )

    def _reading_connection(self, target: Target) -> Connection:
        root = self._root
        if root is not None and root is self._transaction and not target.master and self._trans_context_manager is None:
            known = root.reading.get((target.shard, target.replica))
            if known is not None and root.is_active:
                return known
        connection = self._connection_for_bind(self.get_bind(shardkit_target=target))
        if not target.master and self._root is not None and self._root is self._transaction:
            self._root.reading[target.shard, target.replica] = connection
        return connection

    def connection_to_read(self, bind_arguments: Mapping[str, Any]) -> Connection:
        """The connection of this transaction that these bind arguments lead to."""
        return self._connection_for_bind(self.get_bind(**bind_arguments))

    def connection_to_write(self, shard: str) -> Connection:
        """The connection of this transaction to a shard's master; the shard counts as written."""
        self.admit_writes((shard,))
        return self._connection_for_bind(self.get_bind(shardkit_target=Target(shard, master=True, replica=False)))

    # --- identity

    def _get_impl(self, entity: Any, primary_key_identity: Any, db_load_fn: Any, **options: Any) -> Any:
        if db_load_fn is loading._load_on_pk_identity:
            db_load_fn = _load_with_token
        mapper = cast("Mapper[Any] | None", sa_inspect(entity))
        if options.get("identity_token") is not None or mapper is None or not mapper.is_mapper:
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)
        options["identity_token"] = self._shard_to_get(mapper, primary_key_identity, options)
        try:
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)
        except ReplanNeeded:
            options["identity_token"] = self._shard_to_get(mapper, primary_key_identity, options)
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)

    def _shard_to_get(self, mapper: Mapper[Any], identity: Any, options: Mapping[str, Any]) -> str | None:
        given = options.get("execution_options") or self.execution_options
        if given and (given.get("shardkit_shard") or given.get("shardkit_key")):
            return None  # the planner reads them
        values = identity if isinstance(identity, tuple | list) else (identity,)
        if isinstance(identity, dict) or len(values) != len(mapper.primary_key):
            return None  # SQLAlchemy makes it a tuple, or refuses it
        return home_of(self._outermost().view, mapper).shard_of_identity(values)

    def _identity_lookup(
        self,
        mapper: Mapper[Any],
        primary_key_identity: Any,
        identity_token: Any = None,
        passive: PassiveFlag = PassiveFlag.PASSIVE_OFF,
        lazy_loaded_from: InstanceState[Any] | None = None,
        execution_options: Any = EMPTY_DICT,  # noqa: ARG002 - the base's signature
        bind_arguments: Any = None,  # noqa: ARG002
    ) -> Any:
        if identity_token is not None:
            return super()._identity_lookup(mapper, primary_key_identity, identity_token, passive, lazy_loaded_from)
        if not self.identity_map._dict:  # nothing there: the usual case of a first get()
            return None
        look = partial(self._look, mapper, primary_key_identity, passive, lazy_loaded_from)
        home = home_of(self._outermost().view, mapper)
        shard = home.shard_of_identity(tuple(primary_key_identity))
        if shard is not None:
            return look(shard)
        tokens = home.info.shards if home.tokened else (None, *home.info.shards)
        found = [instance for instance in map(look, tokens) if instance is not None]
        if len(found) > 1 and home.tokened:
            raise MultipleResultsFound(
                f"several shards have a {mapper.class_.__name__} {tuple(primary_key_identity)}: its primary key does "
                f"not hold the shard key of {home.table.name!r}"
            )
        return found[0] if found else None

    def _look(
        self,
        mapper: Mapper[Any],
        identity: Any,
        passive: PassiveFlag,
        lazy_loaded_from: InstanceState[Any] | None,
        token: str | None,
    ) -> Any:
        return super()._identity_lookup(mapper, identity, token, passive, lazy_loaded_from)

    def use_view(self, view: View) -> None:
        """A transaction begins on this map: objects whose rows have moved meanwhile get their new shard."""
        if view.map.version != self._map_version:
            if self._map_version:
                self._rehome(view)
            self._map_version = view.map.version

    def _rehome(self, view: View) -> None:
        for state in self.identity_map.all_states():
            home = home_of(view, state.mapper)
            key = home.key_of(state) if home.tokened else None
            if home.tokened and key is None:
                self._unplaced.add(state)
            else:
                self._move_identity(state, home.shard_of_key(key))

    def _move_identity(self, state: InstanceState[Any], shard: str | None) -> None:
        self._unplaced.discard(state)
        if state.key is not None and state.key[2] != shard:
            self.identity_map.safe_discard(state)
            state.key = (state.key[0], state.key[1], shard)
            state.identity_token = shard
            self.identity_map.replace(state)

    def find_shard(self, state: InstanceState[Any]) -> str:
        """Where the row of an object is now, which was loaded before buckets moved and whose key is not loaded.

        :raises StaleShardMap: when it is not to be found, or was found before as another object.
        """
        mapper, identity = state.mapper, state.identity
        assert identity is not None  # noqa: S101 - it has been loaded before
        known = set(self.identity_map.all_states())
        statement = select(mapper).where(
            *(column == value for column, value in zip(mapper.primary_key, identity, strict=True))
        )
        with self.no_autoflush:
            rows = self.execute(statement).unique().scalars().all()
        found = [instance_state(row) for row in rows]
        if len(found) != 1 or found[0] in known or found[0].key is None:
            raise StaleShardMap(
                f"the row of {mapper.class_.__name__} {tuple(identity)} is not where it was before its buckets moved",
                hint="load it again by its key",
            )
        shard = str(found[0].key[2])
        self.expunge(rows[0])
        self._move_identity(state, shard)
        return shard

    def is_unplaced(self, state: InstanceState[Any]) -> bool:
        """Whether an object's shard is not known since buckets moved."""
        return state in self._unplaced

    # --- flush

    def _flush(self, objects: Sequence[Any] | None = None) -> None:
        if not self._dirty_states and not self._deleted and not self._new:
            super()._flush(objects)
            return
        flush = Flush(self, self._outermost().view)
        carried, self._carried = self._carried, None
        self._flush_at_work = flush
        self.connection_callable = flush.connection_for  # type: ignore[assignment]
        try:
            self._before_flush(flush)
            super()._flush(objects)
        finally:
            self.connection_callable = None
            self._flush_at_work = None
            self._carried = carried

    def _before_flush(self, flush: Flush) -> None:
        """Decide what can be decided before anything is sent."""
        try:
            flush.prepare(self._new, set(self._dirty_states).difference(self._deleted), self._deleted)
            self.admit_writes(flush.touched)
        except (RoutingError, TransactionError):
            self._deactivate()
            raise
        if self.commit_mode is CommitMode.SINGLE:
            # a flush asks for a connection even for objects that it will not write
            for state in flush.unchanged:
                state._commit_all(state.dict, self.identity_map)

    def _register_persistent(self, states: set[InstanceState[Any]]) -> None:
        if self._flush_at_work is not None:
            self._flush_at_work.verify(states)
        super()._register_persistent(states)

    def _bulk_save_mappings(self, mapper: Any, mappings: Any, **options: Any) -> None:
        home = home_of(self._outermost().view, sa_inspect(mapper).mapper)
        groups: dict[str, list[Any]] = {}
        flush = Flush(self, self._outermost().view)
        for item in mappings:
            for shard in flush.shards_of_item(home, item, is_state=options["isstates"]):
                groups.setdefault(shard, []).append(item)
        self.admit_writes(groups)
        for shard, items in groups.items():
            with self._carrying(Target(shard, master=True, replica=False)):
                super()._bulk_save_mappings(mapper, items, **options)


def _load_with_token(
    session: ClusterSession, statement: Any, identity: Any, *, load_options: Any, identity_token: Any, **others: Any
) -> Any:
    """SQLAlchemy's ``_load_on_pk_identity`` with load options that were made before."""
    if identity_token is not None and load_options is QueryContext.default_load_options:
        load_options, identity_token = _load_options(identity_token)[_LOAD_OPTIONS], None
    return loading._load_on_pk_identity(
        session, statement, identity, load_options=load_options, identity_token=identity_token, **others
    )


def _identity_of(options: Mapping[str, Any]) -> Any:
    """The shard that a load by identity asks for; None for every other statement."""
    load = options.get(_LOAD_OPTIONS)
    return None if load is None or _PARENT_LOAD in options else load._identity_token


def _existing(view: View, shard: Any) -> str:
    if shard not in view.map.shards:
        raise StaleShardMap(
            f"shard {shard!r} is not in the shard map (version {view.map.version})",
            hint="load the object again: its rows have moved",
        )
    return str(shard)


def _tokened(view: View, route: Route) -> bool:
    """Whether objects of this statement carry their shard in their identity."""
    try:
        return view.tokens[route.tables]
    except KeyError:
        tables = view.map.tables
        spread = any(name in tables and tables[name].kind == "sharded" for name in route.tables)
        answer = view.tokens[route.tables] = spread and len(view.map.shards) > 1
        return answer


@lru_cache(maxsize=4096)
def _load_options(shard: str) -> immutabledict[str, Any]:
    """What makes the ORM give the objects it loads this shard as their identity token."""
    loading: Any = QueryContext.default_load_options + {"_identity_token": shard}
    return immutabledict({_LOAD_OPTIONS: loading})


def _with_token(options: Mapping[str, Any], shard: str, kind: StatementKind) -> immutabledict[str, Any]:
    if kind is StatementKind.SELECT:
        return _given(options).union({"identity_token": shard}) if options else _load_options(shard)
    tokened: immutabledict[str, Any] = _given(options).union({"identity_token": shard, **_load_options(shard)})
    return tokened


def _given(options: Mapping[str, Any]) -> immutabledict[str, Any]:
    return options if isinstance(options, immutabledict) else immutabledict(options)


def _combined_write(route: Route, results: Sequence[Result[Any]]) -> WriteResult:
    for replayed in results[1:] if route.replicated else ():
        replayed.close()
    counts = [getattr(result, "rowcount", -1) for result in results]
    count = -1 if -1 in counts else counts[0] if route.replicated else sum(counts)
    if route.merge is not None:
        return WriteResult(count, merged(route.merge, results, route.statement))
    if route.replicated and getattr(results[0], "returns_rows", False):
        return WriteResult(count, results[0])
    return WriteResult(count)
