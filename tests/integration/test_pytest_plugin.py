"""The pytest plugin, as a project that uses shardkit sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MAP = """
format: 1
cluster: shop
keyspaces:
  orders:
    partition: {by: hash, buckets: 64}
    tables: {users: id}
    placement: {north: 0-31, south: 32-63}
shards:
  north: {master: mysql://10.0.0.1:3306/shop, replicas: [mysql://10.0.0.2:3306/shop]}
  south: {master: mysql://10.0.0.3:3306/shop}
"""

MODELS = """
import pytest
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from shardkit import sessionmaker

class Base(DeclarativeBase): pass

class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)

@pytest.fixture
def shardkit_metadata():
    return Base.metadata

def write_and_count(cluster):
    Session = sessionmaker(cluster, transactions="best_effort")
    with Session() as session, session.begin():
        session.add_all(User(id=number) for number in range(1, 41))
    with Session() as session:
        return [
            len(session.scalars(select(User), execution_options={"shardkit_shard": shard}).all())
            for shard in ("north", "south")
        ]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "shardmap.yaml").write_text(MAP, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nshardkit_map = shardmap.yaml\n", encoding="utf-8")
    return tmp_path


def run(project: Path, test: str) -> subprocess.CompletedProcess[str]:
    (project / "test_it.py").write_text(MODELS + test, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_it.py"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
    )


def test_a_project_tests_its_routing_on_sqlite(project: Path) -> None:
    done = run(
        project,
        """
@pytest.mark.parametrize("time", [1, 2])
def test_users(shardkit_cluster, time):
    north, south = write_and_count(shardkit_cluster)
    assert north + south == 40 and north and south
""",
    )
    assert "2 passed" in done.stdout, done.stdout


@pytest.mark.mariadb
def test_a_project_tests_on_mariadb(project: Path) -> None:
    done = run(
        project,
        """
@pytest.mark.parametrize("time", [1, 2])
def test_users(shardkit_mariadb_cluster, time):
    north, south = write_and_count(shardkit_mariadb_cluster)
    assert north + south == 40 and north and south

def test_nothing_stays(shardkit_mariadb_server):
    assert shardkit_mariadb_server.execute("SHOW DATABASES LIKE 'test%'") == []
""",
    )
    assert "3 passed" in done.stdout, done.stdout


def test_without_a_map_the_fix_is_named(project: Path) -> None:
    (project / "pytest.ini").unlink()
    done = run(project, "def test_users(shardkit_cluster): pass\n")
    assert "set shardkit_map = path/of/shardmap.yaml" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.mariadb
def test_a_failing_test_shows_what_its_server_logged(project: Path) -> None:
    done = run(
        project,
        """
def test_users(shardkit_mariadb_server):
    shardkit_mariadb_server.execute("SET GLOBAL log_warnings = 4")
    connection = shardkit_mariadb_server.connect()
    connection._force_close()
    import time
    deadline = time.monotonic() + 10
    while "Aborted connection" not in shardkit_mariadb_server.log_tail() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert False

def test_later(shardkit_mariadb_server):
    assert False
""",
    )
    assert "2 failed" in done.stdout, done.stdout
    assert done.stdout.count("end of the log of mariadb-") == 1
    assert "Aborted connection" in done.stdout


def test_a_project_that_does_not_use_it_pays_nothing() -> None:
    code = """
import logging, sys
import shardkit.testing.plugin
heavy = {"sqlalchemy", "pymysql", "kazoo", "pydantic", "yaml", "alembic", "click"} & set(sys.modules)
assert not heavy, heavy
assert not logging.getLogger().handlers and not logging.getLogger("shardkit").handlers
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
