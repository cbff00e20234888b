"""Cleans up when the process that started servers dies without doing so, SIGKILL included.

One small process per process that starts servers. It is told what there is to clean over a pipe; the end of the pipe
(or a change of parent: a forked child of the parent may hold the pipe open) means that the parent is gone. Then it
kills what is still running and removes the data. A parent that ends in an orderly way has taken everything off the
list before.

PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the child ends (prctl(2)), and servers are
started in parallel from short-lived threads; and it could not remove the data directories.

This file is run as a script by an interpreter without site-packages: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TypedDict

#: How the names of all throw-away directories begin: nothing else is ever removed.
PREFIX = "shardkit-"

_POLL = 0.5  # seconds between looks at the parent; the end of the pipe is seen at once
_DEATH = 10.0  # seconds that a process may take to end after SIGKILL: its memory has to be given back first


class Entry(TypedDict):
    """What one server leaves behind: processes as ``[pid, start time]``, directories, commands to run."""

    processes: list[tuple[int, str]]
    directories: list[str]
    commands: list[list[str]]


def start_time(pid: int) -> str | None:
    """When the process with this number was started, as an opaque text; None when there is none, or only a zombie.

    A number together with its start time names one process for good, also over a reboot: numbers are used again, start
    times are not.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        return _start_time_by_ps(pid)
    except ProcessLookupError:
        return None
    # proc(5): the second field is the program's name in parentheses and may hold anything; state is field 3, and
    # the start time in clock ticks since boot is field 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else f"{_boot()}:{fields[19]}"


def _boot() -> str:
    """Names the time since the machine was last started: proc_sys_kernel(5)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").partition("-")[0]


def _start_time_by_ps(pid: int) -> str | None:
    found = subprocess.run(  # noqa: S603 - fixed arguments
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, started = found.stdout.strip().partition(" ")
    return started.strip() if started and not state.startswith("Z") else None


def send_signal(pid: int, started: str, number: int) -> bool:
    """Send a signal to the process of this number and start time; False when that process is gone."""
    if start_time(pid) != started:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def clean(entry: Entry) -> None:
    """Kill the processes, run the commands, remove the directories."""
    for pid, started in entry["processes"]:
        if send_signal(pid, started, signal.SIGKILL):
            _wait_for_death(pid, started)
    for command in entry["commands"]:
        with contextlib.suppress(OSError):  # the program is gone as well: nothing is left to do it with
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603 - built by shardkit.testing
    for directory in entry["directories"]:
        if not Path(directory).name.startswith(PREFIX):
            raise ValueError(f"{directory} was not made by shardkit.testing")
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for_death(pid: int, started: str) -> None:
    # It may still be writing to the directories that are to be removed.
    deadline = time.monotonic() + _DEATH
    while start_time(pid) == started and time.monotonic() < deadline:
        time.sleep(0.01)


def watch() -> None:
    """Read ``{name: Entry | null}`` lines until the parent is gone, then clean up what is still listed."""
    parent = os.getppid()
    entries: dict[str, Entry] = {}
    pending = b""
    pipe = sys.stdin.fileno()
    while os.getppid() == parent:
        if not select.select([pipe], [], [], _POLL)[0]:
            continue
        data = os.read(pipe, 65536)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            for name, entry in json.loads(line).items():
                if entry is None:
                    entries.pop(name, None)
                else:
                    entries[name] = entry
    for entry in entries.values():
        clean(entry)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    watch()
