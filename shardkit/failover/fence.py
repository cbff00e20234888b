"""The old master is closed: nobody writes to it, nothing on it is left in the middle, and its log has an end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.decisions import BranchId, Connection, Janitor, Outcome
from shardkit.errors import PreconditionFailed
from shardkit.failover.servers import LOCK_WAIT, Server
from shardkit.gtid import Flavour, Position
from shardkit.topology import Endpoint
from shardkit_cdc.connection import code_of, connect
from shardkit_cdc.heartbeat import beat

_PAUSE = 0.02  # seconds between two looks
#: Seconds that statements at work get to end before the connections are closed under them.
_STATEMENT_SECONDS = 1
_VERSION = own_tables.map_version.name


@dataclass(frozen=True, slots=True)
class Account:
    """One account of a server."""

    user: str
    host: str

    def __str__(self) -> str:
        return f"{self.user}@{self.host}"


def accounts(server: Server, user: str) -> list[Account]:
    """The accounts that ``user`` or ``user@host`` names."""
    name, at, host = user.rpartition("@")
    found = server.rows("SELECT User, Host FROM mysql.user WHERE User = %s", name if at else user)
    every = [Account(str(user), str(host)) for user, host in found]
    return [account for account in every if account.host == host] if at else every


def writers_past_read_only(server: Server) -> list[str]:
    """Connected users of others whose rights take them past ``read_only``; none on MySQL, which closes to them, too."""
    if server.flavour is Flavour.MYSQL:
        return []
    rights = server.rows(
        "SELECT GRANTEE FROM information_schema.USER_PRIVILEGES WHERE PRIVILEGE_TYPE IN ('READ_ONLY ADMIN', 'SUPER')"
    )
    able = {str(grantee).partition("@")[0].strip("'") for (grantee,) in rights}
    return sorted({user for user in server.clients().values() if user in able})


def foreign_branches(server: Server) -> int:
    """How many XA branches stand prepared that are not shardkit's."""
    found = server.rows("XA RECOVER")
    ours = 0
    for format_id, length, _, data in found:
        raw = data if isinstance(data, bytes) else str(data).encode("latin-1")
        ours += BranchId.parse(format_id, length, raw) is not None
    return len(found) - ours


class Fence:
    """Closes one master, and opens it again where the promotion does not come about.

    Every method may be run again.

    :param version: the map version from which on sessions may use the shard again: the one that is to be published.
    :param locked: accounts that are locked on this server alone.
    """

    def __init__(self, server: Server, shard: str, version: int, locked: Sequence[Account] = ()) -> None:
        self._server = server
        self._shard = shard
        self._version = version
        self._locked = tuple(locked)

    def close(self, *, timeout: float, note_version: bool = True) -> int:
        """Refuse writes, refuse sessions of the old map, and end every client's connection.

        :param note_version: False where nothing more may be written here.
        :returns: how many connections were ended.
        :raises PreconditionFailed: when a client's connection does not end in time.
        """
        server, deadline = self._server, time.monotonic() + timeout
        server.rows(f"SET SESSION lock_wait_timeout = {_STATEMENT_SECONDS}")
        self._shut(deadline)
        if note_version or self._locked:
            server.open_to_ourselves()
            if note_version:
                server.rows(
                    f"INSERT INTO {_VERSION} (id, min_map_version) VALUES (1, %s)"
                    " ON DUPLICATE KEY UPDATE min_map_version = GREATEST(min_map_version, VALUES(min_map_version))",
                    self._version,
                )
            self._lock_accounts("LOCK")
            self._shut(deadline)
        return self._end_connections(deadline)

    def _shut(self, deadline: float) -> None:
        while True:
            try:
                self._server.close_to_writes()
            except pymysql.OperationalError as error:
                if code_of(error) != LOCK_WAIT or time.monotonic() >= deadline:
                    raise
                for connection in self._server.clients():
                    self._server.kill(connection)
            else:
                return

    def _lock_accounts(self, word: str) -> None:
        if not self._locked:
            return
        self._server.rows("SET SESSION sql_log_bin = 0")  # the other servers' accounts stay as they are
        for account in self._locked:
            self._server.rows(f"ALTER USER %s@%s ACCOUNT {word}", account.user, account.host)
        self._server.rows("SET SESSION sql_log_bin = 1")

    def _end_connections(self, deadline: float) -> int:
        """Those that are there now: later ones are told that the server is read-only, and that their map is old."""
        open_now = set(self._server.clients())
        ended = len(open_now)
        for connection in open_now:
            self._server.kill(connection)
        while open_now := open_now & self._server.clients().keys():
            if time.monotonic() >= deadline:
                raise PreconditionFailed(
                    f"{self._server.endpoint.address}: connection {min(open_now)} does not end; it may be rolling back",
                    hint="wait for it, then run the same command again",
                )
            time.sleep(_PAUSE)
        return ended

    def resolve(
        self, shard_masters: Mapping[str, Endpoint], credentials: CredentialSource, *, timeout: float
    ) -> dict[BranchId, Outcome]:
        """End what clients left prepared here, as the deciding shards say.

        :raises PreconditionFailed: when a branch cannot be ended.
        """
        deadline = time.monotonic() + timeout
        janitor = Janitor(Connector(shard_masters, credentials))
        ended: dict[BranchId, Outcome] = {}
        while left := janitor.prepared(self._shard):
            if time.monotonic() >= deadline:
                raise PreconditionFailed(
                    f"transaction {left[0].transaction} stands prepared on {self._server.endpoint.address} and cannot "
                    f"be ended: {left[0].decider} decides over it",
                    hint="see that the deciding shard can be reached, then run the same command again",
                )
            ended |= janitor.sweep([self._shard], patient=False)
        if foreign_branches(self._server):
            raise PreconditionFailed(
                f"XA branches of others stand prepared on {self._server.endpoint.address}",
                hint="commit or roll them back by hand (XA RECOVER), then run the same command again",
            )
        return ended

    def mark_the_end(self) -> None:
        """Write one last row of our own: the relay tells positions only with rows of its database."""
        self._server.open_to_ourselves()
        beat(self._server.connection, self._shard)
        self._server.close_to_writes()

    def final_position(self) -> Position:
        """Where the log ends, once nobody writes any more."""
        return self._server.end_of_log

    def open_again(self, version: int) -> None:
        """As it was before: nothing was promoted.

        :param version: the map version that is in place.
        """
        self._server.open_to_ourselves()
        self._server.rows(f"UPDATE {_VERSION} SET min_map_version = LEAST(min_map_version, %s) WHERE id = 1", version)
        self._lock_accounts("UNLOCK")
        self._server.open_to_writes()
        for connection in self._server.clients():  # they have been told of a version that does not come
            self._server.kill(connection)


class Connector:
    """shard -> a connection to its master, as the janitor asks for it."""

    def __init__(self, masters: Mapping[str, Endpoint], credentials: CredentialSource) -> None:
        self._masters = masters
        self._credentials = credentials

    def __call__(self, shard: str) -> Connection:
        if shard not in self._masters:
            raise PreconditionFailed(
                f"a prepared transaction names shard {shard}, which the map does not have",
                hint="end it by hand (XA RECOVER), then run the same command again",
            )
        return connect(self._masters[shard], self._credentials, autocommit=True)
