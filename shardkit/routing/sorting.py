"""Sort keys: hidden columns that make the merge sort, group and tell apart as the database does, not as Python would.

MySQL and MariaDB compare strings by their collation, which only the server knows: ``WEIGHT_STRING()`` gives the bytes
it compares. Collations that pad compare as if every text went on with blanks for ever (or 'a' would sort before
'a\\t'). SQLite compares by storage class, then by value: NULL, numbers, text by bytes, blobs by bytes
(https://www.sqlite.org/datatype3.html#comparisons); NOCASE takes the letters A to Z as small ones, as ``lower()`` does,
and RTRIM leaves blanks at the end out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import operators
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    Case,
    Cast,
    ColumnClause,
    ColumnElement,
    Grouping,
    Label,
    Null,
    Over,
    TypeCoerce,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CompoundSelect, SelectStatementGrouping
from sqlalchemy.types import NullType, TypeDecorator

from shardkit.errors import RoutingError
from shardkit.routing.expressions import is_distinct
from shardkit.routing.functions import NO_LONGER, NUMERIC, names_of
from shardkit.routing.keyvalues import stored_type
from shardkit.routing.spread import Refused

#: The longest text that every server still sorts as a whole: ``max_sort_length`` (1024 bytes) at four bytes each.
LONGEST_TEXT: Final = 256
LONGEST_BYTES: Final = 1024


class Comparison(StrEnum):
    """How values of a hidden column compare."""

    NUMBER = "number"
    BYTES = "bytes"
    WEIGHTS = "text"
    SQLITE = "sqlite"


@dataclass(frozen=True, slots=True)
class SortKey:
    """One hidden column to compare by.

    :param index: its place in the row.
    :param nulls_first: whether NULLs come before all values.
    """

    index: int
    comparison: Comparison
    descending: bool = False
    nulls_first: bool = True


class _Padded:
    """The weights of a text that compares as if it went on with blanks for ever."""

    __slots__ = ("blank", "weights")

    def __init__(self, weights: bytes, blank: bytes) -> None:
        while weights.endswith(blank):
            weights = weights.removesuffix(blank)
        self.weights = weights
        self.blank = blank

    def __lt__(self, other: _Padded) -> bool:
        length = max(len(self.weights), len(other.weights))
        return self._to(length) < other._to(length)

    def _to(self, length: int) -> bytes:
        missing = length - len(self.weights)
        return self.weights + (self.blank * (missing // len(self.blank) + 1))[:missing]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Padded) and self.weights == other.weights

    def __hash__(self) -> int:
        return hash(self.weights)


def _pad_and_weights(sent: bytes) -> Any:
    """What `WeightString` sends, as something that compares as the texts do.

    :raises RoutingError: for a collation that compares on several levels: its weights do not say how it pads.
    """
    if sent[0] == _SEVERAL_LEVELS:
        raise RoutingError(
            "text of a collation that compares on several levels cannot be sorted over shards",
            hint="use a collation of one level (a binary one, or *_ai_ci), or sort by another column",
        )
    blank = sent[1 : 1 + sent[0]]
    weights = sent[1 + sent[0] :]
    return _Padded(weights, blank) if blank else weights


_SEVERAL_LEVELS: Final = 255

#: A row -> something that compares as the database's own order does.
Ordering: TypeAlias = Callable[[tuple[Any, ...]], Any]


class _Reversed:
    """Compares the other way round."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __lt__(self, other: _Reversed) -> bool:
        return bool(other.value < self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reversed) and bool(self.value == other.value)

    __hash__ = None  # type: ignore[assignment]


def ordering(keys: tuple[SortKey, ...]) -> Ordering:
    """The key function of a sort by these columns."""

    def order(row: tuple[Any, ...]) -> tuple[Any, ...]:
        parts: list[Any] = []
        for key in keys:
            value = row[key.index]
            if value is None:
                parts.append((0 if key.nulls_first else 2,))
            else:
                known = comparable(value, key.comparison)
                parts.append((1, _Reversed(known) if key.descending else known))
        return tuple(parts)

    return order


