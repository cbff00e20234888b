"""Writing the source's rows over a target's rows that differ, in one transaction, while the hop stands still.

The source's rows are locked (shared) from before they are read until the target's transaction has ended, so no change
of theirs is in the log behind them; the hop's position row is locked on the target, so nothing is applied meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from shardkit.credentials import CredentialSource
from shardkit.errors import Interrupted, PreconditionFailed
from shardkit.rowtext import Key, quoted, statements
from shardkit_cdc.checksums import row_checksums
from shardkit_cdc.comparison import LOCKED_SECONDS, Difference, Pair, TooFast, open_pair
from shardkit_cdc.database import Database
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.row_copy import STATEMENT_BYTES
from shardkit_cdc.tables import Table, read_tables

#: Differing rows beyond which a target is better filled anew.
MOST_ROWS = 1000
_ATTEMPTS = 5


def repair(spec: HopSpec, credentials: CredentialSource, differences: Sequence[Difference]) -> int:
    """Make the target's rows the source's.

    :returns: how many rows were written or deleted.
    :raises PreconditionFailed: when it cannot be done safely; nothing was changed.
    """
    with open_pair(spec, credentials) as pair:
        tables = read_tables(pair.source)
        keys = _keys(pair.target, tables, differences)
        for _ in range(_ATTEMPTS):
            try:
                with closing(Database(spec.target, credentials, hop=spec.name, binary=True)) as writer:
                    return _write(pair, writer, tables, keys)
            except (TooFast, Interrupted) as error:
                last: Exception = error
    raise PreconditionFailed(
        f"{spec.target} could not be repaired: its rows are locked, or the hop is more than {LOCKED_SECONDS:.0f} s "
        f"behind; nothing was changed ({last})",
        hint="try again when there is less load, or seed it anew (shardkit relay seed)",
    )


def refuse(differences: Sequence[Difference], triggers: frozenset[str]) -> None:
    """:raises PreconditionFailed: for differences that cannot be repaired row by row.

    :param triggers: the target's tables that have some.
    """
    for each in differences:
        if not each.literals:
            raise PreconditionFailed(
                f"{each.table} cannot be repaired row by row: it differs as a table, or has no primary key",
                hint="seed the target anew (shardkit relay seed)",
            )
        if each.table in triggers:
            raise PreconditionFailed(
                f"{each.table} cannot be repaired: its triggers on the target would fire",
                hint="seed the target anew (shardkit relay seed)",
            )
    if len(differences) > MOST_ROWS:
        raise PreconditionFailed(
            f"{len(differences)} rows differ, more than {MOST_ROWS}", hint="seed the target anew (shardkit relay seed)"
        )


def _keys(target: Database, tables: dict[str, Table], differences: Sequence[Difference]) -> dict[str, list[Key]]:
    found = target.rows(
        "SELECT DISTINCT event_object_table FROM information_schema.triggers WHERE event_object_schema = DATABASE()"
    )
    refuse(differences, frozenset(name for (name,) in found))
    keys: dict[str, list[Key]] = {}
    for each in differences:
        if each.table not in tables:
            raise PreconditionFailed(f"{each.table} is gone from the source", hint="compare again")
        keys.setdefault(each.table, []).append(each.literals)
    return keys


def _write(pair: Pair, writer: Database, tables: dict[str, Table], keys: dict[str, list[Key]]) -> int:
    wanted = [(tables[name], tables[name].one_of(part)) for name, part in keys.items()]
    with pair.source.transaction():
        rows = {table.name: _locked(pair.source, table, where) for table, where in wanted}
        pair.catch_up(seconds=LOCKED_SECONDS)
        with writer.transaction():
            # The first statement: the hop's own first one waits here, or we wait for its transaction to end.
            found = writer.value("SELECT gtid FROM shardkit_position WHERE hop = %s FOR UPDATE", pair.spec.key)
            if found is None:
                raise PreconditionFailed(f"the position in {pair.spec.target} is gone", hint="is it being seeded?")
            for table, where in wanted:
                writer.run(f"DELETE FROM {quoted(table.name)} WHERE {where}")
            for table, _ in wanted:
                for statement in statements(table, rows[table.name], STATEMENT_BYTES):
                    writer.run(statement)
            writer.run("SET NAMES utf8mb4")
            for table, where in wanted:
                if row_checksums(writer, table, where) != row_checksums(pair.source, table, where, lock=True):
                    raise PreconditionFailed(
                        f"{table.name}: what was written did not become the source's rows; nothing was changed",
                        hint="seed the target anew (shardkit relay seed)",
                    )
    return sum(map(len, keys.values()))


def _locked(source: Database, table: Table, where: str) -> list[bytes]:
    found = source.rows(
        f"SELECT {table.row_expression} FROM {quoted(table.name)} FORCE INDEX (PRIMARY) WHERE {where} "
        "LOCK IN SHARE MODE"
    )
    return [line if isinstance(line, bytes) else str(line).encode() for (line,) in found]
