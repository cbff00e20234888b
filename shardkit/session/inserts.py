"""INSERT statements before they are planned: ids that shardkit makes, and values that every shard has to get alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Column, Insert, Table, inspect
from sqlalchemy.sql.elements import BindParameter, Null

from shardkit.session.homes import check_generated
from shardkit.session.shared import computed
from shardkit.shardmap import TableInfo
from shardkit.snapshots import View

#: Makes the value of a column that a row does not have.
Maker = Callable[[], Any]


def filled(statement: Any, parameters: Any, view: View, next_id: Maker, *, nulls: bool) -> tuple[Any, Any]:
    """The statement and its parameters with what has to be decided before any shard sees them.

    That is the integer primary key where the map says ``ids: generated``, the defaults of key columns that Python makes
    up, and for a reference table all that Python makes up by default, once for all shards.

    :param nulls: whether the ORM sends None as NULL; by default it leaves the column of a row out, and so to its
        default.
    :raises MissingKey: when the column for generated ids cannot hold them.
    """
    table = statement.table
    info = view.map.tables.get(table.fullname) if isinstance(table, Table) else None
    if info is None or not isinstance(statement, Insert) or statement.select is not None:
        return statement, parameters
    tables = _tables(statement, parameters)
    makers = dict(_makers(tables, info, view, next_id))
    if statement._multi_values or not parameters:  # noqa: SLF001 - what values([...]) keeps; pinned by a test
        return (_with_missing_values(statement, makers, next_id) if makers else statement), parameters
    skipping = not nulls and statement.entity_description.get("entity") is not None
    left_out = {_name(statement, column) for column in _defaulted(tables, view)} if skipping else set()
    if not makers and not left_out:
        return statement, parameters
    given: Mapping[Any, Any] = statement._values or {}  # noqa: SLF001
    names = {
        _name(statement, column): (maker, maker is next_id or (skipping and not column.type.should_evaluate_none))
        for column, maker in makers.items()
        if _absent(given, column, for_none=maker is next_id)
    }
    rows = [parameters] if isinstance(parameters, Mapping) else parameters
    completed = [_with_missing(_without_none(row, left_out), names) for row in rows]
    return statement, completed[0] if isinstance(parameters, Mapping) else completed


def _tables(statement: Insert, parameters: Any) -> Sequence[Table]:
    """The tables that are inserted into: the ORM gives rows of a joined subclass to all of its class's."""
    entity = statement.entity_description.get("entity")
    several = entity is not None and bool(parameters)
    tables: Sequence[Any] = inspect(entity).mapper.tables if several else (statement.table,)
    return [table for table in tables if isinstance(table, Table)]


def _makers(
    tables: Iterable[Table], info: TableInfo, view: View, next_id: Maker
) -> Iterable[tuple[Column[Any], Maker]]:
    for table in tables:
        column = table.autoincrement_column
        if info.keyspace.generated_ids and column is not None:
            check_generated(table, view.planner.dialect_name)
            yield column, next_id
        for column in (*_keys(table, view), *(table.columns if info.kind == "reference" else ())):
            if column.default is not None and column.default.is_callable:
                yield column, partial(computed, column, column.default)
        for column in _keys(table, view):
            if column.default is not None and column.default.is_scalar:
                yield column, partial(getattr, column.default, "arg")


def _keys(table: Table, view: View) -> list[Column[Any]]:
    """The key columns, where they decide over anything."""
    info = view.map.tables.get(table.fullname)
    if info is None or (len(info.shards) == 1 and info.keyspace.directory is None):
        return []
    return [column for column in table.columns if column.name in info.key]


def _defaulted(tables: Iterable[Table], view: View) -> Iterator[Column[Any]]:
    """The key columns whose default only the server knows: where the ORM leaves a None out, it is no key."""
    for column in (each for table in tables for each in _keys(table, view)):
        known = column.default is not None and (column.default.is_callable or column.default.is_scalar)
        defaulted = column.default is not None or column.server_default is not None
        if defaulted and not known and not column.type.should_evaluate_none:
            yield column


def _name(statement: Insert, column: Column[Any]) -> str:
    """What a row calls a column: the attribute of a mapped class, or the column's own key."""
    entity = statement.entity_description.get("entity")
    return column.key if entity is None else inspect(entity).get_property_by_column(column).key


def _with_missing(row: Mapping[str, Any], makers: Mapping[str, tuple[Maker, bool]]) -> dict[str, Any]:
    """:param makers: with whether they stand in for None, too: an id does; a default does where None is left out."""
    missing = {
        name: make()
        for name, (make, for_none) in makers.items()
        if (row.get(name) is None if for_none else name not in row)
    }
    return {**row, **missing}


def _without_none(row: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    return {name: value for name, value in row.items() if value is not None or name not in names} if names else row


def _with_missing_values(statement: Insert, makers: Mapping[Column[Any], Maker], next_id: Maker) -> Insert:
    """The values in a statement itself: None is NULL in them, but for an id."""
    many: Any = statement._multi_values  # noqa: SLF001
    if many:
        wider = statement._clone()  # noqa: SLF001
        wider._multi_values = tuple([_completed(row, makers, next_id) for row in rows] for rows in many)  # noqa: SLF001
        return wider
    values: Mapping[Any, Any] = statement._values or {}  # noqa: SLF001
    called = {getattr(name, "key", name): name for name in values}  # how the statement calls what it gives
    missing = {
        called.get(column.key, column): make()
        for column, make in makers.items()
        if _absent(values, column, for_none=make is next_id)
    }
    return statement.values(missing) if missing else statement


def _completed(row: Mapping[Any, Any], makers: Mapping[Column[Any], Maker], next_id: Maker) -> dict[Any, Any]:
    missing = {column.key: make() for column, make in makers.items() if _absent(row, column, for_none=make is next_id)}
    return {**{name: value for name, value in row.items() if getattr(name, "key", name) not in missing}, **missing}


def _absent(values: Mapping[Any, Any], column: Column[Any], *, for_none: bool) -> bool:
    """Whether a column, by its name, itself or its attribute, has no value here; None may count as none."""
    for name, value in values.items():
        if getattr(name, "key", name) == column.key:
            given = value.value if isinstance(value, BindParameter) else value
            return for_none and (given is None or isinstance(given, Null))
    return True
