"""``shardkit explain``: where a statement would run, and why."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option
from shardkit.cli.output import Output
from shardkit.cli.where import INTEGER

if TYPE_CHECKING:
    from sqlalchemy import MetaData, Table

    from shardkit.routing.rawsql import Tables
    from shardkit.routing.route import Route
    from shardkit.shardmap import ShardMap


@click.command()
@click.argument("sql")
@click.argument("parameters", metavar="[NAME=VALUE]...", nargs=-1)
@click.option(
    "--models",
    metavar="MODULE:NAME",
    help="The application's tables: shop.models:Base, or a MetaData. They say of what type keys are.",
)
@map_option
@output_option
def explain(sql: str, parameters: tuple[str, ...], models: str | None, map_source: str, out: Output) -> None:
    """Where SQL would run: on which shard, on its master or on any of its databases, and what says so.

    Parameters of the statement (:id) are given as NAME=VALUE. No database is asked, but for the lookup table of a
    keyspace by directory. What a session would refuse is refused here, with the same words. Without --models keys are
    taken for what their values look like.
    """
    from shardkit.routing.explain import explain_json, explain_text

    metadata = None if models is None else _load(models)
    values = dict(_parameter(word) for word in parameters)
    with map_store(map_source) as store:
        shard_map = store.load()
    dialect = next(iter(shard_map.shards.values())).master.dialect
    route, assumed = _plan(shard_map, dialect, sql, values, metadata)
    out.result({**explain_json(route, dialect_name=dialect), "assumed": assumed})
    out.text(explain_text(route, dialect_name=dialect))
    for column, kind in assumed.items():
        out.note(f"{column} was taken for {kind}; --models says what it is")


def _plan(
    shard_map: ShardMap, dialect: str, sql: str, values: Mapping[str, Any], metadata: MetaData | None
) -> tuple[Route, dict[str, str]]:
    from sqlalchemy import text

    from shardkit.cluster import create_cluster
    from shardkit.errors import RoutingError
    from shardkit.routing.planner import Planner
    from shardkit.routing.texts import writes_rows

    def plan(tables: Tables) -> Route:
        if not any(keyspace.directory for keyspace in shard_map.keyspaces.values()):
            return Planner(shard_map, dialect_name=dialect, tables=tables).plan(text(sql), values)
        with create_cluster(shard_map) as cluster:
            planner = Planner(cluster.map, dialect_name=dialect, tables=tables)
            return cluster.looked_up(lambda: planner.plan(text(sql), values), new=writes_rows(text(sql)))

    if metadata is not None:
        return plan(metadata.tables.get), {}
    refused = None
    for kinds in _guesses(shard_map):
        try:
            route = plan(lambda name, kinds=kinds: _guessed(shard_map, name, kinds))  # type: ignore[misc]
        except RoutingError as error:
            refused = refused or error
        else:
            keys = [f"{name}.{key}" for name in route.tables for key in shard_map.table(name).key]
            said = {column: kinds[column.partition(".")[2]] for column in keys} if route.buckets else {}
            return route, said
    assert refused is not None  # noqa: S101 - there is at least one guess
    raise refused


def _guesses(shard_map: ShardMap) -> Iterator[dict[str, str]]:
    """Types that key columns may have, by name: integers first, texts, and mixtures of the two."""
    columns = sorted({column for table in shard_map.tables.values() for column in table.key})
    yield dict.fromkeys(columns, "an integer")
    yield dict.fromkeys(columns, "a text")
    for kinds in itertools.islice(itertools.product(["an integer", "a text"], repeat=len(columns)), 256):
        yield dict(zip(columns, kinds, strict=True))


def _guessed(shard_map: ShardMap, name: str, kinds: Mapping[str, str]) -> Table | None:
    import sqlalchemy as sa

    if name not in shard_map.tables:
        return None
    types: Mapping[str, Any] = {"an integer": sa.BigInteger(), "a text": sa.String(255)}
    return sa.Table(name, sa.MetaData(), *(sa.Column(key, types[kinds[key]]) for key in shard_map.table(name).key))


def _parameter(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals or not name:
        raise click.UsageError(f"{word!r} is no parameter: give NAME=VALUE")
    return name, int(value) if INTEGER.fullmatch(value) else value


def _load(place: str) -> MetaData:
    from sqlalchemy import MetaData

    module, colon, name = place.partition(":")
    if not colon:
        raise click.BadParameter(f"{place!r} has no colon: give MODULE:NAME", param_hint="--models")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise click.BadParameter(f"{place!r} cannot be loaded: {error}", param_hint="--models") from error
    finally:
        sys.path.pop(0)
    found = getattr(found, "metadata", found)
    if not isinstance(found, MetaData):
        raise click.BadParameter(f"{place!r} is no MetaData and has none", param_hint="--models")
    return found
