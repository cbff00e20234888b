"""Statement + parameters + map -> Route. Pure: no engine, no session, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.base import Executable

from shardkit.routing.route import Parameters, Route, RouteOptions
from shardkit.shardmap import Placement, ShardMap

_DEFAULT_OPTIONS = RouteOptions()


class Planner:
    """Plans statements against one map; keeps what it learned about each shape of statement.

    A cluster holds one for its current map, and makes a new one with each new map.

    :param shard_map: the map that every route is planned on.
    :param dialect_name: ``mysql``, ``mariadb`` or ``sqlite``.
    """

    def __init__(self, shard_map: ShardMap, *, dialect_name: str = "mysql") -> None:
        self.shard_map = shard_map
        self.dialect_name = dialect_name

    def plan(
        self, statement: Executable, parameters: Parameters = None, options: RouteOptions = _DEFAULT_OPTIONS
    ) -> Route:
        """Decide where a statement runs.

        :raises RoutingError: for a statement that cannot be answered as one database would (or one of its children:
            MissingKey, KeyChange, ScatterRefused, CrossShardJoin).
        :raises UnknownTable: for a table that the map does not name.
        """
        raise NotImplementedError

    def place(self, table: sa.Table, row: Mapping[str, Any]) -> Placement | None:
        """Where one row belongs: for objects in a flush.

        :param row: the row's values by column name, as the application has them (before bind processing); a column
            that is not in it has no value. None is a value.
        :returns: None for a reference table: the row belongs on every shard of the keyspace.
        :raises MissingKey: when a key column is missing, or its value cannot be trusted to be stored as it is.
        :raises UnknownTable: for a table that the map does not name.
        """
        raise NotImplementedError


def plan(
    statement: Executable,
    parameters: Parameters,
    shard_map: ShardMap,
    options: RouteOptions = _DEFAULT_OPTIONS,
    *,
    dialect_name: str = "mysql",
) -> Route:
    """`Planner.plan` for a single statement: nothing is kept."""
    return Planner(shard_map, dialect_name=dialect_name).plan(statement, parameters, options)
