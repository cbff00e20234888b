"""Endpoint -> engine: made when first asked for, disposed when the map drops the endpoint, safe over a fork."""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import Dialect, ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from shardkit import drivers
from shardkit.credentials import CredentialSource
from shardkit.errors import BucketClosed, PreconditionFailed, ShardUnreachable
from shardkit.replicas import seeing
from shardkit.topology import Endpoint, Role, Shard

#: Engines that the application has already: (shard, role) -> engine. With several replicas the roles are ``replica-0``,
#: ``replica-1``, ...
GivenEngines: TypeAlias = Mapping[tuple[str, str], Engine | AsyncEngine]

#: Where a connection keeps the oldest map version that its server accepted when it was opened.
MAP_VERSION_STAMP = "shardkit_min_map_version"

#: The one-row table in which a rebalance job raises that version.
MAP_VERSION_TABLE = "shardkit_map_version"

#: The drivers that asyncio sessions use, by dialect.
ASYNC_DRIVERS = {"mysql": "asyncmy", "sqlite": "aiosqlite"}

#: Seconds that a probe waits for its server.
PROBE_SECONDS = 2

#: Seconds after which a pooled connection is replaced: before the server's own eight hours, without asking each time.
POOL_RECYCLE_SECONDS = 3600

#: Seconds that a transaction over several shards waits for a lock.
LOCK_WAIT_SECONDS = 5
#: Seconds that a server waits for the reader of a stream over several shards.
STREAM_SECONDS = 24 * 3600

#: Where a connection keeps that its server may have rolled back all of its transaction.
ROLLED_BACK = "shardkit_rolled_back"
_LOCK_WAIT_TIMEOUT = 1205
#: Errors with which a server may undo a whole transaction: a deadlock, a lock waited for in vain (where the server is
#: set so), and MariaDB's "record has changed since last read" (where ``innodb_snapshot_isolation`` is on).
_UNDOING = frozenset({1213, _LOCK_WAIT_TIMEOUT, 1020})

