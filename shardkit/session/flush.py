"""A flush over shards: which connection each object is written on, in an order that lets rows of one shard batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sqlalchemy import Column, Connection, Insert, Select, Table
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.base import PassiveFlag
from sqlalchemy.orm.interfaces import RelationshipDirection
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, ClauseElement

from shardkit.errors import KeyChange, MissingKey, StaleShardMap
from shardkit.routing.rows import attribute_of
from shardkit.session.handed import AssociationConnection, HandedConnection
from shardkit.session.homes import Home, check_generated, home_of
from shardkit.session.renamed import refuse_shared_schema, schema_map_of
from shardkit.session.shared import changed_values, missing_values, touched_values, touches
from shardkit.snapshots import View

if TYPE_CHECKING:
    from shardkit.session.session import ClusterSession

T = TypeVar("T")
#: The values of a primary key, in the table's order.
Row: TypeAlias = tuple[Any, ...]


class Flush:
    """One flush of one session.

    :ivar placed: new objects, with the key that they were placed by.
    :ivar touched: the shards that will be written, as far as is known before the flush.
    :ivar unchanged: objects with attributes that were assigned the values that they had.
    :ivar association: for the rows of many-to-many tables.
    """

    def __init__(self, session: ClusterSession, view: View) -> None:
        self._session = session
        self._view = view
        self.association = AssociationConnection(session)
        self._connections: dict[str, Connection] = {}
        self._replications: dict[str, HandedConnection] = {}  # by reference table
        self._handed: dict[str, HandedConnection] = {}  # by shard
        self._rows: dict[tuple[Table, Row], str] = {}  # those that handlers of events are told of, with their shards
        self.touched: dict[str, None] = {}
        self.unchanged: list[InstanceState[Any]] = []
        self._given: Sequence[InstanceState[Any]] = ()
        self._owners: Mapping[InstanceState[Any], Sequence[tuple[InstanceState[Any], Any]]] | None = None
        self.placed: dict[InstanceState[Any], tuple[tuple[Any, ...] | None, str | None]] = {}
        self._entries: dict[tuple[str, str], str | None] = {}  # of directories, in the transaction

    # --- before anything is sent

    def prepare(
        self,
        new: Iterable[InstanceState[Any]],
        dirty: Iterable[InstanceState[Any]],
        deleted: Iterable[InstanceState[Any]],
    ) -> None:
        """Fill in what decides where new objects live, refuse changed keys, sort new objects by shard, and find the
        shards that will be written.

        :raises KeyChange: when a key was assigned another value.
        :raises MissingKey: when a new object has no key, and no related object that gives it one in the flush.
        """
        order: list[tuple[str, int, InstanceState[Any]]] = []
        new, dirty = list(new), list(dirty)
        self._given = [*new, *dirty]
        in_order = [(home_of(self._view, state.mapper), state) for state in sorted(new, key=_insert_order)]
        for home, state in in_order:
            self._fill(home, state)
        self._look_up(in_order)
        for home, state in in_order:
            shard = self._early_shard(home, state)
            if home.tokened and shard is not None:
                state.identity_token = shard  # a row that is deleted in this flush may have the same identity
            if shard is not None:
                self._check_expressions(home, state, shard)
            self._touch(home, shard)
            order.append((shard or "\uffff", _insert_order(state), state))
        order.sort(key=lambda entry: entry[:2])
        for number, (_, _, state) in enumerate(order, 1):
            state.insert_order = number
        for state in dirty:
            home = home_of(self._view, state.mapper)
            home.refuse_key_change(state)
            _complete_change(home, state)
            if _lends_only(state):
                continue
            if _is_changed(state):
                shard = None if home.replicated else self._shard_of_persistent(home, state)
                if shard is not None:
                    self._check_expressions(home, state, shard)
                self._touch(home, shard)
            else:
                self.unchanged.append(state)
        for state in deleted:
            home = home_of(self._view, state.mapper)
            self._touch(home, None if home.replicated else self._shard_of_persistent(home, state))

    def _touch(self, home: Home, shard: str | None) -> None:
        if home.replicated:
            self.touched.update(dict.fromkeys(home.info.shards))
        elif shard is not None:
            self.touched[shard] = None

    def _fill(self, home: Home, state: InstanceState[Any]) -> None:
        if home.generated is not None:
            check_generated(home.table, self._view.planner.dialect_name)
        home.fill(state, self._session.cluster.next_id)
        if home.replicated:
            _assign(state, missing_values(state.mapper, home.info, state.dict))

    def _look_up(self, new: Sequence[tuple[Home, InstanceState[Any]]]) -> None:
        """Ask for the keys of all new objects of keyspaces by directory at once."""
        filed = [(home, state) for home, state in new if home.info.keyspace.directory]

        def place_all() -> None:
            for home, state in filed:
                with suppress(MissingKey):  # said, or mended by a related object, when its turn comes
                    home.place_new(state)

        if filed:
            self._session.looked_up(place_all, new=True, known=self._entries)

    def _looked_up(self, work: Callable[[], T]) -> T:
        return self._session.looked_up(work, new=True, known=self._entries)

    def _early_shard(self, home: Home, state: InstanceState[Any]) -> str | None:
        """The shard of a new object, where its key is known before the flush; None where the flush will give it."""
        try:
            return self._place(home, state)
        except MissingKey:
            parent = _key_of_parent(home, state) or self._key_of_owner(home, state)
            if parent is None:
                raise
        if parent[0] is None:
            return None
        row = {home.key[0].column: parent[0]}
        placement = self._looked_up(lambda: self._view.planner.place(home.table, row))
        return None if placement is None else placement.shard

    def _key_of_owner(self, home: Home, state: InstanceState[Any]) -> tuple[Any] | None:
        """The key that a new object will take from the object whose collection it is in.

        ``(None,)``: it will take one, which is not known yet.
        """
        if self._owners is None:
            self._owners = _owners(self._given)
        columns = {part.column for part in home.key}
        for owner, relationship in self._owners.get(state, ()):
            for local, remote in relationship.local_remote_pairs or ():
                if remote.table is home.table and remote.name in columns:
                    return (_reader(owner.mapper, local)(owner.obj()) if len(columns) == 1 else None,)
        return None

    def _place(self, home: Home, state: InstanceState[Any]) -> str | None:
        key = home.key_of(state)
        known = self.placed.get(state)
        if known is not None and key is not None and known[0] == key:
            return known[1]
        shard = self._looked_up(lambda: home.place_new(state))
        self.placed[state] = (key, shard)
        return shard

    def _shard_of_persistent(self, home: Home, state: InstanceState[Any]) -> str:
        if self._session.is_unplaced(state):
            return self._session.find_shard(state)
        token = None if state.key is None else state.key[2]
        if isinstance(token, str) and token in home.info.shards:
            return token
        if len(home.info.shards) == 1:
            return home.info.shards[0]
        key = home.key_of(state) if home.key else None
        if key is not None and (shard := self._session.looked_up(lambda: home.placed_by(key))) is not None:
            return shard
        if token is None:  # made persistent by hand: nobody has said where it stands
            return self._session.find_shard(state)
        raise StaleShardMap(
            f"the {state.class_.__name__} {state.key and state.key[1]} was loaded before the shard map changed, "
            "and its shard is not known any more",
            hint="load it again",
        )

    # --- while it runs

    @property
    def over_several(self) -> bool:
        """Whether rows may be on different shards."""
        return self._view.map.sole_host is None

    def connection_for(self, mapper: Mapper[Any], instance: Any) -> Any:
        """SQLAlchemy's ``connection_callable``: the connection to write this object on."""
        state: InstanceState[Any] = mapper.class_manager.state_getter()(instance)
        home = home_of(self._view, state.mapper)
        deleted = self._session._deleted  # noqa: SLF001 - the public one makes a set of objects each time
        if state.key is not None and state not in deleted and _stays(home, state):  # opened by who uses it all the same
            placing = self._session if self.over_several else None
            if placing is not None and home.tokened and _is_watched(state.mapper):
                self._rows.update(dict.fromkeys(_rows_of(state), self._shard_of_persistent(home, state)))
            return HandedConnection(placing, lambda: self._connections_to_write(home, state))
        if home.replicated:
            return self._replicated(home, state)
        connections = self._connections_to_write(home, state)
        ((shard, connection),) = connections.items()
        if not self.over_several or not _is_watched(state.mapper):
            return connection
        self._rows.update(dict.fromkeys(_rows_of(state), shard))
        if shard not in self._handed:
            self._handed[shard] = HandedConnection(self._session, lambda: connections)
        return self._handed[shard]

    def _connections_to_write(self, home: Home, state: InstanceState[Any]) -> Mapping[str, Connection]:
        """Those that an object is written on, by shard."""
        if home.replicated:
            return self._connections_to_all(home, state)
        if state.key is not None:
            home.refuse_key_change(state)
            shard = self._shard_of_persistent(home, state)
        else:
            self._fill(home, state)
            placed = self._place(home, state)
            if home.tokened:
                state.identity_token = placed
            shard = placed or home.info.shards[0]
        self._check_expressions(home, state, shard)
        return {shard: self._connection(shard)}

    def shard_of_row(self, statement: Any, parameters: Any) -> str | None:
        """The shard of the one row that a statement names by its primary key, where an object in the flush has it."""
        table = statement.table if isinstance(statement, UpdateBase) else only_table(statement)
        if not self._rows or not isinstance(table, Table) or isinstance(statement, Insert):
            return None
        table = table._deannotate(clone=False)  # noqa: SLF001 - ORM annotations, which have no public way off
        named = _named_values(statement.whereclause, table, parameters if isinstance(parameters, Mapping) else {})
        keys = [column.name for column in table.primary_key]
        if not set(keys) <= named.keys():
            return None
        return self._rows.get((table, tuple(named[name] for name in keys)))

    def check_item(
        self, home: Home, mapper: Mapper[Any], item: Any, shard: str, *, is_state: bool, update: bool
    ) -> None:
        """`_check_values` of one item of a bulk operation: a state, or a mapping by attribute name."""
        if is_state:
            self._check_expressions(home, item, shard)
        elif home.by_sql:  # values that are SQL expressions are none in such a mapping
            self._check_values(mapper, item, item, shard, () if update else None)

    def _check_expressions(self, home: Home, state: InstanceState[Any], shard: str) -> None:
        now = state.dict
        new = state.key is None
        written = now if new else [name for name in state.committed_state if name in now]
        if home.by_sql or any(isinstance(now[name], ClauseElement) for name in written):
            self._check_values(state.mapper, now, written, shard, None if new else home.key_of(state) or ())

    def _check_values(
        self,
        mapper: Mapper[Any],
        values: Mapping[str, Any],
        written: Iterable[str],
        shard: str,
        key: Sequence[Any] | None = None,
    ) -> None:
        """SQL expressions among the values that are written may only read what stands on the same shard.

        :param values: by attribute.
        :param key: of a row that is there already, empty where it is not known; None for a new one.
        :raises RoutingError: where they may read more.
        """
        given = {name: values[name] for name in written if isinstance(values[name], ClauseElement)}
        names = set(written)
        for table in (each for each in mapper.tables if isinstance(each, Table)):
            found: dict[Any, Any] = {}
            touched = key is None
            for column in table.columns:
                name = attribute_of(mapper, column)
                touched = touched or name in names
                default: Any = column.default if key is None else column.onupdate
                if name in given:
                    found[column] = given[name]
                elif default is not None and default.is_clause_element:
                    left_out = values.get(str(name)) is None if key is None else name not in names
                    found.update({column: default.arg} if left_out else {})
            if found and touched:
                self._looked_up(partial(self._view.planner.check_values, table, found, shard, key))

    def completed(
        self, home: Home, mapper: Mapper[Any], item: Any, *, update: bool, states: bool, nulls: bool, changed_only: bool
    ) -> Any:
        """One item of a bulk operation with what has to be decided before any shard sees it.

        :returns: the state, or a copy of the mapping where something was added.
        """
        if states:
            if not update:
                self._fill(home, item)
            elif home.replicated:
                changed = changed_values(item) if changed_only else item.dict
                _assign(item, touched_values(mapper, home.info, changed))
            values = item.dict
        elif update:
            return {**item, **touched_values(mapper, home.info, item)} if home.replicated else item
        else:
            added = {}
            if home.generated is not None and item.get(home.generated.attribute) is None:
                check_generated(home.table, self._view.planner.dialect_name)
                added[home.generated.attribute] = self._session.cluster.next_id()
            if home.replicated:
                added.update(missing_values(mapper, home.info, {**item, **added}, nulls=nulls))
            added.update(home.defaults(item, nulls=nulls))
            values = item = {**item, **added} if added else item
            left_out = [part.attribute for part in home.key if part.attribute in item and part.lacks(item, nulls=nulls)]
            if left_out:  # None is left to the server's default: the row has no key
                values = item = {name: value for name, value in item.items() if name not in left_out}
        if home.replicated and not update:
            _require_identity(home, mapper, values)
        return item

    def shards_of_items(self, home: Home, items: Sequence[Any], *, is_state: bool) -> Sequence[Sequence[str]]:
        """The shards that each item of a bulk operation is written on: a state, or a mapping by attribute name."""
        if home.info.keyspace.directory and is_state:
            self._look_up([(home, state) for state in items if state.key is None])
        if is_state:
            return [self._shards_of_item(home, item, is_state=True) for item in items]
        return self._looked_up(lambda: [self._shards_of_item(home, item, is_state=False) for item in items])

    def _shards_of_item(self, home: Home, item: Any, *, is_state: bool) -> Sequence[str]:
        if home.replicated:
            return home.info.shards
        if not home.key or (len(home.info.shards) == 1 and not home.info.keyspace.directory):
            return home.info.shards[:1]
        if is_state:
            if item.key is not None:
                home.refuse_key_change(item)
                return (self._shard_of_persistent(home, item),)
            self._fill(home, item)
            return (self._place(home, item) or home.info.shards[0],)
        row = {part.column: item[part.attribute] for part in home.key if part.attribute in item}
        placement = self._view.planner.place(home.table, row)
        return home.info.shards if placement is None else (placement.shard,)

    def _connection(self, shard: str) -> Connection:
        try:
            found = self._connections[shard]
        except KeyError:
            found = self._connections[shard] = self._session.connection_to_write(shard)
        return found

    def _replicated(self, home: Home, state: InstanceState[Any]) -> HandedConnection:
        connections = self._connections_to_all(home, state)
        return self._replications.setdefault(home.info.name, HandedConnection(self._session, lambda: connections))

    def _connections_to_all(self, home: Home, state: InstanceState[Any]) -> Mapping[str, Connection]:
        if state.key is None:
            self._fill(home, state)
            _require_identity(home, state.mapper, state.dict)
        else:
            _complete_change(home, state)
        self._session.admit_writes(home.info.shards)
        connections = {shard: self._connection(shard) for shard in home.info.shards}
        if home.info.name not in self._replications:
            self.refuse_shared_schema(home, connections)
        return connections

    def refuse_shared_schema(self, home: Home, connections: Mapping[str, Connection]) -> None:
        """:raises RoutingError: where rows of a reference table would be written several times into one database."""
        by_session = self._session.execution_options.get("schema_translate_map")
        renamed = {shard: by_session or schema_map_of(each) for shard, each in connections.items()}
        refuse_shared_schema([home.info.name], renamed, self._view)

    def verify(self, states: Iterable[InstanceState[Any]]) -> None:
        """Once written: the rows are where their keys say, whatever event handlers did meanwhile.

        :raises KeyChange: so that the flush is rolled back.
        """
        for state in states:
            known = self.placed.get(state)
            home = home_of(self._view, state.mapper)
            if state.key is not None:
                home.refuse_key_change(state)
                continue
            if known is None:
                continue
            if home.key and home.key_of(state) != known[0]:
                raise KeyChange(
                    f"the key of a new {state.class_.__name__} was changed to {home.key_of(state)} while it was being "
                    f"written on shard {known[1]}",
                    table=home.table.name,
                    key=[part.column for part in home.key],
                    hint="set keys before the flush, in a constructor or in before_flush, not in before_insert",
                )


