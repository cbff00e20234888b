"""``shardkit relay run`` as a process of its own, and the shard map for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shardkit.topology import Endpoint
from tests.relay_chain import Chain, wait_for


class Daemon:
    """``shardkit relay run`` as a process of its own."""

    def __init__(self, source: str, log: Path, *options: str) -> None:
        self._command = [sys.executable, "-c", "from shardkit.cli import main; main()", "relay", "run", "--map", source]
        self._command += options
        self._log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._seen = 0

    def start(self) -> None:
        self._seen = len(self.log())
        environment = os.environ | {"SHARDKIT_USER": "root", "SHARDKIT_PASSWORD": ""}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for_log(self, *texts: str) -> None:
        """Wait until this run has logged all the texts."""
        assert self.process is not None
        process = self.process
        wait_for(
            lambda: process.poll() is not None or all(text in self.log()[self._seen :] for text in texts),
            lambda: f"the daemon says {texts}; it says {self.log()[-3000:]}",
        )
        assert process.poll() is None, self.log()[-3000:]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(30)


def map_of(chain: Chain, path: Path) -> str:
    """Write the map of a chain; its address for ``--map``."""
    path.write_text(map_text(chain.shard, [server.endpoint(chain.database) for server in chain.servers]))
    return f"file:{path}"


def map_text(shard: str, endpoints: Sequence[Endpoint]) -> str:
    """master -> replica, or master -> staging -> replicas where there are more than two."""
    master, *copies = [endpoint.url for endpoint in endpoints]
    staging = (
        f"staging: {copies[0]}, replicas: [{', '.join(copies[1:])}]" if len(copies) > 1 else f"replicas: [{copies[0]}]"
    )
    return f"""
format: 1
cluster: {endpoints[0].database.replace("_", "-")}
version: 1
keyspaces:
  everything: {{tables: [accounts], placement: {shard}}}
shards:
  {shard}: {{master: {master}, {staging}}}
"""
