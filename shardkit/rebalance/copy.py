"""Copying the rows of moving buckets, chunk by chunk along the primary key.

A chunk's rows and the cursor behind them are one transaction on the target, so a copy that was killed goes on exactly
where it stopped, and no row is ever written twice. Rows are inserted, never replaced: a row that is in the way stops
the job and is named.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pymysql
from pymysql.constants import ER

from shardkit.errors import RebalanceError
from shardkit.rebalance.cutover import Lease
from shardkit.rebalance.failpoint import reach
from shardkit.rebalance.servers import Server
from shardkit.rebalance.tables import Table, quoted
from shardkit.rebalance.throttle import ChunkSize, Throttle
from shardkit.rowtext import Key as Key
from shardkit.rowtext import plain_literal, statements
from shardkit.rowtext import show_key as show_key

#: Bytes of one INSERT statement, unless the target's max_allowed_packet is smaller.
STATEMENT_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a phase of a job is with one table.

    :param last: the primary key done last; None at the beginning.
    :param rows: done so far.
    """

    last: Key | None = None
    rows: int = 0
    finished: bool = False


def read_cursor(server: Server, job: str, phase: str, table: str) -> Cursor:
    """Where a phase stands; at the beginning where it has not begun."""
    found = server.rows(
        "SELECT last_key, row_count, finished FROM shardkit_job_cursor"
        " WHERE job = %s AND phase = %s AND table_name = %s",
        job,
        phase,
        table,
    )
    if not found:
        return Cursor()
    last, rows, finished = found[0]
    return Cursor(None if last is None else tuple(json.loads(last)), int(rows), bool(finished))


