"""UPDATE and DELETE -> Route: to the shards of their key; to all where asked; to every copy of a reference table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from shardkit.errors import CrossShardJoin, KeyChange, RoutingError, ScatterRefused
from shardkit.partition import Bucket
from shardkit.routing.conditions import Binds
from shardkit.routing.functions import AGGREGATES, PURE
from shardkit.routing.hints import Hint, hint_of
from shardkit.routing.inserts import (
    changed_by_server,
    check_same_everywhere,
    mapper_of,
    name_of,
    named_as_the_first,
    parameter_sets,
)
from shardkit.routing.merge import MergePlan
from shardkit.routing.moving import moves_on, restricted
from shardkit.routing.queries import Occurrence
from shardkit.routing.route import Parameters, Route, RouteOptions, ShardStatement, StatementKind
from shardkit.routing.rows import Rows, attribute_of
from shardkit.routing.shapes import Shape, Shapes
from shardkit.routing.spread import Everywhere, Parted, Refused, check_connection, check_readable
from shardkit.shardmap import ShardMap, TableInfo


class Changes:
    """Plans UPDATEs and DELETEs on one map."""

    def __init__(self, shard_map: ShardMap, rows: Rows, shapes: Shapes) -> None:
        self._map = shard_map
        self._rows = rows
        self._shapes = shapes

    def route(self, statement: sa.Update | sa.Delete, parameters: Parameters, options: RouteOptions) -> Route:
        """Decide where an UPDATE or DELETE runs.

        :raises KeyChange: when it would set a key column.
        :raises ScatterRefused: when no key pins it and ``shardkit_scatter`` is not given.
        :raises RoutingError: for what cannot be done shard by shard.
        """
        sets = parameter_sets(parameters)
        many = parameters is not None and not isinstance(parameters, Mapping)
        if many and isinstance(statement, sa.Update) and mapper_of(statement) and not statement._where_criteria:  # noqa: SLF001 - no public reader
            return self._by_primary_key(statement, parameters, sets, options)
        parameters = named_as_the_first(statement, parameters)
        sets = parameter_sets(parameters)
        shape, binds = self._shapes.of(statement, sets[0] if sets else None, executemany=many)
        kind = StatementKind.UPDATE if isinstance(statement, sa.Update) else StatementKind.DELETE
        target = shape.lineage.occurrences[0]
        route = Route(
            kind,
            statement,
            parameters,
            target.info.shards,
            shape.keyspace,
            shape.tables,
            writes=True,
            locking=True,
            reasons=shape.reasons,
        )
        hint = hint_of(options, self._map, shape.infos, shape.lineage.occurrences, shape.lineage.readers)
        try:
            self._check_key(statement, sets, shape)
            if target.info.kind == "reference" and len(target.info.shards) > 1:
                return self._everywhere(route, shape, hint)
            if hint is not None:
                return self._hinted(route, shape, binds, hint)
            check_connection(shape.lineage.functions, target.info.name)
            if many and len(sets) > 1:
                return self._split(route, shape, sets)
            return self._planned(route, shape, binds, options)
        except Refused as refused:
            raise refused.over(len(target.info.shards), target.info.key) from None

    # --- what it would change

    def _check_key(self, statement: Any, sets: Sequence[Mapping[str, Any]], shape: Shape) -> None:
        if not isinstance(statement, sa.Update):
            return
        changed = {name_of(column) for column in statement._values or ()}  # noqa: SLF001 - no public reader
        changed |= {name for each in sets for name in each}
        mapper = mapper_of(statement)
        target, *others = _targets(statement, shape)
        for occurrence in (target, *others):
            info = occurrence.info
            if info.name != target.info.name and info.kind == "reference" and len(info.shards) > 1:
                raise RoutingError(
                    f"{info.name} is a reference table: an UPDATE of {target.info.name} that sets its columns, too, "
                    "may leave some of its copies as they are",
                    hint=f"change {info.name} with an UPDATE of its own",
                    table=info.name,
                    shards=len(info.shards),
                )
            for column in occurrence.clause.c:
                names = {column.name, column.key, attribute_of(mapper, column)}
                movable = len(info.shards) > 1 or info.keyspace.directory is not None
                if column.name in info.key and names & changed and movable:
                    raise KeyChange(
                        f"the UPDATE would set {info.name}.{column.name}, the key: the row would have to move",
                        hint="use session.move(obj, new_key), or delete the row and insert it anew",
                        table=info.name,
                        key=info.key,
                        shards=len(info.shards),
                    )

    # --- reference tables

    def _everywhere(self, route: Route, shape: Shape, hint: Hint | None) -> Route:
        info = self._map.table(route.tables[0])
        if hint is not None:
            raise RoutingError(
                f"{info.name} is a reference table: {hint.reason} would change it on one shard only",
                hint="leave the option away: it is changed on every shard",
                table=info.name,
                shards=len(info.shards),
            )
        _check_readable(shape)
        _check_limit(route.statement, info.name)
        changing = sorted(shape.lineage.functions - PURE - AGGREGATES)
        spread = shape.spread
        if changing or not isinstance(spread, Everywhere) or shape.query.nested:
            what = f"{', '.join(changing)}()" if changing else "another table"
            raise Refused(
                RoutingError,
                f"{info.name} is a reference table: {what} may have another value on each shard",
                "read it first and pass the value",
                table=info.name,
            )
        if spread.shards is not None and not spread.shards.issuperset(info.shards):
            others = ", ".join(name for name in spread.names if name != info.name)
            raise Refused(
                CrossShardJoin,
                f"{info.name} is changed by what stands in {others}, which is not on every shard of {info.name}",
                "read it first and pass the value",
                table=info.name,
            )
        self._check_onupdate(route.statement, info)
        return replace(route, replicated=True, reasons=(f"{info.name} is a reference table: changed on every shard",))

    def _check_onupdate(self, statement: Any, info: Any) -> None:
        if not isinstance(statement, sa.Update):
            return
        given = {name_of(column) for column in statement._values or ()}  # noqa: SLF001 - no public reader
        check_same_everywhere((statement._values or {}).values(), info)  # noqa: SLF001
        for column in getattr(statement.table, "c", ()):
            changing = getattr(column, "onupdate", None)
            if (changed_by_server(column) or (changing is not None and not changing.is_scalar)) and not {
                column.name,
                column.key,
            } & given:
                raise RoutingError(
                    f"{info.name} is a reference table, and each shard would choose its own {column.name}",
                    hint=f"give {column.key}=...",
                    table=info.name,
                    shards=len(info.shards),
                )

    # --- by key

    def _planned(self, route: Route, shape: Shape, binds: Binds, options: RouteOptions) -> Route:
        pinned = shape.pinned(binds)
        shards = tuple(dict.fromkeys(shard for each in pinned for shard in each.shards))
        if not shards:
            return replace(route, shards=(), buckets=frozenset())
        if len(shards) == 1:
            missing = next((info for info in shape.infos if shards[0] not in info.shards), None)
            if missing is not None:
                raise Refused(
                    RoutingError,
                    f"{missing.name} does not stand on shard {shards[0]!r}, where {route.tables[0]} is changed",
                    "read its values first and pass them",
                    table=missing.name,
                )
            check_readable(shape.unreadable, self._map, shards[0], route.tables[0])
            known = [each.buckets for each in pinned if each.buckets is not None]
            buckets = frozenset[Bucket]().union(*known) if len(known) == len(pinned) else None
            return replace(route, shards=shards, buckets=buckets)
        return self._spread(route, shape, binds, options)

    def _spread(self, route: Route, shape: Shape, binds: Binds, options: RouteOptions) -> Route:
        _check_readable(shape)
        statement: Any = route.statement
        info = self._map.table(route.tables[0])
        spread = shape.spread
        if not isinstance(spread, Parted) or all(each.number != 0 for each in spread.anchors):
            raise Refused(
                RoutingError,
                f"{info.name} is changed together with other tables over several shards",
                "pin it to one key",
                table=info.name,
            )
        where = shape.anchored(binds)
        found = replace(route, shards=where.shards, buckets=where.buckets)
        if len(where.shards) <= 1:
            return found
        if options.scatter is not True and where.buckets is None:
            raise ScatterRefused(
                f"the {route.kind.upper()} would change {info.name} on {len(where.shards)} shards: nothing pins "
                f"{' and '.join(info.key)}",
                hint="add a condition on the key, or shardkit_scatter=True to change it everywhere",
                table=info.name,
                key=info.key,
                shards=len(where.shards),
            )
        if options.scatter is False:
            raise ScatterRefused(
                f"the {route.kind.upper()} would change {info.name} on {len(where.shards)} shards",
                hint="leave shardkit_scatter=False away",
                table=info.name,
                key=info.key,
                shards=len(where.shards),
            )
        _check_limit(statement, info.name)
        merge = MergePlan(statement, visible=None) if statement._returning else None  # noqa: SLF001 - no public reader
        found = replace(found, merge=merge)
        moves = self._map.moves_of(spread.keyspace.name)
        if moves:
            return self._own_rows(found, moves[0].job)
        return found

    def _hinted(self, route: Route, shape: Shape, binds: Binds, hint: Hint) -> Route:
        pinned = shape.pinned(binds)
        shards = {shard for each in pinned if each.buckets is not None for shard in each.shards}
        if shards and hint.shard not in shards:
            raise RoutingError(
                f"{hint.reason} says {hint.shard!r}, but the key in the statement is on {', '.join(sorted(shards))}",
                hint="leave the option away",
                table=route.tables[0],
                shards=len(shards),
            )
        buckets = None if hint.bucket is None else frozenset({hint.bucket})
        found = replace(route, shards=(hint.shard,), buckets=buckets, reasons=(hint.reason,))
        moves = moves_on(self._map, [each.keyspace for each in shape.infos if each.kind == "sharded"], (hint.shard,))
        if not moves or (shards == {hint.shard} and all(each.buckets is not None for each in pinned)):
            return found
        _check_readable(shape)
        return self._own_rows(found, moves[0].job)

    def _own_rows(self, route: Route, job: str) -> Route:
        """While buckets move: each shard changes the rows of its own buckets only."""
        sets = parameter_sets(route.parameters)
        statement: Any = route.statement
        shape = self._shapes.fresh(statement, sets[0] if sets else None)
        spread = shape.spread
        if not isinstance(spread, Parted):
            return route
        own = restricted(statement, shape.lineage, spread, route.shards, job)
        return replace(route, shard_statements=_per_shard(own, route.parameters))

    # --- several sets of parameters

    def _split(self, route: Route, shape: Shape, sets: Sequence[Mapping[str, Any]]) -> Route:
        by_shard: dict[str, list[Mapping[str, Any]]] = {}
        buckets: set[Bucket] = set()
        for each in sets:
            binds = self._shapes.of(route.statement, each, executemany=True)[1]
            pinned = shape.pinned(binds)
            shards = {shard for one in pinned for shard in one.shards}
            if len(shards) > 1 or any(info.kind == "reference" for info in shape.infos):
                raise Refused(
                    ScatterRefused,
                    f"one set of parameters changes {route.tables[0]} on {len(shards)} shards",
                    "pin each set to one key, or execute the statement once for each set",
                    table=route.tables[0],
                )
            for shard in shards:
                by_shard.setdefault(shard, []).append(each)
            for one in pinned:
                buckets |= one.buckets or set()
        return _over_sets(route, self._map, by_shard, buckets)

    def _by_primary_key(
        self, statement: sa.Update, parameters: Parameters, sets: Sequence[Mapping[str, Any]], options: RouteOptions
    ) -> Route:
        """An ORM bulk update: each set of parameters names its row by primary key and gives new values."""
        mapper = mapper_of(statement)
        tables = [table for table in mapper.tables if isinstance(table, sa.Table)]
        infos = [self._map.table(table.fullname) for table in tables]
        info = infos[0]
        names = tuple(each.name for each in infos)
        hosts = tuple(dict.fromkeys(shard for each in infos for shard in each.shards))
        route = Route(
            StatementKind.UPDATE, statement, parameters, hosts, info.keyspace.name, names, writes=True, locking=True
        )
        hint = hint_of(options, self._map, infos)
        if len(hosts) == 1:
            for table, own in zip(tables, infos, strict=True):
                _check_keys_stay(table, own, sets, mapper)
            return replace(route, reasons=(f"{info.name} stands on one shard",))
        keyed = all(
            each.kind == "sharded" and set(each.key) <= {column.name for column in table.primary_key}
            for table, each in zip(tables, infos, strict=True)
        )
        if not keyed:
            if info.kind == "reference":
                raise ScatterRefused(
                    f"a bulk UPDATE by primary key of {info.name}, which stands on every shard",
                    hint="execute an UPDATE with a condition, or session.bulk_update_mappings()",
                    table=info.name,
                    shards=len(hosts),
                )
            raise ScatterRefused(
                f"a bulk UPDATE of {info.name} by primary key, which does not hold its key",
                hint="execute an UPDATE with a condition on the key",
                table=info.name,
                key=info.key,
                shards=len(hosts),
            )
        by_shard: dict[str, list[Mapping[str, Any]]] = {}
        buckets: set[Bucket] = set()
        for each in sets:
            places = {self._rows.place(table, each, Binds(each, ()), mapper) for table in tables}
            place = places.pop()
            if places or place is None or (hint is not None and hint.shard != place.shard):
                raise RoutingError(
                    f"one set of parameters changes {', '.join(names)} on several shards, or not where it is said to",
                    hint="shard the tables by the same column",
                    table=info.name,
                    key=info.key,
                    shards=len(places) + 1,
                )
            by_shard.setdefault(place.shard, []).append(each)
            buckets.add(place.bucket)
        return _over_sets(route, self._map, by_shard, buckets)


def _check_keys_stay(table: sa.Table, info: TableInfo, sets: Sequence[Mapping[str, Any]], mapper: Any) -> None:
    """:raises KeyChange: for sets of parameters that assign a key which a directory would have to know."""
    if info.keyspace.directory is None:
        return
    for column in table.c:
        names = {column.name, column.key, attribute_of(mapper, column)}
        if column.name in info.key and not column.primary_key and any(names & set(each) for each in sets):
            raise KeyChange(
                f"the UPDATE would set {info.name}.{column.name}, the key, which the directory files",
                hint="use session.move(obj, new_key), or delete the row and insert it anew",
                table=info.name,
                key=info.key,
                shards=len(info.shards),
            )


def _over_sets(
    route: Route, shard_map: ShardMap, by_shard: Mapping[str, list[Mapping[str, Any]]], buckets: set[Bucket]
) -> Route:
    shards = tuple(shard for shard in shard_map.shards if shard in by_shard)
    split = {shard: ShardStatement(route.statement, by_shard[shard]) for shard in shards}
    if len(shards) == 1 and len(by_shard[shards[0]]) == len(parameter_sets(route.parameters)):
        split = {}
    return replace(route, shards=shards, buckets=frozenset(buckets), shard_statements=split)


def _targets(statement: sa.Update, shape: Shape) -> list[Occurrence]:
    """The tables that the UPDATE may set columns of: MySQL's multi-table UPDATE sets any of them."""
    named = {_stored_name(getattr(column, "table", None)) for column in statement._values or ()}  # noqa: SLF001 - no public reader
    first, *others = shape.lineage.occurrences
    # by name: the occurrences may be those of another statement of this shape, with other aliases
    return [first, *(each for each in others if each.info.name in named)]


