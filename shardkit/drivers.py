"""Connections that tell the position of what was committed, and of what was read, without asking for it.

A server that tracks its session says in the packet that answers a COMMIT which transaction id it gave (MySQL Reference
Manual, "Server Tracking of Client Session State"; MariaDB Knowledge Base, "OK_Packet"). The drivers leave that part of
the packet unread: the connection classes here read it. SQLAlchemy opens them by its ``do_connect`` event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import cache
from typing import Any, Final, NoReturn

import pymysql
from pymysql.constants.COMMAND import COM_QUERY
from sqlalchemy.engine import Dialect

_Base: Any = pymysql.connections.Connection  # the stubs leave out what is used here

#: CLIENT_SESSION_TRACK: the client understands session state in OK packets.
_SESSION_TRACK: Final = 1 << 23
#: SERVER_SESSION_STATE_CHANGED: there is some in this packet.
_STATE_CHANGED: Final = 1 << 14
_SYSTEM_VARIABLE, _GTIDS = 0, 3  # kinds of session state
_LAST_GTID = b"last_gtid"
#: The column that `shardkit.session.seeing` puts in front of a SELECT; taken away again here.
POSITION_COLUMN: Final = "shardkit_position"


def gtid_in(message: bytes) -> str | None:
    """The transaction id in the last part of an OK packet: what follows the warning count."""
    try:
        _, state_at = _text(message, 0)  # for people
        state, _ = _text(message, state_at)
        at = 0
        while at < len(state):
            kind = state[at]
            body, at = _text(state, at + 1)
            if kind == _SYSTEM_VARIABLE:
                name, value_at = _text(body, 0)
                if name == _LAST_GTID:
                    return _text(body, value_at)[0].decode("ascii") or None
            elif kind == _GTIDS:
                return _text(body, 1)[0].decode("ascii") or None  # behind a byte for the encoding
    except (IndexError, UnicodeDecodeError):
        return None
    return None


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    """A length-encoded string, and where what follows it begins.

    :raises IndexError: where the data ends before.
    """
    size, at = data[at], at + 1
    if size >= 0xFC:
        width = {0xFC: 2, 0xFD: 3, 0xFE: 8}.get(size, 0)
        size, at = int.from_bytes(data[at : at + width], "little"), at + width
    if at + size > len(data):
        raise IndexError
    return data[at : at + size], at + size


def _tracking(server: str) -> str:
    """What has a server tell transaction ids."""
    if "MariaDB" in server:
        return "SET session_track_system_variables = 'last_gtid'"
    return "SET session_track_gtids = OWN_GTID"


def _ends_transaction(command: Any) -> bool:
    """Whether a command gives up the rows of a stream: it ends the transaction that they are read in."""
    words = command.encode() if isinstance(command, str) else bytes(command)
    return words in {b"COMMIT", b"ROLLBACK"} or words.startswith(b"XA ")


def _keep_rest(result: Any) -> None:
    """Read what is left of a PyMySQL stream, for whoever goes on reading it. What fails in it fails there."""
    rest: deque[Any] = deque()
    failure: pymysql.Error | None = None
    try:
        while (row := result._read_rowdata_packet_unbuffered()) is not None:  # noqa: SLF001
            rest.append(row)
    except pymysql.Error as error:
        failure = error

    def read() -> Any:
        if rest:
            return rest.popleft()
        if failure is not None:
            raise failure
        return None

    result._read_rowdata_packet_unbuffered = read  # noqa: SLF001


def _give_up(result: Any) -> None:
    """Drop what is left of a PyMySQL stream. Whoever reads on is told, rather than that there are no more rows."""
    try:
        lost = result._read_rowdata_packet_unbuffered() is not None  # noqa: SLF001
        result._finish_unbuffered_query()  # noqa: SLF001
    except pymysql.Error:  # of the stream: what comes next finds out whether the connection is lost, too
        lost = True
    if not lost:
        return

    def read() -> NoReturn:
        raise pymysql.ProgrammingError(_LEFT_BEHIND)

    result._read_rowdata_packet_unbuffered = read  # noqa: SLF001


class TellingConnection(_Base):  # type: ignore[misc]
    """A PyMySQL connection that keeps what the server says of its transactions, and the rows of a stream.

    PyMySQL drops the rows of a stream that are not read yet when the connection is used for anything else, and the
    stream then seems to end there. Relationships that are loaded on the way, and a flush, do just that.

    :ivar committed: the id of the last transaction, until it is taken.
    :ivar position: what the last SELECT with a column `POSITION_COLUMN` had there; None where it had no rows.
    :ivar tells: whether the server was asked to tell transaction ids, and does.
    """

    committed: str | None = None
    position: str | None = None
    tells = False

    def __init__(self, *arguments: Any, client_flag: int = 0, **options: Any) -> None:
        super().__init__(*arguments, client_flag=client_flag | _SESSION_TRACK, **options)

    def connect(self, sock: Any = None) -> None:
        """As PyMySQL's; then the server is asked to tell transaction ids."""
        super().connect(sock)
        try:
            self._execute_command(COM_QUERY, _tracking(self.get_server_info()))
            self._read_ok_packet()
            self.tells = True
        except (pymysql.OperationalError, pymysql.InternalError) as error:
            if not self.open or error.args[0] in _LOST:
                raise
            self.tells = False  # a server or a proxy that does not know how

    def _execute_command(self, command: int, sql: Any) -> None:
        result: Any = self._result
        if result is not None and result.unbuffered_active:
            if _ends_transaction(sql):
                _give_up(result)
            else:
                _keep_rest(result)
        super()._execute_command(command, sql)

    def _read_ok_packet(self) -> Any:
        packet = super()._read_ok_packet()
        if packet.server_status & _STATE_CHANGED:
            self.committed = gtid_in(packet.message) or self.committed
        return packet

    def _read_query_result(self, unbuffered: bool = False) -> Any:
        affected = super()._read_query_result(unbuffered)
        result: Any = self._result
        description = result.description
        if description is None:
            if result.message and result.server_status & _STATE_CHANGED:
                self.committed = gtid_in(result.message) or self.committed
        elif description[0][0] == POSITION_COLUMN and not unbuffered:
            rows = result.rows
            self.position = rows[0][0] if rows else None
            result.description = description[1:]
            result.fields = result.fields[1:]
            result.rows = tuple(row[1:] for row in rows)
        return affected


