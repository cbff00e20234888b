"""``shardkit_shard`` and ``shardkit_key``: where the caller says that a statement belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardkit.errors import MissingKey, RoutingError
from shardkit.partition import Bucket
from shardkit.routing.keys import Readers
from shardkit.routing.keyvalues import Untrusted
from shardkit.routing.queries import Occurrence
from shardkit.routing.route import RouteOptions
from shardkit.shardmap import Keyspace, ShardMap, TableInfo


@dataclass(frozen=True)
class Hint:
    """Where the caller says that a statement belongs.

    :param bucket: the bucket of the key given; None where a shard was named.
    """

    shard: str
    reason: str
    bucket: Bucket | None = None


def hint_of(
    options: RouteOptions,
    shard_map: ShardMap,
    infos: Iterable[TableInfo] = (),
    occurrences: Sequence[Occurrence] = (),
    readers: Readers | None = None,
) -> Hint | None:
    """What the options say; None when they say nothing.

    :param infos: the statement's tables, where they are known.
    :param occurrences: the same with their columns, which tell the type of a key.
    :raises UnknownTable: for a shard that the map does not name.
    :raises RoutingError: for a shard without the table, or a key that fits no table or several shards.
    """
    if options.shard is not None:
        shard_map.shard(options.shard)
        _check_hosted(options.shard, infos)
        if options.key is None:
            return Hint(options.shard, f"shardkit_shard={options.shard!r}")
    if options.key is None:
        return None
    hint = _of_key(options.key, shard_map, tuple(infos), occurrences, readers)
    if options.shard is not None and options.shard != hint.shard:
        raise RoutingError(
            f"shardkit_shard={options.shard!r} and shardkit_key contradict each other: the key is on {hint.shard!r}",
            hint="give one of the two",
        )
    _check_hosted(hint.shard, infos)
    return hint


def _check_hosted(shard: str, infos: Iterable[TableInfo]) -> None:
    for info in infos:
        if shard not in info.shards:
            raise RoutingError(
                f"the map places no part of {info.name!r} on shard {shard!r}",
                hint=f"it stands on {', '.join(info.shards)}",
                table=info.name,
                key=info.key,
                shards=len(info.shards),
            )


def _of_key(
    key: Mapping[str, Any],
    shard_map: ShardMap,
    infos: Sequence[TableInfo],
    occurrences: Sequence[Occurrence],
    readers: Readers | None,
) -> Hint:
    names = set(key)
    fitting = [info for info in infos or shard_map.tables.values() if info.kind == "sharded" and set(info.key) == names]
    keyspaces: dict[str, tuple[Keyspace, TableInfo]] = {info.keyspace.name: (info.keyspace, info) for info in fitting}
    shown = ", ".join(sorted(names))
    if not keyspaces:
        where = f"none of {', '.join(info.name for info in infos)}" if infos else "no table of the map"
        raise RoutingError(f"shardkit_key names {shown or 'no column'}: {where} is sharded by that")
    found = []
    for keyspace, info in keyspaces.values():
        values = tuple(_stored(key[name], name, info, occurrences, readers) for name in info.key)
        found.append(shard_map.placement_of(keyspace, values))
    if len({place.shard for place in found}) > 1:
        raise RoutingError(
            f"shardkit_key names {shown}, which is the key of several keyspaces: {', '.join(keyspaces)}",
            hint="name the shard with shardkit_shard",
            shards=len(found),
        )
    return Hint(found[0].shard, f"shardkit_key gives {shown}", found[0].bucket)


def _stored(value: Any, name: str, info: TableInfo, occurrences: Sequence[Occurrence], readers: Readers | None) -> Any:
    if readers is None:
        return value
    for occurrence in occurrences:
        if occurrence.info is not info:
            continue
        column = next((each for each in occurrence.clause.c if each.name == name), None)
        read = None if column is None else readers.of(column.type, info.keyspace.normalize)
        stored = Untrusted("its column's type cannot be a key") if read is None else read(value)
        if isinstance(stored, Untrusted):
            raise MissingKey(
                f"shardkit_key: the value for {info.name}.{name} says nothing about its bucket: {stored.reason}",
                hint=stored.hint or "give a value of the column's own Python type",
                table=info.name,
                key=info.key,
            )
        return stored
    return value
