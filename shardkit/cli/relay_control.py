"""``shardkit relay pause``, ``resume`` and ``skip``: what an operator tells a hop."""

from __future__ import annotations

import getpass
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option, yes_option
from shardkit.cli.output import Output

if TYPE_CHECKING:
    from shardkit.shardmap import ShardMap
    from shardkit_cdc.relay import HopSpec

#: How long `pause` waits for a running hop to come to rest, in seconds; a schema change at hand may take longer.
_REST_SECONDS = 10.0


@click.command()
@click.argument("hop", required=False)
@click.option("--shard", metavar="SHARD", help="Pause every hop of this shard.")
@map_option
@output_option
def pause(hop: str | None, shard: str | None, map_source: str, out: Output) -> int:
    """Pause a hop (as `relay status` calls it), or all of a shard, until it is resumed.

    Outlives daemons: one that is started meanwhile leaves the hop alone too. A running hop applies nothing more within
    a second; a big transaction in the middle is rolled back and applied from its start afterwards. Its position stays
    where it is, so the source has to keep its log: `relay status` shows for how long it will.
    """
    from shardkit.credentials import from_environment
    from shardkit_cdc import own_schema
    from shardkit_cdc.connection import connect, server_errors
    from shardkit_cdc.pause import is_at_rest, read_pause
    from shardkit_cdc.pause import pause as pause_hop

    credentials, by = from_environment(), _who()

    def one(spec: HopSpec) -> dict[str, object]:
        own_schema.upgrade(spec.target, credentials)
        target = connect(spec.target, credentials, autocommit=True)
        with closing(target), server_errors(spec.target, spec.name, doing="pausing it"):
            changed = pause_hop(target, spec.key, by=by)
            until = time.monotonic() + _REST_SECONDS
            while not (rests := is_at_rest(target, spec.target.database, spec.key)) and time.monotonic() < until:
                time.sleep(0.1)
            found = read_pause(target, spec.key)
        if changed:
            _audit().info("hop %s paused by %s", spec.name, by)
        if not rests:
            out.warning(f"{spec.name} is still at work on something long; it rests as soon as that is done")
        return {"hop": spec.name, "changed": changed, "at_rest": rests, "paused": found and str(found)}

    done = _each(_chosen(map_source, hop, shard), one)
    out.result({"hops": done})
    out.table(["hop", "", "at rest"], [[row["hop"], row["paused"], "yes" if row["at_rest"] else "no"] for row in done])
    return 0


@click.command()
@click.argument("hop", required=False)
@click.option("--shard", metavar="SHARD", help="Resume every hop of this shard.")
@map_option
@output_option
def resume(hop: str | None, shard: str | None, map_source: str, out: Output) -> int:
    """Let a paused hop, or all of a shard, go on from its position."""
    from shardkit.credentials import from_environment
    from shardkit_cdc.connection import connect, server_errors
    from shardkit_cdc.pause import resume as resume_hop

    credentials, by = from_environment(), _who()

    def one(spec: HopSpec) -> dict[str, object]:
        target = connect(spec.target, credentials, autocommit=True)
        with closing(target), server_errors(spec.target, spec.name, doing="resuming it"):
            was = resume_hop(target, spec.key)
        if was is not None:
            _audit().info("hop %s resumed by %s; it was %s", spec.name, by, was)
        return {"hop": spec.name, "changed": was is not None, "was": was and str(was)}

    done = _each(_chosen(map_source, hop, shard), one)
    out.result({"hops": done})
    out.table(["hop", ""], [[row["hop"], f"resumed; was {row['was']}" if row["was"] else "not paused"] for row in done])
    return 0


@click.command()
@click.argument("hop")
@click.option("--at", "gtid", required=True, metavar="GTID", help="The transaction that the hop's error names.")
@map_option
@yes_option
@output_option
def skip(hop: str, gtid: str, map_source: str, yes: bool, out: Output) -> int:
    """Pass over the one transaction at which a hop has stopped with an error.

    Its rows and statements never reach the target: see to them by hand first. Refused unless the hop stands exactly
    there. Shows what would be skipped, and asks.
    """
    from shardkit.credentials import from_environment
    from shardkit_cdc.skip import look
    from shardkit_cdc.skip import skip as skip_transaction

    _audit()
    credentials = from_environment()
    with map_store(map_source) as store:
        current = store.load()
    (spec,) = _named(current, hop)
    chosen = look(spec, credentials, gtid, cluster=current.cluster)
    out.confirm(f"skip {chosen.transaction.gtid} on {spec.name}?", yes=yes, plan=chosen.plan)
    skip_transaction(chosen, credentials, by=_who())
    found = chosen.transaction
    out.result(
        {
            "hop": spec.name,
            "skipped": str(found.gtid),
            "committed_at": found.committed_at,
            "tables": found.tables,
            "statements": found.statements,
            "from": str(chosen.before),
            "to": str(chosen.after),
        }
    )
    out.note(f"skipped {found.gtid}; start the hop again: restart the daemon that served it")
    return 0


def _audit() -> logging.Logger:
    """The log of what operators do: shown whatever ``-v`` says."""
    logger = logging.getLogger("shardkit.audit")
    logger.setLevel(logging.INFO)
    return logger


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _chosen(map_source: str, hop: str | None, shard: str | None) -> Sequence[HopSpec]:
    """The hops that a command line names: one by its name, or a shard's."""
    from shardkit.errors import UnknownTable
    from shardkit_cdc.daemon import hops_of

    if (hop is None) == (shard is None):
        raise click.UsageError("name one hop, or give --shard")
    with map_store(map_source) as store:
        current = store.load()
    if hop is not None:
        return _named(current, hop)
    assert shard is not None  # noqa: S101 - one of the two is named
    found = hops_of(current.shard(shard))
    if not found:
        raise UnknownTable(f"the relay fills nothing of shard {shard}")
    return found


def _named(current: ShardMap, hop: str) -> Sequence[HopSpec]:
    from shardkit.errors import UnknownTable
    from shardkit_cdc.daemon import hops_of

    known = {spec.name: spec for shard in current.shards.values() for spec in hops_of(shard)}
    if hop not in known:
        raise UnknownTable(
            f"the shard map has no hop {hop}", hint=f"its hops are {', '.join(known)}" if known else None
        )
    return [known[hop]]


def _each(specs: Sequence[HopSpec], one: Callable[[HopSpec], dict[str, object]]) -> list[dict[str, object]]:
    """Do it for every hop; those that cannot be reached do not keep the others from it.

    :raises PartlyApplied: naming the hops for which it could not be done, when it was for others.
    """
    from shardkit.errors import PartlyApplied, ShardkitError

    done: list[dict[str, object]] = []
    failed: list[tuple[HopSpec, ShardkitError]] = []
    for spec in specs:
        try:
            done.append(one(spec))
        except ShardkitError as error:
            failed.append((spec, error))
    if not failed:
        return done
    if not done:
        raise failed[0][1]
    raise PartlyApplied(
        f"done for {', '.join(str(row['hop']) for row in done)}, but not for "
        + "; ".join(f"{spec.name}: {error.message}" for spec, error in failed),
        hint="mend what is named, then run it again: hops that are done stay as they are",
    )
