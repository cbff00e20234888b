"""``shardkit map``, ``where`` and ``status`` on a real ZooKeeper and a real database server."""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from shardkit import cli as cli_module
from shardkit.cli import cli
from shardkit.mapstore import open_store
from shardkit.shardmap import Move, ShardMap
from shardkit.testing import LocalZooKeeper, free_port
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Endpoint

MAP = """\
format: 1
cluster: {cluster}
keyspaces:
  orders:
    partition: {{by: hash, buckets: 16}}
    tables: {{users: id, orders: user_id}}
    reference: [countries]
    placement: {{a: 0-7, b: 8-15}}
  stores:
    partition: {{by: list, buckets: {{seoul: [서울], daegu: [대구]}}}}
    tables: {{stores: region}}
    placement: {{a: [seoul], b: [daegu]}}
  days:
    partition: {{by: range, buckets: {{old: [null, 2024-01-01], new: [2024-01-01, null]}}}}
    tables: {{visits: day}}
    placement: {{a: [old, new]}}
  billing: {{tables: [invoices], placement: b}}
shards:
  a: {{master: mysql://127.0.0.1:1/a}}
  b: {{master: mysql://127.0.0.1:1/b}}
"""
_clusters = (f"cli-{number}" for number in itertools.count(1))


class Shell:
    """Runs ``shardkit`` and shows what it said."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.environment = {"SHARDKIT_MAP": source, "SHARDKIT_USER": "root", "SHARDKIT_PASSWORD": ""}

    def __call__(self, *words: str | Path, expect: int = 0, **environment: str) -> Result:
        result = CliRunner().invoke(cli, [str(word) for word in words], env={**self.environment, **environment})
        assert "Traceback" not in result.output
        assert result.exit_code == expect, result.output
        return result

    def json(self, *words: str | Path, expect: int = 0, **environment: str) -> Any:
        return json.loads(self(*words, "--json", expect=expect, **environment).stdout)

    def fails(self, *words: str | Path, code: int, **environment: str) -> str:
        """The error: on one screen of standard error, nothing on standard output, and the same as JSON."""
        result = self(*words, expect=code, **environment)
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) < 24
        document = self.json(*words, expect=code, **environment)
        assert document["error"]["exit_code"] == code
        assert document["error"]["message"] in result.stderr
        return result.stderr


@pytest.fixture(autouse=True)
def _no_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_module, "configure_logging", lambda _verbosity: None)


@pytest.fixture
def cluster() -> str:
    return next(_clusters)


@pytest.fixture
def shell(zookeeper: LocalZooKeeper, cluster: str) -> Shell:
    return Shell(zookeeper.url(cluster))


@pytest.fixture
def file(tmp_path: Path, cluster: str) -> Path:
    path = tmp_path / "map.yaml"
    path.write_text(MAP.format(cluster=cluster), encoding="utf-8")
    return path


@pytest.fixture
def published(shell: Shell, file: Path) -> ShardMap:
    shell("map", "apply", file)
    return ShardMap.load(file).with_version(1)


def changed(file: Path, old: str, new: str) -> Path:
    text = file.read_text(encoding="utf-8")
    assert old in text
    path = file.with_name("changed.yaml")
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


# --- show, validate, apply, diff, history


def test_the_life_of_a_map(shell: Shell, file: Path, cluster: str) -> None:
    assert "no shard map is published" in shell.fails("map", "show", code=4)
    assert (
        shell("map", "validate", file).stdout == f"{file} is good: cluster {cluster}, 4 keyspaces, 6 tables, 2 shards\n"
    )
    assert shell("map", "apply", file).stdout == f"published the first map of cluster {cluster}, version 1\n"
    assert "nothing changes: version 1" in shell("map", "apply", file).stdout

    more = changed(file, "reference: [countries]", "reference: [countries, towns]")
    assert shell("map", "diff", more, expect=3).stdout == "keyspace orders: reference table towns added\n"
    assert shell("map", "apply", more).stdout == (
        f"keyspace orders: reference table towns added\npublished version 2 of the map of cluster {cluster}\n"
    )
    assert shell("map", "diff", more).stdout == "no difference\n"
    assert shell.json("map", "diff", "--from", "2", "--to", "1", expect=3) == {
        "from": 2,
        "to": 1,
        "changes": [{"effect": "removes", "change": "keyspace orders: reference table towns removed"}],
    }
    versions = shell.json("map", "history")["versions"]
    assert [version["version"] for version in versions] == [2, 1]
    assert versions[0]["changes"] == ["keyspace orders: reference table towns added"]
    lines = shell("map", "history").stdout.splitlines()
    assert lines[0].split() == ["VERSION", "PUBLISHED", "(UTC)", "BY", "CHANGES"]
    assert lines[2].endswith("the first map")
    assert [version["version"] for version in shell.json("map", "history", "-n", "1")["versions"]] == [2]


def test_what_show_prints_as_yaml_can_be_applied(shell: Shell, file: Path, published: ShardMap) -> None:
    text = shell("map", "show", "--yaml").stdout
    assert ShardMap.parse(text) == published
    edited = file.with_name("edited.yaml")
    edited.write_text(text.replace("invoices", "payments"), encoding="utf-8")
    shell("map", "apply", edited, "--yes")
    # the same file again is made from a version that is past
    assert "was made from version 1, but version 2 is published" in shell.fails("map", "apply", edited, code=4)
    assert shell.json("map", "show", "--version", "1")["map"]["keyspaces"]["billing"]["tables"] == ["invoices"]


PLACEMENT = "KEYSPACE  SHARD  HOLDS         BUCKETS  VALUES"


def test_show_is_readable(shell: Shell, published: ShardMap, cluster: str) -> None:
    text = shell("map", "show").stdout
    assert text.startswith(f"cluster {cluster}, map version 1\n")
    assert "orders    hash               16  users by id, orders by user_id  countries\n" in text
    assert "billing   whole tables        -  invoices" in text
    # the map's own notation: a count alone reads like the number of a bucket
    placement = [line.split(maxsplit=4) for line in text.split("\n")[text.split("\n").index(PLACEMENT) + 1 :]][:6]
    assert placement[:2] == [["orders", "a", "0-7", "8", "-"], ["orders", "b", "8-15", "8", "-"]]
    assert placement[2] == ["stores", "a", "seoul", "1", "seoul: 서울"]
    assert "days      a      old, new            2  old: below 2024-01-01; new: from 2024-01-01\n" in text
    assert "billing   b      whole tables        -  -\n" in text
    assert "a      master  mysql://127.0.0.1:1/a" in text


def test_show_names_a_normalization(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(
        """
