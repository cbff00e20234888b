"""Generated SELECTs over a world, each with what a router owes it.

``must`` is decided here, from the construction of the statement and the promises of the documentation, never by asking
the router: where it is set, a refusal is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from hypothesis import strategies as st

from tests.differential.world import POOLS, Part, World

T = TypeVar("T")


@dataclass
class Question:
    """A SELECT.

    :ivar kinds: what it is made of, for the tally and the list of what must be answered.
    :ivar must: it must be answered.
    :ivar ordered: how many of its first columns ORDER BY fixes.
    :ivar any_spelling: a text may be shown in any of the spellings that the database takes as equal.
    """

    statement: Any
    kinds: set[str]
    must: bool
    ordered: int = 0
    any_spelling: bool = False


@dataclass
class Relation:
    """Something to select from.

    :ivar keys: groups of columns, each a whole shard key of the relation's rows.
    :ivar total: columns that tell every row from every other; empty where there are none.
    """

    clause: Any
    columns: list[Any]
    keys: list[list[Any]] = field(default_factory=list)
    total: list[Any] = field(default_factory=list)

    def of(self, *kinds: type[Any]) -> list[Any]:
        return [column for column in self.columns if isinstance(column.type, kinds)]


class Maker:
    """Draws one question."""

    def __init__(self, draw: st.DrawFn, world: World) -> None:
        self.draw = draw
        self.world = world
        self.kinds: set[str] = set()
        self.must = True
        self.any_spelling = False
        self._numbers = 0

    # --- drawing

    def pick(self, choices: Sequence[T]) -> T:
        return self.draw(st.sampled_from(choices))

    def upto(self, most: int) -> int:
        return self.draw(st.integers(0, most))

    def some(self, choices: Sequence[T], most: int) -> list[T]:
        return self.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=most, unique_by=id))

    def name(self) -> str:
        self._numbers += 1
        return f"x{self._numbers}"

    def is_a(self, kind: str, *, refusable: bool = False) -> None:
        self.kinds.add(kind)
        if refusable:
            self.must = False

    # --- values

    def value(self, column: Any) -> Any:
        match column.type:
            case sa.Boolean():
                kind = "boolean"
            case sa.Integer():
                kind = "integer"
            case sa.Double():
                kind = "float"
            case sa.Numeric():
                kind = "decimal"
            case sa.DateTime():
                kind = "datetime"
            case sa.Date():
                kind = "date"
            case _:
                kind = self.pick(["text", "key text"])
        return self.pick(POOLS[kind])

    # --- relations

    def table(self, part: Part) -> Relation:
        return self.aliased(part) if self.upto(1) else _relation(part.table, part)

    def aliased(self, part: Part) -> Relation:
        return _relation(part.table.alias(self.name()), part)

    def relation(self) -> Relation:
        world = self.world
        match self.upto(39):
            case 0 | 1:
                self.is_a("reference table")
                return self.table(world.codes)
            case 2 | 3:
                self.is_a("vertical table")
                return self.table(world.solo)
            case 4 | 5 | 6 | 7 | 8 | 9:
                return self.by_key(outer=False)
            case 10 | 11 | 12 | 13:
                return self.by_key(outer=True)
            case 14 | 15 | 16:
                return self.with_codes(self.table(world.parents), outer=bool(self.upto(1)))
            case 17 | 18:
                return self.with_codes(self.by_key(outer=bool(self.upto(1))), outer=bool(self.upto(1)))
            case 19:
                self.is_a("reference table preserved by an outer join", refusable=True)
                codes, parents = self.table(world.codes), self.table(world.parents)
                on = codes.clause.c.code == parents.clause.c.code
                return Relation(codes.clause.outerjoin(parents.clause, on), codes.columns + parents.columns)
            case 20:
                self.is_a("join not by the key", refusable=True)
                left, right = self.table(world.parents), self.table(self.pick([world.others, world.children]))
                if left.clause is right.clause:
                    return left
                on = left.clause.c.id == right.clause.c.id
                return Relation(left.clause.join(right.clause, on), left.columns + right.columns)
            case 21 | 22 | 23 | 24 | 25:
                return self.derived()
            case _:
                return self.table(self.pick([world.parents, world.children, world.others]))

    def by_key(self, *, outer: bool) -> Relation:
        """Tables of one keyspace put together by their key."""
        self.is_a("outer join by the key" if outer else "join by the key")
        left, right = self.table(self.world.parents), self.table(self.pick([self.world.children, self.world.parents]))
        if left.clause is right.clause:
            right = self.aliased(self.world.parents)
        on = [one == other for one, other in zip(left.keys[0], right.keys[0], strict=True)]
        if not self.upto(2):
            on.append(self.comparison(right))
        if outer:
            joined = left.clause.outerjoin(right.clause, sa.and_(*on))
        else:
            joined = left.clause.join(right.clause, sa.and_(*on))
        return Relation(joined, left.columns + right.columns, left.keys, left.total + right.total)

    def with_codes(self, left: Relation, *, outer: bool) -> Relation:
        self.is_a("join with a reference table")
        codes = self.table(self.world.codes)
        code = next(column for column in left.columns if column.name == "code")
        joined = left.clause.join(codes.clause, code == codes.clause.c.code, isouter=outer)
        return Relation(joined, left.columns + codes.columns, left.keys, left.total + codes.total)

    def derived(self) -> Relation:
        """A subquery or CTE that holds its rows' key, under names that may be other columns' names."""
        self.is_a("subquery in FROM")
        inner = self.table(self.pick([self.world.parents, self.world.children, self.world.others]))
        others = [column for column in inner.columns if column not in inner.keys[0]]
        shown = [*inner.keys[0], *self.some(others, 3)]
        names = [*self.draw(st.permutations(["id", "code", "t", "k0", "k1", "k", "c0"]))]
        labelled = [column.label(name) for column, name in zip(shown, names, strict=False)]
        statement = sa.select(*labelled)
        if self.upto(1):
            statement = statement.where(self.predicate(inner, 0))
        match self.upto(5):
            case 0:
                self.any_spelling = True
                statement = statement.distinct()
            case 1:
                self.any_spelling = True
                statement = statement.group_by(*shown)
            case 2:
                self.is_a("LIMIT in a subquery", refusable=True)
                statement = statement.order_by(inner.clause.c.id).limit(3)
        clause: Any = statement.cte(self.name()) if not self.upto(3) else statement.subquery(self.name())
        columns = list(clause.c)
        keys = columns[: len(inner.keys[0])]
        total = [column for column, source in zip(columns, shown, strict=True) if source is inner.clause.c.id]
        return Relation(clause, columns, [keys], total)

    # --- predicates

    def comparison(self, relation: Relation) -> Any:
        keys = [column for key in relation.keys for column in key]
        column = self.pick(relation.columns + keys * 3)
        match self.upto(14):
            case 0 | 1:
                return column.in_([self.value(column) for _ in range(self.upto(4))])
            case 2:
                return column.is_(None)
            case 3 if not isinstance(column.type, sa.Boolean):
                return column.between(self.value(column), self.value(column))
            case 4 if not isinstance(column.type, sa.Boolean):
                return column >= self.value(column)
            case 5 if not isinstance(column.type, sa.Boolean):
                return column < self.value(column)
            case 6:
                return column != self.value(column)
            case 7:
                return sa.literal(self.value(column), column.type) == column
            case 8:
                return column == self.pick([c for c in relation.columns if _alike(c.type, column.type)])
            case 9:
                return column.is_not_distinct_from(self.value(column))
            case 10:
                return column.is_not(None)
            case 11 if keys:
                group = self.pick(relation.keys)
                return sa.and_(*(each == self.value(each) for each in group))
            case 12 if relation.keys and len(relation.keys[0]) > 1:
                group = relation.keys[0]
                return sa.tuple_(*group).in_(
                    [tuple(self.value(each) for each in group) for _ in range(1 + self.upto(2))]
                )
            case _:
                return column == self.value(column)

    def predicate(self, relation: Relation, depth: int = 2) -> Any:
        if depth <= 0:
            return self.comparison(relation)
        match self.upto(15):
            case 0 | 1 | 2:
                return sa.and_(self.predicate(relation, depth - 1), self.predicate(relation, depth - 1))
            case 3 | 4 | 5:
                return sa.or_(self.predicate(relation, depth - 1), self.predicate(relation, depth - 1))
            case 6:
                return sa.not_(self.predicate(relation, depth - 1))
            case 7 | 8:
                return self.with_subquery(relation)
            case _:
                return self.comparison(relation)

    def with_subquery(self, relation: Relation) -> Any:
        numbers = [column for column in relation.columns if type(column.type) is sa.Integer]
        own = [key for key in relation.keys if [c.name for c in key] == list(self.world.key) and _from_main(key)]
        if not numbers:
            return self.comparison(relation)
        match self.upto(7):
            case 0 | 1 | 2 if own:
                return self.tied(relation, own[0])
            case 3:
                self.is_a("IN (subquery on a reference table)")
                inner = self.aliased(self.world.codes)
                return self.pick(numbers).in_(sa.select(inner.clause.c.code).where(self.comparison(inner)))
            case 4 | 5:
                return self.uncorrelated(relation)
            case 6:
                self.is_a("subquery not tied by the key", refusable=True)
                inner = self.aliased(self.pick([self.world.children, self.world.others]))
                return sa.exists().where(inner.clause.c.id == self.pick(numbers), self.comparison(inner))
            case _:
                return self.comparison(relation)

    def tied(self, relation: Relation, key: Sequence[Any]) -> Any:
        """A subquery whose rows have the outer row's key."""
        self.is_a("subquery tied by the key")
        inner = self.aliased(self.pick([self.world.children, self.world.parents]))
        clause = inner.clause
        tie = sa.and_(*(one == other for one, other in zip(inner.keys[0], key, strict=True)))
        condition = self.comparison(inner)
        match self.upto(2):
            case 0:
                exists = sa.exists().where(tie, condition)
                return ~exists if self.upto(1) else exists
            case 1:
                count = sa.select(sa.func.count()).select_from(clause).where(tie, condition).scalar_subquery()
                return count > self.upto(2)
            case _:
                number = self.pick([column for column in relation.columns if type(column.type) is sa.Integer])
                return number.in_(sa.select(clause.c.id).where(tie, condition))

    def uncorrelated(self, relation: Relation) -> Any:
        """A subquery that says nothing of the row outside: it can be run first."""
        inner = self.aliased(self.pick([self.world.parents, self.world.children, self.world.others, self.world.solo]))
        pairs = [
            (column, other)
            for column in relation.columns
            for other in inner.columns
            if _alike(column.type, other.type) and not isinstance(column.type, sa.Double)
        ]
        if not pairs:
            return self.comparison(relation)
        column, other = self.pick(pairs)
        comes_back = self.world.dialect != "sqlite" or not isinstance(column.type, sa.Numeric)
        self.is_a("uncorrelated subquery", refusable=not comes_back)
        statement = sa.select(other).where(self.comparison(inner))
        match self.upto(5):
            case 0:
                return column.not_in(statement)
            case 1:
                return sa.exists(statement)
            case 2 if not isinstance(column.type, sa.String | sa.Boolean):
                total = self.pick([sa.func.max, sa.func.min])(other)
                return column >= sa.select(total).where(self.comparison(inner)).scalar_subquery()
            case 3:
                return ~sa.exists().where(self.comparison(inner))
            case _:
                return column.in_(statement)

    # --- statements

    def question(self) -> Question:
        shapes: list[Callable[[], Question]] = [self.rows] * 12 + [self.groups] * 5 + [self.totals] * 3
        shapes += [self.distinct] * 2 + [self.union] * 2 + [self.entities] * 2 + [self.window]
        return self.pick(shapes)()

    def _wheres(self, source: Relation) -> list[Any]:
        return [self.predicate(source) for _ in range(self.upto(2))]

    def expression(self, column: Any) -> Any:
        """Now and then something made of a column."""
        if type(column.type) is sa.Integer:
            match self.upto(8):
                case 0:
                    return (column + 1).label(self.name())
                case 1:
                    return sa.func.coalesce(column, -1).label(self.name())
                case 2:
                    return sa.case((column > 3, 1), else_=0).label(self.name())
        return column

    def rows(self) -> Question:
        source = self.relation()
        shown = [self.expression(column) for column in self.some(source.columns, 3)]
        statement = sa.select(*shown).select_from(source.clause).where(*self._wheres(source))
        return self._sorted(statement, shown, source.total)

    def distinct(self) -> Question:
        source = self.relation()
        shown = self.some(source.columns, 3)
        self.is_a("DISTINCT")
        self.any_spelling = True
        statement = sa.select(*shown).select_from(source.clause).where(*self._wheres(source)).distinct()
        return self._sorted(statement, shown, shown)

    def entities(self) -> Question:
        part = self.pick([self.world.parents, self.world.children, self.world.others])
        self.is_a("ORM objects")
        source = _relation(part.table, part)
        statement = sa.select(part.model).where(*self._wheres(source))
        if self.upto(1):
            statement = statement.order_by(part.table.c.id.desc())
            if self.upto(1):
                statement = statement.limit(self.upto(8)).offset(self.upto(4))
        return Question(statement, self.kinds, self.must)

    def _sorted(self, statement: Any, shown: Sequence[Any], total: Sequence[Any]) -> Question:
        """With ORDER BY or without; LIMIT only where the order leaves no choice."""
        how = self.upto(3)
        if how == 0:
            return Question(statement, self.kinds, self.must, 0, self.any_spelling)
        self.is_a("ORDER BY")
        by = list(shown) if how > 1 else [shown[0]]
        descending = [bool(self.upto(1)) for _ in by]
        statement = statement.order_by(*(e.desc() if down else e for e, down in zip(by, descending, strict=True)))
        if how == 3 and total:
            if "DISTINCT" not in self.kinds and "GROUP BY" not in self.kinds:
                statement = statement.order_by(*total)
            self.is_a("LIMIT")
            statement = statement.limit(self.upto(9))
            if self.upto(1):
                self.is_a("OFFSET")
                statement = statement.offset(self.upto(6))
        return Question(statement, self.kinds, self.must, len(by), self.any_spelling)

    # --- aggregates

    def aggregate(self, source: Relation) -> Any:
        numbers = [column for column in source.of(sa.Integer, sa.Numeric) if not isinstance(column.type, sa.Boolean)]
        match self.upto(7):
            case 0:
                return sa.func.count()
            case 1:
                return sa.func.count(self.pick(source.columns))
            case 2 | 3 if numbers:
                return sa.func.sum(self.pick(numbers))
            case 4 if numbers:
                return sa.func.avg(self.pick(numbers))
            case 5 | 6:
                column = self.pick(source.columns)
                self.any_spelling = True
                return self.pick([sa.func.min, sa.func.max])(column)
            case _:
                column = self.pick(source.columns)
                self.is_a("COUNT(DISTINCT)")
                return sa.func.count(column.distinct())

    def aggregates(self, source: Relation) -> list[Any]:
        return [self.aggregate(source).label(self.name()) for _ in range(1 + self.upto(1))]

    def totals(self) -> Question:
        source = self.relation()
        self.is_a("aggregates")
        shown = self.aggregates(source)
        if not self.upto(3):
            self.is_a("expression over aggregates")
            shown.append((sa.func.count() + sa.func.coalesce(sa.func.max(self._number(source)), 0)).label(self.name()))
        return Question(
            sa.select(*shown).select_from(source.clause).where(*self._wheres(source)),
            self.kinds, self.must, 0, self.any_spelling,
        )  # fmt: skip

    def _number(self, source: Relation) -> Any:
        return self.pick([column for column in source.columns if type(column.type) is sa.Integer] or [sa.literal(1)])

    def groups(self) -> Question:
        source = self.relation()
        self.is_a("GROUP BY")
        groups = self.some(source.columns, 2)
        self.any_spelling = True
        aggregates = self.aggregates(source)
        statement = sa.select(*groups, *aggregates).select_from(source.clause).where(*self._wheres(source))
        statement = statement.group_by(*groups)
        match self.upto(7):
            case 0 | 1:
                self.is_a("HAVING")
                statement = statement.having(sa.func.count() >= self.upto(4))
            case 2:
                self.is_a("HAVING")
                number = self._number(source)
                test = sa.or_(sa.func.min(number).is_(None), sa.func.sum(number).between(-1, 40))
                statement = statement.having(sa.and_(test, sa.func.count() < 1 + self.upto(9)))
        return self._sorted(statement, groups, groups)

    # --- others

    def union(self) -> Question:
        first = self.table(self.pick([self.world.parents, self.world.children, self.world.others]))
        second = self.table(self.pick([self.world.parents, self.world.children, self.world.others]))
        pairs = [
            (one, other)
            for one in first.columns
            for other in second.columns
            if _alike(one.type, other.type) and not isinstance(one.type, sa.String)
        ]
        shown = self.some(pairs, 3)
        selects = [
            sa.select(*(pair[side].label(f"u{n}") for n, pair in enumerate(shown))).where(*self._wheres(source))
            for side, source in enumerate((first, second))
        ]
        every = bool(self.upto(1))
        self.is_a("UNION ALL" if every else "UNION")
        statement: Any = sa.union_all(*selects) if every else sa.union(*selects)
        ordered = 0
        if self.upto(1):
            self.is_a("ORDER BY over a union")
            ordered = len(shown)
            statement = statement.order_by(*(statement.selected_columns[f"u{n}"] for n in range(ordered)))
            if self.upto(1):
                statement = statement.limit(self.upto(9))
        return Question(statement, self.kinds, self.must, ordered, self.any_spelling)

    def window(self) -> Question:
        source = self.table(self.pick([self.world.parents, self.world.children]))
        by: Any = None
        match self.upto(3):
            case 0:
                self.is_a("window function", refusable=True)
            case 1:
                self.is_a("window function by another column", refusable=True)
                by = source.clause.c.code if "code" in source.clause.c else source.clause.c.parent_id
            case _:
                self.is_a("window function by the key")
                by = list(self.draw(st.permutations([*source.keys[0], *self.some(source.of(sa.Integer), 1)])))
        number = source.clause.c.id
        function = self.pick([sa.func.row_number(), sa.func.sum(number), sa.func.lag(number, type_=sa.Integer)])
        window = function.over(partition_by=by, order_by=number).label(self.name())
        statement = sa.select(number, window).where(*self._wheres(source))
        return self._sorted(statement, [number, window], source.total)


def _relation(clause: Any, part: Part) -> Relation:
    """A table, or an alias of it."""
    keys = [[clause.c[name] for name in part.key]] if part.key else []
    return Relation(clause, list(clause.c), keys, [clause.c.id])


def _alike(one: Any, other: Any) -> bool:
    return type(one) is type(other) and getattr(one, "collation", None) == getattr(other, "collation", None)


def _from_main(key: Sequence[Any]) -> bool:
    """Whether these are a table's own columns: a subquery's may carry the names by chance."""
    table = getattr(key[0], "table", None)
    return isinstance(table, sa.Table | sa.Alias) and not isinstance(table, sa.Subquery)


@st.composite
def questions(draw: st.DrawFn, world: World) -> Question:
    """A SELECT over a world."""
    return Maker(draw, world).question()
