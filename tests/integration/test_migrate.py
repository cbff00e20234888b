"""Alembic over shards, on real servers: DDL that commits as it goes, processes that are killed, locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardkit.errors import PartlyApplied, PreconditionFailed
from shardkit.migrate import Ending, Fleet, State
from shardkit.migrate.lock import MigrationRunning
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.migration_tree import MigrationTree, two_shards

R1 = """
op.create_table("users", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))
"""

#: Runs a fleet in a process of its own, so that it can be killed.
COMMAND = """\
import sys
from shardkit.credentials import from_environment
from shardkit.mapstore import open_store
from shardkit.migrate import Fleet, Tree
failure = Fleet(open_store(sys.argv[1]), Tree.load(sys.argv[2])).upgrade().failure()
sys.exit(failure.exit_code if failure else 0)
"""


#: In a revision: say that it is there, and wait until the test lets it go on.
WAIT = """
import pathlib, time
here = pathlib.Path({directory!r})
(here / op.get_bind().engine.url.database).with_suffix(".here").touch()
deadline = time.monotonic() + 60
while not (here / "go").exists():
    assert time.monotonic() < deadline, "the test did not let this revision go on"
    time.sleep(0.02)
"""


class Shop:
    """Two shards on one server, and a tree."""

    def __init__(self, server: LocalDatabaseServer, directory: Path, databases: tuple[str, str]) -> None:
        self.server = server
        self.databases = dict(zip(("s0", "s1"), databases, strict=True))
        self.map: ShardMap = two_shards(*(server.endpoint(name).url for name in databases))
        self.tree = MigrationTree(directory)
        self.tree.revision("r1", None, R1)
        self.directory = directory
        self.wait = WAIT.format(directory=str(directory))

    def fleet(self, **options: object) -> Fleet:
        return self.tree.fleet(self.map, credentials=self.server.credentials, **options)

    def execute(self, shard: str, sql: str) -> list[tuple[object, ...]]:
        return self.server.execute(sql, database=self.databases[shard])

    def tables(self, shard: str) -> set[str]:
        names = {str(name) for (name,) in self.execute(shard, "SHOW TABLES")}
        return {name for name in names if not name.startswith(("shardkit_", "alembic_"))}

    def columns(self, shard: str, table: str) -> list[str]:
        return [str(row[0]) for row in self.execute(shard, f"SHOW COLUMNS FROM {table}")]

    def command(self) -> subprocess.Popen[str]:
        """`upgrade` in a process of its own."""
        path = self.directory / "shardmap.yaml"
        path.write_text(self.map.dump())
        logon = self.server.credentials(self.map.shard("s0").master)
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, f"file:{path}", str(self.tree.ini)],
            env={**os.environ, "SHARDKIT_USER": logon.user, "SHARDKIT_PASSWORD": logon.password},
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def shop(database_server: LocalDatabaseServer, fresh_database: str, tmp_path: Path) -> Iterator[Shop]:
    second = f"{fresh_database}_b"
    database_server.execute(f"CREATE DATABASE {second}")
    yield Shop(database_server, tmp_path, (fresh_database, second))
    database_server.execute(f"DROP DATABASE {second}")


def eventually(true: Callable[[], object], *, seconds: float = 30.0, what: str = "it") -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def test_shards_are_migrated_side_by_side(shop: Shop) -> None:
    # each shard's revision waits for the other's
    shop.tree.revision(
        "r1",
        None,
        f"""
        import pathlib, time
        here = pathlib.Path({str(shop.directory)!r})
        (here / op.get_bind().engine.url.database).with_suffix(".here").touch()
        deadline = time.monotonic() + 30
        while len(list(here.glob("*.here"))) < 2:
            assert time.monotonic() < deadline, "the other shard was not begun"
            time.sleep(0.02)
        op.create_table("users", sa.Column("id", sa.Integer, primary_key=True))
        """,
    )
    assert shop.fleet().upgrade().failure() is None
    assert shop.tables("s0") == shop.tables("s1") == {"users"}


def test_a_revision_that_fails_half_way_is_taken_up_where_it_stopped(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        """
        op.create_table("notes", sa.Column("user_id", sa.Integer))
        op.execute("INSERT INTO notes VALUES (1), (2)")
        op.add_column("users", sa.Column("email", sa.String(99)))
        op.create_table("invoices", sa.Column("id", sa.Integer))
        op.execute("INSERT INTO notes VALUES (3)")
        """,
    )
    shop.execute("s1", "CREATE TABLE invoices (id INTEGER)")

    report = shop.fleet().upgrade()

    assert isinstance(report.failure(), PartlyApplied)
    standing = report.results[1].standing
    assert standing.state is State.UNFINISHED
    assert standing.revisions == ("r1",)
    stopped = standing.unfinished
    assert stopped is not None
    assert stopped.revision == "r2"
    assert stopped.done == 3
    assert stopped.half_applied
    assert not stopped.cut_off
    assert str(stopped.statement).startswith("CREATE TABLE invoices")
    assert "already exists" in str(stopped.error)
    assert shop.fleet().current()[1] == standing

    shop.execute("s1", "DROP TABLE invoices")
    seen: list[tuple[str, bool]] = []
    fleet = shop.fleet(
        listen=lambda _shard, event: (
            seen.append((event["statement"], event["skipped"])) if event["event"] == "statement" else None
        )
    )
    assert fleet.upgrade().failure() is None
    assert [skipped for _, skipped in seen] == [True, True, True, False, False]
    assert shop.execute("s1", "SELECT user_id FROM notes ORDER BY 1") == [(1,), (2,), (3,)]
    assert shop.columns("s1", "users") == ["id", "name", "email"]
    assert shop.execute("s1", "SELECT COUNT(*) FROM shardkit_migration_steps") == [(0,)]
    assert [standing.revisions for standing in shop.fleet().current()] == [("r2",), ("r2",)]


def test_rows_that_were_rolled_back_are_written_again(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        """
        op.execute("INSERT INTO users VALUES (1, 'ann')")
        op.execute("INSERT INTO users VALUES (1, 'bob')")
        """,
    )
    report = shop.fleet(shards=["s0"]).upgrade()
    stopped = report.results[0].standing.unfinished
    assert stopped is not None
    assert not stopped.half_applied
    assert shop.execute("s0", "SELECT COUNT(*) FROM users") == [(0,)]

    shop.tree.revision("r2", "r1", "op.execute(\"INSERT INTO users VALUES (1, 'ann')\")")
    assert shop.fleet(shards=["s0"]).upgrade().failure() is None
    assert shop.execute("s0", "SELECT COUNT(*) FROM users") == [(1,)]


def test_a_revision_sees_the_key_that_its_skipped_insert_generated(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        """
        op.create_table("owners", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(9)))
        op.create_table("pets", sa.Column("owner_id", sa.Integer))
        owners = sa.table("owners", sa.column("id"), sa.column("name"))
        op.execute("INSERT INTO owners (name) VALUES ('first')")
        made = op.get_bind().execute(sa.text("INSERT INTO owners (name) VALUES ('second')"))
        op.create_table("invoices", sa.Column("id", sa.Integer))
        op.execute(f"INSERT INTO pets VALUES ({made.lastrowid * 100 + made.rowcount})")
        """,
    )
    shop.execute("s0", "CREATE TABLE invoices (id INTEGER)")
    assert shop.fleet(shards=["s0"]).upgrade().failure() is not None
    shop.execute("s0", "DROP TABLE invoices")
    assert shop.fleet(shards=["s0"]).upgrade().failure() is None
    assert shop.execute("s0", "SELECT owner_id FROM pets") == [(201,)]


def test_an_insert_with_other_values_than_before_is_not_guessed_at(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        """
        import time
        users = sa.table("users", sa.column("id"), sa.column("name"))
        op.bulk_insert(users, [{"id": 1, "name": str(time.time())}])
        op.create_table("invoices", sa.Column("id", sa.Integer))
        """,
    )
    shop.execute("s0", "CREATE TABLE invoices (id INTEGER)")
    shop.fleet(shards=["s0"]).upgrade()
    shop.execute("s0", "DROP TABLE invoices")

    failure = shop.fleet(shards=["s0"]).upgrade().failure()
    assert failure is not None
    assert "has run this statement with other values" in failure.message
    assert "--restart-revision" in str(failure.hint)

    shop.execute("s0", "DELETE FROM users")
    assert shop.fleet(shards=["s0"]).upgrade(restart_revision=True).failure() is None
    assert shop.execute("s0", "SELECT COUNT(*) FROM users") == [(1,)]


def test_a_process_killed_in_a_ddl_statement_is_taken_up(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        f"""
        import os, pathlib
        op.create_table("notes", sa.Column("user_id", sa.Integer))
        pathlib.Path({str(shop.directory / "pid")!r}).write_text(str(os.getpid()))
        op.execute("CREATE TABLE slow AS SELECT SLEEP(6) AS waited")
        op.add_column("users", sa.Column("email", sa.String(99)))
        """,
    )
    reports = []
    fleet = shop.fleet(shards=["s0"])
    command = threading.Thread(target=lambda: reports.append(fleet.upgrade()))
    command.start()
    at_work = "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'CREATE TABLE slow%'"
    eventually(lambda: shop.execute("s0", at_work), what="the slow statement")
    os.kill(int((shop.directory / "pid").read_text()), signal.SIGKILL)
    command.join(30)

    (result,) = reports[0].results
    assert result.ending is Ending.FAILED
    assert "signal 9" in result.error
    stopped = result.standing.unfinished
    assert stopped is not None
    assert stopped.done == 1
    assert stopped.cut_off
    assert str(stopped.statement).startswith("CREATE TABLE slow")

    # the server is still at it, and nobody starts beside it
    failure = shop.fleet(shards=["s0"]).upgrade().failure()
    assert failure is not None
    assert "another migration is at work on shard s0" in failure.message
    assert "CREATE TABLE slow" in failure.message

    assert shop.fleet(shards=["s0"], wait=30).upgrade().failure() is None
    assert shop.tables("s0") == {"users", "notes", "slow"}
    assert shop.execute("s0", "SELECT COUNT(*) FROM slow") == [(1,)]
    assert shop.columns("s0", "users") == ["id", "name", "email"]


def test_a_process_killed_between_two_statements_is_taken_up_at_the_second(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        f"""
        import os, pathlib
        op.execute("ALTER TABLE users ADD INDEX (name)")
        first_run = pathlib.Path({str(shop.directory / "first_run")!r})
        if not first_run.exists():
            first_run.touch()
            os.kill(os.getpid(), 9)
        op.execute("ALTER TABLE users ADD INDEX (name, id)")
        """,
    )
    assert "signal 9" in str(shop.fleet(shards=["s0"]).upgrade().failure())
    assert shop.fleet(shards=["s0"], wait=10).upgrade().failure() is None
    keys = {row[2] for row in shop.execute("s0", "SHOW INDEX FROM users")}
    assert keys == {"PRIMARY", "name", "name_2"}


def test_a_statement_that_must_not_run_twice_is_left_to_its_owner_when_it_was_cut_off(shop: Shop) -> None:
    shop.fleet(shards=["s0"]).upgrade()
    shop.tree.revision(
        "r2",
        "r1",
        f"""
        import os, pathlib
        pathlib.Path({str(shop.directory / "pid")!r}).write_text(str(os.getpid()))
        op.execute("ALTER TABLE users ADD INDEX (name)")
        """,
    )
    reports = []
    with shop.server.connect(shop.databases["s0"]) as reader, reader.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM users")  # the ALTER waits for this
        fleet = shop.fleet(shards=["s0"])
        command = threading.Thread(target=lambda: reports.append(fleet.upgrade()))
        command.start()
        at_work = "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'ALTER TABLE users%'"
        eventually(lambda: shop.execute("s0", at_work), what="the ALTER")
        os.kill(int((shop.directory / "pid").read_text()), signal.SIGKILL)
        command.join(30)

    failure = shop.fleet(shards=["s0"], wait=30).upgrade().failure()
    assert failure is not None
    assert "nobody can tell whether it was completed: ALTER TABLE users ADD INDEX (name)" in failure.message
    assert reports[0].results[0].standing.unfinished.cut_off


def test_when_the_command_is_killed_its_processes_complete_their_revision_and_stop(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        'op.create_table("notes", sa.Column("user_id", sa.Integer))'
        + shop.wait
        + 'op.add_column("users", sa.Column("email", sa.String(99)))',
    )
    shop.tree.revision("r3", "r2", 'op.create_table("invoices", sa.Column("id", sa.Integer))')
    with shop.command() as command:
        eventually(lambda: len(list(shop.directory.glob("*.here"))) == 2, what="both shards in r2")
        command.kill()
    with pytest.raises(MigrationRunning):
        # the command's own locks are gone with it; each shard's is held by the process that is at work
        _raise(shop.fleet(shards=["s0"]).upgrade().failure())
    (shop.directory / "go").touch()

    def stand() -> list[tuple[str, ...]]:
        return [standing.revisions for standing in shop.fleet().current()]

    eventually(lambda: stand() == [("r2",), ("r2",)], what="the end of r2")
    assert shop.fleet(wait=30).upgrade().failure() is None
    assert stand() == [("r3",), ("r3",)]
    assert shop.columns("s1", "users") == ["id", "name", "email"]


def _raise(failure: BaseException | None) -> None:
    # a process cannot raise in ours: its refusal comes back as words
    if failure is not None and "another migration is at work" in str(failure):
        raise MigrationRunning(str(failure))


def test_two_commands_at_once(shop: Shop) -> None:
    shop.tree.revision("r1", None, R1 + shop.wait)
    with shop.command() as command:
        eventually(lambda: list(shop.directory.glob("*.here")), what="the first command at work")

        with pytest.raises(MigrationRunning, match=r"at work on shard s0: connection \d+ of root from"):
            shop.fleet().upgrade()

        second = []
        waiting = threading.Thread(target=lambda: second.append(shop.fleet(wait=30).upgrade()))
        waiting.start()
        (shop.directory / "go").touch()
        waiting.join(60)
        assert command.wait(30) == 0
    assert second[0].failure() is None
    assert [result.applied for result in second[0].results] == [(), ()]


def test_ddl_does_not_queue_the_application_behind_a_long_transaction(shop: Shop) -> None:
    shop.fleet().upgrade()
    shop.tree.revision("r2", "r1", 'op.add_column("users", sa.Column("email", sa.String(99)))')
    with shop.server.connect(shop.databases["s0"]) as reader, reader.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM users")
        report = shop.fleet(shards=["s0"], lock_timeout=1).upgrade()
        failure = report.failure()
        assert failure is not None
        assert "1205" in failure.message
        assert not report.results[0].standing.unfinished.half_applied
    assert shop.fleet(shards=["s0"]).upgrade().failure() is None


def test_another_revision_does_not_run_over_one_that_stopped(shop: Shop) -> None:
    shop.tree.revision(
        "r2",
        "r1",
        'op.create_table("notes", sa.Column("user_id", sa.Integer))\nraise RuntimeError("stop")',
        'op.drop_table("notes")',
    )
    assert shop.fleet(shards=["s0"]).upgrade().failure() is not None
    failure = shop.fleet(shards=["s0"]).downgrade("base").failure()
    assert failure is not None
    assert "r2 stopped in the middle of its upgrade" in failure.message
    assert shop.tables("s0") == {"users", "notes"}


def test_a_server_that_is_away_stops_the_command_before_it_changes_anything(shop: Shop) -> None:
    s1 = shop.map.shard("s1")
    away = f"mysql://127.0.0.1:1/{s1.master.database}"
    fleet = shop.tree.fleet(two_shards(shop.map.shard("s0").master.url, away), credentials=shop.server.credentials)
    assert [standing.state for standing in fleet.current()] == [State.BEHIND, State.UNREACHABLE]
    with pytest.raises(PreconditionFailed, match="s1"):
        fleet.upgrade()
    assert shop.tables("s0") == set()


def test_check_compares_with_the_models(shop: Shop) -> None:
    shop.fleet().upgrade()
    assert shop.fleet().check().failure() is None
    shop.execute("s0", "ALTER TABLE users MODIFY name VARCHAR(51)")
    shop.execute("s1", "CREATE INDEX by_name ON users (name)")
    assert [check.differences for check in shop.fleet().check().checks] == [
        ("the type of users.name is VARCHAR(51) in the database and VARCHAR(50) in the models",),
        ("index by_name on users is in the database and not in the models",),
    ]
