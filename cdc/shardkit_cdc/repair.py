"""Writing the source's rows over a target's rows that differ, in one transaction, while nothing is applied.

Of a hop that follows, the source's rows are locked (shared) from before they are read until the target's transaction
has ended, so no change of theirs is in the log behind them; the hop's position row is locked on the target, so nothing
is applied meanwhile.

Of a hop that stands still the rows are written as they were at its position: those that have not changed since as the
source has them, others as the log has them before their first change (`standstill`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed
from shardkit.rowtext import Key, quoted, statements
from shardkit_cdc.checksums import row_checksums
from shardkit_cdc.comparison import LOCKED_SECONDS, Difference, Kind, Pair, TooFast, Verdict, open_pair
from shardkit_cdc.connection import code_of, text_of
from shardkit_cdc.database import Database
from shardkit_cdc.matching import Matched, compared_tables, match
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.row_copy import STATEMENT_BYTES
from shardkit_cdc.standstill import Standstill
from shardkit_cdc.tables import Table
from shardkit_cdc.touched import Touched

#: Differing rows beyond which a target is better filled anew.
MOST_ROWS = 1000
_ATTEMPTS = 5
_SEED = "seed the target anew (shardkit relay seed)"


def repair(spec: HopSpec, credentials: CredentialSource, differences: Sequence[Difference]) -> int:
    """Make the target's rows the source's.

    :returns: how many rows were written or deleted.
    :raises PreconditionFailed: when it cannot be done safely; nothing was changed.
    """
    with open_pair(spec, credentials) as pair:
        matched = match(pair.source, pair.target, compared_tables(pair.source), compared_tables(pair.target))
        keys = _keys(pair.target, matched, differences)
        for _ in range(_ATTEMPTS):
            try:
                with closing(Database(spec.target, credentials, hop=spec.name, binary=True)) as writer:
                    return _write(pair, writer, matched, keys)
            except (TooFast, Interrupted) as error:
                last: Exception = error
    raise PreconditionFailed(
        f"{spec.target} could not be repaired: its rows are locked, or the hop is more than {LOCKED_SECONDS:.0f} s "
        f"behind; nothing was changed ({last})",
        hint="try again when there is less load, or seed it anew (shardkit relay seed)",
    )


def repair_at(spec: HopSpec, credentials: CredentialSource, verdict: Verdict) -> int:
    """Make rows of a target whose hop stands still what the source had there.

    :returns: how many rows were written or deleted.
    :raises PreconditionFailed: when it cannot be done safely, or the hop has gone on; nothing was changed.
    """
    with open_pair(spec, credentials) as pair:
        row = pair.row()
        if verdict.stopped is None or verdict.stopped.position != row.gtid:
            raise _gone_on(spec)
        still = Standstill(row, pair, credentials)
        matched = still.begin()
        tables = matched.tables
        touched = still.read_log(tables)
        wanted = _wanted(still, matched, touched, verdict.differences)
        conditions = {name: {each.condition for each in rows} for name, rows in wanted.items()}
        first = still.read_log(tables, conditions).rows
        _write_at(still, matched.written, wanted, first, credentials)
        return sum(map(len, wanted.values()))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One row to be put right.

    :param condition: what finds it.
    :param logged: it is written as the log has it.
    :param key: it is written as the source has it now; empty for not.
    """

    condition: bytes
    logged: bool = False
    key: Key = ()


def _wanted(
    still: Standstill, matched: Matched, touched: Touched, differences: Sequence[Difference]
) -> dict[str, list[_Wanted]]:
    by_table = {name: [each for each in differences if each.table == name] for name in {d.table for d in differences}}
    triggers = _with_triggers(still.target)
    found: dict[str, list[_Wanted]] = {}
    for name, rows in by_table.items():
        _refuse_left_out(name, matched)
        table = matched.tables.get(name)
        told, passed = still.told(table, touched) if table is not None and table.primary else ({}, set())
        by_text = {str(each): (condition, each.kind) for condition, each in told.items()}
        refuse([each for each in rows if str(each) not in by_text], triggers)
        refuse_triggers(rows, triggers)
        for each in rows:
            logged = by_text.get(str(each))
            if table is None or name in touched.whole or (logged is None and each.literals in passed):
                raise PreconditionFailed(f"{each}: it has changed on the source meanwhile", hint="compare again")
            if logged is not None:
                condition, kind = logged
                found.setdefault(name, []).append(_Wanted(condition, logged=kind is Kind.MISSING))
            else:
                key = () if each.kind is Kind.EXTRA else each.literals
                found.setdefault(name, []).append(_Wanted(table.one_of([each.literals]).encode(), key=key))
    if len(differences) > MOST_ROWS:
        raise _too_many(differences)
    return found


def _write_at(
    still: Standstill,
    tables: dict[str, Table],
    wanted: dict[str, list[_Wanted]],
    logged: Mapping[tuple[str, bytes], bytes],
    credentials: CredentialSource,
) -> None:
    """One transaction, with the hop held where it stands.

    :param logged: INSERT statements of the rows that are written as the log has them.
    """
    spec, row = still.spec, still.row
    with closing(Database(spec.target, credentials, hop=spec.name, binary=True)) as writer, _transaction(writer):
        ours = "SELECT COUNT(*) FROM shardkit_position WHERE hop = %s AND gtid = %s FOR UPDATE"
        if writer.value(ours, row.hop, row.gtid) != 1:
            raise _gone_on(spec)
        for name, rows in wanted.items():
            for each in rows:
                writer.run(f"DELETE FROM {quoted(name)} WHERE ".encode() + each.condition)
        for name, rows in wanted.items():
            for each in rows:
                if each.logged:
                    writer.run(logged[name, each.condition])
            for statement in statements(tables[name], _unchanged(still, tables[name], rows), STATEMENT_BYTES):
                writer.run(statement)