def write_cursor(server: Server, job: str, phase: str, table: str, cursor: Cursor) -> None:
    """Note it, in the caller's transaction."""
    last = None if cursor.last is None else json.dumps(cursor.last)
    server.run(
        "INSERT INTO shardkit_job_cursor (job, phase, table_name, last_key, row_count, finished)"
        " VALUES (%s, %s, %s, %s, %s, %s) ON DUPLICATE KEY UPDATE"
        " last_key = VALUES(last_key), row_count = VALUES(row_count), finished = VALUES(finished)",
        job,
        phase,
        table,
        last,
        cursor.rows,
        int(cursor.finished),
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows as literals, with their primary keys, in the key's order.

    :param seconds: what reading them took.
    """

    rows: Sequence[bytes]
    keys: Sequence[Key]
    seconds: float

    @property
    def size(self) -> int:
        """Bytes of the literals."""
        return sum(map(len, self.rows))


def read_chunk(source: Server, table: Table, where: str, after: Key | None, limit: int) -> Chunk:
    """The next rows behind ``after`` that fulfil ``where``.

    :raises RebalanceError: for a row whose literal is longer than the server's max_allowed_packet.
    """
    started = time.monotonic()
    part = (
        f"FROM {quoted(table.name)} FORCE INDEX (PRIMARY) WHERE {where} AND {table.after(after)} ORDER BY {table.order}"
    )
    # One column: every further one costs the driver as much as the row itself. Key literals hold no control characters.
    found = source.rows(
        f"SELECT CONCAT(CONCAT_WS(X'1F',{table.key_literals}),X'1E',{table.row_expression}) {part} LIMIT {limit}"
    )
    rows: list[bytes] = []
    keys: list[Key] = []
    for (line,) in found:
        if line is None:
            (key,) = source.rows(f"SELECT {table.key_literals} {part} LIMIT {len(rows)}, 1")
            raise RebalanceError(
                f"{source}: the row of {table.name} with the primary key {show_key(table, tuple(map(str, key)))} does "
                "not fit into max_allowed_packet as an SQL literal",
                hint="raise max_allowed_packet on both servers to three times the largest row, then run this again",
            )
        names, _, row = (line if isinstance(line, bytes) else line.encode()).partition(b"\x1e")
        rows.append(row)
        keys.append(tuple(names.decode().split("\x1f")))
    return Chunk(rows, keys, time.monotonic() - started)


@dataclass(frozen=True)
class Copy:
    """Copies tables of one job.

    :param source: reads.
    :param target: writes; its literals are bytes.
    :param lookup: a second connection to the target, to name the row that is in the way.
    :param check: called between chunks; raises to stop.
    :param wait: called with seconds to wait.
    :param report: told the table and its rows so far.
    """

    job: str
    source: Server
    target: Server
    lookup: Server
    lease: Lease
    throttle: Throttle
    check: Callable[[], None]
    wait: Callable[[float], None]
    report: Callable[[Table, int], None]

    def run(self, table: Table, where: str) -> int:
        """Copy the rows that fulfil ``where``, from wherever an earlier run stopped.

        :returns: all rows copied of this table, earlier runs included.
        :raises RebalanceError: when a row of the target is in the way.
        """
        cursor = read_cursor(self.target, self.job, "copy", table.name)
        if cursor.finished:
            return cursor.rows
        packet = int(self.target.row("SELECT @@max_allowed_packet")[0])
        size = ChunkSize()
        self.report(table, cursor.rows)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardkit-copy") as ahead:
            pending = ahead.submit(read_chunk, self.source, table, where, cursor.last, size.rows)
            try:
                while True:
                    chunk = pending.result()
                    if chunk.rows:
                        pending = ahead.submit(read_chunk, self.source, table, where, chunk.keys[-1], size.rows)
                    try:
                        cursor = self._write(table, chunk, cursor, packet, size)
                    except pymysql.IntegrityError as error:
                        if not error.args or error.args[0] != ER.DUP_ENTRY:
                            raise
                        # on the thread that reads from the source: a connection takes one statement at a time
                        raise ahead.submit(self._clash, table, chunk, str(error.args[1])).result() from error
                    reach("copying.chunk")
                    self.report(table, cursor.rows)
                    if cursor.finished:
                        return cursor.rows
                    self.check()
            finally:
                pending.cancel()

    def _write(self, table: Table, chunk: Chunk, cursor: Cursor, packet: int, size: ChunkSize) -> Cursor:
        started = time.monotonic()
        last = chunk.keys[-1] if chunk.keys else cursor.last
        after = Cursor(last, cursor.rows + len(chunk.rows), finished=not chunk.rows)
        with self.target.transaction():
            self.lease.check(self.target)
            for statement in statements(table, chunk.rows, min(STATEMENT_BYTES, packet)):
                if len(statement) >= packet:
                    raise RebalanceError(
                        f"{self.target}: a row of {table.name} takes {len(statement):,} bytes as a statement, more "
                        f"than max_allowed_packet ({packet:,})",
                        job=self.job,
                        hint="raise max_allowed_packet on both servers, then run the same command again",
                    )
                self.target.run_bytes(statement)
            write_cursor(self.target, self.job, "copy", table.name, after)
        took = time.monotonic() - started
        size.learn(len(chunk.rows), chunk.size, max(took, chunk.seconds))
        pause = self.throttle.pause_after(len(chunk.rows), max(took, chunk.seconds))
        if pause:
            self.wait(pause)
        return after

    def _clash(self, table: Table, chunk: Chunk, said: str) -> RebalanceError:
        """Name both rows that cannot be on one shard."""
        found = find_clash(self.source, self.lookup, table, chunk.keys)
        rows = "; ".join(found) if found else said
        return RebalanceError(
            f"table {table.name}: a row to be moved from {self.source.shard} clashes with one of {self.target.shard}: "
            f"{rows}",
            job=self.job,
            hint="mend or delete one of the two rows (on the source the bucket is closed: cancel the job first), "
            "then run the same command again",
        )


def find_clash(source: Server, target: Server, table: Table, keys: Sequence[Key]) -> list[str]:
    """Pairs of rows, one among these of the source and one of the target, that share a unique value; a few of them."""
    found: list[str] = []
    for name, columns in (("PRIMARY", table.primary), *((index.name, index.columns) for index in table.unique)):
        literals = ",".join(table.column(column).key_literal for column in columns)
        for start in range(0, len(keys), 200):
            part = keys[start : start + 200]
            ours = {
                row[: len(columns)]: row[len(columns) :]
                for row in source.rows(
                    f"SELECT {literals}, {table.key_literals} FROM {quoted(table.name)} WHERE {table.one_of(part)}"
                )
                if "NULL" not in row[: len(columns)] and None not in row[: len(columns)]
            }
            if not ours:
                continue
            tests = (
                "("
                + " AND ".join(f"{quoted(column)}={value}" for column, value in zip(columns, values, strict=True))
                + ")"
                for values in ours
            )
            for row in target.rows(
                f"SELECT {literals}, {table.key_literals} FROM {quoted(table.name)} WHERE {' OR '.join(tests)} LIMIT 5"
            ):
                theirs = show_key(table, tuple(map(str, row[len(columns) :])))
                mine = ours.get(row[: len(columns)])
                mine_text = "a row" if mine is None else f"the row {show_key(table, tuple(map(str, mine)))}"
                value = ", ".join(plain_literal(str(part)) for part in row[: len(columns)])
                found.append(
                    f"{mine_text} of {source.shard} and the row {theirs} of {target.shard} share {value} in {name}"
                )
                if len(found) == 5:
                    return found
    return found
