"""Generated INSERTs, UPDATEs and DELETEs over a world, and whether the shards hold afterwards what one database holds.

Each change is made on both, compared, and rolled back: the world stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from shardkit.errors import RoutingError
from tests.differential.check import Different, Tally
from tests.differential.selects import Maker, _relation
from tests.differential.world import SHARDS, WHOLE, Part, World

#: New rows have ids from here on: none of them is there already.
NEW = 1000
#: MySQL does not change a table that a subquery reads (ER_UPDATE_TABLE_USED).
_TARGET_IN_SUBQUERY = 1093


@dataclass
class Change:
    """A statement that changes rows.

    :ivar must: it must be carried out; decided from how it was made, never by asking the router.
    """

    statement: Any
    parameters: Any
    kinds: set[str]
    must: bool
    options: Mapping[str, Any] = field(default_factory=dict)


class ChangeMaker(Maker):
    """Draws one change."""

    def change(self) -> Change:
        part = self.pick([self.world.parents, self.world.children, self.world.others] * 2 + [self.world.solo])
        if not self.upto(5):
            part = self.world.codes
        match self.upto(4):
            case 0 | 1:
                return self.insert(part)
            case 2 | 3:
                return self.update(part)
            case _:
                return self.delete(part)

    def _made(self, statement: Any, parameters: Any, kind: str, **options: Any) -> Change:
        return Change(statement, parameters, {kind, *self.kinds}, self.must, options)

    # --- INSERT

    def insert(self, part: Part) -> Change:
        rows = [self._new_row(part, NEW + number) for number in range(1 + self.upto(5))]
        if part.key and not self.upto(7):
            self.is_a("INSERT without a key", refusable=True)
            del self.pick(rows)[self.pick(part.key)]
        together = {frozenset(row) for row in rows}
        if len(together) == 1 and self.upto(1):
            return self._made(sa.insert(part.table), rows, "INSERT of many")
        if len(together) == 1 and self.upto(1):
            return self._made(sa.insert(part.table).values(rows), None, "INSERT of several rows of values")
        return self._made(sa.insert(part.table).values(rows[0]), None, "INSERT")

    def _new_row(self, part: Part, number: int) -> dict[str, Any]:
        row = {"id": number}
        for column in part.table.c:
            if column.name != "id":
                pool = [*self.world.pools[f"{part.table.name}.{column.name}"], *self.world._nulls(part, column)]
                row[column.name] = self.pick(pool)
        if part is self.world.codes:
            row["code"] = number  # another one than those that are there
        return row

    # --- UPDATE and DELETE

    def _where(self, part: Part) -> tuple[list[Any], dict[str, Any]]:
        relation = _relation(part.table, part)
        where = [self.predicate(relation, 1) for _ in range(self.upto(1))]
        if not part.key:
            return where, {}
        if self.upto(2):
            row = self.pick(self.world.rows[part.table.name])
            if all(row[name] is not None for name in part.key):
                where += [part.table.c[name] == row[name] for name in part.key]
                return where, {}
        if self.upto(3):
            return where, {"shardkit_scatter": True}
        self.is_a("change without a key", refusable=True)
        return where, {}

    def update(self, part: Part) -> Change:
        where, options = self._where(part)
        others = [column for column in part.table.c if column.name not in {"id", "code", *part.key}]
        values = {column.name: self.value(column) for column in self.some(others, 2)}
        numbers = [column for column in others if isinstance(column.type, sa.Integer) and column.name in values]
        if numbers and self.upto(1):
            values[numbers[0].name] = numbers[0] + 1
        if part.key and not self.upto(9):
            self.is_a("UPDATE of a key", refusable=True)
            values[part.key[0]] = self.value(part.table.c[part.key[0]])
        return self._made(sa.update(part.table).where(*where).values(values), None, "UPDATE", **options)

    def delete(self, part: Part) -> Change:
        where, options = self._where(part)
        return self._made(sa.delete(part.table).where(*where), None, "DELETE", **options)


@st.composite
def changes(draw: st.DrawFn, world: World) -> Change:
    """A change of a world."""
    return ChangeMaker(draw, world).change()


def check_change(world: World, change: Change, tally: Tally) -> None:
    """Make the change on the shards and on the one database, compare all they hold, and take it back.

    :raises Different: when they differ, a row is not where its key says, or what must be carried out is refused.
    """
    with world.sessions() as over, Session(world.engines[WHOLE]) as once:
        try:
            count = over.execute(change.statement, change.parameters, execution_options=change.options).rowcount
        except RoutingError as error:
            if change.must and "subquery" not in " ".join(change.kinds):
                raise Different(f"refused what must be carried out ({sorted(change.kinds)}): {error}") from error
            tally.count(change.kinds, answered=False)
            over.rollback()
            _compare(world, over, once)
            return
        except DBAPIError as error:
            with pytest.raises(DBAPIError) as raised:
                once.execute(change.statement, change.parameters)
            if raised.value.orig is None or error.orig is None or raised.value.orig.args[0] != error.orig.args[0]:
                raise Different(f"{error}, and in one database {raised.value}") from error
            return
        tally.count(change.kinds, answered=True)
        try:
            wanted = once.execute(change.statement, change.parameters).rowcount
        except DBAPIError as error:
            if count or error.orig is None or error.orig.args[0] != _TARGET_IN_SUBQUERY:
                raise
            return  # no row could match, so no shard was asked what it would have said of the statement
        if count != wanted and "many" not in " ".join(change.kinds):
            raise Different(f"{count} rows, and {wanted} in one database")
        _compare(world, over, once)
        over.rollback()
        once.rollback()


def _compare(world: World, over: Session, once: Session) -> None:
    for part in world.parts:
        whole = Counter(_rows(part, once, {}))
        names = [column.name for column in part.table.c]
        found: Counter[Any] = Counter()
        for shard in SHARDS if part is not world.solo else ("s1",):
            own = Counter(_rows(part, over, {"shardkit_shard": shard}))
            if part is world.codes and own != whole:
                raise Different(f"codes differ on {shard}: {dict(own - whole)} too many, {dict(whole - own)} missing")
            for row in own:
                if shard not in world._home(part, dict(zip(names, row, strict=True))):
                    raise Different(f"a row of {part.table.name} is on {shard}, where it does not belong: {row}")
            found += own
        if part is not world.codes and found != whole:
            more, less = dict(found - whole), dict(whole - found)
            raise Different(f"{part.table.name} differs: {more} too many, {less} missing")


def _rows(part: Part, session: Session, options: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in session.execute(sa.select(part.table), execution_options=options)]
