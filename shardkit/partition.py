"""Partitions: the function key -> bucket, in Python and, with the same answer, in SQL.

Format 1 of the shard map hashes a key as ``CRC32(canonical text) mod buckets``. The canonical text of each type is
fixed for ever (docs/reference/keys.md lists it); changing it would lose rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import Enum, StrEnum
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

#: The smallest unit that moves: a number for hash partitions, a name for all others and for pinned keys.
Bucket: TypeAlias = int | str
#: The values of a table's key columns, in the map's order. One column is a tuple of one.
Key: TypeAlias = tuple[Any, ...]

HASH_BUCKETS = 4096
NULL_BUCKET = 0
#: The one bucket of a vertical keyspace.
WHOLE = "all"
_SEPARATOR = "\x1f"  # between the parts of a composite key
_NULL_PART = "\x00"  # a NULL inside a composite key


class KeyType(StrEnum):
    """The kinds of key columns that have a canonical text. FLOAT has none: it does not survive rounding."""

    INTEGER = "integer"
    STRING = "string"
    UUID = "uuid"
    BYTES = "bytes"
    DATE = "date"
    DATETIME = "datetime"
    DECIMAL = "decimal"


def key_type_of(column_type: TypeEngine[Any]) -> KeyType | None:
    """The kind of key that a column of this type holds; None where it cannot be a key."""
    if isinstance(column_type, sa.types.TypeDecorator):
        return key_type_of(column_type.impl_instance)
    if isinstance(column_type, sa.Double | sa.Float):
        return None
    for known, kind in _KEY_TYPES:
        if isinstance(column_type, known):
            return kind
    return None


_KEY_TYPES: tuple[tuple[type[TypeEngine[Any]], KeyType], ...] = (
    (sa.Boolean, KeyType.INTEGER),
    (sa.Integer, KeyType.INTEGER),
    (sa.Numeric, KeyType.DECIMAL),
    (sa.Uuid, KeyType.UUID),
    (sa.types._Binary, KeyType.BYTES),  # noqa: SLF001 - the parent of LargeBinary and VARBINARY has no public name
    (sa.DateTime, KeyType.DATETIME),
    (sa.Date, KeyType.DATE),
    (sa.Enum, KeyType.STRING),
    (sa.String, KeyType.STRING),
)


def canonical_text(value: Any) -> str | None:
    """The text that a key value is hashed and compared by; None for NULL.

    :raises TypeError: for a type that cannot be a key (float, time with zone, containers, ...).
    """
    if value is None or (isinstance(value, str) and not isinstance(value, Enum)):
        return value
    match value:
        case bool():
            return str(int(value))
        case Enum():
            return value.name
        case int():
            return str(value)
        case UUID():
            return value.hex
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
        case datetime():
            return _datetime_text(value)
        case date():
            return value.isoformat()
        case Decimal() if value.is_finite():
            text = format(value, "f")
            text = text.rstrip("0").rstrip(".") if "." in text else text
            return "0" if text == "-0" else text
    raise TypeError(f"a {type(value).__name__} cannot be a shard key")


def _datetime_text(value: datetime) -> str:
    if value.tzinfo is not None:
        raise TypeError("a datetime with a time zone cannot be a shard key: DATETIME columns store none")
    return value.isoformat(sep=" ", timespec="microseconds")


def key_text(key: Key) -> str | None:
    """One text for a whole key: the parts' texts with a separator; None only for a single NULL."""
    if len(key) == 1:
        return canonical_text(key[0])
    return _SEPARATOR.join(_NULL_PART if (text := canonical_text(part)) is None else text for part in key)


# --- the same in SQL ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A key column as an SQL expression (a table's column, or ``NEW.user_id`` in a trigger) and its kind."""

    expression: sa.ColumnElement[Any]
    kind: KeyType


class _DatetimeText(FunctionElement[str]):
    """DATETIME as canonical text."""

    type = sa.String()
    inherit_cache = True


