"""A TCP proxy on the loopback address that loses, holds, delays and cuts connections on request."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Literal, Self

from shardkit.errors import PreconditionFailed
from shardkit.testing.ports import LOOPBACK, free_port, release_port
from shardkit.topology import Endpoint

_CHUNK = 65536
_CONNECT_TIMEOUT = 5.0  # seconds


class Direction(StrEnum):
    """Which way a packet travels."""

    TO_SERVER = "to_server"
    TO_CLIENT = "to_client"


class Action(StrEnum):
    """What a packet hook wants done with the packet and its connection."""

    FORWARD = "forward"
    DROP = "drop"
    CUT_BEFORE = "cut_before"
    CUT_AFTER = "cut_after"


#: Called for each packet, header included, in the order in which packets arrive on one connection and direction.
PacketHook = Callable[[Direction, bytes], Action]
Framing = Literal["mysql", "zookeeper", "raw"]


@dataclass(slots=True)
class _ArmedCut:
    direction: Direction | None
    packets: int | None
    size: int | None


class TcpProxy:
    """Passes connections on to a server, until told otherwise.

    ::

        with TcpProxy(server.host, server.port) as proxy:
            connection = pymysql.connect(host=proxy.host, port=proxy.port, ...)
            proxy.cut_after(packets=1, direction=Direction.TO_SERVER)
            connection.commit()      # COMMIT reaches the server, its answer never comes back

    Packets are those of the protocol named by ``framing``; with ``raw`` each piece that was read counts as one.
    A MySQL client that goes over to TLS (PyMySQL does where the server offers it; ``ssl_disabled=True`` stops it) is
    passed on as ``raw``; a packet hook or a cut counted in packets then raises `PreconditionFailed` in `close`.

    :param on_packet: sees every packet and decides about it; runs in the connection's thread. An error in it cuts the
        connection and is raised again by `close`.
    :param max_connections: further connections are closed at once, and `close` raises `PreconditionFailed`.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        *,
        framing: Framing = "mysql",
        on_packet: PacketHook | None = None,
        max_connections: int = 64,
    ) -> None:
        self.target = (target_host, target_port)
        self.framing: Framing = framing
        self.on_packet = on_packet
        self.max_connections = max_connections
        self.host = LOOPBACK
        self.port = free_port()
        #: Connections accepted since the start.
        self.accepted = 0
        #: Set when a cut asked for with `cut_after` has happened.
        self.tripped = threading.Event()
        self._forwarded: Counter[Direction] = Counter()
        self._changed = threading.Condition()
        self._held: frozenset[Direction] = frozenset()
        self._delay = 0.0
        self._armed: _ArmedCut | None = None
        self._links: set[_Link] = set()
        self._errors: list[BaseException] = []
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None

    # --- life cycle ----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen. Nothing happens when the proxy listens already."""
        if self._listener is None:
            self._listener = socket.create_server((self.host, self.port), backlog=self.max_connections)
            self._accepting = threading.Thread(
                target=self._accept, args=(self._listener,), name=f"proxy-{self.port}", daemon=True
            )
            self._accepting.start()
        return self

    def refuse(self) -> None:
        """Stop listening: new connections are refused until `start`. Open ones go on."""
        if self._listener is not None and self._accepting is not None:
            with contextlib.suppress(
                OSError
            ):  # some systems say ENOTCONN for a listening socket, and wake it all the same
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._accepting.join()
            self._listener = self._accepting = None

    def close(self) -> None:
        """Stop listening, cut everything, wait for the threads; raise what a packet hook raised."""
        self.refuse()
        self.restore()
        while links := self._open_links():
            for link in links:
                link.cut()
                link.join()
        release_port(self.port)
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- faults --------------------------------------------------------------------------------------------------

    def cut(self) -> int:
        """Close all open connections on both sides; returns how many. New ones are accepted."""
        links = self._open_links()
        for link in links:
            link.cut()
        return len(links)

    def blackhole(self, direction: Direction | None = None) -> None:
        """Pass nothing on any more, one way or both, while connections stay open: what a lost route looks like.

        What arrives meanwhile is held and delivered after `restore`, as TCP's retransmissions would.
        """
        with self._changed:
            self._held = frozenset(Direction) if direction is None else self._held | {direction}

    def delay(self, seconds: float) -> None:
        """Hold data back for this long, both ways; 0 ends it."""
        with self._changed:
            self._delay = seconds

    def restore(self) -> None:
        """End `blackhole`, `delay` and a `cut_after` that has not happened."""
        with self._changed:
            self._held = frozenset()
            self._delay = 0.0
            self._armed = None
            self._changed.notify_all()

    def cut_after(
        self, *, packets: int | None = None, size: int | None = None, direction: Direction | None = None
    ) -> None:
        """Cut all connections once so much more has been passed on, counted from now over all connections; once.

        :param packets: whole packets; 0 cuts when the next one arrives, which is lost.
        :param size: bytes, to the byte: a packet may be cut in two.
        :param direction: count (and so cut at) this direction only.
        """
        if (packets is None) == (size is None):
            raise ValueError("say either packets= or size=")
        self.tripped.clear()
        with self._changed:
            self._armed = _ArmedCut(direction, packets, size)

    # --- what happened -------------------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._open_links())

    def forwarded(self, direction: Direction) -> int:
        """Bytes passed on in this direction since the start."""
        with self._changed:
            return self._forwarded[direction]

    def endpoint(self, database: str) -> Endpoint:
        """The endpoint that goes through this proxy."""
        return Endpoint(self.host, self.port, database)

    # --- threads -------------------------------------------------------------------------------------------------

    def _open_links(self) -> list[_Link]:
        with self._changed:
            return list(self._links)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _address = listener.accept()
            except OSError:  # `refuse` closed it
                return
            if self.connections >= self.max_connections:
                client.close()
                self.failed(
                    PreconditionFailed(
                        f"the proxy on port {self.port} already carries {self.max_connections} connections",
                        hint="close some, or raise max_connections",
                    )
                )
                continue
            try:
                server = socket.create_connection(self.target, timeout=_CONNECT_TIMEOUT)
            except OSError:  # the server is down: the client sees its connection closed, as with any proxy
                client.close()
                continue
            link = _Link(self, client, server)
            with self._changed:
                self.accepted += 1
                self._links.add(link)
            link.start()

    def pass_on(self, link: _Link, direction: Direction, arrived: float, packet: bytes, sink: socket.socket) -> None:
        """Decide about one packet and carry the decision out. For the connection's own threads."""
        if not self._wait_for_passage(link, direction, arrived):
            return
        self._refuse_to_count_blindly(link)
        action = self.on_packet(direction, packet) if self.on_packet is not None else Action.FORWARD
        if action is Action.DROP:
            return
        if action is Action.CUT_BEFORE:
            link.cut()
            return
        part, cut_all = self._cut_short(direction, packet)
        # Sealed before the last packet leaves: its answer must not slip through.
        doomed = self._open_links() if cut_all else [link] if action is Action.CUT_AFTER else []
        for other in doomed:
            other.seal()
        if part:
            # Counted before it is sent: who has received something finds it counted.
            with self._changed:
                self._forwarded[direction] += len(part)
            sink.sendall(part)
        for other in doomed:
            other.cut()
        if cut_all:
            self.tripped.set()

    def _wait_for_passage(self, link: _Link, direction: Direction, arrived: float) -> bool:
        with self._changed:
            while not link.is_cut:
                if direction in self._held:
                    self._changed.wait()
                elif self._delay and (left := arrived + self._delay - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    return True
            return False

    def _refuse_to_count_blindly(self, link: _Link) -> None:
        armed = self._armed
        if link.encrypted and (self.on_packet is not None or (armed is not None and armed.packets is not None)):
            raise PreconditionFailed(
                f"a connection through the proxy on port {self.port} uses TLS, so its packets cannot be told apart",
                hint="connect with ssl_disabled=True, or start the server with options={'tls_version': ''}",
            )

    def _cut_short(self, direction: Direction, packet: bytes) -> tuple[bytes, bool]:
        """What of the packet still goes through before an armed cut, and whether that cut is due now."""
        with self._changed:
            armed = self._armed
            if armed is None or armed.direction not in {None, direction}:
                return packet, False
            if armed.size is not None:
                part, armed.size = packet[: armed.size], max(0, armed.size - len(packet))
                due = armed.size == 0
            else:
                left = armed.packets or 0
                part, armed.packets = (packet, left - 1) if left else (b"", 0)
                due = armed.packets == 0
            if due:
                self._armed = None
            return part, due

    def forget(self, link: _Link) -> None:
        """The connection is over. For the connection's own threads."""
        with self._changed:
            self._links.discard(link)

    def failed(self, error: BaseException) -> None:
        """Keep an error that `close` is to raise. For the proxy's own threads."""
        self._errors.append(error)

    def wake(self) -> None:
        """Have waiting threads look again whether they were cut."""
        with self._changed:
            self._changed.notify_all()


class _Link:
    """One connection through the proxy: two sockets and a thread for each direction."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._sockets = (client, server)
        server.settimeout(None)
        for end in self._sockets:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._cut = threading.Event()
        #: Whether the client has asked the server for TLS.
        self.encrypted = False
        self._left = 2
        self._lock = threading.Lock()
        ways = ((client, server, Direction.TO_SERVER), (server, client, Direction.TO_CLIENT))
        self._threads = [
            threading.Thread(target=self._pump, args=way, name=f"proxy-{proxy.port}-{way[2]}", daemon=True)
            for way in ways
        ]

    @property
    def is_cut(self) -> bool:
        return self._cut.is_set()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def seal(self) -> None:
        """Pass nothing on any more; the sockets are still open."""
        self._cut.set()

    def cut(self) -> None:
        self.seal()
        for end in self._sockets:
            with contextlib.suppress(OSError):  # the other side was faster
                end.shutdown(socket.SHUT_RDWR)
        self._proxy.wake()

    def join(self) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        try:
            for arrived, packet in self._packets(source):
                if direction is Direction.TO_SERVER and self._proxy.framing == "mysql" and _asks_for_tls(packet):
                    self.encrypted = True  # before the server, which answers in TLS, has seen it
                self._proxy.pass_on(self, direction, arrived, packet, sink)
                if self.is_cut:
                    break
        except OSError:  # a side closed or reset its connection: what proxies are for
            pass
        except Exception as error:  # noqa: BLE001 - from the test's own packet hook: kept, and raised by `close`
            self._proxy.failed(error)
        finally:
            self.cut()
            self._finish()

    def _packets(self, source: socket.socket) -> Iterator[tuple[float, bytes]]:
        """Read a socket to its end as whole packets, each with the time (monotonic) at which its last byte was read.

        What is left of a packet that was cut in two comes last.
        """
        pending = bytearray()
        while data := source.recv(_CHUNK):
            arrived = time.monotonic()
            pending += data
            while pending and (size := self._next_size(pending)) is not None:
                yield arrived, bytes(pending[:size])
                del pending[:size]
        if pending:
            yield time.monotonic(), bytes(pending)

    def _next_size(self, pending: bytearray) -> int | None:
        if self.encrypted or self._proxy.framing == "raw":
            return len(pending)
        size = _packet_size(pending, self._proxy.framing)
        return size if size is not None and len(pending) >= size else None

    def _finish(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            for end in self._sockets:
                end.close()
            self._proxy.forget(self)


def _packet_size(pending: bytearray, framing: Framing) -> int | None:
    """Size in bytes of the packet that starts here, header included; None as long as the header is not complete.

    MySQL (internals manual, "Protocol::Packet"): 3 bytes length, little-endian, 1 byte sequence, payload. ZooKeeper
    (jute over TCP): 4 bytes length, big-endian, payload; a four-letter word would look like a length, so proxies that
    carry those use ``raw``.
    """
    if len(pending) < 4:
        return None
    if framing == "mysql":
        return 4 + int.from_bytes(pending[:3], "little")
    return 4 + int.from_bytes(pending[:4], "big")


def _asks_for_tls(packet: bytes) -> bool:
    """Whether this is a client's SSLRequest (internals manual, "Protocol::SSLRequest").

    It is the second packet of the connection (sequence 1), has 32 bytes of payload, and CLIENT_SSL (0x800) set in the
    capabilities with which it starts.
    """
    return len(packet) == 36 and packet[3] == 1 and bool(int.from_bytes(packet[4:8], "little") & 0x800)
