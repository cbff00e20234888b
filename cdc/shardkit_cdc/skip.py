"""Passing over the one transaction that a hop has stopped at, when an operator asks for it.

Two steps: `look` finds out whether the hop stands exactly there and what would be lost, and changes nothing; `skip`
moves the position, by the same compare-and-set as a runner (`shardkit_cdc.position`), and only from where `look` saw
it. On a hop into staging the master's history moves along, so the replicas behind it go without the transaction too.
"""

from __future__ import annotations

import logging
import zlib
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.gtid import Flavour, Gtid, Position, family_of, parse_gtid, parse_position
from shardkit_cdc import own_schema, preflight, schema_change
from shardkit_cdc.connection import connect, server_errors
from shardkit_cdc.position import Claim, HopRow, is_held, lock_name, read_row
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.retention import kept_log, position_lost
from shardkit_cdc.selection import Selector
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.survey import Found, first_own

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

#: What operators did, one line each: `shardkit relay` shows it whatever the level of its log is.
audit = logging.getLogger("shardkit.audit")


@dataclass(frozen=True, slots=True)
class Skippable:
    """A hop that stands right before a transaction which it cannot apply.

    :param transaction: what would be passed over.
    :param epoch: of the position row when it was looked at.
    :param before: the position that it held.
    :param after: the position behind the transaction.
    :param error: why the hop stopped.
    :param schema_changed: the transaction's schema change has run on the target, only its position or its rows have not
        been written; skipping leaves it there.
    """

    spec: HopSpec
    flavour: Flavour
    transaction: Found
    epoch: int
    before: Position
    after: Position
    error: str
    schema_changed: bool

    @property
    def plan(self) -> list[str]:
        """What skipping does, a line each."""
        found = self.transaction
        lines = [
            f"hop {self.spec.name}: {self.spec.source.address} to {self.spec.target}",
            f"stopped: {self.error}",
            f"skip {found.gtid}, committed on the source at {found.committed_at.isoformat()}",
            *(f"  {table}: {count} row events" for table, count in sorted(found.tables.items())),
            *(f"  {statement}" for statement in found.statements),
        ]
        if found.ends_branch:
            lines.append(f"  the rows prepared as XA branch {found.ends_branch} are dropped")
        if not found.whole:
            lines.append("  ... and more: it was not looked at to its end")
        if self.schema_changed:
            lines.append("its schema change has run on the target already, and stays")
        lines.append(f"position {self.before or 'at the beginning'} -> {self.after}")
        if self.spec.reads_master:
            lines.append("whatever is filled from this target goes without it too")
        return lines


def look(spec: HopSpec, credentials: CredentialSource, at: str, *, cluster: str) -> Skippable:
    """Check that the hop has stopped exactly at a transaction, and see what is in it. Changes nothing.

    :param at: the transaction's GTID.
    :param cluster: the cluster's name: with the hop's it gives the server id that the source knows this reader by.
    :raises PreconditionFailed: in every other state, with the reason.
    :raises PositionLost: the source has purged what follows the position, or is another server.
    """
    target = connect(spec.target, credentials, autocommit=True)
    with closing(target), server_errors(spec.target, spec.name, doing="looking at the hop"):
        target_facts = preflight.ask(target, spec.target)
        flavour = family_of(at)
        gtid = _gtid(flavour, at)
        row = _stopped_row(spec, target, gtid)
        schema_changed = row.ddl_gtid == str(gtid) and schema_change.has_run(
            target, target_facts.flavour, Claim(target, flavour, row, history=None)
        )
    before = parse_position(flavour, row.gtid)
    source = connect(spec.source, credentials, autocommit=True)
    with closing(source), server_errors(spec.source, spec.name, doing="reading its log"):
        facts = preflight.ask(source, spec.source)
        preflight.refuse_other_log(row.source, facts, target_facts, hop=spec.name)
        log = kept_log(source, flavour)
        if log.has_lost(before):
            raise position_lost(spec.source.address, hop=spec.name)
        stream = BinlogStream(
            spec.source,
            credentials,
            hop=spec.name,
            flavour=flavour,
            after=before,
            # not the runner's own: the source ends an older reader with the same one
            server_id=0x40000000 | zlib.crc32(f"{cluster}/{spec.name}/skip".encode()) & 0x3FFFFFFF,
        )
        with closing(stream):
            selector = Selector(spec.source.database, spec.target.database, fold_case=facts.folds_names)
            found, reached = first_own(stream, flavour, selector, after=before, end=log.end)
    if found is None or found.gtid != gtid:
        raise PreconditionFailed(
            f"hop {spec.name} does not stand at {gtid}: "
            + (f"what comes next for it is {found.gtid}" if found else "the source's log has nothing more for it"),
            hint="start the hop again, and skip where it stops then, if it does",
        )
    return Skippable(
        spec, flavour, found, row.epoch, before, reached.advanced([gtid]), row.error, schema_changed=schema_changed
    )


