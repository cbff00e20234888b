"""Sorted reads over eight shards of 100,000 rows each: the first rows of all, and all of them in a stream.

The rival of the merge is one database that holds all 800,000 rows. Both answers are compared.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalMariaDB

SHARDS = tuple(f"merge-{number}" for number in range(8))
WHOLE = "merge-whole"
BUCKETS = 64
ROWS = 800_000
MEGABYTE = 1 << 20

Row = dict[str, Any]


class Base(DeclarativeBase):
    """The benchmark's table."""


class Reading(Base):
    """Sorted by another column than the key."""

    __tablename__ = "readings"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int] = mapped_column(index=True)
    note: Mapped[str] = mapped_column(sa.String(40))


def run() -> list[Row]:
    """The rows of the merge."""
    with LocalMariaDB(options={"innodb_buffer_pool_size": "512M"}) as server, _filled(server) as (cluster, whole):
        return [*_first_rows(cluster, whole), *_stream(cluster)]


@contextmanager
def _filled(server: LocalMariaDB) -> Iterator[tuple[Cluster, sa.Engine]]:
    for name in (*SHARDS, WHOLE):
        server.execute(f"CREATE DATABASE `{name}`")
    share = BUCKETS // len(SHARDS)
    spans = {name: (number * share, number * share + share - 1) for number, name in enumerate(SHARDS)}
    shard_map = ShardMap.parse(
        {
            "format": 1,
            "cluster": "merge",
            "keyspaces": {
                "readings": {
                    "partition": {"by": "hash", "buckets": BUCKETS},
                    "tables": {"readings": "id"},
                    "placement": {name: f"{low}-{high}" for name, (low, high) in spans.items()},
                }
            },
            "shards": {name: {"master": server.endpoint(name).url} for name in SHARDS},
        }
    )
    made = f"SELECT seq, CRC32(seq * 7) % 1000000, CONCAT('note ', seq) FROM `{WHOLE}`.numbers"
    with create_cluster(shard_map, credentials=server.credentials) as cluster:
        server.execute(f"CREATE TABLE `{WHOLE}`.numbers AS SELECT seq FROM mysql.seq_1_to_{ROWS}")
        cluster.create_all(Base.metadata)
        for name, (low, high) in spans.items():
            server.execute(
                f"INSERT INTO `{name}`.readings (id, value, note) {made} "
                f"WHERE CRC32(seq) % {BUCKETS} BETWEEN {low} AND {high}"
            )
        server.execute(f"CREATE TABLE `{WHOLE}`.readings LIKE `{SHARDS[0]}`.readings")
        server.execute(f"INSERT INTO `{WHOLE}`.readings (id, value, note) {made}")
        whole = sa.create_engine(server.dsn(WHOLE))
        yield cluster, whole
        whole.dispose()


def _first_rows(cluster: Cluster, engine: sa.Engine) -> list[Row]:
    statement = select(Reading.id, Reading.value).order_by(Reading.value, Reading.id).limit(100)
    with shardkit.sessionmaker(cluster)() as ours, Session(engine) as whole:
        assert ours.execute(statement).all() == whole.execute(statement).all()

        def seconds(session: Session) -> float:
            began = time.perf_counter()
            session.execute(statement).all()
            return time.perf_counter() - began

        times = [(seconds(ours), seconds(whole)) for _ in range(30)]
    value = median(mine / theirs for mine, theirs in times)
    return [
        {
            "name": "router ORDER BY + LIMIT 100 over 8 shards of 100,000 rows, mariadb",
            "value": round(value, 2),
            "unit": "x one database with 800,000 rows",
            "target": "-",
            "rival": f"{median(theirs for _, theirs in times) * 1000:.1f} ms",
            "ok": True,
        }
    ]


def _stream(cluster: Cluster) -> list[Row]:
    """All rows, sorted; what is remembered of them is one number."""
    statement = select(Reading.id, Reading.value, Reading.note).order_by(Reading.value, Reading.id)
    factory = shardkit.sessionmaker(cluster)
    with factory() as session:  # statements compiled, connections open
        session.execute(statement.limit(1)).all()
    before = _resident()
    peak, seen, first = before, 0, 0.0
    before_row = (-1, -1)
    began = time.perf_counter()
    with factory() as session:
        for row in session.execute(statement, execution_options={"yield_per": 1000}):
            if not seen:
                first = time.perf_counter() - began
            assert before_row < (row.value, row.id)
            before_row = (row.value, row.id)
            seen += 1
            if seen % 20_000 == 0:
                peak = max(peak, _resident())
    whole = time.perf_counter() - began
    assert seen == ROWS
    grown = (peak - before) / MEGABYTE
    return [
        {
            "name": "router sorted stream of 800,000 rows over 8 shards: memory, mariadb",
            "value": round(grown, 1),
            "unit": "MB over the baseline",
            "target": "< 50",
            "rival": "-",
            "ok": grown < 50,
        },
        {
            "name": "router sorted stream of 800,000 rows over 8 shards: first row, mariadb",
            "value": round(first / whole, 4),
            "unit": f"of the time of all ({whole:.1f} s)",
            "target": "< 0.5",
            "rival": "-",
            "ok": first / whole < 0.5,
        },
    ]


def _resident() -> int:
    """This process's resident memory, in bytes."""
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not say")
