"""Giving an object another shard key: its row, and the rows that belong to it, are written anew where that key lives.

A key cannot be changed by an UPDATE, which would leave the row on a shard where nobody looks for it. So the rows are
read under lock, deleted, and inserted with the new key where that lives, in the session's transaction.
"""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.interfaces import RelationshipDirection
from sqlalchemy.types import NullType, UserDefinedType

from shardkit.errors import KeyChange, RoutingError
from shardkit.session.homes import Home, home_of

if TYPE_CHECKING:
    from shardkit.session.session import ClusterSession

_T = TypeVar("_T")


@dataclass
class _Rows:
    """Rows of one table that move together.

    :param rows: the rows as they were, by column name.
    :param new: the rows as they become.
    :param owners: the table of the rows that they were found by, and the pairs of columns (its, theirs) that tie them.
    """

    mapper: Mapper[Any]
    home: Home
    rows: list[dict[str, Any]]
    new: list[dict[str, Any]] = field(default_factory=list)
    owners: tuple[Any, list[tuple[str, str]]] | None = None

    @property
    def table(self) -> Any:
        return self.home.table

    @property
    def primary_key(self) -> Sequence[Any]:
        """As the mapper has it, whose order may not be the table's."""
        return self.mapper.primary_key

    def identity(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[column.name] for column in self.primary_key)


def move(session: ClusterSession, instance: object, key: Any) -> None:
    """`ClusterSession.move`."""
    state: InstanceState[Any] | None = sa_inspect(instance, raiseerr=False)
    if state is None or state.key is None or state.session is not session:
        raise RoutingError(
            f"{type(instance).__name__} is not a loaded object of this session", hint="load it, then move it"
        )
    _check_moved_once(session, state)
    session.flush()
    view = session._outermost().view
    home = home_of(view, state.mapper)
    new_key = _new_key(home, key)
    source = session._shards_of(state, view)[0]
    wanted = session.looked_up(lambda: view.planner.place(home.table, new_key), new=True)
    target = source if wanted is None else wanted.shard
    everything = list(_gather(session, state, home, source, new_key))
    _check_nobody_is_left(session, everything, source)
    batches = _in_order(everything)
    session.admit_writes(dict.fromkeys((source, target)))
    try:
        for each in reversed(batches):  # before the new rows, which on the same shard may have the same primary keys
            for some in _pieces(each.rows):
                session.execute(
                    sa.delete(each.table).where(_these(each.primary_key, map(each.identity, some))),
                    execution_options={"shardkit_shard": source, "synchronize_session": False},
                )
        for each in batches:
            options = {"shardkit_shard": target}
            session.execute(_insert_of(each), each.new, execution_options=options)
    except BaseException:
        session._deactivate()  # half of it may be done
        raise
    _rename(session, everything, source, target)


def _new_key(home: Home, key: Any) -> dict[str, Any]:
    if not home.key:
        raise RoutingError(f"{home.info.name} has no shard key", hint="only rows of sharded tables can be moved")
    names = [part.column for part in home.key]
    if isinstance(key, Mapping):
        given = dict(key)
    elif len(names) == 1:
        given = {names[0]: key}
    else:
        given = {}
    if sorted(given) != sorted(names):
        raise RoutingError(
            f"{home.info.name} is sharded by {', '.join(names)}",
            hint=f"give all of them: session.move(obj, {{{', '.join(f'{name!r}: ...' for name in names)}}})",
            table=home.info.name,
            key=names,
        )
    return given


# --- finding the rows --------------------------------------------------------------------------------------------


def _check_moved_once(session: ClusterSession, state: InstanceState[Any]) -> None:
    """:raises RoutingError: inside a savepoint, for an object that was moved before it: SQLAlchemy could not give it
    its first key back."""
    transaction: Any = session._transaction
    while transaction is not None and transaction.parent is not None:
        transaction = transaction.parent
        if state in transaction._key_switches:
            raise RoutingError(
                f"{state.class_.__name__} {state.key and state.key[1]} has been moved in this transaction, before the "
                "savepoint",
                hint="move it once, or end the savepoint first",
            )


