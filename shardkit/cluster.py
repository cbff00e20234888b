"""The one object that an application holds: the shard map, kept fresh, and the engines of its databases."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Engine, Executable, MetaData, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from shardkit import own_tables
from shardkit.credentials import CredentialSource, from_environment
from shardkit.directory import Directory, Entries, FiledKey, by_home, file, read, read_beside, with_lookups
from shardkit.engines import ASYNC_DRIVERS, Engines, EngineSettings, GivenEngines
from shardkit.errors import (
    CrossShardJoin,
    MissingKey,
    NoFreshReplica,
    PreconditionFailed,
    ShardMapError,
    ShardUnreachable,
    StaleShardMap,
    UnknownTable,
)
from shardkit.ids import IdGenerator, lease_for
from shardkit.mapstore import MapStore, open_store
from shardkit.patience import Patience
from shardkit.replicas.balance import Spill, choose
from shardkit.replicas.health import Replica, ReplicaHealth
from shardkit.replicas.token import Mark
from shardkit.routing.rawsql import no_tables
from shardkit.routing.route import Route, RouteOptions
from shardkit.routing.texts import writes_rows
from shardkit.shardmap import Placement, ShardMap
from shardkit.snapshots import Pin, Snapshots, View
from shardkit.telemetry import RouterMetrics
from shardkit.topology import Endpoint, Role, Shard

logger = logging.getLogger(__name__)

#: Why a read that replicas should serve goes to the master.
_FALLBACKS = {
    "lag": "no replica is near enough",
    "token": "no replica has yet what the session has written or seen",
}

T = TypeVar("T")


def create_cluster(
    source: str | Path | ShardMap | MapStore,
    *,
    credentials: CredentialSource | None = None,
    engines: GivenEngines | None = None,
    driver: str = "pymysql",
    async_driver: str = ASYNC_DRIVERS["mysql"],
    engine_options: Mapping[str, Any] | None = None,
    async_engine_options: Mapping[str, Any] | None = None,
    max_lag: float = 1.0,
    causal_wait: float = 0.05,
    master_read_share: float = 1.0,
    failover_wait: float = 10.0,
    store_timeout: float = 10.0,
    metadata: MetaData | None = None,
    metrics: RouterMetrics | None = None,
) -> Cluster:
    """Open a cluster. No database is connected to yet.

    :param source: ``zookeeper://h1:2181,h2:2181/name``, ``file:shardmap.yaml``, a `ShardMap`, or an open `MapStore`.
    :param credentials: how to log on to an endpoint; the environment's ``SHARDKIT_USER`` by default.
    :param engines: engines that the application has already, by (shard, role): in-memory SQLite, tests.
    :param driver: the DBAPI for servers; with a dialect before it where tables are declared for it
        (``mariadb+pymysql``).
    :param async_driver: the same for asyncio sessions.
    :param engine_options: passed to every `sqlalchemy.create_engine`.
    :param async_engine_options: the same for asyncio sessions, whose driver takes other ``connect_args``; the same ones
        by default.
    :param max_lag: seconds; a replica further behind gets no reads.
    :param causal_wait: seconds that a read waits for a replica to have what the session has written or seen, before it
        goes to the master.
    :param master_read_share: how much of what replicas should read may go to the masters when no replica can serve it,
        from 0 to 1, over the last ten seconds; past it such reads raise `NoFreshReplica`, so that replicas which lag do
        not take their master down. 1: all of it.
    :param failover_wait: seconds that a new transaction waits for the map to name another master, when it cannot reach
        the master of a shard that has replicas or a staging database. At most a hundred wait at once. 0: none.
    :param store_timeout: seconds that reaching the map's store may take.
    :param metadata: the application's tables (``Base.metadata``): it says of what type the keys in raw SQL are, without
        which they pin nothing.
    :param metrics: what the sessions count; ``RouterMetrics(prometheus_client.REGISTRY)`` has it exposed with the
        application's own. By default it is counted in `Cluster.metrics` and exposed nowhere.
    :raises MapStoreUnavailable: when the store cannot be reached.
    :raises InvalidShardMap: when what it holds is not a map.
    """
    store = source if isinstance(source, MapStore) else open_store(source, timeout=store_timeout)
    settings = EngineSettings(
        credentials or from_environment(), driver, async_driver, dict(engine_options or {}), async_engine_options
    )
    try:
        return Cluster(
            store,
            settings,
            given=engines,
            max_lag=max_lag,
            causal_wait=causal_wait,
            master_read_share=master_read_share,
            failover_wait=failover_wait,
            metadata=metadata,
            metrics=metrics,
        )
    except BaseException:
        store.close()
        raise


class Cluster:
    """What one shard map describes, as seen and used by this process. Made by `create_cluster`; usable by many threads,
    by asyncio, and by child processes after a fork."""

    def __init__(
        self,
        store: MapStore,
        settings: EngineSettings,
        *,
        given: GivenEngines | None = None,
        max_lag: float = 1.0,
        causal_wait: float = 0.05,
        master_read_share: float = 1.0,
        failover_wait: float = 10.0,
        metadata: MetaData | None = None,
        metrics: RouterMetrics | None = None,
    ) -> None:
        self.metrics = metrics or RouterMetrics()
        self._store = store
        self._directory = Directory(on_unknown_bucket=self.refresh_soon)
        initial = self._directory.bound(store.load())
        tables = no_tables if metadata is None else metadata.tables.get
        self._snapshots = Snapshots(initial, _dialect_name(initial, settings, given or {}), store.announce, tables)
        self._check_given(given or {})
        self._credentials = settings.credentials
        self._engines = Engines(settings, given, self.refresh_soon)
        self._health = ReplicaHealth(
            self._all_replicas,
            lambda replica: self._engines.probe(replica[0], Role.REPLICA, replica[2], replica[1]),
            lambda shard: self.map.shard(shard),
            max_lag,
        )
        self._causal_wait = causal_wait
        self._spill = Spill(master_read_share)
        self._patience = Patience(failover_wait)
        self._ids = IdGenerator(lambda: lease_for(store))
        self._random = Random()  # noqa: S311 - spreads load; no secret
        self._refreshing = threading.Event()
        self._watch = store.watch(self._accept, after=self.map.version)
        _survive_forks(self)

    def _check_given(self, given: GivenEngines) -> None:
        for shard, role in given:
            if shard not in self.map.shards or role.partition("-")[0] not in set(Role):
                raise PreconditionFailed(
                    f"engines= names ({shard!r}, {role!r}), which the shard map of {self.map.cluster!r} does not have",
                    hint=f"its shards are {', '.join(self.map.shards)}; the roles are master, staging, replica-0, ...",
                )

    def __repr__(self) -> str:
        return f"<Cluster {self.map.cluster!r}, map version {self.map.version}, {len(self.map.shards)} shards>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.adispose()

    # --- the map

    @property
    def map(self) -> ShardMap:
        """The newest map that this process has seen: an immutable snapshot."""
        return self._snapshots.current.map

    @property
    def view(self) -> View:
        """The map with what was worked out from it."""
        return self._snapshots.current

    @property
    def store(self) -> MapStore:
        """Where the map is kept."""
        return self._store

    @property
    def credentials(self) -> CredentialSource:
        """How this process logs on to an endpoint."""
        return self._credentials

    def pin(self) -> Pin:
        """Hold the current map, as a transaction does: until it is released, the process counts as running on it."""
        return self._snapshots.pin()

    def refresh(self) -> ShardMap:
        """Look for a newer map now, rather than when the store's watch tells of one.

        :returns: the newest map; the one known while the store cannot be reached.
        """
        self._accept(self._store.load())
        return self.map

    def refresh_soon(self) -> None:
        """`refresh` in the background: for places that must not wait."""
        if self._refreshing.is_set():
            return
        self._refreshing.set()
        threading.Thread(target=self._refresh_now, name="shardkit-map-refresh", daemon=True).start()

    def _refresh_now(self) -> None:
        try:
            self.refresh()
        except ShardMapError as error:
            logger.warning("the shard map of %s could not be refreshed: %s", self.map.cluster, error)
        finally:
            self._refreshing.clear()

    def _accept(self, new: ShardMap) -> None:
        before = self.map
        if new.version > before.version and (new.moves != before.moves or before.diff(new).moved):
            self._engines.renew()  # before the store is told that this process runs on the new map
        if self._snapshots.accept(self._directory.bound(new)):
            self._engines.keep(new.shards.values())
            logger.info("the shard map of %s is at version %d", new.cluster, new.version)

    def require(self, version: int) -> None:
        """Have a map of at least this version.

        :raises StaleShardMap: when the store does not give one now.
        """
        if self.map.version < version and self.refresh().version < version:
            raise StaleShardMap(
                f"a server asks for version {version} of the shard map; {self._store.source} gives {self.map.version}",
                hint="check that this process reaches the map store, and that it names the right one",
            )

    def await_failover(self, shard: str, come: Callable[[], bool], pause: Callable[[float], None]) -> bool:
        """Wait up to ``failover_wait`` for what a promotion of the shard will bring; False where it does not come.

        :param pause: sleeps; an event loop goes on meanwhile.
        """
        here = self.map.shard(shard)
        if here.staging is None and not here.replicas:
            return come()  # nobody can take its master's place
        return self._patience.wait(come, pause)

    def locate(self, table: str, **key: Any) -> Placement:
        """Where the rows with this key live: ``cluster.locate("orders", user_id=42)``.

        :raises UnknownTable: for a table that the map does not name.
        :raises MissingKey: when a key column is missing, or no bucket takes the value.
        """
        return self.looked_up(lambda: self.map.locate(table, key))

    def assign(self, table: str, key: Any, bucket: str) -> Placement:
        """Decide where the rows of a new key of a keyspace by directory are to be, in a transaction of its own.

        Keys that are not assigned are given a bucket when their first row is written. Under asyncio:
        ``await asyncio.to_thread(cluster.assign, "orders", "acme", "large")``.

        :param key: the key's value, of its column's Python type.
        :param bucket: one of the buckets that the map names for the keyspace.
        :raises PreconditionFailed: when the keyspace is not by directory or has no such bucket, or when the key is in
            another bucket already.
        """
        keyspace = self.map.table(table).keyspace
        directory = keyspace.directory
        if directory is None or bucket not in directory.names:
            buckets = "is not partitioned by a directory" if directory is None else f"has no bucket {bucket!r}"
            raise PreconditionFailed(
                f"keyspace {keyspace.name!r} {buckets}",
                hint="see 'shardkit map show'"
                if directory is None
                else f"its buckets are {', '.join(directory.names)}",
            )
        try:
            text = directory.text_of((key,))
        except TypeError as error:
            raise MissingKey(f"keyspace {keyspace.name!r}: {error}", table=table) from None
        if text is None:
            raise MissingKey("NULL cannot be assigned to a bucket", table=table, hint="give a value")
        engine = self.engine(directory.home)
        self.ensure_own_tables(directory.home)
        with engine.begin() as connection:
            found = file(connection, {(directory, text): bucket})
        self._directory.remember(found)
        if (holder := found[keyspace.name, text]) != bucket:
            raise PreconditionFailed(
                f"{key!r} is in bucket {holder!r} already", hint="its rows would have to move: leave it there"
            )
        return Placement(keyspace.name, bucket, keyspace.placement[bucket])

    def look_up(self, home: str, keys: Collection[FiledKey]) -> Entries:
        """Read entries of a directory as they are committed now, apart from all sessions, and remember them."""
        if self.engine(home).dialect.name == "sqlite":
            return read_beside(self.engine(home), keys)  # what a session in memory has not committed shows, too
        try:
            # an isolation of its own: a server may be set to show what is not committed
            with self._beside(home).connect().execution_options(isolation_level="READ COMMITTED") as connection:
                found = read(connection, keys)
        except DBAPIError as error:
            raise ShardUnreachable(
                f"shard {home}: the directory cannot be read: {error.orig}",
                shard=home,
                orig=error.orig or error,
                hint="check that the server runs; keys that this process knows already do without it",
            ) from error
        self._directory.remember(found)
        return found

    def looked_up(self, work: Callable[[], T], *, new: bool = False) -> T:
        """Run ``work``, which only looks at the map, with the directory's entries that it asks for.

        :param new: whether keys without an entry count as in the bucket that they would be given.
        """

        def entries(keys: Collection[FiledKey]) -> Entries:
            found: dict[tuple[str, str], str | None] = {}
            for home, some in by_home(keys).items():
                found.update(self.look_up(home, some))
            first = {(one.keyspace, text): one.first_bucket_of(text) for one, text in keys} if new else {}
            return {key: bucket or first.get(key) for key, bucket in found.items()}

        return with_lookups(work, entries)

    def ensure_own_tables(self, shard: str) -> None:
        """Make sure, once for each of this process's engines, that shardkit's own tables are on the master."""
        own_tables.ensure(self.engine(shard), self._beside(shard))

    def _beside(self, shard: str) -> Engine:
        """For a word with a master aside: on a connection that no session waits for while it holds another one."""
        return self._engines.probe(shard, Role.MASTER, self._endpoint(shard, Role.MASTER, 0))

    def explain(self, statement: Executable, params: Mapping[str, Any] | None = None) -> Route:
        """What the router would do with a statement. Touches no database, but for the lookup table of a directory.

        :raises RoutingError: where the session would refuse it.
        """
        options = RouteOptions.from_execution_options(statement.get_execution_options())
        return self.looked_up(lambda: self.view.planner.plan(statement, params, options), new=writes_rows(statement))

    # --- engines

    def engine(self, shard: str, role: Role | str = Role.MASTER, number: int = 0) -> Engine:
        """The SQLAlchemy engine of one endpoint.

        Statements sent through it are not routed, and not counted among those that a rebalance job waits for.

        :param number: which of the shard's replicas, from 0.
        :raises UnknownTable: when the map has no such shard, or the shard no such endpoint.
        """
        return self._engines.sync(shard, Role(role), self._endpoint(shard, Role(role), number), number)

    def async_engine(self, shard: str, role: Role | str = Role.MASTER, number: int = 0) -> AsyncEngine:
        """`engine`, for asyncio."""
        return self._engines.asynchronous(shard, Role(role), self._endpoint(shard, Role(role), number), number)

    def _endpoint(self, shard: str, role: Role, number: int) -> Endpoint:
        return _endpoint_in(self.map, shard, role, number)

    def choose_replica(
        self,
        shard: str,
        *,
        mark: Mark | None = None,
        max_lag: float | None = None,
        asynchronous: bool = False,
        run_blocking: Callable[[Callable[[], list[Replica]]], list[Replica]] = lambda call: call(),
    ) -> tuple[Replica, Engine] | None:
        """A replica that may serve reads now; None where there is none, so that the master has to.

        :param mark: what the replica has to have applied.
        :param max_lag: seconds; the cluster's unless given.
        :param run_blocking: runs a call that may wait: for a first look at the replicas, or for one to apply what the
            mark asks for.
        :raises NoFreshReplica: where there is none, and the master has been asked for too many reads already.
        """
        view = self.view  # one map throughout: by another one the same number may be another replica's
        here = view.map.shard(shard)
        replicas = [replica for replica in _replicas_of(here) if here.weight(replica[2])]
        if not replicas:
            return None
        fresh = self._health.fresh(replicas, max_lag)
        if not fresh and not self._health.has_looked(replicas):
            fresh = run_blocking(lambda: self._health.first(replicas, max_lag))
        able = fresh
        if mark is not None and fresh:
            able = self._health.covering(fresh, mark)
            if not able and mark.position is not None and mark.epoch == here.epoch:
                able = run_blocking(lambda: self._health.wait_for(fresh, mark, self._causal_wait))

        def engine_of(replica: Replica) -> Engine:
            return self._core_in(view, shard, Role.REPLICA, replica[1], asynchronous=asynchronous)

        chosen = choose(
            able,
            lambda replica: _checked_out(engine_of(replica)),
            self._random,
            lambda replica: here.weight(replica[2]),
        )
        if chosen is None:
            self._fall_back(shard, "token" if fresh else "lag")
            return None
        self._spill.on_replica()
        self.metrics.replica_reads.labels(shard).inc()
        return chosen, engine_of(chosen)

    def eject(self, replica: Replica) -> None:
        """Give a replica no reads until it has been asked again and answers: its connection was lost."""
        self.metrics.lost_replicas.labels(replica[0]).inc()
        logger.warning("replica %s of shard %s was lost in the middle of a read", replica[2], replica[0])
        self._health.eject(replica)

    def _fall_back(self, shard: str, reason: str) -> None:
        self.metrics.master_reads.labels(shard, reason).inc()
        logger.info("shard %s is read on its master: %s", shard, _FALLBACKS[reason])
        if not self._spill.to_master():
            raise NoFreshReplica(
                f"no replica of shard {shard} can serve this read ({_FALLBACKS[reason]}), and its master serves as "
                "many such reads as it may",
                shard=shard,
                hint="see 'shardkit status'; or raise master_read_share= of create_cluster",
            )

    def _replicas_of(self, shard: str) -> list[Replica]:
        return _replicas_of(self.map.shard(shard))

    def _all_replicas(self) -> list[Replica]:
        return [replica for shard in self.map.shards.values() for replica in _replicas_of(shard)]

    @property
    def health(self) -> ReplicaHealth:
        """The lag of the replicas, as this process sees it."""
        return self._health

    def next_id(self) -> int:
        """A new 63-bit id, unique over the processes of this cluster.

        :raises PreconditionFailed: when no worker number can be had.
        """
        return self._ids.next_id()

    def core_engine(self, shard: str, role: Role, number: int = 0, *, asynchronous: bool = False) -> Engine:
        """What a session binds to: an engine, or an async engine's inner one."""
        return self._core_in(self.view, shard, role, number, asynchronous=asynchronous)

    def _core_in(self, view: View, shard: str, role: Role, number: int, *, asynchronous: bool) -> Engine:
        key = (shard, role, number, asynchronous)
        known: Engine | None = view.cores.get(key)
        if known is None:
            endpoint = _endpoint_in(view.map, shard, role, number)
            if asynchronous:
                known = self._engines.asynchronous(shard, role, endpoint, number).sync_engine
            else:
                known = self._engines.sync(shard, role, endpoint, number)
            view.cores[key] = known
        return known

    def helper_of(self, engine: Engine) -> Engine | None:
        """An engine for a word aside to the server of a session's engine, on a connection of its own that gives up
        soon; None for an engine that is not of this cluster."""
        for (shard, role, number, _), known in list(self.view.cores.items()):
            if known is engine:
                return self._engines.probe(shard, role, self._endpoint(shard, role, number), number)
        return None

    # --- tables

    def create_all(self, metadata: MetaData, *, checkfirst: bool = True) -> None:
        """Create each table on the shards that host it.

        :raises UnknownTable: for a table that the map does not name, before anything is created.
        :raises CrossShardJoin: for a foreign key to a table that is not on every shard of the table that has it.
        """
        for shard, tables in self._tables_by_shard(metadata).items():
            metadata.create_all(self.engine(shard), tables=tables, checkfirst=checkfirst)

    def drop_all(self, metadata: MetaData, *, checkfirst: bool = True) -> None:
        """Drop each table on the shards that host it.

        :raises UnknownTable: for a table that the map does not name, before anything is dropped.
        """
        for shard, tables in self._tables_by_shard(metadata).items():
            metadata.drop_all(self.engine(shard), tables=tables, checkfirst=checkfirst)

    def _tables_by_shard(self, metadata: MetaData) -> dict[str, list[Table]]:
        shards_of = _hosts(metadata.sorted_tables, self.map)
        for table in metadata.sorted_tables:
            for target in {key.column.table for key in table.foreign_keys}:
                if missing := [shard for shard in shards_of[table] if shard not in shards_of[target]]:
                    raise CrossShardJoin(
                        f"{table.name!r} has a foreign key to {target.name!r}, which is not on {', '.join(missing)}",
                        table=table.name,
                        hint="take the constraint out, or put both tables into one keyspace",
                    )
        by_shard: dict[str, list[Table]] = {}
        for table, shards in shards_of.items():
            for shard in shards:
                by_shard.setdefault(shard, []).append(table)
        return by_shard

    # --- ending

    def dispose(self) -> None:
        """Close every connection and stop watching the map. A cluster with asyncio sessions: `adispose`."""
        self._watch.close()
        self._health.close()
        self._ids.close()
        self._store.close()
        self._engines.dispose()

    async def adispose(self) -> None:
        """`dispose`, in the event loop of the asyncio sessions."""
        self._watch.close()
        self._health.close()
        self._ids.close()
        self._store.close()
        await self._engines.adispose()

    def after_fork(self) -> None:
        """In a child process: holds and threads of its own."""
        self._refreshing = threading.Event()
        self._directory.after_fork()
        self._snapshots.after_fork()
        self._health.after_fork()
        self._patience.after_fork()


