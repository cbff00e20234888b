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

from shardkit.normalization import Normalization

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
    """The kinds of key columns that have a canonical text."""

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
    if isinstance(column_type, sa.Float | sa.TIMESTAMP | mysql.SET):
        # FLOAT does not survive rounding, a TIMESTAMP shows what the session's time zone says, and of a SET the server
        # stores the words in its own order and spelling
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

    Values are taken as the column stores them (`shardkit.routing.keyvalues` brings values of statements to that).
    An enumeration's member counts as its value where that is a string or an integer (`enum.StrEnum`, `enum.IntEnum`),
    else as its name.

    :raises TypeError: for a type that cannot be a key (float, time with zone, containers, ...).
    """
    match value:
        case Enum():
            return canonical_text(value.value) if isinstance(value, str | int) else value.name
        case None | str():
            return value
        case bool():
            return str(int(value))
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
            return _decimal_text(value)
    raise TypeError(f"a {type(value).__name__} cannot be a shard key")


def _datetime_text(value: datetime) -> str:
    if value.tzinfo is not None:
        raise TypeError("a datetime with a time zone cannot be a shard key: DATETIME columns store none")
    return value.isoformat(sep=" ", timespec="microseconds")


def _decimal_text(value: Decimal) -> str:
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def typed_value(kind: KeyType, value: Any) -> Any:
    """A key value as it is written in a map, as the Python type of a key column of this kind.

    YAML knows neither UUIDs nor decimals nor bytes: they are written as their canonical text.

    :raises TypeError: where no value of this kind is written like that.
    """
    text = canonical_text(value)
    if text is None:
        return None
    return _read(_READERS[kind], text)


_READERS: Mapping[KeyType, Callable[[str], Any]] = {
    KeyType.INTEGER: int,
    KeyType.STRING: str,
    KeyType.UUID: UUID,
    KeyType.BYTES: bytes.fromhex,
    KeyType.DATE: date.fromisoformat,
    KeyType.DATETIME: datetime.fromisoformat,
    KeyType.DECIMAL: Decimal,
}


def _read(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except (ValueError, ArithmeticError):
        raise TypeError(f"{text!r} is not a value that the key column can have ({read.__qualname__})") from None


def key_text(key: Key, normalize: Normalization | None = None) -> str | None:
    """One text for a whole key: the parts' texts with a separator; None only for a single NULL.

    :param normalize: what is done to each part's text. Those of other types than strings it leaves as they are.
    :raises TypeError: for a part that cannot be a key, or is outside the normalization's alphabet.
    """
    if len(key) == 1:
        return canonical_text(key[0]) if normalize is None else _part_text(key[0], normalize)
    return _SEPARATOR.join(_NULL_PART if (text := _part_text(part, normalize)) is None else text for part in key)


def _part_text(part: Any, normalize: Normalization | None) -> str | None:
    text = canonical_text(part)
    return text if text is None or normalize is None else normalize.text(text)


# --- the same in SQL ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A key column as an SQL expression (a table's column, or ``NEW.user_id`` in a trigger) and its kind.

    The kind counts, not the expression's SQLAlchemy type: in a trigger there is none.
    """

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


class _HexText(FunctionElement[str]):
    """Bytes as canonical text: lower-case hexadecimal digits."""

    type = sa.String()
    inherit_cache = True


class _ControlCharacter(FunctionElement[str]):
    """A character that no SQL text should hold as it is."""

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
    return f"CAST(date_format({value}, '{pattern}') AS CHAR CHARACTER SET utf8mb4)"


@compiles(_HexText)
def _hex_sql(element: _HexText, compiler: SQLCompiler, **kw: Any) -> str:
    value = compiler.process(element.clauses, **kw)
    if compiler.dialect.name == "sqlite":
        return f"iif({value} IS NULL, NULL, lower(hex({value})))"  # its hex(NULL) is ''
    return f"CAST(lower(hex({value})) AS CHAR CHARACTER SET utf8mb4)"