format: 1
cluster: shop
version: 1
keyspaces: {k: {partition: {by: hash, buckets: 4, normalize: lower}, tables: {users: name}, placement: {a: 0-3}}}
shards: {a: {master: "mysql://h/a"}}
""",
        encoding="utf-8",
    )
    assert "k         hash, normalize: lower        4  users by name" in shell("map", "show", "--map", file).stdout


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{a: 0-7, b: 8-15}", "{a: 0-6, b: 7-15}", "keyspace orders: 1 bucket a -> b: 7"),
        ("buckets: 16", "buckets: 16, exceptions: {2: hot}", "the partition changes"),
        ("orders: user_id", "orders: id", "table orders: keyed by id, was user_id"),
        ("placement: b}", "placement: a}", "keyspace billing: 1 bucket b -> a: all"),
    ],
)
def test_rows_are_not_lost_sight_of(
    shell: Shell, file: Path, published: ShardMap, old: str, new: str, said: str
) -> None:
    moved = changed(file, old, new)
    if "hot" in new:
        moved = changed(
            moved, "{a: 0-7, b: 8-15}", "{a: 0-7, b: '8-15, hot'}" if 2 in _on_a() else "{a: '0-7, hot', b: 8-15}"
        )
    error = shell.fails("map", "apply", moved, "--yes", code=4)
    assert said in error
    assert "shardkit rebalance plan" in error
    assert shell.json("map", "show")["version"] == 1
    # by force, and only when asked
    assert "there is no terminal to ask on" in shell.fails("map", "apply", moved, "--force-placement", code=4)
    assert shell.json("map", "show")["version"] == 1
    shell("map", "apply", moved, "--force-placement", "--yes")
    assert shell.json("map", "show")["version"] == 2


def _on_a() -> set[int]:
    """The keys that hash to a shard of the first half."""
    layout = ShardMap.parse(MAP.format(cluster="c"))
    return {key for key in range(50) if layout.locate("users", [key]).shard == "a"}


def test_taking_something_away_is_asked_for(shell: Shell, file: Path, published: ShardMap) -> None:
    fewer = changed(file, "reference: [countries]", "reference: []")
    result = shell("map", "apply", fewer, expect=4)
    assert "  keyspace orders: reference table countries removed\n" in result.stderr
    assert "give --yes" in result.stderr
    shell("map", "apply", fewer, "--yes")


def test_a_dry_run_writes_nothing(shell: Shell, file: Path, published: ShardMap) -> None:
    moved = changed(file, "{a: 0-7, b: 8-15}", "{a: 0-6, b: 7-15}")
    assert shell("map", "apply", moved, "--dry-run").stdout == "keyspace orders: 1 bucket a -> b: 7\n"
    assert shell.json("map", "show")["version"] == 1


def test_jobs_at_work_stay_in_the_map(shell: Shell, file: Path, published: ShardMap) -> None:
    store = open_store(shell.source)
    move = Move("7", "orders", (1,), "a", "b")
    store.publish(published.with_moves([move]), expected_version=1)
    shell("map", "apply", changed(file, "[countries]", "[countries, towns]"))
    assert store.load().moves == (move,)
    assert "moving" in shell("map", "show").stdout
    assert "being moved from a to b by job 7" in shell("where", "users", f"id={_key_in(published, 1)}").stdout
    store.close()


def _key_in(layout: ShardMap, bucket: int) -> int:
    return next(key for key in itertools.count() if layout.locate("users", [key]).bucket == bucket)


def test_the_file_store_is_published_to_alike(shell: Shell, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "published.yaml"
    shell("map", "apply", file, "--map", target)
    assert shell.json("map", "show", "--map", f"file:{target}")["version"] == 1
    assert "is the published map itself" in shell.fails("map", "apply", target, "--map", target, code=4)


def test_two_operators_do_not_overwrite_each_other(shell: Shell, file: Path, published: ShardMap) -> None:
    first = changed(file, "[countries]", "[countries, towns]")
    text = shell("map", "show", "--yaml").stdout
    second = file.with_name("second.yaml")
    second.write_text(text.replace("- countries", "- countries\n    - rivers"), encoding="utf-8")
    shell("map", "apply", first)
    assert "nothing was written" in shell.fails("map", "apply", second, code=4)
    assert "towns" in shell("map", "show").stdout


def test_comparing_needs_something_to_compare(shell: Shell, file: Path, published: ShardMap) -> None:
    assert "say what to compare" in shell.fails("map", "diff", code=2)
    assert "not both" in shell.fails("map", "diff", file, "--to", "1", code=2)
    assert "has no version 9" in shell.fails("map", "diff", "--from", "9", code=4)


# --- where


@pytest.mark.parametrize(
    ("words", "shard", "bucket", "kind"),
    [
        (["users", "id=42"], None, None, "int"),
        (["users", "id:str=42"], None, None, "str"),
        (["users", 'id="42"'], None, None, "str"),
        (["users", "id=서울"], None, None, "str"),
        (["users", "id:null="], "a", 0, "null"),
        (["users", "id=550e8400-e29b-41d4-a716-446655440000"], None, None, "uuid"),
        (["users", "id=1.50"], None, None, "decimal"),
        (["users", "id=2024-01-31 12:00:00"], None, None, "datetime"),
        (["stores", "region=서울"], "a", "seoul", "str"),
        (["visits", "day=2024-06-01"], "a", "new", "date"),
        (["visits", "day:null="], "a", "old", "null"),
    ],
)
def test_where_a_key_lives(
    shell: Shell, published: ShardMap, words: list[str], shard: str | None, bucket: object, kind: str
) -> None:
    answer = shell.json("where", *words)
    (key,) = answer["key"].values()
    assert key["type"] == kind
    assert key["assumed"] is (":" not in words[1].partition("=")[0] and '"' not in words[1])
    if shard is not None:
        assert (answer["shard"], answer["bucket"]) == (shard, bucket)
    assert answer["shard"] in {"a", "b"}
    assert answer["master"] == f"mysql://127.0.0.1:1/{answer['shard']}"


def test_where_says_the_same_as_the_map(shell: Shell, published: ShardMap) -> None:
    for key in (0, 7, 42):
        answer = shell.json("where", "orders", f"user_id={key}")
        placement = published.locate("orders", [key])
        assert (answer["keyspace"], answer["bucket"], answer["shard"]) == ("orders", placement.bucket, placement.shard)
    result = shell("where", "orders", "user_id=42")
    assert result.stdout.startswith(f"orders user_id=42: shard {placement.shard}\n")
    assert result.stderr == "user_id was taken for an integer; user_id:TYPE= says otherwise\n"


def test_where_other_tables_are(shell: Shell, published: ShardMap) -> None:
    assert shell("where", "invoices").stdout.startswith("invoices: shard b\n")
    assert "it stands in full on a, b" in shell("where", "countries").stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["user", "id=1"], 4, "does not name the table 'user'\nfix: did you mean 'users'? add it to a keyspace"),
        (["users"], 2, "users is sharded by id, and no key was given: give id=..."),
        (["users", "user_id=1"], 2, "users is sharded by id, not by user_id: give id=..."),
        (["users", "id=1", "id=2"], 2, "not by id, id"),
        (["users", "id"], 2, "'id' is not a key: write COLUMN=VALUE"),
        (["users", "id:float=1"], 2, "'float' is not a type of key: write int, str, uuid"),
        (["users", "id:int=x"], 2, "'x' is not an integer"),
        (["visits", "day=yesterday"], 2, "'yesterday' is not a date"),
        (["stores", "region=부산"], 1, "no bucket of keyspace 'stores' takes the key '부산'"),
        (["invoices", "id=1"], 2, "invoices has no shard key"),
    ],
)
def test_where_nothing_is(shell: Shell, published: ShardMap, words: list[str], code: int, said: str) -> None:
    assert said in shell.fails("where", *words, code=code)


# --- bad input


def test_a_faulty_map_is_refused_with_lines_and_nothing_is_written(
    shell: Shell, file: Path, published: ShardMap
) -> None:
    gap = changed(file, "{a: 0-7, b: 8-15}", "{a: 0-6, b: 8-15}")
    twice = changed(file, "{a: 0-7, b: 8-15}", "{a: 0-8, b: 8-15}")
    for words in (["map", "validate", twice], ["map", "apply", twice], ["map", "diff", twice]):
        error = shell.fails(*words, code=4)
        assert "line 8: keyspaces.orders.placement.b: bucket 8 is placed on a already: place every bucket once" in error
    gap.write_text(file.read_text(encoding="utf-8").replace("0-7", "0-6"), encoding="utf-8")
    assert "line 8: keyspaces.orders.placement: bucket 7 is on no shard" in shell.fails("map", "validate", gap, code=4)
    assert shell.json("map", "show")["version"] == 1


def test_a_file_that_is_not_there(shell: Shell) -> None:
    assert "cannot be read: No such file" in shell.fails("map", "validate", "none.yaml", code=4)
    assert "there is no shard map at" in shell.fails("map", "show", "--map", "none.yaml", code=4)


def test_an_unreachable_zookeeper(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"zookeeper://127.0.0.1:{free_port()}/shop"
    opened = open_store
    monkeypatch.setattr("shardkit.mapstore.open_store", lambda where, **_: opened(where, timeout=1))
    for words in (["map", "show"], ["status"]):
        error = shell.fails(*words, "--map", source, code=4)
        assert "no ZooKeeper server of 127.0.0.1" in error
        assert "fix: check that ZooKeeper runs" in error


def test_no_map_is_named(shell: Shell) -> None:
    said = shell.fails("map", "show", code=2, SHARDKIT_MAP="")
    assert "Missing option '--map' (env var: 'SHARDKIT_MAP')" in said
    assert "fix: give --map file:shardmap.yaml or --map zookeeper://zk1:2181/shop, or export SHARDKIT_MAP" in said
    assert "is not a map source" in shell.fails("map", "show", "--map", "shop", code=4)


def test_the_panel_of_an_error_on_a_terminal(tmp_path: Path) -> None:
    """A frame, 80 columns, no more than a screen, no traceback; no colours under NO_COLOR."""
    bad = tmp_path / "bad.yaml"
    bad.write_text(MAP.format(cluster="c").replace("0-7", "0-3") + "nonsense: 1\n", encoding="utf-8")
    for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        screen = _on_a_terminal(["map", "validate", str(bad)], extra)
        assert ("\x1b[3" in screen) is coloured
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).splitlines()
        assert lines[0].startswith("╭─ error ─")
        assert len(lines) < 24
        assert max(map(len, lines)) <= 80
        assert any("nonsense: is not a field" in line for line in lines)
        assert any("fix: mend what is named" in line for line in lines)


def _on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    settings = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **environment}
    settings.pop("NO_COLOR", None) if "NO_COLOR" not in environment else None
    with subprocess.Popen([sys.executable, "-m", "shardkit", *words], stdout=theirs, stderr=theirs, env=settings):
        os.close(theirs)
        said = b""
        while piece := _read(ours):
            said += piece
    os.close(ours)
    return said.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


# --- adopting a database, and looking at a cluster


SHOP = [
    "CREATE TABLE users (id BIGINT AUTO_INCREMENT PRIMARY KEY, email VARCHAR(100) NOT NULL UNIQUE)",
    "CREATE TABLE orders (id BIGINT PRIMARY KEY, user_id BIGINT, FOREIGN KEY (user_id) REFERENCES users(id))",
    "CREATE TABLE countries (code CHAR(2) PRIMARY KEY)",
    "CREATE TABLE shardkit_position (hop INT PRIMARY KEY)",
    "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY)",
]


@pytest.fixture
def shop_url(database_server: LocalDatabaseServer, fresh_database: str) -> str:
    for statement in SHOP:
        database_server.execute(statement, database=fresh_database)
    return str(database_server.endpoint(fresh_database))


def test_a_database_becomes_the_first_shard(shell: Shell, shop_url: str, tmp_path: Path, fresh_database: str) -> None:
    file = tmp_path / "map.yaml"
    result = shell("map", "init", "--from", shop_url, "-o", file)
    assert "users (email) is unique on each shard only" in result.stderr
    assert f"wrote {file}" in result.stdout
    assert "is good" in shell("map", "validate", file).stdout
    proposed = ShardMap.load(file)
    assert proposed.cluster == fresh_database
    assert proposed.table("orders").key == ("user_id",)
    assert proposed.table("users").key == ("id",)
    assert proposed.table("countries").kind == "reference"
    assert set(proposed.tables) == {"users", "orders", "countries"}
    assert proposed.keyspace("users").generated_ids
    assert str(proposed.shard(f"{fresh_database}-0").master) == shop_url

    # it can be published and asked at once
    source = tmp_path / "published.yaml"
    shell("map", "apply", file, "--map", source)
    assert shell.json("where", "orders", "user_id=7", "--map", source)["shard"] == f"{fresh_database}-0"
    assert "exists" in shell.fails("map", "init", "--from", shop_url, "-o", file, code=4)
    shell("map", "init", "--from", shop_url, "-o", file, "--force", "--cluster", "other")
    assert ShardMap.load(file).cluster == "other"


def test_without_a_file_the_proposal_is_printed(shell: Shell, shop_url: str) -> None:
    text = shell("map", "init", "--from", shop_url).stdout
    assert "# foreign key to users.id" in text
    assert ShardMap.parse(text).table("orders").key == ("user_id",)
    assert shell.json("map", "init", "--from", shop_url, "--key", "orders.id")["map"]["keyspaces"]["orders"][
        "tables"
    ] == {"orders": "id"}


def test_an_sqlite_file_is_adopted_too(shell: Shell, tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shop.db")
    with engine.begin() as connection:
        for statement in SHOP[:3]:
            connection.exec_driver_sql(statement.replace("BIGINT AUTO_INCREMENT", "INTEGER"))
    engine.dispose()
    proposed = ShardMap.parse(shell("map", "init", "--from", f"sqlite:///{tmp_path}/shop.db").stdout)
    assert proposed.table("orders").key == ("user_id",)
    assert "there is no file" in shell.fails("map", "init", "--from", f"sqlite:///{tmp_path}/none.db", code=4)
    assert not (tmp_path / "none.db").exists()


@pytest.fixture
def guarded(database_server: LocalDatabaseServer) -> Iterator[str]:
    database_server.create_user("clerk", "right-password")
    yield "clerk"
    database_server.execute("DROP USER 'clerk'@'%'")


def test_a_database_that_refuses(
    shell: Shell, database_server: LocalDatabaseServer, fresh_database: str, guarded: str
) -> None:
    address = f"127.0.0.1:{database_server.port}"
    for url, said in (
        (f"mysql://{guarded}:wrong-password@{address}/{fresh_database}", "the server refused the log-on"),
        (f"mysql://root@{address}/no_such_database", "the database does not exist"),
        (f"mysql://root@127.0.0.1:{free_port()}/shop", "cannot be reached"),
        (f"mysql://root@{address}/{fresh_database}", "has no tables"),
        ("postgresql://me:wrong-password@h/shop", "is not the URL of a database"),
        ("mysql://me:wrong-password@h", "is not the URL of a database"),
    ):
        error = shell.fails("map", "init", "--from", url, code=4)
        assert said in error
        assert "fix: " in error
        assert "wrong-password" not in error
    shell(
        "map",
        "init",
        "--from",
        f"mysql://{address}/{fresh_database}",
        expect=4,
        SHARDKIT_USER="clerk",
        SHARDKIT_PASSWORD="x",
    )


def test_a_map_is_held_against_its_databases(
    shell: Shell, shop_url: str, tmp_path: Path, database_server: LocalDatabaseServer, fresh_database: str
) -> None:
    database_server.execute(
        "CREATE TABLE codes (code VARCHAR(10) COLLATE utf8mb4_general_ci PRIMARY KEY)", database=fresh_database
    )
    file = tmp_path / "map.yaml"
    file.write_text(
        f"""
