"""A moving table as rebalance sees it: its columns, its primary key, and SQL that carries a row exactly.

A row travels as the text of SQL literals that the source server itself writes (`Table.row_expression`), so no value is
ever converted by a driver: each literal is one that gives, on a server of the same flavour, the very bytes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from shardkit.errors import PreconditionFailed
from shardkit.partition import WHOLE, Bucket, HashPartition, KeyColumn, KeyType, Partition
from shardkit.rebalance.servers import Flavour, Server
from shardkit.shardmap import Keyspace

# Named parameters: for other styles SQLAlchemy doubles every % in literal SQL, and no driver formats this SQL.
_DIALECT = mysql.dialect(paramstyle="named")

_KEY_KINDS = {
    **dict.fromkeys(("tinyint", "smallint", "mediumint", "int", "bigint", "year"), KeyType.INTEGER),
    **dict.fromkeys(("char", "varchar", "tinytext", "text", "mediumtext", "longtext", "enum"), KeyType.STRING),
    **dict.fromkeys(("binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"), KeyType.BYTES),
    "decimal": KeyType.DECIMAL,
    "date": KeyType.DATE,
    "datetime": KeyType.DATETIME,
    "uuid": KeyType.UUID,
}
#: Bytes that a value of the type takes in a row; types of variable length are measured.
_FIXED_WIDTH = {
    **dict.fromkeys(("tinyint", "year"), 1),
    **dict.fromkeys(("smallint", "enum"), 2),
    **dict.fromkeys(("mediumint", "date"), 3),
    **dict.fromkeys(("int", "float"), 4),
    "time": 6,
    "timestamp": 7,
    **dict.fromkeys(("bigint", "double", "datetime", "set", "bit"), 8),
    "uuid": 16,
}


class Form(Enum):
    """How values of a type are written as literals."""

    QUOTED = auto()
    """``QUOTE()``: numbers, dates and times, whose text is exact, and MySQL's text in its own character set."""
    BYTES = auto()
    """The bytes as they are stored, in whatever character set."""
    HEX = auto()
    """The same in hexadecimal: MySQL's ``QUOTE()`` takes text of the connection's character set only."""
    NUMBER = auto()
    """By number: ENUM and SET (their empty values have no text of their own), BIT."""
    REAL = auto()
    """Through DOUBLE: a FLOAT's own text is rounded to six digits."""
    JSON = auto()
    """MySQL's JSON takes text, but no binary string."""


_NUMBERS = frozenset({"tinyint", "smallint", "mediumint", "int", "bigint", "decimal", "year"})
_FORMS = {
    **dict.fromkeys(("enum", "set", "bit"), Form.NUMBER),
    **dict.fromkeys(("float", "double"), Form.REAL),
    **dict.fromkeys(_NUMBERS, Form.QUOTED),
    **dict.fromkeys(("date", "time", "datetime", "timestamp", "uuid", "inet4", "inet6"), Form.QUOTED),
    "json": Form.JSON,
}


def quoted(name: str) -> str:
    """An identifier in backticks."""
    return "`" + name.replace("`", "``") + "`"


def text_literal(text: str) -> str:
    """A string literal, for statements that are kept by the server (triggers) and so take no parameters."""
    return "'" + text.replace("\\", "\\\\").replace("'", "''") + "'"


