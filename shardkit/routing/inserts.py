"""INSERT -> Route: each row to the shard of its key, rows of one statement split by shard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.sql.elements import BindParameter, ClauseElement
from sqlalchemy.sql.selectable import ScalarSelect, SelectStatementGrouping, TableClause

from shardkit.errors import KeyChange, RoutingError
from shardkit.routing.conditions import Binds
from shardkit.routing.expressions import contents_of, may_select
from shardkit.routing.functions import PURE
from shardkit.routing.hints import Hint, hint_of
from shardkit.routing.merge import MergePlan
from shardkit.routing.route import Parameters, Route, RouteOptions, ShardStatement, StatementKind
from shardkit.routing.rows import Rows, attribute_of
from shardkit.routing.shapes import Shapes
from shardkit.routing.sorting import bare
from shardkit.routing.spread import Refused, check_connection, check_readable
from shardkit.shardmap import Placement, ShardMap, TableInfo

#: Prefixes that change nothing about which row is written.
_QUIET: Final = frozenset({"LOW_PRIORITY", "HIGH_PRIORITY", "DELAYED"})
#: Prefixes that make an INSERT depend on rows that are there already.
_DEPENDING: Final = frozenset({"IGNORE", "OR IGNORE", "OR REPLACE", "OR ABORT", "REPLACE"})


class Inserts:
    """Plans INSERTs on one map."""

    def __init__(self, shard_map: ShardMap, rows: Rows, shapes: Shapes) -> None:
        self._map = shard_map
        self._rows = rows
        self._shapes = shapes

    def route(self, statement: sa.Insert, parameters: Parameters, options: RouteOptions) -> Route:
        """Decide where an INSERT runs.

        :raises MissingKey: when a row has no key that can be trusted.
        :raises RoutingError: for what cannot be done on the rows' own shards.
        """
        mapper = mapper_of(statement)
        if mapper is None:  # the ORM takes each row as it is
            parameters = named_as_the_first(statement, parameters)
        sets = parameter_sets(parameters)
        tables = self._tables(statement, mapper if sets else None)
        infos = tuple(self._map.table(table.fullname) for table in tables)
        info = infos[0]
        hosts = tuple(dict.fromkeys(shard for each in infos for shard in each.shards))
        names = tuple(each.name for each in infos)
        route = Route(
            StatementKind.INSERT, statement, parameters, hosts, info.keyspace.name, names, writes=True, locking=True
        )
        hint = hint_of(options, self._map, infos)
        if hint is None:
            self._check_connection(statement, sets, info)
        if len(hosts) == 1 and not info.keyspace.directory:
            self._check_reads(statement, sets, info, hosts[0], tables)
            return replace(route, reasons=(f"{info.name} stands on one shard",))
        if len({each.kind for each in infos}) > 1 or len({each.keyspace.name for each in infos}) > 1:
            raise RoutingError(
                f"the tables {', '.join(names)} of one object stand in different keyspaces",
                hint="put them into one keyspace with the same key",
                table=info.name,
                shards=len(hosts),
            )
        self._check_clauses(statement, info, hosts)
        if info.kind == "reference":
            return self._everywhere(route, statement, sets, info, hint)
        found = self._by_key(route, statement, sets, tables, mapper)
        if hint is not None and found.shards != (hint.shard,):
            raise RoutingError(
                f"{hint.reason} says {hint.shard!r}, but the key of the row belongs on {', '.join(found.shards)}",
                hint="leave the option away",
                table=info.name,
                key=info.key,
                shards=len(found.shards),
            )
        for shard in found.shards:
            self._check_reads(statement, sets, info, shard, tables)
        return found

    def _tables(self, statement: sa.Insert, mapper: Any) -> tuple[TableClause, ...]:
        if mapper is not None:
            return tuple(table for table in mapper.tables if isinstance(table, TableClause))
        return (_table_of(statement),)

    def _check_connection(self, statement: sa.Insert, sets: Sequence[Mapping[str, Any]], info: TableInfo) -> None:
        values = [*_expressions_in(statement)]
        values += [each for part in _upsert_parts(statement) for each in _upsert_values(part)]
        functions = contents_of(values).functions
        for select in _selects_in(statement):
            functions |= self._shapes.of(select, sets[0] if sets else None)[0].lineage.functions
        try:
            check_connection(functions, info.name)
        except Refused as refused:
            raise refused.over(len(info.shards), info.key) from None

    def _check_reads(
        self,
        statement: sa.Insert,
        sets: Sequence[Mapping[str, Any]],
        info: TableInfo,
        shard: str,
        tables: Sequence[TableClause],
    ) -> None:
        """What the INSERT selects has to stand on the shard that it writes."""
        made_up = _defaults_by_sql(statement, tables, sets)
        whole = [statement.select] if statement._select_names else []  # noqa: SLF001 - no public reader
        self.check_values(
            [*_expressions_in(statement), *made_up], info, shard, whole, _said(statement, sets[0] if sets else None)
        )

    def check_values(
        self,
        values: Sequence[ClauseElement],
        info: TableInfo,
        shard: str,
        selects: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """What is written on a shard as an SQL expression must not read rows that stand elsewhere.

        :raises RoutingError: where it may.
        """
        try:
            check_readable(contents_of(values).unreadable, self._map, shard, info.name)
        except Refused as refused:
            raise refused.over(len(info.shards), info.key) from None
        for select in (*selects, *_subqueries_of(values)):
            shape, binds = self._shapes.of(select, given)
            pinned = {name for each in shape.pinned(binds) for name in each.shards}
            elsewhere = sorted(pinned - {shard})
            missing = [each.name for each in shape.infos if shard not in each.shards]
            if elsewhere or missing or shape.unreadable:
                raise RoutingError(
                    f"the INSERT into {info.name} on shard {shard!r} selects rows of other shards"
                    f" ({', '.join(elsewhere or missing or shape.unreadable)})",
                    hint="read the rows first and insert them: each goes to the shard of its key",
                    table=info.name,
                    key=info.key,
                    shards=len(pinned | {shard}),
                )

    # --- rows by their key

    def _by_key(
        self,
        route: Route,
        statement: sa.Insert,
        sets: Sequence[Mapping[str, Any]],
        tables: Sequence[TableClause],
        mapper: Any,
    ) -> Route:
        info = self._map.table(tables[0].fullname)
        multi = _multi_rows(statement, tables[0])
        if multi:
            places = [
                self._place(tables, row, Binds(_said(statement, sets[0] if sets else None), ()), mapper)
                for row in multi
            ]
        else:
            base = _single_row(statement)
            fixed = _fixed(base, mapper)
            places = [
                self._place(tables, {**base, **_without(row, fixed)}, Binds(_said(statement, row), ()), mapper)
                for row in sets or ({},)
            ]
        by_shard: dict[str, list[int]] = {}
        for number, place in enumerate(places):
            by_shard.setdefault(place.shard, []).append(number)
        shards = tuple(shard for shard in self._map.shards if shard in by_shard)
        key = " and ".join(f"{info.name}.{column}" for column in info.key) or info.name
        buckets = frozenset(place.bucket for place in places)
        found = replace(route, shards=shards, buckets=buckets, reasons=(f"the rows' {key}",))
        if len(shards) == 1:
            return found
        if multi:
            rows = _rows_as_the_first(multi, info)
            split = {
                shard: ShardStatement(_of_rows(statement, [rows[n] for n in by_shard[shard]]), route.parameters)
                for shard in shards
            }
        else:
            split = {shard: ShardStatement(statement, [sets[n] for n in by_shard[shard]]) for shard in shards}
        return replace(found, shard_statements=split, merge=_returned(statement, info, len(shards)))

    def _place(self, tables: Sequence[TableClause], row: Mapping[Any, Any], binds: Binds, mapper: Any) -> Placement:
        places = {self._rows.place(table, row, binds, mapper) for table in tables}
        if len(places) != 1:
            raise RoutingError(
                f"the tables {', '.join(table.name for table in tables)} of one object would go to different shards",
                hint="shard them by the same column",
                table=tables[0].name,
                shards=len(places),
            )
        place = places.pop()
        assert place is not None  # noqa: S101 - reference tables do not come here
        return place

    # --- reference tables

    def _everywhere(
        self,
        route: Route,
        statement: sa.Insert,
        sets: Sequence[Mapping[str, Any]],
        info: TableInfo,
        hint: Hint | None,
    ) -> Route:
        if hint is not None:
            raise RoutingError(
                f"{info.name} is a reference table: {hint.reason} would write it on one shard only",
                hint="leave the option away: it is written on every shard",
                table=info.name,
                shards=len(route.shards),
            )
        table: Any = _table_of(statement)
        if statement._select_names:  # noqa: SLF001 - no public reader
            raise RoutingError(
                f"INSERT ... SELECT into the reference table {info.name}",
                hint="read the rows first and insert them",
                table=info.name,
                shards=len(route.shards),
            )
        read = contents_of(_returned_expressions(statement))
        if read.subqueries or read.unreadable:
            raise RoutingError(
                f"RETURNING of a subquery or raw SQL, from an INSERT into the reference table {info.name}",
                hint="read it with a statement of its own",
                table=info.name,
                shards=len(route.shards),
            )
        base = _single_row(statement)
        rows = _multi_rows(statement, table) or [{**base, **row} for row in sets or ({},)]
        for row in rows:
            check_same_everywhere(row.values(), info)
        self._check_defaults(table, rows, info, mapper_of(statement))
        return replace(route, replicated=True, reasons=(f"{info.name} is a reference table: written on every shard",))

    def _check_defaults(self, table: Any, rows: Sequence[Mapping[Any, Any]], info: TableInfo, mapper: Any) -> None:
        """Refuse rows to which each shard would add a value of its own."""
        for column in table.c:
            default, server = getattr(column, "default", None), getattr(column, "server_default", None)
            automatic = column is getattr(table, "autoincrement_column", None)
            changing = automatic or (default is not None and not default.is_scalar) or not is_constant(server)
            if not changing:
                continue
            names = {column.name, column.key, attribute_of(mapper, column)}
            if any(names.isdisjoint({name_of(given) for given in row}) for row in rows):
                raise RoutingError(
                    f"{info.name} is a reference table, and each shard would choose its own {column.name}",
                    hint=f"give {column.key}=...",
                    table=info.name,
                    shards=len(info.shards),
                )

    # --- clauses

    def _check_clauses(self, statement: sa.Insert, info: TableInfo, hosts: Sequence[str]) -> None:
        clause = statement._post_values_clause  # noqa: SLF001 - no public reader
        prefixes = {str(getattr(each, "text", "?")).strip().upper() for each, _ in statement._prefixes}  # noqa: SLF001
        unknown = prefixes - _QUIET - _DEPENDING
        if unknown or statement._independent_ctes:  # noqa: SLF001
            what = f"the prefix {', '.join(sorted(unknown))}" if unknown else "a CTE"
            raise RoutingError(
                f"the router does not know what {what} does to an INSERT into {info.name}",
                hint="leave it away",
                table=info.name,
                key=info.key,
                shards=len(hosts),
            )
        if clause is not None:
            self._check_upsert(statement, _table_of(statement), info, hosts)
        if (clause is not None or prefixes & _DEPENDING) and info.kind == "sharded":
            self._check_unique(statement, info, hosts)

    def _check_upsert(self, statement: sa.Insert, table: Any, info: TableInfo, hosts: Sequence[str]) -> None:
        by_key = {column.key: column.name for column in table.c}  # columns may be given by either
        for part in _upsert_parts(statement):
            changes = _upsert_changes(part)
            changed = {name_of(column) for column in changes}
            if (changed | {by_key.get(name) for name in changed}) & set(info.key):
                raise KeyChange(
                    f"the upsert would change the key of {info.name}",
                    hint="leave the key column out of the update",
                    table=info.name,
                    key=info.key,
                    shards=len(hosts),
                )
            read = _upsert_values(part)
            if info.kind == "reference":
                check_same_everywhere(read, info)
                stamped = next(
                    (c for c in table.c if changed_by_server(c) and changed.isdisjoint({c.name, c.key})), None
                )
                if changes and stamped is not None:
                    raise RoutingError(
                        f"{info.name} is a reference table, and each shard would choose its own {stamped.name}",
                        hint=f"give {stamped.key}=... in the update, too",
                        table=info.name,
                        shards=len(hosts),
                    )
            contents = contents_of(read)
            if contents.subqueries or contents.unreadable:
                raise RoutingError(
                    f"the upsert of {info.name} reads a subquery or raw SQL",
                    hint="read it first and pass the value",
                    table=info.name,
                    key=info.key,
                    shards=len(hosts),
                )

    def _check_unique(self, statement: sa.Insert, info: TableInfo, hosts: Sequence[str]) -> None:
        table = _table_of(statement)
        if not isinstance(table, sa.Table):
            raise RoutingError(
                f"an upsert into {info.name}, whose unique indexes are not known",
                hint="use a Table with its constraints",
                table=info.name,
                key=info.key,
                shards=len(hosts),
            )
        for columns in _unique_sets(table):
            if not set(info.key) <= columns:
                raise RoutingError(
                    f"an upsert into {info.name}: the unique columns {', '.join(sorted(columns))} do not hold its key, "
                    "so the row that it would update may stand on another shard",
                    hint=f"make {', '.join(info.key)} part of that index",
                    table=info.name,
                    key=info.key,
                    shards=len(hosts),
                )


def _upsert_parts(statement: sa.Insert) -> Sequence[Any]:
    clause = statement._post_values_clause  # noqa: SLF001 - no public reader
    return () if clause is None else (clause, *getattr(clause, "clauses", ()))


def _upsert_changes(part: Any) -> Mapping[Any, Any]:
    return getattr(part, "update", None) or getattr(part, "update_values_to_set", None) or {}


def _upsert_values(part: Any) -> Iterable[ClauseElement]:
    """What an upsert sets, and on which condition."""
    values = (*_upsert_changes(part).values(), getattr(part, "update_whereclause", None))
    return [value for value in values if isinstance(value, ClauseElement)]


def parameter_sets(parameters: Parameters) -> Sequence[Mapping[str, Any]]:
    """Parameters as a list of sets; empty where there are none."""
    if parameters is None:
        return ()
    if isinstance(parameters, Mapping):
        return (parameters,) if parameters else ()
    return parameters


def named_as_the_first(statement: Any, parameters: Any) -> Any:
    """Several sets of parameters as SQLAlchemy takes them: those that the first one names, whatever others say besides.

    Split over shards, each shard has another first one.

    :raises RoutingError: for a set that lacks what the first one names.
    """
    if not isinstance(parameters, Sequence) or len(parameters) < 2:
        return parameters
    names = parameters[0].keys()
    if all(each.keys() == names for each in parameters):
        return parameters
    cache_key = statement._generate_cache_key()  # noqa: SLF001 - memoized: SQLAlchemy asks for it anyway
    own = {bind.key for bind in cache_key.bindparams if not bind.required} if cache_key else set()
    for number, each in enumerate(parameters):
        if lacking := [name for name in names if name not in each and name not in own]:
            raise RoutingError(
                f"set {number} of the parameters has no value for {', '.join(map(str, lacking))}, which the first has",
                hint="name the same columns in each of them",
            )
    return [{name: each[name] for name in names if name in each} for each in parameters]


def mapper_of(statement: Any) -> Any:
    """The mapper of an ORM-enabled INSERT, UPDATE or DELETE."""
    if statement._propagate_attrs.get("compile_state_plugin") != "orm":  # noqa: SLF001 - no public reader
        return None
    subject = statement._propagate_attrs.get("plugin_subject")  # noqa: SLF001
    return getattr(subject, "mapper", None)


def name_of(column: Any) -> Any:
    """The name in SQL of a column given as itself or by name."""
    return getattr(column, "name", column)


def check_same_everywhere(values: Iterable[Any], info: TableInfo) -> None:
    """Refuse values that each shard of a reference table would work out for itself, and differently.

    :raises RoutingError: for functions that are not pure, subqueries and raw SQL.
    """
    contents = contents_of(value for value in values if isinstance(value, ClauseElement))
    changing = sorted(contents.functions - PURE)
    if changing or contents.subqueries or contents.unreadable:
        what = f"{', '.join(changing)}()" if changing else "a subquery or raw SQL"
        raise RoutingError(
            f"{info.name} is a reference table: {what} may have another value on each shard",
            hint="work the value out first and pass it",
            table=info.name,
            shards=len(info.shards),
        )


_LITERAL: Final = re.compile(r"\s*(-?\d+(\.\d+)?|'[^']*'|null|true|false)\s*", re.IGNORECASE)


def is_constant(server_default: Any) -> bool:
    """Whether a column's own default is the same on every shard."""
    if server_default is None or isinstance(server_default, sa.Computed):
        return True
    given = getattr(server_default, "arg", None)
    return isinstance(given, str) or (isinstance(given, sa.TextClause) and bool(_LITERAL.fullmatch(given.text)))


