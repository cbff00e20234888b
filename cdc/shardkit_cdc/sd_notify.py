"""Telling systemd how the daemon stands, over the socket that it names in the environment.

Protocol: sd_notify(3) and sd_watchdog_enabled(3). One datagram of ``NAME=value`` lines; a socket whose name begins with
``@`` is in the abstract namespace. Outside systemd nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import time

logger = logging.getLogger(__name__)


class Supervisor:
    """The supervisor of this process: systemd, or nobody."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._period = _watchdog_seconds() / 2 if self._address else 0.0
        self._next = time.monotonic()

    def ready(self) -> None:
        """Everything has been started."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The daemon has begun to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """To be called often: sends a sign of life twice in each ``WatchdogSec=``, where that is set."""
        now = time.monotonic()
        if self._period and now >= self._next:
            self._next = now + self._period
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.connect(self._address)
                sock.sendall(state.encode("ascii"))
        except OSError as error:  # relaying goes on whether or not somebody listens
            logger.warning("systemd could not be told %s: %s", state, error)


def _watchdog_seconds() -> float:
    """``WATCHDOG_USEC`` in seconds; 0 when it is not set, is no number, or is meant for another process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / 1_000_000 if text.isascii() and text.isdigit() else 0.0
