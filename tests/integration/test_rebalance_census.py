"""Counting buckets before they are moved."""

from __future__ import annotations

import pytest

from shardkit.errors import PreconditionFailed
from shardkit.rebalance import census
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer


def test_rows_in_no_bucket_stop_a_move_before_it_is_planned(
    database_server: LocalDatabaseServer, fresh_database: str, flavour: str
) -> None:
    collation = "utf8mb4_nopad_bin" if flavour == "mariadb" else "utf8mb4_0900_bin"
    database_server.execute(
        f"CREATE TABLE {fresh_database}.stores (id INT PRIMARY KEY, region VARCHAR(20) CHARACTER SET utf8mb4 "
        f"COLLATE {collation} NOT NULL)"
    )
    database_server.execute(f"INSERT INTO {fresh_database}.stores VALUES (1, 'seoul'), (2, 'busan'), (3, 'seoul')")
    shard_map = ShardMap.parse(
        {
            "format": 1,
            "cluster": "x",
            "keyspaces": {
                "stores": {
                    "partition": {"by": "list", "buckets": {"north": ["seoul"], "south": ["busan"]}},
                    "tables": {"stores": "region"},
                    "placement": {"s0": ["north", "south"]},
                }
            },
            "shards": {
                "s0": {"master": database_server.endpoint(fresh_database).url},
                "s1": {"master": "mysql://127.0.0.1:1/x"},
            },
        }
    )
    keyspace = shard_map.keyspace("stores")
    assert dict(census.count(shard_map, keyspace, database_server.credentials).rows) == {"north": 2, "south": 1}
    database_server.execute(f"INSERT INTO {fresh_database}.stores VALUES (4, 'jeju')")
    with pytest.raises(PreconditionFailed, match="1 rows of stores on s0 have keys that no bucket of 'stores' takes"):
        census.count(shard_map, keyspace, database_server.credentials)
