"""``shardkit doctor``: what is unwell in a running cluster, and the cure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option
from shardkit.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardkit.decisions import BranchId, Connection, Janitor
    from shardkit.shardmap import ShardMap

#: Seconds between the two looks: longer than a commit takes.
WAIT = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One prepared part of a transaction over shards.

    :param decision: ``commit`` or ``abort``; None where nobody has decided.
    :param outcome: what became of it; None with ``--dry-run``.
    """

    shard: str
    transaction: str
    decider: str
    decision: str | None
    outcome: str | None = None


@click.command()
@click.option("--transactions", is_flag=True, help="End transactions over shards whose client has gone.")
@click.option("--dry-run", is_flag=True, help="Show what is left prepared, and change nothing. Exits with 3 if any is.")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=WAIT, show_default=True, help="Seconds between two looks."
)
@map_option
@output_option
def doctor(transactions: bool, dry_run: bool, wait: float, map_source: str, out: Output) -> int:
    """Look for what is unwell in a cluster, and cure it.

    --transactions does once what the relay's daemon does every ten seconds: transactions over shards that a dead client
    left prepared are committed where their decision stands, and rolled back where there is none. What is seen only once
    belongs to a living client and is left alone.

    Exit code 1 when a server cannot be asked, or something could not be ended.
    """
    if not transactions:
        raise click.UsageError("say what to look for: --transactions")
    from shardkit.credentials import from_environment
    from shardkit.decisions import Janitor
    from shardkit_cdc.connection import connect

    with map_store(map_source) as store:
        shard_map = store.load()
    credentials = from_environment()

    def open_master(shard: str) -> Connection:
        return connect(shard_map.shard(shard).master, credentials, autocommit=True)

    janitor = Janitor(open_master)
    seen, unwell = _look(janitor, shard_map, open_master)
    findings = seen
    if seen and not dry_run:
        _sweep(janitor, shard_map, unwell)
        time.sleep(wait)
        outcomes = _sweep(janitor, shard_map, unwell)
        findings = {
            branch: replace(each, outcome=outcomes.get(branch, "ended by its client")) for branch, each in seen.items()
        }
    _tell(findings, unwell, out, dry_run=dry_run)
    stuck = any(each.outcome == "undecided" for each in findings.values())
    return 1 if unwell or stuck else 3 if dry_run and findings else 0


def _masters(shard_map: ShardMap) -> list[str]:
    return [name for name, shard in shard_map.shards.items() if shard.master.dialect == "mysql"]


def _look(
    janitor: Janitor, shard_map: ShardMap, open_master: Callable[[str], Connection]
) -> tuple[dict[BranchId, Finding], dict[str, str]]:
    """What is prepared, and the shards that could not be asked."""
    from shardkit.decisions import verdict
    from shardkit.errors import ShardkitError

    found: dict[BranchId, Finding] = {}
    unwell: dict[str, str] = {}
    for shard in _masters(shard_map):
        try:
            for branch in janitor.prepared(shard):
                with closing(open_master(branch.decider)) as connection:
                    decision = verdict(connection, branch.transaction)
                found[branch] = Finding(shard, branch.transaction, branch.decider, decision)
        except (ShardkitError, _driver_error()) as error:
            unwell[shard] = str(error)
    return found, unwell


def _sweep(janitor: Janitor, shard_map: ShardMap, unwell: dict[str, str]) -> Mapping[BranchId, str]:
    from shardkit.errors import ShardkitError

    try:
        swept = janitor.sweep([shard for shard in _masters(shard_map) if shard not in unwell])
    except (ShardkitError, _driver_error()) as error:
        unwell["?"] = str(error)
        return {}
    return {branch: outcome.value for branch, outcome in swept.items()}


def _driver_error() -> type[Exception]:
    import pymysql

    return pymysql.MySQLError


def _tell(findings: Mapping[BranchId, Finding], unwell: Mapping[str, str], out: Output, *, dry_run: bool) -> None:
    out.result({"prepared": list(findings.values()), "unreachable": unwell})
    for shard, error in unwell.items():
        out.warning(f"shard {shard} could not be asked: {error}")
    if findings:
        columns = ["shard", "transaction", "decided by", "decision", *([] if dry_run else ["now"])]
        rows = [
            [each.shard, each.transaction, each.decider, each.decision or "none", *([] if dry_run else [each.outcome])]
            for each in findings.values()
        ]
        out.table(columns, rows)
    elif not unwell:
        out.done("no transaction over shards is left prepared")
