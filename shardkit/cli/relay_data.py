"""``shardkit relay seed`` and ``verify``: fill a target from a snapshot; compare it with its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import chosen_shards, map_option, map_store, output_option, yes_option
from shardkit.cli.output import Column, Output, count
from shardkit.cli.progress import Progress, Task

if TYPE_CHECKING:
    from shardkit.errors import ShardkitError
    from shardkit.shardmap import ShardMap
    from shardkit_cdc.comparison import Difference, Verdict
    from shardkit_cdc.relay import HopSpec
    from shardkit_cdc.seed import Found

_BYTES = 1 << 20
#: Differences of one hop that people are shown one by one.
_SHOWN = 20


@click.command()
@click.argument("endpoint", required=False)
@map_option
@click.option("--shard", required=True, metavar="SHARD", help="Whose copy it is.")
@click.option("--staging", is_flag=True, help="Fill the shard's staging database.")
@click.option("--replica", type=click.IntRange(1), metavar="N", help="Fill the N-th replica that the map names.")
@click.option(
    "--from",
    "origin",
    type=click.Choice(["staging", "master"]),
    help="Where the data comes from; by default where the relay of this target reads.",
)
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Tables copied at once.")
@click.option("--anew", is_flag=True, help="Empty the target first, instead of keeping what is equal.")
@yes_option
@output_option
def seed(
    out: Output,
    endpoint: str | None,
    map_source: str,
    shard: str,
    staging: bool,
    replica: int | None,
    origin: str | None,
    jobs: int,
    anew: bool,
    yes: bool,
) -> None:
    """Fill a staging database or a replica from a snapshot of its source; the relay goes on right after it.

    ENDPOINT (mysql://host/database) may be one that the map does not name yet. The source is not locked, save for
    milliseconds while the snapshot is taken. Of a target that the relay, or a seed that was cut short, has filled
    before, the rows that equal the source's are kept, after asking; one with other tables is refused. Between MariaDB
    and MySQL rows alone are copied, into tables that the target has.
    """
    from shardkit.credentials import from_environment
    from shardkit_cdc.seed import seed as run

    if (endpoint is not None) + staging + (replica is not None) != 1:
        raise click.UsageError("name one target: ENDPOINT, --staging or --replica N")
    with map_store(map_source) as store:
        current = store.load()
    spec = _target(current, shard, endpoint, staging, replica, origin)
    with out.progress() as progress:
        done = run(
            spec,
            from_environment(),
            jobs=jobs,
            anew=anew,
            confirm=lambda found: _ask(out, spec, found, anew, yes),
            progress=_Bars(progress),
            shard_epoch=current.shard(shard).epoch,
        )
    out.result({"seeded": done})
    pace = f"{(done.kept + done.rows) / max(done.seconds, 0.001):,.0f} rows/s"
    out.note(f"the source's commits waited for {done.held * 1000:.0f} ms")
    if done.remade:
        out.note(f"made anew, their definition was not the source's: {', '.join(done.remade)}")
    kept = f"{count(done.kept)} rows kept, " if done.kept else ""
    out.done(
        f"filled {spec.target}: {count(done.tables)} tables, {kept}{count(done.rows)} rows copied, "
        f"{done.bytes / _BYTES:,.1f} MiB in {done.seconds:.1f} s ({pace}); the relay goes on from {done.position}"
    )


def _target(
    current: ShardMap, name: str, endpoint: str | None, staging: bool, replica: int | None, origin: str | None
) -> HopSpec:
    """The hop whose target is to be filled."""
    from shardkit.errors import PreconditionFailed
    from shardkit.topology import Endpoint, ReplicationKind, Role
    from shardkit_cdc.relay import HopSpec

    shard = current.shard(name)
    if shard.replication is not ReplicationKind.RELAY or shard.master.dialect != "mysql":
        raise PreconditionFailed(f"the relay does not fill the copies of {name}", hint="set replication: relay")
    if staging:
        if shard.staging is None:
            raise PreconditionFailed(f"{name} has no staging database", hint="name it in the shard map: staging: ...")
        target = shard.staging
    elif replica is not None:
        if replica > len(shard.replicas):
            raise PreconditionFailed(
                f"{name} has {len(shard.replicas)} replicas", hint="name it in the shard map, or give its ENDPOINT"
            )
        target = shard.replicas[replica - 1]
    else:
        try:
            target = Endpoint.parse(endpoint or "")
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        for other in current.shards.values():
            for role, used in other.endpoints():
                if used == target and (other.name != name or role is Role.MASTER):
                    raise PreconditionFailed(f"{target} is the {role.value} of {other.name}: not to be overwritten")
    source = shard.master if shard.staging is None or target == shard.staging else shard.staging
    if origin is not None and source is not {"staging": shard.staging, "master": shard.master}[origin]:
        raise PreconditionFailed(
            f"the relay of {target} reads {source}: it could not go on from a position of the {origin}",
            hint="leave out --from",
        )
    role = Role.STAGING if target == shard.staging else Role.REPLICA
    return HopSpec(name, source, target, role, source == shard.master)


def _ask(out: Output, spec: HopSpec, found: Found, anew: bool, yes: bool) -> None:
    from shardkit.topology import Role

    what = "tables with rows" if found.rows_only else "tables, views and routines"
    holds = f"{len(found.objects)} {what}"
    plan = []
    if found.runner:
        plan.append(f"the hop {spec.name}, run by {found.runner}, is stopped")
    if found.unfinished:
        plan.append("an earlier seed of it was cut short")
    if anew:
        plan.append(f"{spec.target} is emptied: {holds}")
        plan.append(f"it is filled from {spec.source}")
    else:
        plan.append(f"{spec.target} is made what {spec.source} is: {holds}")
        others = "all others" if found.rows_only else "all others, and tables of another definition,"
        plan.append(f"rows that are equal are kept; {others} are deleted")
        plan.append("what is missing then is copied")
    if spec.role is Role.STAGING:
        filled = "are emptied and filled with it" if anew else "get what changes through its log"
        plan.append(f"replicas that follow it {filled}")
    out.confirm("Empty it and fill it anew?" if anew else "Overwrite it?", yes=yes, plan=plan)


class _Bars:
    """Progress of the copy, a bar for each table."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Task] = {}

    def begin(self, table: str, estimate: int) -> None:
        self._tasks[table] = self._progress.task(f"copy {table}", total=estimate or None)

    def advance(self, table: str, rows: int) -> None:
        task = self._tasks[table]
        task.advance(rows)
        if task.pace.total is not None and task.pace.done > task.pace.total:
            task.expect(task.pace.done)  # the server's estimate was too low

    def end(self, table: str) -> None:
        task = self._tasks.pop(table)
        task.expect(task.pace.done)
        task.finish()


@click.command()
@map_option
@click.option("--shard", "shards", multiple=True, metavar="SHARD", help="This shard only; may be repeated.")
@click.option("--repair", is_flag=True, help="Write the source's rows over those that differ, after asking.")
@yes_option
@output_option
def verify(out: Output, map_source: str, shards: tuple[str, ...], repair: bool, yes: bool) -> int:
    """Compare every staging database and replica with the server that its relay reads, while both work.

    Names the rows that are missing, extra or different: the first 20 of a hop; all of them with --json. A hop that
    stands still is compared as of where it stands. Exit code 3 when there are any differences, and they were not
    repaired; 1 when rows or tables could not be compared, 4 when a hop could not be. Columns that never can be, between
    MariaDB and MySQL, are named only.
    """
    from shardkit.credentials import from_environment
    from shardkit.errors import ShardkitError
    from shardkit_cdc.daemon import hops_of
    from shardkit_cdc.repair import repair as mend
    from shardkit_cdc.repair import repair_at as mend_at

    with map_store(map_source) as store:
        current = store.load()
    specs = [spec for shard in chosen_shards(current, shards) for spec in hops_of(shard)]
    verdicts: list[Verdict] = []
    refused: dict[str, ShardkitError] = {}
    repaired = 0
    for spec in specs:
        try:
            verdict = _compare(out, spec)
        except ShardkitError as error:
            refused[spec.name] = error  # the others are compared all the same
            continue
        verdicts.append(verdict)
        if repair and verdict.differences:
            out.confirm(
                f"Make {len(verdict.differences)} rows of {spec.target} like those of {spec.source}?",
                yes=yes,
                plan=_shown(verdict.differences),
            )
            # At once: what follows this target gets the rows through its log, and is compared after that.
            repaired += (
                mend_at(spec, from_environment(), verdict)
                if verdict.stopped
                else mend(spec, from_environment(), verdict.differences)
            )
    if len(refused) == len(specs) == 1:
        raise refused.popitem()[1]
    differing = sum(len(verdict.differences) for verdict in verdicts)
    faults = {name: error.message for name, error in refused.items()}
    out.result({"hops": verdicts, "refused": faults, "differences": differing, "repaired": repaired})
    out.table(
        ["hop", *(Column(name, right=True) for name in ("tables", "rows", "seconds", "differences"))],
        [
            (each.hop, count(each.tables), count(each.rows), f"{each.seconds:.1f}", count(len(each.differences)))
            for each in verdicts
        ],
    )
    for each in verdicts:
        if each.stopped is not None:
            because = f" ({each.stopped.error})" if each.stopped.error else ""
            where = each.stopped.position or "the beginning"
            out.warning(f"{each.hop} stands still at {where}, and was compared as of there{because}")
        for difference in _shown(each.differences):
            out.line(f"{each.hop}: {difference}", style="red")
        if len(each.undecided) > _SHOWN:
            out.warning(
                f"{each.hop}: {count(len(each.undecided))} rows or tables could not be compared, the first {_SHOWN} "
                "are named (--json has all)"
            )
        for what in each.undecided[:_SHOWN]:
            out.warning(
                f"{each.hop}: {what}" if each.stopped else f"{each.hop}: {what} changed too fast to be compared"
            )
        for what in each.left_out:
            out.warning(f"{each.hop}: not compared: {what}")
    for name, reason in refused.items():
        out.warning(f"{name} was not compared: {reason}")
    if not specs:
        out.note("no shard has a staging database or replicas that the relay fills")
    if repaired:
        out.done(f"repaired {count(repaired)} rows")
        if any(each.stopped and each.stopped.error and each.differences for each in verdicts):
            out.note("start the relay's daemon again: a hop that has failed stays so until then")
    if differing > repaired:
        return 3
    if refused:
        return max(error.exit_code for error in refused.values())
    return 1 if any(each.undecided or each.tables_left_out for each in verdicts) else 0


def _shown(differences: Sequence[Difference]) -> list[str]:
    """The first differences of a hop, and of each table how many more there are."""
    more = Counter(each.table for each in differences[_SHOWN:])
    rest = [f"{table}: {count(number)} more (--json has all)" for table, number in more.items()]
    return [*map(str, differences[:_SHOWN]), *rest]


def _compare(out: Output, spec: HopSpec) -> Verdict:
    from shardkit.credentials import from_environment
    from shardkit_cdc.verify import verify as compare

    with out.progress() as progress:
        task = progress.task(f"compare {spec.name}")
        done: dict[str, int] = {}

        def report(table: str, rows: int) -> None:
            done[table] = rows
            task.at(sum(done.values()))

        verdict = compare(spec, from_environment(), report=report)
        task.finish()
    return verdict
