"""``shardkit demo``: the whole of it, on a ZooKeeper and eight database servers of its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.cli.output import Output
from shardkit.cli.progress import Progress, duration
from shardkit.cluster import Cluster, create_cluster
from shardkit.demo import data
from shardkit.demo.answers import ask_all
from shardkit.demo.crash import kill_relay_while_writing
from shardkit.demo.layout import flights_map
from shardkit.demo.loading import load
from shardkit.demo.models import Base
from shardkit.demo.moving import move_a_tenth
from shardkit.demo.pipeline import Pipeline
from shardkit.demo.relay_process import RelayProcess
from shardkit.shardmap import ShardMap
from shardkit.testing import LocalCluster

CLUSTER = "flights"


@dataclass
class _Demo:
    """What the steps share."""

    out: Output
    cluster: Cluster
    relay: RelayProcess
    pipeline: Pipeline


def run(out: Output, *, keep: bool) -> None:
    """Run the demo from nothing to nothing.

    :param keep: leave the cluster and the relay up, and say how to look at them and how to stop them.
    :raises ShardkitError: when a step fails, or a comparison finds a difference.
    """
    began = time.monotonic()
    with _local_cluster(out) as local:
        source = local.zookeeper_url(CLUSTER)
        published = _publish(out, local)
        log = Path(tempfile.gettempdir()) / f"shardkit-demo-relay-{os.getpid()}.log"
        relay = RelayProcess(source, local.credentials(published.shards[f"{CLUSTER}-0"].master), log=log)
        relay.start()
        kept = False
        try:
            # the tables are declared for both flavours: the driver's name says which one this is
            with create_cluster(source, credentials=local.credentials, driver="mariadb+pymysql") as cluster:
                result = _steps(_Demo(out, cluster, relay, Pipeline(published, local.credentials, relay)))
            if keep:
                local.detach(map_source=source)
                kept = True
                _say_how_to_go_on(out, source, relay, log)
        except KeyboardInterrupt:
            out.note("Interrupted: stopping the servers and removing their data.")
            raise
        finally:
            if not kept:
                relay.stop()
                log.unlink(missing_ok=True)
        out.result({**result, "seconds": round(time.monotonic() - began, 1)})
    if not keep:
        out.note("All servers are stopped and their data removed.")
    out.done(f"Done in {duration(time.monotonic() - began)}.")


@contextlib.contextmanager
def _local_cluster(out: Output) -> Iterator[LocalCluster]:
    local = LocalCluster(shards=2, staging=True, replicas=2, name=CLUSTER)
    with out.progress() as progress:
        task = progress.task("Starting ZooKeeper and eight database servers", unit="")
        local.start()
        task.finish()
    with local:
        yield local


def _publish(out: Output, local: LocalCluster) -> ShardMap:
    published = local.publish(flights_map(local.shards))
    out.line(f"Published version {published.version} of the shard map to ZooKeeper:")
    for keyspace in published.keyspaces.values():
        kind = "whole tables" if keyspace.partition is None else f"by {keyspace.partition.by}"
        places = ", ".join(f"{len(keyspace.buckets_on(shard)):,} on {shard}" for shard in keyspace.shards)
        out.line(f"    {keyspace.name}: {', '.join(keyspace.tables)} {kind}; buckets: {places}")
    return published


def _steps(demo: _Demo) -> dict[str, Any]:
    out, cluster = demo.out, demo.cluster
    result: dict[str, Any] = {}
    with out.progress() as progress:
        _timed(progress, "The relay copies master -> staging -> replicas", demo.pipeline.wait_until_running)
        _timed(progress, "Creating the tables on both masters", lambda: cluster.create_all(Base.metadata))
        result["rows"] = _load(progress, cluster)
        _timed(progress, "Waiting for the replicas", demo.pipeline.wait_until_level)
    demo.pipeline.show_lag(out)
    result["answers"] = ask_all(cluster, out, read_from="replica")
    out.line()
    result["crash"] = kill_relay_while_writing(cluster, demo.pipeline, demo.relay, out)
    result["move"] = move_a_tenth(cluster, demo.pipeline, out)
    return result


def _timed(progress: Progress, label: str, step: Callable[[], object]) -> None:
    task = progress.task(label, unit="")
    step()
    task.finish()


def _load(progress: Progress, cluster: Cluster) -> dict[str, int]:
    expected = data.FLIGHTS + data.OTHER_ROWS
    task = progress.task("Loading the flights through the session factory", total=expected)
    rows = load(cluster, lambda _table, count: task.advance(count))
    task.finish()
    return rows


def _say_how_to_go_on(out: Output, source: str, relay: RelayProcess, log: Path) -> None:
    out.line()
    out.line("Everything is still running. Look at it:")
    out.line(f"    export SHARDKIT_MAP={source} SHARDKIT_USER=root")
    out.line("    shardkit status")
    out.line("    shardkit relay status")
    out.line("    shardkit where flights tailnum=N14228")
    out.line("and stop it:")
    out.line(f"    kill {relay.pid}    # the relay; it logs to {log}")
    out.line(f"    shardkit local down --name {CLUSTER}")
