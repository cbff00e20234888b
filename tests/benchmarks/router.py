"""The router's overhead: keyed reads and writes through a cluster's session, against a plain Session on the same engine
and against SQLAlchemy's own ShardedSession. Ratios of times, from interleaved runs in one process."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count, cycle, islice
from statistics import fmean, median
from typing import Any

import sqlalchemy as sa
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import shardkit
from shardkit.cluster import Cluster
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalMariaDB, TcpProxy
from tests.benchmarks import merge

SHARDS = ("bench-0", "bench-1")
BUCKETS = 64
ROWS = 2_000
ROUNDS = 300
OPERATIONS = 25

Row = dict[str, Any]
Operation = Callable[[int], Any]


class Base(DeclarativeBase):
    """The benchmark's tables."""


class Person(Base):
    """Sharded by its primary key."""

    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(sa.String(50))
    email: Mapped[str] = mapped_column(sa.String(100))
    age: Mapped[int]
    city: Mapped[str] = mapped_column(sa.String(50))


def run() -> list[Row]:
    """Every row of ``make bench ONLY=router``."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        masters = {shard: f"sqlite:///{directory}/{shard}.db" for shard in SHARDS}
        with _cluster(masters) as cluster:
            rows += _keyed_reads(cluster, "sqlite")
    with LocalMariaDB() as server:
        for shard in SHARDS:
            server.execute(f"CREATE DATABASE `{shard}`")
        masters = {shard: server.endpoint(shard).url for shard in SHARDS}
        with _cluster(masters, credentials=server.credentials) as cluster:
            rows += _keyed_reads(cluster, "mariadb")
            rows += asyncio.run(_asyncio_reads(cluster, "mariadb"))
            rows += _explain(cluster)
        rows += _flush(server)
        rows += _scatter(server)
    rows += merge.run()
    return rows


def _map(masters: Mapping[str, str]) -> ShardMap:
    """Buckets spread evenly over the shards, in spans."""
    share = BUCKETS // len(masters)
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "bench",
            "keyspaces": {
                "people": {
                    "partition": {"by": "hash", "buckets": BUCKETS},
                    "tables": {"people": "id"},
                    "placement": {
                        shard: f"{number * share}-{number * share + share - 1}" for number, shard in enumerate(masters)
                    },
                }
            },
            "shards": {shard: {"master": url} for shard, url in masters.items()},
        }
    )


@contextmanager
def _cluster(masters: Mapping[str, str], **options: Any) -> Iterator[Cluster]:
    with shardkit.create_cluster(_map(masters), **options) as cluster:
        cluster.create_all(Base.metadata)
        with shardkit.sessionmaker(cluster, transactions="best_effort").begin() as session:
            session.execute(insert(Person), [_person(number) for number in range(ROWS)])
        yield cluster


def _person(number: int) -> Row:
    return {"id": number, "name": f"n{number}", "email": f"{number}@example.org", "age": number % 90, "city": "Seoul"}


def _bucket(number: int) -> int:
    return zlib.crc32(str(number).encode()) % BUCKETS


def _shard_of(number: int) -> str:
    return SHARDS[_bucket(number) * len(SHARDS) // BUCKETS]


def _sharded_session(cluster: Cluster) -> ShardedSession:
    """SQLAlchemy's, with choosers that cost as little as can be."""
    return ShardedSession(
        shard_chooser=lambda _mapper, instance, **_: _shard_of(instance.id),
        identity_chooser=lambda _mapper, identity, **_: [_shard_of(identity[0])],
        execute_chooser=lambda context: [_shard_of(_value(context))],
        shards={shard: cluster.engine(shard) for shard in SHARDS},
    )


def _value(context: Any) -> int:
    where = context.statement.whereclause.right
    return int(context.parameters[where.key] if context.parameters else where.value)


