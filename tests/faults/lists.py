"""A checker of what clients are shown: each appends to a list of its own, and reads all lists through replicas.

The database cannot hide a violation: an acknowledged append that its client does not see afterwards breaks
read-your-writes; a list that is shorter than a client has seen it before goes backwards.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
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
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def violated(self, what: str) -> None:
        with self.lock:
            self.violations.append(what)

    @property
    def operations(self) -> int:
        return self.counts["append"] + self.counts["read"]


class Client:
    """One client, in one thread at a time.

    :param carry: what becomes of the token between two operations: what a cookie would do to it.
    """

    def __init__(
        self,
        number: int,
        clients: int,
        factory: Callable[..., Session],
        story: Story,
        carry: Callable[[Token], Token],
        append_share: float,
    ) -> None:
        self.number = number
        self._others = range(number - number % _OWNERS, number - number % _OWNERS + clients)
        self._factory = factory
        self._story = story
        self._carry = carry
        self._append_share = append_share
        self._random = random.Random(number)
        self.token = Token()
        self.acknowledged = 0  # entries of the own list
        self.tried = 0  # of them, with those whose commit is not known
        self.seen: dict[int, int] = {}

    def step(self) -> None:
        """One operation."""
        try:
            if self._random.random() < self._append_share:
                self._append()
            else:
                self._read(self.number if self._random.random() < 0.5 else self._random.choice(self._others))
        except (DBAPIError, ShardkitError) as error:
            self._story.count(f"failed: {type(error).__name__}")
            time.sleep(0.005)

    def learn(self, other: Client) -> None:
        """Take over another client's token, and with it what that one has seen."""
        self.token = self.token.merged(self._carry(other.token))
        for owner, seen in other.seen.items():
            self.seen[owner] = max(self.seen.get(owner, 0), seen)

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
            self.acknowledged = self.tried
            self.token = self._carry(session.token)
        self.seen[self.number] = self.acknowledged
        self._story.count("append")

    def _find_out(self) -> None:
        """Whether the last entry is there, said by the master."""
        while True:
            with suppress(DBAPIError, ShardkitError), self._factory(read_from="master") as session:
                self.tried = session.scalar(_length(self.number)) or 0
                self.acknowledged = max(self.acknowledged, self.tried)
                return
            time.sleep(0.05)

    def _read(self, owner: int) -> None:
        with self._factory(token=self.token) as session:
            length = session.scalar(_length(owner)) or 0
            again = session.scalar(_length(owner)) or 0 if self._random.random() < 0.1 else length
            self.token = self._carry(session.token)
        self._story.count("read")
        if length != again:
            self._story.violated(f"client {self.number}: {length}, then {again} entries of {owner} in one transaction")
        if owner == self.number and length < self.acknowledged:
            self._story.violated(f"client {owner} wrote {self.acknowledged} entries, and was shown {length}")
        if length < self.seen.get(owner, 0):
            self._story.violated(f"client {self.number} saw {self.seen[owner]} entries of {owner}, and then {length}")
        self.seen[owner] = max(self.seen.get(owner, 0), length)


def _length(owner: int) -> sa.Select[tuple[int]]:
    return sa.select(sa.func.count()).select_from(Entry).where(Entry.owner == owner)


def run(
    cluster: Cluster,
    operations: int,
    *,
    threads: int = 6,
    clients: int = 12,
    carry: Callable[[Token], Token] = lambda token: Token.loads(token.dumps("s3cret"), "s3cret"),
    faults: Callable[[threading.Event], None] | None = None,
    seconds: float = 300.0,
    append_share: float = 0.2,
    to_the_first: bool = False,
    **options: Any,
) -> Story:
    """Let clients work until so many operations are done, while ``faults`` happen in a thread of their own.

    :param to_the_first: end with the first violation.
    """
    story = Story()
    factory = shardkit.sessionmaker(cluster, **{"read_from": "replica", **options})
    first = next(_runs) * _OWNERS
    made = [Client(first + number, clients, factory, story, carry, append_share) for number in range(clients)]
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
