"""Free TCP ports on the loopback address, reserved across processes."""

from __future__ import annotations

import fcntl
import getpass
import os
import random
import socket
import tempfile
import threading
from itertools import chain
from pathlib import Path

from shardkit.errors import PreconditionFailed

LOOPBACK = "127.0.0.1"

# Below the range from which Linux takes the local ports of outgoing connections (32768 and up unless set otherwise):
# a port from there could be taken by any client while our server is stopped between two starts.
_FIRST, _LAST = 20_000, 32_000

_lock = threading.Lock()
_reserved: dict[int, int] = {}  # port -> descriptor of its locked file, open as long as the reservation holds


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on, reserved for this process until `release_port` or its end.

    Processes that use shardkit.testing at the same time (pytest-xdist workers) never get the same port.

    :raises PreconditionFailed: when no port from 20000 to 32000 is free.
    """
    directory = _lock_directory()
    start = random.randrange(_FIRST, _LAST)  # noqa: S311 - spreads processes over the range; nothing secret about it
    for candidate in chain(range(start, _LAST), range(_FIRST, start)):
        if _reserve(directory / str(candidate), candidate):
            return candidate
    raise PreconditionFailed(
        f"no free TCP port from {_FIRST} to {_LAST} on {LOOPBACK}", hint="stop servers that are no longer needed"
    )


def release_port(port: int) -> None:
    """Give a port of `free_port` back. Nothing happens for a port that was not reserved here."""
    with _lock:
        descriptor = _reserved.pop(port, None)
    if descriptor is not None:
        os.close(descriptor)


def _reserve(lock_file: Path, port: int) -> bool:
    descriptor = os.open(lock_file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    if not _nobody_listens(port):
        os.close(descriptor)
        return False
    with _lock:
        _reserved[port] = descriptor
    return True


def _nobody_listens(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do it, so that connections of a stopped server that linger in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _lock_directory() -> Path:
    directory = Path(tempfile.gettempdir()) / f"shardkit-ports-{getpass.getuser()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory
