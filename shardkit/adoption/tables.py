"""What stands in a database: its tables, as far as a decision about sharding needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.types import TypeEngine

from shardkit import own_tables
from shardkit.adoption.settings import read_settings
from shardkit.credentials import CredentialSource
from shardkit.engines import Engines, EngineSettings
from shardkit.errors import PreconditionFailed
from shardkit.partition import KeyType, key_type_of
from shardkit.topology import Endpoint, Role

#: Tables of tools, not of the application.
_TOOLS = frozenset({"alembic_version"})


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """One column.

    :param collation: of text columns on servers.
    """

    name: str
    type: TypeEngine[Any]
    nullable: bool
    autoincrement: bool = False
    collation: str | None = None

    @property
    def kind(self) -> KeyType | None:
        """The kind of shard key that it could be."""
        return key_type_of(self.type)


@dataclass(frozen=True, slots=True)
class ForeignKeyFacts:
    """Columns that point at another table's columns."""

    columns: tuple[str, ...]
    table: str
    referred: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TableFacts:
    """One table.

    :param uniques: the columns of each unique index, the primary key not among them.
    :param rows: about how many there are; None where nobody counted.
    """

    name: str
    columns: Mapping[str, ColumnFacts]
    primary_key: tuple[str, ...] = ()
    uniques: tuple[tuple[str, ...], ...] = ()
    foreign_keys: tuple[ForeignKeyFacts, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class DatabaseFacts:
    """What a database holds, and how its server is set up.

    :param tables: the application's, by name.
    :param settings: by name; empty of SQLite.
    """

    tables: Mapping[str, TableFacts]
    settings: Mapping[str, str]


def read_database(shard: str, endpoint: Endpoint, credentials: CredentialSource) -> DatabaseFacts:
    """The application's tables in a database, and the settings of its server.

    :param shard: what to call it in errors.
    :raises ShardUnreachable: when it does not answer, or refuses the log-on.
    :raises PreconditionFailed: when there is no such SQLite file.
    """
    if endpoint.dialect == "sqlite" and not Path(endpoint.database).exists():
        raise PreconditionFailed(f"there is no file {endpoint.database}", hint="check the path")
    engines = Engines(EngineSettings(credentials))
    try:
        engine = engines.sync(shard, Role.MASTER, endpoint)
        return DatabaseFacts(read_tables(engine), read_settings(engine))
    finally:
        engines.dispose()


def read_tables(engine: Engine) -> dict[str, TableFacts]:
    """The application's tables, by name."""
    inspector = sa.inspect(engine)
    collations, rows = _server_facts(engine) if engine.dialect.name != "sqlite" else ({}, _sqlite_rows(engine))
    names = [
        name for name in inspector.get_table_names() if not name.startswith(own_tables.PREFIX) and name not in _TOOLS
    ]
    return {
        name: TableFacts(
            name,
            {
                column["name"]: ColumnFacts(
                    column["name"],
                    column["type"],
                    bool(column["nullable"]),
                    column.get("autoincrement") is True,
                    collations.get((name, column["name"])),
                )
                for column in inspector.get_columns(name)
            },
            tuple(inspector.get_pk_constraint(name)["constrained_columns"]),
            tuple(
                tuple(str(column) for column in index["column_names"])
                for index in inspector.get_indexes(name)
                if index["unique"]
            ),
            tuple(
                ForeignKeyFacts(
                    tuple(key["constrained_columns"]), key["referred_table"], tuple(key["referred_columns"])
                )
                for key in inspector.get_foreign_keys(name)
            ),
            rows.get(name),
        )
        for name in names
    }


def _server_facts(engine: Engine) -> tuple[dict[tuple[str, str], str], dict[str, int]]:
    """Collations of text columns and estimated rows, which reflection does not give in full."""
    with engine.connect() as connection:
        collations = connection.exec_driver_sql(
            "SELECT table_name, column_name, collation_name FROM information_schema.columns "
            "WHERE table_schema = DATABASE() AND collation_name IS NOT NULL"
        )
        found = {(str(table), str(column)): str(collation) for table, column, collation in collations}
        rows = connection.exec_driver_sql(
            "SELECT table_name, table_rows FROM information_schema.tables "
            "WHERE table_schema = DATABASE() AND table_rows IS NOT NULL"
        )
        return found, {str(table): int(count) for table, count in rows}


def _sqlite_rows(engine: Engine) -> dict[str, int]:
    quote = engine.dialect.identifier_preparer.quote
    with engine.connect() as connection:
        return {
            name: int(connection.exec_driver_sql(f"SELECT count(*) FROM {quote(name)}").scalar_one())
            for name in sa.inspect(connection).get_table_names()
        }
