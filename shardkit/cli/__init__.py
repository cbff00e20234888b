"""The ``shardkit`` command line. One module per command group; they are imported when used."""

from __future__ import annotations

import rich_click as click

from shardkit.cli.frame import Entry, LazyGroup, configure_logging

_ENTRIES = {
    "demo": Entry("shardkit.cli.demo", "demo", "See it all work on this machine, on real data."),
    "local": Entry("shardkit.cli.local", "local", "Start and stop a throw-away cluster on this machine."),
    "status": Entry("shardkit.cli.status", "status", "The cluster at a glance: shards, endpoints, lag."),
    "map": Entry("shardkit.cli.map", "map_", "Show, check, publish and compare shard maps."),
    "where": Entry("shardkit.cli.where", "where", "Which shard a key lives on."),
    "directory": Entry("shardkit.cli.directory", "directory", "Which bucket keys are in, where a table says so."),
    "explain": Entry("shardkit.cli.explain", "explain", "Where a statement would run, and why."),
    "relay": Entry("shardkit.cli.relay", "relay", "Copy every master's changes to its replicas."),
    "shard": Entry("shardkit.cli.shard", "shard", "Every shard's databases, and a new master for one."),
    "rebalance": Entry("shardkit.cli.rebalance", "rebalance", "Move buckets between shards."),
    "doctor": Entry("shardkit.cli.doctor", "doctor", "Look for what is unwell, and cure it."),
    "migrate": Entry("shardkit.cli.migrate", "migrate", "Alembic over every shard."),
}


@click.group(
    cls=LazyGroup,
    entries=_ENTRIES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("-v", "--verbose", count=True, metavar="", help="Log what happens to standard error; twice for more.")
@click.version_option(package_name="shardkit")
def cli(verbose: int) -> None:
    """Sharding, read off-loading and change data capture for MySQL and MariaDB.

    Exit codes: 0 done, 1 failed, 2 usage, 3 differences found, 4 precondition not met, 5 partly applied,
    130 interrupted.
    """
    configure_logging(verbose)


def main() -> None:
    """The entry point of the ``shardkit`` script."""
    cli.main(prog_name="shardkit")
