"""``schema_translate_map`` over several shards: where it leads them to one database, its rows would count once for each
of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any, TypeAlias

from sqlalchemy import Connection

from shardkit.errors import RoutingError
from shardkit.snapshots import View

SchemaMap: TypeAlias = Mapping[str | None, str | None]


def schema_map_of(connection: Connection) -> SchemaMap:
    """What a connection, or its engine, renames whatever is sent on it."""
    found: Any = connection.get_execution_options().get("schema_translate_map")
    return found or {}


def refuse_shared_schema(tables: Iterable[str], renamed: Mapping[str, SchemaMap], view: View) -> None:
    """:raises RoutingError: where several shards of one server are led to the same database.

    :param tables: as the shard map calls them.
    :param renamed: shard -> its ``schema_translate_map``.
    """
    if view.planner.dialect_name == "sqlite" or not any(renamed.values()):
        return
    for table in tables:
        schema = table.rpartition(".")[0] or None
        if not any(each.get(schema) for each in renamed.values()):
            continue
        masters = {shard: view.map.shards[shard].master for shard in renamed}
        named: Sequence[Any] = [
            (_host(masters[shard].host), masters[shard].port, each.get(schema) or schema or masters[shard].database)
            for shard, each in renamed.items()
        ]
        if len(set(named)) < len(named):
            raise RoutingError(
                "schema_translate_map names a database that several shards on one server share",
                table=table,
                shards=len(renamed),
                hint="ask one shard (shardkit_shard), or give each shard a server of its own",
            )


def _host(name: str) -> str:
    """One spelling of a host's name, as far as it shows: nobody is asked what other names a host has."""
    plain = name.strip("[]").rstrip(".").casefold()
    try:
        address = ip_address(plain)
    except ValueError:
        return plain
    return "localhost" if address.is_loopback else str(address)
