"""A database's tables, views, triggers and routines as the statements that make them, and making them elsewhere."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pymysql

from shardkit import own_tables
from shardkit.errors import PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.rowtext import quoted
from shardkit_cdc.connection import code_of, text_of
from shardkit_cdc.database import Database

#: Made in this order; the triggers after the rows, so that they do not fire for them.
BEFORE_ROWS = ("SEQUENCE", "TABLE")
AFTER_ROWS = ("FUNCTION", "PROCEDURE", "PACKAGE", "PACKAGE BODY", "VIEW", "TRIGGER")
#: Among a table's options, in front of all texts.
_COUNTER = re.compile(r"^(\)[^'\n]*) AUTO_INCREMENT=(\d+)", re.MULTILINE)
#: A view's table or function is not there yet: it may be made after the next ones.
_NOT_YET = frozenset({1146, 1305, 1356})


@dataclass(frozen=True)
class Definition:
    """One object.

    :param kind: as in ``SHOW CREATE ...``.
    :param settings: session variables under which it was made.
    """

    kind: str
    name: str
    statement: str
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def identity(self) -> tuple[object, ...]:
        """What two readings of the same definition have in common, whatever rows came between."""
        return self.kind, self.name, _COUNTER.sub(r"\1", self.statement), self.settings


def read_definitions(database: Database) -> tuple[Definition, ...]:
    """Everything in the database that the relay carries, shardkit's own tables left out.

    :raises PreconditionFailed: when the account may not read a definition.
    """
    listed: list[tuple[str, str]] = []
    kinds = {"VIEW": "VIEW", "SEQUENCE": "SEQUENCE"}
    for name, kind in database.rows(
        "SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = DATABASE() "
        "ORDER BY table_name"
    ):
        if not str(name).startswith(own_tables.PREFIX):
            listed.append((kinds.get(kind, "TABLE"), name))
    listed += database.rows(
        "SELECT routine_type, routine_name FROM information_schema.routines WHERE routine_schema = DATABASE() "
        "ORDER BY routine_type, routine_name"
    )
    listed += [
        ("TRIGGER", name)
        for (name,) in database.rows(
            "SELECT trigger_name FROM information_schema.triggers WHERE trigger_schema = DATABASE() "
            "ORDER BY event_object_table, action_timing, event_manipulation, action_order"
        )
    ]
    return tuple(_read(database, kind, name) for kind, name in listed)


def _read(database: Database, kind: str, name: str) -> Definition:
    row = database.rows(f"SHOW CREATE {kind} {quoted(name)}")[0]
    if kind in {"TABLE", "SEQUENCE"}:
        return Definition(kind, name, row[1])
    if kind == "VIEW":
        statement, client, collation, mode = row[1], row[2], row[3], None
    else:
        mode, statement, client, collation = row[1:5]
    if statement is None:
        raise PreconditionFailed(
            f"{database}: this account may not see the definition of the {kind.lower()} {name}",
            hint="grant SELECT ON mysql.proc (MariaDB) or SHOW_ROUTINE (MySQL)",
        )
    # The text was given in utf8mb4. Where it is ASCII its own client's character set is noted with it as it was.
    settings = [("collation_connection", str(collation))]
    if str(statement).isascii():
        settings.insert(0, ("character_set_client", str(client)))
    if mode is not None:
        settings.append(("sql_mode", str(mode)))
    return Definition(kind, name, str(statement), tuple(settings))


def same(one: Iterable[Definition], other: Iterable[Definition]) -> bool:
    """Whether no schema change lies between two readings."""
    return [each.identity for each in one] == [each.identity for each in other]


def refuse_foreign_names(definitions: Iterable[Definition], source: str, target: str) -> None:
    """:raises PreconditionFailed: for a definition that names its database, where the target calls it otherwise."""
    if source == target:
        return
    naming = [each for each in definitions if f"{quoted(source)}." in each.statement]
    if naming:
        raise PreconditionFailed(
            f"the {naming[0].kind.lower()} {naming[0].name} names its database {source}, which the target calls "
            f"{target}",
            hint="give both databases the same name",
        )


def create(target: Database, definitions: Sequence[Definition], kinds: Sequence[str]) -> None:
    """Make the objects of these kinds.

    :raises PreconditionFailed: when the target refuses one.
    """
    for setting in _wanted_off(target):
        target.run(f"SET SESSION {setting} = OFF")
    for kind in kinds:
        waiting = [each for each in definitions if each.kind == kind]
        while waiting:
            late: list[Definition] = []
            for each in waiting:
                try:
                    _run(target, each)
                except pymysql.MySQLError as error:
                    if code_of(error) not in _NOT_YET or (each is waiting[-1] and len(late) == len(waiting) - 1):
                        raise _refused(target, each, error) from error
                    late.append(each)
            waiting = late


def _refused(target: Database, definition: Definition, error: pymysql.MySQLError) -> PreconditionFailed:
    return PreconditionFailed(
        f"{target.endpoint} refused the {definition.kind.lower()} {definition.name}: {text_of(error)} "
        f"({code_of(error)})",
        hint="mend it on the source (a view of a table that is gone, say) or the target's settings, then run the same "
        "command again",
    )


def _run(target: Database, definition: Definition) -> None:
    settings = dict(definition.settings)
    if not settings:
        target.run(definition.statement.encode())
        return
    before = target.rows("SELECT @@sql_mode, @@character_set_client, @@collation_connection")[0]
    _set(target, {"character_set_client": "utf8mb4"} | settings)
    try:
        target.run(definition.statement.encode())
    finally:
        _set(target, dict(zip(("sql_mode", "character_set_client", "collation_connection"), before, strict=True)))


def _set(target: Database, settings: Mapping[str, str]) -> None:
    # One after the other and without parameters: the statement's own character set changes with them.
    for name, value in settings.items():
        if not re.fullmatch(r"[A-Za-z0-9_,]*", value):
            raise PreconditionFailed(f"{target}: {name} cannot be {value!r}")
        target.run(f"SET SESSION {name} = '{value}'")


def _wanted_off(target: Database) -> list[str]:
    """MySQL's settings by which a table would get a primary key that the source's has not, or be refused."""
    if target.flavour is Flavour.MARIADB:
        return []
    names = ("sql_generate_invisible_primary_key", "sql_require_primary_key")
    found = target.rows("SHOW VARIABLES WHERE Variable_name IN (%s, %s) AND Value = 'ON'", *names)
    return [name for name, _ in found]


def unchanged_tables(target: Database, definitions: Iterable[Definition]) -> frozenset[str]:
    """The tables that the target has by the very same definition."""
    there = {
        name
        for (name,) in target.rows(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE() "
            "AND table_type = 'BASE TABLE'"
        )
    }
    return frozenset(
        each.name
        for each in definitions
        if each.kind == "TABLE" and each.name in there and same([each], [_read(target, "TABLE", each.name)])
    )


def drop_all(target: Database, *, but: Container[str] = frozenset()) -> None:
    """Empty the database; shardkit's own tables stay.

    :param but: tables that stay with their rows, but without triggers.
    """
    for kind, name, table in target.rows(
        "SELECT 'TRIGGER', trigger_name, event_object_table FROM information_schema.triggers "
        "WHERE trigger_schema = DATABASE() "
        "UNION ALL SELECT table_type, table_name, table_name FROM information_schema.tables "
        "WHERE table_schema = DATABASE() "
        "UNION ALL SELECT routine_type, routine_name, routine_name FROM information_schema.routines "
        "WHERE routine_schema = DATABASE()"
    ):
        if table.startswith(own_tables.PREFIX) or (kind == "BASE TABLE" and name in but):
            continue
        kind = {"BASE TABLE": "TABLE", "SYSTEM VERSIONED": "TABLE"}.get(kind, kind)
        target.run(f"DROP {kind} IF EXISTS {quoted(name)}")


def raise_counters(target: Database, definitions: Iterable[Definition], names: Container[str]) -> None:
    """Have AUTO_INCREMENT of these tables go on no earlier than it does by their definitions."""
    for each in definitions:
        if each.kind == "TABLE" and each.name in names:
            wanted, there = (_counter(one) for one in (each, _read(target, "TABLE", each.name)))
            if wanted > there:
                target.run(f"ALTER TABLE {quoted(each.name)} AUTO_INCREMENT = {wanted}")


def _counter(table: Definition) -> int:
    found = _COUNTER.search(table.statement)
    return int(found[2]) if found else 1
