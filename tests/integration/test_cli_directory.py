"""``shardkit directory``, and what the other commands say of keyspaces by directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shardkit.adoption.filing import filer
from shardkit.cli import cli
from shardkit.credentials import fixed
from tests.integration.conftest import Shop
from tests.integration.test_session_directory import BUCKETS, HOME, Base, Tenancy, Tenant, map_of


@pytest.fixture
def tenancy(shop: Shop, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Tenancy]:
    if shop.kind == "server":
        server = request.getfixturevalue("database_server")
        monkeypatch.setenv("SHARDKIT_USER", server.user)
        monkeypatch.setenv("SHARDKIT_PASSWORD", server.password)
    made = Tenancy(shop)
    yield made
    with shop.open(map_of(shop)) as cluster:
        cluster.drop_all(Base.metadata)


@pytest.fixture
def map_file(tenancy: Tenancy, tmp_path: Path) -> Path:
    path = tmp_path / "map.yaml"
    path.write_text(map_of(tenancy.shop).dump(), encoding="utf-8")
    return path


def run(map_file: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--map", str(map_file)])


def add_past_shardkit(tenancy: Tenancy, shard: str, *codes: str) -> None:
    for code in codes:
        tenancy.shop.execute(tenancy.shop.masters[shard], f"INSERT INTO tenants (code, seats) VALUES ('{code}', 3)")


def test_assign_then_where_and_explain(tenancy: Tenancy, map_file: Path) -> None:
    done = run(map_file, "directory", "assign", "tenants", "code=acme", "large")
    assert done.exit_code == 0, done.output
    assert "is in bucket large, on shop-2" in done.stderr + done.stdout
    assert tenancy.entries() == {"acme": "large"}
    again = run(map_file, "directory", "assign", "tenants", "code=acme", "small")
    assert again.exit_code == 4
    assert "in bucket 'large' already" in again.stderr
    assert "shard shop-2" in run(map_file, "where", "tenants", "code=acme").stdout
    nobody = run(map_file, "where", "tenants", "code=nobody")
    assert nobody.exit_code == 1
    assert "shardkit directory assign tenants code=VALUE BUCKET (one of " in nobody.stderr
    assert "cluster.assign" not in nobody.stderr
    found = json.loads(run(map_file, "explain", "SELECT * FROM tenants WHERE code = 'acme'", "--json").stdout)
    assert found["shards"] == ["shop-2"]
    new = json.loads(run(map_file, "explain", "INSERT INTO tenants (code) VALUES ('nobody')", "--json").stdout)
    assert len(new["shards"]) == 1
    assert tenancy.entries() == {"acme": "large"}


def test_fill_enters_what_was_written_past_shardkit(tenancy: Tenancy, map_file: Path) -> None:
    tenancy.cluster.assign("tenants", "known", "small")
    add_past_shardkit(tenancy, "shop-0", "known", "a", "b")
    add_past_shardkit(tenancy, "shop-2", "c", "서울")
    checked = CliRunner().invoke(cli, ["map", "validate", str(map_file), "--connect"])
    assert checked.exit_code == 3, checked.output
    assert "4 of 5 keys that have rows are not in the directory" in checked.stdout
    looked = run(map_file, "directory", "fill", "tenants", "--dry-run")
    assert looked.exit_code == 3
    assert tenancy.entries() == {"known": "small"}
    done = run(map_file, "directory", "fill", "tenants", "--json")
    assert json.loads(done.stdout) == {"keys": 5, "missing": 4, "entered": 4, "astray": []}
    assert set(tenancy.entries()) == {"known", "a", "b", "c", "서울"}
    tenancy.check()
    assert run(map_file, "directory", "fill", "tenants").exit_code == 0
    assert CliRunner().invoke(cli, ["map", "validate", str(map_file), "--connect"]).exit_code == 0
    with tenancy.session() as session:
        assert session.get_one(Tenant, "서울").seats == 3


def test_fill_tells_of_rows_that_no_entry_can_lead_to(tenancy: Tenancy, map_file: Path) -> None:
    tenancy.cluster.assign("tenants", "strayed", "small")
    add_past_shardkit(tenancy, HOME, "strayed", "double")
    add_past_shardkit(tenancy, "shop-2", "double", "fine")
    done = run(map_file, "directory", "fill", "tenants")
    assert done.exit_code == 1
    assert "'strayed' has rows on shop-1; its entry leads to shop-0 (small)" in done.stderr
    assert "'double' has rows on shop-1, shop-2" in done.stderr
    assert tenancy.entries() == {"strayed": "small", "fine": "large"}


def test_fill_tells_keys_apart_that_a_collation_does_not(tenancy: Tenancy, map_file: Path) -> None:
    codes = ["Acme", "acme", "b", "b ", "e", "é"]
    add_past_shardkit(tenancy, "shop-2", *codes)
    done = run(map_file, "directory", "fill", "tenants", "--json")
    assert json.loads(done.stdout) == {"keys": 6, "missing": 6, "entered": 6, "astray": []}
    assert set(tenancy.entries()) == set(codes)


def test_fill_tells_of_a_key_that_went_elsewhere_meanwhile(tenancy: Tenancy) -> None:
    add_past_shardkit(tenancy, "shop-2", "raced")
    shard_map = map_of(tenancy.shop)
    credentials = tenancy.shop.options.get("credentials", fixed("nobody"))
    with filer(shard_map, shard_map.keyspace("tenants"), credentials) as made:
        found = made.look()
        tenancy.cluster.assign("tenants", "raced", "small")
        assert made.fill(found) == 0
    assert found.astray == ["the key 'raced' has rows on shop-2; its entry, made meanwhile, leads to shop-0"]


def test_what_is_no_directory_is_refused(tenancy: Tenancy, map_file: Path, shop: Shop) -> None:
    other = map_file.with_name("other.yaml")
    other.write_text(shop.map().dump(), encoding="utf-8")
    for words in (["directory", "fill", "orders"], ["directory", "assign", "users", "id=1", "small"]):
        done = run(other, *words)
        assert done.exit_code == 4, done.output
        assert "not partitioned by a directory" in done.stderr
    unknown = run(map_file, "directory", "assign", "tenants", "code=acme", "huge")
    assert unknown.exit_code == 4
    assert f"its buckets are {', '.join(BUCKETS)}" in unknown.stderr
    assert run(map_file, "directory", "assign", "tenants", "seats=1", "large").exit_code == 2
