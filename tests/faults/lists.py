"""A checker of what clients are shown: each appends to a list of its own, and reads all lists through replicas.

The database cannot hide a violation: an acknowledged append that its client does not see afterwards breaks
read-your-writes; a list that is shorter than a client has seen it before goes backwards.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import shardkit
from shardkit.cluster import Cluster
from shardkit.errors import CommitUnknown, ShardkitError
from shardkit.replicas.token import Token
from shardkit.shardmap import ShardMap
from shardkit.topology import Shard

SHARD = "lists-0"


class Base(DeclarativeBase):
    """The clients' lists."""


class Entry(Base):
    """One entry of a client's list."""

    __tablename__ = "entries"
    owner: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


def lists_map(shard: Shard) -> ShardMap:
    """The map of the lists, all of them on one shard."""
    written = ShardMap.parse(
        {
            "format": 1,
            "cluster": "lists",
            "keyspaces": {
                "lists": {
                    "partition": {"by": "hash", "buckets": 4},
                    "tables": {"entries": "owner"},
                    "placement": {SHARD: "0-3"},
                }
            },
            "shards": {SHARD: {"master": shard.master.url}},
        }
    )
    return written.with_shards({SHARD: shard})


#: Owners of one run; those of the next have other numbers.
_OWNERS = 1_000
_runs = itertools.count(1)


@dataclass
class Story:
    """What happened.

    :param lost: how many replicas were lost so far.
    """

    lost: Callable[[], float] = lambda: 0.0
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def violated(self, what: str) -> None:
        with self.lock:
            self.violations.append(what)

    def add(self, more: Story) -> None:
        """What happened afterwards."""
        self.counts += more.counts
        self.violations += more.violations

    @property
    def operations(self) -> int:
        return self.counts["append"] + self.counts["read"]


#: What becomes of the token between two operations: what a cookie would do to it.
Carry: TypeAlias = Callable[[Token], Token]


def as_a_cookie(token: Token) -> Token:
    """Written, signed, and read again."""
    return Token.loads(token.dumps("s3cret"), "s3cret")


class _Client:
    """What one client knows, and its judgement on what it is shown."""

    def __init__(self, number: int, clients: int, story: Story, carry: Carry, append_share: float) -> None:
        self.number = number
        self._others = range(number - number % _OWNERS, number - number % _OWNERS + clients)
        self._story = story
        self._carry = carry
        self._append_share = append_share
        self._random = random.Random(number)
        self.token = Token()
        self.acknowledged = 0  # entries of the own list
        self.tried = 0  # of them, with those whose commit is not known
        self.seen: dict[int, int] = {}

    def _appends(self) -> bool:
        return self._random.random() < self._append_share

    def _owner(self) -> int:
        """Whose list is read next."""
        return self.number if self._random.random() < 0.5 else self._random.choice(self._others)

    def _reads_twice(self) -> bool:
        return self._random.random() < 0.1

    def _failed(self, error: Exception) -> None:
        if isinstance(error, IntegrityError):
            self._story.violated(f"client {self.number}: entry {self.tried + 1} is there, whose commit failed")
        self._story.count(f"failed: {type(error).__name__}")

    def learn(self, other: _Client) -> None:
        """Take over another client's token, and with it what that one has seen."""
        self.token = self.token.merged(self._carry(other.token))
        for owner, seen in other.seen.items():
            self.seen[owner] = max(self.seen.get(owner, 0), seen)

    def _appended(self, token: Token) -> None:
        self.acknowledged = self.seen[self.number] = self.tried
        self.token = self._carry(token)
        self._story.count("append")

    def _found(self, length: int) -> None:
        """So many entries has the own list, as the master says after a commit whose answer was lost."""
        self.tried = length
        self.acknowledged = max(self.acknowledged, length)
        self.seen[self.number] = self.acknowledged

    def _shown(self, owner: int, length: int, again: int, token: Token, *, lost: bool) -> None:
        """What a transaction has shown of a list, twice; after a lost replica it may go on with newer data."""
        self.token = self._carry(token)
        self._story.count("read")
        if again < length or (again > length and not lost):
            self._story.violated(f"client {self.number}: {length}, then {again} entries of {owner} in one transaction")
        if owner == self.number and length < self.acknowledged:
            self._story.violated(f"client {owner} wrote {self.acknowledged} entries, and was shown {length}")
        if length < self.seen.get(owner, 0):
            self._story.violated(f"client {self.number} saw {self.seen[owner]} entries of {owner}, and then {length}")
        self.seen[owner] = max(self.seen.get(owner, 0), length)


