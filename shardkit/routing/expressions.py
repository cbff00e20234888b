"""What stands inside expressions: subqueries, functions, windows, aggregates, and what cannot be looked into.

Only elements that are known are taken for what they are. Raw SQL is not read here: ``AND`` does not put parentheses
around ``text("a = 1 OR b = 2")``, so even beside ``user_id = 5`` such a text can mean any row of any table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

import sqlalchemy as sa
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import (
    AbstractTextClause,
    AggregateOrderBy,
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Case,
    Cast,
    ClauseElement,
    ClauseList,
    CollationClause,
    ColumnClause,
    ElementList,
    ExpressionClauseList,
    Extract,
    False_,
    FrameClause,
    FunctionFilter,
    Grouping,
    Label,
    Null,
    Over,
    Slice,
    True_,
    TypeClause,
    TypeCoerce,
    UnaryExpression,
)
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.sql.selectable import CompoundSelect, Exists, ScalarSelect, SelectStatementGrouping

from shardkit.routing.functions import (
    AGGREGATES,
    BARE_CLOCKS,
    CLOCKS_BY_ARGUMENT,
    OF_THE_CONNECTION,
    PURE,
    VOLATILE,
)

#: Where an expression stands: in an AND of a predicate, under an OR of one, or where its value is used.
Place: TypeAlias = Literal["and", "or", "value"]


@dataclass(frozen=True, slots=True)
class Subselect:
    """A subquery in an expression.

    :param member: the ``x`` of ``x IN (subquery)``, where that is asked of the rows (not under NOT).
    """

    select: Any
    place: Place
    member: ClauseElement | None = None


@dataclass
class Contents:
    """What expressions hold, subqueries' own contents not counted.

    :param functions: the names of the functions called.
    :param windows: for each window function, what it is partitioned by.
    :param unknown: those of them that are not named in `shardkit.routing.functions`.
    """

    subqueries: list[Subselect] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)
    windows: list[tuple[ClauseElement, ...]] = field(default_factory=list)
    aggregates: bool = False

    @property
    def may_aggregate(self) -> bool:
        """Whether many rows may become one."""
        return self.aggregates or bool(self.unknown)


def contents_of(elements: Iterable[ClauseElement], place: Place = "value") -> Contents:
    """Look through expressions.

    :param place: where they stand.
    """
    contents = Contents()
    for element in elements:
        _look(element, place, contents)
    return contents


_MAY_SELECT: Final = re.compile(r"\b(?:select|table|with)\b", re.ASCII | re.IGNORECASE)


def may_select(value: ClauseElement) -> bool:
    """Whether a value that is written may read rows: by a subquery, also one in raw SQL, or by what is not known."""
    contents = contents_of([value])
    if contents.subqueries or any(each.startswith("a ") for each in contents.unreadable):
        return True
    return bool(contents.unreadable) and any(map(_MAY_SELECT.search, _raw_texts(value)))


def _raw_texts(value: ClauseElement) -> Iterator[str]:
    for each in visitors.iterate(value):
        operator = getattr(each, "operator", None)
        for text in (getattr(each, "text", None), getattr(each, "name", None), getattr(operator, "opstring", None)):
            if isinstance(text, str):
                yield text


_LEAVES = (BindParameter, Null, True_, False_, TypeClause, CollationClause, FrameClause)
_CONTAINERS = (
    AggregateOrderBy,
    Case,
    Cast,
    ClauseList,
    ElementList,
    ExpressionClauseList,
    Extract,
    FunctionFilter,
    Label,
    Slice,
    TypeCoerce,
    UnaryExpression,
)
_SELECTS = (sa.Select, CompoundSelect, ScalarSelect, SelectStatementGrouping)
#: Operators of `ColumnElement.op` that bind as tightly as a comparison and say nothing else.
_PLAIN_OPERATORS: Final = frozenset(
    {"REGEXP", "RLIKE", "LIKE", "GLOB", "DIV", "MOD", "&", "|", "^", "<<", ">>", "%", "<=>", "->", "->>"}
    | {"+", "-", "*", "/", "=", "!=", "<>", "<", ">", "<=", ">="}
)
_ONE_NAME: Final = re.compile(
    r"(?:[A-Za-z_]\w*|`[^`]+`)(?:\.(?:[A-Za-z_]\w*|`[^`]+`))*|\d+(?:\.\d+)?|'[^'\\]*'|\*", re.ASCII
)
_PLAIN_TEXT: Final = re.compile(
    r"""\s*(?!(?:select|exists|not|case|or|xor|and)\b)[\w.`]+\s*
        (?:=|<=>|<>|!=|<=|>=|<|>|\blike\b|\bis\b(?:\s+not)?)\s*
        (?::\w+|-?\d+(?:\.\d+)?|'[^'\\]*'|null|true|false|[A-Za-z_][\w.`]*)\s*""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
