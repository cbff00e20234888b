"""Checksums by which rows of two servers of one family are compared: of ranges of the primary key, and row by row.

What is summed up is the text by which a row is copied (`shardkit.rowtext`), which tells everything apart that a copy
has to: rows of equal checksums are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

from shardkit.errors import PreconditionFailed
from shardkit.rowtext import Key, quoted
from shardkit_cdc.database import Database
from shardkit_cdc.tables import Table

#: Rows of one range.
CHUNK_ROWS = 2000
#: Added to each row's checksum so that the sum tells how many there are: more than all the checksums together.
_ONE = 10**30


class Digest(NamedTuple):
    """Number of rows, and the sum of 60 bits of each one's SHA-256: equal rows do not cancel each other out."""

    rows: int
    total: int


def digest(database: Database, table: Table, where: str) -> Digest:
    """:raises PreconditionFailed: for a row whose text the server cannot make."""
    count, total = database.rows(
        f"SELECT COUNT(*), SUM({_ONE} + CAST(CONV(LEFT(SHA2({table.row_expression}, 256), 15), 16, 10) AS DECIMAL(20)))"
        f" FROM {quoted(table.name)}{' FORCE INDEX (PRIMARY)' if table.primary else ''} WHERE {where}"
    )[0]
    with_text, checksum = divmod(int(total or 0), _ONE)
    if with_text != count:
        raise too_long(database, table)
    return Digest(int(count), checksum)


def both_digests(pool: Executor, source: Database, target: Database, table: Table, where: str) -> tuple[Digest, Digest]:
    """Both servers at work at the same time."""
    pending = [pool.submit(digest, side, table, where) for side in (source, target)]
    ours, theirs = (each.result() for each in pending)
    return ours, theirs


def compared_ranges(
    source: Database, target: Database, table: Table, chunk: int
) -> Iterator[tuple[str, Digest, Digest]]:
    """Every range of the source's primary key as a condition, with the source's and the target's digest of it."""
    low: Key | None = None
    with ThreadPoolExecutor(2, thread_name_prefix="shardkit-compare") as both:
        while True:
            high = boundary(source, table, low, chunk)
            inside = table.between(low, high)
            yield inside, *both_digests(both, source, target, table, inside)
            if high is None:
                return
            low = high


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
