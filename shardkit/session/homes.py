"""Where the objects of a mapped class live: on the shard of their key, on one fixed shard, or on all of a keyspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, Integer, SmallInteger, Table
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.exc import UnmappedColumnError

from shardkit.directory import KeyNotLookedUp
from shardkit.errors import KeyChange, MissingKey, RoutingError, UnknownTable
from shardkit.partition import WHOLE
from shardkit.routing.expressions import contents_of, may_select
from shardkit.routing.functions import OF_THE_STATEMENT_BEFORE
from shardkit.shardmap import Keyspace, TableInfo
from shardkit.snapshots import View

_ABSENT = object()


@dataclass(frozen=True, slots=True)
class KeyAttribute:
    """One key column of a mapped class.

    :param column: its name in the table, as the shard map has it.
    :param attribute: its name on the object.
    :param position: where it stands in the primary key; None where it is no part of it.
    :param default: the column's default that Python computes, if any.
    :param by_server: whether it has a default that only the server knows.
    :param sends_none: whether the ORM sends None as a value; it leaves others out of an INSERT, to the default.
    """

    column: str
    attribute: str
    position: int | None
    default: Any = None
    by_server: bool = False
    sends_none: bool = False

    def lacks(self, values: Mapping[str, Any], *, nulls: bool = False) -> bool:
        """Whether a new row has no value for it, so that its default counts, if there is one.

        :param nulls: whether None is sent as NULL, whatever the type.
        """
        if self.attribute not in values:
            return True
        defaulted = self.by_server or self.default is not None
        return values[self.attribute] is None and defaulted and not (nulls or self.sends_none)


@dataclass(frozen=True, slots=True)
class Home:
    """Where the objects of one mapped class live, on one version of the map.

    :param table: its first table; None for what a cluster of one shard takes without one.
    :param key: the columns that say which shard; none for reference and vertical tables.
    :param generated: the integer primary key that shardkit fills, by attribute and column name, where the keyspace has
        ``ids: generated``.
    :param plain_number: where in the primary key the shard key stands, if it is one plain integer column, whose value
        needs no interpreting.
    :param by_sql: whether a column's default or ``onupdate`` is an SQL expression to look at for each row.
    :param tokened: whether objects carry their shard in their identity: each row stands on one shard of several.
    """

    view: View
    table: Any
    info: TableInfo
    key: tuple[KeyAttribute, ...] = ()
    generated: KeyAttribute | None = None
    tokened: bool = False
    plain_number: int | None = None
    by_sql: bool = False

    @property
    def replicated(self) -> bool:
        """Whether every shard of the keyspace has every row."""
        return self.info.kind == "reference"

    @property
    def key_in_identity(self) -> bool:
        """Whether a primary key says which shard its row is on."""
        return all(part.position is not None for part in self.key)

    def shard_of_identity(self, identity: Sequence[Any]) -> str | None:
        """The shard of a primary key; None where that does not tell.

        A value of another type than the column's does not tell either: the database may find rows that compare equal.
        """
        if not self.tokened:
            return None
        if self.plain_number is not None and type(identity[self.plain_number]) is int:
            keyspace = self.info.keyspace
            assert keyspace.partition is not None  # noqa: S101 - tables with a key have one
            bucket = keyspace.partition.bucket_of((identity[self.plain_number],))
            return None if bucket is None else keyspace.placement[bucket]
        row = {part.column: identity[part.position] for part in self.key if part.position is not None}
        if len(row) < len(self.key):
            return None
        try:
            return self._placed(row)
        except KeyNotLookedUp:
            return None

    def shard_of_key(self, key: tuple[Any, ...] | None) -> str | None:
        """The shard of an object with this key, as the object has it (before bind processing); None where it does not
        tell, or would have to be looked up."""
        if self.info.kind == "vertical":
            return self.info.shards[0]
        if not self.key or key is None:
            return None
        try:
            return self.placed_by(key)
        except KeyNotLookedUp:
            return None

    def placed_by(self, key: tuple[Any, ...]) -> str | None:
        """`shard_of_key`, for those who can look a key up.

        :raises KeyNotLookedUp: when it has to be.
        """
        return self._placed({part.column: value for part, value in zip(self.key, key, strict=True)})

    def _placed(self, row: Mapping[str, Any]) -> str | None:
        try:
            placement = self.view.planner.place(self.table, row)
        except MissingKey:
            return None
        return None if placement is None else placement.shard

    def key_of(self, state: InstanceState[Any]) -> tuple[Any, ...] | None:
        """The key values that an object has now; None where one is not loaded."""
        values = state.dict
        identity = None if state.key is None else state.key[1]
        found = []
        for part in self.key:
            if part.attribute in values:
                found.append(values[part.attribute])
            elif identity is not None and part.position is not None:
                found.append(identity[part.position])
            else:
                return None
        return tuple(found)

    def fill(self, state: InstanceState[Any], next_id: Any) -> None:
        """Give a new object the values that decide where it lives: defaults that Python computes, a generated id."""
        values = state.dict
        for name, value in self.defaults(values).items():
            setattr(state.obj(), name, value)
        if self.generated is not None and values.get(self.generated.attribute) is None:
            setattr(state.obj(), self.generated.attribute, next_id())

    def defaults(self, values: Mapping[str, Any], *, nulls: bool = False) -> dict[str, Any]:
        """The defaults that Python computes for key columns without a value in a new row, by attribute.

        :param nulls: whether None is sent as NULL, where the ORM would leave the column to its default.
        :raises MissingKey: for a default that cannot be computed before.
        """
        return {
            part.attribute: _computed(part, self.table)
            for part in self.key
            if part.default is not None and part.lacks(values, nulls=nulls)
        }

    def place_new(self, state: InstanceState[Any]) -> str | None:
        """The shard of a new object; None: all shards of a reference table.

        :raises MissingKey: when a key column has no value.
        """
        if not self.key:
            return None if self.replicated else self.info.shards[0]
        values = state.dict
        row = {}
        for part in self.key:
            value = values.get(part.attribute, _ABSENT)
            if value is _ABSENT or (value is None and (part.position is not None or part.lacks(values))):
                continue  # a primary key of None, or one with a default, is one that the database would make up
            row[part.column] = value
        placement = self.view.planner.place(self.table, row)
        return None if placement is None else placement.shard

    def refuse_key_change(self, state: InstanceState[Any]) -> None:
        """:raises KeyChange: when the object's key was assigned another value than it was loaded with."""
        changed = state.committed_state
        for part in self.key:
            if part.attribute not in changed:
                continue
            old, new = changed[part.attribute], state.dict.get(part.attribute)
            if old == new:
                continue
            known = part.position is not None and state.key is not None
            if known and state.key is not None and state.key[1][part.position or 0] == new:
                continue
            raise KeyChange(
                f"{state.class_.__name__}.{part.attribute} is the shard key of {self.table.name!r}: it cannot be "
                f"changed to {new!r}",
                table=self.table.name,
                key=[column.column for column in self.key],
                hint=f"session.move(obj, {new!r}) moves it, and what belongs to it",
            )


