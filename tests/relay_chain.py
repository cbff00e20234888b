"""Master, staging and replica for the relay's tests, on a database of its own per test.

The fixtures are in `tests.relay_fixtures`: name that module in ``pytest_plugins``.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pymysql
import pytest

from shardkit.gtid import Flavour, Position, parse_position
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Role
from shardkit_cdc.heartbeat import Heartbeat
from shardkit_cdc.relay import Hop, HopOptions, HopSpec, State

DEADLINE = 60.0  # seconds: generous, only a hang reaches it


def wait_for(condition: Callable[[], bool], what: str | Callable[[], str], *, deadline: float = DEADLINE) -> None:
    """Wait until the condition holds; fail with ``what`` when it does not in time."""
    end = time.monotonic() + deadline
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what if isinstance(what, str) else what()}: not within {deadline:.0f} s")
        time.sleep(0.02)


def relay_command(*words: str, password: str = "", seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run ``shardkit relay ...`` in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", "from shardkit.cli import main; main()", "relay", *words],
        env=os.environ | {"SHARDKIT_USER": "root", "SHARDKIT_PASSWORD": password},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


class Chain:
    """master -> staging -> replica on one database, relayed by threads of the test process.

    :param servers: as many as there are links, plus one.
    """

    def __init__(self, servers: Sequence[LocalDatabaseServer], database: str) -> None:
        self.servers = list(servers)
        self.database = database
        self.flavour = Flavour(servers[0].flavour)
        self.shard = "shop-0"
        self.hops: list[Hop] = []
        self._tasks: list[tuple[Hop | Heartbeat, threading.Thread]] = []
        self.options = HopOptions(retry_seconds=(0.05, 0.5))
        self.story: Callable[[], str] = lambda: f"hops: {[hop.report for hop in self.hops]}"

    @property
    def master(self) -> LocalDatabaseServer:
        return self.servers[0]

    @property
    def last(self) -> LocalDatabaseServer:
        return self.servers[-1]

    @property
    def specs(self) -> list[HopSpec]:
        ends = [server.endpoint(self.database) for server in self.servers]
        roles = [Role.STAGING, Role.REPLICA]
        return [
            HopSpec(self.shard, source, target, roles[min(index, 1)], index == 0)
            for index, (source, target) in enumerate(itertools.pairwise(ends))
        ]

    def hop(self, index: int, **changes: object) -> Hop:
        """One hop, not started."""
        settings: dict[str, object] = {"cluster": "test", "runner": "pytest", "options": self.options}
        return Hop(self.specs[index], self.master.credentials, **settings | changes)

    def start(self) -> None:
        """Start all hops."""
        for index in range(len(self.servers) - 1):
            self.run(self.hop(index))

    def run(self, hop: Hop) -> None:
        self.hops.append(hop)
        self.run_task(hop)

    def run_task(self, task: Hop | Heartbeat) -> None:
        """Run a hop or a heartbeat in a thread, until `stop`."""
        thread = threading.Thread(target=task.run)
        thread.start()
        self._tasks.append((task, thread))

    def stop(self) -> None:
        """Stop all hops and wait for them."""
        for task, _ in self._tasks:
            task.stop()
        for task, thread in self._tasks:
            thread.join(DEADLINE)
            assert not thread.is_alive(), f"{task} does not end"
        self.hops.clear()
        self._tasks.clear()

    def sql(self, *statements: str, server: LocalDatabaseServer | None = None) -> None:
        """Run statements in the database, each committed by itself; on the master by default."""
        connection = (server or self.master).connect(self.database, autocommit=True)
        try:
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
        finally:
            connection.close()

    def end_of_log(self, server: LocalDatabaseServer | None = None) -> Position:
        variable = "gtid_binlog_pos" if self.flavour is Flavour.MARIADB else "gtid_executed"
        return parse_position(self.flavour, str((server or self.master).execute(f"SELECT @@global.{variable}")[0][0]))

    def reached(self, server: LocalDatabaseServer) -> Position:
        """The master position that a server's data has."""
        rows = server.execute(
            "SELECT gtid FROM shardkit_position WHERE hop = %s", f"history:{self.shard}", database=self.database
        )
        return parse_position(self.flavour, rows[0][0] if rows else "")

    def reached_or_none(self, server: LocalDatabaseServer) -> Position | None:
        """As `reached`; None as long as there is nothing."""
        try:
            position = self.reached(server)
        except pymysql.MySQLError:
            return None
        return position if str(position) else None

    def settle(self, deadline: float = DEADLINE) -> None:
        """Wait until the last server has everything that the master's log holds for the database.

        A last own transaction carries the position over other databases' ones, which do not move it by themselves.
        """
        self.sql(
            "CREATE TABLE IF NOT EXISTS settled (id INT PRIMARY KEY AUTO_INCREMENT)", "INSERT INTO settled VALUES ()"
        )
        end = self.end_of_log()

        # One connection for all the asking: a new one each time would be most of the test's work.
        connection = self.last.connect(self.database, autocommit=True)
        with connection, connection.cursor() as cursor:

            def arrived() -> bool:
                for hop in self.hops:
                    if hop.report.state in {State.FAILED, State.FENCED, State.BLOCKED}:
                        pytest.fail(f"{hop.spec.name} is {hop.report.state}: {hop.report.error}")
                try:
                    cursor.execute("SELECT gtid FROM shardkit_position WHERE hop = %s", (f"history:{self.shard}",))
                except pymysql.MySQLError:
                    return False  # the table is not there yet
                found = cursor.fetchone()
                return found is not None and parse_position(self.flavour, found[0]).covers(end)

            wait_for(arrived, lambda: f"{self.last.name} reaches {end}; {self.story()}", deadline=deadline)

    def contents(self, server: LocalDatabaseServer) -> Mapping[str, tuple[object, ...]]:
        """Every table, view and routine with its definition and, of tables, its checksum; shardkit's own left out."""
        connection = server.connect(self.database, autocommit=True)
        with connection, connection.cursor() as cursor:

            def ask(statement: str, *values: object) -> tuple[tuple[Any, ...], ...]:
                cursor.execute(statement, values)
                return cursor.fetchall()

            return {**_tables(ask, self.database), **_programs(ask, self.database)}

    def assert_equal(self) -> None:
        """Every server holds what the master holds."""
        expected = self.contents(self.master)
        assert expected, "the master has no tables: nothing would be compared"
        for server in self.servers[1:]:
            found = self.contents(server)
            different = {name: (expected.get(name), found.get(name)) for name in expected.keys() | found.keys()}
            assert found == expected, (
                f"{server.name}: { {n: pair for n, pair in different.items() if pair[0] != pair[1]} }"
            )

    def failed(self, index: int = 0) -> BaseException:
        """Wait until a hop has stopped by itself, and give its error."""
        hop = self.hops[index]
        wait_for(lambda: hop.report.state in {State.FAILED, State.FENCED, State.BLOCKED}, f"{hop.spec.name} stops")
        assert hop.report.error is not None
        return hop.report.error


