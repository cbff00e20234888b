"""Watching the relay at work: how far each database is, and whether they hold the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pymysql

from shardkit.cli.output import Column, Output
from shardkit.credentials import CredentialSource
from shardkit.demo.models import Base
from shardkit.demo.relay_process import RelayProcess
from shardkit.errors import DifferencesFound, ShardkitError
from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint, Role, Shard

#: Seconds that the replicas may take to catch up. They need one or two.
PATIENCE = 60.0


@dataclass(frozen=True)
class Checksums:
    """``CHECKSUM TABLE`` of one shard's tables: by endpoint, in the order of ``tables``."""

    shard: str
    tables: tuple[str, ...]
    by_endpoint: Mapping[str, tuple[int | None, ...]]

    @property
    def equal(self) -> bool:
        """Whether every endpoint holds the same."""
        return len(set(self.by_endpoint.values())) == 1


class Pipeline:
    """Master -> staging -> replicas of each shard, seen from outside.

    :param relay: asked whether it still lives while something is waited for.
    """

    def __init__(self, shard_map: ShardMap, credentials: CredentialSource, relay: RelayProcess) -> None:
        self._shards = shard_map.shards
        self._tables = {
            name: tuple(sorted(table for table, info in shard_map.tables.items() if name in info.shards))
            for name in shard_map.shards
        }
        self._credentials = credentials
        self._relay = relay

    # --- waiting

    def wait_until_running(self) -> None:
        """Until every replica has a heartbeat that came all the way."""
        self._wait(lambda: all(lag is not None for _, _, lag in self.lags()), "the first heartbeat on every replica")

    def wait_until_level(self) -> None:
        """Until every replica holds all that its master held when this was called."""
        floors = {name: self._beat(shard.master) or 0 for name, shard in self._shards.items()}

        def level() -> bool:
            # the next heartbeat follows, in the log, everything that was committed before it
            return all(
                (self._beat(endpoint) or 0) > floors[name] + 1
                for name, shard in self._shards.items()
                for role, endpoint in shard.endpoints()
                if role is not Role.MASTER
            )

        self._wait(level, "the replicas to catch up")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self._relay.check()
            if time.monotonic() > deadline:
                raise ShardkitError(f"waited {PATIENCE:.0f} s for {what}", hint="see what the relay printed")
            time.sleep(0.05)

    # --- lag

    def lags(self) -> Iterator[tuple[str, str, float | None]]:
        """Shard, endpoint and the age of its newest heartbeat in seconds, for staging and replicas."""
        for name, shard in self._shards.items():
            for label, endpoint in labelled(shard):
                if label != Role.MASTER:
                    yield name, label, self._age(endpoint)

    def show_lag(self, out: Output) -> None:
        """A table of `lags`."""
        out.line()
        out.table(
            ["shard", "database", Column("lag", right=True)],
            [
                (name, label, "unknown" if lag is None else f"{lag * 1000:.0f} ms behind the master")
                for name, label, lag in self.lags()
            ],
        )

    def _age(self, endpoint: Endpoint) -> float | None:
        rows = self._query(
            endpoint, "SELECT UNIX_TIMESTAMP(NOW(6)) * 1000000 - MAX(written_at) FROM shardkit_heartbeat"
        )
        return None if not rows or rows[0][0] is None else float(rows[0][0]) / 1e6

    def _beat(self, endpoint: Endpoint) -> int | None:
        rows = self._query(endpoint, "SELECT MAX(beat) FROM shardkit_heartbeat")
        return rows[0][0] if rows else None

    # --- contents

    def checksums(self) -> list[Checksums]:
        """Every table on every endpoint.

        :raises DifferencesFound: when the endpoints of a shard do not hold the same.
        """
        found = []
        for name, shard in self._shards.items():
            tables = self._tables[name]
            words = ", ".join(f"`{table}`" for table in tables)
            sums = {
                label: tuple(row[1] for row in self._query(endpoint, f"CHECKSUM TABLE {words}"))
                for label, endpoint in labelled(shard)
            }
            found.append(Checksums(name, tables, sums))
        different = [checksums for checksums in found if not checksums.equal]
        if different:
            raise DifferencesFound(
                f"master, staging and replicas of {', '.join(checksums.shard for checksums in different)} differ: "
                f"{[dict(checksums.by_endpoint) for checksums in different]}"
            )
        return found

    def count(self, endpoint: Endpoint, condition: str) -> int:
        """How many flights of one endpoint meet an SQL condition."""
        return int(
            self._query(endpoint, f"SELECT COUNT(*) FROM {Base.metadata.tables['flights'].name} WHERE {condition}")[0][
                0
            ]
        )

    def _query(self, endpoint: Endpoint, statement: str) -> list[tuple[Any, ...]]:
        credentials = self._credentials(endpoint)
        connection = pymysql.connect(
            host=endpoint.host,
            port=endpoint.port,
            user=credentials.user,
            password=credentials.password,
            database=endpoint.database,
            autocommit=True,
            connect_timeout=5,
        )
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return list(cursor.fetchall())
        except pymysql.err.ProgrammingError:
            return []  # the relay has yet to make its tables there
        finally:
            connection.close()


def labelled(shard: Shard) -> Iterator[tuple[str, Endpoint]]:
    """A shard's endpoints: master, staging, replica 1, replica 2, ..."""
    yield Role.MASTER, shard.master
    if shard.staging is not None:
        yield Role.STAGING, shard.staging
    for number, replica in enumerate(shard.replicas, 1):
        yield f"{Role.REPLICA} {number}", replica