def identity(keys: tuple[SortKey, ...]) -> Ordering:
    """A hashable value that is equal for rows that the database takes as equal in these columns."""

    def same(row: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if row[key.index] is None else comparable(row[key.index], key.comparison) for key in keys)

    return same


def comparable(value: Any, comparison: Comparison) -> Any:
    """A value that is not NULL, as something that compares as it does in the database.

    :raises RoutingError: for a value that the column's type did not promise: its order is not known.
    """
    match comparison:
        case Comparison.NUMBER if isinstance(value, _NUMBERS):
            return value
        case Comparison.BYTES if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        case Comparison.WEIGHTS if isinstance(value, bytes | bytearray | memoryview):
            return _pad_and_weights(bytes(value))
        case Comparison.SQLITE:
            if isinstance(value, int | float):
                return (1, value)
            return (2, value.encode()) if isinstance(value, str) else (3, bytes(value))
    raise RoutingError(
        f"a shard sent a {type(value).__name__} where a {comparison} was to be sorted by",
        hint="the model's column type is not the database's; correct it, or sort in the application",
    )


_NUMBERS = (int, float, Decimal)


# --- which hidden column sorts an expression ---------------------------------------------------------------------


class WeightString(FunctionElement[bytes]):
    """What the server compares a text by, as `_pad_and_weights` reads it.

    The bytes are: the length of a blank's weight (0: the collation does not pad, 255: it compares on several levels),
    that weight, and the weights of the text. ``WEIGHT_STRING(x AS CHAR(n))`` would pad by itself, but by characters:
    where a character has no weight, or two (German sharp s), equal texts get different bytes (seen on MySQL 9.7).
    """

    type = sa.LargeBinary()
    inherit_cache = True


@compiles(WeightString)
def _weight_string(element: WeightString, compiler: SQLCompiler, **kw: Any) -> str:
    (text,) = element.clauses
    sql = compiler.process(text, **kw)
    percent = "%%" if compiler.preparer._double_percents else "%"  # noqa: SLF001 - as SQLAlchemy's own literals do

    def named(*patterns: str) -> str:
        tests = (f"collation({sql}) LIKE '{pattern.replace('%', percent)}' ESCAPE '!'" for pattern in patterns)
        return " OR ".join(tests)

    weights, blank = f"weight_string({sql})", f"weight_string(right(concat({sql}, ' '), 1))"
    return (
        f"CASE WHEN {named('%0900%', 'binary')} THEN concat(char(0), {weights})"
        f" WHEN {named('%!_w2', '%!_as!_%', '%!_cs')} THEN concat(char(255), left({weights}, 0))"
        f" WHEN {named('%nopad%')} THEN concat(char(0), {weights})"
        f" ELSE concat(char(length({blank})), {blank}, {weights}) END"
    )


class Moment(FunctionElement[int]):
    """The number that a TIMESTAMP sorts as, where a clock that goes back shows two moments alike: MariaDB knows them
    apart, in groups and expressions, too; MySQL takes them there for what they show (seen on MariaDB 10.11, MySQL 9.7).
    """

    inherit_cache = True


@compiles(Moment)
def _moment_sql(element: Moment, compiler: SQLCompiler, **kw: Any) -> str:
    (moment,) = element.clauses
    sql = compiler.process(moment, **kw)
    return f"CASE WHEN locate('MariaDB', version()) THEN unix_timestamp({sql}) ELSE {sql} + 0 END"


def raw(expression: ColumnElement[Any]) -> ColumnElement[Any]:
    """The value as the driver gives it, with no result processing."""
    return sa.type_coerce(expression, NullType())


def _numbered(expression: ColumnElement[Any]) -> ColumnElement[Any]:
    """The number that the server takes a date, a time or an ENUM for: it sorts as they do."""
    return raw(sa.type_coerce(expression, sa.Integer()) + sa.literal_column("0"))


def sort_column(expression: ColumnElement[Any], dialect: Dialect) -> tuple[ColumnElement[Any], Comparison]:
    """The hidden column that sorts by an expression, and how its values compare.

    :raises Refused: where the database's order cannot be told from outside.
    """
    expression = bare(expression)
    if dialect.name == "sqlite":
        return _by_collation(expression, _sqlite_collation(expression, dialect)), Comparison.SQLITE
    return _on_server(expression, stored_type(expression.type, dialect), dialect)