_BARE_CLOCK: Final = re.compile(rf"(?<![\w.`])(?:{'|'.join(sorted(BARE_CLOCKS))})(?![\w.`])", re.ASCII | re.IGNORECASE)


def _look(element: Any, place: Place, contents: Contents) -> None:
    match element:
        case ColumnClause():
            if element.is_literal and not _ONE_NAME.fullmatch(element.name):
                contents.unreadable.append("literal_column() with more than a name or a number")
            elif element.is_literal and element.name.casefold() in BARE_CLOCKS:
                contents.functions.add(element.name.casefold())
        case AbstractTextClause():
            _text(element, place, contents)
        case Grouping():
            _look(element.element, place, contents)
        case LambdaElement():
            _look(element._resolved, place, contents)  # noqa: SLF001 - the expression that it stands for
        case Exists():
            contents.subqueries.append(Subselect(element.element, place))
        case BooleanClauseList():
            inner: Place = "value" if place == "value" else place if element.operator is operators.and_ else "or"
            for clause in element.clauses:
                _look(clause, inner, contents)
        case BinaryExpression():
            _binary(element, place, contents)
        case Over():
            _window(element, contents)
        case FunctionElement():
            _function(element, contents)
        case _ if isinstance(element, _SELECTS):
            contents.subqueries.append(Subselect(element, "value"))
        case _ if isinstance(element, _LEAVES):
            pass
        case _ if element.__visit_name__ in {"label_reference", "textual_label_reference"}:
            _children(element, contents)
        case _ if isinstance(element, _CONTAINERS):
            _children(element, contents)
        case _:
            contents.unreadable.append(f"a {type(element).__name__}")


def _children(element: ClauseElement, contents: Contents) -> None:
    for child in element.get_children():
        if isinstance(child, ClauseElement):
            _look(child, "value", contents)


def _text(element: AbstractTextClause, place: Place, contents: Contents) -> None:
    text = getattr(element, "text", "")
    pattern = _ONE_NAME if place == "value" else _PLAIN_TEXT
    if not isinstance(element, sa.TextClause) or not pattern.fullmatch(text):
        contents.unreadable.append("text()")
    contents.functions |= {found.casefold() for found in _BARE_CLOCK.findall(text)}


def _binary(element: BinaryExpression[Any], place: Place, contents: Contents) -> None:
    operator = element.operator
    if isinstance(operator, custom_op) and operator.opstring.upper().strip() not in _PLAIN_OPERATORS:
        contents.unreadable.append(f"the operator {operator.opstring!r}")
    right: Any = element.right
    while isinstance(right, Grouping):
        right = right.element
    if operator is operators.in_op and place != "value" and isinstance(right, _SELECTS):
        _look(element.left, "value", contents)
        contents.subqueries.append(Subselect(right, place, member=element.left))
        return
    _look(element.left, "value", contents)
    _look(right, "value", contents)


def _window(element: Over[Any], contents: Contents) -> None:
    contents.windows.append(() if element.partition_by is None else tuple(element.partition_by.clauses))
    for child in element.get_children():
        # the function itself is no aggregate here, but its arguments may hold some
        _arguments(child, contents) if child is element.element else _look_if_clause(child, contents)


def _arguments(function: Any, contents: Contents) -> None:
    if isinstance(function, FunctionElement):
        for argument in function.clauses:
            _look(argument, "value", contents)
    else:
        _look(function, "value", contents)


