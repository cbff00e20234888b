"""Which shards, revisions and tables a tree is about."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from shardkit.errors import PreconditionFailed, UnknownTable
from shardkit.migrate.scope import Scope, offline_range, pending, refuse_while_moving, scopes, targets
from shardkit.shardmap import Move, ShardMap

MAP = ShardMap.parse(
    {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {
            "orders": {
                "partition": {"by": "hash", "buckets": 8},
                "tables": {"users": "id"},
                "reference": ["countries"],
                "placement": {"shop-0": "0-3", "shop-1": "4-7"},
            },
            "billing": {"tables": ["invoices"], "placement": "billing-0"},
        },
        "shards": {name: {"master": f"sqlite:///{name}.db"} for name in ("shop-0", "shop-1", "billing-0", "spare")},
    }
)


def revision(directory: Path, name: str, down: str | None, label: str | None = None) -> None:
    (directory / "versions").mkdir(exist_ok=True)
    (directory / "versions" / f"{name}.py").write_text(
        f"revision = {name!r}\ndown_revision = {down!r}\nbranch_labels = {(label,) if label else None!r}\n"
        "depends_on = None\n"
    )


@pytest.fixture
def script(tmp_path: Path) -> ScriptDirectory:
    """base -> c1 (everywhere); two branches: o1 -> o2 (orders), b1 (billing); x1 (a label that is no keyspace)."""
    for name, down, label in (
        ("c1", None, None),
        ("o1", None, "orders"),
        ("o2", "o1", None),
        ("b1", None, "billing"),
        ("x1", None, "extras"),
    ):
        revision(tmp_path, name, down, label)
    config = Config()
    config.set_main_option("script_location", str(tmp_path))
    return ScriptDirectory.from_config(config)


def scope(shard: str, keyspace: str | None = None) -> Scope:
    (found,) = scopes(MAP, keyspace=keyspace, shards=(shard,))
    return found


def test_a_tree_without_a_keyspace_runs_on_every_shard() -> None:
    assert [one.shard for one in scopes(MAP)] == ["shop-0", "shop-1", "billing-0", "spare"]


def test_a_tree_of_a_keyspace_runs_where_it_is_hosted() -> None:
    assert [one.shard for one in scopes(MAP, keyspace="orders")] == ["shop-0", "shop-1"]
    with pytest.raises(UnknownTable, match="shard 'spare' hosts nothing of keyspace 'orders'"):
        scopes(MAP, keyspace="orders", shards=("spare",))


def test_only_the_tables_that_the_map_places_on_the_shard_are_compared() -> None:
    assert scope("shop-0").tables == {"users", "countries"}
    assert not scope("shop-0").compares("invoices")
    assert not scope("shop-0").compares("shardkit_position")
    assert scope("shop-0").unplaced(["users", "invoices", "stray"]) == ("stray",)


@pytest.mark.parametrize(
    ("shard", "keyspace", "asked", "expected"),
    [
        ("shop-0", None, "heads", {"c1", "o2", "x1"}),
        ("billing-0", None, "head", {"c1", "b1", "x1"}),
        ("spare", None, "heads", {"c1", "x1"}),
        ("shop-0", None, "o1", {"o1"}),
        ("billing-0", None, "o1", set()),
        ("billing-0", None, "orders@head", set()),
        ("shop-0", None, "+1", {"+1"}),
        ("shop-0", None, "base", {"base"}),
        ("shop-0", "orders", "base", {"orders@base"}),
    ],
)
def test_a_shard_gets_the_branches_of_its_keyspaces(
    script: ScriptDirectory, shard: str, keyspace: str | None, asked: str, expected: set[str]
) -> None:
    assert set(targets(script, scope(shard, keyspace), asked)) == expected


def test_an_unknown_revision_is_refused(script: ScriptDirectory) -> None:
    with pytest.raises(PreconditionFailed, match="no revision 'o9'"):
        targets(script, scope("shop-0"), "o9")


def test_what_is_pending_comes_in_the_order_in_which_it_runs(script: ScriptDirectory) -> None:
    assert pending(script, (), ("o2",)) == ("o1", "o2")
    assert pending(script, ("o1",), ("o2",)) == ("o2",)
    assert pending(script, ("o2", "c1"), ("o2", "c1")) == ()
    assert pending(script, ("o2",), ("o1",), downgrade=True) == ("o2",)
    with pytest.raises(PreconditionFailed, match="gone -> o2 is no way through the tree"):
        pending(script, ("gone",), ("o2",))


def test_offline_sql_begins_at_the_shards_place_on_that_branch(script: ScriptDirectory) -> None:
    assert offline_range(script, (), "o2") == "o2"
    assert offline_range(script, ("c1", "o1"), "o2") == "o1:o2"
    with pytest.raises(PreconditionFailed, match="offline SQL for o2 cannot begin at c1"):
        offline_range(script, ("c1",), "o2")


def test_a_rebalance_job_closes_its_keyspace_and_no_other() -> None:
    moving = MAP.with_moves([Move("job-1", "orders", (1,), "shop-0", "shop-1")])
    refuse_while_moving(moving, scopes(moving, keyspace="billing"))
    with pytest.raises(PreconditionFailed, match="job-1"):
        refuse_while_moving(moving, scopes(moving))
