"""A whole cluster on this machine: ZooKeeper, and for each shard a master, a staging database and replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from shardkit.credentials import CredentialSource, fixed
from shardkit.errors import MapNotFound, PreconditionFailed
from shardkit.mapstore import open_store
from shardkit.shardmap import ShardMap
from shardkit.testing.database import ROOT_PASSWORD, ROOT_USER, Flavour, LocalDatabaseServer
from shardkit.testing.mariadb import LocalMariaDB
from shardkit.testing.mysql import LocalMySQL
from shardkit.testing.record import ClusterRecord, ServerRecord, ServerState, load
from shardkit.testing.server import LocalServer, close_together, start_together
from shardkit.testing.zookeeper import LocalZooKeeper
from shardkit.topology import Endpoint, Role, Shard

_KINDS: Mapping[Flavour, type[LocalDatabaseServer]] = {"mariadb": LocalMariaDB, "mysql": LocalMySQL}


@dataclass(frozen=True, slots=True)
class _Member:
    """One database server's place in the cluster."""

    shard: str
    role: Role
    number: int
    server: LocalDatabaseServer

    @property
    def name(self) -> str:
        return f"{self.shard}/{self.role}" + (f"-{self.number}" if self.role is Role.REPLICA else "")


class LocalCluster:
    """A cluster of local servers, started in parallel and always stopped again.

    ::

        with LocalCluster(shards=2, replicas=2) as local:
            local.publish(ShardMap.load("shardmap.yaml").with_shards(local.shards))
            with create_cluster(local.zookeeper_url("shop"), credentials=local.credentials) as cluster:
                ...

    Every shard has an empty database, named after the shard, on each of its servers. Nothing is replicated until a
    relay runs.

    :param shards: how many, or their names.
    :param replicas: replicas per shard.
    :param staging: whether each shard has a staging database.
    :param zookeeper: whether to start a ZooKeeper.
    :param name: prefix of the shards' names (``local-0``), and the cluster's name in its record.
    :param options: server options for every database server (`LocalDatabaseServer`).
    :param durable: flush at every commit (`LocalDatabaseServer`).
    """

    def __init__(
        self,
        shards: int | Iterable[str] = 2,
        replicas: int = 2,
        *,
        staging: bool = True,
        zookeeper: bool = True,
        flavour: Flavour = "mariadb",
        name: str = "local",
        options: Mapping[str, object] | None = None,
        durable: bool = False,
    ) -> None:
        names = tuple(f"{name}-{number}" for number in range(shards)) if isinstance(shards, int) else tuple(shards)
        if not names or replicas < 0:
            raise ValueError("a cluster has at least one shard, and no fewer than zero replicas")
        self.name = name
        self.flavour: Flavour = flavour
        self.zookeeper = LocalZooKeeper() if zookeeper else None
        roles = [(Role.MASTER, 0), *([(Role.STAGING, 0)] if staging else [])]
        roles += [(Role.REPLICA, number) for number in range(replicas)]
        self._members = tuple(
            _Member(shard, role, number, _KINDS[flavour](options=options, durable=durable))
            for shard in names
            for role, number in roles
        )

    # --- what it consists of -------------------------------------------------------------------------------------

    @property
    def servers(self) -> tuple[LocalServer, ...]:
        """All servers, ZooKeeper first."""
        databases = tuple(member.server for member in self._members)
        return (self.zookeeper, *databases) if self.zookeeper is not None else databases

    @property
    def shards(self) -> dict[str, Shard]:
        """The shards as a shard map has them."""
        names = dict.fromkeys(member.shard for member in self._members)
        return {name: self._shard(name) for name in names}

    @property
    def credentials(self) -> CredentialSource:
        """The root account of every database server."""
        return fixed(ROOT_USER, ROOT_PASSWORD)

    def server(self, shard: str, role: Role | str = Role.MASTER, number: int = 0) -> LocalDatabaseServer:
        """One database server, to look into it, or to stop, kill or pause it.

        :raises KeyError: when the cluster has no such server.
        """
        for member in self._members:
            if (member.shard, member.role, member.number) == (shard, Role(role), number):
                return member.server
        raise KeyError(f"{shard}/{role}-{number}")

    def zookeeper_url(self, cluster: str) -> str:
        """The map source of a cluster in this ZooKeeper.

        :raises PreconditionFailed: when it was left out.
        """
        if self.zookeeper is None:
            raise PreconditionFailed("this local cluster has no ZooKeeper", hint="make it with zookeeper=True")
        return self.zookeeper.url(cluster)

    def status(self) -> tuple[ServerState, ...]:
        """How every server is now."""
        return tuple(record.state() for record in self._records())

    # --- life cycle ----------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start every server that does not run, in parallel, and create the shards' databases.

        :raises MissingServer: when programs are not installed.
        :raises ServerFailed: when a server does not come up; then none is left running.
        """
        start_together(self.servers)
        for member in self._members:
            member.server.execute(f"CREATE DATABASE IF NOT EXISTS `{database_of(member.shard)}`")
        return self

    def close(self) -> None:
        """Kill every server and remove its data."""
        close_together(self.servers)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def publish(self, new: ShardMap) -> ShardMap:
        """Put a map into this ZooKeeper, in place of the one that is there.

        :raises MapConflict: when somebody else changes it at the same moment.
        """
        store = open_store(self.zookeeper_url(new.cluster))
        try:
            try:
                version = store.load().version
            except MapNotFound:
                version = 0
            return store.publish(new, expected_version=version)
        finally:
            store.close()

    def detach(self, *, map_source: str | None = None) -> ClusterRecord:
        """Leave the cluster running when this process ends, and record how to find and stop it (`record.load`).

        :param map_source: where its shard map is, for whoever looks at the record.
        :raises PreconditionFailed: when another cluster was left running under this name.
        """
        if load(self.name) is not None:
            raise PreconditionFailed(
                f"a local cluster named {self.name} has been left running already",
                hint=f"shardkit local down --name {self.name}",
            )
        record = ClusterRecord(self.name, self.flavour, map_source, tuple(self._records()))
        record.save()
        for server in self.servers:
            server.detach()
        return record

    # --- inside --------------------------------------------------------------------------------------------------

    def _shard(self, name: str) -> Shard:
        staging = self._endpoints(name, Role.STAGING)
        return Shard(
            name,
            master=self._endpoints(name, Role.MASTER)[0],
            staging=staging[0] if staging else None,
            replicas=self._endpoints(name, Role.REPLICA),
        )

    def _endpoints(self, shard: str, role: Role) -> tuple[Endpoint, ...]:
        return tuple(
            member.server.endpoint(database_of(shard))
            for member in self._members
            if (member.shard, member.role) == (shard, role)
        )

    def _records(self) -> Iterable[ServerRecord]:
        if self.zookeeper is not None:
            yield ServerRecord.of("zookeeper", self.zookeeper)
        for member in self._members:
            yield ServerRecord.of(
                member.name, member.server, shard=member.shard, role=member.role, database=database_of(member.shard)
            )


def database_of(shard: str) -> str:
    """The database of a shard: its name, with what needs no quoting in SQL."""
    return "".join(letter if letter.isalnum() else "_" for letter in shard)
