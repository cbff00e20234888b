"""A root directory with MySQL in it, made from Debian's archive: MySQL beside MariaDB, whose packages exclude it.

``python -m shardkit.testing.mysql_root`` makes it in the cache directory when it is missing: about a minute and half a
gigabyte. `shardkit.testing.LocalMySQL` then runs ``mysqld`` in it by chroot.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from shardkit.errors import MissingServer, PreconditionFailed
from shardkit.testing.binaries import mysql_root, server_version, which

#: Debian keeps MySQL in its development suite only.
SUITE = "sid"
PACKAGES = ("mysql-server-core",)


def make_mysql_root(target: Path | None = None) -> Path:
    """Make the root directory unless it is there. Processes that do this at the same time wait for the first.

    :returns: the directory, with a ``mysqld`` that runs.
    :raises PreconditionFailed: without the right to chroot.
    :raises MissingServer: when debootstrap is missing, or the archive cannot deliver MySQL today; nothing is left.
    """
    root = target if target is not None else mysql_root()
    root.parent.mkdir(parents=True, exist_ok=True)
    with (root.parent / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "usr/sbin/mysqld").exists():
            _make(root)
    return root


def _make(root: Path) -> None:
    if os.geteuid() != 0:
        raise PreconditionFailed(
            "a root directory for MySQL can only be made and used by root", hint="run as root, or install MySQL itself"
        )
    debootstrap = which("debootstrap")
    if debootstrap is None:
        raise MissingServer("debootstrap is not installed", hint="apt-get install debootstrap")
    building = Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=root.parent))
    try:
        building.chmod(0o755)
        _bootstrap(debootstrap, building)
        shutil.rmtree(building / "var/cache/apt/archives", ignore_errors=True)  # the packages that were unpacked
        building.rename(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _bootstrap(debootstrap: str, directory: Path) -> None:
    log = directory.with_suffix(".log")
    command = [debootstrap, "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(directory)]
    with log.open("wb") as output:
        done = subprocess.run(  # noqa: S603 - a program found on this machine
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    log.unlink()
    if done.returncode != 0:
        raise MissingServer(
            "Debian's archive cannot deliver MySQL today: debootstrap ended with exit code "
            f"{done.returncode}: {' / '.join(lines[-5:])}",
            hint="try again tomorrow, or install MySQL 8.4 or later and set SHARDKIT_MYSQLD",
        )
    if server_version(("chroot", str(directory), "/usr/sbin/mysqld")) is None:
        raise MissingServer(
            "the MySQL of Debian's archive does not start today",
            hint="try again tomorrow, or install MySQL 8.4 or later and set SHARDKIT_MYSQLD",
        )


if __name__ == "__main__":
    try:
        sys.stdout.write(f"making a root directory with MySQL, about a minute: {mysql_root()}\n")
        sys.stdout.flush()
        make_mysql_root()
    except PreconditionFailed as error:
        sys.stderr.write(f"error: {error.message}\nfix: {error.hint}\n")
        sys.exit(error.exit_code)
