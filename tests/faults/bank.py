"""A bank over two servers, whose clients can be struck at any packet of a commit.

Every transfer takes from an account on one server, adds to one on the other, and writes a ledger row on both: so that
what the servers hold can be told from outside, whatever the client believes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Self

import pymysql
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shardkit import create_cluster, fixed, own_tables, sessionmaker
from shardkit.decisions import Janitor, prepared_branches
from shardkit.errors import CommitPending, CommitUnknown, PartialCommit, ShardkitError
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalMariaDB, LocalMySQL, TcpProxy
from shardkit.testing.database import LocalDatabaseServer
from shardkit.testing.proxy import Action, Direction
from tests.conftest import FLAVOUR

SHARDS = ("north", "south")
ACCOUNTS = 100
#: Of all accounts of a server together.
BALANCE = 1_000_000
#: Seconds between two passes of the janitor.
PERIOD = 0.25
#: Passes within which a branch that was left prepared is gone: seen, ended; one more where its owner had to be killed.
PASSES = 4
PATIENCE = 60.0  # seconds
_CLIENTS = 4


class Base(DeclarativeBase):
    """The bank's tables."""


class Account(Base):
    """Some on each server."""

    __tablename__ = "accounts"
    region: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    amount: Mapped[int]


class Ledger(Base):
    """Each transfer, on both servers."""

    __tablename__ = "ledger"
    region: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    transfer: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


# --- the client, in a process of its own -------------------------------------------------------------------------


def client(pipe: Connection, document: dict[str, Any], mode: str) -> None:
    """Make the transfers that are asked for: says ``flushed`` before the commit, waits, then says how it ended."""
    with create_cluster(ShardMap.parse(document), credentials=fixed("root")) as cluster:
        factory = sessionmaker(cluster, transactions=mode)
        while True:
            try:
                number, hold = pipe.recv()
            except EOFError:
                return

            def before_commit(hold: bool = hold) -> None:
                if hold:
                    pipe.send("flushed")
                    pipe.recv()

            pipe.send(transfer(factory(), number, before_commit))


def transfer(session: Session, number: int, before_commit: Callable[[], None] = lambda: None) -> str:
    """One transfer: ``ok``, ``pending``, ``failed`` (nothing of it is durable), ``unknown`` or ``partial``."""
    try:
        with session:
            ways = ((0, -1), (1, 1))
            for region, change in ways if number % 2 else reversed(ways):
                account = (region, number * (3 + region) % ACCOUNTS)
                session.get_one(Account, account, with_for_update=True).amount += change
                session.add(Ledger(region=region, transfer=number))
                session.flush()
            before_commit()
            session.commit()
    except CommitPending:
        return "pending"
    except CommitUnknown:
        return "unknown"
    except PartialCommit:
        return "partial"
    except (SQLAlchemyError, ShardkitError, OSError) as error:
        return f"failed: {error}"
    return "ok"


# --- the servers -------------------------------------------------------------------------------------------------


@dataclass
class Strike:
    """Something that happens at one packet of a commit, counted over both servers and both directions.

    :param at: the packet's number, from 1.
    :param do: called with the shard whose packet it is, before the packet goes on; says what becomes of it.
    """

    at: int
    do: Callable[[str], Action]
    seen: int = 0
    reached: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def packet(self, shard: str) -> Action:
        """A packet comes by."""
        with self._lock:
            self.seen += 1
            if self.seen != self.at:
                return Action.FORWARD
            self.reached = True
        try:
            return self.do(shard)
        finally:
            self.done.set()


