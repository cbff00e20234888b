"""Comparing what was copied: checksums of both sides over ranges of the primary key, then the rows that differ.

A range is open at its end, so rows that only the target has are differences like all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shardkit.errors import RebalanceError
from shardkit.rebalance.copy import Key, show_key
from shardkit.rebalance.servers import Server
from shardkit.rebalance.tables import Table, quoted
from shardkit.rebalance.throttle import ChunkSize
from shardkit.rowtext import Digest, digest_of

#: Differing rows that an error names.
NAMED = 10


def digest(server: Server, table: Table, where: str, *, by_key: bool = True) -> Digest:
    """What the rows that fulfil ``where`` come to.

    :param by_key: walk along the primary key.
    :raises RebalanceError: for a row whose literal is longer than the server's max_allowed_packet.
    """
    index = " FORCE INDEX (PRIMARY)" if by_key else ""
    found = digest_of(*server.row(f"SELECT {table.digest} FROM {quoted(table.name)}{index} WHERE {where}"))
    if found is None:
        raise RebalanceError(
            f"{server}: a row of {table.name} does not fit into max_allowed_packet as an SQL literal",
            hint="raise max_allowed_packet on both servers to three times the largest row, then run this again",
        )
    return found


@dataclass(frozen=True)
class Verification:
    """Compares tables of one job.

    :param check: called between ranges; raises to stop.
    :param report: told the table and its rows compared so far.
    """

    job: str
    source: Server
    target: Server
    check: Callable[[], None]
    report: Callable[[Table, int], None]

    def run(self, table: Table, where: str) -> int:
        """Compare the rows that fulfil ``where``.

        :returns: how many there are.
        :raises RebalanceError: naming rows that differ.
        """
        low: Key | None = None
        compared = 0
        size = ChunkSize(rows=5000, most=500_000)
        self.report(table, 0)
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="shardkit-verify") as both:
            while True:
                started = time.monotonic()
                high = self._boundary(table, where, low, size.rows)
                inside = f"{where} AND {table.after(low)} AND {table.upto(high)}"
                pending = [both.submit(digest, side, table, inside) for side in (self.source, self.target)]
                ours, theirs = (side.result() for side in pending)
                if ours != theirs:
                    raise self._difference(table, inside)
                compared += ours.rows
                size.learn(ours.rows, 0, time.monotonic() - started)
                self.report(table, compared)
                if high is None:
                    return compared
                low = high
                self.check()

    def _boundary(self, table: Table, where: str, low: Key | None, rows: int) -> Key | None:
        """The primary key of the row that ends the next range; None where the last range begins."""
        found = self.source.rows(
            f"SELECT {table.key_literals} FROM {quoted(table.name)} FORCE INDEX (PRIMARY)"
            f" WHERE {where} AND {table.after(low)} ORDER BY {table.order} LIMIT {rows - 1}, 1"
        )
        return tuple(map(str, found[0])) if found else None

    def _difference(self, table: Table, where: str) -> RebalanceError:
        query = (
            f"SELECT SHA2({table.row_expression}, 256), {table.key_literals} FROM {quoted(table.name)}"
            f" FORCE INDEX (PRIMARY) WHERE {where}"
        )
        ours, theirs = (
            {tuple(map(str, row[1:])): row[0] for row in side.rows(query)} for side in (self.source, self.target)
        )
        faults = [
            *(f"{show_key(table, key)} is missing on {self.target.shard}" for key in ours if key not in theirs),
            *(f"{show_key(table, key)} is only on {self.target.shard}" for key in theirs if key not in ours),
            *(
                f"{show_key(table, key)} differs"
                for key, value in ours.items()
                if key in theirs and theirs[key] != value
            ),
        ]
        more = f", and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        return RebalanceError(
            f"table {table.name}: {self.source.shard} and {self.target.shard} differ in the moving buckets: "
            f"{'; '.join(faults[:NAMED])}{more}",
            job=self.job,
            hint="nothing was given to the target: cancel the job ('shardkit rebalance cancel'), find out who writes "
            "there past the fence, and plan again",
        )
