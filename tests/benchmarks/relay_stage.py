"""What the benchmarks of the relay share: servers of one durability, and the two contestants on one backlog.

Native replication is timed from when it has fetched the whole log, which favours it; the relay from the start of its
hop, which fetches while it applies. Neither uses TLS. A figure counts only if the copy holds what the source holds.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from shardkit.gtid import Flavour, Position, parse_position
from shardkit.testing import LocalMariaDB, LocalMySQL
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Role
from shardkit_cdc import own_schema
from shardkit_cdc.relay import Hop, HopSpec, State

DATABASE = "bench"
DEADLINE = 300.0  # seconds

_BUFFERS = {"innodb_buffer_pool_size": "256M"}
_MARIADB_OPTIONS = {**_BUFFERS, "innodb_log_file_size": "256M"}
_MYSQL_OPTIONS = {**_BUFFERS, "innodb_redo_log_capacity": "256M", "tls_version": ""}

Settings = Mapping[str, object]
#: Native replication as it is compared with: by one thread, then the ways to use four.
WAYS: Mapping[Flavour, Mapping[str, Settings]] = {
    Flavour.MARIADB: {
        "1 thread": {"slave_parallel_threads": 0},
        "4 threads conservative": {"slave_parallel_threads": 4, "slave_parallel_mode": "conservative"},
        "4 threads optimistic": {"slave_parallel_threads": 4, "slave_parallel_mode": "optimistic"},
    },
    Flavour.MYSQL: {
        "1 worker": {"replica_parallel_workers": 1},
        "4 workers": {"replica_parallel_workers": 4},
    },
}


def single(flavour: Flavour) -> Settings:
    """One applying thread."""
    return next(iter(WAYS[flavour].values()))


def single_and_best(times: Mapping[str, float]) -> tuple[str, str]:
    """Of the seconds that each of the `WAYS` took: the name of the single-threaded one, and of the best other one."""
    first, *others = times
    return first, min(others, key=lambda name: times[name])


# --- servers


@contextmanager
def servers(flavour: Flavour, count: int) -> Iterator[list[LocalDatabaseServer]]:
    """So many servers at full durability, each with an empty database.

    :raises MissingServer: where there is no such server.
    """
    with ExitStack() as stack:
        found: list[LocalDatabaseServer] = []
        for _ in range(count):
            server: LocalDatabaseServer = (
                LocalMariaDB(options=_MARIADB_OPTIONS, durable=True)
                if flavour is Flavour.MARIADB
                else LocalMySQL(options=_MYSQL_OPTIONS, durable=True)
            )
            found.append(stack.enter_context(server))
            empty(server)
        yield found


def empty(server: LocalDatabaseServer) -> None:
    """Nothing in the database, and a log that begins with it."""
    server.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
    forget_log(server)
    server.execute(f"CREATE DATABASE {DATABASE} CHARACTER SET utf8mb4")


def forget_log(server: LocalDatabaseServer) -> None:
    """Begin the server's log anew."""
    server.execute("RESET MASTER" if Flavour(server.flavour) is Flavour.MARIADB else "RESET BINARY LOGS AND GTIDS")


def set_durability(server: LocalDatabaseServer, *, durable: bool) -> None:
    """Sync every commit, or none."""
    server.execute(f"SET GLOBAL sync_binlog = {1 if durable else 0}")
    server.execute(f"SET GLOBAL innodb_flush_log_at_trx_commit = {1 if durable else 2}")


def end_of_log(server: LocalDatabaseServer) -> Position:
    """The position of the server's last transaction."""
    flavour = Flavour(server.flavour)
    variable = "gtid_binlog_pos" if flavour is Flavour.MARIADB else "gtid_executed"
    return parse_position(flavour, str(server.execute(f"SELECT @@global.{variable}")[0][0]))


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


# --- contents


def contents(server: LocalDatabaseServer) -> list[tuple[Any, ...]]:
    """A checksum of each table, shardkit's own left out."""
    tables = server.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = %s "
        "AND table_name NOT LIKE 'shardkit%%' ORDER BY table_name",
        DATABASE,
    )
    return server.execute(f"CHECKSUM TABLE {', '.join(name for (name,) in tables)}", database=DATABASE)


def require_equal(wanted: Sequence[tuple[Any, ...]], copy: LocalDatabaseServer) -> None:
    """:raises AssertionError: for a copy that holds something else."""
    if contents(copy) != list(wanted):
        raise AssertionError(f"{copy.name} does not hold what the source holds: the figure would be worth nothing")


# --- the relay


def hop_between(
    source: LocalDatabaseServer, target: LocalDatabaseServer, *, role: Role = Role.STAGING, reads_master: bool = True
) -> Hop:
    """A hop, not yet running."""
    spec = HopSpec("bench", source.endpoint(DATABASE), target.endpoint(DATABASE), role, reads_master)
    return Hop(spec, source.credentials, cluster="bench", runner="bench")


@contextmanager
def running(hop: Hop) -> Iterator[None]:
    """The hop at work in a thread."""
    thread = threading.Thread(target=hop.run)
    thread.start()
    try:
        yield
    finally:
        hop.stop()
        thread.join()
    if hop.report.state is not State.STOPPED:
        raise AssertionError(f"{hop.spec.name}: {hop.report.error}")


