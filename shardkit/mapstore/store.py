"""What a place that keeps the shard map has to do, and the values that it hands out."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol, TypeAlias, runtime_checkable

from shardkit.errors import MapConflict
from shardkit.shardmap import ShardMap

#: Called with a map that is newer than every map this watch has handed over before.
MapCallback: TypeAlias = Callable[[ShardMap], None]


@dataclass(frozen=True, slots=True)
class MapVersion:
    """One publication of the map.

    :param published_at: when, in UTC.
    :param published_by: ``user@host`` of the publishing process; empty where nobody noted it.
    """

    version: int
    published_at: datetime
    published_by: str = ""


@dataclass(frozen=True, slots=True)
class ClientState:
    """A live process that uses the map.

    :param version: the map version that it runs on.
    :param since: when the process registered, in UTC.
    """

    id: str
    version: int
    host: str
    pid: int
    since: datetime


class Watch(Protocol):
    """A running subscription to newer maps."""

    def close(self) -> None:
        """End it. The callback may still be running when this returns, but is not called again."""
        ...


@runtime_checkable
class MapStore(Protocol):
    """A place that keeps the shard map of one cluster, one version after the other.

    Stores may be used from several threads, and from child processes after a fork: a child opens its own connections.
    """

    @property
    def source(self) -> str:
        """The store as `open_store` reads it."""
        ...

    def load(self) -> ShardMap:
        """The newest map. Never one older than this store has handed out before; while none can be read, the last one
        that it handed out, with a line in the log.

        :raises MapStoreUnavailable: when the store cannot be reached and no map has been loaded yet.
        :raises MapNotFound: when nothing has been published yet.
        :raises InvalidShardMap: when what is kept there is not a map, and none has been loaded yet.
        """
        ...

    def publish(self, new: ShardMap, *, expected_version: int) -> ShardMap:
        """Put ``new`` in place of the version ``expected_version``, or do nothing (compare-and-set).

        :param expected_version: the version that ``new`` was made from; 0 for the first publication.
        :returns: the map with its version, ``expected_version + 1``.
        :raises MapConflict: when another version is in place.
        :raises MapStoreUnavailable: when the store cannot be reached; the message says whether anything may have been
            written.
        """
        ...

    def watch(self, callback: MapCallback, *, after: int = 0) -> Watch:
        """Call ``callback`` with the current map when it is newer than ``after``, then with each newer one.

        Only ever newer versions; versions in between may be left out. The callback runs in a thread of the store (of
        the publisher, in a memory store) and should return soon; an error in it is logged.

        :param after: the version that the caller has already.
        """
        ...

    def history(self, limit: int | None = None) -> Sequence[MapVersion]:
        """The versions that `load_version` can give, oldest first.

        :param limit: only the newest so many.
        """
        ...

    def load_version(self, version: int) -> ShardMap:
        """An earlier (or the current) version.

        :raises MapNotFound: when the store does not have it (any more).
        """
        ...

    def announce(self, version: int) -> None:
        """Say that this process runs on ``version``. Never blocks and never raises: it is written as soon as possible,
        written again after a lost session, and gone when the process is."""
        ...

    def clients(self) -> Sequence[ClientState]:
        """The live processes that have announced a version. Stores without a server know this process only."""
        ...

    def close(self) -> None:
        """End all watches and connections. May be called twice."""
        ...


def next_version(new: ShardMap, *, current: int, expected: int) -> ShardMap:
    """The decision of a compare-and-set: the map to write.

    :param current: the version in place; 0 where there is none.
    :raises MapConflict: when ``current`` is not what the publisher expected.
    """
    if current == expected:
        return new.with_version(expected + 1)
    if current == 0:
        raise MapConflict(
            f"the shard map of {new.cluster!r} was to replace version {expected}, but none is published",
            hint="check the map source; publish a first map with 'shardkit map apply'",
        )
    raise MapConflict(
        f"the shard map of {new.cluster!r} is at version {current}, "
        + (f"not {expected} any more" if expected else "it was to be the first")
        + ": nothing was written",
        hint="load the current map ('shardkit map show'), make the change again on top of it, and publish that",
    )


def this_client(version: int) -> ClientState:
    """This process as a client on ``version``."""
    host, pid = socket.gethostname(), os.getpid()
    return ClientState(f"{host}-{pid}-{os.urandom(4).hex()}", version, host, pid, datetime.now(UTC))


def publisher() -> str:
    """``user@host`` of this process, for the history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no passwd entry, as in many containers
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
