"""Free TCP ports on the loopback address, reserved across processes."""

from __future__ import annotations

import fcntl
import getpass
import os
import random
import socket
import tempfile
import threading
from functools import cache
from itertools import chain
from pathlib import Path

from shardkit.errors import PreconditionFailed

LOOPBACK = "127.0.0.1"

# Below the range from which Linux takes the local ports of outgoing connections (32768 and up unless set otherwise):
# a port from there could be taken by any client while our server is stopped between two starts.
_FIRST, _LAST = 20_000, 32_000

_lock = threading.Lock()
_reserved: set[int] = set()


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on, reserved for this process until `release_port` or its end.

    Processes that use shardkit.testing at the same time (pytest-xdist workers) never get the same port.

    :raises PreconditionFailed: when no port from 20000 to 32000 is free.
    """
    start = random.randrange(_FIRST, _LAST)  # noqa: S311 - spreads processes over the range; nothing secret about it
    for candidate in chain(range(start, _LAST), range(_FIRST, start)):
        if _reserve(candidate):
            return candidate
    raise PreconditionFailed(
        f"no free TCP port from {_FIRST} to {_LAST} on {LOOPBACK}", hint="stop servers that are no longer needed"
    )


def release_port(port: int) -> None:
    """Give a port of `free_port` back. Nothing happens for a port that was not reserved here."""
    with _lock:
        if port in _reserved:
            _reserved.remove(port)
            fcntl.lockf(_lock_file(), fcntl.LOCK_UN, 1, port)


def _reserve(port: int) -> bool:
    with _lock:
        if port in _reserved:
            return False
        try:
            fcntl.lockf(_lock_file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
        except (BlockingIOError, PermissionError):  # POSIX leaves the choice between EAGAIN and EACCES
            return False
        if not _nobody_listens(port):
            fcntl.lockf(_lock_file(), fcntl.LOCK_UN, 1, port)
            return False
        _reserved.add(port)
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


@cache
def _lock_file() -> int:
    """One empty file whose byte N is locked by the process that has port N.

    Record locks (fcntl(2)) belong to a process, are not inherited by its children, and end with it. They also end when
    the process closes any descriptor of the file, so it is opened once and never closed.
    """
    path = Path(tempfile.gettempdir()) / f"shardkit-{getpass.getuser()}.ports"
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