def _is_changed(state: InstanceState[Any]) -> bool:
    """Whether an object has anything to flush; True where that is not plain to see."""
    columns, now = state.mapper.column_attrs, state.dict
    for name, old in state.committed_state.items():
        if name not in columns or name not in now:
            return True
        try:
            if not columns[name].columns[0].type.compare_values(old, now[name]):
                return True
        except TypeError:
            return True
    return not state.committed_state or bool(state.__dict__.get("_pending_mutations"))


def _is_watched(mapper: Mapper[Any]) -> bool:
    """Whether handlers of events are given the connection that its objects are written on."""
    events = mapper.dispatch
    return bool(
        events.before_insert
        or events.after_insert
        or events.before_update
        or events.after_update
        or events.before_delete
        or events.after_delete
    )


def _rows_of(state: InstanceState[Any]) -> Iterator[tuple[Table, Row]]:
    for table in state.mapper.tables:
        if isinstance(table, Table):
            names = [attribute_of(state.mapper, column) for column in table.primary_key]
            if all(state.dict.get(str(name)) is not None for name in names):
                yield table, tuple(state.dict[str(name)] for name in names)


def only_table(statement: Any) -> Any:
    """The table that a SELECT reads, where it is one and no alias of it."""
    froms = statement.get_final_froms() if isinstance(statement, Select) else ()
    return froms[0] if len(froms) == 1 and isinstance(froms[0], Table) else None


