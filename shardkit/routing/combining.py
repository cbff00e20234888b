"""The shards' parts of one group -> the group: exactly, as one database would have worked it out.

A shard sends its parts as hidden columns, as the driver gives them. Sums of integers and DECIMALs are exact whatever
their number of digits; floating point depends on the order of the rows, as in the database itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from functools import reduce
from math import isnan, sqrt
from operator import and_, or_, xor
from typing import Any, Final, Protocol, TypeAlias

from shardkit.routing.formulas import Formula, Mean, as_decimal, quotient, value_of
from shardkit.routing.sorting import Comparison, SortKey, comparable, identity, ordering

Row: TypeAlias = tuple[Any, ...]


class Combine(Protocol):
    """One aggregate of the result.

    :ivar visible: the place of the statement's own column that it fills; None: it is only used by others.
    :ivar raw: the place of the hidden column with the shard's own value; the combined one is put there.
    """

    @property
    def visible(self) -> int | None: ...
    @property
    def raw(self) -> int: ...
    @property
    def name(self) -> str: ...
    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        """Combine a group's rows, and write the value into ``whole``."""
        ...


class Aggregate(StrEnum):
    """Aggregates whose parts are numbers of their own kind."""

    COUNT = "count"
    SUM = "sum"
    BIT_AND = "bit_and"
    BIT_OR = "bit_or"
    BIT_XOR = "bit_xor"


_BITS: Final[dict[Aggregate, Callable[[int, int], int]]] = {
    Aggregate.BIT_AND: and_,
    Aggregate.BIT_OR: or_,
    Aggregate.BIT_XOR: xor,
}


@dataclass(frozen=True, slots=True)
class Total:
    """The parts are added up, or their bits put together."""

    how: Aggregate
    visible: int | None
    raw: int

    @property
    def name(self) -> str:
        return self.how.upper()

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        present = [row for row in parts if row[self.raw] is not None]
        if not present:
            return  # NULL on every shard: the first row's own value stands (NULL, or what COALESCE put there)
        values = [row[self.raw] for row in present]
        value = reduce(_BITS[self.how], map(int, values)) if self.how in _BITS else total(values)
        _set(self, present[0], whole, value)


@dataclass(frozen=True, slots=True)
class Extreme:
    """MIN or MAX: the row with the least or greatest part gives the value.

    :param order: the place of the hidden column that decides, and how it compares.
    """

    greatest: bool
    visible: int | None
    raw: int
    order: int
    comparison: Comparison

    @property
    def name(self) -> str:
        return "MAX" if self.greatest else "MIN"

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        present = [row for row in parts if row[self.raw] is not None]
        if not present:
            return
        choose = max if self.greatest else min
        chosen = choose(present, key=lambda row: comparable(row[self.order], self.comparison))
        for place in (self.raw, self.order, self.visible):
            if place is not None:
                whole[place] = chosen[place]


@dataclass(frozen=True, slots=True)
class Average:
    """AVG, from the parts' SUM and COUNT.

    :param total: the place of the part's SUM; :param count: of its COUNT.
    :param compared: the place for what comparisons take it for, which comes with `Mean.rounds`; None: it is compared
        with nothing.
    """

    visible: int | None
    raw: int
    total: int
    count: int
    compared: int | None = None
    name: str = "AVG"

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        _compare_as(self.compared, None, whole)
        present = [row for row in parts if row[self.raw] is not None]
        if not present:
            return
        sum_, count = (total([row[place] for row in present]) for place in (self.total, self.count))
        whole[self.total], whole[self.count] = sum_, count
        value = _average(sum_, count, present[0][self.raw])
        _set(self, present[0], whole, value)
        _compare_as(self.compared, _mean(sum_, count, value, present[0], self.compared), whole)


