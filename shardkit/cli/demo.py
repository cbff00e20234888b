"""``shardkit demo``: the main job on real data, from nothing, and nothing left behind."""

from __future__ import annotations

import rich_click as click

from shardkit.cli.options import output_option
from shardkit.cli.output import Output


@click.command()
@click.option("--embedded", is_flag=True, help="The routing half alone, on SQLite files: no server, a few seconds.")
@click.option("--keep", is_flag=True, help="Leave everything running, and say how to look at it and how to stop it.")
@output_option
def demo(embedded: bool, keep: bool, out: Output) -> None:
    """Show shardkit at work on every flight that left New York City in 2013.

    Starts ZooKeeper and two shards, each with a master, a staging database and two replicas, loads 336,776 flights
    through the session factory, asks questions of the replicas, kills the relay in the middle of writes, moves a tenth
    of the flights to the other shard, and checks every row. Then stops and removes everything.
    """
    if embedded:
        from shardkit.demo.embedded import run as run_embedded

        run_embedded(out, keep=keep)
    else:
        from shardkit.demo.servers import run as run_servers

        run_servers(out, keep=keep)
