"""Reads on replicas: what tokens cost, how soon clients read their writes, how much replicas take off a master."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa
from sqlalchemy import select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import shardkit
from shardkit import drivers, own_tables
from shardkit.cluster import Cluster
from shardkit.demo.relay_process import RelayProcess
from shardkit.replicas.token import Token
from shardkit.session.transaction import ClusterTransaction
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalCluster, LocalMariaDB, LocalMySQL, TcpProxy
from shardkit.testing.cluster import database_of
from shardkit.testing.database import Flavour, LocalDatabaseServer
from tests.faults.readers import open_stage, when

SHARD = "bench-0"
ROWS = 1_000
ROUNDS = 60
OPERATIONS = 50

Row = dict[str, Any]


class Base(DeclarativeBase):
    """The benchmark's tables."""


class Person(Base):
    """Sharded by its primary key."""

    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.String(50))
    visits: Mapped[int]


def run(quick: bool = False) -> list[Row]:
    """Every row of ``make bench ONLY=replicas``."""
    rows: list[Row] = []
    rounds = 4 if quick else ROUNDS
    kinds: Sequence[tuple[Flavour, type[LocalDatabaseServer]]] = (("mariadb", LocalMariaDB), ("mysql", LocalMySQL))
    for flavour, kind in kinds:
        with kind(durable=True) as server, _one_server(server) as cluster:
            rows += [_commits(cluster, server, flavour, rounds), _keyed_reads(cluster, flavour, rounds)]
        with _relayed(flavour, away=0.003) as cluster:
            rows.append(_own_writes(cluster, flavour, 300 if quick else 2_000))
        with _relayed(flavour, away=0.0) as cluster:
            rows.append(_off_loaded(cluster, flavour, 3.0 if quick else 15.0))
        rows += _noticed(flavour, 3 if quick else 20)
    return rows


def _map(master: str, replicas: Sequence[str] = ()) -> ShardMap:
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "bench",
            "keyspaces": {
                "people": {
                    "partition": {"by": "hash", "buckets": 4},
                    "tables": {"people": "id"},
                    "placement": {SHARD: "0-1", "bench-1": "2-3"},
                }
            },
            "shards": {
                SHARD: {"master": master, "replicas": list(replicas)},
                "bench-1": {"master": master.replace(f"/{database_of(SHARD)}", "/other")},
            },
        }
    )


# --- what tokens cost, on one server -----------------------------------------------------------------------------


@contextmanager
def _one_server(server: LocalDatabaseServer) -> Iterator[Cluster]:
    """A master and a database that stands for its replica: it says that it has all of the master's log."""
    for name in (database_of(SHARD), "replica", "other"):
        server.execute(f"CREATE DATABASE {name}")
    shard_map = _map(server.endpoint(database_of(SHARD)).url, [server.endpoint("replica").url])
    with _cluster(shard_map, server) as cluster:
        for engine in (cluster.engine(SHARD), cluster.engine("bench-1"), cluster.engine(SHARD, "replica")):
            Base.metadata.create_all(engine)
            own_tables.upgrade(engine)
            with engine.begin() as connection:
                connection.execute(sa.insert(Person), [_person(number) for number in range(ROWS)])
        variable = "gtid_binlog_pos" if server.flavour == "mariadb" else "gtid_executed"
        ((position,),) = server.execute(f"SELECT @@global.{variable}")
        with cluster.engine(SHARD, "replica").begin() as connection:
            connection.exec_driver_sql(
                f"INSERT INTO shardkit_position VALUES ('history:{SHARD}', 0, 0, '{position}', 'm', '', 0, '', '', 0, "
                "'', 0)"
            )
            connection.exec_driver_sql(
                f"INSERT INTO shardkit_heartbeat VALUES ('{SHARD}', 1, UNIX_TIMESTAMP() * 1000000)"
            )
        while not cluster.health.wait():
            time.sleep(0.1)
        yield cluster


def _cluster(shard_map: ShardMap, server: LocalDatabaseServer) -> Cluster:
    return shardkit.create_cluster(
        shard_map,
        credentials=server.credentials,
        max_lag=1e9,
        engine_options={"connect_args": {"ssl_disabled": True}},
    )


def _person(number: int) -> Row:
    return {"id": number, "name": f"n{number}", "visits": 0}


def _keys(cluster: Cluster) -> list[int]:
    return [number for number in range(ROWS) if cluster.locate("people", id=number).shard == SHARD]