def row_column(expression: ColumnElement[Any], dialect: Dialect) -> tuple[ColumnElement[Any], Comparison]:
    """`sort_column` for rows that are neither grouped nor made distinct: both servers sort a table's TIMESTAMP as the
    moment that it is, though a clock that goes back shows two moments alike.

    :raises Refused: where the database's order cannot be told from outside.
    """
    column = bare(expression)
    if (
        dialect.name != "sqlite"
        and isinstance(stored_type(column.type, dialect), sa.TIMESTAMP)
        and _is_of_table(column)
    ):
        return raw(sa.func.unix_timestamp(column)), Comparison.NUMBER
    return sort_column(expression, dialect)


def extreme_column(function: Any, dialect: Dialect) -> tuple[ColumnElement[Any], Comparison, bool]:
    """The hidden column by which MIN or MAX of the shards' values is found, how its values compare, and whether they
    sort as the function's own value does: SQLite finds the least text by its column's collation, and sorts what it has
    found by its bytes.

    :raises Refused: where the database's order cannot be told from outside.
    """
    if dialect.name == "sqlite":
        (argument,) = map(bare, function.clauses)
        collation = _sqlite_collation(bare(argument.element) if is_distinct(argument) else argument, dialect)
        sorts = collation is None or collation.upper() == "BINARY"
        return _by_collation(function, collation), Comparison.SQLITE, sorts
    return (*sort_column(function, dialect), True)


def without_null(column: ColumnElement[Any], comparison: Comparison) -> ColumnElement[Any]:
    """A hidden column of `sort_column` for an ORDER BY inside of GROUP_CONCAT: there both servers take NULL for 0, for
    the day 0 or for an empty text (``group_concat_key_cmp_with_order()``; seen on MariaDB 10.11 and MySQL 9.7).
    """
    if isinstance(column, WeightString):
        (text,) = column.clauses
        return WeightString(sa.func.coalesce(text, sa.literal_column("''")))
    return raw(sa.func.coalesce(column, sa.literal_column("0" if comparison is Comparison.NUMBER else "''")))


def _by_collation(expression: ColumnElement[Any], collation: str | None) -> ColumnElement[Any]:
    match "BINARY" if collation is None else collation.upper():
        case "BINARY":
            return raw(expression)
        case "NOCASE":
            return raw(sa.func.lower(expression))
        case "RTRIM":
            return raw(sa.func.rtrim(expression, " "))
        case _:
            raise _unsortable(expression, f"it has the collation {collation}")


def _sqlite_collation(expression: Any, dialect: Dialect) -> str | None:
    """The collation that SQLite compares an expression by: a column's own, also under CAST and +; of other
    expressions only one that is said with COLLATE (https://www.sqlite.org/datatype3.html, section 7.1).

    :raises Refused: where SQLAlchemy's type says another one.
    """
    inner = expression
    while isinstance(inner, Cast | TypeCoerce):
        inner = bare(inner.clause)
    if isinstance(inner, BinaryExpression) and inner.operator is operators.collate:
        return str(getattr(inner.right, "collation", inner.right)).strip('"')
    declared: str | None = getattr(stored_type(inner.type, dialect), "collation", None)
    plain = all(isinstance(each, ColumnClause) for each in inner.base_columns)  # also where a subquery passes it on
    if declared is None or plain or declared.upper() == "BINARY":
        return declared
    raise _unsortable(expression, f"it is an expression over text with the collation {declared}")


