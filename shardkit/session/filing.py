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
        own = self._own_connection(home)
        if own is not None:
            return directory.read(own, keys)  # may be of this very transaction: not to be remembered
        return self.run_blocking(lambda: self.cluster.look_up(home, keys))

    def _own_connection(self, home: str) -> Connection | None:
        """The transaction's connection to the home, which sees what it has filed; None where it has none."""
        transaction = self._outermost()
        sqlite = transaction.view.planner.dialect_name == "sqlite"
        if not sqlite:
            self.run_blocking(lambda: self.cluster.ensure_own_tables(home))
        if sqlite or self.connections is not None:
            bind = self.get_bind(shardkit_target=Target(home, master=False, replica=False))
            return self._connection_for_bind(bind)
        return transaction.master_connection(home)

    def _file(self, keys: Collection[FiledKey]) -> Entries:
        wanted = {(partition, text): partition.first_bucket_of(text) for partition, text in keys}
        entries: dict[tuple[str, str], str | None] = {}
        homes = directory.by_home(keys)
        if self.commit_mode is CommitMode.SINGLE:  # refused before anything is sent
            keyspaces = self._outermost().view.map.keyspaces
            rows = (keyspaces[partition.keyspace].placement[bucket] for (partition, _), bucket in wanted.items())
            self.admit_writes(dict.fromkeys([*homes, *rows]))
        for home, some in homes.items():
            entries.update(directory.file(self.connection_to_write(home), {key: wanted[key] for key in some}))
        return entries