@dataclass(frozen=True, slots=True)
class Deviation:
    """Variances and standard deviations: from the parts' counts, means and variances, in floating point as in the
    database (T. Chan, G. Golub, R. LeVeque: Algorithms for computing the sample variance, 1983).

    :param count: the place of the part's COUNT; :param variance: of its VAR_POP.
    :param mean: the place of its mean, which is floating point; of exact numbers, of their sum.
    :param zero: the place of a zero with as many digits as the values have, where they are exact numbers.
    :param rounds: the place of a flag: MariaDB rounds those of exact numbers to four digits more than the values have,
        MySQL does not (seen on MariaDB 10.11 and MySQL 9.7).
    """

    name: str
    visible: int | None
    raw: int
    count: int
    mean: int
    variance: int
    zero: int
    rounds: int
    sample: bool
    root: bool

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        present = [row for row in parts if row[self.count]]
        if not present:
            return
        count, mean, squares = 0, Fraction(0), Fraction(0)
        for row in present:  # exactly: means that are large and differ little would lose what they differ by
            more, its_mean = int(row[self.count]), row[self.mean]
            apart = Fraction(its_mean) / (1 if isinstance(its_mean, float) else more) - mean
            squares += Fraction(float(row[self.variance])) * more + apart * apart * count * more / (count + more)
            mean += apart * more / (count + more)
            count += more
        degrees = count - 1 if self.sample else count
        value = None if not degrees else float(squares / degrees)
        if value is not None:
            value = sqrt(value) if self.root else value
            zero = present[0][self.zero]
            if present[0][self.rounds] and isinstance(zero, int | Decimal):
                value = round(value, 4 - int(Decimal(zero).as_tuple().exponent))
        _set(self, present[0], whole, value)


@dataclass(frozen=True, slots=True)
class Different:
    """COUNT, SUM or AVG of different values: the shards send one row a value.

    :param how: ``count``, ``sum`` or ``avg``.
    :param value: the place of the value, as the driver gives it.
    :param key: what tells values apart.
    :param compared: of an AVG, as in `Average`.
    """

    how: str
    visible: int | None
    raw: int
    value: int
    key: SortKey
    compared: int | None = None

    @property
    def name(self) -> str:
        return f"{self.how.upper()}(DISTINCT)"

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        _compare_as(self.compared, None, whole)
        same = identity((self.key,))
        found = {same(row): row for row in parts if row[self.value] is not None}
        if self.how == "count":
            _set(self, parts[0], whole, len(found))
            return
        if not found:
            return
        rows = list(found.values())
        sum_ = value = total([row[self.value] for row in rows])
        if self.how == "avg":
            value = _average(sum_, len(rows), rows[0][self.raw])
            _compare_as(self.compared, _mean(sum_, len(rows), value, rows[0], self.compared), whole)
        _set(self, rows[0], whole, value)


@dataclass(frozen=True, slots=True)
class Texts:
    """GROUP_CONCAT: the shards send one row for each value (and place in the order), with how often it occurs.

    :param value: the place of the value as text; :param count: of the number of rows that have it.
    :param order: what its values are sorted by; empty: in any order.
    :param key: DISTINCT: what tells values apart.
    :param longest: the place of ``group_concat_max_len`` (bytes); None where there is no such limit.
    """

    visible: int | None
    raw: int
    value: int
    count: int
    separator: str
    order: tuple[SortKey, ...]
    key: SortKey | None
    longest: int | None
    name: str = "GROUP_CONCAT"

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        present = [row for row in parts if row[self.value] is not None]
        if not present:
            return
        if self.order:
            present.sort(key=ordering(self.order))
        if self.key is None:
            texts = [str(row[self.value]) for row in present for _ in range(int(row[self.count]))]
        else:
            same = identity((self.key,))
            first: dict[Any, str] = {}
            for row in present:
                first.setdefault(same(row), str(row[self.value]))
            texts = list(first.values())
        value = self.separator.join(texts)
        if self.longest is not None:
            value = value.encode()[: int(present[0][self.longest])].decode(errors="ignore")
        _set(self, present[0], whole, value)


