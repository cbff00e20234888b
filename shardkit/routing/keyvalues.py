"""Python values -> the values that a key column stores. A value may only steer where its column stores it unchanged.

``code = 5`` on a VARCHAR matches '5', '05' and '5x'; DATETIME and DECIMAL round on storing; CHAR drops trailing
blanks. Such a value says nothing about the bucket: it is `Untrusted`, which makes a read ask every shard, and an INSERT
refused.

Where the partition normalizes keys, the readers of its key columns give normalized texts: two spellings of one key are
one value to whoever compares what was read. What is sent to the database stays what the application gave.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.types import NullType, TypeDecorator, TypeEngine

from shardkit.normalization import ALPHABET_IN_WORDS, Normalization, narrow
from shardkit.partition import KeyType, key_type_of


class Untrusted:
    """Why a value says nothing about the bucket.

    :param hint: what to do about it, where another value of the same type will not do.
    """

    __slots__ = ("hint", "reason")

    def __init__(self, reason: str, hint: str | None = None) -> None:
        self.reason = reason
        self.hint = hint


#: The stored value of a Python value (None for NULL), or `Untrusted`.
Reader: TypeAlias = Callable[[Any], Any]

_BIG = 1 << 63
_INTEGER_LIMITS: tuple[tuple[type[TypeEngine[Any]], int], ...] = (
    (sa.Boolean, 1 << 7),
    (mysql.TINYINT, 1 << 7),
    (sa.SmallInteger, 1 << 15),
    (mysql.MEDIUMINT, 1 << 23),
    (sa.BigInteger, _BIG),
    (sa.Integer, 1 << 31),
)


def reader_of(column_type: TypeEngine[Any], dialect: Dialect, normalize: Normalization | None = None) -> Reader | None:
    """How values of this column type are read; None for a type that cannot be a key.

    :param dialect: whose bind processing counts; an unconnected one will do.
    :param normalize: what the column's partition does to strings.
    """
    if column_type._has_bind_expression:  # noqa: SLF001 - the only way to see that the server is sent an expression
        return None
    if isinstance(column_type, TypeDecorator):
        return _decorated(column_type, dialect, normalize)
    stored = stored_type(column_type, dialect)
    if stored is not column_type:
        return reader_of(stored, dialect, normalize)
    if not _standard(column_type):
        return None
    return _plain(column_type, dialect, normalize)


def _standard(column_type: TypeEngine[Any]) -> bool:
    """Whether values pass through SQLAlchemy's own bind processing only, not through a subclass's."""
    processing = type(column_type).bind_processor
    return processing.__module__.startswith("sqlalchemy.")


def _decorated(column_type: TypeDecorator[Any], dialect: Dialect, normalize: Normalization | None) -> Reader | None:
    if type(column_type).bind_processor is not TypeDecorator.bind_processor:
        return None  # it does more than process_bind_param()
    inner = reader_of(column_type.load_dialect_impl(dialect), dialect, normalize)
    if inner is None:
        return None

    def read(value: Any) -> Any:
        try:
            stored = column_type.process_bind_param(value, dialect)
        except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            return Untrusted(f"{type(column_type).__name__} refuses it: {error}")
        return inner(stored)

    if type(column_type).process_bind_param is TypeDecorator.process_bind_param:
        return inner
    return read


def _plain(column_type: TypeEngine[Any], dialect: Dialect, normalize: Normalization | None) -> Reader | None:
    if isinstance(column_type, sa.Enum):
        return _enum(column_type, dialect, normalize)
    match key_type_of(column_type):
        case KeyType.INTEGER:
            return _integer(column_type, dialect)
        case KeyType.STRING:
            return _string(column_type, dialect, normalize)
        case KeyType.UUID:
            return _uuid(column_type)
        case KeyType.BYTES:
            return _bytes(column_type)
        case KeyType.DATE:
            return _date
        case KeyType.DATETIME:
            return _datetime(column_type, dialect)
        case KeyType.DECIMAL:
            return _decimal(column_type, dialect)
        case _:
            return None


def _wrong(value: Any, wanted: str) -> Untrusted:
    return Untrusted(f"a {type(value).__name__} is not {wanted}")


def _integer(column_type: TypeEngine[Any], dialect: Dialect) -> Reader:
    limit = next((size for known, size in _INTEGER_LIMITS if isinstance(column_type, known)), 1 << 31)
    low, high = -limit, limit
    if getattr(column_type, "unsigned", False):
        low, high = 0, 2 * limit
    if dialect.name == "sqlite":
        low, high = -_BIG, _BIG

    def read(value: Any) -> Any:
        kind = type(value)  # exactly: drivers send subclasses (IntEnum) in ways of their own
        if kind is int:
            return value if low <= value < high else Untrusted(f"an integer outside the range of {column_type!r}")
        if kind is bool:
            return int(value)
        return None if value is None else _wrong(value, "an integer")

    return read


_WITHOUT_PADDING: Final = ("nopad", "0900_bin")


def binary_collation(collation: str | None, dialect: Dialect) -> bool:
    """Whether two different texts are different keys. None (not declared) is left to ``shardkit doctor``."""
    if collation is None:
        return True
    name = collation.lower()
    if name == "binary":
        return True
    return dialect.name != "sqlite" and name.endswith("_bin") and any(word in name for word in _WITHOUT_PADDING)


def collation_fits(collation: str | None, dialect: Dialect, normalize: Normalization) -> bool:
    """Whether a normalization takes for equal whatever the collation does. None (not declared) is left to ``shardkit
    doctor``; SQLite's own collations only ever ignore the case of ASCII, or trailing blanks."""
    if collation is None:
        return True
    if dialect.name == "sqlite":
        return collation.lower() in {"binary", "nocase", "rtrim"}
    return normalize.fits(collation)