_AUTO_INCREMENT = re.compile(r" AUTO_INCREMENT=\d+")


def _tables(ask: Callable[..., tuple[tuple[Any, ...], ...]], database: str) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for name, kind in ask(
        "SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = %s", database
    ):
        quoted = "`" + name.replace("`", "``") + "`"
        if name.startswith("shardkit_"):
            continue
        if kind == "VIEW":
            found[name] = ask(f"SHOW CREATE VIEW {quoted}")[0][1:2]
            continue
        created = ask(f"SHOW CREATE TABLE {quoted}")[0][1]
        if kind == "SEQUENCE":
            found[name] = (created,)
            continue
        # The next number is not in the log: a copy knows of those that rows have.
        found[name] = (_AUTO_INCREMENT.sub("", created), ask(f"CHECKSUM TABLE {quoted}")[0][1])
    return found


def _programs(ask: Callable[..., tuple[tuple[Any, ...], ...]], database: str) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for kind, name, body in ask(
        "SELECT routine_type, routine_name, routine_definition FROM information_schema.routines "
        "WHERE routine_schema = %s",
        database,
    ):
        found[f"{kind} {name}"] = (body,)
    for name, event, table, action in ask(
        "SELECT trigger_name, event_manipulation, event_object_table, action_statement "
        "FROM information_schema.triggers WHERE trigger_schema = %s",
        database,
    ):
        found[f"trigger {name}"] = (event, table, action)
    return found


_numbers = itertools.count(1)


def chain_over(links: Sequence[LocalDatabaseServer]) -> Iterator[Chain]:
    """A chain over these servers on a new database, dropped afterwards. For fixtures to yield from."""
    database = f"relay_{next(_numbers)}"
    for server in links:
        server.execute(f"CREATE DATABASE {database} CHARACTER SET utf8mb4")
    chain = Chain(links, database)
    try:
        yield chain
    finally:
        chain.stop()
        for server in links:
            if server.running:
                _forget_prepared(server)
                server.execute(f"DROP DATABASE IF EXISTS {database}")


def _forget_prepared(server: LocalDatabaseServer) -> None:
    """Roll back the branches that a failed test left prepared: their locks would hold up DROP DATABASE for ever."""
    for format_id, length, _, data in server.execute("XA RECOVER"):
        raw = data if isinstance(data, bytes) else data.encode("latin-1")
        server.execute(f"XA ROLLBACK X'{raw[:length].hex()}',X'{raw[length:].hex()}',{format_id}")
