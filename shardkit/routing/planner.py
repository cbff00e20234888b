"""Statement + parameters + map -> Route. Pure: no engine, no session, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import FromStatement
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.cache_key import CacheKey
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.sql.selectable import CompoundSelect
from sqlalchemy.util import immutabledict

from shardkit.errors import CrossShardJoin, KeyChange, MissingKey, RoutingError, ScatterRefused, UnknownTable
from shardkit.partition import WHOLE, Bucket
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.changes import Changes
from shardkit.routing.expressions import contents_of, may_select
from shardkit.routing.feeds import Feed, feeding_of
from shardkit.routing.inserts import Inserts
from shardkit.routing.keys import Readers
from shardkit.routing.keyvalues import Untrusted
from shardkit.routing.rawsql import Tables, no_tables
from shardkit.routing.reads import Reads, one_set
from shardkit.routing.route import Parameters, Route, RouteOptions, StatementKind
from shardkit.routing.rows import Rows
from shardkit.routing.shapes import Shape, Shapes
from shardkit.routing.spread import Refused, check_connection
from shardkit.routing.texts import Texts, reads_only, text_of
from shardkit.shardmap import Placement, ShardMap

_DEFAULT_OPTIONS = RouteOptions()
_MISSING = object()


class Keyed(NamedTuple):
    """Where a SELECT goes that one key decides.

    :param shard: holds the bucket.
    """

    shape: Shape
    bucket: Bucket
    shard: str


class Planner:
    """Plans statements against one map; keeps what it learned about each shape of statement.

    A cluster holds one for its current map, and makes a new one with each new map. Threads may share it.

    :param shard_map: the map that every route is planned on.
    :param dialect_name: ``mysql``, ``mariadb`` or ``sqlite``.
    :param tables: tells the types of raw SQL's columns.
    """

    def __init__(self, shard_map: ShardMap, *, dialect_name: str = "mysql", tables: Tables = no_tables) -> None:
        self.shard_map = shard_map
        self.dialect_name = dialect_name
        dialect = dialect_of(dialect_name)
        readers = Readers(dialect)
        self._dialect = dialect
        self._shapes = Shapes(shard_map, dialect, readers)
        self._rows = Rows(shard_map, readers)
        self._reads = Reads(shard_map, self._shapes, dialect)
        self._inserts = Inserts(shard_map, self._rows, self._shapes)
        self._changes = Changes(shard_map, self._rows, self._shapes)
        self._texts = Texts(shard_map, self._rows, self._reads, tables, dialect)
        self._only = shard_map.only
        self._files_keys = any(keyspace.directory for keyspace in shard_map.keyspaces.values())

    def plan(
        self, statement: Executable, parameters: Parameters = None, options: RouteOptions = _DEFAULT_OPTIONS
    ) -> Route:
        """Decide where a statement runs.

        :raises RoutingError: for a statement that cannot be answered as one database would (or one of its children:
            MissingKey, KeyChange, ScatterRefused, CrossShardJoin).
        :raises UnknownTable: for a table that the map does not name.
        """
        if isinstance(statement, LambdaElement):
            statement = statement._resolved  # noqa: SLF001 - the statement that it stands for
        if self._only is not None:
            return self._on_the_only(statement, parameters, options, self._only)
        try:
            return self._plan(statement, parameters, options)
        except RoutingError as error:  # nothing else can be meant than the one place where rows are
            sole = self.shard_map.sole_host
            hinted = options.shard is not None or options.key is not None
            # a row whose key says nothing, or no bucket, would not be found again by its key
            if sole is None or hinted or isinstance(error, MissingKey | KeyChange):
                raise
            if self._files_keys and kind_of(statement) in {StatementKind.INSERT, StatementKind.TEXT}:
                raise  # its keys would not be filed
            reason = f"{sole} is the only shard that holds anything ({error.message})"
            return replace(self._on_the_only(statement, parameters, options, sole), reasons=(reason,))

    def _plan(self, statement: Any, parameters: Parameters, options: RouteOptions) -> Route:
        match statement:
            case sa.Select():
                quick = self._quick(statement, parameters, options)
                return quick or self._fed(self._reads.route, statement, parameters, options)
            case CompoundSelect():
                return self._fed(self._reads.route, statement, parameters, options)
            case FunctionElement():
                return self._reads.route(statement.select(), parameters, options)
            case sa.Insert():
                return self._inserts.route(statement, parameters, options)
            case sa.Update() | sa.Delete():
                return self._fed(self._changes.route, statement, parameters, options)
            case ExecutableDDLElement():
                return self._texts.ddl(statement, parameters, options)
            case FromStatement() if kind_of(statement.element) is not StatementKind.TEXT:
                return self._of_entities(statement, parameters, options)
            case _:
                return self._texts.route(statement, parameters, options)

    def _of_entities(self, statement: FromStatement[Any], parameters: Parameters, options: RouteOptions) -> Route:
        """``select(...).from_statement(...)`` of no raw SQL: where the statement inside runs, if that is one shard."""
        route = self._plan(_inside(statement), parameters, options)
        if route.first is not None or route.merge is not None or route.shard_statements or len(route.shards) > 1:
            raise RoutingError(
                f"from_statement() of a statement that is not for one shard alone ({', '.join(route.tables)})",
                hint="select from an aliased() subquery, or run the statement inside as it is",
                table=route.tables[0] if route.tables else None,
                shards=len(route.shards),
            )
        return replace(route, statement=statement)

    def _fed(
        self,
        plan: Callable[[Any, Parameters, RouteOptions], Route],
        statement: Any,
        parameters: Parameters,
        options: RouteOptions,
    ) -> Route:
        """Plan a statement; where its subqueries are in the way, plan them as statements that run before it."""
        try:
            return plan(statement, parameters, options)
        except (ScatterRefused, KeyChange):
            raise
        except RoutingError:
            if isinstance(parameters, Sequence) and len(parameters) > 1:
                raise
            names = tuple(one_set(parameters) or ())
            changes = isinstance(statement, sa.Update | sa.Delete)
            feeding = feeding_of(statement, names, self._dialect, locked=changes)
            if feeding is None:
                raise
        # nothing is known of the values yet: whether the statement may go to all shards is asked when they are
        allowed = replace(options, scatter=options.scatter or options.scatter is None)
        route = plan(feeding.assumed(), parameters, allowed)
        routes = tuple(self._of_feed(feed, parameters, options) for feed in feeding.feeds)
        return replace(route, statement=statement, first=replace(feeding, routes=routes))

    def _of_feed(self, feed: Feed, parameters: Parameters, options: RouteOptions) -> Route:
        try:
            return self.plan(feed.statement, parameters, options)
        except ScatterRefused:
            raise
        except RoutingError as error:
            raise CrossShardJoin(
                f"a subquery would have to run first ({feed.purpose}), and cannot: {error.message}",
                hint="run it as a statement of its own, and pass its values",
                table=error.table,
                key=error.key,
                shards=error.shards,
            ) from error

    def _on_the_only(self, statement: Any, parameters: Parameters, options: RouteOptions, shard: str) -> Route:
        """A cluster of one shard is that database: nothing is refused; ``warn`` says what would be."""
        kind = kind_of(statement)
        text = text_of(statement) if kind is StatementKind.TEXT else None
        reads = kind is StatementKind.SELECT or (text is not None and reads_only(text))
        locking = not reads or getattr(statement, "_for_update_arg", None) is not None
        route = Route(kind, statement, parameters, (shard,), writes=not reads, locking=locking, reasons=_ONE)
        if options.policy == "warn" and options.scatter is None and options.shard is None:
            return replace(route, warning=self._over_several(statement, parameters, options))
        return route

    @cached_property
    def _spread_out(self) -> Planner:
        """A planner for the same keyspaces over one more shard that does not exist."""
        return Planner(_spread_out(self.shard_map), dialect_name=self.dialect_name)

    def _over_several(self, statement: Any, parameters: Parameters, options: RouteOptions) -> str | None:
        try:
            return self._spread_out.plan(statement, parameters, options).warning
        except (RoutingError, UnknownTable) as error:
            return f"over several shards this would be refused: {error.message}"

    def keyed(self, statement: sa.Select[Any], parameters: Parameters) -> Keyed | None:
        """Where the commonest SELECT goes: of a shape seen before, whose one key is one bound parameter. As `plan`, in
        less time.

        :returns: None where it has to be planned, or where a value has to be asked for first (`bindparam` with
            ``callable_``).
        :raises KeyNotLookedUp: when a directory has to be asked.
        """
        key = statement._generate_cache_key()  # noqa: SLF001 - memoized: SQLAlchemy asks for it anyway
        if key is None or self._only is not None:
            return None
        for bind in key.bindparams:
            if bind.callable is not None:
                return None
        return self._keyed(key, parameters)

    def _keyed(self, key: CacheKey, parameters: Parameters) -> Keyed | None:
        shape = self._shapes.find(key.key)
        if shape is None or shape.quick is None or key.params:
            return None
        read, slot, keyspace = shape.quick
        value = _MISSING
        if parameters:
            if not isinstance(parameters, dict):
                return None
            value = parameters.get(slot.key, _MISSING)
            if value is _MISSING:
                value = parameters.get(slot.name, _MISSING)
        if value is _MISSING:
            bind = slot.bind if slot.position is None else key.bindparams[slot.position]
            if bind.required:
                return None
            value = bind.effective_value
        value = read(value)
        if value is None or isinstance(value, Untrusted) or keyspace.partition is None:
            return None
        try:
            bucket = keyspace.partition.bucket_of((value,))
        except TypeError:
            return None
        return None if bucket is None else Keyed(shape, bucket, keyspace.placement[bucket])

    def _quick(self, statement: Any, parameters: Parameters, options: RouteOptions) -> Route | None:
        if options.shard is not None or options.key is not None:
            return None
        key = statement._generate_cache_key()  # noqa: SLF001 - as in keyed()
        keyed = None if key is None else self._keyed(key, parameters)
        if keyed is None:
            return None
        shape = keyed.shape
        return Route(
            StatementKind.SELECT,
            statement,
            parameters,
            (keyed.shard,),
            shape.keyspace,
            shape.tables,
            frozenset((keyed.bucket,)),
            locking=shape.locking,
            reasons=shape.reasons,
        )

    def check_load(self, statement: Any, parameters: Parameters, shard: str) -> None:
        """A SELECT of one object's row, which is known to be on this shard: what it reads along has to stand there.

        :raises RoutingError: where it may read rows of other shards.
        """
        select = _inside(statement) if isinstance(statement, FromStatement) else statement
        self._reads.check_load(select, parameters, shard)

    def loads_beside(self, statement: Any, parameters: Parameters) -> bool:
        """Whether the rows that ``subqueryload()`` reads stand on the shard of the rows that it reads them for."""
        return self.shard_map.sole_host is not None or self._reads.loads_beside(statement, parameters)

    def check_values(
        self, table: sa.Table, values: Mapping[Any, ClauseElement], shard: str, key: Sequence[Any] | None
    ) -> None:
        """SQL expressions as values of a row on this shard, in a flush: what they read has to stand there.

        :param values: by column.
        :param key: of a row that is there already, empty where it is not known; None for a new one.
        :raises RoutingError: where they may read rows of other shards.
        """
        if self.shard_map.sole_host is not None:
            return
        info = self.shard_map.table(table.fullname)
        try:
            check_connection(contents_of(values.values()).functions, info.name)
        except Refused as refused:
            raise refused.over(len(info.shards), info.key) from None
        reading = {column: value for column, value in values.items() if may_select(value)}
        if not reading:
            return
        if key is None:
            self._inserts.check_values([*reading.values()], info, shard)
            return
        columns = {column.name: column for column in table.c}
        here = [columns[name] == value for name, value in zip(info.key, key, strict=False)]
        route = self._changes.route(sa.update(table).values(reading).where(*here), None, _DEFAULT_OPTIONS)
        if route.shards != (shard,):
            raise RoutingError(
                f"an SQL expression that is written to {info.name} on shard {shard!r} reads rows of other shards",
                hint="read its value first and assign it",
                table=info.name,
                key=info.key,
                shards=len(route.shards),
            )

    def place(self, table: sa.Table, row: Mapping[str, Any]) -> Placement | None:
        """Where one row belongs: for objects in a flush.

        :param row: the row's values by column name, as the application has them (before bind processing); a column
            that is not in it has no value. None is a value.
        :returns: None for a reference table: the row belongs on every shard of the keyspace.
        :raises MissingKey: when a key column is missing, or its value cannot be trusted to be stored as it is.
        :raises UnknownTable: for a table that the map does not name.
        """
        if self._only is not None:
            return Placement("", WHOLE, self._only)
        info = self.shard_map.table(table.fullname)
        if len(info.shards) == 1 and info.kind == "sharded" and not info.keyspace.directory:
            return self._rows.on_one_shard(table, row, info)
        return self._rows.place(table, row)


_ONE = ("the cluster has one shard",)


def _inside(statement: FromStatement[Any]) -> Any:
    """The statement in ``from_statement()``: what ``params()`` has said of the one around it holds for it."""
    inside: Any = statement.element
    if statement._params:  # noqa: SLF001 - no public reader
        inside = inside._generate()  # noqa: SLF001 - an update() has no params() of its own
        inside._params = immutabledict({**inside._params, **statement._params})  # noqa: SLF001
    return inside


def _spread_out(shard_map: ShardMap) -> ShardMap:
    """The same keyspaces with every second bucket on another shard."""
    (name, shard), *_ = shard_map.shards.items()
    other = f"{name}-and-another"
    keyspaces = {
        keyspace.name: replace(
            keyspace,
            placement={bucket: other if number % 2 else name for number, bucket in enumerate(keyspace.placement)},
        )
        for keyspace in shard_map.keyspaces.values()
    }
    return replace(shard_map, keyspaces=keyspaces, shards={name: shard, other: replace(shard, name=other)}, moves=())


def kind_of(statement: Any) -> StatementKind:
    """What a statement does."""
    match statement:
        case sa.Select() | CompoundSelect() | FunctionElement():
            return StatementKind.SELECT
        case sa.Insert():
            return StatementKind.INSERT
        case sa.Update():
            return StatementKind.UPDATE
        case sa.Delete():
            return StatementKind.DELETE
        case ExecutableDDLElement():
            return StatementKind.DDL
        case _:
            return StatementKind.TEXT


def plan(
    statement: Executable,
    parameters: Parameters,
    shard_map: ShardMap,
    options: RouteOptions = _DEFAULT_OPTIONS,
    *,
    dialect_name: str = "mysql",
) -> Route:
    """`Planner.plan` for a single statement: nothing is kept."""
    return Planner(shard_map, dialect_name=dialect_name).plan(statement, parameters, options)