_PROBE = " probe"
_CHANGED = "shardkit_changed_variables"
_SIGNAL = 1644  # ER_SIGNAL_EXCEPTION: what a trigger's SIGNAL arrives as
_REFUSAL = "shardkit:"
_NO_SUCH_TABLE = 1146
_ACCESS_DENIED = frozenset({1044, 1045, 1698})
_UNKNOWN_DATABASE = 1049


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How engines are made in this process.

    :param driver: the DBAPI for servers (``pymysql``, ``mysqldb``), or with SQLAlchemy's name for the dialect before it
        (``mariadb+pymysql``).
    :param options: passed to `sqlalchemy.create_engine`.
    :param async_options: passed to `sqlalchemy.ext.asyncio.create_async_engine`; None: the same ones.
    """

    credentials: CredentialSource
    driver: str = "pymysql"
    async_driver: str = ASYNC_DRIVERS["mysql"]
    options: Mapping[str, Any] = field(default_factory=dict)
    async_options: Mapping[str, Any] | None = None

    def url(self, endpoint: Endpoint, *, asynchronous: bool = False) -> URL:
        """The SQLAlchemy URL of an endpoint, with this process's driver and credentials."""
        if endpoint.dialect == "sqlite":
            driver = f"sqlite+{ASYNC_DRIVERS['sqlite']}" if asynchronous else "sqlite"
            return URL.create(driver, database=endpoint.database)
        credentials = self.credentials(endpoint)
        driver = self.async_driver if asynchronous else self.driver
        return URL.create(
            driver if "+" in driver else f"mysql+{driver}",
            username=credentials.user,
            password=credentials.password or None,
            host=endpoint.host,
            port=endpoint.port,
            database=endpoint.database,
        )

    def options_for(self, url: URL, *, asynchronous: bool) -> dict[str, Any]:
        """The engine options for this URL: ours for servers, and the application's over them."""
        theirs = self.options if not asynchronous or self.async_options is None else self.async_options
        ours = {} if url.get_backend_name() == "sqlite" else {"pool_recycle": POOL_RECYCLE_SECONDS}
        return {**ours, **theirs}


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one engine is for."""

    shard: str
    role: str
    endpoint: Endpoint
    asynchronous: bool


class Engines:
    """The engines of one cluster in this process.

    :param given: engines that the application made itself; they are used and never disposed.
    :param on_refusal: called when a server refuses a write because its bucket is moving.
    """

    def __init__(
        self, settings: EngineSettings, given: GivenEngines | None = None, on_refusal: Callable[[], None] = lambda: None
    ) -> None:
        self._settings = settings
        self._given = dict(given or {})
        self._on_refusal = on_refusal
        self._lock = threading.Lock()
        self._made: dict[_Slot, Engine | AsyncEngine] = {}
        for (shard, role), engine in self._given.items():
            self._prepare(engine, shard, role, None)
        _survive_forks(self)

    def sync(self, shard: str, role: Role, endpoint: Endpoint, number: int = 0) -> Engine:
        """The engine of one endpoint for threads.

        :param number: the position among the shard's endpoints of this role.
        :raises PreconditionFailed: when the driver is not installed, or no user is set.
        """
        engine = self._given_for(shard, role, number, Engine) or self._engine(shard, role, endpoint, asynchronous=False)
        assert isinstance(engine, Engine)  # noqa: S101 - for the type checker: slots are apart
        return engine

    def asynchronous(self, shard: str, role: Role, endpoint: Endpoint, number: int = 0) -> AsyncEngine:
        """The engine of one endpoint for asyncio."""
        given = self._given_for(shard, role, number, AsyncEngine)
        engine = given or self._engine(shard, role, endpoint, asynchronous=True)
        assert isinstance(engine, AsyncEngine)  # noqa: S101
        return engine

    def probe(self, shard: str, role: Role, endpoint: Endpoint, number: int = 0) -> Engine:
        """An engine for one short question now and then: one connection, without transactions, that gives up soon."""
        given = self._given_for(shard, role, number, Engine)
        if isinstance(given, Engine):
            return given
        slot = _Slot(shard, f"{role}{_PROBE}", endpoint, asynchronous=False)
        with self._lock:
            if slot not in self._made:
                self._made[slot] = self._make_probe(slot)
            engine = self._made[slot]
        assert isinstance(engine, Engine)  # noqa: S101
        return engine

    def _make_probe(self, slot: _Slot) -> Engine:
        url = self._settings.url(slot.endpoint)
        if url.get_backend_name() == "sqlite":
            return create_engine(url)
        timeouts = {"connect_timeout": PROBE_SECONDS, "read_timeout": PROBE_SECONDS, "write_timeout": PROBE_SECONDS}
        arguments = {**self._settings.options.get("connect_args", {}), **timeouts}
        return create_engine(url, pool_size=1, max_overflow=0, isolation_level="AUTOCOMMIT", connect_args=arguments)

    def _given_for(
        self, shard: str, role: Role, number: int, kind: type[Engine | AsyncEngine]
    ) -> Engine | AsyncEngine | None:
        names = (f"{role}-{number}", str(role)) if number == 0 else (f"{role}-{number}",)
        for name in names:
            engine = self._given.get((shard, name))
            if isinstance(engine, kind):
                return engine
        return None

    def _engine(self, shard: str, role: Role, endpoint: Endpoint, *, asynchronous: bool) -> Engine | AsyncEngine:
        slot = _Slot(shard, str(role), endpoint, asynchronous)
        try:
            return self._made[slot]
        except KeyError:
            pass
        with self._lock:
            if slot not in self._made:
                self._made[slot] = self._make(slot)
            return self._made[slot]

    def _make(self, slot: _Slot) -> Engine | AsyncEngine:
        url = self._settings.url(slot.endpoint, asynchronous=slot.asynchronous)
        options = self._settings.options_for(url, asynchronous=slot.asynchronous)
        engine: Engine | AsyncEngine
        try:
            engine = (create_async_engine if slot.asynchronous else create_engine)(url, **options)
        except ModuleNotFoundError as error:
            raise PreconditionFailed(
                f"the driver of {url.drivername} is not installed", hint=f"pip install {error.name}"
            ) from error
        self._prepare(engine, slot.shard, slot.role, slot.endpoint)
        return engine

    def _prepare(self, engine: Engine | AsyncEngine, shard: str, role: str, endpoint: Endpoint | None) -> None:
        """Give an engine what shardkit needs on its connections."""
        core = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        if core.dialect.name == "sqlite":
            event.listen(core, "connect", _add_crc32)
            if endpoint is None:  # connections that the application's pool holds already
                event.listen(core, "checkout", _add_crc32_once)
        else:
            event.listen(core, "connect", _stamp)
            event.listen(core, "do_connect", _connect)
            if endpoint is None:  # connections that the application has opened, or opens in a way of its own
                event.listen(core, "checkout", _adopt)
            if role.startswith(Role.REPLICA):
                event.listen(core, "before_cursor_execute", seeing.before, retval=True)
                event.listen(core, "after_cursor_execute", seeing.after)
            event.listen(core, "reset", _set_back)
        event.listen(core, "handle_error", _Translator(shard, role, endpoint, self._on_refusal))

    def keep(self, shards: Iterable[Shard]) -> None:
        """Dispose the engines of endpoints that are not among these shards'. Connections in use end when returned."""
        wanted = {(shard.name, str(role), endpoint) for shard in shards for role, endpoint in shard.endpoints()}
        with self._lock:
            dropped = [
                slot for slot in self._made if (slot.shard, slot.role.removesuffix(_PROBE), slot.endpoint) not in wanted
            ]
            engines = [self._made.pop(slot) for slot in dropped]
        for engine in engines:
            _core(engine).dispose()

    def renew(self) -> None:
        """Have every later transaction open a connection of its own time; connections in use end when returned.

        A rebalance job closes what is older than the map that names it. Nobody notices who has renewed before that.
        """
        with self._lock:
            engines = [*self._made.values(), *self._given.values()]
        for engine in engines:
            if _core(engine).dialect.name != "sqlite":
                # an AsyncEngine's idle connections can only be closed inside its event loop: they are let go of
                _core(engine).dispose(close=not isinstance(engine, AsyncEngine))

    def dispose(self) -> None:
        """Close the pooled connections of every engine made here."""
        with self._lock:
            engines = list(self._made.values())
            self._made = {}
        for engine in engines:
            # an AsyncEngine's connections can only be closed inside its event loop: see Cluster.adispose
            _core(engine).dispose(close=not isinstance(engine, AsyncEngine))

    async def adispose(self) -> None:
        """`dispose` for the engines of asyncio, inside their event loop, and then for the others."""
        with self._lock:
            slots = [slot for slot in self._made if slot.asynchronous]
            engines = [self._made.pop(slot) for slot in slots]
        for engine in engines:
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
        self.dispose()

    def after_fork(self) -> None:
        """In a child process: pools of its own. The parent's connections are let go of without a word to the server."""
        self._lock = threading.Lock()
        for engine in (*self._made.values(), *self._given.values()):
            core = _core(engine)
            if not isinstance(core.pool, StaticPool):  # in memory: the child's copy is its own already
                core.dispose(close=False)


