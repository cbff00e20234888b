"""Predicates + parameters -> the key values that rows can have: exact values, intervals, or unknown.

What a predicate says is read once a shape of statement (`facts_of`), into conditions over bound parameters; what it
means for one execution is worked out from the parameters' values (`KeyPin.buckets`). AND intersects, OR unites (an OR
with a branch that says nothing is unknown), NOT says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Final, TypeAlias

from sqlalchemy.engine import Dialect
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    ClauseElement,
    ClauseList,
    ExpressionClauseList,
    False_,
    Grouping,
    Null,
    Tuple,
)
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.types import TupleType, TypeEngine

from shardkit.normalization import Normalization
from shardkit.partition import Bucket, KeyType, RangePartition
from shardkit.routing.anatomy import Slot
from shardkit.routing.conditions import Allowed, Between, Binds, Condition, Either, IsNull, OneOf, Source, intersection
from shardkit.routing.keyvalues import Reader, reader_of, sends_alike
from shardkit.shardmap import Keyspace

#: A column of one occurrence of a table: (number of the occurrence, column name).
Term: TypeAlias = tuple[int, str]
#: More combinations than this of a composite key's values are not worked out.
MOST_KEYS: Final = 10_000


# --- facts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KnownColumn:
    """A column of a table in the map whose lineage is known.

    :param kind: what it stores; columns of one kind and one normalization that are equal hash to the same bucket.
    :param name: ``table.column``, for people.
    :param normalize: what its partition does to it, if it is a string key: equal values are then the same normalized.
    """

    term: Term
    type: TypeEngine[Any]
    kind: KeyType
    name: str
    normalize: Normalization | None = None

    def tied_to(self, other: KnownColumn) -> bool:
        """Whether the two, where they are equal, hash to the same bucket."""
        return self.kind is other.kind and self.normalize is other.normalize


Resolve: TypeAlias = Callable[[ClauseElement], KnownColumn | None]


@dataclass(frozen=True, slots=True)
class Fact:
    """``column`` fulfils ``condition``. ``text`` says it for people, without values."""

    column: KnownColumn
    condition: Condition
    text: str


@dataclass
class Facts:
    """What is true of every row combination that passes a predicate.

    :param known: conditions on single columns.
    :param equal: pairs of columns with equal values, neither NULL.
    :param impossible: nothing passes.
    :param within: the outer joins on whose nullable side these facts stand.
    :param join: the outer join whose nullable side's own facts these are, as a number.
    """

    known: list[Fact] = field(default_factory=list)
    equal: list[tuple[KnownColumn, KnownColumn]] = field(default_factory=list)
    impossible: bool = False
    within: frozenset[int] = frozenset()
    join: int | None = None

    @classmethod
    def of_nullable_side(cls, within: frozenset[int]) -> Facts:
        """For the nullable side of one more outer join."""
        facts = cls()
        facts.join = id(facts)
        facts.within = within | {id(facts)}
        return facts

    def add(self, other: Facts) -> None:
        """Both hold."""
        self.known += other.known
        self.equal += other.equal
        self.impossible = self.impossible or other.impossible

    def not_null(self) -> Iterator[Term]:
        """The columns that are certainly not NULL."""
        yield from (fact.column.term for fact in self.known if fact.condition.rejects_null)
        for one, other in self.equal:
            yield one.term
            yield other.term


def facts_of(predicate: ClauseElement, resolve: Resolve, slots: Mapping[BindParameter[Any], Slot]) -> Facts:
    """Read a predicate. What it does not understand says nothing.

    :param resolve: finds the lineage of a column expression, or None.
    """
    return _Reading(resolve, slots).facts(predicate)


@dataclass(frozen=True)
class _Reading:
    resolve: Resolve
    slots: Mapping[BindParameter[Any], Slot]

    def facts(self, predicate: Any) -> Facts:
        match predicate:
            case Grouping():
                return self.facts(predicate.element)
            case LambdaElement():
                return self.facts(predicate._resolved)  # noqa: SLF001 - the expression that it stands for
            case False_():
                return Facts(impossible=True)
            case BooleanClauseList() if predicate.operator is operators.and_:
                both = Facts()
                for clause in predicate.clauses:
                    both.add(self.facts(clause))
                return both
            case BooleanClauseList() if predicate.operator is operators.or_:
                return _either([self.facts(clause) for clause in predicate.clauses])
            case BinaryExpression():
                return self._comparison(predicate)
            case _:
                return Facts()

    def _comparison(self, expression: BinaryExpression[Any]) -> Facts:
        left, right = _bare(expression.left), _bare(expression.right)
        operator: Any = expression.operator
        if operator is operators.in_op and isinstance(left, Tuple):
            return self._tuple_in(left, right)
        column = self.resolve(left)
        if column is None:
            column, other = self.resolve(right), left
            operator = _MIRRORED.get(operator)
        else:
            other = right
        if column is None or operator is None:
            return Facts()
        if operator is operators.eq and (second := self.resolve(other)) is not None:
            return Facts(equal=[(column, second)]) if column.tied_to(second) else Facts()
        condition = self._condition(column, operator, other)
        if condition is None:
            return Facts()
        return Facts([Fact(column, condition, f"{column.name} {_WORDS[operator]}")])

    def _condition(self, column: KnownColumn, operator: Any, other: ClauseElement) -> Condition | None:
        if operator is operators.is_:
            return IsNull() if isinstance(other, Null) else None
        if operator is operators.is_not_distinct_from and isinstance(other, Null):
            return IsNull()
        if column.normalize is not None and operator in _RANGES:
            return Between(None, None)  # the collation's order is not that of the normalized texts: it is not NULL
        if operator is operators.between_op and isinstance(other, ExpressionClauseList):
            low, high = (self._source(column, clause) for clause in other.clauses)
            return Between(low, high) if low and high else None
        if operator is operators.in_op:
            sources = self._list(column, other)
            return None if sources is None else OneOf(sources)
        source = self._source(column, other)
        if source is None:
            return None
        if operator in (operators.eq, operators.is_not_distinct_from):
            return OneOf((source,), null_safe=operator is operators.is_not_distinct_from)
        if operator in (operators.lt, operators.le):
            return Between(None, source)
        if operator in (operators.gt, operators.ge):
            return Between(source, None)
        return None

    def _source(self, column: KnownColumn, element: ClauseElement) -> Source | None:
        element = _bare(element)
        if not isinstance(element, BindParameter) or element.expanding or not sends_alike(element.type, column.type):
            return None
        slot = self.slots.get(element)
        return None if slot is None else Source(slot)

    def _list(self, column: KnownColumn, element: ClauseElement) -> tuple[Source, ...] | None:
        if isinstance(element, BindParameter) and element.expanding:
            slot = self.slots.get(element)
            return (Source(slot, many=True),) if slot and sends_alike(element.type, column.type) else None
        if not isinstance(element, ClauseList | ExpressionClauseList):
            return None
        sources = [self._source(column, clause) for clause in element.clauses]
        known = tuple(source for source in sources if source is not None)
        return known if len(known) == len(sources) else None

    def _tuple_in(self, left: Tuple, right: ClauseElement) -> Facts:
        if not isinstance(right, BindParameter) or not right.expanding or not isinstance(right.type, TupleType):
            return Facts()
        slot = self.slots.get(right)
        if slot is None or len(right.type.types) != len(left.clauses):
            return Facts()
        found = Facts()
        for part, clause in enumerate(left.clauses):
            column = self.resolve(_bare(clause))
            if column is not None and sends_alike(right.type.types[part], column.type):
                condition = OneOf((Source(slot, many=True, part=part),))
                found.known.append(Fact(column, condition, f"{column.name} in a list"))
        return found


def _bare(element: Any) -> Any:
    while isinstance(element, Grouping):
        element = element.element
    return element


_RANGES: Final = frozenset({operators.between_op, operators.lt, operators.le, operators.gt, operators.ge})
_MIRRORED: Final[Mapping[Any, Any]] = {
    operators.eq: operators.eq,
    operators.is_not_distinct_from: operators.is_not_distinct_from,
    operators.lt: operators.gt,
    operators.le: operators.ge,
    operators.gt: operators.lt,
    operators.ge: operators.le,
}
_WORDS: Final[Mapping[Any, str]] = {
    operators.eq: "= value",
    operators.is_not_distinct_from: "= value",
    operators.is_: "is NULL",
    operators.in_op: "in a list",
    operators.between_op: "in a range",
    operators.lt: "in a range",
    operators.le: "in a range",
    operators.gt: "in a range",
    operators.ge: "in a range",
}


def _either(branches: Sequence[Facts]) -> Facts:
    open_branches = [branch for branch in branches if not branch.impossible]
    if not open_branches:
        return Facts(impossible=True)
    found = Facts()
    first, *others = open_branches
    for column in {fact.column.term: fact.column for fact in first.known}.values():
        if all(any(fact.column.term == column.term for fact in other.known) for other in others):
            ands = [
                tuple(f.condition for f in branch.known if f.column.term == column.term) for branch in open_branches
            ]
            found.known.append(Fact(column, Either(tuple(ands)), f"{column.name} in every branch of an OR"))
    return found


# --- pins --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyPin:
    """What is known about the key of one table's rows.

    :param columns: for each key column, in the map's order, what it has to fulfil, each with the reader of the column
        that the condition stands on.
    :param impossible: no row passes.
    """

    keyspace: Keyspace
    columns: tuple[tuple[tuple[Reader, Condition], ...], ...]
    impossible: bool = False

    def buckets(self, binds: Binds) -> frozenset[Bucket] | None:
        """The only buckets that matching rows can be in; None: any."""
        if self.impossible:
            return frozenset()
        partition = self.keyspace.partition
        if partition is None or not self.columns:
            return None
        allowed = [intersection(each.allowed(read, binds) for read, each in column) for column in self.columns]
        if any(one is not None and not one.values and not one.spans for one in allowed):
            return frozenset()
        try:
            if len(allowed) == 1 and allowed[0] is not None:
                return self._of_one_column(allowed[0])
            return self._of_combinations(allowed)
        except (TypeError, ValueError):  # a value that cannot be compared or hashed as this key: unknown
            return None

    def _of_one_column(self, allowed: Allowed) -> frozenset[Bucket] | None:
        partition = self.keyspace.partition
        assert partition is not None  # noqa: S101 - narrowed by the caller
        found: set[Bucket | None] = {partition.bucket_of((value,)) for value in allowed.values}
        for low, high in allowed.spans:
            if not isinstance(partition, RangePartition):
                return None
            found.update(partition.overlapping(low, high))
        return frozenset(bucket for bucket in found if bucket is not None)

    def _of_combinations(self, allowed: Sequence[Allowed | None]) -> frozenset[Bucket] | None:
        partition = self.keyspace.partition
        assert partition is not None  # noqa: S101 - narrowed by the caller
        values: list[frozenset[Any]] = []
        count = 1
        for one in allowed:
            if one is None or one.spans:
                return None
            values.append(one.values)
            count *= len(one.values)
        if count > MOST_KEYS:
            return None
        found = {partition.bucket_of(key) for key in product(*values)}
        return frozenset(bucket for bucket in found if bucket is not None)

    @property
    def single(self) -> tuple[Reader, Slot] | None:
        """The one parameter that decides, in the commonest case: one key column, ``= value``."""
        if self.impossible or len(self.columns) != 1 or len(self.columns[0]) != 1 or self.keyspace.partition is None:
            return None
        read, condition = self.columns[0][0]
        if not isinstance(condition, OneOf) or condition.null_safe or len(condition.sources) != 1:
            return None
        source = condition.sources[0]
        return None if source.many else (read, source.slot)


class Readers:
    """The reader of each column type and normalization, made once."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._made: dict[tuple[TypeEngine[Any], Normalization | None], Reader | None] = {}

    def of(self, column_type: TypeEngine[Any], normalize: Normalization | None = None) -> Reader | None:
        """How values of this type are read; None for a type that cannot be a key.

        :param normalize: what the column's partition does to strings.
        """
        made = column_type, normalize
        if made not in self._made:
            self._made[made] = reader_of(column_type, self.dialect, normalize)
        return self._made[made]
