"""The command's side of a shard's process: start it, hear its events, let it end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed, ShardError
from shardkit.migrate.job import Job, Task
from shardkit.topology import Endpoint

Listener = Callable[[str, Mapping[str, Any]], None]

#: As much of a process's error output as an error quotes, in lines.
TAIL_LINES = 5


@dataclass
class Outcome:
    """How a shard's process ended.

    :param events: all but the statements'.
    :param error: why it failed; None where it did not.
    :param precondition: nothing was changed, because something has to be put right first.
    :param stopped: it stopped between two revisions, as asked.
    :param trace: the traceback in the process.
    """

    events: list[Mapping[str, Any]] = field(default_factory=list)
    error: str | None = None
    hint: str | None = None
    precondition: bool = False
    stopped: bool = False
    trace: str = ""

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """Its events of one kind."""
        return [event for event in self.events if event["event"] == kind]


class Processes:
    """The processes of one command.

    :param listen: called with a shard's name and each of its events, from several threads.
    """

    def __init__(self, listen: Listener | None = None) -> None:
        self._listen = listen
        self._lock = threading.Lock()
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._stopping = False

    def run(self, job: Job) -> Outcome:
        """Do a job and wait for it."""
        outcome = Outcome()
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            with self._lock:
                if self._stopping:
                    outcome.stopped = True
                    return outcome
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "shardkit.migrate.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    process_group=0,  # Ctrl-C is for the command: it lets each process complete its revision
                    text=True,
                    encoding="utf-8",
                )
                self._running[job.shard] = process
            with process:
                self._converse(process, job, outcome)
            with self._lock:
                del self._running[job.shard]
            if process.returncode and outcome.error is None:
                errors.seek(0)
                said = " | ".join(errors.read().splitlines()[-TAIL_LINES:])
                ended = f"signal {-process.returncode}" if process.returncode < 0 else f"code {process.returncode}"
                outcome.error = f"its process ended with {ended}" + (f": {said}" if said else "")
        return outcome

    def stop(self) -> None:
        """Let each process complete the revision that it is in, and start no other."""
        with self._lock:
            self._stopping = True
            for process in self._running.values():
                if process.stdin is not None:
                    process.stdin.close()

    def _converse(self, process: subprocess.Popen[str], job: Job, outcome: Outcome) -> None:
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # it has ended already: its exit code is told
            process.stdin.write(job.line())
            process.stdin.flush()
        for line in process.stdout:
            event = json.loads(line)
            match event["event"]:
                case "failed":
                    outcome.error, outcome.hint = event["error"], event["hint"]
                    outcome.precondition, outcome.trace = event["precondition"], event["trace"]
                case "stopped":
                    outcome.stopped = True
            if event["event"] != "statement":
                outcome.events.append(event)
            if self._listen is not None:
                self._listen(job.shard, event)


def ensure_own_tables(
    shard: str, endpoint: Endpoint, credentials: CredentialSource, *, driver: str = "pymysql"
) -> None:
    """Bring shardkit's own tables in one database up to date.

    :raises ShardError: when that fails.
    """
    logon = credentials(endpoint)
    job = Job(Task.OWN_TABLES, shard, endpoint.url, logon.user, logon.password, driver, sys_path=tuple(sys.path))
    outcome = Processes().run(job)
    if outcome.error is not None and outcome.precondition:
        raise PreconditionFailed(outcome.error, hint=outcome.hint)
    if outcome.error is not None:
        raise ShardError(f"shard {shard}: {endpoint}: {outcome.error}", shard=shard, hint=outcome.hint)