def _checked_out(engine: Engine) -> int:
    """How many of an engine's connections are in use."""
    pool: Any = engine.pool
    return int(pool.checkedout()) if hasattr(pool, "checkedout") else 0


def _replicas_of(shard: Shard) -> list[Replica]:
    return [(shard.name, number, endpoint) for number, endpoint in enumerate(shard.replicas)]


def _endpoint_in(shard_map: ShardMap, shard: str, role: Role, number: int) -> Endpoint:
    endpoints = shard_map.shard(shard).with_role(role)
    if number >= len(endpoints):
        raise UnknownTable(
            f"shard {shard!r} has {len(endpoints)} endpoints with the role {role}: there is no number {number}",
            hint="see 'shardkit map show'",
        )
    return endpoints[number]


def _hosts(tables: Iterable[Table], shard_map: ShardMap) -> dict[Table, tuple[str, ...]]:
    unknown = [table.fullname for table in tables if table.fullname not in shard_map.tables]
    if unknown:
        raise UnknownTable(
            f"the shard map of {shard_map.cluster!r} does not name {', '.join(map(repr, unknown))}",
            hint="add each table to a keyspace: by its key, under reference, or in a keyspace without a partition",
        )
    return {table: shard_map.table(table.fullname).shards for table in tables}


def _dialect_name(shard_map: ShardMap, settings: EngineSettings, given: GivenEngines) -> str:
    """The dialect that statements are planned for: that of the masters."""
    masters = [(name, shard.master) for name, shard in shard_map.shards.items()]
    names = {
        given[name, "master"].dialect.name if (name, "master") in given else endpoint.dialect
        for name, endpoint in masters
    }
    if names == {"sqlite"}:
        return "sqlite"
    return settings.driver.partition("+")[0] if "+" in settings.driver else "mysql"


_alive: weakref.WeakSet[Cluster] = weakref.WeakSet()
_registered = threading.Event()


def _survive_forks(cluster: Cluster) -> None:
    _alive.add(cluster)
    if not _registered.is_set():
        _registered.set()
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for cluster in list(_alive):
        cluster.after_fork()
