"""How long, and how many at once, transactions wait for a shard to get another master."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Sessions of one process that wait at the same time; the others fail at once, so that a dead master does not fill an
#: application's threads.
MOST_WAITING = 100
_LOOK_SECONDS = 0.05


class Patience:
    """What transactions that find no master go by.

    :param seconds: how long one of them waits.
    """

    def __init__(self, seconds: float, most: int = MOST_WAITING) -> None:
        self._seconds = seconds
        self._most = most
        self.after_fork()

    def after_fork(self) -> None:
        """In a child process: nobody waits there yet."""
        self._places = threading.BoundedSemaphore(self._most)

    def wait(self, come: Callable[[], bool], pause: Callable[[float], None]) -> bool:
        """Wait until ``come`` says yes; False when that takes too long, or too many wait already.

        :param pause: sleeps; an event loop goes on meanwhile.
        """
        if come():
            return True
        if self._seconds <= 0 or not self._places.acquire(blocking=False):
            return False
        try:
            end = time.monotonic() + self._seconds
            while time.monotonic() < end:
                pause(_LOOK_SECONDS)
                if come():
                    return True
            return False
        finally:
            self._places.release()
