"""A map kept in a YAML file: the embedded default, for one machine or a shared directory.

Beside ``shardmap.yaml`` stand ``shardmap.yaml.history/`` with every version published, and ``.shardmap.yaml.lock``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from shardkit.errors import MapNotFound, MapStoreUnavailable, ShardMapError
from shardkit.mapstore.store import ClientState, MapCallback, MapVersion, next_version, publisher, this_client
from shardkit.mapstore.watches import CallbackWatch, Watches
from shardkit.shardmap import ShardMap

POLL_SECONDS = 0.5
_HEADER = re.compile(r"# version \d+ of this shard map, published (?P<at>\S+) by (?P<by>\S+)")

_Signature = tuple[int, int, int]


class FileMapStore:
    """One YAML file, replaced as a whole; a lock file makes publishing a compare-and-set between processes.

    A file written by hand counts as version 1 where it has no ``version``. Who changes it by hand while processes watch
    it has to raise ``version``: lower and equal versions are never accepted.

    :param path: the YAML file.
    :param timeout: seconds to wait for the lock of another publisher.
    :param poll: seconds between two looks at the file's time stamp while it is watched.
    """

    def __init__(self, path: str | Path, *, timeout: float = 10.0, poll: float = POLL_SECONDS) -> None:
        self._path = Path(path).absolute()
        self._timeout = timeout
        self._signature: _Signature | None = None
        self._client: ClientState | None = None
        self._watches = Watches(str(self._path), self._refresh, poll)

    def __repr__(self) -> str:
        return f"FileMapStore({str(self._path)!r})"

    @property
    def source(self) -> str:
        """``file:`` and the absolute path."""
        return f"file:{self._path}"

    @property
    def path(self) -> Path:
        """The YAML file."""
        return self._path

    # --- reading

    def load(self) -> ShardMap:
        """See `MapStore.load`."""
        try:
            found = self._read()
        except ShardMapError as error:
            return self._watches.instead(error)
        return self._watches.see(found)

    def _read(self) -> ShardMap:
        try:
            self._path.stat()
        except FileNotFoundError:
            raise MapNotFound(
                f"there is no shard map at {self._path}",
                hint=f"check the path; make one from a database with 'shardkit map init --from URL -o {self._path}'",
            ) from None
        except OSError as error:
            raise MapStoreUnavailable(
                f"the shard map {self._path} cannot be read: {error.strerror}", hint="mend the path or its permissions"
            ) from None
        found = ShardMap.load(self._path)
        return found.with_version(max(found.version, 1))

    def _refresh(self) -> None:
        stat = self._path.stat()
        signature = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if signature != self._signature:
            self._watches.see(self._read())
            self._signature = signature

    # --- publishing

    def publish(self, new: ShardMap, *, expected_version: int) -> ShardMap:
        """See `MapStore.publish`. Comments of a file written by hand stay in its history only."""
        with self._locked():
            try:
                current = self._read()
            except MapNotFound:
                current = None
            new = next_version(new, current=current.version if current else 0, expected=expected_version)
            if current is not None and not self._version_path(current.version).exists():
                self._write(self._version_path(current.version), self._path.read_text(encoding="utf-8"))
            published = datetime.now(UTC).isoformat(timespec="seconds")
            text = f"# version {new.version} of this shard map, published {published} by {publisher()}\n{new.dump()}"
            self._write(self._version_path(new.version), text)
            self._write(self._path, text)
        self._watches.see(new)
        self._watches.wake()
        return new

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        deadline = time.monotonic() + self._timeout
        try:
            lock = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise MapStoreUnavailable(
                f"{self._path.parent} cannot be written: {error.strerror}", hint="mend the path or its permissions"
            ) from None
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise MapStoreUnavailable(
                            f"another process has been publishing {self._path} for {self._timeout:g} s",
                            hint="end it and try again; nothing was written",
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(lock)  # gives the lock back, too

    def _write(self, path: Path, text: str) -> None:
        """Replace a file so that a reader sees the old text or the new, also after a power cut."""
        try:
            path.parent.mkdir(exist_ok=True)
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with contextlib.ExitStack() as cleanup:
                cleanup.callback(Path(name).unlink, missing_ok=True)
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fchmod(file.fileno(), mode)
                    os.fsync(file.fileno())
                Path(name).replace(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise MapStoreUnavailable(
                f"{path} cannot be written: {error.strerror}", hint="mend the path or its permissions"
            ) from None

    # --- history

    def _version_path(self, version: int) -> Path:
        return self._path.with_name(f"{self._path.name}.history") / f"{version}.yaml"

    def history(self, limit: int | None = None) -> Sequence[MapVersion]:
        """See `MapStore.history`."""
        current = self.load().version
        kept = (int(path.stem) for path in self._version_path(0).parent.glob("*.yaml") if path.stem.isdecimal())
        # a publisher that died half way leaves a file for a version that never was
        versions = sorted({*(version for version in kept if version < current), current})
        return tuple(self._entry(version) for version in versions[-limit if limit else 0 :])

    def _entry(self, version: int) -> MapVersion:
        path = self._version_path(version)
        path = path if path.exists() else self._path
        with path.open(encoding="utf-8") as file:
            header = _HEADER.match(file.readline())
        if header:
            return MapVersion(version, datetime.fromisoformat(header["at"]), header["by"])
        return MapVersion(version, datetime.fromtimestamp(path.stat().st_mtime, UTC))

    def load_version(self, version: int) -> ShardMap:
        """See `MapStore.load_version`."""
        current = self.load()
        if version == current.version:
            return current
        path = self._version_path(version)
        if version > current.version or not path.exists():
            raise MapNotFound(f"{self._path} has no version {version}", hint="see 'shardkit map history'")
        return ShardMap.load(path).with_version(version)

    # --- the rest of the protocol

    def watch(self, callback: MapCallback, *, after: int = 0) -> CallbackWatch:
        """See `MapStore.watch`: the file's time stamp is looked at every ``poll`` seconds."""
        return self._watches.add(callback, after)

    def announce(self, version: int) -> None:
        """Noted for `clients` of this process; a file has no place for others to see it."""
        self._client = this_client(version) if self._client is None else replace(self._client, version=version)

    def clients(self) -> Sequence[ClientState]:
        """This process, where it has announced itself."""
        return () if self._client is None else (self._client,)

    def close(self) -> None:
        """End all watches."""
        self._watches.close()
