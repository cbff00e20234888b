"""Deleting the rows of buckets that a shard has given away, chunk by chunk along the primary key.

Rows are deleted by their primary keys, so nothing but them is locked. A chunk and the cursor behind it are one
transaction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from shardkit.rebalance.copy import Cursor, read_cursor, write_cursor
from shardkit.rebalance.cutover import Lease
from shardkit.rebalance.failpoint import reach
from shardkit.rebalance.servers import LockWait, Server
from shardkit.rebalance.tables import Table, quoted
from shardkit.rebalance.throttle import ChunkSize, Throttle

#: Rows that one DELETE names.
MOST_ROWS = 2000


@dataclass(frozen=True)
class Cleanup:
    """Deletes rows for one job.

    :param phase: under which the cursors are kept: ``clean`` or ``undo``.
    :param check: called between chunks; raises to stop.
    :param wait: called with seconds to wait.
    :param report: told the table and its rows so far.
    """

    job: str
    phase: str
    server: Server
    lease: Lease
    throttle: Throttle
    check: Callable[[], None]
    wait: Callable[[float], None]
    report: Callable[[Table, int], None]

    def run(self, table: Table, where: str) -> int:
        """Delete the rows that fulfil ``where``.

        :returns: all rows deleted of this table, earlier runs included.
        """
        cursor = read_cursor(self.server, self.job, self.phase, table.name)
        size = ChunkSize(rows=500, most=MOST_ROWS)
        while not cursor.finished:
            self.report(table, cursor.rows)
            cursor = self._chunk(table, where, cursor, size)
            reach("cleaning.chunk")
            self.check()
        self.report(table, cursor.rows)
        return cursor.rows

    def _chunk(self, table: Table, where: str, cursor: Cursor, size: ChunkSize) -> Cursor:
        started = time.monotonic()
        keys = [
            tuple(map(str, row))
            for row in self.server.rows(
                f"SELECT {table.key_literals} FROM {quoted(table.name)} FORCE INDEX (PRIMARY)"
                f" WHERE {where} AND {table.after(cursor.last)} ORDER BY {table.order} LIMIT {size.rows}"
            )
        ]
        after = Cursor(keys[-1] if keys else cursor.last, cursor.rows + len(keys), finished=not keys)
        try:
            with self.server.transaction():
                self.lease.check(self.server)
                if keys:
                    self.server.run(f"DELETE FROM {quoted(table.name)} WHERE {table.one_of(keys)} AND {where}")
                write_cursor(self.server, self.job, self.phase, table.name, after)
        except LockWait:  # somebody reads FOR UPDATE what is about to go
            self.wait(0.5)
            return cursor
        took = time.monotonic() - started
        size.learn(len(keys), 0, took)
        # as long a pause as the work took, at least: nobody waits for these rows to go
        self.wait(max(self.throttle.pause_after(len(keys), took), min(took, 0.05)))
        return after
