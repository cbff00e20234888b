"""Per-shard rows -> one result: order, limit, aggregates, distinct. Pure; rows are plain tuples.

The planner makes each shard return the statement's own columns first, and behind them hidden columns: sort keys, group
keys, parts of aggregates. Merging looks at hidden columns only, so the first columns may be anything (ORM objects), and
the rows that come out have the hidden ones taken off.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from itertools import chain, islice
from typing import Any

from sqlalchemy.sql.base import Executable

from shardkit.routing.sorting import Comparison, SortKey, comparable, identity, ordering

Row = tuple[Any, ...]


class Aggregate(StrEnum):
    """How the shards' parts of one aggregate make the whole."""

    COUNT = "count"
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    AVG = "avg"


@dataclass(frozen=True, slots=True)
class Combine:
    """One aggregate of the result.

    :param how: which.
    :param visible: the place of the statement's own column that it fills; None: it is only sorted or filtered by.
    :param raw: the place of the hidden column with the shard's own value, as the driver gives it.
    :param total: AVG: the place of the shard's SUM.
    :param count: AVG: the place of the shard's COUNT.
    :param comparison: MIN and MAX: how ``order`` compares.
    :param order: MIN and MAX: the place of the hidden column that decides.
    """

    how: Aggregate
    visible: int | None
    raw: int
    total: int | None = None
    count: int | None = None
    order: int | None = None
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Having:
    """A condition on a group: the combined number at ``place``, compared with ``value``."""

    place: int
    compare: Callable[[Any, Any], Any]
    value: int | float | Decimal

    def passes(self, row: Row) -> bool:
        """Whether a combined row fulfils it. NULL does not."""
        number = row[self.place]
        if number is None:
            return False
        if isinstance(number, float) or isinstance(self.value, float):
            return bool(self.compare(float(number), float(self.value)))
        return bool(self.compare(number, self.value))


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows that become one: those with equal keys, or all of them (no keys: exactly one row comes out)."""

    keys: tuple[SortKey, ...]
    combines: tuple[Combine, ...]
    having: tuple[Having, ...] = ()


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How the rows of several shards make one result.

    :param statement: what each shard executes: hidden columns added, LIMIT raised by OFFSET, aggregates split.
    :param visible: how many leading elements of a row are the statement's own; an ORM entity is one element. None:
        all, nothing is hidden behind them.
    :param order: what the result is sorted by; the shards' rows come sorted by the same, unless there are groups.
    :param distinct: what tells rows apart, where equal ones are to be dropped.
    :param groups: how rows are put together, where several make one.
    :param limit: how many rows the result has at most; None: all.
    :param offset: how many merged rows are skipped first.
    :param unique: each stream has to be made ``unique()`` before it is merged: joined collections repeat a row, and the
        LIMIT counts it once. Where it is not set, ``unique()`` is for the merged rows, as in one database.
    """

    statement: Executable
    visible: int | None
    order: tuple[SortKey, ...] = ()
    distinct: tuple[SortKey, ...] = ()
    groups: Groups | None = None
    limit: int | None = None
    offset: int = 0
    unique: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        """The merge in words, in order."""
        groups = self.groups
        found = []
        if groups is not None:
            parts = ", ".join(dict.fromkeys(combine.how.upper() for combine in groups.combines))
            found.append(f"{'group' if groups.keys else 'one row'}" + (f": combine {parts}" if parts else ""))
            found += ["filter the groups"] if groups.having else []
        if self.distinct:
            found.append("drop equal rows")
        if self.order:
            found.append("sort the groups" if groups else "merge sorted rows")
        elif groups is None:
            found.append("one shard after the other")
        if self.offset:
            found.append(f"skip {self.offset}")
        if self.limit is not None:
            found.append(f"take {self.limit}")
        return tuple(found)