def _computed(part: KeyAttribute, table: Table) -> Any:
    default = part.default
    if not default.is_callable:
        return default.arg
    try:
        return default.arg(None)
    except Exception as error:
        raise MissingKey(
            f"the default of {table.name}.{part.column} cannot be computed before its row is placed: {error}",
            table=table.name,
            key=[part.column],
            hint="assign the key, or use a default without a context",
        ) from error


def home_of(view: View, mapper: Mapper[Any]) -> Home:
    """Where a mapped class's objects live.

    :raises UnknownTable: for a class whose table the map does not name.
    :raises RoutingError: for a class over several tables that the map keeps apart, or that does not map the key.
    """
    try:
        found: Home = view.homes[mapper]
    except KeyError:
        found = view.homes[mapper] = _find(view, mapper) if view.only is None else _at(view.only, view, mapper)
    return found


def _at(only: str, view: View, mapper: Mapper[Any]) -> Home:
    """A cluster of one shard is that database: it holds every class, keys say nothing, and nothing is refused."""
    table = next((table for table in mapper.tables if isinstance(table, Table)), None)
    known = None if table is None else view.map.tables.get(table.fullname)
    whole = Keyspace(
        name="",
        partition=None,
        tables={},
        placement=dict.fromkeys([WHOLE], only),
        generated_ids=known is not None and known.keyspace.generated_ids,
    )
    info = TableInfo(mapper.class_.__name__ if table is None else table.fullname, "vertical", (whole,))
    return Home(view, table, info, generated=None if table is None else _generated(mapper, table, info))