def skip(chosen: Skippable, credentials: CredentialSource, *, by: str) -> None:
    """Move the hop's position past the transaction, and say so in the audit log.

    :param by: who asked for it.
    :raises PreconditionFailed: the hop runs again, or its position has moved since it was looked at.
    :raises Fenced: another runner took over at the same time.
    """
    spec = chosen.spec
    target = connect(spec.target, credentials)
    with closing(target), server_errors(spec.target, spec.name, doing="moving the position"):
        if is_held(target, lock_name(spec.target.database, spec.key)):
            raise _runs(spec, "somebody")
        target.rollback()
        claim = Claim.take(
            target,
            chosen.flavour,
            database=spec.target.database,
            key=spec.key,
            runner=f"relay skip by {by}",
            history=spec.shard if spec.reads_master else None,
            expected_epoch=chosen.epoch,
        )
        if claim.position != chosen.before:
            raise PreconditionFailed(
                f"hop {spec.name} has moved from {chosen.before} to {claim.position} meanwhile; nothing was skipped"
            )
        claim.begin(chosen.after)
        if chosen.transaction.ends_branch:
            with target.cursor() as cursor:
                cursor.execute(
                    f"DELETE FROM {own_tables.prepared.name} WHERE hop = %s AND xid = %s",
                    (spec.key, chosen.transaction.ends_branch),
                )
        claim.finish(chosen.after)
    audit.warning("skipped by %s: %s", by, "; ".join(line.strip() for line in chosen.plan))


def _gtid(flavour: Flavour, text: str) -> Gtid:
    try:
        return parse_gtid(flavour, text.strip())
    except ValueError as error:
        raise PreconditionFailed(
            f"{error}", hint="give the GTID that `shardkit relay status` shows in the hop's error"
        ) from None


def _stopped_row(spec: HopSpec, target: Connection, gtid: Gtid) -> HopRow:
    """The position row of a hop that has stopped with an error at this transaction; anything else is refused."""
    row = read_row(target, spec.key) if own_schema.exists(target) else None
    if row is None:
        raise PreconditionFailed(
            f"hop {spec.name} has never run: there is nothing to skip", hint="start it: shardkit relay run"
        )
    if is_held(target, lock_name(spec.target.database, spec.key)):
        raise _runs(spec, row.runner)
    if not row.error:
        raise PreconditionFailed(
            f"hop {spec.name} has not failed: it was stopped, and goes on when it is started",
            hint="start it: shardkit relay run; skip only where it stops with an error",
        )
    if f"(at {gtid})" not in row.error:
        raise PreconditionFailed(
            f"hop {spec.name} did not stop at {gtid}: {row.error}",
            hint="only the transaction that the error names behind 'at' can be skipped",
        )
    return row


def _runs(spec: HopSpec, runner: str) -> PreconditionFailed:
    return PreconditionFailed(
        f"hop {spec.name} is run by {runner} now: nothing was skipped",
        hint="only a hop that has stopped with an error can skip the transaction that it stopped at",
    )