format: 1
cluster: shop
keyspaces:
  one:
    partition: {{by: hash, exceptions: {{vip: own}}}}
    tables: {{users: id, orders: owner_id, gone: id}}
    placement: {{s: '0-4095, own'}}
  two: {{partition: {{by: hash}}, tables: {{codes: code}}, placement: {{s: 0-4095}}}}
shards: {{s: {{master: '{shop_url}'}}}}
""",
        encoding="utf-8",
    )
    findings = shell.json("map", "validate", file, "--connect", expect=3)["findings"]
    for part in (
        "s: the table orders has no key column owner_id",
        "s: there is no table gone",
        "s: codes.code: utf8mb4_general_ci takes different texts for the same",
        "s: keyspace one: 'vip' is not a value that the key column can have (int): users.id is integer",
    ):
        assert any(part in finding for finding in findings), part


def test_what_is_unique_or_refers_over_shards_is_found(
    shell: Shell, shop_url: str, fresh_database: str, database_server: LocalDatabaseServer, tmp_path: Path
) -> None:
    person = "person_id BIGINT NOT NULL, FOREIGN KEY (person_id) REFERENCES people (id)"
    for table in (
        "people (id BIGINT PRIMARY KEY, email VARCHAR(50) UNIQUE)",
        f"posts (id BIGINT AUTO_INCREMENT PRIMARY KEY, {person})",
        f"bands (id BIGINT PRIMARY KEY, {person})",
    ):
        database_server.execute(f"CREATE TABLE {table}", database=fresh_database)
    document: dict[str, Any] = {
        "format": 1,
        "cluster": "social",
        "keyspaces": {
            "people": {
                "partition": {"by": "hash"},
                "tables": {"people": "id", "posts": "person_id"},
                "placement": {"s": "0-4095"},
            },
            "bands": {"tables": ["bands"], "placement": "s"},
        },
        "shards": {"s": {"master": shop_url}},
    }
    file = tmp_path / "map.yaml"

    def findings() -> list[str]:
        file.write_text(ShardMap.parse(document).dump(), encoding="utf-8")
        return list(shell.json("map", "validate", file, "--connect", expect=3)["findings"])

    found = findings()
    for part in (
        "s: people (email) is unique on each shard only: the index does not hold id",
        "s: posts.id is AUTO_INCREMENT: two shards give the same number; set 'ids: generated' on its",
        "s: bands (person_id) points at people, which may live elsewhere",
    ):
        assert any(part in finding for finding in found), (part, found)
    assert len(found) == 3
    document["keyspaces"]["people"]["local"] = ["people", "posts"]
    assert len(findings()) == 1
    document["keyspaces"]["people"]["local"] = ["bands"]
    file.write_text(json.dumps(document), encoding="utf-8")
    assert "'bands' is no table of this keyspace" in shell.fails("map", "validate", file, code=4)


def test_the_cluster_at_a_glance(
    shell: Shell, shop_url: str, tmp_path: Path, zookeeper: LocalZooKeeper, cluster: str, until: Callable[..., None]
) -> None:
    away = f"mysql://127.0.0.1:{free_port()}/shop"
    layout = ShardMap.parse(
        {
            "format": 1,
            "cluster": cluster,
            "keyspaces": {"k": {"partition": {"by": "hash"}, "tables": {"users": "id"}, "placement": {"s": "0-4095"}}},
            "shards": {"s": {"master": shop_url, "replicas": [{"url": away, "weight": 5}]}},
        }
    )
    store = open_store(shell.source)
    store.publish(layout, expected_version=0)
    assert re.search(rf"s +replica +{re.escape(away)} +5\n", shell("map", "show").stdout)
    store.announce(1)
    until(lambda: len(store.clients()) == 1)
    status = shell.json("status", expect=1)
    assert (status["cluster"], status["map_version"]) == (cluster, 1)
    assert [client["version"] for client in status["clients"]] == [1]
    master, replica = status["databases"]
    assert (master["role"], master["reachable"], master["writable"]) == ("master", True, True)
    assert (replica["role"], replica["reachable"]) == ("replica", False)
    assert (master["weight"], replica["weight"]) == (None, 5)
    assert "cannot be reached" in replica["error"]

    result = shell("status", expect=1)
    assert "1 running process, all on this map" in result.stdout
    assert re.search(rf"s +master +{re.escape(Endpoint.parse(shop_url).address)} +up ", result.stdout)
    assert re.search(rf"s +replica +{re.escape(Endpoint.parse(away).address)} +unreachable +- +- +5\n", result.stdout)
    assert "no user is set" in _without_user(shell)
    store.close()


def _without_user(shell: Shell) -> str:
    environment = {name: value for name, value in shell.environment.items() if name != "SHARDKIT_USER"}
    result = CliRunner().invoke(cli, ["status"], env={**environment, "SHARDKIT_USER": None})
    assert result.exit_code == 4
    return result.stderr


@pytest.fixture
def until() -> Callable[..., None]:
    import time

    def wait(condition: Callable[[], object], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.01)

    return wait
