"""Statements: planned on the transaction's map, sent to the shards that their rows are on."""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

from sqlalchemy import Connection, Engine, Executable, Insert, Result, Select
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.orm import FromStatement, ORMExecuteState
from sqlalchemy.sql import coercions, roles
from sqlalchemy.sql.base import CompileState
from sqlalchemy.util import EMPTY_DICT, immutabledict

from shardkit.directory import KeyNotLookedUp
from shardkit.errors import RoutingError, TransactionError
from shardkit.routing.feeds import Feeding
from shardkit.routing.inserts import mapper_of, named_as_the_first
from shardkit.routing.merge import merge_rows
from shardkit.routing.planner import Keyed
from shardkit.routing.route import Route, RouteOptions, StatementKind
from shardkit.routing.texts import commits_implicitly, writes_rows
from shardkit.session.deadline import Deadline, checked_seconds
from shardkit.session.homes import home_of
from shardkit.session.identity import IdentitySession
from shardkit.session.inserts import filled
from shardkit.session.renamed import refuse_shared_schema, schema_map_of
from shardkit.session.results import WriteResult, empty, merged
from shardkit.session.scatter import select_from_several
from shardkit.session.settled import listed, settled
from shardkit.session.tokens import (
    LOAD_OPTIONS,
    PARENT_LOAD,
    SUBQUERY_LOAD,
    as_immutable,
    existing,
    identity_of,
    is_wide,
    load_options_of,
    tokened,
    tokened_rows,
    with_token,
)
from shardkit.session.transacting import Target
from shardkit.session.transaction import ClusterTransaction, ReplanNeeded
from shardkit.snapshots import View

#: The bind argument that says where a statement goes, once that is decided.
TARGET = "shardkit_target"
#: What is said of a statement and holds for the subqueries that run before it.
_OF_SUBQUERIES = ("shardkit_read_from", "shardkit_max_lag", "shardkit_scatter", "autoflush", "schema_translate_map")
#: Seconds that a statement has left whose time is over: it is answered that it is late.
_NO_TIME = 0.001
#: What is said of a statement and holds for the loaders of its objects' relationships.
_OF_LOADERS = ("shardkit_read_from", "shardkit_max_lag", "shardkit_scatter")
_ORM_SELECT: Any = CompileState.plugins["orm", "select"]


class ScatterWarning(UserWarning):
    """A read touched several shards under ``scatter="warn"``."""


class NoSingleBind(RoutingError, UnboundExecutionError):
    """A bind was asked for, and several shards may be meant."""