@compiles(_ControlCharacter)
def _control_sql(element: _ControlCharacter, compiler: SQLCompiler, **kw: Any) -> str:
    code = compiler.process(element.clauses, **kw)
    return f"char({code})" if compiler.dialect.name == "sqlite" else f"char({code} USING utf8mb4)"


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


def _text_expression(column: KeyColumn, normalize: Normalization | None = None) -> sa.ColumnElement[Any]:
    expression = column.expression
    match column.kind:
        case KeyType.STRING if normalize is not None:
            return normalize.expression(sa.cast(expression, _TEXT))
        case KeyType.UUID:
            return sa.func.lower(sa.func.replace(sa.cast(expression, _TEXT), "-", ""))
        case KeyType.BYTES:
            return _HexText(expression)
        case KeyType.DATETIME:
            return _DatetimeText(expression)
        case KeyType.DECIMAL:
            return _DecimalText(sa.cast(expression, _TEXT))
        case _:
            return sa.cast(expression, _TEXT)


def key_text_expression(columns: Sequence[KeyColumn], normalize: Normalization | None = None) -> sa.ColumnElement[Any]:
    """`key_text` as an SQL expression over a table's key columns; NULL, too, where that raises for the alphabet."""
    if len(columns) == 1:
        return _text_expression(columns[0], normalize)
    separator, null = (_ControlCharacter(_number(ord(mark))) for mark in (_SEPARATOR, _NULL_PART))
    texts: list[sa.ColumnElement[Any]] = [
        sa.func.coalesce(_text_expression(column), null)
        if normalize is None
        else sa.case((column.expression.is_(None), null), else_=_text_expression(column, normalize))
        for column in columns
    ]
    first, *rest = texts
    joined: sa.ColumnElement[Any] = first
    for part in rest:
        joined = joined.concat(separator).concat(part)
    return joined


def _number(value: int) -> sa.ColumnElement[int]:
    return sa.literal_column(str(value), sa.Integer())


def outside_alphabet(columns: Sequence[KeyColumn], normalize: Normalization | None) -> sa.ColumnElement[bool] | None:
    """An SQL condition that is true for the rows, never to be found by their key, whose key the normalization does not
    know; None where there can be none."""
    texts = [sa.cast(column.expression, _TEXT) for column in columns if column.kind is KeyType.STRING]
    return None if normalize is None or not texts else sa.or_(*(normalize.outside(text) for text in texts))


def _equals_any(
    columns: Sequence[KeyColumn], keys: Iterable[Key], normalize: Normalization | None
) -> sa.ColumnElement[bool]:
    """True, false, never NULL: whether the key is one of these."""
    tests = [
        sa.and_(*(_equals(column, part, normalize) for column, part in zip(columns, key, strict=True))) for key in keys
    ]
    return sa.or_(sa.false(), *tests)


def _equals(column: KeyColumn, value: Any, normalize: Normalization | None) -> sa.ColumnElement[bool]:
    """Never NULL. The value goes in as the column's kind, so that no server compares ``'42abc'`` with 42.

    Not by IS NOT DISTINCT FROM: SQLAlchemy 2.1 loses ``literal_binds`` inside it, and triggers have no parameters.
    """
    value = typed_value(column.kind, value)
    if value is None:
        return column.expression.is_(None)
    if normalize is not None and column.kind is KeyType.STRING:
        same = _text_expression(column, normalize) == sa.literal(_part_text(value, normalize), sa.String())
        return sa.func.coalesce(same, sa.false())
    if column.kind in {KeyType.UUID, KeyType.BYTES}:  # stored in many ways: compare what they have in common
        same = _text_expression(column) == sa.literal(canonical_text(value), sa.String())
    else:
        same = column.expression == _literal(column.kind, value)
    return sa.and_(column.expression.is_not(None), same)


def _literal(kind: KeyType, value: Any) -> sa.ColumnElement[Any]:
    return sa.literal(value, _LITERAL_TYPES[kind])


