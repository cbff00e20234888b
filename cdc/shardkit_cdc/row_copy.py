"""Making one table's rows on a target those of a source's snapshot, whatever the target holds before.

First all that differs is deleted, then all that is missing is copied. Between the two the target holds none but rows of
the snapshot: so no row that is copied meets an old one in a unique index. Nothing rests on what earlier attempts noted:
rows are kept because their checksum is the source's.

Nobody else may write the table meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

from shardkit.errors import Interrupted, PreconditionFailed
from shardkit.rowtext import Key, quoted
from shardkit_cdc.checksums import GROUPS, boundary, digest, group_digests, in_groups, on_both, row_checksums, too_long
from shardkit_cdc.database import Database
from shardkit_cdc.tables import Table

#: Bytes of one INSERT statement, unless the target's max_allowed_packet is smaller.
STATEMENT_BYTES = 1 << 20
#: Statements of one transaction.
_STATEMENTS = 8
#: Statements that are read ahead.
_AHEAD = 4
#: Keys of one statement.
_KEYS = 200
#: Times the rows of a range that the target may hold in it: their checksums are held in memory. Beyond, all of them are
#: deleted.
_MOST_TIMES = 10
#: Rows deleted in one transaction.
_DELETED_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Copied:
    """What was done to a table.

    :param rows: copied.
    :param bytes: of the statements that did it.
    :param kept: rows that the target had already.
    """

    rows: int
    bytes: int
    kept: int


@dataclass(frozen=True, slots=True)
class _Gap:
    """Rows of which the target lacks some.

    :param where: which they are on the source, in SQL.
    :param empty: the target has none of them.
    """

    where: str
    empty: bool


def compared(table: Table) -> bool:
    """Whether rows that the target has can be kept: both ends put the table's keys into one order."""
    return bool(table.primary) and table.keys_alike


