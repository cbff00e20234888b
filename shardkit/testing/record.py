"""A cluster that was left running: recorded by ``shardkit local up``, for ``status`` and ``down``."""

from __future__ import annotations

import fcntl
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from shardkit.errors import PreconditionFailed
from shardkit.testing import watchdog
from shardkit.testing.binaries import cache_directory
from shardkit.testing.server import LocalServer
from shardkit.topology import Endpoint, Role

_FORMAT = 1
_ANSWER = 1.0  # seconds


class Health(StrEnum):
    """How a recorded server is."""

    RUNNING = "running"
    SILENT = "silent"  #: the process is there, but its port does not answer
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class ServerState:
    """How one server of a local cluster is now.

    :param name: ``shop-0/master``.
    :param url: where it listens, as a shard map (or a ZooKeeper client) writes it.
    """

    name: str
    kind: str
    url: str
    pid: int | None
    health: Health


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One server of a recorded cluster, and what there is to clean up after it."""

    name: str
    kind: str
    host: str
    port: int
    processes: tuple[tuple[int, str], ...]
    directories: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    shard: str | None = None
    role: Role | None = None
    database: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        server: LocalServer,
        *,
        shard: str | None = None,
        role: Role | None = None,
        database: str | None = None,
    ) -> Self:
        """The record of a server as it is now."""
        entry = server.cleanup_entry()
        return cls(
            name,
            server.kind,
            server.host,
            server.port,
            tuple(entry["processes"]),
            tuple(entry["directories"]),
            tuple(tuple(command) for command in entry["commands"]),
            shard,
            role,
            database,
        )

    @property
    def url(self) -> str:
        """``mysql://127.0.0.1:21000/shop_0``, or ``127.0.0.1:21000`` for a ZooKeeper."""
        return f"{self.host}:{self.port}" if self.database is None else self.endpoint.url

    @property
    def endpoint(self) -> Endpoint:
        """The database's endpoint."""
        return Endpoint(self.host, self.port, self.database or "")

    def state(self) -> ServerState:
        """Look how the server is."""
        pid = next((pid for pid, started in self.processes if watchdog.start_time(pid) == started), None)
        return ServerState(self.name, self.kind, self.url, pid, self._health(pid))

    def _health(self, pid: int | None) -> Health:
        if pid is None and not self.commands:
            return Health.GONE
        return Health.RUNNING if self._answers() else Health.SILENT

    def _answers(self) -> bool:
        # A database server speaks first; ZooKeeper answers a four-letter word.
        try:
            with socket.create_connection((self.host, self.port), timeout=_ANSWER) as connection:
                if self.database is None:
                    connection.sendall(b"ruok")
                return bool(connection.recv(1))
        except OSError:
            return False

    def remove(self) -> None:
        """Kill the server, unless it is gone already, and remove its data."""
        watchdog.clean(
            {
                "processes": list(self.processes),
                "directories": list(self.directories),
                "commands": [list(command) for command in self.commands],
            }
        )


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """A cluster that was left running."""

    name: str
    flavour: str
    map_source: str | None
    servers: tuple[ServerRecord, ...]

    def save(self) -> None:
        """Write the record, readable by its user only."""
        path = path_of(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=2), encoding="utf-8")
        new.replace(path)

    def status(self) -> tuple[ServerState, ...]:
        """How every server is now."""
        return tuple(server.state() for server in self.servers)

    def shards(self) -> dict[str, dict[str, Any]]:
        """The ``shards:`` section of a shard map over these servers."""
        shards: dict[str, dict[str, Any]] = {}
        for server in self.servers:
            if server.shard is None:
                continue
            shard = shards.setdefault(server.shard, {})
            if server.role is Role.REPLICA:
                shard.setdefault("replicas", []).append(server.url)
            else:
                shard[str(server.role)] = server.url
        return shards

    def remove(self) -> None:
        """Kill every server that still runs, remove the data and the record."""
        for server in self.servers:
            server.remove()
        path_of(self.name).unlink(missing_ok=True)


def path_of(name: str) -> Path:
    """Where the record of a cluster is.

    :raises PreconditionFailed: for a name that is not letters, digits, ``-`` and ``_``.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise PreconditionFailed(
            f"{name!r} cannot name a local cluster", hint="use letters, digits, - and _, 64 of them at most"
        )
    return cache_directory() / "local" / f"{name}.json"


@contextmanager
def exclusively(name: str) -> Iterator[None]:
    """Hold the name while a cluster is started or stopped under it.

    :raises PreconditionFailed: when another process holds it.
    """
    path = path_of(name).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreconditionFailed(
                f"another process is just now starting or stopping the local cluster {name}", hint="try again later"
            ) from None
        yield


def load(name: str) -> ClusterRecord | None:
    """The record of this name; None when there is none.

    :raises PreconditionFailed: when it cannot be read.
    """
    path = path_of(name)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return _record(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise PreconditionFailed(
            f"{path} is not the record of a local cluster: {error}",
            hint="stop its servers by hand, then remove the file",
        ) from None


def names() -> Iterator[str]:
    """The recorded clusters."""
    for path in sorted((cache_directory() / "local").glob("*.json")):
        yield path.stem


def _record(fields: dict[str, Any]) -> ClusterRecord:
    if fields.pop("format") != _FORMAT:
        raise ValueError("its format is of another version of shardkit")
    servers = tuple(
        ServerRecord(
            **{
                **server,
                "processes": tuple((int(pid), str(started)) for pid, started in server["processes"]),
                "directories": tuple(server["directories"]),
                "commands": tuple(tuple(command) for command in server["commands"]),
                "role": Role(server["role"]) if server["role"] else None,
            }
        )
        for server in fields.pop("servers")
    )
    return ClusterRecord(**fields, servers=servers)
