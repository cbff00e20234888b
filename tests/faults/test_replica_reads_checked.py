"""Nobody sees an own write missing or time running backwards, whatever happens to the relay and the replicas."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from shardkit import create_cluster
from shardkit.cluster import Cluster
from shardkit.demo.relay_process import RelayProcess
from shardkit.replicas.positions import Told
from shardkit.replicas.token import Mark, Token
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalCluster, TcpProxy
from shardkit.testing.cluster import database_of
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import ReplicationKind, Role
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD, Base, Story, lists_map, run, run_async
from tests.native_replication import follow

#: Of each kind of replication, with threads and with asyncio: 20,500 together, on either kind of server.
OPERATIONS = {ReplicationKind.RELAY: 7_000, ReplicationKind.NATIVE: 9_500}
ASYNC_OPERATIONS = 2_000
#: Of the long run, for each kind of replication.
SOAK_OPERATIONS = int(os.environ.get("SHARDKIT_TEST_SOAK_OPERATIONS", "40000"))

pytestmark = [getattr(pytest.mark, FLAVOUR)]


@dataclass
class Stage:
    """One shard with two replicas behind proxies, and what fills them."""

    cluster: Cluster
    local: LocalCluster
    proxies: list[TcpProxy]
    relay: RelayProcess | None

    @property
    def kind(self) -> ReplicationKind:
        return self.cluster.map.shard(SHARD).replication

    def replica(self, number: int) -> LocalDatabaseServer:
        return self.local.server(SHARD, Role.REPLICA, number)

    def fresh(self) -> bool:
        return self.cluster.health.wait(1.0)


def open_cluster(source: ShardMap, local: LocalCluster) -> Cluster:
    """Its replicas stay in use however far the faults set them back: only tokens keep their past from being shown."""
    return create_cluster(
        source, credentials=local.credentials, max_lag=30.0, causal_wait=0.3, engine_options={"pool_size": 10}
    )


@pytest.fixture(scope="module", params=[ReplicationKind.RELAY, ReplicationKind.NATIVE])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    native = request.param is ReplicationKind.NATIVE
    folder = tmp_path_factory.mktemp(str(request.param))
    with ExitStack() as stack:
        local = stack.enter_context(
            LocalCluster(shards=[SHARD], replicas=2, staging=not native, zookeeper=False, flavour=FLAVOUR)
        )
        shard = local.shards[SHARD]
        proxies = [stack.enter_context(TcpProxy(each.host, each.port)) for each in shard.replicas]
        behind = [proxy.endpoint(database_of(SHARD)) for proxy in proxies]
        maps = {
            name: lists_map(replace(shard, replicas=tuple(replicas), replication=request.param))
            for name, replicas in (("clients", behind), ("relay", shard.replicas))
        }
        source = folder / "map.yaml"
        source.write_text(maps["relay"].dump(), encoding="utf-8")
        cluster = stack.enter_context(open_cluster(maps["clients"], local))
        if native:
            for number in range(2):
                follow(local.server(SHARD, Role.REPLICA, number), local.server(SHARD))
        Base.metadata.create_all(cluster.engine(SHARD))
        relay = RelayProcess(str(source), local.credentials(shard.master), log=folder / "relay.log")
        relay.start()  # of native replication it writes the heartbeat only
        stack.callback(relay.stop)
        made = Stage(cluster, local, proxies, relay)
        wait(made.fresh)
        yield made


def wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.1)


def strike(stage: Stage, done: threading.Event, seed: int = 0) -> None:
    """Faults one after the other, each mended before the next."""
    chance = random.Random(seed)
    relayed = stage.kind is ReplicationKind.RELAY
    while not done.wait(chance.uniform(0.3, 1.0)):
        number = chance.randrange(2)
        faults: list[Callable[[], object]] = [
            partial(slow_down, stage.proxies[number], done),
            stage.proxies[number].cut,
            partial(kill, stage.replica(number)),
        ]
        if relayed:
            faults += [partial(stop_relay, stage, done), partial(kill_relay, stage), partial(restart_staging, stage)]
        else:
            faults += [partial(stop_following, stage.replica(number), done)] * 2
        chance.choice(faults)()


def slow_down(proxy: TcpProxy, done: threading.Event) -> None:
    proxy.delay(0.02)
    done.wait(0.5)
    proxy.delay(0)


def kill(server: LocalDatabaseServer) -> None:
    server.kill()
    time.sleep(0.2)
    server.start()


def stop_relay(stage: Stage, done: threading.Event) -> None:
    assert stage.relay is not None
    assert stage.relay.pid is not None
    os.kill(stage.relay.pid, signal.SIGSTOP)
    done.wait(0.7)
    os.kill(stage.relay.pid, signal.SIGCONT)


def kill_relay(stage: Stage) -> None:
    assert stage.relay is not None
    stage.relay.kill()
    stage.relay.start()


def restart_staging(stage: Stage) -> None:
    stage.local.server(SHARD, Role.STAGING).restart()


def stop_following(replica: LocalDatabaseServer, done: threading.Event) -> None:
    word = "SLAVE" if FLAVOUR == "mariadb" else "REPLICA"
    with suppress(Exception):
        replica.execute(f"STOP {word}")
    done.wait(0.7)
    replica.execute(f"START {word}")


def on_replicas(cluster: Cluster) -> float:
    """How many reads replicas have served so far."""
    return cluster.metrics.replica_reads.labels(SHARD)._value.get()


def told(story: Story, replicas: float) -> str:
    share = replicas / max(1, story.counts["read"])
    return f"{dict(story.counts)}; {share:.0%} of the reads on replicas; {story.violations[:5]}"


def test_nobody_is_shown_the_past(stage: Stage) -> None:
    wait(stage.fresh)
    check(stage, OPERATIONS[stage.kind])


#: On a busy machine faults may take most of a run: then it is repeated, so many times at most, and all of it counts.
ROUNDS = 4


def check(stage: Stage, operations: int, seconds: float = 300.0) -> None:
    before = on_replicas(stage.cluster)
    story = Story()
    for _ in range(ROUNDS):
        story.add(run(stage.cluster, operations, seconds=seconds, faults=partial(strike, stage)))
        if story.violations or on_replicas(stage.cluster) - before >= 0.6 * story.counts["read"]:
            break
    judge(story, operations, on_replicas(stage.cluster) - before)


def judge(story: Story, operations: int, replicas: float) -> None:
    assert not story.violations, told(story, replicas)
    assert story.operations >= operations, told(story, replicas)
    assert replicas >= 0.6 * story.counts["read"], told(story, replicas)


async def check_async(stage: Stage, operations: int, seconds: float = 300.0) -> None:
    async with open_cluster(stage.cluster.map, stage.local) as cluster:
        await asyncio.to_thread(wait, lambda: cluster.health.wait(1.0))
        story = Story()
        for _ in range(ROUNDS):
            story.add(await run_async(cluster, operations, seconds=seconds, faults=partial(strike, stage)))
            if story.violations or on_replicas(cluster) >= 0.6 * story.counts["read"]:
                break
        judge(story, operations, on_replicas(cluster))


def test_nobody_is_shown_the_past_under_asyncio(stage: Stage) -> None:
    wait(stage.fresh)
    asyncio.run(check_async(stage, ASYNC_OPERATIONS))


@pytest.mark.parametrize("stage", [ReplicationKind.RELAY], indirect=True)
def test_without_tokens_the_checker_finds_violations_under_asyncio(stage: Stage) -> None:
    async def check() -> Story:
        async with open_cluster(stage.cluster.map, stage.local) as cluster:
            await asyncio.to_thread(wait, lambda: cluster.health.wait(1.0))
            return await run_async(cluster, 4_000, carry=lambda _token: Token(), seconds=60, to_the_first=True)

    wait(stage.fresh)
    with lag_in_turn(stage):
        story = asyncio.run(check())
    assert story.violations, told(story, 0)


@pytest.mark.soak
def test_nobody_is_shown_the_past_under_asyncio_for_long(stage: Stage) -> None:
    wait(stage.fresh)
    asyncio.run(check_async(stage, SOAK_OPERATIONS // 2, seconds=3600))


@pytest.mark.soak
def test_nobody_is_shown_the_past_for_long(stage: Stage) -> None:
    wait(stage.fresh)
    check(stage, SOAK_OPERATIONS, seconds=3600)


@pytest.mark.parametrize("stage", [ReplicationKind.RELAY], indirect=True)
def test_without_tokens_the_checker_finds_violations(stage: Stage) -> None:
    wait(stage.fresh)
    with lag_in_turn(stage):
        story = run(stage.cluster, 4_000, carry=lambda _token: Token(), seconds=60, to_the_first=True)
    assert story.violations, told(story, 0)


@pytest.mark.parametrize("stage", [ReplicationKind.RELAY], indirect=True)
def test_a_token_raised_from_what_was_known_before_is_caught(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The poller's position is older than the data: good enough to choose a replica, too old to remember."""
    wait(stage.fresh)
    health: Any = stage.cluster.health

    def cached(told: Told) -> Mark:
        known = [reading.position for reading in health._readings.values() if reading.position is not None]
        least = next((one for one in known if all(other.covers(one) for other in known)), None)
        return Mark(told.epoch, least)

    monkeypatch.setattr(Told, "mark", property(cached))
    with lag_in_turn(stage):
        story = run(stage.cluster, 20_000, seconds=90, append_share=0.05, to_the_first=True)
    assert any("saw" in violation for violation in story.violations), told(story, 0)


@contextmanager
def lag_in_turn(stage: Stage) -> Iterator[None]:
    """Meanwhile one replica stands still while the other goes on, and then the other way round."""
    done = threading.Event()
    lagging = threading.Thread(target=_lag_in_turn, args=(stage, done))
    lagging.start()
    try:
        yield
    finally:
        done.set()
        lagging.join()


def _lag_in_turn(stage: Stage, done: threading.Event) -> None:
    turn = 0
    while not done.is_set():
        turn += 1
        with suppress(Exception), closing(stage.replica(turn % 2).connect(database_of(SHARD))) as connection:
            cursor = connection.cursor()
            cursor.execute("SELECT * FROM entries FOR UPDATE")  # no row can be added behind the last one
            cursor.fetchall()
            done.wait(0.4)
            connection.rollback()
