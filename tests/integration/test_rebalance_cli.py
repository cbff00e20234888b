"""``shardkit rebalance``: what it prints and what it exits with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shardkit.cli import cli
from shardkit.testing.database import LocalDatabaseServer
from tests.rebalance_shop import FIRST, SECOND, Shop, open_shop


@pytest.fixture
def shop(database_server: LocalDatabaseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setenv("SHARDKIT_USER", "root")
    monkeypatch.setenv("SHARDKIT_PASSWORD", "")
    monkeypatch.chdir(tmp_path)
    with open_shop(database_server, f"file:{tmp_path}/map.yaml") as shop:
        monkeypatch.setenv("SHARDKIT_MAP", shop.source)
        yield shop


def rebalance(*words: str) -> Result:
    return CliRunner().invoke(cli, ["rebalance", *words])


def as_json(*words: str, code: int = 0) -> Any:
    result = rebalance(*words, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_plan_is_shown_written_applied_and_listed(shop: Shop, tmp_path: Path) -> None:
    shown = rebalance("plan", "--move", "12-15:shop-1", "-o", "plan.yaml")
    assert shown.exit_code == 0, shown.output
    assert "  - shop-0: 0-15\n  + shop-0: 0-11\n  - shop-1: 16-31\n  + shop-1: 12-31" in shown.stdout
    assert "apply it with: shardkit rebalance apply plan.yaml" in shown.stdout
    assert "email is unique on each shard only" in shown.stderr

    assert "no job has ever run" in rebalance("status").stdout
    applied = rebalance("apply", "plan.yaml", "--yes")
    assert applied.exit_code == 0, applied.output
    assert "map version 4" in applied.stdout
    assert "copy: 150 of 150 rows (100%)" in applied.stderr
    assert shop.misplaced() == []

    listed = rebalance("status")
    assert "completed" in listed.stdout
    again = rebalance("apply", "plan.yaml")
    assert again.exit_code == 0, "done is done, and nobody is asked"


def test_json_is_one_document_for_each_command(shop: Shop) -> None:
    plan = as_json("plan", "--split", FIRST, "--to", SECOND, "--fraction", "0.25", "--keyspace", "orders")
    assert plan["transfers"][0]["rows"] == 150
    assert plan["transfers"][0]["buckets"] == "12-15"
    done = as_json("apply", plan["file"], "--yes")
    assert [job["state"] for job in done["jobs"]] == ["completed"]
    assert done["map_version"] == shop.map.version
    (job,) = as_json("status")
    assert job["id"] == f"{plan['id']}-1"
    assert as_json("status", job["id"]) == [job]
    error = as_json("status", "nothing", code=4)
    assert error["error"]["type"] == "PreconditionFailed"


def test_draining_a_shard_moves_everything_of_every_keyspace(shop: Shop) -> None:
    before = shop.contents()
    plan = as_json("plan", "--drain", FIRST)
    assert [transfer["keyspace"] for transfer in plan["transfers"]] == ["orders", "stores", "billing"]
    as_json("apply", plan["file"], "--yes")
    assert shop.contents() == before
    assert shop.misplaced() == []
    assert all(FIRST not in keyspace.shards for keyspace in shop.map.keyspaces.values())
    assert shop.rows(FIRST, "SELECT COUNT(*) FROM users") == [(0,)]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["plan", "--move", "12-15"], 2, "--move takes BUCKETS:SHARD"),
        (["plan", "--move", "15-12:shop-1"], 2, "runs backwards"),
        (["plan", "--drain", "shop-0", "--add", "shop-1"], 2, "exclude one another"),
        (["plan", "--split", "shop-0"], 2, "belong together"),
        (["plan", "--move", "12:shop-9"], 4, "the map has no shard 'shop-9'"),
        (["plan", "--move", "99:shop-1", "--keyspace", "orders"], 4, "keyspace 'orders' has no bucket 99"),
        (["plan", "--move", "99:shop-1"], 4, "not clear which keyspace is meant: none would fit"),
        (["plan", "--move", "20:shop-1"], 4, "nothing to move"),
        (["plan"], 4, "not clear which keyspace is meant: orders, stores would fit"),
        (["apply", "nowhere.yaml"], 4, "the plan nowhere.yaml cannot be read"),
        (["apply", "map.yaml"], 4, "map.yaml is not a plan"),
        (["cancel", "nothing"], 4, "there is no rebalance job nothing"),
        (["cancel", "../../etc/passwd"], 4, "there is no rebalance job"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_fix(shop: Shop, words: list[str], code: int, says: str) -> None:
    result = rebalance(*words)
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "fix:" in result.stderr
    assert "Traceback" not in result.output
    assert shop.map.version == 1


def test_nobody_to_ask_means_no(shop: Shop) -> None:
    as_json("plan", "--move", "12:shop-1", "-o", "plan.yaml")
    refused = rebalance("apply", "plan.yaml")
    assert refused.exit_code == 4
    assert "nothing was changed" in refused.stderr
    assert rebalance("status").stdout.startswith("no job")
