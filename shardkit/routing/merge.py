"""Per-shard rows -> one result: order, limit, aggregates, distinct. Pure; rows are plain tuples.

The planner makes each shard return the statement's own columns first, and behind them hidden columns: sort keys, group
keys, parts of aggregates. Merging looks at hidden columns only, so the first columns may be anything (ORM objects), and
the rows that come out have the hidden ones taken off.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from sqlalchemy.sql.base import Executable

from shardkit.errors import RoutingError
from shardkit.routing.combining import Groups, Row
from shardkit.routing.sorting import Ordering, SortKey, identity, ordering


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
            parts = ", ".join(groups.names)
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
    :raises RoutingError: when a shard sends a value, or an order, that its column's type did not promise.
    """
    if plan.limit == 0:
        return iter(())
    rows: Iterator[Row]
    if plan.groups is not None:
        rows = plan.groups.combined(chain.from_iterable(streams))
        if plan.order:
            rows = iter(sorted(rows, key=ordering(plan.order)))
    elif plan.order:
        key = ordering(plan.order)
        rows = map(_ROW, heapq.merge(*(_in_order(stream, key) for stream in streams), key=_KEY))
    else:
        rows = chain.from_iterable(streams)
    if plan.distinct:
        rows = _different(plan.distinct, rows)
    end = None if plan.limit is None else plan.offset + plan.limit
    visible = plan.visible
    return (row[:visible] for row in islice(rows, plan.offset, end))


_KEY, _ROW = itemgetter(0), itemgetter(1)


def _in_order(rows: Iterable[Row], key: Ordering) -> Iterator[tuple[Any, Row]]:
    """A shard's rows with what they are merged by.

    :raises RoutingError: where they are sorted by something else: merged, they would be in no order at all.
    """
    last: Any = None
    for row in rows:
        known = key(row)
        if last is not None and known < last:
            raise RoutingError(
                "a shard has sorted its rows otherwise than the model's column types say",
                hint="a column that is sorted by is declared as another type than the database has (a String for an "
                "ENUM, say); correct it, or sort in the application",
            )
        last = known
        yield known, row


def _different(keys: tuple[SortKey, ...], rows: Iterable[Row]) -> Iterator[Row]:
    seen = set()
    same = identity(keys)
    for row in rows:
        known = same(row)
        if known not in seen:
            seen.add(known)
            yield row
