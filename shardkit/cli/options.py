"""The options that every command shares: ``--map``, ``--json``, ``--yes``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import rich_click as click

from shardkit.cli.output import Output

if TYPE_CHECKING:
    from shardkit.mapstore import MapStore
    from shardkit.shardmap import ShardMap
    from shardkit.topology import Shard

F = TypeVar("F", bound=Callable[..., Any])


def map_option(command: F) -> F:
    """``--map SOURCE``, or ``SHARDKIT_MAP``; the command gets it as ``map_source``. Open it with `map_store`."""
    return click.option(
        "--map",
        "map_source",
        metavar="SOURCE",
        envvar="SHARDKIT_MAP",
        show_envvar=True,
        required=True,
        help="The shard map: zookeeper://host:2181/cluster, file:shardmap.yaml, or a .yaml path.",
    )(command)


def output_option(command: F) -> F:
    """``--json``; the command gets an `Output` as ``out``."""
    return click.option(
        "--json",
        "out",
        is_flag=True,
        callback=lambda _ctx, _parameter, value: Output(as_json=value),
        help="Print one JSON document instead of text.",
    )(command)


def yes_option(command: F) -> F:
    """``--yes`` for `Output.confirm`; the command gets it as ``yes``."""
    return click.option("--yes", "-y", "yes", is_flag=True, help="Do not ask.")(command)


@contextmanager
def map_store(source: str, *, timeout: float = 10.0) -> Iterator[MapStore]:
    """The store that ``--map`` names, closed afterwards."""
    from shardkit.mapstore import open_store  # keeps SQLAlchemy and kazoo out of --help

    store = open_store(source, timeout=timeout)
    try:
        yield store
    finally:
        store.close()


def chosen_shards(shard_map: ShardMap, names: Collection[str]) -> list[Shard]:
    """The shards that a command line names, in the map's order; all of them where it names none.

    :raises UnknownTable: when the map has no such shard.
    """
    for name in names:
        shard_map.shard(name)
    return [shard for name, shard in shard_map.shards.items() if not names or name in names]
