"""What a daemon tells over HTTP: ``/livez``, ``/readyz`` and ``/metrics``. Plain text, no authentication.

It says names of servers and errors, so it is for loopback or for a network that may know these.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shardkit.errors import PreconditionFailed

_TEXT = "text/plain; charset=utf-8"
#: A client that says nothing for so many seconds is let go.
_PATIENCE = 10.0
LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``, ``[::1]:PORT``, or a port alone, which is one of 127.0.0.1. Port 0 takes any that is free.

    :raises ValueError: for anything else.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"{text!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]") or LOOPBACK, int(port)


class HealthServer:
    """Serves from a thread of its own until closed.

    :param unready: why the daemon is not ready, a line each; empty when it is.
    :param registry: the metrics to show.
    :raises PreconditionFailed: when the address cannot be listened on.
    """

    def __init__(
        self, address: tuple[str, int], *, unready: Callable[[], list[str]], registry: CollectorRegistry
    ) -> None:
        server = _IPv6Server if ":" in address[0] else _Server
        try:
            self._server = server(address, _handler(unready, registry))
        except OSError as error:
            raise PreconditionFailed(
                f"cannot listen on {address[0]}:{address[1]}: {error.strerror or error}",
                hint="give --listen an address of this machine and a port that is free",
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """What it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that holds its connection open must not hold up the daemon's end


class _IPv6Server(_Server):
    address_family = socket.AF_INET6


def _handler(unready: Callable[[], list[str]], registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE
        server_version = "shardkit"
        sys_version = ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/livez":
                self._answer(HTTPStatus.OK, _TEXT, b"alive\n")
            elif path == "/readyz":
                reasons = unready()
                status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
                self._answer(status, _TEXT, "".join(f"{line}\n" for line in reasons or ["ready"]).encode())
            elif path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, content_type, encode(registry))
            else:
                self._answer(HTTPStatus.NOT_FOUND, _TEXT, b"there are /livez, /readyz and /metrics\n")

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def _answer(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as in the base class
            """Not logged: probes come every few seconds."""

    return Handler
