"""A throw-away MariaDB."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from shardkit.errors import ServerFailed
from shardkit.testing.binaries import Program, find_mariadb, find_mariadb_install
from shardkit.testing.database import CONTAINER_PLACES, Flavour, LocalDatabaseServer, option_arguments
from shardkit.testing.datadir import baked_in, copy_template
from shardkit.testing.docker import DATA, Container, start_script
from shardkit.testing.process import ServerProcess
from shardkit.testing.server import Run

# FLUSH PRIVILEGES makes the server read the grant tables, which it has only just been given.
_ACCOUNTS = (
    "FLUSH PRIVILEGES;\n"
    "CREATE USER 'root'@'%' IDENTIFIED BY '';\n"
    "GRANT ALL PRIVILEGES ON *.* TO 'root'@'%' WITH GRANT OPTION;\n"
)
_INSTALL_OPTIONS = (
    "--auth-root-authentication-method=normal",
    "--skip-test-db",
    "--cross-bootstrap",  # no look-up of this machine's name, which may not resolve
)


class LocalMariaDB(LocalDatabaseServer):
    """A MariaDB server of its own: about half a second from nothing, one second more the very first time.

    ::

        with LocalMariaDB() as server:
            server.execute("CREATE DATABASE shop")
            engine = create_engine(server.dsn("shop"))
    """

    kind = "mariadb"
    flavour: Flavour = "mariadb"

    def _flavour_options(self) -> dict[str, object]:
        return {
            "binlog_format": "ROW",
            "log_slave_updates": True,
            "gtid_strict_mode": False,
            "innodb_log_file_size": "16M",
            "aria_pagecache_buffer_size": "8M",
            "key_buffer_size": "1M",
            "feedback": False,
        }

    def _in_container(self) -> Run:
        install = "mariadb-install-db " + shlex.join(
            ["--no-defaults", "--user=root", f"--datadir={DATA}", *_INSTALL_OPTIONS, "--extra-file=/shardkit/accounts"]
        )
        prepare = f'printf "%s" "$ACCOUNTS" >/shardkit/accounts\n{install}'
        server = shlex.join(["mariadbd", "--no-defaults", "--user=root", *self._arguments(CONTAINER_PLACES)])
        image = os.environ.get("SHARDKIT_MARIADB_IMAGE", "mariadb:11.4")
        script = start_script(prepare, server)
        return Container(self.name, image, script, port=self.port, environment={"ACCOUNTS": _ACCOUNTS})

    def _process(self, directory: Path) -> Run:
        program = find_mariadb()
        paths = self._layout(directory)
        arguments = option_arguments({"innodb_log_file_size": "16M"} | baked_in(self.options)) + _as_user()

        def make(datadir: Path) -> None:
            _install(program, arguments, datadir)

        copy_template(self.flavour, program, arguments, make, paths["datadir"])
        given = self._arguments({name: str(path) for name, path in paths.items()})
        command = [*program.command, "--no-defaults", *_as_user(), *given]
        return ServerProcess(self.name, command, log=directory / "server.log", cwd=directory)


def _install(program: Program, arguments: list[str], datadir: Path) -> None:
    accounts = datadir.parent / "accounts.sql"
    accounts.write_text(_ACCOUNTS, encoding="ascii")
    command = [
        find_mariadb_install(program),
        "--no-defaults",
        f"--datadir={datadir}",
        *_INSTALL_OPTIONS,
        f"--extra-file={accounts}",
        *arguments,
    ]
    done = subprocess.run(  # noqa: S603 - a program found on this machine
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise ServerFailed(
            f"mariadb-install-db could not make a data directory (exit code {done.returncode})",
            log="\n".join(done.stdout.splitlines()[:60]),
        )


def _as_user() -> list[str]:
    # The server refuses to run as root unless told to.
    return ["--user=root"] if os.geteuid() == 0 else []
