"""Route -> text for people and JSON for programs: which shards, why, what each of them runs, how rows are merged.

Values of parameters do not appear: they may be personal data.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import Executable

from shardkit.partition import format_buckets
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.feeds import Feed
from shardkit.routing.inserts import parameter_sets
from shardkit.routing.route import Parameters, Route


def explain_json(route: Route, *, dialect_name: str = "mysql") -> dict[str, Any]:
    """A route as plain values: the documented contract of ``shardkit explain --json``.

    :returns: ``statement`` (select, insert, ...), ``shards`` (names, in order), ``role`` (what the statement needs:
        ``master``, or ``any`` for reads that a replica may answer), ``keyspace``, ``tables``, ``buckets`` (names and
        numbers, null when not pinned), ``scattered``, ``replicated``, ``alternatives``, ``reasons``, ``merge`` (steps
        in order), ``sql`` (shard -> text with placeholders) and ``first`` (the subqueries that run before it: the same
        again of each, with its ``purpose``; what is said of the statement is what is known without their values).
    """
    dialect = dialect_of(dialect_name)
    return {
        "statement": route.kind.value,
        "shards": list(route.shards),
        "role": "master" if route.writes or route.locking else "any",
        "keyspace": route.keyspace,
        "tables": list(route.tables),
        "buckets": None if route.buckets is None else sorted(route.buckets, key=str),
        "scattered": route.scattered,
        "replicated": route.replicated,
        "alternatives": list(route.alternatives),
        "reasons": list(route.reasons),
        "merge": [] if route.merge is None else list(route.merge.steps),
        "sql": {
            shard: _sql(route.statement_for(shard), route.parameters_for(shard), dialect) for shard in route.shards
        },
        "first": [
            {"purpose": feed.purpose, **explain_json(own, dialect_name=dialect_name)} for feed, own in _before(route)
        ],
    }


def explain_text(route: Route, *, dialect_name: str = "mysql") -> str:
    """A route as lines for people; shards that run the same SQL share one block."""
    found = explain_json(route, dialect_name=dialect_name)
    lines = []
    for feed, own in _before(route):
        lines.append(f"first, for {feed.purpose}:")
        lines += [f"  {line}" for line in explain_text(own, dialect_name=dialect_name).splitlines()]
    shards = ", ".join(route.shards) or "none: no row can match, nothing is sent"
    if route.first is not None:
        shards += " at most"
    lines.append(f"{found['statement']} on {shards} ({found['role']})")
    if route.buckets is not None and route.buckets:
        lines.append(f"  buckets: {format_buckets(sorted(route.buckets, key=str))}")
    if len(route.alternatives) > 1:
        lines.append(f"  or any of: {', '.join(route.alternatives)}")
    lines += [f"  because: {reason}" for reason in route.reasons]
    lines += [f"  merge: {step}" for step in found["merge"]]
    same: dict[str, list[str]] = {}
    for shard, sql in found["sql"].items():
        same.setdefault(sql, []).append(shard)
    for sql, together in same.items():
        lines.append(f"  {', '.join(together)}:")
        lines += [f"    {line.strip()}" for line in sql.splitlines()]
    return "\n".join(lines)


def _before(route: Route) -> Sequence[tuple[Feed, Route]]:
    return () if route.first is None else list(zip(route.first.feeds, route.first.routes, strict=True))


def _sql(statement: Executable, parameters: Parameters, dialect: Dialect) -> str:
    sets = parameter_sets(parameters)
    if sets and isinstance(statement, sa.Insert | sa.Update):
        with suppress(sa_exc.CompileError):  # the ORM's names for columns: shown with all of them
            return str(statement.compile(dialect=dialect, column_keys=list(sets[0])))
    try:
        return str(statement.compile(dialect=dialect))  # type: ignore[attr-defined]
    except sa_exc.CompileError as error:
        return f"cannot be shown without a connection: {error}"
