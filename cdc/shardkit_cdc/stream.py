"""A binlog connection of our own: asks a server for its log from a GTID position on and yields checked events.

Protocol: MySQL Internals "COM_BINLOG_DUMP_GTID", MariaDB Knowledge Base "Replication Protocol"; the session variables
are those that each server's own replica sets (``get_master_version_and_clock`` in sql/slave.cc, sql/rpl_replica.cc).
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import cast

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted
from shardkit.gtid import Flavour, MySQLPosition, Position
from shardkit.topology import Endpoint
from shardkit_cdc.connection import RelayConnection, connect, server_errors
from shardkit_cdc.events import Event, Format
from shardkit_cdc.wire import PIECE_BYTES, EventReader

_COM_BINLOG_DUMP = 0x12
_COM_BINLOG_DUMP_GTID = 0x1E


class _DumpConnection(RelayConnection):
    """A driver connection that is turned into a one-way stream of events."""

    def begin_dump(self, command: int, payload: bytes, timeout: float) -> socket.socket:
        self._execute_command(command, payload)  # type: ignore[attr-defined]  # the stubs leave it out
        sock = cast("socket.socket", self._sock)  # type: ignore[attr-defined]  # the stubs leave it out
        sock.settimeout(timeout)
        return sock


class BinlogStream:
    """Events of one server's log, in commit order, from just after a position.

    Rotations, artificial events and heartbeats stay inside.

    :param after: the first transaction delivered is the one after this position.
    :param server_id: what this reader calls itself; the server ends an older reader with the same one.
    :param heartbeat: seconds of silence after which the server sends a sign of life.
    :param timeout: seconds of complete silence after which the connection counts as lost.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        credentials: CredentialSource,
        *,
        hop: str,
        flavour: Flavour,
        after: Position,
        server_id: int,
        heartbeat: float = 1.0,
        timeout: float = 10.0,
    ) -> None:
        self.endpoint = endpoint
        self._reader = EventReader(self._receive, endpoint.address)
        self._early: list[Event] = []
        connection = connect(endpoint, credentials, autocommit=True, read_timeout=timeout, kind=_DumpConnection)
        self._connection = cast("_DumpConnection", connection)
        try:
            with server_errors(endpoint, hop, doing="asking for its log"):
                self._socket = self._ask(flavour, after, server_id, heartbeat, timeout)
        except BaseException:
            self._connection.close()
            raise

    def _ask(
        self, flavour: Flavour, after: Position, server_id: int, heartbeat: float, timeout: float
    ) -> socket.socket:
        nanoseconds = int(heartbeat * 1e9)
        with self._connection.cursor() as cursor:
            cursor.execute("SET @master_heartbeat_period=%s, @source_heartbeat_period=%s", (nanoseconds, nanoseconds))
            # What is asked for and what comes may differ; the Format_description event decides.
            cursor.execute("SET @master_binlog_checksum='CRC32', @source_binlog_checksum='CRC32'")
            if flavour is Flavour.MARIADB:
                cursor.execute("SET @mariadb_slave_capability=4, @slave_gtid_strict_mode=1")
                cursor.execute("SET @slave_connect_state=%s", (str(after),))
        if flavour is Flavour.MARIADB:
            return self._connection.begin_dump(_COM_BINLOG_DUMP, struct.pack("<IHI", 4, 0, server_id), timeout)
        if not isinstance(after, MySQLPosition):
            raise TypeError(f"{after} is not a MySQL position")
        gtids = after.encoded()
        request = struct.pack("<HIIQI", 0, server_id, 0, 4, len(gtids)) + gtids
        return self._connection.begin_dump(_COM_BINLOG_DUMP_GTID, request, timeout)

    @property
    def format(self) -> Format | None:
        """What the log's format is, once it is known."""
        return self._reader.format

    def begin(self) -> Format:
        """Wait until the server has accepted the position, and give the format of the file that it begins with.

        :raises PositionLost, PreconditionFailed, Interrupted: as `read`; a missing privilege shows here.
        """
        while (form := self._reader.first_format) is None:
            self._early += self._reader.read()
        return form

    def read(self) -> list[Event]:
        """Wait for the log to go on and return what has arrived; empty when only a heartbeat came.

        :raises Interrupted: the connection was lost, or the server ended it; a new stream goes on.
        :raises PositionLost: the server no longer has the log from the position on.
        :raises BadEvent: an event is corrupt.
        """
        if self._early:
            found, self._early = self._early, []
            return found
        return self._reader.read()

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(PIECE_BYTES)
        except TimeoutError:
            raise Interrupted(f"{self.endpoint.address} has sent nothing, not even a heartbeat") from None
        except OSError as error:
            raise Interrupted(f"lost {self.endpoint.address} while reading its log: {error}") from None
        if not data:
            raise Interrupted(f"{self.endpoint.address} closed the connection")
        return data

    def close(self) -> None:
        """End the stream; a `read` that waits in another thread returns with Interrupted. May be called twice."""
        with suppress(OSError):  # already closed by the other side: nothing is left to end
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._connection.open:
            self._connection.close()