def _gather(
    session: ClusterSession, state: InstanceState[Any], home: Home, source: str, new_key: Mapping[str, Any]
) -> Iterable[_Rows]:
    """The object's row and, after it, the rows of the objects that belong to it; each with what it becomes."""
    assert state.key is not None  # noqa: S101 - asked by the caller
    root = _Rows(
        state.mapper,
        home,
        _read(session, home, [_these(state.mapper.primary_key, [state.key[1]])], source, state.mapper),
    )
    if not root.rows:
        raise RoutingError(f"the row of {state.mapper.class_.__name__} {state.key[1]} is gone", hint="refresh it")
    old = [root.rows[0][part.column] for part in home.key]
    if old == [new_key[part.column] for part in home.key]:
        raise KeyChange(f"{state.mapper.class_.__name__} {state.key[1]} has this key already")
    waiting, seen = [root], {(root.table, root.identity(root.rows[0]))}
    while waiting:
        each = waiting.pop(0)
        each.new = [{**row, **_renamed(each.home, home, new_key)} for row in each.rows]
        yield each
        for relationship in _relationships(each.mapper):
            if relationship.viewonly or relationship.direction is RelationshipDirection.MANYTOONE:
                continue
            children = _children(session, each, relationship, home, old, source)
            if children is None:
                continue
            found = {children.identity(row): row for row in children.rows}
            children.rows = [row for identity, row in found.items() if (children.table, identity) not in seen]
            seen.update((children.table, children.identity(row)) for row in children.rows)
            if children.rows:
                waiting.append(children)


def _renamed(own: Home, home: Home, new_key: Mapping[str, Any]) -> dict[str, Any]:
    """The key columns of a row, as they become: all rows that were found have the old key, in whatever spelling."""
    return {part.column: new_key[first.column] for part, first in zip(own.key, home.key, strict=True)}


def _children(
    session: ClusterSession, parents: _Rows, relationship: Any, home: Home, old: Sequence[Any], source: str
) -> _Rows | None:
    view = home.view
    own = home_of(view, relationship.mapper)
    identity_changes = any(part.position is not None for part in parents.home.key)
    together = own.info.kind == "sharded" and own.info.keyspace.name == home.info.keyspace.name
    together = together and len(own.key) == len(home.key) and relationship.secondary is None
    if not together or (identity_changes and not _tied_by_key(relationship, parents.home, own)):
        if identity_changes or relationship.secondary is not None:
            raise RoutingError(
                f"{parents.mapper.class_.__name__}.{relationship.key} leads to rows that do not move along, and would "
                "lose what they belong to",
                hint="make the relationship viewonly, or move those rows by hand",
                table=own.info.name,
            )
        return None
    pairs = [(local.name, remote) for local, remote in relationship.local_remote_pairs]
    same_key = sa.and_(*(own.table.c[part.column] == value for part, value in zip(own.key, old, strict=True)))
    ours = [sa.and_(each, same_key) for each in _pointing([(remote, local) for local, remote in pairs], parents.rows)]
    rows = _read(session, own, ours, source, relationship.mapper)
    owners = (parents.table, [(local, remote.name) for local, remote in pairs])
    return _Rows(relationship.mapper, own, rows, owners=owners)


def _in_order(everything: Sequence[_Rows]) -> Sequence[_Rows]:
    """The rows in batches, those that others point at first: servers check foreign keys row by row."""
    keys = {each.table: [part.column for part in each.home.key] for each in everything}
    links = [_links(each, keys) for each in everything]
    pointed_at: dict[Any, dict[tuple[Any, ...], list[tuple[int, int]]]] = {
        (table, there): {} for found in links for table, there, _ in found
    }
    for (table, names), found in pointed_at.items():
        for place, each in enumerate(everything):
            if each.table is table:
                for number, row in enumerate(each.rows):
                    found.setdefault(tuple(row.get(name) for name in names), []).append((place, number))
    sorter: TopologicalSorter[tuple[int, int]] = TopologicalSorter()
    for place, each in enumerate(everything):
        for number, row in enumerate(each.rows):
            first = [
                node
                for table, there, here in links[place]
                for node in pointed_at[table, there].get(tuple(row.get(name) for name in here), ())
                if node != (place, number)
            ]
            sorter.add((place, number), *first)
    try:
        sorter.prepare()
    except CycleError:  # the server decides
        return everything
    batches = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        for place, nodes in groupby(ready, itemgetter(0)):
            each, numbers = everything[place], [number for _, number in nodes]
            rows, new = ([all_[number] for number in numbers] for all_ in (each.rows, each.new))
            batches.append(replace(each, rows=rows, new=new))
        sorter.done(*ready)
    return batches


