"""The connections that a flush writes on. It hands them to the handlers of mapper events (``before_insert``, ...), too.

Nobody has said for which shard a handler's statement is: it may be one for this connection, or for none that it has.
"""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import Connection, Executable
from sqlalchemy.engine import CursorResult

from shardkit.errors import RoutingError, UnknownTable
from shardkit.routing.planner import kind_of
from shardkit.routing.route import Route, RouteOptions, StatementKind
from shardkit.routing.texts import reads_only, text_of, writes_rows
from shardkit.snapshots import View

if TYPE_CHECKING:
    from shardkit.session.session import ClusterSession

#: A statement, its sets of parameters and its execution options -> what is to be sent of the first two.
Check = Callable[[Any, Any, Any], tuple[Any, Any]]


class ShardConnection(Connection):
    """One shard's connection, which looks at what others than the flush itself execute.

    It is the session's own connection under another name: the two share all that they know.
    """

    _check: Check

    @classmethod
    def over(cls, connection: Connection, check: Check) -> Self:
        """:param check: raises a `RoutingError` for what is not for this shard."""
        made = cls.__new__(cls)
        made.__dict__ = connection.__dict__
        made.__dict__["_check"] = check
        return made

    def _execute_clauseelement(self, elem: Any, distilled_parameters: Any, execution_options: Any) -> Any:
        if not _is_of_flush(execution_options):
            elem, distilled_parameters = _checked(self._check, elem, distilled_parameters, execution_options)
        return super()._execute_clauseelement(elem, distilled_parameters, execution_options)


class ReplicatedConnection:
    """What a flush writes a reference table's rows on: every statement is sent to all shards; the first one answers.

    :param check: raises a `RoutingError` for what is not for all of these shards.
    """

    def __init__(self, connections: Sequence[Connection], check: Check) -> None:
        self._connections = tuple(connections)
        self._check = check

    def execute(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> CursorResult[Any]:
        """As `sqlalchemy.Connection.execute`, on every shard."""
        if not _is_of_flush(execution_options):
            statement, parameters = self._check(statement, parameters, execution_options)
        options = {"execution_options": execution_options}
        return [connection.execute(statement, parameters, **options) for connection in self._connections][0]  # noqa: RUF015 - all run

    def scalar(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        """As `sqlalchemy.Connection.scalar`, on every shard."""
        return self.execute(statement, parameters, execution_options=execution_options).scalar()

    def scalars(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        """As `sqlalchemy.Connection.scalars`, on every shard."""
        return self.execute(statement, parameters, execution_options=execution_options).scalars()

    def exec_driver_sql(self, statement: str, *arguments: Any, **options: Any) -> CursorResult[Any]:
        """As `sqlalchemy.Connection.exec_driver_sql`, for what only reads.

        :raises RoutingError: for what may write: nobody knows what.
        """
        refuse_raw_write(statement)
        return self._connections[0].exec_driver_sql(statement, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connections[0], name)


def refuse_raw_write(text: str) -> None:
    """:raises RoutingError: for raw SQL that may write, on the connection of a flush to several shards."""
    if not reads_only(text):
        raise RoutingError(
            "raw SQL of a handler, in the flush of a reference table's row, may write to a table that each shard has "
            "a part of",
            hint="write it as an insert(), update() or delete(), or execute it on the session",
        )


def _is_of_flush(execution_options: Any) -> bool:
    """The unit of work compiles what it sends into a cache of the class's own."""
    return bool(execution_options) and "compiled_cache" in execution_options


def _checked(check: Check, statement: Executable, sets: Any, execution_options: Any) -> tuple[Any, Any]:
    """:param sets: as a connection keeps them: a list of sets of parameters, or nothing."""
    given = (sets[0] if len(sets) == 1 else sets) if sets else None
    statement, wanted = check(statement, given, execution_options)
    if wanted is given:
        return statement, sets
    return statement, [wanted] if isinstance(wanted, dict) else wanted or ()


def check_handed(
    session: ClusterSession,
    known: dict[tuple[str, str], str | None],
    shards: Sequence[str],
    statement: Any,
    parameters: Any,
    options: Mapping[str, Any] | None,
) -> tuple[Any, Any]:
    """A statement that a handler executes on the connection to these shards: the session has to send it there, too.

    :param known: the entries of directories that the flush has looked up.
    :returns: what to send: ids and defaults that the session would make are in it.
    :raises RoutingError: for what the session would send to other shards.
    """
    view, options = session._outermost().view, options or {}
    if view.map.sole_host is not None:
        return statement, parameters
    said = RouteOptions.from_execution_options({**statement._execution_options, **options})
    if kind_of(statement) is StatementKind.TEXT:
        if (text := text_of(statement)) is None:
            return statement, parameters  # SAVEPOINT
        if len(shards) > 1:
            refuse_raw_write(text)
        said = replace(said, shard=said.shard or shards[0])  # what is plain and says otherwise is refused
    try:
        if view.planner.names_no_table(statement):
            return statement, parameters
        statement, parameters = session._completed(statement, parameters, options, view)
        plan = partial(view.planner.plan, statement, parameters, replace(said, scatter=True))
        route = session.looked_up(plan, new=writes_rows(statement), known=known)
    except UnknownTable:  # nothing is said of its rows
        return statement, parameters
    if _is_for(route, shards, view):
        return statement, parameters
    raise RoutingError(
        f"an event handler executes a statement on the flush's connection to {', '.join(shards)}, which is for "
        f"{', '.join(route.shards)}",
        hint="execute it on the session (sqlalchemy.orm.object_session(instance).execute(...)), or name the key in it; "
        "where one shard is meant, give it execution_options={'shardkit_shard': ...}",
        table=route.tables[0] if route.tables else None,
        shards=len(route.shards),
    )


def _is_for(route: Route, shards: Sequence[str], view: View) -> bool:
    """Whether a route leads to these shards and no others, and what they are sent is the statement itself."""
    if not route.shards:
        return True  # no row can match
    if route.merge is not None or route.first is not None or route.shard_statements:
        return False
    if route.kind is StatementKind.TEXT:
        return route.shards == (shards[0],)
    if route.writes:
        return set(route.shards) == set(shards) and (route.replicated or len(shards) == 1)
    if len(shards) > 1:
        return all(view.map.table(name).kind == "reference" for name in route.tables)
    return route.shards == (shards[0],) or shards[0] in route.alternatives
