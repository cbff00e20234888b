"""Whether the databases are as a map says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import sqlalchemy as sa

from shardkit.adoption import hazards
from shardkit.adoption.filing import misfiled
from shardkit.adoption.settings import unlike
from shardkit.adoption.tables import ColumnFacts, TableFacts, read_database
from shardkit.credentials import CredentialSource
from shardkit.engines import Engines, EngineSettings
from shardkit.normalization import ALPHABET_IN_WORDS
from shardkit.partition import (
    HashPartition,
    KeyColumn,
    KeyType,
    ListPartition,
    Partition,
    RangePartition,
    outside_alphabet,
    typed_value,
)
from shardkit.shardmap import ShardMap, TableInfo
from shardkit.topology import Role, Shard


def misfits(shard_map: ShardMap, credentials: CredentialSource) -> list[str]:
    """What of the map the masters' databases do not have, or what would go wrong there; one sentence each.

    :raises ShardUnreachable: when a master does not answer.
    """
    databases = {name: read_database(name, shard.master, credentials) for name, shard in shard_map.shards.items()}
    found: list[str] = []
    for name, facts in databases.items():
        never = _never_found(shard_map, shard_map.shards[name], facts.tables, credentials)
        found += (f"{name}: {finding}" for finding in (*_on_shard(shard_map, name, facts.tables), *never))
    found += unlike({name: facts.settings for name, facts in databases.items()})
    return found or list(misfiled(shard_map, credentials))


def _on_shard(shard_map: ShardMap, shard: str, found: Mapping[str, TableFacts]) -> Iterator[str]:
    for info in shard_map.tables.values():
        if shard not in info.shards:
            continue
        if info.name not in found:
            yield f"there is no table {info.name}"
        else:
            if info.kind == "sharded":
                yield from _sharded(info, found[info.name])
            yield from hazards.foreign_key_hazards(found[info.name], _beside(shard_map, info))


def _beside(shard_map: ShardMap, info: TableInfo) -> frozenset[str]:
    """The tables whose rows stand with this table's rows, wherever those are."""
    here = set(info.shards)

    def stands_with(other: TableInfo) -> bool:
        if other.kind == "reference":
            return here <= set(other.shards)
        if other.kind == "sharded":
            return info.kind == "sharded" and other.keyspace.name == info.keyspace.name
        return here == set(other.shards)

    return frozenset(name for name, other in shard_map.tables.items() if stands_with(other))


def _sharded(info: TableInfo, facts: TableFacts) -> Iterator[str]:
    missing = [column for column in info.key if column not in facts.columns]
    yield from (f"the table {info.name} has no key column {column}" for column in missing)
    for column in info.key:
        if column not in missing:
            yield from hazards.key_hazards(facts, facts.columns[column], info.keyspace.normalize)
            yield from _values(info, facts.columns[column])
    if not missing:
        if info.keyspace.normalize is not None and not _string_columns(info, facts):
            yield f"keyspace {info.keyspace.name}: 'normalize' is for strings, and {info.name} has none in its key"
        local = info.name in info.keyspace.local
        yield from hazards.sharded_hazards(facts, info.key, generated=info.keyspace.generated_ids, local=local)


def _string_columns(info: TableInfo, facts: TableFacts) -> list[KeyColumn]:
    columns = (facts.columns[name] for name in info.key if name in facts.columns)
    return [KeyColumn(sa.column(each.name), each.kind) for each in columns if each.kind is KeyType.STRING]


def _never_found(
    shard_map: ShardMap, shard: Shard, found: Mapping[str, TableFacts], credentials: CredentialSource
) -> Iterator[str]:
    """Rows whose keys a normalization does not know; each table that has one is read once."""
    here = [
        (info, condition)
        for name, info in shard_map.tables.items()
        if info.kind == "sharded" and shard.name in info.shards and name in found
        if (condition := outside_alphabet(_string_columns(info, found[name]), info.keyspace.normalize)) is not None
    ]
    if not here:
        return
    engines = Engines(EngineSettings(credentials))
    try:
        with engines.sync(shard.name, Role.MASTER, shard.master).connect() as connection:
            for info, condition in here:
                counting = sa.select(sa.func.count()).select_from(sa.table(info.name)).where(condition)
                if count := connection.execute(counting).scalar_one():
                    yield _outside(count, info)
    finally:
        engines.dispose()


def _outside(count: int, info: TableInfo) -> str:
    return (
        f"{count} rows of {info.name} have keys with characters that 'normalize: {info.keyspace.normalize}' does not "
        f"know (it knows {ALPHABET_IN_WORDS}): they are in no bucket, and a read by a key that the collation takes for "
        "theirs does not find them; change these keys, or do without 'normalize', on a binary collation without padding"
    )


def _values(info: TableInfo, column: ColumnFacts) -> Iterator[str]:
    """Values that stand in the map but can never stand in the column."""
    kind = column.kind
    for value in _written_values(info.keyspace.partition) if kind is not None else ():
        try:
            typed_value(kind, value)  # type: ignore[arg-type] # not None: see above
        except TypeError as error:
            yield f"keyspace {info.keyspace.name}: {error}: {info.name}.{column.name} is {kind}"


def _written_values(partition: Partition | None) -> Iterator[object]:
    match partition:
        case HashPartition():
            yield from (key[0] for key in partition.exceptions)
        case ListPartition():
            yield from (value for values in partition.values.values() for value in values)
        case RangePartition():
            yield from (end for ends in partition.bounds.values() for end in ends)
