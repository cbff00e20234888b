"""What an application's ``env.py`` calls.

.. code-block:: python

    from shardkit.migrate import run_migrations
    from shop.models import Base

    run_migrations(target_metadata=Base.metadata)

Under ``shardkit migrate`` this runs on the shard that the command chose. Under Alembic's own command line the shard is
named with ``alembic -x shard=shop-0 upgrade head``; without one, and without a map in ``[shardkit]``, Alembic's
``sqlalchemy.url`` is used as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.config import Config
from alembic.util import CommandError

from shardkit.credentials import Credentials, from_environment
from shardkit.errors import PreconditionFailed, ShardkitError
from shardkit.mapstore import open_store
from shardkit.migrate.connect import migration_engine
from shardkit.migrate.journal import Journal
from shardkit.migrate.lock import LockKind, migration_lock
from shardkit.migrate.notes import forget
from shardkit.migrate.scope import Scope, refuse_while_moving, scopes
from shardkit.migrate.tree import settings_of
from shardkit.topology import Endpoint

#: Where a command leaves its `Visit` for ``env.py``, in Alembic's ``config.attributes``.
VISIT = "shardkit_visit"

#: Seconds that a DDL statement waits for the transactions before it. Every later statement on the table queues behind
#: it meanwhile, so this is how long a migration may hold an application up; the servers' own default is a day or more.
LOCK_TIMEOUT = 10

_OURS = frozenset(
    {"connection", "url", "dialect_name", "fn", "version_table", "transactional_ddl", "transaction_per_migration"}
)

Report = Callable[[Mapping[str, Any]], None]


def _silent(_event: Mapping[str, Any]) -> None:
    """Report to nobody."""


class Stopped(ShardkitError):
    """The command asked to stop; the shard stands between two revisions."""


@dataclass
class Visit:
    """One run of ``env.py`` on one shard.

    :param lock_timeout: seconds that a DDL statement waits for the transactions before it.
    :param wait: seconds to wait for a migration that is at work on the shard.
    :param restart_revision: forget how far a revision has come: it runs from its first statement.
    :param compare_only: nothing is changed: no lock and no journal. The shard stands where it should.
    :param report: told of each revision and statement.
    :param stop_requested: asked before each revision.
    """

    scope: Scope
    endpoint: Endpoint
    credentials: Credentials
    version_table: str
    driver: str = "pymysql"
    lock_timeout: int = LOCK_TIMEOUT
    wait: float = 0.0
    restart_revision: bool = False
    compare_only: bool = False
    report: Report = _silent
    stop_requested: Callable[[], bool] = lambda: False


def run_migrations(target_metadata: sa.MetaData | Sequence[sa.MetaData] | None = None, **options: Any) -> None:
    """Run whatever Alembic command is under way, on one shard. To be called in ``env.py``.

    :param target_metadata: the models' metadata, for ``check`` and ``revision --autogenerate``. Only the tables that
        the shard map places on the shard are compared.
    :param options: more options of Alembic's ``context.configure``, e.g. ``compare_server_default=True``.
    :raises PreconditionFailed: for options that belong to shardkit; when a rebalance job or another migration is at
        work; and as Alembic's ``CommandError`` when run by ``alembic`` itself.
    """
    if ours := sorted(_OURS & options.keys()):
        raise PreconditionFailed(
            f"run_migrations() takes no {ours[0]!r}",
            hint="the version table is set as version_table in the section [shardkit] of alembic.ini"
            if ours[0] == "version_table"
            else "shardkit sets it for each shard",
        )
    config = context.config
    visit: Visit | None = config.attributes.get(VISIT)
    if visit is not None:
        _run(visit, target_metadata, options)
        return
    try:
        visit = _visit_of_command_line(config)
        if visit is None:
            _run_plainly(config, target_metadata, options)
        else:
            _run(visit, target_metadata, options)
    except ShardkitError as error:
        # Alembic's command line prints its own errors only
        raise CommandError(str(error)) from error


def _run(visit: Visit, target_metadata: Any, options: Mapping[str, Any]) -> None:
    configure = {
        **options,
        "target_metadata": target_metadata,
        "version_table": visit.version_table,
        "include_name": _both(_names_compared(visit), options.get("include_name")),
        "include_object": _both(_objects_compared(visit), options.get("include_object")),
    }
    if unplaced := visit.scope.unplaced(_tables(target_metadata)):
        visit.report({"event": "unplaced", "tables": list(unplaced)})
    if context.is_offline_mode():
        context.configure(dialect_name=visit.endpoint.dialect, literal_binds=True, **configure)
        with context.begin_transaction():
            context.run_migrations()
        return
    engine = migration_engine(visit.scope.shard, visit.endpoint, visit.credentials, driver=visit.driver)
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        connection = stack.enter_context(engine.connect())
        if visit.compare_only:
            _compare(connection, configure)
            return
        stack.enter_context(migration_lock(connection, LockKind.SHARD, shard=visit.scope.shard, wait=visit.wait))
        _run_noted(visit, connection, configure)


def _compare(connection: sa.Connection, configure: dict[str, Any]) -> None:
    """Run ``check`` or ``revision``."""
    context.configure(connection=connection, **configure)
    migration = context.get_context()
    plan, script = migration.opts["fn"], migration.script

    def compare(_heads: Any, migration: Any) -> Any:
        # Alembic compares only where every branch is at its head; a shard has the branches of its keyspaces alone
        return plan(tuple(script.get_heads()) if script is not None else (), migration)

    context.configure(connection=connection, fn=compare, **configure)
    context.run_migrations()


def _run_noted(visit: Visit, connection: sa.Connection, configure: dict[str, Any]) -> None:
    """Run the revisions, noting each statement."""
    if connection.dialect.name != "sqlite":
        connection.exec_driver_sql(f"SET SESSION lock_wait_timeout = {visit.lock_timeout}")
        connection.rollback()

    def completed(step: Any, **_others: Any) -> None:
        journal.finish()
        visit.report({"event": "applied", "revision": _revision(step)})

    def statement_done(done: int, statement: str, skipped: bool) -> None:
        visit.report({"event": "statement", "done": done, "statement": statement, "skipped": skipped})

    if visit.restart_revision:
        forget(connection, visit.version_table)
        visit.restart_revision = False
    journal = Journal(connection, visit.version_table, statement_done)
    hooks = configure.pop("on_version_apply", ())
    configure["on_version_apply"] = (*(hooks if isinstance(hooks, tuple | list) else (hooks,)), completed)
    configure["transaction_per_migration"] = True
    if connection.dialect.name == "sqlite":
        configure["transactional_ddl"] = True
    context.configure(connection=connection, **configure)
    plan = context.get_context().opts["fn"]

    def noted_plan(heads: Any, migration: Any) -> Iterator[Any]:
        # Alembic runs each step as it is handed out, so what stands before a `yield` happens right before that step
        steps: Iterable[Any] = plan(heads, migration)
        for step in steps:
            if visit.stop_requested():
                raise Stopped(f"stopped before revision {_revision(step.info)}, as asked")
            connection.commit()  # of the version table, where Alembic has just made it
            if not step.info.is_stamp:  # stamping is how a shard that was repaired by hand is put right
                journal.begin(_revision(step.info), "up" if step.info.is_upgrade else "down")
                visit.report({"event": "revision", "revision": _revision(step.info)})
            yield step

    context.configure(connection=connection, fn=noted_plan, **configure)
    journal.watch()
    try:
        context.run_migrations()
    except BaseException as error:
        if (stopped := journal.fail(error)) is not None:
            visit.report({"event": "unfinished", **asdict(stopped)})
        raise


def _run_plainly(config: Config, target_metadata: Any, options: Mapping[str, Any]) -> None:
    """No map and no shard: Alembic's own behaviour, on ``sqlalchemy.url``."""
    url = config.get_alembic_option("sqlalchemy.url")
    if not url:
        raise PreconditionFailed(
            "neither a shard nor a database is named",
            hint="set map in the section [shardkit] of alembic.ini and name a shard with `alembic -x shard=NAME ...`, "
            "or use `shardkit migrate`",
        )
    configure = {**options, "target_metadata": target_metadata, "version_table": settings_of(config).version_table}
    if context.is_offline_mode():
        context.configure(url=url, literal_binds=True, **configure)
        with context.begin_transaction():
            context.run_migrations()
        return
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        context.configure(connection=connection, **configure)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


