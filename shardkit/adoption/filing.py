"""Rows of a keyspace by directory whose keys were never filed: written before shardkit came, or past it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import sqlalchemy as sa

from shardkit import directory, own_tables
from shardkit.adoption.tables import read_tables
from shardkit.credentials import CredentialSource
from shardkit.engines import Engines, EngineSettings
from shardkit.errors import PreconditionFailed
from shardkit.partition import DirectoryPartition, KeyColumn, key_text_expression
from shardkit.shardmap import Keyspace, ShardMap
from shardkit.topology import Role

_BATCH = 1000


@dataclass
class Filing:
    """How a keyspace's rows and its directory fit together.

    :param keys: how many different keys have rows.
    :param unfiled: keys that have rows on one shard and no entry: shard -> the keys' texts.
    :param astray: what no entry can mend, one sentence each: keys with rows where their entry does not lead.
    """

    keys: int = 0
    unfiled: dict[str, list[str]] = field(default_factory=dict)
    astray: list[str] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """How many keys have rows and no entry."""
        return sum(map(len, self.unfiled.values()))


class Filer:
    """Compares the rows of a keyspace by directory with its entries, and makes up what is missing.

    :raises PreconditionFailed: for a keyspace that is not by directory.
    """

    def __init__(self, shard_map: ShardMap, keyspace: Keyspace, credentials: CredentialSource) -> None:
        if keyspace.directory is None:
            raise PreconditionFailed(
                f"keyspace {keyspace.name!r} is not partitioned by a directory", hint="see 'shardkit map show'"
            )
        self._map = shard_map
        self._keyspace = keyspace
        self._partition: DirectoryPartition = keyspace.directory
        self._engines = Engines(EngineSettings(credentials))

    def close(self) -> None:
        """Close the connections."""
        self._engines.dispose()

    def look(self) -> Filing:
        """Read the keys of every row, and their entries. Keys that the partition's normalization takes for one count
        as one. Reads each table of the keyspace once, in full."""
        shards_of: dict[str, set[str]] = {}
        unknown: dict[str, str] = {}
        for shard in self._keyspace.shards:
            for raw in self._texts(self._engine(shard)):
                try:
                    text = self._partition.text_of((raw,)) or ""
                except TypeError as error:
                    unknown.setdefault(raw, f"the key {raw!r} has rows on {shard}, and cannot be entered: {error}")
                else:
                    shards_of.setdefault(text, set()).add(shard)
        found = Filing(len(shards_of) + len(unknown), astray=[*unknown.values()])
        entries = self._entries(list(shards_of))
        for text, shards in shards_of.items():
            bucket = entries.get((self._keyspace.name, text))
            rows = ", ".join(sorted(shards))
            if bucket is None and len(shards) == 1:
                found.unfiled.setdefault(rows, []).append(text)
            elif bucket is None:
                found.astray.append(f"the key {text!r} has rows on {rows}")
            elif shards != {holder := self._keyspace.placement.get(bucket, "no shard")}:
                found.astray.append(f"the key {text!r} has rows on {rows}; its entry leads to {holder} ({bucket})")
        return found

    def fill(self, found: Filing) -> int:
        """Enter the keys that have no entry, each in a bucket of the shard where its rows are.

        :returns: how many were entered; a key that somebody else entered meanwhile is not counted, and is added to
            ``found.astray`` where it was given to another shard.
        """
        home = self._engine(self._partition.home)
        own_tables.ensure(home, home)
        entered = 0
        for shard, texts in found.unfiled.items():
            buckets = [str(bucket) for bucket in self._keyspace.buckets_on(shard)]
            for start in range(0, len(texts), _BATCH):
                wanted = {
                    (self._partition, text): buckets[zlib.crc32(text.encode()) % len(buckets)]
                    for text in texts[start : start + _BATCH]
                }
                with home.begin() as connection:
                    now = directory.file(connection, wanted)
                for (_, text), bucket in wanted.items():
                    holder = now[self._keyspace.name, text]
                    if holder == bucket:
                        entered += 1
                    elif (place := self._keyspace.placement.get(str(holder), "no shard")) != shard:
                        found.astray.append(
                            f"the key {text!r} has rows on {shard}; its entry, made meanwhile, leads to {place}"
                        )
        return entered

    def _engine(self, shard: str) -> sa.Engine:
        return self._engines.sync(shard, Role.MASTER, self._map.shard(shard).master)

    def _texts(self, engine: sa.Engine) -> Iterator[str]:
        tables = read_tables(engine)
        for name, (key,) in self._keyspace.tables.items():
            facts = tables.get(name)
            column = None if facts is None else facts.columns.get(key)
            if column is None or column.kind is None:
                raise PreconditionFailed(
                    f"{name}.{key} is not there, or is of no type that can be a key",
                    hint="see 'shardkit map validate --connect'",
                )
            expression = sa.column(key, column.type)
            text = key_text_expression([KeyColumn(expression, column.kind)])
            # as bytes: the collation of a text may take different keys as equal
            query = (
                sa.select(sa.cast(text, sa.LargeBinary))
                .distinct()
                .select_from(sa.table(name))
                .where(expression.is_not(None))
            )
            with engine.connect().execution_options(stream_results=True, yield_per=_BATCH) as connection:
                for (found,) in connection.execute(query):
                    yield bytes(found).decode()

    def _entries(self, texts: list[str]) -> dict[tuple[str, str], str | None]:
        home = self._engine(self._partition.home)
        if not sa.inspect(home).has_table(own_tables.directory.name):
            return {}
        with home.connect() as connection:
            return dict(directory.read(connection, [(self._partition, text) for text in texts]))


@contextmanager
def filer(shard_map: ShardMap, keyspace: Keyspace, credentials: CredentialSource) -> Iterator[Filer]:
    """A `Filer` whose connections are closed at the end."""
    with closing(Filer(shard_map, keyspace, credentials)) as made:
        yield made


def misfiled(shard_map: ShardMap, credentials: CredentialSource) -> Iterator[str]:
    """What is wrong with the directories of a map, one sentence each."""
    for keyspace in shard_map.keyspaces.values():
        if keyspace.directory is None:
            continue
        with filer(shard_map, keyspace, credentials) as made:
            found = made.look()
        if found.missing:
            yield (
                f"keyspace {keyspace.name}: {found.missing} of {found.keys} keys that have rows are not in the "
                f"directory, so reads by key do not find them: 'shardkit directory fill {keyspace.name}' enters them"
            )
        yield from (f"keyspace {keyspace.name}: {sentence}" for sentence in found.astray)
