"""GROUP BY and aggregates over several shards -> hidden columns for the shards, and how their rows become the groups.

Where an aggregate is of different values, or puts texts together, the shards group by those values too: then each of
their rows is a part of a group, and every other aggregate is combined from such parts just as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    AggregateOrderBy,
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    Cast,
    ClauseElement,
    ColumnClause,
    ColumnElement,
    ExpressionClauseList,
    Null,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import ScalarSelect
from sqlalchemy.types import NullType, TypeDecorator

from shardkit.errors import RoutingError
from shardkit.routing import formulas
from shardkit.routing.combining import (
    Aggregate,
    Average,
    Combine,
    Computed,
    Deviation,
    Different,
    Extreme,
    Texts,
    Total,
)
from shardkit.routing.conditions import Binds
from shardkit.routing.expressions import contents_of, is_distinct, same
from shardkit.routing.formulas import Call, Constant, Formula, Place
from shardkit.routing.functions import VOLATILE
from shardkit.routing.keyvalues import stored_type
from shardkit.routing.sorting import Comparison, SortKey, bare, extreme_column, raw, sort_column, without_null
from shardkit.routing.spread import Refused


@dataclass(frozen=True, slots=True)
class Sorted:
    """An element of ORDER BY without its direction, and the direction."""

    expression: Any
    descending: bool
    nulls_first: bool


@dataclass
class Grouping:
    """Collects what the shards send beside a grouped statement's own columns.

    :param hide: adds a hidden column, and gives its place in the row.
    :param sorted_by: reads an element of an ORDER BY.
    :param is_key: whether a column is the whole key of the statement's rows.
    :ivar finer: what the shards group by beside the statement's own groups.
    :ivar counts_keys: whether different keys are counted by adding up the shards' counts: right only as long as the
        shards do not group more finely.
    :ivar asks_shards: what only a shard's row can say, not the merge: it is missing where no shard sends a row.
    :ivar unsorted: places of hidden columns that find an extreme, and do not sort as it does.
    """

    groups: Sequence[ColumnElement[Any]]
    binds: Binds
    dialect: Dialect
    hide: Callable[[ColumnElement[Any]], int]
    sorted_by: Callable[[Any], Sorted]
    is_key: Callable[[ClauseElement], bool]
    distinct: bool = False
    keys: list[SortKey] = field(default_factory=list)
    combines: list[Combine] = field(default_factory=list)
    computed: list[Computed] = field(default_factory=list)
    finer: list[ColumnElement[Any]] = field(default_factory=list)
    counts_keys: bool = False
    asks_shards: str | None = None
    unsorted: set[int] = field(default_factory=set)
    _made: list[tuple[Any, SortKey | None, int]] = field(default_factory=list)  # expression, how it sorts, its place

    def __post_init__(self) -> None:
        for expression in self.groups:
            refuse_clock(expression)
            column, comparison = sort_column(expression, self.dialect)
            self.keys.append(SortKey(self.hide(least(column)), comparison))

    # --- the statement's columns

    def output(self, column: Any, place: int) -> SortKey | None:
        """Read one of the statement's own columns.

        :returns: what it is compared by; None for a constant.
        """
        expression = bare(column)
        if not isinstance(expression, ColumnElement):
            raise refused("an ORM entity or a bundle beside aggregates, over several shards", "select its columns")
        group = self._group(expression)
        if group is not None:
            return group
        if is_constant(expression) or _name(expression) == "any_value":
            return None
        if self.distinct and self._hides_digits(expression) and _holds_average(expression):
            raise refused(  # seen on MariaDB 10.11; MySQL takes equal digits for equal
                "DISTINCT with an AVG of exact numbers, over several shards: servers tell it apart by more digits than "
                "they show",
                "leave DISTINCT away, or do it in the application",
            )
        if self._is_aggregate(expression):
            return self._aggregate(expression, place)
        if _name(expression) == "coalesce":
            first, *others = map(bare, expression.clauses)
            if self._is_aggregate(first) and not _is_number(first) and all(map(is_constant, others)):
                if self.distinct:
                    raise refused("DISTINCT with COALESCE of an aggregate that is no number, over several shards")
                return self._aggregate(first, place)  # on a shard without a value the default stands in its place
        return self._compute(expression, place)

    def order(self, wanted: Sorted) -> SortKey:
        """What a group is sorted by."""
        expression = bare(wanted.expression)
        key = self._group(expression) or self._known(expression)
        if key is None and self._is_aggregate(expression):
            key = self._aggregate(expression, None)
        if key is None:
            if not _is_number(expression):
                raise refused("ORDER BY an expression over aggregates that is no number, over several shards")
            key = self._compute(expression, None)
        self.check_sorts(key)
        return SortKey(key.index, key.comparison, wanted.descending, wanted.nulls_first)

    def check_sorts(self, key: SortKey) -> None:
        """:raises Refused: for the hidden column of an aggregate that does not sort as the aggregate does."""
        if key.index in self.unsorted:
            raise refused("ORDER BY or DISTINCT of MIN or MAX of text with a collation, over several shards")

    def _group(self, expression: Any) -> SortKey | None:
        for group, key in zip(self.groups, self.keys, strict=True):
            if same(bare(group), expression):
                return key
        return None

    def _known(self, expression: Any) -> SortKey | None:
        return next((key for each, key, _ in self._made if key is not None and same(each, expression)), None)

    def blank(self, columns: Sequence[Any], width: int) -> tuple[Any, ...]:
        """The row that stands for no rows at all: for shards that answer with none, since they group more finely."""
        row: list[Any] = [None] * width
        for place, column in enumerate(columns):
            expression = bare(column)
            if _name(expression) == "coalesce":  # of an aggregate that has no value, and constants
                expression = next((each for each in map(bare, expression.clauses) if is_constant(each)), expression)
            if is_constant(expression):
                row[place] = self._constant(expression).value
        for combine in self.combines:
            if isinstance(combine, Total) and combine.how is not Aggregate.SUM:
                row[combine.raw] = 2**64 - 1 if combine.how is Aggregate.BIT_AND else 0
                if combine.visible is not None:
                    row[combine.visible] = row[combine.raw]
        return tuple(row)

    # --- aggregates

    def _is_aggregate(self, expression: Any) -> bool:
        if isinstance(expression, AggregateOrderBy):
            return _name(expression.element) in _TEXTS
        name = _name(expression)
        count = len(list(expression.clauses)) if name else 0
        return name in _AGGREGATES and (count <= 1 or name in _TEXTS)

    def _aggregate(self, expression: Any, place: int | None) -> SortKey:
        """Combine one aggregate; what it is compared by."""
        if isinstance(expression.type, TypeDecorator) and _name(expression) not in {"min", "max"}:
            raise refused(f"{_name(expression).upper()} of a column with a type of its own, over several shards")
        if isinstance(expression, AggregateOrderBy) or _name(expression) in _TEXTS:
            combine: Combine = self._texts(expression, place)
            self.combines.append(combine)
            self._made.append((expression, None, combine.raw))
            return SortKey(combine.raw, Comparison.BYTES)
        combine = self._number(expression, place)
        self.combines.append(combine)
        if isinstance(combine, Extreme):
            key = SortKey(combine.order, combine.comparison)
        else:
            key = SortKey(combine.raw, self._as_number)
        self._made.append((expression, key, combine.raw))
        return key

    @property
    def _as_number(self) -> Comparison:
        return Comparison.SQLITE if self.dialect.name == "sqlite" else Comparison.NUMBER

    def _number(self, expression: Any, place: int | None) -> Combine:
        name = _name(expression)
        own = self.hide(raw(expression))
        arguments = [bare(each) for each in expression.clauses]
        if name in {"sum", "avg"} and self.dialect.name != "sqlite" and any(map(_holds_quotient, arguments)):
            raise refused(
                f"{name.upper()} of a quotient of exact numbers, over several shards",
                "divide the sum (SUM(x) / 7), divide floating point, or do it in the application",
            )  # each shard's sum is rounded already
        if arguments and is_distinct(arguments[0]):
            argument = bare(arguments[0].element)
            if name == "count" and self.is_key(argument):
                self.counts_keys = True
                return Total(Aggregate.COUNT, place, own)
            if name in {"count", "sum", "avg"}:
                return self._different(name, argument, place, own)
            if name not in {"min", "max"}:
                raise refused(f"{name.upper()}(DISTINCT ...) over several shards")
        match name:
            case "min" | "max":
                column, comparison, sorts = extreme_column(expression, self.dialect)
                order = self.hide(column)
                if not sorts:
                    self.unsorted.add(order)
                return Extreme(name == "max", place, own, order, comparison)
            case "avg":
                (argument,) = arguments
                return Average(
                    place, own, self.hide(raw(sa.func.sum(argument))), self.hide(raw(sa.func.count(argument)))
                )
            case _ if name in _DEVIATIONS:
                return self._deviation(name, expression, arguments[0], place, own)
            case _ if name.startswith("bit_") and isinstance(stored_type(arguments[0].type, self.dialect), _BINARY):
                raise refused(f"{name.upper()} of binary text, over several shards")  # as many bytes, on MySQL
            case _:
                return Total(Aggregate(name), place, own)

    def _deviation(self, name: str, expression: Any, argument: Any, place: int | None, own: int) -> Combine:
        if not isinstance(expression.type, NullType | sa.Float) or is_distinct(argument):
            raise refused(f"{name.upper()} with a type or DISTINCT, over several shards")
        sample, root = _DEVIATIONS[name]
        number: ColumnElement[Any] = sa.type_coerce(
            argument, sa.Double()
        )  # what the server takes texts, dates and ENUMs for, too
        kind = stored_type(argument.type, self.dialect)
        inexact = isinstance(kind, sa.Float) or not isinstance(kind, sa.Integer | sa.Numeric)
        exact = raw(number + sa.literal_column("0e0"))  # as DOUBLE: MariaDB rounds those of exact numbers
        return Deviation(
            name.upper(),
            place,
            own,
            count=self.hide(raw(sa.func.count(argument))),
            mean=self.hide(raw(sa.func.avg(exact) if inexact else sa.func.sum(argument))),
            variance=self.hide(raw(sa.func.var_pop(exact))),
            zero=self.hide(raw(sa.func.max(number * sa.literal_column("0")))),
            rounds=self._of_mariadb(),
            sample=sample,
            root=root,
        )

    def _different(self, name: str, argument: Any, place: int | None, own: int) -> Combine:
        if name != "count" and not (_is_number(argument) or isinstance(argument.type, sa.Boolean | sa.Float)):
            raise refused(f"{name.upper()} of different values that are no numbers, over several shards")
        refuse_clock(argument)
        column, comparison = sort_column(argument, self.dialect)
        self.finer.append(argument)
        # FLOAT is sent rounded: its key is not
        sent = column if isinstance(stored_type(argument.type, self.dialect), sa.Float) else raw(argument)
        value = self.hide(least(sent))
        return Different(name, place, own, value, SortKey(self.hide(least(column)), comparison))

    def _texts(self, expression: Any, place: int | None) -> Texts:
        function = expression.element if isinstance(expression, AggregateOrderBy) else expression
        order_by: Any = getattr(function.clauses, "aggregate_order_by", None)
        if isinstance(expression, AggregateOrderBy):
            order_by = expression.order_by
        value, *others = (bare(each) for each in function.clauses)
        sqlite = self.dialect.name == "sqlite"
        separator = ","
        if others:
            known = self._constant(others[0]).value if is_constant(others[0]) else None
            if len(others) > 1 or not isinstance(known, str) or (not sqlite and _name(function) == "group_concat"):
                raise refused("GROUP_CONCAT of several values over several shards", "use func.aggregate_strings()")
            separator = known
        different = is_distinct(value)
        value = bare(value.element) if different else value
        if not isinstance(value.type, sa.String | sa.Integer | sa.Numeric | sa.Date | sa.DateTime | sa.Time):
            raise refused(f"GROUP_CONCAT of a {value.type!r} over several shards")
        text = sa.cast(value, sa.Text) if sqlite else sa.func.concat(value)
        order = []
        for each in () if order_by is None else order_by.clauses:
            by = self.sorted_by(each)
            if different and not same(bare(by.expression), value):
                raise refused("GROUP_CONCAT(DISTINCT ...) sorted by something else, over several shards")
            column, comparison = sort_column(by.expression, self.dialect)
            column = column if sqlite else without_null(column, comparison)
            self.finer.append(by.expression)
            order.append(SortKey(self.hide(least(column)), comparison, by.descending, by.nulls_first))
        key = None
        if different:
            column, comparison = sort_column(value, self.dialect)
            key = SortKey(self.hide(least(column)), comparison)
            self.finer.append(value)
        else:
            self.finer.append(sa.cast(text, sa.LargeBinary))  # by its bytes: equal spellings are not one value here
        shown, count = self.hide(least(raw(text))), self.hide(raw(sa.func.count(value)))
        longest = None if sqlite else self.hide(raw(sa.literal_column("@@group_concat_max_len")))
        return Texts(place, self.hide(sa.null()), shown, count, separator, tuple(order), key, longest)

    # --- expressions over aggregates

    def _compute(self, expression: Any, place: int | None) -> SortKey:
        formula = self.formula(expression)
        own = self.hide(raw(expression))
        process = expression.type.result_processor(self.dialect, None)
        if isinstance(expression.type, TypeDecorator):
            raise refused("an expression over aggregates with a type of its own, over several shards")
        pads = self._of_mariadb() if isinstance(expression, Case) and self.dialect.name != "sqlite" else None
        self.computed.append(Computed(place, own, formula, process, pads))
        key = SortKey(own, self._as_number)
        self._made.append((expression, key, own))
        return key

    def formula(self, expression: Any, *, compared: bool = False) -> Formula:
        """A number made of aggregates.

        :param compared: it is not shown, but compared with another.
        :raises Refused: for what only the database can work out.
        """
        expression = bare(expression)
        if is_constant(expression):
            return self._constant(expression)
        if self._is_aggregate(expression):
            place = self._aggregated(expression)
            return self._compared(place) if compared and _name(expression) == "avg" else place
        group = self._group(expression)
        if group is not None and _is_number(expression):
            return Place(self.hide(least(raw(expression))))
        match expression:
            case BinaryExpression() if expression.operator in _ARITHMETIC:
                self._check_digits(expression.left, expression.right)
                arguments = (self.formula(expression.left), self.formula(expression.right))
                return self._in_range(Call(_ARITHMETIC[expression.operator], arguments), expression)
            case BinaryExpression() if expression.operator is operators.truediv:
                arguments = (self.formula(expression.left), self.formula(expression.right))
                if self.dialect.name == "sqlite":
                    return Call(formulas.divide_floats, arguments)
                self._check_digits(expression.left, expression.right)
                if self._digits_vary(expression.left):
                    raise refused(
                        "a quotient of a CASE or COALESCE of numbers with different digits, over several shards",
                        "give its values the same number of digits after the point, or do it in the application",
                    )
                digits = Place(self.hide(raw(sa.literal_column("@@div_precision_increment"))))
                return self._in_range(Call(formulas.divide, (*arguments, digits)), expression)
            case UnaryExpression() if expression.operator is operators.neg:
                return Call(formulas.negate, self._values([expression.element], compared=compared))
            case FunctionElement() if _name(expression) in {"coalesce", "ifnull"}:
                self._check_choice(*expression.clauses)
                values = self._values(expression.clauses, compared=compared)
                return Call(formulas.coalesce, (Constant(self._padding(expression)), *values))
            case Case() if expression.value is None:
                return self._case(expression, compared=compared)
        raise refused(
            f"{_name(expression).upper() or 'a column'} beside aggregates, over several shards",
            "select aggregates, GROUP BY columns, numbers made of them with + - * / and COALESCE, or group by the key",
        )

    def _check_digits(self, *operands: Any) -> None:
        """A quotient is shown with fewer digits than the server goes on with (see `formulas`).

        :raises Refused: for arithmetic on one.
        """
        if any(map(self._hides_digits, operands)):
            raise refused(
                "arithmetic on a quotient or an AVG, over several shards",
                "multiply before dividing (SUM(x) * 100 / COUNT(*)), or do it in the application",
            )

    def _values(self, expressions: Iterable[Any], *, compared: bool) -> tuple[Formula, ...]:
        """The values that an expression is, or may be.

        :raises Refused: where it is compared, for an AVG: inside of expressions servers compare it now with the digits
            that they show, now with others.
        """
        expressions = list(expressions)
        if compared and any(_name(bare(each)) == "avg" and self._hides_digits(each) for each in expressions):
            raise refused(
                "HAVING that compares an expression over an AVG, over several shards",
                "compare the AVG itself with =, < or >, or SUM(x) with COUNT(x) * number",
            )
        return tuple(self.formula(each, compared=compared) for each in expressions)

    def _check_choice(self, *values: Any) -> None:
        """An exact number that is chosen among floating point ones becomes one, with the digits that were hidden.

        :raises Refused: for a quotient beside floating point.
        """
        if any(map(self._hides_digits, values)) and any(map(self._is_floating, values)):
            raise refused(
                "a quotient or an AVG of exact numbers that may also be floating point, over several shards",
                "give the other values as Decimal, or do it in the application",
            )

    def _check_compared(self, *operands: Any, listed: bool) -> None:
        """Servers compare a quotient with other digits than they show: MariaDB in BETWEEN and IN and with floating
        point (seen on MariaDB 10.11); an AVG in BETWEEN and IN.

        :param listed: in BETWEEN or IN.
        :raises Refused: for such a comparison.
        """
        hiding = [each for each in map(bare, operands) if self._hides_digits(each)]
        floating = any(_name(each) != "avg" for each in hiding) and any(map(self._is_floating, operands))
        if hiding and (listed or floating):
            raise refused(
                "HAVING with a quotient or an AVG in BETWEEN or IN, or a quotient beside floating point, over several "
                "shards",
                "compare it with =, < or > and numbers given as Decimal, or SUM(x) with COUNT(x) * number",
            )

    def _padding(self, choice: FunctionElement[Any]) -> int | None:
        """Digits after the point that each value of a COALESCE is shown with; None where the shards have to say."""
        scales = {self._scale(each) for each in map(bare, choice.clauses) if not _is_null(each)}
        return None if None in scales or -1 in scales else max(scales, default=0)  # type: ignore[type-var]

    def _pads(self, expression: Any) -> bool:
        """Whether a COALESCE in it may choose a number with fewer digits than it is shown with, which only the shards
        know.
        """
        expression = bare(expression)
        match expression:
            case BinaryExpression():
                return self._pads(expression.left) or self._pads(expression.right)
            case UnaryExpression():
                return self._pads(expression.element)
            case FunctionElement() if _name(expression) in {"coalesce", "ifnull"}:
                shown = [each for each in map(bare, expression.clauses) if not _is_null(each)]
                unknown = len(shown) > 1 and self._padding(expression) is None and not self._is_floating(expression)
                return unknown or any(map(self._pads, shown))
        return False

    def _hides_digits(self, expression: Any) -> bool:
        """Whether the server has more digits of it than it shows; floating point hides none."""
        return self.dialect.name != "sqlite" and _is_quotient(expression) and not self._is_floating(expression)

    def _is_floating(self, expression: Any) -> bool:
        """Whether it is floating point to the server, whatever type SQLAlchemy was told of an aggregate."""
        expression = bare(expression)
        if is_constant(expression):
            return isinstance(self._constant(expression).value, float)
        match expression:
            case BinaryExpression():
                return self._is_floating(expression.left) or self._is_floating(expression.right)
            case UnaryExpression():
                return self._is_floating(expression.element)
            case Case():
                values = [then for _, then in expression.whens] + [expression.else_]
                return any(self._is_floating(each) for each in values if each is not None)
            case FunctionElement() if _name(expression) in {"coalesce", "ifnull"}:
                return any(map(self._is_floating, expression.clauses))
            case FunctionElement() if _name(expression) in {"sum", "avg", "min", "max"}:
                (argument,) = map(bare, expression.clauses)
                return _is_float(argument.element if is_distinct(argument) else argument)
        return _name(expression) in _DEVIATIONS or isinstance(expression.type, sa.Float)

    def _digits_vary(self, expression: Any) -> bool:
        """Whether a CASE or COALESCE in it may choose a number with fewer digits than its type has: a quotient has as
        many as the type says, and more.
        """
        expression = bare(expression)
        match expression:
            case BinaryExpression():
                return self._digits_vary(expression.left) or self._digits_vary(expression.right)
            case UnaryExpression():
                return self._digits_vary(expression.element)
            case Case():
                values = [then for _, then in expression.whens] + [expression.else_]
            case FunctionElement() if _name(expression) in {"coalesce", "ifnull"}:
                values = list(expression.clauses)
            case _:
                return False
        shown = [bare(each) for each in values if each is not None and not self._is_nothing(each)]
        if any(self._digits_vary(each) for each in shown):
            return True
        scales = {self._scale(each) for each in shown}
        if scales != {0}:
            self.asks_shards = "a quotient with a default"  # the shards' own values say with how many digits 0 is shown
        return len(shown) > 1 and (None in scales or len(scales) > 1)

    def _is_nothing(self, expression: Any) -> bool:
        """NULL, or the number 0, whose quotients are 0 with any number of digits."""
        expression = bare(expression)
        if not is_constant(expression):
            return False
        value = self._constant(expression).value
        return value is None or (type(value) is int and value == 0)

    def _scale(self, expression: Any) -> int | None:
        """Digits after the point; -1 of floating point, None where they are not known."""
        if is_constant(expression):
            value = self._constant(expression).value
            if isinstance(value, Decimal):
                return max(0, -int(value.as_tuple().exponent))
            return {int: 0, float: -1}.get(type(value))
        match expression:
            case UnaryExpression():
                return self._scale(bare(expression.element))
            case BinaryExpression():
                both = {self._scale(bare(each)) for each in (expression.left, expression.right)}
                return 0 if both == {0} and not _divides(expression) else None
            case FunctionElement() if _name(expression) in {"coalesce", "ifnull"}:
                return self._padding(expression)
            case Case():
                return None
        if _name(expression) == "count":
            return 0
        if _name(expression) in {"sum", "min", "max"}:
            (expression,) = map(bare, expression.clauses)
            expression = bare(expression.element) if is_distinct(expression) else expression
        if isinstance(expression.type, sa.Integer | sa.Float):
            return 0 if isinstance(expression.type, sa.Integer) else -1
        return expression.type.scale if isinstance(expression, ColumnClause) and _is_number(expression) else None

    def _case(self, expression: Case[Any], *, compared: bool) -> Formula:
        values = [then for _, then in expression.whens] + ([] if expression.else_ is None else [expression.else_])
        self._check_choice(*values)
        if self.dialect.name != "sqlite" and any(map(self._pads, values)):
            raise refused(
                "a CASE of a COALESCE whose values may have different digits, over several shards",
                "give its values the same number of digits after the point, or do it in the application",
            )
        if any(self._scale(each) != 0 for each in map(bare, values) if not _is_null(each)):
            self.asks_shards = "a CASE of numbers with digits after the point"
        parts: list[Formula] = []
        for when, then in expression.whens:
            parts += (self.test(when), *self._values([then], compared=compared))
        if expression.else_ is None:
            return Call(formulas.first_true, (*parts, Constant(None)))
        return Call(formulas.first_true, (*parts, *self._values([expression.else_], compared=compared)))

    def _compared(self, average: Place) -> Place:
        """Where comparisons find an AVG: servers compare it with other digits than they show."""
        if self.dialect.name == "sqlite":
            return average  # floating point
        for number, combine in enumerate(self.combines):
            if isinstance(combine, Average | Different) and combine.raw == average.index:
                if combine.compared is None:
                    combine = replace(combine, compared=self._of_mariadb())
                    self.combines[number] = combine
                return Place(combine.compared or 0)
        return average

    def _of_mariadb(self) -> int:
        """A hidden column that tells the servers apart."""
        return self.hide(raw(sa.func.version().like("%MariaDB%")))

    def _in_range(self, call: Call, expression: BinaryExpression[Any]) -> Call:
        if self.dialect.name == "sqlite":
            return Call(formulas.as_sqlite, (call,))
        types = [stored_type(each.type, self.dialect) for each in (expression.left, expression.right)]
        unsigned = any(isinstance(each, sa.Integer) and getattr(each, "unsigned", False) for each in types)
        return Call(formulas.in_range, (call, Constant(unsigned), *call.arguments))

    def _aggregated(self, expression: Any) -> Place:
        if not _is_number(expression):
            raise refused(f"{_name(expression).upper()} of what is not a number in an expression, over several shards")
        return self._place_of(expression)

    def _place_of(self, expression: Any) -> Place:
        """Where an aggregate's combined value stands; it is combined once, however often it is used."""
        for each, _, place in self._made:
            if same(each, expression):
                return Place(place)
        self._aggregate(expression, None)
        return Place(self._made[-1][2])

    def _constant(self, expression: Any) -> Constant:
        if isinstance(expression, Null):
            return Constant(None)
        if isinstance(expression, BindParameter):
            value = self.binds.of(expression)
            if value is None or isinstance(value, int | float | Decimal | str | bytes):
                return Constant(value)
        elif _NUMBER.fullmatch(expression.name):
            return Constant(Decimal(expression.name) if "." in expression.name else int(expression.name))
        raise refused("a constant that is not a number in an expression over aggregates, over several shards")

    # --- HAVING

    def test(self, clause: Any) -> Formula:
        """A condition on a group: true, false or NULL."""
        clause = bare(clause)
        if not contents_of([clause]).aggregates:
            # every shard says the same of a group's own columns
            self.asks_shards = "a condition without an aggregate"
            return Place(self.hide(least(raw(sa.type_coerce(clause, sa.Integer)))))
        match clause:
            case BooleanClauseList():
                how = formulas.both if clause.operator is operators.and_ else formulas.either
                return Call(how, tuple(self.test(each) for each in clause.clauses))
            case UnaryExpression() if clause.operator is operators.inv:
                return Call(formulas.negated, (self.test(clause.element),))
            case BinaryExpression():
                return self._comparison(clause)
        raise _untold()

    def _comparison(self, clause: BinaryExpression[Any]) -> Formula:
        operator: Any = clause.operator
        right: Any = bare(clause.right)
        if operator in (operators.is_, operators.is_not) and isinstance(right, Null):
            how = formulas.is_null if operator is operators.is_ else formulas.is_not_null
            return Call(how, (self._present(clause.left),))
        left = self._operand(clause.left)
        if operator in _COMPARISONS:
            self._check_compared(clause.left, right, listed=False)
            return Call(_COMPARISONS[operator], (left, self._operand(right)))
        found: Formula
        if operator in (operators.between_op, operators.not_between_op) and isinstance(right, ExpressionClauseList):
            self._check_compared(clause.left, *right.clauses, listed=True)
            found = Call(formulas.between, (left, *(self._operand(each) for each in right.clauses)))
            return Call(formulas.negated, (found,)) if operator is operators.not_between_op else found
        if operator in (operators.in_op, operators.not_in_op) and isinstance(right, BindParameter) and right.expanding:
            self._check_compared(clause.left, listed=True)
            values = self.binds.of(right)
            if all(isinstance(value, int | float | Decimal) or value is None for value in values):
                found = Call(formulas.one_of, (left, *map(Constant, values)))
                return Call(formulas.negated, (found,)) if operator is operators.not_in_op else found
        raise _untold()

    def _present(self, expression: Any) -> Formula:
        """Something that is NULL where the expression is."""
        expression = bare(expression)
        return self._place_of(expression) if self._is_aggregate(expression) else self.formula(expression)

    def _operand(self, expression: Any) -> Formula:
        formula = self.formula(expression, compared=True)
        if isinstance(formula, Constant) and isinstance(formula.value, str | bytes):
            raise _untold()
        return formula