def _on_server(expression: Any, stored: Any, dialect: Dialect) -> tuple[ColumnElement[Any], Comparison]:
    function = expression.element if isinstance(expression, Over) else expression
    name = getattr(function, "name", "") if isinstance(function, FunctionElement) else ""
    match stored:
        case sa.Enum():
            if not isinstance(expression, ColumnClause):
                raise _unsortable(expression, "an expression over an ENUM sorts as text")
            if not stored.native_enum:
                return _text(expression, stored.length)
            if not _is_stored(expression):
                raise _unsortable(expression, "an expression over an ENUM, or a union of some, is text and sorts so")
            return _numbered(expression), Comparison.NUMBER
        case sa.Boolean() | sa.Integer() | sa.Double() | sa.Numeric():
            return raw(expression), Comparison.NUMBER
        case sa.Float():
            return raw(expression + sa.literal_column("0e0")), Comparison.NUMBER  # FLOAT is sent rounded: as DOUBLE
        case sa.Date() | sa.DateTime() | sa.Time():
            return _moment(expression, stored), Comparison.NUMBER
        case sa.Uuid() if dialect.name == "mysql":
            if stored.native_uuid:  # MariaDB's own type sorts by its last part first, MySQL has none
                raise _unsortable(expression, "a native UUID does not sort as text: use Uuid(native_uuid=False)")
            return WeightString(expression), Comparison.WEIGHTS
        case sa.LargeBinary() | sa.BINARY() | sa.VARBINARY():
            length = getattr(stored, "length", None)
            if length is None or length > LONGEST_BYTES:
                raise _unsortable(expression, f"it may be longer than max_sort_length ({LONGEST_BYTES} bytes)")
            return raw(expression), Comparison.BYTES
        case mysql.SET():
            if not _is_stored(expression):
                raise _unsortable(expression, "an expression over a SET, or a union of some, is text and sorts so")
            return _numbered(expression), Comparison.NUMBER
        case sa.String():
            return _text(expression, getattr(stored, "length", None))
        case NullType() if name.lower() in NUMERIC:
            return raw(expression), Comparison.NUMBER
        case NullType() if name.lower() in _DAYS:
            return _numbered(expression), Comparison.NUMBER
        case NullType() if name.lower() in NO_LONGER:
            argument = stored_type(_shortened(expression).type, dialect)
            if isinstance(argument, sa.String) and not isinstance(argument, sa.Enum):
                return _text(expression, argument.length)
            raise _unsortable(expression, f"nothing is known of how {stored!r} sorts")
        case _:
            raise _unsortable(expression, f"nothing is known of how {stored!r} sorts")


def _moment(expression: Any, stored: Any) -> ColumnElement[Any]:
    """The number that a date or time sorts as. A bound one is sent as a text: COALESCE of it and a column is a text to
    the server, which sorts as they do where all are of one kind and written alike.

    :raises Refused: for other texts, or what may be one.
    """
    kinds = set(_kinds_of_moment(expression))
    if kinds & _MOMENTS and kinds <= {*_MOMENTS, "null"}:
        return Moment(expression)
    kinds = {kind.replace("moment", "datetime") for kind in kinds}
    if kinds <= _NATIVE:
        return _numbered(expression)
    if kinds <= {"date", "bound date", "null"}:
        return _numbered(sa.cast(expression, mysql.DATE()))
    if kinds <= {"datetime", "bound datetime", "null"}:
        return _numbered(sa.cast(expression, mysql.DATETIME(fsp=6)))
    raise _unsortable(expression, f"it is no {stored!r} to the server, or not in all rows")


#: Dates and times to the server, as which it sorts them.
_NATIVE: Final = frozenset({"date", "datetime", "fine datetime", "time", "null"})
_MOMENTS: Final = frozenset({"moment", "fine moment"})
_CLOCKS: Final = names_of(
    "adddate curdate current_date current_time current_timestamp curtime date date_add date_sub from_days "
    "from_unixtime last_day localtime localtimestamp makedate maketime now sec_to_time subdate sysdate timestamp "
    "timestampadd utc_date utc_time utc_timestamp"
)
#: Functions whose value is a day, whatever SQLAlchemy thinks of its type.
_DAYS: Final = names_of("date last_day")
_CHOOSING: Final = names_of("coalesce greatest ifnull least max min")
_PASSING: Final = names_of("any_value first_value lag last_value lead nth_value nullif")


