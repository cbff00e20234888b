"""Rows to be written -> where they belong. A key has to be there, and to be stored as it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy.sql.elements import BindParameter, ClauseElement, Null
from sqlalchemy.sql.selectable import TableClause
from sqlalchemy.types import NullType

from shardkit.errors import MissingKey
from shardkit.partition import WHOLE
from shardkit.routing.conditions import Binds
from shardkit.routing.keys import Readers
from shardkit.routing.keyvalues import Reader, Untrusted, sends_alike
from shardkit.shardmap import Placement, ShardMap, TableInfo

_ABSENT: Final = object()


@dataclass(frozen=True)
class KeyColumnOf:
    """A key column of a table that is written to.

    :param names: what the column may be called among parameters: its key, its ORM attribute.
    :param optional: whether an explicit NULL is stored as NULL.
    :param constant: the model's default, where that is a plain value; None where there is none.
    :param counted: whether the server may count it up: it then takes 0 for "give me the next number".
    """

    column: Any
    names: tuple[str, ...]
    read: Reader | None
    optional: bool
    constant: Any = None
    counted: bool = False


class Rows:
    """Finds the place of rows on one map."""

    def __init__(self, shard_map: ShardMap, readers: Readers) -> None:
        self._map = shard_map
        self._readers = readers
        self._keys: dict[tuple[TableClause, Any], tuple[KeyColumnOf, ...]] = {}

    def key_of(self, table: TableClause, mapper: Any = None) -> tuple[KeyColumnOf, ...]:
        """The key columns of a table, in the map's order.

        :param mapper: the ORM mapper whose attribute names count, too.
        :raises MissingKey: when the table's metadata lacks a key column.
        """
        found = self._keys.get((table, mapper))
        if found is None:
            info = self._map.table(table.fullname)
            found = tuple(self._key_column(table, name, info, mapper) for name in info.key)
            self._keys[table, mapper] = found
        return found

    def _key_column(self, table: TableClause, name: str, info: TableInfo, mapper: Any) -> KeyColumnOf:
        column = next((each for each in table.c if each.name == name), None)
        if column is None:
            raise MissingKey(
                f"the model of {info.name!r} has no column {name!r}, which the map shards it by",
                hint="correct the model or the map",
                table=info.name,
                key=info.key,
            )
        attribute = attribute_of(mapper, _copied_into(mapper, column))
        # the ORM knows rows by attribute: what only a column is called is left out of them, or is another attribute
        names = (column.key if attribute is None else attribute,)
        optional = bool(getattr(column, "nullable", True)) and not getattr(column, "primary_key", False)
        default = getattr(column, "default", None)
        constant = default.arg if default is not None and default.is_scalar else None
        counted = getattr(table, "autoincrement_column", None) is column and self._readers.dialect.name != "sqlite"
        reader = self._readers.of(column.type, info.keyspace.normalize)
        return KeyColumnOf(column, names, reader, optional, constant, counted)

    def place(
        self, table: TableClause, row: Mapping[Any, Any], binds: Binds | None = None, mapper: Any = None
    ) -> Placement | None:
        """Where a row belongs.

        :param row: values by column or by name.
        :returns: None for a reference table.
        :raises MissingKey: when a key value is missing or cannot be trusted.
        """
        info = self._map.table(table.fullname)
        if info.kind == "reference":
            return None
        keyspace = info.keyspace
        if info.kind == "vertical" or keyspace.partition is None:
            return self._map.placement_of(keyspace, ())
        key = tuple(self._value(each, row, info, binds) for each in self.key_of(table, mapper))
        try:
            return self._map.placement_of(keyspace, key)
        except MissingKey as error:
            raise MissingKey(error.message, hint=error.hint, table=info.name, key=info.key) from None

    def on_one_shard(self, table: TableClause, row: Mapping[Any, Any], info: TableInfo) -> Placement:
        """Where a row belongs, in a keyspace that one shard holds: nothing is refused, its bucket may be unknown."""
        try:
            place = self.place(table, row)
        except MissingKey:
            place = None
        return place or Placement(info.keyspace.name, WHOLE, info.shards[0])

    def _value(self, key: KeyColumnOf, row: Mapping[Any, Any], info: TableInfo, binds: Binds | None) -> Any:
        name = f"{info.name}.{key.column.name}"
        value = _given(key, row)
        if value is _ABSENT and key.constant is not None:
            value = key.constant
        if value is _ABSENT:
            raise self._missing(info, f"the row has no value for its key {name}", f"give {key.names[0]}=... (None too)")
        if isinstance(value, BindParameter):
            if not isinstance(value.type, NullType) and not sends_alike(value.type, key.column.type):
                raise self._missing(info, f"the value for the key {name} is bound with another type", _TYPED)
            value = value.effective_value if binds is None else binds.of(value)
        elif isinstance(value, Null):
            value = None
        elif isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
            raise self._missing(
                info, f"the key {name} is an SQL expression: only the database would know its value", "give a value"
            )
        if key.read is None:
            exact = "use a type that is stored exactly; a string's collation counts, too (docs/reference/keys.md)"
            raise self._missing(info, f"the type of {name} cannot be a key", exact)
        stored = key.read(value)
        if isinstance(stored, Untrusted):
            what = f"the value for the key {name} may be stored as another: {stored.reason}"
            raise self._missing(info, what, stored.hint or _TYPED)
        if stored is None and not key.optional:
            raise self._missing(
                info,
                f"the key {name} is NULL, which the column does not store",
                "give a value: the database's own default or AUTO_INCREMENT would be chosen after the shard",
            )
        if key.counted and stored == 0:
            raise self._missing(
                info,
                f"the key {name} is 0, for which AUTO_INCREMENT makes up another number",
                "give another value, or declare the column with autoincrement=False",
            )
        return stored

    def _missing(self, info: TableInfo, message: str, hint: str) -> MissingKey:
        return MissingKey(message, hint=hint, table=info.name, key=info.key, shards=len(info.shards))


_TYPED = "give a value of the column's own Python type, as precise as the column"


def _given(key: KeyColumnOf, row: Mapping[Any, Any]) -> Any:
    for name in key.names:
        if name in row:
            return row[name]
    for given, value in row.items():
        if isinstance(given, sa.ColumnElement) and getattr(given, "key", None) == key.column.key:
            return value
    return _ABSENT


def _copied_into(mapper: Any, column: Any) -> Any:
    """The column of a parent class's table whose value the ORM writes into this one of a joined subclass; or itself."""
    for each in () if mapper is None else mapper.iterate_to_root():
        for parent, own in each._inherits_equated_pairs or ():  # noqa: SLF001 - no public reader
            if own is column:
                return _copied_into(mapper, parent)
    return column


def attribute_of(mapper: Any, column: Any) -> str | None:
    """The ORM attribute that stands for a column."""
    if mapper is None:
        return None
    try:
        return str(mapper.get_property_by_column(column).key)
    except sa_exc.InvalidRequestError:  # a column that is not mapped
        return None
