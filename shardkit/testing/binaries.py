"""Where the server programs are: named by the environment, installed on this machine, or in a cached root directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shardkit.errors import MissingServer

# Debian keeps servers in sbin, which is not on the PATH of ordinary users.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
# Where Debian's packages put their jars.
_JARS = Path("/usr/share/java")


@dataclass(frozen=True, slots=True)
class Program:
    """A server program that can be started.

    :param command: program with leading arguments; ``("chroot", ROOT, "/usr/sbin/mysqld")`` where it has a root.
    :param version: such as ``10.11.19-MariaDB``.
    :param root: the root directory that the program sees as ``/``, where it has one of its own.
    """

    command: tuple[str, ...]
    version: str
    root: Path | None = None

    def sees(self, path: Path) -> str:
        """The path as the program knows it."""
        return str(path) if self.root is None else "/" + str(path.relative_to(self.root))


@dataclass(frozen=True, slots=True)
class Java:
    """A Java runtime and the class path on which ZooKeeper is found."""

    command: str
    class_path: str


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """``SHARDKIT_CACHE``, by default ``~/.cache/shardkit``: prepared data directories and the MySQL root."""
    named = environ.get("SHARDKIT_CACHE")
    return Path(named) if named else Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardkit"


def mysql_root(environ: Mapping[str, str] = os.environ) -> Path:
    """The root directory that `shardkit.testing.mysql_root` makes."""
    return cache_directory(environ) / "mysql-root"


def find_mariadb(environ: Mapping[str, str] = os.environ) -> Program:
    """``SHARDKIT_MARIADBD``, or ``mariadbd`` on this machine.

    :raises MissingServer: when there is none, or the one named is not MariaDB.
    """
    named = environ.get("SHARDKIT_MARIADBD")
    candidates = [named] if named else [which("mariadbd", environ), which("mysqld", environ)]
    for candidate in candidates:
        version = server_version((candidate,)) if candidate else None
        if candidate and version is not None and "MariaDB" in version:
            return Program((candidate,), version)
    if named:
        raise MissingServer(
            f"SHARDKIT_MARIADBD names {named}, which does not run as a MariaDB server",
            hint="give the full path of mariadbd, or unset SHARDKIT_MARIADBD",
        )
    raise MissingServer(
        "MariaDB is not installed: no mariadbd was found",
        hint="Debian or Ubuntu: apt-get install mariadb-server; elsewhere install MariaDB 10.11 or later and put"
        " mariadbd on the PATH, set SHARDKIT_MARIADBD to it, or start Docker",
    )


def find_mariadb_install(program: Program, environ: Mapping[str, str] = os.environ) -> str:
    """``mariadb-install-db``, which belongs to this MariaDB.

    :raises MissingServer: when it is not beside the server, nor on the PATH.
    """
    server = Path(program.command[0]).resolve()
    beside = (folder / name for folder in _folders_near(server) for name in ("mariadb-install-db", "mysql_install_db"))
    for script in beside:
        if os.access(script, os.X_OK):
            return str(script)
    on_path = which("mariadb-install-db", environ)
    if on_path is None:
        raise MissingServer(
            f"{server} is there, but mariadb-install-db is not",
            hint="Debian or Ubuntu: apt-get install mariadb-server; elsewhere put mariadb-install-db on the PATH",
        )
    return on_path


def _folders_near(server: Path) -> tuple[Path, ...]:
    prefix = server.parent.parent
    return (server.parent, prefix / "bin", prefix / "scripts")


def find_mysql(environ: Mapping[str, str] = os.environ) -> Program:
    """``SHARDKIT_MYSQLD``, or a ``mysqld`` that is MySQL, or the one in the cached root directory.

    :raises MissingServer: when there is none that this user can start.
    """
    named = environ.get("SHARDKIT_MYSQLD")
    candidate = named or which("mysqld", environ)
    version = server_version((candidate,)) if candidate else None
    if candidate and version is not None and "MariaDB" not in version:
        return Program((candidate,), version)
    if named:
        raise MissingServer(
            f"SHARDKIT_MYSQLD names {named}, which does not run as a MySQL server",
            hint="give the full path of mysqld, or unset SHARDKIT_MYSQLD",
        )
    root = mysql_root(environ)
    if not (root / "usr/sbin/mysqld").exists():
        raise MissingServer(
            "MySQL is not installed: no mysqld of MySQL was found",
            hint="Debian or Ubuntu, as root: python -m shardkit.testing.mysql_root; elsewhere install MySQL 8.4 or"
            " later and put mysqld on the PATH, set SHARDKIT_MYSQLD to it, or start Docker",
        )
    command = (which("chroot", environ) or "chroot", str(root), "/usr/sbin/mysqld")
    version = server_version(command)
    if version is None:
        raise MissingServer(
            f"the MySQL in {root} cannot be started by this user",
            hint="it needs chroot, that is root; or install MySQL 8.4 or later, or set SHARDKIT_MYSQLD",
        )
    return Program(command, version, root)


def find_zookeeper(environ: Mapping[str, str] = os.environ) -> Java:
    """``SHARDKIT_ZOOKEEPER_CLASSPATH``, an unpacked release named by ``ZOOKEEPER_HOME``, or Debian's packages.

    :raises MissingServer: when ZooKeeper or Java is missing.
    """
    class_path = _zookeeper_class_path(environ)
    if class_path is None:
        raise MissingServer(
            "ZooKeeper is not installed: no zookeeper.jar was found",
            hint="Debian or Ubuntu: apt-get install zookeeper; elsewhere unpack a ZooKeeper 3.8 release and set"
            " ZOOKEEPER_HOME to it, or start Docker",
        )
    home = environ.get("JAVA_HOME")
    java = (
        str(Path(home) / "bin" / "java") if home and (Path(home) / "bin" / "java").exists() else which("java", environ)
    )
    if java is None:
        raise MissingServer(
            "ZooKeeper needs Java, which is not installed",
            hint="Debian or Ubuntu: apt-get install default-jre-headless; elsewhere put java on the PATH, or"
            " set JAVA_HOME",
        )
    return Java(java, class_path)


def _zookeeper_class_path(environ: Mapping[str, str]) -> str | None:
    named = environ.get("SHARDKIT_ZOOKEEPER_CLASSPATH")
    if named:
        return named
    home = environ.get("ZOOKEEPER_HOME")
    if home and (Path(home) / "lib").is_dir():
        return f"{home}/lib/*:{home}/*"
    if (_JARS / "zookeeper.jar").exists():
        # Debian's jar names what it needs in its manifest, all but a place for the log to go.
        return f"{_JARS}/zookeeper.jar:{_JARS}/slf4j-simple.jar"
    return None


@cache
def server_version(command: tuple[str, ...]) -> str | None:
    """What ``--version`` says after *Ver*; None when the program cannot be run."""
    try:
        said = subprocess.run(  # noqa: S603 - a program found on this machine or named by its user
            [*command, "--no-defaults", "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bVer (\S+)", said.stdout)
    return found.group(1) if said.returncode == 0 and found else None


def which(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The program of this name on the PATH or in one of the sbin directories."""
    return shutil.which(name, path=f"{environ.get('PATH', '')}:{_SBIN}")


_FINDERS: Mapping[str, Callable[[], Program | Java]] = {
    "mariadb": find_mariadb,
    "mysql": find_mysql,
    "zookeeper": find_zookeeper,
}


def main(words: Sequence[str]) -> int:
    """``python -m shardkit.testing.binaries [--missing] [mariadb|mysql|zookeeper]...``: what is here, and where.

    With ``--missing`` only the names of those that are not, which is no error. For the set-up scripts.
    """
    kinds = [word for word in words if word in _FINDERS] or ["mariadb", "zookeeper"]
    only_missing = "--missing" in words
    code = 0
    for kind in kinds:
        try:
            found = _FINDERS[kind]()
        except MissingServer as error:
            if only_missing:
                sys.stdout.write(f"{kind}\n")
            else:
                sys.stderr.write(f"error: {error.message}\nfix: {error.hint}\n")
                code = error.exit_code
        else:
            if not only_missing:
                sys.stdout.write(f"{kind}: {found}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
