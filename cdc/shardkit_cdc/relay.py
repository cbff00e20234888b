"""One hop's life: elected, checked, resumed from the position in its target, run, drained.

Two threads: one reads the source's log and takes out of it what concerns the hop; the other, the hop's own, applies.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import (
    Fenced,
    Interrupted,
    PositionLost,
    PreconditionFailed,
    RelayError,
    ShardkitError,
    Unreachable,
)
from shardkit.gtid import Flavour, parse_position
from shardkit.telemetry import RelayMetrics
from shardkit.topology import Endpoint, Role
from shardkit_cdc import own_schema, preflight
from shardkit_cdc.apply import Applier, prepare_session
from shardkit_cdc.apply_path import ApplyPath, AskedPath, Chosen, choose, note_path, read_path, without_privilege
from shardkit_cdc.apply_sql import CONNECTION_FLAGS, prepare_statements
from shardkit_cdc.backlog import Backlog
from shardkit_cdc.connection import connect, server_errors
from shardkit_cdc.election import Election, Unopposed
from shardkit_cdc.pause import LOOK_SECONDS, Pause, read_pause
from shardkit_cdc.position import Claim, HopRow, note_error, read_row, refuse_promoted
from shardkit_cdc.preflight import ServerFacts
from shardkit_cdc.schema import charsets_by_id
from shardkit_cdc.selection import Selected, Selector
from shardkit_cdc.start import begin_from_start
from shardkit_cdc.stream import BinlogStream
from shardkit_cdc.transactions import Assembler

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

logger = logging.getLogger(__name__)


class State(StrEnum):
    """Where a hop is in its life."""

    NEW = "new"
    #: Another process runs it; this one waits to take over.
    STANDBY = "standby"
    STARTING = "starting"
    RUNNING = "running"
    #: An operator has paused it; it goes on by itself when it is resumed.
    PAUSED = "paused"
    #: A server is away; tried again by itself.
    RETRYING = "retrying"
    #: A setting, a privilege or a password stands in the way; looked at again by itself.
    BLOCKED = "blocked"
    #: Somebody has to decide something.
    FAILED = "failed"
    #: Another runner has taken over.
    FENCED = "fenced"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class HopSpec:
    """One relay link.

    :param shard: the shard that it serves.
    :param role: what the target is.
    :param reads_master: whether the source is the shard's master; then the hop writes the master's history.
    """

    shard: str
    source: Endpoint
    target: Endpoint
    role: Role
    reads_master: bool

    @property
    def name(self) -> str:
        """The hop in logs, metrics and ZooKeeper: shard and target."""
        return f"{self.shard}/{self.target.address}"

    @property
    def key(self) -> str:
        """Its row in the target's position table: a target has one source for a shard."""
        return own_tables.HOP_PREFIX + self.shard


@dataclass(frozen=True, slots=True)
class HopOptions:
    """How a hop works.

    :param batch_transactions: source transactions in one target transaction, at most.
    :param batch_bytes: their row events, at most.
    :param from_start: begin at the source's first transaction although it has tables already; the operator vouches
        that its log holds all of them.
    :param settle_seconds: how often the position moves past other databases' transactions alone.
    :param heartbeat: seconds of silence after which the source's server sends a sign of life.
    :param retry_seconds: the shortest and the longest pause between two attempts.
    :param apply: how rows reach the target.
    """

    batch_transactions: int = 1000
    batch_bytes: int = 4 << 20
    from_start: bool = False
    settle_seconds: float = 10.0
    heartbeat: float = 1.0
    retry_seconds: tuple[float, float] = (0.1, 10.0)
    apply: AskedPath = AskedPath.AUTO


@dataclass(slots=True)
class HopReport:
    """What a hop says about itself while it runs. Written by the hop's thread only."""

    state: State = State.NEW
    error: ShardkitError | None = None
    pause: Pause | None = None
    position: str = ""
    transactions: int = 0


