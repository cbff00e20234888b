"""Checksums by which rows of two servers are compared: of ranges of the primary key, and row by row.

What is summed up is the text by which a row is copied (`shardkit.rowtext`), or one that both families write alike
(`shardkit_cdc.matching`). It tells everything apart that a copy has to: rows of equal checksums are equal to the last
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from shardkit.errors import PreconditionFailed
from shardkit.rowtext import Digest, Key, digest_of, quoted
from shardkit_cdc.database import Database
from shardkit_cdc.tables import Table

#: Rows of one range.
CHUNK_ROWS = 2000
#: Parts into which a range that differs is divided.
GROUPS = 64
#: Keys of one statement.
_KEYS = 200

T = TypeVar("T")


def digest(database: Database, table: Table, where: str) -> Digest:
    """:raises PreconditionFailed: for a row whose text the server cannot make."""
    index = " FORCE INDEX (PRIMARY)" if table.primary else ""
    found = digest_of(*database.rows(f"SELECT {table.digest} FROM {quoted(table.name)}{index} WHERE {where}")[0])
    if found is None:
        raise too_long(database, table)
    return found


def on_both(
    pool: Executor,
    ask: Callable[[Database, Table, str], T],
    source: Database,
    target: Database,
    table: Table,
    where: str,
) -> tuple[T, T]:
    """The answers of both servers, which are at work at the same time."""
    pending = [pool.submit(ask, side, table, where) for side in (source, target)]
    ours, theirs = (each.result() for each in pending)
    return ours, theirs


def group_digests(database: Database, table: Table, where: str) -> dict[int, int]:
    """The sum of the checksums of each of `GROUPS` groups, over which rows are spread by their primary key.

    For a range that is known to differ: which part of it does. Rows whose text the server cannot make are left out.
    """
    return {
        int(group): int(total or 0)
        for group, total in database.rows(
            f"SELECT {_group(table)}, SUM({table.checksum}) FROM {quoted(table.name)} FORCE INDEX (PRIMARY) "
            f"WHERE {where} GROUP BY 1"  # a name could be that of a column of the table, which would be taken
        )
    }


def in_groups(table: Table, groups: Iterable[int]) -> str:
    """SQL: the row is in one of these groups."""
    return f"{_group(table)} IN ({','.join(map(str, groups))})"


def _group(table: Table) -> str:
    return f"CRC32(CONCAT({table.key_literals})) % {GROUPS}"


def ranges(database: Database, table: Table, chunk: int) -> Iterator[str]:
    """Every range of a server's primary key as a condition, in its order."""
    low: Key | None = None
    while True:
        high = boundary(database, table, low, chunk)
        yield table.between(low, high)
        if high is None:
            return
        low = high


def compared_ranges(
    source: Database, target: Database, table: Table, chunk: int
) -> Iterator[tuple[str, Digest, Digest]]:
    """Every range of the source's primary key as a condition, with the source's and the target's digest of it."""
    with ThreadPoolExecutor(2, thread_name_prefix="shardkit-compare") as both:
        for inside in ranges(source, table, chunk):
            yield inside, *on_both(both, digest, source, target, table, inside)


def suspicious_rows(
    walked: Database, other: Database, table: Table, chunk: int
) -> Iterator[tuple[int, dict[Key, str] | None]]:
    """For ends that may put a table's keys into two orders: one end's ranges, as the number of rows in each and, where
    the other end's digest differs, each row's checksum; else None.

    As soon as a range turns out to be a large one on the other end, all of its like are given without asking that end.
    """
    large = False
    with ThreadPoolExecutor(2, thread_name_prefix="shardkit-compare") as both:
        for inside in ranges(walked, table, chunk):
            if not large:
                here, there = on_both(both, digest, walked, other, table, inside)
                if here == there:
                    yield here.rows, None
                    continue
                large = there.rows > 2 * chunk
            rows = row_checksums(walked, table, inside)
            yield len(rows), rows


def checksums_of(database: Database, table: Table, keys: Iterable[Key]) -> dict[Key, str]:
    """As `row_checksums`, of these rows."""
    wanted = list(keys)
    found: dict[Key, str] = {}
    for start in range(0, len(wanted), _KEYS):
        found |= row_checksums(database, table, table.one_of(wanted[start : start + _KEYS]))
    return found


def row_checksums(database: Database, table: Table, where: str, *, lock: bool = False) -> dict[Key, str]:
    """Each row's primary key and SHA-256.

    :raises PreconditionFailed: for a row whose text the server cannot make.
    """
    found = database.rows(
        f"SELECT SHA2({table.row_expression}, 256), {table.key_literals} FROM {quoted(table.name)} "
        f"FORCE INDEX (PRIMARY) WHERE {where}{' LOCK IN SHARE MODE' if lock else ''}"
    )
    if any(checksum is None for checksum, *_ in found):
        raise too_long(database, table)
    return {tuple(map(str, key)): str(checksum) for checksum, *key in found}


def boundary(database: Database, table: Table, low: Key | None, rows: int) -> Key | None:
    """The primary key that ends the range of so many rows behind ``low``; None where the last one begins."""
    found = database.rows(
        f"SELECT {table.key_literals} FROM {quoted(table.name)} FORCE INDEX (PRIMARY) WHERE {table.after(low)} "
        f"ORDER BY {table.order} LIMIT {rows - 1}, 1"
    )
    return tuple(map(str, found[0])) if found else None


def too_long(database: Database, table: Table) -> PreconditionFailed:
    """A row's text is longer than the server lets a string be."""
    return PreconditionFailed(
        f"a row of {table.name} does not fit into the max_allowed_packet of {database} as an SQL literal",
        hint="raise max_allowed_packet on both servers to three times the largest row, then run this again",
    )