def _stored_name(clause: Any) -> str | None:
    """The name of the table that a column's table is, or is an alias of."""
    while isinstance(clause, sa.Alias):
        clause = clause.element
    return clause.fullname if isinstance(clause, sa.TableClause) else None


def _check_readable(shape: Shape) -> None:
    if shape.unreadable:
        raise Refused(
            RoutingError,
            f"the router cannot look into {', '.join(shape.unreadable)}",
            "name the shard with shardkit_shard or the key with shardkit_key",
            table=shape.tables[0],
        )
    if shape.unknown_functions:
        raise Refused(
            RoutingError,
            f"the router does not know what {', '.join(shape.unknown_functions)}() does over several shards",
            "work its value out first and pass it",
            table=shape.tables[0],
        )


def _check_limit(statement: Any, table: str) -> None:
    options = [name for name in getattr(statement, "dialect_kwargs", {}) if name.endswith("_limit")]
    if options or getattr(statement, "_post_criteria_clause", None) is not None:
        raise Refused(
            RoutingError,
            f"a change of {table} with LIMIT over several shards",
            "pin it to one key, or select the rows first and change them by their keys",
            table=table,
        )


def _per_shard(statements: Mapping[str, Any], parameters: Parameters) -> dict[str, ShardStatement]:
    return {shard: ShardStatement(statement, parameters) for shard, statement in statements.items()}