def _look_if_clause(child: Any, contents: Contents) -> None:
    if isinstance(child, ClauseElement):
        _look(child, "value", contents)


def _function(element: FunctionElement[Any], contents: Contents) -> None:
    arguments: Sequence[ClauseElement] = tuple(element.clauses)
    for argument in arguments:
        _look(argument, "value", contents)
    if type(element).__module__.startswith("shardkit."):
        return
    name = _name(element)
    contents.functions.add(name)
    if _reads_clock(name, arguments):
        contents.functions.add("now")
    if name in AGGREGATES and not (name in {"max", "min"} and len(arguments) > 1):  # SQLite's scalar MAX(a, b)
        contents.aggregates = True
    elif name not in PURE and name not in VOLATILE and name not in OF_THE_CONNECTION:
        contents.unknown.add(name)


def _reads_clock(name: str, arguments: Sequence[ClauseElement]) -> bool:
    """Whether a function of times may be given none: a constant may be SQLite's ``'now'``."""
    place = CLOCKS_BY_ARGUMENT.get(name)
    if place is None:
        return False
    if len(arguments) <= place:
        return True
    inside = visitors.iterate(arguments[place])
    return name != "unix_timestamp" and not any(isinstance(each, ColumnClause) for each in inside)


def is_distinct(element: Any) -> bool:
    """Whether this is ``sqlalchemy.distinct(x)``: as a column, outside a function, it makes the SELECT a DISTINCT."""
    while isinstance(element, Grouping | Label):
        element = element.element
    return isinstance(element, UnaryExpression) and element.operator is operators.distinct_op


def same(one: ClauseElement, other: ClauseElement) -> bool:
    """Whether two expressions are alike."""
    try:
        return bool(one.compare(other))
    except AttributeError:  # SQLAlchemy 2.1 cannot compare attributes of two mapped classes: they are not alike
        return False


def _name(function: FunctionElement[Any]) -> str:
    packages = tuple(getattr(function, "packagenames", ()))
    return ".".join((*packages, str(getattr(function, "name", type(function).__name__)))).lower()


# --- what hangs on a statement beside its clauses -----------------------------------------------------------------

#: What users may hang on a statement as raw SQL without changing what it means. SET_VAR may (sql_select_limit).
_HARMLESS = re.compile(
    r"/\*\+(?![^*/]*\bSET_VAR\b)[^*/]*\*/|SQL_NO_CACHE|STRAIGHT_JOIN|HIGH_PRIORITY|SQL_(BIG|SMALL|BUFFER)_RESULT",
    re.IGNORECASE,
)
_INDEX_HINT = re.compile(r"(USE|FORCE|IGNORE)\s+(INDEX|KEY)\b[^()]*\([^()]*\)", re.IGNORECASE)


def raw_clauses(statement: Any) -> list[str]:
    """The parts of a statement that are raw SQL, or that the router does not know."""
    found = []
    for name in ("_prefixes", "_suffixes"):
        for element, _ in getattr(statement, name, ()):
            if not _HARMLESS.fullmatch(str(getattr(element, "text", "?")).strip()):
                found.append(f"a {name[1:-2]} of raw SQL")
    if any(not _HARMLESS.fullmatch(text.strip()) for _, text in getattr(statement, "_statement_hints", ())):
        found.append("a statement hint of raw SQL")
    if any(not _INDEX_HINT.fullmatch(text.strip()) for text in _table_hints(statement)):
        found.append("a table hint of raw SQL")
    clauses = ("_post_select_clause", "_pre_columns_clause", "_post_body_clause", "_independent_ctes")
    found += [f"{name[1:].replace('_', ' ')}" for name in clauses if getattr(statement, name, None)]
    if getattr(statement, "_distinct_on", ()):
        found.append("DISTINCT ON")
    if isinstance(statement, sa.Select) and statement._post_criteria_clause is not None:  # noqa: SLF001 - no public reader
        found.append("a clause of a dialect's own")
    return found


def _table_hints(statement: Any) -> Iterable[str]:
    return (text for text in (getattr(statement, "_hints", None) or {}).values())
