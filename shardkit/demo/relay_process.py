"""The relay as the demo runs it: a process of its own, as on a real host, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from shardkit.credentials import Credentials
from shardkit.errors import ShardkitError


class RelayProcess:
    """``shardkit relay run`` for a whole cluster.

    :param source: the shard map's source.
    :param account: the account on every server.
    :param log: the file that takes what the relay prints.
    """

    def __init__(self, source: str, account: Credentials, *, log: Path) -> None:
        self._source = source
        self._environment = {**os.environ, "SHARDKIT_USER": account.user, "SHARDKIT_PASSWORD": account.password}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. It begins where the positions in the databases say."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, "-m", "shardkit", "relay", "run", "--map", self._source],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that takes longer than ten seconds."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def check(self) -> None:
        """Complain when it has stopped by itself.

        :raises ShardkitError: with the last lines that it printed.
        """
        if self._process is not None and self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
            raise ShardkitError(f"the relay stopped by itself (exit code {self._process.returncode}):\n{tail}")
