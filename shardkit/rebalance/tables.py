"""A moving table as rebalance sees it: its columns, its primary key, and SQL that carries a row exactly.

A row travels as the text of SQL literals that the source server itself writes (`Table.row_expression`), so no value is
ever converted by a driver: each literal is one that gives, on a server of the same flavour, the very bytes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from shardkit.errors import PreconditionFailed
from shardkit.partition import WHOLE, Bucket, HashPartition, KeyColumn, KeyType, Partition, outside_alphabet
from shardkit.rebalance.servers import Server
from shardkit.rowtext import Column as Column
from shardkit.rowtext import RowTexts
from shardkit.rowtext import quoted as quoted
from shardkit.rowtext import text_literal as text_literal
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


@dataclass(frozen=True, slots=True)
class Index:
    """A unique index: its name and its columns in order."""

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Table(RowTexts):
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

    def outside(self, partition: Partition | None, row: str = "") -> str | None:
        """SQL that is true for a row whose key the partition's normalization does not know, so that it is in no bucket,
        though a read by another key may be meant to find it; None where there can be none.

        :param row: as above.
        """
        if partition is None:
            return None
        condition = outside_alphabet(self._key_columns(row), partition.normalize)
        return None if condition is None else f"({_sql(condition)})"


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
