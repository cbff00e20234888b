"""Comparing the ends of a hop that stands still: the target has the data of an older position of the source's log.

The source's rows of now differ from the target's wherever the source has gone on. So the log behind the position is
read: a row that no event touches is on the source what it was at the position, and a difference of it is one. Of rows
that events touch, the first event's image tells whether there was such a row: an update or a delete of a row that the
target lacks is a difference, and so is an insert of one that it has; that is what stops a hop. What else touched rows
may differ in cannot be told, and is counted.

The source is read in one snapshot, and the log to its end behind that: so nothing that the snapshot shows is missed.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.gtid import Position, parse_position
from shardkit.rowtext import Key, plain_literal, quoted, show_key
from shardkit_cdc import preflight
from shardkit_cdc.checksums import checksums_of, compared_ranges, digest, row_checksums, suspicious_rows
from shardkit_cdc.comparison import (
    Difference,
    Kind,
    Pair,
    Stopped,
    Verdict,
    count_rows,
    differing_rows,
    kind_of,
)
from shardkit_cdc.connection import SCHEMA_CHANGED, code_of
from shardkit_cdc.database import Database
from shardkit_cdc.matching import Matched, compared_tables, computed_columns, match, other_values
from shardkit_cdc.payload import unpacked
from shardkit_cdc.position import HopRow
from shardkit_cdc.retention import SEED_HINT, kept_log, position_lost
from shardkit_cdc.schema import SchemaCheck, charsets_by_id
from shardkit_cdc.selection import Selector
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.tables import Table
from shardkit_cdc.touched import Before, Touched, read_touched

#: Keys of one statement.
_KEYS = 100


def compare_at(
    row: HopRow, pair: Pair, credentials: CredentialSource, *, chunk: int, report: Callable[[str, int], None]
) -> Verdict:
    """Compare all tables as of where the hop stands.

    :param row: the hop's, which tells where that is.
    :param chunk: rows of one range.
    :param report: told the table and how many rows of it have been compared.
    :raises PreconditionFailed: the schema, or too many rows, have changed on the source since; or the hop goes on.
    :raises PositionLost: the source no longer has the log from there on.
    """
    try:
        return _Comparison(Standstill(row, pair, credentials), chunk, report).run()
    except pymysql.MySQLError as error:
        if code_of(error) not in SCHEMA_CHANGED:
            raise
        raise PreconditionFailed(
            f"the schema of {pair.spec.source} has changed since the hop stopped: the two ends cannot be compared",
            hint=SEED_HINT,
        ) from error


class Standstill:
    """A hop that stands still: its ends, the source in one snapshot, and the source's log between them.

    :param row: the hop's.
    """

    def __init__(self, row: HopRow, pair: Pair, credentials: CredentialSource) -> None:
        self.row = row
        self.spec = pair.spec
        self.source = pair.source
        self.target = pair.target
        self._pair = pair
        self._credentials = credentials
        self._position: Position = parse_position(pair.source.flavour, row.gtid)
        self._folds_names = False

    def begin(self) -> Matched:
        """Open the snapshot; the two ends' tables.

        :raises PositionLost: when the source has not the log from the position on.
        """
        facts, target = (preflight.ask(side.connection, side.endpoint) for side in (self.source, self.target))
        preflight.refuse_other_log(self.row.source, facts, target, hop=self.spec.name)
        if kept_log(self.source.connection, self.source.flavour).has_lost(self._position):
            raise position_lost(self.spec.source.address, hop=self.spec.name)
        self._folds_names = facts.folds_names
        self.source.run("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        return match(self.source, self.target, compared_tables(self.source), compared_tables(self.target))

    def read_log(self, tables: Mapping[str, Table], wanted: Mapping[str, Container[bytes]] | None = None) -> Touched:
        """What has changed since, as far as the snapshot shows it at least.

        :param wanted: as `Touched`.
        :raises PreconditionFailed, BadEvent, Interrupted, PositionLost: as `read_touched`.
        """
        spec, flavour = self.spec, self.source.flavour
        abroad = flavour is not self.target.flavour
        charsets = charsets_by_id(self.source.connection) if abroad else None
        check = SchemaCheck(self.target.connection, by_name=abroad, charsets=charsets)
        touched = Touched(check, flavour, self.target.flavour, tables, wanted or {})
        # Of a branch that was prepared before the position the log behind it has only the end; its rows were locked.
        for (events,) in self.target.rows(
            f"SELECT events FROM {own_tables.prepared.name} WHERE hop = %s ORDER BY xid, part", self.row.hop
        ):
            touched.add(unpacked(events, {}))
        stream = BinlogStream(
            spec.source,
            self._credentials,
            hop=spec.name,
            flavour=flavour,
            after=self._position,
            server_id=0x40000000 | secrets.randbits(30),  # not the runner's own: the source would end that
        )
        with closing(stream):
            selector = Selector(spec.source.database, spec.target.database, fold_case=self._folds_names)
            end = self._pair.end_behind_what_is_seen()
            read_touched(touched, stream, flavour, selector, after=self._position, end=end)
        touched.whole |= self._reached_by_cascades(touched.changed)
        return touched

    def _reached_by_cascades(self, changed: set[str]) -> set[str]:
        """Tables whose rows may have changed along with those of others, without an event in the log."""
        links = self.source.rows(
            "SELECT referenced_table_name, table_name FROM information_schema.referential_constraints "
            "WHERE constraint_schema = DATABASE() "
            "AND NOT (delete_rule IN ('RESTRICT', 'NO ACTION') AND update_rule IN ('RESTRICT', 'NO ACTION'))"
        )
        reached: set[str] = set()
        while more := {child for parent, child in links if parent in changed | reached} - reached:
            reached |= more
        return reached

    @property
    def gone_on(self) -> bool:
        """Whether the hop stands elsewhere now."""
        return self._pair.row().gtid != self.row.gtid

    def told(self, table: Table, touched: Touched) -> tuple[dict[bytes, Difference], set[Key]]:
        """What the first changes tell of a table: rows that should not be on the target, or should be, by the condition
        that finds them; and the keys of all rows that were touched.
        """
        changes = touched.keys.get(table.name, {})
        there, now = (_found(side, table, list(changes)) for side in (self.target, self.source))
        seen: set[Key] = set()
        told: dict[bytes, Difference] = {}
        for condition, before in changes.items():
            key = there.get(condition)
            if key is None and before is Before.THERE:
                known = now.get(condition, ())
                shown = show_key(table, known) if known else _shown(condition)
                told[condition] = Difference(table.name, Kind.MISSING, shown, known)
            # Of several ways to write a key the first is the one that the row had at the position.
            if key is not None and key not in seen:
                seen.add(key)
                if before is Before.ABSENT:
                    told[condition] = Difference(table.name, Kind.EXTRA, show_key(table, key), key)
        return told, seen.union(now.values())


class _Comparison:
    def __init__(self, still: Standstill, chunk: int, report: Callable[[str, int], None]) -> None:
        self._still = still
        self._ends = still.source, still.target
        self._chunk = chunk
        self._report = report
        self._verdict = Verdict(still.spec.name, Stopped(still.row.gtid, still.row.error))

    def run(self) -> Verdict:
        began = time.monotonic()
        matched = self._still.begin()
        tables = matched.tables
        found = {
            table.name: self._by_key(table) if table.primary else self._as_a_whole(table) for table in tables.values()
        }
        computed = [table for table in matched.computed.values() if not self._is_computed_alike(table)]
        touched = self._still.read_log(tables)
        self._verdict.differences += matched.faults
        self._verdict.left_out += matched.left_out
        self._verdict.tables_left_out += matched.tables_left_out
        for table in tables.values():
            self._decide(table, found[table.name], touched)
        differing = {each.table for each in self._verdict.differences}
        for table in (table for table in computed if table.name not in differing):
            if table.name in touched.keys or table.name in touched.whole:
                self._verdict.undecided.append(
                    f"{computed_columns(table)}: the rows have changed on the source since the hop stopped"
                )
            else:
                self._verdict.left_out.append(other_values(table))
        if self._still.gone_on:
            raise PreconditionFailed(
                f"hop {self._still.spec.name} has gone on while its ends were compared", hint="compare again"
            )
        self._verdict.tables = len(tables)
        self._verdict.seconds = time.monotonic() - began
        return self._verdict

    # --- how the target differs from the source of now

    def _by_key(self, table: Table) -> dict[Key, Difference]:
        if not table.keys_alike:
            return self._from_both_ends(table)
        found: dict[Key, Difference] = {}
        done = 0
        for inside, ours, theirs in compared_ranges(*self._ends, table, self._chunk):
            if ours != theirs:
                sides = [row_checksums(side, table, inside) for side in self._ends]
                for key in sides[0] | sides[1]:
                    if sides[0].get(key) != sides[1].get(key):
                        found[key] = Difference(table.name, kind_of(key, *sides), show_key(table, key), key)
            done += ours.rows
            self._report(table.name, done)
        self._verdict.rows += done
        return found

    def _from_both_ends(self, table: Table) -> dict[Key, Difference]:
        """The same where each end may have an order of its own."""
        source, target = self._ends
        found: dict[Key, Difference] = {}
        done, differing = 0, False
        for count, ours in suspicious_rows(source, target, table, self._chunk):
            if ours is not None:
                differing = True
                theirs = checksums_of(target, table, ours)
                for key in (key for key, checksum in ours.items() if theirs.get(key) != checksum):
                    found[key] = Difference(table.name, kind_of(key, ours, theirs), show_key(table, key), key)
            done += count
            self._report(table.name, done)
        for _, held in suspicious_rows(target, source, table, self._chunk) if differing else ():
            if held is not None:
                known = checksums_of(source, table, held)
                for key in held.keys() - known.keys():
                    found[key] = Difference(table.name, Kind.EXTRA, show_key(table, key), key)
        self._verdict.rows += done
        return found

    def _as_a_whole(self, table: Table) -> dict[Key, Difference]:
        ours, theirs = (digest(side, table, "TRUE") for side in self._ends)
        self._verdict.rows += ours.rows
        self._report(table.name, ours.rows)
        if ours == theirs:
            return {}
        rows = differing_rows(table, *(count_rows(side, table) for side in self._ends))
        return {(str(number),): each for number, each in enumerate(rows)}

    def _is_computed_alike(self, table: Table) -> bool:
        ours, theirs = (digest(side, table, "TRUE") for side in self._ends)
        return ours == theirs

    # --- what of it is a difference

    def _decide(self, table: Table, found: Mapping[Key, Difference], touched: Touched) -> None:
        if table.name in touched.whole:
            if found:
                self._verdict.undecided.append(f"{table.name} has changed on the source since the hop stopped")
            return
        told, passed = self._still.told(table, touched)
        self._verdict.differences += [each for key, each in found.items() if key not in passed]
        self._verdict.differences += told.values()
        left = len(found.keys() & passed - {each.literals for each in told.values()})
        if left:
            self._verdict.undecided.append(
                f"{left} row{'s' if left > 1 else ''} of {table.name} changed on the source since the hop stopped"
            )


def _found(side: Database, table: Table, conditions: Sequence[bytes]) -> dict[bytes, Key]:
    """The primary keys of the rows that are there."""
    return {
        conditions[number]: tuple(map(str, key))
        for question in _questions(table, conditions)
        for number, *key in side.rows(question)
    }


def _shown(condition: bytes) -> str:
    """A condition as `show_key` shows the key of the row that it finds."""
    text = condition.decode().replace("`", "").replace(" AND ", ", ")
    return re.sub(r"(_\w+ )?X'[0-9a-f]*'", lambda literal: plain_literal(literal[0]), text)


def _questions(table: Table, conditions: Sequence[bytes]) -> Iterator[str]:
    for start in range(0, len(conditions), _KEYS):
        yield " UNION ALL ".join(
            f"SELECT {number}, {table.key_literals} FROM {quoted(table.name)} WHERE {condition.decode()}"
            for number, condition in enumerate(conditions[start : start + _KEYS], start)
        )
