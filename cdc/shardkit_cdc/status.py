"""How every hop stands, read from the databases alone: it works from any machine, whoever runs the relay."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import ShardkitError
from shardkit.gtid import Flavour, Position, parse_position
from shardkit.topology import Shard
from shardkit_cdc import own_schema, preflight
from shardkit_cdc.connection import connect, server_errors
from shardkit_cdc.daemon import hops_of
from shardkit_cdc.position import lock_name, read_row
from shardkit_cdc.relay import HopSpec

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class HopStatus:
    """One hop, as its two servers show it.

    :param state: ``running`` (a runner holds the hop's lock on the target), ``stopped``, ``failed`` (stopped with an
        error), ``new`` (never ran), ``unreachable`` (the target does not answer).
    :param position: how far the target is in the source's log; empty before the first transaction.
    :param lag_seconds: age of the newest heartbeat on the target; None where there is none.
    :param behind: transactions of the source not yet applied; None where the source does not answer.
    :param runner: who runs it, or ran it last.
    :param error: why it stopped, or why nothing is known.
    """

    hop: str
    shard: str
    role: str
    source: str
    target: str
    state: str
    position: str = ""
    lag_seconds: float | None = None
    behind: int | None = None
    epoch: int | None = None
    runner: str = ""
    error: str = ""


def hop_status(shards: Iterable[Shard], credentials: CredentialSource) -> list[HopStatus]:
    """Look at every hop of these shards, all at once; a server that does not answer costs a few seconds."""
    specs = [spec for shard in shards for spec in hops_of(shard)]
    if not specs:
        return []
    with ThreadPoolExecutor(max_workers=min(16, len(specs))) as pool:
        return list(pool.map(lambda spec: _look(spec, credentials), specs))


def _look(spec: HopSpec, credentials: CredentialSource) -> HopStatus:
    new = HopStatus(
        hop=spec.name,
        shard=spec.shard,
        role=spec.role.value,
        source=spec.source.address,
        target=spec.target.address,
        state="new",
    )
    try:
        target = connect(spec.target, credentials, autocommit=True, read_timeout=_ANSWER_SECONDS)
        with closing(target), server_errors(spec.target, spec.name, doing="looking at the hop"):
            facts = preflight.ask(target, spec.target)
            row = read_row(target, spec.key) if own_schema.exists(target) else None
            if row is None:
                return new
            running = _is_held(target, lock_name(spec.target.database, spec.key))
            lag = _lag(target, spec.shard)
            behind = _behind(spec, credentials, facts.flavour, parse_position(facts.flavour, row.gtid))
    except ShardkitError as error:
        return replace(new, state="unreachable", error=str(error))
    state = "running" if running else "failed" if row.error else "stopped"
    return replace(
        new,
        state=state,
        position=row.gtid,
        lag_seconds=lag,
        behind=behind,
        epoch=row.epoch,
        runner=row.runner,
        error=row.error,
    )


def _is_held(connection: Connection, lock: str) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT IS_USED_LOCK(%s)", (lock,))
        found = cursor.fetchone()
    return found is not None and found[0] is not None


def _lag(connection: Connection, shard: str) -> float | None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT (UNIX_TIMESTAMP(NOW(6)) * 1000000 - written_at) / 1000000 FROM {own_tables.heartbeat.name} "
            "WHERE shard = %s",
            (shard,),
        )
        found = cursor.fetchone()
    return None if found is None else max(0.0, float(found[0]))


def _behind(spec: HopSpec, credentials: CredentialSource, flavour: Flavour, position: Position) -> int | None:
    try:
        source = connect(spec.source, credentials, autocommit=True, read_timeout=_ANSWER_SECONDS)
        with closing(source), server_errors(spec.source, spec.name, doing="asking how far its log is"):
            return preflight.end_of_log(source, flavour).ahead_of(position)
    except ShardkitError:
        return None  # the hop's own state says what there is to say; the source has a line of its own elsewhere
