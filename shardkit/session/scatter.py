"""A SELECT over several shards: sent to all of them at once, its rows put together.

Only connections work in parallel: what touches the session (autoflush, turning rows into objects) stays on its thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import Connection, CursorResult, Executable, Result
from sqlalchemy.orm.context import _ORMCompileState
from sqlalchemy.sql.base import CompileState
from sqlalchemy.util import immutabledict

from shardkit.routing.route import Route
from shardkit.session.parallel import runner_for
from shardkit.session.results import merged

if TYPE_CHECKING:
    from shardkit.session.statements import RoutedSession


class _Part(NamedTuple):
    """One shard's share of a statement."""

    statement: Executable
    parameters: Any
    options: Mapping[str, Any]
    bind_arguments: dict[str, Any]
    connection: Connection


def select_from_several(
    session: RoutedSession,
    route: Route,
    options_for: Callable[[str], immutabledict[str, Any]],
    bind_arguments_for: Callable[[str], dict[str, Any]],
) -> Result[Any]:
    """Ask every shard of the route.

    :param options_for: shard -> the execution options for it.
    :param bind_arguments_for: shard -> the bind arguments that lead there.
    :raises: the first error of any shard, once all have answered.
    """
    orm = _orm_class(route.statement_for(route.shards[0]))
    prepared = []
    for shard in route.shards:  # the first one flushes: before any connection is chosen
        statement, parameters = route.statement_for(shard), route.parameters_for(shard)
        options, bind_arguments = options_for(shard), bind_arguments_for(shard)
        if orm is None:
            bind_arguments.setdefault("clause", statement)
        else:
            statement, options, parameters = orm.orm_pre_session_exec(  # type: ignore[no-untyped-call]
                session, statement, parameters, options, bind_arguments, False
            )
        prepared.append((statement, parameters, options, bind_arguments))
    if orm is None:
        session._autoflush()  # noqa: SLF001 - as Session.execute does for statements without entities
    parts = [
        _Part(statement, parameters, options, bind_arguments, session.connection_to_read(bind_arguments))
        for statement, parameters, options, bind_arguments in prepared
    ]
    run = runner_for([part.connection for part in parts], asynchronous=session.asynchronous)
    cursors = run([partial(_execute, part) for part in parts])
    results: list[Result[Any]] = [
        cursor
        if orm is None
        else orm.orm_setup_cursor_result(  # type: ignore[no-untyped-call]
            session, part.statement, part.parameters, part.options, part.bind_arguments, cursor
        )
        for part, cursor in zip(parts, cursors, strict=True)
    ]
    assert route.merge is not None  # noqa: S101 - the planner's promise for several shards
    return merged(route.merge, results, route.statement)


def _execute(part: _Part) -> CursorResult[Any]:
    return part.connection.execute(part.statement, part.parameters or {}, execution_options=part.options)


def _orm_class(statement: Executable) -> type[_ORMCompileState] | None:
    """The class that turns rows into objects, for a statement about mapped classes."""
    if statement._propagate_attrs.get("compile_state_plugin") != "orm":  # noqa: SLF001
        return None
    found: Any = CompileState._get_plugin_class_for_plugin(statement, "orm")  # noqa: SLF001
    return cast("type[_ORMCompileState]", found)
