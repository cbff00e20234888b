"""The demo's shard map: one keyspace of each kind, made from the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardkit.demo import data
from shardkit.partition import HASH_BUCKETS
from shardkit.shardmap import ShardMap
from shardkit.topology import Shard

_NEW_YORK = ("EWR", "JFK", "LGA")


def flights_map(shards: Mapping[str, Shard]) -> ShardMap:
    """The map over two shards: flights by hash, daily visits by region, weather as a whole table."""
    first, second = shards
    half = HASH_BUCKETS // 2
    regions = regions_of_airports()
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "flights",
            "keyspaces": {
                "flights": {
                    "partition": {"by": "hash", "buckets": HASH_BUCKETS},
                    "tables": {"flights": "tailnum"},
                    "reference": ["airlines", "airports", "planes"],
                    "placement": {first: f"0-{half - 1}", second: f"{half}-{HASH_BUCKETS - 1}"},
                },
                "visits": {
                    "partition": {"by": "list", "buckets": regions},
                    "tables": {"daily_visits": "airport"},
                    "placement": {first: ["new_york", "west"], second: ["east", "central"]},
                },
                "weather": {"tables": ["weather"], "placement": second},
            },
            "shards": {name: _written(shard) for name, shard in shards.items()},
        }
    )


def _written(shard: Shard) -> dict[str, Any]:
    fields: dict[str, Any] = {"master": shard.master.url}
    if shard.staging is not None:
        fields["staging"] = shard.staging.url
    if shard.replicas:
        fields["replicas"] = [replica.url for replica in shard.replicas]
    return fields


def regions_of_airports() -> dict[str, list[str]]:
    """Every airport that a flight left or reached, by region: New York itself, east, central, west by time zone."""
    zone = {airport["faa"]: airport["tz"] for airport in data.airports()}
    regions: dict[str, list[str]] = {"new_york": list(_NEW_YORK), "east": [], "central": [], "west": []}
    for airport in sorted(data.destinations() - set(_NEW_YORK)):
        offset = zone.get(airport, -4)  # the four that the file of airports lacks are in the Caribbean
        regions["east" if offset >= -5 else "central" if offset == -6 else "west"].append(airport)
    return regions