@dataclass(frozen=True, slots=True)
class Computed:
    """An expression over combined aggregates.

    :param raw: the place of the hidden column with the shard's own value of it, which says how many digits a value has.
    :param process: makes the value of the statement's own column of the driver's; None: it is the same.
    :param pads: of a CASE, the place of a flag: MariaDB gives each of its values as many digits as any of them has,
        MySQL each its own (seen on MariaDB 10.11 and MySQL 9.7), and the shards may have chosen others.
    """

    visible: int | None
    raw: int
    formula: Formula
    process: Callable[[Any], Any] | None
    pads: int | None = None

    def put(self, parts: Sequence[Row], whole: list[Any]) -> None:
        """Work it out; the aggregates that it uses are in ``whole``."""
        value = value_of(self.formula, whole)
        sample = next((row[self.raw] for row in parts if row[self.raw] is not None), None)
        if isinstance(sample, Decimal) and isinstance(value, int | Decimal):
            own = self.pads is not None and not parts[0][self.pads]
            shown = Decimal(value) if own else sample
            value = as_decimal(Fraction(value), -int(shown.as_tuple().exponent))
        elif isinstance(sample, float) and isinstance(value, int | Decimal):
            value = float(value)
        whole[self.raw] = value
        if self.visible is not None:
            whole[self.visible] = value if self.process is None else self.process(value)


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows that become one: those with equal keys, or all of them (no keys: exactly one row comes out).

    :param computed: what is worked out of the aggregates, once they are combined.
    :param having: what a group must fulfil: formulas that are true.
    :param blank: the row that stands where no shard sends any, before its formulas; None: then there is none.
    """

    keys: tuple[SortKey, ...]
    combines: tuple[Combine, ...]
    having: tuple[Formula, ...] = ()
    computed: tuple[Computed, ...] = ()
    blank: Row | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The aggregates, each once."""
        return tuple(dict.fromkeys(combine.name for combine in self.combines))

    def combined(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The groups of the shards' rows. All of them are held in memory."""
        same = identity(self.keys)
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            found.setdefault(same(row), []).append(row)
        if not found and self.blank is not None:
            found[()] = [self.blank]
        for parts in found.values():
            whole = list(parts[0])
            for combine in self.combines:
                combine.put(parts, whole)
            for each in self.computed:
                each.put(parts, whole)
            if all(value_of(test, whole) for test in self.having):
                yield tuple(whole)


def total(values: Sequence[Any]) -> Any:
    """The sum: exact for integers and decimals, in floating point where the database's is."""
    if any(isinstance(number, float) for number in values):
        added = sum(float(number) for number in values)
        return None if isnan(added) else added  # SQLite: infinity less infinity is NULL
    if all(isinstance(number, int) for number in values):
        return sum(values)
    decimals = [Decimal(number) for number in values]
    scale = max(0, *(-int(number.as_tuple().exponent) for number in decimals))
    return as_decimal(sum(map(Fraction, decimals)), scale)


def _average(sum_: Any, count: Any, sample: Any) -> Any:
    if sum_ is None:
        return None
    if isinstance(sum_, float) or isinstance(sample, float):
        return float(sum_) / int(count)
    return quotient(sum_, int(count), -int(Decimal(sample).as_tuple().exponent))


def _mean(sum_: Any, count: Any, value: Any, sample: Row, compared: int | None) -> Any:
    """An average as comparisons take it."""
    if compared is None or not isinstance(value, Decimal):
        return value
    return Mean.of(sum_, int(count), value, rounds=bool(sample[compared]))


def _compare_as(place: int | None, value: Any, whole: list[Any]) -> None:
    if place is not None:
        whole[place] = value


def _set(combine: Combine, sample: Row, whole: list[Any], value: Any) -> None:
    whole[combine.raw] = _like(sample[combine.raw], value)
    if combine.visible is not None:
        whole[combine.visible] = _like(sample[combine.visible], value)


def _like(sample: Any, value: Any) -> Any:
    """A combined value as the type that the statement's own column has."""
    if sample is None or value is None or (isinstance(sample, int) and isinstance(value, float)):
        return value  # SQLite: a sum of integers on one shard, of floating point on another
    if isinstance(sample, Decimal):
        scale = -int(sample.as_tuple().exponent)
        if isinstance(value, Decimal) and -int(value.as_tuple().exponent) >= scale:
            return value
        return as_decimal(Fraction(value), scale)  # of a default beside it the value takes the digits, too
    return value if type(sample) is type(value) else type(sample)(value)
