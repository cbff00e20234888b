"""From the bytes of a binlog connection to checked events. Sans I/O: bytes come from a callable, in any pieces.

Packets: three bytes of length, one that counts packets, a status byte; an event of 16 MiB or more takes several packets
(MySQL Internals, "MySQL Packets").
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from shardkit.errors import BadEvent, Interrupted, PositionLost, PreconditionFailed, RelayError
from shardkit_cdc import events
from shardkit_cdc.connection import DENIED
from shardkit_cdc.events import Event, Format, checked_event

#: Packets longer than what is at hand by this many bytes are collected piece by piece instead of by one growing buffer.
PIECE_BYTES = 1 << 17
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


class EventReader:
    """Reads one connection's events. Rotations, artificial events and heartbeats stay inside.

    :param receive: gives the next bytes, at least one; its exceptions pass through.
    :param address: the server, for messages.
    """

    def __init__(self, receive: Callable[[], bytes], address: str) -> None:
        self.format: Format | None = None
        #: Of the first file: one answer may hold the beginnings of several.
        self.first_format: Format | None = None
        self._receive = receive
        self._address = address
        self._buffer = b""
        self._unread = False  # the buffer holds bytes that have not been looked at
        self._error: RelayError | PreconditionFailed | None = None

    def read(self) -> list[Event]:
        """Wait for bytes and return the events that they complete; empty when those were none.

        An error comes after the events before it.

        :raises Interrupted: the server ended the stream; a new one goes on.
        :raises PositionLost: the server no longer has the log from the position on.
        :raises PreconditionFailed: the account may not read the log.
        :raises BadEvent: an event is corrupt.
        """
        if self._error is not None:
            raise self._error
        found: list[Event] = []
        try:
            self._read(found)
        except (RelayError, PreconditionFailed) as error:
            if not found:
                raise
            self._error = error
        return found

    def _read(self, found: list[Event]) -> None:
        buffer = self._buffer if self._unread else self._buffer + self._receive()
        self._unread = False
        form = self.format
        at, size = 0, len(buffer)
        while size - at >= 4:
            length = _PACKET_HEADER.unpack_from(buffer, at)[0] & _LONGEST_PACKET  # the fourth byte counts packets
            end = at + 4 + length
            if length == _LONGEST_PACKET or end > size + PIECE_BYTES:
                # Handed over by itself: a row of long ones must not gather here.
                packet, self._buffer = self._long_packet(buffer[at:])
                self._unread = True
                self._take(packet, found)
                return
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

    def _long_packet(self, buffer: bytes) -> tuple[bytes, bytes]:
        """Collect an event of many pieces, or of several packets; what follows it is handed back."""
        parts: list[bytes] = []
        total = 0
        while True:
            while len(buffer) < 4:
                buffer += self._receive()
            length = _PACKET_HEADER.unpack_from(buffer)[0] & _LONGEST_PACKET
            pieces, have = [buffer], len(buffer)
            while have < 4 + length:
                pieces.append(self._receive())
                have += len(pieces[-1])
            buffer = b"".join(pieces)
            parts.append(buffer[4 : 4 + length])
            buffer = buffer[4 + length :]
            total += length
            if length < _LONGEST_PACKET:
                return b"".join(parts), buffer
            if total > events.MAX_EVENT_BYTES:
                raise BadEvent("an event is longer than any server writes")

    def _take(self, packet: bytes, found: list[Event]) -> None:
        if not packet:
            raise BadEvent("the server sent an empty packet in its log")
        if packet[0] != 0:
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
                raise BadEvent(f"the log begins with an event of kind {raw[4]}, not with its format")
            return
        found = Format.parse(raw)
        if self.format is not None and not found.same_layout(self.format):
            raise Interrupted("the source's log changed its format: it was upgraded")
        self.format = found
        self.first_format = self.first_format or found

    def _ended(self, packet: bytes) -> RelayError | PreconditionFailed:
        """What the end-of-file or error packet that ends a stream means."""
        if packet[0] != 0xFF or len(packet) < 3:
            return Interrupted(f"{self._address} ended its log: it stops, or another reader has this one's server id")
        code = int.from_bytes(packet[1:3], "little")
        text = packet[3:].decode("utf-8", "replace")
        if text.startswith("#"):
            text = text[6:]
        if code in DENIED:
            return PreconditionFailed(
                f"the relay's user may not read the log of {self._address} ({text})",
                hint="GRANT REPLICATION SLAVE ON *.* to it",
            )
        lowered = text.lower()
        if code == _FATAL_READ and ("purged" in lowered or "gtid" in lowered):
            return PositionLost(
                f"{self._address} cannot go on from this hop's position: {text}",
                hint="its log was purged or belongs to another history: this target needs a reseed, fill it anew with "
                "`shardkit relay seed`",
            )
        if code == _FATAL_READ and "same server" not in lowered and "shutdown" not in lowered:
            return BadEvent(f"{self._address} cannot read its own log: {text}")
        return Interrupted(f"{self._address} ended its log: {text}")
