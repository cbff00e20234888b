"""The relay against the servers' own replication, on one backlog, at equal durability, contents compared.

Catch-up: a source with a backlog of small transactions, and empty targets (`relay_stage` says what is timed). The
contestants take turns; a ratio is one of medians. The latency of the machine's fsync stands beside: sharing it is part
of the gain. Steady state: a chain of two hops, and the same chain by native replication.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from datetime import datetime
from decimal import Decimal
from typing import Any

import pymysql

from shardkit.errors import MissingServer
from shardkit.gtid import Flavour, parse_position
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Role
from shardkit_cdc.daemon import tune_process
from shardkit_cdc.row_image import RowDecoder
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Assembler
from tests.benchmarks.relay_stage import (
    DATABASE,
    WAYS,
    attach,
    contents,
    detach,
    empty,
    end_of_log,
    fsync_milliseconds,
    hop_between,
    native_seconds,
    relay_seconds,
    require_equal,
    row,
    running,
    servers,
    set_durability,
    single,
    single_and_best,
    start,
    wait_until,
)

TRANSACTIONS = 20_000
TRANSACTIONS_PER_SECOND = 300
#: How often each contestant runs.
ROUNDS = 3
#: At least so many times as fast as one native thread, and as the best parallel setting (relay.md, "Targets").
_TARGETS: Mapping[tuple[Flavour, bool], tuple[float, float]] = {
    (Flavour.MARIADB, True): (5.0, 3.0),
    (Flavour.MYSQL, True): (8.0, 5.0),
    (Flavour.MARIADB, False): (1.0, 1.0),
    (Flavour.MYSQL, False): (1.0, 1.0),
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Every measure of the relay. MySQL's are left out where there is no MySQL."""
    tune_process()
    count = int(os.environ.get("SHARDKIT_BENCH_TRANSACTIONS", "1000" if quick else str(TRANSACTIONS)))
    rows = [row("relay fsync of 4 KiB, median", fsync_milliseconds(), "ms")]
    for flavour in Flavour:
        try:
            rows += _flavour(flavour, count, rounds=1 if quick else ROUNDS, seconds=2 if quick else 8)
        except MissingServer as error:
            rows.append(row(f"relay {flavour}, not measured", error.message, ""))
    return rows


