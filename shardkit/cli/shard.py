"""``shardkit shard``: the databases of every shard, and a new master for one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option, yes_option
from shardkit.cli.output import Column, Output

if TYPE_CHECKING:
    from shardkit.failover import Plan, Promotion, Standing


@click.group()
def shard() -> None:
    """The databases of every shard, and a new master for one of them."""


@shard.command("list")
@map_option
@output_option
def list_(map_source: str, out: Output) -> int:
    """Every shard's databases: role, whether it answers, position in its master's log, lag.

    Exit code 1 when one does not answer, or does not let us in.
    """
    from shardkit.credentials import from_environment
    from shardkit.failover import look

    with map_store(map_source) as store:
        shard_map = store.load()
    standings = look(shard_map.shards.values(), from_environment())
    out.result({"map_version": shard_map.version, "databases": [_document(each) for each in standings]})
    out.table(
        ["shard", Column("epoch", right=True), "role", "address", "state", Column("lag s", right=True), "position"],
        [
            [
                each.shard,
                shard_map.shards[each.shard].epoch,
                each.role,
                each.endpoint.address or each.endpoint,
                _state(each),
                None if each.lag_seconds is None else f"{each.lag_seconds:.2f}",
                each.position,
            ]
            for each in standings
        ],
    )
    for each in standings:
        if each.error:
            out.warning(f"{each.endpoint}: {each.error}")
    asked = [each for each in standings if each.endpoint.dialect == "mysql"]
    return 0 if all(each.reachable and each.read_only is not None for each in asked) else 1


def _state(standing: Standing) -> str:
    if not standing.reachable:
        return "unknown" if standing.endpoint.dialect != "mysql" else "unreachable"
    if standing.read_only is None:
        return "unknown"  # it did not let us in
    return "read-only" if standing.read_only else "writable"


def _document(standing: Standing) -> dict[str, object]:
    return {
        "shard": standing.shard,
        "role": standing.role,
        "endpoint": str(standing.endpoint),
        "reachable": standing.reachable,
        "read_only": standing.read_only,
        "position": None if standing.position is None else str(standing.position),
        "received": None if standing.received is None else str(standing.received),
        "lag_seconds": standing.lag_seconds,
        "replicating": standing.fed,
        "error": standing.error or None,
    }


@shard.command()
@click.argument("name", metavar="SHARD")
@click.argument("endpoint", required=False)
@click.option("--dry-run", is_flag=True, help="Only show what would happen.")
@click.option(
    "--force", is_flag=True, help="Go on although the old master does not answer, and lose what nobody else has."
)
@click.option(
    "--app-user",
    "app_users",
    multiple=True,
    metavar="USER[@HOST]",
    help="Lock this account on the old master; may be repeated.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=30.0, show_default=True, help="Seconds that a wait may take."
)
@map_option
@yes_option
@output_option
def promote(
    name: str,
    endpoint: str | None,
    dry_run: bool,
    force: bool,
    app_users: tuple[str, ...],
    timeout: float,
    map_source: str,
    yes: bool,
    out: Output,
) -> None:
    """Put another database in the place of SHARD's master.

    ENDPOINT is one of its replicas, or its staging database (URL or host:port); by default the replica that is
    furthest. No acknowledged write is lost while the old master answers. Exit code 4: nothing was changed, or it was
    undone; 5: the same command goes on.
    """
    from shardkit.credentials import from_environment
    from shardkit.errors import PreconditionFailed
    from shardkit.failover import make_plan
    from shardkit.failover import promote as carry_out
    from shardkit.topology import Endpoint

    with map_store(map_source) as store:
        shard_map = store.load()
        if endpoint is not None and "://" in endpoint:
            try:
                Endpoint.parse(endpoint)
            except ValueError as error:
                raise PreconditionFailed(f"ENDPOINT: {error}") from None
        if endpoint is not None and endpoint in {
            shard_map.shard(name).master.url,
            shard_map.shard(name).master.address,
        }:
            out.result({"promoted": False, "shard": name, "new": str(shard_map.shard(name).master), "plan": []})
            out.line(f"{endpoint} is the master of shard {name} already")
            return
        credentials = from_environment()
        plan = make_plan(shard_map, name, credentials, wanted=endpoint, force=force, app_users=app_users)
        for warning in plan.warnings:
            out.warning(warning)
        if dry_run:
            out.result({"promoted": False, **_plan_document(plan)})
            for line in plan.lines:
                out.line(line)
            return
        out.confirm(f"Promote {plan.candidate.endpoint}?", yes=yes, plan=plan.lines)
        done = carry_out(store, credentials, plan, timeout=timeout, say=out.note)
    out.result({"promoted": True, "plan": plan.lines, **_fields(done)})
    _tell(done, out)


def _plan_document(plan: Plan) -> dict[str, object]:
    return {
        "shard": plan.shard.name,
        "old": str(plan.shard.master),
        "new": str(plan.candidate.endpoint),
        "epoch": plan.after.epoch,
        "follow": [str(each) for each in plan.follow],
        "removed": [str(each) for each in plan.removes],
        "loss": plan.loss,
        "plan": plan.lines,
    }


def _fields(done: Promotion) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(done)


def _tell(done: Promotion, out: Output) -> None:
    out.done(
        f"{done.new} is the master of shard {done.shard}: epoch {done.epoch}, map version {done.map_version}; "
        f"closed for {done.closed_seconds:.1f} s"
    )
    if done.loss is None:
        out.line(f"it has all of the old master's log: {done.final_position}")
    else:
        for line in done.loss.lines:
            out.warning(line)
        out.warning(
            f"{done.old} was not closed: before it is started again, give it read_only=1 and keep clients away from it"
        )
    for branch, outcome in done.ended_branches.items():
        out.line(f"transaction {branch} stood prepared: {outcome}")
    for branch in done.undecided:
        out.warning(f"its rows are not there: transaction over shards {branch}")
    for endpoint, why in done.removed.items():
        out.line(f"left the map: {endpoint} ({why}); to bring it back see docs/how-to/promote.md")
