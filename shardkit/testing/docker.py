"""Servers in containers, through testcontainers: for machines on which they are not installed.

The server listens on the same port inside and outside, published on the loopback address only. It is started by a
script of ours, not by the image's own entry point, so that any image with the programs in it will do.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from shardkit.errors import MissingServer, PreconditionFailed, ServerFailed
from shardkit.testing.ports import LOOPBACK

_POLL = 0.05  # seconds

#: Inside the container: where the data are, and the file that says that they are complete.
DATA = "/shardkit/data"
_READY = "/shardkit/ready"


@cache
def engine_answers() -> bool:
    """Whether containers can be started here: testcontainers is installed and a Docker engine answers."""
    if find_spec("testcontainers") is None or find_spec("docker") is None:
        return False
    import docker

    try:
        client = docker.from_env(timeout=5)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except docker.errors.DockerException:
        return False
    finally:
        client.close()


def start_script(prepare: str, run: str) -> str:
    """The container's program: prepares the data unless an earlier start has done so, then becomes the server.

    Both parts are shell commands; ``prepare`` fills `DATA`.
    """
    return (
        "set -e\n"
        f"if [ ! -e {_READY} ]; then\n"
        f"rm -rf {DATA}\nmkdir -p {DATA.rpartition('/')[0]}\n{prepare}\ntouch {_READY}\n"
        "fi\n"
        f"exec {run}\n"
    )


class Container:
    """One server in a container (`server.Run`).

    :param image: what to run it from; pulled when the engine does not have it.
    :param script: shell script that becomes the server (`start_script`).
    :raises MissingServer: when no container can be started here.
    """

    def __init__(self, name: str, image: str, script: str, *, port: int, environment: Mapping[str, str]) -> None:
        if not engine_answers():
            raise MissingServer(
                f"{name} cannot be started in a container: no Docker engine answers",
                hint="start Docker, and pip install testcontainers (shardkit's extra 'testing')",
            )
        from testcontainers.core.container import DockerContainer

        self.name = name
        self._image = image
        self._container = DockerContainer(image, name=f"shardkit-{name}-{time.time_ns()}")
        self._container.with_kwargs(entrypoint=["/bin/sh", "-c", script])
        self._container.with_envs(**environment)
        # with_bind_ports() would publish on every address of the machine, and root has no password.
        ports: dict[str, Any] = self._container.ports
        ports[f"{port}/tcp"] = (LOOPBACK, port)
        self._paused = False

    @property
    def running(self) -> bool:
        """Whether the container runs; a paused one does."""
        return self._status() in {"running", "paused"}

    @property
    def identity(self) -> tuple[int, str] | None:
        """None: the process is the engine's."""
        return None

    def start(self) -> None:
        """Create the container, or start it again with the data that it has."""
        with self._engine_errors("started"):
            if self._wrapped() is None:
                self._container.start()
            else:
                self._wrapped().start()

    def wait_until(self, answers: Callable[[], bool], timeout: float) -> None:
        """Wait until the server answers.

        :param timeout: seconds.
        :raises ServerFailed: with the end of the log, when the container ends or the server does not answer in time.
        """
        deadline = time.monotonic() + timeout
        while not answers():
            if not self.running:
                raise ServerFailed(f"the container of {self.name} ended while starting", log=self.log_tail())
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} did not answer within {timeout:g} seconds", log=self.log_tail())
            time.sleep(_POLL)

    def stop(self, timeout: float = 20.0) -> None:
        """SIGTERM, and SIGKILL after ``timeout`` seconds."""
        if self.running:
            self.resume()
            with self._engine_errors("stopped"):
                self._wrapped().stop(timeout=round(timeout))

    def kill(self) -> None:
        """SIGKILL."""
        if self.running:
            self.resume()  # the engine does not kill what is frozen
            with self._engine_errors("killed"):
                self._wrapped().kill()
                self._wrapped().wait()

    def pause(self) -> None:
        """Freeze every process in the container.

        :raises PreconditionFailed: when it does not run.
        """
        if not self.running:
            raise PreconditionFailed(f"{self.name} does not run, so it cannot be paused", hint="start it first")
        with self._engine_errors("paused"):
            self._wrapped().pause()
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        if self._paused:
            self._paused = False
            with self._engine_errors("resumed"):
                self._wrapped().unpause()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the container wrote."""
        wrapped = self._wrapped()
        if wrapped is None:
            return ""
        with self._engine_errors("asked for its log"):
            return str(wrapped.logs(tail=lines).decode("utf-8", "replace"))

    def cleanup_commands(self) -> list[list[str]]:
        """How to remove the container from outside this process."""
        wrapped = self._wrapped()
        program = shutil.which("docker")
        return [[program, "rm", "--force", "--volumes", wrapped.id]] if wrapped is not None and program else []

    def detach(self) -> None:
        """Leave the container running: it does not depend on this process."""

    def close(self) -> None:
        """Remove the container and its data."""
        with self._engine_errors("removed"):
            self._container.stop()

    def _wrapped(self) -> Any:
        from testcontainers.core.exceptions import ContainerStartException

        try:
            return self._container.get_wrapped_container()
        except ContainerStartException:  # not created yet
            return None

    def _status(self) -> str:
        import docker

        wrapped = self._wrapped()
        if wrapped is None:
            return "none"
        try:
            with self._engine_errors("looked at"):
                wrapped.reload()
        except ServerFailed as error:
            if isinstance(error.__cause__, docker.errors.NotFound):
                return "gone"
            raise
        return str(wrapped.status)

    @contextlib.contextmanager
    def _engine_errors(self, deed: str) -> Iterator[None]:
        import docker

        try:
            yield
        except (docker.errors.DockerException, OSError) as error:
            raise ServerFailed(
                f"the container of {self.name} (image {self._image}) could not be {deed}: {error}",
                log="",
                hint="see that the Docker engine runs and can get the image",
            ) from error
