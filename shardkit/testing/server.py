"""What every local server has in common: a life cycle, a port, a throw-away directory, a log."""

from __future__ import annotations

import abc
import atexit
import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from shardkit.errors import MissingServer, PreconditionFailed
from shardkit.testing.docker import engine_answers
from shardkit.testing.ports import LOOPBACK, free_port, release_port
from shardkit.testing.process import WATCHDOG
from shardkit.testing.watchdog import PREFIX, Entry

_numbers = itertools.count(1)
_open_lock = threading.Lock()
_open: list[LocalServer] = []


class Run(Protocol):
    """How a server runs: a child process (`process.ServerProcess`) or a container (`docker.Container`)."""

    name: str

    @property
    def running(self) -> bool: ...
    @property
    def identity(self) -> tuple[int, str] | None: ...
    def start(self) -> None: ...
    def wait_until(self, answers: Callable[[], bool], timeout: float) -> None: ...
    def stop(self, timeout: float = ...) -> None: ...
    def kill(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def log_tail(self, lines: int = ...) -> str: ...
    def cleanup_commands(self) -> list[list[str]]: ...
    def detach(self) -> None: ...
    def close(self) -> None: ...


class LocalServer(abc.ABC):
    """A server with throw-away data on a free loopback port.

    As a context manager it is started on entering, and stopped and removed on leaving. However this process ends
    (normally, Ctrl-C, SIGTERM, SIGKILL), the server is gone and its directory removed soon after. Data outlive `stop`,
    `kill` and `restart`; only `close` removes them.

    :param port: TCP port; a free one when left out.
    :param start_timeout: seconds that the server may take until it answers.
    :param docker: True runs it in a container, False never does; None does where the programs are not installed and a
        Docker engine answers.
    """

    #: What messages and directories call this kind of server.
    kind: str

    def __init__(self, *, port: int | None = None, start_timeout: float = 60.0, docker: bool | None = None) -> None:
        self.host = LOOPBACK
        self._docker = docker
        self.start_timeout = start_timeout
        self._given_port = port
        self._port: int | None = port
        self._number = next(_numbers)
        self._directory: Path | None = None
        self._run: Run | None = None
        self._owner = os.getpid()

    # --- what a kind of server has to say ------------------------------------------------------------------------

    @abc.abstractmethod
    def _process(self, directory: Path) -> Run:
        """Lay out configuration and data in the new, empty directory and say how the server runs from them."""

    @abc.abstractmethod
    def _in_container(self) -> Run:
        """How the server runs in a container."""

    @abc.abstractmethod
    def _answers(self) -> bool:
        """Whether the server accepts work now. Must return within about a second."""

    def _parent_directory(self) -> Path:
        """Where the server's directory is made."""
        return Path(tempfile.gettempdir())

    def _prepare(self, directory: Path) -> Run:
        if self._docker is not True:
            try:
                return self._process(directory)
            except MissingServer:
                if self._docker is False or not engine_answers():
                    raise
        return self._in_container()

    # --- life cycle ----------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The TCP port; the same over restarts."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def name(self) -> str:
        """``mariadb-20511``: kind and port."""
        return f"{self.kind}-{self.port}"

    @property
    def directory(self) -> Path | None:
        """Data, configuration and log; None before the first start and after `close`."""
        return self._directory

    @property
    def running(self) -> bool:
        """Whether the process is there (a paused one is)."""
        return self._run is not None and self._run.running

    @property
    def identity(self) -> tuple[int, str] | None:
        """``(pid, start time)`` while it runs as a process of this machine."""
        return self._run.identity if self._run is not None else None

    def start(self) -> Self:
        """Start the server and wait until it answers. Nothing happens when it runs already.

        :raises MissingServer: when the programs are not installed; the hint says how to install them.
        :raises ServerFailed: when it does not come up, with the end of its log.
        """
        if self.running:
            return self
        if self._run is None:
            try:
                self._run = self._lay_out()
            except BaseException:
                self.close()
                raise
        try:
            self._run.start()
            self._keep()
            self._run.wait_until(self._answers, self.start_timeout)
        except BaseException:
            self._run.kill()
            raise
        return self

    def stop(self) -> None:
        """Shut the server down in order; its data stay for the next `start`."""
        if self._run is not None:
            self._run.stop()
            self._keep()

    def kill(self) -> None:
        """SIGKILL: what a crash leaves stays for the next `start`."""
        if self._run is not None:
            self._run.kill()
            self._keep()

    def restart(self) -> None:
        """Stop in order and start again, on the same port and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered until `resume`.

        :raises PreconditionFailed: when the server does not run.
        """
        if self._run is None:
            raise PreconditionFailed(f"{self.name} does not run, so it cannot be paused", hint="start it first")
        self._run.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._run is not None:
            self._run.resume()

    def close(self) -> None:
        """Kill the server and remove its data. Does nothing in a forked child of the process that started it."""
        if self._owner != os.getpid():
            return
        with _open_lock:
            if self in _open:
                _open.remove(self)
        if self._run is not None:
            self._run.kill()
            self._run.close()
            self._run = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            WATCHDOG.drop(self._key)
            self._directory = None
        if self._given_port is None and self._port is not None:
            release_port(self._port)
            self._port = None

    def detach(self) -> None:
        """Leave the running server behind when this process ends, with its data; `close` no longer does anything.

        `cleanup_entry` says what there is to clean up later.

        :raises PreconditionFailed: when it does not run.
        """
        if self._run is None or not self._run.running:
            raise PreconditionFailed(f"{self.name} does not run, so it cannot be left running", hint="start it first")
        self._run.detach()
        with _open_lock:
            _open.remove(self)
        WATCHDOG.drop(self._key)
        self._owner = 0

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the server's log."""
        return self._run.log_tail(lines) if self._run is not None else ""

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<{type(self).__name__} {self.host}:{self._port} {state}>"

    @property
    def _key(self) -> str:
        return f"{self.kind}#{self._number}"

    def _lay_out(self) -> Run:
        self._directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{self.kind}-", dir=self._parent_directory()))
        with _open_lock:
            _open.append(self)
        self._keep()
        return self._prepare(self._directory)

    def _keep(self) -> None:
        WATCHDOG.keep(self._key, self.cleanup_entry())

    def cleanup_entry(self) -> Entry:
        """What `watchdog.clean` has to clean up after this server as it is now."""
        identity = self.identity
        return {
            "processes": [identity] if identity is not None else [],
            "directories": [str(self._directory)] if self._directory is not None else [],
            "commands": self._run.cleanup_commands() if self._run is not None else [],
        }


def open_servers() -> tuple[LocalServer, ...]:
    """The servers of this process that have been started and not closed."""
    with _open_lock:
        return tuple(_open)


def start_together(servers: Sequence[LocalServer]) -> None:
    """Start several servers in parallel. When one fails, all of them are closed and its error is raised."""
    if not servers:
        return
    with ThreadPoolExecutor(max_workers=min(8, len(servers)), thread_name_prefix="shardkit-start") as pool:
        started = [pool.submit(server.start) for server in servers]
    errors = [error for future in started if (error := future.exception()) is not None]
    if errors:
        close_together(servers)
        raise errors[0]


def close_together(servers: Sequence[LocalServer]) -> None:
    """Close several servers: killed one after the other, which takes milliseconds each."""
    for server in servers:
        server.close()


@atexit.register
def _close_all() -> None:
    close_together(open_servers())