class Client(_Client):
    """One client, in one thread at a time."""

    def __init__(self, factory: Callable[..., Session], *who: Any) -> None:
        super().__init__(*who)
        self._factory = factory

    def step(self) -> None:
        """One operation."""
        try:
            if self._appends():
                self._append()
            else:
                self._read(self._owner())
        except (DBAPIError, ShardkitError) as error:
            self._failed(error)
            time.sleep(0.005)

    def _append(self) -> None:
        with self._factory(token=self.token) as session:
            try:
                session.add(Entry(owner=self.number, number=self.tried + 1))
                session.flush()
            except (DBAPIError, ShardkitError):
                session.rollback()
                raise
            self.tried += 1
            try:
                session.commit()
            except CommitUnknown:
                self._find_out()
                return
            except (DBAPIError, ShardkitError):
                self.tried -= 1  # which says that it is not there
                raise
            self._appended(session.token)

    def _find_out(self) -> None:
        """Whether the last entry is there, said by the master."""
        while True:
            with suppress(DBAPIError, ShardkitError), self._factory(read_from="master") as session:
                self._found(session.scalar(_length(self.number)) or 0)
                return
            time.sleep(0.05)

    def _read(self, owner: int) -> None:
        with self._factory(token=self.token) as session:
            lost = self._story.lost()
            length = session.scalar(_length(owner)) or 0
            again = session.scalar(_length(owner)) or 0 if self._reads_twice() else length
            self._shown(owner, length, again, session.token, lost=self._story.lost() > lost)


class AsyncClient(_Client):
    """One client, in a task."""

    def __init__(self, factory: Callable[..., Any], *who: Any) -> None:
        super().__init__(*who)
        self._factory = factory

    async def step(self) -> None:
        """One operation."""
        try:
            if self._appends():
                await self._append()
            else:
                await self._read(self._owner())
        except (DBAPIError, ShardkitError) as error:
            self._failed(error)
            await asyncio.sleep(0.005)

    async def _append(self) -> None:
        async with self._factory(token=self.token) as session:
            try:
                session.add(Entry(owner=self.number, number=self.tried + 1))
                await session.flush()
            except (DBAPIError, ShardkitError):
                await session.rollback()
                raise
            self.tried += 1
            try:
                await session.commit()
            except CommitUnknown:
                await self._find_out()
                return
            except (DBAPIError, ShardkitError):
                self.tried -= 1  # which says that it is not there
                raise
            self._appended(session.token)

    async def _find_out(self) -> None:
        """Whether the last entry is there, said by the master."""
        while True:
            with suppress(DBAPIError, ShardkitError):
                async with self._factory(read_from="master") as session:
                    self._found(await session.scalar(_length(self.number)) or 0)
                    return
            await asyncio.sleep(0.05)

    async def _read(self, owner: int) -> None:
        async with self._factory(token=self.token) as session:
            lost = self._story.lost()
            length = await session.scalar(_length(owner)) or 0
            again = await session.scalar(_length(owner)) or 0 if self._reads_twice() else length
            self._shown(owner, length, again, session.token, lost=self._story.lost() > lost)


def _lost_replicas(cluster: Cluster) -> float:
    registry = cluster.metrics.registry
    return registry.get_sample_value("shardkit_router_lost_replicas_total", {"shard": SHARD}) or 0.0


def _length(owner: int) -> sa.Select[tuple[int]]:
    return sa.select(sa.func.count()).select_from(Entry).where(Entry.owner == owner)


def run(
    cluster: Cluster,
    operations: int,
    *,
    threads: int = 6,
    clients: int = 12,
    carry: Carry = as_a_cookie,
    faults: Callable[[threading.Event], None] | None = None,
    seconds: float = 300.0,
    append_share: float = 0.2,
    to_the_first: bool = False,
    **options: Any,
) -> Story:
    """Let clients work until so many operations are done, while ``faults`` happen in a thread of their own.

    :param to_the_first: end with the first violation.
    """
    story = Story(lambda: _lost_replicas(cluster))
    factory = shardkit.sessionmaker(cluster, **{"read_from": "replica", **options})
    first = next(_runs) * _OWNERS
    made = [Client(factory, first + number, clients, story, carry, append_share) for number in range(clients)]
    done = threading.Event()
    end = time.monotonic() + seconds
    turn = itertools.count()

    def work(own: list[Client]) -> None:
        while not done.is_set():
            for client in own:
                client.step()
                if next(turn) % 20 == 0:
                    client.learn(own[0])
            enough = story.operations >= operations or (to_the_first and story.violations)
            if enough or time.monotonic() > end:
                done.set()

    workers = [threading.Thread(target=work, args=(made[number::threads],)) for number in range(threads)]
    if faults is not None:
        workers.append(threading.Thread(target=faults, args=(done,)))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return story


async def run_async(
    cluster: Cluster,
    operations: int,
    *,
    clients: int = 12,
    carry: Carry = as_a_cookie,
    faults: Callable[[threading.Event], None] | None = None,
    seconds: float = 300.0,
    append_share: float = 0.2,
    to_the_first: bool = False,
) -> Story:
    """`run` with clients that are tasks of one event loop."""
    story = Story(lambda: _lost_replicas(cluster))
    factory = shardkit.async_sessionmaker(cluster)
    first = next(_runs) * _OWNERS
    made = [AsyncClient(factory, first + number, clients, story, carry, append_share) for number in range(clients)]
    done = threading.Event()
    end = time.monotonic() + seconds

    async def work(client: AsyncClient) -> None:
        for turn in itertools.count():
            await client.step()
            if turn % 20 == 0:
                client.learn(made[0])
            enough = story.operations >= operations or (to_the_first and story.violations)
            if enough or time.monotonic() > end:
                return

    striking = None if faults is None else asyncio.create_task(asyncio.to_thread(faults, done))
    try:
        await asyncio.gather(*map(work, made))
    finally:
        done.set()
        if striking is not None:
            await striking
    return story
