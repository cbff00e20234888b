"""A server as a child process: started with a log file, stopped by its pid, and never left behind."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from shardkit.errors import PreconditionFailed, ServerFailed
from shardkit.testing import watchdog

_POLL = 0.02  # seconds between two looks at a server that is starting or stopping


class Watchdog:
    """This process's end of the pipe to its watchdog process (`shardkit.testing.watchdog`), started at first need."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def keep(self, name: str, entry: watchdog.Entry) -> None:
        """Have this cleaned up should the process die; replaces what was said under the same name."""
        self._send({name: entry})

    def drop(self, name: str) -> None:
        """The server of this name has been cleaned up in an orderly way."""
        self._send({name: None})

    def _send(self, message: Mapping[str, watchdog.Entry | None]) -> None:
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            pipe = self._process.stdin if self._process is not None else None
            assert pipe is not None  # noqa: S101 - for the type checker
            pipe.write(json.dumps(message).encode() + b"\n")
            pipe.flush()

    def _start(self) -> None:
        # In a forked child the inherited object belongs to the parent's watchdog: leave that alone.
        self._owner = os.getpid()
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter on our own file
            [sys.executable, "-I", "-S", watchdog.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self) -> None:
        """End the watchdog process; what is still on its list is cleaned up."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                return
            assert self._process.stdin is not None  # noqa: S101 - for the type checker
            with contextlib.suppress(BrokenPipeError):  # it was killed: nothing to close
                self._process.stdin.close()
            self._process.wait()
            self._process = None


WATCHDOG = Watchdog()
# Registered before anything that uses it, and so run after the servers have been closed.
atexit.register(WATCHDOG.stop)

# Kept, because subprocess warns about a Popen object that goes away before its process does.
_LEFT_RUNNING: list[subprocess.Popen[bytes]] = []


class ServerProcess:
    """One server program on this machine.

    The child runs in a session of its own, so that Ctrl-C in a terminal reaches only us and we stop it in order.

    :param name: for messages and for the watchdog; unique in this process.
    :param command: program and arguments; must not fork into the background.
    :param log: file that takes standard output and standard error, appended to at each start.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.log = log
        self._cwd = cwd
        self._env = dict(env) if env is not None else None
        self._child: subprocess.Popen[bytes] | None = None
        self._started: str | None = None
        self._paused = False

    @property
    def pid(self) -> int | None:
        """The process number while it runs."""
        return self._child.pid if self._child is not None and self.running else None

    @property
    def identity(self) -> tuple[int, str] | None:
        """``(pid, start time)`` of the running process: what a state file records."""
        pid = self.pid
        return (pid, self._started) if pid is not None and self._started is not None else None

    @property
    def running(self) -> bool:
        """Whether the process is there; a paused one is."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start the program. Does not wait until it answers."""
        if self.running:
            return
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(  # noqa: S603 - the caller built the command; no shell
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._cwd,
                env=self._env,
                start_new_session=True,
            )
        self._started = watchdog.start_time(self._child.pid)
        self._paused = False

    def wait_until(self, answers: Callable[[], bool], timeout: float) -> None:
        """Wait until the server answers.

        :param timeout: seconds.
        :raises ServerFailed: with the end of the log, when it ends by itself or does not answer in time.
        """
        deadline = time.monotonic() + timeout
        while not answers():
            if not self.running:
                code = self._child.returncode if self._child is not None else None
                raise ServerFailed(
                    f"{self.name} ended by itself while starting (exit code {code})", log=self.log_tail()
                )
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} did not answer within {timeout:g} seconds", log=self.log_tail())
            time.sleep(_POLL)

    def stop(self, timeout: float = 20.0) -> None:
        """Ask it to end (SIGTERM) and wait; kill it after ``timeout`` seconds. A paused server is resumed first."""
        if not self.running:
            return
        self._signal(signal.SIGTERM)
        self.resume()
        if not self._wait(timeout):
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._child is not None and self.running:
            self._signal(signal.SIGKILL)
            self._child.wait()
        self._paused = False

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers, as with a hung machine.

        :raises PreconditionFailed: when the server does not run.
        """
        if not self.running:
            raise PreconditionFailed(f"{self.name} does not run, so it cannot be paused", hint="start it first")
        self._signal(signal.SIGSTOP)
        assert self._child is not None  # noqa: S101 - it runs
        # kill(2) returns before the other threads have stopped, and until then one of them may still answer
        os.waitid(os.P_PID, self._child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._paused = True

    def resume(self) -> None:
        """SIGCONT after `pause`."""
        if self._paused and self.running:
            self._signal(signal.SIGCONT)
        self._paused = False

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the log; empty when there is none."""
        return tail(self.log, lines)

    def cleanup_commands(self) -> list[list[str]]:
        """Nothing beyond the process itself has to be cleaned up."""
        return []

    def detach(self) -> None:
        """Leave the process running when this one ends."""
        if self._child is not None:
            _LEFT_RUNNING.append(self._child)

    def close(self) -> None:
        """Forget the process, which has ended."""
        self._child = None

    def _signal(self, number: int) -> None:
        if self._child is not None:
            self._child.send_signal(number)

    def _wait(self, timeout: float) -> bool:
        assert self._child is not None  # noqa: S101 - for the type checker: callers looked
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True


def tail(log: Path, lines: int) -> str:
    """The last ``lines`` lines of a file, read from its last 64 KiB; empty when there is no such file."""
    try:
        with log.open("rb") as file:
            _seek_back(file, 65536)
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def _seek_back(file: IO[bytes], size: int) -> None:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - size))
