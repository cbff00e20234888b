"""``shardkit where``: which shard a key lives on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option
from shardkit.cli.output import Output

if TYPE_CHECKING:
    from shardkit.partition import Partition
    from shardkit.shardmap import Placement, ShardMap, TableInfo

_TYPES: Mapping[str, Any] = {
    "int": int,
    "str": str,
    "uuid": UUID,
    "bytes": bytes.fromhex,
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "decimal": Decimal,
}
_NAMES: Mapping[type, str] = {int: "int", str: "str", date: "date", datetime: "datetime"}
#: What is taken for an integer when nobody says.
INTEGER = re.compile(r"0|-?[1-9][0-9]*")
# what a value is taken for when nobody says: the first that fits
_LOOKS_LIKE = (
    ("int", INTEGER),
    ("decimal", re.compile(r"-?[0-9]+\.[0-9]+")),
    ("uuid", re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")),
    ("datetime", re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?")),
    ("date", re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")),
)


@dataclass(frozen=True, slots=True)
class GivenKey:
    """One ``COLUMN[:TYPE]=VALUE`` of the command line.

    :param assumed: whether nobody said the type.
    """

    column: str
    value: Any
    type: str
    assumed: bool


@click.command()
@click.argument("table")
@click.argument("keys", metavar="KEY=VALUE...", nargs=-1)
@map_option
@output_option
def where(table: str, keys: tuple[str, ...], map_source: str, out: Output) -> None:
    """Which bucket and shard a key of TABLE lives on.

    A value is taken for what it looks like; 'KEY:str=5' says otherwise (int, str, uuid, bytes, date, datetime, decimal;
    'KEY:null=' is NULL). No database is asked, but for the lookup table of a keyspace by directory.
    """
    with map_store(map_source) as store:
        shard_map = store.load()
    info = shard_map.table(table)
    if info.kind == "reference":
        _everywhere(info, out)
        return
    given = key_of(info, keys)
    _answer(shard_map, info, given, _place(shard_map, info, given), out)


def key_of(info: TableInfo, words: Sequence[str]) -> list[GivenKey]:
    """A table's key as ``COLUMN[:TYPE]=VALUE``, of each column one.

    :raises click.UsageError: for what is no such key of the table.
    """
    given = [_read(word, info) for word in words]
    _check_columns(info, given)
    return given


def _place(shard_map: ShardMap, info: TableInfo, given: Sequence[GivenKey]) -> Placement:
    key = {one.column: one.value for one in given}
    if info.keyspace.directory is None:
        return shard_map.locate(info.name, key)
    from shardkit.cluster import create_cluster
    from shardkit.errors import MissingKey

    with create_cluster(shard_map) as cluster:
        try:
            return cluster.locate(info.name, **key)
        except MissingKey as error:
            raise MissingKey(error.message, hint=assigning(info, given[0].column), table=info.name) from None


def assigning(info: TableInfo, column: str) -> str:
    """How a key gets its entry in the directory."""
    names = info.keyspace.directory.names if info.keyspace.directory is not None else ()
    return (
        "it gets a bucket with its first row; to choose one: "
        f"shardkit directory assign {info.name} {column}=VALUE BUCKET (one of {', '.join(names)})"
    )


def _everywhere(info: TableInfo, out: Output) -> None:
    out.result({"table": info.name, "kind": info.kind, "shards": info.shards})
    out.line(f"{info.name} is a reference table: it stands in full on {', '.join(info.shards)}")


def _read(word: str, info: TableInfo) -> GivenKey:
    name, equals, text = word.partition("=")
    column, _, kind = name.partition(":")
    if not equals or not column:
        raise click.UsageError(f"{word!r} is not a key: write COLUMN=VALUE")
    if kind == "null":
        return GivenKey(column, None, "null", assumed=False)
    if kind and kind not in _TYPES:
        raise click.UsageError(f"{kind!r} is not a type of key: write {', '.join(_TYPES)} or null")
    assumed = not kind
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and not kind:
        kind, text, assumed = "str", text[1:-1], False
    kind = kind or _kind_in_map(info.keyspace.partition) or _looks_like(text)
    try:
        return GivenKey(column, _TYPES[kind](text), kind, assumed)
    except (ValueError, ArithmeticError):
        raise click.UsageError(
            f"{text!r} is not {in_words(kind)}: mend it, or say its type with {column}:TYPE="
        ) from None


def _kind_in_map(partition: Partition | None) -> str | None:
    """The type of the values that the map itself names; a hash partition usually names none."""
    from shardkit.partition import HashPartition, ListPartition, RangePartition

    values: list[Any] = []
    match partition:
        case HashPartition():
            values = [key[0] for key in partition.exceptions]
        case ListPartition():
            values = [value for some in partition.values.values() for value in some]
        case RangePartition():
            values = [end for ends in partition.bounds.values() for end in ends]
    return next((_NAMES[type(value)] for value in values if type(value) in _NAMES), None)


def _looks_like(text: str) -> str:
    return next((kind for kind, pattern in _LOOKS_LIKE if pattern.fullmatch(text)), "str")


def in_words(kind: str) -> str:
    """What a value was taken for: ``an integer``, ``a text``."""
    return {"int": "an integer", "str": "a text", "uuid": "a UUID", "bytes": "bytes", "decimal": "a decimal"}.get(
        kind, f"a {kind}"
    )


def _check_columns(info: TableInfo, given: list[GivenKey]) -> None:
    columns = [key.column for key in given]
    if info.kind == "vertical":
        if given:
            raise click.UsageError(f"{info.name} has no shard key: the whole table is on one shard")
        return
    if sorted(columns) != sorted(info.key):
        said = f"not by {', '.join(columns)}" if columns else "and no key was given"
        wanted = " ".join(f"{column}=..." for column in info.key)
        raise click.UsageError(f"{info.name} is sharded by {', '.join(info.key)}, {said}: give {wanted}")


def _answer(shard_map: ShardMap, info: TableInfo, given: Sequence[GivenKey], placement: Placement, out: Output) -> None:
    shard = shard_map.shard(placement.shard)
    moves = [move for move in shard_map.moves_of(placement.keyspace) if placement.bucket in move.buckets]
    out.result(
        {
            "table": info.name,
            "kind": info.kind,
            "key": {key.column: {"value": key.value, "type": key.type, "assumed": key.assumed} for key in given},
            "keyspace": placement.keyspace,
            "bucket": placement.bucket,
            "shard": placement.shard,
            "master": str(shard.master),
            "replicas": [str(replica) for replica in shard.replicas],
            "moving_to": moves[0].target if moves else None,
            "map_version": shard_map.version,
        }
    )
    shown = ", ".join(f"{key.column}={_shown(key.value)}" for key in given)
    bucket = "" if info.kind == "vertical" else f", bucket {placement.bucket}"
    out.line(f"{info.name} {shown}".strip() + f": shard {placement.shard}", style="bold")
    out.line(f"  keyspace {placement.keyspace}{bucket}; master {shard.master}")
    for move in moves:
        out.line(f"  being moved from {move.source} to {move.target} by job {move.job}", style="yellow")
    for key in given:
        if key.assumed:
            out.note(f"{key.column} was taken for {in_words(key.type)}; {key.column}:TYPE= says otherwise")


def _shown(value: object) -> str:
    return "NULL" if value is None else repr(value) if isinstance(value, str) else str(value)
