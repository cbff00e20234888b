"""Unique 63-bit ids that sort by time: 41 bits of milliseconds, 10 bits of worker number, 12 bits of sequence.

A worker number is leased, so that no two processes issue under the same one at the same time. Each lease notes, ahead
of time, up to which millisecond its holder may issue; the next holder of the number begins after that. So an id is
never issued twice, whatever clocks do and however a process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from kazoo.exceptions import (
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    NodeExistsError,
    NoNodeError,
    SessionExpiredError,
)
from kazoo.handlers.threading import KazooTimeoutError

from shardkit.errors import PreconditionFailed, ShardkitError
from shardkit.mapstore import FileMapStore, MapStore, ZooKeeperMapStore

#: Milliseconds of 2024-01-01T00:00:00Z: where the time part begins. It lasts until 2093.
EPOCH_MS = 1_704_067_200_000
WORKERS = 1024
_SEQUENCE_BITS = 12
_WORKER_BITS = 10
_SEQUENCES = 1 << _SEQUENCE_BITS
#: Milliseconds that a holder reserves ahead.
RESERVE_MS = 10_000
#: Milliseconds that a clock may step back before issuing fails rather than waits.
PATIENCE_MS = 1_000


class ClockWentBack(ShardkitError):
    """The clock stepped back further than can be waited out: ids would not be unique or not in order."""


class Lease(Protocol):
    """A worker number that this process alone holds."""

    @property
    def number(self) -> int:
        """From 0 to 1023."""
        ...

    @property
    def reserved_until(self) -> int:
        """The millisecond up to which somebody, maybe this holder, was allowed to issue under the number."""
        ...

    def reserve(self, until_ms: int) -> None:
        """Note durably that ids up to this millisecond may be issued.

        :raises PreconditionFailed: when the number is not held any more.
        """
        ...

    def close(self) -> None:
        """Give the number back."""
        ...


class IdGenerator:
    """Issues ids. Usable by many threads, and after a fork: the child leases a number of its own.

    :param lease: takes a worker number.
    :param clock: milliseconds since the epoch.
    """

    def __init__(
        self,
        lease: Callable[[], Lease],
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._take_lease = lease
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._pid = 0
        self._last_ms = 0
        self._sequence = 0
        self._allowed_until = 0

    def next_id(self) -> int:
        """A new id, greater than all before it from this generator.

        :raises PreconditionFailed: when no worker number is free, or ours was lost.
        :raises ClockWentBack: when the clock stepped back by more than a second.
        """
        with self._lock:
            lease = self._held()
            now = self._now()
            if now == self._last_ms:
                self._sequence += 1
                if self._sequence == _SEQUENCES:  # 4,096 in one millisecond: the next one
                    now = self._after(self._last_ms)
            if now != self._last_ms:
                self._last_ms, self._sequence = now, 0
            if now > self._allowed_until:
                self._reserve(lease, now + RESERVE_MS)
            stamp = (now - EPOCH_MS) << (_WORKER_BITS + _SEQUENCE_BITS)
            return stamp | lease.number << _SEQUENCE_BITS | self._sequence

    __call__ = next_id

    def _reserve(self, lease: Lease, until_ms: int) -> None:
        try:
            lease.reserve(until_ms)
        except PreconditionFailed:
            self._lease = None  # the next call takes another number
            raise
        self._allowed_until = until_ms

    def _held(self) -> Lease:
        if self._lease is None or self._pid != os.getpid():
            self._lease = self._take_lease()
            self._pid = os.getpid()
            self._last_ms = max(self._last_ms, self._lease.reserved_until)
            self._sequence = _SEQUENCES - 1  # whatever was issued in that millisecond
            self._allowed_until = 0
        return self._lease

    def _now(self) -> int:
        now = self._clock()
        if now >= self._last_ms:
            return now
        if self._last_ms - now > PATIENCE_MS + RESERVE_MS:
            raise ClockWentBack(
                f"the clock is {(self._last_ms - now) / 1000:.1f} s behind the last id issued",
                hint="set the clock right (NTP, slewing), or wait until it has caught up",
            )
        return self._after(self._last_ms - 1)

    def _after(self, passed: int) -> int:
        """Wait until the clock is past this millisecond."""
        while (now := self._clock()) <= passed:
            self._sleep((passed - now + 1) / 1000)
        return now

    def close(self) -> None:
        """Give the worker number back."""
        with self._lock:
            if self._lease is not None and self._pid == os.getpid():
                with contextlib.suppress(PreconditionFailed):  # what was reserved before stands
                    self._lease.reserve(self._last_ms)
                self._lease.close()
            self._lease = None


def lease_for(store: MapStore) -> Lease:
    """A worker number among the processes that share this map store.

    A map in ZooKeeper leases it there; a map in a file beside the file; a map in memory on this machine.
    """
    match store:
        case ZooKeeperMapStore():
            return ZooKeeperLease(store)
        case FileMapStore():
            return FileLease(store.path.with_name(f".{store.path.name}.workers"))
    return FileLease(Path(tempfile.gettempdir()) / f"shardkit-workers-{os.getuid()}")


class FileLease:
    """A worker number held by a locked file: the operating system frees it with the process."""

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise PreconditionFailed(
                f"no worker number can be leased in {directory}: {error.strerror}", hint="mend its permissions"
            ) from error
        self._file, self._number, self._reserved = self._lock_one(directory)

    @staticmethod
    def _lock_one(directory: Path) -> tuple[int, int, int]:
        now = time.time_ns() // 1_000_000
        for patient in (False, True):  # first a number that needs no waiting
            for number in range(WORKERS):
                file = os.open(directory / f"{number:04}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    reserved = int(os.pread(file, 32, 0) or b"0")
                    if patient or reserved < now:
                        return file, number, reserved
                os.close(file)
        raise PreconditionFailed(
            f"all {WORKERS} worker numbers in {directory} are taken", hint="stop processes that issue ids"
        )

    @property
    def number(self) -> int:
        return self._number

    @property
    def reserved_until(self) -> int:
        return self._reserved

    def reserve(self, until_ms: int) -> None:
        os.pwrite(self._file, b"%020d" % until_ms, 0)
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)


class ZooKeeperLease:
    """A worker number held by an ephemeral node ``workers/<n>/holder``; what is reserved stands in ``workers/<n>``.

    ZooKeeper frees the number when it has not heard from the process for the session time-out. A holder that it takes
    for dead may still be alive: but each reservation is a write that succeeds only if nobody else has written since,
    and the next holder begins after what was reserved.

    :param timeout: seconds that each call may take: kazoo would wait for a lost connection for ever.
    """

    def __init__(self, store: ZooKeeperMapStore, *, timeout: float = 10.0) -> None:
        self._store = store
        self._timeout = timeout
        self._number, self._version, self._reserved = self._take()

    def _take(self) -> tuple[int, int, int]:
        client = self._store.client
        now = time.time_ns() // 1_000_000
        self._wait(client.ensure_path_async(self._store.path("workers")))
        for number in _scattered_numbers():
            path = self._store.path("workers", str(number))
            try:
                with contextlib.suppress(NodeExistsError):
                    self._wait(client.create_async(path, b"0"))
                self._wait(client.create_async(f"{path}/holder", b"%d" % os.getpid(), ephemeral=True))
                data, stat = self._wait(client.get_async(path))
            except (NodeExistsError, NoNodeError):
                continue  # held, or just given back
            if int(data) < now:
                return number, int(stat.version), int(data)
            self._wait(client.delete_async(f"{path}/holder"))
        raise PreconditionFailed(f"all {WORKERS} worker numbers are taken", hint="stop processes that issue ids")

    def _wait(self, result: Any) -> Any:
        """The value of a kazoo async result, within the time-out."""
        try:
            return result.get(timeout=self._timeout)
        except (KazooTimeoutError, ConnectionLoss, ConnectionClosedError, SessionExpiredError) as error:
            raise PreconditionFailed(
                f"no worker number can be leased at {self._store.source}: {type(error).__name__}",
                hint="ids are issued again once ZooKeeper answers",
            ) from error

    @property
    def number(self) -> int:
        return self._number

    @property
    def reserved_until(self) -> int:
        return self._reserved

    def reserve(self, until_ms: int) -> None:
        path = self._store.path("workers", str(self._number))
        try:
            stat = self._wait(self._store.client.set_async(path, b"%d" % until_ms, version=self._version))
        except (BadVersionError, NoNodeError) as error:
            raise PreconditionFailed(
                f"worker number {self._number} has been leased to another process meanwhile",
                hint="ids are issued under another number from now on",
            ) from error
        self._version = int(stat.version)

    def close(self) -> None:
        with contextlib.suppress(PreconditionFailed, NoNodeError):  # else it ends with the session
            self._wait(self._store.client.delete_async(self._store.path("workers", str(self._number), "holder")))


def _scattered_numbers() -> Iterator[int]:
    """Every worker number once, from a place of this process's own: else all would try the same ones first."""
    start = os.getpid()
    yield from ((start + step) % WORKERS for step in range(WORKERS))
