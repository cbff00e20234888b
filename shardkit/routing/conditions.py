"""What a comparison says about one column's values: exact values, intervals, or nothing.

A condition is read once for a shape of statement; `allowed` works out from one execution's parameters which values the
column can have. None stands for unknown: any value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import exc as sa_exc
from sqlalchemy.sql.elements import BindParameter

from shardkit.routing.anatomy import Slot
from shardkit.routing.keyvalues import Reader, Untrusted

# --- values ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Allowed:
    """The values that a column can have: some exact ones (None for NULL), and closed intervals (None: open end)."""

    values: frozenset[Any] = frozenset()
    spans: tuple[tuple[Any, Any], ...] = ()

    def __or__(self, other: Allowed) -> Allowed:
        return Allowed(self.values | other.values, self.spans + other.spans)

    def __and__(self, other: Allowed) -> Allowed:
        values = {value for value in self.values if other.takes(value)}
        values.update(value for value in other.values if self.takes(value))
        spans = tuple(_overlap(one, two) for one in self.spans for two in other.spans)
        return Allowed(frozenset(values), spans)

    def takes(self, value: Any) -> bool:
        """Whether the column can have this value."""
        return value in self.values or (value is not None and any(_within(value, span) for span in self.spans))


def _within(value: Any, span: tuple[Any, Any]) -> bool:
    low, high = span
    try:
        return (low is None or _order(low) <= _order(value)) and (high is None or _order(value) <= _order(high))
    except TypeError:
        return True  # not comparable here: the database decides


def _overlap(one: tuple[Any, Any], two: tuple[Any, Any]) -> tuple[Any, Any]:
    try:
        low = one[0] if two[0] is None else two[0] if one[0] is None else max(one[0], two[0], key=_order)
        high = one[1] if two[1] is None else two[1] if one[1] is None else min(one[1], two[1], key=_order)
    except TypeError:
        return one
    return low, high


def _order(value: Any) -> Any:
    return value.encode() if isinstance(value, str) else value


class Binds:
    """The values of one execution's parameters."""

    __slots__ = ("_extracted", "_given")

    def __init__(self, given: Mapping[str, Any] | None, extracted: Sequence[BindParameter[Any]]) -> None:
        """:param given: parameters given at execution; :param extracted: those of the statement's own cache key."""
        self._given = given
        self._extracted = extracted

    def __getitem__(self, slot: Slot) -> Any:
        """The value that the statement is sent with, before bind processing.

        :raises sqlalchemy.exc.InvalidRequestError: when a required parameter was not given, as at execution.
        """
        if self._given:
            if slot.key in self._given:
                return self._given[slot.key]
            if slot.name in self._given:
                return self._given[slot.name]
        return _own_value(slot.bind if slot.position is None else self._extracted[slot.position])

    def of(self, bind: BindParameter[Any]) -> Any:
        """The value of a parameter that stands in this very statement, not in another one of its shape.

        :raises sqlalchemy.exc.InvalidRequestError: as above.
        """
        if self._given and bind.key in self._given:
            return self._given[bind.key]
        return _own_value(bind)


def _own_value(bind: BindParameter[Any]) -> Any:
    if bind.required:
        raise sa_exc.InvalidRequestError(f"A value is required for bind parameter {bind.key!r}")
    return bind.effective_value


# --- conditions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A bound value, or a list of them.

    :param part: which part of each value counts, in a list of tuples.
    """

    slot: Slot
    many: bool = False
    part: int | None = None

    def raw(self, binds: Binds) -> Iterable[Any]:
        """The values of this execution."""
        value = binds[self.slot]
        if not self.many:
            return (value,)
        return value if self.part is None else [row[self.part] for row in value]


@dataclass(frozen=True, slots=True)
class OneOf:
    """``= value`` or ``IN (values)``. NULL among them matches nothing, unless the comparison is the NULL-safe one."""

    sources: tuple[Source, ...]
    null_safe: bool = False
    rejects_null = property(lambda self: not self.null_safe)

    def allowed(self, read: Reader, binds: Binds) -> Allowed | None:
        values = set()
        for source in self.sources:
            for raw in source.raw(binds):
                value = read(raw)
                if isinstance(value, Untrusted):
                    return None
                if value is not None or self.null_safe:
                    values.add(value)
        return Allowed(frozenset(values))


@dataclass(frozen=True, slots=True)
class IsNull:
    """``IS NULL``."""

    rejects_null = False

    def allowed(self, read: Reader, binds: Binds) -> Allowed | None:  # noqa: ARG002 - every condition is asked the same way
        return Allowed(frozenset({None}))


@dataclass(frozen=True, slots=True)
class Between:
    """``low <= column <= high``; strict comparisons are widened, which only ever adds a bucket."""

    low: Source | None
    high: Source | None
    rejects_null = True

    def allowed(self, read: Reader, binds: Binds) -> Allowed | None:
        ends: list[Any] = []
        for source in (self.low, self.high):
            if source is None:
                ends.append(None)
                continue
            value = read(binds[source.slot])
            if isinstance(value, Untrusted):
                return None
            if value is None:
                return Allowed()  # a comparison with NULL is never true
            ends.append(value)
        return Allowed(spans=((ends[0], ends[1]),))


@dataclass(frozen=True, slots=True)
class Either:
    """An OR all of whose branches say something about the column: each branch is an AND of conditions."""

    branches: tuple[tuple[Condition, ...], ...]
    rejects_null = property(lambda self: all(any(each.rejects_null for each in branch) for branch in self.branches))

    def allowed(self, read: Reader, binds: Binds) -> Allowed | None:
        union = Allowed()
        for branch in self.branches:
            one = intersection(each.allowed(read, binds) for each in branch)
            if one is None:
                return None
            union |= one
        return union


Condition: TypeAlias = OneOf | IsNull | Between | Either


def intersection(parts: Iterable[Allowed | None]) -> Allowed | None:
    """What all of them allow; those that are None (unknown) say nothing."""
    result: Allowed | None = None
    for part in parts:
        if part is not None:
            result = part if result is None else result & part
    return result