_NUMBER: Final = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_TEXTS: Final = frozenset({"group_concat", "aggregate_strings"})
#: name -> (of a sample, the square root)
_DEVIATIONS: Final[Mapping[str, tuple[bool, bool]]] = {
    "std": (False, True),
    "stddev": (False, True),
    "stddev_pop": (False, True),
    "stddev_samp": (True, True),
    "variance": (False, False),
    "var_pop": (False, False),
    "var_samp": (True, False),
}
_AGGREGATES: Final = frozenset({*(each.value for each in Aggregate), "min", "max", "avg", *_DEVIATIONS, *_TEXTS})
_BINARY: Final = (sa.LargeBinary, sa.BINARY, sa.VARBINARY)
_ARITHMETIC: Final[Mapping[Any, Callable[..., Any]]] = {
    operators.add: formulas.add,
    operators.sub: formulas.subtract,
    operators.mul: formulas.multiply,
}
_COMPARISONS: Final[Mapping[Any, Callable[..., Any]]] = {
    operators.gt: formulas.greater,
    operators.ge: formulas.greater_or_equal,
    operators.lt: formulas.less,
    operators.le: formulas.less_or_equal,
    operators.eq: formulas.equal,
    operators.ne: formulas.unequal,
}


def _is_quotient(expression: Any) -> bool:
    """Whether an exact number may have more digits inside the server than it shows."""
    expression = bare(expression)
    match expression:
        case BinaryExpression():
            if _divides(expression):
                return True
            return _is_quotient(expression.left) or _is_quotient(expression.right)
        case UnaryExpression():
            return _is_quotient(expression.element)
        case Case():
            values = [then for _, then in expression.whens] + [expression.else_]
            return any(_is_quotient(each) for each in values if each is not None)
        case FunctionElement() if _name(expression) in {"coalesce", "ifnull", "min", "max"}:
            return any(map(_is_quotient, expression.clauses))
    return _name(expression) == "avg"


