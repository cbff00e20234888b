"""``shardkit local up|status|down``: a throw-away cluster on this machine, left running until it is taken down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import output_option
from shardkit.cli.output import Column, Output

if TYPE_CHECKING:
    from shardkit.shardmap import ShardMap
    from shardkit.testing.record import ClusterRecord, ServerState

COLUMNS = ("server", "kind", Column("address", whole=True), Column("pid", right=True), "health")

name_option = click.option(
    "--name", default="local", show_default=True, metavar="NAME", help="Several may run at a time, under several names."
)


@click.group()
def local() -> None:
    """Start and stop a throw-away cluster on this machine.

    Servers listen on free loopback ports and keep their data in temporary directories. They never touch a server that
    the machine already runs.
    """


@local.command()
@click.option("--shards", type=click.IntRange(1, 16), default=2, show_default=True, help="How many shards.")
@click.option("--replicas", type=click.IntRange(0, 8), default=2, show_default=True, help="Replicas for each shard.")
@click.option("--staging/--no-staging", default=True, help="Whether each shard has a staging database.  [default: yes]")
@click.option("--zookeeper/--no-zookeeper", default=True, help="Whether to start a ZooKeeper.  [default: yes]")
@click.option(
    "--flavour", type=click.Choice(["mariadb", "mysql"]), default="mariadb", show_default=True, help="Which servers."
)
@click.option(
    "--like",
    metavar="SOURCE",
    help="Start the shards that this shard map names, and publish the map over them in the new ZooKeeper.",
)
@name_option
@output_option
def up(
    shards: int, replicas: int, staging: bool, zookeeper: bool, flavour: str, like: str | None, name: str, out: Output
) -> None:
    """Start a cluster and leave it running."""
    from shardkit.cli.options import map_store
    from shardkit.errors import PreconditionFailed
    from shardkit.testing import LocalCluster, record

    model: ShardMap | None = None
    if like is not None:
        if not zookeeper:
            raise click.UsageError("--like publishes a map, which needs the ZooKeeper that --no-zookeeper leaves out")
        with map_store(like) as store:
            model = store.load()
    with record.exclusively(name):
        if record.load(name) is not None:
            raise PreconditionFailed(
                f"a local cluster named {name} is up already",
                hint=f"shardkit local down --name {name}, or give another --name",
            )
        cluster = LocalCluster(
            tuple(model.shards) if model is not None else shards,
            replicas,
            staging=staging,
            zookeeper=zookeeper,
            flavour="mysql" if flavour == "mysql" else "mariadb",
            name=name,
        )
        with cluster:
            source = None
            if model is not None:
                source = cluster.zookeeper_url(model.cluster)
                cluster.publish(model.with_shards(cluster.shards))
            elif cluster.zookeeper is not None:
                source = cluster.zookeeper_url(name)
            kept = cluster.detach(map_source=source)
    _show(kept, kept.status(), out)
    if source is not None and model is None:
        out.note(
            f"no shard map is published yet: write one over these servers, then 'shardkit map apply' it to {source}"
        )


@local.command()
@name_option
@output_option
def status(name: str, out: Output) -> int:
    """Show the servers of a cluster that was started with 'up', and what to export for the other commands.

    Exit code 3 when one of them does not answer.
    """
    from shardkit.errors import DifferencesFound
    from shardkit.testing.record import Health

    kept = _recorded(name)
    states = kept.status()
    _show(kept, states, out)
    away = [state.name for state in states if state.health is not Health.RUNNING]
    if away:
        out.warning(f"{len(away)} of {len(states)} servers do not answer: {', '.join(away)}")
        out.note(f"'shardkit local down --name {name}', then up again: local clusters are thrown away, not mended")
    return DifferencesFound.exit_code if away else 0


@local.command()
@name_option
@output_option
def down(name: str, out: Output) -> None:
    """Stop a cluster that was started with 'up' and remove its data."""
    from shardkit.testing import record

    with record.exclusively(name):
        kept = _recorded(name)
        kept.remove()
    out.result({"name": kept.name, "stopped": [server.name for server in kept.servers]})
    count = len(kept.servers)
    out.done(f"stopped {count} {'server' if count == 1 else 'servers'} and removed their data")


def _recorded(name: str) -> ClusterRecord:
    from shardkit.errors import PreconditionFailed
    from shardkit.testing import record

    kept = record.load(name)
    if kept is None:
        others = ", ".join(record.names())
        raise PreconditionFailed(
            f"no local cluster named {name} is up",
            hint=f"give --name, one of {others}" if others else "shardkit local up starts one",
        )
    return kept


def _show(kept: ClusterRecord, states: tuple[ServerState, ...], out: Output) -> None:
    out.result(
        {
            "name": kept.name,
            "flavour": kept.flavour,
            "map": kept.map_source,
            "servers": states,
            "shards": kept.shards(),
            "environment": _environment(kept),
        }
    )
    out.table(COLUMNS, [(state.name, state.kind, state.url, state.pid, state.health) for state in states])
    out.text("\n".join(["", *(f"export {variable}={value}" for variable, value in _environment(kept).items())]))


def _environment(kept: ClusterRecord) -> Mapping[str, str]:
    """What shardkit's other commands need to find this cluster and log on to it."""
    from shardkit.testing.database import ROOT_USER

    source = {"SHARDKIT_MAP": kept.map_source} if kept.map_source is not None else {}
    return {**source, "SHARDKIT_USER": ROOT_USER}
