"""INSERT statements before they are planned: ids that shardkit makes, and values that every shard has to get alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Insert, Table, inspect

from shardkit.errors import MissingKey
from shardkit.session.homes import check_generated
from shardkit.shardmap import TableInfo
from shardkit.snapshots import View

#: Makes the value of a column that a row does not have.
Maker = Callable[[], Any]


def filled(statement: Any, parameters: Any, view: View, next_id: Maker) -> tuple[Any, Any]:
    """The statement and its parameters with what has to be decided before any shard sees them.

    That is the integer primary key where the map says ``ids: generated``, and for a reference table what Python makes
    up by default, once for all shards.

    :raises MissingKey: when the column for generated ids cannot hold them.
    """
    table = statement.table
    info = view.map.tables.get(table.fullname) if isinstance(table, Table) else None
    if info is None or not isinstance(statement, Insert) or statement.select is not None:
        return statement, parameters
    makers = dict(_makers(table, info, view, next_id))
    if not makers:
        return statement, parameters
    if isinstance(parameters, Sequence) and parameters:
        names = {_name(statement, column): maker for column, maker in makers.items()}
        return statement, [_with_missing(row, names) for row in parameters]
    return _with_missing_values(statement, parameters or {}, makers), parameters


def _makers(table: Table, info: TableInfo, view: View, next_id: Maker) -> Iterable[tuple[Column[Any], Maker]]:
    column = table.autoincrement_column
    if info.keyspace.generated_ids and column is not None:
        check_generated(table, view.planner.dialect_name)
        yield column, next_id
    if info.kind == "reference":
        for column in table.columns:
            if column.default is not None and column.default.is_callable:
                yield column, _call(column)


def _call(column: Column[Any]) -> Maker:
    default: Any = column.default

    def make() -> Any:
        try:
            return default.arg(None)
        except Exception as error:
            raise MissingKey(
                f"the default of {column} cannot be computed before its row is sent to every shard: {error}",
                hint="give the value, or use a default without a context",
            ) from error

    return make


def _name(statement: Insert, column: Column[Any]) -> str:
    """What a row calls a column: the attribute of a mapped class, or the column's own key."""
    entity = statement.entity_description.get("entity")
    return column.key if entity is None else inspect(entity).get_property_by_column(column).key


def _with_missing(row: Mapping[str, Any], makers: Mapping[str, Maker]) -> dict[str, Any]:
    return {**row, **{name: make() for name, make in makers.items() if row.get(name) is None}}


def _with_missing_values(
    statement: Insert, parameters: Mapping[str, Any], makers: Mapping[Column[Any], Maker]
) -> Insert:
    many: Any = statement._multi_values  # noqa: SLF001 - what values([...]) keeps; pinned by a test
    if many:
        wider = statement._clone()  # noqa: SLF001
        wider._multi_values = tuple(  # noqa: SLF001
            [{**row, **{column: make() for column, make in makers.items() if column not in row}} for row in rows]
            for rows in many
        )
        return wider
    given = {getattr(name, "key", name) for name in statement._values or ()}  # noqa: SLF001
    missing = {
        column: make()
        for column, make in makers.items()
        if column.key not in given and parameters.get(_name(statement, column)) is None
    }
    return statement.values(missing) if missing else statement
