"""The alembic tree of shardkit's own tables: one head, up and down again, with the columns that the code uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from pytest_alembic.tests import test_single_head_revision, test_up_down_consistency, test_upgrade

from shardkit import own_tables
from shardkit.testing.database import LocalDatabaseServer

__all__ = ["test_single_head_revision", "test_up_down_consistency", "test_upgrade"]


@pytest.fixture
def alembic_config() -> dict[str, Any]:
    """Where the tree is."""
    return {"script_location": str(own_tables.migrations_directory())}


@pytest.fixture(params=["sqlite", "server"])
def alembic_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Connection]:
    """A connection to an empty database: the tree's env.py takes one, and no engine."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/own.db"
    else:
        server: LocalDatabaseServer = request.getfixturevalue("database_server")
        url = server.dsn(request.getfixturevalue("fresh_database"))
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_the_tables_have_the_columns_that_the_code_reads_and_writes(alembic_engine: sa.Connection) -> None:
    alembic_engine.close()
    own_tables.upgrade(alembic_engine.engine)
    described = own_tables.metadata
    options = {
        "version_table": own_tables.VERSION_TABLE,
        "include_name": lambda name, kind, _parents: kind != "table" or name in described.tables,
    }
    with alembic_engine.engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts=options), described)
    # a revision says what a column is on each server; the models, what the code has to know of it
    said_otherwise = {"modify_type", "modify_comment"}
    assert [diff for diff in found if not (isinstance(diff, list) and diff[0][0] in said_otherwise)] == []
