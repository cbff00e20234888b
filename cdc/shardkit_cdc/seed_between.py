"""What a seed asks of a target of the other family: its tables are there already, and only their rows are copied."""

from __future__ import annotations

from collections.abc import Mapping

from shardkit.errors import PreconditionFailed
from shardkit.rowtext import quoted
from shardkit_cdc.apply_sql import require_sight
from shardkit_cdc.checksums import digest
from shardkit_cdc.database import Database
from shardkit_cdc.matching import Matched, match
from shardkit_cdc.tables import Table, read_tables

#: Rows up to which a table of a target that nobody has filled yet is compared.
_SMALL = 1000


def match_for_seed(source: Database, target: Database, ours: Mapping[str, Table]) -> Matched:
    """How the source's tables are read and written, as far as the target may be filled.

    :param ours: the source's tables that are wanted.
    :raises PreconditionFailed: for a table that the target has not, or has in another shape, or whose rows cannot be
        carried.
    """
    theirs = read_tables(target)
    sequence = next((name for name, table in {**theirs, **ours}.items() if table.kind == "SEQUENCE"), None)
    if sequence is not None:
        raise PreconditionFailed(
            f"{source if sequence in ours else target} has the sequence {sequence}, which MySQL has not",
            hint=f"use an AUTO_INCREMENT column, and DROP SEQUENCE {quoted(sequence)}",
        )
    missing = sorted(ours.keys() - theirs.keys())
    if missing:
        names = ", ".join(missing[:5]) + (" and others" if len(missing) > 5 else "")
        raise PreconditionFailed(
            f"{target.endpoint} has no table {names}: between families only rows are copied",
            hint=f"make it there first, with the source's columns, character sets and primary key, as {target.flavour} "
            "has them (run the application's migrations there, say), then run this again",
        )
    wanted = {name: table for name, table in theirs.items() if name in ours or not table.own}
    matched = match(source, target, ours, wanted)
    if matched.faults:
        raise PreconditionFailed(
            "; ".join(f"{each.table}: {each.key}" for each in matched.faults[:5]),
            hint=f"make the tables of {target.endpoint} like those of {source.endpoint}, then run this again",
        )
    if not ours.keys() <= matched.written.keys():
        raise PreconditionFailed(
            f"rows cannot be carried to {target.endpoint}: {'; '.join(matched.left_out)}",
            hint="change the tables on the source to types, keys and kinds that both families have",
        )
    _refuse_target(target)
    return matched


def _refuse_target(target: Database) -> None:
    """The same that stops the hop itself: rows go into the target as statements."""
    require_sight(target.connection, target.endpoint)
    triggers = target.rows(
        "SELECT event_object_table, trigger_name FROM information_schema.triggers "
        "WHERE event_object_schema = DATABASE() ORDER BY 1, 2"
    )
    for table, trigger in triggers:
        raise PreconditionFailed(
            f"{table} has the trigger {trigger} on {target.endpoint}, which would fire for what is copied",
            hint=f"DROP TRIGGER {quoted(trigger)} on {target.endpoint}; the relay between families needs that, too",
        )
    plain = target.rows(
        "SELECT t.table_name, t.engine FROM information_schema.tables t JOIN information_schema.engines e "
        "USING (engine) WHERE t.table_schema = DATABASE() AND e.transactions <> 'YES'"
    )
    for table, engine in plain:
        raise PreconditionFailed(
            f"{target.endpoint} keeps {table} in {engine}, which has no transactions",
            hint=f"on the target: ALTER TABLE {quoted(table)} ENGINE=InnoDB",
        )


def tables_with_rows(target: Database) -> list[str]:
    """The tables of others than shardkit that hold anything."""
    tables = [table for table in read_tables(target).values() if not table.own]
    return [each.name for each in tables if target.rows(f"SELECT 1 FROM {quoted(each.name)} LIMIT 1")]


def tables_with_other_rows(source: Database, target: Database, matched: Matched) -> list[str]:
    """The same without small tables that hold exactly what the source holds, as a migration leaves its revision."""
    found = []
    for name in tables_with_rows(target):
        small = len(target.rows(f"SELECT 1 FROM {quoted(name)} LIMIT {_SMALL + 1}")) <= _SMALL
        table = matched.tables[name]
        if not small or digest(source, table, "TRUE") != digest(target, table, "TRUE"):
            found.append(name)
    return found
