"""shardkit's own tables: what they are called, what stands in them, and bringing them up to date.

They live in each shard's own database under the prefix ``shardkit_``. Their definitions here are for reading and
writing; the tables are made by the alembic tree in ``migrations/``, on every server by itself: the relay does not
carry their DDL, and of their rows only those that belong to the data (the heartbeat, a master's history, ownership)
travel from a master to its replicas.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import mysql

from shardkit.errors import PreconditionFailed

#: Every table of shardkit's begins with this.
PREFIX = "shardkit_"
#: Where alembic notes the revision of shardkit's own tables; an application's ``alembic_version`` is left alone.
VERSION_TABLE = "shardkit_schema_version"
#: Own tables whose rows belong to one server; the relay leaves them out.
LOCAL_TABLES = frozenset(
    {VERSION_TABLE, "shardkit_prepared", "shardkit_migration_steps", "shardkit_pause", "shardkit_apply_path"}
)
#: Position rows under this prefix are a master's history and travel; rows of hops do not.
HISTORY_PREFIX = "history:"
HOP_PREFIX = "hop:"
#: The runner of a row that a promotion has moved: until the map names the new master, nobody else is to.
PROMOTED_BY = "shardkit shard promote"
#: Where a promotion has taken a database out of the relay, its hop's source is called this and the shard's next epoch;
#: and so does the row begin that notes where a new master's log begins to be the shard's.
PROMOTED_PREFIX = "promoted:"
#: A target that is being filled from a snapshot has a row under this prefix and none of its hop.
SEED_PREFIX = "seed:"

LOCK_TIMEOUT = 60  # seconds

SYSTEM_LOCK = "shardkit:system:"
#: Run by every lasting connection of shardkit's own machinery: a named lock with the connection's id in it, freed by
#: the server with the connection. A rebalance job knows them by it when it closes an application's older connections.
MARK_AS_SYSTEM = f"SELECT GET_LOCK(CONCAT('{SYSTEM_LOCK}', CONNECTION_ID()), 0)"

# alembic keeps the migration at hand in module globals, so one process runs one at a time, whatever the database.
_one_migration = threading.Lock()


def ascii_name(length: int) -> sa.String:
    """A name compared byte by byte: hops, shards, GTIDs."""
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


metadata = sa.MetaData()

#: How far this server has applied other servers' logs. ``hop`` has to stay the first column: the relay reads it from
#: row events without decoding the rest.
position = sa.Table(
    "shardkit_position",
    metadata,
    sa.Column("hop", ascii_name(190), primary_key=True, comment="hop:<name> or history:<shard>"),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="raised by each runner that takes over"),
    sa.Column("counter", sa.BigInteger, nullable=False, comment="target transactions so far"),
    sa.Column("gtid", sa.Text, nullable=False, comment="position in the source's log"),
    sa.Column("source", ascii_name(64), nullable=False, comment="whose log: the source's identity"),
    sa.Column("runner", sa.String(190), nullable=False),
    sa.Column("connection_id", sa.BigInteger, nullable=False, comment="of the runner, on this server"),
    sa.Column("ddl_gtid", ascii_name(128), nullable=False, comment="schema change begun and not yet noted as done"),
    sa.Column("ddl_origin", ascii_name(64), nullable=False, comment="GTID domain or UUID of this hop's schema changes"),
    sa.Column("ddl_number", sa.BigInteger, nullable=False, comment="number of the last one begun"),
    sa.Column("error", sa.Text, nullable=False, comment="why the hop stopped; empty while all is well"),
    sa.Column("updated_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC, this server's"),
)

#: One row per shard, written on its master and carried along with the data.
heartbeat = sa.Table(
    "shardkit_heartbeat",
    metadata,
    sa.Column("shard", ascii_name(190), primary_key=True),
    sa.Column("beat", sa.BigInteger, nullable=False, comment="counts up"),
    sa.Column("written_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC, the master's"),
)

#: Row events of XA branches between XA PREPARE and XA COMMIT, as they came; rows belong to this server alone.
prepared = sa.Table(
    "shardkit_prepared",
    metadata,
    sa.Column("hop", ascii_name(190), primary_key=True),
    sa.Column("xid", ascii_name(300), primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("gtid", ascii_name(128), nullable=False),
    sa.Column("events", sa.LargeBinary, nullable=False),
)

#: The hops into this database that an operator has paused; `shardkit_cdc.pause`. Rows belong to this server alone.
pause = sa.Table(
    "shardkit_pause",
    metadata,
    sa.Column("hop", ascii_name(190), primary_key=True, comment="hop:<name>"),
    sa.Column("paused_by", sa.String(190), nullable=False, comment="user and machine"),
    sa.Column("paused_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC, this server's"),
)

#: How the rows of each hop into this database reach it; `shardkit_cdc.apply_path`. Rows belong to this server alone.
apply_path = sa.Table(
    "shardkit_apply_path",
    metadata,
    sa.Column("hop", ascii_name(190), primary_key=True, comment="hop:<name>"),
    sa.Column("path", ascii_name(8), nullable=False, comment="raw or sql"),
    sa.Column("reason", sa.Text, nullable=False, comment="why it is not raw"),
)

#: What an application's revision has done so far on this server, statement by statement; empty when none is under way.
migration_steps = sa.Table(
    "shardkit_migration_steps",
    metadata,
    sa.Column("version_table", ascii_name(64), primary_key=True, comment="the application's tree"),
    sa.Column("ordinal", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("revision", ascii_name(64), nullable=False),
    sa.Column("direction", ascii_name(8), nullable=False, comment="up or down"),
    sa.Column("state", ascii_name(8), nullable=False, comment="started, done or failed"),
    sa.Column("statement_digest", ascii_name(32)),
    sa.Column("values_digest", ascii_name(32)),
    sa.Column("statement", sa.Text, comment="its first characters"),
    sa.Column("row_count", sa.BigInteger),
    sa.Column("last_row_id", sa.BigInteger),
    sa.Column("error", sa.Text),
)

#: Which buckets this shard owns; the triggers of `shardkit.rebalance.fence` read it.
ownership = sa.Table(
    "shardkit_ownership",
    metadata,
    sa.Column("keyspace", ascii_name(63), primary_key=True),
    sa.Column("bucket", ascii_name(63), primary_key=True, comment="a number, or a name"),
    sa.Column(
        "state",
        sa.String(16).with_variant(
            mysql.ENUM("owned", "importing", "frozen", "moved", charset="ascii", collation="ascii_bin"),
            "mysql",
            "mariadb",
        ),
        nullable=False,
        comment="owned, importing, frozen or moved",
    ),
    sa.Column("epoch", sa.BigInteger, nullable=False, comment="only grows, whichever shard owns the bucket"),
    sa.Column("moved_to", ascii_name(63), comment="the shard to go to"),
    sa.Column("job", ascii_name(64), comment="the rebalance job at work on it"),
)

#: One row: the oldest map version that the shard still takes statements for. `shardkit.engines` reads it on connecting.
map_version = sa.Table(
    "shardkit_map_version",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False, comment="always 1"),
    sa.Column("min_map_version", sa.BigInteger, nullable=False, comment="statements of older maps are not sent"),
)

#: The process at work on a rebalance job; each of its transactions begins with a look at its token here.
rebalance_job = sa.Table(
    "shardkit_job",
    metadata,
    sa.Column("job", ascii_name(64), primary_key=True),
    sa.Column("coordinator", ascii_name(32), nullable=False, comment="token of the process at work on it"),
)

#: How far a job has copied or deleted a table; written in the transaction of the rows.
rebalance_cursor = sa.Table(
    "shardkit_job_cursor",
    metadata,
    sa.Column("job", ascii_name(64), primary_key=True),
    sa.Column("phase", ascii_name(16), primary_key=True, comment="copy, clean or undo"),
    sa.Column("table_name", sa.String(64), primary_key=True),
    sa.Column("last_key", sa.Text, comment="primary key done last, as JSON list of SQL literals"),
    sa.Column("row_count", sa.BigInteger, nullable=False),
    sa.Column("finished", sa.SmallInteger, nullable=False),
)

#: What a job has done to a shard for good; written in the transaction that did it.
journal = sa.Table(
    "shardkit_journal",
    metadata,
    sa.Column("job", ascii_name(64), primary_key=True),
    sa.Column("event", ascii_name(16), primary_key=True, comment="frozen, activated, opened, cleaned or cancelled"),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("noted_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC"),
)

#: Which bucket each key of a keyspace by directory is in; on the keyspace's home shard. Rows are never changed.
directory = sa.Table(
    "shardkit_directory",
    metadata,
    sa.Column("keyspace", ascii_name(63), primary_key=True),
    sa.Column("key_text", sa.VARBINARY(512), primary_key=True, comment="canonical text of the key, UTF-8"),
    sa.Column("bucket", ascii_name(63), nullable=False),
)


def applied_position(shard: str) -> sa.Select[tuple[str | None, int | None, int]]:
    """How far a replica or a staging database is, in one query.

    Its one row: the master position that its data has reached (None before the first transaction), when the newest
    heartbeat that it holds was written, and the server's time now; both microseconds since the epoch. A scalar
    subquery of it belongs in any statement that has to know the position of the data which it reads.
    """
    reached = sa.select(position.c.gtid).where(position.c.hop == HISTORY_PREFIX + shard).scalar_subquery()
    beat = sa.select(heartbeat.c.written_at).where(heartbeat.c.shard == shard).scalar_subquery()
    return sa.select(reached.label("position"), beat.label("written_at"), now_microseconds().label("now"))


def now_microseconds() -> sa.ColumnElement[int]:
    """The server's time as microseconds since the epoch, whatever its time zone."""
    return sa.cast(sa.func.unix_timestamp(sa.func.now(6)) * 1_000_000, mysql.BIGINT(unsigned=True))


