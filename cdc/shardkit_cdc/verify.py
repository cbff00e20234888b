"""Comparing a hop's target with its source while both work, without false alarms.

Ranges of the primary key are compared by checksums. Where they differ, the rows are looked at one by one: a row that is
the same on the source before and after the target has passed the source's position of the first look, and is another on
the target, differs. Before a difference is reported, the source's row is read once more under a shared lock, which is
held until the target has passed: for about the hop's lag, and never longer than `LOCKED_SECONDS`.

A hop that stands still is compared in another way: `standstill`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed
from shardkit.rowtext import Key, show_key
from shardkit_cdc.checksums import (
    CHUNK_ROWS,
    checksums_of,
    compared_ranges,
    digest,
    ranges,
    row_checksums,
    suspicious_rows,
)
from shardkit_cdc.comparison import (
    LOCKED_SECONDS,
    PATIENCE,
    Difference,
    Pair,
    TooFast,
    Verdict,
    count_rows,
    differing_rows,
    kind_of,
    open_pair,
)
from shardkit_cdc.connection import SCHEMA_CHANGED, code_of
from shardkit_cdc.matching import Matched, compared_tables, computed_columns, match, other_values, shapes
from shardkit_cdc.position import HopRow
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.standstill import compare_at
from shardkit_cdc.tables import Table

#: Keys of one statement.
_KEYS = 200
_ROUNDS = 3
_LOCKED_ROUNDS = 10


def verify(
    spec: HopSpec,
    credentials: CredentialSource,
    *,
    patience: float = PATIENCE,
    chunk: int = CHUNK_ROWS,
    report: Callable[[str, int], None] | None = None,
) -> Verdict:
    """Compare all tables, shardkit's own left out.

    :param patience: seconds that the target may take to pass a position of the source.
    :param chunk: rows of one range.
    :param report: told the table and how many rows of it have been compared.
    :raises PreconditionFailed: the target is too far behind, or has never been filled; or its hop stands still, and too
        much has happened on the source since.
    :raises PositionLost: its hop stands still, and the source no longer has the log from there on.
    :raises Interrupted: a server went away.
    """
    report = report or (lambda _table, _rows: None)
    with open_pair(spec, credentials, patience) as pair:
        stopped = _standing_still(pair)
        if stopped is not None:
            return compare_at(stopped, pair, credentials, chunk=chunk, report=report)
        return _Comparison(pair, chunk, report).run()


def _standing_still(pair: Pair) -> HopRow | None:
    """The row of a hop that does not go on although the source's log does; None of one that follows.

    :raises PreconditionFailed: when it goes on, and is too far behind.
    """
    row = pair.row()
    if row.error and not pair.reached().covers(pair.end()):
        return row
    try:
        pair.catch_up()
    except PreconditionFailed:
        if pair.row().gtid != row.gtid:
            raise
        return row
    return None


def _only(name: str, tables: Mapping[str, Table]) -> dict[str, Table]:
    return {name: tables[name]} if name in tables else {}


class _Comparison:
    def __init__(self, pair: Pair, chunk: int, report: Callable[[str, int], None]) -> None:
        self._pair = pair
        self._source = pair.source
        self._target = pair.target
        self._chunk = chunk
        self._report = report
        self._verdict = Verdict(pair.spec.name)

    def run(self) -> Verdict:
        began = time.monotonic()
        self._pair.catch_up()
        matched = self._match()
        for table in matched.tables.values():
            self._table(table)
            self._verdict.tables += 1
        differing = {each.table for each in self._verdict.differences}
        for table in matched.computed.values():
            if table.name not in differing:
                self._computed(table)
        self._pair.row()  # whether the target was what it was to the end
        self._verdict.seconds = time.monotonic() - began
        return self._verdict

    # --- tables

    def _match(self) -> Matched:
        """The tables that both have in one shape; what else there is, is a difference."""
        for _ in range(_ROUNDS):
            ours = compared_tables(self._source)
            self._pair.catch_up()
            matched = match(self._source, self._target, ours, compared_tables(self._target))
            if not matched.faults or shapes(compared_tables(self._source)) == shapes(ours):
                break
        self._verdict.differences += matched.faults
        self._verdict.left_out += matched.left_out
        self._verdict.tables_left_out += matched.tables_left_out
        return matched

    def _table(self, table: Table) -> None:
        compare = self._as_a_whole
        if table.primary:
            compare = self._by_key if table.keys_alike else self._from_both_ends
        before = self._verdict.rows, len(self._verdict.differences)
        for _ in range(_ROUNDS):
            try:
                compare(table)
            except TooFast:
                self._verdict.undecided.append(table.name)
            except pymysql.MySQLError as error:
                if code_of(error) not in SCHEMA_CHANGED:
                    raise
                # A schema change is on its way: look again once it has arrived.
                self._verdict.rows = before[0]
                del self._verdict.differences[before[1] :]
                self._pair.catch_up()
                ours, theirs = (_only(table.name, compared_tables(side)) for side in (self._source, self._target))
                if not ours:
                    return
                table = match(self._source, self._target, ours, theirs).tables.get(table.name, table)
                continue
            return
        self._verdict.undecided.append(table.name)

    def _computed(self, table: Table) -> None:
        """Say whether the target computes other values than the source: one range that rests is enough for that."""
        decided = True
        try:
            by_range = table.primary and table.keys_alike
            for inside in ranges(self._source, table, self._chunk) if by_range else ["TRUE"]:
                alike = self._is_computed_alike(table, inside)
                if alike is False:
                    self._verdict.left_out.append(other_values(table))
                    return
                decided = decided and alike is True
        except pymysql.MySQLError as error:
            if code_of(error) not in SCHEMA_CHANGED:
                raise
            decided = False
        if not decided:
            self._verdict.undecided.append(computed_columns(table))

    def _is_computed_alike(self, table: Table, where: str) -> bool | None:
        """None where the rows change all the time."""
        for _ in range(_ROUNDS):
            ours = digest(self._source, table, where)
            self._pair.catch_up()
            theirs = digest(self._target, table, where)
            if ours == theirs:
                return True
            if digest(self._source, table, where) == ours:
                self._pair.catch_up()
                if digest(self._target, table, where) == theirs:
                    return False
        return None

    # --- tables with a primary key

    def _by_key(self, table: Table) -> None:
        done = 0
        for inside, ours, theirs in compared_ranges(self._source, self._target, table, self._chunk):
            if ours != theirs:
                self._range(table, inside)
            done += ours.rows
            self._verdict.rows += ours.rows
            self._report(table.name, done)

    def _range(self, table: Table, where: str) -> None:
        """Find out which rows of a range differ, if any."""
        ours = row_checksums(self._source, table, where)
        self._pair.catch_up()
        theirs = row_checksums(self._target, table, where)
        doubtful = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        self._settle(table, doubtful)

    def _from_both_ends(self, table: Table) -> None:
        """The same where each end may have an order of its own: the source's rows, then whether the target has more."""
        done, differing = 0, False
        for count, ours in suspicious_rows(self._source, self._target, table, self._chunk):
            if ours is not None:
                differing = True
                self._pair.catch_up()
                theirs = checksums_of(self._target, table, ours)
                self._settle(table, [key for key, checksum in ours.items() if theirs.get(key) != checksum])
            done += count
            self._verdict.rows += count
            self._report(table.name, done)
        for _, held in suspicious_rows(self._target, self._source, table, self._chunk) if differing else ():
            if held is not None:
                known = checksums_of(self._source, table, held)
                self._settle(table, [key for key in held if key not in known])

    def _settle(self, table: Table, doubtful: list[Key]) -> None:
        """Name those of these rows that differ."""
        for _ in range(_ROUNDS):
            if not doubtful:
                return
            doubtful = self._look_again(table, doubtful)
        for start in range(0, len(doubtful), _KEYS):
            self._decide(table, doubtful[start : start + _KEYS])

    def _look_again(self, table: Table, keys: Sequence[Key]) -> list[Key]:
        """Those that the target does not have as the source has."""
        left: list[Key] = []
        for start in range(0, len(keys), _KEYS):
            part = keys[start : start + _KEYS]
            ours = row_checksums(self._source, table, table.one_of(part))
            self._pair.catch_up()
            theirs = row_checksums(self._target, table, table.one_of(part))
            left += [key for key in part if ours.get(key) != theirs.get(key)]
        return left

    def _decide(self, table: Table, keys: Sequence[Key]) -> None:
        """Compare rows while the source's are locked: nothing can be on its way."""
        for _ in range(_LOCKED_ROUNDS):
            try:
                with self._source.transaction():
                    ours = row_checksums(self._source, table, table.one_of(keys), lock=True)
                    self._pair.catch_up(seconds=LOCKED_SECONDS)
                    theirs = row_checksums(self._target, table, table.one_of(keys))
            except (TooFast, Interrupted):
                time.sleep(0.1)
                continue
            for key in sorted(ours | theirs):
                if ours.get(key) != theirs.get(key):
                    kind = kind_of(key, ours, theirs)
                    self._verdict.differences.append(Difference(table.name, kind, show_key(table, key), key))
            return
        self._verdict.undecided += [f"{table.name}: {show_key(table, key)}" for key in keys]

    # --- tables without one

    def _as_a_whole(self, table: Table) -> None:
        """Rows that are equal in everything cannot be told apart: they are counted."""
        for _ in range(_LOCKED_ROUNDS):
            before = digest(self._source, table, "TRUE")
            self._pair.catch_up()
            theirs = digest(self._target, table, "TRUE")
            if before != theirs:
                if digest(self._source, table, "TRUE") != before:
                    continue
                ours_counted, theirs_counted = count_rows(self._source, table), count_rows(self._target, table)
                self._pair.catch_up()
                if digest(self._source, table, "TRUE") != before or digest(self._target, table, "TRUE") != theirs:
                    continue
                self._verdict.differences += differing_rows(table, ours_counted, theirs_counted)
            self._verdict.rows += before.rows
            self._report(table.name, before.rows)
            return
        raise TooFast