class _DecimalText(FunctionElement[str]):
    """DECIMAL as canonical text: no trailing zeros."""

    type = sa.String()
    inherit_cache = True


class _HashBucket(FunctionElement[int]):
    """``CRC32(text) mod buckets``. On SQLite ``crc32`` is a function that `shardkit.engines` adds to the connection."""

    type = sa.Integer()
    inherit_cache = True


@compiles(_DatetimeText)
def _datetime_sql(element: _DatetimeText, compiler: SQLCompiler, **kw: Any) -> str:
    value = compiler.process(element.clauses, **kw)
    if compiler.dialect.name == "sqlite":
        return value  # SQLAlchemy stores this very text
    percent = "%%" if compiler.preparer._double_percents else "%"  # noqa: SLF001 - as SQLAlchemy's own literals do
    pattern = "%Y-%m-%d %H:%i:%s.%f".replace("%", percent)
    return f"date_format({value}, '{pattern}')"


@compiles(_DecimalText)
def _decimal_sql(element: _DecimalText, compiler: SQLCompiler, **kw: Any) -> str:
    text = compiler.process(element.clauses, **kw)
    if compiler.dialect.name == "sqlite":
        return f"iif(instr({text}, '.'), rtrim(rtrim({text}, '0'), '.'), {text})"
    trimmed = f"trim(TRAILING '.' FROM trim(TRAILING '0' FROM {text}))"
    return f"if(locate('.', {text}), {trimmed}, {text})"


@compiles(_HashBucket)
def _hash_bucket_sql(element: _HashBucket, compiler: SQLCompiler, **kw: Any) -> str:
    text, buckets = (compiler.process(clause, **kw) for clause in element.clauses)
    if compiler.dialect.name == "sqlite":
        return f"(crc32({text}) % {buckets})"
    return f"mod(crc32({text}), {buckets})"


#: CHAR in utf8mb4, so that CRC32 sees the same bytes whatever the column's character set is.
_TEXT = sa.String().with_variant(mysql.CHAR(charset="utf8mb4"), "mysql", "mariadb")


def _text_expression(column: KeyColumn) -> sa.ColumnElement[Any]:
    expression = column.expression
    match column.kind:
        case KeyType.UUID:
            return sa.func.lower(sa.func.replace(sa.cast(expression, _TEXT), "-", ""))
        case KeyType.BYTES:
            return sa.func.lower(sa.func.hex(expression))
        case KeyType.DATETIME:
            return _DatetimeText(expression)
        case KeyType.DECIMAL:
            return _DecimalText(sa.cast(expression, _TEXT))
        case _:
            return sa.cast(expression, _TEXT)


def key_text_expression(columns: Sequence[KeyColumn]) -> sa.ColumnElement[Any]:
    """`key_text` as an SQL expression over a table's key columns."""
    if len(columns) == 1:
        return _text_expression(columns[0])
    parts: list[Any] = []
    for column in columns:
        parts += [sa.literal(_SEPARATOR), sa.func.coalesce(_text_expression(column), _NULL_PART)]
    joined: sa.ColumnElement[Any] = parts[1]
    for part in parts[2:]:
        joined = joined.concat(part)
    return joined


def _equals_any(columns: Sequence[KeyColumn], keys: Iterable[Key]) -> sa.ColumnElement[bool]:
    """True, false, never NULL: whether the key is one of these."""
    tests = [
        sa.and_(*(column.expression.is_not_distinct_from(part) for column, part in zip(columns, key, strict=True)))
        for key in keys
    ]
    return sa.or_(sa.false(), *tests)


# --- partitions --------------------------------------------------------------------------------------------------


@runtime_checkable
class Partition(Protocol):
    """The function key -> bucket of one keyspace. Every method is pure."""

    @property
    def by(self) -> str:
        """``hash``, ``list``, ``range`` or ``directory``: the word in the shard map."""
        ...

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Every bucket, in the map's order."""
        ...

    def bucket_of(self, key: Key) -> Bucket | None:
        """The key's bucket; None where no bucket takes such a key (so no row can have it).

        :raises TypeError: for a value that cannot be a key.
        """
        ...

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        """An SQL condition that is true for the rows of these buckets and false, never NULL, for all others."""
        ...


