"""``shardkit explain``: the route of raw SQL, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shardkit.cli import cli
from tests.routing_shop import shop_map

MAP = shop_map()


@pytest.fixture
def map_file(tmp_path: Path) -> Path:
    path = tmp_path / "map.yaml"
    path.write_text(MAP.dump(), encoding="utf-8")
    return path


def explain(map_file: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["explain", *words, "--map", str(map_file)])


def test_a_key_says_where(map_file: Path) -> None:
    shard = MAP.locate("users", [5]).shard
    done = explain(map_file, "SELECT name FROM users WHERE id = 5 AND age > 3")
    assert done.exit_code == 0, done.output
    assert f"text on {shard} (any)" in done.stdout
    assert "because: users.id = value pins users" in done.stdout
    assert "SELECT name FROM users WHERE id = 5 AND age > 3" in done.stdout
    assert "users.id was taken for an integer" in done.stderr


def test_for_programs(map_file: Path) -> None:
    done = explain(map_file, "UPDATE stores SET size = 3 WHERE region = :region", "region=busan", "--json")
    found = json.loads(done.stdout)
    assert found["shards"] == ["s1"]
    assert found["role"] == "master"
    assert found["tables"] == ["stores"]
    assert found["assumed"] == {"stores.region": "a text"}


def test_composite_keys_of_two_types(map_file: Path) -> None:
    done = explain(map_file, "SELECT * FROM reads WHERE tenant = 1 AND day = '2'", "--json")
    assert json.loads(done.stdout)["shards"] == [MAP.locate("reads", [1, "2"]).shard]


def test_models_say_what_keys_are(map_file: Path) -> None:
    models = ["--models", "tests.routing_shop:Base"]
    done = explain(map_file, "SELECT * FROM users WHERE id = :n", "n=5", *models)
    assert done.exit_code == 0, done.output
    assert "taken for" not in done.stderr
    assert explain(map_file, "SELECT * FROM stores WHERE region = 5", *models).exit_code == 1
    for place in ("nowhere:Base", "tests.routing_shop:Nothing", "tests.routing_shop:MAP", "tests.routing_shop"):
        done = explain(map_file, "SELECT 1", "--models", place)
        assert done.exit_code == 2
        assert place in done.stderr


def test_a_refusal_is_told_with_its_fix(map_file: Path) -> None:
    done = explain(map_file, "SELECT * FROM users WHERE age = 5")
    assert done.exit_code == 1
    assert "raw SQL on users would run on 3 shards" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.output
    assert explain(map_file, "SELECT 1", "n").exit_code == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["SELECT * FROM users WHERE age = 5"],
            1,
            "(--models MODULE:NAME, as shop.models:Base, says what the types are), or",
        ),
        (
            ["SELECT * FROM users WHERE age = 5", "--models", "tests.routing_shop:Base"],
            1,
            "its column's type, or write the statement as a select()",
        ),
        (["SELECT * FROM users WHERE id = :id"], 2, "parameters without a value: give id=VALUE"),
        (["this is no SQL"], 2, "'this is no SQL' is no SQL statement: give the whole statement in quotes"),
        ([""], 2, "is no SQL statement"),
        (["/* why */ (SELECT 1)"], 1, "only plain SQL says by itself where it belongs"),
        (["SELECT * FROM elsewhere WHERE id = 5"], 1, "does not name the table 'elsewhere'"),
    ],
)
def test_hints_are_for_a_command_line(map_file: Path, words: list[str], code: int, said: str) -> None:
    done = explain(map_file, *words)
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "create_cluster" not in done.stderr
    if code == 1:
        shown = json.loads(explain(map_file, *words, "--json").stdout)["error"]
        assert shown["exit_code"] == 1