def _string(column_type: TypeEngine[Any], dialect: Dialect, normalize: Normalization | None) -> Reader | None:
    collation: str | None = getattr(column_type, "collation", None)
    if normalize is not None:
        return _normalized(column_type, collation, dialect, normalize)
    if not binary_collation(collation, dialect):
        return None
    server = dialect.name != "sqlite"
    length: int | None = getattr(column_type, "length", None)
    fixed = isinstance(column_type, sa.CHAR | sa.NCHAR)

    def read(value: Any) -> Any:
        if type(value) is not str:
            return None if value is None else _wrong(value, "a string")
        if server and length is not None and len(value) > length:
            return Untrusted(f"a string longer than {length} characters")
        if server and fixed and value.endswith(" "):
            return Untrusted("CHAR drops trailing blanks")
        return value

    return read


def _normalized(
    column_type: TypeEngine[Any], collation: str | None, dialect: Dialect, normalize: Normalization
) -> Reader | None:
    if not collation_fits(collation, dialect, normalize):
        return None
    server = dialect.name != "sqlite"
    length: int | None = getattr(column_type, "length", None)
    declared: str | None = collation or getattr(column_type, "charset", None)
    only_ascii = declared is not None and narrow(declared)

    def read(value: Any) -> Any:
        if type(value) is not str:
            return None if value is None else _wrong(value, "a string")
        if server and length is not None and len(value) > length:
            return Untrusted(f"a string longer than {length} characters")
        if only_ascii and not value.isascii():
            return Untrusted(f"{declared} stores ASCII, and not all other characters")
        try:
            return normalize.text(value)
        except TypeError as error:
            return Untrusted(str(error), f"use keys of {ALPHABET_IN_WORDS}, or a binary collation without padding")

    return read


def _enum(column_type: sa.Enum, dialect: Dialect, normalize: Normalization | None) -> Reader | None:
    stored_as = _string(column_type, dialect, normalize)
    if stored_as is None:
        return None
    names = frozenset(column_type.enums)

    def read(value: Any) -> Any:
        if value is None:
            return None
        try:
            text = column_type._db_value_for_elem(value)  # type: ignore[no-untyped-call]  # noqa: SLF001 - its bind processing
        except LookupError:
            return Untrusted(f"{value!r} is not one of {column_type!r}")
        if text not in names:
            return Untrusted(f"{value!r} is not one of {column_type!r}")
        return stored_as(text)

    return read


def _uuid(column_type: TypeEngine[Any]) -> Reader:
    as_uuid = getattr(column_type, "as_uuid", True)

    def read(value: Any) -> Any:
        if value is None:
            return None
        if as_uuid:
            return value if type(value) is UUID else _wrong(value, "a UUID")
        if type(value) is not str:
            return _wrong(value, "a string")
        try:
            return UUID(value)
        except ValueError:
            return Untrusted("not the text of a UUID")

    return read


def _bytes(column_type: TypeEngine[Any]) -> Reader:
    length: int | None = getattr(column_type, "length", None)
    fixed = isinstance(column_type, sa.BINARY)

    def read(value: Any) -> Any:
        if type(value) is not bytes:
            return None if value is None else _wrong(value, "bytes")
        if length is not None and (len(value) > length or (fixed and len(value) != length)):
            return Untrusted(f"{len(value)} bytes do not fit {column_type!r} as they are")
        return value

    return read