def _against(one: Callable[[int], Any], other: Callable[[int], Any], keys: Sequence[int], rounds: int) -> float:
    """The ratio of their times: of each the mean of its least disturbed rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            work = (one, other)[which]
            began = time.perf_counter()
            for step in range(OPERATIONS):
                work(keys[(number * OPERATIONS + step) % len(keys)])
            if number >= 2:
                times[which].append(time.perf_counter() - began)
    first, second = (fmean(sorted(series)[: max(1, len(series) // 4)]) for series in times)
    return first / second


def _commits(cluster: Cluster, server: LocalDatabaseServer, flavour: str, rounds: int) -> Row:
    """Transactions of one UPDATE: with tokens, and with connections and sessions that know of none."""
    keys = _keys(cluster)
    with patch.object(drivers, "connect", lambda dialect, arguments, options: dialect.connect(*arguments, **options)):
        plain = _cluster(cluster.map, server)
        with shardkit.sessionmaker(plain, read_from="master")() as session:
            session.get(Person, keys[0])

    def change(on: Cluster) -> Callable[[int], Any]:
        factory = shardkit.sessionmaker(on, read_from="master")

        def work(number: int) -> None:
            with factory() as session:
                session.execute(update(Person).where(Person.id == number).values(visits=Person.visits + 1))
                session.commit()

        return work

    blindly = change(plain)

    def untold(number: int) -> None:
        with patch.object(ClusterTransaction, "_tell_what_was_committed", lambda *_: None):
            blindly(number)

    with plain:
        value = _against(change(cluster), untold, keys, rounds)
    return _ratio(f"replicas commit with a token, {flavour}, flushed", value, "x without", 1.02)


def _keyed_reads(cluster: Cluster, flavour: str, rounds: int) -> Row:
    """Transactions of one read by key on a replica: raising the token, and not."""
    keys = _keys(cluster)
    factory = shardkit.sessionmaker(cluster)

    def read(number: int) -> None:
        with factory() as session:
            session.scalars(select(Person).where(Person.id == number)).one()

    def blind(number: int) -> None:
        with patch.object(ClusterTransaction, "_watch", lambda *_: None):
            read(number)

    value = _against(read, blind, keys, rounds)
    return _ratio(f"replicas read by key with a token, {flavour}", value, "x without", 1.05)


def _ratio(name: str, value: float, unit: str, target: float) -> Row:
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "target": f"<= {target}",
        "rival": "-",
        "ok": value <= target,
    }


# --- through the relay -------------------------------------------------------------------------------------------


@contextmanager
def _relayed(flavour: Flavour, *, away: float) -> Iterator[Cluster]:
    """One shard with two replicas, whose relay is so many seconds away from each of them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        local = stack.enter_context(LocalCluster([SHARD], 2, zookeeper=False, flavour=flavour))
        local.server(SHARD).execute("CREATE DATABASE other")
        shard = local.shards[SHARD]
        proxies = [stack.enter_context(TcpProxy(each.host, each.port)) for each in shard.replicas]
        for proxy in proxies:
            proxy.delay(away)
        distant = replace(shard, replicas=tuple(proxy.endpoint(database_of(SHARD)) for proxy in proxies))
        near = _map(shard.master.url)
        others = {name: each for name, each in near.shards.items() if name != SHARD}
        source = folder / "map.yaml"
        source.write_text(near.with_shards({SHARD: distant, **others}).dump(), encoding="utf-8")
        cluster = stack.enter_context(
            shardkit.create_cluster(
                near.with_shards({SHARD: shard, **others}),
                credentials=local.credentials,
                engine_options={"connect_args": {"ssl_disabled": True}, "pool_size": 16},
            )
        )
        Base.metadata.create_all(cluster.engine(SHARD))
        with shardkit.sessionmaker(cluster, transactions="best_effort").begin() as session:
            session.add_all(Person(**_person(number)) for number in _keys(cluster))
        relay = RelayProcess(str(source), local.credentials(shard.master), log=folder / "relay.log")
        relay.start()
        stack.callback(relay.stop)
        end = time.monotonic() + 60
        while not cluster.health.wait(1.0) and time.monotonic() < end:
            relay.check()
        yield cluster


