"""SELECT -> Route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.selectable import CompoundSelect

from shardkit.errors import CrossShardJoin, RoutingError
from shardkit.routing.conditions import Binds
from shardkit.routing.hints import Hint, hint_of
from shardkit.routing.merge import MergePlan
from shardkit.routing.moving import moves_on, restricted
from shardkit.routing.policy import check_policy
from shardkit.routing.queries import limited_tables, loses_limited_rows
from shardkit.routing.route import Parameters, Route, RouteOptions, ShardStatement, StatementKind
from shardkit.routing.shapes import Pinned, Shape, Shapes
from shardkit.routing.splitting import SplitContext, merge_plan
from shardkit.routing.spread import Everywhere, Parted, Refused, check_connection, check_readable
from shardkit.routing.unions import as_select
from shardkit.shardmap import ShardMap


class Reads:
    """Plans SELECTs on one map."""

    def __init__(self, shard_map: ShardMap, shapes: Shapes, dialect: Dialect) -> None:
        self._map = shard_map
        self._shapes = shapes
        self._dialect = dialect

    def route(self, statement: Executable, parameters: Parameters, options: RouteOptions) -> Route:
        """Decide where a SELECT runs.

        :raises RoutingError: when it cannot be answered as one database would.
        """
        given = one_set(parameters)
        shape, binds = self._shapes.of(statement, given)
        route = Route(
            StatementKind.SELECT,
            statement,
            parameters,
            (),
            shape.keyspace,
            shape.tables,
            locking=shape.locking,
            reasons=shape.reasons,
        )
        hint = hint_of(options, self._map, shape.infos, shape.lineage.occurrences, shape.lineage.readers)
        try:
            if hint is not None:
                return self._hinted(route, shape, binds, hint)
            check_connection(shape.lineage.functions, shape.tables[0] if shape.tables else None)
            return self._planned(route, shape, binds, options)
        except Refused as refused:
            sharded = next((info for info in shape.infos if info.kind == "sharded"), None)
            raise refused.over(
                len({shard for info in shape.infos for shard in info.shards}), sharded.key if sharded else ()
            ) from None

    def check_load(self, statement: Any, parameters: Parameters, shard: str) -> None:
        """`Planner.check_load`."""
        shape, binds = self._shapes.of(statement, one_set(parameters))
        try:
            check_connection(shape.lineage.functions, shape.tables[0])
            check_readable(shape.unreadable, self._map, shard, shape.tables[0])
            if _distinct(shape.pinned(binds)) != (shard,):
                _ = shape.spread
        except Refused as refused:
            info = shape.infos[0]
            raise refused.over(len(info.shards), info.key) from None

    def loads_beside(self, statement: Any, parameters: Parameters) -> bool:
        """`Planner.loads_beside`."""
        return self._shapes.of(statement, one_set(parameters))[0].loads_beside

    # --- one shard

    def _planned(self, route: Route, shape: Shape, binds: Binds, options: RouteOptions) -> Route:
        if not shape.sharded:
            return self._anywhere(route, shape)
        pinned = shape.pinned(binds)
        shards = _distinct(pinned)
        if len(shards) == 1:
            return self._on_one(route, shape, shards[0], pinned)
        if shards or shape.unreadable:
            return self._spread(route, shape, options)
        if self._is_empty(shape, binds):
            return replace(route, shards=(), buckets=frozenset())
        return self._on_one(route, shape, self._home(shape), pinned)

    def _anywhere(self, route: Route, shape: Shape) -> Route:
        """Reference tables only, or no table at all: any shard that has them answers."""
        shards = tuple(shard for shard in self._map.shards if all(shard in info.shards for info in shape.infos))
        if not shards:
            raise Refused(
                CrossShardJoin,
                f"the reference tables {', '.join(shape.tables)} stand on no shard together",
                "add them to the same keyspace",
            )
        if len(shards) > 1:
            self._check_readable(shape)
        reason = f"{', '.join(shape.tables)}: the same on every shard" if shape.tables else "no table"
        others = () if shape.locking else shards  # two who lock the same row have to meet on the same shard
        return replace(route, shards=shards[:1], alternatives=others, reasons=(reason,))

    def _on_one(self, route: Route, shape: Shape, shard: str, pinned: Sequence[Pinned]) -> Route:
        missing = next((info for info in shape.infos if shard not in info.shards), None)
        if missing is not None:
            raise Refused(
                CrossShardJoin,
                f"the other tables are pinned to shard {shard!r}, where {missing.name!r} does not stand",
                "read one after the other",
                table=missing.name,
            )
        check_readable(shape.unreadable, self._map, shard, shape.tables[0])
        buckets = None
        if all(each.buckets is not None for each in pinned):
            buckets = frozenset(bucket for each in pinned for bucket in each.buckets or ())
        return replace(route, shards=(shard,), buckets=buckets)

    def _is_empty(self, shape: Shape, binds: Binds) -> bool:
        """Whether no row can come out. An aggregate over nothing still makes one."""
        if shape.query.collapses or shape.query.branches:
            return False
        try:
            spread = shape.spread
        except Refused:
            return False
        return isinstance(spread, Parted) and not shape.anchored(binds).shards

    def _home(self, shape: Shape) -> str:
        """A shard that has every table, for a statement that no row matches."""
        for shard in self._map.shards:
            if all(shard in info.shards for info in shape.infos):
                return shard
        raise Refused(
            CrossShardJoin, f"{', '.join(shape.tables)} stand on no shard together", "read one after the other"
        )

    def _hinted(self, route: Route, shape: Shape, binds: Binds, hint: Hint) -> Route:
        buckets = None if hint.bucket is None else frozenset({hint.bucket})
        found = replace(route, shards=(hint.shard,), buckets=buckets, reasons=(hint.reason,))
        keyspaces = [info.keyspace for info in shape.infos if info.kind == "sharded"]
        moves = moves_on(self._map, keyspaces, (hint.shard,))
        pinned = shape.pinned(binds)
        if not moves or (all(each.buckets is not None for each in pinned) and _distinct(pinned) == (hint.shard,)):
            return found
        self._check_readable(shape)
        given = one_set(route.parameters)
        own = self._own_rows(route.statement, route.statement, given, (hint.shard,), moves[0].job)
        return replace(found, shard_statements=_per_shard(own, route.parameters))

    # --- several shards

    def _check_readable(self, shape: Shape) -> None:
        if shape.unreadable:
            raise Refused(
                RoutingError,
                f"the router cannot look into {', '.join(shape.unreadable)}",
                "name the shard with shardkit_shard or the key with shardkit_key",
                table=shape.tables[0] if shape.tables else None,
            )
        if shape.unknown_functions:
            raise Refused(
                RoutingError,
                f"the router does not know what {', '.join(shape.unknown_functions)}() does over several shards",
                "name the shard with shardkit_shard or the key with shardkit_key",
                table=shape.tables[0] if shape.tables else None,
            )

    def _spread(self, route: Route, shape: Shape, options: RouteOptions) -> Route:
        self._check_readable(shape)
        statement: Any = route.statement
        given = one_set(route.parameters)
        if isinstance(statement, CompoundSelect) and statement.keyword.name in {"UNION", "UNION_ALL"}:
            statement = as_select(statement)
        statement = _in_order_of_loader(statement)
        shape, binds = self._shapes.of(statement, given)
        # LIMIT is ours to cut after the merge; with it an ORM statement may hide its tables in a subquery
        whole = _without_limit(statement)
        wide, wide_binds = (shape, binds) if whole is statement else self._shapes.of(whole, given)
        spread = wide.spread
        if isinstance(spread, Everywhere):
            raise Refused(
                CrossShardJoin,
                f"{', '.join(spread.names) or 'a statement without FROM'} around a subquery over several shards",
                "tie the two by their keys, or run the subquery first and pass its values",
            )
        where = wide.anchored(wide_binds)
        found = replace(route, shards=where.shards, buckets=where.buckets)
        if len(where.shards) == 1:
            return found
        if not where.shards:
            if wide.query.collapses:
                return replace(found, shards=(self._home(shape),))
            return found
        if shape.locking:
            raise Refused(RoutingError, "FOR UPDATE over several shards", "pin it to one key, or to one shard")
        self._check_collections(shape)
        warning = check_policy(shape, options, len(where.shards))
        plan = self._merge(statement, shape, wide, binds, given)
        found = replace(found, merge=plan, warning=warning)
        moves = [move for name in {info.keyspace.name for info in shape.infos} for move in self._map.moves_of(name)]
        if moves:
            own = self._own_rows(plan.statement, statement, given, where.shards, moves[0].job)
            found = replace(found, shard_statements=_per_shard(own, route.parameters))
        return found

    def _check_collections(self, shape: Shape) -> None:
        """:raises Refused: for an object of a reference table with a collection of which each shard has a part."""
        tables = self._map.tables
        for each in shape.lineage.collections:
            owner, member = (tables.get(str(of.local_table)) for of in (each.parent, each.mapper))
            if owner is not None and owner.kind == "reference" and (member is None or member.kind != "reference"):
                raise Refused(
                    RoutingError,
                    f"a joined eager load of {each}: each shard has a part of the collection",
                    "use selectinload()",
                    table=owner.name,
                )

    def _merge(
        self, statement: Any, shape: Shape, wide: Shape, binds: Binds, given: Mapping[str, Any] | None
    ) -> MergePlan:
        # where the statement has a LIMIT that its outermost SELECT has not, joined eager loads stand around it
        nested = wide is not shape and not shape.query.limited
        if wide is not shape and not nested and shape.lineage.repeats:
            raise Refused(
                RoutingError,
                "contains_eager() of a collection under LIMIT over several shards: LIMIT cuts the collections",
                "use selectinload() or joinedload(), or take the LIMIT away",
                table=shape.tables[0],
            )
        if nested and loses_limited_rows(shape.query):
            raise Refused(
                RoutingError,
                "an eager load with innerjoin=True beside LIMIT over several shards: LIMIT counts rows that the join "
                "leaves out",
                "use joinedload() without innerjoin=True, or selectinload()",
                table=shape.tables[0],
            )
        context = SplitContext(
            query=wide.query,
            repeated=(lambda: limited_tables(self._shapes.fresh(statement, given).query)) if nested else None,
            own=lambda: self._shapes.fresh(_without_limit(statement), given),
            binds=binds,
            dialect=self._dialect,
            keyed_groups=wide.query.grouped and wide.keyed_groups,
            keyed_windows=not wide.query.windows or wide.keyed_windows,
            keyed_rows=wide.query.distinct and wide.keyed_rows,
        )
        return merge_plan(statement, context)

    def _own_rows(
        self, statement: Any, original: Any, given: Mapping[str, Any] | None, shards: Sequence[str], job: str
    ) -> Any:
        shape = self._shapes.fresh(_without_limit(original), given)
        if not isinstance(statement, sa.Select) or not isinstance(shape.spread, Parted):
            raise Refused(
                RoutingError,
                f"rebalance job {job} is moving rows, and this statement cannot be told to take each row once",
                "pin it to one key, or run it again when the job has ended (shardkit rebalance status)",
            )
        return restricted(statement, shape.lineage, shape.spread, shards, job)


def one_set(parameters: Parameters) -> Any:
    """The parameters of a statement that takes one set of them.

    :raises RoutingError: when several sets were given.
    """
    if parameters is None or isinstance(parameters, dict):
        return parameters
    if isinstance(parameters, Sequence):
        if len(parameters) > 1:
            raise RoutingError("a SELECT was given several sets of parameters", hint="execute it once for each")
        return parameters[0] if parameters else None
    return dict(parameters)


def _distinct(pinned: Sequence[Pinned]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shard for each in pinned for shard in each.shards))


def _without_limit(statement: Any) -> Any:
    if isinstance(statement, sa.Select) and statement._has_row_limiting_clause:  # noqa: SLF001 - no public reader
        return statement.limit(None).offset(None)
    return statement


def _in_order_of_loader(statement: Any) -> Any:
    """subqueryload(), and selectinload() by a join, add the order of their relationship when they are compiled: too
    late for what is merged by it."""
    every = getattr(statement, "_compile_state_funcs", ())
    adding = [each for each in every if each[0].__name__ == "_setup_outermost_orderby"]
    if not adding:
        return statement
    noted = SimpleNamespace(eager_order_by=())
    for add, _ in adding:
        add(noted)
    ordered = statement.order_by(*noted.eager_order_by)
    ordered._compile_state_funcs = tuple(each for each in every if each not in adding)  # noqa: SLF001 - once is enough
    return ordered


def _per_shard(statements: Any, parameters: Parameters) -> dict[str, ShardStatement]:
    return {shard: ShardStatement(statement, parameters) for shard, statement in statements.items()}