def changed_by_server(column: Any) -> bool:
    """Whether the server sets a column in every UPDATE that does not: MySQL's ON UPDATE stands beside the default."""
    if getattr(column, "server_onupdate", None) is not None:
        return True
    given = getattr(getattr(column, "server_default", None), "arg", None)
    return isinstance(given, sa.TextClause) and bool(_ON_UPDATE.search(given.text))


_ON_UPDATE: Final = re.compile(r"\bon\s+update\b", re.IGNORECASE)


def _unique_sets(table: sa.Table) -> Iterable[set[str]]:
    yield {column.name for column in table.primary_key.columns}
    for constraint in table.constraints:
        if isinstance(constraint, sa.UniqueConstraint):
            yield {column.name for column in constraint.columns}
    for index in table.indexes:
        if index.unique:
            yield {column.name for column in index.columns}


def _table_of(statement: sa.Insert) -> Any:
    return statement.table._deannotate(clone=False)  # noqa: SLF001 - ORM annotations, which have no public way off


def _selects_in(statement: sa.Insert) -> Iterable[Any]:
    """The SELECTs whose rows or values an INSERT writes."""
    if statement._select_names:  # noqa: SLF001 - no public reader
        yield statement.select
    yield from _subqueries_of(_expressions_in(statement))


def _subqueries_of(values: Iterable[ClauseElement]) -> Iterator[Any]:
    for inner in contents_of(values).subqueries:
        select = inner.select
        while isinstance(select, ScalarSelect | SelectStatementGrouping):
            select = select.element
        yield select


