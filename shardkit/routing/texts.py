"""Raw SQL and DDL -> Route.

Raw SQL goes where ``shardkit_shard`` or ``shardkit_key`` says; where they say nothing, to the one shard that plain SQL
is about (`shardkit.routing.rawsql`). Plain SQL that is about another shard than they say is refused, as the same
statement made of `insert()` or `update()` is. Raw SQL is never sent to several shards: nobody could put their rows
together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import FromStatement
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import BindParameter

from shardkit.errors import KeyChange, MissingKey, RoutingError
from shardkit.partition import Bucket
from shardkit.routing.conditions import Binds
from shardkit.routing.functions import OF_THE_STATEMENT_BEFORE
from shardkit.routing.hints import Hint, hint_of
from shardkit.routing.inserts import parameter_sets
from shardkit.routing.keys import Readers
from shardkit.routing.rawsql import RawStatement, Tables, read_raw
from shardkit.routing.reads import Reads
from shardkit.routing.route import Parameters, Route, RouteOptions, StatementKind
from shardkit.routing.rows import Rows
from shardkit.routing.shapes import Pinned, Shape, Shapes
from shardkit.shardmap import Placement, ShardMap, TableInfo

_READS: Final = re.compile(r"\s*(?:\(\s*)*(?:select|show|explain|describe|desc|values)\b", re.IGNORECASE)
_LOCKS: Final = re.compile(
    r"\bfor\s+(?:update|share)\b|\block\s+in\s+share\s+mode\b|\binto\s+(?:outfile|dumpfile|@)", re.IGNORECASE
)


class Texts:
    """Plans raw SQL and DDL on one map."""

    def __init__(self, shard_map: ShardMap, rows: Rows, reads: Reads, tables: Tables, dialect: Dialect) -> None:
        self._map = shard_map
        self._rows = rows
        self._reads = reads
        self._tables = tables
        self._dialect = dialect
        self._readers = Readers(dialect)
        self._shapes = Shapes(shard_map, dialect, self._readers)

    def route(self, statement: Executable, parameters: Parameters, options: RouteOptions) -> Route:
        """Where raw SQL runs.

        :raises RoutingError: when nothing says where it belongs, or what it says contradicts the options.
        """
        text = text_of(statement)
        writes = text is None or not reads_only(text)
        locking = text is None or bool(_LOCKS.search(text))
        route = Route(StatementKind.TEXT, statement, parameters, (), writes=writes, locking=locking)
        element = _raw(statement)
        raw = None
        if element is not None:
            raw = read_raw(element.text, _binds_of(statement, element), self._map, self._tables, self._dialect)
        if options.shard is not None or options.key is not None:
            return self._hinted(route, raw, options)
        if raw is not None and element is not None:
            _check_connection(element.text)
            return self._where_it_reads(route, raw, options)
        raise RoutingError(
            f"raw SQL ({type(statement).__name__}) does not say which of {len(self._map.shards)} shards it is for",
            hint="name the shard with shardkit_shard or the key with shardkit_key, or write it as a select()",
            shards=len(self._map.shards),
        )

    # --- with shardkit_shard or shardkit_key

    def _hinted(self, route: Route, raw: RawStatement | None, options: RouteOptions) -> Route:
        """Where the options say. What plain SQL says itself has to agree with them."""
        shape = None if raw is None else self._shape(raw)
        buckets = None
        if raw is None or shape is None:
            hint = hint_of(options, self._map)
        else:
            declared = ((each, self._tables(each.info.name)) for each in shape.lineage.occurrences)
            typed = [replace(each, clause=table) for each, table in declared if table is not None]
            hint = hint_of(options, self._map, shape.infos, typed, self._readers)
            self._check_change(raw)
            buckets = None if hint is None else self._agreed(route, raw, hint, shape.infos[0])
        assert hint is not None  # noqa: S101 - asked only where the options say something
        if buckets is None and hint.bucket is not None:
            buckets = frozenset({hint.bucket})
        self._check_moves(hint.shard, buckets)
        return replace(route, shards=(hint.shard,), buckets=buckets, reasons=(hint.reason,))

    def _shape(self, raw: RawStatement) -> Shape | None:
        """Its tables; None where the map does not know one of them: then nothing of the text is certain."""
        try:
            return self._shapes.of(raw.select, None)[0]
        except sa_exc.InvalidRequestError:  # UnknownTable and RoutingError are such
            return None

    def _agreed(self, route: Route, raw: RawStatement, hint: Hint, info: TableInfo) -> frozenset[Bucket] | None:
        """The buckets of all its rows, where it pins them.

        :raises RoutingError: when it pins rows to other shards than the hint's.
        """
        sets = parameter_sets(route.parameters) or ({},)
        said = [pinned for given in sets for pinned in self._pinned(raw, given)]
        for pinned in said:
            if pinned.buckets and hint.shard not in pinned.shards:
                what = "the key of the row belongs on" if raw.inserted else "the key in the statement is on"
                raise RoutingError(
                    f"{hint.reason} says {hint.shard!r}, but {what} {', '.join(pinned.shards)}",
                    hint="leave the option away",
                    table=info.name,
                    key=info.key,
                    shards=len(pinned.shards),
                )
        known = [each.buckets for each in said if each.buckets is not None and each.shards == (hint.shard,)]
        return frozenset[Bucket]().union(*known) if known and len(known) == len(said) else None

    def _pinned(self, raw: RawStatement, given: Mapping[str, Any]) -> Sequence[Pinned]:
        """What each row of an INSERT, or each group of tables, says of its place. What is not known is for the hint."""
        if raw.inserted:
            places = [self._known_place(raw, row, given) for row in raw.inserted]
            return [
                Pinned(None, ()) if place is None else Pinned(frozenset({place.bucket}), (place.shard,))
                for place in places
            ]
        shape, binds = self._shapes.of(raw.select, given or None)
        try:
            return shape.pinned(binds)
        except sa_exc.InvalidRequestError:  # a parameter without a value: it will not run either
            return ()

    def _known_place(self, raw: RawStatement, row: Mapping[str, Any], given: Mapping[str, Any]) -> Placement | None:
        info = self._map.table(raw.changes or "")
        try:
            self._check_counted(raw, info, given)
            return self._rows.place(raw.source, row, Binds(given, ()))
        except sa_exc.InvalidRequestError:  # MissingKey is one
            return None

    # --- without them

    def _where_it_reads(self, route: Route, raw: RawStatement, options: RouteOptions) -> Route:
        """The one shard that holds the rows of plain SQL."""
        found = self._of_rows(route, raw) if raw.inserted else self._of_select(route, raw, options)
        self._check_change(raw)
        table = found.tables[0]
        if len(found.shards) > 1:
            raise RoutingError(
                f"raw SQL on {table} would run on {len(found.shards)} shards: {'; '.join(found.reasons)}",
                hint="compare the key with a value (create_cluster(metadata=...) says of what type it is), name it "
                "with shardkit_key, or write the statement as a select(), whose rows can be put together",
                table=table,
                key=self._map.table(table).key,
                shards=len(found.shards),
            )
        shards = found.shards or self._map.table(table).shards[:1]  # no row can match; its columns are wanted
        self._check_moves(shards[0], found.buckets)
        return replace(
            route,
            shards=shards,
            keyspace=found.keyspace,
            tables=found.tables,
            buckets=found.buckets,
            alternatives=() if route.writes or route.locking else found.alternatives,
            reasons=found.reasons,
        )

    def _check_change(self, raw: RawStatement) -> None:
        """:raises RoutingError: for a change of a reference table's one copy, or of a key."""
        if raw.changes is None:
            return
        info = self._map.table(raw.changes)
        if info.kind == "reference" and len(info.shards) > 1:
            raise RoutingError(
                f"raw SQL that changes the reference table {info.name!r} would change it on one shard only",
                hint="write it as an insert(), update() or delete()",
                table=info.name,
                shards=len(info.shards),
            )
        movable = len(info.shards) > 1 or info.keyspace.directory is not None
        keys = {column.lower() for column in info.key} if movable else set()
        if changed := [column for column in raw.assigned if column.lower() in keys]:
            raise KeyChange(
                f"raw SQL would change {changed[0]}, which {info.name!r} is sharded by",
                hint="insert a row with the new key, and delete the old one",
                table=info.name,
                key=info.key,
            )

    def ddl(self, statement: ExecutableDDLElement, parameters: Parameters, options: RouteOptions) -> Route:
        """Where DDL runs: on every shard that hosts the table.

        :raises RoutingError: when it is not about one table, or the table's rows are being moved.
        """
        route = Route(StatementKind.DDL, statement, parameters, (), writes=True, locking=True, replicated=True)
        hint = hint_of(options, self._map)
        if hint is not None:
            return replace(route, shards=(hint.shard,), reasons=(hint.reason,))
        table = _table_of(statement)
        if table is None:
            raise RoutingError(
                f"the DDL {type(statement).__name__} does not say which table, so not which shards, it is for",
                hint="run it once for each shard with shardkit_shard, or with shardkit migrate",
                shards=len(self._map.shards),
            )
        info = self._map.table(table.fullname)
        moves = [move.job for keyspace in info.keyspaces for move in self._map.moves_of(keyspace.name)]
        if moves:
            raise RoutingError(
                f"rebalance job {moves[0]} is moving rows of the keyspace of {info.name}",
                hint="run it again when the job has ended (shardkit rebalance status)",
                table=info.name,
                key=info.key,
                shards=len(info.shards),
            )
        return replace(
            route,
            shards=info.shards,
            keyspace=info.keyspace.name,
            tables=(info.name,),
            reasons=(f"{info.name} stands on {len(info.shards)} shards",),
        )

    def _check_moves(self, shard: str, buckets: frozenset[Bucket] | None) -> None:
        """:raises RoutingError: while rows come to this shard or leave it, for what is not pinned to a bucket."""
        moving = [move.job for move in self._map.moves if shard in (move.source, move.target)]
        if moving and not buckets:
            raise RoutingError(
                f"rebalance job {moving[0]} is moving rows to or from {shard!r}, and raw SQL cannot be told to "
                "take each row once",
                hint="name the key with shardkit_key, or wait for the end of the job (shardkit rebalance status)",
                shards=1,
            )

    def _of_select(self, route: Route, raw: RawStatement, options: RouteOptions) -> Route:
        if isinstance(route.parameters, Sequence) and len(route.parameters) > 1:
            raise RoutingError(
                "raw SQL was given several sets of parameters, whose rows may be on several shards",
                hint="execute it once for each, or name the shard with shardkit_shard",
            )
        return self._reads.route(raw.select, route.parameters, replace(options, scatter=True))

    def _of_rows(self, route: Route, raw: RawStatement) -> Route:
        """Where an INSERT's rows belong, for every set of parameters."""
        info = self._map.table(raw.changes or "")
        sets = parameter_sets(route.parameters) or ({},)
        for given in sets:
            self._check_counted(raw, info, given)
        places = [self._rows.place(raw.source, row, Binds(given, ())) for given in sets for row in raw.inserted]
        known = [place for place in places if place is not None]
        return replace(
            route,
            shards=tuple(dict.fromkeys(place.shard for place in known)) or info.shards,
            keyspace=info.keyspace.name,
            tables=(info.name,),
            buckets=frozenset(place.bucket for place in known),
            reasons=(f"the rows' {' and '.join(info.key) or info.name}",),
        )

    def _check_counted(self, raw: RawStatement, info: TableInfo, given: Mapping[str, Any]) -> None:
        """:raises MissingKey: for a key of 0 that the server would take as "give me the next number"."""
        declared = self._tables(info.name)
        counted = None if declared is None or self._dialect.name == "sqlite" else declared.autoincrement_column
        if counted is None:
            return
        for row in raw.inserted:
            bind = row.get(counted.name)
            if bind is not None and Binds(given, ()).of(bind) == 0:
                raise MissingKey(
                    f"the key {info.name}.{counted.name} is 0, for which the server puts in the next number",
                    hint="give another value: the number would be chosen after the shard",
                    table=info.name,
                    key=info.key,
                )


