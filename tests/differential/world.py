"""Generated schemas and rows: on one database with all rows, and over three shards under a generated shard map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from random import Random
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import registry

import shardkit
from shardkit import own_tables
from shardkit.cluster import Cluster, create_cluster
from shardkit.directory import file
from shardkit.partition import key_text
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from tests.integration.shop import KEY_COLLATION
from tests.routing_shop import memory_engine

SHARDS = ("s0", "s1", "s2")
WHOLE = "whole"
#: Collations of texts, by database. None is the database's own default for a text that is compared by its bytes.
COLLATIONS: Mapping[str, Sequence[str | None]] = {
    "sqlite": (None, None, "NOCASE", "RTRIM"),
    "mariadb": ("utf8mb4_general_ci", "utf8mb4_bin", "utf8mb4_unicode_520_ci", "utf8mb4_nopad_bin"),
    "mysql": ("utf8mb4_0900_ai_ci", "utf8mb4_general_ci", "utf8mb4_bin", "utf8mb4_0900_bin"),
}
WORDS = ("", "a", "A", "a ", "á", "b", "B", "ss", "ß", "ab", "서울", "10", "9")
NAMES = ("대구", "대전", "서울", "a", "A", "b", "")
DATES = tuple(date(1999, 12, 30 + n) if n < 2 else date(2000, n, 1) for n in range(8))
#: Values of each type; NULL is added where a column takes it.
POOLS: Mapping[str, Sequence[Any]] = {
    "integer": (-2, -1, 0, 1, 2, 3, 5, 8, 13, 21),
    "decimal": tuple(Decimal(each) for each in ("-1.50", "0.00", "0.25", "1.00", "1.10", "10.00", "99999999.99")),
    "float": (-0.5, 0.0, 0.1, 0.2, 1.5, 3e10),
    "date": DATES,
    "datetime": tuple(datetime(2000, 1, 1 + n % 3, n) for n in range(7)),  # noqa: DTZ001 - DATETIME has no zone
    "boolean": (True, False),
    "text": WORDS,
    "key text": NAMES,
}
#: How a keyspace may be partitioned: (types of the key's columns, its partition and placement).
PARTITIONS: Sequence[tuple[tuple[str, ...], Mapping[str, Any], Mapping[str, Any]]] = (
    (
        ("integer",),
        {"by": "hash", "buckets": 16},
        {"s0": "0-1, 6-7, 12-13", "s1": "2-3, 8-9, 14", "s2": "4-5, 10-11, 15"},
    ),
    (("key text",), {"by": "hash", "buckets": 16}, {"s0": "0-4", "s1": "5-9", "s2": "10-15"}),
    (("integer", "key text"), {"by": "hash", "buckets": 16}, {"s0": "0-4", "s1": "5-9", "s2": "10-15"}),
    (("date", "integer"), {"by": "hash", "buckets": 16}, {"s0": "0-4", "s1": "5-9", "s2": "10-15"}),
    (
        ("key text",),
        {"by": "list", "buckets": {"one": ["서울", "a", None], "two": ["대구", "A"], "three": ["대전", "b", ""]}},
        {"s0": ["one"], "s1": ["two"], "s2": ["three"]},
    ),
    (
        ("integer",),
        {"by": "list", "buckets": {"one": [-2, -1, 0, 1], "two": [2, 3, None], "three": [5, 8], "four": [13, 21]}},
        {"s0": ["one", "four"], "s1": ["two"], "s2": ["three"]},
    ),
    (
        ("integer",),
        {"by": "range", "buckets": {"low": [None, 1], "middle": [1, 5], "high": [5, 13], "top": [13, None]}},
        {"s0": ["low", "high"], "s1": ["middle"], "s2": ["top"]},
    ),
    (
        ("date",),
        {
            "by": "range",
            "buckets": {
                "old": [None, date(2000, 2, 1)],
                "new": [date(2000, 2, 1), date(2000, 5, 1)],
                "next": [date(2000, 5, 1), None],
            },
        },
        {"s0": ["old"], "s1": ["new"], "s2": ["next"]},
    ),
    (
        ("decimal",),
        {"by": "hash", "buckets": 9},
        {"s0": "0-2", "s1": "3-5", "s2": "6-8"},
    ),
    (
        ("integer",),
        {"by": "directory", "buckets": ["one", "two", "three", "four"], "home": "s1"},
        {"s0": ["one", "four"], "s1": ["two"], "s2": ["three"]},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One table of a world.

    :param key: the columns that it is sharded by; none for a reference or vertical table.
    :param model: the class that is mapped to it.
    """

    table: sa.Table
    key: tuple[str, ...]
    model: type[Any]


