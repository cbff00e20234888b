"""Laws of partitions and maps: every key has exactly one place, and changes say what they changed."""

# ruff: noqa: DTZ001 - key columns store no time zone

from __future__ import annotations

import contextlib
from datetime import date, datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import InvalidShardMap
from shardkit.partition import (
    Bucket,
    HashPartition,
    ListPartition,
    RangePartition,
    canonical_text,
    format_buckets,
    parse_buckets,
)
from shardkit.shardmap import ShardMap

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
key_values = st.one_of(
    st.integers(-(2**63), 2**64),
    text,
    st.uuids(),
    st.binary(max_size=20),
    st.dates(),
    st.datetimes(),
    st.decimals(allow_nan=False, allow_infinity=False, places=6),
    st.booleans(),
    st.none(),
)
shards = st.sampled_from(["a", "b", "c"])
comparable = st.sampled_from([st.integers(), text, st.dates(), st.datetimes()])


@given(st.lists(key_values, min_size=1, max_size=3), st.integers(1, 5000))
def test_every_key_has_one_of_the_hash_buckets(key: list[Any], count: int) -> None:
    partition = HashPartition(count)
    bucket = partition.bucket_of(tuple(key))
    assert bucket in range(count)
    assert partition.bucket_of(tuple(key)) == bucket


@given(st.lists(key_values, unique_by=lambda value: canonical_text(value), min_size=1, max_size=8), st.data())
def test_a_pinned_key_has_its_own_bucket_and_the_others_keep_theirs(values: list[Any], data: st.DataObject) -> None:
    pinned = data.draw(st.lists(st.sampled_from(values), unique_by=lambda value: canonical_text(value)))
    partition = HashPartition(64, {(value,): f"own-{index}" for index, value in enumerate(pinned)})
    for value in values:
        if value in pinned:
            assert partition.bucket_of((value,)) == f"own-{pinned.index(value)}"
        else:
            assert partition.bucket_of((value,)) == HashPartition(64).bucket_of((value,))


@given(st.dictionaries(text, st.integers(0, 3), min_size=1))
def test_a_list_takes_each_value_into_one_bucket(homes: dict[str, int]) -> None:
    partition = ListPartition({f"b{home}": [value for value in homes if homes[value] == home] for home in range(4)})
    for value, home in homes.items():
        assert partition.bucket_of((value,)) == f"b{home}"


@given(comparable.flatmap(lambda values: st.tuples(st.sets(values, min_size=1, max_size=6), st.lists(values))))
def test_adjoining_ranges_take_every_value_once(drawn: tuple[set[Any], list[Any]]) -> None:
    cuts, probes = drawn
    ends = [None, *sorted(cuts, key=lambda cut: cut.encode() if isinstance(cut, str) else cut), None]
    partition = RangePartition({f"r{index}": (low, high) for index, (low, high) in enumerate(pairwise(ends))})
    for value in [*probes, *cuts, None]:
        bucket = partition.bucket_of((value,))
        others = [
            name for name in partition.buckets if RangePartition({name: partition.bounds[name]}).bucket_of((value,))
        ]
        assert others == [bucket]
        if value is not None:
            assert partition.overlapping(value, value) == (bucket,)


def _map(placement: dict[int, str]) -> ShardMap:
    spread: dict[str, list[int]] = {}
    for bucket, shard in placement.items():
        spread.setdefault(shard, []).append(bucket)
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "c",
            "keyspaces": {
                "k": {
                    "partition": {"by": "hash", "buckets": len(placement)},
                    "tables": {"t": "id"},
                    "placement": spread,
                }
            },
            "shards": {shard: {"master": f"mysql://h/{shard}"} for shard in ("a", "b", "c")},
        }
    )


placements = st.lists(shards, min_size=1, max_size=40).map(lambda held: dict(enumerate(held)))


@given(placements, key_values)
def test_a_key_is_located_on_the_shard_that_holds_its_bucket(placement: dict[int, str], value: Any) -> None:
    shard_map = _map(placement)
    found = shard_map.locate("t", {"id": value})
    assert shard_map.keyspace("k").placement[found.bucket] == found.shard
    assert [shard for shard in "abc" if found.bucket in shard_map.keyspace("k").buckets_on(shard)] == [found.shard]


