"""A binlog connection of our own: asks a server for its log from a GTID position on and yields checked events.

Protocol: MySQL Internals "COM_BINLOG_DUMP_GTID", MariaDB Knowledge Base "Replication Protocol"; the session variables
are those that each server's own replica sets (``get_master_version_and_clock`` in sql/slave.cc, sql/rpl_replica.cc).
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.errors import BadEvent, Interrupted, PositionLost, PreconditionFailed, RelayError
from shardkit.topology import Endpoint
from shardkit_cdc import events
from shardkit_cdc.connection import DENIED, connect, server_errors
from shardkit_cdc.events import Event, Format, checked_event
from shardkit_cdc.gtid import Flavour, MySQLPosition, Position

_COM_BINLOG_DUMP = 0x12
_COM_BINLOG_DUMP_GTID = 0x1E
_RECEIVE_BYTES = 1 << 17
_LONGEST_PACKET = 0xFFFFFF
_PACKET_HEADER = struct.Struct("<I")
#: Kinds that only keep the connection alive or describe the file.
_NOISE = frozenset(
    {
        events.ROTATE,
        events.STOP,
        events.HEARTBEAT,
        events.HEARTBEAT_V2,
        events.PREVIOUS_GTIDS,
        events.MARIADB_GTID_LIST,
        events.MARIADB_BINLOG_CHECKPOINT,
    }
)
_FATAL_READ = 1236  # ER_MASTER_FATAL_ERROR_READING_BINLOG


if TYPE_CHECKING:
    _Connection = pymysql.Connection[Any]  # generic in the stubs only
else:
    _Connection = pymysql.Connection


class _DumpConnection(_Connection):
    """A driver connection that is turned into a one-way stream of events."""

    def begin_dump(self, command: int, payload: bytes, timeout: float) -> socket.socket:
        self._execute_command(command, payload)  # type: ignore[attr-defined]  # the stubs leave it out
        sock = cast("socket.socket", self._sock)  # type: ignore[attr-defined]  # the stubs leave it out
        sock.settimeout(timeout)
        return sock


class BinlogStream:
    """Events of one server's log, in commit order, from just after a position.

    Rotations, artificial events and heartbeats stay inside. `format` is known once `begin` or `read` has returned.

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
        self.hop = hop
        self.format: Format | None = None
        self.bytes_read = 0
        self._buffer = b""
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

    def begin(self) -> Format:
        """Wait until the server has accepted the position, and say what its log's format is.

        :raises PositionLost, PreconditionFailed, Interrupted: as `read`; a missing privilege shows here.
        """
        while self.format is None:
            self._early += self._next()
        return self.format

    def read(self) -> list[Event]:
        """Wait for the log to go on and return all that has arrived; empty when only a heartbeat came.

        :raises Interrupted: the connection was lost, or the server ended it; a new stream goes on.
        :raises PositionLost: the server no longer has the log from the position on.
        :raises BadEvent: an event is corrupt.
        """
        if self._early:
            found, self._early = self._early, []
            return found
        return self._next()

    def _next(self) -> list[Event]:
        buffer = self._buffer + self._receive()
        found: list[Event] = []
        form = self.format
        at, size = 0, len(buffer)
        while size - at >= 4:
            length = _PACKET_HEADER.unpack_from(buffer, at)[0] & _LONGEST_PACKET  # the fourth byte counts packets
            end = at + 4 + length
            if length == _LONGEST_PACKET or end > size + _RECEIVE_BYTES:
                packet, buffer = self._long_packet(buffer[at:])
                at, size = 0, len(buffer)
                self._take(packet, found)
                continue
            if end > size:
                break
            # What _take does for most events, without the calls.
            if form is None or length < 6 or buffer[at + 4] or buffer[at + 9] == events.FORMAT_DESCRIPTION:
                self._take(buffer[at + 4 : end], found)
                form = self.format
            else:
                event = checked_event(buffer[at + 5 : end], form)
                if event[0] not in _NOISE:
                    found.append(event)
            at = end
        self._buffer = buffer[at:]
        return found

    def _receive(self) -> bytes:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except TimeoutError:
            raise Interrupted(f"{self.endpoint.address} has sent nothing, not even a heartbeat", hop=self.hop) from None
        except OSError as error:
            raise Interrupted(f"lost {self.endpoint.address} while reading its log: {error}", hop=self.hop) from None
        if not data:
            raise Interrupted(f"{self.endpoint.address} closed the connection", hop=self.hop)
        self.bytes_read += len(data)
        return data

    def _long_packet(self, buffer: bytes) -> tuple[bytes, bytes]:
        """Collect an event of many receives, or of several packets; what follows it is handed back."""
        parts: list[bytes] = []
        total = 0
        while True:
            chunks, have = [buffer], len(buffer)
            while have < 4:
                chunks.append(self._receive())
                have += len(chunks[-1])
            length = int.from_bytes(b"".join(chunks)[:3], "little")
            while have < 4 + length:
                chunks.append(self._receive())
                have += len(chunks[-1])
            buffer = b"".join(chunks)
            parts.append(buffer[4 : 4 + length])
            buffer = buffer[4 + length :]
            total += length
            if length < _LONGEST_PACKET:
                return b"".join(parts), buffer
            if total > events.MAX_EVENT_BYTES:
                raise BadEvent("an event is longer than any server writes", hop=self.hop)

    def _take(self, packet: bytes, found: list[Event]) -> None:
        if not packet:
            raise BadEvent("the server sent an empty packet in its log", hop=self.hop)
        status = packet[0]
        if status != 0:
            raise self._ended(packet)
        raw = packet[1:]
        if self.format is None or (len(raw) > 4 and raw[4] == events.FORMAT_DESCRIPTION):
            self._begin_file(raw)
            return
        event = checked_event(raw, self.format)
        if event.kind not in _NOISE:
            found.append(event)

    def _begin_file(self, raw: bytes) -> None:
        events.header_of(raw, "first")
        if raw[4] != events.FORMAT_DESCRIPTION:
            if raw[4] not in _NOISE:
                raise BadEvent(f"the log begins with an event of kind {raw[4]}, not with its format", hop=self.hop)
            return
        found = Format.parse(raw)
        if self.format is not None and not found.same_layout(self.format):
            raise Interrupted("the source's log changed its format: it was upgraded", hop=self.hop)
        self.format = found

    def _ended(self, packet: bytes) -> RelayError | PreconditionFailed:
        if packet[0] != 0xFF or len(packet) < 3:
            return Interrupted(
                f"{self.endpoint.address} ended its log: another reader has this one's server id, or it stops",
                hop=self.hop,
            )
        code = int.from_bytes(packet[1:3], "little")
        text = packet[3:].decode("utf-8", "replace")
        if text.startswith("#"):
            text = text[6:]
        if code in DENIED:
            return PreconditionFailed(
                f"hop {self.hop}: the relay's user may not read the log of {self.endpoint.address} ({text})",
                hint="GRANT REPLICATION SLAVE ON *.* to it",
            )
        lowered = text.lower()
        if code == _FATAL_READ and ("purged" in lowered or "gtid" in lowered):
            return PositionLost(
                f"{self.endpoint.address} cannot go on from this hop's position: {text}",
                hop=self.hop,
                hint="its log was purged or belongs to another history: fill the target anew (relay reseed)",
            )
        if code == _FATAL_READ and "same server" not in lowered and "shutdown" not in lowered:
            return BadEvent(f"{self.endpoint.address} cannot read its own log: {text}", hop=self.hop)
        return Interrupted(f"{self.endpoint.address} ended its log: {text}", hop=self.hop)

    def close(self) -> None:
        """End the stream; a `read` that waits in another thread returns with Interrupted. May be called twice."""
        with suppress(OSError):  # already closed by the other side: nothing is left to end
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._connection.open:
            self._connection.close()