class Hop:
    """One relay link of this process.

    :param cluster: the cluster's name: with the hop's name it gives the server id that the source knows this reader by.
    :param runner: who this process is, for people.
    """

    def __init__(
        self,
        spec: HopSpec,
        credentials: CredentialSource,
        *,
        cluster: str,
        runner: str,
        election: Election | None = None,
        options: HopOptions | None = None,
        metrics: RelayMetrics | None = None,
        on_change: Callable[[Hop], None] | None = None,
    ) -> None:
        self.spec = spec
        self.report = HopReport()
        self._credentials = credentials
        self._runner = runner
        self._election = election or Unopposed()
        self._options = options or HopOptions()
        self._metrics = metrics or RelayMetrics()
        self._on_change = on_change
        self._stop = threading.Event()
        self._epoch: int | None = None
        self._server_id = 0x40000000 | zlib.crc32(f"{cluster}/{spec.name}".encode()) & 0x3FFFFFFF
        self._said = ""

    # --- life

    def stop(self) -> None:
        """Ask it to end: the batch at hand is committed, nothing more is begun."""
        self._stop.set()
        self._election.cancel()

    def run(self) -> None:
        """Run until stopped. Ends earlier in the state FAILED, or FENCED where there is no election to go back to."""
        try:
            while not self._stop.is_set():
                if self._election.shared:
                    self._become(State.STANDBY)
                with self._election.lead(self._stop) as lost:
                    if lost is None:
                        break
                    self._epoch = None
                    if not self._lead(lost):
                        return
                if self.report.state is State.FENCED:
                    self._stop.wait(self._options.retry_seconds[1])  # elected and yet fenced: no hurry to be so again
            self._become(State.STOPPED)
        except Exception as error:
            self._become(State.FAILED, RelayError(f"failed: {error!r}", hop=self.spec.name))
            raise

    def _lead(self, lost: threading.Event) -> bool:
        """Serve until stopped, or leadership is lost; false when the hop has come to its end by itself."""
        shortest, longest = self._options.retry_seconds
        pause = shortest
        while not self._stop.is_set() and not lost.is_set():
            self._become(State.STARTING)
            served = time.monotonic()
            try:
                self._serve(lost)
            except (Interrupted, Unreachable) as error:
                self._become(State.RETRYING, error)
            except Fenced as error:
                self._become(State.FENCED, error)
                return self._election.shared
            except PositionLost as error:
                return self._fail(error)
            except PreconditionFailed as error:
                self._become(State.BLOCKED, error)
                pause = max(pause, 1.0)
            except RelayError as error:
                return self._fail(error)
            if time.monotonic() - served > longest:
                pause = shortest
            if self.report.error is not None:
                self._metrics.restarts.labels(self.spec.name, self.report.state.value).inc()
                self._stop.wait(pause * random.uniform(0.7, 1.3))  # noqa: S311 - spreads reconnects, nothing secret
                pause = min(longest, pause * 2)
        return True

    def _fail(self, error: RelayError) -> bool:
        known = error.of_hop(self.spec.name)
        self._note(known)  # first: whoever sees the state finds the reason
        self._become(State.FAILED, known)
        return False

    def _become(self, state: State, error: ShardkitError | None = None, pause: Pause | None = None) -> None:
        report = self.report
        if isinstance(error, RelayError):
            error = error.of_hop(self.spec.name)
        report.state, report.pause = state, pause
        if state is not State.STARTING:  # until the new attempt has come to something, the old one's error stands
            report.error = error
        level = logging.INFO if error is None else logging.WARNING if state is State.RETRYING else logging.ERROR
        line = f"{state.value}: {error}" if error else str(pause) if pause else state.value
        if state is State.STARTING or line == self._said:
            level = logging.DEBUG  # said once: the same again with every attempt tells nothing
        else:
            self._said = line
        logger.log(level, "hop %s: %s", self.spec.name, line)
        if self._on_change is not None:
            self._on_change(self)

    def _note(self, error: ShardkitError) -> None:
        """Leave the reason in the target, where `relay status` finds it from anywhere."""
        if self._epoch is None:
            return
        try:
            connection = connect(self.spec.target, self._credentials)
            with closing(connection):
                note_error(connection, self.spec.key, self._epoch, str(error))
        except (ShardkitError, pymysql.MySQLError) as failure:
            logger.warning("hop %s: its error could not be noted in the target: %s", self.spec.name, failure)

    # --- start

    def _serve(self, lost: threading.Event) -> None:
        spec = self.spec
        target = connect(spec.target, self._credentials, flags=CONNECTION_FLAGS)
        with closing(target):
            if self._rested(target, lost):
                return
            source = connect(spec.source, self._credentials, autocommit=True)
            with closing(source), server_errors(spec.source, spec.name, doing="asking it for its settings"):
                source_facts = preflight.ask(source, spec.source)
                charsets = charsets_by_id(source)
            with server_errors(spec.target, spec.name, doing="taking the hop over"):
                target_facts = preflight.ask(target, spec.target)
                stream, claim, chosen = self._resume(source_facts, target_facts, target)
            with closing(stream):
                applier = Applier(
                    target,
                    spec.target,
                    claim,
                    stream.begin(),
                    source=source_facts.flavour,
                    flavour=target_facts.flavour,
                    chosen=chosen,
                    detours=self._options.apply is AskedPath.AUTO,
                    charsets=charsets if source_facts.flavour is not target_facts.flavour else None,
                    hop=spec.name,
                )
                self._tell_path(target, applier.path)
                self._run(stream, applier, target, source_facts, lost, lambda: self._paused(target, busy=applier.busy))

    def _rested(self, target: Connection, lost: threading.Event) -> bool:
        """Wait as long as the hop is paused, elected but without a claim; false when it is not."""
        pause = self._paused(target)
        if pause is None:
            return False
        self._become(State.PAUSED, pause=pause)
        while not self._stop.wait(LOOK_SECONDS) and not lost.is_set() and self._paused(target) is not None:
            pass
        return True

    def _paused(self, target: Connection, *, busy: bool = False) -> Pause | None:
        with server_errors(self.spec.target, self.spec.name, doing="asking whether the hop is paused"):
            found = read_pause(target, self.spec.key)
            if not busy:
                target.rollback()
        return found

    def _resume(
        self, source: ServerFacts, target_facts: ServerFacts, target: Connection
    ) -> tuple[BinlogStream, Claim, Chosen]:
        """Check that the hop can run before anything is changed, then take it over."""
        spec = self.spec
        target.rollback()
        chosen = choose(self._options.apply, source, target_facts)
        preflight.refuse_faults(source, target_facts, statements=chosen.path is ApplyPath.SQL)
        row = self._position_row(target)
        if row is not None:
            refuse_promoted(row, source.identity if spec.reads_master else None)
            preflight.refuse_other_log(row.source, source, target_facts, hop=spec.name)
        stream = self._open(source.flavour, row.gtid if row else "")
        try:
            form = stream.begin()
            if chosen.path is ApplyPath.RAW:
                try:
                    prepare_session(target, source.flavour, form)  # tells whether BINLOG is allowed here
                except pymysql.MySQLError as error:
                    target.rollback()
                    chosen = without_privilege(error, self._options.apply, target_facts)
            if chosen.path is ApplyPath.SQL:
                prepare_statements(target, target_facts.flavour, spec.target)
            own_schema.upgrade(spec.target, self._credentials)
            if row is None:
                begin_from_start(
                    spec,
                    source,
                    target,
                    self._credentials,
                    flavour=target_facts.flavour,
                    log_began=form.timestamp,
                    vouched=self._options.from_start,
                )
            claim = Claim.take(
                target,
                source.flavour,
                database=spec.target.database,
                key=spec.key,
                runner=self._runner,
                history=spec.shard if spec.reads_master else None,
                expected_epoch=self._epoch,
                source=source.identity,
            )
            self._epoch = claim.epoch
            if row is not None and parse_position(source.flavour, row.gtid) != claim.position:
                # The old runner moved on until it was ended.
                stream.close()
                stream = self._open(source.flavour, str(claim.position))
        except BaseException:
            stream.close()
            raise
        return stream, claim, chosen

    def _tell_path(self, target: Connection, chosen: Chosen) -> None:
        """Say in the log, the metrics and the target how rows reach it, where that is news."""
        spec = self.spec
        with server_errors(spec.target, spec.name, doing="noting the path"):
            known = read_path(target, spec.key)
            if known != chosen:
                note_path(target, spec.key, chosen)
            target.rollback()
        for path in ApplyPath:
            self._metrics.apply_info.labels(spec.name, path.value).set(path is chosen.path)
        if known != chosen and (chosen.reason or known):
            logger.info("hop %s: rows are applied as %s", spec.name, chosen)

    def _position_row(self, target: Connection) -> HopRow | None:
        if not own_schema.exists(target):
            return None
        row = read_row(target, self.spec.key)
        target.rollback()
        return row

    def _open(self, flavour: Flavour, gtid: str) -> BinlogStream:
        return BinlogStream(
            self.spec.source,
            self._credentials,
            hop=self.spec.name,
            flavour=flavour,
            after=parse_position(flavour, gtid),
            server_id=self._server_id,
            heartbeat=self._options.heartbeat,
            timeout=max(10.0, 4 * self._options.heartbeat),
        )

    # --- running

    def _run(
        self,
        stream: BinlogStream,
        applier: Applier,
        target: Connection,
        source: ServerFacts,
        lost: threading.Event,
        paused: Callable[[], Pause | None],
    ) -> None:
        """Apply until stopped, paused, or leadership is lost; a big transaction in the middle is then rolled back."""
        spec, options = self.spec, self._options
        backlog = Backlog()
        selector = Selector(spec.source.database, spec.target.database, fold_case=source.folds_names)
        reader = threading.Thread(
            target=_read,
            args=(stream, Assembler(source.flavour), selector, backlog),
            name=f"read {spec.name}",
            daemon=True,
        )
        reader.start()
        self._become(State.RUNNING)
        try:
            settle_at = time.monotonic() + options.settle_seconds
            look_at = 0.0
            told = applier.path
            while not self._stop.is_set() and not lost.is_set():
                if time.monotonic() >= look_at:
                    if paused() is not None:
                        break
                    look_at = time.monotonic() + LOOK_SECONDS
                batch = backlog.take(
                    most_bytes=options.batch_bytes, most_transactions=options.batch_transactions, timeout=0.25
                )
                if any(selected.own for selected in batch):
                    applier.apply(batch)
                    if applier.path != told and not applier.busy:
                        told = applier.path
                        self._tell_path(target, told)
                elif batch:
                    applier.pass_over(selected.transaction.gtid for selected in batch)
                if applier.passing and time.monotonic() >= settle_at:
                    applier.settle()
                if not applier.passing:
                    settle_at = time.monotonic() + options.settle_seconds
                if batch:
                    self._account(applier, backlog, batch[-1].transaction.timestamp)
        finally:
            backlog.close()
            stream.close()
            reader.join()
            if applier.busy:
                logger.info("hop %s: a transaction was cut short; it will be applied from its start", spec.name)

    def _account(self, applier: Applier, backlog: Backlog, timestamp: int) -> None:
        name, metrics, counts = self.spec.name, self._metrics, applier.counts.drained()
        metrics.transactions.labels(name).inc(counts.transactions)
        metrics.rows.labels(name).inc(counts.row_events)
        metrics.bytes.labels(name).inc(counts.bytes)
        if counts.commits:
            metrics.commit_seconds.labels(name).observe(counts.commit_seconds / counts.commits)
            metrics.batch.labels(name).set(counts.largest_batch)
        metrics.queue_bytes.labels(name).set(backlog.bytes)
        metrics.lag_seconds.labels(name).set(max(0.0, time.time() - timestamp))
        self.report.transactions += counts.transactions
        self._note_position(str(applier.position))

    def _note_position(self, position: str) -> None:
        """The position as a metric's label: one label set at a time, however far it moves."""
        name, before = self.spec.name, self.report.position
        if position == before:
            return
        if before:
            self._metrics.position_info.remove(name, before)
        self._metrics.position_info.labels(name, position).set(1)
        self.report.position = position


def _read(stream: BinlogStream, assembler: Assembler, selector: Selector, backlog: Backlog) -> None:
    """The reader thread: everything that it meets goes to the applier through the backlog, errors too."""
    found: list[Selected] = []
    try:
        while True:
            for event in stream.read():
                transaction = assembler.push(event)
                if transaction is not None:
                    selected = selector.select(transaction)
                    if selected is not None:
                        found.append(selected)
            if found:
                if not backlog.put(found):
                    return
                found = []
    except Exception as error:  # noqa: BLE001 - raised again by the applier's thread, which takes it from the backlog
        # What came before the fault is good: it is applied first, so that the position names the faulty transaction.
        backlog.put(found)
        backlog.fail(error)
