"""A tree over many shards: who stands where, and going to a revision together."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from sqlalchemy.exc import DBAPIError

from shardkit.credentials import CredentialSource, from_environment
from shardkit.errors import PreconditionFailed, ShardError
from shardkit.mapstore import MapStore
from shardkit.migrate.connect import PARALLEL, error_line, migration_engine
from shardkit.migrate.environment import LOCK_TIMEOUT
from shardkit.migrate.job import Job, Task
from shardkit.migrate.lock import LockKind, migration_lock
from shardkit.migrate.notes import unfinished
from shardkit.migrate.process import Listener, Outcome, Processes
from shardkit.migrate.report import (
    CheckReport,
    Ending,
    MigrationReport,
    ShardCheck,
    ShardResult,
    Standing,
)
from shardkit.migrate.scope import Scope, offline_range, pending, refuse_while_moving, scopes, targets
from shardkit.migrate.tree import Tree

T = TypeVar("T")


class Fleet:
    """One Alembic tree and the shards that it belongs on.

    :param keyspace: only the shards that host it, and only its tables; the tree's own setting where there is one.
    :param shards: only these.
    :param credentials: how to log on; the environment's ``SHARDKIT_USER`` by default.
    :param parallel: shards that are worked on at a time.
    :param lock_timeout: seconds that a DDL statement waits for the transactions before it.
    :param wait: seconds to wait for another migration; 0 refuses at once.
    :param listen: called with a shard's name and what its process tells, from several threads.
    :raises UnknownTable: for a keyspace or shard that the map does not name.
    :raises PreconditionFailed: when the tree belongs to another keyspace, or cannot be read.
    """

    def __init__(
        self,
        store: MapStore,
        tree: Tree,
        *,
        keyspace: str | None = None,
        shards: Sequence[str] = (),
        credentials: CredentialSource | None = None,
        driver: str = "pymysql",
        parallel: int = PARALLEL,
        lock_timeout: int = LOCK_TIMEOUT,
        wait: float = 0.0,
        listen: Listener | None = None,
    ) -> None:
        own = tree.settings.keyspace
        if keyspace and own and keyspace != own:
            raise PreconditionFailed(
                f"the tree belongs to keyspace {own!r}, not to {keyspace!r}",
                hint="name the other keyspace's tree with --config",
            )
        self._store = store
        self._map = store.load()
        self._tree = tree
        self._script = tree.script()
        self._scopes = scopes(self._map, keyspace=keyspace or own, shards=shards)
        self._credentials = credentials or from_environment()
        self._driver = driver
        self._parallel = max(1, parallel)
        self._lock_timeout = lock_timeout
        self._wait = wait
        self._listen = listen

    @property
    def cluster(self) -> str:
        """The cluster's name."""
        return self._map.cluster

    @property
    def shards(self) -> tuple[str, ...]:
        """The shards that the tree runs on, in the map's order."""
        return tuple(scope.shard for scope in self._scopes)

    # --- looking

    def current(self, revision: str = "heads", *, downgrade: bool = False) -> tuple[Standing, ...]:
        """Where each shard stands on its way to ``revision``. Changes nothing; a shard out of reach is said to be.

        :param downgrade: the way leads back.
        """
        return self._each(lambda scope: self._standing(scope, revision, downgrade=downgrade))

    def check(self) -> CheckReport:
        """Compare every shard with the tree, and with the models that ``env.py`` names. Changes nothing."""
        return CheckReport(self.cluster, self._each(self._check))

    def offline_sql(self, revision: str = "heads") -> Mapping[str, str]:
        """What an upgrade would run, as SQL, per shard from where it stands.

        :raises PreconditionFailed: for a shard whose place is not known.
        """

        def sql(scope: Scope) -> tuple[str, str]:
            standing = self._known_standing(scope, revision)
            if not standing.pending:
                return scope.shard, ""
            ranges = tuple(offline_range(self._script, standing.revisions, target) for target in standing.targets)
            outcome = self._succeed(self._job(Task.SQL, scope, ranges))
            return scope.shard, "".join(str(event["text"]) for event in outcome.of("sql"))

        return dict(self._each(sql))

    def new_revision(self, shard: str | None = None, **options: Any) -> tuple[str, ...]:
        """Write a new revision file, as ``alembic revision`` does.

        :param shard: whose tables ``autogenerate=True`` compares with the models; the first by default.
        :param options: ``message``, ``autogenerate``, ``branch_label``, ``head`` and so on.
        :returns: the files written.
        :raises PreconditionFailed: when the shard is not up to date.
        """
        if shard is not None and shard not in self.shards:
            raise PreconditionFailed(f"the tree does not run on {shard!r}", hint=f"it runs on {', '.join(self.shards)}")
        scope = next(one for one in self._scopes if shard in {None, one.shard})
        if options.get("autogenerate"):
            standing = self._known_standing(scope, "heads")
            if standing.pending or standing.unfinished is not None:
                raise PreconditionFailed(
                    f"shard {scope.shard} is {standing.state}: {standing.detail}",
                    hint="run `shardkit migrate upgrade` first: the models are compared with its tables",
                )
        outcome = self._succeed(replace(self._job(Task.REVISION, scope, ()), options=options))
        return tuple(str(event["path"]) for event in outcome.of("file"))

    # --- changing

    def upgrade(
        self,
        revision: str = "heads",
        *,
        first: str | None = None,
        keep_going: bool = False,
        restart_revision: bool = False,
    ) -> MigrationReport:
        """Bring every shard to ``revision``.

        Nothing is begun anywhere unless every shard can be reached, stands at a revision of the tree, and is free of
        other migrations and of rebalance jobs. After that, a shard that fails keeps the others that are at work going,
        and no other is begun. Running it again goes on where each shard stopped.

        :param first: a shard to migrate alone before the others: they are left alone when it fails.
        :param keep_going: begin the other shards although one has failed.
        :param restart_revision: forget how far a revision has come: it runs from its first statement.
        :raises PreconditionFailed: nothing was changed.
        """
        return self._change(Task.UPGRADE, revision, first, keep_going, restart_revision)

    def downgrade(
        self,
        revision: str,
        *,
        first: str | None = None,
        keep_going: bool = False,
        restart_revision: bool = False,
    ) -> MigrationReport:
        """Take every shard back to ``revision``; otherwise as `upgrade`."""
        return self._change(Task.DOWNGRADE, revision, first, keep_going, restart_revision)

    def _change(
        self, task: Task, revision: str, first: str | None, keep_going: bool, restart_revision: bool
    ) -> MigrationReport:
        if first is not None and first not in self.shards:
            raise PreconditionFailed(f"the tree does not run on {first!r}", hint=f"it runs on {', '.join(self.shards)}")
        run = _Run(Processes(self._listen), keep_going)
        with self._alone():
            before = self._preflight(task, revision)
            jobs = {
                scope.shard: replace(
                    self._job(task, scope, before[scope.shard].targets), restart_revision=restart_revision
                )
                for scope in self._scopes
            }
            order = sorted(self._scopes, key=lambda scope: scope.shard != first)
            waves = (order[:1], order[1:]) if first is not None else (order,)
            with ThreadPoolExecutor(self._parallel) as pool:
                for wave in waves:
                    run.finish([pool.submit(run.one, jobs[scope.shard], before[scope.shard]) for scope in wave])
            downgrade = task is Task.DOWNGRADE
            # a step count means something else once steps have been made
            wanted = {shard: () if revision[:1] == "-" else standing.targets for shard, standing in before.items()}
            after = {
                scope.shard: self._standing_at(scope, wanted[scope.shard], downgrade=downgrade)
                for scope in self._scopes
            }
        results = tuple(
            _result(before[shard], after[shard], run.outcomes.get(shard), run.seconds.get(shard, 0.0))
            for shard in self.shards
        )
        return MigrationReport(task, revision, self.cluster, results, run.interrupted)

    def _preflight(self, task: Task, revision: str) -> dict[str, Standing]:
        """Everything that can be known before: nothing is half done because of it."""
        refuse_while_moving(self._store.load(), self._scopes)
        standings = self.current(revision, downgrade=task is Task.DOWNGRADE)
        if faults := [standing for standing in standings if standing.problem is not None]:
            raise PreconditionFailed(
                "nothing was changed: " + "; ".join(f"{fault.shard}: {fault.problem}" for fault in faults),
                hint="mend that first, or leave shards out by naming the others with --shard",
            )
        return {standing.shard: standing for standing in standings}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of every shard. All commands take them in the same order."""
        with ExitStack() as stack:
            for scope in sorted(self._scopes, key=lambda scope: str(self._map.shard(scope.shard).master)):
                connection = stack.enter_context(self._connected(scope.shard))
                stack.enter_context(migration_lock(connection, LockKind.RUN, shard=scope.shard, wait=self._wait))
            yield

    # --- one shard

    def _standing(self, scope: Scope, revision: str, *, downgrade: bool = False) -> Standing:
        try:
            wanted = targets(self._script, scope, revision)
        except PreconditionFailed as error:
            return Standing(scope.shard, str(self._map.shard(scope.shard).master), problem=error_line(error))
        standing = self._standing_at(scope, wanted, downgrade=downgrade)
        if wanted == (revision,) and revision[:1] in {"+", "-"} and standing.pending and not downgrade:
            return replace(standing, targets=standing.pending[-1:])
        return standing

    def _standing_at(self, scope: Scope, wanted: tuple[str, ...], *, downgrade: bool = False) -> Standing:
        standing = Standing(scope.shard, str(self._map.shard(scope.shard).master), targets=wanted)
        version_table = self._tree.settings.version_table
        try:
            with self._connected(scope.shard) as connection:
                found = MigrationContext.configure(connection, opts={"version_table": version_table})
                standing = replace(
                    standing,
                    revisions=tuple(sorted(found.get_current_heads())),
                    unfinished=unfinished(connection, version_table),
                )
        except (ShardError, DBAPIError) as error:
            problem = str(error) if isinstance(error, ShardError) else error_line(error)
            return replace(standing, problem=problem, reachable=False)
        try:
            return replace(standing, pending=pending(self._script, standing.revisions, wanted, downgrade=downgrade))
        except PreconditionFailed as error:
            return replace(standing, problem=error_line(error))

    def _known_standing(self, scope: Scope, revision: str) -> Standing:
        standing = self._standing(scope, revision)
        if standing.problem is not None:
            raise PreconditionFailed(f"{scope.shard}: {standing.problem}")
        return standing

    def _check(self, scope: Scope) -> ShardCheck:
        standing = self._standing(scope, "heads")
        if standing.problem is not None:
            return ShardCheck(standing, error=standing.problem)
        if standing.pending or standing.unfinished is not None:
            # the tables of a shard that is behind differ from the models anyway
            return ShardCheck(standing, (f"{standing.state}: {standing.detail}",))
        outcome = Processes(self._listen).run(self._job(Task.CHECK, scope, ()))
        if outcome.error is not None:
            return ShardCheck(standing, error=outcome.error)
        unplaced = (table for event in outcome.of("unplaced") for table in event["tables"])
        return ShardCheck(
            standing,
            (
                *(f"table {table} is in the models and in no keyspace of the shard map" for table in unplaced),
                *(str(line) for event in outcome.of("differences") for line in event["lines"]),
            ),
        )

    def _succeed(self, job: Job) -> Outcome:
        outcome = Processes(self._listen).run(job)
        if outcome.error is None:
            return outcome
        if outcome.precondition:
            raise PreconditionFailed(outcome.error, hint=outcome.hint)
        raise ShardError(f"shard {job.shard}: {outcome.error}", shard=job.shard, hint=outcome.hint)

    def _job(self, task: Task, scope: Scope, wanted: tuple[str, ...]) -> Job:
        endpoint = self._map.shard(scope.shard).master
        logon = self._credentials(endpoint)
        return Job(
            task=task,
            shard=scope.shard,
            url=endpoint.url,
            user=logon.user,
            password=logon.password,
            driver=self._driver,
            keyspaces=scope.keyspaces,
            tables=tuple(scope.tables),
            labels=tuple(scope.labels),
            named=tuple(scope.named),
            targets=wanted,
            version_table=self._tree.settings.version_table,
            ini=str(self._tree.ini) if self._tree.ini else None,
            toml=str(self._tree.toml) if self._tree.toml else None,
            section=self._tree.section,
            sys_path=tuple(sys.path),
            lock_timeout=self._lock_timeout,
            wait=self._wait,
        )

    @contextmanager
    def _connected(self, shard: str) -> Iterator[sa.Connection]:
        endpoint = self._map.shard(shard).master
        engine = migration_engine(shard, endpoint, self._credentials(endpoint), driver=self._driver)
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()

    def _each(self, look: Callable[[Scope], T]) -> tuple[T, ...]:
        with ThreadPoolExecutor(self._parallel) as pool:
            return tuple(pool.map(look, self._scopes))


class _Run:
    """The processes of one upgrade, and what came of them."""

    def __init__(self, processes: Processes, keep_going: bool) -> None:
        self._processes = processes
        self._keep_going = keep_going
        self._failed = threading.Event()
        self.outcomes: dict[str, Outcome] = {}
        self.seconds: dict[str, float] = {}
        self.interrupted = False

    def one(self, job: Job, before: Standing) -> None:
        """Migrate one shard, unless there is nothing to do or another has failed."""
        if not before.pending and not (job.restart_revision and before.unfinished is not None):
            self.outcomes[job.shard] = Outcome()
            return
        if self.interrupted or (self._failed.is_set() and not self._keep_going):
            return
        started = time.monotonic()
        outcome = self._processes.run(job)
        self.seconds[job.shard] = time.monotonic() - started
        self.outcomes[job.shard] = outcome
        if outcome.error is not None:
            self._failed.set()

    def finish(self, parts: Sequence[Future[None]]) -> None:
        """Wait for shards. Ctrl-C lets each complete its revision; a second one leaves them to it."""
        try:
            for part in parts:
                part.result()
        except KeyboardInterrupt:
            self.interrupted = True
            self._processes.stop()
            for part in parts:
                part.result()


def _result(before: Standing, after: Standing, outcome: Outcome | None, seconds: float) -> ShardResult:
    error, hint = (outcome.error, outcome.hint) if outcome else (None, None)
    if outcome is not None and error is None and not outcome.stopped and after.unfinished is not None:
        error = after.unfinished.describe()
        hint = "complete it with the command that began it, or repair the shard by hand and run with --restart-revision"
    if outcome is None:
        ending = Ending.NOT_RUN
    elif error is not None:
        ending = Ending.FAILED
    else:
        ending = Ending.STOPPED if outcome.stopped else Ending.DONE
    return ShardResult(
        shard=before.shard,
        ending=ending,
        before=before.revisions,
        applied=tuple(str(event["revision"]) for event in outcome.of("applied")) if outcome else (),
        standing=after,
        error=error,
        hint=hint,
        seconds=seconds,
    )
