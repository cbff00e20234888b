"""Making sure that no process still works by an older map: asked nicely first, then shown the door by the databases.

Every process tells the map's store the oldest version that its open transactions use. A process that has lost the
store is not heard of there; therefore the shards raise the version that they take (`shardkit_map_version`, which
`shardkit.engines` reads on every new connection) and connections from before that are closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from shardkit.credentials import CredentialSource
from shardkit.errors import RebalanceError
from shardkit.mapstore import MapStore
from shardkit.own_tables import SYSTEM_LOCK
from shardkit.rebalance.servers import Server
from shardkit.topology import Endpoint, Role, Shard

#: Seconds between two looks.
LOOK_SECONDS = 0.05
#: Seconds that open transactions of unknown processes get to end before their connections are closed.
GRACE_SECONDS = 3.0

_SERVERS_OWN = ("system user", "event_scheduler", "binlog dump", "binlog dump gtid", "daemon")


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment on one endpoint: connections with a smaller id are older.

    :param connection: the id that a connection got at that moment.
    """

    shard: str
    role: Role
    endpoint: Endpoint
    connection: int


def read_by_clients(shards: Iterable[Shard]) -> list[tuple[str, Role, Endpoint]]:
    """The endpoints that sessions use: masters and replicas. Staging databases are the relay's alone."""
    return [
        (shard.name, role, endpoint)
        for shard in shards
        for role, endpoint in shard.endpoints()
        if role is not Role.STAGING
    ]


def marks(shards: Iterable[Shard], credentials: CredentialSource) -> list[Mark]:
    """This moment on every endpoint that sessions use.

    :raises Unreachable: when one does not answer.
    """
    found: list[Mark] = []
    for name, role, endpoint in read_by_clients(shards):
        with closing(Server(name, role, endpoint, credentials)) as server:
            found.append(Mark(name, role, endpoint, server.id))
    return found


def raise_version(master: Server, version: int) -> None:
    """Let the shard take statements of this map version and later ones only."""
    master.run(
        "INSERT INTO shardkit_map_version (id, min_map_version) VALUES (1, %s)"
        " ON DUPLICATE KEY UPDATE min_map_version = GREATEST(min_map_version, VALUES(min_map_version))",
        version,
    )


def wait_for_clients(
    store: MapStore, version: int, *, patience: float, wait: Callable[[float], None], job: str
) -> None:
    """Wait until every live process runs on this version or a later one.

    :param patience: seconds.
    :raises RebalanceError: naming the processes that do not.
    """
    deadline = time.monotonic() + patience
    while True:
        behind = [client for client in store.clients() if client.version < version]
        if not behind:
            return
        if time.monotonic() >= deadline:
            names = ", ".join(f"{client.host} process {client.pid} (version {client.version})" for client in behind[:5])
            more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
            raise RebalanceError(
                f"after {patience:.0f} s these still work by an older map than version {version}: {names}{more}",
                job=job,
                hint="they are stopped, or have a transaction open since before: end those, then run the same command "
                "again",
            )
        wait(LOOK_SECONDS)


def wait_for_replicas(
    shard: Shard,
    credentials: CredentialSource,
    query: str,
    values: Sequence[object],
    *,
    patience: float,
    wait: Callable[[float], None],
    job: str,
) -> None:
    """Wait until a query has an answer on every replica: until they have applied what wrote it on the master.

    :param patience: seconds.
    :raises RebalanceError: naming the replica that does not get there.
    """
    deadline = time.monotonic() + patience
    for endpoint in shard.with_role(Role.REPLICA):
        with closing(Server(shard.name, Role.REPLICA, endpoint, credentials)) as replica:
            while not replica.rows(query, *values):
                if time.monotonic() >= deadline:
                    raise RebalanceError(
                        f"{replica} has not applied its master's changes after {patience:.0f} s",
                        job=job,
                        hint="check the relay ('shardkit relay status') or take the replica out of the map, then run "
                        "the same command again",
                    )
                wait(LOOK_SECONDS)


def close_older(
    at: Iterable[Mark], credentials: CredentialSource, *, wait: Callable[[float], None], grace: float = GRACE_SECONDS
) -> int:
    """Close the connections of applications that are older than the marks.

    Idle ones at once; those inside a transaction get ``grace`` seconds to end it. Replication, the relay and other
    rebalance jobs keep theirs, and so do other databases' clients.

    :returns: how many were closed.
    """
    closed = 0
    for mark in at:
        with closing(Server(mark.shard, mark.role, mark.endpoint, credentials)) as server:
            deadline = time.monotonic() + grace
            while True:
                older = _older(server, mark.connection)
                due = time.monotonic() >= deadline
                for connection, busy in older.items():
                    if due or not busy:
                        server.kill(connection)
                        closed += 1
                if due or not any(older.values()):
                    break
                wait(LOOK_SECONDS)
    return closed


def _older(server: Server, mark: int) -> dict[int, bool]:
    """The application's connections to this database from before the mark: id -> inside a transaction."""
    if mark <= 0:
        return {}
    found = [
        (int(connection), str(command).lower())
        for connection, user, _host, database, command, *_ in server.rows("SHOW PROCESSLIST")
        if int(connection) < mark
        and database == server.database
        and str(user).lower() not in _SERVERS_OWN
        and str(command).lower() not in _SERVERS_OWN
    ]
    open_transactions = {
        int(row[0]) for row in server.rows("SELECT trx_mysql_thread_id FROM information_schema.innodb_trx")
    }
    return {
        connection: command != "sleep" or connection in open_transactions
        for connection, command in found
        if server.lock_holder(f"{SYSTEM_LOCK}{connection}") != connection
    }
