"""shardkit's own tables: made once, by whoever comes first, on servers and on SQLite."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from shardkit import own_tables
from shardkit.errors import PreconditionFailed
from shardkit.testing.database import LocalDatabaseServer


def tables(engine: sa.Engine) -> set[str]:
    return set(sa.inspect(engine).get_table_names())


def test_made_on_a_server_with_the_columns_that_the_code_writes(
    database_server: LocalDatabaseServer, fresh_database: str
) -> None:
    engine = sa.create_engine(database_server.dsn(fresh_database))
    own_tables.upgrade(engine)
    inspector = sa.inspect(engine)
    for table in own_tables.metadata.tables.values():
        found = [column["name"] for column in inspector.get_columns(table.name)]
        assert found == [column.name for column in table.columns], table.name
    assert all(name.startswith(own_tables.PREFIX) for name in tables(engine))
    before = database_server.execute("SHOW CREATE TABLE shardkit_position", database=fresh_database)
    own_tables.upgrade(engine)
    assert database_server.execute("SHOW CREATE TABLE shardkit_position", database=fresh_database) == before
    engine.dispose()


def test_processes_and_threads_that_come_together_make_them_once(
    database_server: LocalDatabaseServer, fresh_database: str
) -> None:
    dsn = database_server.dsn(fresh_database)
    program = f"import sqlalchemy as sa; from shardkit.own_tables import upgrade; upgrade(sa.create_engine({dsn!r}))"
    others = [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    engine = sa.create_engine(dsn)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: own_tables.upgrade(engine), range(3)))
    for other in others:
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors
    assert "shardkit_position" in tables(engine)
    engine.dispose()


def test_taken_up_where_a_process_died(database_server: LocalDatabaseServer, fresh_database: str) -> None:
    """Servers commit each CREATE TABLE by itself: what is there already must not be in the way."""
    engine = sa.create_engine(database_server.dsn(fresh_database), poolclass=sa.NullPool)
    made = 0
    fatal = 1

    @sa.event.listens_for(engine, "after_cursor_execute")
    def die(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        nonlocal made
        made += "CREATE TABLE" in statement
        if made == fatal:
            raise KeyboardInterrupt

    while True:
        made = 0
        try:
            own_tables.upgrade(engine)
        except KeyboardInterrupt:
            fatal += 1  # a step further each time
        else:
            break
    assert fatal > 4
    assert {"shardkit_position", "shardkit_decision"} <= set(tables(engine))
    engine.dispose()


def test_made_on_several_databases_at_once(database_server: LocalDatabaseServer, fresh_database: str) -> None:
    """alembic itself keeps the migration at hand in globals."""
    names = [f"{fresh_database}_{number}" for number in range(3)]
    engines = []
    try:
        for name in names:
            database_server.execute(f"CREATE DATABASE {name}")
            engines.append(sa.create_engine(database_server.dsn(name)))
        with ThreadPoolExecutor() as pool:
            list(pool.map(own_tables.upgrade, engines))
        assert all("shardkit_position" in tables(engine) for engine in engines)
    finally:
        for engine, name in zip(engines, names, strict=False):
            engine.dispose()
            database_server.execute(f"DROP DATABASE {name}")


def test_made_on_sqlite_in_memory_and_in_a_file_by_several_threads(tmp_path: Path) -> None:
    memory, file = sa.create_engine("sqlite://"), sa.create_engine(f"sqlite:///{tmp_path / 'shard.db'}")
    own_tables.upgrade(memory)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: own_tables.upgrade(file), range(3)))
    for engine in (memory, file):
        assert "shardkit_position" in tables(engine)
        engine.dispose()


def test_tables_of_a_newer_shardkit_are_left_alone(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shard.db'}")
    own_tables.upgrade(engine)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {own_tables.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(PreconditionFailed, match="newer shardkit"):
        own_tables.upgrade(engine)
    engine.dispose()


def test_logging_stays_as_it_is(tmp_path: Path) -> None:
    before = (list(logging.getLogger().handlers), logging.getLogger().level, logging.getLogger("alembic").level)
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'shard.db'}")
    own_tables.upgrade(engine)
    engine.dispose()
    assert (list(logging.getLogger().handlers), logging.getLogger().level, logging.getLogger("alembic").level) == before
