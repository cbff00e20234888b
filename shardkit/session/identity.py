"""Objects and their shards: get(), the identity map, and what becomes of loaded objects when their rows move."""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import inspect as sa_inspect
from sqlalchemy import select
from sqlalchemy.exc import MultipleResultsFound
from sqlalchemy.orm import InstanceState, Mapper, class_mapper, loading
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.base import PassiveFlag
from sqlalchemy.util import EMPTY_DICT

from shardkit.cluster import Cluster
from shardkit.errors import RoutingError, StaleShardMap, UnknownTable
from shardkit.session.filing import FilingSession
from shardkit.session.homes import home_of
from shardkit.session.replicated import OneForEachRow
from shardkit.session.tokens import load_with_token
from shardkit.session.transaction import ReplanNeeded
from shardkit.snapshots import View

_SEVERAL = (tuple, list)


class IdentitySession(FilingSession):
    """A session whose objects carry the shard that they live on in their identity."""

    def __init__(self, cluster: Cluster, **options: Any) -> None:
        super().__init__(cluster, **options)
        self._replicated_classes: dict[type[Any], bool] = {}
        self._know_replicated_rows()

    def expunge_all(self) -> None:
        """As `sqlalchemy.orm.Session.expunge_all`."""
        super().expunge_all()
        self._know_replicated_rows()

    def _know_replicated_rows(self) -> None:
        shard_map = self.cluster.map
        if len(shard_map.shards) > 1 and any(keyspace.reference for keyspace in shard_map.keyspaces.values()):
            self.identity_map._dict = OneForEachRow(self._is_replicated)

    def _is_replicated(self, class_: type[Any]) -> bool:
        known = self._replicated_classes.get(class_)
        if known is None:
            try:
                known = home_of(self._outermost().view, class_mapper(class_)).replicated
            except (RoutingError, UnknownTable):
                known = False
            self._replicated_classes[class_] = known
        return known

    def _get_impl(self, entity: Any, primary_key_identity: Any, db_load_fn: Any, **options: Any) -> Any:
        if self._from_replica and self._outermost().has_written:
            with self.reading_masters():
                return self._get_impl(entity, primary_key_identity, db_load_fn, **options)
        if db_load_fn is loading._load_on_pk_identity:
            db_load_fn = load_with_token
        mapper: Mapper[Any] | None = getattr(entity, "__dict__", {}).get("__mapper__") or sa_inspect(entity)
        if mapper is None or not mapper.is_mapper:
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)
        if options.get("identity_token") is not None:
            # merge() gives the shard that an object was loaded from: its row may have moved since
            shard = self._shard_to_get(mapper, primary_key_identity, options)
            options["identity_token"] = shard or options["identity_token"]
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)
        options["identity_token"] = self._shard_to_get(mapper, primary_key_identity, options)
        try:
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)
        except ReplanNeeded:
            options["identity_token"] = self._shard_to_get(mapper, primary_key_identity, options)
            return super()._get_impl(entity, primary_key_identity, db_load_fn, **options)

    def _shard_to_get(self, mapper: Mapper[Any], identity: Any, options: Mapping[str, Any]) -> str | None:
        given = options.get("execution_options") or self.execution_options
        if given and (given.get("shardkit_shard") or given.get("shardkit_key")):
            return None  # the planner reads them
        values = identity if isinstance(identity, _SEVERAL) else (identity,)
        if isinstance(identity, dict) or len(values) != len(mapper.primary_key):
            return None  # SQLAlchemy makes it a tuple, or refuses it
        return home_of(self._outermost().view, mapper).shard_of_identity(values)

    def _identity_lookup(
        self,
        mapper: Mapper[Any],
        primary_key_identity: Any,
        identity_token: Any = None,
        passive: PassiveFlag = PassiveFlag.PASSIVE_OFF,
        lazy_loaded_from: InstanceState[Any] | None = None,
        execution_options: Any = EMPTY_DICT,  # noqa: ARG002 - the base's signature
        bind_arguments: Any = None,  # noqa: ARG002
    ) -> Any:
        if identity_token is not None:
            return super()._identity_lookup(mapper, primary_key_identity, identity_token, passive, lazy_loaded_from)
        if not self.identity_map._dict:  # nothing there: the usual case of a first get()
            return None
        look = partial(self._look, mapper, primary_key_identity, passive, lazy_loaded_from)
        home = home_of(self._outermost().view, mapper)
        shard = home.shard_of_identity(tuple(primary_key_identity))
        if shard is not None:
            return look(shard)
        # a reference row that came with rows of a sharded table has the shard of those
        tokens = home.info.shards if home.tokened else (None, *home.info.shards) if home.replicated else (None,)
        found = [instance for instance in map(look, tokens) if instance is not None]
        if len(found) > 1 and home.tokened:
            raise MultipleResultsFound(
                f"several shards have a {mapper.class_.__name__} {tuple(primary_key_identity)}: its primary key does "
                f"not hold the shard key of {home.table.name!r}"
            )
        return found[0] if found else None

    def _look(
        self,
        mapper: Mapper[Any],
        identity: Any,
        passive: PassiveFlag,
        lazy_loaded_from: InstanceState[Any] | None,
        token: str | None,
    ) -> Any:
        return super()._identity_lookup(mapper, identity, token, passive, lazy_loaded_from)

    def _before_attach(self, state: InstanceState[Any], obj: object) -> bool:
        attaching = super()._before_attach(state, obj)
        if attaching and state.key is not None:
            self._place_again(state, state.key)
        return attaching

    def _place_again(self, state: InstanceState[Any], key: Any) -> None:
        """A detached object comes in: its row may have moved since it was loaded."""
        home = home_of(self._outermost().view, state.mapper)
        if not home.tokened:
            return
        state.identity_token = key[2]  # merge(load=False) leaves it out, and a flush would take the row for another
        if any(part.attribute in state.committed_state for part in home.key):
            return
        shard = home.shard_of_key(home.key_of(state))
        if shard is not None and shard != key[2]:
            state.key = (key[0], key[1], shard)
            state.identity_token = shard

    def use_view(self, view: View) -> None:
        """A transaction begins on this map: objects whose rows have moved meanwhile get their new shard."""
        if view.map.version != self._map_version:
            if self._map_version:
                self._rehome(view)
            self._map_version = view.map.version

    def _rehome(self, view: View) -> None:
        for state in self.identity_map.all_states():
            home = home_of(view, state.mapper)
            shard = home.shard_of_key(home.key_of(state)) if home.tokened else None
            if home.tokened and shard is None:
                self._unplaced.add(state)
            else:
                self._move_identity(state, shard)

    def _move_identity(self, state: InstanceState[Any], shard: str | None) -> None:
        self._unplaced.discard(state)
        if state.key is not None and state.key[2] != shard:
            self.identity_map.safe_discard(state)
            state.key = (state.key[0], state.key[1], shard)
            state.identity_token = shard
            self.identity_map.replace(state)

    def find_shard(self, state: InstanceState[Any]) -> str:
        """Where the row of an object is now, whose key is not loaded: it was loaded before buckets moved, or made by
        `sqlalchemy.orm.make_transient_to_detached`.

        :raises StaleShardMap: when it is not to be found, or was found before as another object.
        :raises RoutingError: the same, of an object that was not loaded at all.
        """
        mapper, identity = state.mapper, state.identity
        assert identity is not None  # noqa: S101 - it has been loaded before
        home = home_of(self._outermost().view, mapper)
        key = home.key_of(state)
        shard = None if key is None else self.looked_up(lambda: home.placed_by(key))
        if shard is not None:
            self._move_identity(state, shard)
            return shard
        known = set(self.identity_map.all_states())
        statement = select(mapper).where(
            *(column == value for column, value in zip(mapper.primary_key, identity, strict=True))
        )
        with self.no_autoflush:
            rows = self.execute(statement).unique().scalars().all()
        found = [instance_state(row) for row in rows]
        if found == [state] and state.key is not None:  # its row has not moved
            self._unplaced.discard(state)
            return str(state.key[2])
        if len(found) != 1 or found[0] in known or found[0].key is None:
            if state.key is not None and state.key[2] is None:
                there = "is in this session already" if found else "is on no shard"
                raise RoutingError(
                    f"{mapper.class_.__name__} {tuple(identity)} was given to the session as an object with a row, and "
                    f"this row {there}",
                    table=home.table.name,
                    key=[part.column for part in home.key],
                    shards=len(home.info.shards),
                    hint="load the object with get(), or give it its key, too",
                )
            raise StaleShardMap(
                f"the row of {mapper.class_.__name__} {tuple(identity)} is not where it was before its buckets moved",
                hint="load it again by its key",
            )
        shard = str(found[0].key[2])
        self.expunge(rows[0])
        self._move_identity(state, shard)
        return shard

    def is_unplaced(self, state: InstanceState[Any]) -> bool:
        """Whether an object's shard is not known since buckets moved."""
        return state in self._unplaced
