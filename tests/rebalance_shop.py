"""Two shards in two databases of one server, filled, under a map in a file or in ZooKeeper: for tests of rebalance."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pymysql

from shardkit.credentials import Credentials, fixed
from shardkit.errors import ShardkitError
from shardkit.mapstore import MapStore, open_store
from shardkit.partition import Bucket
from shardkit.rebalance import Job, MoveBuckets, Plan, Split, apply_plan, cancel_job, list_jobs, plan_move
from shardkit.rebalance.failpoint import VARIABLE
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Shard

FIRST, SECOND = "shop-0", "shop-1"
BUCKETS = 32
USERS = 400
TABLES = {"users": "id", "orders": "user_id", "stores": "region"}
_numbers = itertools.count(1)

DDL = (
    """CREATE TABLE users (
         id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY, name VARCHAR(60) NOT NULL, email VARCHAR(80),
         balance DECIMAL(12, 2) NOT NULL DEFAULT 0, UNIQUE KEY by_email (email)
       ) CHARACTER SET utf8mb4""",
    """CREATE TABLE orders (
         id BIGINT NOT NULL PRIMARY KEY, user_id BIGINT, item VARBINARY(40), amount INT NOT NULL,
         KEY by_user (user_id), CONSTRAINT of_user FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE
       ) CHARACTER SET utf8mb4""",
    """CREATE TABLE stores (
         region VARCHAR(20) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, number INT NOT NULL, sales INT NOT NULL,
         PRIMARY KEY (region, number)
       ) CHARACTER SET utf8mb4""",
    "CREATE TABLE countries (code CHAR(2) PRIMARY KEY, name VARCHAR(40)) CHARACTER SET utf8mb4",
    "CREATE TABLE invoices (id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY, total DECIMAL(12, 2)) CHARACTER SET utf8mb4",
)


@dataclass
class Shop:
    """The two shards, their map, and what they hold.

    :param source: the map's source, as `open_store` and ``--map`` take it.
    """

    server: LocalDatabaseServer
    databases: dict[str, str]
    source: str
    _stores: list[MapStore] = field(default_factory=list)

    # --- asking the databases, never through the code under test

    def connect(self, shard: str, **options: Any) -> pymysql.Connection[Any]:
        """A plain connection, as an application's raw SQL has."""
        return self.server.connect(self.databases[shard], **{"autocommit": True, "ssl_disabled": True, **options})

    def rows(self, shard: str, sql: str) -> list[tuple[Any, ...]]:
        """A query on one shard."""
        with closing(self.connect(shard)) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def execute(self, shard: str, *statements: str) -> None:
        """Statements on one shard."""
        with closing(self.connect(shard)) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def contents(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every sharded table, over both shards."""
        return {
            table: sorted(
                (row for shard in self.databases for row in self.rows(shard, f"SELECT * FROM {table}")), key=repr
            )
            for table in TABLES
        }

    def contents_once(self) -> dict[str, list[tuple[Any, ...]]]:
        """The same by the map: of each shard only the rows of the buckets that are placed there."""
        shard_map = self.map
        found: dict[str, list[tuple[Any, ...]]] = {}
        for table, key in TABLES.items():
            rows = (
                (shard, row[0], row[1:])
                for shard in self.databases
                for row in self.rows(shard, f"SELECT {key}, {table}.* FROM {table}")
            )
            placed = (row for shard, value, row in rows if shard_map.locate(table, [value]).shard == shard)
            found[table] = sorted(placed, key=repr)
        return found

    def misplaced(self) -> list[str]:
        """Rows that are not on the shard that the map places them on."""
        shard_map = self.map
        faults: list[str] = []
        for table, key in TABLES.items():
            for shard in self.databases:
                for (value,) in self.rows(shard, f"SELECT {key} FROM {table}"):
                    place = shard_map.locate(table, [value])
                    if place.shard != shard:
                        faults.append(f"{table} {value} is on {shard}, the map places it on {place.shard}")
        return faults

    def owners(self, keyspace: str = "orders") -> dict[str, list[str]]:
        """Bucket -> the shards that say that they own it."""
        found: dict[str, list[str]] = {}
        for shard in self.databases:
            if not self.rows(shard, "SHOW TABLES LIKE 'shardkit_ownership'"):
                continue
            for (bucket,) in self.rows(
                shard, f"SELECT bucket FROM shardkit_ownership WHERE keyspace = '{keyspace}' AND state = 'owned'"
            ):
                found.setdefault(bucket, []).append(shard)
        return found

    # --- the map

    def store(self) -> MapStore:
        """A store of its own, closed after the test."""
        store = open_store(self.source)
        self._stores.append(store)
        return store

    @property
    def map(self) -> ShardMap:
        """The map of now."""
        with closing(open_store(self.source)) as store:
            return store.load()

    def users_in(self, buckets: Sequence[Bucket], table: str = "users") -> list[int]:
        """Ids of users in these buckets."""
        shard_map, wanted = self.map, set(buckets)
        return [number for number in range(1, USERS + 1) if shard_map.locate(table, [number]).bucket in wanted]

    def add_shard(self, name: str) -> None:
        """A third shard with an empty database."""
        database = f"{self.databases[FIRST]}_{len(self.databases)}"
        self.server.execute(f"CREATE DATABASE {database}")
        self.databases[name] = database
        with closing(open_store(self.source)) as store:
            current = store.load()
            shards = {**current.shards, name: Shard(name, self.server.endpoint(database))}
            store.publish(current.with_shards(shards), expected_version=current.version)

    # --- rebalancing

    def plan(self, *buckets: Bucket, target: str = SECOND) -> Plan:
        """Move these buckets, or, without any, a quarter of the first shard."""
        wish = MoveBuckets(buckets, target) if buckets else Split(FIRST, target, 0.25)
        return plan_move(self.source, wish, keyspace=None if buckets else "orders", credentials=self.server.credentials)

    def apply(self, plan: Plan, **options: Any) -> tuple[Job, ...]:
        """In this process."""
        return apply_plan(self.source, plan, credentials=self.server.credentials, **options)

    def job(self) -> Job:
        """The newest job."""
        return list_jobs(self.source)[-1]

    def start(self, plan: Path, *, failpoint: str = "", command: str = "apply") -> subprocess.Popen[str]:
        """``shardkit rebalance apply PLAN`` as a process of its own."""
        environment = {
            **os.environ,
            "SHARDKIT_USER": "root",
            "SHARDKIT_PASSWORD": "",
            "SHARDKIT_MAP": self.source,
            "SHARDKIT_FAILPOINT": failpoint,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "shardkit", "rebalance", command, str(plan), "--yes"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, plan: Plan, *, failpoint: str = "", undo: bool = False, timeout: float = 60) -> tuple[int, str]:
        """Apply a plan, or undo its first job, in a process of its own that may be killed on the way.

        :returns: its exit code (negative: the signal that ended it) and what it said.
        """
        receiver, sender = _processes.Pipe(duplex=False)
        process = _processes.Process(
            target=_run, args=(self.source, Credentials("root"), plan, failpoint, undo, sender), daemon=True
        )
        process.start()
        sender.close()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(f"the job did not end within {timeout:.0f} s")
        with closing(receiver), suppress(EOFError):  # of who was killed before a word
            return process.exitcode or 0, receiver.recv()
        return process.exitcode or 0, ""

    def close(self) -> None:
        for store in self._stores:
            store.close()


# Children of a process that has the modules at hand, and no threads: a new interpreter each time takes seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.rebalance_shop"])


def _run(source: str, credentials: Credentials, plan: Plan, failpoint: str, undo: bool, sender: Connection) -> None:
    os.environ[VARIABLE] = failpoint
    try:
        if undo:
            cancel_job(source, plan.job_id(0), credentials=fixed(credentials.user, credentials.password))
        else:
            apply_plan(source, plan, credentials=fixed(credentials.user, credentials.password))
    except ShardkitError as error:
        sender.send(str(error))
        sys.exit(error.exit_code)
    sender.send("done")


def ended(process: subprocess.Popen[str], *, timeout: float = 60) -> tuple[int, str]:
    """Exit code and output of a process, killed when it takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"the command did not end within {timeout:.0f} s:\n{output}") from None
    return process.returncode, output


