"""Raw SQL and DDL -> Route.

Raw SQL is not read: it goes where ``shardkit_shard`` or ``shardkit_key`` says. (Reading plain SQL with sqlglot belongs
into `Texts.route`, before the hint is asked for.)
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.schema import ExecutableDDLElement
from sqlalchemy.sql.base import Executable

from shardkit.errors import RoutingError
from shardkit.routing.hints import hint_of
from shardkit.routing.route import Parameters, Route, RouteOptions, StatementKind
from shardkit.shardmap import ShardMap

_READS: Final = re.compile(r"\s*(?:\(\s*)*(?:select|show|explain|describe|desc|values)\b", re.IGNORECASE)
_LOCKS: Final = re.compile(
    r"\bfor\s+(?:update|share)\b|\block\s+in\s+share\s+mode\b|\binto\s+(?:outfile|dumpfile|@)", re.IGNORECASE
)


class Texts:
    """Plans raw SQL and DDL on one map."""

    def __init__(self, shard_map: ShardMap) -> None:
        self._map = shard_map

    def route(self, statement: Executable, parameters: Parameters, options: RouteOptions) -> Route:
        """Where raw SQL runs.

        :raises RoutingError: when nothing says where it belongs.
        """
        text = text_of(statement)
        writes = text is None or not reads_only(text)
        locking = text is None or bool(_LOCKS.search(text))
        route = Route(StatementKind.TEXT, statement, parameters, (), writes=writes, locking=locking)
        hint = hint_of(options, self._map)
        if hint is None:
            raise RoutingError(
                f"raw SQL ({type(statement).__name__}) does not say which of {len(self._map.shards)} shards it is for",
                hint="name the shard with shardkit_shard or the key with shardkit_key, or write it as a select()",
                shards=len(self._map.shards),
            )
        moving = [move.job for move in self._map.moves if hint.shard in (move.source, move.target)]
        if moving and hint.bucket is None:
            raise RoutingError(
                f"rebalance job {moving[0]} is moving rows to or from {hint.shard!r}, and raw SQL cannot be told to "
                "take each row once",
                hint="name the key with shardkit_key, or wait for the end of the job (shardkit rebalance status)",
                shards=1,
            )
        buckets = None if hint.bucket is None else frozenset({hint.bucket})
        return replace(route, shards=(hint.shard,), buckets=buckets, reasons=(hint.reason,))

    def ddl(self, statement: ExecutableDDLElement, parameters: Parameters, options: RouteOptions) -> Route:
        """Where DDL runs: on every shard that hosts the table.

        :raises RoutingError: when it is not about one table, or the table's rows are being moved.
        """
        route = Route(StatementKind.DDL, statement, parameters, (), writes=True, locking=True, replicated=True)
        hint = hint_of(options, self._map)
        if hint is not None:
            return replace(route, shards=(hint.shard,), reasons=(hint.reason,))
        table = _table_of(statement)
        if table is None:
            raise RoutingError(
                f"the DDL {type(statement).__name__} does not say which table, so not which shards, it is for",
                hint="run it once for each shard with shardkit_shard, or with shardkit migrate",
                shards=len(self._map.shards),
            )
        info = self._map.table(table.fullname)
        moves = [move.job for keyspace in info.keyspaces for move in self._map.moves_of(keyspace.name)]
        if moves:
            raise RoutingError(
                f"rebalance job {moves[0]} is moving rows of the keyspace of {info.name}",
                hint="run it again when the job has ended (shardkit rebalance status)",
                table=info.name,
                key=info.key,
                shards=len(info.shards),
            )
        return replace(
            route,
            shards=info.shards,
            keyspace=info.keyspace.name,
            tables=(info.name,),
            reasons=(f"{info.name} stands on {len(info.shards)} shards",),
        )


def reads_only(text: str) -> bool:
    """Whether raw SQL certainly changes nothing and locks nothing."""
    return bool(_READS.match(text)) and not _LOCKS.search(text)


def text_of(statement: Any) -> str | None:
    """The text of raw SQL, also inside ``select(...).from_statement(text(...))``; None where there is none."""
    element = statement
    for _ in range(4):
        if isinstance(element, sa.TextClause):
            return element.text
        element = getattr(element, "element", None)
    return None


def _table_of(statement: Any) -> sa.Table | None:
    element = getattr(statement, "element", None)
    if isinstance(statement, sa.schema.CreateTable | sa.schema.DropTable) or isinstance(element, sa.Table):
        return element if isinstance(element, sa.Table) and type(statement).__name__ in _ON_TABLES else None
    table = getattr(element, "table", None)
    return table if isinstance(table, sa.Table) else None


#: DDL on a whole table that reads nothing else (CREATE TABLE ... AS and views do).
_ON_TABLES: Final = frozenset({"CreateTable", "DropTable", "SetTableComment", "DropTableComment"})
