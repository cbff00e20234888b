"""How every hop stands, read from the databases alone: it works from any machine, whoever runs the relay."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import ShardkitError
from shardkit.gtid import Flavour, parse_position
from shardkit.topology import Shard
from shardkit_cdc import own_schema, preflight
from shardkit_cdc.apply_path import read_path
from shardkit_cdc.connection import connect, server_errors
from shardkit_cdc.daemon import hops_of
from shardkit_cdc.pause import read_pause
from shardkit_cdc.position import HopRow, is_held, lock_name, read_row
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.retention import KeptLog, kept_log, position_lost

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class HopStatus:
    """One hop, as its two servers show it.

    :param state: ``running`` (a runner holds the hop's lock on the target), ``paused``, ``pausing`` (paused, and the
        runner has yet to notice), ``stopped``, ``failed`` (stopped with an error), ``needs reseed`` (its position is
        purged from the source's log), ``new`` (never ran), ``no source`` (not running, and the source does not answer),
        ``unreachable`` (the target does not answer).
    :param position: how far the target is in the source's log; empty before the first transaction.
    :param lag_seconds: age of the newest heartbeat on the target; None where there is none.
    :param behind: transactions of the source not yet applied; None where the source does not answer.
    :param retention_left: seconds until the source may purge what the hop needs next, if the hop stood still from now
        on; None where that cannot be told (no limit in time, no heartbeat, no answer).
    :param runner: who runs it, or ran it last.
    :param error: why it stopped, or why nothing is known.
    :param apply: how rows reach the target, ``raw`` or ``sql``; empty where no runner has said so.
    :param apply_reason: why it is not ``raw``, for the hop or for some of its tables.
    :param paused_by: who paused it; None while it is not paused.
    :param paused_at: since when, by the target's clock.
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
    retention_left: float | None = None
    epoch: int | None = None
    runner: str = ""
    error: str = ""
    apply: str = ""
    apply_reason: str = ""
    paused_by: str | None = None
    paused_at: datetime | None = None


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
            pause = read_pause(target, spec.key)
            if pause is not None:
                new = replace(new, state="paused", paused_by=pause.by, paused_at=pause.at)
            row = read_row(target, spec.key) if own_schema.exists(target) else None
            if row is None:
                return new
            path = read_path(target, spec.key)
            running = is_held(target, lock_name(spec.target.database, spec.key))
            lag = _lag(target, spec.shard)
        family = _family(row, facts.flavour)
        position = parse_position(family, row.gtid)
        log, fault = _log(spec, credentials, family)
    except ShardkitError as error:
        return replace(new, state="unreachable", error=str(error))
    # A runner reads on past other databases' transactions before it moves the position: what it reads is not lost.
    waits = not (running or row.error or pause is not None)
    lost = not running and log is not None and log.has_lost(position)
    return replace(
        new,
        state="needs reseed"
        if lost
        else "no source"
        if fault and waits
        else _state(row, running=running, paused=pause is not None),
        position=row.gtid,
        lag_seconds=lag,
        behind=None if log is None else log.end.ahead_of(position),
        retention_left=None if log is None or lost else log.seconds_left(lag),
        epoch=row.epoch,
        runner=row.runner,
        apply=path.path.value if path else "",
        apply_reason=path.reason if path else "",
        error=str(position_lost(spec.source.address, hop=spec.name)) if lost else row.error or fault,
    )


def _family(row: HopRow, flavour: Flavour) -> Flavour:
    """The family of the source, as its identity in the row says."""
    word = row.source.partition(":")[0]
    return Flavour(word) if word in set(Flavour) else flavour


def _state(row: HopRow, *, running: bool, paused: bool) -> str:
    if running:
        return "pausing" if paused else "running"
    if row.error:
        return "failed"
    return "paused" if paused else "stopped"


def _lag(connection: Connection, shard: str) -> float | None:
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT (UNIX_TIMESTAMP(NOW(6)) * 1000000 - written_at) / 1000000 FROM {own_tables.heartbeat.name} "
            "WHERE shard = %s",
            (shard,),
        )
        found = cursor.fetchone()
    return None if found is None else max(0.0, float(found[0]))


def _log(spec: HopSpec, credentials: CredentialSource, flavour: Flavour) -> tuple[KeptLog | None, str]:
    """What the source has kept of its log, or why it does not say so."""
    try:
        source = connect(spec.source, credentials, autocommit=True, read_timeout=_ANSWER_SECONDS)
        with closing(source), server_errors(spec.source, spec.name, doing="asking how far its log is"):
            return kept_log(source, flavour), ""
    except (ShardkitError, pymysql.MySQLError) as error:
        return None, f"its source: {error}"