def _links(each: _Rows, keys: Mapping[Any, Sequence[str]]) -> list[tuple[Any, tuple[str, ...], tuple[str, ...]]]:
    """What rows point at: the table, its columns and theirs, of foreign keys and of what they were found by. Not the
    shard key: all of them have one, and may spell it in several ways.

    :param keys: the shard keys' columns of the tables whose rows move.
    """
    found = [
        (one.referred_table, [(element.column.name, element.parent.name) for element in one.elements])
        for one in each.table.foreign_key_constraints
    ]
    found += [each.owners] if each.owners else []
    links = []
    for table, pairs in found:
        same = set(zip(keys.get(table, ()), keys[each.table], strict=False))
        rest = [pair for pair in pairs if pair not in same]
        links.append((table, tuple(there for there, _ in rest), tuple(here for _, here in rest)))
    return links


def _tied_by_key(relationship: Any, parent: Home, child: Home) -> bool:
    """Whether all rows that the relationship leads to have the parent's key, and so stand beside it."""
    pairs = {(local.name, remote.name) for local, remote in relationship.local_remote_pairs}
    return all((one.column, other.column) in pairs for one, other in zip(parent.key, child.key, strict=True))


def _relationships(mapper: Mapper[Any]) -> Sequence[Any]:
    """Those of a class and of its subclasses, whose rows stand in the same table."""
    found = {each for one in mapper.self_and_descendants for each in one.relationships}
    return sorted(found, key=str)


def _read(
    session: ClusterSession, home: Home, conditions: Iterable[Any], shard: str, mapper: Mapper[Any]
) -> list[dict[str, Any]]:
    table: Any = home.table
    if any(len(each.tables) > 1 for each in mapper.self_and_descendants):
        raise RoutingError(
            f"{mapper.class_.__name__} is mapped to several tables, which move() does not take apart",
            hint="write the new object, and delete this one",
        )
    options = {"shardkit_shard": shard}
    nothing: sa.Select[Any] = sa.select(sa.literal_column("*")).select_from(table).limit(0)
    there = session.execute(nothing, execution_options=options)
    unknown = [name for name in there.keys() if name not in table.c]  # noqa: SIM118 - a Result's keys()
    there.close()
    if unknown:
        raise RoutingError(
            f"{table.name} has columns that the application's table does not know, and that would be lost: "
            f"{', '.join(unknown)}",
            hint="add them to the model",
            table=table.name,
        )
    columns = [column for column in table.c if column.computed is None]
    untouched = _untouched(mapper, home)
    exact = [_exact(column, session, raw=column.name in untouched).label(column.name) for column in columns]
    found = []
    for where in conditions:
        rows = session.execute(sa.select(*exact).where(where).with_for_update(), execution_options=options)
        found += [dict(row) for row in rows.mappings()]
    return found


def _untouched(mapper: Mapper[Any], home: Home) -> frozenset[str]:
    """The columns that are copied as the driver has them, without their types' processing: SQL NULL and JSON's null are
    the same to Python. Not those that are compared with others or changed."""
    pointing = (column for column in home.table.c if column.foreign_keys)
    touched = {column.name for column in (*mapper.primary_key, *home.table.primary_key, *pointing)}
    touched |= {part.column for part in home.key}
    for relationship in _relationships(mapper):
        for local, remote in relationship.local_remote_pairs or ():
            touched |= {local.name, remote.name}
    for one in mapper.self_and_descendants:
        if one.polymorphic_on is not None:
            touched.add(one.polymorphic_on.name)
    return frozenset(column.name for column in home.table.c if column.name not in touched)


class _AsItIs(UserDefinedType[Any]):
    """A value as the driver has it. An INSERT gives a value without a type its column's, but not one with this."""

    cache_ok = True