def _core(engine: Engine | AsyncEngine) -> Engine:
    return engine.sync_engine if isinstance(engine, AsyncEngine) else engine


_alive: weakref.WeakSet[Engines] = weakref.WeakSet()
_registered = threading.Event()


def _survive_forks(engines: Engines) -> None:
    _alive.add(engines)
    if not _registered.is_set():
        _registered.set()
        os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for engines in list(_alive):
        engines.after_fork()


# --- what every connection gets ----------------------------------------------------------------------------------


def _crc32(value: str | bytes | None) -> int | None:
    """CRC32() of MySQL and MariaDB."""
    if value is None:
        return None
    return zlib.crc32(value if isinstance(value, bytes) else str(value).encode())


def _add_crc32(connection: Any, record: Any) -> None:
    connection.create_function("crc32", 1, _crc32, deterministic=True)
    record.info["shardkit_crc32"] = True


def _add_crc32_once(connection: Any, record: Any, _proxy: Any) -> None:
    if "shardkit_crc32" not in record.info:
        _add_crc32(connection, record)


def _adopt(connection: Any, _record: Any, _proxy: Any) -> None:
    drivers.adopt(connection)


def _connect(dialect: Dialect, _record: Any, arguments: Any, options: Any) -> Any:
    """Connect, and say what to install where the server's way of checking passwords needs it."""
    try:
        return drivers.connect(dialect, arguments, options)
    except RuntimeError as error:
        if "cryptography" not in str(error):
            raise
        raise PreconditionFailed(
            "the server checks passwords with caching_sha2_password, for which the driver lacks a package",
            hint="pip install cryptography, or connect over TLS (engine_options={'connect_args': {'ssl': ...}})",
        ) from error


def wait_briefly(connection: Connection) -> None:
    """Have a connection give up on locks soon, until it goes back to its pool.

    Two transactions that wait for each other on two servers are a deadlock that neither server sees.
    """
    _set_for_now(connection, "innodb_lock_wait_timeout", f"LEAST(@@innodb_lock_wait_timeout, {LOCK_WAIT_SECONDS})")


def has_rolled_back(connection: Connection) -> bool:
    """Whether the server has undone the transaction that this connection is still taken to be in.

    A deadlock undoes a whole transaction, a lock that is waited for in vain only where the server is set so (MySQL
    Reference Manual, "InnoDB Error Handling"). What is sent afterwards begins another one.
    """
    codes: set[int] = connection.info.get(ROLLED_BACK, set())
    if codes == {_LOCK_WAIT_TIMEOUT}:
        return bool(connection.exec_driver_sql("SELECT @@innodb_rollback_on_timeout").scalar())
    return bool(codes)


