"""``shardkit rebalance``: plan a move of buckets, apply it, see how it goes, undo it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option, yes_option
from shardkit.cli.output import Column, Output, count
from shardkit.cli.progress import Progress, Task
from shardkit.errors import JobStopped, PreconditionFailed, RebalanceError
from shardkit.partition import format_buckets, parse_buckets
from shardkit.rebalance import (
    Add,
    Drain,
    Even,
    Job,
    MoveBuckets,
    Plan,
    Settings,
    Split,
    State,
    Wish,
    apply_plan,
    cancel_job,
    list_jobs,
    plan_move,
)
from shardkit.rebalance import Progress as JobProgress
from shardkit.shardmap import ShardMap

#: What a job does in each state, for people.
_DOING: Mapping[State, str] = {
    State.PREPARED: "prepare both shards, tell every client",
    State.FREEZING: "close the buckets to writes",
    State.FROZEN: "hold the tables",
    State.COPYING: "copy",
    State.VERIFYING: "compare",
    State.ACTIVATED: "hand over",
    State.PUBLISHED: "publish the map, tell every client",
    State.CLEANING: "delete the source's rows",
    State.CANCELLING: "undo",
}


@click.group()
def rebalance() -> None:
    """Move buckets between shards: make a plan, read it, apply it.

    While a job runs, its buckets take no writes: the databases refuse them. Everything else goes on, and reads of
    everything stay right. A job that was stopped or killed goes on with the same command.
    """


# --- plan ----------------------------------------------------------------------------------------------------------


@rebalance.command()
@map_option
@click.option("--move", metavar="BUCKETS:SHARD", help="These buckets to this shard: seoul:shop-1, or 0-63:shop-1.")
@click.option("--drain", metavar="SHARD", help="Everything away from this shard.")
@click.option("--add", metavar="SHARD", help="A fair share to this shard.")
@click.option("--split", metavar="SHARD", help="A part of this shard's load to the one that --to names.")
@click.option("--to", metavar="SHARD", help="With --split: where to.")
@click.option("--fraction", type=click.FloatRange(0, 1, min_open=True), default=0.5, help="With --split: how much.")
@click.option("--keyspace", metavar="NAME", help="Whose buckets; may be left out where it is clear.")
@click.option("--by", type=click.Choice(["rows", "bytes"]), default="rows", help="What a bucket weighs.")
@click.option("--group", type=click.IntRange(1), metavar="N", help="At most N buckets in one job.")
@click.option(
    "-o", "--output", "file", type=click.Path(path_type=Path), metavar="FILE", help="Where to write the plan."
)
@output_option
def plan(
    out: Output,
    map_source: str,
    move: str | None,
    drain: str | None,
    add: str | None,
    split: str | None,
    to: str | None,
    fraction: float,
    keyspace: str | None,
    by: str,
    group: int | None,
    file: Path | None,
) -> None:
    """Choose what to move, count it, and look whether it can be moved. Changes nothing.

    Without --move, --drain, --add or --split: evens out the load of the keyspace's shards.
    """
    wish = _wish(move, drain, add, split, to, fraction)
    with map_store(map_source) as store:
        shard_map = store.load()
        made = plan_move(store, wish, keyspace=keyspace, by="bytes" if by == "bytes" else "rows", group=group)
    path = file or Path(f"rebalance-{made.id}.yaml")
    path.write_text(made.dump(), encoding="utf-8")
    out.result({**made.document(), "file": str(path)})
    _show_plan(out, made, shard_map)
    out.done(f"wrote {path}; apply it with: shardkit rebalance apply {path}")


def _wish(
    move: str | None, drain: str | None, add: str | None, split: str | None, to: str | None, fraction: float
) -> Wish:
    if sum(part is not None for part in (move, drain, add, split)) > 1:
        raise click.UsageError("--move, --drain, --add and --split exclude one another")
    if (split is None) != (to is None):
        raise click.UsageError("--split SHARD and --to SHARD belong together")
    if move is not None:
        buckets, colon, target = move.rpartition(":")
        if not colon or not target:
            raise click.UsageError("--move takes BUCKETS:SHARD, for example 0-63:shop-1")
        try:
            return MoveBuckets(tuple(parse_buckets(buckets)), target)
        except ValueError as error:
            raise click.UsageError(f"--move: {error}") from None
    if drain is not None:
        return Drain(drain)
    if add is not None:
        return Add(add)
    if split is not None and to is not None:
        return Split(split, to, fraction)
    return Even()


def _show_plan(out: Output, made: Plan, shard_map: ShardMap) -> None:
    out.table(
        ["job", "keyspace", "from", "to", Column("buckets", right=True), Column("rows", right=True), _BYTES],
        [
            (
                made.job_id(number),
                transfer.keyspace,
                transfer.source,
                transfer.target,
                count(len(transfer.buckets)),
                count(transfer.rows),
                count(transfer.size),
            )
            for number, transfer in enumerate(made.transfers)
        ],
    )
    after = made.result(shard_map)
    for name in dict.fromkeys(transfer.keyspace for transfer in made.transfers):
        before_space, after_space = shard_map.keyspaces[name], after.keyspaces[name]
        out.line(f"{name}:")
        for shard in dict.fromkeys((*before_space.shards, *after_space.shards)):
            old, new = format_buckets(before_space.buckets_on(shard)), format_buckets(after_space.buckets_on(shard))
            if old == new:
                out.line(f"    {shard}: {old}")
            else:
                out.line(f"  - {shard}: {old or 'nothing'}", style="red")
                out.line(f"  + {shard}: {new or 'nothing'}", style="green")
    for note in made.notes:
        out.warning(note)


_BYTES = Column("bytes", right=True)


# --- apply, cancel -------------------------------------------------------------------------------------------------


@rebalance.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path(path_type=Path))
@map_option
@click.option("--rows-per-second", type=click.FloatRange(1), metavar="N", help="Copy and delete no faster than this.")
@click.option(
    "--client-patience", type=click.FloatRange(0), default=60.0, metavar="SECONDS", help="For processes to take a map."
)
@yes_option
@output_option
def apply(
    out: Output,
    plan_file: Path,
    map_source: str,
    rows_per_second: float | None,
    client_patience: float,
    yes: bool,
) -> None:
    """Do what PLAN says; the same command goes on after whatever stopped it.

    Refused when the map has changed since the plan was made. Ctrl-C once stops at the next safe point.
    """
    made = Plan.load(plan_file)
    settings = Settings(rows_per_second=rows_per_second, client_patience=client_patience)
    with map_store(map_source) as store:
        begun = {job.id: job for job in list_jobs(store) if job.plan == made.id}
        lines = [begun[name].summary if name in begun else _line(made, number) for number, name in _jobs_of(made)]
        if begun:
            out.note(f"going on with plan {made.id}")
        else:
            out.confirm("Move these buckets? They take no writes while they are copied.", yes=yes, plan=lines)
        resume = f"shardkit rebalance apply {plan_file} --map {map_source}"
        with _watched(out, resume) as (watcher, stop):
            jobs = apply_plan(store, made, settings=settings, observer=watcher, stop=stop)
        version = store.load().version
    out.result({"plan": made.id, "map_version": version, "jobs": [job.document() for job in jobs]})
    out.done(f"moved {count(made.rows)} rows in {sum(len(job.buckets) for job in jobs)} buckets; map version {version}")


def _jobs_of(made: Plan) -> list[tuple[int, str]]:
    return [(number, made.job_id(number)) for number in range(len(made.transfers))]


def _line(made: Plan, number: int) -> str:
    transfer = made.transfers[number]
    return (
        f"{transfer.keyspace}: {len(transfer.buckets)} buckets, {count(transfer.rows)} rows, "
        f"{transfer.source} -> {transfer.target}"
    )


@rebalance.command()
@click.argument("job")
@map_option
@yes_option
@output_option
def cancel(out: Output, job: str, map_source: str, yes: bool) -> None:
    """Undo JOB, while its target does not own the buckets yet.

    The source takes writes again at once; then the target's copy is deleted.
    """
    with map_store(map_source) as store:
        found = next((one for one in list_jobs(store) if one.id == job), None)
        if found is None:
            raise PreconditionFailed(f"there is no rebalance job {job}", hint="see 'shardkit rebalance status'")
        if found.final:
            raise PreconditionFailed(f"job {job} is {found.state} already")
        out.confirm(f"Undo job {job}?", yes=yes, plan=[found.summary])
        with _watched(out, f"shardkit rebalance cancel {job} --map {map_source}") as (watcher, stop):
            done = cancel_job(store, job, observer=watcher, stop=stop)
    out.result(done.document())
    out.done(f"job {job} is undone: {done.source} has its buckets as before")


# --- status --------------------------------------------------------------------------------------------------------


@rebalance.command()
@click.argument("job", required=False)
@map_option
@output_option
def status(out: Output, job: str | None, map_source: str) -> None:
    """The jobs on record, the newest last. Asks the map's store only, no database."""
    with map_store(map_source) as store:
        jobs = [one for one in list_jobs(store) if job in {None, one.id, one.plan}]
    if job is not None and not jobs:
        raise PreconditionFailed(f"there is no rebalance job {job}", hint="see 'shardkit rebalance status'")
    out.result([one.document() for one in jobs])
    if not jobs:
        out.line("no job has ever run under this map")
        return
    out.table(
        ["job", "keyspace", Column("buckets", right=True), "from", "to", "state", "progress", "since", "by"],
        [
            (
                one.id,
                one.keyspace,
                count(len(one.buckets)),
                one.source,
                one.target,
                one.state,
                _progress(one),
                f"{one.updated_at:%Y-%m-%d %H:%M:%S}",
                one.coordinator,
            )
            for one in jobs
        ],
    )
    for one in jobs:
        if one.problem and not one.final:
            out.line(f"{one.id} stopped: {one.problem}", style="yellow")