def _find(view: View, mapper: Mapper[Any]) -> Home:
    tables = [table for table in mapper.tables if isinstance(table, Table)]
    if not tables:
        raise UnknownTable(
            f"{mapper.class_.__name__} is not mapped to a table",
            hint="shardkit routes classes that are mapped to tables",
        )
    infos = {table: view.map.table(table.fullname) for table in tables}
    if len({(info.kind, *(keyspace.name for keyspace in info.keyspaces)) for info in infos.values()}) > 1:
        raise RoutingError(
            f"{mapper.class_.__name__} is mapped to {', '.join(table.name for table in tables)}: "
            "the shard map does not keep them together",
            hint="put its tables into one keyspace, with the same key",
        )
    table = tables[0]
    info = infos[table]
    key = tuple(_key_attribute(mapper, table, name) for name in info.key)
    if len(info.shards) > 1:
        for other in tables[1:]:
            _check_same_key(mapper, key, other, infos[other])
    return Home(
        view=view,
        table=table,
        info=info,
        key=key,
        generated=_generated(mapper, table, info),
        tokened=info.kind != "reference" and view.map.sole_host is None,
        plain_number=_plain_number(table, info, key),
        by_sql=any(
            _matters(made) for each in tables for column in each.c for made in (column.default, column.onupdate)
        ),
    )


def _check_same_key(mapper: Mapper[Any], key: Sequence[KeyAttribute], table: Table, info: TableInfo) -> None:
    """:raises RoutingError: when a further table of the class is sharded by something else than the first."""
    own = [_key_attribute(mapper, table, name).attribute for name in info.key]
    equal: list[set[str]] = []
    for each in mapper.iterate_to_root():
        pairs: Any = each._inherits_equated_pairs or ()  # noqa: SLF001 - the columns that join the tables of inheritance
        equal += [{mapper.get_property_by_column(column).key for column in pair} for pair in pairs]
    same = len(own) == len(key) and all(
        part.attribute == attribute or any({part.attribute, attribute} <= names for names in equal)
        for part, attribute in zip(key, own, strict=True)
    )
    if not same:
        raise RoutingError(
            f"{mapper.class_.__name__} is mapped to {table.name} besides its first table, and the two are sharded by "
            f"different columns ({', '.join(own)}; {', '.join(part.attribute for part in key)})",
            table=table.name,
            key=info.key,
            hint="shard them by the same column: the rows of one object have to stand on one shard",
        )


def _matters(default: Any) -> bool:
    """Whether it may read rows of other shards, or tells of the statement before: ``func.now()`` does neither."""
    if default is None or not default.is_clause_element:
        return False
    return may_select(default.arg) or not OF_THE_STATEMENT_BEFORE.isdisjoint(contents_of([default.arg]).functions)


def _plain_number(table: Table, info: TableInfo, key: Sequence[KeyAttribute]) -> int | None:
    partition = info.keyspace.partition
    if len(key) != 1 or key[0].position is None or partition is None or partition.by == "directory":
        return None
    kind = type(next(column for column in table.columns if column.name == key[0].column).type)
    return key[0].position if kind in {Integer, BigInteger, SmallInteger} else None


def _key_attribute(mapper: Mapper[Any], table: Table, name: str) -> KeyAttribute:
    column = table.columns.get(name)
    if column is None:
        column = next((other for other in table.columns if other.name == name), None)
    try:
        attribute = None if column is None else mapper.get_property_by_column(column).key
    except UnmappedColumnError:
        attribute = None
    if column is None or attribute is None:
        raise RoutingError(
            f"{mapper.class_.__name__} does not map {table.name}.{name}, the shard key",
            table=table.name,
            key=[name],
            hint="map the column, or mend the key in the shard map",
        )
    default = _python_default(column)
    by_server = default is None and (column.default is not None or column.server_default is not None)
    return KeyAttribute(
        name, attribute, _position(mapper, column), default, by_server, column.type.should_evaluate_none
    )


def _position(mapper: Mapper[Any], column: Column[Any]) -> int | None:
    return mapper.primary_key.index(column) if column in mapper.primary_key else None


def _python_default(column: Column[Any]) -> Any:
    default = column.default
    return default if default is not None and (default.is_scalar or default.is_callable) else None


def _generated(mapper: Mapper[Any], table: Table, info: TableInfo) -> KeyAttribute | None:
    column = table.autoincrement_column
    if not info.keyspace.generated_ids or column is None or column not in mapper.primary_key:
        return None
    return KeyAttribute(column.name, mapper.get_property_by_column(column).key, _position(mapper, column))


def check_generated(table: Table, dialect_name: str) -> None:
    """:raises MissingKey: when the column for generated ids cannot hold them on a server."""
    column = table.autoincrement_column
    if column is not None and dialect_name != "sqlite" and not isinstance(column.type, BigInteger):
        raise MissingKey(
            f"{table.name}.{column.name} is to be filled with a 63-bit id, but is declared {column.type}",
            table=table.name,
            key=[column.name],
            hint="declare it BigInteger",
        )


def rows_of(parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> Sequence[Mapping[str, Any]]:
    """A statement's parameters as rows."""
    if parameters is None:
        return ()
    return [parameters] if isinstance(parameters, Mapping) else parameters
