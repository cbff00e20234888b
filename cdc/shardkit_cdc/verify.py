"""Comparing a hop's target with its source while both work, without false alarms.

Ranges of the primary key are compared by checksums. Where they differ, the rows are looked at one by one: a row that is
the same on the source before and after the target has passed the source's position of the first look, and is another on
the target, differs. Before a difference is reported, the source's row is read once more under a shared lock, which is
held until the target has passed: for about the hop's lag, and never longer than `LOCKED_SECONDS`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed
from shardkit.gtid import Flavour, Position, parse_position
from shardkit.rowtext import Key, quoted, show_key
from shardkit_cdc import own_schema
from shardkit_cdc.checksums import CHUNK_ROWS, both_digests, boundary, digest, row_checksums
from shardkit_cdc.connection import code_of
from shardkit_cdc.database import Database
from shardkit_cdc.position import read_row
from shardkit_cdc.preflight import end_of_log
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.tables import Table, read_tables

#: Seconds that the target may take to pass a position of the source. A hop tells of other databases' transactions every
#: ten seconds only.
PATIENCE = 30.0
#: Seconds for which rows of the source are locked at most.
LOCKED_SECONDS = 2.0
#: MySQL frees a transaction's locks a moment before its GTID is in ``gtid_executed`` (``process_commit_stage_queue`` in
#: sql/binlog.cc commits in the engine first).
_GTID_SECONDS = 0.05
#: Keys of one statement.
_KEYS = 200
_ROUNDS = 3
_LOCKED_ROUNDS = 10
_CHANGED = frozenset({1054, 1146, 1412})  # unknown column, no such table, table definition has changed

Rows: TypeAlias = Mapping[Key, str]


class Kind(StrEnum):
    """How the target differs."""

    MISSING = "missing"
    EXTRA = "extra"
    DIFFERENT = "different"
    #: The table itself: there on one side only, or of another shape.
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Difference:
    """One row, or one table, that is not on the target what it is on the source.

    :param key: the primary key for people, or what is wrong with the table.
    :param literals: the key as SQL literals; empty where there is none.
    """

    table: str
    kind: Kind
    key: str
    literals: Key = ()

    def __str__(self) -> str:
        return f"{self.table}: {self.key}" if self.kind is Kind.TABLE else f"{self.table}: {self.key} is {self.kind}"


@dataclass(slots=True)
class Verdict:
    """What a comparison has found.

    :param undecided: tables, or rows, that changed too fast to be compared.
    """

    hop: str
    tables: int = 0
    rows: int = 0
    seconds: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)


class TooFast(Exception):
    """Rows changed, or stayed locked, all the time. Never leaves this package."""


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
    :raises PreconditionFailed: the target does not follow the source, or has never been filled.
    :raises Interrupted: a server went away.
    """
    with open_pair(spec, credentials, patience) as pair:
        return _Comparison(pair, chunk, report or (lambda _table, _rows: None)).run()


class Pair:
    """Connections to both ends of a hop."""

    def __init__(self, spec: HopSpec, source: Database, target: Database, patience: float) -> None:
        self.spec = spec
        self.source = source
        self.target = target
        self._patience = patience

    def end(self) -> Position:
        """The end of the source's log."""
        return end_of_log(self.source.connection, self.source.flavour)

    def reached(self) -> Position:
        """How far the target is in the source's log.

        :raises PreconditionFailed: when the position is gone.
        """
        found = self.target.rows("SELECT gtid FROM shardkit_position WHERE hop = %s", self.spec.key)
        if not found:
            raise PreconditionFailed(f"the position in {self.spec.target} is gone", hint="is it being seeded?")
        return parse_position(self.target.flavour, found[0][0])

    def catch_up(self, *, seconds: float | None = None) -> None:
        """Wait until the target has all that is in the source's log now.

        :param seconds: to wait at most, where rows of the source are locked.
        :raises TooFast: when that is not enough, where ``seconds`` are given.
        :raises PreconditionFailed: when the target does not follow.
        """
        if seconds is not None and self.source.flavour is Flavour.MYSQL:
            time.sleep(_GTID_SECONDS)
        wanted = self.end()
        end = time.monotonic() + (self._patience if seconds is None else seconds)
        pause = 0.002
        while not (reached := self.reached()).covers(wanted):
            if time.monotonic() > end:
                if seconds is not None:
                    raise TooFast
                raise PreconditionFailed(
                    f"{self.spec.target} is at {reached or 'the beginning'} and does not get to {wanted} of "
                    f"{self.spec.source} within {self._patience:.0f} s: only a target that follows can be compared",
                    hint="start the relay (shardkit relay run) and look why it stopped (shardkit relay status); a hop "
                    "that stopped for good is seeded anew (shardkit relay seed)",
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)


