"""A throw-away MySQL."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from shardkit.errors import MissingServer, ServerFailed
from shardkit.testing.binaries import Program, find_mysql
from shardkit.testing.database import CONTAINER_PLACES, Flavour, LocalDatabaseServer, option_arguments
from shardkit.testing.datadir import baked_in, copy_template
from shardkit.testing.docker import DATA, Container, start_script
from shardkit.testing.process import ServerProcess
from shardkit.testing.server import Run

# --initialize-insecure makes root@localhost only, which does not match 127.0.0.1 under skip_name_resolve.
_ACCOUNTS = (
    "CREATE USER 'root'@'%' IDENTIFIED WITH caching_sha2_password BY '';\n"
    "GRANT ALL PRIVILEGES ON *.* TO 'root'@'%' WITH GRANT OPTION;\n"
)


class LocalMySQL(LocalDatabaseServer):
    """A MySQL server of its own: about a second from nothing, two more the very first time."""

    kind = "mysql"
    flavour: Flavour = "mysql"

    def _flavour_options(self) -> dict[str, object]:
        return {
            "gtid_mode": True,
            "enforce_gtid_consistency": True,
            "innodb_redo_log_capacity": "32M",
            "table_definition_cache": 400,
        }

    def _parent_directory(self) -> Path:
        try:
            root = find_mysql().root
        except MissingServer:  # it will run in a container, if anywhere
            root = None
        return root / "tmp" if root is not None else super()._parent_directory()

    def _in_container(self) -> Run:
        always = ["--no-defaults", "--user=root", "--mysqlx=OFF", "--secure-file-priv=NULL"]
        install = shlex.join(
            ["mysqld", *always, "--initialize-insecure", f"--datadir={DATA}", "--init-file=/shardkit/accounts"]
        )
        prepare = f'printf "%s" "$ACCOUNTS" >/shardkit/accounts\n{install}'
        server = shlex.join(["mysqld", *always, *self._arguments(CONTAINER_PLACES)])
        image = os.environ.get("SHARDKIT_MYSQL_IMAGE", "mysql:8.4")
        script = start_script(prepare, server)
        return Container(self.name, image, script, port=self.port, environment={"ACCOUNTS": _ACCOUNTS})

    def _process(self, directory: Path) -> Run:
        program = find_mysql()
        paths = self._layout(directory)
        arguments = option_arguments({"innodb_redo_log_capacity": "32M"} | baked_in(self.options)) + _always()

        def make(datadir: Path) -> None:
            _initialize(program, arguments, datadir)

        copy_template(self.flavour, program, arguments, make, paths["datadir"])
        given = self._arguments({name: program.sees(path) for name, path in paths.items()})
        command = [*program.command, "--no-defaults", *_always(), *given]
        return ServerProcess(self.name, command, log=directory / "server.log", cwd=directory)


def _initialize(program: Program, arguments: list[str], datadir: Path) -> None:
    accounts = datadir.parent / "accounts.sql"
    accounts.write_text(_ACCOUNTS, encoding="ascii")
    command = [
        *program.command,
        "--no-defaults",
        "--initialize-insecure",
        f"--datadir={program.sees(datadir)}",
        f"--init-file={program.sees(accounts)}",
        *arguments,
    ]
    done = subprocess.run(  # noqa: S603 - a program found on this machine
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise ServerFailed(
            f"mysqld --initialize-insecure could not make a data directory (exit code {done.returncode})",
            log="\n".join(done.stdout.splitlines()[-30:]),
        )
    (datadir / "auto.cnf").unlink(missing_ok=True)  # the server's UUID: each copy makes its own


def _always() -> list[str]:
    # Debian's default for secure_file_priv is a directory that a bare root does not have, and the X protocol would
    # listen on a port that we did not choose. Without --user the server refuses to run as root.
    return ["--secure-file-priv=NULL", "--mysqlx=OFF", *(["--user=root"] if os.geteuid() == 0 else [])]
