"""kill -9 of the relay in the middle of a mixed load, over both hops, and at the moments that hurt."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pymysql
import pytest

from shardkit.failover import make_plan, promote
from shardkit.gtid import Flavour
from shardkit.mapstore import open_store
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc.seed import seed
from tests.relay_chain import Chain
from tests.relay_daemon import Daemon, map_of

pytest_plugins = ["tests.relay_fixtures"]

logger = logging.getLogger(__name__)

KILLS = int(os.environ.get("SHARDKIT_TEST_KILLS", "6"))


@pytest.fixture
def daemons() -> Iterator[list[Daemon]]:
    started: list[Daemon] = []
    yield started
    for daemon in started:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.signal(signal.SIGCONT)
            daemon.kill()


class Load:
    """Transactions of many kinds on the master, from a thread, until stopped. Not one of them may be run twice."""

    def __init__(self, chain: Chain, seed: int) -> None:
        self._chain = chain
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        #: Whether tables are changed, too.
        self.schema_changes = True
        self.transactions = 0
        self.error: Exception | None = None

    def start(self) -> None:
        self._chain.sql(
            "CREATE TABLE accounts (id INT PRIMARY KEY, balance BIGINT NOT NULL)",
            "INSERT INTO accounts VALUES " + ", ".join(f"({number}, 1000)" for number in range(100)),
            "CREATE TABLE ledger (id BIGINT PRIMARY KEY AUTO_INCREMENT, account INT, amount INT, note VARCHAR(200))",
            "CREATE TABLE loose (n INT)",
            "CREATE TABLE side (n INT)",
        )
        self._thread.start()

    def go_on(self) -> None:
        """After a stop, on what is the chain's master now."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        kinds: Sequence[Callable[[pymysql.cursors.Cursor], None]] = (
            [self._transfer] * 60
            + [self._loose] * 25
            + [self._big] * 2
            + [self._in_parts]
            + [self._xa] * 4
            + [self._schema] * 4
        )
        connection = self._chain.master.connect(self._chain.database)
        try:
            with connection, connection.cursor() as cursor:
                while not self._stop.is_set():
                    self._random.choice(kinds)(cursor)
                    connection.commit()
                    self.transactions += 1
                    self._stop.wait(0.002)
        except Exception as error:  # noqa: BLE001 - raised again by stop()
            self.error = error

    def _transfer(self, cursor: pymysql.cursors.Cursor) -> None:
        giver, taker = self._random.sample(range(100), 2)
        amount = self._random.randint(1, 9)
        cursor.execute("UPDATE accounts SET balance = balance - %s WHERE id = %s", (amount, giver))
        cursor.execute("UPDATE accounts SET balance = balance + %s WHERE id = %s", (amount, taker))
        cursor.execute(
            "INSERT INTO ledger (account, amount) VALUES (%s, %s), (%s, %s)", (giver, -amount, taker, amount)
        )

    def _loose(self, cursor: pymysql.cursors.Cursor) -> None:
        cursor.execute("INSERT INTO loose VALUES (%s)", (self._random.randint(1, 1000),))

    def _big(self, cursor: pymysql.cursors.Cursor) -> None:
        cursor.execute(
            "INSERT INTO ledger (account, amount, note) SELECT id, 0, REPEAT('b', 200) FROM accounts "
            "CROSS JOIN (SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) AS three"
        )

    def _in_parts(self, cursor: pymysql.cursors.Cursor) -> None:
        """More than the relay takes in one piece: it streams the transaction."""
        if not cursor.execute("DELETE FROM ledger WHERE note = REPEAT('p', 200)"):
            cursor.execute(
                "INSERT INTO ledger (account, amount, note) SELECT one.id, 0, REPEAT('p', 200) FROM accounts AS one "
                "CROSS JOIN accounts AS two CROSS JOIN (SELECT 1 UNION ALL SELECT 2) AS three"
            )

    def _xa(self, cursor: pymysql.cursors.Cursor) -> None:
        xid = f"x{self._random.getrandbits(40):x}"
        for statement in (
            f"XA START '{xid}'",
            "INSERT INTO loose VALUES (-1)",
            f"XA END '{xid}'",
            f"XA PREPARE '{xid}'",
        ):
            cursor.execute(statement)
        cursor.execute(f"XA {self._random.choice(['COMMIT', 'ROLLBACK'])} '{xid}'")

    def _schema(self, cursor: pymysql.cursors.Cursor) -> None:
        if not self.schema_changes:
            return
        column = f"c{self._random.getrandbits(32)}"
        for statement in self._random.choice(
            [
                [f"ALTER TABLE side ADD {column} INT DEFAULT 1", "INSERT INTO side (n) VALUES (1)"],
                ["TRUNCATE side", "INSERT INTO side (n) VALUES (2)"],
                [f"CREATE TABLE {column} AS SELECT * FROM side", f"RENAME TABLE {column} TO r{column}"],
                [f"ALTER TABLE loose ADD INDEX {column} (n)", f"ALTER TABLE loose DROP INDEX {column}"],
            ]
        ):
            cursor.execute(statement)


