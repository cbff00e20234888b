"""How the databases of a shard stand, as the relay's host sees them: ephemeral nodes ``servers/<shard>/<role>-<n>``.

For people, by `shardkit status`, where they cannot reach a database themselves. No client decides by it: what another
host sees a moment ago says neither whether this process reaches a replica nor what that replica has now.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pymysql
from kazoo.exceptions import KazooException, NodeExistsError, NoNodeError
from kazoo.handlers.threading import KazooTimeoutError

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import ShardkitError
from shardkit.gtid import Flavour
from shardkit.mapstore import ZooKeeperMapStore
from shardkit.topology import Endpoint, ReplicationKind, Role, Shard
from shardkit_cdc.connection import code_of, connect
from shardkit_cdc.election import Election

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

logger = logging.getLogger(__name__)

#: Seconds between two looks.
INTERVAL = 0.5
#: Seconds after which a position is told again; what people act on (reachable or not, writable) at once.
REFRESH = 2.0
#: Seconds that a server, and ZooKeeper, are given to answer.
_ANSWER_SECONDS = 2.0
_NO_SUCH_TABLE = 1146
#: What it means that ZooKeeper cannot be told or asked now.
_AWAY = (KazooException, KazooTimeoutError, ShardkitError)
#: What it means that a database cannot be asked.
_UNREACHABLE = (ShardkitError, pymysql.MySQLError, OSError)


@dataclass(frozen=True, slots=True)
class LiveState:
    """One database, as the relay's host saw it.

    :param endpoint: its URL.
    :param writable: None while it is not reachable.
    :param position: how far it has the log of the shard's master; of the master, the end of that log.
    :param lag_seconds: age of the newest heartbeat that it holds; None for masters, and where there is none.
    :param epoch: of the shard.
    :param by: ``host:process`` of the relay.
    :param at: when, in UTC.
    """

    endpoint: str
    role: str
    reachable: bool
    epoch: int
    by: str
    at: datetime
    writable: bool | None = None
    position: str | None = None
    lag_seconds: float | None = None
    error: str | None = None


def live_states(store: ZooKeeperMapStore) -> Mapping[str, LiveState]:
    """What relays tell now, by endpoint URL; empty while none runs."""
    client, found = store.client, {}

    def ask(result: Any) -> Any:
        return result.get(timeout=_ANSWER_SECONDS)

    with suppress(*_AWAY):  # it may be away, or the nodes while they are read
        for shard in ask(client.get_children_async(store.path("servers"))):
            for name in ask(client.get_children_async(store.path("servers", shard))):
                with suppress(NoNodeError):
                    fields = json.loads(ask(client.get_async(store.path("servers", shard, name)))[0])
                    state = LiveState(**{**fields, "at": datetime.fromisoformat(fields["at"])})
                    found[state.endpoint] = state
    return found


class LiveStateTask:
    """Tells how one shard's databases stand, in a thread of the caller's.

    :param by: who this process is, for people.
    """

    def __init__(
        self,
        shard: Shard,
        credentials: CredentialSource,
        store: ZooKeeperMapStore,
        *,
        by: str,
        election: Election,
        interval: float = INTERVAL,
    ) -> None:
        self._shard = shard
        self._credentials = credentials
        self._store = store
        self._by = by
        self._election = election
        self._interval = interval
        self._stop = threading.Event()
        self._connections: dict[Endpoint, Connection] = {}
        self._told: dict[str, tuple[float, LiveState]] = {}

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()
        self._election.cancel()

    def run(self) -> None:
        """Look and tell until stopped."""
        places = [
            (f"{role}-{number}", role, endpoint)
            for role in Role
            for number, endpoint in enumerate(self._shard.with_role(role))
        ]
        while not self._stop.is_set():
            with self._election.lead(self._stop) as lost, ThreadPoolExecutor(len(places)) as pool:
                while lost is not None and not lost.is_set() and not self._stop.wait(self._interval):
                    list(pool.map(lambda place: self._tell(place[0], self._look(place[1], place[2])), places))
                self._withdraw()

    def _look(self, role: Role, endpoint: Endpoint) -> LiveState:
        state = LiveState(endpoint.url, str(role), False, self._shard.epoch, self._by, datetime.now(UTC))
        kept = self._connections.pop(endpoint, None)
        if kept is not None:
            with suppress(*_UNREACHABLE):  # the server may have closed it, and be well
                return self._ask(kept, endpoint, role, state)
        try:
            connection = connect(endpoint, self._credentials, autocommit=True, read_timeout=_ANSWER_SECONDS)
            return self._ask(connection, endpoint, role, state)
        except _UNREACHABLE as error:
            return replace(state, error=str(error))

    def _ask(self, connection: Connection, endpoint: Endpoint, role: Role, state: LiveState) -> LiveState:
        try:
            found = self._facts(connection, role, state)
        except _UNREACHABLE:
            connection._force_close()  # type: ignore[attr-defined]  # noqa: SLF001 - nothing is to be sent
            raise
        self._connections[endpoint] = connection
        return found

    def _facts(self, connection: Connection, role: Role, state: LiveState) -> LiveState:
        ((version, read_only),) = _rows(connection, "SELECT VERSION(), @@global.read_only")
        flavour = Flavour.of_version(str(version))
        state = replace(state, reachable=True, writable=not read_only)
        if role is Role.MASTER or self._shard.replication is ReplicationKind.NATIVE:
            applied = "gtid_binlog_pos" if role is Role.MASTER else "gtid_slave_pos"
            variable = applied if flavour is Flavour.MARIADB else "gtid_executed"
            positions = _rows(connection, f"SELECT @@global.{variable}")
        else:
            history = own_tables.HISTORY_PREFIX + self._shard.name
            positions = _rows(connection, f"SELECT gtid FROM {own_tables.position.name} WHERE hop = %s", history)
        state = replace(state, position=str(positions[0][0]).replace("\n", "") if positions else None)
        if role is Role.MASTER:
            return state
        beats = _rows(
            connection,
            f"SELECT (UNIX_TIMESTAMP(NOW(6)) * 1000000 - written_at) / 1000000 FROM {own_tables.heartbeat.name} "
            "WHERE shard = %s",
            self._shard.name,
        )
        return replace(state, lag_seconds=round(max(0.0, float(beats[0][0])), 3) if beats else None)

    # --- telling

    def _tell(self, name: str, state: LiveState) -> None:
        before = self._told.get(name)
        if before is not None and time.monotonic() - before[0] < REFRESH:
            told = before[1]
            if (told.reachable, told.writable) == (state.reachable, state.writable):
                return
        try:
            self._write(name, json.dumps({**asdict(state), "at": state.at.isoformat()}).encode())
        except _AWAY as error:
            logger.debug("the state of %s could not be told: %r", state.endpoint, error)
        else:
            self._told[name] = (time.monotonic(), state)

    def _write(self, name: str, data: bytes) -> None:
        client, path = self._store.client, self._store.path("servers", self._shard.name, name)
        try:
            client.create_async(path, data, ephemeral=True, makepath=True).get(timeout=_ANSWER_SECONDS)
        except NodeExistsError:
            stat = client.set_async(path, data).get(timeout=_ANSWER_SECONDS)
            if stat.ephemeralOwner != client.client_id[0]:  # of a session that ends: it would take the node along
                client.delete_async(path).get(timeout=_ANSWER_SECONDS)
                client.create_async(path, data, ephemeral=True).get(timeout=_ANSWER_SECONDS)

    def _withdraw(self) -> None:
        """What nobody keeps up to date is worse than nothing."""
        with suppress(*_AWAY):
            client = self._store.client
            for name in self._told if client.connected else ():  # else a request would wait for a connection
                client.delete_async(self._store.path("servers", self._shard.name, name)).get(timeout=_ANSWER_SECONDS)
        self._told.clear()
        for connection in self._connections.values():
            connection._force_close()  # type: ignore[attr-defined]  # noqa: SLF001
        self._connections.clear()


def _rows(connection: Connection, statement: str, *values: object) -> list[Any]:
    """The rows; none where the table is not there (yet)."""
    with connection.cursor() as cursor:
        try:
            cursor.execute(statement, values or None)
        except pymysql.MySQLError as error:
            if code_of(error) != _NO_SUCH_TABLE:
                raise
            return []
        return list(cursor.fetchall())