class RoutedSession(IdentitySession):
    """A session that plans each statement."""

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
            before, self._given_options = self._given_options, execution_options
            try:
                return super()._execute_internal(
                    statement,
                    params,
                    execution_options=execution_options,
                    bind_arguments=bind_arguments,
                    _parent_execute_state=_parent_execute_state,
                    _add_event=self._planned_after(_add_event),
                    _scalar_result=_scalar_result,
                )
            finally:
                self._given_options = before
        if not isinstance(statement, Executable):
            statement = coercions.expect(roles.StatementRole, statement)
        return self._route(statement, params, execution_options, bind_arguments, None, _scalar_result)

    def _planned_after(self, event: Callable[[ORMExecuteState], Any] | None) -> Callable[[ORMExecuteState], Any]:
        def plan_and_run(state: ORMExecuteState) -> Any:
            answer = None if event is None else event(state)
            if answer is not None or TARGET in state.bind_arguments or "bind" in state.bind_arguments:
                return answer
            # as they were given: what the ORM has made of them for the handlers must not be used a second time
            options = as_immutable(self._given_options).union(state._update_execution_options)
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
        if params and LOAD_OPTIONS not in options:  # else a loader's, of values that objects have
            params = listed(params)
        try:
            return self._plan_and_run(statement, params, options, bind_arguments, parent, scalar)
        except ReplanNeeded:
            if identity_of(options) is not None:
                raise  # whoever chose the shard has to choose again
            return self._plan_and_run(statement, params, options, bind_arguments, parent, scalar)
        except DBAPIError:
            if not self._left_lost_replicas():
                raise
            # nothing of its answer has been given away: another replica gives it, or the master
            return self._plan_and_run(statement, params, options, bind_arguments, parent, scalar)

    def _left_lost_replicas(self) -> bool:
        """Whether this transaction has just lost a replica, and may go on elsewhere."""
        root = self._root
        return root is not None and self._transaction is root and root.leave_lost_replicas()

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
        route_options, from_replica, run = self._route_options, self._from_replica, self._run
        max_lag: float | None = None
        if options or statement._execution_options or self.execution_options:
            token = identity_of(options)
            if token is not None:  # get() and refresh of an object whose shard is known
                refreshed = options[LOAD_OPTIONS]._refresh_state
                if refreshed is not None:
                    shard = self.find_shard(refreshed) if refreshed in self._unplaced else refreshed.key[2]
                    if shard != token:  # its row has moved since the statement was made
                        token, options = shard, as_immutable(options).union({"identity_token": shard})
                if len(options) > 1 or statement._execution_options or self.execution_options:  # more than the token
                    said = (options, statement._execution_options, self.execution_options)
                    if (given := _first_said("shardkit_read_from", said)) is not None:
                        from_replica = _replica(given)
                    run = self._runner(_first_said("shardkit_deadline", said))
                    max_lag = checked_lag(_first_said("shardkit_max_lag", said))
                target = Target(existing(view, token), statement._for_update_arg is not None, from_replica, max_lag)
                if view.map.sole_host is None and (parent is not None or is_wide(view, statement)):
                    self.looked_up(partial(view.planner.check_load, statement, params, target.shard))
                return run(statement, params, options, bind_arguments, target, parent, scalar)
            combined = self._merged_options(statement, options)
            if "shardkit_read_from" in combined:
                from_replica = _replica(combined["shardkit_read_from"])
            run = self._runner(combined.get("shardkit_deadline"))
            max_lag = checked_lag(combined.get("shardkit_max_lag"))
            route_options = RouteOptions.from_execution_options(combined, policy=route_options.policy)
            if "identity_token" in options and PARENT_LOAD in options:
                # of the statement that this loader belongs to: related rows may live elsewhere
                options = as_immutable(options).union({"identity_token": None})
            elif "identity_token" in combined and route_options.shard is None:
                named = combined["identity_token"]
                if view.map.sole_host is None or named in view.map.shards:
                    route_options = replace(route_options, shard=named)
            if SUBQUERY_LOAD in combined and not view.planner.loads_beside(statement, params):
                # what was said of the rows that it loads for: related rows may live elsewhere
                route_options = replace(route_options, shard=None, key=None)
        elif type(statement) is Select and (keyed := self._keyed(view, statement, params)) is not None:
            target = Target(keyed.shard, keyed.shape.locking, from_replica)
            if statement._propagate_attrs and tokened_rows(view, keyed.shape.tables):
                options = load_options_of(keyed.shard)
            return run(statement, params, options, bind_arguments, target, parent, scalar)
        if view.map.sole_host is None:  # one database looks at them once
            statement, params = settled(statement, params)
        statement, params = self._completed(statement, params, options, view)
        try:
            route = view.planner.plan(statement, params, route_options)
        except KeyNotLookedUp:
            if statement._propagate_attrs and self._merged_options(statement, options).get("autoflush", True):
                self._autoflush()  # what is pending may be the first row of its key
            plan = partial(view.planner.plan, statement, params, route_options)
            route = self.looked_up(plan, new=writes_rows(statement))
        if route.first is not None:
            statement, left = self._fed(route.first, params, self._merged_options(statement, options))
            return self._route(statement, params, {**options, **left}, bind_arguments, parent, scalar)
        if len(route.shards) != 1 or route.merge is not None:
            answer = self._run_on_several(route, view, options, bind_arguments, parent, (from_replica, max_lag))
            return answer.scalar() if scalar else answer
        shard = route.shards[0]
        if route.alternatives:
            shard = self._stay(transaction, route)
        target = Target(shard, route.writes or route.locking, from_replica, max_lag)
        if statement._propagate_attrs and tokened(view, route):
            options = with_token(options, shard, route.kind)
        if route.shard_statements:
            statement, params = route.statement_for(shard), route.parameters_for(shard)
        if not route.writes:
            return run(statement, params, options, bind_arguments, target, parent, scalar)
        if route.kind in {StatementKind.TEXT, StatementKind.DDL} and transaction.written:
            refuse_implicit_commit(statement, view)
        self.admit_writes(route.shards)
        with self._carrying(target):
            return run(statement, params, options, bind_arguments, target, parent, scalar)

    def _keyed(self, view: View, statement: Select[Any], params: Any) -> Keyed | None:
        try:
            return view.planner.keyed(statement, params)
        except KeyNotLookedUp:
            return None  # it is looked up once it has been planned

    def _completed(self, statement: Any, params: Any, options: Mapping[str, Any], view: View) -> tuple[Any, Any]:
        """An INSERT, also inside of ``from_statement()``, with what its rows need before they are placed."""
        insert = statement.element if isinstance(statement, FromStatement) else statement
        if not isinstance(insert, Insert):
            return statement, params
        of_insert = {**insert._execution_options, **statement._execution_options, **options}
        strategy = of_insert.get("dml_strategy")
        nulls = bool(of_insert.get("render_nulls")) or strategy == "raw"
        if strategy in {"raw", "orm"} or mapper_of(insert) is None:  # without the ORM's care for each row
            try:
                params = named_as_the_first(insert, params)
            except RoutingError:
                if view.map.sole_host is None:
                    raise  # one database says what it misses
        complete, params = filled(insert, params, view, self.cluster.next_id, nulls=nulls)
        if insert is statement:
            return complete, params
        if complete is not insert:
            statement = statement._generate()
            statement.element = complete
        return statement, params

    def _runner(self, deadline: Any) -> Callable[..., Any]:
        """`_run`, within the time that ``shardkit_deadline`` says, where it says one."""
        seconds = checked_seconds(deadline)
        return self._run if seconds is None else partial(self._run_by, seconds)

    def _run_by(self, seconds: float, statement: Any, *arguments: Any) -> Any:
        target: Target = arguments[3]
        connection = self._reading_connection(target)
        with Deadline(seconds, self.cluster) as deadline, deadline.over(target.shard, connection):
            return self._run(statement, *arguments)

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
        if target.master:
            self._turn_to_masters((target.shard,))
        if self._binds_by_itself and self._outermost().view.map.sole_host is not None:
            with self._carrying(target):  # an application's own get_bind() sees what it would see of one database
                return super()._execute_internal(
                    statement,
                    params,
                    execution_options=options,
                    bind_arguments=dict(bind_arguments or {}),
                    _parent_execute_state=parent,
                    _scalar_result=scalar,
                )
        arguments = {**bind_arguments, TARGET: target} if bind_arguments else {TARGET: target}
        if (
            type(statement) is Select
            and parent is None
            and not self.execution_options
            and statement._propagate_attrs.get("compile_state_plugin") == "orm"
        ):
            # what Session.execute does with a SELECT of mapped classes once its handlers have run: the usual case
            select, options, params = _ORM_SELECT.orm_pre_session_exec(
                self, statement, params, as_immutable(options), arguments, False
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

    def _fed(self, feeding: Feeding, params: Any, options: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """The statement, once its subqueries have been read, and the option for the time that is left to it. They see
        what this transaction has written."""
        inherited = {name: options[name] for name in _OF_SUBQUERIES if name in options}
        seconds = checked_seconds(options.get("shardkit_deadline"))
        until = None if seconds is None else monotonic() + seconds

        def left() -> Mapping[str, Any]:
            return {} if until is None else {"shardkit_deadline": max(until - monotonic(), _NO_TIME)}

        answers = []
        for feed in feeding.feeds:
            with self._route(feed.statement, params, {**inherited, **left()}, None, None, scalar=False) as result:
                answers.append(feed.values_of(result.scalars()))
        return feeding.fed(answers), left()

    @property
    def _binds_by_itself(self) -> bool:
        """Whether an application has put a get_bind() of its own over ours."""
        return type(self).get_bind is not RoutedSession.get_bind or "get_bind" in self.__dict__

    def _merged_options(self, statement: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the session, the statement and the call, the later over the earlier. Loaders inherit the read
        options of the statement that they belong to."""
        inherited: Mapping[str, Any] = EMPTY_DICT
        if (context := options.get(PARENT_LOAD)) is not None:
            outer = {**context.query._execution_options, **context.execution_options}
            inherited = {name: outer[name] for name in _OF_LOADERS if name in outer}
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
        """Bulk operations ask for their bind again, without the arguments that they were called with. In an event of a
        flush they are no part of it, and would not know what to do with its way of choosing connections."""
        before, self._carried = self._carried, target
        chooser, self.connection_callable = self.connection_callable, None
        try:
            yield
        finally:
            self._carried = before
            self.connection_callable = chooser

    def _run_on_several(
        self,
        route: Route,
        view: View,
        options: Mapping[str, Any],
        bind_arguments: Mapping[str, Any] | None,
        parent: ORMExecuteState | None,
        reading: tuple[bool, float | None],
    ) -> Any:
        if route.warning:
            warnings.warn(route.warning, ScatterWarning, stacklevel=5)
        if not route.shards:
            self._autoflush()
            if route.kind is not StatementKind.SELECT:
                return WriteResult(0)
            return empty(route.statement, iter(()) if route.merge is None else merge_rows(route.merge, ()))
        orm = route.statement._propagate_attrs.get("compile_state_plugin") == "orm"
        carry_shard = orm and tokened(view, route)
        given = immutabledict(options)

        def options_for(shard: str) -> immutabledict[str, Any]:
            return with_token(given, shard, route.kind) if carry_shard else given

        def target_for(shard: str) -> Target:
            return Target(shard, route.writes or route.locking, *reading)

        def arguments_for(shard: str) -> dict[str, Any]:
            return {**(bind_arguments or {}), TARGET: target_for(shard)}

        said = self._merged_options(route.statement, options)
        if renamed := said.get("schema_translate_map"):
            refuse_shared_schema(route.tables, dict.fromkeys(route.shards, renamed), view)
        run = self._runner(said.get("shardkit_deadline"))
        if route.kind is StatementKind.SELECT and not route.writes:
            self.cluster.metrics.scattered.labels(route.tables[0] if route.tables else "").inc()
            session_options = immutabledict(
                {
                    name: value
                    for name, value in self.execution_options.items()
                    if name not in route.statement._execution_options
                }
            )
            return select_from_several(
                self, route, lambda shard: session_options.union(options_for(shard)), arguments_for, said
            )
        if route.kind in {StatementKind.TEXT, StatementKind.DDL} and self._outermost().written:
            refuse_implicit_commit(route.statement, view)
        self.admit_writes(route.shards)
        if not renamed:
            connections = {shard: self.connection_to_write(shard) for shard in route.shards}
            refuse_shared_schema(
                route.tables, {shard: schema_map_of(each) for shard, each in connections.items()}, view
            )
        results: list[Result[Any]] = []
        for shard in route.shards:
            target = target_for(shard)
            own = options_for(shard)
            if route.replicated and results:
                own = own.union({"synchronize_session": False})  # objects follow the first shard's rows
            try:
                with self._carrying(target):
                    statement, params = route.statement_for(shard), route.parameters_for(shard)
                    results.append(run(statement, params, own, bind_arguments, target, parent, False))
            except BaseException:
                if results:  # one database would have undone the whole statement: this part of it cannot be
                    self._deactivate()
                raise
        return combined_write(route, results)

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
        return self._outermost().bind_for(
            target.shard, master=target.master, read_from_replica=target.replica, max_lag=target.max_lag
        )

    def _target_without_route(
        self, mapper: Any, clause: Any, shard: str | None, key: Mapping[str, Any] | None
    ) -> Target:
        """Who asks for a bind without a statement may do anything with it: so it is a master, and counts as written."""
        view = self._outermost().view
        if shard is not None:
            return Target(existing(view, shard), master=True, replica=False)
        if len(view.map.shards) == 1:
            return Target(next(iter(view.map.shards)), master=True, replica=False)
        if clause is not None:
            options = replace(self._route_options, key=key)
            route = self.looked_up(lambda: view.planner.plan(clause, None, options))
            if len(route.shards) == 1 and route.first is None:
                return Target(route.shards[0], master=route.writes or route.locking, replica=False)
        elif mapper is not None:
            mapper = sa_inspect(mapper).mapper
            home = home_of(view, mapper)
            if key is not None:
                placement = self.looked_up(lambda: view.map.locate(home.info.name, key))
                return Target(placement.shard, master=True, replica=False)
            if len(home.info.shards) == 1 and home.info.keyspace.directory is None:
                return Target(home.info.shards[0], master=True, replica=False)
        if view.map.sole_host is not None:
            return Target(view.map.sole_host, master=True, replica=False)
        raise NoSingleBind(
            "a connection was asked for without saying to which shard",
            hint="session.connection(bind_arguments={'shardkit_shard': 'shop-0'})",
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


def refuse_implicit_commit(statement: Any, view: View) -> None:
    """:raises TransactionError: for what a server commits around, in a transaction that has written already."""
    if view.planner.dialect_name != "sqlite" and view.only is None and commits_implicitly(statement):
        raise TransactionError(
            "the server commits before and after this statement, and the transaction has written already: "
            "a part of it could not be undone any more",
            hint="commit first, and run it in a transaction of its own",
        )


def _first_said(name: str, given: Iterable[Mapping[str, Any]]) -> Any:
    """An execution option, of those who say it the first; None where nobody does."""
    return next((options[name] for options in given if name in options), None)


def checked_lag(seconds: Any) -> float | None:
    """What the execution option ``shardkit_max_lag`` says.

    :raises RoutingError: for what is no number of seconds.
    """
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise RoutingError(f"shardkit_max_lag is {seconds!r}", hint="give a number of seconds")
    return float(seconds)


def _replica(read_from: str) -> bool:
    """:raises RoutingError: for a value of ``shardkit_read_from`` that is not known."""
    if read_from not in {"master", "replica"}:
        raise RoutingError(f"shardkit_read_from is {read_from!r}", hint="give 'master' or 'replica'")
    return read_from == "replica"


def combined_write(route: Route, results: Sequence[Result[Any]]) -> WriteResult:
    for replayed in results[1:] if route.replicated else ():
        replayed.close()
    counts = [getattr(result, "rowcount", -1) for result in results]
    count = -1 if -1 in counts else counts[0] if route.replicated else sum(counts)
    if route.merge is not None:
        return WriteResult(count, merged(route.merge, results, route.statement))
    if not route.replicated:
        return WriteResult(count)
    return WriteResult(count, results[0] if _returns_rows(results[0]) else None, results[0])


def _returns_rows(result: Result[Any]) -> bool:
    """Whether there is a RETURNING. Objects that the ORM has made of rows are in a result that does not tell."""
    told: bool = getattr(result._metadata, "returns_rows", True)
    return bool(getattr(result, "returns_rows", told))
