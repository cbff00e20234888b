"""Objects that a flush writes though nobody has changed or deleted them: their relationships to others say so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from sqlalchemy.orm import InstanceState, RelationshipProperty
from sqlalchemy.orm.base import PassiveFlag
from sqlalchemy.orm.interfaces import RelationshipDirection

_AS_LOADED = PassiveFlag.PASSIVE_NO_INITIALIZE | PassiveFlag.INCLUDE_PENDING_MUTATIONS


def written_along(
    owners: Iterable[InstanceState[Any]], deleted: Collection[InstanceState[Any]]
) -> set[InstanceState[Any]]:
    """Orphans, what is deleted with them, and children whose foreign keys change. Only what is loaded: nobody can have
    looked at the rest.

    :param owners: what is new, changed or deleted.
    :param deleted: those that are deleted.
    """
    found: set[InstanceState[Any]] = set()
    doomed: list[InstanceState[Any]] = []
    for owner in owners:
        gone = owner in deleted
        for relationship in _relationships(owner):
            one_to_many = relationship.direction is RelationshipDirection.ONETOMANY
            orphans = relationship.cascade.delete_orphan
            if not one_to_many and not orphans:
                continue
            if not gone and relationship.key not in owner.committed_state and not _is_pending(owner, relationship.key):
                continue
            added, unchanged, removed = owner.get_history(relationship.key, _AS_LOADED).as_state()
            if one_to_many:
                found.update(state for state in (*added, *removed) if state is not None)
                if gone and relationship.passive_deletes != "all":
                    found.update(state for state in unchanged if state is not None)
            if orphans:
                doomed.extend(state for state in removed if state is not None)
    seen: set[InstanceState[Any]] = set()
    while doomed:
        state = doomed.pop()
        if state in seen:
            continue
        seen.add(state)
        for relationship in _relationships(state):
            history = state.get_history(relationship.key, _AS_LOADED).as_state()
            children = [child for child in history.sum() if child is not None]
            if relationship.cascade.delete:
                doomed.extend(children)
            elif relationship.direction is RelationshipDirection.ONETOMANY:
                found.update(children)
    return found | seen


def _relationships(state: InstanceState[Any]) -> Iterator[RelationshipProperty[Any]]:
    return (relationship for relationship in state.mapper.relationships if not relationship.viewonly)


def _is_pending(state: InstanceState[Any], name: str) -> bool:
    """Whether a collection that is not loaded was added to."""
    return name in state.__dict__.get("_pending_mutations", ())