def _progress(job: Job) -> str:
    progress = job.progress
    return "" if progress is None else f"{progress.table}: {count(progress.done)} of {count(progress.total)} rows"


# --- watching a job ------------------------------------------------------------------------------------------------


class _Watcher:
    """Shows a job's states as tasks, with a bar where there are rows to count."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Task | None = None

    def entered(self, job: Job) -> None:
        """The job is in another state."""
        self.end()
        if job.final:
            self._progress.line(job.summary)
            return
        if job.state in _DOING:
            counted = job.state in {State.COPYING, State.VERIFYING, State.CLEANING}
            label = f"{job.id} {_DOING[job.state]}"
            self._task = self._progress.task(label, total=job.rows if counted else None, unit="rows")

    def progressed(self, job: Job, progress: JobProgress) -> None:
        """So many rows are copied, compared or deleted."""
        if self._task is None:
            self._task = self._progress.task(
                f"{job.id} {_DOING.get(job.state, job.state)}", total=progress.total, unit="rows"
            )
        self._task.at(progress.done)

    def noted(self, job: Job, text: str) -> None:
        """Something worth a line."""
        self._progress.line(f"{job.id}: {text}")

    def end(self) -> None:
        """The state is over."""
        if self._task is not None:
            self._task.finish()
            self._task = None


@contextmanager
def _watched(out: Output, resume: str) -> Iterator[tuple[_Watcher, threading.Event]]:
    """Show the progress; let the first Ctrl-C stop the job at a safe point, and the second end the process.

    :param resume: the command that goes on.
    """
    stop = threading.Event()

    def interrupt(_signal: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out.note("stopping at the next safe point (Ctrl-C again: at once, which is safe too)")
        stop.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with out.progress() as progress:
            watcher = _Watcher(progress)
            yield watcher, stop
            watcher.end()
    except JobStopped as error:
        raise JobStopped(error.message, job=error.job, hint=f"go on with: {resume}") from error
    except RebalanceError as error:
        again = (error.hint or "").replace("the same command", f"'{resume}'")
        raise RebalanceError(error.message, job=error.job, hint=again or None) from error
    finally:
        signal.signal(signal.SIGINT, before)
