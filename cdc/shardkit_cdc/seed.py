"""Filling a hop's target from a consistent snapshot of its source, so that the hop goes on right after it.

The rows travel as the source's own literals (`shardkit.rowtext`), in the order of the primary key, while the source
goes on working. What the target holds already is compared first: tables by their definitions, rows by their checksums.
What is equal stays (`row_copy`), so an attempt that was cut short, or a copy that has drifted, costs little more than
the comparison; and the end is the snapshot whatever there was before.

Between MariaDB and MySQL the rows alone are copied, into tables that the target has already (`seed_between`); each
table is compared as a whole in the end, for a literal may mean something else to the other family.

What the seed writes is in the target's log like all else: a staging database's log stays complete, so replicas of it
may be seeded or begin there as before.

A target that is being filled has a row ``seed:<shard>`` in its position table and no row of its hop; the transaction
that ends the seed exchanges them. So no hop runs on half of the data. Each transaction that writes rows first locks
that row (shared) and looks whether it is still its own seed's: a take-over by the next attempt waits for those that are
open, and lets no later one through.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Protocol

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import Fenced, Interrupted, PartlyApplied, PreconditionFailed
from shardkit.gtid import Position
from shardkit.rowtext import quoted
from shardkit.topology import Endpoint
from shardkit_cdc import own_schema, preflight, schema_copy
from shardkit_cdc.checksums import CHUNK_ROWS
from shardkit_cdc.connection import SCHEMA_CHANGED, code_of, connect, server_errors, text_of
from shardkit_cdc.database import Database
from shardkit_cdc.matching import Matched
from shardkit_cdc.position import LOCK_TIMEOUT, HopRow, end_old_runner, insert_row, is_held, lock_name, read_row
from shardkit_cdc.preflight import ServerFacts
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.row_copy import Copied, RowCopy, compared
from shardkit_cdc.schema_copy import Definition
from shardkit_cdc.seed_between import match_for_seed, tables_with_other_rows, tables_with_rows
from shardkit_cdc.snapshot import PATIENCE, Snapshot, take_snapshot
from shardkit_cdc.start import new_origin, user_objects
from shardkit_cdc.tables import Table, read_tables

#: How often a snapshot is taken again because somebody changed the schema around it.
_ATTEMPTS = 5


class Progress(Protocol):
    """Told how far the copy is; from several threads. Rows that are kept count as those that are copied."""

    def begin(self, table: str, estimate: int) -> None: ...
    def advance(self, table: str, rows: int) -> None: ...
    def end(self, table: str) -> None: ...


class _Silent:
    def begin(self, table: str, estimate: int) -> None: ...
    def advance(self, table: str, rows: int) -> None: ...
    def end(self, table: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """What a target holds before it is filled.

    :param objects: tables, views and routines in it; of a target of the other family, tables that hold rows.
    :param unfinished: an earlier seed was cut short.
    :param filled: a hop of this shard has a position in it.
    :param runner: who runs the hop into it now; empty for nobody.
    :param rows_only: it is of the other family: its tables stay, and their rows are exchanged.
    """

    objects: tuple[str, ...]
    unfinished: bool
    filled: bool
    runner: str
    rows_only: bool = False


@dataclass(frozen=True, slots=True)
class Seeded:
    """What a seed has done.

    :param rows: copied.
    :param bytes: of the statements that did it.
    :param kept: rows that the target had already.
    :param remade: tables that the target had, by another definition than the source's: made anew.
    :param position: of the source's log; the hop goes on from there.
    :param seconds: in all.
    :param held: seconds for which the source's commits waited.
    """

    hop: str
    source: str
    target: str
    tables: int
    rows: int
    bytes: int
    kept: int
    remade: tuple[str, ...]
    position: str
    seconds: float
    held: float


def seed(
    spec: HopSpec,
    credentials: CredentialSource,
    *,
    jobs: int = 1,
    anew: bool = False,
    confirm: Callable[[Found], None] | None = None,
    progress: Progress | None = None,
    patience: float = PATIENCE,
    chunk: int = CHUNK_ROWS,
    shard_epoch: int | None = None,
) -> Seeded:
    """Fill the hop's target.

    :param jobs: tables copied at the same time.
    :param anew: empty the target first, instead of keeping what is equal.
    :param confirm: called before anything is changed where the target is not empty; raises to stop. Without it such a
        target is refused.
    :param patience: seconds to wait for a moment without prepared XA branches.
    :param chunk: rows of a range whose checksums are compared.
    :param shard_epoch: the map's: what a promotion into that epoch, or an earlier one, has left in the target is
        history. Without it any trace of a promotion is one that is under way.
    :raises PreconditionFailed: when something stands in the way; the target is as it was, or marked as half filled.
    :raises PartlyApplied: when it was cut short; the same call keeps what has been copied.
    """
    seeding = _Seed(spec, credentials, jobs, anew, progress or _Silent(), patience, chunk, shard_epoch)
    try:
        with ExitStack() as stack:
            return seeding.run(stack, confirm)
    except Interrupted as error:
        raise PartlyApplied(f"the seed was cut short: {error.text}", hint=_AGAIN) from error
    except pymysql.MySQLError as error:
        raise PartlyApplied(
            f"the seed of {spec.target} failed: {text_of(error)} ({code_of(error)})", hint=_AGAIN
        ) from error


_AGAIN = "run the same command again: it copies what is missing, or has changed since"


class _Seed:
    def __init__(
        self,
        spec: HopSpec,
        credentials: CredentialSource,
        jobs: int,
        anew: bool,
        progress: Progress,
        patience: float,
        chunk: int,
        shard_epoch: int | None,
    ) -> None:
        self._spec = spec
        self._credentials = credentials
        self._jobs = jobs
        self._anew = anew
        self._progress = progress
        self._patience = patience
        self._chunk = chunk
        self._shard_epoch = shard_epoch
        self._mark = own_tables.SEED_PREFIX + spec.shard
        self._token = secrets.token_hex(16)
        self._stop = threading.Event()
        self._epoch = 0  # above that of every runner that has served the target before

    def run(self, stack: ExitStack, confirm: Callable[[Found], None] | None) -> Seeded:
        began = time.monotonic()
        spec = self._spec
        facts = self._preflight()
        target = stack.enter_context(closing(self._database(spec.target)))
        found = self._look(target, facts)
        if found.objects or found.filled or found.unfinished:
            if confirm is None:
                raise PreconditionFailed(f"{spec.target} is not empty", hint="empty it first")
            confirm(found)
        own_schema.upgrade(spec.target, self._credentials)
        self._take_over(target)
        definitions, tables, snapshot = self._snapshot(rows_only=found.rows_only)
        stack.callback(snapshot.close)
        history = self._history(snapshot.sessions[0], snapshot.position, facts)
        remade: tuple[str, ...] = ()
        if found.rows_only:
            copied = self._copy_rows(snapshot, target, tables)
            schema_copy.raise_counters(target, definitions, {table.name for table in tables if not table.own})
        else:
            copied, remade = self._copy_all(snapshot, target, tables, definitions, found)
        self._finish(target, facts, snapshot.position, history)
        return Seeded(
            hop=spec.name,
            source=spec.source.address,
            target=spec.target.address,
            tables=len([table for table in tables if not table.own]),
            rows=sum(each.rows for each in copied),
            bytes=sum(each.bytes for each in copied),
            kept=sum(each.kept for each in copied),
            remade=remade,
            position=str(snapshot.position),
            seconds=time.monotonic() - began,
            held=snapshot.held,
        )

    def _copy_all(
        self,
        snapshot: Snapshot,
        target: Database,
        tables: Sequence[Table],
        definitions: Sequence[Definition],
        found: Found,
    ) -> tuple[list[Copied], tuple[str, ...]]:
        """Definitions and rows: what was copied, and the tables that were made anew."""
        comparable = {table.name for table in tables if table.primary and table.kind == "BASE TABLE" and not table.own}
        kept = frozenset() if self._anew else comparable & schema_copy.unchanged_tables(target, definitions)
        schema_copy.drop_all(target, but=kept)
        missing = [each for each in definitions if each.name not in kept or each.kind != "TABLE"]
        schema_copy.create(target, missing, schema_copy.BEFORE_ROWS)
        copied = self._copy_rows(snapshot, target, tables)
        schema_copy.raise_counters(target, definitions, kept)
        schema_copy.create(target, missing, schema_copy.AFTER_ROWS)
        return copied, () if self._anew else tuple(sorted(comparable.intersection(found.objects) - kept))

    def _database(self, endpoint: Endpoint, *, binary: bool = False) -> Database:
        return Database(endpoint, self._credentials, hop=self._spec.name, binary=binary)

    # --- before anything is changed

    def _preflight(self) -> ServerFacts:
        spec, facts = self._spec, []
        for endpoint in (spec.source, spec.target):
            connection = connect(endpoint, self._credentials, autocommit=True)
            with closing(connection), server_errors(endpoint, spec.name, doing="asking it for its settings"):
                facts.append(preflight.ask(connection, endpoint))
        preflight.refuse_faults(facts[0], facts[1], statements=facts[0].flavour is not facts[1].flavour)
        with closing(self._database(spec.source)) as source:
            self._refuse_engines(source)
            if not spec.reads_master:
                self._masters(source)
        return facts[0]

    def _refuse_engines(self, source: Database) -> None:
        """A snapshot shows tables with transactions only, and so does the relay."""
        plain = source.rows(
            "SELECT t.table_name, t.engine FROM information_schema.tables t JOIN information_schema.engines e "
            "USING (engine) WHERE t.table_schema = DATABASE() AND e.transactions <> 'YES' "
            "AND t.table_type <> 'SEQUENCE'"
        )
        if plain:
            raise PreconditionFailed(
                f"{source.endpoint} keeps {plain[0][0]} in {plain[0][1]}, which has no transactions",
                hint=f"on the source: ALTER TABLE {quoted(plain[0][0])} ENGINE=InnoDB",
            )

    def _look(self, target: Database, source: ServerFacts) -> Found:
        """:raises PreconditionFailed: for a target with tables that no relay of this shard has put there, or one that
        a promotion is at work on.
        """
        spec = self._spec
        row = mark = None
        if own_schema.exists(target.connection):
            row, mark = read_row(target.connection, spec.key), read_row(target.connection, self._mark)
        self._refuse_promoted(target, row, source)
        rows_only = source.flavour is not target.flavour
        if rows_only:
            objects = self._look_abroad(target, known=row is not None or mark is not None)
        else:
            objects = tuple(sorted(user_objects(target.connection, spec.target.database)))
        if objects and row is None and mark is None:
            again = f"DROP DATABASE `{spec.target.database}` and create it again"
            names = ", ".join(objects[:3]) + (f" and {len(objects) - 3} more" if len(objects) > 3 else "")
            raise PreconditionFailed(
                f"{spec.target} holds {'rows in ' if rows_only else ''}{names}, and nothing says that the relay of "
                f"{spec.shard} has put them there",
                hint=f"if nobody needs them, {'delete them' if rows_only else again}; "
                "else give the target another name in the shard map",
            )
        held = target.value("SELECT IS_USED_LOCK(%s)", lock_name(spec.target.database, spec.key)) is not None
        return Found(objects, mark is not None, row is not None, row.runner if held and row else "", rows_only)

    def _look_abroad(self, target: Database, *, known: bool) -> tuple[str, ...]:
        """The tables with rows in a target of the other family, where it can be filled.

        :param known: the relay, or a seed, has filled it before.
        :raises PreconditionFailed: as `match_for_seed`.
        """
        with closing(self._database(self._spec.source)) as source:
            ours = {name: table for name, table in read_tables(source).items() if not table.own}
            matched = match_for_seed(source, target, ours)
            return tuple(tables_with_rows(target) if known else tables_with_other_rows(source, target, matched))

    def _refuse_promoted(self, target: Database, row: HopRow | None, source: ServerFacts) -> None:
        """See that no promotion has taken the target, which is the shard's next master then, or a copy of that one."""
        spec = self._spec
        at_work = is_held(target.connection, lock_name(spec.target.database, own_tables.PROMOTED_PREFIX + spec.shard))
        if not at_work and (row is None or row.runner != own_tables.PROMOTED_BY):
            return
        if not at_work and row is not None:
            if row.source.startswith(own_tables.PROMOTED_PREFIX):
                into = int(row.source.removeprefix(own_tables.PROMOTED_PREFIX))
                if self._shard_epoch is not None and into <= self._shard_epoch:
                    return  # it has been a master since
            elif spec.reads_master and row.source == source.identity:
                return  # the map names the new master
        raise PreconditionFailed(
            f"a promotion of {spec.shard} has taken {spec.target}: it is about to be the master, or a copy of the next "
            "one",
            hint="let the promotion end; if it was cut short, run the same shardkit shard promote again. Where the "
            f"promotion has ended and {spec.target} left the map since, DROP DATABASE `{spec.target.database}` and "
            "create it again",
        )

    # --- the target becomes ours

    def _take_over(self, target: Database) -> None:
        """Hold the target against hops and other seeds for as long as the connection lives, and mark it."""
        spec = self._spec
        if target.value("SELECT GET_LOCK(%s, 0)", lock_name(spec.target.database, self._mark)) != 1:
            raise PreconditionFailed(
                f"another `shardkit relay seed` is filling {spec.target}", hint="let it end, or end it"
            )
        lock = lock_name(spec.target.database, spec.key)
        end_old_runner(target.connection, lock)
        if target.value("SELECT GET_LOCK(%s, %s)", lock, LOCK_TIMEOUT) != 1:
            raise PreconditionFailed(
                f"the hop's runner has not let go of {spec.target} within {LOCK_TIMEOUT} s",
                hint="stop the relay, or wait until its big transaction is rolled back, then run this again",
            )
        rows = (read_row(target.connection, key) for key in (spec.key, self._mark))
        self._epoch = max((row.epoch + 1 for row in rows if row is not None), default=0)
        with target.transaction():
            # Apart from the histories, which travel on: the relay takes or leaves a whole row event.
            target.run("DELETE FROM shardkit_position WHERE hop NOT LIKE %s", own_tables.HISTORY_PREFIX + "%")
            for table in read_tables(target).values():
                if table.own and table.name not in own_tables.LOCAL_TABLES - {own_tables.prepared.name}:
                    target.run(f"DELETE FROM {quoted(table.name)}")
            insert_row(target.connection, self._mark, gtid="", source=self._token, ddl_origin="", epoch=self._epoch)

    # --- the snapshot

    def _snapshot(self, *, rows_only: bool) -> tuple[tuple[Definition, ...], list[Table], Snapshot]:
        """A snapshot, and the schema that its data has: the same before and after it was taken."""
        spec = self._spec
        with closing(self._database(self._spec.source)) as source:
            for _ in range(_ATTEMPTS):
                before = schema_copy.read_definitions(source)
                tables = read_tables(source)
                if not rows_only:
                    schema_copy.refuse_foreign_names(before, spec.source.database, spec.target.database)
                snapshot = take_snapshot(
                    spec.source, self._credentials, hop=spec.name, sessions=self._jobs, patience=self._patience
                )
                try:
                    unchanged = schema_copy.same(before, schema_copy.read_definitions(source))
                except BaseException:
                    snapshot.close()
                    raise
                if unchanged:
                    return before, [table.with_history for table in tables.values()], snapshot
                snapshot.close()
        raise PartlyApplied(
            f"the schema of {spec.source} changes all the time: no snapshot of it", hint="wait for the migration to end"
        )

    def _history(self, source: Database, position: Position, facts: ServerFacts) -> tuple[str, str]:
        """The master's position that the snapshot has, and whose log it is a position of."""
        if self._spec.reads_master:
            return str(position), facts.identity
        return self._masters(source)

    def _masters(self, source: Database) -> tuple[str, str]:
        """The same of a staging database."""
        key = own_tables.HISTORY_PREFIX + self._spec.shard
        row = read_row(source.connection, key) if own_schema.exists(source.connection) else None
        if row is None:
            raise PreconditionFailed(
                f"{self._spec.source} has no position of its master: no relay has filled it yet",
                hint="seed the staging database first (shardkit relay seed --staging), then its replicas",
            )
        return row.gtid, row.source

    # --- rows

    def _copy_rows(self, snapshot: Snapshot, target: Database, tables: Sequence[Table]) -> list[Copied]:
        """Copy every table, the largest first, by as many threads as there are sessions."""
        local = own_tables.LOCAL_TABLES | {own_tables.position.name}
        wanted = [table for table in tables if table.name not in local]
        self._refuse_missing(target, wanted)
        matched = self._match_all(target, wanted) if snapshot.sessions[0].flavour is not target.flavour else None
        waiting: queue.SimpleQueue[Table] = queue.SimpleQueue()
        for table in sorted(wanted, key=lambda table: -table.estimate):
            waiting.put(table)

        def work(source: Database) -> list[Copied]:
            copied = []
            with (
                closing(self._database(self._spec.target)) as reader,
                closing(self._database(self._spec.target, binary=True)) as writer,
                closing(self._database(self._spec.source)) as beside,
            ):
                if any(table.kind == "SYSTEM VERSIONED" for table in wanted):
                    writer.run("SET SESSION system_versioning_insert_history = ON")
                rows = RowCopy(
                    source,
                    reader,
                    writer,
                    fence=self._fence,
                    chunk=self._chunk,
                    stop=self._stop,
                    advance=self._advance,
                )
                while not self._stop.is_set():
                    try:
                        table = waiting.get_nowait()
                    except queue.Empty:
                        break
                    copied.append(self._copy(table, rows, beside, matched))
            return copied

        with ThreadPoolExecutor(len(snapshot.sessions), thread_name_prefix="shardkit-seed") as pool:
            futures = [pool.submit(work, source) for source in snapshot.sessions]
            try:
                done, running = wait(futures, return_when=FIRST_EXCEPTION)
                if running:
                    self._stop.set()
                    for future in done:
                        future.result()  # what went wrong, before what is only stopped because of it
                return [each for future in futures for each in future.result()]
            finally:
                self._stop.set()

    def _refuse_missing(self, target: Database, wanted: Sequence[Table]) -> None:
        there = read_tables(target)
        missing = [table.name for table in wanted if table.own and table.name not in there]
        if missing:
            raise PreconditionFailed(
                f"{self._spec.source} has {missing[0]}, which this shardkit does not know", hint="upgrade shardkit here"
            )

    def _match_all(self, target: Database, wanted: Sequence[Table]) -> Matched:
        with closing(self._database(self._spec.source)) as source:
            return match_for_seed(source, target, {table.name: table for table in wanted})

    def _copy(self, table: Table, rows: RowCopy, beside: Database, matched: Matched | None) -> Copied:
        """One table. The source's definition of it has to be the snapshot's all the time."""
        if not table.own:
            self._progress.begin(table.name, table.estimate)
        try:
            copied = rows.copy(table) if matched is None else self._carry(table.name, rows, matched)
        except pymysql.MySQLError as error:
            if code_of(error) not in SCHEMA_CHANGED:
                raise
            raise self._changed(table) from error
        now = read_tables(beside).get(table.name)
        if now is None or (now.born, now.shape) != (table.born, table.shape):
            raise self._changed(table)
        if table.own:
            return Copied(0, 0, 0)
        self._progress.end(table.name)
        return copied

    def _carry(self, name: str, rows: RowCopy, matched: Matched) -> Copied:
        """One table's rows to a target of the other family."""
        table = matched.tables[name]
        if self._anew or not compared(table):
            rows.empty(table)
        try:
            copied = rows.copy(table, matched.written[name])
        except pymysql.IntegrityError as error:
            raise PartlyApplied(
                f"{self._spec.target} refused a row of {name}: {text_of(error)} ({code_of(error)})",
                hint="its collations may take two of the source's texts for one: give the columns the source's "
                "collations, then run the same command again",
            ) from error
        if rows.differs(table):
            raise PartlyApplied(
                f"rows of {name} did not become on {self._spec.target} what they are on {self._spec.source}",
                hint="it holds values that the other family does not keep (a FLOAT of -0.0 on MariaDB, say): change "
                "them, then run the same command again",
            )
        return copied

    def _advance(self, table: Table, rows: int) -> None:
        if not table.own:
            self._progress.advance(table.name, rows)

    def _fence(self, writer: Database) -> None:
        """:raises Fenced: when another seed has taken the target over."""
        ours = "SELECT COUNT(*) FROM shardkit_position WHERE hop = %s AND source = %s LOCK IN SHARE MODE"
        if writer.value(ours, self._mark, self._token) != 1:
            raise self._lost()

    def _lost(self) -> Fenced:
        return Fenced(f"another seed has taken {self._spec.target} over", hop=self._spec.name)

    def _changed(self, table: Table) -> PartlyApplied:
        return PartlyApplied(
            f"somebody changed the table {table.name} on {self._spec.source} while it was copied",
            hint="wait for the migration to end, then run the same command again",
        )

    # --- the end

    def _finish(self, target: Database, facts: ServerFacts, position: Position, history: tuple[str, str]) -> None:
        spec = self._spec
        gtid, source = history
        with target.transaction():
            if target.run("DELETE FROM shardkit_position WHERE hop = %s AND source = %s", self._mark, self._token) != 1:
                raise self._lost()
            insert_row(
                target.connection,
                spec.key,
                gtid=str(position),
                source=facts.identity,
                ddl_origin=new_origin(target.connection, target.flavour),
                epoch=self._epoch,
            )
            insert_row(
                target.connection, own_tables.HISTORY_PREFIX + spec.shard, gtid=gtid, source=source, ddl_origin=""
            )
