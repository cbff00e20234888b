"""``shardkit doctor --transactions``: what dead clients left prepared is ended, by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shardkit.decisions import BranchId, new_transaction
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.test_decisions import Bench, cluster_of, two_shards


@pytest.fixture
def bench(database_server: LocalDatabaseServer, tmp_path: Path) -> Iterator[Bench]:
    with two_shards(database_server, "doctor") as names:
        with cluster_of(database_server, names) as cluster:
            (tmp_path / "map.yaml").write_text(cluster.map.dump(), encoding="utf-8")
        yield Bench(database_server, names)


def doctor(directory: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "shardkit", "doctor", *options, "--map", str(directory / "map.yaml"), "--wait", "0.2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "SHARDKIT_USER": "root", "SHARDKIT_PASSWORD": ""},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_wrong(bench: Bench, tmp_path: Path) -> None:
    code, said = doctor(tmp_path, "--transactions")
    assert (code, said.strip()) == (0, "no transaction over shards is left prepared")


def test_what_is_left_is_ended_as_it_was_decided(bench: Bench, tmp_path: Path) -> None:
    decided, _ = bench.prepare()
    bench.decide(decided)
    code, said = doctor(tmp_path, "--transactions", "--dry-run")
    assert code == 3
    assert decided.transaction in said
    assert "commit" in said
    assert bench.left_prepared() == {decided}
    code, said = doctor(tmp_path, "--transactions", "--json")
    assert code == 0
    assert json.loads(said)["prepared"] == [
        {
            "shard": "right",
            "transaction": decided.transaction,
            "decider": "left",
            "decision": "commit",
            "outcome": "committed",
        }
    ]
    assert bench.left_prepared() == set()
    assert bench.amounts("right") == [50]


def test_what_nobody_decided_is_rolled_back(bench: Bench, tmp_path: Path) -> None:
    branch, _ = bench.prepare()
    code, said = doctor(tmp_path, "--transactions")
    assert code == 0
    assert "rolled back" in said
    assert branch.transaction in said
    assert bench.amounts("right") == []


def test_a_server_that_does_not_answer_is_named(bench: Bench, tmp_path: Path) -> None:
    document = yaml.safe_load((tmp_path / "map.yaml").read_text(encoding="utf-8"))
    document["shards"]["right"]["master"] = "mysql://127.0.0.1:1/nowhere"
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    code, said = doctor(tmp_path, "--transactions")
    assert code == 1
    assert "shard right could not be asked" in said


def test_it_says_what_it_can_look_for(bench: Bench, tmp_path: Path) -> None:
    code, said = doctor(tmp_path)
    assert code == 2
    assert "--transactions" in said


def test_branch_names_carry_who_decides() -> None:
    branch = BranchId("left", new_transaction(), "right", 7, 9)
    gtrid, bqual, number = branch.literal.split(",")
    data = bytes.fromhex(gtrid[2:-1]) + bytes.fromhex(bqual[2:-1])
    assert BranchId.parse(int(number), len(gtrid[2:-1]) // 2, data) == branch
