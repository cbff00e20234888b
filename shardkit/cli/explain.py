"""``shardkit explain``: where a statement would run, and why."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option
from shardkit.cli.output import Output
from shardkit.cli.where import INTEGER, assigning, in_words

if TYPE_CHECKING:
    from sqlalchemy import MetaData, Table

    from shardkit.errors import RoutingError
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
    from shardkit.errors import RoutingError, UnknownTable
    from shardkit.routing.explain import explain_json, explain_text

    metadata = None if models is None else _load(models)
    values = dict(_parameter(word) for word in parameters)
    _check_given(sql, values)
    with map_store(map_source) as store:
        shard_map = store.load()
    dialect = next(iter(shard_map.shards.values())).master.dialect
    try:
        route, assumed = _plan(shard_map, dialect, sql, values, metadata)
    except UnknownTable as error:  # a session would refuse the statement: that is one exit code
        error.exit_code = RoutingError.exit_code
        raise
    except RoutingError as error:
        raise type(error)(
            error.message,
            hint=_hint(error, shard_map, typed=metadata is not None),
            table=error.table,
            key=error.key,
            shards=error.shards,
        ) from error
    out.result({**explain_json(route, dialect_name=dialect), "assumed": assumed})
    out.text(explain_text(route, dialect_name=dialect))
    for column, kind in assumed.items():
        out.note(f"{column} was taken for {kind}; --models says what it is")


_STATEMENT: Final = re.compile(
    r"(?:[\s(]|/\*.*?\*/|--[^\n]*\n|#[^\n]*\n)*(select|with|insert|update|delete|replace|call|set|show|values|table|do|load|handler|truncate|create|alter|drop|"
    r"rename|explain|describe|desc|analyze|lock|unlock|grant|revoke|start|begin|commit|rollback|savepoint|use|xa)\b",
    re.IGNORECASE | re.DOTALL,
)


def _check_given(sql: str, values: Mapping[str, Any]) -> None:
    """:raises click.UsageError: for parameters without a value, and for text that is no SQL."""
    from sqlalchemy import text

    if not _STATEMENT.match(sql):
        raise click.UsageError(f"{sql!r} is no SQL statement: give the whole statement in quotes")
    missing = [name for name in text(sql)._bindparams if name not in values]  # noqa: SLF001 - no public reader
    if missing:
        wanted = " ".join(f"{name}=VALUE" for name in missing)
        raise click.UsageError(f"the statement has parameters without a value: give {wanted}")


def _hint(error: RoutingError, shard_map: ShardMap, *, typed: bool) -> str | None:
    """The fix, for somebody who has a command line and no session."""
    hint = error.hint or ""
    if "create_cluster(metadata=" in hint:
        several = ", or write the statement as a select(), whose rows can be put together" if error.shards else ""
        return (
            "compare the key with a value of its column's type"
            + ("" if typed else " (--models MODULE:NAME, as shop.models:Base, says what the types are)")
            + several
        )
    if "cluster.assign(" in hint:
        info = shard_map.table(error.table or next(iter(shard_map.tables)))
        return assigning(info, info.key[0])
    if hint.startswith("name the shard with shardkit_shard"):
        return (
            "only plain SQL says by itself where it belongs (docs/reference/routing.md, Raw SQL); a session needs the "
            "execution option shardkit_shard or shardkit_key for this, or a select()"
        )
    return error.hint


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
    integer, text = in_words("int"), in_words("str")
    yield dict.fromkeys(columns, integer)
    yield dict.fromkeys(columns, text)
    for kinds in itertools.islice(itertools.product([integer, text], repeat=len(columns)), 256):
        yield dict(zip(columns, kinds, strict=True))


def _guessed(shard_map: ShardMap, name: str, kinds: Mapping[str, str]) -> Table | None:
    import sqlalchemy as sa

    if name not in shard_map.tables:
        return None
    types: Mapping[str, Any] = {in_words("int"): sa.BigInteger(), in_words("str"): sa.String(255)}
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
