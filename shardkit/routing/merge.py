"""Per-shard rows -> one result: order, limit, aggregates, distinct. Pure; rows are plain tuples.

The planner makes each shard return the statement's own columns first, and behind them hidden columns: sort keys, group
keys, parts of aggregates. Merging looks at hidden columns only, so the first columns may be anything (ORM objects), and
the rows that come out have the hidden ones taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.sql.base import Executable


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How the rows of several shards make one result.

    :param statement: what each shard executes: hidden columns added, LIMIT raised by OFFSET, aggregates split.
    :param visible: how many leading elements of a row are the statement's own; an ORM entity is one element.
    :param limit: how many rows the result has at most; None: all.
    :param offset: how many merged rows are skipped first.
    """

    statement: Executable
    visible: int
    limit: int | None = None
    offset: int = 0


def merge_rows(plan: MergePlan, streams: Sequence[Iterable[tuple[Any, ...]]]) -> Iterator[tuple[Any, ...]]:
    """The rows of the whole statement, from one stream of rows a shard.

    Streams are read lazily and in step where the order allows it, so the merge holds one row a shard; groups and
    distinct values are held in memory. An ORM statement that needs ``unique()`` needs it on each stream.

    :param streams: rows of ``plan.statement``, hidden columns included; one stream a shard.
    """
    raise NotImplementedError
