"""Where the databases are: endpoints, their roles, and the shards that they make up. Frozen values, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

DEFAULT_PORT = 3306
#: Of a replica for which the map says nothing else.
DEFAULT_WEIGHT = 1
#: As in HAProxy: room for percentages, and for a server that warms up.
MAX_WEIGHT = 256
Dialect = Literal["mysql", "sqlite"]


class Role(StrEnum):
    """What an endpoint is for. ``REPLICA`` is the reference design's *slave*."""

    MASTER = "master"
    STAGING = "staging"
    REPLICA = "replica"


class ReplicationKind(StrEnum):
    """Who fills a shard's replicas: shardkit's relay, or the servers' own replication."""

    RELAY = "relay"
    NATIVE = "native"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One database on one server, without driver and without credentials: those belong to the process, not to the map.

    :param host: name or address of the server; empty for SQLite.
    :param port: TCP port; 0 for SQLite.
    :param database: database name; for SQLite the file's path.
    """

    host: str
    port: int
    database: str
    dialect: Dialect = "mysql"

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Read ``mysql://host[:port]/database`` or ``sqlite:///path``.

        :raises ValueError: with the fix, for anything else, and for URLs that carry a user, a password or a driver.
        """
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "an endpoint carries no user and no password: take them out, set SHARDKIT_USER and SHARDKIT_PASSWORD"
            )
        if parts.scheme in {"mysql", "mariadb"}:
            return cls._parse_server(url)
        if parts.scheme == "sqlite":
            path = unquote(parts.path.removeprefix("/"))
            if parts.netloc or not path:
                raise ValueError(
                    f"{url!r} is not a SQLite endpoint: write sqlite:///relative.db or sqlite:////absolute.db"
                )
            return cls("", 0, path, "sqlite")
        if "+" in parts.scheme:
            raise ValueError(
                f"{url!r} names a driver: write {parts.scheme.partition('+')[0]}://..., each process chooses its own"
            )
        raise ValueError(f"{url!r} is not an endpoint: write mysql://host:3306/database or sqlite:///file.db")

    @classmethod
    def _parse_server(cls, url: str) -> Endpoint:
        parts = urlsplit(url)
        database = unquote(parts.path.removeprefix("/"))
        try:
            port = parts.port or DEFAULT_PORT
        except ValueError:
            raise ValueError(f"{url!r} has a port that is not a number from 1 to 65535") from None
        if not parts.hostname or not database or "/" in database:
            raise ValueError(f"{url!r} is not an endpoint: write mysql://host:3306/database")
        if parts.query or parts.fragment:
            raise ValueError(f"{url!r} carries options: they go into engine_options= of create_cluster")
        return cls(parts.hostname, port, database)

    @property
    def url(self) -> str:
        """The endpoint as it stands in a shard map. Holds no secret."""
        if self.dialect == "sqlite":
            return f"sqlite:///{quote(self.database)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mysql://{host}:{self.port}/{quote(self.database, safe='')}"

    @property
    def address(self) -> str:
        """``host:port``, or the file of a SQLite endpoint: what a log line needs."""
        return self.database if self.dialect == "sqlite" else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class Shard:
    """One logical database: a master, an optional staging database, and any number of replicas.

    :param epoch: counts the masters that it has had: positions of different epochs cannot be compared.
    :param weights: of the replicas whose weight is not `DEFAULT_WEIGHT`.
    """

    name: str
    master: Endpoint
    staging: Endpoint | None = None
    replicas: tuple[Endpoint, ...] = field(default=())
    replication: ReplicationKind = ReplicationKind.RELAY
    epoch: int = 0
    weights: Mapping[Endpoint, int] = field(default_factory=dict, hash=False)

    def weight(self, replica: Endpoint) -> int:
        """How much of the reads a replica is given, against the weights of the others; 0: none."""
        return self.weights.get(replica, DEFAULT_WEIGHT)

    def endpoints(self) -> Iterator[tuple[Role, Endpoint]]:
        """Every endpoint with its role, master first."""
        yield Role.MASTER, self.master
        if self.staging is not None:
            yield Role.STAGING, self.staging
        for replica in self.replicas:
            yield Role.REPLICA, replica

    def with_role(self, role: Role) -> tuple[Endpoint, ...]:
        """The endpoints that have this role, in the map's order."""
        return tuple(endpoint for has, endpoint in self.endpoints() if has is role)