def _named_values(condition: Any, table: Table, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a table that a condition says equal to a value, whatever else it says."""
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        parts = [_named_values(each, table, parameters) for each in condition.clauses]
        return {name: value for part in parts for name, value in part.items()}
    if not isinstance(condition, BinaryExpression) or condition.operator is not operators.eq:
        return {}
    column, value = condition.left, condition.right
    if not isinstance(column, Column) or not isinstance(value, BindParameter) or column.name not in table.c:
        return {}
    if column.table._deannotate(clone=False) is not table:  # noqa: SLF001 - as above
        return {}
    return {column.name: parameters.get(value.key, value.effective_value)}


def _stays(home: Home, state: InstanceState[Any]) -> bool:
    """Whether the row of an object in the flush is not written, unless a handler of events changes it."""
    if home.replicated and state.mapper.dispatch.before_update and touches(state.mapper):
        return False  # what it changes has to be completed before it is sent
    return _lends_only(state) or not _is_changed(state)


def _lends_only(state: InstanceState[Any]) -> bool:
    """Whether an object was only put into relationships that other rows write down."""
    names = {*state.committed_state, *state.__dict__.get("_pending_mutations", ())}
    return bool(names) and all(
        name in state.mapper.relationships and _written_elsewhere(state.mapper, name) for name in names
    )


def _written_elsewhere(mapper: Mapper[Any], name: str) -> bool:
    relationship = mapper.relationships[name]
    return relationship.direction is not RelationshipDirection.MANYTOONE and not relationship.post_update


def _insert_order(state: InstanceState[Any]) -> int:
    return state.insert_order or 0


def _key_relationships(home: Home, mapper: Mapper[Any]) -> Iterable[tuple[Any, Callable[[Any], Any]]]:
    """The many-to-one relationships that give an object its key, with how to read the parent's side; of a key of
    several columns, None stands for what is not known yet."""
    columns = {part.column for part in home.key}
    for relationship in mapper.relationships:
        if relationship.direction is not RelationshipDirection.MANYTOONE:
            continue
        for local, remote in relationship.local_remote_pairs or ():
            if local.name in columns and local.table is home.table:
                yield relationship, _reader(relationship.mapper, remote) if len(columns) == 1 else _not_known


def _reader(mapper: Mapper[Any], column: Any) -> Callable[[Any], Any]:
    name = mapper.get_property_by_column(column).key
    return lambda parent: parent.__dict__.get(name)


def _not_known(_parent: Any) -> None:
    return None


def _owners(states: Iterable[InstanceState[Any]]) -> Mapping[InstanceState[Any], Sequence[tuple[Any, Any]]]:
    """New object -> the objects in whose collections it is, with the relationship."""
    found: dict[InstanceState[Any], list[tuple[Any, Any]]] = {}
    for owner in states:
        for relationship in owner.mapper.relationships:
            if relationship.direction is not RelationshipDirection.ONETOMANY or relationship.viewonly:
                continue
            history = owner.get_history(relationship.key, PassiveFlag.PASSIVE_NO_INITIALIZE)
            for child in (*(history.added or ()), *(history.unchanged or ())):
                if child is not None:
                    found.setdefault(instance_state(child), []).append((owner, relationship))
    return found


def _key_of_parent(home: Home, state: InstanceState[Any]) -> tuple[Any] | None:
    """The key that a new object will take from a related one; None where there is no such object (on this side)."""
    for relationship, read in _key_relationships(home, state.mapper):
        parent = state.dict.get(relationship.key)
        if parent is not None:
            return (read(parent),)
    return None


def _assign(state: InstanceState[Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(state.obj(), name, value)


def _complete_change(home: Home, state: InstanceState[Any]) -> None:
    if home.replicated and state.modified and (changed := changed_values(state)):
        _assign(state, touched_values(state.mapper, home.info, changed))


def _require_identity(home: Home, mapper: Mapper[Any], values: Mapping[str, Any]) -> None:
    for column in mapper.primary_key:
        if column.default is not None or column.server_default is not None:
            continue
        if values.get(mapper.get_property_by_column(column).key) is None:
            raise MissingKey(
                f"a new row of the reference table {home.table.name!r} has no {column.name}: "
                "each shard would make one up",
                table=home.table.name,
                key=[column.name],
                hint="assign the primary key, or set 'ids: generated' on its keyspace in the shard map",
            )