@dataclass(frozen=True, slots=True)
class Column:
    """One column, as ``information_schema`` describes it.

    :param data_type: the bare type, lower case.
    :param charset: of character columns.
    :param generated: computed by the server from other columns: not copied.
    """

    name: str
    data_type: str
    charset: str | None
    generated: bool
    auto_increment: bool
    flavour: Flavour

    @property
    def form(self) -> Form:
        """How its values are written."""
        if self.data_type in _FORMS:
            return _FORMS[self.data_type]
        if self.flavour == "mariadb":
            return Form.BYTES
        return Form.QUOTED if self.charset in {"utf8mb4", "ascii"} else Form.HEX

    @property
    def literal(self) -> str:
        """SQL that gives the text of a literal with the column's value.

        NULL (not the text) where the value is too long for the server's max_allowed_packet: no test for NULL may stand
        around an expression that can come out so.
        """
        name = quoted(self.name)
        match self.form:
            case Form.QUOTED:
                return f"QUOTE({name})"
            case Form.NUMBER:
                return f"IFNULL(CAST({name} AS UNSIGNED),'NULL')"
            case Form.REAL:
                return f"QUOTE(CAST({name} AS DOUBLE))"
            case Form.JSON:
                return f"IF({name} IS NULL,'NULL',CONCAT('_utf8mb4 X''',HEX(CAST({name} AS CHAR)),''''))"
            case Form.BYTES:
                return f"QUOTE(CAST({name} AS BINARY))"
            case Form.HEX:
                return f"IF({name} IS NULL,'NULL',CONCAT('X''',HEX(CAST({name} AS BINARY)),''''))"

    @property
    def key_literal(self) -> str:
        """The same for a primary key column (never NULL): ASCII text, which compares as the column does.

        A character set in front makes it a string of the column's own kind, so that the column's collation compares.
        """
        name = quoted(self.name)
        if self.data_type not in _FORMS:
            introducer = f"_{self.charset} " if self.charset else ""
            return f"CONCAT('{introducer}X''',HEX(CAST({name} AS BINARY)),'''')"
        if self.data_type in _NUMBERS:  # a DECIMAL is compared with a string as floating point
            return f"CAST({name} AS CHAR)"
        return self.literal

    @property
    def width(self) -> str:
        """SQL for the bytes that the value takes, NULL for none."""
        fixed = _FIXED_WIDTH.get(self.data_type)
        name = quoted(self.name)
        return f"IF({name} IS NULL,0,{fixed})" if fixed else f"IFNULL(OCTET_LENGTH({name}),0)"


@dataclass(frozen=True, slots=True)
class Index:
    """A unique index: its name and its columns in order."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table that moves with its keyspace.

    :param key: the shard key's columns, none in a vertical keyspace.
    :param primary: the primary key's columns.
    :param unique: the other unique indexes.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    primary: tuple[str, ...]
    unique: tuple[Index, ...]

    def column(self, name: str) -> Column:
        """A column by name, as the server compares names."""
        return next(column for column in self.columns if column.name.lower() == name.lower())

    @cached_property
    def stored(self) -> tuple[Column, ...]:
        """The columns that are copied."""
        return tuple(column for column in self.columns if not column.generated)

    @cached_property
    def row_expression(self) -> str:
        """SQL for the text of a whole row: ``('1','a',NULL)``."""
        parts = ",',',".join(column.literal for column in self.stored)
        return f"CONCAT('(',{parts},')')"

    @cached_property
    def insert_head(self) -> str:
        """What stands before the rows."""
        return f"INSERT INTO {quoted(self.name)} ({','.join(quoted(column.name) for column in self.stored)}) VALUES "

    @cached_property
    def width(self) -> str:
        """SQL for the bytes of one row's values."""
        return "+".join(column.width for column in self.stored)

    # --- the primary key

    @cached_property
    def key_literals(self) -> str:
        """SQL for the primary key's literals, one selected column each."""
        return ",".join(self.column(name).key_literal for name in self.primary)

    @cached_property
    def order(self) -> str:
        """The primary key's columns, for ORDER BY."""
        return ",".join(quoted(name) for name in self.primary)

    def after(self, key: Sequence[str] | None) -> str:
        """SQL: the primary key is greater than this one. True for everything without one."""
        return "TRUE" if key is None else self._compared(">", ">", key)

    def upto(self, key: Sequence[str] | None) -> str:
        """SQL: the primary key is not greater than this one."""
        return "TRUE" if key is None else self._compared("<", "<=", key)

    def _compared(self, strict: str, last: str, key: Sequence[str]) -> str:
        """Column by column: servers use an index for this, and not for ``(a, b) > (1, 2)``."""
        names = [quoted(name) for name in self.primary]
        tests = []
        for end, (name, value) in enumerate(zip(names, key, strict=True)):
            equal = [f"{before}={known}" for before, known in zip(names[:end], key[:end], strict=True)]
            operator = last if end == len(names) - 1 else strict
            tests.append("(" + " AND ".join([*equal, f"{name}{operator}{value}"]) + ")")
        return "(" + " OR ".join(tests) + ")"

    def one_of(self, keys: Iterable[Sequence[str]]) -> str:
        """SQL: the primary key is one of these."""
        names = [quoted(name) for name in self.primary]
        if len(names) == 1:
            return f"{names[0]} IN ({','.join(key[0] for key in keys)})"
        tests = (" AND ".join(f"{name}={value}" for name, value in zip(names, key, strict=True)) for key in keys)
        return "(" + " OR ".join(f"({test})" for test in tests) + ")"

    # --- the shard key

    def _key_columns(self, row: str) -> list[KeyColumn]:
        prefix = f"{row}." if row else ""
        return [
            KeyColumn(sa.literal_column(prefix + quoted(name)), key_kind(self, self.column(name))) for name in self.key
        ]

    def predicate(self, partition: Partition | None, buckets: Iterable[Bucket]) -> str:
        """SQL that is true for the rows of these buckets, and false for all others."""
        if partition is None:
            return "TRUE"
        return "(" + _sql(partition.predicate(self._key_columns(""), buckets)) + ")"

    def bucket(self, partition: Partition | None, row: str = "") -> str:
        """SQL for the name of the bucket that a row is in; NULL for a row that no bucket takes.

        :param row: ``NEW`` or ``OLD`` inside a trigger.
        """
        if partition is None:
            return text_literal(WHOLE)
        columns = self._key_columns(row)
        if isinstance(partition, HashPartition):
            number = f"CAST({_sql(partition.bucket_expression(columns))} AS CHAR)"
            named: list[Bucket] = [bucket for bucket in partition.buckets if isinstance(bucket, str)]
        else:
            number = "NULL"
            named = list(partition.buckets)
        if not named:
            return number
        cases = (f"WHEN {_sql(partition.predicate(columns, [name]))} THEN {text_literal(str(name))}" for name in named)
        return f"CASE {' '.join(cases)} ELSE {number} END"