def write_patiently(connection: Connection) -> None:
    """Have the server wait for a client that takes its rows slowly, until the connection goes back to its pool.

    Rows of a shard that wait for their turn in a merge are rows that nobody reads (MariaDB and MySQL manuals,
    "net_write_timeout": 60 seconds, after which the client is told that the connection was lost).
    """
    if connection.dialect.name != "sqlite":
        _set_for_now(connection, "net_write_timeout", f"GREATEST(@@net_write_timeout, {STREAM_SECONDS})")


def _set_for_now(connection: Connection, variable: str, value: str) -> None:
    changed = connection.info.setdefault(_CHANGED, set())
    if variable not in changed:
        kept = f"@shardkit_{variable}"
        connection.exec_driver_sql(f"SET {kept} = @@{variable}, {variable} = CAST({value} AS UNSIGNED)")
        changed.add(variable)


def _set_back(connection: Any, record: Any, state: Any) -> None:
    changed = None if record is None else record.info.pop(_CHANGED, None)
    if not changed or not state.asyncio_safe:
        return  # as it was, or not to be spoken to any more
    cursor = connection.cursor()
    try:
        cursor.execute("SET " + ", ".join(f"{variable} = @shardkit_{variable}" for variable in sorted(changed)))
    finally:
        cursor.close()


def _stamp(connection: Any, record: Any) -> None:
    """Note the oldest map version that the server takes from clients, as of now."""
    cursor = connection.cursor()
    try:
        cursor.execute(f"SELECT min_map_version FROM {MAP_VERSION_TABLE} WHERE id = 1")
        row = cursor.fetchone()
    except Exception as error:
        if _code(error) != _NO_SUCH_TABLE:
            raise
        row = None
    finally:
        cursor.close()
        connection.rollback()  # the SELECT has opened a transaction
    record.info[MAP_VERSION_STAMP] = 0 if row is None else int(row[0])


def _code(error: BaseException) -> int | None:
    """The server's error number, where the driver's error carries one."""
    code = error.args[0] if error.args else None
    return code if isinstance(code, int) else None


def is_down(error: ShardUnreachable) -> bool:
    """Whether nobody answered, rather than that somebody refused the log-on or the database."""
    return _code(error.orig or error) not in {*_ACCESS_DENIED, _UNKNOWN_DATABASE}


class _Translator:
    """Turns driver errors that mean something to shardkit into its own, and names the shard in all others."""

    def __init__(self, shard: str, role: str, endpoint: Endpoint | None, on_refusal: Callable[[], None]) -> None:
        self._shard = shard
        self._role = role
        self._endpoint = endpoint
        self._on_refusal = on_refusal

    def __call__(self, context: ExceptionContext) -> BaseException | None:
        error = context.original_exception
        place = f"shard {self._shard}, {self._role}" + (f" {self._endpoint}" if self._endpoint else "")
        if context.connection is None and not context.is_pre_ping and context.sqlalchemy_exception is not None:
            return self._unreachable(error, place)
        message = _text(error)
        if _code(error) in _UNDOING and context.connection is not None:
            context.connection.info.setdefault(ROLLED_BACK, set()).add(_code(error))
        if _code(error) == _SIGNAL and message.startswith(_REFUSAL):
            self._on_refusal()
            return bucket_closed(message, place)
        if context.sqlalchemy_exception is not None:
            context.sqlalchemy_exception.add_detail(f"({place})")
        return None

    def _unreachable(self, error: BaseException, place: str) -> ShardUnreachable:
        code = _code(error)
        if code in _ACCESS_DENIED:
            fault, hint = "the server refused the log-on", "check SHARDKIT_USER and SHARDKIT_PASSWORD, or credentials="
        elif code == _UNKNOWN_DATABASE:
            fault, hint = "the database does not exist", "create it, or mend the endpoint in the shard map"
        else:
            fault, hint = "cannot be reached", "check that the server runs and that the shard map names its address"
        return ShardUnreachable(f"{place}: {fault}: {_text(error)}", shard=self._shard, orig=error, hint=hint)


def _text(error: BaseException) -> str:
    """The driver's message without its number."""
    text = str(error.args[1]) if len(error.args) > 1 else str(error)
    return text or type(error).__name__


def bucket_closed(message: str, place: str) -> BucketClosed:
    """Read a refusal of shardkit's triggers: ``shardkit: bucket 12 of keyspace orders is frozen; moved_to=shop-1``."""
    what, _, fields = message.removeprefix(_REFUSAL).strip().partition(";")
    moved_to = fields.strip().removeprefix("moved_to=").strip() or None
    return BucketClosed(
        f"{what} ({place}): the write was refused",
        moved_to=moved_to,
        hint="roll back and run the transaction again: the shard map is being refreshed",
    )
