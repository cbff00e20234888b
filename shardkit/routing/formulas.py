"""Expressions over combined aggregates, worked out as the database does: NULL, three-valued logic, DECIMAL digits.

MySQL and MariaDB divide DECIMALs in words of nine digits, and cut the quotient off behind the last word before it is
rounded to its number of digits (``strings/decimal.c``, ``do_div_mod``): AVG of three DECIMAL(12,5) of the sum 2 is
0.666666666, not ...667 (seen on MariaDB 10.11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from math import isfinite
from typing import Any, Final, TypeAlias

from shardkit.errors import RoutingError


@dataclass(frozen=True, slots=True)
class Place:
    """The value at a place of the row."""

    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A value of the statement's own."""

    value: Any


@dataclass(frozen=True, slots=True)
class Call:
    """An operation on other formulas' values, in order."""

    how: Callable[..., Any]
    arguments: tuple[Formula, ...]


Formula: TypeAlias = Place | Constant | Call


def value_of(formula: Formula, row: Sequence[Any]) -> Any:
    """A formula's value over a row: None is NULL."""
    match formula:
        case Place(index):
            return row[index]
        case Constant(value):
            return value
        case Call(how, arguments):
            return how(*(value_of(each, row) for each in arguments))


# --- numbers -----------------------------------------------------------------------------------------------------

#: Adds and multiplies without rounding: no value of a database has as many digits.
_EXACT: Final = Context(prec=400)
_WORD: Final = 9
_MORE_DIGITS: Final = 4
_LARGEST: Final = 2**63 - 1


def as_decimal(value: Fraction | int, scale: int) -> Decimal:
    """A fraction as a Decimal of this many digits after the point, halves rounded away from zero as MySQL does."""
    scaled = abs(Fraction(value)) * 10**scale
    whole = int(scaled + Fraction(1, 2))
    return Decimal((int(value < 0), tuple(int(digit) for digit in str(whole)), -scale))


def quotient(dividend: Any, divisor: Any, scale: int) -> Decimal:
    """An exact number by an exact number, with the digits that MySQL and MariaDB give it.

    :param scale: digits after the point of the result, as the server sends them.
    """
    return as_decimal(Fraction(_cut(dividend, divisor, scale)), scale)


def _cut(dividend: Any, divisor: Any, scale: int) -> Decimal:
    """A quotient before it is rounded."""
    one, other = _scale(dividend), _scale(divisor)
    more = max(0, scale - one - (_words(one) - one) - (_words(other) - other))
    digits = _words(_words(one) + _words(other) + more)
    exact = Fraction(dividend) / Fraction(divisor)
    cut = Fraction(int(abs(exact) * 10**digits), 10**digits)
    return as_decimal(-cut if exact < 0 else cut, digits)


@dataclass(frozen=True, slots=True)
class Mean:
    """An AVG of exact numbers as the servers compare it: MySQL before it is rounded, MariaDB as it is shown; with
    floating point both the former, or an exact quotient (seen on MariaDB 10.11 and MySQL 9.7). In BETWEEN, in IN and
    inside other expressions they do now this, now that: those are refused.
    """

    exact: Fraction
    unrounded: Decimal
    shown: Decimal
    rounds: bool

    @classmethod
    def of(cls, total: Any, count: int, shown: Decimal, *, rounds: bool) -> Mean:
        """The AVG of so many values.

        :param shown: as the server sends it.
        :param rounds: whether the server compares what it shows.
        """
        scale = -int(shown.as_tuple().exponent)
        return cls(Fraction(total) / count, _cut(total, count, scale), shown, rounds)

    def readings(self, other: Any) -> Sequence[Any]:
        """What it may be for a comparison with another number."""
        if isinstance(other, float):
            return (self.unrounded, self.exact)
        return (self.shown if self.rounds else self.unrounded,)


def _scale(value: Any) -> int:
    return max(0, -int(value.as_tuple().exponent)) if isinstance(value, Decimal) else 0


