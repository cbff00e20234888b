"""Servers that run already, named by the environment: a service container of a CI system, a server kept for tests.

``SHARDKIT_TEST_MARIADB_URL`` and ``SHARDKIT_TEST_MYSQL_URL`` (``mysql://root:password@127.0.0.1:3306``) and
``SHARDKIT_TEST_ZOOKEEPER`` (``host:port``). Only the fixtures that share one server per test process use them: tests
that stop or kill servers start their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from shardkit.errors import PreconditionFailed, Unreachable
from shardkit.testing.database import Flavour, LocalDatabaseServer
from shardkit.testing.mariadb import LocalMariaDB
from shardkit.testing.mysql import LocalMySQL
from shardkit.testing.server import LocalServer, Run
from shardkit.testing.zookeeper import LocalZooKeeper

# What the relay needs of a server's binary log, and what this flavour calls it.
_WANTED = {"log_bin": "ON", "binlog_format": "ROW", "binlog_row_image": "FULL", "binlog_row_metadata": "FULL"}


def mariadb_server(environ: Mapping[str, str] = os.environ) -> LocalDatabaseServer:
    """The MariaDB that ``SHARDKIT_TEST_MARIADB_URL`` names, or one of our own. Not started yet."""
    url = environ.get("SHARDKIT_TEST_MARIADB_URL")
    return NamedDatabaseServer(url, "mariadb") if url else LocalMariaDB()


def mysql_server(environ: Mapping[str, str] = os.environ) -> LocalDatabaseServer:
    """The MySQL that ``SHARDKIT_TEST_MYSQL_URL`` names, or one of our own. Not started yet."""
    url = environ.get("SHARDKIT_TEST_MYSQL_URL")
    return NamedDatabaseServer(url, "mysql") if url else LocalMySQL()


def zookeeper_server(environ: Mapping[str, str] = os.environ) -> LocalZooKeeper:
    """The ZooKeeper that ``SHARDKIT_TEST_ZOOKEEPER`` names, or one of our own. Not started yet."""
    hosts = environ.get("SHARDKIT_TEST_ZOOKEEPER")
    return NamedZooKeeper(hosts) if hosts else LocalZooKeeper()


class NamedServer(LocalServer):
    """A server that is not ours: it is used, and neither started nor stopped."""

    def start(self) -> Self:
        """See that it answers and can be used.

        :raises Unreachable: when it does not answer.
        :raises PreconditionFailed: when it is not the kind of server that it should be.
        """
        if not self._answers():
            raise Unreachable(
                f"the {self.kind} server named by the environment, {self.host}:{self.port}, does not answer",
                hint="start it, or unset the variable: then shardkit starts its own",
            )
        self._check()
        return self

    def close(self) -> None:
        """Leave the server as it is."""

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self._answers()

    def stop(self) -> None:
        """Refused, as are `kill`, `restart` and `pause`.

        :raises PreconditionFailed: always.
        """
        raise self._not_ours("stopped")

    def kill(self) -> None:
        """Refused: see `stop`."""
        raise self._not_ours("killed")

    def restart(self) -> None:
        """Refused: see `stop`."""
        raise self._not_ours("restarted")

    def pause(self) -> None:
        """Refused: see `stop`."""
        raise self._not_ours("paused")

    def _check(self) -> None:
        """Nothing more is needed than that it answers."""

    def _process(self, directory: Path) -> Run:
        raise self._not_ours(f"started in {directory}")

    def _in_container(self) -> Run:
        raise self._not_ours("started in a container")

    def _not_ours(self, what: str) -> PreconditionFailed:
        return PreconditionFailed(
            f"the {self.kind} at {self.host}:{self.port} was named by the environment: it is not {what} by tests",
            hint="a test that does so starts a server of its own",
        )


class NamedDatabaseServer(NamedServer, LocalDatabaseServer):
    """A MariaDB or MySQL that runs already.

    :param url: ``mysql://user:password@host:port``; the user needs all rights.
    """

    def __init__(self, url: str, flavour: Flavour) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"mysql", "mariadb"} or not parts.hostname or not parts.username:
            raise PreconditionFailed(
                f"the {flavour} server named by the environment is not given as a URL with a user",
                hint="write mysql://user:password@host:port",
            )
        super().__init__(port=parts.port or 3306)
        self.kind = self.flavour = flavour
        self.host = parts.hostname
        self.user = unquote(parts.username)
        self.password = unquote(parts.password or "")

    def _check(self) -> None:
        ((version,),) = self.execute("SELECT VERSION()")
        found = "mariadb" if "MariaDB" in version else "mysql"
        if found != self.flavour:
            raise PreconditionFailed(
                f"the server {self.host}:{self.port} is {version}, not {self.flavour}",
                hint="SHARDKIT_TEST_MARIADB_URL is for MariaDB, SHARDKIT_TEST_MYSQL_URL for MySQL",
            )
        for name, wanted in _WANTED.items():
            ((_, value),) = self.execute("SHOW VARIABLES LIKE %s", name)
            if value != wanted:
                raise PreconditionFailed(
                    f"the server {self.host}:{self.port} runs with {name}={value}; tests of the relay need {wanted}",
                    hint=f"start it with --{name.replace('_', '-')}" + (f"={wanted}" if name != "log_bin" else ""),
                )

    def _flavour_options(self) -> dict[str, object]:
        return {}


class NamedZooKeeper(NamedServer, LocalZooKeeper):
    """A ZooKeeper that runs already.

    :param address: ``host:port``; four-letter word ``srvr`` has to be allowed there.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise PreconditionFailed(f"{address!r} names no ZooKeeper", hint="write SHARDKIT_TEST_ZOOKEEPER=host:port")
        super().__init__(port=int(port))
        self.host = host