def _insert_of(each: _Rows) -> Any:
    raw = _untouched(each.mapper, each.home) & each.rows[0].keys()
    return (
        sa.insert(each.table).values({each.table.c[name]: sa.bindparam(name, type_=_AsItIs()) for name in sorted(raw)})
        if raw
        else sa.insert(each.table)
    )


def _check_nobody_is_left(session: ClusterSession, everything: Sequence[_Rows], source: str) -> None:
    """:raises RoutingError: for rows that point at rows which leave, and do not move along: the server would delete
    them (ON DELETE CASCADE), empty what they point with, or refuse."""
    known = session._outermost().view.map.tables
    moving: dict[Any, set[tuple[Any, ...]]] = {}
    for each in everything:
        names = [column.name for column in each.table.primary_key]
        moving.setdefault(each.table, set()).update(tuple(row[name] for name in names) for row in each.rows)
    for each in everything:
        for table in each.table.metadata.tables.values():
            there = known.get(table.fullname)
            if there is None or source not in there.shards:
                continue
            for constraint in table.foreign_key_constraints:
                if constraint.referred_table is not each.table or not table.primary_key:
                    continue
                pairs = [(element.parent, element.column.name) for element in constraint.elements]
                for ours in _pointing(pairs, each.rows):
                    query = sa.select(*table.primary_key).where(ours).limit(len(moving.get(table, ())) + 1)
                    rows = session.execute(query, execution_options={"shardkit_shard": source}).all()
                    if any(tuple(row) not in moving.get(table, set()) for row in rows):
                        raise RoutingError(
                            f"rows of {table.name} point at rows of {each.table.name} that would move away from them",
                            hint="give the class a relationship to them (one to many), so that they move along, or "
                            "move them by hand",
                            table=table.name,
                        )


def _exact(column: Any, session: ClusterSession, *, raw: bool) -> Any:
    """A column whose value comes back as it is stored: MySQL shows only six digits of a FLOAT."""
    floats = isinstance(column.type, sa.Float) and not isinstance(column.type, sa.Double)
    if floats and session.cluster.view.planner.dialect_name != "sqlite":
        return sa.type_coerce(column + sa.literal_column("0E0"), sa.Double())
    return sa.type_coerce(column, NullType()) if raw else column


def _pieces(rows: Sequence[_T], size: int = 200) -> Iterator[Sequence[_T]]:
    """No more rows than a condition should name: servers take ever longer for more, and SQLite takes 1,000."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _pointing(pairs: Sequence[tuple[Any, str]], rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Conditions for what points at these rows, for some of them at a time. Nothing points at a NULL.

    :param pairs: a column that points, and the name of the one that it points at.
    """
    there = [row for row in rows if not any(row[name] is None for _, name in pairs)]
    for some in _pieces(there):
        yield sa.or_(*(sa.and_(*(column == row[name] for column, name in pairs)) for row in some))


def _these(columns: Sequence[Any], identities: Iterable[Sequence[Any]]) -> Any:
    return sa.or_(
        *(
            sa.and_(*(column == value for column, value in zip(columns, identity, strict=True)))
            for identity in identities
        )
    )


# --- the objects --------------------------------------------------------------------------------------------------


def _rename(session: ClusterSession, everything: Iterable[_Rows], source: str, target: str) -> None:
    """Loaded objects become those of the new rows; a rollback makes them the old ones again."""
    identities = {
        (each.table, each.identity(old)): each.identity(new)
        for each in everything
        for old, new in zip(each.rows, each.new, strict=True)
    }
    renamed = [
        (state, identities[state.mapper.local_table, state.key[1]])
        for state in session.identity_map.all_states()
        if state.key is not None
        and state.key[2] in {source, None}
        and (state.mapper.local_table, state.key[1]) in identities
    ]
    transaction: Any = session._transaction
    for state, identity in renamed:
        old = state.key
        assert old is not None  # noqa: S101 - chosen above
        new = (old[0], identity, target)
        session.identity_map.safe_discard(state)
        first = transaction._key_switches.get(state, (old,))[0]
        transaction._key_switches[state] = (first, new)
        state.key, state.identity_token = new, target
        session.identity_map.replace(state)
        state._expire(state.dict, session.identity_map._modified)
