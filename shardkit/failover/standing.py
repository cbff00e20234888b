"""Where every database of a shard stands in the log of its master."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import ShardkitError, Unreachable
from shardkit.failover.native import following
from shardkit.failover.servers import Row, Server
from shardkit.gtid import Flavour, Position
from shardkit.replicas.positions import position_query
from shardkit.replicas.token import Mark
from shardkit.topology import Endpoint, ReplicationKind, Role, Shard

PROMOTED = own_tables.PROMOTED_PREFIX
_LOOK_SECONDS = 5.0
_AT_ONCE = 16
_NOW = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS UNSIGNED)"


@dataclass(frozen=True, slots=True)
class Standing:
    """One database, as it answered.

    :param position: the position in the master's log that its data has reached; the master's own end of log.
    :param received: of native replication, how far it has the log, applied or not.
    :param beat_at: when the newest heartbeat that it holds was written: microseconds since the epoch.
    :param lag_seconds: the age of that heartbeat; None for masters, and where there is none.
    :param history: whose log its position is one of: that server's identity; of relayed copies only.
    :param begun: a promotion into the next epoch has made this the new master, and may not have got to its end: its
        identity.
    :param fed: whether something is there to bring it further: a source, or a hop's position.
    :param error: why nothing is known.
    """

    shard: str
    role: Role
    endpoint: Endpoint
    reachable: bool = False
    flavour: Flavour | None = None
    read_only: bool | None = None
    position: Position | None = None
    received: Position | None = None
    beat_at: int | None = None
    lag_seconds: float | None = None
    history: str = ""
    begun: str = ""
    fed: bool = False
    error: str = ""

    @property
    def known(self) -> Position | None:
        """The most that it has of the master's log."""
        if self.position is None or self.received is None:
            return self.position or self.received
        return Mark(0, self.position).union(Mark(0, self.received)).position


def look(shards: Iterable[Shard], credentials: CredentialSource) -> list[Standing]:
    """Ask every server of these shards, all at once; one that does not answer costs a few seconds."""
    places = [(shard, role, endpoint) for shard in shards for role, endpoint in shard.endpoints()]
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(places) or 1)) as pool:
        found = list(pool.map(lambda place: _look(place[0], place[1], place[2], credentials), places))
    begun = {(each.shard, each.begun): each.position for each in found if each.begun}
    # those that read the new master's log already hold what it held, and maybe what it has logged since
    return [replace(each, position=begun.get((each.shard, each.history), each.position)) for each in found]


def _look(shard: Shard, role: Role, endpoint: Endpoint, credentials: CredentialSource) -> Standing:
    standing = Standing(shard.name, role, endpoint)
    if endpoint.dialect != "mysql":
        return replace(standing, error="SQLite has no log: there is no position to tell")
    try:
        with Server(endpoint, credentials, seconds=_LOOK_SECONDS) as server:
            return stand(server, shard, role)
    except Unreachable as error:
        return replace(standing, error=str(error))
    except ShardkitError as error:
        return replace(standing, reachable=True, error=str(error))


def stand(server: Server, shard: Shard, role: Role) -> Standing:
    """How one database stands, asked on an open connection."""
    standing = Standing(
        shard.name,
        role,
        server.endpoint,
        reachable=True,
        flavour=server.flavour,
        read_only=server.is_on("read_only"),
        position=position_of(server, shard, role),
    )
    if server.has_table(own_tables.heartbeat.name):
        beats = server.rows(f"SELECT written_at, {_NOW} FROM {own_tables.heartbeat.name} WHERE shard = %s", shard.name)
        for beat_at, now in beats:
            lag = None if role is Role.MASTER else max(0.0, (int(now) - int(beat_at)) / 1e6)
            standing = replace(standing, beat_at=int(beat_at), lag_seconds=lag)
    if role is Role.MASTER:
        return standing
    if shard.replication is ReplicationKind.RELAY:
        rows = {str(hop): (str(source), int(epoch)) for hop, source, epoch in _relayed(server)}
        source, _ = rows.get(own_tables.HOP_PREFIX + shard.name, (PROMOTED, 0))
        begun, epoch = rows.get(PROMOTED + shard.name, ("", 0))
        return replace(
            standing,
            fed=not source.startswith(PROMOTED),
            history=rows.get(own_tables.HISTORY_PREFIX + shard.name, ("", 0))[0],
            begun=begun if epoch == shard.epoch + 1 else "",
        )
    followed = following(server)
    if followed is None:
        return standing
    return replace(standing, fed=True, received=followed.received, error=followed.error)


def position_of(server: Server, shard: Shard, role: Role) -> Position | None:
    """How far a database has the log of the shard's master; None where it has nothing of it."""
    if role is Role.MASTER:
        return server.end_of_log
    if shard.replication is ReplicationKind.RELAY and not server.has_table(own_tables.position.name):
        return None
    query = position_query(shard.name, role, shard.replication, server.flavour)
    return query.read(server.row(f"SELECT {query.expression}")[0])


def _relayed(server: Server) -> list[Row]:
    if not server.has_table(own_tables.position.name):
        return []
    return server.rows(f"SELECT hop, source, epoch FROM {own_tables.position.name}")