class Client:
    """A client process."""

    def __init__(self, document: dict[str, Any], mode: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.bank"])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=client, args=(theirs, document, mode), daemon=True)
        self.process.start()
        theirs.close()

    def transfer(self, number: int) -> str:
        """Make a whole transfer."""
        self._pipe.send((number, False))
        return self.answer()

    def begin(self, number: int) -> None:
        """Make a transfer up to its commit."""
        self._pipe.send((number, True))
        assert self.answer() == "flushed"

    def commit(self) -> None:
        """Let it commit."""
        self._pipe.send("go")

    def answer(self) -> str:
        """What the client says next; ``dead`` when it died."""
        if not self._pipe.poll(PATIENCE):
            raise AssertionError("the client says nothing")
        try:
            return str(self._pipe.recv())
        except (EOFError, ConnectionResetError):
            return "dead"

    def kill(self) -> None:
        """SIGKILL."""
        self._signal(signal.SIGKILL)
        assert self.process.pid is not None
        while not _is_dead(self.process.pid):
            time.sleep(0.001)

    def stop(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it is dead already
            os.kill(self.process.pid, number)

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self.go_on()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _is_dead(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:  # noqa: PTH123 - asked a thousand times a second
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _server() -> LocalDatabaseServer:
    if FLAVOUR == "mariadb":
        return LocalMariaDB(durable=True)
    return LocalMySQL(durable=True, options={"tls_version": ""})  # the proxies count packets


class Bank:
    """Two servers, each behind a proxy, and what was said about each transfer."""

    def __init__(self, mode: str = "atomic") -> None:
        self.mode = mode
        self.said: dict[int, str] = {}
        self._numbers = iter(range(1, 1_000_000))
        self._strike: Strike | None = None
        self._stack = ExitStack()
        self.servers: dict[str, LocalDatabaseServer] = {}
        self.proxies: dict[str, TcpProxy] = {}
        try:
            for shard in SHARDS:
                server = self._stack.enter_context(_server())
                self.servers[shard] = server
                proxy = TcpProxy(server.host, server.port)
                proxy.on_packet = self._hook(shard)
                self.proxies[shard] = self._stack.enter_context(proxy)
                server.execute("CREATE DATABASE bank")
            self._create()
        except BaseException:
            self._stack.close()
            raise
        self.janitor = Janitor(self.connect)

    def _create(self) -> None:
        document = self.document({shard: server.endpoint("bank").url for shard, server in self.servers.items()})
        with create_cluster(ShardMap.parse(document), credentials=fixed("root")) as cluster:
            cluster.create_all(Base.metadata)
            for region, shard in enumerate(SHARDS):
                own_tables.upgrade(cluster.engine(shard))
                with cluster.engine(shard).begin() as connection:
                    account = {"region": region, "amount": BALANCE // ACCOUNTS}
                    connection.execute(
                        sa.insert(Account.__table__), [{**account, "number": number} for number in range(ACCOUNTS)]
                    )

    @staticmethod
    def document(masters: dict[str, str]) -> dict[str, Any]:
        """The bank's map."""
        return {
            "format": 1,
            "cluster": "bank",
            "keyspaces": {
                "bank": {
                    "partition": {"by": "list", "buckets": {shard: [n] for n, shard in enumerate(SHARDS)}},
                    "tables": {"accounts": "region", "ledger": "region"},
                    "placement": {shard: [shard] for shard in SHARDS},
                }
            },
            "shards": {shard: {"master": url} for shard, url in masters.items()},
        }

    def _hook(self, shard: str) -> Callable[[Direction, bytes], Action]:
        def hook(_direction: Direction, _packet: bytes) -> Action:
            strike = self._strike
            return Action.FORWARD if strike is None else strike.packet(shard)

        return hook

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._strike = None
        self._stack.close()

    # --- clients and faults

    def _new_client(self) -> Client:
        return Client(
            self.document({shard: each.endpoint("bank").url for shard, each in self.proxies.items()}), self.mode
        )

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """A client that goes through the proxies, with its connections open."""
        made = self._new_client()
        try:
            for _ in SHARDS:  # each of them decides once: from there on it is known to hold decisions
                assert self.noted(made.transfer, "ok"), list(self.said.items())[-1]
            yield made
        finally:
            made.close()

    def noted(self, make: Callable[[int], str], wanted: str | None = None) -> bool:
        """Make a transfer and remember what was said of it; True when it was said as wanted."""
        number = next(self._numbers)
        self.said[number] = make(number)
        return wanted is None or self.said[number] == wanted

    def under_load(self, seconds: float, faults: Sequence[Callable[[Bank, Client], None]], seed: int) -> None:
        """Clients make transfers in both directions while faults strike one after the other."""
        end = time.monotonic() + seconds
        chance = random.Random(seed)
        working: list[Client] = []
        lock = threading.Lock()

        def work() -> None:
            while time.monotonic() < end:
                made = self._new_client()
                working.append(made)
                while time.monotonic() < end:
                    with lock:
                        number = next(self._numbers)
                    said = self.said[number] = made.transfer(number)
                    if said == "dead":
                        break
                working.remove(made)
                made.close()

        def tidy() -> None:
            while time.monotonic() < end:
                with contextlib.suppress(pymysql.MySQLError, ShardkitError):  # a server that is down: the next pass
                    self.janitor.sweep(SHARDS)
                time.sleep(PERIOD)

        with ThreadPoolExecutor(_CLIENTS + 1) as pool:
            tasks = [pool.submit(work) for _ in range(_CLIENTS)] + [pool.submit(tidy)]
            while time.monotonic() < end:
                time.sleep(chance.uniform(0.05, 0.4))
                if working:
                    chance.choice(faults)(self, chance.choice(working))
            for task in tasks:
                task.result()
        self.mend()
        self.tidy_up()

    def struck(self, at: int, fault: Callable[[Bank, Client, str], Action], *, meanwhile: bool = False) -> bool:
        """One transfer with a fault at one packet of its commit; the janitor follows, and the client goes on.

        :param meanwhile: the client stands still: the janitor works before it goes on.
        :returns: whether the commit had that many packets.
        """
        with self.client() as made:
            strike = Strike(at, lambda shard: fault(self, made, shard))
            number = next(self._numbers)
            made.begin(number)
            self._strike = strike
            made.commit()
            if meanwhile:
                deadline = time.monotonic() + 0.5
                while not strike.reached and time.monotonic() < deadline:
                    time.sleep(0.005)
                if strike.reached:
                    self.tidy_up()
                made.go_on()
            self.said[number] = made.answer()
            self._strike = None
            assert not strike.reached or strike.done.wait(PATIENCE)
            self.mend()
            self.tidy_up()
            if self.said[number] != "dead":
                # it recovers, and no row is locked; a connection that was cut while it lay in the pool fails once
                recovered = any(self.noted(made.transfer, "ok") for _ in range(1 + len(SHARDS)))
                assert recovered, list(self.said.items())[-4:]
            return strike.reached

    def isolate(self) -> None:
        """Let nobody through the proxies any more."""
        for proxy in self.proxies.values():
            proxy.refuse()
            proxy.cut()

    def mend(self) -> None:
        """Start what was killed, and let everybody through again."""
        for shard in SHARDS:
            if not self.servers[shard].running:
                self.servers[shard].start()
            self.proxies[shard].start()

    # --- looking from outside

    def connect(self, shard: str) -> Any:
        """A connection past the proxy."""
        return self.servers[shard].connect("bank", autocommit=True)

    def prepared(self) -> list[str]:
        """The shards on which branches stand prepared."""
        found = []
        for shard in SHARDS:
            with closing(self.connect(shard)) as connection:
                found += [shard for _ in prepared_branches(connection)]
        return found

    def tidy_up(self) -> None:
        """The janitor's passes; afterwards nothing may be left prepared."""
        for _ in range(PASSES):
            self.janitor.sweep(SHARDS)
            if not self.prepared():
                return
            time.sleep(PERIOD)
        assert not self.prepared(), "branches stay prepared"

    def violations(self) -> list[str]:
        """What must not be: compared with what was said to clients."""
        ledger: dict[int, set[str]] = {}
        amounts = {}
        for shard in SHARDS:
            for (number,) in self.servers[shard].execute("SELECT transfer FROM bank.ledger"):
                ledger.setdefault(number, set()).add(shard)
            amounts[shard] = self.servers[shard].execute("SELECT SUM(amount) FROM bank.accounts")[0][0]
        found = [f"transfer {number} is on {shards} only" for number, shards in ledger.items() if len(shards) == 1]
        for number, said in self.said.items():
            if said in {"ok", "pending"} and number not in ledger:
                found.append(f"transfer {number} was acknowledged ({said}), and is lost")
            if said.startswith("failed") and number in ledger:
                found.append(f"transfer {number} is there, and was said to have failed: {said}")
        if sum(amounts.values()) != 2 * BALANCE:
            found.append(f"the sum is {sum(amounts.values())}")
        if amounts["south"] - BALANCE != len([1 for shards in ledger.values() if "south" in shards]):
            found.append(f"{amounts} do not fit a ledger of {len(ledger)}")
        return found
