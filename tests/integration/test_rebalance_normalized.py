"""Normalized keys on their way to another shard, and what has to be mended before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from sqlalchemy import insert, select

import shardkit
from shardkit.adoption.filing import filer
from shardkit.adoption.fit import misfits
from shardkit.errors import MissingKey, PreconditionFailed, RebalanceError
from shardkit.mapstore import MapStore, open_store
from shardkit.rebalance import Job, MoveBuckets, Progress, State, apply_plan, census, plan_move, preflight
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.conftest import driver

METADATA = sa.MetaData()
codes = sa.Table(
    "codes",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("code", sa.String(20), nullable=False),
)
ROWS = [(n, f"{'Code' if n % 2 else 'CODE'} {n // 2}{' ' * (n % 3)}") for n in range(200)]
ROWS += [(n, f"서울 {'a' if n % 2 else 'A'}{n // 2}") for n in range(200, 240)]
HASH = {"by": "hash", "buckets": 16, "normalize": "lower"}


@dataclass
class World:
    """Two databases, and a map over one or both of them."""

    server: LocalDatabaseServer
    names: dict[str, str]

    def map(self, partition: dict[str, Any], placement: dict[str, Any]) -> ShardMap:
        return ShardMap.parse(
            {
                "format": 1,
                "cluster": "normalized",
                "keyspaces": {"codes": {"partition": partition, "tables": {"codes": "code"}, "placement": placement}},
                "shards": {shard: {"master": self.server.endpoint(name).url} for shard, name in self.names.items()},
            }
        )

    def store(self, folder: Path) -> MapStore:
        """With all buckets on the first shard."""
        store = open_store(f"file:{folder}/map.yaml")
        store.publish(self.map(HASH, {"a": "0-15", "b": []}), expected_version=0)
        return store

    def execute(self, shard: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        connection = self.server.connect(self.names[shard], autocommit=True)
        with closing(connection), connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall())

    def fill(self, shard: str, rows: list[tuple[int, str]]) -> None:
        for row in rows:
            self.execute(shard, "INSERT INTO codes VALUES (%s, %s)", *row)

    def cluster(self, shard_map: Any) -> shardkit.Cluster:
        return shardkit.create_cluster(shard_map, credentials=self.server.credentials, driver=driver())


@pytest.fixture
def world(database_server: LocalDatabaseServer, fresh_database: str) -> Iterator[World]:
    names = {"a": fresh_database, "b": f"{fresh_database}_b"}
    database_server.execute(f"CREATE DATABASE {names['b']}")
    made = World(database_server, names)
    with made.cluster(made.map(HASH, {"a": "0-7", "b": "8-15"})) as cluster:
        cluster.create_all(METADATA)
    yield made
    database_server.execute(f"DROP DATABASE {names['b']}")


class At:
    """Does something when a job enters a state."""

    def __init__(self, actions: dict[State, Callable[[], object]]) -> None:
        self._actions = actions

    def entered(self, job: Job) -> None:
        if job.state in self._actions:
            self._actions[job.state]()

    def progressed(self, job: Job, progress: Progress) -> None: ...

    def noted(self, job: Job, text: str) -> None: ...


def test_rows_are_where_they_are_looked_for_after_a_move(world: World, tmp_path: Path) -> None:
    store = world.store(tmp_path)
    world.fill("a", ROWS)
    credentials = world.server.credentials
    said: list[str] = []

    def write() -> None:
        for statement in (
            "INSERT INTO codes VALUES (999, 'é')",
            "UPDATE codes SET code = 'ç' WHERE id = 0",
            "INSERT INTO codes VALUES (1000, 'New')",
        ):
            try:
                world.execute("a", statement)
            except pymysql.OperationalError as error:
                said.append(error.args[1])

    def read() -> None:
        """While rows are on both shards, each counts those of its own buckets."""
        doubled = sum(len(world.execute(shard, "SELECT id FROM codes")) for shard in ("a", "b"))
        with world.cluster(store.load()) as cluster, shardkit.sessionmaker(cluster)() as session:
            seen.append((doubled, session.execute(select(sa.func.count()).select_from(codes)).scalar_one()))

    seen: list[tuple[int, int]] = []
    shard_map = store.load()
    counted = census.count(shard_map, shard_map.keyspace("codes"), credentials)
    assert sum(counted.rows.values()) == len(ROWS)
    plan = plan_move(store, MoveBuckets(tuple(range(8, 16)), "b"), keyspace="codes", credentials=credentials)
    apply_plan(store, plan, credentials=credentials, observer=At({State.FREEZING: write, State.VERIFYING: read}))
    refused = "shardkit refuses this key: 'normalize' of keyspace codes does not know a character of it"
    assert said == [refused, refused]
    ((doubled, once),) = seen
    assert doubled > once == len(ROWS) + 1
    after = store.load()
    rows = {shard: world.execute(shard, "SELECT id, code FROM codes") for shard in ("a", "b")}
    assert sorted([*rows["a"], *rows["b"]]) == sorted([*ROWS, (1000, "New")])
    assert len(rows["b"]) > 50
    for shard, some in rows.items():
        assert {after.locate("codes", [code]).shard for _, code in some} == {shard}
    with world.cluster(after) as cluster, shardkit.sessionmaker(cluster)() as session:
        for number, code in ROWS:
            for spelling in (code.upper(), code.lower()):
                found = session.execute(select(codes.c.id).where(codes.c.code == spelling)).scalars().all()
                assert number in found


def test_rows_outside_the_alphabet_stop_a_move(world: World, tmp_path: Path) -> None:
    store = world.store(tmp_path)
    world.fill("a", [(1, "e"), (2, "é")])
    credentials = world.server.credentials
    shard_map = store.load()
    with pytest.raises(PreconditionFailed, match="1 rows of codes"):
        census.count(shard_map, shard_map.keyspace("codes"), credentials)
    world.execute("a", "DELETE FROM codes WHERE id = 2")
    plan = plan_move(store, MoveBuckets(tuple(range(8, 16)), "b"), keyspace="codes", credentials=credentials)
    world.fill("a", [(2, "é")])
    with pytest.raises(PreconditionFailed, match="1 rows of codes have keys with characters that"):
        apply_plan(store, plan, credentials=credentials)
    assert store.load().version == 1


def test_rows_outside_the_alphabet_that_come_before_the_fence_stop_it_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = world.store(tmp_path)
    world.fill("a", [(1, "e")])
    plan = plan_move(
        store, MoveBuckets(tuple(range(8, 16)), "b"), keyspace="codes", credentials=world.server.credentials
    )
    checked = preflight.check

    def check(*args: Any, **options: Any) -> Any:
        found = checked(*args, **options)
        world.execute("a", "INSERT IGNORE INTO codes VALUES (2, 'é')")
        return found

    monkeypatch.setattr(preflight, "check", check)
    with pytest.raises(RebalanceError, match="1 rows of codes have keys with characters that"):
        apply_plan(store, plan, credentials=world.server.credentials)
    assert store.load().moves == ()


def test_validation_counts_what_is_never_found(world: World) -> None:
    shard_map = world.map(HASH, {"a": "0-7", "b": "8-15"})
    credentials = world.server.credentials
    assert misfits(shard_map, credentials) == []
    (hazard, *_) = misfits(world.map({"by": "hash", "buckets": 16}, {"a": "0-7", "b": "8-15"}), credentials)
    assert "a binary collation without padding" in hazard
    assert "or 'normalize: lower' in the map" in hazard
    world.fill("b", [(1, "é"), (2, "Kim\t"), (3, "fine")])
    (found,) = misfits(shard_map, credentials)
    assert found.startswith("b: 2 rows of codes have keys with characters that 'normalize: lower' does not know")
    world.execute("b", "DELETE FROM codes")
    world.execute("a", "ALTER TABLE codes MODIFY code VARCHAR(20) COLLATE utf8mb4_lithuanian_ci NOT NULL")
    (found,) = misfits(shard_map, credentials)
    assert "a: codes.code: utf8mb4_lithuanian_ci is not known to take for the same only what" in found
    world.execute("a", "ALTER TABLE codes MODIFY code INT NOT NULL")
    (found,) = misfits(shard_map, credentials)
    assert found == "a: keyspace codes: 'normalize' is for strings, and codes has none in its key"


def test_a_directory_is_filled_with_one_entry_for_all_spellings(world: World) -> None:
    partition = {"by": "directory", "buckets": ["x", "y"], "home": "a", "normalize": "lower"}
    shard_map = world.map(partition, {"a": ["x"], "b": ["y"]})
    world.fill("b", [(1, "Kim"), (2, "KIM "), (3, "kim"), (4, "서울"), (5, "é")])
    with filer(shard_map, shard_map.keyspace("codes"), world.server.credentials) as made:
        found = made.look()
        assert (found.keys, found.missing) == (3, 2)
        assert len(found.astray) == 1
        assert "the key 'é' has rows on b, and cannot be entered: the character" in found.astray[0]
        assert made.fill(found) == 2
        assert made.look().missing == 0
    assert sorted(world.execute("a", "SELECT key_text, bucket FROM shardkit_directory")) == [
        (b"kim", "y"),
        ("서울".encode(), "y"),
    ]
    with world.cluster(shard_map) as cluster, shardkit.sessionmaker(cluster)() as session:
        assert cluster.locate("codes", code="KIM").shard == "b"
        session.execute(insert(codes).values(id=9, code="kIm"))
        session.commit()
        assert cluster.assign("codes", "LEE ", "x").shard == "a"
        assert cluster.locate("codes", code="lee").shard == "a"
        with pytest.raises(MissingKey, match="outside what"):
            cluster.locate("codes", code="é")
    assert world.execute("b", "SELECT id FROM codes WHERE id = 9") == [(9,)]