def _kinds_of_moment(expression: Any) -> Iterator[str]:
    """What an expression of a date's or time's type is made of, as the server sees it."""
    expression = bare(expression)
    if isinstance(expression, Over):
        expression = bare(expression.element)
    match expression:
        case Null():
            yield "null"
        case BindParameter():
            yield f"bound {_kind_of_moment(expression.type, stored=False)}"
        case Cast():
            yield _kind_of_moment(expression.type, stored=False)
        case Case():
            for each in (*(then for _, then in expression.whens), expression.else_):
                if each is not None:
                    yield from _kinds_of_moment(each)
        case ColumnClause():
            passed_on = [each for each in expression._proxies if each is not expression]  # noqa: SLF001 - no public reader
            for each in passed_on:
                yield from _kinds_of_moment(each)
            if not passed_on:
                yield _kind_of_moment(expression.type)
        case FunctionElement():
            name = getattr(expression, "name", "").lower()
            arguments = [each.element if is_distinct(each) else each for each in map(bare, expression.clauses)]
            if name in _CHOOSING:
                for each in arguments:
                    yield from _kinds_of_moment(each)
            elif name in _PASSING and arguments:
                yield from _kinds_of_moment(arguments[0])
            else:
                yield _kind_of_moment(expression.type, stored=False) if name in _CLOCKS else "unknown"
        case _:
            yield "unknown"


def _kind_of_moment(column_type: Any, *, stored: bool = True) -> str:
    """:param stored: whether it is a column's, which may be a TIMESTAMP; values and functions are a DATETIME."""
    while isinstance(column_type, TypeDecorator):
        column_type = column_type.impl_instance
    match column_type:
        case sa.DateTime():
            kind = "moment" if stored and isinstance(column_type, sa.TIMESTAMP) else "datetime"
            return f"fine {kind}" if getattr(column_type, "fsp", None) else kind
        case sa.Date():
            return "date"
        case sa.Time():
            return "time"
        case _:
            return "unknown"


def _is_of_table(expression: Any) -> bool:
    """Whether it is a column of a table, and of no subquery."""
    table = getattr(expression, "table", None)
    while isinstance(table, sa.Alias):
        table = table.element
    return isinstance(table, sa.TableClause)


def _is_stored(expression: Any) -> bool:
    """Whether it is a table's column, also where plain subqueries pass it on: of a union or an expression only the
    model's type is that of the column, the server has made a text of it.
    """
    while isinstance(expression, ColumnClause):
        rows: Any = getattr(expression.table, "element", None)
        if isinstance(rows, CompoundSelect | SelectStatementGrouping):
            return False
        # what a subquery's column stands for: of a label also what it labels
        proxied = {id(each): each for each in map(bare, expression._proxies)}  # noqa: SLF001 - no public reader
        if not proxied:
            return expression.table is None or isinstance(expression.table, sa.TableClause)
        if len(proxied) > 1:
            return False
        (expression,) = proxied.values()
    return False


def _text(expression: ColumnElement[Any], length: int | None) -> tuple[ColumnElement[Any], Comparison]:
    if not isinstance(_shortened(expression), ColumnClause):
        raise _unsortable(expression, "the longest length of its text is not known")
    if length is None or length > LONGEST_TEXT:
        raise _unsortable(expression, f"it may be longer than max_sort_length ({LONGEST_TEXT} characters)")
    return WeightString(expression), Comparison.WEIGHTS


def _shortened(expression: Any) -> Any:
    """What functions that make no text longer are given."""
    while isinstance(expression, FunctionElement) and getattr(expression, "name", "").lower() in NO_LONGER:
        expression = bare(next(iter(expression.clauses)))
    return expression


def bare(expression: Any) -> Any:
    """An expression without label and parentheses."""
    while isinstance(expression, Label | Grouping):
        expression = expression.element
    return expression


def _unsortable(expression: Any, why: str) -> Refused:
    name = getattr(expression, "name", None) or type(expression).__name__
    table = getattr(getattr(expression, "table", None), "name", None)
    shown = f"{table}.{name}" if table else str(name)
    return Refused(
        RoutingError,
        f"rows of several shards cannot be sorted or told apart by {shown}: {why}",
        "declare the column's type and length, sort by another column, or pin one shard",
        table=table,
    )
