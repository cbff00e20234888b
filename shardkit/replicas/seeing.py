"""The position of what a transaction sees on a replica, found out along with its first read.

A replica that the relay fills has its position in a table of its own, which a transaction sees as it sees the data: a
subquery in front of the columns of a SELECT tells it at no round trip. The driver takes that column away again
(`shardkit.drivers`).
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection
from sqlalchemy.sql.elements import BindParameter, Grouping, Label, TextClause, UnaryExpression
from sqlalchemy.sql.selectable import Select

from shardkit.drivers import POSITION_COLUMN
from shardkit.gtid import Position
from shardkit.replicas.positions import PositionQuery

#: Where a connection keeps what its transaction sees.
SEEING: Final = "shardkit_seeing"
_LEVEL: Final = "shardkit_isolation_level"
_SELECT: Final = "SELECT "
_DISTINCT: Final = "SELECT DISTINCT "
#: Isolation levels in which a transaction sees one state of the data from its first read to its end.
_ONE_SNAPSHOT: Final = frozenset({"REPEATABLE READ", "SERIALIZABLE"})


class Seen:
    """What one transaction has seen on one replica.

    :param query: how the replica is asked for its position.
    :param each: whether every statement sees a state of its own.
    :ivar text: the position as the replica told it.
    """

    __slots__ = ("each", "in_front", "known", "query", "text")

    def __init__(self, query: PositionQuery, *, each: bool) -> None:
        self.query = query
        self.each = each
        self.in_front = False
        self.known = False
        self.text: Any = None

    @property
    def wanted(self) -> bool:
        """Whether the next statement has to tell the position."""
        return self.each or not self.known

    def note(self, text: Any) -> None:
        """The position as the replica told it."""
        self.text = text
        self.known = True

    @property
    def position(self) -> Position | None:
        """None where nothing was read, or the replica does not know."""
        return self.query.read(self.text)


def watch(connection: Connection, query: PositionQuery) -> Seen:
    """From now on note what is seen on this connection, until `unwatch`."""
    dialect: Any = connection.dialect
    level = (
        connection._execution_options.get("isolation_level")  # noqa: SLF001 - its public reader copies all of them
        or dialect._on_connect_isolation_level  # noqa: SLF001 - has no public reader
        or connection.info.get(_LEVEL)
    )
    if level is None:  # once for each connection: an application's own handlers may have set it
        level = connection.info[_LEVEL] = connection.get_isolation_level()
    seen = Seen(query, each=level not in _ONE_SNAPSHOT)
    connection.info[SEEING] = seen
    return seen


def unwatch(connection: Connection) -> None:
    """Stop noting."""
    if not connection.closed and not connection.invalidated:
        connection.info.pop(SEEING, None)


def before(
    connection: Connection, _cursor: Any, statement: str, parameters: Any, context: Any, _executemany: bool
) -> tuple[str, Any]:
    """SQLAlchemy's ``before_cursor_execute`` of replicas: ask for the position in front of the columns."""
    seen: Seen | None = connection.info.get(SEEING)
    if seen is None or not seen.wanted or not seen.query.in_snapshot:
        return statement, parameters
    driver: Any = connection.connection.driver_connection
    if context is not None and _is_stream(context):
        if not seen.each:
            _ask(connection, seen)  # it opens the snapshot that the stream is read from
    elif _takes_a_column(context, statement) and hasattr(driver, "position"):
        start = _DISTINCT if statement.startswith(_DISTINCT) else _SELECT
        seen.in_front = True
        driver.position = None
        return f"{start}{seen.query.expression} AS {POSITION_COLUMN}, {statement[len(start) :]}", parameters
    return statement, parameters


def after(
    connection: Connection, _cursor: Any, _statement: str, _parameters: Any, context: Any, _executemany: bool
) -> None:
    """SQLAlchemy's ``after_cursor_execute`` of replicas: keep the position, or ask for it where it did not come."""
    seen: Seen | None = connection.info.get(SEEING)
    if seen is None or not seen.wanted:
        return
    if seen.in_front:
        seen.in_front = False
        driver: Any = connection.connection.driver_connection
        if driver.position is not None:
            seen.note(driver.position)
            return
    if context is not None and _is_stream(context):
        seen.note(None)  # nothing can be asked while its rows come
        return
    _ask(connection, seen)


def _ask(connection: Connection, seen: Seen) -> None:
    cursor = connection.connection.cursor()
    try:
        cursor.execute(f"SELECT {seen.query.expression}")
        row = cursor.fetchone()
    finally:
        cursor.close()
    seen.note(None if row is None else row[0])


def _is_stream(context: Any) -> bool:
    return bool(getattr(context, "_is_server_side", False))


def _takes_a_column(context: Any, statement: str) -> bool:
    """Whether a further column may stand in front: a plain SELECT that SQLAlchemy has written."""
    compiled = None if context is None else context.compiled
    if compiled is None or not statement.startswith(_SELECT) or statement != context.statement:
        return False  # the last: a handler of the application has changed it
    known: bool | None = compiled.__dict__.get(POSITION_COLUMN)
    if known is None:
        known = _has_room(compiled)
        setattr(compiled, POSITION_COLUMN, known)
    return known


def _has_room(compiled: Any) -> bool:
    select: Any = compiled.statement
    if type(select) is not Select:
        return False
    final = getattr(compiled.compile_state, "statement", select)  # what the ORM has made of it
    return not any(
        each._prefixes or any(map(_may_be_a_number, (*each._order_by_clauses, *each._group_by_clauses)))  # noqa: SLF001 - no public reader
        for each in {id(each): each for each in (select, final) if isinstance(each, Select)}.values()
    )


def _may_be_a_number(clause: Any) -> bool:
    """Whether a term of ORDER BY or GROUP BY may name a column by its number, which a further column would shift."""
    while isinstance(clause, UnaryExpression | Label | Grouping):
        clause = clause.element
    return isinstance(clause, TextClause | BindParameter) or bool(getattr(clause, "is_literal", False))
