"""Values that can be changed in place: copies of them as they were loaded.

SQLAlchemy keeps no value from before such a change: neither with `sqlalchemy.ext.mutable` nor after `flag_modified`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import InstanceState, Mapper, mapperlib

if TYPE_CHECKING:
    from shardkit.session.transacting import TransactingSession

# Any other type, an application's own above all, may have values of any kind.
_PLAIN = (
    sa.String,
    sa.Integer,
    sa.Numeric,
    sa.Boolean,
    sa.Date,
    sa.Time,
    sa.DateTime,
    sa.Interval,
    sa.LargeBinary,
    sa.Uuid,
)


class LoadedCopies:
    """Of one session, by object and attribute."""

    def __init__(self) -> None:
        self._copies: WeakKeyDictionary[InstanceState[Any], dict[str, Any]] = WeakKeyDictionary()

    def __contains__(self, state: InstanceState[Any]) -> bool:
        return state in self._copies

    def of(self, state: InstanceState[Any]) -> dict[str, Any]:
        """What there is of an object."""
        return self._copies.get(state, {})

    def take(self, state: InstanceState[Any], names: Iterable[str]) -> None:
        """Copy what these attributes hold now."""
        copies = self._copies.setdefault(state, {})
        for name in names:
            copies.pop(name, None)
            if name in state.dict:
                try:
                    copies[name] = copy.deepcopy(state.dict[name])
                except Exception:  # noqa: BLE001, S112 - of an application's class, which may not be made for it
                    continue

    def renew(self, states: Iterable[InstanceState[Any]]) -> None:
        """These objects have been written as they are now."""
        if self._copies:
            for state in states:
                if state in self._copies:
                    self.take(state, list(self._copies[state]))


def _watch(mapper: Mapper[Any], _class: Any = None) -> None:
    """Have what replicas show of a class copied, if it has attributes whose values can be changed in place."""
    names = [prop.key for prop in mapper.column_attrs if _changes_in_place(prop.columns[0])]
    if names:
        loaded, refreshed = _listeners(frozenset(names))
        # before others, which may put values of their own in their place
        event.listen(mapper, "load", loaded, raw=True, insert=True)
        event.listen(mapper, "refresh", refreshed, raw=True, insert=True)


def _changes_in_place(column: Any) -> bool:
    if not isinstance(column, sa.Column):
        return False
    return isinstance(column.type, mysql.SET) or not isinstance(column.type, _PLAIN)


def _listeners(names: frozenset[str]) -> tuple[Callable[..., None], Callable[..., None]]:
    def loaded(state: InstanceState[Any], context: Any) -> None:
        refreshed(state, context, None)

    def refreshed(state: InstanceState[Any], context: Any, attributes: Iterable[str] | None) -> None:
        session = state.session if context is None else context.session
        if hasattr(session, "copy_loaded"):
            found = names if attributes is None else names.intersection(attributes)
            cast("TransactingSession", session).copy_loaded(state, found)

    return loaded, refreshed


def _watch_all() -> None:
    """Classes that are mapped already, and those to come."""
    for registry in mapperlib._all_registries():  # noqa: SLF001 - no public way leads to all of them
        for mapper in registry.mappers:
            if mapper.configured:
                _watch(mapper)
    event.listen(Mapper, "mapper_configured", _watch)


_watch_all()