#: What an earlier statement has left on its connection: functions that tell of it, and variables.
_OF_THE_CONNECTION: Final = re.compile(
    rf"\b(?:{'|'.join(sorted(OF_THE_STATEMENT_BEFORE))})\s*\(|@(?!@)", re.ASCII | re.IGNORECASE
)
_QUOTED: Final = re.compile(r"'[^']*'|`[^`]*`")


def _check_connection(text: str) -> None:
    """:raises RoutingError: for plain SQL that takes up what another statement has left on its connection."""
    if _OF_THE_CONNECTION.search(_QUOTED.sub("''", text)):
        raise RoutingError(
            "raw SQL with a variable, or of the statement before on the same connection: each shard has its own",
            hint="pass the value as a parameter, or name the shard with shardkit_shard",
        )


def reads_only(text: str) -> bool:
    """Whether raw SQL certainly changes nothing and locks nothing."""
    return bool(_READS.match(text)) and not _LOCKS.search(text)


def writes_rows(statement: Any) -> bool:
    """Whether a statement says itself which rows it inserts."""
    if isinstance(statement, FromStatement):
        statement = statement.element
    if isinstance(statement, sa.Insert):
        return statement.select is None
    text = text_of(statement)
    return text is not None and text.lstrip()[:6].upper() == "INSERT"


