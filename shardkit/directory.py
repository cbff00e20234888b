"""Keyspaces by directory: a table on the keyspace's home shard says for each key which bucket it is in.

A row of such a keyspace is written in one transaction with its key's entry in the table, if that is new; entries are
never changed and outlive their rows, so what is known of a key stays true and is cached. A key without an entry has no
rows.

Planning touches no database. So a lookup that the cache cannot answer raises `KeyNotLookedUp`; whoever planned fetches
what was asked for and plans again (`with_lookups`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import ProgrammingError

from shardkit.errors import MissingKey, PreconditionFailed, ShardkitError, StaleShardMap
from shardkit.own_tables import directory as table
from shardkit.partition import DirectoryPartition
from shardkit.shardmap import ShardMap

T = TypeVar("T")

#: Keys whose buckets one process remembers.
CACHED_KEYS: Final = 100_000
#: Bytes of a key's canonical text that the table holds.
LONGEST_KEY: Final = 512
_KEYS_A_QUERY: Final = 1000
_ROUNDS: Final = 100
_NO_SUCH_TABLE: Final = 1146

#: A key of a keyspace by directory: its keyspace's partition, and its canonical text.
FiledKey: TypeAlias = tuple[DirectoryPartition, str]
#: Keyspace and canonical text -> bucket; None where the key has no entry.
Entries: TypeAlias = Mapping[tuple[str, str], str | None]


class KeyNotLookedUp(Exception):
    """The bucket of a key is not known in this process: its entry has to be read first."""


@dataclass
class _Answers:
    """What was read for one statement.

    :param collecting: whether every further question is noted rather than raised, and answered with any bucket.
    """

    known: dict[tuple[str, str], str | None] = field(default_factory=dict)
    asked: dict[tuple[str, str], DirectoryPartition] = field(default_factory=dict)
    collecting: bool = False


_answers: ContextVar[_Answers | None] = ContextVar("shardkit_directory_answers", default=None)


class Directory:
    """What one process knows of the lookup tables."""

    def __init__(self, *, on_unknown_bucket: Callable[[], None]) -> None:
        """:param on_unknown_bucket: called when a key is in a bucket that its map lacks; must not block."""
        self._on_unknown_bucket = on_unknown_bucket
        self._known: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """In a child process: a thread of the parent's may have held the lock."""
        self._lock = threading.Lock()

    def bound(self, shard_map: ShardMap) -> ShardMap:
        """The map, with keyspaces by directory that ask here."""
        return shard_map.with_lookup(self._lookup)

    def _lookup(self, partition: DirectoryPartition, text: str) -> str | None:
        key = partition.keyspace, text
        bucket = self._known.get(key)
        if bucket is not None:
            return self._checked(partition, bucket)
        answers = _answers.get()
        if answers is None:
            raise KeyNotLookedUp
        if key in answers.known:
            bucket = answers.known[key]
            return bucket if bucket is None else self._checked(partition, bucket)
        answers.asked[key] = partition
        if not answers.collecting:
            raise KeyNotLookedUp
        return partition.names[0]

    def _checked(self, partition: DirectoryPartition, bucket: str) -> str:
        if bucket in partition.names:
            return bucket
        self._on_unknown_bucket()
        raise StaleShardMap(
            f"a key of keyspace {partition.keyspace!r} is filed under bucket {bucket!r}, which this version of the map "
            "does not have",
            hint="run the transaction again: a newer map may know it",
        )

    def remember(self, entries: Entries) -> None:
        """Take in entries that are committed."""
        with self._lock:
            self._known.update({key: bucket for key, bucket in entries.items() if bucket is not None})
            while len(self._known) > CACHED_KEYS:
                del self._known[next(iter(self._known))]


def with_lookups(work: Callable[[], T], fetch: Callable[[Collection[FiledKey]], Entries]) -> T:
    """Run ``work``, which only looks and may run more than once, with the entries that it asks for.

    :param fetch: reads entries; of each key that it is asked for the answer says something, None included.
    """
    try:
        return work()
    except KeyNotLookedUp:
        pass
    answers = _Answers()
    for _ in range(_ROUNDS):
        with _answering(answers, collecting=True), suppress(ShardkitError):
            work()  # its verdict counts only once all is known
        _fetch_asked(answers, fetch)
        try:
            with _answering(answers):
                return work()
        except KeyNotLookedUp:
            _fetch_asked(answers, fetch)
    raise PreconditionFailed("the keys of this statement change each time that it is looked at")


