"""The root directory with MySQL: all or nothing, whatever the archive does. A script stands in for debootstrap."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from shardkit.errors import MissingServer, PreconditionFailed
from shardkit.testing import mysql_root

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may chroot")


@pytest.fixture
def debootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in; write a shell script into it. ``$4`` is the directory to fill."""
    program = tmp_path / "debootstrap"
    program.touch(mode=0o755)
    monkeypatch.setattr(mysql_root, "which", lambda _name: str(program))
    return program


@needs_root
def test_what_the_archive_cannot_deliver_leaves_nothing(debootstrap: Path, tmp_path: Path) -> None:
    debootstrap.write_text(
        "#!/bin/sh\nmkdir -p $4/usr\necho E: Couldn\\'t find these debs: mysql-server-core\nexit 1\n"
    )
    with pytest.raises(MissingServer, match=r"exit code 1.*mysql-server-core"):
        mysql_root.make_mysql_root(tmp_path / "cache" / "root")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["root.lock"]


@needs_root
def test_a_mysql_that_does_not_start_leaves_nothing(debootstrap: Path, tmp_path: Path) -> None:
    debootstrap.write_text("#!/bin/sh\nmkdir -p $4/usr/sbin\ntouch $4/usr/sbin/mysqld\n")
    with pytest.raises(MissingServer, match="does not start today"):
        mysql_root.make_mysql_root(tmp_path / "cache" / "root")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["root.lock"]


@needs_root
def test_two_processes_that_want_it_at_once_make_it_once(
    debootstrap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql_root, "server_version", lambda _command: "9.7.4")
    debootstrap.write_text(
        f"#!/bin/sh\necho made >>{tmp_path}/made\nsleep 0.2\nmkdir -p $4/usr/sbin\ntouch $4/usr/sbin/mysqld\n"
    )
    target = tmp_path / "cache" / "root"
    threads = [threading.Thread(target=mysql_root.make_mysql_root, args=(target,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (target / "usr/sbin/mysqld").exists()
    assert (tmp_path / "made").read_text() == "made\n"


def test_without_the_right_to_chroot_nothing_is_downloaded(
    debootstrap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    debootstrap.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    with pytest.raises(PreconditionFailed, match="only be made and used by root"):
        mysql_root.make_mysql_root(tmp_path / "root")
    assert not (tmp_path / "ran").exists()


def test_a_leg_that_was_not_run_is_said_loudly_and_is_no_failure() -> None:
    script = Path(__file__).parents[2] / ".ci" / "not-run.sh"
    done = subprocess.run([script, "the tests on MySQL", "why"], capture_output=True, text=True, check=True)
    assert "NOT RUN: the tests on MySQL" in done.stdout
