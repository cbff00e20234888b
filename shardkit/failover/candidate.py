"""The new master: brought up to a position, taken out of replication, opened."""

from __future__ import annotations

import time

from shardkit import own_tables
from shardkit.errors import PreconditionFailed
from shardkit.failover.native import stop_following
from shardkit.failover.relayed import freeze, left_prepared
from shardkit.failover.servers import Server
from shardkit.failover.standing import position_of
from shardkit.gtid import Position
from shardkit.topology import ReplicationKind, Role, Shard

_PAUSE = 0.02  # seconds between two looks


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
    freeze(server, shard, epoch)


def prepared_here(server: Server, shard: Shard, epoch: int) -> list[str]:
    """XA branches that the relay holds here without knowing their end: their names.

    :param epoch: that the shard is about to have: an earlier attempt has put them aside under it.
    """
    if not server.has_table(own_tables.prepared.name):
        return []
    found = server.rows(
        f"SELECT DISTINCT xid, gtid FROM {own_tables.prepared.name} WHERE hop IN (%s, %s)",
        own_tables.HOP_PREFIX + shard.name,
        left_prepared(shard, epoch),
    )
    return [f"{xid} (prepared at {gtid})" for xid, gtid in found]
