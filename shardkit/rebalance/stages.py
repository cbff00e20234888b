"""A job's way through its states, and the effect of each.

What the effects do to the databases is in `shardkit.rebalance.cutover`, `copy`, `verify` and `clean`.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TypeVar

import pymysql
import sqlalchemy as sa

from shardkit import own_tables
from shardkit.engines import EngineSettings
from shardkit.errors import MapConflict, RebalanceError
from shardkit.rebalance import clients, cutover, fence, mapchange, preflight
from shardkit.rebalance.clean import Cleanup
from shardkit.rebalance.coordinator import Coordinator
from shardkit.rebalance.copy import Copy, Cursor, read_cursor, show_key
from shardkit.rebalance.cutover import Lease
from shardkit.rebalance.failpoint import reach
from shardkit.rebalance.job import Job, Progress, State
from shardkit.rebalance.plan import Transfer
from shardkit.rebalance.servers import LockWait, Server, code_of, new_token
from shardkit.rebalance.tables import Table, moving_tables, quoted
from shardkit.rebalance.throttle import Throttle
from shardkit.rebalance.verify import Verification
from shardkit.shardmap import Keyspace, ShardMap
from shardkit.topology import ReplicationKind, Role, Shard

#: Seconds between two notes of a job's progress in its record.
NOTE_SECONDS = 1.0

#: Why a statement on a moving table may have to wait while we hold the table.
_WAITING_DDL = "somebody's DDL or TRUNCATE, which waits for the table"

T = TypeVar("T")


def carry_out(coordinator: Coordinator, *, undo: bool = False) -> Job:
    """Carry a job to ``completed``, or, to undo it, to ``cancelled``.

    :raises JobStopped: when it was told to stop.
    :raises RebalanceError: when it cannot go on; the record says why, and running it again goes on from there.
    """
    if coordinator.job.final:
        return coordinator.job
    with closing(Stages(coordinator)) as stages:
        try:
            if undo and coordinator.job.state is not State.CANCELLING:
                planned = coordinator.job.state is State.PLANNED
                coordinator.advance(State.CANCELLED if planned else State.CANCELLING)
            while not coordinator.job.final:
                coordinator.check()
                state = coordinator.job.state
                elsewhere = stages.effect(state)
                reach(f"{state}.done")
                coordinator.advance(elsewhere or coordinator.job.next)
        except BaseException as error:
            coordinator.last_words(error)
            raise
    return coordinator.job


class Stages:
    """One run of a job: its connections, and the effect of each state.

    :raises PreconditionFailed: when another process is at work on the job.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._co = coordinator
        self._stack = ExitStack()
        self._verified = False
        self._held: list[Callable[[], None]] = []
        self._holding = ExitStack()
        self._noted_at = 0.0
        shard_map = coordinator.store.load()
        job = coordinator.job
        self._from = shard_map.shard(job.source)
        self._to = shard_map.shard(job.target)
        self._keyspace: Keyspace = shard_map.keyspace(job.keyspace)
        self._lease = Lease(job.id, new_token())
        try:
            self._source = self._open(self._from)
            self._lease.begin(self._source)
            self._target = self._open(self._to)
            self._lease.follow(self._target)
        except BaseException:
            self._stack.close()
            raise
        self._make_own_tables()
        for server in (self._source, self._target):
            self._patiently(partial(self._lease.sign, server), "an earlier run's transaction")
        coordinator.take(f"{getpass.getuser()}@{socket.gethostname()} process {os.getpid()}")
        self._effects: dict[State, Callable[[], State | None]] = {
            State.PLANNED: lambda: None,
            State.PREPARED: self._prepare,
            State.FREEZING: self._freeze,
            State.FROZEN: self._hold,
            State.COPYING: self._copy,
            State.VERIFYING: self._verify,
            State.ACTIVATED: self._activate,
            State.PUBLISHED: self._publish,
            State.CLEANING: self._clean,
            State.CANCELLING: self._cancel,
        }

    def close(self) -> None:
        """End every connection."""
        self._holding.close()
        self._stack.close()

    def effect(self, state: State) -> State | None:
        """Have the effect of a state, again or for the first time.

        :returns: the state to go to, where it is not the usual one.
        :raises RebalanceError: when the job cannot go on.
        """
        try:
            return self._effects[state]()
        except pymysql.MySQLError as error:
            code, text = code_of(error)
            raise RebalanceError(
                f"job {self._job.id}, {state}: the database refused with error {code}: {text}",
                job=self._job.id,
                hint="mend the cause, then run the same command again: it goes on from there",
            ) from error

    # --- connections

    @property
    def _job(self) -> Job:
        return self._co.job

    def _open(self, shard: Shard, *, binary: bool = False) -> Server:
        server = Server(shard.name, Role.MASTER, shard.master, self._co.credentials, binary=binary)
        self._stack.callback(server.close)
        return server

    def _make_own_tables(self) -> None:
        """shardkit's own tables, on every server of both shards: their DDL is not replicated by the relay."""
        settings = EngineSettings(self._co.credentials)
        for shard in (self._from, self._to):
            for role, endpoint in shard.endpoints():
                if role is Role.MASTER or shard.replication is ReplicationKind.RELAY:
                    engine = sa.create_engine(settings.url(endpoint), poolclass=sa.NullPool)
                    own_tables.upgrade(engine)

    def _patiently(self, step: Callable[[], T], behind: str, *, patience: float = 60.0) -> T:
        """Try a step again while locks are in its way.

        :returns: what the step does.
        :raises RebalanceError: when they stay.
        """
        deadline = time.monotonic() + patience
        pause = 0.05
        while True:
            try:
                return step()
            except LockWait as error:
                if time.monotonic() >= deadline:
                    raise RebalanceError(
                        f"job {self._job.id}, {self._job.state}: waited {patience:.0f} s behind {behind} ({error})",
                        job=self._job.id,
                        hint="end the transactions that hold it (SHOW ENGINE INNODB STATUS, XA RECOVER), then run the "
                        "same command again",
                    ) from None
                self._co.wait(pause)
                pause = min(pause * 2, 2.0)

    # --- what moves

    def _tables(self) -> tuple[Table, ...]:
        return moving_tables(self._source, self._keyspace)

    def _where(self, table: Table) -> str:
        return table.predicate(self._keyspace.partition, self._job.buckets)

    def _report(self, table: Table, done: int) -> None:
        progress = Progress(table.name, done, self._job.rows)
        self._co.observer.progressed(self._job, progress)
        if time.monotonic() - self._noted_at >= NOTE_SECONDS:
            self._noted_at = time.monotonic()
            self._co.save(replace(self._job, progress=progress))

    # --- prepared

    def _prepare(self) -> None:
        co, job = self._co, self._job
        if not mapchange.is_named(co.store.load(), job):
            transfer = Transfer(job.keyspace, job.buckets, job.source, job.target, job.rows, job.size)
            preflight.check(co.store.load(), transfer, co.credentials, job=job.id)
        tables = self._tables()
        self._make_tables(tables)
        for server in (self._source, self._target):
            self._patiently(partial(fence.complete_ownership, server, self._keyspace), "ownership rows")
        self._check_source_owns()
        self._patiently(partial(cutover.import_buckets, self._target, job, self._lease), "refused writers")
        for server in (self._target, self._source):
            fence.install(server, self._keyspace, tables, co.wait, patience=co.settings.table_patience)
        reach("prepared.fenced")
        self._refuse_strays(tables)
        self._refuse_outside_alphabet(tables)
        published = self._change_map(mapchange.name_move)
        reach("prepared.named")
        self._settle(published.version, (self._source, self._target))
        co.save(replace(self._job, moving_version=published.version))

    def _make_tables(self, tables: Sequence[Table]) -> None:
        for table in tables:
            if not preflight.has_table(self._target, table.name):
                definition = preflight.definition(self._source, table.name)
                self._target.run(str(definition))
                self._co.observer.noted(self._job, f"made table {table.name} on {self._target.shard}")

    def _check_source_owns(self) -> None:
        rows = fence.read_ownership(self._source, self._job.keyspace, self._job.buckets)
        for bucket in self._job.buckets:
            row = rows.get(str(bucket))
            if row is None or row.state is not fence.Owned.OWNED:
                raise fence.unexpected(self._source, self._job.keyspace, str(bucket), row, {fence.Owned.OWNED})

    def _refuse_strays(self, tables: Sequence[Table]) -> None:
        """Rows in the target's tables that belong to the buckets are nobody's: they would be taken for copied ones."""
        for table in tables:
            found = self._target.rows(
                f"SELECT {table.key_literals} FROM {quoted(table.name)} WHERE {self._where(table)} LIMIT 5"
            )
            if found:
                keys = "; ".join(show_key(table, tuple(map(str, row))) for row in found)
                raise RebalanceError(
                    f"table {table.name} on {self._target.shard} already has rows of the moving buckets: {keys}",
                    job=self._job.id,
                    hint="the map has never placed these buckets there: look where the rows come from, delete them "
                    "(as the job does: SET @shardkit_coordinator = 'by hand' in that session), then run this again",
                )

    def _refuse_outside_alphabet(self, tables: Sequence[Table]) -> None:
        """Once more, now that the fence refuses further ones: on a single shard, nobody else does."""
        for server in (self._source, self._target):
            for table in tables:
                for fault in preflight.outside_alphabet_faults(server, self._keyspace, table):
                    raise RebalanceError(fault, job=self._job.id, hint="mend this, then run the same command again")

    # --- the map

    def _change_map(self, change: Callable[[ShardMap, Job], ShardMap | None]) -> ShardMap:
        """Publish a change on top of whatever the map is; nothing where it is in place already."""
        while True:
            current = self._co.store.load()
            changed = change(current, self._job)
            if changed is None:
                return current
            try:
                return self._co.store.publish(changed, expected_version=current.version)
            except MapConflict:
                self._co.wait(0.05)

    def _settle(self, version: int, masters: Sequence[Server]) -> None:
        """Have every process on this version, or without a connection to these shards that could do with less."""
        co = self._co
        shards = [shard for shard in (self._from, self._to) if any(master.shard == shard.name for master in masters)]
        for master in masters:
            self._patiently(partial(clients.raise_version, master, version), "the map version's row")
        for shard in shards:
            self._wait_for_replicas(shard, "SELECT 1 FROM shardkit_map_version WHERE min_map_version >= %s", version)
        # not before: a connection reads the version when it is made, and one made until now has read the last one
        older = clients.marks(shards, co.credentials)
        clients.wait_for_clients(
            co.store, version, patience=co.settings.client_patience, wait=co.wait, job=self._job.id
        )
        closed = clients.close_older(older, co.credentials, wait=co.wait)
        if closed:
            co.observer.noted(self._job, f"closed connections older than map version {version}: {closed}")

    def _wait_for_replicas(self, shard: Shard, query: str, *values: object) -> None:
        clients.wait_for_replicas(
            shard,
            self._co.credentials,
            query,
            values,
            patience=self._co.settings.replica_patience,
            wait=self._co.wait,
            job=self._job.id,
        )

    def _wait_for_event(self, shard: Shard, event: str) -> None:
        self._wait_for_replicas(
            shard, "SELECT 1 FROM shardkit_journal WHERE job = %s AND event = %s", self._job.id, event
        )

    # --- freezing, frozen

    def _freeze(self) -> None:
        self._patiently(
            partial(cutover.freeze, self._source, self._target, self._job, self._lease),
            "open transactions that have written to the buckets",
            patience=self._co.settings.freeze_patience,
        )

    def _hold(self) -> None:
        """Hold the tables and see that the fence stands; again after every restart, until the decision."""
        if self._held:
            return
        tables = self._tables()
        for shard in (self._from, self._to):
            keeper = self._open(shard)
            names = [table.name for table in tables]
            self._held.append(self._holding.enter_context(cutover.held(keeper, names, self._co.wait)))
        self._check_fence(tables)

    def _check_fence(self, tables: Sequence[Table]) -> None:
        for still_held in self._held:
            still_held()
        for server in (self._source, self._target):
            missing = fence.missing_triggers(server, self._keyspace, tables)
            if missing:
                raise RebalanceError(
                    f"{server}: triggers of the fence are gone: {', '.join(missing)}",
                    job=self._job.id,
                    hint="somebody dropped them, and may have written past them: cancel the job and plan again",
                )

    # --- copying, verifying

    def _copy(self) -> None:
        self._hold()
        co = self._co
        reader, writer = self._open(self._from), self._open(self._to, binary=True)
        self._let_through(writer)
        copy = Copy(
            self._job.id,
            reader,
            writer,
            self._target,
            self._lease,
            Throttle(co.settings.rows_per_second),
            co.check,
            co.wait,
            self._report_after(0),
        )
        done = 0
        for table in self._tables():
            part = partial(replace(copy, report=self._report_after(done)).run, table, self._where(table))
            done += self._patiently(part, _WAITING_DDL)

    def _report_after(self, before: int) -> Callable[[Table, int], None]:
        """Progress over all tables: ``before`` rows were in the tables before this one."""
        return lambda table, rows: self._report(table, before + rows)

    @staticmethod
    def _let_through(server: Server) -> None:
        server.run("SET @shardkit_coordinator = 'rebalance'")

    def _verify(self) -> None:
        self._hold()
        reader, other = self._open(self._from), self._open(self._to)
        done = 0
        for table in self._tables():
            verification = Verification(self._job.id, reader, other, self._co.check, self._report_after(done))
            done += self._patiently(partial(verification.run, table, self._where(table)), _WAITING_DDL)
        self._verified = True

    # --- activated, published

    def _activate(self) -> State | None:
        co, job = self._co, self._job
        if cutover.noted(self._target, job.id, "activated") is None:
            if not self._verified:
                return State.VERIFYING
            self._check_fence(self._tables())
            self._patiently(partial(cutover.activate, self._source, self._target, job, self._lease), "refused writers")
            reach("activated.decided")
        self._holding.close()
        self._patiently(partial(cutover.give_away, self._source, job, self._lease), "ownership rows")
        self._wait_for_event(self._to, "activated")
        co.observer.noted(job, f"{job.target} owns {len(job.buckets)} buckets of {job.keyspace}")
        return None

    def _publish(self) -> None:
        """The new map reaches everybody before the first write to the target: till then, old maps read all there is."""
        co, job = self._co, self._job
        published = self._change_map(mapchange.place_on_target)
        reach("published.named")
        self._settle(published.version, (self._source,))
        co.save(replace(self._job, published_version=published.version))
        faults = list(preflight.reference_faults(self._source, self._target, self._keyspace))
        if faults:
            raise RebalanceError("; ".join(faults), job=job.id, hint="make them equal, then run the same command again")
        self._patiently(partial(cutover.open_buckets, self._target, job, self._lease), "ownership rows")

    # --- cleaning

    def _clean(self) -> None:
        self._delete_rows(self._from, "clean", self._tables())
        self._patiently(partial(cutover.finish, self._source, self._job, self._lease, "cleaned"), "ownership rows")
        self._patiently(partial(cutover.finish, self._target, self._job, self._lease, "cleaned"), "ownership rows")
        reach("cleaning.deleted")
        self._wait_for_event(self._from, "cleaned")
        self._change_map(mapchange.forget_move)

    def _delete_rows(self, shard: Shard, phase: str, tables: Sequence[Table]) -> None:
        server = self._open(shard)
        self._let_through(server)
        done = 0
        for table in tables:
            cleanup = Cleanup(
                self._job.id,
                phase,
                server,
                self._lease,
                Throttle(self._co.settings.rows_per_second),
                self._co.check,
                self._co.wait,
                self._report_after(done),
            )
            done += self._patiently(partial(cleanup.run, table, self._where(table)), _WAITING_DDL)

    # --- cancelling

    def _copied(self, table: Table) -> bool:
        """Whether the target has rows that the job wrote: their cursor came with them. Others are not its to delete."""
        return read_cursor(self._target, self._job.id, "copy", table.name) != Cursor()

    def _cancel(self) -> None:
        job = self._job
        for server in (self._source, self._target):
            fence.complete_ownership(server, self._keyspace)
        self._patiently(partial(cutover.give_up, self._target, job, self._lease), "ownership rows")
        self._patiently(partial(cutover.thaw, self._source, job, self._lease), "ownership rows")
        reach("cancelling.thawed")
        self._delete_rows(self._to, "undo", [table for table in self._tables() if self._copied(table)])
        self._patiently(partial(cutover.finish, self._target, job, self._lease, "cancelled"), "ownership rows")
        self._patiently(partial(cutover.finish, self._source, job, self._lease, "cancelled"), "ownership rows")
        self._wait_for_event(self._to, "cancelled")
        self._change_map(mapchange.forget_move)