@dataclass(frozen=True)
class HashPartition:
    """``CRC32(canonical text) mod count``; single keys may be pinned to a bucket of their own.

    :param count: the number of hash buckets, 4096 unless the map says otherwise.
    :param exceptions: key -> the name of its own bucket.
    """

    count: int = HASH_BUCKETS
    exceptions: Mapping[Key, str] = field(default_factory=dict)
    by: ClassVar[str] = "hash"

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        return (*range(self.count), *dict.fromkeys(self.exceptions.values()))

    @cached_property
    def _pinned(self) -> Mapping[str | None, str]:
        return {key_text(key): bucket for key, bucket in self.exceptions.items()}

    def bucket_of(self, key: Key) -> Bucket:
        text = key_text(key)
        if text in self._pinned:
            return self._pinned[text]
        return NULL_BUCKET if text is None else zlib.crc32(text.encode()) % self.count

    def bucket_expression(self, columns: Sequence[KeyColumn]) -> sa.ColumnElement[int]:
        """The hash bucket's number in SQL, pinned keys not regarded."""
        hashed = _HashBucket(key_text_expression(columns), sa.literal_column(str(self.count), sa.Integer()))
        return sa.func.coalesce(hashed, sa.literal_column(str(NULL_BUCKET), sa.Integer()))

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        wanted = set(buckets)
        number = self.bucket_expression(columns)
        spans = _spans(bucket for bucket in wanted if isinstance(bucket, int))
        hashed = sa.or_(sa.false(), *(_between(number, low, high) for low, high in spans))
        if not self.exceptions:
            return hashed
        pinned = [key for key, bucket in self.exceptions.items() if bucket in wanted]
        return sa.or_(
            sa.and_(hashed, sa.not_(_equals_any(columns, self.exceptions))),
            _equals_any(columns, pinned),
        )


def _between(number: sa.ColumnElement[int], low: int, high: int) -> sa.ColumnElement[bool]:
    first, last = (sa.literal_column(str(end), sa.Integer()) for end in (low, high))
    return number == first if low == high else number.between(first, last)


