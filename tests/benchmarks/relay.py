"""The relay against the servers' own replication, on one backlog, at equal durability, contents compared.

Catch-up: a source with a backlog of small transactions, and empty targets. Native replication is timed from when it has
fetched the whole log, which favours it; the relay from the start of its hop, which fetches while it applies.
Every ratio is of one run on one machine; the latency of its fsync stands beside: sharing it is part of the gain.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from decimal import Decimal
from typing import Any

from shardkit.errors import PreconditionFailed
from shardkit.gtid import Flavour, parse_position
from shardkit.testing import LocalMariaDB, LocalMySQL
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Role
from shardkit_cdc import own_schema
from shardkit_cdc.daemon import tune_process
from shardkit_cdc.relay import Hop, HopSpec, State
from shardkit_cdc.row_image import RowDecoder
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Assembler

TRANSACTIONS = 20_000
TRANSACTIONS_PER_SECOND = 300
DATABASE = "bench"
TABLES = ("accounts", "orders", "order_lines")
DEADLINE = 300.0  # seconds

_BUFFERS = {"innodb_buffer_pool_size": "256M"}
_MARIADB_OPTIONS = {**_BUFFERS, "innodb_log_file_size": "256M"}
_MYSQL_OPTIONS = {**_BUFFERS, "innodb_redo_log_capacity": "256M"}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Every measure of the relay. MySQL's are left out where there is no MySQL."""
    tune_process()
    count = int(os.environ.get("SHARDKIT_BENCH_TRANSACTIONS", "1000" if quick else str(TRANSACTIONS)))
    rows = [_row("relay fsync of 4 KiB, median", fsync_milliseconds(), "ms")]
    rows += _flavour(Flavour.MARIADB, count, seconds=2 if quick else 8)
    try:
        rows += _flavour(Flavour.MYSQL, count, seconds=2 if quick else 8)
    except PreconditionFailed as error:
        rows.append(_row("relay mysql, not measured", str(error.message), ""))
    return rows


def _flavour(flavour: Flavour, count: int, *, seconds: float) -> Iterator[dict[str, Any]]:
    settings: list[tuple[str, dict[str, object]]]
    if flavour is Flavour.MARIADB:
        settings = [
            ("1 thread", {"slave_parallel_threads": 0}),
            ("4 threads conservative", {"slave_parallel_threads": 4, "slave_parallel_mode": "conservative"}),
            ("4 threads optimistic", {"slave_parallel_threads": 4, "slave_parallel_mode": "optimistic"}),
        ]
    else:
        settings = [
            ("1 worker", {"replica_parallel_workers": 1}),
            ("4 workers", {"replica_parallel_workers": 4}),
        ]
    with servers(flavour, 4) as (source, target, native, last):
        make_backlog(source, count)
        contents = checksums(source)
        ours, theirs = decoded_per_second(source)
        label = f"relay {flavour} rows read and decoded"
        yield _row(label, ours, "rows/s")
        yield _row(f"{label}, x mysql-replication", ours / theirs, "x", 5.0, f"{theirs:.0f} rows/s")
        for durable in (True, False):
            relayed = relay_seconds(source, target, durable=durable)
            _require_equal(contents, target)
            times = {}
            for name, values in settings:
                times[name] = native_seconds(flavour, source, native, values, durable=durable)
                _require_equal(contents, native)
            single, *parallel = times.items()
            best = min(parallel, key=lambda each: each[1])
            label = f"relay {flavour} catch-up" + ("" if durable else ", durability off")
            yield _row(f"{label}, relay", count / relayed, "transactions/s", rival=f"{relayed:.2f} s")
            target_ratio = 4.0 if durable else None
            yield _row(f"{label}, x native {single[0]}", single[1] / relayed, "x", target_ratio, f"{single[1]:.2f} s")
            yield _row(f"{label}, x native {best[0]}", best[1] / relayed, "x", None, f"{best[1]:.2f} s (the best)")
        for name, latencies in latency(source, target, last, seconds=seconds).items():
            yield _row(
                f"relay {flavour} two hops at {TRANSACTIONS_PER_SECOND}/s, {name}",
                latencies,
                "ms",
                rival=None,
            )


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


def checksums(server: LocalDatabaseServer) -> list[tuple[Any, ...]]:
    return server.execute(f"CHECKSUM TABLE {', '.join(TABLES)}", database=DATABASE)


def _require_equal(contents: Sequence[tuple[Any, ...]], copy: LocalDatabaseServer) -> None:
    if checksums(copy) != list(contents):
        raise AssertionError(f"{copy.name} does not hold what the source holds: the figure would be worth nothing")


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