def _keyed_reads(cluster: Cluster, database: str) -> list[Row]:
    keys = [number for number in range(ROWS) if cluster.locate("people", id=number).shard == SHARDS[0]]
    plain, ours, rival = Session(cluster.engine(SHARDS[0])), shardkit.sessionmaker(cluster)(), _sharded_session(cluster)
    sessions: Sequence[Session] = (plain, ours, rival)

    def selecting(session: Session) -> Operation:
        return lambda number: session.scalars(select(Person).where(Person.id == number)).one()

    def getting(session: Session) -> Operation:
        return lambda number: session.get_one(Person, number)

    rows = []
    for what, operation in (("keyed select", selecting), ("get", getting)):
        # SQLite works in this process: its processor time is all the time there is, and others cannot disturb it
        clock = time.process_time if database == "sqlite" else time.perf_counter
        times = _interleaved([operation(session) for session in sessions], keys, clock)
        rows.append(_row(f"router {what}, {database}", times, target=1.10))
    for session in sessions:
        session.close()
    return rows


def _interleaved(operations: Sequence[Operation], keys: Sequence[int], clock: Callable[[], float]) -> list[list[float]]:
    """Seconds of each operation in each round; the order changes from round to round."""
    times: list[list[float]] = [[] for _ in operations]
    upcoming = [cycle(keys) for _ in operations]
    for round_number in range(ROUNDS + 2):
        for step in range(len(operations)):
            which = (step + round_number) % len(operations)
            batch = list(islice(upcoming[which], OPERATIONS))
            operation = operations[which]
            gc.disable()
            began = clock()
            for key in batch:
                operation(key)
            elapsed = clock() - began
            gc.enable()
            if round_number >= 2:  # the first ones compile statements and open connections
                times[which].append(elapsed)
    return times