def _fetch_asked(answers: _Answers, fetch: Callable[[Collection[FiledKey]], Entries]) -> None:
    if answers.asked:
        answers.known.update(fetch([(partition, text) for (_, text), partition in answers.asked.items()]))
        answers.asked.clear()


@contextmanager
def _answering(answers: _Answers, *, collecting: bool = False) -> Iterator[None]:
    answers.collecting = collecting
    token = _answers.set(answers)
    try:
        yield
    finally:
        _answers.reset(token)


# --- the table ---------------------------------------------------------------------------------------------------


def by_home(keys: Iterable[FiledKey]) -> Mapping[str, list[FiledKey]]:
    """The keys by the shard whose database has their entries."""
    homes: dict[str, list[FiledKey]] = {}
    for partition, text in keys:
        homes.setdefault(partition.home, []).append((partition, text))
    return homes


def read(connection: sa.Connection, keys: Collection[FiledKey], *, locked: bool = False) -> Entries:
    """The entries of these keys, on their home.

    :param locked: wait for transactions that are about to write them, and see what they wrote.
    """
    found: dict[tuple[str, str], str | None] = {(partition.keyspace, text): None for partition, text in keys}
    if connection.dialect.name == "sqlite" and not sa.inspect(connection).has_table(table.name):
        return found
    try:
        found.update(_entries(connection, keys, locked=locked))
    except ProgrammingError as error:
        if error.orig is None or not error.orig.args or error.orig.args[0] != _NO_SUCH_TABLE:
            raise
    return found


def _entries(connection: sa.Connection, keys: Collection[FiledKey], *, locked: bool) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    names: dict[str, list[bytes]] = {}
    for partition, text in keys:
        names.setdefault(partition.keyspace, []).append(text.encode())
    for keyspace, texts in names.items():
        for start in range(0, len(texts), _KEYS_A_QUERY):
            some = texts[start : start + _KEYS_A_QUERY]
            query = sa.select(table.c.key_text, table.c.bucket).where(
                table.c.keyspace == keyspace, table.c.key_text.in_(some)
            )
            for text, bucket in connection.execute(query.with_for_update() if locked else query):
                found[keyspace, bytes(text).decode()] = bucket
    return found


def read_beside(engine: sa.Engine, keys: Collection[FiledKey]) -> Entries:
    """`read` for SQLite, where a connection may be one that a session is using: its transaction is left alone."""
    found: dict[tuple[str, str], str | None] = {(partition.keyspace, text): None for partition, text in keys}
    pooled: Any = engine.raw_connection()
    try:
        cursor = pooled.cursor()
        cursor.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table.name,))
        for keyspace, text in found if cursor.fetchone() else ():
            cursor.execute(
                f"SELECT bucket FROM {table.name} WHERE keyspace = ? AND key_text = ?", (keyspace, text.encode())
            )
            row = cursor.fetchone()
            found[keyspace, text] = None if row is None else str(row[0])
        cursor.close()
    finally:
        pooled._close_special(transaction_reset=True)  # noqa: SLF001 - the only way back to the pool without a ROLLBACK
    return found


def file(connection: sa.Connection, wanted: Mapping[FiledKey, str]) -> Entries:
    """Enter keys that may be new, in the connection's transaction.

    :param wanted: key -> the bucket for it, where nobody has entered it before.
    :returns: what the table says now: of two who enter the same key, the first says where.
    :raises MissingKey: for a key that is too long.
    """
    for partition, text in wanted:
        if len(text.encode()) > LONGEST_KEY:
            raise MissingKey(
                f"a key of keyspace {partition.keyspace!r} is longer than the {LONGEST_KEY} bytes of the directory",
                hint="use a shorter key, or a hash partition",
            )
    if connection.dialect.name == "sqlite":
        table.create(connection, checkfirst=True)
    rows = [
        {"keyspace": keyspace, "key_text": text, "bucket": bucket}
        for keyspace, text, bucket in sorted(
            (partition.keyspace, text.encode(), bucket) for (partition, text), bucket in wanted.items()
        )
    ]
    for start in range(0, len(rows), _KEYS_A_QUERY):
        connection.execute(_quiet_insert(connection, rows[start : start + _KEYS_A_QUERY]))
    return read(connection, wanted.keys(), locked=True)


def _quiet_insert(connection: sa.Connection, rows: Collection[Mapping[str, object]]) -> sa.Insert:
    if connection.dialect.name == "sqlite":
        return sqlite_insert(table).values(list(rows)).on_conflict_do_nothing()
    # not IGNORE, which would also ignore a value that does not fit
    return mysql_insert(table).values(list(rows)).on_duplicate_key_update(bucket=table.c.bucket)
