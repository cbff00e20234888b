"""shardkit's own tables on every server of a cluster.

The relay does not carry their DDL: masters, staging databases and replicas are migrated one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from shardkit.credentials import CredentialSource
from shardkit.errors import ShardkitError
from shardkit.migrate.connect import PARALLEL
from shardkit.migrate.process import ensure_own_tables
from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint, Role


@dataclass(frozen=True, slots=True)
class OwnTables:
    """One database's own tables.

    :param error: why they could not be brought up to date; None where they are.
    """

    shard: str
    role: Role
    endpoint: Endpoint
    error: str | None

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"shard": self.shard, "role": self.role, "endpoint": self.endpoint.url, "error": self.error}


def upgrade_own_tables(
    shardmap: ShardMap,
    credentials: CredentialSource,
    *,
    shards: Sequence[str] = (),
    driver: str = "pymysql",
    parallel: int = PARALLEL,
) -> tuple[OwnTables, ...]:
    """Bring shardkit's own tables up to date in every database of the cluster.

    :param shards: only these.
    :raises UnknownTable: for a shard that the map does not name.
    """
    chosen = [shardmap.shard(name) for name in shards or shardmap.shards]

    def upgrade(place: tuple[str, Role, Endpoint]) -> OwnTables:
        shard, role, endpoint = place
        try:
            ensure_own_tables(shard, endpoint, credentials, driver=driver)
        except ShardkitError as error:
            return OwnTables(shard, role, endpoint, str(error))
        return OwnTables(shard, role, endpoint, None)

    with ThreadPoolExecutor(max(1, parallel)) as pool:
        return tuple(
            pool.map(
                upgrade, [(shard.name, role, endpoint) for shard in chosen for role, endpoint in shard.endpoints()]
            )
        )
