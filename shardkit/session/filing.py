"""Keyspaces by directory in sessions: keys are looked up, and new ones filed in the transaction of their first row."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection

from shardkit import directory
from shardkit.directory import Entries, FiledKey
from shardkit.session.transacting import Target, TransactingSession
from shardkit.session.transaction import CommitMode

T = TypeVar("T")


class FilingSession(TransactingSession):
    """A session that knows where the keys of keyspaces by directory are."""

    def looked_up(
        self, work: Callable[[], T], *, new: bool = False, known: dict[tuple[str, str], str | None] | None = None
    ) -> T:
        """Run ``work``, which only looks, with the directory's entries that it asks for.

        :param new: whether keys without an entry are given one: rows of them are about to be written.
        :param known: what an earlier call of the same flush has found out; added to.
        """
        return directory.with_lookups(work, partial(self._entries, new=new, known={} if known is None else known))

    def _entries(self, keys: Collection[FiledKey], *, new: bool, known: dict[tuple[str, str], str | None]) -> Entries:
        unknown = [(partition, text) for partition, text in keys if known.get((partition.keyspace, text)) is None]
        for home, some in directory.by_home(unknown).items():
            known.update(self._read(home, some))
        missing = [(partition, text) for partition, text in unknown if known[partition.keyspace, text] is None]
        if new and missing:
            known.update(self._file(missing))
        return known

    def _read(self, home: str, keys: Collection[FiledKey]) -> Entries:
        """What is committed, and what this transaction has filed. The transaction's own view of the home may be older
        than rows that it will meet on other shards, or that it changes."""
        transaction = self._outermost()
        if self.connections is not None or transaction.view.planner.dialect_name == "sqlite":
            return directory.read(self._connection_to(home), keys)
        found = dict(self.run_blocking(lambda: self.cluster.look_up(home, keys)))
        missing = [(partition, text) for partition, text in keys if found[partition.keyspace, text] is None]
        if missing and home in transaction.filed:
            found.update(directory.read(self._connection_to(home), missing))  # not to be remembered
        return found

    def _connection_to(self, home: str) -> Connection:
        if home in self._outermost().filed:
            return self.connection_to_write(home)
        return self._connection_for_bind(self.get_bind(shardkit_target=Target(home, master=False, replica=False)))

    def _file(self, keys: Collection[FiledKey]) -> Entries:
        wanted = {(partition, text): partition.first_bucket_of(text) for partition, text in keys}
        entries: dict[tuple[str, str], str | None] = {}
        homes = directory.by_home(keys)
        if self.commit_mode is CommitMode.SINGLE:  # refused before anything is sent
            keyspaces = self._outermost().view.map.keyspaces
            rows = (keyspaces[partition.keyspace].placement[bucket] for (partition, _), bucket in wanted.items())
            self.admit_writes(dict.fromkeys([*homes, *rows]))
        for home, some in homes.items():
            if self.connections is None and self._outermost().view.planner.dialect_name != "sqlite":
                self.run_blocking(partial(self.cluster.ensure_own_tables, home))
            self._outermost().filed.add(home)
            entries.update(directory.file(self.connection_to_write(home), {key: wanted[key] for key in some}))
        return entries
