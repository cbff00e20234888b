"""What the router decides about one statement: a Route. Frozen values, no I/O.

`shardkit.routing.planner` makes routes; whoever executes them asks `Route.statement_for` and `Route.parameters_for` for
each of `Route.shards`, and puts the rows together with `shardkit.routing.merge.merge_rows` where `Route.merge` is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from sqlalchemy.sql.base import Executable

from shardkit.errors import RoutingError
from shardkit.partition import Bucket
from shardkit.routing.feeds import Feeding
from shardkit.routing.merge import MergePlan

#: What a statement is executed with: nothing, one set of values, or one set a row (executemany).
Parameters: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
ScatterPolicy: TypeAlias = Literal["allow", "warn", "refuse"]


class StatementKind(StrEnum):
    """What a statement does."""

    SELECT = "select"
    INSERT = "insert"
    UPDATE = "update"
    DELETE = "delete"
    TEXT = "text"
    DDL = "ddl"


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """What the caller says about routing, next to the statement.

    :param shard: run on this shard and nowhere else (``shardkit_shard``).
    :param key: the key that the statement is about, by column name (``shardkit_key``).
    :param scatter: ``True`` lets this statement touch several shards, also to write; ``False`` forbids it; ``None``
        leaves reads to ``policy`` and refuses writes (``shardkit_scatter``).
    :param policy: what a read over several shards does where the statement does not say (``scatter=`` of
        `shardkit.sessionmaker`).
    """

    shard: str | None = None
    key: Mapping[str, Any] | None = None
    scatter: bool | None = None
    policy: ScatterPolicy = "allow"

    @classmethod
    def from_execution_options(cls, options: Mapping[str, Any], *, policy: ScatterPolicy = "allow") -> RouteOptions:
        """Read ``shardkit_shard``, ``shardkit_key`` and ``shardkit_scatter``; other options are not ours.

        :raises RoutingError: when one of them has a value of the wrong kind.
        """
        if not options or _OPTION_NAMES.isdisjoint(options):
            return _DEFAULTS[policy]
        shard, key, scatter = (options.get(name) for name in ("shardkit_shard", "shardkit_key", "shardkit_scatter"))
        if shard is not None and not isinstance(shard, str):
            raise RoutingError(f"shardkit_shard is {shard!r}", hint="give the name of one shard")
        if key is not None and not (isinstance(key, Mapping) and all(isinstance(name, str) for name in key)):
            raise RoutingError(f"shardkit_key is {key!r}", hint="give key columns by name: {'user_id': 42}")
        if scatter is not None and not isinstance(scatter, bool):
            raise RoutingError(f"shardkit_scatter is {scatter!r}", hint="give True or False")
        return cls(shard, key, scatter, policy)


_OPTION_NAMES = frozenset({"shardkit_shard", "shardkit_key", "shardkit_scatter"})
_POLICIES: tuple[ScatterPolicy, ...] = ("allow", "warn", "refuse")
_DEFAULTS: Mapping[ScatterPolicy, RouteOptions] = {policy: RouteOptions(policy=policy) for policy in _POLICIES}


@dataclass(frozen=True, slots=True)
class ShardStatement:
    """What one shard executes, where that differs from the statement as given."""

    statement: Executable
    parameters: Parameters


@dataclass(frozen=True)
class Route:
    """What the router decided for one statement.

    :param kind: what the statement does.
    :param statement: the statement as given.
    :param parameters: its parameters as given.
    :param shards: each shard to ask, once, in the map's order. Empty: no row can match, send nothing, the result is
        empty (no rows; a rowcount of 0).
    :param keyspace: the keyspace of its tables; None where it has none, or several.
    :param tables: the tables that it names, in order of appearance.
    :param buckets: the only buckets that matching rows can be in; None where nothing pins it.
    :param writes: whether it changes rows or tables, so that it needs the master.
    :param locking: whether it locks the rows that it reads (``FOR UPDATE``), so that it needs the master.
    :param replicated: every one of ``shards`` makes the same change (reference tables): one shard's rowcount counts,
        their sum does not.
    :param alternatives: any one of these answers as well as ``shards`` does (reference tables, no table at all); a
        caller that already talks to one of them should stay there.
    :param reasons: which condition pinned which key, or why all shards are asked: one line each.
    :param warning: what to warn about once (``scatter="warn"``).
    :param merge: how the shards' rows make one result; None: one shard, straight through, or nothing to return. A
        write over several shards with RETURNING has one, too.
    :param first: the subqueries that have to run before it. The rest of the route is what is known without their
        values; with them the statement is planned again.
    :param shard_statements: what a shard executes, for those where it is not ``merge.statement`` or ``statement``.
    """

    kind: StatementKind
    statement: Executable
    parameters: Parameters
    shards: tuple[str, ...]
    keyspace: str | None = None
    tables: tuple[str, ...] = ()
    buckets: frozenset[Bucket] | None = None
    writes: bool = False
    locking: bool = False
    replicated: bool = False
    alternatives: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    warning: str | None = None
    merge: MergePlan | None = None
    first: Feeding | None = None
    shard_statements: Mapping[str, ShardStatement] = field(default_factory=lambda: _NONE)

    def __str__(self) -> str:
        """What ``shardkit explain`` shows."""
        from shardkit.routing.explain import explain_text  # explains routes, so it imports this module

        return explain_text(self)

    @property
    def scattered(self) -> bool:
        """Whether it asks several shards for different rows."""
        return len(self.shards) > 1 and not self.replicated

    def statement_for(self, shard: str) -> Executable:
        """What this shard executes."""
        own = self.shard_statements.get(shard)
        if own is not None:
            return own.statement
        return self.statement if self.merge is None else self.merge.statement

    def parameters_for(self, shard: str) -> Parameters:
        """What this shard executes it with."""
        own = self.shard_statements.get(shard)
        return self.parameters if own is None else own.parameters


_NONE: Mapping[str, ShardStatement] = MappingProxyType({})