def _holds_average(expression: Any) -> bool:
    return any(_name(each) == "avg" for each in visitors.iterate(expression))


def _divides(expression: BinaryExpression[Any]) -> bool:
    operator: Any = expression.operator
    return operator is operators.truediv or getattr(operator, "opstring", "").strip() == "/"


def _is_float(expression: Any) -> bool:
    expression = bare(expression)
    if isinstance(expression.type, sa.Float):
        return True
    return isinstance(expression, BinaryExpression) and (_is_float(expression.left) or _is_float(expression.right))


def _holds_quotient(expression: Any) -> bool:
    """Whether an exact number is, or is made of, a quotient: a server sums up more digits of it than it shows."""
    expression = bare(expression)
    if isinstance(expression, Cast) or _is_float(expression) or isinstance(expression.type, sa.Boolean):
        return False
    match expression:
        case BinaryExpression() if _divides(expression):
            return True
        case Case():
            values = [then for _, then in expression.whens] + [expression.else_]
            return any(_holds_quotient(each) for each in values if each is not None)
        case FunctionElement() if _name(expression) in {"round", "truncate", "floor", "ceil", "ceiling", "count"}:
            return False
        case FunctionElement():
            return any(map(_holds_quotient, expression.clauses))
        case ScalarSelect():
            return any(_holds_quotient(each) or _is_quotient(each) for each in expression.element.selected_columns)
        case ColumnClause():  # servers put a plain subquery's expression in place of its column
            return any(_holds_quotient(each) for each in expression._proxies)  # noqa: SLF001 - no public reader
    return any(_holds_quotient(each) for each in expression.get_children() if isinstance(each, ColumnElement))


