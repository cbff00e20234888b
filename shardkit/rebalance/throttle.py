"""How large the next chunk is, and how long to wait before it. Pure: time comes in as seconds."""

from __future__ import annotations

from dataclasses import dataclass

#: Seconds that one chunk's transaction should take: long enough for throughput, short enough for replicas and Ctrl-C.
CHUNK_SECONDS = 0.5
FEWEST_ROWS = 100
MOST_ROWS = 50_000
#: Bytes that one chunk may hold in this process.
MOST_BYTES = 32 * 1024 * 1024


@dataclass
class ChunkSize:
    """The number of rows of the next chunk, steered by what the last one took.

    :param rows: for the first chunk, which teaches us how fast the servers are.
    :param most: never more rows than this.
    """

    rows: int = 1000
    most: int = MOST_ROWS
    fewest: int = FEWEST_ROWS

    def learn(self, rows: int, size: int, seconds: float) -> None:
        """A chunk of so many rows and bytes took so long. Grows at most twofold: one lucky chunk proves little."""
        if rows == 0:
            return
        wanted = rows * CHUNK_SECONDS / max(seconds, 0.001)
        by_size = MOST_BYTES * rows / max(size, 1)
        self.rows = int(max(min(wanted, self.rows * 2, by_size, self.most), min(self.fewest, by_size), 1))


@dataclass
class Throttle:
    """Holds the work to a number of rows a second.

    :param rows_per_second: None for as fast as it goes.
    """

    rows_per_second: float | None = None

    def pause_after(self, rows: int, seconds: float) -> float:
        """Seconds to wait after a chunk of so many rows that took so long."""
        if self.rows_per_second is None:
            return 0.0
        return max(rows / self.rows_per_second - seconds, 0.0)
