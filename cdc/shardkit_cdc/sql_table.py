"""A table as the SQL path writes it: decoded rows as literals that give the very bytes back, and what finds a row.

The session has to have the time zone UTC, a strict `sql_mode` with backslash escapes, and utf8mb4 for its statements
(`shardkit_cdc.apply_sql`): then a literal is taken exactly, or refused by the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from shardkit.gtid import Flavour
from shardkit.rowtext import quoted
from shardkit_cdc.json_binary import Opaque, json_text
from shardkit_cdc.row_image import ABSENT, Image, Value
from shardkit_cdc.schema import TargetColumn
from shardkit_cdc.table_map import Column, ColumnType

#: A value that is neither NULL nor absent, as an SQL literal.
Literal: TypeAlias = Callable[[Any], bytes]

_INTEGERS = frozenset(
    {
        ColumnType.TINY,
        ColumnType.SHORT,
        ColumnType.INT24,
        ColumnType.LONG,
        ColumnType.LONGLONG,
        ColumnType.YEAR,
        ColumnType.BIT,
        ColumnType.ENUM,
        ColumnType.SET,
    }
)
_REAL = frozenset({ColumnType.FLOAT, ColumnType.DOUBLE})
_TEMPORAL = frozenset({ColumnType.DATE, ColumnType.TIME2, ColumnType.DATETIME2, ColumnType.TIMESTAMP2})
_BINARY = "binary"


class NotCarried(ValueError):
    """A value that the target cannot hold exactly. The message says which, and of which column."""


class NotLogged(NotCarried):
    """A value that the log does not hold."""


@dataclass(frozen=True, slots=True)
class SqlColumn:
    """One column on both sides.

    :param place: of its value in the log's images.
    :param name: in backticks.
    :param literal: a value as it is written.
    :param test: a value as SQL that is true where the column holds these very bytes.
    :param key_test: the same by the column's own comparison, which an index is used for.
    :param computed: by the target from other columns: not written.
    :param touched: by the target itself with every update that leaves it out (ON UPDATE): always written.
    """

    place: int
    name: bytes
    literal: Literal
    test: Literal
    key_test: Literal
    computed: bool
    touched: bool


class SqlTable:
    """Statements for one table.

    :param name: with its database, in backticks.
    :param columns: all that the log describes, in the log's order.
    :param key: names of the columns that tell its rows apart; empty where nothing does.
    """

    def __init__(self, name: str, columns: Sequence[SqlColumn], key: Sequence[str]) -> None:
        self.name = name.encode()
        self._all = columns
        self._written = [column for column in columns if not column.computed]
        folded = {column.name.decode().casefold(): column for column in columns}
        exact = {column.name.decode(): column for column in columns}
        self.key = [exact.get(name) or folded[name.casefold()] for name in map(quoted, key)]
        names = b",".join(column.name for column in self._written)
        self.insert_head = b"INSERT INTO " + self.name + b" (" + names + b") VALUES "
        self.delete_head = b"DELETE FROM " + self.name + b" WHERE "

    def row(self, image: Image) -> bytes:
        """``(1,'a',NULL)``.

        :raises NotCarried: naming the column.
        """
        try:
            return b"(" + b",".join([_or_null(column.literal, image[column.place]) for column in self._written]) + b")"
        except NotCarried:
            self._blame(image)
            raise

    def update(self, before: Image, after: Image) -> bytes:
        """An UPDATE of the columns that differ.

        :raises NotCarried: naming the column.
        """
        changes = [
            column for column in self._written if column.touched or not _same(before[column.place], after[column.place])
        ] or self._written[:1]  # nothing differs: the row has to be there all the same
        try:
            parts = [column.name + b"=" + _or_null(column.literal, after[column.place]) for column in changes]
        except NotCarried:
            self._blame(after)
            raise
        return b"UPDATE " + self.name + b" SET " + b",".join(parts) + b" WHERE " + self.where(before)

    def where(self, image: Image) -> bytes:
        """SQL that finds one row.

        :raises NotCarried: naming the column.
        """
        tested = self.key or self._written
        for column in tested:
            if image[column.place] is ABSENT:
                raise _not_logged(column)
        if self.key:
            return b" AND ".join([column.key_test(image[column.place]) for column in self.key])
        tests = [
            column.name + b" IS NULL" if image[column.place] is None else column.test(image[column.place])
            for column in tested
        ]
        return b" AND ".join(tests or [b"TRUE"]) + b" LIMIT 1"  # all columns computed: one row is like the other

    def _blame(self, image: Image) -> None:
        for column in self._written:
            try:
                _or_null(column.literal, image[column.place])
            except NotLogged:
                raise _not_logged(column) from None
            except NotCarried as error:
                raise NotCarried(f"column {column.name.decode()}: {error}") from None


def _or_null(literal: Literal, value: Value) -> bytes:
    if value is None:
        return b"NULL"
    if value is ABSENT:
        raise NotLogged
    return literal(value)


def _not_logged(column: SqlColumn) -> NotLogged:
    return NotLogged(f"the log does not hold column {column.name.decode()}")


def _same(before: Value, after: Value) -> bool:
    # 0.0 and -0.0 are equal, and not the same bytes.
    return before == after and not (isinstance(after, float) and str(before) != str(after))


def sql_columns(
    logged: Sequence[Column], targets: Sequence[TargetColumn], *, source: Flavour, flavour: Flavour
) -> list[SqlColumn]:
    """How the values of a table's columns are written.

    :param logged: the columns in the log, without those that the target has no column for.
    :param targets: the target's, in the same order.
    :param source: the family that wrote the log.
    :param flavour: the target's family.
    """
    return [
        sql_column(
            place,
            column,
            target,
            charset=target.charset if column.collation is not None else None,
            source=source,
            flavour=flavour,
        )
        for place, (column, target) in enumerate(zip(logged, targets, strict=True))
    ]


def sql_column(
    place: int, logged: Column, target: TargetColumn, *, charset: str | None, source: Flavour, flavour: Flavour
) -> SqlColumn:
    """How a column's values are written.

    :param charset: of the column in the log, as the target calls it; None where it has none.
    :param source: the family that wrote the log.
    :param flavour: the target's family.
    """
    name = quoted(target.name).encode()
    kind = logged.type
    literal: Literal
    exact: Literal
    if kind in _INTEGERS:
        literal, exact = _integer, (_compared_set if kind == ColumnType.SET else _integer)
    elif kind in _REAL:
        literal, exact = (_real_or_refuse if flavour is Flavour.MARIADB else _real), _real_number
    elif kind == ColumnType.NEWDECIMAL:
        literal = exact = _number_text
    elif kind in _TEMPORAL:
        literal = exact = _temporal
    elif kind == ColumnType.JSON:
        stays = target.data_type == "json" and source is Flavour.MYSQL
        literal, exact = (_document if stays else _document_text), _document_text
    else:
        literal, exact = _octets, _hex
    if kind == ColumnType.JSON:
        stored, own = b"CAST(CAST(" + name + b" AS CHAR) AS BINARY)=", name + b"="
    elif exact is _hex:
        stored = b"CAST(" + name + b" AS BINARY)="
        # A character set in front makes it a string of the column's own kind: its collation compares.
        own = name + b"=" + (f"_{charset} ".encode() if charset and charset != _BINARY else b"")
    else:
        stored = own = name + b"="

    def test(value: Any) -> bytes:
        if value == 0 and kind in _REAL and flavour is Flavour.MYSQL:
            return _zero(name, value)
        return stored + exact(value)

    return SqlColumn(
        place,
        name,
        literal,
        test,
        lambda value: own + exact(value),
        computed=target.computed,
        touched="on update" in target.extra.lower(),
    )


def _integer(value: int) -> bytes:
    return b"%d" % value


def _compared_set(value: int) -> bytes:
    """A SET compares as a signed number, of which its 64th member is the sign."""
    return b"%d" % (value - (1 << 64) if value >> 63 else value)


def _number_text(value: str) -> bytes:
    return value.encode()


def _real(value: float) -> bytes:
    if not math.isfinite(value):
        raise NotCarried(f"{value} has no literal")
    return f"'{value!r}'".encode()


def _real_or_refuse(value: float) -> bytes:
    if value == 0 and math.copysign(1, value) < 0:
        raise NotCarried("it is -0.0, which MariaDB does not keep")
    return _real(value)


def _real_number(value: float) -> bytes:
    """A DOUBLE, not a DECIMAL or a string: a FLOAT is compared with it by its very value."""
    text = f"{value!r}"
    return (text if "e" in text else f"{text}e0").encode()


def _zero(name: bytes, value: float) -> bytes:
    """What finds 0.0 or -0.0, which compare as equal.

    The factor keeps the server from putting a constant for the column: the sign would be the constant's.
    """
    sign = b"" if math.copysign(1, value) < 0 else b"NOT "
    return name + b"*1e0=0 AND CAST(" + name + b"*1e0 AS CHAR) " + sign + b"LIKE '-%'"


def _temporal(value: str) -> bytes:
    return f"'{value}'".encode()


def _octets(value: bytes) -> bytes:
    return b"_binary'" + value.replace(b"\\", b"\\\\").replace(b"'", b"\\'") + b"'"


def _hex(value: bytes) -> bytes:
    return b"X'" + value.hex().encode() + b"'"


def _document(value: bytes) -> bytes:
    try:
        return b"_utf8mb4 " + _hex(json_text(value, as_document=True).encode())
    except Opaque as error:
        raise NotCarried(f"{error}, which JSON text has no word for") from None


def _document_text(value: bytes) -> bytes:
    return _hex(json_text(value).encode())