def _defaults_by_sql(
    statement: sa.Insert, tables: Sequence[TableClause], sets: Sequence[Mapping[str, Any]]
) -> list[ClauseElement]:
    """The defaults of the model that read rows, of columns that some row does not give."""
    defaults = [(column, getattr(column, "default", None)) for table in tables for column in table.c]
    reading = [
        (column, default.arg)
        for column, default in defaults
        if default is not None and default.is_clause_element and may_select(default.arg)
    ]
    if not reading:  # the rows may be many
        return []
    mapper, base = mapper_of(statement), _single_row(statement)
    rows = _multi_rows(statement, tables[0]) or [{**base, **row} for row in sets or ({},)]
    given = [{name_of(each) for each in row} for row in rows]
    return [
        value
        for column, value in reading
        if not all(names & {column.name, column.key, attribute_of(mapper, column)} for names in given)
    ]


def _expressions_in(statement: sa.Insert) -> Iterator[ClauseElement]:
    """The values that are SQL expressions, and what is returned."""
    yield from _returned_expressions(statement)
    values = [*(statement._values or {}).values()]  # noqa: SLF001 - no public reader
    values += [value for row in _multi_rows(statement, _table_of(statement)) for value in row.values()]
    yield from (value for value in values if isinstance(value, ClauseElement))