_LITERAL_TYPES: Mapping[KeyType, TypeEngine[Any]] = {
    KeyType.INTEGER: sa.BigInteger(),
    KeyType.STRING: sa.String(),
    KeyType.DATE: sa.Date(),
    KeyType.DATETIME: sa.DateTime(),
    KeyType.DECIMAL: sa.Numeric(),
}


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

    @property
    def normalize(self) -> Normalization | None:
        """What is done to string keys first, where the database takes different texts for one key."""
        ...

    def bucket_of(self, key: Key) -> Bucket | None:
        """The key's bucket; None where no bucket takes such a key (so no row can have it).

        :raises TypeError: for a value that cannot be a key, or is outside the normalization's alphabet.
        """
        ...

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        """An SQL condition that is true for the rows of these buckets and false, never NULL, for all others (also
        for those outside the normalization's alphabet, which are in no bucket)."""
        ...


@dataclass(frozen=True)
class HashPartition:
    """``CRC32(canonical text) mod count``; single keys may be pinned to a bucket of their own.

    :param count: the number of hash buckets, 4096 unless the map says otherwise.
    :param exceptions: key -> the name of its own bucket.
    :param normalize: what is done to string keys first.
    """

    count: int = HASH_BUCKETS
    exceptions: Mapping[Key, str] = field(default_factory=dict)
    normalize: Normalization | None = None
    by: ClassVar[str] = "hash"

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        return (*range(self.count), *dict.fromkeys(self.exceptions.values()))

    @cached_property
    def _pinned(self) -> Mapping[str | None, str]:
        return {key_text(key, self.normalize): bucket for key, bucket in self.exceptions.items()}

    def bucket_of(self, key: Key) -> Bucket:
        if len(key) == 1 and type(key[0]) is int and not self.exceptions:
            return zlib.crc32(b"%d" % key[0]) % self.count  # the usual key, without a detour: the same text
        text = key_text(key, self.normalize)
        if text in self._pinned:
            return self._pinned[text]
        return NULL_BUCKET if text is None else zlib.crc32(_utf8(text)) % self.count

    def bucket_expression(self, columns: Sequence[KeyColumn]) -> sa.ColumnElement[int]:
        """The hash bucket's number in SQL, pinned keys not regarded; NULL for a key outside the normalization's
        alphabet."""
        hashed = _HashBucket(key_text_expression(columns, self.normalize), _number(self.count))
        if self.normalize is None:
            return sa.func.coalesce(hashed, _number(NULL_BUCKET))
        null = sa.and_(*(column.expression.is_(None) for column in columns))
        return hashed if len(columns) > 1 else sa.case((null, _number(NULL_BUCKET)), else_=hashed)

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        wanted = set(buckets)
        number = self.bucket_expression(columns)
        spans = _spans(bucket for bucket in wanted if isinstance(bucket, int))
        hashed: sa.ColumnElement[bool] = sa.or_(sa.false(), *(_between(number, low, high) for low, high in spans))
        if self.normalize is not None:
            hashed = sa.func.coalesce(hashed, sa.false())
        if not self.exceptions:
            return hashed
        pinned = [key for key, bucket in self.exceptions.items() if bucket in wanted]
        return sa.or_(
            sa.and_(hashed, sa.not_(_equals_any(columns, self.exceptions, self.normalize))),
            _equals_any(columns, pinned, self.normalize),
        )


