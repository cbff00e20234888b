"""The daemon: hops of a map, elected in ZooKeeper, following the map; status and command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from shardkit.credentials import fixed
from shardkit.errors import PreconditionFailed, UnknownTable
from shardkit.mapstore import MapStore, ZooKeeperMapStore, open_store
from shardkit.own_tables import applied_position
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalZooKeeper
from shardkit.topology import Endpoint, ReplicationKind, Role, Shard
from shardkit_cdc.daemon import Relay, hops_of
from shardkit_cdc.livestate import LiveState, live_states
from shardkit_cdc.relay import HopOptions, State
from shardkit_cdc.status import hop_status
from tests.relay_chain import Chain, relay_command, wait_for

pytest_plugins = ["tests.relay_fixtures"]

OPTIONS = HopOptions(retry_seconds=(0.05, 0.5))


def document(chain: Chain, *, cluster: str = "relaytest", shard: str = "shop-0") -> dict[str, object]:
    master, *copies = [server.endpoint(chain.database).url for server in chain.servers]
    described: dict[str, object] = {"master": master, "replicas": copies[1:] or copies}
    if len(copies) > 1:
        described["staging"] = copies[0]
    return {
        "format": 1,
        "cluster": cluster,
        "version": 1,
        "keyspaces": {"all": {"tables": ["t"], "placement": shard}},
        "shards": {shard: described},
    }


@contextmanager
def daemon(chain: Chain, store: MapStore, **settings: object) -> Iterator[Relay]:
    relay = Relay(store, chain.master.credentials, options=OPTIONS, **settings)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()


def states(relay: Relay) -> list[State]:
    return [hop.report.state for hop in relay.hops]


def all_running(relay: Relay) -> bool:
    return bool(relay.hops) and set(states(relay)) == {State.RUNNING}


def shard_of(chain: Chain) -> Shard:
    return ShardMap.parse(document(chain)).shards["shop-0"]


# --- which hops there are


def ends(*names: str) -> list[Endpoint]:
    return [Endpoint(name, 3306, "shop") for name in names]


def test_hops_of_a_shard_with_staging() -> None:
    master, staging, one, two = ends("m", "s", "r1", "r2")
    hops = hops_of(Shard("shop-0", master, staging, (one, two)))
    assert [(hop.source.host, hop.target.host, hop.role, hop.reads_master) for hop in hops] == [
        ("m", "s", Role.STAGING, True),
        ("s", "r1", Role.REPLICA, False),
        ("s", "r2", Role.REPLICA, False),
    ]
    assert hops[0].name == "shop-0/s:3306"


def test_hops_of_a_shard_without_staging_read_the_master() -> None:
    master, one, two = ends("m", "r1", "r2")
    hops = hops_of(Shard("shop-0", master, None, (one, two)))
    assert [(hop.source.host, hop.target.host, hop.reads_master) for hop in hops] == [
        ("m", "r1", True),
        ("m", "r2", True),
    ]


def test_there_are_no_hops_for_native_replication_single_servers_and_sqlite() -> None:
    master, one = ends("m", "r1")
    assert hops_of(Shard("shop-0", master, None, (one,), ReplicationKind.NATIVE)) == ()
    assert hops_of(Shard("shop-0", master)) == ()
    lite = Endpoint("", 0, "a.db", "sqlite")
    assert hops_of(Shard("shop-0", lite, None, (lite,))) == ()


# --- a daemon with a map in memory


def test_a_whole_shard_is_relayed_and_its_lag_seen(chain: Chain) -> None:
    store = open_store(ShardMap.parse(document(chain)))
    with daemon(chain, store) as relay:
        assert relay.refused() == []
        chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        chain.settle()
        wait_for(lambda: all_running(relay), "both hops run")

        def fresh() -> bool:
            found = hop_status([shard_of(chain)], chain.master.credentials)
            return all(hop.lag_seconds is not None and hop.lag_seconds < 2 for hop in found)

        wait_for(fresh, "the heartbeat arrives on staging and replica")
        found = hop_status([shard_of(chain)], chain.master.credentials)
        assert [hop.state for hop in found] == ["running", "running"]
        assert all(hop.runner.endswith(f":{os.getpid()}") for hop in found)
        engine = sa.create_engine(chain.last.dsn(chain.database))
        with engine.connect() as connection:
            position, written_at, now = connection.execute(applied_position("shop-0")).one()
        engine.dispose()
        assert chain.reached(chain.last).covers(type(chain.reached(chain.last)).parse(position))
        assert 0 <= now - written_at < 5_000_000
        metrics = relay.metrics.registry.get_sample_value(
            "shardkit_relay_transactions_total", {"hop": relay.hops[0].spec.name}
        )
        assert metrics is not None
        assert metrics >= 2
    chain.assert_equal()
    assert [hop.state for hop in hop_status([shard_of(chain)], chain.master.credentials)] == ["stopped", "stopped"]


def test_status_of_hops_that_never_ran_and_of_servers_that_are_away(pair: Chain) -> None:
    (new,) = hop_status([shard_of(pair)], pair.master.credentials)
    assert (new.state, new.position, new.lag_seconds) == ("new", "", None)
    away = Shard("shop-0", pair.master.endpoint(pair.database), None, (Endpoint("127.0.0.1", 1, "shop"),))
    (found,) = hop_status([away], pair.master.credentials)
    assert found.state == "unreachable"
    assert "127.0.0.1:1" in found.error
    (refused,) = hop_status([shard_of(pair)], fixed("root", "wrong"))
    assert refused.state == "unreachable"
    assert "password" in refused.error


def test_a_daemon_refuses_a_map_without_anything_to_relay(pair: Chain) -> None:
    described = document(pair)
    described["shards"]["shop-0"].pop("replicas")
    store = open_store(ShardMap.parse(described))
    with pytest.raises(PreconditionFailed, match="staging database or replicas"):
        Relay(store, pair.master.credentials).start()
    with pytest.raises(UnknownTable, match="shop-9"):
        Relay(open_store(ShardMap.parse(document(pair))), pair.master.credentials, shards=["shop-9"]).start()


def test_a_daemon_follows_its_map(chain: Chain) -> None:
    small = document(chain)
    replicas = small["shards"]["shop-0"].pop("replicas")
    store = open_store(ShardMap.parse(small))
    with daemon(chain, store) as relay:
        chain.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        wait_for(lambda: all_running(relay), "the first hop runs")
        assert len(relay.hops) == 1
        small["shards"]["shop-0"]["replicas"] = replicas
        store.publish(ShardMap.parse(small), expected_version=store.load().version)
        wait_for(lambda: len(relay.hops) == 2, "the new replica's hop is started")
        chain.settle()
        chain.assert_equal()
        small["shards"]["shop-0"].pop("replicas")
        store.publish(ShardMap.parse(small), expected_version=store.load().version)
        wait_for(lambda: len(relay.hops) == 1, "the hop is ended")


# --- elected in ZooKeeper


def published(zookeeper: LocalZooKeeper, chain: Chain, cluster: str) -> str:
    source = f"zookeeper://127.0.0.1:{zookeeper.port}/{cluster}"
    store = open_store(source)
    store.publish(ShardMap.parse(document(chain, cluster=cluster)), expected_version=0)
    store.close()
    return source


def test_of_two_daemons_one_runs_and_the_other_takes_over(zookeeper: LocalZooKeeper, pair: Chain) -> None:
    source = published(zookeeper, pair, pair.database)
    first_store, second_store = open_store(source), open_store(source)
    with daemon(pair, second_store) as second:
        with daemon(pair, first_store) as first:
            pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
            pair.settle()
            assert sorted([*states(first), *states(second)]) == [State.RUNNING, State.STANDBY]
        wait_for(lambda: all_running(second), "the other daemon takes over")
        pair.sql("INSERT INTO t VALUES (2)")
        pair.settle()
    first_store.close()
    second_store.close()
    pair.assert_equal()


def test_how_the_databases_stand_is_told_in_zookeeper(zookeeper: LocalZooKeeper, pair: Chain) -> None:
    source = published(zookeeper, pair, pair.database)
    store, watcher = open_store(source), open_store(source)
    assert isinstance(watcher, ZooKeeperMapStore)
    master, replica = (server.endpoint(pair.database).url for server in pair.servers)

    def live() -> dict[str, LiveState]:
        return dict(live_states(watcher))

    def stands(endpoint: str, *, reachable: bool) -> bool:
        return endpoint in live() and live()[endpoint].reachable is reachable

    assert live() == {}
    with daemon(pair, store):
        pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        pair.settle()
        wait_for(lambda: live().keys() == {master, replica}, "both are told")
        wait_for(lambda: live()[replica].lag_seconds is not None, "the heartbeat has come through")
        wait_for(lambda: live()[replica].position == live()[master].position != "", "the replica has all")
        assert (live()[master].role, live()[master].writable, live()[master].lag_seconds) == ("master", True, None)
        assert (live()[replica].role, live()[replica].epoch) == ("replica", 0)
        pair.servers[1].kill()
        try:
            wait_for(lambda: stands(replica, reachable=False), "its end is told")
            assert "no database server answers" in str(live()[replica].error)
            assert stands(master, reachable=True)
        finally:
            pair.servers[1].start()
        wait_for(lambda: stands(replica, reachable=True), "its return is told")
    assert live() == {}
    with daemon(pair, store):
        wait_for(lambda: live().keys() == {master, replica}, "they are told again")
        store.close()  # as if the process had ended
        assert live() == {}
    watcher.close()


def test_leadership_ends_with_zookeeper_and_returns_with_it(pair: Chain) -> None:
    with LocalZooKeeper() as zookeeper:
        store = open_store(published(zookeeper, pair, pair.database))
        with daemon(pair, store) as relay:
            pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
            pair.settle()
            zookeeper.stop()
            wait_for(lambda: states(relay) == [State.STANDBY], "the hop steps down")
            pair.sql("INSERT INTO t VALUES (2)")
            zookeeper.start()
            wait_for(lambda: all_running(relay), "the hop runs again")
            pair.settle()
        store.close()
    pair.assert_equal()


# --- the command line


def map_file(chain: Chain, path: Path) -> str:
    path.write_text(ShardMap.parse(document(chain)).dump())
    return f"file:{path}"


def test_status_on_the_command_line(pair: Chain, tmp_path: Path) -> None:
    source = map_file(pair, tmp_path / "map.yaml")
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.settle()
    done = relay_command("status", "--map", source, "--json")
    assert done.returncode == 0, done.stderr
    (hop,) = json.loads(done.stdout)["hops"]
    assert (hop["state"], hop["shard"], hop["behind"]) == ("running", "shop-0", 0)
    done = relay_command("status", "--map", source)
    assert "running" in done.stdout
    assert relay_command("status", "--map", source, "--shard", "shop-9").returncode == 4


@pytest.mark.parametrize("password", ["", "wrong"])
def test_a_relay_that_cannot_start_says_why_on_one_screen(pair: Chain, tmp_path: Path, password: str) -> None:
    pair.sql("CREATE TABLE in_the_way (id INT)", server=pair.last)
    done = relay_command("run", "--map", map_file(pair, tmp_path / "map.yaml"), password=password)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert "fix: " in done.stderr
    assert ("password" if password else "in_the_way") in done.stderr
    assert "wrong" not in done.stderr


def test_no_map_no_relay(tmp_path: Path) -> None:
    done = relay_command("run", "--map", f"file:{tmp_path / 'missing.yaml'}")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    done = relay_command("run", "--map", "zookeeper://127.0.0.1:1/shop")
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
