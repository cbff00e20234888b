"""The map in ZooKeeper, and the paths that all of shardkit's coordination uses there.

Layout, under ``/shardkit/<cluster>``: ``map`` (the current map: JSON, zlib-compressed), ``map_history/<version>``
(every published version with who and when), ``clients/<id>`` (ephemeral: the map version that a process runs on).
Other parts keep ``servers``, ``relay``, ``jobs`` and ``workers`` beside them, through `ZooKeeperMapStore.client` and
`ZooKeeperMapStore.path`.

Facts that shape this file: a request sent while the connection is down waits in kazoo's queue, so every call here is
bounded by a time-out; a call inside a kazoo state listener dead-locks, so listeners and watches only wake a thread;
kazoo forgets watches when the connection is lost, so the thread sets them again; a packet over ``jute.maxbuffer``
(1 MiB) makes the server drop the connection, so sizes are checked before sending.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import (
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    NodeExistsError,
    NoNodeError,
    OperationTimeoutError,
    SessionExpiredError,
)
from kazoo.handlers.threading import KazooTimeoutError

from shardkit.errors import InvalidShardMap, MapNotFound, MapStoreUnavailable, ShardMapError
from shardkit.mapstore.store import ClientState, MapCallback, MapVersion, next_version, publisher, this_client
from shardkit.mapstore.watches import CallbackWatch, Watches
from shardkit.shardmap import ShardMap

ROOT = "/shardkit"
#: Compressed bytes of one map. A publication carries it twice in one packet, which ZooKeeper takes up to 1 MiB.
MAX_NODE_BYTES = 500_000
#: How many versions ``map_history`` keeps.
KEPT_VERSIONS = 200
#: Seconds between two looks at the map that nothing has caused: a net under the watches.
POLL_SECONDS = 30.0

_MAX_TEXT_BYTES = 64 * 1024 * 1024  # what a node may unpack to: no more, whatever it claims to be
_SOURCE = re.compile(r"zookeeper://(?P<hosts>[^/]+)/(?P<cluster>[A-Za-z0-9_][A-Za-z0-9_.-]{0,62})/?")
_AWAY = (ConnectionLoss, ConnectionClosedError, SessionExpiredError, OperationTimeoutError, KazooTimeoutError)

#: Clients that a fork copied from its parent. Kept, so that no finaliser ever touches the parent's connection.
_inherited: list[Any] = []


class ZooKeeperMapStore:
    """The map of one cluster in ZooKeeper.

    :param hosts: ``host:port,host:port``.
    :param cluster: the cluster's name.
    :param timeout: seconds that connecting, and each call, may take.
    :param session_timeout: seconds after which ZooKeeper takes a silent process for gone.
    """

    def __init__(
        self,
        hosts: str,
        cluster: str,
        *,
        timeout: float = 10.0,
        session_timeout: float = 10.0,
        poll: float = POLL_SECONDS,
    ) -> None:
        self._hosts = hosts
        self._cluster = cluster
        self._timeout = timeout
        self._session_timeout = session_timeout
        self._lock = threading.Lock()
        self._kazoo: Any = None
        self._announced: ClientState | None = None
        self._written: tuple[Any, ClientState] | None = None  # session id, what stands in clients/<id>
        self._lost_at: float | None = None
        self._closed = False
        self._watches = Watches(self.source, self._refresh, poll, self._leave_parent)

    @classmethod
    def from_source(cls, source: str, *, timeout: float = 10.0) -> ZooKeeperMapStore:
        """Read ``zookeeper://host:port,host:port/cluster``.

        :raises ShardMapError: with the form, for anything else.
        """
        match = _SOURCE.fullmatch(source)
        if match is None or "@" in match["hosts"]:
            shown = source if "@" not in source else "the map source"
            raise ShardMapError(
                f"{shown} is not a ZooKeeper source",
                hint="write zookeeper://host:2181,host:2181/cluster, without a user",
            )
        return cls(match["hosts"], match["cluster"], timeout=timeout)

    def __repr__(self) -> str:
        return f"ZooKeeperMapStore({self.source!r})"

    @property
    def source(self) -> str:
        """``zookeeper://hosts/cluster``."""
        return f"zookeeper://{self._hosts}/{self._cluster}"

    @property
    def cluster(self) -> str:
        """The cluster's name."""
        return self._cluster

    def path(self, *parts: str) -> str:
        """The path of a node of this cluster: ``store.path("jobs", "7")`` is ``/shardkit/<cluster>/jobs/7``."""
        return "/".join((ROOT, self._cluster, *parts))

    # --- the connection

    @property
    def client(self) -> Any:
        """The started kazoo client of this process, for everything that is coordinated beside the map.

        A child process gets a client of its own. Do not stop it, and do not call it inside a state listener.

        :raises MapStoreUnavailable: when no ZooKeeper server answers within the time-out.
        """
        with self._lock:
            if self._closed:
                raise MapStoreUnavailable(f"{self.source} is closed", hint="open the store again")
            if self._kazoo is None:
                self._kazoo = self._connect()
            return self._kazoo

    def _leave_parent(self) -> None:
        """In a child process: no use of the parent's session, whose socket the fork has copied."""
        self._lock = threading.Lock()
        _inherited.append(self._kazoo)
        self._kazoo = None
        self._written = None
        self._announced = None if self._announced is None else this_client(self._announced.version)

    def _connect(self) -> Any:
        forever: dict[str, Any] = {"max_tries": -1, "delay": 0.1, "backoff": 2, "max_delay": 2.0}
        try:
            client = KazooClient(
                hosts=_with_patience(self._hosts, self._session_timeout),
                timeout=self._session_timeout,
                connection_retry=forever,
                command_retry={"max_tries": 3},
            )
        except ValueError:
            raise MapStoreUnavailable(
                f"{self._hosts!r} is not a list of hosts", hint="write zookeeper://host:2181,host:2181/cluster"
            ) from None
        client.add_listener(self._state_changed)
        try:
            client.start(timeout=self._timeout)
        except KazooTimeoutError:
            raise self._unreachable() from None
        return client

    def _state_changed(self, _state: Any) -> None:
        self._watches.wake()

    def _unreachable(self) -> MapStoreUnavailable:
        return MapStoreUnavailable(
            f"no ZooKeeper server of {self._hosts} answered within {self._timeout:g} s",
            hint="check that ZooKeeper runs and that the map source names its hosts and client ports",
        )

    def _wait(self, result: Any) -> Any:
        """The value of a kazoo async result, within the time-out."""
        return result.get(timeout=self._timeout)

    # --- reading

    def load(self) -> ShardMap:
        """See `MapStore.load`."""
        newest, kazoo = self._watches.newest, self._kazoo
        if newest is not None and kazoo is not None and not kazoo.connected:
            return newest
        try:
            found, _ = self._read()
        except ShardMapError as error:
            return self._watches.instead(error)
        return self._watches.see(found)

    def _read(self, *, watch: bool = False) -> tuple[ShardMap, int]:
        """The map in place and the version of its znode."""
        path = self.path("map")
        client = self.client
        try:
            data, stat = self._wait(client.get_async(path, watch=self._on_change if watch else None))
        except NoNodeError:
            if watch:  # tell us when it comes to be
                self._wait(client.exists_async(path, watch=self._on_change))
            raise MapNotFound(
                f"no shard map is published at {self.source}",
                hint=f"publish one with 'shardkit map apply FILE --map {self.source}'",
            ) from None
        except _AWAY:
            raise self._unreachable() from None
        return _unpack_map(data, path), int(stat.version)

    def _on_change(self, _event: Any) -> None:
        self._watches.wake()

    def _refresh(self) -> None:
        """The watching thread's work: set the watch, take the map, and keep this client's registration alive."""
        if self._kazoo is not None and not self._kazoo.connected:
            self._forget_the_past(self._kazoo)
            raise MapStoreUnavailable(f"the connection to ZooKeeper at {self._hosts} is lost")
        self._lost_at = None
        try:
            self._watches.see(self._read(watch=True)[0])
        finally:
            self._register()

    def _forget_the_past(self, kazoo: Any) -> None:
        """A ZooKeeper restored from a backup refuses clients that have seen later transactions than it has, for ever.

        Once the session cannot be saved any more there is nothing to protect: kazoo itself forgets the last transaction
        with an expired session, but that is what such a server never tells it.
        """
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        elif now - self._lost_at > self._session_timeout:
            kazoo.last_zxid = 0

    # --- publishing

    def publish(self, new: ShardMap, *, expected_version: int) -> ShardMap:
        """See `MapStore.publish`. The map and its history entry are written in one transaction.

        :raises ShardMapError: for the map of another cluster, or one that is too large for a znode.
        """
        if new.cluster != self._cluster:
            raise ShardMapError(
                f"the shard map is of cluster {new.cluster!r}, {self.source} keeps {self._cluster!r}",
                hint="mend 'cluster:' in the map, or the end of the map source",
            )
        token = os.urandom(8).hex()  # by which we know our own publication again when the answer was lost
        deadline = time.monotonic() + self._timeout
        sent = False
        while True:
            try:
                current, node_version = self._in_place()
                if sent and current == expected_version + 1 and self._history_node(current).get("token") == token:
                    published = new.with_version(current)
                    break
                published = next_version(new, current=current, expected=expected_version)
                sent = True
                if self._commit(published, node_version, token):
                    break
            except (*_AWAY, MapStoreUnavailable) as error:
                if time.monotonic() >= deadline:
                    raise self._publish_failed(expected_version + 1, sent=sent) from error
                time.sleep(0.1)
        self._watches.see(published)
        self._watches.wake()
        self._prune(published.version)
        return published

    def _in_place(self) -> tuple[int, int | None]:
        """The map version in place and its znode's version; (0, None) where there is none."""
        if not self.client.connected:  # else the request would wait in a queue, and be sent who knows when
            raise self._unreachable()
        try:
            current, node_version = self._read()
        except MapNotFound:
            return 0, None
        return current.version, node_version

    def _commit(self, new: ShardMap, node_version: int | None, token: str) -> bool:
        """One transaction; False when somebody else was faster."""
        client = self.client
        packed = _pack(new.to_json())
        entry = _pack(
            json.dumps(
                {"token": token, "by": publisher(), "at": datetime.now(UTC).isoformat(), "map": new.to_json()},
                ensure_ascii=False,
            )
        )
        if max(len(packed), len(entry)) > MAX_NODE_BYTES:
            raise ShardMapError(
                f"the shard map takes {len(packed)} bytes, a ZooKeeper node at most {MAX_NODE_BYTES}",
                hint="place buckets in spans rather than one by one; move long lists of keys into a directory",
            )
        self._wait(client.ensure_path_async(self.path("map_history")))
        history = self.path("map_history", str(new.version))
        transaction = client.transaction()
        if node_version is None:
            transaction.create(self.path("map"), packed)
        else:
            transaction.set_data(self.path("map"), packed, version=node_version)
        transaction.create(history, entry)
        results = self._wait(transaction.commit_async())
        faults = [result for result in results if isinstance(result, Exception)]
        if not faults:
            return True
        if any(isinstance(fault, BadVersionError | NoNodeError) for fault in faults):
            return False
        if isinstance(results[0], NodeExistsError):
            return False
        if isinstance(results[-1], NodeExistsError):
            # the map went back to a lower version (restored from a backup): the newer history is of another past
            self._wait(client.delete_async(history))
            return False
        raise MapStoreUnavailable(f"{self.source} refused the shard map: {faults!r}", hint="see ZooKeeper's own log")

    def _publish_failed(self, version: int, *, sent: bool) -> MapStoreUnavailable:
        if not sent:
            error = self._unreachable()
            return MapStoreUnavailable(f"{error.message}: nothing was written", hint=error.hint)
        return MapStoreUnavailable(
            f"ZooKeeper at {self._hosts} did not confirm version {version} of the shard map: "
            "it may or may not have been written",
            hint="look with 'shardkit map show' once ZooKeeper is back, and publish again if it was not",
        )

    def _prune(self, current: int) -> None:
        """Drop history that is too old. What cannot be dropped now goes with the next publication."""
        try:
            for name in self._wait(self.client.get_children_async(self.path("map_history"))):
                if name.isdecimal() and int(name) <= current - KEPT_VERSIONS:
                    self._wait(self.client.delete_async(self.path("map_history", name)))
        except (*_AWAY, MapStoreUnavailable, NoNodeError):
            return

    # --- history

    def history(self, limit: int | None = None) -> Sequence[MapVersion]:
        """See `MapStore.history`; the last 200 versions are kept."""
        current = self.load().version
        try:
            names = self._wait(self.client.get_children_async(self.path("map_history")))
        except _AWAY:
            raise self._unreachable() from None
        versions = sorted(int(name) for name in names if name.isdecimal() and int(name) <= current)
        entries = ((version, self._history_node(version)) for version in versions[-limit if limit else 0 :])
        return tuple(
            MapVersion(version, datetime.fromisoformat(entry["at"]), entry["by"]) for version, entry in entries if entry
        )

    def _history_node(self, version: int) -> dict[str, Any]:
        """One history entry; empty where there is none (any more)."""
        path = self.path("map_history", str(version))
        try:
            data, _ = self._wait(self.client.get_async(path))
        except NoNodeError:
            return {}
        except _AWAY:
            raise self._unreachable() from None
        try:
            entry: dict[str, Any] = json.loads(_unpack(data))
        except (ValueError, zlib.error):
            raise InvalidShardMap(["is not a history entry written by shardkit"], source=path) from None
        return entry

    def load_version(self, version: int) -> ShardMap:
        """See `MapStore.load_version`."""
        entry = self._history_node(version)
        if not entry:
            raise MapNotFound(
                f"{self.source} has no version {version}",
                hint=f"see 'shardkit map history'; the last {KEPT_VERSIONS} are kept",
            )
        return ShardMap.from_json(entry["map"])

    # --- watching and being seen

    def watch(self, callback: MapCallback, *, after: int = 0) -> CallbackWatch:
        """See `MapStore.watch`. Survives lost connections and expired sessions: afterwards the map is read again."""
        return self._watches.add(callback, after)

    def announce(self, version: int) -> None:
        """See `MapStore.announce`: written by the watching thread."""
        before = self._announced
        self._announced = this_client(version) if before is None else replace(before, version=version)
        self._watches.start()

    def _register(self) -> None:
        """Make ``clients/<id>`` what was announced, in the session of now."""
        wanted = self._announced
        if wanted is None or self._kazoo is None or not self._kazoo.connected:
            return
        client = self._kazoo
        now = (client.client_id, wanted)
        if self._written == now:
            return
        path = self.path("clients", wanted.id)
        data = json.dumps(
            {"version": wanted.version, "host": wanted.host, "pid": wanted.pid, "since": wanted.since.isoformat()}
        ).encode()
        try:
            if self._written is not None and self._written[0] == now[0]:
                self._wait(client.set_async(path, data))
            else:
                self._wait(client.create_async(path, data, ephemeral=True, makepath=True))
            self._written = now
        except NodeExistsError:  # of our own session: the answer to its creation was lost
            self._wait(client.set_async(path, data))
            self._written = now
        except NoNodeError:
            self._written = None
            self._watches.wake()
        except _AWAY:
            raise self._unreachable() from None

    def clients(self) -> Sequence[ClientState]:
        """The processes whose registration stands, in order of their start."""
        parent = self.path("clients")
        states: list[ClientState] = []
        try:
            for name in self._wait(self.client.get_children_async(parent)):
                try:
                    data, _ = self._wait(self.client.get_async(f"{parent}/{name}"))
                except NoNodeError:
                    continue  # gone meanwhile
                fields = json.loads(data)
                since = datetime.fromisoformat(fields["since"])
                states.append(ClientState(name, fields["version"], fields["host"], fields["pid"], since))
        except NoNodeError:
            return ()
        except _AWAY:
            raise self._unreachable() from None
        return tuple(sorted(states, key=lambda state: (state.since, state.id)))

    def close(self) -> None:
        """End the watches and the session; this process's ephemeral nodes go with it."""
        self._closed = True
        self._watches.close()
        with self._lock:
            client, self._kazoo = self._kazoo, None
        if client is not None:
            client.remove_listener(self._state_changed)
            client.stop()
            client.close()


def _with_patience(hosts: str, session_timeout: float) -> str:
    """The hosts, named so often that kazoo waits about three seconds for one to greet it, and not a whole session.

    kazoo divides the session's time-out by the number of hosts that it was given (as ZooKeeper's own client does). A
    server that is just starting may take a connection and never answer it, so with a single host the one wait would use
    up all the time that a caller has.
    """
    tries = session_timeout / len(hosts.split(",")) / 3.0
    return ",".join([hosts] * max(1, round(tries)))


def _pack(text: str) -> bytes:
    return zlib.compress(text.encode())


def _unpack(data: bytes) -> bytes:
    """:raises ValueError: for what unpacks to more than any map."""
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, _MAX_TEXT_BYTES)
    if not unpacker.eof:
        raise ValueError("truncated, or too large")
    return text


def _unpack_map(data: bytes, path: str) -> ShardMap:
    try:
        text = _unpack(data)
    except (ValueError, zlib.error):
        raise InvalidShardMap(["is not a shard map written by shardkit"], source=path) from None
    return ShardMap.from_json(text)