def _flavour(flavour: Flavour, count: int, *, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    with servers(flavour, 4) as (source, target, native, last):
        make_backlog(source, count)
        ours, theirs = decoded_per_second(source)
        label = f"relay {flavour} rows read and decoded"
        yield row(label, ours, "rows/s")
        yield row(f"{label}, x mysql-replication", ours / theirs, "x", least=5.0, rival=f"{theirs:.0f} rows/s")
        for durable in (True, False):
            yield from _catch_up(source, target, native, count, durable=durable, rounds=rounds)
        yield from _steady(source, target, native, last, rounds=rounds, seconds=seconds)


def _catch_up(
    source: LocalDatabaseServer,
    target: LocalDatabaseServer,
    native: LocalDatabaseServer,
    count: int,
    *,
    durable: bool,
    rounds: int,
) -> Iterator[dict[str, Any]]:
    flavour = Flavour(source.flavour)
    wanted = contents(source)
    ways = WAYS[flavour]
    relayed: list[float] = []
    natively: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        relayed.append(relay_seconds(source, target, durable=durable))
        require_equal(wanted, target)
        for name, values in ways.items():
            natively[name].append(native_seconds(source, native, values, durable=durable))
            require_equal(wanted, native)
    ours = statistics.median(relayed)
    times = {name: statistics.median(each) for name, each in natively.items()}
    label = f"relay {flavour} catch-up" + ("" if durable else ", durability off")
    yield row(f"{label}, relay", count / ours, "transactions/s", rival=f"{ours:.2f} s")
    for name, least in zip(single_and_best(times), _TARGETS[flavour, durable], strict=True):
        yield row(f"{label}, x native {name}", times[name] / ours, "x", least=least, rival=f"{times[name]:.2f} s")


# --- the backlog


def make_backlog(source: LocalDatabaseServer, count: int) -> None:
    """Small transactions of a shop: one update, one order, three lines; 4.85 rows each with what begins them."""
    dice = random.Random(1)
    set_durability(source, durable=False)
    with closing(source.connect(DATABASE)) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE accounts (id INT PRIMARY KEY, balance BIGINT NOT NULL, note VARCHAR(60))")
        cursor.execute(
            "CREATE TABLE orders (id BIGINT PRIMARY KEY AUTO_INCREMENT, account INT NOT NULL, amount DECIMAL(12,2), "
            "state VARCHAR(20), created DATETIME(6), KEY (account))"
        )
        cursor.execute(
            "CREATE TABLE order_lines (id BIGINT PRIMARY KEY AUTO_INCREMENT, orders BIGINT NOT NULL, item VARCHAR(40), "
            "quantity INT, price DECIMAL(10,2), KEY (orders))"
        )
        cursor.executemany("INSERT INTO accounts VALUES (%s, 1000, %s)", [(n, f"account {n}") for n in range(2000)])
        connection.commit()
        for _ in range(count):
            account = dice.randrange(2000)
            cursor.execute("UPDATE accounts SET balance = balance - %s WHERE id = %s", (dice.randint(1, 5), account))
            cursor.execute(
                "INSERT INTO orders (account, amount, state, created) VALUES (%s, %s, 'new', NOW(6))",
                (account, round(dice.random() * 100, 2)),
            )
            order = cursor.lastrowid
            for _ in range(3):
                cursor.execute(
                    "INSERT INTO order_lines (orders, item, quantity, price) VALUES (%s, %s, %s, %s)",
                    (order, f"item-{dice.randrange(1000)}", dice.randrange(1, 9), round(dice.random() * 10, 2)),
                )
            connection.commit()
    set_durability(source, durable=True)


# --- decoding, for the SQL path


def decoded_per_second(source: LocalDatabaseServer) -> tuple[float, float]:
    """Rows per second, read from the log and decoded: here, and by mysql-replication. Values are compared."""
    began = time.perf_counter()
    found = list(our_rows(source))
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    others = list(itertools.islice(their_rows(source), len(found)))
    their_seconds = time.perf_counter() - began
    if [_plain(row) for row in others] != found:
        raise AssertionError("the two decoders do not agree: the figure would be worth nothing")
    return len(found) / seconds, len(others) / their_seconds


def our_rows(source: LocalDatabaseServer) -> Iterator[tuple[Any, ...]]:
    flavour, end = Flavour(source.flavour), end_of_log(source)
    position = parse_position(flavour, "")
    assembler = Assembler(flavour)
    decoders: dict[TableMap, RowDecoder] = {}
    stream = BinlogStream(
        source.endpoint(DATABASE), source.credentials, hop="bench", flavour=flavour, after=position, server_id=4001
    )
    with closing(stream):
        while not position.covers(end):
            done = []
            for event in stream.read():
                transaction = assembler.push(event)
                if transaction is None:
                    continue
                done.append(transaction.gtid)
                for table, rows in transaction.rows:
                    if table.database != DATABASE:
                        continue
                    decoder = decoders.get(table)
                    if decoder is None:
                        decoder = decoders[table] = RowDecoder(table)
                    yield from decoder.images(rows)
            position = position.advanced(done)


def their_rows(source: LocalDatabaseServer) -> Iterator[tuple[Any, ...]]:
    from pymysqlreplication import BinLogStreamReader
    from pymysqlreplication.row_event import DeleteRowsEvent, UpdateRowsEvent, WriteRowsEvent

    stream = BinLogStreamReader(
        {"host": source.host, "port": source.port, "user": source.user, "passwd": source.password},
        server_id=4002,
        only_events=[WriteRowsEvent, UpdateRowsEvent, DeleteRowsEvent],
        only_schemas=[DATABASE],
        log_file=source.execute("SHOW BINARY LOGS")[0][0],
        log_pos=4,
        resume_stream=True,
    )
    with closing(stream):
        for event in stream:
            for row in event.rows:
                if "values" in row:
                    yield tuple(row["values"].values())
                else:
                    yield tuple(row["before_values"].values())
                    yield tuple(row["after_values"].values())


def _plain(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Their values in the form of ours: exact texts of DECIMAL and DATETIME, and text as its bytes."""
    return tuple(
        value.encode()
        if isinstance(value, str)
        else f"{value:%Y-%m-%d %H:%M:%S.%f}"
        if isinstance(value, datetime)
        else str(value)
        if isinstance(value, Decimal)
        else value
        for value in row
    )


# --- steady state


def _steady(
    source: LocalDatabaseServer,
    first: LocalDatabaseServer,
    native: LocalDatabaseServer,
    last: LocalDatabaseServer,
    *,
    rounds: int,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Two hops at a steady load: source -> first -> last by the relay, then source -> native -> last natively.

    Medians of the rounds: a single p99 is that of some twenty transactions.
    """
    relayed, natively = [], []
    for _ in range(rounds):
        relayed.append(_by_the_relay(source, first, last, seconds=seconds))
        natively.append(_natively(source, native, last, seconds=seconds))
    label = f"relay {source.flavour} two hops at {TRANSACTIONS_PER_SECOND}/s"
    for name, most in (("p50", 10.0), ("p99", 50.0)):
        ours, theirs = (statistics.median(each[name] for each in measured) for measured in (relayed, natively))
        yield row(f"{label}, {name}", ours, "ms", most=most)
        yield row(f"{label}, {name}, x a native chain", ours / theirs, "x", most=2.0, rival=f"{theirs:.2f} ms")


def _by_the_relay(
    source: LocalDatabaseServer, first: LocalDatabaseServer, last: LocalDatabaseServer, *, seconds: float
) -> dict[str, float]:
    _begin_ticks(source)
    for server in (first, last):
        empty(server)
        set_durability(server, durable=True)
    hops = [hop_between(source, first), hop_between(first, last, role=Role.REPLICA, reads_master=False)]
    with ExitStack() as stack:
        for hop in hops:
            stack.enter_context(running(hop))
        return latency(source, last, seconds=seconds)


def _natively(
    source: LocalDatabaseServer, native: LocalDatabaseServer, last: LocalDatabaseServer, *, seconds: float
) -> dict[str, float]:
    _begin_ticks(source)
    for above, below in ((source, native), (native, last)):
        set_durability(below, durable=True)
        attach(above, below, single(Flavour(source.flavour)))
        start(below)
    try:
        return latency(source, last, seconds=seconds)
    finally:
        for server in (native, last):
            detach(server)


def _begin_ticks(source: LocalDatabaseServer) -> None:
    empty(source)  # its log, too: else replicas go through the load before
    source.execute("CREATE TABLE ticks (id INT PRIMARY KEY, note VARCHAR(100))", database=DATABASE)


def latency(source: LocalDatabaseServer, replica: LocalDatabaseServer, *, seconds: float) -> dict[str, float]:
    """Milliseconds from a commit's return on the source until its row is seen on the replica."""
    wait_until(lambda: _is_empty(replica))
    committed: list[float] = []
    seen: list[float] = []
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(replica, seen, stop))
    watcher.start()
    try:
        with closing(source.connect(DATABASE, autocommit=True)) as connection, connection.cursor() as cursor:
            began = time.perf_counter()
            for number in range(int(seconds * TRANSACTIONS_PER_SECOND)):
                pause = began + number / TRANSACTIONS_PER_SECOND - time.perf_counter()
                if pause > 0:
                    time.sleep(pause)  # the load's rate
                cursor.execute("INSERT INTO ticks VALUES (%s, REPEAT('t', 90))", (number,))
                committed.append(time.perf_counter())
        wait_until(lambda: len(seen) >= len(committed))
    finally:
        stop.set()
        watcher.join()
    delays = sorted((visible - done) * 1000 for visible, done in zip(seen, committed, strict=False))
    return {"p50": statistics.median(delays), "p99": delays[int(len(delays) * 0.99)]}


def _is_empty(replica: LocalDatabaseServer) -> bool:
    try:
        return replica.execute(f"SELECT COUNT(*) FROM {DATABASE}.ticks") == [(0,)]
    except pymysql.MySQLError:  # the table, or the database, is not there yet
        return False


def _watch(replica: LocalDatabaseServer, seen: list[float], stop: threading.Event) -> None:
    """Note when each number is first seen; asked about once a millisecond."""
    with closing(replica.connect(DATABASE, autocommit=True)) as connection, connection.cursor() as cursor:
        while not stop.is_set():
            cursor.execute("SELECT MAX(id) FROM ticks")
            newest = (cursor.fetchone() or (None,))[0]
            now = time.perf_counter()
            while newest is not None and len(seen) <= newest:
                seen.append(now)
            stop.wait(0.001)