@dataclass
class _Client:
    """Writes its own row, and reads it again."""

    factory: Callable[..., Session]
    number: int
    token: Token
    written: int = 0
    stale: int = 0

    def write(self) -> None:
        with self.factory(token=self.token) as session:
            self.written += 1
            session.execute(update(Person).where(Person.id == self.number).values(visits=self.written))
            session.commit()
            self.token = session.token

    def read(self) -> float:
        began = time.perf_counter()
        with self.factory(token=self.token) as session:
            found = session.scalars(select(Person.visits).where(Person.id == self.number)).one()
            self.token = session.token
        self.stale += found < self.written
        return time.perf_counter() - began


def _clients(cluster: Cluster, work: Callable[[_Client], None]) -> list[_Client]:
    """Four clients at once."""
    factory = shardkit.sessionmaker(cluster)
    clients = [_Client(factory, number, Token()) for number in _keys(cluster)[:4]]
    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def _served(cluster: Cluster) -> tuple[float, float]:
    """Reads on replicas, and on the master in their place."""
    metrics = cluster.metrics
    replicas = metrics.replica_reads.labels(SHARD)._value.get()
    masters = sum(metrics.master_reads.labels(SHARD, reason)._value.get() for reason in ("lag", "token"))
    return replicas, masters


def _own_writes(cluster: Cluster, flavour: str, operations: int) -> Row:
    """Each client reads its own row at most 5 ms after it has written it; replicas are 10 to 50 ms behind."""
    latencies: list[float] = []
    before = _served(cluster)

    def work(client: _Client) -> None:
        chance = random.Random(client.number)
        for _ in range(operations // 4):
            client.write()
            time.sleep(chance.uniform(0, 0.005))
            latencies.append(client.read())

    clients = _clients(cluster, work)
    after = _served(cluster)
    share = (after[0] - before[0]) / max(1, sum(after) - sum(before))
    cuts = quantiles(latencies, n=100)
    stale = sum(client.stale for client in clients)
    return {
        "name": f"replicas own write read within 5 ms, {flavour}: p99",
        "value": round(cuts[98] * 1000, 1),
        "unit": f"ms (p50 {cuts[49] * 1000:.1f} ms, {share:.0%} on replicas, {stale} stale of {len(latencies)})",
        "target": "0 stale",
        "rival": "-",
        "ok": stale == 0,
    }


def _off_loaded(cluster: Cluster, flavour: str, seconds: float) -> Row:
    """17 reads to 3 writes, each a transaction; every client with its token."""
    before = _served(cluster)
    end = time.monotonic() + seconds

    def work(client: _Client) -> None:
        chance = random.Random(client.number)
        while time.monotonic() < end:
            if chance.random() < 0.15:
                client.write()
            else:
                client.read()

    clients = _clients(cluster, work)
    after = _served(cluster)
    replicas, reads = after[0] - before[0], sum(after) - sum(before)
    stale = sum(client.stale for client in clients)
    value = replicas / max(1.0, reads)
    return {
        "name": f"replicas share of reads, 85 % reads, {flavour}",
        "value": round(value, 3),
        "unit": f"of {reads:.0f} reads ({stale} stale)",
        "target": ">= 0.8",
        "rival": "-",
        "ok": value >= 0.8 and stale == 0,
    }


# --- how soon processes notice -----------------------------------------------------------------------------------


def _noticed(flavour: Flavour, rounds: int) -> list[Row]:
    """Until the last of three processes, which read without a pause, has noticed: a map without a replica, a map with
    one more, a replica that was killed. The slowest of all rounds; a read that fails ends the benchmark."""
    changed: list[float] = []
    died: list[float] = []
    with tempfile.TemporaryDirectory() as folder, open_stage(flavour, 3, Path(folder)) as stage:
        first, second = stage.replicas
        stage.readers.all_read(stage.replicas, time.monotonic())
        for _ in range(rounds):
            changed.append(stage.readers.all_read([first], when(lambda: stage.publish(first))))
            changed.append(stage.readers.all_read(stage.replicas, when(lambda: stage.publish(first, second))))
            died.append(stage.readers.all_read([first], when(stage.server(1).kill)))
            stage.server(1).start()
            stage.readers.all_read(stage.replicas, time.monotonic())
    return [
        {
            "name": f"replicas {what} noticed by three processes, {flavour}: slowest",
            "value": round(max(found) * 1000),
            "unit": f"ms (median {median(found) * 1000:.0f} ms of {len(found)}, no failed read)",
            "target": "<= 1000",
            "rival": "-",
            "ok": max(found) <= 1.0,
        }
        for what, found in (("change of the map", changed), ("death", died))
    ]
