"""Rows as the text of SQL literals that the server itself writes: how shardkit carries and compares them exactly.

No value is ever converted by a driver: each literal is one that gives, on a server of the same flavour, the very bytes
back. The session has to have the time zone UTC and a `sql_mode` with backslash escapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple, TypeAlias

#: A primary key as SQL literals.
Key: TypeAlias = tuple[str, ...]

#: Added to each row's checksum so that the sum tells how many there are: more than all the checksums together.
_ONE = 10**30

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
    """Through DOUBLE: a FLOAT's own text is rounded to six digits. Not MySQL's DOUBLE: MySQL cuts the text of an
    expression at 22 characters, which are too few for a DOUBLE, and that of a column nowhere (tried on 9.7)."""
    TEXT = auto()
    """ASCII text that says so: MariaDB's UUID and INET types take a binary string for the stored bytes."""
    JSON = auto()
    """MySQL's JSON takes text, but no binary string."""


_NUMBERS = frozenset({"tinyint", "smallint", "mediumint", "int", "bigint", "decimal", "year"})
_FORMS = {
    **dict.fromkeys(("enum", "set", "bit"), Form.NUMBER),
    **dict.fromkeys(("float", "double"), Form.REAL),
    **dict.fromkeys(_NUMBERS, Form.QUOTED),
    **dict.fromkeys(("date", "time", "datetime", "timestamp"), Form.QUOTED),
    **dict.fromkeys(("uuid", "inet4", "inet6"), Form.TEXT),
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
    flavour: str

    @property
    def form(self) -> Form:
        """How its values are written."""
        if self.data_type == "double" and self.flavour == "mysql":
            return Form.QUOTED
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
            case Form.TEXT:
                return f"IF({name} IS NULL,'NULL',CONCAT('_ascii ''',{name},''''))"
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
        if self.data_type == "float" and self.flavour == "mysql":  # its text as a DOUBLE is cut: a FLOAT it is exactly
            return f"CONCAT('CAST(',{self.literal},' AS FLOAT)')"
        if self.data_type == "set":  # it compares as a signed number, of which its 64th member is the sign
            return f"CAST(CAST({name} AS SIGNED) AS CHAR)"
        return self.literal

    @property
    def width(self) -> str:
        """SQL for the bytes that the value takes, NULL for none."""
        fixed = _FIXED_WIDTH.get(self.data_type)
        name = quoted(self.name)
        return f"IF({name} IS NULL,0,{fixed})" if fixed else f"IFNULL(OCTET_LENGTH({name}),0)"


class Digest(NamedTuple):
    """What rows come to in whatever order: how many, and the sum of 60 bits of each one's SHA-256."""

    rows: int
    total: int


def digest_of(count: int, total: Decimal | None) -> Digest | None:
    """From what `RowTexts.digest` gives; None where the server could not make the text of a row.

    It is longer than max_allowed_packet then, and aggregates leave NULL out: two such rows would count as equal.
    """
    with_text, checksum = divmod(int(total or 0), _ONE)
    return Digest(with_text, checksum) if with_text == count else None


class RowTexts:
    """SQL about the rows of one table. For a table's description to inherit from."""

    name: str
    columns: tuple[Column, ...]
    primary: tuple[str, ...]

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
    def checksum(self) -> str:
        """SQL for 60 bits of the SHA-256 of a row's text; NULL where the server cannot make it."""
        return f"CAST(CONV(LEFT(SHA2({self.row_expression}, 256), 15), 16, 10) AS DECIMAL(20))"

    @cached_property
    def digest(self) -> str:
        """SQL for two columns, of which `digest_of` makes a `Digest`."""
        return f"COUNT(*), SUM({_ONE} + {self.checksum})"

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

    def between(self, low: Sequence[str] | None, high: Sequence[str] | None) -> str:
        """SQL: the primary key is behind ``low`` and not behind ``high``; None for no end."""
        return f"{self.after(low)} AND {self.upto(high)}"

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


def show_key(table: RowTexts, key: Key) -> str:
    """A primary key for people."""
    return ", ".join(f"{name}={plain_literal(value)}" for name, value in zip(table.primary, key, strict=True))


def plain_literal(literal: str) -> str:
    """A literal of `Column.key_literal` as people write it."""
    if literal.startswith("CAST("):
        return literal.removeprefix("CAST(").removesuffix(" AS FLOAT)")
    introducer, mark, digits = literal.rpartition("X'")
    if not mark:
        return literal
    raw = bytes.fromhex(digits.rstrip("'"))
    try:
        return repr(raw.decode("utf-8")) if introducer else f"0x{raw.hex()}"
    except UnicodeDecodeError:
        return f"0x{raw.hex()}"


def statements(table: RowTexts, rows: Iterable[bytes], most: int) -> Iterator[bytes]:
    """INSERT statements of at most ``most`` bytes each; a row that is larger gets one of its own."""
    head = table.insert_head.encode()
    part: list[bytes] = []
    size = len(head)
    for row in rows:
        if part and size + len(row) + 1 > most:
            yield head + b",".join(part)
            part, size = [], len(head)
        part.append(row)
        size += len(row) + 1
    if part:
        yield head + b",".join(part)