def _returned_expressions(statement: sa.Insert) -> Iterator[ClauseElement]:
    for each in statement._returning:  # noqa: SLF001 - no public reader
        if not isinstance(each, sa.FromClause):
            yield each


def _said(statement: sa.Insert, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The values of parameters: also those that ``params()`` has said of a ``select().from_statement()`` around it."""
    said: Mapping[str, Any] = statement._params  # noqa: SLF001 - no public reader
    return {**said, **(given or {})} if said else given


def _single_row(statement: sa.Insert) -> Mapping[Any, Any]:
    """The values that stand in the statement; of INSERT ... SELECT, those that it gives as constants."""
    if not statement._select_names:  # noqa: SLF001 - no public reader
        return statement._values or {}  # noqa: SLF001
    select: Any = statement.select
    columns = select.selected_columns if isinstance(select, sa.Select) else ()
    return {name: bare(column) for name, column in zip(statement._select_names, columns, strict=False)}  # noqa: SLF001


def _fixed(base: Mapping[Any, Any], mapper: Any) -> frozenset[Any]:
    """Names under which a parameter changes nothing: the statement gives their column a value of its own.

    A plain value gives way to a parameter of the column's name; a named parameter and an SQL expression do not.
    """
    columns = [each for each, value in base.items() if not (isinstance(value, BindParameter) and value.unique)]
    keys = {getattr(column, "key", column) for column in columns}
    attributes = {attribute_of(mapper, column) for column in columns if isinstance(column, sa.ColumnElement)}
    return frozenset(keys | attributes)


def _without(row: Mapping[str, Any], names: frozenset[Any]) -> Mapping[str, Any]:
    return {name: value for name, value in row.items() if name not in names} if names else row


def _multi_rows(statement: sa.Insert, table: Any) -> list[Mapping[Any, Any]]:
    return [
        row if isinstance(row, Mapping) else {column.key: value for column, value in zip(table.c, row, strict=False)}
        for group in statement._multi_values  # noqa: SLF001 - no public reader
        for row in group
    ]


def _rows_as_the_first(rows: Sequence[Mapping[Any, Any]], info: TableInfo) -> list[Mapping[Any, Any]]:
    """The rows of one INSERT with the columns that its first row names: the only ones that SQLAlchemy writes."""
    names = {getattr(name, "key", name) for name in rows[0]}
    found: list[Mapping[Any, Any]] = [
        {name: value for name, value in row.items() if getattr(name, "key", name) in names} for row in rows
    ]
    if any(len(row) < len(names) for row in found):
        raise RoutingError(
            f"a row of an INSERT into {info.name} lacks columns that its first row names",
            hint="name the same columns in each row",
            table=info.name,
            key=info.key,
            shards=len(info.shards),
        )
    return found


def _of_rows(statement: sa.Insert, rows: list[Mapping[Any, Any]]) -> sa.Insert:
    """The same multi-row INSERT with these rows."""
    part: Any = statement._generate()  # noqa: SLF001 - there is no public way to leave rows out
    part._multi_values = (rows,)  # noqa: SLF001
    found: sa.Insert = part
    return found


def _returned(statement: sa.Insert, info: TableInfo, shards: int) -> MergePlan | None:
    if not statement._returning:  # noqa: SLF001 - no public reader
        return None
    if statement._sort_by_parameter_order:  # noqa: SLF001
        raise RoutingError(
            f"RETURNING in the order of the parameters, from {shards} shards",
            hint="leave sort_by_parameter_order away",
            table=info.name,
            key=info.key,
            shards=shards,
        )
    return MergePlan(statement, visible=None)