def relay_seconds(source: LocalDatabaseServer, target: LocalDatabaseServer, *, durable: bool = True) -> float:
    """From the start of a hop into an empty target until it has the source's last transaction."""
    empty(target)
    set_durability(target, durable=durable)
    own_schema.upgrade(target.endpoint(DATABASE), target.credentials)
    end = end_of_log(source)
    with closing(target.connect(DATABASE, autocommit=True)) as connection:
        began = time.perf_counter()
        hop = hop_between(source, target)
        with running(hop):
            wait_until(lambda: arrived(connection, source, end), [hop])
            return time.perf_counter() - began


def arrived(connection: Any, master: LocalDatabaseServer, end: Position) -> bool:
    """Whether the relay has brought the target at the connection's other end to a position of the master's log."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT gtid FROM shardkit_position WHERE hop = 'history:bench'")
        found = cursor.fetchone()
    return found is not None and parse_position(Flavour(master.flavour), found[0]).covers(end)


def wait_until(condition: Callable[[], bool], hops: Sequence[Hop] = (), *, seconds: float = DEADLINE) -> None:
    """:raises AssertionError: when a hop ends, or the time does."""
    end = time.monotonic() + seconds
    while not condition():
        for hop in hops:
            if hop.report.state in {State.FAILED, State.FENCED, State.BLOCKED}:
                raise AssertionError(f"{hop.spec.name} is {hop.report.state}: {hop.report.error}")
        if time.monotonic() > end:
            raise AssertionError("the benchmark waits in vain")
        time.sleep(0.005)


# --- native replication


def native_seconds(
    source: LocalDatabaseServer, target: LocalDatabaseServer, settings: Settings, *, durable: bool = True
) -> float:
    """From the start of the applying threads, with the whole log fetched, until the source's last transaction."""
    flavour = Flavour(source.flavour)
    set_durability(target, durable=durable)
    attach(source, target, settings)
    replica, end = _replica(flavour), end_of_log(source)
    target.execute(f"START {replica} IO_THREAD")
    wait_until(lambda: _fetched(flavour, target, end))
    began = time.perf_counter()
    target.execute(f"START {replica} SQL_THREAD")
    wait = "MASTER_GTID_WAIT" if flavour is Flavour.MARIADB else "WAIT_FOR_EXECUTED_GTID_SET"
    outcome = target.execute(f"SELECT {wait}(%s, %s)", str(end), DEADLINE)
    seconds = time.perf_counter() - began
    if outcome != [(0,)]:
        raise AssertionError(f"native replication did not arrive: {target.execute(f'SHOW {replica} STATUS')}")
    target.execute(f"STOP {replica}")
    return seconds


def attach(source: LocalDatabaseServer, target: LocalDatabaseServer, settings: Settings) -> None:
    """Make an emptied server a native replica, from the source's first transaction on; not started."""
    flavour = Flavour(source.flavour)
    detach(target)
    target.execute(f"DROP DATABASE IF EXISTS {DATABASE}")
    forget_log(target)
    for name, value in settings.items():
        target.execute(f"SET GLOBAL {name} = %s", value)
    if flavour is Flavour.MARIADB:
        target.execute("SET GLOBAL gtid_slave_pos = ''")
        target.execute(
            "CHANGE MASTER TO master_host = %s, master_port = %s, master_user = 'root', master_use_gtid = slave_pos",
            source.host,
            source.port,
        )
    else:
        target.execute(
            "CHANGE REPLICATION SOURCE TO source_host = %s, source_port = %s, source_user = 'root', "
            "source_auto_position = 1, source_ssl = 0, get_source_public_key = 1",
            source.host,
            source.port,
        )


def start(target: LocalDatabaseServer) -> None:
    """Let a native replica go."""
    target.execute(f"START {_replica(Flavour(target.flavour))}")


def detach(target: LocalDatabaseServer) -> None:
    """End native replication into a server; its data stays."""
    replica = _replica(Flavour(target.flavour))
    target.execute(f"STOP {replica}")
    target.execute(f"RESET {replica} ALL")


def _replica(flavour: Flavour) -> str:
    return "SLAVE" if flavour is Flavour.MARIADB else "REPLICA"


def _fetched(flavour: Flavour, target: LocalDatabaseServer, end: Position) -> bool:
    """Whether native replication has the whole log on its side."""
    with closing(target.connect()) as connection, connection.cursor() as cursor:
        cursor.execute(f"SHOW {_replica(flavour)} STATUS")
        row = cursor.fetchone()
        names = [column[0] for column in cursor.description]
    if row is None:
        return False
    name = "Gtid_IO_Pos" if flavour is Flavour.MARIADB else "Retrieved_Gtid_Set"
    return parse_position(flavour, row[names.index(name)]).covers(end)


# --- rows of the table


def row(
    name: str,
    value: float | str,
    unit: str,
    *,
    least: float | None = None,
    most: float | None = None,
    rival: str | None = None,
) -> dict[str, Any]:
    """One measure.

    :param least: the target, for what should be large.
    :param most: the target, for what should be small.
    """
    target, ok = None, None
    if least is not None and not isinstance(value, str):
        target, ok = f">= {least:g}", value >= least
    if most is not None and not isinstance(value, str):
        target, ok = f"<= {most:g}", value <= most
    shown = round(value, 2) if isinstance(value, float) else value
    return {"name": name, "value": shown, "unit": unit, "target": target, "rival": rival, "ok": ok}
