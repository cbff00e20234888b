"""The connections that a flush hands out: SQLAlchemy writes rows on them, and handlers of its events are given them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, SelectBase, TextClause, Update
from sqlalchemy.engine import CursorResult
from sqlalchemy.sql.dml import UpdateBase

from shardkit.errors import RoutingError

if TYPE_CHECKING:
    from shardkit.session.session import ClusterSession

#: Shard -> its connection, in the map's order; opened when it is asked for.
Connections = Callable[[], Mapping[str, Connection]]


class AssociationConnection:
    """What a flush writes the rows of many-to-many tables on: each goes where its key says, since no object does."""

    def __init__(self, session: ClusterSession) -> None:
        self._session = session

    def execute(self, statement: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
        """As `sqlalchemy.Connection.execute`, over shards."""
        if isinstance(statement, Update):
            rows = _changes(rows)
        return self._session.execute_in_flush(statement, rows)


def _changes(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What follows a primary key that has changed: SQLAlchemy sets all columns of the row between, also those that stay
    as they are. The shard key may be among these."""
    same = {name for name in rows[0] if all(f"old_{name}" in row and row[name] == row[f"old_{name}"] for row in rows)}
    return [{name: value for name, value in row.items() if name not in same} for row in rows]


class HandedConnection(Connection):
    """What a flush writes an object on, where others than SQLAlchemy see it, or where it is not one connection.

    The flush's own statements go to the object's shards, and the first one answers. Statements of a handler of its
    events go where the rows are that they are about, as those of a session do. Anything else is asked of the first
    shard's connection.

    :param session: places the statements of handlers; None: they stay on the object's shard.
    """

    def __init__(self, session: ClusterSession | None, connections: Connections) -> None:  # it opens nothing
        self._own.update(session=session, connections=connections, savepoints=[])

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN:
            return object.__getattribute__(self, name)
        return getattr(self._first, name)

    def execute(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> CursorResult[Any]:
        """As `sqlalchemy.Connection.execute`."""
        own = self._own
        options: Mapping[str, Any] = execution_options or {}
        if "compiled_cache" in options:  # the mapper's: a statement of the flush itself
            connections: Mapping[str, Connection] = own["connections"]()
            results = [each.execute(statement, parameters, execution_options=options) for each in connections.values()]
            return results[0]
        session: ClusterSession | None = own["session"]
        if session is None or not isinstance(statement, _PLACED):
            return self._first.execute(statement, parameters, execution_options=options)
        held = any(savepoint.is_active for savepoint in own["savepoints"])
        answer: CursorResult[Any] = session.execute_in_flush(statement, parameters, options, own["connections"], held)
        return answer

    def scalar(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        """As `sqlalchemy.Connection.scalar`."""
        if not isinstance(statement, _PLACED):
            return self._first.scalar(statement, parameters, execution_options=execution_options)
        return self.execute(statement, parameters, execution_options=execution_options).scalar()

    def scalars(self, statement: Any, parameters: Any = None, *, execution_options: Any = None) -> Any:
        """As `sqlalchemy.Connection.scalars`."""
        return self.execute(statement, parameters, execution_options=execution_options).scalars()

    def execution_options(self, **options: Any) -> Any:
        """As `sqlalchemy.Connection.execution_options`: of this connection, from now on."""
        for connection in self._own["connections"]().values():
            connection.execution_options(**options)
        return self

    def begin_nested(self) -> Any:
        """As `sqlalchemy.Connection.begin_nested`.

        :raises RoutingError: for a savepoint that would be needed on several shards.
        """
        connections = self._own["connections"]()
        if len(connections) > 1:
            raise RoutingError(
                f"a savepoint of an event handler, on {len(connections)} shards",
                hint="begin it with session.begin_nested(), before the flush",
                shards=len(connections),
            )
        (connection,) = connections.values()
        savepoint = connection.begin_nested()
        self._own["savepoints"].append(savepoint)
        return savepoint

    @property
    def _own(self) -> dict[str, Any]:
        """What is this object's own, past `__getattribute__`."""
        own: dict[str, Any] = object.__getattribute__(self, "__dict__")
        return own

    @property
    def _first(self) -> Connection:
        connections: Connections = self._own["connections"]
        return next(iter(connections().values()))


_PLACED = (SelectBase, UpdateBase, TextClause)
_OWN = frozenset({"execute", "scalar", "scalars", "begin_nested", "execution_options", "_first", "_own"})