@pytest.mark.parametrize("path", ["raw", "sql"])
def test_killed_in_the_middle_of_a_mixed_load(chain: Chain, tmp_path: Path, daemons: list[Daemon], path: str) -> None:
    seed = random.randrange(10**9)
    logger.info("seed %d", seed)  # shown when the test fails
    dice = random.Random(seed)
    daemon = Daemon(map_of(chain, tmp_path / "map.yaml"), tmp_path / "relay.log", "--apply", path)
    daemons.append(daemon)
    chain.story = lambda: f"the daemon says {daemon.log()[-3000:]}"
    load = Load(chain, seed)
    load.start()
    try:
        for _ in range(KILLS if path == "raw" else (KILLS + 1) // 2):
            daemon.start()
            daemon.wait_for_log(*(f"hop {spec.name}: running" for spec in chain.specs))
            threading.Event().wait(dice.uniform(0, 0.7))  # the moment of the kill is the test's random input
            daemon.kill()
    finally:
        load.stop()
    assert load.transactions > 100
    daemon.start()
    chain.settle()
    chain.assert_equal()
    balance = chain.last.execute("SELECT SUM(balance) FROM accounts", database=chain.database)
    assert balance == [(100_000,)]
    # SIGTERM drains and ends well.
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.log()[-2000:]
    assert "Traceback" not in daemon.log()


def test_a_stopped_process_that_wakes_up_finds_itself_fenced(
    pair: Chain, tmp_path: Path, daemons: list[Daemon]
) -> None:
    source = map_of(pair, tmp_path / "map.yaml")
    sleeper, successor = Daemon(source, tmp_path / "sleeper.log"), Daemon(source, tmp_path / "successor.log")
    daemons += [sleeper, successor]
    running = f"hop {pair.specs[0].name}: running"
    sleeper.start()
    sleeper.wait_for_log(running)
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()
    sleeper.signal(signal.SIGSTOP)
    pair.sql("INSERT INTO t VALUES (2)")
    successor.start()
    successor.wait_for_log(running)
    pair.sql("INSERT INTO t VALUES (3)")
    pair.settle()
    sleeper.signal(signal.SIGCONT)
    assert sleeper.wait() == 1
    assert "another runner has taken over" in sleeper.log()
    assert "Traceback" not in sleeper.log()
    pair.sql("INSERT INTO t VALUES (4)")
    pair.settle()
    pair.assert_equal()


# --- the long run: relay and targets, inside COMMIT and inside DDL too

SOAK_KILLS = int(os.environ.get("SHARDKIT_TEST_SOAK_KILLS", "110"))
#: Seconds that a moment is waited for; the kill comes then all the same.
PATIENCE = 2.0

#: A moment -> how the relay's statement of that moment begins.
MOMENTS = {"inside COMMIT": ("COMMIT",), "inside DDL": ("ALTER", "CREATE", "TRUNCATE", "RENAME"), "at random": ()}


class Misfortune:
    """Kills relays and targets at chosen moments, and counts what was met.

    :param daemon: the relay of the chain.
    """

    def __init__(self, chain: Chain, daemon: Daemon, dice: random.Random) -> None:
        self._chain = chain
        self._daemon = daemon
        self._dice = dice
        self.met: Counter[str] = Counter()

    def kill_relay(self, target: LocalDatabaseServer) -> None:
        """Kill the relay when it is in the chosen moment at the target."""
        self._wait_for_moment("relay", target)
        self._daemon.kill()

    def kill_server(self, target: LocalDatabaseServer) -> None:
        """Kill the target and start it again; the relay goes on by itself."""
        self._wait_for_moment("server", target)
        target.kill()
        target.start()

    def _wait_for_moment(self, who: str, target: LocalDatabaseServer) -> None:
        moment = self._dice.choice(list(MOMENTS))
        if not MOMENTS[moment]:
            time.sleep(self._dice.uniform(0, 0.7))
        elif not self._seen(target, MOMENTS[moment]):
            moment = "missed"
        self.met[f"{who} {moment}"] += 1

    def _seen(self, target: LocalDatabaseServer, begins: tuple[str, ...]) -> bool:
        connection = target.connect(autocommit=True)
        end = time.monotonic() + PATIENCE
        with connection, connection.cursor() as cursor:
            while time.monotonic() < end:
                cursor.execute(
                    "SELECT info FROM information_schema.processlist WHERE db = %s AND command = 'Query'",
                    (self._chain.database,),
                )
                if any((info or "").upper().startswith(begins) for (info,) in cursor.fetchall()):
                    return True
        return False


def promote_the_replica(chain: Chain, source: str) -> None:
    """master -> staging -> replica becomes replica -> staging -> master, which is filled anew."""
    credentials = chain.master.credentials
    with closing(open_store(source)) as store:
        plan = make_plan(store.load(), chain.shard, credentials, wanted=chain.last.endpoint(chain.database).url)
        done = promote(store, credentials, plan)
        assert done.follow == (chain.servers[1].endpoint(chain.database).url,)
        chain.servers.reverse()
        if chain.flavour is Flavour.MYSQL:
            chain.last.execute("SET GLOBAL super_read_only = 0")
        chain.last.execute("SET GLOBAL read_only = 0")
        chain.last.execute(f"DROP DATABASE {chain.database}")
        chain.last.execute(f"CREATE DATABASE {chain.database} CHARACTER SET utf8mb4")
        seed(chain.specs[1], credentials, confirm=lambda _found: None, patience=60.0)
        current = store.load()
        shard = replace(current.shard(chain.shard), replicas=(chain.last.endpoint(chain.database),))
        store.publish(current.with_shards({chain.shard: shard}), expected_version=current.version)


@pytest.mark.soak
def test_relay_and_targets_are_killed_again_and_again(
    own_chain: Chain, tmp_path: Path, daemons: list[Daemon], record_property: pytest.RecordProperty
) -> None:
    chain = own_chain
    number = random.randrange(10**9)
    logger.info("seed %d", number)  # shown when the test fails
    dice = random.Random(number)
    source = map_of(chain, tmp_path / "map.yaml")
    daemon = Daemon(source, tmp_path / "relay.log")
    daemons.append(daemon)
    chain.story = lambda: f"the daemon says {daemon.log()[-3000:]}"
    luck = Misfortune(chain, daemon, dice)
    load = Load(chain, number)
    load.start()
    staging_filled = promoted = False
    try:
        for turn in range(SOAK_KILLS):
            daemon.start()
            if turn == SOAK_KILLS * 3 // 4:
                load.stop()
                chain.settle()
                promote_the_replica(chain, source)
                load.go_on()
                promoted = True
            daemon.wait_for_log(*(f"hop {spec.name}: running" for spec in chain.specs))
            target = dice.choice(chain.servers[1:])
            if turn % 5 == 4:
                luck.kill_server(target)
            luck.kill_relay(target)
            if turn >= SOAK_KILLS // 2 and not staging_filled:
                # Staging is replaced by one with another log; the replica finds its place in it.
                load.schema_changes = False
                time.sleep(1)  # the one that may be under way comes to its end
                seed(chain.specs[0], chain.master.credentials, confirm=lambda _found: None, patience=60.0)
                load.schema_changes = staging_filled = True
    finally:
        load.stop()
    daemon.start()
    chain.settle()
    chain.assert_equal()
    assert chain.last.execute("SELECT SUM(balance) FROM accounts", database=chain.database) == [(100_000,)]
    assert staging_filled
    assert promoted
    assert sum(count for what, count in luck.met.items() if what.startswith("relay")) == SOAK_KILLS
    assert sum(count for what, count in luck.met.items() if what.startswith("server")) == SOAK_KILLS // 5
    for moment in ("inside COMMIT", "inside DDL"):
        assert luck.met[f"relay {moment}"] >= SOAK_KILLS // 20, luck.met
    logger.warning("%d transactions, %s", load.transactions, dict(luck.met))
    record_property("kills", dict(luck.met))