def _unchanged(still: Standstill, table: Table, rows: Sequence[_Wanted]) -> list[bytes]:
    """The source's rows that have not changed since."""
    keys = [each.key for each in rows if each.key]
    texts = still.source.rows(f"SELECT {table.row_expression} FROM {table.walk(table.one_of(keys))}") if keys else []
    if len(texts) != len(keys):
        raise PreconditionFailed(f"rows of {table.name} are gone from the source meanwhile", hint="compare again")
    return [_line(each) for each in texts]


def _gone_on(spec: HopSpec) -> PreconditionFailed:
    return PreconditionFailed(f"hop {spec.name} does not stand where it stood any more", hint="compare again")


def refuse(differences: Sequence[Difference], triggers: frozenset[str]) -> None:
    """:raises PreconditionFailed: for differences that cannot be repaired row by row.

    :param triggers: the target's tables that have some.
    """
    for each in differences:
        if not each.literals:
            raise PreconditionFailed(
                f"{each.table} cannot be repaired row by row: it differs as a table, or has no primary key",
                hint=_SEED,
            )
    refuse_triggers(differences, triggers)
    if len(differences) > MOST_ROWS:
        raise _too_many(differences)


def refuse_triggers(differences: Sequence[Difference], triggers: frozenset[str]) -> None:
    """:raises PreconditionFailed: for tables whose triggers would fire."""
    for each in differences:
        if each.table in triggers:
            raise PreconditionFailed(
                f"{each.table} cannot be repaired: its triggers on the target would fire",
                hint=_SEED,
            )


def _too_many(differences: Sequence[Difference]) -> PreconditionFailed:
    return PreconditionFailed(f"{len(differences)} rows differ, more than {MOST_ROWS}", hint=_SEED)


def _refuse_left_out(table: str, matched: Matched) -> None:
    """:raises PreconditionFailed: for a table of whose columns some cannot be written."""
    if table in matched.tables and table not in matched.written:
        raise PreconditionFailed(
            f"{table} cannot be repaired: it has columns that cannot be carried between the families "
            f"({'; '.join(each for each in matched.left_out if each.startswith(f'{table}.'))})",
            hint="write its rows by hand",
        )


def _keys(target: Database, matched: Matched, differences: Sequence[Difference]) -> dict[str, list[Key]]:
    refuse(differences, _with_triggers(target))
    keys: dict[str, list[Key]] = {}
    for each in differences:
        if each.table not in matched.tables:
            raise PreconditionFailed(f"{each.table} is gone, or another table now", hint="compare again")
        _refuse_left_out(each.table, matched)
        keys.setdefault(each.table, []).append(each.literals)
    return keys


def _with_triggers(target: Database) -> frozenset[str]:
    found = target.rows(
        "SELECT DISTINCT event_object_table FROM information_schema.triggers WHERE event_object_schema = DATABASE()"
    )
    return frozenset(name for (name,) in found)


def _write(pair: Pair, writer: Database, matched: Matched, keys: dict[str, list[Key]]) -> int:
    wanted = [(matched.tables[name], matched.tables[name].one_of(part)) for name, part in keys.items()]
    with pair.source.transaction():
        rows = {table.name: _locked(pair.source, matched.written[table.name], where) for table, where in wanted}
        pair.catch_up(seconds=LOCKED_SECONDS)
        with _transaction(writer):
            # The first statement: the hop's own first one waits here, or we wait for its transaction to end.
            found = writer.value("SELECT gtid FROM shardkit_position WHERE hop = %s FOR UPDATE", pair.spec.key)
            if found is None:
                raise PreconditionFailed(f"the position in {pair.spec.target} is gone", hint="is it being seeded?")
            for table, where in wanted:
                writer.run(f"DELETE FROM {quoted(table.name)} WHERE {where}")
            for table, _ in wanted:
                for statement in statements(matched.written[table.name], rows[table.name], STATEMENT_BYTES):
                    writer.run(statement)
            writer.run("SET NAMES utf8mb4")
            for table, where in wanted:
                if row_checksums(writer, table, where) != row_checksums(pair.source, table, where, lock=True):
                    raise PreconditionFailed(
                        f"{table.name}: what was written did not become the source's rows; nothing was changed",
                        hint=_SEED,
                    )
    return sum(map(len, keys.values()))


@contextmanager
def _transaction(writer: Database) -> Iterator[None]:
    """:raises PreconditionFailed: for a row that meets another one in a unique index."""
    try:
        with writer.transaction():
            yield
    except pymysql.IntegrityError as error:
        raise PreconditionFailed(
            f"{writer.endpoint} refused a row, nothing was changed: {text_of(error)} ({code_of(error)})",
            hint="another row is in its way: compare again, and where that does not find it seed the target anew "
            "(shardkit relay seed)",
        ) from error


def _locked(source: Database, table: Table, where: str) -> list[bytes]:
    found = source.rows(
        f"SELECT {table.row_expression} FROM {quoted(table.name)} FORCE INDEX (PRIMARY) WHERE {where} "
        "LOCK IN SHARE MODE"
    )
    return [_line(each) for each in found]


def _line(row: tuple[object, ...]) -> bytes:
    """A row's text, alone in the result of a query."""
    return row[0] if isinstance(row[0], bytes) else str(row[0]).encode()
