"""What comparing a hop's two ends is about: connections to both, their tables, and what is found."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.gtid import Flavour, Position, parse_position
from shardkit.rowtext import Key, quoted
from shardkit_cdc import own_schema
from shardkit_cdc.database import Database
from shardkit_cdc.position import HopRow, read_row
from shardkit_cdc.preflight import end_of_log
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.tables import Table

#: Seconds that the target may take to pass a position of the source. A hop tells of other databases' transactions every
#: ten seconds only.
PATIENCE = 30.0
#: Seconds for which rows of the source are locked at most.
LOCKED_SECONDS = 2.0
#: MySQL frees a transaction's locks a moment before its GTID is in ``gtid_executed`` (``process_commit_stage_queue`` in
#: sql/binlog.cc commits in the engine first).
_GTID_SECONDS = 0.05


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


def kind_of(key: Key, ours: Container[Key], theirs: Container[Key]) -> Kind:
    """How a row differs of which it is known that it does.

    :param ours: keys that the source has.
    :param theirs: keys that the target has.
    """
    return Kind.MISSING if key not in theirs else Kind.EXTRA if key not in ours else Kind.DIFFERENT


@dataclass(frozen=True, slots=True)
class Stopped:
    """Where a hop stands still.

    :param position: of the source's log; the target is compared as of there.
    :param error: why it stopped; empty where nobody runs it.
    """

    position: str
    error: str


@dataclass(slots=True)
class Verdict:
    """What a comparison has found.

    :param undecided: tables, or rows, that changed too fast to be compared, or since the hop stopped.
    :param stopped: of a hop that stands still; None where the target follows.
    :param left_out: tables and columns that cannot be compared between two families, and why.
    :param tables_left_out: names of the tables among them.
    """

    hop: str
    stopped: Stopped | None = None
    tables: int = 0
    rows: int = 0
    seconds: float = 0.0
    differences: list[Difference] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tables_left_out: list[str] = field(default_factory=list)


class TooFast(Exception):
    """Rows changed, or stayed locked, all the time. Never leaves this package."""


class Pair:
    """Connections to both ends of a hop.

    :param row: the hop's, as it is now.
    """

    def __init__(self, spec: HopSpec, source: Database, target: Database, row: HopRow, patience: float) -> None:
        self.spec = spec
        self.source = source
        self.target = target
        self._filled_by = row.ddl_origin
        self._patience = patience

    def end(self) -> Position:
        """The end of the source's log."""
        return end_of_log(self.source.connection, self.source.flavour)

    def end_behind_what_is_seen(self) -> Position:
        """The same, and no transaction of which something has been seen is behind it."""
        if self.source.flavour is Flavour.MYSQL:
            time.sleep(_GTID_SECONDS)
        return self.end()

    def row(self) -> HopRow:
        """The hop's row on the target.

        :raises PreconditionFailed: when it is gone, or another one: a seed takes rows away before it brings them.
        """
        found = read_row(self.target.connection, self.spec.key)
        if found is None:
            raise PreconditionFailed(f"the position in {self.spec.target} is gone", hint="is it being seeded?")
        if found.ddl_origin != self._filled_by:
            raise PreconditionFailed(f"{self.spec.target} has been seeded meanwhile", hint="compare again")
        return found

    def reached(self) -> Position:
        """How far the target is in the source's log.

        :raises PreconditionFailed: when the position is gone.
        """
        return parse_position(self.source.flavour, self.row().gtid)

    def catch_up(self, *, seconds: float | None = None) -> None:
        """Wait until the target has all that is in the source's log now.

        :param seconds: to wait at most, where rows of the source are locked.
        :raises TooFast: when that is not enough, where ``seconds`` are given.
        :raises PreconditionFailed: when the target does not follow.
        """
        wanted = self.end() if seconds is None else self.end_behind_what_is_seen()
        end = time.monotonic() + (self._patience if seconds is None else seconds)
        pause = 0.002
        while not (reached := self.reached()).covers(wanted):
            if time.monotonic() > end:
                if seconds is not None:
                    raise TooFast
                raise PreconditionFailed(
                    f"{self.spec.target} is at {reached or 'the beginning'} and does not get to {wanted} of "
                    f"{self.spec.source} within {self._patience:.0f} s: only a target that follows can be compared",
                    hint="wait until it has caught up (shardkit relay status), then compare again",
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
        for each in (source, target):
            each.run("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")  # locks the gaps of missing rows too
        source.run(f"SET SESSION innodb_lock_wait_timeout = {LOCKED_SECONDS:.0f}")
        row = read_row(target.connection, spec.key) if own_schema.exists(target.connection) else None
        if row is None:
            raise PreconditionFailed(
                f"{spec.target} has no position: the relay has not filled it yet",
                hint="shardkit relay run, or shardkit relay seed",
            )
        yield Pair(spec, source, target, row, patience)


def count_rows(database: Database, table: Table) -> Counter[str]:
    """How often each row of a table without key is there, by its text: the first characters of it, and its checksum."""
    found = database.rows(
        f"SELECT MIN(LEFT({table.row_expression}, 100)), LEFT(SHA2({table.row_expression}, 256), 8), COUNT(*) "
        f"FROM {quoted(table.name)} GROUP BY 2"  # a name could be that of a column of the table, which would be taken
    )
    return Counter({f"{_text(text)} ({checksum})": int(times) for text, checksum, times in found})


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def differing_rows(table: Table, ours: Counter[str], theirs: Counter[str]) -> Iterator[Difference]:
    """The differences of a table without a primary key, from what `count_rows` gives."""
    for kind, rows in ((Kind.MISSING, ours - theirs), (Kind.EXTRA, theirs - ours)):
        for text, times in rows.items():
            yield from [Difference(table.name, kind, text)] * times
