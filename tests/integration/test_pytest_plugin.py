"""The pytest plugin, as a project that uses shardkit sees it."""

from __future__ import annotations

import os
import re
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
    return run_pytest(project, "test_it.py")


def run_pytest(project: Path, file: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", file],
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


ROLLBACK = """
@pytest.fixture
def session_factory(request):
    return sessionmaker(request.getfixturevalue(CLUSTER))

def rows(cluster):
    with sessionmaker(cluster)() as session:
        return len(session.scalars(select(User)).all())

def test_what_is_committed_is_undone(session_factory, request):
    from shardkit.testing.rollback import rolled_back
    cluster = request.getfixturevalue(CLUSTER)
    with session_factory.begin() as session:
        session.add(User(id=1000))
    with rolled_back(session_factory) as factory:
        with factory.begin() as session:
            session.add_all(User(id=number) for number in range(1, 41))
        with factory() as session:
            assert len(session.scalars(select(User)).all()) == 41
            session.add_all(User(id=number) for number in range(41, 60))
            session.flush()
            session.rollback()
            assert len(session.scalars(select(User)).all()) == 41
    assert rows(cluster) == 1
    with session_factory.begin() as session:
        session.add(User(id=1001))
    assert rows(cluster) == 2
"""


def test_a_test_is_rolled_back_on_sqlite(project: Path) -> None:
    done = run(project, f"CLUSTER = 'shardkit_cluster'\n{ROLLBACK}")
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.mariadb
def test_a_test_is_rolled_back_on_mariadb(project: Path) -> None:
    done = run(project, f"CLUSTER = 'shardkit_mariadb_cluster'\n{ROLLBACK}")
    assert "1 passed" in done.stdout, done.stdout


def test_the_fixture_rolls_back_when_the_test_ends(project: Path) -> None:
    done = run(
        project,
        """
import shardkit

@pytest.fixture(scope="module")
def factory(tmp_path_factory, request):
    home = tmp_path_factory.mktemp("shards")
    text = (request.config.rootpath / "shardmap.yaml").read_text()
    parsed = shardkit.ShardMap.parse(text)
    from shardkit.topology import Endpoint, Shard
    shards = {name: Shard(name, Endpoint("", 0, str(home / name), "sqlite")) for name in parsed.shards}
    with shardkit.create_cluster(parsed.with_shards(shards)) as cluster:
        cluster.create_all(Base.metadata)
        yield sessionmaker(cluster)

@pytest.mark.parametrize("time", [1, 2])
def test_users(factory, shardkit_rollback, time):
    assert shardkit_rollback(factory) is factory
    with factory.begin() as session:
        session.add_all(User(id=number) for number in range(1, 41))
    with factory() as session:
        assert len(session.scalars(select(User)).all()) == 40
""",
    )
    assert "2 passed" in done.stdout, done.stdout


PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "testing.md"


@pytest.mark.parametrize(
    "kind", ["shardkit_cluster", pytest.param("shardkit_mariadb_cluster", marks=pytest.mark.mariadb)]
)
def test_the_page_can_be_followed(tmp_path: Path, kind: str) -> None:
    """Each block that begins with the name of a file is that file."""
    files = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == [
        "application.py",
        "shardmap.yaml",
        "pyproject.toml",
        "conftest.py",
        "test_shop.py",
    ]
    for name, text in files:
        (tmp_path / name).write_text(text.replace("shardkit_cluster", kind), encoding="utf-8")
    done = run_pytest(tmp_path, "test_shop.py")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_application_is_pointed_at_another_cluster_and_back(project: Path) -> None:
    done = run(
        project,
        """
import asyncio
from shardkit import async_sessionmaker, create_cluster
from shardkit.errors import ShardkitError
from shardkit.testing.rollback import async_rolled_back, pointed_at, rolled_back

def test_it(shardkit_cluster, shardkit_map):
    with create_cluster(shardkit_map) as cluster:
        factory = sessionmaker(cluster)  # atomic: of servers
        with pointed_at(factory, shardkit_cluster):
            with factory.begin() as session:
                session.add_all(User(id=number) for number in range(1, 41))
            with rolled_back(factory), factory.begin() as session:
                session.add(User(id=41))
            with factory() as session:
                assert len(session.scalars(select(User)).all()) == 40
        assert (factory.kw["cluster"], factory.kw["transactions"]) == (cluster, "atomic")

def test_the_other_function_is_named(shardkit_cluster):
    async def wrong():
        async with async_rolled_back(sessionmaker(shardkit_cluster)):
            pass

    with pytest.raises(TypeError, match=r"use rolled_back"):
        asyncio.run(wrong())
    with pytest.raises(TypeError, match=r"use async_rolled_back"), rolled_back(async_sessionmaker(shardkit_cluster)):
        pass
    for function in (lambda: rolled_back(5), lambda: pointed_at(5, shardkit_cluster)):
        with pytest.raises(ShardkitError), function():
            pass
""",
    )
    assert "2 passed" in done.stdout, done.stdout


def test_a_read_of_several_shards_fails_its_test(project: Path) -> None:
    done = run(
        project,
        """
from shardkit.errors import ScatterRefused

def test_scatter(shardkit_cluster, no_scatter):
    with sessionmaker(shardkit_cluster)() as session:
        session.get(User, 1)
        session.scalars(select(User), execution_options={"shardkit_scatter": True}).all()
        with pytest.raises(ScatterRefused, match="users is read on 2 shards"):
            session.scalars(select(User)).all()

def test_without(shardkit_cluster):
    with sessionmaker(shardkit_cluster)() as session:
        session.scalars(select(User)).all()

def test_keyed(assert_single_shard):
    assert_single_shard(select(User).where(User.id == 1))

def test_not_keyed(assert_single_shard):
    assert_single_shard(select(User))
""",
    )
    assert "3 passed" in done.stdout, done.stdout
    assert "1 failed" in done.stdout, done.stdout
    assert "2 shards would be asked: north, south" in done.stdout, done.stdout


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
