"""Choosing what to move, and the file that says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import PreconditionFailed, UnknownTable
from shardkit.partition import Bucket, HashPartition, ListPartition
from shardkit.rebalance.plan import (
    Add,
    Drain,
    Even,
    MoveBuckets,
    Plan,
    Split,
    Transfer,
    Weights,
    Wish,
    check_against,
    choose,
    now,
    transfers_of,
)
from shardkit.shardmap import Keyspace, ShardMap
from shardkit.topology import Endpoint, Shard


def keyspace(placement: Mapping[Bucket, str]) -> Keyspace:
    return Keyspace("orders", HashPartition(len(placement)), {"users": ("id",)}, placement)


def halves(count: int = 16) -> Keyspace:
    return keyspace({bucket: "a" if bucket < count // 2 else "b" for bucket in range(count)})


def chosen(space: Keyspace, wish: Wish, weights: Weights | None = None) -> dict[Bucket, str]:
    return dict(choose(space, weights or {}, wish, ("a", "b", "c")))


def loads(space: Keyspace, moved: Mapping[Bucket, str], weights: Weights) -> Counter[str]:
    after: Counter[str] = Counter()
    for bucket, shard in {**space.placement, **moved}.items():
        after[shard] += weights.get(bucket, 0)
    return after


def test_named_buckets_go_where_they_are_sent_and_those_already_there_stay() -> None:
    assert chosen(halves(), MoveBuckets((6, 7, 8), "b")) == {6: "b", 7: "b"}
    with pytest.raises(UnknownTable, match="no bucket 99"):
        chosen(halves(), MoveBuckets((99,), "b"))
    with pytest.raises(UnknownTable, match="no shard 'z'"):
        chosen(halves(), MoveBuckets((1,), "z"))


def test_a_drained_shard_keeps_nothing_and_the_others_end_up_level() -> None:
    space = keyspace({bucket: "abc"[bucket % 3] for bucket in range(12)})
    weights = dict.fromkeys(range(12), 10)
    moved = chosen(space, Drain("b"), weights)
    assert set(moved) == {1, 4, 7, 10}
    assert loads(space, moved, weights) == Counter(a=60, c=60)


def test_a_shard_that_holds_all_is_drained_to_the_others_of_the_map() -> None:
    space = keyspace(dict.fromkeys(range(4), "a"))
    assert set(chosen(space, Drain("a")).values()) == {"b", "c"}
    with pytest.raises(PreconditionFailed, match="no other shard to take a's buckets"):
        choose(space, {}, Drain("a"), ("a",))


def test_a_new_shard_gets_a_fair_share_of_the_rows_from_the_end_of_each() -> None:
    weights = dict.fromkeys(range(16), 30)
    moved = chosen(halves(), Add("c"), weights)
    assert set(moved.values()) == {"c"}
    assert loads(halves(), moved, weights) == Counter(a=150, b=150, c=180)
    assert sorted(moved) == [5, 6, 7, 13, 14, 15], "neighbours, so that the map stays short"


def test_a_split_takes_the_fraction_of_the_rows_not_of_the_buckets() -> None:
    weights = {bucket: 100 if bucket == 7 else 10 for bucket in range(8)}
    assert chosen(halves(), Split("a", "c", 0.5), weights) == {7: "c"}
    assert chosen(halves(), Split("a", "c", 1.0), weights) == dict.fromkeys(range(8), "c")
    with pytest.raises(PreconditionFailed, match=r"fraction of 0 is not between"):
        chosen(halves(), Split("a", "c", 0.0))


def test_where_nothing_is_stored_buckets_count() -> None:
    assert chosen(halves(), Split("a", "c", 0.25)) == {6: "c", 7: "c"}


def test_evening_out_moves_nothing_that_is_not_worth_it() -> None:
    level = {bucket: 100 + bucket % 2 for bucket in range(16)}
    assert chosen(halves(), Even(), level) == {}
    lopsided = {bucket: 100 if bucket < 8 else 10 for bucket in range(16)}
    moved = chosen(halves(), Even(), lopsided)
    after = loads(halves(), moved, lopsided)
    assert abs(after["a"] - after["b"]) <= 100, "as level as whole buckets allow"


@given(
    weights=st.dictionaries(st.integers(0, 31), st.integers(0, 1000)),
    holders=st.lists(st.sampled_from("abc"), min_size=32, max_size=32),
    wish=st.sampled_from([Drain("a"), Add("c"), Even(), Split("a", "b", 0.3), Split("b", "c", 0.9)]),
)
def test_whatever_is_chosen_exists_moves_and_leaves_every_bucket_placed_once(
    weights: dict[int, int], holders: list[str], wish: Wish
) -> None:
    space = keyspace(dict(enumerate(holders)))
    moved = choose(space, weights, wish, ("a", "b", "c"))
    assert all(space.placement[bucket] != shard for bucket, shard in moved.items())
    transfers = transfers_of(space, moved, weights, weights, group=5)
    assert sorted(bucket for transfer in transfers for bucket in transfer.buckets) == sorted(moved)
    assert all(len(transfer.buckets) <= 5 for transfer in transfers)
    assert sum(transfer.rows for transfer in transfers) == sum(weights.get(bucket, 0) for bucket in moved)
    if isinstance(wish, Drain):
        assert "a" not in {**space.placement, **moved}.values()
    if isinstance(wish, Even | Add):
        before, after = loads(space, {}, weights), loads(space, moved, weights)
        most = max([weights.get(bucket, 0) for bucket in range(32)])
        assert max(after.values()) <= max(before.values()) + most


# --- the file ------------------------------------------------------------------------------------------------------


def shop() -> ShardMap:
    shards = {name: Shard(name, Endpoint("h", 3306, name)) for name in "ab"}
    regions = Keyspace(
        "stores",
        ListPartition({"seoul": ["서울"], "daegu": ["대구"]}),
        {"stores": ("region",)},
        {"seoul": "a", "daegu": "b"},
    )
    return ShardMap("shop", {"orders": halves(), "stores": regions}, shards, version=7)


def plan(*transfers: Transfer, version: int = 7, cluster: str = "shop") -> Plan:
    return Plan("r1", cluster, version, now(), transfers, ("a note",))


GOOD = (Transfer("orders", (6, 7), "a", "b", 20, 2000), Transfer("stores", ("seoul",), "a", "b", 1, 10))


def test_a_plan_comes_back_from_its_file_as_it_was() -> None:
    given = plan(*GOOD)
    assert Plan.parse(given.dump()) == given
    assert [plan(*GOOD).job_id(number) for number in (0, 1)] == ["r1-1", "r1-2"]
    assert (plan(*GOOD).rows, plan(*GOOD).size) == (21, 2010)


def test_its_result_is_the_map_afterwards() -> None:
    after = plan(*GOOD).result(shop())
    assert after.keyspaces["orders"].buckets_on("a") == (0, 1, 2, 3, 4, 5)
    assert after.keyspaces["stores"].shards == ("b",)


@pytest.mark.parametrize("text", ["", "[]", "format: 2", "format: 1\nid: x", "{", "format: 1\nid: x\ncluster: y"])
def test_what_is_not_a_plan_says_so(text: str) -> None:
    with pytest.raises(PreconditionFailed, match="is not a plan that this shardkit reads"):
        Plan.parse(text)


def test_a_plan_fits_only_the_map_that_it_was_made_for() -> None:
    check_against(plan(*GOOD), shop())
    for wrong, why in (
        (plan(*GOOD, version=6), "made for version 6 of the map, which is at 7 now"),
        (plan(*GOOD, cluster="other"), "the plan is for cluster 'other'"),
        (plan(Transfer("orders", (8,), "a", "b", 0, 0)), "the map does not place it on a"),
        (plan(Transfer("orders", (7,), "a", "a", 0, 0)), "the map does not place it on a"),
    ):
        with pytest.raises(PreconditionFailed, match=why):
            check_against(wrong, shop())
