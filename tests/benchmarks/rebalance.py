"""Moving rows between two local servers, beside ``mariadb-dump | mariadb`` of the same table in the same run.

Rows have 100 bytes of values. The job is a whole one: triggers on both shards, chunks with their cursors, both servers'
binary logs on. The dump goes into a table without triggers, by the servers' own programs.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from shardkit.errors import MissingServer
from shardkit.mapstore import FileMapStore
from shardkit.rebalance import Drain, Job, Progress, State, apply_plan, plan_move
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalMariaDB, LocalMySQL
from shardkit.testing.database import LocalDatabaseServer

ROWS = 300_000
DATABASE = "bench"
TABLE = """CREATE TABLE events (
    id BIGINT NOT NULL PRIMARY KEY, user_id BIGINT NOT NULL, happened DATETIME NOT NULL, kind VARCHAR(12) NOT NULL,
    payload VARCHAR(80) NOT NULL, amount INT NOT NULL, KEY by_user (user_id)
) CHARACTER SET utf8mb4"""
#: 8 + 8 + 5 + 5 + 70 + 4 bytes.
FILLING = """INSERT INTO events SELECT {first} + n, MOD(n * 7919, 100003), '2024-01-01' + INTERVAL n SECOND, 'click',
    RPAD(CONV(n * 2654435761, 10, 36), 70, 'x'), n FROM (SELECT @n := @n + 1 AS n FROM information_schema.columns a,
    information_schema.columns b, information_schema.columns c, (SELECT @n := 0) zero LIMIT {count}) numbers"""
OPTIONS = {"innodb_buffer_pool_size": "256M", "innodb_flush_log_at_trx_commit": 1, "sync_binlog": 1}
#: Rows copied in a second, and the dump's time against ours.
TARGET_ROWS, TARGET_RATIO = 50_000, 1.0


class Stages:
    """When each state began."""

    def __init__(self) -> None:
        self.at: dict[State, float] = {}

    def entered(self, job: Job) -> None:
        self.at[job.state] = time.monotonic()

    def progressed(self, job: Job, progress: Progress) -> None: ...

    def noted(self, job: Job, text: str) -> None: ...

    def seconds(self, state: State, following: State) -> float:
        """What a state took."""
        return self.at[following] - self.at[state]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows a second of each stage; the copy against a dump piped into a client."""
    count = 20_000 if quick else ROWS
    rows = list(_moved(LocalMariaDB, "mariadb", count))
    if not quick:
        try:
            rows += _moved(LocalMySQL, "mysql", count)
        except MissingServer as error:
            rows.append(_row("rebalance mysql, not measured", error.message, ""))
    return rows


def _moved(kind: type[LocalMariaDB | LocalMySQL], flavour: str, count: int) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        source, target = (stack.enter_context(kind(options=OPTIONS)) for _ in range(2))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for server in (source, target):
            server.execute(f"CREATE DATABASE {DATABASE}")
            server.execute(TABLE, database=DATABASE)
        with closing(source.connect(DATABASE, autocommit=True)) as connection, connection.cursor() as cursor:
            for first in range(0, count, 50_000):
                cursor.execute(FILLING.format(first=first, count=min(50_000, count - first)))
        dumped = _dump_seconds(source, target) if flavour == "mariadb" else None
        stages = _move(source, target, directory, count)
    copying = stages.seconds(State.COPYING, State.VERIFYING)
    copied = count / copying
    yield _row(f"rebalance {flavour} copy", copied, "rows/s", target=TARGET_ROWS, ok=copied >= TARGET_ROWS)
    if dumped is not None:
        ratio = dumped / copying
        rival = f"mariadb-dump | mariadb: {count / dumped:,.0f} rows/s"
        yield _row(
            f"rebalance {flavour} copy against a dump", ratio, "x", target=TARGET_RATIO, rival=rival, ok=ratio >= 1
        )
    verifying = stages.seconds(State.VERIFYING, State.ACTIVATED)
    yield _row(f"rebalance {flavour} verify", count / verifying, "rows/s")
    yield _row(f"rebalance {flavour} clean up", count / stages.seconds(State.CLEANING, State.COMPLETED), "rows/s")
    closed = stages.at[State.CLEANING] - stages.at[State.FREEZING]
    yield _row(f"rebalance {flavour} closed without copy and compare", closed - copying - verifying, "s")


def _move(source: LocalDatabaseServer, target: LocalDatabaseServer, directory: Path, count: int) -> Stages:
    with closing(FileMapStore(directory / "map.yaml")) as store:
        store.publish(
            ShardMap.parse(
                {
                    "format": 1,
                    "cluster": "bench",
                    "keyspaces": {
                        "events": {
                            "partition": {"by": "hash", "buckets": 4096},
                            "tables": {"events": "user_id"},
                            "placement": {"a": "0-4095"},
                        }
                    },
                    "shards": {
                        "a": {"master": source.endpoint(DATABASE).url},
                        "b": {"master": target.endpoint(DATABASE).url},
                    },
                }
            ),
            expected_version=0,
        )
        stages = Stages()
        plan = plan_move(store, Drain("a"), credentials=source.credentials)
        apply_plan(store, plan, observer=stages, credentials=source.credentials)
    arrived = target.execute("SELECT COUNT(*) FROM events", database=DATABASE)[0][0]
    if arrived != count or plan.rows != count:
        raise AssertionError(f"{arrived:,} of {count:,} rows arrived")
    return stages


def _dump_seconds(source: LocalDatabaseServer, target: LocalDatabaseServer) -> float | None:
    """A dump of the table piped into a client, and the table emptied again; None where they are not installed."""
    dump, client = (shutil.which(name) for name in ("mariadb-dump", "mariadb"))
    if dump is None or client is None:
        return None
    account = ["--no-defaults", "--protocol=tcp", "-uroot"]
    started = time.monotonic()
    with subprocess.Popen(
        [dump, *account, f"-h{source.host}", f"-P{source.port}", "--single-transaction", "--no-create-info", DATABASE],
        stdout=subprocess.PIPE,
    ) as producer:
        subprocess.run(
            [client, *account, f"-h{target.host}", f"-P{target.port}", DATABASE], stdin=producer.stdout, check=True
        )
    took = time.monotonic() - started
    if producer.returncode:
        raise AssertionError(f"mariadb-dump ended with {producer.returncode}")
    target.execute("TRUNCATE TABLE events", database=DATABASE)
    return took


def _row(
    name: str,
    value: object,
    unit: str,
    *,
    target: float | None = None,
    rival: str | None = None,
    ok: bool | None = None,
) -> dict[str, Any]:
    shown = (round(value) if value >= 100 else round(value, 2)) if isinstance(value, float) else value
    return {"name": name, "value": shown, "unit": unit, "target": target, "rival": rival, "ok": ok}
