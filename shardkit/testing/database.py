"""What LocalMariaDB and LocalMySQL have in common: options, the root account, connections."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pymysql

from shardkit.credentials import CredentialSource, fixed
from shardkit.errors import Unreachable
from shardkit.testing.docker import DATA
from shardkit.testing.server import LocalServer
from shardkit.topology import Endpoint

Flavour = Literal["mariadb", "mysql"]

#: The account that every local database server has: all rights, no password, reachable on the loopback address only.
#: (MySQL's caching_sha2_password takes a password over TLS, which PyMySQL 1.2 uses where the server offers it, or
#: encrypted, for which drivers need a package more. An empty password needs neither.)
ROOT_USER = "root"
ROOT_PASSWORD = ""


class LocalDatabaseServer(LocalServer):
    """A MariaDB or MySQL server with small buffers, a row-format binary log with full metadata, and GTIDs.

    :param options: server options beyond or instead of the usual ones, with underscores:
        ``{"max_connections": 50, "skip_log_bin": None}``; None stands for an option without a value, True and False
        for ON and OFF.
    :param durable: flush the log and the binary log at every commit, as production does. Without, a crash of the
        server loses nothing either (the pages are the operating system's by then), only a crash of the machine does.
    :param server_id: replication server number; by default the port, so that local servers differ.
    """

    flavour: Flavour

    def __init__(
        self,
        *,
        options: Mapping[str, object] | None = None,
        durable: bool = False,
        server_id: int | None = None,
        port: int | None = None,
        start_timeout: float = 60.0,
        docker: bool | None = None,
    ) -> None:
        super().__init__(port=port, start_timeout=start_timeout, docker=docker)
        self.options = {name.replace("-", "_"): value for name, value in (options or {}).items()}
        self.durable = durable
        self._server_id = server_id
        self.user = ROOT_USER
        self.password = ROOT_PASSWORD

    @property
    def server_id(self) -> int:
        """The replication server number."""
        return self._server_id if self._server_id is not None else self.port

    @property
    def root_dsn(self) -> str:
        """SQLAlchemy URL of the server as root, without a database: append ``/name``."""
        return self._dsn("pymysql")

    @property
    def credentials(self) -> CredentialSource:
        """The root account, in the form that `create_cluster` takes."""
        return fixed(self.user, self.password)

    def dsn(self, database: str, driver: str = "pymysql") -> str:
        """SQLAlchemy URL of one database as root."""
        return f"{self._dsn(driver)}/{database}"

    def _dsn(self, driver: str) -> str:
        password = f":{quote(self.password, safe='')}" if self.password else ""
        return f"mysql+{driver}://{quote(self.user, safe='')}{password}@{self.host}:{self.port}"

    def endpoint(self, database: str) -> Endpoint:
        """The endpoint to put into a shard map."""
        return Endpoint(self.host, self.port, database)

    def connect(self, database: str | None = None, **options: Any) -> pymysql.Connection[Any]:
        """A new connection as root. ``options`` are those of `pymysql.connect`.

        :raises Unreachable: when the server does not let us in.
        """
        settings: dict[str, Any] = {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "database": database,
            "charset": "utf8mb4",
            "connect_timeout": 10,
        }
        if "password" not in options and "ssl" not in options:
            # Making a TLS context takes longer than most statements, and root's empty password needs none.
            settings["ssl_disabled"] = True
        try:
            return pymysql.connect(**settings | options)
        except pymysql.OperationalError as error:
            raise Unreachable(
                f"no connection to {self.name} at {self.host}:{self.port}: {error.args[-1]}",
                hint="the server is running" if self.running else "start the server first",
            ) from error

    def execute(self, sql: str, *parameters: object, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own and commit it.

        :param parameters: for the ``%s`` in the statement.
        :returns: the rows; empty for a statement that has none.
        """
        with closing(self.connect(database, autocommit=True)) as connection, connection.cursor() as cursor:
            # Without parameters a % stands for itself: LIKE patterns.
            cursor.execute(sql, parameters or None)
            return list(cursor.fetchall())

    def create_user(self, user: str, password: str = "", *, grants: str = "ALL PRIVILEGES ON *.*") -> None:
        """Create an account for any host. ``grants`` is what stands between GRANT and TO."""
        self.execute("CREATE USER %s@'%%' IDENTIFIED BY %s", user, password)
        self.execute(f"GRANT {grants.replace('%', '%%')} TO %s@'%%'", user)

    # --- for the two kinds ---------------------------------------------------------------------------------------

    @abc.abstractmethod
    def _flavour_options(self) -> dict[str, object]:
        """Options that only this flavour has, or that it calls by another name."""

    def _arguments(self, places: Mapping[str, str]) -> list[str]:
        """The command line for ``places`` (datadir, tmpdir, bind_address), the usual options and the caller's."""
        usual: dict[str, object] = {
            "port": self.port,
            "server_id": self.server_id,
            "bind_address": self.host,
            # Relative to the data directory: the system's limit for socket paths is about 100 characters.
            "socket": "server.sock",
            "pid_file": "server.pid",
            "skip_name_resolve": None,
            "character_set_server": "utf8mb4",
            "performance_schema": False,
            "max_connections": 300,
            "table_open_cache": 400,
            # The default is a day or a year: a test that waits for a table that another forgot to let go would hang.
            "lock_wait_timeout": 60,
            "innodb_buffer_pool_size": "48M",
            "innodb_flush_log_at_trx_commit": 1 if self.durable else 2,
            "log_bin": "binlog",
            "sync_binlog": 1 if self.durable else 0,
            "binlog_row_image": "FULL",
            "binlog_row_metadata": "FULL",
        }
        chosen = usual | self._flavour_options() | dict(places) | self.options
        if "skip_log_bin" in chosen:
            chosen.pop("log_bin", None)
        return option_arguments(chosen)

    def _answers(self) -> bool:
        try:
            connection = pymysql.connect(
                host=self.host,
                port=self.port,
                user=self.user,
                password=self.password,
                connect_timeout=1,
                read_timeout=1,
            )
        except (pymysql.MySQLError, OSError):
            return False
        connection.close()
        return True

    def _layout(self, directory: Path) -> dict[str, Path]:
        (directory / "tmp").mkdir()
        return {"datadir": directory / "data", "tmpdir": directory / "tmp"}


#: Where a server in a container listens and keeps its data.
CONTAINER_PLACES = {"bind_address": "0.0.0.0", "datadir": DATA, "tmpdir": "/tmp"}  # noqa: S104, S108 - of the container


def option_arguments(options: Mapping[str, object]) -> list[str]:
    """``{"log_bin": "binlog", "performance_schema": False, "skip_name_resolve": None}`` as command-line arguments."""
    return [_argument(name, value) for name, value in options.items()]


def _argument(name: str, value: object) -> str:
    option = "--" + name.replace("_", "-")
    if value is None:
        return option
    if isinstance(value, bool):
        return f"{option}={'ON' if value else 'OFF'}"
    return f"{option}={value}"
