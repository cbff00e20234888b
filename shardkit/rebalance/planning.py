"""Making a plan and applying it: what the command line and the demo call."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardkit.cluster import Cluster
from shardkit.credentials import CredentialSource, from_environment
from shardkit.errors import PreconditionFailed
from shardkit.mapstore import MapStore, open_store
from shardkit.rebalance import census, preflight
from shardkit.rebalance.coordinator import Coordinator, Observer, Settings, Silence
from shardkit.rebalance.failpoint import reach
from shardkit.rebalance.job import Job, State, now
from shardkit.rebalance.jobstore import JobStore, open_job_store
from shardkit.rebalance.plan import Drain, MoveBuckets, Plan, Split, Transfer, Wish, check_against, choose, transfers_of
from shardkit.rebalance.plan import now as plan_time
from shardkit.rebalance.stages import carry_out
from shardkit.shardmap import Keyspace, ShardMap


@dataclass(frozen=True, slots=True)
class Place:
    """Where the map is, and how to log on to its servers."""

    store: MapStore
    credentials: CredentialSource


def place_of(where: Cluster | MapStore | str | Path, credentials: CredentialSource | None, stack: ExitStack) -> Place:
    """What a caller names: a cluster, an open store, or a map source (closed with the stack)."""
    if isinstance(where, Cluster):
        return Place(where.store, credentials or where.credentials)
    if isinstance(where, str | Path):
        store = open_store(where)
        stack.callback(store.close)
        return Place(store, credentials or from_environment())
    return Place(where, credentials or from_environment())


def plan_move(
    where: Cluster | MapStore | str | Path,
    wish: Wish,
    *,
    keyspace: str | None = None,
    by: Literal["rows", "bytes"] = "rows",
    group: int | None = None,
    credentials: CredentialSource | None = None,
) -> Plan:
    """Choose what to move, count it, and look whether it can be moved. Changes nothing.

    :param where: a cluster, an open map store, or a map source.
    :param wish: `MoveBuckets`, `Drain`, `Add`, `Split` or `Even`.
    :param keyspace: may be left out where the wish fits one keyspace only, or, to drain a shard, concerns all.
    :param by: what a bucket weighs.
    :param group: at most so many buckets in one job.
    :param credentials: how to log on; a cluster brings its own, else the environment's account.
    :raises PreconditionFailed: with the reasons, when it cannot be moved; also when there is nothing to move.
    """
    with ExitStack() as stack:
        place = place_of(where, credentials, stack)
        shard_map = place.store.load()
        transfers: list[Transfer] = []
        notes: list[str] = []
        for space in _keyspaces(shard_map, keyspace, wish):
            counted = census.count(shard_map, space, place.credentials)
            weights = counted.rows if by == "rows" else counted.size
            chosen = choose(space, weights, wish, shard_map.shards)
            transfers += transfers_of(space, chosen, counted.rows, counted.size, group=group)
        if not transfers:
            raise PreconditionFailed(
                "nothing to move: the buckets are where they are wanted, or too even to be worth it",
                hint="see 'shardkit map show'",
            )
        for transfer in transfers:
            _refuse_busy(shard_map, transfer)
            notes += preflight.check(shard_map, transfer, place.credentials)
        return Plan(
            f"r{secrets.token_hex(3)}",
            shard_map.cluster,
            shard_map.version,
            plan_time(),
            tuple(transfers),
            tuple(dict.fromkeys(notes)),
        )


def _keyspaces(shard_map: ShardMap, name: str | None, wish: Wish) -> Sequence[Keyspace]:
    if name is not None:
        return (shard_map.keyspace(name),)
    spaces = list(shard_map.keyspaces.values())
    match wish:
        case Drain():
            return [space for space in spaces if space.buckets_on(wish.shard)]
        case Split():
            spaces = [space for space in spaces if space.partition is not None and space.buckets_on(wish.shard)]
        case MoveBuckets():
            spaces = [space for space in spaces if all(bucket in space.placement for bucket in wish.buckets)]
        case _:
            spaces = [space for space in spaces if space.partition is not None]
    if len(spaces) != 1:
        fitting = ", ".join(space.name for space in spaces) or "none"
        raise PreconditionFailed(
            f"it is not clear which keyspace is meant: {fitting} would fit", hint="name it with --keyspace (keyspace=)"
        )
    return spaces


def _refuse_busy(shard_map: ShardMap, transfer: Transfer) -> None:
    wanted = set(transfer.buckets)
    for move in shard_map.moves_of(transfer.keyspace):
        if wanted & set(move.buckets):
            raise PreconditionFailed(
                f"job {move.job} is moving some of these buckets of {transfer.keyspace} already",
                hint=f"see 'shardkit rebalance status {move.job}'",
            )


def apply_plan(
    where: Cluster | MapStore | str | Path,
    plan: Plan,
    *,
    settings: Settings | None = None,
    observer: Observer | None = None,
    stop: threading.Event | None = None,
    credentials: CredentialSource | None = None,
) -> tuple[Job, ...]:
    """Do what a plan says; called again after whatever stopped it, go on from there.

    :param observer: told how it goes.
    :param stop: when it is set, the job at work stops at the next safe point.
    :returns: the jobs, finished.
    :raises PreconditionFailed: when the map has changed since the plan was made.
    :raises JobStopped: when it was told to stop.
    :raises RebalanceError: when a job cannot go on; the message says why, the record keeps where.
    """
    with ExitStack() as stack:
        place = place_of(where, credentials, stack)
        jobs = open_job_store(place.store)
        names = _begin(place.store.load(), jobs, plan)
        done: list[Job] = []
        for name in names:
            job, revision = jobs.load(name)
            coordinator = Coordinator(
                place.store,
                jobs,
                place.credentials,
                job,
                revision,
                settings or Settings(),
                observer or Silence(),
                stop or threading.Event(),
            )
            done.append(carry_out(coordinator))
        return tuple(done)


def _begin(shard_map: ShardMap, jobs: JobStore, plan: Plan) -> list[str]:
    """The plan's jobs: on record already, or recorded now."""
    names = [plan.job_id(number) for number in range(len(plan.transfers))]
    there = {job.id for job in jobs.jobs()}
    if not there & set(names):
        check_against(plan, shard_map)
    time = now()
    jobs.create(
        [
            Job(
                id=name,
                plan=plan.id,
                keyspace=transfer.keyspace,
                buckets=transfer.buckets,
                source=transfer.source,
                target=transfer.target,
                state=State.PLANNED,
                map_version=plan.map_version,
                rows=transfer.rows,
                size=transfer.size,
                created_at=time,
                updated_at=time,
            )
            for name, transfer in zip(names, plan.transfers, strict=True)
            if name not in there
        ]
    )
    reach(str(State.PLANNED))
    return names


def cancel_job(
    where: Cluster | MapStore | str | Path,
    job: str,
    *,
    settings: Settings | None = None,
    observer: Observer | None = None,
    stop: threading.Event | None = None,
    credentials: CredentialSource | None = None,
) -> Job:
    """Undo a job that has not been decided yet: the source takes writes again, the target's copy is deleted.

    :raises RebalanceError: when the target owns the buckets already: then the job can only be finished.
    """
    with ExitStack() as stack:
        place = place_of(where, credentials, stack)
        jobs = open_job_store(place.store)
        found, revision = jobs.load(job)
        coordinator = Coordinator(
            place.store,
            jobs,
            place.credentials,
            found,
            revision,
            settings or Settings(),
            observer or Silence(),
            stop or threading.Event(),
        )
        return carry_out(coordinator, undo=True)


def list_jobs(where: Cluster | MapStore | str | Path) -> Sequence[Job]:
    """Every job on record, oldest first. Needs the map's store only."""
    with ExitStack() as stack:
        place = place_of(where, None, stack)
        return open_job_store(place.store).jobs()