def _visit_of_command_line(config: Config) -> Visit | None:
    """The shard named by ``alembic -x shard=NAME [-x map=SOURCE]``."""
    arguments = context.get_x_argument(as_dictionary=True)
    settings = settings_of(config)
    source = arguments.get("map") or settings.map_source
    if source is None and "shard" not in arguments:
        return None
    if source is None:
        raise PreconditionFailed(
            "no shard map is named", hint="set map in the section [shardkit], or add -x map=SOURCE"
        )
    store = open_store(source)
    try:
        shardmap = store.load()
    finally:
        store.close()
    if "shard" not in arguments:
        raise PreconditionFailed(
            f"cluster {shardmap.cluster!r} has {len(shardmap.shards)} shards, and none is named",
            hint=f"add -x shard=NAME ({', '.join(shardmap.shards)}), or use `shardkit migrate` for all of them",
        )
    (scope,) = scopes(shardmap, keyspace=settings.keyspace, shards=(arguments["shard"],))
    refuse_while_moving(shardmap, (scope,))
    endpoint = shardmap.shard(scope.shard).master
    if not context.is_offline_mode():
        _own_tables_in_another_process(scope.shard, endpoint)
    return Visit(scope, endpoint, from_environment()(endpoint), settings.version_table)


def _own_tables_in_another_process(shard: str, endpoint: Endpoint) -> None:
    # shardkit's own tree is Alembic's too, and Alembic's context cannot be entered twice in one process
    from shardkit.migrate.process import ensure_own_tables  # which imports this module

    ensure_own_tables(shard, endpoint, from_environment())


# --- what is compared


def _names_compared(visit: Visit) -> Callable[..., bool]:
    def include_name(name: str | None, kind: str, _parents: Any) -> bool:
        return kind != "table" or visit.scope.compares(name)

    return include_name


def _objects_compared(visit: Visit) -> Callable[..., bool]:
    def include_object(_thing: Any, name: str | None, kind: str, _reflected: bool, _other: Any) -> bool:
        return kind != "table" or visit.scope.compares(name)

    return include_object


def _both(ours: Callable[..., bool], theirs: Callable[..., bool] | None) -> Callable[..., bool]:
    if theirs is None:
        return ours
    return lambda *arguments: ours(*arguments) and theirs(*arguments)


def _tables(metadata: Any) -> tuple[str, ...]:
    if metadata is None:
        return ()
    many = metadata if isinstance(metadata, Sequence) else (metadata,)
    return tuple(table.name for one in many for table in one.tables.values())


def _revision(step: Any) -> str:
    return ", ".join(step.up_revision_ids)
