"""``shardkit migrate`` as an operator meets it: tables, JSON, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from shardkit.cli import cli
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.migration_tree import MigrationTree, two_shards

USERS = 'op.create_table("users", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))'


class Prompt:
    """A shell in the application's directory."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self._capsys = capsys
        self.tree = MigrationTree(directory)
        self.tree.revision("r1", None, USERS, 'op.drop_table("users")')
        self.map: ShardMap = two_shards(f"sqlite:///{directory}/s0.db", f"sqlite:///{directory}/s1.db")
        (directory / "shardmap.yaml").write_text(self.map.dump())
        self.tree.settings(map=f"file:{directory}/shardmap.yaml")

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        with pytest.raises(SystemExit) as ended:
            cli.main(["migrate", words[0], "--config", str(self.tree.ini), *words[1:]])
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def json(self, *words: str) -> tuple[int, Any]:
        code, out, _ = self.run(*words, "--json")
        return code, json.loads(out)

    def execute(self, shard: str, sql: str) -> None:
        engine = sa.create_engine(f"sqlite:///{self.directory}/{shard}.db")
        with engine.begin() as connection:
            connection.exec_driver_sql(sql)
        engine.dispose()


@pytest.fixture
def prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prompt:
    return Prompt(tmp_path, capsys)


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_upgrade_prints_a_table_of_shards_and_revisions(prompt: Prompt) -> None:
    code, out, _ = prompt.run("upgrade")
    assert code == 0
    assert [row[:4] for row in lines(out)] == [
        ["SHARD", "FROM", "TO", "RESULT"],
        ["s0", "-", "r1", "done"],
        ["s1", "-", "r1", "done"],
    ]
    code, out, _ = prompt.run("current")
    assert code == 0
    assert lines(out)[1:] == [["s0", "r1", "up", "to", "date", "-"], ["s1", "r1", "up", "to", "date", "-"]]


def test_a_part_that_failed_exits_with_5_and_the_fix(prompt: Prompt) -> None:
    prompt.execute("s1", "CREATE TABLE users (id INTEGER)")
    code, out, err = prompt.run("upgrade")
    assert code == 5
    assert "failed" in out
    assert "the upgrade failed on s1: table users already exists; complete on s0" in err
    assert "fix: mend what is named, then run the same command again" in err
    assert "Traceback" not in err

    code, document = prompt.json("upgrade")
    assert code == 5
    failed = document["shards"][1]
    assert failed["ending"] == "failed"
    assert failed["standing"]["state"] == "unfinished"
    assert failed["standing"]["unfinished"]["revision"] == "r1"
    assert failed["standing"]["unfinished"]["half_applied"] is False

    prompt.execute("s1", "DROP TABLE users")
    assert prompt.run("upgrade")[0] == 0


def test_dry_run_and_sql_change_nothing(prompt: Prompt) -> None:
    code, out, _ = prompt.run("upgrade", "--dry-run")
    assert code == 0
    assert "1 to run: r1" in out
    code, out, _ = prompt.run("upgrade", "--sql")
    assert code == 0
    assert out.startswith("-- shards: s0, s1\n")
    assert "CREATE TABLE users" in out
    code, document = prompt.json("current")
    assert code == 0
    assert [shard["pending"] for shard in document["shards"]] == [["r1"], ["r1"]]


def test_downgrade_asks_first(prompt: Prompt) -> None:
    prompt.run("upgrade")
    code, _, err = prompt.run("downgrade", "-1")
    assert code == 4
    assert "s0: revert r1" in err
    assert "nothing was changed" in err
    assert prompt.run("downgrade", "-1", "--yes")[0] == 0
    assert prompt.json("current")[1]["shards"][0]["revisions"] == []


def test_check_exits_with_3_where_shards_differ(prompt: Prompt) -> None:
    prompt.run("upgrade")
    assert prompt.run("check")[0] == 0
    prompt.execute("s1", "ALTER TABLE users ADD COLUMN shoe_size INTEGER")
    code, out, _ = prompt.run("check")
    assert code == 3
    assert "column users.shoe_size is in the database and not in the models" in out


def test_revision_writes_a_file(prompt: Prompt) -> None:
    prompt.run("upgrade")
    code, document = prompt.json("revision", "-m", "shoe size", "--autogenerate")
    assert code == 0
    (file,) = document["files"]
    assert "down_revision = 'r1'" in Path(file).read_text()


def test_usage_errors_say_what_to_give(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHARDKIT_MAP", raising=False)
    prompt.tree.settings()
    code, _, err = prompt.run("current")
    assert code == 2
    assert "give --map, set SHARDKIT_MAP, or set map in [shardkit]" in err


@pytest.mark.parametrize("words", [("upgrade", "--keyspace", "nope"), ("upgrade", "r9"), ("upgrade", "--shard", "s9")])
def test_what_does_not_exist_is_a_precondition(prompt: Prompt, words: tuple[str, ...]) -> None:
    code, _, err = prompt.run(*words)
    assert code == 4
    assert "fix:" in err


def test_own_tables_are_made_in_every_database(prompt: Prompt) -> None:
    code, out, _ = prompt.run("upgrade", "--internal", "--map", f"file:{prompt.directory}/shardmap.yaml")
    assert code == 0
    assert [row[:2] for row in lines(out)[1:]] == [["s0", "master"], ["s1", "master"]]
    engine = sa.create_engine(f"sqlite:///{prompt.directory}/s1.db")
    assert "shardkit_migration_steps" in sa.inspect(engine).get_table_names()
    engine.dispose()


def test_ctrl_c_completes_the_revision_at_work_and_says_how_to_go_on(prompt: Prompt) -> None:
    prompt.tree.revision(
        "r1",
        None,
        f"""
        import pathlib, time
        pathlib.Path(op.get_bind().engine.url.database + ".here").touch()
        deadline = time.monotonic() + 60
        while not pathlib.Path({str(prompt.directory / "go")!r}).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        {USERS}
        """,
    )
    prompt.tree.revision("r2", "r1", 'op.create_table("invoices", sa.Column("id", sa.Integer))')
    with subprocess.Popen(
        [sys.executable, "-c", "from shardkit.cli import main; main()", "migrate", "upgrade", "-c", prompt.tree.ini],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        deadline = time.monotonic() + 30
        while len(list(prompt.directory.glob("*.here"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(command.pid, signal.SIGINT)
        (prompt.directory / "go").touch()
        out, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert "run the same command again: it goes on from there" in err
    assert {shard["revisions"][0] for shard in prompt.json("current")[1]["shards"]} == {"r1"}, out


def test_a_password_shows_nowhere(
    prompt: Prompt, database_server: LocalDatabaseServer, fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = database_server.endpoint(fresh_database).url
    (prompt.directory / "shardmap.yaml").write_text(two_shards(url, url.replace(fresh_database, "mysql")).dump())
    monkeypatch.setenv("SHARDKIT_USER", "nobody")
    monkeypatch.setenv("SHARDKIT_PASSWORD", "sesame-open")
    code, out, err = prompt.run("upgrade")
    assert code == 4
    assert "refused the log-on" in err
    assert "SHARDKIT_PASSWORD" in err
    assert "sesame-open" not in out + err