def _between(number: sa.ColumnElement[int], low: int, high: int) -> sa.ColumnElement[bool]:
    first, last = _number(low), _number(high)
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
    :param normalize: what is done to string keys, and to the values, before they are compared.
    """

    values: Mapping[str, Sequence[Any]]
    normalize: Normalization | None = None
    by: ClassVar[str] = "list"

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        return tuple(self.values)

    @cached_property
    def _bucket_of_text(self) -> Mapping[str | None, str]:
        return {
            key_text((value,), self.normalize): bucket for bucket, values in self.values.items() for value in values
        }

    def bucket_of(self, key: Key) -> Bucket | None:
        return self._bucket_of_text.get(key_text(key, self.normalize))

    def predicate(self, columns: Sequence[KeyColumn], buckets: Iterable[Bucket]) -> sa.ColumnElement[bool]:
        keys = ((value,) for bucket in _named(buckets) for value in self.values[bucket])
        return _equals_any(columns, keys, self.normalize)


@dataclass(frozen=True)
class RangePartition:
    """Named buckets, each an interval ``[low, high)``; None is an open end. NULL sorts below every value.

    Strings compare by their UTF-8 bytes, as binary collations do.

    :param bounds: bucket -> (low, high).
    """

    bounds: Mapping[str, tuple[Any, Any]]
    by: ClassVar[str] = "range"
    #: The order of normalized texts is not the collation's, so their ranges would be others.
    normalize: ClassVar[None] = None

    @cached_property
    def buckets(self) -> Sequence[Bucket]:
        return tuple(self.bounds)

    def bucket_of(self, key: Key) -> Bucket | None:
        (value,) = key
        canonical_text(value)  # refuses what cannot be a key
        _order(value)  # and what no column can hold
        try:
            return next((bucket for bucket, (low, high) in self.bounds.items() if _inside(value, low, high)), None)
        except TypeError:
            raise TypeError(
                f"{value!r} cannot be compared with the ranges' {type(self._some_bound).__name__}"
            ) from None

    @property
    def _some_bound(self) -> Any:
        return next((end for ends in self.bounds.values() for end in ends if end is not None), None)

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
        return sa.or_(sa.false(), *(self._within(column, bucket) for bucket in _named(buckets)))

    def _within(self, column: KeyColumn, bucket: str) -> sa.ColumnElement[bool]:
        value, (low, high) = column.expression, self.bounds[bucket]
        inside = sa.and_(
            value.is_not(None),
            *([] if low is None else [value >= _literal(column.kind, low)]),
            *([] if high is None else [value < _literal(column.kind, high)]),
        )
        return sa.or_(inside, value.is_(None)) if low is None else inside


def _inside(value: Any, low: Any, high: Any) -> bool:
    """Whether ``low <= value < high``; None is an open end, and as a value below all others."""
    if value is None:
        return low is None
    return (low is None or _order(value) >= _order(low)) and (high is None or bool(_order(value) < _order(high)))


def _order(value: Any) -> Any:
    """What a value is compared by, as the database would."""
    if isinstance(value, str):
        return _utf8(value.value if isinstance(value, Enum) else value)
    return value


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise TypeError(f"{text!r} is not valid text: no column can hold it") from None


#: Finds the bucket of a key's text in a directory's lookup table; None where it is not there.
DirectoryLookup: TypeAlias = Callable[["DirectoryPartition", str], str | None]


@dataclass(frozen=True)
class DirectoryPartition:
    """Named buckets, and a table that says for each key which one it is in.

    The table ``shardkit_directory`` lives on the shard ``home``; a cluster's map knows how to look into it
    (`shardkit.directory`), a map by itself does not.

    :param names: the buckets.
    :param home: the shard whose database holds the lookup table.
    :param keyspace: the keyspace's name, under which the lookup table files its keys.
    :param lookup: looks into the table.
    :param normalize: what is done to string keys before they are filed.
    """

    names: Sequence[str]
    home: str
    keyspace: str
    lookup: DirectoryLookup | None = field(default=None, compare=False, repr=False)
    normalize: Normalization | None = None
    by: ClassVar[str] = "directory"

    @property
    def buckets(self) -> Sequence[Bucket]:
        return tuple(self.names)

    def text_of(self, key: Key) -> str | None:
        """The text that a key is filed under; None for NULL, which is not.

        :raises TypeError: as `bucket_of`.
        """
        return key_text(key, self.normalize)

    def bucket_of(self, key: Key) -> Bucket | None:
        text = self.text_of(key)
        if text is None:
            return None  # NULL is no key that could be filed
        if self.lookup is None:
            raise TypeError(f"the keys of {self.keyspace} stand in a lookup table: ask a cluster, not the map alone")
        return self.lookup(self, text)

    def first_bucket_of(self, text: str) -> str:
        """The bucket that a key is given where nobody has chosen one: evenly spread, and the same for everybody."""
        return self.names[zlib.crc32(_utf8(text)) % len(self.names)]

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