class RowCopy:
    """Connections that copy one table after the other.

    :param source: sees the snapshot.
    :param target: reads the target.
    :param writer: writes it; its literals are bytes.
    :param fence: called with the writer at the beginning of each of its transactions; raises where the target is not
        the caller's any more.
    :param chunk: rows of one range.
    :param stop: set where another thread has failed.
    :param advance: told of rows that are done: kept, or copied.
    """

    def __init__(
        self,
        source: Database,
        target: Database,
        writer: Database,
        *,
        fence: Callable[[Database], None],
        chunk: int,
        stop: threading.Event,
        advance: Callable[[Table, int], None],
    ) -> None:
        self._source = source
        self._target = target
        self._writer = writer
        self._fence = fence
        self._chunk = chunk
        self._stop = stop
        self._advance = advance
        self._packet = int(writer.value("SELECT @@max_allowed_packet"))

    def copy(self, table: Table, written: Table | None = None) -> Copied:
        """Make the target's rows the snapshot's.

        :param table: one whose rows are not `compared` has to be empty on the target.
        :param written: the table as its rows are written, where that is not as they are compared.
        """
        written = written or table
        kept, gaps = self._delete_wrong(table) if compared(table) else (0, [_Gap("TRUE", True)])
        rows = size = 0
        parts = self._parts(written, self._missing(written, gaps))
        with closing(_ahead(parts, self._stop)) as statements:
            ended = False
            while not ended:
                done, sent, ended = self._write(table, statements)
                rows, size = rows + done, size + sent
                self._advance(table, done)
        return Copied(rows, size, kept)

    def empty(self, table: Table) -> None:
        """Delete all of the target's rows."""
        while self._delete(table, f"TRUE LIMIT {_DELETED_ROWS}"):
            self._go_on()

    def differs(self, table: Table) -> bool:
        """Whether the target's rows are not the snapshot's."""
        with ThreadPoolExecutor(2, thread_name_prefix="shardkit-seed-compare") as both:
            ours, theirs = on_both(both, digest, self._source, self._target, table, "TRUE")
        return ours != theirs

    # --- first what is wrong

    def _delete_wrong(self, table: Table) -> tuple[int, list[_Gap]]:
        """Leave none but the snapshot's rows on the target: how many, and where some are missing."""
        kept, low = 0, None
        gaps: list[_Gap] = []
        with ThreadPoolExecutor(2, thread_name_prefix="shardkit-seed-compare") as both:
            while self._holds(table, low):
                self._go_on()
                high = boundary(self._source, table, low, self._chunk)
                inside = table.between(low, high)
                ours, theirs = on_both(both, digest, self._source, self._target, table, inside)
                right = ours.rows
                if ours != theirs:
                    right, gap = self._delete_wrong_of(both, table, inside, theirs.rows)
                    if right < ours.rows:
                        gaps.append(gap)
                kept += right
                self._advance(table, right)
                if high is None:
                    return kept, gaps
                low = high
        return kept, [*gaps, _Gap(table.after(low), empty=True)]

    def _holds(self, table: Table, low: Key | None) -> bool:
        """Whether the target has rows behind this key."""
        return bool(self._target.rows(f"SELECT 1 FROM {quoted(table.name)} WHERE {table.after(low)} LIMIT 1"))

    def _delete_wrong_of(self, both: Executor, table: Table, inside: str, held: int) -> tuple[int, _Gap]:
        """The same for a range that differs: how many rows are left, and where some may be missing.

        :param held: how many rows the target has there.
        """
        ends = self._source, self._target
        if 0 < held <= _MOST_TIMES * self._chunk:
            sums = on_both(both, group_digests, *ends, table, inside)
            groups = [group for group in range(GROUPS) if sums[0].get(group) != sums[1].get(group)]
            part = f"{inside} AND {in_groups(table, groups)}"
            ours, theirs = on_both(both, row_checksums, *ends, table, part)
            wrong = [key for key, checksum in theirs.items() if ours.get(key) != checksum]
            keys = (wrong[start : start + _KEYS] for start in range(0, len(wrong), _KEYS))
            if sum([self._delete(table, table.one_of(some)) for some in keys]) == len(wrong):
                return held - len(wrong), _Gap(part, empty=len(wrong) == len(theirs))
        while held and self._delete(table, f"{inside} LIMIT {_DELETED_ROWS}"):
            self._go_on()
        return 0, _Gap(inside, empty=True)

    def _delete(self, table: Table, where: str) -> int:
        with self._transaction():
            return self._writer.run(f"DELETE FROM {quoted(table.name)} WHERE {where}")

    # --- then what is missing

    def _missing(self, table: Table, gaps: Iterable[_Gap]) -> Iterator[bytes]:
        """The text of each of the source's rows that the target lacks."""
        for gap in gaps:
            held = set() if gap.empty else self._keys(table, gap)
            keys = f", {table.key_literals}" if held else ""
            for line, *key in self._source.stream(f"SELECT {table.row_expression}{keys} FROM {table.walk(gap.where)}"):
                if line is None:
                    raise too_long(self._source, table)
                if not held or tuple(map(str, key)) not in held:
                    yield line if isinstance(line, bytes) else line.encode()

    def _keys(self, table: Table, gap: _Gap) -> set[Key]:
        found = self._target.rows(f"SELECT {table.key_literals} FROM {table.walk(gap.where)}")
        return {tuple(map(str, key)) for key in found}

    def _parts(self, table: Table, rows: Iterable[bytes]) -> Generator[tuple[int, bytes]]:
        """INSERT statements, and the number of rows in each."""
        most = min(STATEMENT_BYTES, self._packet // 2)
        head = table.insert_head.encode()
        part: list[bytes] = []
        size = len(head)
        for row in rows:
            if part and size + len(row) + 1 > most:
                yield len(part), head + b",".join(part)
                part, size = [], len(head)
            part.append(row)
            size += len(row) + 1
        if part:
            yield len(part), head + b",".join(part)

    def _write(self, table: Table, parts: Iterator[tuple[int, bytes]]) -> tuple[int, int, bool]:
        """One transaction; its rows, their bytes, and whether they were the last ones."""
        rows = size = count = 0
        with self._transaction():
            for count, (number, statement) in enumerate(parts, 1):
                if len(statement) >= self._packet:
                    raise PreconditionFailed(
                        f"a row of {table.name} takes {len(statement):,} bytes as a statement, more than "
                        f"max_allowed_packet of {self._writer} ({self._packet:,})",
                        hint="raise max_allowed_packet on both servers to three times the largest row, then run this "
                        "again",
                    )
                self._writer.run(statement)
                rows, size = rows + number, size + len(statement)
                if count == _STATEMENTS:
                    break
                self._go_on()
        return rows, size, count < _STATEMENTS

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._writer.transaction():
            self._fence(self._writer)
            yield

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _stopped()


def _stopped() -> Interrupted:
    return Interrupted("another table could not be copied")


def _ahead(parts: Generator[tuple[int, bytes]], stop: threading.Event) -> Generator[tuple[int, bytes]]:
    """The same, read by a thread of its own while the consumer writes."""
    ready: queue.Queue[tuple[int, bytes] | BaseException | None] = queue.Queue(_AHEAD)
    ended = threading.Event()

    def put(item: tuple[int, bytes] | BaseException | None) -> bool:
        while not (ended.is_set() or stop.is_set()):
            try:
                ready.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            with closing(parts):
                for part in parts:
                    if not put(part):
                        return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer
            put(error)

    thread = threading.Thread(target=read, name="shardkit-seed-read", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=0.2)
            except queue.Empty:
                if stop.is_set():
                    raise _stopped() from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        thread.join()