_LOST: Final = frozenset({2006, 2013})
_LEFT_BEHIND: Final = "the transaction that these rows were read in has ended before the last of them"


class _Left:
    """Stands for what is left of an asyncmy stream: rows, and what its reader is told after them."""

    def __init__(self, rows: Iterable[Any], failure: Exception | None) -> None:
        self._rows = deque(rows)
        self._failure = failure

    async def _read_rowdata_packet_unbuffered(self) -> Any:
        if self._rows:
            return self._rows.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    def _take_pending_rows(self, limit: int | None = None) -> list[Any]:
        """Rows that need no reading."""
        count = len(self._rows) if limit is None else max(0, min(limit, len(self._rows)))
        return [self._rows.popleft() for _ in range(count)]


async def _rest(result: Any, errors: Any) -> _Left:
    """As `_keep_rest`, for asyncmy."""
    rows = []
    failure: Exception | None = None
    try:
        while (row := await result._read_rowdata_packet_unbuffered()) is not None:  # noqa: SLF001
            rows.append(row)
    except errors.Error as error:
        failure = error
    return _Left(rows, failure)


async def _given_up(result: Any, errors: Any) -> _Left | None:
    """As `_give_up`, for asyncmy; None where no row is lost."""
    try:
        lost = await result._read_rowdata_packet_unbuffered() is not None  # noqa: SLF001
        await result._finish_unbuffered_query()  # noqa: SLF001
    except errors.Error:
        lost = True
    return _Left((), errors.ProgrammingError(_LEFT_BEHIND)) if lost else None


