"""Alembic over shards, on SQLite: what needs no server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from shardkit.credentials import Credentials
from shardkit.errors import DifferencesFound, PartlyApplied, PreconditionFailed, ShardkitError, UnknownTable
from shardkit.migrate import Ending, State, Tree
from shardkit.migrate.connect import migration_engine
from shardkit.migrate.lock import LockKind, MigrationRunning, migration_lock
from shardkit.shardmap import Move, ShardMap
from tests.integration.migration_tree import MigrationTree, two_shards

USERS = """
op.create_table("users", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))
"""
INVOICES = 'op.create_table("invoices", sa.Column("id", sa.Integer, primary_key=True))'


@pytest.fixture
def tree(tmp_path: Path) -> MigrationTree:
    made = MigrationTree(tmp_path)
    made.revision("r1", None, USERS, 'op.drop_table("users")')
    return made


@pytest.fixture
def shop(tmp_path: Path) -> ShardMap:
    return two_shards(f"sqlite:///{tmp_path}/s0.db", f"sqlite:///{tmp_path}/s1.db")


def tables(shop: ShardMap, shard: str) -> set[str]:
    engine = sa.create_engine(f"sqlite:///{shop.shard(shard).master.database}")
    try:
        names = sa.inspect(engine).get_table_names()
    finally:
        engine.dispose()
    return {name for name in names if not name.startswith(("shardkit_", "alembic_"))}


def execute(shop: ShardMap, shard: str, sql: str) -> None:
    engine = sa.create_engine(f"sqlite:///{shop.shard(shard).master.database}")
    with engine.begin() as connection:
        connection.exec_driver_sql(sql)
    engine.dispose()


def test_an_upgrade_brings_every_shard_to_the_head(tree: MigrationTree, shop: ShardMap) -> None:
    fleet = tree.fleet(shop)
    assert [standing.state for standing in fleet.current()] == [State.BEHIND, State.BEHIND]

    report = fleet.upgrade()

    assert report.failure() is None
    assert [result.applied for result in report.results] == [("r1",), ("r1",)]
    assert tables(shop, "s0") == tables(shop, "s1") == {"users"}
    assert [(standing.state, standing.revisions) for standing in fleet.current()] == [(State.UP_TO_DATE, ("r1",))] * 2


def test_a_second_upgrade_has_nothing_to_do(tree: MigrationTree, shop: ShardMap) -> None:
    tree.fleet(shop).upgrade()
    again = tree.fleet(shop).upgrade()
    assert again.failure() is None
    assert [(result.ending, result.applied) for result in again.results] == [(Ending.DONE, ())] * 2


def test_a_failed_shard_says_where_it_stands_and_the_same_command_goes_on(tree: MigrationTree, shop: ShardMap) -> None:
    tree.revision("r2", "r1", 'op.create_table("extra", sa.Column("id", sa.Integer))\n' + INVOICES)
    tree.fleet(shop).upgrade("r1")
    execute(shop, "s1", "CREATE TABLE invoices (id INTEGER)")

    report = tree.fleet(shop).upgrade()

    failure = report.failure()
    assert isinstance(failure, PartlyApplied)
    assert failure.exit_code == 5
    good, bad = report.results
    assert good.ending is Ending.DONE
    assert bad.ending is Ending.FAILED
    assert bad.standing.revisions == ("r1",)
    stopped = bad.standing.unfinished
    assert stopped is not None
    assert stopped.revision == "r2"
    assert not stopped.half_applied  # DDL is transactional here
    assert "invoices already exists" in str(stopped.error)
    assert tables(shop, "s1") == {"users", "invoices"}

    execute(shop, "s1", "DROP TABLE invoices")
    report = tree.fleet(shop).upgrade()
    assert report.failure() is None
    assert [result.applied for result in report.results] == [(), ("r2",)]
    assert tables(shop, "s1") == {"users", "extra", "invoices"}
    assert tree.fleet(shop).current()[1].unfinished is None


def test_nothing_done_anywhere_is_a_plain_failure(tree: MigrationTree, shop: ShardMap) -> None:
    tree.revision("r1", None, 'raise RuntimeError("not today")')
    failure = tree.fleet(shop).upgrade().failure()
    assert isinstance(failure, ShardkitError)
    assert failure.exit_code == 1
    assert "not today" in failure.message


def test_a_canary_that_fails_leaves_the_others_alone(tree: MigrationTree, shop: ShardMap) -> None:
    execute(shop, "s1", "CREATE TABLE users (id INTEGER)")
    report = tree.fleet(shop).upgrade(first="s1")
    assert {result.shard: result.ending for result in report.results} == {"s0": Ending.NOT_RUN, "s1": Ending.FAILED}
    assert tables(shop, "s0") == set()


def test_no_other_shard_is_begun_after_a_failure_unless_asked(tree: MigrationTree, shop: ShardMap) -> None:
    execute(shop, "s0", "CREATE TABLE users (id INTEGER)")
    report = tree.fleet(shop, parallel=1).upgrade()
    assert report.results[1].ending is Ending.NOT_RUN
    report = tree.fleet(shop, parallel=1).upgrade(keep_going=True)
    assert report.results[1].ending is Ending.DONE


def test_a_shard_gets_the_branches_of_the_keyspaces_that_it_hosts(tree: MigrationTree, shop: ShardMap) -> None:
    tree.revision("b1", None, INVOICES, label="billing")

    assert tree.fleet(shop).upgrade().failure() is None

    assert tables(shop, "s0") == {"users"}
    assert tables(shop, "s1") == {"users", "invoices"}
    assert [standing.revisions for standing in tree.fleet(shop).current()] == [("r1",), ("b1", "r1")]
    assert tree.fleet(shop, keyspace="billing").shards == ("s1",)


def test_going_back_in_one_keyspace_leaves_the_others(tree: MigrationTree, shop: ShardMap) -> None:
    tree.revision("b1", None, INVOICES, 'op.drop_table("invoices")', label="billing")
    tree.fleet(shop).upgrade()
    assert tree.fleet(shop, keyspace="billing").downgrade("base").failure() is None
    assert tables(shop, "s1") == {"users"}


def test_a_tree_of_one_keyspace_runs_on_its_shards_only(tree: MigrationTree, shop: ShardMap) -> None:
    tree.settings(keyspace="billing", version_table="billing_version")
    assert tree.fleet(shop).shards == ("s1",)
    with pytest.raises(PreconditionFailed, match="belongs to keyspace 'billing', not to 'people'"):
        tree.fleet(shop, keyspace="people")


def test_a_downgrade_takes_every_shard_back(tree: MigrationTree, shop: ShardMap) -> None:
    tree.fleet(shop).upgrade()
    report = tree.fleet(shop).downgrade("-1")
    assert report.failure() is None
    assert [result.applied for result in report.results] == [("r1",), ("r1",)]
    assert tables(shop, "s0") == tables(shop, "s1") == set()


def test_one_step_up_is_one_step_on_every_shard(tree: MigrationTree, shop: ShardMap) -> None:
    tree.revision("r2", "r1", INVOICES)
    report = tree.fleet(shop).upgrade("+1")
    assert report.failure() is None
    assert [result.standing.revisions for result in report.results] == [("r1",), ("r1",)]


def test_no_schema_change_while_a_job_moves_rows(tree: MigrationTree, shop: ShardMap) -> None:
    moving = shop.with_moves([Move("job-7", "people", (3,), "s0", "s1")])
    with pytest.raises(PreconditionFailed, match="rebalance job job-7 is moving buckets of keyspace 'people'"):
        tree.fleet(moving).upgrade()
    assert tables(shop, "s0") == set()


def test_a_second_migration_is_refused_with_the_name_of_the_first(tree: MigrationTree, shop: ShardMap) -> None:
    engine = migration_engine("s1", shop.shard("s1").master, Credentials(""))
    with (
        engine.connect() as connection,
        migration_lock(connection, LockKind.RUN, shard="s1"),
        pytest.raises(MigrationRunning, match=f"at work on shard s1: process {os.getpid()}"),
    ):
        tree.fleet(shop).upgrade()
    assert tables(shop, "s0") == set()
    assert tree.fleet(shop).upgrade().failure() is None


def test_an_unknown_keyspace_or_revision_is_refused(tree: MigrationTree, shop: ShardMap) -> None:
    with pytest.raises(UnknownTable, match="no keyspace 'nope'"):
        tree.fleet(shop, keyspace="nope")
    with pytest.raises(PreconditionFailed, match="no revision 'r9'"):
        tree.fleet(shop).upgrade("r9")


def test_a_shard_from_another_tree_stops_the_command_before_it_changes_anything(
    tree: MigrationTree, shop: ShardMap
) -> None:
    execute(shop, "s1", "CREATE TABLE alembic_version (version_num VARCHAR(32))")
    execute(shop, "s1", "INSERT INTO alembic_version VALUES ('elsewhere')")
    assert tree.fleet(shop).current()[1].state is State.UNKNOWN
    with pytest.raises(PreconditionFailed, match="nothing was changed: s1: elsewhere -> r1"):
        tree.fleet(shop).upgrade()
    assert tables(shop, "s0") == set()


def test_check_names_what_differs(tree: MigrationTree, shop: ShardMap) -> None:
    behind = tree.fleet(shop).check()
    assert isinstance(behind.failure(), DifferencesFound)
    assert behind.checks[0].differences == ("behind: 1 to run: r1",)

    tree.fleet(shop).upgrade()
    execute(shop, "s0", "CREATE TABLE someone_elses (id INTEGER)")  # in no keyspace: none of our business
    assert tree.fleet(shop).check().failure() is None

    execute(shop, "s1", "ALTER TABLE users ADD COLUMN shoe_size INTEGER")
    report = tree.fleet(shop).check()
    assert [check.differences for check in report.checks] == [
        (),
        ("column users.shoe_size is in the database and not in the models",),
    ]
    failure = report.failure()
    assert failure is not None
    assert failure.exit_code == 3


def test_check_names_a_model_that_no_keyspace_places(tree: MigrationTree, shop: ShardMap) -> None:
    tree.fleet(shop).upgrade()
    tree.models(
        "import sqlalchemy as sa\nmetadata = sa.MetaData()\n"
        'sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))\n'
        'sa.Table("stray", metadata, sa.Column("id", sa.Integer, primary_key=True))\n'
    )
    assert tree.fleet(shop).check().checks[0].differences == (
        "table stray is in the models and in no keyspace of the shard map",
    )


def test_a_new_revision_is_written_from_the_models(tree: MigrationTree, shop: ShardMap) -> None:
    tree.fleet(shop).upgrade()
    tree.models(
        "import sqlalchemy as sa\nmetadata = sa.MetaData()\n"
        'sa.Table("users", metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)),'
        ' sa.Column("email", sa.String(99)))\n'
        # on the other shard only, so not compared here
        'sa.Table("invoices", metadata, sa.Column("id", sa.Integer, primary_key=True))\n'
    )
    (file,) = tree.fleet(shop).new_revision("s0", message="email", autogenerate=True)
    text = Path(file).read_text()
    assert "'email'" in text
    assert "invoices" not in text


def test_offline_sql_begins_where_each_shard_stands(tree: MigrationTree, shop: ShardMap) -> None:
    tree.revision("r2", "r1", INVOICES)
    tree.fleet(shop, shards=("s0",)).upgrade("r1")
    sql = tree.fleet(shop).offline_sql()
    assert "CREATE TABLE users" not in sql["s0"]
    assert "CREATE TABLE invoices" in sql["s0"]
    assert "CREATE TABLE users" in sql["s1"]


def test_what_env_py_prints_does_not_disturb(tree: MigrationTree, shop: ShardMap) -> None:
    env = tree.directory / "migrations" / "env.py"
    env.write_text('print("hello from env.py")\n' + env.read_text())
    assert tree.fleet(shop).upgrade().failure() is None


def test_an_env_py_that_exits_is_a_failure_with_its_words(tree: MigrationTree, shop: ShardMap) -> None:
    (tree.directory / "migrations" / "env.py").write_text('raise SystemExit("wrong moon")\n')
    failure = tree.fleet(shop).upgrade().failure()
    assert failure is not None
    assert "wrong moon" in failure.message


def test_options_that_belong_to_shardkit_are_refused(tree: MigrationTree, shop: ShardMap) -> None:
    (tree.directory / "migrations" / "env.py").write_text(
        'from shardkit.migrate import run_migrations\nrun_migrations(version_table="mine")\n'
    )
    failure = tree.fleet(shop).upgrade().failure()
    assert failure is not None
    assert "takes no 'version_table'" in failure.message


def test_a_missing_or_misspelt_configuration_is_refused(tree: MigrationTree, tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="is no Alembic configuration"):
        Tree.load(tmp_path / "nowhere" / "alembic.ini")
    tree.settings(keyspce="people")
    with pytest.raises(PreconditionFailed, match="has no setting 'keyspce'"):
        Tree.load(tree.ini)


# --- Alembic's own command line


def alembic(tree: MigrationTree, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", "-c", str(tree.ini), *words],
        cwd=tree.directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_alembics_own_command_line_works_on_one_shard(tree: MigrationTree, shop: ShardMap) -> None:
    (tree.directory / "shardmap.yaml").write_text(shop.dump())
    tree.settings(map=f"file:{tree.directory}/shardmap.yaml")

    done = alembic(tree, "-x", "shard=s1", "upgrade", "head")

    assert done.returncode == 0, done.stderr
    assert tables(shop, "s1") == {"users"}
    assert tables(shop, "s0") == set()
    assert "r1 (head)" in alembic(tree, "-x", "shard=s1", "current").stdout


def test_alembics_own_command_line_asks_for_the_shard(tree: MigrationTree, shop: ShardMap) -> None:
    (tree.directory / "shardmap.yaml").write_text(shop.dump())
    tree.settings(map=f"file:{tree.directory}/shardmap.yaml")
    refused = alembic(tree, "upgrade", "head")
    assert refused.returncode != 0
    assert "add -x shard=NAME (s0, s1)" in refused.stderr + refused.stdout
    assert "Traceback" not in refused.stderr


def test_without_a_map_the_tree_is_an_ordinary_one(tree: MigrationTree, tmp_path: Path) -> None:
    tree.ini.write_text(
        tree.ini.read_text().replace("[shardkit]", f"sqlalchemy.url = sqlite:///{tmp_path}/plain.db\n[shardkit]")
    )
    done = alembic(tree, "upgrade", "head")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plain.db").exists()