def merge_rows(plan: MergePlan, streams: Sequence[Iterable[Row]]) -> Iterator[Row]:
    """The rows of the whole statement, from one stream of rows a shard.

    Streams are read lazily and in step where the order allows it, so the merge holds one row a shard; groups and
    distinct values are held in memory.

    :param streams: rows of ``plan.statement``, hidden columns included; one stream a shard.
    :raises RoutingError: when a shard sends a value that its column's type did not promise.
    """
    if plan.limit == 0:
        return iter(())
    rows: Iterator[Row]
    if plan.groups is not None:
        rows = _grouped(plan.groups, chain.from_iterable(streams))
        if plan.order:
            rows = iter(sorted(rows, key=ordering(plan.order)))
    elif plan.order:
        rows = heapq.merge(*streams, key=ordering(plan.order))
    else:
        rows = chain.from_iterable(streams)
    if plan.distinct:
        rows = _different(plan.distinct, rows)
    end = None if plan.limit is None else plan.offset + plan.limit
    visible = plan.visible
    return (row[:visible] for row in islice(rows, plan.offset, end))


def _different(keys: tuple[SortKey, ...], rows: Iterable[Row]) -> Iterator[Row]:
    seen = set()
    same = identity(keys)
    for row in rows:
        known = same(row)
        if known not in seen:
            seen.add(known)
            yield row


# --- groups ------------------------------------------------------------------------------------------------------


def _grouped(groups: Groups, rows: Iterable[Row]) -> Iterator[Row]:
    same = identity(groups.keys)
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(same(row), []).append(row)
    for parts in found.values():
        whole = _combined(groups, parts)
        if all(test.passes(whole) for test in groups.having):
            yield whole


def _combined(groups: Groups, parts: Sequence[Row]) -> Row:
    whole = list(parts[0])
    for combine in groups.combines:
        _combine(combine, parts, whole)
    return tuple(whole)


def _combine(combine: Combine, parts: Sequence[Row], whole: list[Any]) -> None:
    present = [row for row in parts if row[combine.raw] is not None]
    if not present:
        return  # NULL on every shard: the first row's own value stands (NULL, or what COALESCE put there)
    if combine.order is not None and combine.comparison is not None:
        chosen = _extreme(combine, present)
        for place in (combine.raw, combine.order, combine.visible):
            if place is not None:
                whole[place] = chosen[place]
        return
    value: Any
    if combine.total is not None and combine.count is not None:
        total = _sum(row[combine.total] for row in present)
        count = _sum(row[combine.count] for row in present)
        value = _quotient(total, count, present[0][combine.raw])
        whole[combine.total], whole[combine.count] = total, count
    else:
        value = _sum(row[combine.raw] for row in present)
    whole[combine.raw] = value
    if combine.visible is not None:
        whole[combine.visible] = _like(present[0][combine.visible], value)


def _extreme(combine: Combine, present: Sequence[Row]) -> Row:
    assert combine.order is not None  # noqa: S101 - narrowed by the caller
    place, comparison = combine.order, combine.comparison or Comparison.NUMBER
    choose = min if combine.how is Aggregate.MIN else max
    return choose(present, key=lambda row: comparable(row[place], comparison))


def _sum(values: Iterable[Any]) -> Any:
    """Exact for integers and decimals, whatever their number of digits; in floating point where the database's is."""
    numbers = list(values)
    if any(isinstance(number, float) for number in numbers):
        return sum(float(number) for number in numbers)
    if all(isinstance(number, int) for number in numbers):
        return sum(numbers)
    decimals = [Decimal(number) for number in numbers]
    scale = max(0, *(-int(number.as_tuple().exponent) for number in decimals))
    return _decimal(sum(map(Fraction, decimals)), scale)


def _decimal(value: Fraction | int, scale: int) -> Decimal:
    """A fraction as a Decimal of this many digits after the point, halves rounded away from zero as MySQL does."""
    scaled = abs(Fraction(value)) * 10**scale
    whole = int(scaled + Fraction(1, 2))
    return Decimal((int(value < 0), tuple(int(digit) for digit in str(whole)), -scale))


def _quotient(total: Any, count: Any, sample: Any) -> Any:
    if isinstance(total, float) or isinstance(sample, float):
        return float(total) / int(count)
    scale = -int(Decimal(sample).as_tuple().exponent)
    return _decimal(Fraction(total) / int(count), max(scale, 0))


def _like(sample: Any, value: Any) -> Any:
    """A combined value as the type that the statement's own column has."""
    if type(sample) is type(value) or sample is None:
        return value
    if isinstance(sample, Decimal):
        scale = -int(sample.as_tuple().exponent)
        return _decimal(Fraction(value), scale)
    return type(sample)(value)
