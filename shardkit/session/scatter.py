"""A SELECT over several shards: sent to all of them at once, its rows put together.

Only connections work in parallel: what touches the session (autoflush, turning rows into objects) stays on its thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import Connection, CursorResult, Executable, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.context import _ORMCompileState
from sqlalchemy.sql.base import CompileState
from sqlalchemy.util import immutabledict

from shardkit.engines import write_patiently
from shardkit.errors import DeadlineExceeded, RoutingError, ShardUnreachable
from shardkit.routing.route import Route
from shardkit.session.deadline import Deadline, checked_seconds
from shardkit.session.parallel import runner_for
from shardkit.session.renamed import refuse_shared_schema, schema_map_of
from shardkit.session.results import merged
from shardkit.session.tokens import LOAD_OPTIONS

if TYPE_CHECKING:
    from shardkit.session.statements import RoutedSession


logger = logging.getLogger(__name__)


class _Part(NamedTuple):
    """One shard's share of a statement."""

    statement: Executable
    parameters: Any
    options: Mapping[str, Any]
    bind_arguments: dict[str, Any]
    shard: str
    connection: Connection


class _Missing(NamedTuple):
    """A shard that did not answer."""

    shard: str
    error: Exception


def select_from_several(
    session: RoutedSession,
    route: Route,
    options_for: Callable[[str], immutabledict[str, Any]],
    bind_arguments_for: Callable[[str], dict[str, Any]],
    said: Mapping[str, Any],
) -> Result[Any]:
    """Ask every shard of the route.

    :param options_for: shard -> the execution options for it.
    :param bind_arguments_for: shard -> the bind arguments that lead there.
    :param said: the execution options of session, statement and call together.
    :raises: the first error of any shard, once all have answered. With ``shardkit_partial_ok``, only when none answers.
    :raises DeadlineExceeded: when a shard does not answer within ``shardkit_deadline`` seconds.
    """
    seconds, partial_ok = checked_seconds(said.get("shardkit_deadline")), _partial_ok(said)
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
        prepared.append((statement, parameters, options, bind_arguments, shard))
    if orm is None:
        session._autoflush()  # noqa: SLF001 - as Session.execute does for statements without entities
    with Deadline(seconds, session.cluster) as deadline:
        parts, missing = _connected(session, prepared, partial_ok=partial_ok)
        if not said.get("schema_translate_map"):
            renamed = {part.shard: schema_map_of(part.connection) for part in parts}
            refuse_shared_schema(route.tables, renamed, session._outermost().view)  # noqa: SLF001
        if said.get("yield_per") or said.get("stream_results"):
            for part in parts:
                write_patiently(part.connection)
        run = runner_for([part.connection for part in parts], asynchronous=session.asynchronous)
        answers = run([partial(_execute, part, deadline, partial_ok) for part in parts])
    missing += [answer for answer in answers if isinstance(answer, _Missing)]
    answered = [(part, answer) for part, answer in zip(parts, answers, strict=True) if not isinstance(answer, _Missing)]
    if not answered:
        raise missing[0].error
    for shard, error in missing:
        session.cluster.metrics.missing.labels(shard).inc()
        logger.warning("a read over several shards goes without shard %s: %s", shard, error)
    results: list[Result[Any]] = [
        cursor
        if orm is None
        else orm.orm_setup_cursor_result(  # type: ignore[no-untyped-call]
            session, part.statement, part.parameters, part.options, part.bind_arguments, cursor
        )
        for part, cursor in answered
    ]
    assert route.merge is not None  # noqa: S101 - the planner's promise for several shards
    load = answered[0][0].options.get(LOAD_OPTIONS)
    return merged(
        route.merge,
        results,
        route.statement,
        missing=tuple(each.shard for each in missing),
        tuples=load is not None and load._only_return_tuples,  # noqa: SLF001
    )


def _connected(
    session: RoutedSession, prepared: Sequence[Any], *, partial_ok: bool
) -> tuple[list[_Part], list[_Missing]]:
    parts, missing = [], []
    session.wait_for_masters(not partial_ok)
    for statement, parameters, options, bind_arguments, shard in prepared:
        try:
            connection = session.connection_to_read(bind_arguments)
        except ShardUnreachable as error:
            if not partial_ok:
                raise
            missing.append(_Missing(shard, error))
        else:
            parts.append(_Part(statement, parameters, options, bind_arguments, shard, connection))
    return parts, missing


def _execute(part: _Part, deadline: Deadline, partial_ok: bool) -> CursorResult[Any] | _Missing:
    try:
        with deadline.over(part.shard, part.connection):
            return part.connection.execute(part.statement, part.parameters or {}, execution_options=part.options)
    except (DeadlineExceeded, DBAPIError) as error:
        if not partial_ok or not (isinstance(error, DeadlineExceeded) or error.connection_invalidated):
            raise
        return _Missing(part.shard, error)


def _partial_ok(said: Mapping[str, Any]) -> bool:
    given = said.get("shardkit_partial_ok", False)
    if not isinstance(given, bool):
        raise RoutingError(f"shardkit_partial_ok is {given!r}", hint="give True or False")
    return given


def _orm_class(statement: Executable) -> type[_ORMCompileState] | None:
    """The class that turns rows into objects, for a statement about mapped classes."""
    if statement._propagate_attrs.get("compile_state_plugin") != "orm":  # noqa: SLF001
        return None
    found: Any = CompileState._get_plugin_class_for_plugin(statement, "orm")  # noqa: SLF001
    return cast("type[_ORMCompileState]", found)