KILLED = -signal.SIGKILL


def wait_until(condition: Callable[[], object], what: str, timeout: float = 20) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.02)


def map_over(server: LocalDatabaseServer, databases: dict[str, str], cluster: str = "shop") -> ShardMap:
    """The map over the two databases."""
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": cluster,
            "keyspaces": {
                "orders": {
                    "partition": {"by": "hash", "buckets": BUCKETS},
                    "tables": {"users": "id", "orders": "user_id"},
                    "reference": ["countries"],
                    "ids": "generated",
                    "placement": {FIRST: f"0-{BUCKETS // 2 - 1}", SECOND: f"{BUCKETS // 2}-{BUCKETS - 1}"},
                },
                "stores": {
                    "partition": {"by": "list", "buckets": {"seoul": ["서울"], "daegu": ["대구"], "daejeon": ["대전"]}},
                    "tables": {"stores": "region"},
                    "placement": {FIRST: ["seoul", "daegu"], SECOND: ["daejeon"]},
                },
                "billing": {"tables": ["invoices"], "placement": FIRST},
            },
            "shards": {shard: {"master": server.endpoint(name).url} for shard, name in databases.items()},
        }
    )


def fill(shop: Shop) -> None:
    """Users with two orders each, and stores, where the map places them."""
    shard_map = shop.map
    for shard in shop.databases:
        users = [number for number in range(1, USERS + 1) if shard_map.locate("users", [number]).shard == shard]
        regions = [region for region in ("서울", "대구", "대전") if shard_map.locate("stores", [region]).shard == shard]
        shop.execute(
            shard,
            *DDL,
            "INSERT INTO countries VALUES ('kr', '대한민국'), ('de', 'Deutschland')",
            "INSERT INTO users (id, name, email, balance) VALUES "
            + ", ".join(f"({number}, 'user {number}', 'u{number}@example.org', {number}.25)" for number in users),
            "INSERT INTO orders VALUES "
            + ", ".join(
                f"({number * 10 + which}, {number}, X'00FF27{number % 256:02X}', {which + 1})"
                for number in users
                for which in (0, 1)
            ),
            *(["INSERT INTO invoices (total) VALUES (1.5), (2.5), (NULL)"] if shard == FIRST else []),
            "INSERT INTO stores VALUES "
            + ", ".join(f"('{region}', {number}, {number * 7})" for region in regions for number in range(1, 30)),
        )


@contextmanager
def open_shop(server: LocalDatabaseServer, source: str, cluster: str = "shop") -> Iterator[Shop]:
    """A filled shop; its databases go with it."""
    mark = f"{os.getpid()}_{next(_numbers)}"
    databases = {shard: f"reb_{mark}_{number}" for number, shard in enumerate((FIRST, SECOND))}
    shop = Shop(server, databases, source)
    for name in databases.values():
        server.execute(f"CREATE DATABASE {name}")
    try:
        with closing(open_store(source)) as store:
            store.publish(map_over(server, databases, cluster), expected_version=0)
        fill(shop)
        yield shop
    finally:
        shop.close()
        for name in shop.databases.values():
            server.execute(f"DROP DATABASE IF EXISTS {name}")
