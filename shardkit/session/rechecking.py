"""Objects that were read from a replica and are written now: first their rows are looked at on the master.

A replica may be behind. An object that it has shown holds values that the row may not have any more; what is written
from them would undo somebody's acknowledged change. With a ``version_id_col`` the UPDATE itself finds that out.
"""

# The private members used below are extension points in all but name: SQLAlchemy's own sharding extension uses them.
# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import InstanceState, Mapper
from sqlalchemy.orm.base import NO_VALUE

from shardkit.errors import StaleReadError

if TYPE_CHECKING:
    from shardkit.session.session import ClusterSession

_ROWS_A_QUERY = 200


def recheck(session: ClusterSession, states: Iterable[InstanceState[Any]]) -> None:
    """Lock these objects' rows on their masters, and compare them with what the objects were loaded with.

    :raises StaleReadError: when a row is different.
    """
    groups: dict[tuple[str, Mapper[Any]], list[InstanceState[Any]]] = {}
    for state in states:
        if state.key is not None and state.mapper.version_id_col is None:
            (shard, *_) = session._shards_of(state, session._outermost().view)
            groups.setdefault((shard, state.mapper), []).append(state)
    for (shard, mapper), group in groups.items():
        for start in range(0, len(group), _ROWS_A_QUERY):
            _compare(session, shard, mapper, group[start : start + _ROWS_A_QUERY])


def _compare(session: ClusterSession, shard: str, mapper: Mapper[Any], states: Sequence[InstanceState[Any]]) -> None:
    columns = {prop.key: prop.columns[0] for prop in mapper.column_attrs if isinstance(prop.columns[0], sa.Column)}
    primary = list(mapper.primary_key)
    wanted = sa.or_(
        *(
            sa.and_(*(column == value for column, value in zip(primary, _identity(state), strict=True)))
            for state in states
        )
    )
    query = (
        sa.select(*primary, *columns.values()).select_from(mapper.persist_selectable).where(wanted).with_for_update()
    )
    rows = session.connection_to_write(shard).execute(query).all()
    found = {tuple(row[: len(primary)]): dict(zip(columns, row[len(primary) :], strict=True)) for row in rows}
    renamed = not found.keys() <= {_identity(state) for state in states}
    for state in states:
        row = found.get(_identity(state))
        if row is None and renamed:
            raise StaleReadError(
                f"{state.class_.__name__} {_identity(state)} was read from a replica, and on the master of shard "
                f"{shard} its key may have got another spelling: writing it could undo an acknowledged change",
                hint="roll back and run the transaction again",
            )
        if row is None:
            continue  # its UPDATE or DELETE will not find it either, and says so
        for name, loaded in _loaded(state, columns, session.loaded_copies.of(state)).items():
            if not columns[name].type.compare_values(loaded, row[name]):
                raise StaleReadError(
                    f"{state.class_.__name__} {_identity(state)} was read from a replica, where {name} was not yet as "
                    f"on the master of shard {shard}: writing it could undo an acknowledged change",
                    hint="roll back and run the transaction again; read with execution_options={'shardkit_read_from': "
                    "'master'} what is to be changed, or give the class a version_id_col",
                )


def _identity(state: InstanceState[Any]) -> tuple[Any, ...]:
    assert state.key is not None  # noqa: S101 - asked by `recheck`
    return tuple(state.key[1])


def _loaded(state: InstanceState[Any], columns: Mapping[str, Any], copies: Mapping[str, Any]) -> dict[str, Any]:
    """The values that an object was loaded with, of attributes that were.

    :param copies: of values that can be changed in place: what the object holds is not what was loaded.
    """
    values = {name: state.dict[name] for name in columns if name in state.dict}
    values.update({name: value for name, value in state.committed_state.items() if name in columns})
    values.update({name: value for name, value in copies.items() if name in values})
    return {name: value for name, value in values.items() if value is not NO_VALUE}
