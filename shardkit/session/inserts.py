"""INSERT statements before they are planned: ids that shardkit makes, and values that every shard has to get alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

    That is the integer primary key where the map says ``ids: generated``, and for a reference table what Python makes
    up by default, once for all shards.

    :param nulls: whether the ORM sends None as NULL; by default it leaves the column out, and so to its default.
    :raises MissingKey: when the column for generated ids cannot hold them.
    """
    table = statement.table
    info = view.map.tables.get(table.fullname) if isinstance(table, Table) else None
    if info is None or not isinstance(statement, Insert) or statement.select is not None:
        return statement, parameters
    makers = dict(_makers(_tables(statement, parameters), info, view, next_id))
    if not makers:
        return statement, parameters
    skipped = not nulls and statement.entity_description.get("entity") is not None
    if isinstance(parameters, Sequence) and parameters:
        names = {_name(statement, column): (maker, skipped or maker is next_id) for column, maker in makers.items()}
        return statement, [_with_missing(row, names) for row in parameters]
    return _with_missing_values(statement, parameters or {}, makers, None if skipped else next_id), parameters


def _tables(statement: Insert, parameters: Any) -> Sequence[Table]:
    """The tables that are inserted into: the ORM gives rows of a joined subclass to all of its class's."""
    entity = statement.entity_description.get("entity")
    several = entity is not None and isinstance(parameters, Sequence) and not isinstance(parameters, str)
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
        if info.kind == "reference":
            for column in table.columns:
                if column.default is not None and column.default.is_callable:
                    yield column, partial(computed, column, column.default)


def _name(statement: Insert, column: Column[Any]) -> str:
    """What a row calls a column: the attribute of a mapped class, or the column's own key."""
    entity = statement.entity_description.get("entity")
    return column.key if entity is None else inspect(entity).get_property_by_column(column).key


def _with_missing(row: Mapping[str, Any], makers: Mapping[str, tuple[Maker, bool]]) -> dict[str, Any]:
    """:param makers: with whether they stand in for None, too: an id does; a default does where None is left out."""
    missing = {name: make() for name, (make, for_none) in makers.items() if _lacks(row, name, for_none=for_none)}
    return {**row, **missing}


def _lacks(row: Mapping[str, Any], name: str, *, for_none: bool) -> bool:
    return row.get(name) is None if for_none else name not in row


def _with_missing_values(
    statement: Insert, parameters: Mapping[str, Any], makers: Mapping[Column[Any], Maker], for_none: Maker | None
) -> Insert:
    """:param for_none: the maker that stands in for None, too; None: all do."""
    many: Any = statement._multi_values  # noqa: SLF001 - what values([...]) keeps; pinned by a test
    if many:
        wider = statement._clone()  # noqa: SLF001
        wider._multi_values = tuple([_completed(row, makers, for_none) for row in rows] for rows in many)  # noqa: SLF001
        return wider
    values: Mapping[Any, Any] = statement._values or {}  # noqa: SLF001
    called = {getattr(name, "key", name): name for name in values}  # how the statement calls what it gives
    missing = {
        called.get(column.key, column): make()
        for column, make in makers.items()
        if _absent(values, column, make, for_none)
        and _lacks(parameters, _name(statement, column), for_none=for_none in (None, make))
    }
    return statement.values(missing) if missing else statement


def _completed(row: Mapping[Any, Any], makers: Mapping[Column[Any], Maker], for_none: Maker | None) -> dict[Any, Any]:
    missing = {column.key: make() for column, make in makers.items() if _absent(row, column, make, for_none)}
    return {**{name: value for name, value in row.items() if getattr(name, "key", name) not in missing}, **missing}


def _absent(values: Mapping[Any, Any], column: Column[Any], make: Maker, for_none: Maker | None) -> bool:
    """Whether a column, by its name, itself or its attribute, has no value here; None may count as none."""
    for name, value in values.items():
        if getattr(name, "key", name) == column.key:
            given = value.value if isinstance(value, BindParameter) else value
            return (given is None or isinstance(given, Null)) and for_none in (None, make)
    return True