def is_constant(expression: Any) -> bool:
    """Whether it is the same for every row: a bound value, NULL, or a literal."""
    return isinstance(expression, BindParameter | Null) or bool(getattr(expression, "is_literal", False))


def _is_null(expression: Any) -> bool:
    return isinstance(expression, Null)


def least(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """The one value of a group: MIN says so to ONLY_FULL_GROUP_BY."""
    return raw(sa.func.min(column))


def refused(what: str, hint: str = "pin the statement to one shard, or do this part in the application") -> Refused:
    """A refusal."""
    return Refused(RoutingError, what, hint)


def refuse_clock(expression: ClauseElement) -> None:
    """:raises Refused: for what tells rows apart by the time alone: one database has one, each shard its own."""
    columns = (each for each in visitors.iterate(expression) if isinstance(each, ColumnClause) and not each.is_literal)
    if contents_of([expression]).functions & VOLATILE and next(columns, None) is None:
        raise refused(
            "rows of several shards told apart by the time, which is another on each",
            "pass the time as a value, or leave it out of DISTINCT, GROUP BY and UNION",
        )


def _untold() -> Refused:
    return refused(
        "HAVING over several shards",
        "compare aggregates and numbers made of them with numbers, group by the key, or filter in the application",
    )


def _is_number(expression: Any) -> bool:
    if _name(expression) in {*_DEVIATIONS, "count", "avg"} or _name(expression).startswith("bit_"):
        return True
    return isinstance(expression.type, sa.Integer | sa.Numeric) and not isinstance(expression.type, sa.Boolean)


def _name(expression: Any) -> str:
    return str(getattr(expression, "name", "")).lower() if isinstance(expression, FunctionElement) else ""