#: What MySQL and MariaDB commit around (MySQL Reference Manual, "Statements That Cause an Implicit Commit"), and what
#: ends or begins a transaction by itself.
_COMMITTING: Final = re.compile(
    r"\s*(ALTER|ANALYZE|BEGIN|CACHE|CHECK|CHANGE|COMMIT|CREATE|DROP|FLUSH|GRANT|INSTALL|LOAD\s+INDEX|LOCK|OPTIMIZE|"
    r"RENAME|REPAIR|RESET|REVOKE|ROLLBACK(?!\s+TO)|SET\s+(@@|SESSION\s+)?(\w+\.)?AUTOCOMMIT|START|STOP|TRUNCATE|"
    r"UNINSTALL|UNLOCK)\b",
    re.IGNORECASE,
)
_TEMPORARY: Final = re.compile(r"\s*(CREATE|DROP)\s+TEMPORARY\s", re.IGNORECASE)


def commits_implicitly(statement: Any) -> bool:
    """Whether a server commits the transaction in which this runs."""
    if isinstance(statement, ExecutableDDLElement):
        return True
    text = text_of(statement)
    return text is not None and bool(_COMMITTING.match(text)) and not _TEMPORARY.match(text)


def text_of(statement: Any) -> str | None:
    """The text of raw SQL, also inside ``select(...).from_statement(text(...))``; None where there is none."""
    element = _raw(statement)
    return None if element is None else element.text