def key_kind(table: Table, column: Column) -> KeyType:
    """The kind of key that the column holds.

    :raises PreconditionFailed: for a type whose bucket the database cannot tell reliably.
    """
    kind = _KEY_KINDS.get(column.data_type)
    if kind is None:
        why = (
            "its text depends on each session's time zone, so a trigger cannot tell its bucket"
            if column.data_type == "timestamp"
            else "the type has no exact text"
        )
        raise PreconditionFailed(
            f"table {table.name}: the key column {column.name} is {column.data_type}: {why}",
            hint="use an integer, a string, bytes, a date, a DATETIME or a DECIMAL as key",
        )
    return kind


def _sql(expression: sa.ColumnElement[Any]) -> str:
    return str(expression.compile(dialect=_DIALECT, compile_kwargs={"literal_binds": True}))


# --- reading it from a server ------------------------------------------------------------------------------------


def moving_tables(server: Server, keyspace: Keyspace) -> tuple[Table, ...]:
    """The keyspace's tables as they are on this server.

    :raises PreconditionFailed: when one is missing there, or lacks a key column.
    """
    return tuple(read_table(server, name, key) for name, key in keyspace.tables.items())


def read_table(server: Server, name: str, key: tuple[str, ...] = ()) -> Table:
    """One table.

    :raises PreconditionFailed: when it is not there, or lacks a key column.
    """
    columns = tuple(
        Column(
            str(column),
            str(data_type).lower(),
            None if charset is None else str(charset),
            "GENERATED" in str(extra).upper().replace("DEFAULT_GENERATED", "") or bool(expression),
            "auto_increment" in str(extra).lower(),
            server.flavour,
        )
        for column, data_type, charset, extra, expression in server.rows(
            "SELECT column_name, data_type, character_set_name, extra, generation_expression"
            " FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name = %s"
            " ORDER BY ordinal_position",
            name,
        )
    )
    if not columns:
        raise PreconditionFailed(
            f"{server}: there is no table {name}",
            hint="create it (Cluster.create_all, or 'shardkit migrate upgrade'), or take it out of the map",
        )
    missing = [part for part in key if part.lower() not in {column.name.lower() for column in columns}]
    if missing:
        raise PreconditionFailed(
            f"{server}: table {name} has no column {', '.join(missing)}, which the map gives as its key",
            hint="mend the key in the shard map",
        )
    indexes: dict[str, list[str]] = {}
    for index, column in server.rows(
        "SELECT index_name, column_name FROM information_schema.statistics"
        " WHERE table_schema = DATABASE() AND table_name = %s AND non_unique = 0 ORDER BY index_name, seq_in_index",
        name,
    ):
        indexes.setdefault(str(index), []).append(str(column))
    primary = tuple(indexes.pop("PRIMARY", ()))
    unique = tuple(Index(index, tuple(parts)) for index, parts in indexes.items())
    return Table(name, key, columns, primary, unique)