def _date(value: Any) -> Any:
    if type(value) is not date:  # a datetime is a date to Python, and is cut off by the server
        return None if value is None else _wrong(value, "a date")
    return value


def _datetime(column_type: TypeEngine[Any], dialect: Dialect) -> Reader | None:
    server = dialect.name != "sqlite"
    if server and isinstance(column_type, sa.TIMESTAMP):
        return None  # its text depends on the connection's time zone
    digits = getattr(column_type, "fsp", None) or 0

    def read(value: Any) -> Any:
        if type(value) is not datetime:
            return None if value is None else _wrong(value, "a datetime")
        if value.tzinfo is not None:
            return Untrusted("DATETIME columns store no time zone")
        if server and value.microsecond % 10 ** (6 - digits):
            return Untrusted(f"DATETIME({digits}) rounds microseconds")
        return value

    return read


_SQLITE_DIGITS: Final = 15  # what a REAL holds exactly
_DEFAULT_PRECISION: Final = 10  # DECIMAL is DECIMAL(10, 0)


def _decimal(column_type: TypeEngine[Any], dialect: Dialect) -> Reader:
    scale: int = getattr(column_type, "scale", None) or 0
    precision: int = getattr(column_type, "precision", None) or _DEFAULT_PRECISION
    sqlite = dialect.name == "sqlite"

    def read(value: Any) -> Any:
        if type(value) is not Decimal and type(value) is not int:
            return None if value is None else _wrong(value, "a Decimal")
        number = Decimal(value)
        if not number.is_finite():
            return Untrusted("not a finite number")
        _, digits, exponent = number.as_tuple()
        while digits and digits[-1] == 0:
            digits, exponent = digits[:-1], int(exponent) + 1
        whole, fraction = len(digits) + int(exponent), -int(exponent)
        fits = len(digits) <= _SQLITE_DIGITS if sqlite else fraction <= scale and whole <= precision - scale
        return value if fits or not digits else Untrusted(f"{column_type!r} rounds it")

    return read


# --- which types may stand for each other ------------------------------------------------------------------------


def stored_type(column_type: TypeEngine[Any], dialect: Dialect) -> TypeEngine[Any]:
    """The type under all decorators and variants: what the server knows."""
    if isinstance(column_type, TypeDecorator):
        return stored_type(column_type.load_dialect_impl(dialect), dialect)
    variant = column_type._variant_mapping.get(dialect.name)  # noqa: SLF001 - with_variant() has no public reader
    return column_type if variant is None else stored_type(variant, dialect)


def sends_alike(bound: TypeEngine[Any], column_type: TypeEngine[Any]) -> bool:
    """Whether a value bound with the type ``bound`` reaches the server as one bound with the column's type would."""
    if bound is column_type:
        return True
    if isinstance(column_type, TypeDecorator | sa.Enum) or isinstance(bound, TypeDecorator | sa.Enum):
        return _same_type(bound, column_type)
    if isinstance(bound, NullType):
        return True
    if bound._has_bind_expression or not _standard(bound):  # noqa: SLF001 - see reader_of
        return False
    if bound._type_affinity is column_type._type_affinity:  # noqa: SLF001 - the type's family: INTEGER for BIGINT
        return True
    return isinstance(bound, sa.Integer) and key_type_of(column_type) is KeyType.DECIMAL


def _same_type(one: TypeEngine[Any], other: TypeEngine[Any]) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, sa.Enum) and isinstance(other, sa.Enum):
        return one.enum_class is other.enum_class and one.enums == other.enums
    key = one._static_cache_key  # noqa: SLF001 - SQLAlchemy's own test of two types being equal
    return isinstance(key, tuple) and key == other._static_cache_key  # noqa: SLF001


def exact_kind(
    column_type: TypeEngine[Any], dialect: Dialect, *, is_key: bool, normalize: Normalization | None = None
) -> KeyType | None:
    """The kind of a column whose equality means the same bucket; None where equal values may hash apart.

    The collation of a string column that is no key is not known to be binary: 'abc' = 'ABC' says nothing there.

    :param normalize: what the partition does to the column, a key, where that is a string.
    """
    stored = stored_type(column_type, dialect)
    kind = key_type_of(stored)
    if kind is KeyType.STRING:
        collation = getattr(stored, "collation", None)
        if normalize is not None:
            return kind if collation_fits(collation, dialect, normalize) else None
        known = is_key or dialect.name == "sqlite" or collation is not None
        return kind if known and binary_collation(collation, dialect) else None
    if kind is KeyType.DATETIME and isinstance(stored, sa.TIMESTAMP) and dialect.name != "sqlite":
        return None  # compared after conversion to the connection's time zone
    return kind