def migrations_directory() -> Path:
    """Where the alembic tree is: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def upgrade(engine: sa.Engine) -> None:
    """Make or update shardkit's own tables in one database. Running it again, or from several processes, is safe.

    :raises PreconditionFailed: when a newer shardkit has been here, or another process holds the lock for a minute.
    """
    config = _config()
    script = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if _is_current(connection, script):
            return
        connection.rollback()
        with _one_migration, _lock(connection):
            if not _is_current(connection, script):
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    return config


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


_up_to_date: WeakSet[sa.Engine] = WeakSet()


def ensure(engine: sa.Engine, beside: sa.Engine) -> None:
    """`upgrade`, once for each engine.

    :param beside: the same database, for a look at whether there is anything to do.
    """
    if engine not in _up_to_date:
        with beside.connect() as connection:
            current = _is_current(connection, _script())
        if not current:
            upgrade(engine)
        _up_to_date.add(engine)


def _is_current(connection: sa.Connection, script: ScriptDirectory) -> bool:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = set(context.get_current_heads())
    known = {revision.revision for revision in script.walk_revisions()}
    if not found <= known:
        raise PreconditionFailed(
            f"shardkit's own tables in {connection.engine.url.database or 'this database'} were made by a newer "
            f"shardkit (revision {', '.join(sorted(found - known))})",
            hint="upgrade shardkit here",
        )
    return found == set(script.get_heads())


@contextmanager
def _lock(connection: sa.Connection) -> Iterator[None]:
    """Only one process at a time works on one database's tables."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield
        return
    database = connection.scalar(sa.text("SELECT DATABASE()"))
    name = "shardkit:tables:" + hashlib.sha1(str(database).encode(), usedforsecurity=False).hexdigest()
    if connection.scalar(sa.text("SELECT GET_LOCK(:name, :timeout)"), {"name": name, "timeout": LOCK_TIMEOUT}) != 1:
        raise PreconditionFailed(
            f"another process has been changing shardkit's own tables in {database} for {LOCK_TIMEOUT} seconds",
            hint="wait for it, or end it, then run this again",
        )
    try:
        yield
    finally:
        if not connection.invalidated:  # else the lock went with the connection
            connection.scalar(sa.text("SELECT RELEASE_LOCK(:name)"), {"name": name})
