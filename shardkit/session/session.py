"""A SQLAlchemy Session over the shards of a cluster.

What differs from `sqlalchemy.orm.Session`: each statement is planned and sent to the shards that its rows are on
(statements.py); objects know their shard (identity.py) and are written there (this file). The methods that replace
SQLAlchemy's own are pinned by tests/unit/test_session_hooks.py.
"""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import event
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import InstanceState

from shardkit.errors import StaleReadError
from shardkit.session.flush import Flush
from shardkit.session.homes import home_of
from shardkit.session.inflush import InFlushSession
from shardkit.session.moving import move
from shardkit.session.rechecking import recheck
from shardkit.session.transacting import Target


class ClusterSession(InFlushSession):
    """A `sqlalchemy.orm.Session` whose statements and objects go to the shards of their keys.

    Made by `shardkit.sessionmaker`, which documents the options.
    """

    def move(self, instance: object, key: Any) -> None:
        """Give a loaded object another shard key, and move it to the shard of that key.

        Its row is written anew, and with it the rows of the same key in the same keyspace that its relationships
        (one to many, not viewonly) lead to, and theirs. All of it is part of the session's transaction: under
        ``transactions="atomic"`` it has moved everywhere or nowhere. Loaded objects stay the same objects.

        With asyncio: ``await session.run_sync(lambda session: session.move(order, 7))``.

        :param key: the new value of the shard key, as the application has it; of several columns, a mapping by name.
        :raises RoutingError: for an object that cannot be moved, before anything is written.
        """
        move(self, instance, key)

    def merge(self, instance: Any, *, load: bool = True, options: Any = None) -> Any:
        """As `sqlalchemy.orm.Session.merge`; the rows to merge into are read on their masters."""
        with self.reading_masters():
            return super().merge(instance, load=load, options=options)

    def _follow_keys(self) -> None:
        """After a rollback has given moved objects their old keys back."""
        for state in self.identity_map.all_states():
            if state.key is not None and state.identity_token != state.key[2]:
                state.identity_token = state.key[2]

    def _flush(self, objects: Sequence[Any] | None = None) -> None:
        if not self._dirty_states and not self._deleted and not self._new:
            super()._flush(objects)
            return
        flush = Flush(self, self._outermost().view)
        carried, self._carried = self._carried, None
        self.flush_at_work = flush
        self.connection_callable = flush.connection_for  # type: ignore[assignment]
        try:
            self._before_flush(flush)
            super()._flush(objects)
        finally:
            self.connection_callable = None
            self.flush_at_work = None
            self._carried = carried

    def _before_flush(self, flush: Flush) -> None:
        """Decide what can be decided before anything is sent."""
        written: set[InstanceState[Any]] = set()
        try:
            flush.prepare(self._new, set(self._dirty_states).difference(self._deleted), self._deleted)
            transaction = self._outermost()
            if self._recheck and (self._from_replicas or transaction.has_read_replicas):
                written.update(self._written_along())  # before what is not changed is expired
                self._turn_to_masters({s for state in written for s in self._shards_of(state, transaction.view)})
            self.admit_writes(flush.touched)
            written.update({*self._dirty_states, *self._deleted}.difference(flush.unchanged))
            self._check_what_replicas_showed(written)
        except BaseException as error:
            self._deactivate()
            if isinstance(error, StaleReadError):
                self._read_again(written)
            raise

    def _check_what_replicas_showed(self, written: Iterable[InstanceState[Any]]) -> None:
        """:raises StaleReadError: where one of these is not as on its master."""
        if states := self.to_recheck(written):
            recheck(self, states)
            self.forget_replicas(states)

    def _read_again(self, states: Iterable[InstanceState[Any]]) -> None:
        """What was not written because it is not as on the master: the next look at it is one at the master."""
        stale = [state for state in self.to_recheck(states) if self.identity_map.contains_state(state)]
        for state in stale:
            state._expire(state.dict, self.identity_map._modified)
        self.forget_replicas(stale)

    def _register_persistent(self, states: set[InstanceState[Any]]) -> None:
        if self.flush_at_work is not None:
            self.flush_at_work.verify(states)
        super()._register_persistent(states)
        self.loaded_copies.renew(states)

    def _bulk_save_mappings(self, mapper: Any, mappings: Any, **options: Any) -> None:
        mapped = sa_inspect(mapper).mapper
        home = home_of(self._outermost().view, mapped)
        groups: dict[str, list[Any]] = {}
        flush = Flush(self, self._outermost().view)
        items = []
        for given in mappings:
            item = flush.completed(
                home,
                mapped,
                given,
                update=options["isupdate"],
                states=options["isstates"],
                nulls=options["render_nulls"],
                changed_only=options["update_changed_only"],
            )
            if item is not given and options["return_defaults"]:
                given.update(item)
                item = given
            items.append(item)
        placed = flush.shards_of_items(home, items, is_state=options["isstates"])
        for item, shards in zip(items, placed, strict=True):
            for shard in shards:
                groups.setdefault(shard, []).append(item)
                if not home.replicated:
                    state, update = options["isstates"], options["isupdate"]
                    flush.check_item(home, mapped, item, shard, is_state=state, update=update)
        self.admit_writes(groups)
        if home.replicated and groups:
            flush.refuse_shared_schema(home, {shard: self.connection_to_write(shard) for shard in groups})
        if options["isstates"] and options["isupdate"]:
            try:
                self._check_what_replicas_showed(items)
            except BaseException:
                self._deactivate()
                raise
        for shard, group in groups.items():
            with self._carrying(Target(shard, master=True, replica=False)):
                super()._bulk_save_mappings(mapper, group, **options)


@event.listens_for(ClusterSession, "after_soft_rollback")
def _after_rollback(session: ClusterSession, _transaction: Any) -> None:
    session.forget_replicas([state for state in session._from_replicas if state.expired])
    session._follow_keys()
