"""A throw-away ZooKeeper."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

from shardkit.testing.binaries import find_zookeeper
from shardkit.testing.docker import DATA, Container, start_script
from shardkit.testing.process import ServerProcess
from shardkit.testing.server import LocalServer, Run

# A small heap, one compiler tier and one collector thread: starts in less than half a second.
_JVM = ("-Xmx128m", "-Xshare:auto", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_MAIN = "org.apache.zookeeper.server.ZooKeeperServerMain"


class LocalZooKeeper(LocalServer):
    """A single ZooKeeper server: about half a second from nothing.

    Sessions may be as short as ``2 * tick`` (0.4 seconds) and as long as a minute, so that tests of lost sessions need
    not wait.

    :param tick: seconds; ZooKeeper's unit for time-outs.
    :param durable: fsync at every write, as production does. Without, a crash of the server loses nothing either.
    """

    kind = "zookeeper"

    def __init__(
        self,
        *,
        tick: float = 0.2,
        durable: bool = False,
        port: int | None = None,
        start_timeout: float = 60.0,
        docker: bool | None = None,
    ) -> None:
        super().__init__(port=port, start_timeout=start_timeout, docker=docker)
        self.tick = tick
        self.durable = durable

    @property
    def hosts(self) -> str:
        """``host:port``, as ZooKeeper clients want it."""
        return f"{self.host}:{self.port}"

    def url(self, cluster: str) -> str:
        """The map source ``zookeeper://host:port/cluster``, as `create_cluster` takes it."""
        return f"zookeeper://{self.hosts}/{cluster}"

    def ask(self, word: str, timeout: float = 1.0) -> str:
        """Send one of ZooKeeper's four-letter words (``srvr``, ``cons``, ``dump``, ``mntr``) and return the answer.

        :param timeout: seconds.
        :raises OSError: when nothing answers.
        """
        answer = b""
        with socket.create_connection((self.host, self.port), timeout=timeout) as connection:
            connection.sendall(word.encode("ascii"))
            while data := connection.recv(65536):
                answer += data
        return answer.decode("utf-8", "replace")

    def _process(self, directory: Path) -> Run:
        java = find_zookeeper()
        configuration = directory / "zoo.cfg"
        configuration.write_text(self._configuration(str(directory / "data"), self.host), encoding="utf-8")
        command = [java.command, *self._java_options(), "-cp", java.class_path, _MAIN, str(configuration)]
        # The user's own Java options (a larger heap, an agent) are not meant for a throw-away server.
        environment = {k: v for k, v in os.environ.items() if k not in {"JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS"}}
        return ServerProcess(self.name, command, log=directory / "server.log", cwd=directory, env=environment)

    def _in_container(self) -> Run:
        prepare = f'mkdir {DATA}\nprintf "%s" "$CONFIGURATION" >/shardkit/zoo.cfg'
        # The official image has a release under /, Debian's packages have their jars in /usr/share/java.
        path = (
            '"$(for lib in /apache-zookeeper*/lib; do [ -d "$lib" ] && printf "%s/*:" "$lib"; done)'
            '/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar"'
        )
        server = f"java {shlex.join(self._java_options())} -cp {path} {_MAIN} /shardkit/zoo.cfg"
        return Container(
            self.name,
            os.environ.get("SHARDKIT_ZOOKEEPER_IMAGE", "zookeeper:3.9"),
            start_script(prepare, server),
            port=self.port,
            environment={"CONFIGURATION": self._configuration(DATA, "0.0.0.0")},  # noqa: S104 - of the container
        )

    def _configuration(self, data: str, address: str) -> str:
        settings = {
            "dataDir": data,
            "clientPort": self.port,
            "clientPortAddress": address,
            "tickTime": round(self.tick * 1000),
            "minSessionTimeout": round(self.tick * 2000),
            "maxSessionTimeout": 60_000,
            "maxClientCnxns": 0,
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "*",
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())

    def _java_options(self) -> list[str]:
        return [
            *_JVM,
            f"-Dzookeeper.forceSync={'yes' if self.durable else 'no'}",
            "-Dzookeeper.preAllocSize=1024",  # KiB; the default is 64 MiB per log file
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
        ]

    def _answers(self) -> bool:
        try:
            return "Mode:" in self.ask("srvr")
        except OSError:
            return False