def _spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as closed spans: 1, 2, 3, 7 -> (1, 3), (7, 7)."""
    spans: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans


@dataclass(frozen=True)
class ListPartition:
    """Named buckets, each with the key values that it takes: by region, by tenant class, ...

    :param values: bucket -> its values; None stands for NULL.
    """

    values: Mapping[str, Sequence[Any]]
    by: ClassVar[str] = "list"

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        return tuple(self.values)

    @cached_property
    def _bucket_of_text(self) -> Mapping[str | None, str]:
        return {canonical_text(value): bucket for bucket, values in self.values.items() for value in values}

    def bucket_of(self, key: Key) -> Bucket | None:
        return self._bucket_of_text.get(key_text(key))

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        return _equals_any(columns, ((value,) for bucket in _named(buckets) for value in self.values[bucket]))


@dataclass(frozen=True)
class RangePartition:
    """Named buckets, each an interval ``[low, high)``; None is an open end. NULL sorts below every value.

    Strings compare by their UTF-8 bytes, as binary collations do.

    :param bounds: bucket -> (low, high).
    """

    bounds: Mapping[str, tuple[Any, Any]]
    by: ClassVar[str] = "range"

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        return tuple(self.bounds)

    def bucket_of(self, key: Key) -> Bucket | None:
        (value,) = key
        canonical_text(value)  # refuses what cannot be a key
        for bucket, (low, high) in self.bounds.items():
            if _at_least(value, low) and (high is None or value is None or _order(value) < _order(high)):
                return bucket
        return None

    def overlapping(self, low: Any, high: Any) -> Sequence[Bucket]:
        """The buckets that may hold a value in the closed interval ``[low, high]``; None is an open end."""
        return tuple(
            bucket
            for bucket, (first, end) in self.bounds.items()
            if (high is None or first is None or _order(first) <= _order(high))
            and (low is None or end is None or _order(low) < _order(end))
        )

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        (column,) = columns
        return sa.or_(sa.false(), *(self._within(column.expression, bucket) for bucket in _named(buckets)))

    def _within(self, value: sa.ColumnElement[Any], bucket: str) -> sa.ColumnElement[bool]:
        low, high = self.bounds[bucket]
        inside = sa.and_(
            value.is_not(None),
            *([] if low is None else [value >= low]),
            *([] if high is None else [value < high]),
        )
        return sa.or_(inside, value.is_(None)) if low is None else inside


def _at_least(value: Any, low: Any) -> bool:
    if value is None:
        return low is None
    return low is None or bool(_order(value) >= _order(low))


def _order(value: Any) -> Any:
    """What a value is compared by, as the database would."""
    return value.encode() if isinstance(value, str) else value


#: Finds a key's bucket in a directory's lookup table: (keyspace, key text) -> bucket or None.
DirectoryLookup: TypeAlias = Callable[[str, str | None], str | None]


@dataclass(frozen=True)
class DirectoryPartition:
    """Named buckets, and a table that says for each key which one it is in.

    The table ``shardkit_directory`` lives on the shard ``home``; reading it is the cluster's work, so `bucket_of`
    answers only for keys that ``entries`` holds.

    :param names: the buckets.
    :param home: the shard whose database holds the lookup table.
    :param keyspace: the keyspace's name, under which the lookup table files its keys.
    """

    names: Sequence[str]
    home: str
    keyspace: str
    lookup: DirectoryLookup | None = field(default=None, compare=False, repr=False)
    by: ClassVar[str] = "directory"

    @property
    def buckets(self) -> Sequence[Bucket]:
        return tuple(self.names)

    def bucket_of(self, key: Key) -> Bucket | None:
        if self.lookup is None:
            raise TypeError(f"the keys of {self.keyspace} stand in a lookup table: ask a cluster, not the map alone")
        return self.lookup(self.keyspace, key_text(key))

    def predicate(
        self,
        columns: Sequence[KeyColumn],  # noqa: ARG002 - the protocol's signature
        buckets: Iterable[Bucket],  # noqa: ARG002
    ) -> sa.ColumnElement[bool]:
        raise TypeError(f"the buckets of {self.keyspace} cannot be told apart in SQL: they stand in a lookup table")


def _named(buckets: Iterable[Bucket]) -> Iterable[str]:
    return (str(bucket) for bucket in buckets)


# --- bucket sets as text -----------------------------------------------------------------------------------------


def parse_buckets(text: str) -> list[Bucket]:
    """Read ``"0-2047, 3000, hot-1"``: numbers, closed spans of numbers, and names.

    :raises ValueError: for an empty part or a span that runs backwards.
    """
    buckets: list[Bucket] = []
    for part in text.split(","):
        word = part.strip()
        first, dash, last = word.partition("-")
        if word.isdecimal():
            buckets.append(int(word))
        elif dash and first.strip().isdecimal() and last.strip().isdecimal():
            low, high = int(first), int(last)
            if high < low:
                raise ValueError(f"the span {word!r} runs backwards: write {high}-{low}")
            buckets += range(low, high + 1)
        elif word:
            buckets.append(word)
        else:
            raise ValueError(f"{text!r} has an empty part: write buckets as 0-2047, 3000, name")
    return buckets


def format_buckets(buckets: Iterable[Bucket]) -> str:
    """The opposite of `parse_buckets`, with spans as long as they get: ``0-2047, 3000, hot-1``."""
    members = list(buckets)
    spans = _spans(bucket for bucket in members if isinstance(bucket, int))
    numbers = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    return ", ".join([*numbers, *(bucket for bucket in members if isinstance(bucket, str))])