# --- the contestants


def relay_seconds(source: LocalDatabaseServer, target: LocalDatabaseServer, *, durable: bool) -> float:
    """From the start of a hop into an empty target until it has the source's last transaction."""
    empty(target)
    set_durability(target, durable=durable)
    own_schema.upgrade(target.endpoint(DATABASE), target.credentials)
    spec = HopSpec("bench", source.endpoint(DATABASE), target.endpoint(DATABASE), Role.STAGING, True)
    end = end_of_log(source)
    with closing(target.connect(DATABASE, autocommit=True)) as connection, connection.cursor() as cursor:

        def arrived() -> bool:
            cursor.execute("SELECT gtid FROM shardkit_position WHERE hop = 'history:bench'")
            found = cursor.fetchone()
            return found is not None and parse_position(flavour, found[0]).covers(end)

        flavour = Flavour(source.flavour)
        began = time.perf_counter()
        hop = Hop(spec, source.credentials, cluster="bench", runner="bench")
        with running(hop):
            wait_until(arrived, [hop])
            return time.perf_counter() - began


def native_seconds(
    flavour: Flavour,
    source: LocalDatabaseServer,
    target: LocalDatabaseServer,
    settings: dict[str, object],
    *,
    durable: bool,
) -> float:
    """From the start of the applying thread, with the whole log fetched, until the source's last transaction."""
    mariadb = flavour is Flavour.MARIADB
    replica = "SLAVE" if mariadb else "REPLICA"
    target.execute(f"STOP {replica}")
    target.execute(f"RESET {replica} ALL")
    empty(target)
    target.execute("RESET MASTER" if mariadb else "RESET BINARY LOGS AND GTIDS")
    target.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
    target.execute("RESET MASTER" if mariadb else "RESET BINARY LOGS AND GTIDS")
    set_durability(target, durable=durable)
    for name, value in settings.items():
        target.execute(f"SET GLOBAL {name} = %s", value)
    address = (source.host, source.port)
    end = str(end_of_log(source))
    if mariadb:
        target.execute("SET GLOBAL gtid_slave_pos = ''")
        target.execute(
            "CHANGE MASTER TO master_host = %s, master_port = %s, master_user = 'root', master_use_gtid = slave_pos",
            *address,
        )
    else:
        target.execute(
            "CHANGE REPLICATION SOURCE TO source_host = %s, source_port = %s, source_user = 'root', "
            "source_auto_position = 1, get_source_public_key = 1",
            *address,
        )
    target.execute(f"START {replica} IO_THREAD")
    wait_until(lambda: fetched(flavour, target, end))
    began = time.perf_counter()
    target.execute(f"START {replica} SQL_THREAD")
    wait = "MASTER_GTID_WAIT" if mariadb else "WAIT_FOR_EXECUTED_GTID_SET"
    outcome = target.execute(f"SELECT {wait}(%s, %s)", end, DEADLINE)
    seconds = time.perf_counter() - began
    if outcome != [(0,)]:
        raise AssertionError(f"native replication did not arrive: {target.execute(f'SHOW {replica} STATUS')}")
    target.execute(f"STOP {replica}")
    return seconds


