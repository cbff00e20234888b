"""What has been read and not yet applied: reading and applying overlap, and memory stays bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from shardkit_cdc.selection import Selected

#: Row event bytes that may wait before the reader does.
MOST_BYTES = 16 << 20
#: What one waiting transaction counts beside its row events, so that many empty ones are bounded too.
OVERHEAD_BYTES = 256


class Backlog:
    """A queue between one reader thread and one applier thread, bounded in bytes."""

    def __init__(self, *, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._waiting: deque[Selected] = deque()
        self._bytes = 0
        self._error: Exception | None = None
        self._closed = False
        self._changed = threading.Condition()

    @property
    def bytes(self) -> int:
        """Bytes that wait now."""
        return self._bytes

    def put(self, batch: Sequence[Selected]) -> bool:
        """Add transactions, waiting while it is full; false when nobody will take them any more."""
        size = sum(selected.transaction.size for selected in batch) + OVERHEAD_BYTES * len(batch)
        with self._changed:
            while self._bytes >= self._most and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._waiting.extend(batch)
            self._bytes += size
            self._changed.notify_all()
            return True

    def fail(self, error: Exception) -> None:
        """The reader has stopped; the applier gets the error once everything before it is taken."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def take(self, *, most_bytes: int, most_transactions: int, timeout: float) -> list[Selected]:
        """Everything that waits, up to these limits but at least one; empty when nothing came in ``timeout`` seconds.

        :raises Exception: the reader's, after the last transaction that it delivered.
        """
        with self._changed:
            if not self._waiting and self._error is None:
                self._changed.wait(timeout)
            if not self._waiting:
                if self._error is not None:
                    raise self._error
                return []
            taken: list[Selected] = []
            size = 0
            while self._waiting and len(taken) < most_transactions and (not taken or size < most_bytes):
                selected = self._waiting.popleft()
                taken.append(selected)
                size += selected.transaction.size
            self._bytes -= size + OVERHEAD_BYTES * len(taken)
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """Let a waiting reader go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