def _words(digits: int) -> int:
    return -(-digits // _WORD) * _WORD


def _strict(operation: Callable[..., Any]) -> Callable[..., Any]:
    """NULL with anything is NULL."""

    def strict(*values: Any) -> Any:
        return None if any(value is None for value in values) else operation(*values)

    return strict


def _numbers(one: Any, other: Any) -> tuple[Any, Any]:
    if isinstance(one, float) or isinstance(other, float):
        return float(one), float(other)
    if isinstance(one, int) and isinstance(other, int):
        return one, other
    return Decimal(one), Decimal(other)


@_strict
def add(one: Any, other: Any) -> Any:
    """``one + other``."""
    one, other = _numbers(one, other)
    return _EXACT.add(one, other) if isinstance(one, Decimal) else one + other


@_strict
def subtract(one: Any, other: Any) -> Any:
    """``one - other``."""
    one, other = _numbers(one, other)
    return _EXACT.subtract(one, other) if isinstance(one, Decimal) else one - other


@_strict
def multiply(one: Any, other: Any) -> Any:
    """``one * other``."""
    one, other = _numbers(one, other)
    return _EXACT.multiply(one, other) if isinstance(one, Decimal) else one * other


@_strict
def negate(value: Any) -> Any:
    """``-value``."""
    return -value


#: Most digits of a DECIMAL inside of the servers: nine words.
_MOST_DIGITS: Final = 81


def in_range(value: Any, unsigned: bool, *operands: Any) -> Any:
    """The result of an operation, where the servers do not refuse it as too large (1690).

    :param unsigned: whether an operand's type is, so that an integer may not be negative.
    :raises RoutingError: where they do, or where nobody can tell.
    """
    if isinstance(value, float):
        kind, fits = "DOUBLE", isfinite(value)
    elif isinstance(value, Decimal):
        kind, fits = "DECIMAL", len(value.as_tuple().digits) <= _MOST_DIGITS
    elif isinstance(value, int):
        large = unsigned or any(isinstance(each, int) and each > _LARGEST for each in operands)
        kind, fits = "BIGINT", (0 if unsigned else ~_LARGEST) <= value <= (2 * _LARGEST + 1 if large else _LARGEST)
    else:
        return value
    if not fits:
        raise RoutingError(
            f"a {kind} value is out of range in an expression over aggregates of several shards",
            hint="do a part of it in the application",
        )
    return value


def as_sqlite(value: Any) -> Any:
    """An integer that is too large for one is floating point there."""
    return float(value) if isinstance(value, int) and not ~_LARGEST <= value <= _LARGEST else value


def divide(one: Any, other: Any, more_digits: int | None) -> Any:
    """``one / other`` on MySQL and MariaDB; NULL by zero.

    :param more_digits: ``div_precision_increment``; None where no shard has said so: the servers' default.
    """
    if one is None or other is None or not other:
        return None
    more_digits = _MORE_DIGITS if more_digits is None else more_digits
    if isinstance(one, float) or isinstance(other, float):
        return float(one) / float(other)
    return quotient(one, other, _scale(one) + int(more_digits))


@_strict
def divide_floats(one: Any, other: Any) -> Any:
    """``one / (other + 0.0)``, as SQLAlchemy divides on SQLite; NULL by zero."""
    return float(one) / float(other) if other else None


def coalesce(scale: int | None, *values: Any) -> Any:
    """The first value that is not NULL.

    :param scale: digits after the point that it is shown with at least; None: its own.
    """
    value = next((value for value in values if value is not None), None)
    if scale and isinstance(value, int | Decimal) and _scale(value) < scale:
        return as_decimal(Fraction(value), scale)
    return value


# --- logic: True, False, None ------------------------------------------------------------------------------------


def _comparison(operation: Callable[[Any, Any], bool]) -> Callable[..., Any]:
    @_strict
    def compare(one: Any, other: Any) -> Any:
        if not isinstance(one, Mean) and not isinstance(other, Mean):
            return operation(*_numbers(one, other))
        ones = one.readings(other) if isinstance(one, Mean) else (one,)
        others = other.readings(one) if isinstance(other, Mean) else (other,)
        kind = float if isinstance(one, float) or isinstance(other, float) else Fraction
        answers = {operation(kind(each), kind(than)) for each in ones for than in others}
        if len(answers) > 1:
            raise RoutingError(
                "an AVG that is compared with floating point between what the server knows of it and what it is",
                hint="give the number as a Decimal, or compare SUM(x) with COUNT(x) * number",
            )
        return answers.pop()

    return compare


less = _comparison(lambda one, other: one < other)
less_or_equal = _comparison(lambda one, other: one <= other)
greater = _comparison(lambda one, other: one > other)
greater_or_equal = _comparison(lambda one, other: one >= other)
equal = _comparison(lambda one, other: one == other)
unequal = _comparison(lambda one, other: one != other)


def both(*values: Any) -> Any:
    """AND."""
    if any(value is not None and not value for value in values):
        return False
    return None if None in values else True


def either(*values: Any) -> Any:
    """OR."""
    if any(values):
        return True
    return None if None in values else False


@_strict
def negated(value: Any) -> Any:
    """NOT."""
    return not value


def is_null(value: Any) -> bool:
    """``IS NULL``."""
    return value is None


def is_not_null(value: Any) -> bool:
    """``IS NOT NULL``."""
    return value is not None


def between(value: Any, low: Any, high: Any) -> Any:
    """``BETWEEN``."""
    return both(less_or_equal(low, value), less_or_equal(value, high))


def one_of(value: Any, *others: Any) -> Any:
    """``IN``."""
    return either(*(equal(value, other) for other in others)) if others else False


def first_true(*parts: Any) -> Any:
    """``CASE WHEN``: conditions and values in turn, and the value of ELSE."""
    *pairs, other = parts
    return next((value for test, value in zip(pairs[::2], pairs[1::2], strict=True) if test), other)
