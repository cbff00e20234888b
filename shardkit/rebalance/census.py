"""What each bucket of a keyspace holds, counted on the masters."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.partition import Bucket, DirectoryPartition
from shardkit.rebalance.servers import Server
from shardkit.rebalance.tables import moving_tables, quoted
from shardkit.shardmap import Keyspace, ShardMap
from shardkit.topology import Role


@dataclass(frozen=True, slots=True)
class Census:
    """Rows and bytes by bucket; buckets that hold nothing may be left out."""

    rows: Mapping[Bucket, int]
    size: Mapping[Bucket, int]


def count(shard_map: ShardMap, keyspace: Keyspace, credentials: CredentialSource) -> Census:
    """Count every bucket of a keyspace: one scan of each of its tables on each of its shards.

    :raises PreconditionFailed: for partitions whose buckets the database cannot tell apart, shards that are not
        servers, and rows that are in no bucket.
    """
    if isinstance(keyspace.partition, DirectoryPartition):
        raise PreconditionFailed(
            f"keyspace {keyspace.name!r} is partitioned by a directory, whose buckets cannot be moved yet",
            hint="a database cannot tell in SQL which bucket a row is in; use hash, list or range",
        )
    by_name = {str(bucket): bucket for bucket in keyspace.placement}
    rows: dict[Bucket, int] = {}
    size: dict[Bucket, int] = {}
    for shard in keyspace.shards:
        endpoint = shard_map.shard(shard).master
        if endpoint.dialect != "mysql":
            raise PreconditionFailed(
                f"shard {shard} is a SQLite file: buckets can be moved between MariaDB and MySQL servers only",
                hint="the fence that keeps a move safe is made of triggers and row locks, which SQLite lacks",
            )
        here = set(keyspace.buckets_on(shard))
        with closing(Server(shard, Role.MASTER, endpoint, credentials)) as server:
            for table in moving_tables(server, keyspace):
                for name, found, width in server.rows(
                    f"SELECT {table.bucket(keyspace.partition)} AS shardkit_bucket, COUNT(*), SUM({table.width})"
                    f" FROM {quoted(table.name)} GROUP BY shardkit_bucket"
                ):
                    if name is None:
                        raise PreconditionFailed(
                            f"{found} rows of {table.name} on {shard} have keys that no bucket of {keyspace.name!r} "
                            "takes: once buckets are elsewhere, nobody finds those rows by their key",
                            hint="give these keys a bucket in the shard map, or delete the rows"
                            if keyspace.normalize is None
                            else "change these keys: 'shardkit map validate --connect' says what is wrong with them",
                        )
                    bucket = by_name.get(str(name))
                    if bucket in here:
                        rows[bucket] = rows.get(bucket, 0) + int(found)
                        size[bucket] = size.get(bucket, 0) + int(width)
    return Census(rows, size)