@cache
def _asyncmy_classes() -> tuple[Any, Any]:
    """asyncmy's connections, and the same for them; asyncmy need not be installed."""
    from asyncmy import connection, cursors, errors

    plain: Any = connection.Connection  # its stubs leave out what is used here

    class TellingAsyncConnection(plain):  # type: ignore[misc]
        """An asyncmy connection that keeps what the server says of its transactions, and the rows of a stream: see
        `TellingConnection`. asyncmy's results take nothing from outside, so its cursor is given another result.
        """

        committed: str | None = None
        position: str | None = None
        tells = False
        _streams: tuple[Any, ...] = ()

        async def connect(self) -> None:
            await super().connect()
            try:
                await self._execute_command(COM_QUERY, _tracking(self.get_server_info()))
                await self._read_ok_packet()
                self.tells = True
            except (errors.OperationalError, errors.InternalError) as error:
                if not self.connected or error.args[0] in _LOST:
                    raise
                self.tells = False

        def cursor(self, cursor: Any = None) -> Any:
            made = super().cursor(cursor)
            if isinstance(made, cursors.SSCursor):
                self._streams = (*self._streams, made)
            return made

        async def _execute_command(self, command: int, sql: Any) -> None:
            result = self._result
            if self._streams:  # those that are closed
                self._streams = tuple(each for each in self._streams if each.connection is not None)
            if result is not None and result.unbuffered_active:
                left = await (_given_up if _ends_transaction(sql) else _rest)(result, errors)
                for stream in self._streams:
                    if left is not None and stream._result is result:  # noqa: SLF001 - asyncmy's own
                        stream._result = left  # noqa: SLF001
            await super()._execute_command(command, sql)

        async def _read_ok_packet(self) -> Any:
            packet = await super()._read_ok_packet()
            if packet.server_status & _STATE_CHANGED:
                self.committed = gtid_in(packet.message) or self.committed
            return packet

        async def _read_query_result(self, unbuffered: bool = False) -> Any:
            affected = await super()._read_query_result(unbuffered)
            result = self._result
            description = result.description
            if description is None:
                if result.message and self.server_status & _STATE_CHANGED:
                    self.committed = gtid_in(result.message) or self.committed
            elif description[0][0] == POSITION_COLUMN and not unbuffered:
                rows = result.rows
                self.position = rows[0][0] if rows else None
                result.description = description[1:]
                result.rows = tuple(row[1:] for row in rows)
            return affected

    return plain, TellingAsyncConnection


async def _connect_asyncmy(**options: Any) -> Any:
    _, telling = _asyncmy_classes()
    made = telling(**{**options, "client_flag": options.get("client_flag", 0) | _SESSION_TRACK})
    await made.connect()
    return made


def connect(dialect: Dialect, arguments: Any, options: dict[str, Any]) -> Any:
    """Open a connection that tells, where the driver is one that can be taught; else an ordinary one."""
    if dialect.driver == "pymysql":
        return TellingConnection(*arguments, **options)
    if dialect.driver == "asyncmy" and "async_creator_fn" not in options:
        options = {**options, "async_creator_fn": _connect_asyncmy}
    return dialect.connect(*arguments, **options)


def adopt(connection: Any) -> None:
    """Have a connection that somebody else has opened keep the rows of its streams. What it commits it does not tell.

    :param connection: as SQLAlchemy's pools hold it. One of another class than the driver's own stays as it is.
    """
    driver = getattr(connection, "driver_connection", connection)
    kind = type(driver)
    if kind is _Base:
        driver.__class__ = TellingConnection
    elif kind.__module__ == "asyncmy.connection":
        plain, telling = _asyncmy_classes()
        if kind is plain:
            driver.__class__ = telling
