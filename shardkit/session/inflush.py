"""Core statements in a flush: of many-to-many tables, and of event handlers on the connections that they are given."""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sqlalchemy import Column, Connection, Insert, TextClause
from sqlalchemy.util import EMPTY_DICT

from shardkit.errors import RoutingError, ScatterRefused, ShardkitError, UnknownTable
from shardkit.routing.route import Route, RouteOptions
from shardkit.routing.texts import writes_rows
from shardkit.session.flush import only_table
from shardkit.session.renamed import refuse_shared_schema, schema_map_of
from shardkit.session.settled import listed, settled
from shardkit.session.statements import RoutedSession, combined_write
from shardkit.session.transacting import Target


class InFlushSession(RoutedSession):
    """A session that executes on the shards of the rows what a flush, or a handler of its events, has for a connection.

    As a connection does: without the events of `Session.execute`, and without objects.
    """

    def execute_in_flush(
        self,
        statement: Any,
        parameters: Any,
        options: Mapping[str, Any] = EMPTY_DICT,
        own: Callable[[], Mapping[str, Connection]] | None = None,
        held: bool = False,
    ) -> Any:
        """Execute a Core statement of a flush, or of a handler of its events, on the shards of its rows.

        :param own: the connections of the object that the event is about, by shard.
        :param held: whether the handler has a savepoint there, which would not undo what is done elsewhere.
        :raises RoutingError: for what cannot be answered as one database would.
        """
        if parameters:
            parameters = listed(parameters)
        try:
            route = self._route_in_flush(statement, parameters, options)
            if own is not None and not route.writes and route.scattered:
                route = self._route_beside(statement, parameters, options) or route
        except ScatterRefused:
            beside = None if own is None else self._route_beside(statement, parameters, options)
            if beside is None:
                raise
            route = beside
        except (RoutingError, UnknownTable) as error:
            if own is None:
                raise
            shard = self._shard_of_copies(statement, parameters, options)
            if shard is not None:
                return self.connection_to_write(shard).execute(statement, parameters, execution_options=options)
            if isinstance(error, RoutingError) and not isinstance(statement, TextClause):
                raise
            return self._execute_beside(statement, parameters, options, own(), error)
        if not route.writes and not route.locking:
            return self._read_in_flush(route, options)
        if held and own is not None and (elsewhere := sorted(set(route.shards).difference(own()))):
            raise RoutingError(
                f"a change of {route.tables[0]} on {', '.join(elsewhere)}, inside of a savepoint that an event handler "
                f"has on {', '.join(own())}",
                hint="begin it with session.begin_nested(), before the flush",
                table=route.tables[0],
                shards=len(route.shards),
            )
        self.admit_writes(route.shards)
        connections = {shard: self.connection_to_write(shard) for shard in route.shards}
        renamed = {shard: schema_map_of(each) for shard, each in connections.items()}
        refuse_shared_schema(route.tables, renamed, self._outermost().view)
        results = [
            connection.execute(route.statement_for(shard), route.parameters_for(shard), execution_options=options)
            for shard, connection in connections.items()
        ]
        return results[0] if len(results) == 1 else combined_write(route, results)

    def _route_in_flush(self, statement: Any, parameters: Any, options: Mapping[str, Any]) -> Route:
        view = self._outermost().view
        said = self._merged_options(statement, options)
        route_options = RouteOptions.from_execution_options(said, policy=self._route_options.policy)
        statement, parameters = settled(statement, parameters)
        statement, parameters = self._completed(statement, parameters, options, view)
        plan = partial(view.planner.plan, statement, parameters, route_options)
        route = self.looked_up(plan, new=writes_rows(statement))
        if route.first is None:
            return route
        return self._route_in_flush(self._fed(route.first, parameters, said), parameters, options)

    def _route_beside(self, statement: Any, parameters: Any, options: Mapping[str, Any]) -> Route | None:
        """The route of what names, by its primary key alone, the row of an object that this flush writes."""
        flush = self.flush_at_work
        shard = None if flush is None else flush.shard_of_row(statement, parameters)
        if shard is None:
            return None
        return self._route_in_flush(statement, parameters, {**options, "shardkit_shard": shard})

    def _shard_of_copies(self, statement: Any, parameters: Any, options: Mapping[str, Any]) -> str | None:
        """The shard of an INSERT that copies rows with their keys, as histories do: copies belong beside their rows."""
        select: Any = statement.select if isinstance(statement, Insert) else None
        source = only_table(select)
        if source is None or statement._post_values_clause is not None or statement._prefixes:
            return None
        known = self._outermost().view.map.tables
        into, out_of = (known.get(table.fullname) for table in (statement.table, source))
        if into is None or out_of is None or not into.key or into.keyspace.name != out_of.keyspace.name:
            return None
        names = {column.key: column.name for column in statement.table.c}
        given = [names.get(getattr(name, "key", name)) for name in statement._select_names]
        copied = dict(zip(given, select.selected_columns, strict=False))
        for own, theirs in zip(into.key, out_of.key, strict=True):
            column = copied.get(own)
            if not isinstance(column, Column) or column.name != theirs or column.table.fullname != source.fullname:
                return None
        route = self._route_in_flush(select, parameters, options)
        if len(route.shards) != 1:
            route = self._route_beside(select, parameters, options) or route
        return route.shards[0] if len(route.shards) == 1 else None

    def _read_in_flush(self, route: Route, options: Mapping[str, Any]) -> Any:
        with self.reading_masters():
            if len(route.shards) == 1 and route.merge is None:
                shard = self._stay(self._outermost(), route) if route.alternatives else route.shards[0]
                connection = self._reading_connection(Target(shard, master=False, replica=False))
                statement, parameters = route.statement_for(shard), route.parameters_for(shard)
                return connection.execute(statement, parameters, execution_options=options)
            if route.statement._propagate_attrs:
                raise RoutingError(
                    f"an event handler reads mapped classes over {len(route.shards)} shards on a connection",
                    hint="read with the session (object_session(target)), or select from the tables",
                    table=route.tables[0] if route.tables else None,
                    shards=len(route.shards),
                )
            return self._run_on_several(route, self._outermost().view, options, None, None, (False, None))

    def _execute_beside(
        self,
        statement: Any,
        parameters: Any,
        options: Mapping[str, Any],
        own: Mapping[str, Connection],
        error: ShardkitError,
    ) -> Any:
        """What the router cannot place, of a handler: on the shard of the object that the event is about."""
        (shard, connection), *others = own.items()
        if isinstance(statement, TextClause) and isinstance(error, RoutingError):
            beside = {**options, "shardkit_shard": shard}  # which is looked at, as far as it is plain
            others = others if self._route_in_flush(statement, parameters, beside).writes else []
        if others:
            raise error
        return connection.execute(statement, parameters, execution_options=options)
