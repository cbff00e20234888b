"""What the schema refuses, said in the map's own words: pydantic's errors -> path and message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from shardkit.mapschema import FORMAT
from shardkit.mapyaml import Path
from shardkit.topology import MAX_WEIGHT

# What stands at a place, by the pattern of its path ("*" is any one part); the first that fits.
_FORMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("cluster",), "a name in quotes or without"),
    (("version",), "a whole number from 0; publishing raises it"),
    (("keyspaces",), "fields under each keyspace's name"),
    (("keyspaces", "*"), "fields: partition, tables, reference, local, ids, placement"),
    (("keyspaces", "*", "tables"), "{table: key_column}; in a vertical keyspace a list [table, table]"),
    (("keyspaces", "*", "tables", "*"), "the key's column, or a list of columns: text, quoted where it is a number"),
    (("keyspaces", "*", "tables", "*", "*"), "the name of a column: quote it"),
    (("keyspaces", "*", "reference"), "a list of tables: [countries]"),
    (("keyspaces", "*", "local"), "a list of tables of this keyspace: [orders]"),
    (("keyspaces", "*", "ids"), "'generated', or left out"),
    (
        ("keyspaces", "*", "placement"),
        '{shard: buckets}, such as {shop-0: "0-2047"}; in a vertical keyspace a shard',
    ),
    (("keyspaces", "*", "placement", "*"), 'buckets: "0-2047, 3000" or a list of numbers, spans and names'),
    (("keyspaces", "*", "placement", "*", "*"), "a bucket: a number, a span or a name"),
    (("keyspaces", "*", "partition"), "{by: hash, list, range or directory, ...}"),
    (("keyspaces", "*", "partition", "exceptions"), "{key: bucket name}"),
    (("keyspaces", "*", "partition", "normalize"), "'lower', or left out"),
    (("shards",), "fields under each shard's name"),
    (("shards", "*"), "{master: mysql://host:3306/database}, with staging and replicas where there are"),
    (("shards", "*", "replicas"), "a list of endpoints: [mysql://host:3306/database]"),
    (("shards", "*", "replicas", "*"), "an endpoint, or {url: mysql://host:3306/database, weight: 3}"),
    (("shards", "*", "replicas", "*", "url"), "an endpoint: mysql://host:3306/database"),
    (("shards", "*", "replicas", "*", "weight"), f"a whole number from 0 (no reads) to {MAX_WEIGHT}"),
    (("shards", "*", "replication"), "relay or native"),
    (("shards", "*", "*"), "an endpoint: mysql://host:3306/database"),
    (("moves",), "a list that rebalance jobs keep: leave it to them"),
)
_PARTITION_FORMS: Mapping[str, str] = {
    "hash": "the number of buckets, from 1 to 65536",
    "list": "{bucket: [value, value]}",
    "range": "{bucket: [low, high]}, null for an open end",
    "directory": "a list of bucket names",
}


def schema_faults(error: ValidationError, written: Any) -> Iterator[tuple[Path, str]]:
    """Every fault once, at its deepest place.

    :param written: the data that was refused.
    """
    faults = [(_data_path(fault["loc"], written), fault) for fault in error.errors(include_url=False)]
    paths = {path for path, _ in faults}
    said: set[Path] = set()
    for path, fault in faults:
        # a union reports every alternative, and the place that holds them
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        if path not in said and not (deeper and fault["type"] not in {"missing", "extra_forbidden"}):
            place, message = _said(path, fault, written)
            said.add(path)
            yield place, message


def _said(path: Path, fault: Mapping[str, Any], written: Any) -> tuple[Path, str]:
    kind, given = fault["type"], fault.get("input")
    if kind == "missing":
        return path[:-1], f"{path[-1]!r} is missing"
    if kind == "extra_forbidden":
        return path, "is not a field of the map: remove it or mend its spelling"
    if kind == "string_pattern_mismatch" or fault["loc"][-1:] == ("[key]",):
        quoted = "" if isinstance(given, str) else ", in quotes"
        return path, f"{given!r} is not a name: use letters, digits, '_', '-' and '.', at most 63{quoted}"
    if path == ("format",):
        return path, f"this shardkit reads format {FORMAT}, not {given!r}"
    return path, f"must be {_form(path, written)}, not {shown(given)}"


def _form(path: Path, written: Any) -> str:
    if not path:
        return "fields: format, cluster, keyspaces, shards"
    if path[0] == "keyspaces" and path[2:4] == ("partition", "buckets"):
        by = written["keyspaces"][path[1]]["partition"].get("by")
        return _PARTITION_FORMS.get(by, "what the partition needs")
    for pattern, form in _FORMS:
        if len(pattern) == len(path) and all(part in {"*", str(own)} for part, own in zip(pattern, path, strict=True)):
            return form
    return "something else"


def _data_path(location: Sequence[str | int], data: Any) -> Path:
    """Pydantic's location without the names of types that it puts between the data's own keys."""
    path: list[str | int] = []
    here = data
    for position, part in enumerate(location):
        inside = (isinstance(here, Mapping) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if inside:
            here = here[part]
        elif position < len(location) - 1 or not isinstance(here, Mapping) or part in _TYPE_NAMES:
            continue
        path.append(part)
    return tuple(path)


_TYPE_NAMES = frozenset(
    {"hash", "list", "range", "directory", "str", "int", "list[str]", "list[union[int,str]]", "[key]", "WrittenReplica"}
    | {"dict[str,union[str,list[str]]]", "dict[constrained-str,union[str,list[union[int,str]]]]"}
)


def shown(value: Any) -> str:
    """A value, shortened to fit a line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