@contextmanager
def open_pair(spec: HopSpec, credentials: CredentialSource, patience: float = PATIENCE) -> Iterator[Pair]:
    with ExitStack() as stack:
        source, target = (
            stack.enter_context(closing(Database(endpoint, credentials, hop=spec.name)))
            for endpoint in (spec.source, spec.target)
        )
        if source.flavour is not target.flavour:
            raise PreconditionFailed(
                f"{spec.source.address} is {source.flavour} and {spec.target.address} is {target.flavour}",
                hint="only servers of one family can be compared: each writes values in its own way",
            )
        for each in (source, target):
            each.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # locks the gaps of missing rows too
        source.run(f"SET SESSION innodb_lock_wait_timeout = {LOCKED_SECONDS:.0f}")
        if not own_schema.exists(target.connection) or read_row(target.connection, spec.key) is None:
            raise PreconditionFailed(
                f"{spec.target} has no position: the relay has not filled it yet",
                hint="shardkit relay run, or shardkit relay seed",
            )
        yield Pair(spec, source, target, patience)


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
        for table in self._tables():
            self._table(table)
            self._verdict.tables += 1
        self._verdict.seconds = time.monotonic() - began
        return self._verdict

    # --- tables

    def _tables(self) -> list[Table]:
        """The tables that both have in one shape; what else there is, is a difference."""
        faults: list[Difference] = []
        for _ in range(_ROUNDS):
            ours = _compared(self._source)
            self._pair.catch_up()
            theirs = _compared(self._target)
            faults = _shape_faults(ours, theirs)
            if not faults or _shapes(_compared(self._source)) == _shapes(ours):
                break
        self._verdict.differences += faults
        wrong = {fault.table for fault in faults}
        return [table for name, table in ours.items() if name not in wrong]

    def _table(self, table: Table) -> None:
        compare = self._by_key if table.primary else self._as_a_whole
        before = self._verdict.rows, len(self._verdict.differences)
        for _ in range(_ROUNDS):
            try:
                compare(table)
            except TooFast:
                self._verdict.undecided.append(table.name)
            except pymysql.MySQLError as error:
                if code_of(error) not in _CHANGED:
                    raise
                # A schema change is on its way: look again once it has arrived.
                self._verdict.rows = before[0]
                del self._verdict.differences[before[1] :]
                self._pair.catch_up()
                found = _compared(self._source).get(table.name)
                if found is None:
                    return
                table = found
                continue
            return
        self._verdict.undecided.append(table.name)

    # --- tables with a primary key

    def _by_key(self, table: Table) -> None:
        low: Key | None = None
        done = 0
        with ThreadPoolExecutor(2, thread_name_prefix="shardkit-verify") as both:
            while True:
                high = boundary(self._source, table, low, self._chunk)
                inside = table.between(low, high)
                ours, theirs = both_digests(both, self._source, self._target, table, inside)
                if ours != theirs:
                    self._range(table, inside)
                done += ours.rows
                self._verdict.rows += ours.rows
                self._report(table.name, done)
                if high is None:
                    return
                low = high

    def _range(self, table: Table, where: str) -> None:
        """Find out which rows of a range differ, if any."""
        ours = row_checksums(self._source, table, where)
        self._pair.catch_up()
        theirs = row_checksums(self._target, table, where)
        doubtful = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
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
                    kind = Kind.MISSING if key not in theirs else Kind.EXTRA if key not in ours else Kind.DIFFERENT
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
                ours_counted, theirs_counted = _counted(self._source, table), _counted(self._target, table)
                self._pair.catch_up()
                if digest(self._source, table, "TRUE") != before or digest(self._target, table, "TRUE") != theirs:
                    continue
                for kind, rows in (
                    (Kind.MISSING, ours_counted - theirs_counted),
                    (Kind.EXTRA, theirs_counted - ours_counted),
                ):
                    for text, times in rows.items():
                        self._verdict.differences += [Difference(table.name, kind, text)] * times
            self._verdict.rows += before.rows
            self._report(table.name, before.rows)
            return
        raise TooFast


def _compared(database: Database) -> dict[str, Table]:
    return {name: table for name, table in read_tables(database).items() if not table.own and table.kind != "SEQUENCE"}


def _shapes(tables: Mapping[str, Table]) -> dict[str, object]:
    return {name: (table.shape, table.primary) for name, table in tables.items()}


def _shape_faults(ours: Mapping[str, Table], theirs: Mapping[str, Table]) -> list[Difference]:
    faults = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            faults.append(Difference(name, Kind.TABLE, "the table is missing"))
        elif name not in ours:
            faults.append(Difference(name, Kind.TABLE, "the table is extra"))
        elif _shapes({name: ours[name]}) != _shapes({name: theirs[name]}):
            faults.append(Difference(name, Kind.TABLE, "the table has other columns or another primary key"))
    return faults


def _counted(database: Database, table: Table) -> Counter[str]:
    """How often each row is there, by its text (the first characters of it, and its checksum)."""
    found = database.rows(
        f"SELECT MIN(LEFT({table.row_expression}, 100)), LEFT(SHA2({table.row_expression}, 256), 8) AS checksum, "
        f"COUNT(*) FROM {quoted(table.name)} GROUP BY checksum"
    )
    return Counter({f"{_text(text)} ({checksum})": int(times) for text, checksum, times in found})


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
