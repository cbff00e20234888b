"""The relay on loads that are not a shop's: hot rows, wide rows, large values, one transaction of a gigabyte.

Each is a backlog of its own, applied at full durability, contents compared; beside it native replication by one thread
and by four. The gigabyte is relayed by `shardkit relay run` in a process of its own, whose memory is measured.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pymysql

from shardkit.errors import MissingServer
from shardkit.gtid import Flavour, Position
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc.daemon import tune_process
from tests.benchmarks.relay_stage import (
    DATABASE,
    WAYS,
    arrived,
    contents,
    empty,
    end_of_log,
    native_seconds,
    relay_seconds,
    require_equal,
    row,
    servers,
    set_durability,
    single,
    single_and_best,
    wait_until,
)
from tests.relay_daemon import Daemon, map_text

MOST_MEGABYTES = 150.0  # of a hop's process


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Every load, on every kind of server that is here."""
    tune_process()
    scale = 0.02 if quick else 1.0
    rows: list[dict[str, Any]] = []
    for flavour in Flavour:
        try:
            with servers(flavour, 3) as (source, target, native):
                for name, make in _LOADS.items():
                    _backlog(source, make, scale)
                    rows += _compared(f"loads {flavour} {name}", source, target, native)
                _backlog(source, one_gigabyte, scale)
                rows += _in_a_process(f"loads {flavour} one transaction of 1 GB", source, target, native)
        except MissingServer as error:
            rows.append(row(f"loads {flavour}, not measured", error.message, ""))
    return rows


def _backlog(source: LocalDatabaseServer, make: Callable[[Any, float], None], scale: float) -> None:
    empty(source)
    set_durability(source, durable=False)
    with closing(source.connect(DATABASE, autocommit=True)) as connection, connection.cursor() as cursor:
        make(cursor, scale)
    set_durability(source, durable=True)


def _compared(
    label: str, source: LocalDatabaseServer, target: LocalDatabaseServer, native: LocalDatabaseServer
) -> Iterator[dict[str, Any]]:
    wanted, flavour = contents(source), Flavour(source.flavour)
    ours = relay_seconds(source, target)
    require_equal(wanted, target)
    yield row(f"{label}, relay", ours, "s")
    times: dict[str, float] = {}
    for name, settings in WAYS[flavour].items():
        times[name] = native_seconds(source, native, settings)
        require_equal(wanted, native)
    for name in single_and_best(times):
        yield row(f"{label}, x native {name}", times[name] / ours, "x", rival=f"{times[name]:.2f} s")


def _in_a_process(
    label: str, source: LocalDatabaseServer, target: LocalDatabaseServer, native: LocalDatabaseServer
) -> Iterator[dict[str, Any]]:
    wanted, end = contents(source), end_of_log(source)
    theirs = native_seconds(source, native, single(Flavour(source.flavour)))
    require_equal(wanted, native)
    empty(target)
    with tempfile.TemporaryDirectory() as directory:
        shard_map = Path(directory) / "map.yaml"
        shard_map.write_text(map_text("bench", [source.endpoint(DATABASE), target.endpoint(DATABASE)]))
        daemon = Daemon(f"file:{shard_map}", Path(directory) / "log")
        began = time.perf_counter()
        daemon.start()
        try:
            with closing(target.connect(DATABASE, autocommit=True)) as connection:
                wait_until(lambda: _has_arrived(connection, source, end))
            ours = time.perf_counter() - began
            peak = _peak_megabytes(daemon)
        finally:
            daemon.kill()
    require_equal(wanted, target)
    yield row(f"{label}, relay with its start", ours, "s")
    yield row(f"{label}, x native by one thread", theirs / ours, "x", rival=f"{theirs:.2f} s")
    yield row(f"{label}, memory of the relay's process", peak, "MB", most=MOST_MEGABYTES)


def _has_arrived(connection: Any, master: LocalDatabaseServer, end: Position) -> bool:
    with suppress(pymysql.ProgrammingError):  # the daemon has not made its tables yet
        return arrived(connection, master, end)
    return False


def _peak_megabytes(daemon: Daemon) -> float:
    """The most memory that the process has had resident."""
    assert daemon.process is not None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


# --- the loads


def hot_rows(cursor: Any, scale: float) -> None:
    """Ten rows, updated 100,000 times, each time in a transaction of its own."""
    cursor.execute("CREATE TABLE hot (id INT PRIMARY KEY, n BIGINT NOT NULL, note VARCHAR(40))")
    cursor.execute("INSERT INTO hot VALUES " + ", ".join(f"({number}, 0, 'row {number}')" for number in range(10)))
    for number in range(int(100_000 * scale)):
        cursor.execute(f"UPDATE hot SET n = n + 1 WHERE id = {number % 10}")


def wide_rows(cursor: Any, scale: float) -> None:
    """200 columns: 10,000 rows inserted one by one, and a column of each fourth updated."""
    dice = random.Random(2)
    kinds = ("INT", "BIGINT", "VARCHAR(30)", "DECIMAL(12,2)", "DATETIME(6)")
    columns = [f"c{number} {kinds[number % len(kinds)]}" for number in range(199)]
    cursor.execute(f"CREATE TABLE wide (id INT PRIMARY KEY, {', '.join(columns)})")
    values = [
        (str(dice.randrange(1 << 30)), str(dice.randrange(1 << 60)), "'a text of 20 letters'", "12345.67", "NOW(6)")
        for _ in range(50)
    ]
    for number in range(int(10_000 * scale)):
        chosen = [values[(number + column) % 50][column % len(kinds)] for column in range(199)]
        cursor.execute(f"INSERT INTO wide VALUES ({number}, {', '.join(chosen)})")
        if number % 4 == 0:
            cursor.execute(f"UPDATE wide SET c{number % 199} = NULL WHERE id = {number}")


def large_values(cursor: Any, scale: float) -> None:
    """300 values of 1 MB, a transaction each."""
    cursor.execute("CREATE TABLE documents (id INT PRIMARY KEY, body LONGBLOB NOT NULL)")
    for number in range(max(1, int(300 * scale))):
        cursor.execute(f"INSERT INTO documents VALUES ({number}, REPEAT(SHA2('{number}', 256), 16384))")


def one_gigabyte(cursor: Any, scale: float) -> None:
    """A million rows of 1,000 bytes in one transaction."""
    cursor.execute("CREATE TABLE seeds (n INT, body VARCHAR(1000))")
    cursor.execute("CREATE TABLE big (id INT PRIMARY KEY AUTO_INCREMENT, n INT, body VARCHAR(1000))")
    cursor.execute("INSERT INTO seeds VALUES (0, REPEAT('a', 1000))")
    for _ in range(10):
        cursor.execute("INSERT INTO seeds SELECT n, body FROM seeds")
    cursor.execute("BEGIN")
    for number in range(int(1024 * scale)):
        cursor.execute(f"INSERT INTO big (n, body) SELECT {number}, body FROM seeds")
    cursor.execute("COMMIT")


_LOADS: dict[str, Callable[[Any, float], None]] = {
    "10 rows updated 100,000 times": hot_rows,
    "rows of 200 columns": wide_rows,
    "values of 1 MB": large_values,
}
