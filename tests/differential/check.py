"""Whether the shards' answer is that of the one database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from shardkit.errors import RoutingError
from tests.differential.selects import Question
from tests.differential.world import WHOLE, World


class Different(AssertionError):
    """The shards' answer is not that of the one database."""


class Tally:
    """How many were asked, how many answered, and the kinds of those that were not."""

    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.total = self.answered = 0

    def count(self, kinds: set[str], *, answered: bool) -> None:
        self.total += 1
        self.answered += answered
        if not answered:
            self.refused.update(kinds)


Ask = Callable[[Any], list[tuple[Any, ...]]]


def check_select(world: World, question: Question, tally: Tally, ask: Ask | None = None) -> None:
    """Ask both, and compare.

    :param ask: statement -> the shards' rows; through a `Session` by default.
    :raises Different: when they differ, or when what must be answered is refused.
    """
    try:
        if ask is not None:
            over = ask(question.statement)
        else:
            with world.sessions() as session:
                over = rows_of(session, question.statement)
    except RoutingError as error:
        if question.must:
            raise Different(f"refused what must be answered ({sorted(question.kinds)}): {error}") from error
        tally.count(question.kinds, answered=False)
        return
    tally.count(question.kinds, answered=True)
    with Session(world.engines[WHOLE]) as session:
        once = rows_of(session, question.statement)
    types = [getattr(column, "type", None) for column in getattr(question.statement, "selected_columns", ())]

    def plain(rows: Sequence[tuple[Any, ...]], columns: int | None, *, any_spelling: bool) -> list[tuple[Any, ...]]:
        return [
            tuple(world.plain(value, each, any_spelling=any_spelling) for value, each in zip(row, types, strict=True))[
                :columns
            ]
            for row in rows
        ]

    ours, theirs = (Counter(plain(each, None, any_spelling=question.any_spelling)) for each in (over, once))
    if ours != theirs:
        raise Different(f"over shards {dict(ours - theirs)} too many, {dict(theirs - ours)} missing")
    if question.ordered:
        ours_sorted, theirs_sorted = (plain(each, question.ordered, any_spelling=True) for each in (over, once))
        if ours_sorted != theirs_sorted:
            raise Different(f"sorted otherwise: {ours_sorted} and in one database {theirs_sorted}")


def rows_of(session: Session, statement: Any) -> list[tuple[Any, ...]]:
    """The rows of a statement, objects as their columns' values."""
    rows = []
    for row in session.execute(statement):
        values: list[Any] = []
        for value in row:
            state = sa.inspect(value, raiseerr=False)
            if state is None or not hasattr(state, "mapper"):
                values.append(value)
            else:
                values += (getattr(value, column.key) for column in state.mapper.columns)
        rows.append(tuple(values))
    return rows