def fetched(flavour: Flavour, target: LocalDatabaseServer, end: str) -> bool:
    """Whether native replication has the whole log on its side."""
    with closing(target.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW SLAVE STATUS" if flavour is Flavour.MARIADB else "SHOW REPLICA STATUS")
        row = cursor.fetchone()
        names = [column[0] for column in cursor.description]
    if row is None:
        return False
    name = "Gtid_IO_Pos" if flavour is Flavour.MARIADB else "Retrieved_Gtid_Set"
    return parse_position(flavour, row[names.index(name)]).covers(parse_position(flavour, end))


# --- steady state


def latency(
    source: LocalDatabaseServer, staging: LocalDatabaseServer, replica: LocalDatabaseServer, *, seconds: float
) -> dict[str, float]:
    """Milliseconds from a commit's return on the master until its row is seen on the replica, through two hops."""
    for server in (staging, replica):
        empty(server)
        set_durability(server, durable=True)
        server.execute("RESET MASTER" if Flavour(server.flavour) is Flavour.MARIADB else "RESET BINARY LOGS AND GTIDS")
    ends = [server.endpoint(DATABASE) for server in (source, staging, replica)]
    hops = [
        Hop(
            HopSpec("bench", ends[0], ends[1], Role.STAGING, True), source.credentials, cluster="bench", runner="bench"
        ),
        Hop(
            HopSpec("bench", ends[1], ends[2], Role.REPLICA, False), source.credentials, cluster="bench", runner="bench"
        ),
    ]
    source.execute("CREATE TABLE IF NOT EXISTS ticks (id INT PRIMARY KEY, note VARCHAR(100))", database=DATABASE)
    source.execute("TRUNCATE ticks", database=DATABASE)
    end = end_of_log(source)
    committed: list[float] = []
    seen: list[float] = []
    with ExitStack() as stack:
        for hop in hops:
            stack.enter_context(running(hop))
        wait_until(lambda: _reached(replica, end), hops)
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(replica, seen, stop))
        watcher.start()
        with closing(source.connect(DATABASE, autocommit=True)) as connection, connection.cursor() as cursor:
            began = time.perf_counter()
            for number in range(int(seconds * TRANSACTIONS_PER_SECOND)):
                pause = began + number / TRANSACTIONS_PER_SECOND - time.perf_counter()
                if pause > 0:
                    time.sleep(pause)  # the load's rate
                cursor.execute("INSERT INTO ticks VALUES (%s, REPEAT('t', 90))", (number,))
                committed.append(time.perf_counter())
        wait_until(lambda: len(seen) >= len(committed))
        stop.set()
        watcher.join()
    delays = sorted((visible - done) * 1000 for visible, done in zip(seen, committed, strict=False))
    return {"p50": statistics.median(delays), "p99": delays[int(len(delays) * 0.99)]}


def _reached(replica: LocalDatabaseServer, end: Any) -> bool:
    try:
        rows = replica.execute("SELECT gtid FROM shardkit_position WHERE hop = 'history:bench'", database=DATABASE)
    except Exception:  # noqa: BLE001 - the table is not there yet
        return False
    return bool(rows) and parse_position(Flavour(replica.flavour), rows[0][0]).covers(end)


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


# --- servers


@contextmanager
def servers(flavour: Flavour, count: int) -> Iterator[list[LocalDatabaseServer]]:
    with ExitStack() as stack:
        found: list[LocalDatabaseServer] = []
        for _ in range(count):
            server: LocalDatabaseServer = (
                LocalMariaDB(options=_MARIADB_OPTIONS, durable=True)
                if flavour is Flavour.MARIADB
                else LocalMySQL(options=_MYSQL_OPTIONS, durable=True)
            )
            found.append(stack.enter_context(server))
            server.execute(f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4")
        yield found


@contextmanager
def running(hop: Hop) -> Iterator[None]:
    thread = threading.Thread(target=hop.run)
    thread.start()
    try:
        yield
    finally:
        hop.stop()
        thread.join()
    if hop.report.state is not State.STOPPED:
        raise AssertionError(f"{hop.spec.name}: {hop.report.error}")


def empty(server: LocalDatabaseServer) -> None:
    server.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
    server.execute(f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4")


def set_durability(server: LocalDatabaseServer, *, durable: bool) -> None:
    server.execute(f"SET GLOBAL sync_binlog = {1 if durable else 0}")
    server.execute(f"SET GLOBAL innodb_flush_log_at_trx_commit = {1 if durable else 2}")


def end_of_log(server: LocalDatabaseServer) -> Any:
    flavour = Flavour(server.flavour)
    variable = "gtid_binlog_pos" if flavour is Flavour.MARIADB else "gtid_executed"
    return parse_position(flavour, str(server.execute(f"SELECT @@global.{variable}")[0][0]))


def wait_until(condition: Callable[[], bool], hops: Sequence[Hop] = ()) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        for hop in hops:
            if hop.report.state in {State.FAILED, State.FENCED, State.BLOCKED}:
                raise AssertionError(f"{hop.spec.name} is {hop.report.state}: {hop.report.error}")
        if time.monotonic() > end:
            raise AssertionError("the benchmark waits in vain")
        time.sleep(0.005)


def fsync_milliseconds(count: int = 50) -> float:
    """The median time of writing 4 KiB and syncing it, where the servers keep their data."""
    times = []
    with tempfile.TemporaryFile(buffering=0) as file:
        for _ in range(count):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def _row(
    name: str, value: float | str, unit: str, target: float | None = None, rival: str | None = None
) -> dict[str, Any]:
    shown = round(value, 2) if isinstance(value, float) else value
    return {
        "name": name,
        "value": shown,
        "unit": unit,
        "target": None if target is None else f">= {target}",
        "rival": rival,
        "ok": None if target is None or isinstance(value, str) else value >= target,
    }