@given(placements, st.data())
def test_a_diff_is_exactly_what_was_moved(placement: dict[int, str], data: st.DataObject) -> None:
    old = _map(placement)
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(placement)), shards))
    new = old.with_placement("k", changes)
    diff = old.diff(new)
    moved = {
        bucket: (source, target) for (source, target), buckets in diff.moved.get("k", {}).items() for bucket in buckets
    }
    assert moved == {bucket: (placement[bucket], to) for bucket, to in changes.items() if placement[bucket] != to}
    assert len(diff.lines) == len(diff.moved.get("k", {}))
    assert bool(diff) == bool(moved)
    # applying it gives the new map, undoing it the old one
    assert old.with_placement("k", {bucket: to for bucket, (_, to) in moved.items()}) == new
    assert new.with_placement("k", {bucket: source for bucket, (source, _) in moved.items()}) == old
    assert not new.diff(new)


@given(placements, st.integers(0, 10**9))
def test_a_map_survives_writing(placement: dict[int, str], version: int) -> None:
    shard_map = _map(placement).with_version(version)
    assert ShardMap.parse(shard_map.dump()) == shard_map
    assert ShardMap.from_json(shard_map.to_json()) == shard_map


yaml_values = st.one_of(
    st.integers(),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
    st.dates(),
    st.datetimes(),
    st.sampled_from(
        ["NO", "on", "null", "~", "01234", "0x1f", "1e3", "12:30", "1_000", "2024-01-31", "=", "<<", "-", "a: b"]
    ),
)


@given(
    st.one_of(
        st.lists(st.integers(), min_size=1, unique=True),
        st.lists(yaml_values.filter(lambda value: isinstance(value, str)), min_size=1, unique=True),
        st.lists(st.dates(), min_size=1, unique=True),
        st.lists(st.datetimes(), min_size=1, unique=True),
    )
)
def test_key_values_keep_their_type_in_yaml_and_json(values: list[Any]) -> None:
    document = {
        "format": 1,
        "cluster": "c",
        "keyspaces": {
            "k": {
                "partition": {"by": "list", "buckets": {"x": values}},
                "tables": {"t": "id"},
                "placement": {"a": ["x"]},
            },
            "p": {
                "partition": {"by": "hash", "buckets": 4, "exceptions": dict.fromkeys(values, "x")},
                "tables": {"u": "id"},
                "placement": {"a": "0-3, x"},
            },
        },
        "shards": {"a": {"master": "mysql://h/a"}},
    }
    original = ShardMap.parse(document)
    for again in (ShardMap.parse(original.dump()), ShardMap.from_json(original.to_json())):
        assert again == original
        partition = again.keyspaces["k"].partition
        assert isinstance(partition, ListPartition)
        assert [type(value) for value in partition.values["x"]] == [type(value) for value in values]


@given(
    st.lists(
        st.one_of(st.integers(0, 10_000), st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)),
        unique=True,
        min_size=1,
    )
)
def test_bucket_sets_survive_writing(buckets: list[Bucket]) -> None:
    assert set(parse_buckets(format_buckets(buckets))) == set(buckets)


LINES = [
    "format: 1",
    "cluster: c",
    "keyspaces:",
    "  k:",
    "    partition: {by: hash, buckets: 2}",
    "    tables: {t: id}",
]
LINES += [
    "    placement: {a: 0-1}",
    "shards:",
    "  a: {master: mysql://h/a}",
    "- x",
    "? [y]",
    "&z {q: *z}",
    "!!binary x",
    "<<: 5",
]


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(LINES), max_size=12).map("\n".join)))
def test_any_text_is_a_map_or_refused_as_one(anything: str) -> None:
    with contextlib.suppress(InvalidShardMap):
        ShardMap.parse(anything)


@settings(max_examples=300)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats(), st.just(Decimal(1))),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.sampled_from(
                    ["format", "cluster", "keyspaces", "shards", "partition", "tables", "placement", "by", "k"]
                ),
                inner,
                max_size=5,
            ),
        ),
        max_leaves=12,
    )
)
def test_any_data_is_a_map_or_refused_as_one(anything: Any) -> None:
    with contextlib.suppress(InvalidShardMap):
        ShardMap.parse(yaml.dump(anything, Dumper=yaml.Dumper))
    if isinstance(anything, dict):
        with contextlib.suppress(InvalidShardMap):
            ShardMap.parse(anything)


def test_dates_and_their_texts_differ() -> None:
    partition = ListPartition({"x": [date(2024, 1, 31)], "y": [datetime(2024, 1, 31)]})
    assert partition.bucket_of((date(2024, 1, 31),)) == "x"
    assert partition.bucket_of((datetime(2024, 1, 31),)) == "y"
