"""The new master: brought up to a position, taken out of replication, opened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed, ShardkitError
from shardkit.failover.native import follow, following, stop_following
from shardkit.failover.servers import Server
from shardkit.failover.standing import PROMOTED, position_of
from shardkit.gtid import Position
from shardkit.topology import Endpoint, ReplicationKind, Role, Shard
from shardkit_cdc.position import lock_name

_PAUSE = 0.02  # seconds between two looks
#: Seconds that a replica gets to begin to follow its new master.
_FOLLOW_SECONDS = 3.0
_POSITION = own_tables.position.name


def wait_for(server: Server, shard: Shard, role: Role, wanted: Position, *, timeout: float) -> Position:
    """Wait until a database has everything up to a position.

    :returns: the position that it has then.
    :raises PreconditionFailed: when it does not get there in time.
    """
    deadline = time.monotonic() + timeout
    while (has := position_of(server, shard, role)) is None or not has.covers(wanted):
        if time.monotonic() >= deadline:
            who = "'shardkit relay status'" if shard.replication is ReplicationKind.RELAY else "its replication"
            raise PreconditionFailed(
                f"{server.endpoint} has not come up to {wanted} in {timeout:.0f} s: it has {has or 'nothing'}",
                hint=f"check {who}, or give it more time (--timeout), then run the same command again",
            )
        time.sleep(_PAUSE)
    return has


def detach(server: Server, shard: Shard, epoch: int) -> None:
    """Let nothing of the old master's log come any more. Running it again is safe."""
    if shard.replication is ReplicationKind.NATIVE:
        stop_following(server)
        return
    key = own_tables.HOP_PREFIX + shard.name
    (holder,) = server.row("SELECT IS_USED_LOCK(%s)", lock_name(server.endpoint.database, key))
    if holder is not None:
        server.kill(int(holder))  # its transaction would hold the row
    # the runner's compare-and-set fails from here on, and a new one finds a source that is not its own
    server.rows(
        f"UPDATE {_POSITION} SET epoch = epoch + 1, source = %s, runner = 'shardkit shard promote' WHERE hop = %s",
        f"{PROMOTED}{epoch}",
        key,
    )


def prepared_here(server: Server, shard: Shard) -> list[str]:
    """XA branches that the relay holds here without knowing their end: their names."""
    if not server.has_table(own_tables.prepared.name):
        return []
    found = server.rows(
        f"SELECT DISTINCT xid, gtid FROM {own_tables.prepared.name} WHERE hop = %s", own_tables.HOP_PREFIX + shard.name
    )
    return [f"{xid} (prepared at {gtid})" for xid, gtid in found]


def follow_all(replicas: Sequence[Endpoint], master: Endpoint, credentials: CredentialSource) -> dict[Endpoint, str]:
    """Have replicas follow the new master.

    :returns: why, for each that does not.
    """
    if not replicas:
        return {}
    with ThreadPoolExecutor(len(replicas)) as pool:
        faults = pool.map(lambda replica: _follow(replica, master, credentials), replicas)
        return {replica: fault for replica, fault in zip(replicas, faults, strict=True) if fault}


def _follow(replica: Endpoint, master: Endpoint, credentials: CredentialSource) -> str:
    """Why it does not; empty where it does."""
    try:
        with Server(replica, credentials) as server:
            follow(server, master)
            deadline = time.monotonic() + _FOLLOW_SECONDS
            while (now := following(server)) is None or not now.running:
                if time.monotonic() >= deadline:
                    return now.error or "its replication does not start" if now else "it follows nobody"
                time.sleep(_PAUSE)
    except (ShardkitError, pymysql.MySQLError) as error:
        return str(error)
    return ""
