"""A shard whose master can be promoted away: servers, what replicates, a map in a file, clients that write."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import pymysql
import pytest
from sqlalchemy.exc import DBAPIError

import shardkit
from shardkit.cluster import Cluster, create_cluster
from shardkit.credentials import Credentials, fixed
from shardkit.demo.relay_process import RelayProcess
from shardkit.errors import MapConflict, PartlyApplied, ShardkitError
from shardkit.failover import Plan, promote
from shardkit.mapstore import MapStore
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalCluster
from shardkit.testing.cluster import database_of
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import Endpoint, ReplicationKind, Role, Shard
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD, Base, Entry, lists_map
from tests.native_replication import follow

#: The package shows the function of the module's name in its place.
_RUN: Any = import_module("shardkit.failover.promote")._Run
DATABASE = database_of(SHARD)
APP, SECRET = "app", "app"


@dataclass
class Stage:
    """One shard with two replicas, its map in a file, and what fills the replicas."""

    local: LocalCluster
    source: Path
    relay: RelayProcess
    kind: ReplicationKind
    #: Whose the commands are; root's unless given.
    account: Credentials | None = None

    @property
    def master(self) -> LocalDatabaseServer:
        """The first master."""
        return self.local.server(SHARD)

    @property
    def shard(self) -> Shard:
        """As the map has it now."""
        return ShardMap.load(self.source).shard(SHARD)

    def server_at(self, endpoint: Endpoint) -> LocalDatabaseServer:
        """The server of an endpoint."""
        found = [each for each in self.local.servers if isinstance(each, LocalDatabaseServer)]
        return next(each for each in found if each.port == endpoint.port)

    def replica(self, number: int = 0) -> LocalDatabaseServer:
        return self.local.server(SHARD, Role.REPLICA, number)

    @contextmanager
    def clients(self, **options: Any) -> Iterator[Cluster]:
        """A cluster as an application has it, with an account without special rights."""
        settings: dict[str, Any] = {"credentials": fixed(APP, SECRET), "engine_options": {"pool_size": 10}}
        with create_cluster(str(self.source), **settings | options) as cluster:
            yield cluster

    def command(self, *words: str) -> subprocess.Popen[str]:
        """``shardkit shard ...``, begun."""
        account = self.account or self.local.credentials(self.master.endpoint(DATABASE))
        return subprocess.Popen(
            [sys.executable, "-m", "shardkit", "shard", *words, "--map", str(self.source), "--json"],
            env={**os.environ, "SHARDKIT_USER": account.user, "SHARDKIT_PASSWORD": account.password},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, dict[str, Any], str]:
        """``shardkit shard ...``: exit code, document, what it said."""
        process = self.command(*words)
        out, said = process.communicate(timeout=120)
        return process.returncode, json.loads(out), said

    def promoted(self, *words: str) -> dict[str, Any]:
        """A promotion that comes about."""
        code, document, said = self.run("promote", SHARD, "--yes", *words)
        assert code == 0, (document, said)
        return document

    def entries(self, server: LocalDatabaseServer) -> set[tuple[int, int]]:
        return {
            (owner, number) for owner, number in server.execute("SELECT owner, number FROM entries", database=DATABASE)
        }

    def caught_up(self) -> None:
        """Wait until every replica has what the master has."""
        for number in range(2):
            wait_until(lambda number=number: self.entries(self.replica(number)) == self.entries(self.master))


def cut_short(
    monkeypatch: pytest.MonkeyPatch,
    store: MapStore,
    stage: Stage,
    plan: Plan,
    *,
    of: object = _RUN,
    step: str = "_publish",
) -> None:
    """Carry a promotion out up to a step that fails, after which only the same promotion helps."""

    def conflict(*_arguments: object) -> None:
        raise MapConflict("somebody else")

    with monkeypatch.context() as patch:
        patch.setattr(of, step, conflict)
        with pytest.raises(PartlyApplied):
            promote(store, stage.local.credentials, plan)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with suppress(pymysql.MySQLError):
            if condition():
                return
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)


@contextmanager
def open_stage(kind: ReplicationKind, folder: Path) -> Iterator[Stage]:
    native = kind is ReplicationKind.NATIVE
    options = {"log_slave_updates": True} if native and FLAVOUR == "mariadb" else {}
    with ExitStack() as stack:
        local = stack.enter_context(
            LocalCluster(
                shards=[SHARD], replicas=2, staging=not native, zookeeper=False, flavour=FLAVOUR, options=options
            )
        )
        source = folder / "map.yaml"
        shard = replace(local.shards[SHARD], replication=kind)
        written = lists_map(shard)
        source.write_text(written.dump(), encoding="utf-8")
        servers = [each for each in local.servers if isinstance(each, LocalDatabaseServer)]
        if native:
            for number in range(2):
                follow(local.server(SHARD, Role.REPLICA, number), local.server(SHARD))
            servers = [local.server(SHARD)]
        for server in servers:
            server.create_user(APP, SECRET, grants=f"ALL PRIVILEGES ON {DATABASE}.*")
        relay = RelayProcess(str(source), local.credentials(shard.master), log=folder / "relay.log")
        stage = Stage(local, source, relay, kind)
        with create_cluster(str(source), credentials=local.credentials) as cluster:
            Base.metadata.create_all(cluster.engine(SHARD))
            relay.start()
            stack.callback(relay.stop)
            with shardkit.sessionmaker(cluster)() as session:
                session.add(Entry(owner=0, number=0))
                session.commit()
        stage.caught_up()
        for number in range(2):
            holds_a_beat(stage, number)
        yield stage


def holds_a_beat(stage: Stage, number: int) -> None:
    wait_until(lambda: bool(stage.replica(number).execute("SELECT 1 FROM shardkit_heartbeat", database=DATABASE)))


@dataclass
class Writers:
    """Clients that write all the time, each its own numbers, and note what was acknowledged and when."""

    cluster: Cluster
    threads: int = 4
    acknowledged: set[tuple[int, int]] = field(default_factory=set)
    at: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._done = threading.Event()
        self._running = [threading.Thread(target=self._work, args=(owner + 1,)) for owner in range(self.threads)]
        for each in self._running:
            each.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._done.set()
        for each in self._running:
            each.join()

    def _work(self, owner: int) -> None:
        factory = shardkit.sessionmaker(self.cluster)
        number = 0
        while not self._done.is_set():
            number += 1
            try:
                with factory() as session:
                    session.add(Entry(owner=owner, number=number))
                    session.commit()
            except (DBAPIError, ShardkitError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(0.01)
            else:
                self.at.append(time.monotonic())
                self.acknowledged.add((owner, number))

    def go_on(self, seconds: float = 30.0) -> None:
        """Wait until writes are acknowledged that begin from now on."""
        before = len(self.at)
        wait_until(lambda: len(self.at) > before + 5 * self.threads, seconds)

    @property
    def longest_gap(self) -> float:
        """Seconds between two acknowledged writes."""
        times = sorted(self.at)
        return max(later - earlier for earlier, later in itertools.pairwise(times))


def refused(server: LocalDatabaseServer) -> bool:
    """Whether an application's account can no longer write there."""
    try:
        with closing(server.connect(DATABASE, user=APP, password=SECRET, autocommit=True)) as connection:
            connection.cursor().execute("INSERT INTO entries VALUES (999, 999)")
    except (pymysql.MySQLError, ShardkitError):
        return True
    return False