class World:
    """A schema, its rows and its shard map, drawn from a seed; the same rows once on one database, once over shards.

    Parents and children share a keyspace and key; ``others`` are in a keyspace of their own; ``codes`` is a reference
    table and ``solo`` a vertical one.
    """

    def __init__(
        self,
        seed: int,
        dialect: str,
        engines: Mapping[str, sa.Engine],
        urls: Mapping[str, str],
        **options: Any,
    ) -> None:
        self.random = Random(seed)
        self.dialect = dialect
        self.engines = engines
        self.metadata = sa.MetaData()
        self.collations = COLLATIONS[dialect]
        kinds, partition, placement = PARTITIONS[seed % len(PARTITIONS)]
        self.key = tuple(f"k{n}" for n in range(len(kinds)))
        keys = dict(zip(self.key, kinds, strict=True))
        self.pools: dict[str, Sequence[Any]] = {}
        codes = {"code": "integer"}
        self.parents = self._table("parents", keys, {**codes, **self._some(4)})
        self.children = self._table("children", keys, {"parent_id": "id", **self._some(3)})
        self.others = self._table("others", {"k": "integer"}, self._some(3))
        self.codes = self._table("codes", {}, {**codes, "title": "text"})
        self.solo = self._table("solo", {}, self._some(3))
        self.parts = (self.parents, self.children, self.others, self.codes, self.solo)
        self.map = ShardMap.parse(
            {
                "format": 1,
                "cluster": "world",
                "keyspaces": {
                    "main": {
                        "partition": partition,
                        "tables": {"parents": list(self.key), "children": list(self.key)},
                        "reference": ["codes"],
                        "placement": placement,
                    },
                    "second": {
                        "partition": {"by": "hash", "buckets": 6},
                        "tables": {"others": "k"},
                        "reference": ["codes"],
                        "placement": {"s0": "0-1", "s1": "2-3", "s2": "4-5"},
                    },
                    "alone": {"tables": ["solo"], "placement": "s1"},
                },
                "shards": {shard: {"master": urls[shard]} for shard in SHARDS},
            }
        )
        #: Key text -> bucket, of a keyspace by directory; keys without one are given it by the router.
        self.entries: dict[str, str] = {}
        self.map = self.map.with_lookup(lambda by, text: self.entries.get(text) or by.first_bucket_of(text))
        for engine in engines.values():
            self.metadata.create_all(engine)
        self.rows = {part.table.name: self._rows(part) for part in self.parts}
        self._file()
        for part in self.parts:
            self._fill(part)
        self.spellings = self._spellings()
        given = {(shard, "master"): engines[shard] for shard in SHARDS}
        self.cluster: Cluster = create_cluster(self.map, engines=given, **options)
        self.sessions = shardkit.sessionmaker(
            self.cluster, transactions="best_effort" if dialect == "sqlite" else "atomic"
        )

    def close(self) -> None:
        self.cluster.dispose()
        for engine in self.engines.values():
            self.metadata.drop_all(engine)
            engine.dispose()

    # --- schema

    def _some(self, count: int) -> dict[str, str]:
        kinds = [kind for kind in POOLS if kind != "key text"]
        return {f"c{n}": self.random.choice(kinds) for n in range(count - 1)} | {"t": "text"}

    def _table(self, name: str, keys: Mapping[str, str], columns: Mapping[str, str]) -> Part:
        table = sa.Table(
            name,
            self.metadata,
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
            *(sa.Column(column, self._type(kind, key=True)) for column, kind in keys.items()),
            *(sa.Column(column, self._type(kind)) for column, kind in columns.items()),
        )
        for column, kind in {**keys, **columns}.items():
            self.pools[f"{name}.{column}"] = range(30) if kind == "id" else POOLS[kind]
        self.pools[f"{name}.id"] = range(40)
        model = type(name.title(), (), {})
        registry().map_imperatively(model, table)
        return Part(table, tuple(keys), model)

    def _type(self, kind: str, *, key: bool = False) -> sa.types.TypeEngine[Any]:
        match kind:
            case "integer" | "id":
                return sa.Integer()
            case "decimal":
                return sa.Numeric(10, 2)
            case "float":
                return sa.Double()
            case "date":
                return sa.Date()
            case "datetime":
                return sa.DateTime()
            case "boolean":
                return sa.Boolean()
            case _:
                collation = KEY_COLLATION.get(self.dialect) if key else self.random.choice(self.collations)
                if self.dialect == "sqlite":
                    return sa.String(20, collation=collation)
                return mysql.VARCHAR(20, charset="utf8mb4", collation=collation)

    # --- rows

    def _rows(self, part: Part) -> list[dict[str, Any]]:
        count = {"parents": 26, "children": 40, "others": 20, "codes": 6, "solo": 8}[part.table.name]
        return [self._row(part, number) for number in range(count)]

    def _row(self, part: Part, number: int) -> dict[str, Any]:
        """A row with this id; NULL is as likely as any value."""
        row: dict[str, Any] = {"id": number}
        for column in part.table.c:
            if column.name != "id":
                row[column.name] = self.random.choice(
                    [*self.pools[f"{part.table.name}.{column.name}"], *self._nulls(part, column)]
                )
        if part.table.name == "codes":
            row["code"] = None if number == 0 else POOLS["integer"][number + 1]
        return row

    def _nulls(self, part: Part, column: sa.Column[Any]) -> list[None]:
        return [] if column.name in part.key and not self._takes_null(part) else [None]

    def _takes_null(self, part: Part) -> bool:
        """Whether some bucket takes a NULL key; a list that does not name it has none."""
        return (
            part.table.name == "others"
            or self.map.keyspaces["main"].partition.bucket_of((None,) * len(self.key)) is not None
        )  # type: ignore[union-attr]

    def _home(self, part: Part, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The shards that a row belongs on."""
        if part.key:
            return (self.map.locate(part.table.name, [row[column] for column in part.key]).shard,)
        return SHARDS if part is self.codes else ("s1",)

    def _file(self) -> None:
        """Give each key that has rows a bucket, other than the router would, and enter it in the directory."""
        directory = self.map.keyspaces["main"].directory
        if directory is None:
            return
        keys = {
            key_text([row[k] for k in self.key])
            for part in (self.parents, self.children)
            for row in self.rows[part.table.name]
        }
        self.entries = {str(text): self.random.choice(directory.names) for text in sorted(map(str, keys))}
        own_tables.upgrade(self.engines[directory.home])
        with self.engines[directory.home].begin() as connection:
            file(connection, {(directory, text): bucket for text, bucket in self.entries.items()})

    def _fill(self, part: Part) -> None:
        """Put a table's rows where they belong."""
        rows = self.rows[part.table.name]
        for name, engine in self.engines.items():
            own = rows if name == WHOLE else [row for row in rows if name in self._home(part, row)]
            with engine.begin() as connection:
                if own:
                    connection.execute(part.table.insert(), own)

    # --- comparing

    def _spellings(self) -> dict[str, dict[str, str]]:
        """Collation -> text -> the first of the words that the database takes as equal to it."""
        found: dict[str, dict[str, str]] = {}
        engine = self.engines[WHOLE]
        for collation in {each for each in self.collations if each}:
            with closing(engine.connect()) as connection:
                equal = {
                    (one, other)
                    for one in WORDS
                    for other in WORDS
                    if connection.scalar(_equal(self.dialect, collation), {"one": one, "other": other})
                }
            found[collation] = {one: next(other for other in WORDS if (one, other) in equal) for one in WORDS}
        return found

    def plain(self, value: Any, column_type: Any, *, any_spelling: bool) -> Any:
        """A value that compares: floats to nine digits; of equal spellings, where any may be shown, the first."""
        if isinstance(value, float) or (isinstance(value, Decimal) and self.dialect == "sqlite"):
            return float(f"{float(value):.9g}") + 0.0
        collation = getattr(column_type, "collation", None)
        if any_spelling and isinstance(value, str) and collation is not None:
            return self.spellings[collation].get(value, value)
        return value


def _equal(dialect: str, collation: str) -> sa.TextClause:
    if dialect == "sqlite":
        return sa.text(f"SELECT :one = :other COLLATE {collation}")
    return sa.text(
        f"SELECT CONVERT(:one USING utf8mb4) COLLATE {collation} = CONVERT(:other USING utf8mb4) COLLATE {collation}"
    )


def sqlite_world(seed: int) -> World:
    """A world in memory."""
    return World(
        seed, "sqlite", {name: memory_engine() for name in (*SHARDS, WHOLE)}, {s: f"sqlite:///{s}.db" for s in SHARDS}
    )


def server_world(seed: int, server: LocalDatabaseServer, flavour: str, prefix: str) -> World:
    """A world in databases of a server, which are made anew."""
    engines, urls = {}, {}
    for name in (*SHARDS, WHOLE):
        database = f"{prefix}_{name}"
        server.execute(f"DROP DATABASE IF EXISTS {database}")
        server.execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
        url = sa.make_url(server.dsn(database))
        driver = "mariadb+pymysql" if flavour == "mariadb" else "mysql+pymysql"
        engines[name] = sa.create_engine(url.set(drivername=driver), connect_args={"ssl_disabled": True})
        urls[name] = server.endpoint(database).url
    async_driver = "mariadb+asyncmy" if flavour == "mariadb" else "asyncmy"
    return World(seed, flavour, engines, urls, credentials=server.credentials, async_driver=async_driver)