def _undisturbed(series: Sequence[float]) -> float:
    """The mean of the fastest quarter: rounds in which other processes took the processor say nothing about us."""
    return fmean(sorted(series)[: max(1, len(series) // 4)])


def _row(name: str, times: Sequence[Sequence[float]], target: float) -> Row:
    """Ours over plain, with the rival's own ratio beside it. Rows of times: plain, ours, rival."""
    plain, ours, rival = (_undisturbed(series) for series in times)
    value, others = ours / plain, rival / plain
    return {
        "name": name,
        "value": round(value, 3),
        "unit": "x plain Session",
        "target": f"<= {target}",
        "rival": f"ShardedSession {others:.2f}x",
        "ok": value <= target,
    }


def _explain(cluster: Cluster) -> list[Row]:
    """What planning a keyed statement costs, built anew each time as applications do."""
    times = []
    for _ in range(ROUNDS):
        statements = [select(Person).where(Person.id == number) for number in range(OPERATIONS)]
        began = time.perf_counter()
        for statement in statements:
            cluster.explain(statement)
        times.append((time.perf_counter() - began) / OPERATIONS)
    value = _undisturbed(times) * 1_000_000
    return [
        {
            "name": "router cluster.explain of a keyed select",
            "value": round(value, 1),
            "unit": "us",
            "target": "<= 100",
            "rival": "-",
            "ok": value <= 100,
        }
    ]


def _flush(server: LocalMariaDB) -> list[Row]:
    """A flush of new objects whose keys alternate between four shards: SQLAlchemy's writes them one by one."""
    names = [f"flush-{number}" for number in range(4)]
    for name in names:
        server.execute(f"CREATE DATABASE `{name}`")
    masters = {name: server.endpoint(name).url for name in names}
    with _cluster(masters, credentials=server.credentials) as cluster:
        return _flushed(cluster, names)


def _flushed(cluster: Cluster, names: Sequence[str]) -> list[Row]:
    numbers = count(1_000_000)

    def rival() -> ShardedSession:
        return ShardedSession(
            shard_chooser=lambda _mapper, instance, **_: names[_bucket(instance.id) * len(names) // BUCKETS],
            identity_chooser=lambda *_, **__: names,
            execute_chooser=lambda _: names,
            shards={name: cluster.engine(name) for name in names},
        )

    def flushing(make: Callable[[], Session]) -> float:
        objects = [Person(**_person(number)) for number in islice(numbers, 4_000)]
        with make() as session:
            session.add_all(objects)
            began = time.perf_counter()
            session.flush()
            elapsed = time.perf_counter() - began
            session.rollback()
        return elapsed

    factory = shardkit.sessionmaker(cluster, transactions="best_effort")
    ratios = [flushing(rival) / flushing(factory) for _ in range(3)]
    value = median(ratios)
    return [
        {
            "name": "router flush of 4,000 interleaved new objects over 4 shards, mariadb",
            "value": round(value, 2),
            "unit": "x faster than ShardedSession",
            "target": ">= 1.8",
            "rival": "ShardedSession 1x",
            "ok": value >= 1.8,
        }
    ]


async def _asyncio_reads(cluster: Cluster, database: str) -> list[Row]:
    """Keyed reads through AsyncSession, against a plain AsyncSession on the same engine."""
    keys = [number for number in range(ROWS) if cluster.locate("people", id=number).shard == SHARDS[0]]
    sessions = [AsyncSession(cluster.async_engine(SHARDS[0])), shardkit.async_sessionmaker(cluster)()]
    times: list[list[float]] = [[], []]
    for round_number in range(ROUNDS + 2):
        for step in range(2):
            which = (step + round_number) % 2
            session = sessions[which]
            gc.disable()
            began = time.perf_counter()
            for key in keys[:OPERATIONS]:
                (await session.scalars(select(Person).where(Person.id == key))).one()
            gc.enable()
            if round_number >= 2:
                times[which].append(time.perf_counter() - began)
    for session in sessions:
        await session.close()
    await cluster.async_engine(SHARDS[0]).dispose()
    plain, ours = (_undisturbed(series) for series in times)
    value = ours / plain
    return [
        {
            "name": f"router keyed select, asyncio, {database}",
            "value": round(value, 3),
            "unit": "x plain AsyncSession",
            "target": "<= 1.1",
            "rival": "-",
            "ok": value <= 1.10,
        }
    ]


def _scatter(server: LocalMariaDB) -> list[Row]:
    """A read over eight shards that are 20 ms away each, against the same read of one of them."""
    names = [f"far-{number}" for number in range(8)]
    for name in names:
        server.execute(f"CREATE DATABASE `{name}`")
    with ExitStack() as stack:
        proxies = [stack.enter_context(TcpProxy(server.host, server.port)) for _ in names]
        masters = {name: proxy.endpoint(name).url for name, proxy in zip(names, proxies, strict=True)}
        cluster = stack.enter_context(shardkit.create_cluster(_map(masters), credentials=server.credentials))
        cluster.create_all(Base.metadata)
        for proxy in proxies:
            proxy.delay(0.01)
        with shardkit.sessionmaker(cluster)() as session, _sharded(cluster, names) as rival:

            def seconds(work: Callable[[], Any]) -> float:
                began = time.perf_counter()
                work()
                return time.perf_counter() - began

            one = select(Person.id).where(Person.id == 1)
            everything = select(Person.id)
            works = (
                lambda: session.execute(one).all(),
                lambda: session.execute(everything).all(),
                lambda: rival.execute(everything).all(),
            )
            for work in works:
                work()
            times = [[seconds(work) for work in works] for _ in range(15)]
    value = median(all_of / one_of for one_of, all_of, _ in times)
    others = median(theirs / one_of for one_of, _, theirs in times)
    return [
        {
            "name": "router read over 8 shards, 20 ms each, mariadb",
            "value": round(value, 2),
            "unit": "x one shard",
            "target": "<= 1.5",
            "rival": f"ShardedSession {others:.1f}x",
            "ok": value <= 1.5,
        }
    ]


def _sharded(cluster: Cluster, names: Sequence[str]) -> ShardedSession:
    return ShardedSession(
        shard_chooser=lambda *_, **__: names[0],
        identity_chooser=lambda *_, **__: names,
        execute_chooser=lambda _: names,
        shards={name: cluster.engine(name) for name in names},
    )