def _raw(statement: Any) -> sa.TextClause | None:
    element = statement
    for _ in range(4):
        if isinstance(element, sa.TextClause):
            return element
        element = getattr(element, "element", None)
    return None


def _binds_of(statement: Any, text: sa.TextClause) -> Mapping[str, BindParameter[Any]]:
    """The parameters of raw SQL, with the values that ``params()`` has given them."""
    said: dict[str, Any] = {}
    outer = statement
    while outer is not None:
        said = {**getattr(outer, "_params", {}), **said}
        outer = None if outer is text else outer.element
    binds: Mapping[str, Any] = text._bindparams  # noqa: SLF001 - no public reader
    return {
        name: bind._with_value(said[name], maintain_key=True, required=False) if name in said else bind  # noqa: SLF001 - what bindparams() does
        for name, bind in binds.items()
    }


def _table_of(statement: Any) -> sa.Table | None:
    element = getattr(statement, "element", None)
    if isinstance(statement, sa.schema.CreateTable | sa.schema.DropTable) or isinstance(element, sa.Table):
        return element if isinstance(element, sa.Table) and type(statement).__name__ in _ON_TABLES else None
    table = getattr(element, "table", None)
    return table if isinstance(table, sa.Table) else None


#: DDL on a whole table that reads nothing else (CREATE TABLE ... AS and views do).
_ON_TABLES: Final = frozenset({"CreateTable", "DropTable", "SetTableComment", "DropTableComment"})
