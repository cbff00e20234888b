"""The shard map: reading, asking, changing, comparing."""

# ruff: noqa: DTZ001 - key columns store no time zone

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest

from shardkit.errors import InvalidShardMap, MissingKey, UnknownTable
from shardkit.mapdiff import Effect
from shardkit.normalization import Normalization
from shardkit.partition import HashPartition, ListPartition
from shardkit.shardmap import Move, Placement, ShardMap
from shardkit.topology import Endpoint, ReplicationKind, Role

SHOP = """
format: 1
cluster: shop
keyspaces:
  orders:
    partition: {by: hash, buckets: 4096}
    tables: {users: id, orders: user_id, order_lines: user_id}
    reference: [countries]
    ids: generated
    placement: {shop-0: "0-2047", shop-1: "2048-4095"}
  stores:
    partition: {by: list, buckets: {seoul: [서울], daegu: [대구], daejeon: [대전, null]}}
    tables: {stores: region, visits: region}
    reference: [countries]
    placement: {shop-0: [seoul], shop-1: [daegu, daejeon]}
  members:
    partition: {by: range, buckets: {teens: [10, 20], twenties: [20, 30], thirties: [30, null]}}
    tables: {members: age}
    placement: {shop-0: [teens], shop-1: [twenties, thirties]}
  billing:
    tables: [invoices, payments]
    placement: billing-0
shards:
  shop-0:
    master: mysql://10.0.0.1:3306/shop
    staging: mysql://10.0.0.2:3306/shop
    replicas: [mysql://10.0.0.3:3306/shop, mysql://10.0.0.4:3306/shop]
  shop-1: {master: mysql://10.0.1.1:3306/shop, replication: native}
  billing-0: {master: mysql://10.0.2.1:3306/billing}
"""


@pytest.fixture(scope="module")
def shop() -> ShardMap:
    return ShardMap.parse(SHOP)


def test_the_map_of_the_design_is_read(shop: ShardMap) -> None:
    assert shop.cluster == "shop"
    assert shop.version == 0
    assert list(shop.keyspaces) == ["orders", "stores", "members", "billing"]
    assert shop.keyspace("orders").generated_ids
    assert shop.keyspace("orders").shards == ("shop-0", "shop-1")
    assert shop.keyspace("stores").buckets_on("shop-1") == ("daegu", "daejeon")
    assert shop.shard("shop-0").with_role(Role.REPLICA) == (
        Endpoint("10.0.0.3", 3306, "shop"),
        Endpoint("10.0.0.4", 3306, "shop"),
    )
    assert shop.shard("shop-1").replication is ReplicationKind.NATIVE


def test_the_documented_map_is_good() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "shard-map.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert ShardMap.parse(example).locate("users", [42]) == Placement("orders", "hot-1", "shop-0")


def test_tables_know_their_place(shop: ShardMap) -> None:
    assert shop.table("orders").key == ("user_id",)
    assert shop.table("orders").kind == "sharded"
    assert shop.table("invoices").kind == "vertical"
    assert shop.table("invoices").shards == ("billing-0",)
    assert shop.table("countries").kind == "reference"
    assert [keyspace.name for keyspace in shop.table("countries").keyspaces] == ["orders", "stores"]
    assert shop.table("countries").shards == ("shop-0", "shop-1")


def test_a_key_is_located_by_hash(shop: ShardMap) -> None:
    # CRC32 of "42" is 841265288, and 841265288 mod 4096 is 136: fixed for ever
    assert shop.locate("users", {"id": 42}) == Placement("orders", 136, "shop-0")
    assert shop.locate("orders", [42]).shard == shop.locate("users", {"id": 42}).shard
    assert shop.locate("users", {"id": None}) == Placement("orders", 0, "shop-0")


def test_a_key_is_located_by_list(shop: ShardMap) -> None:
    assert shop.locate("stores", {"region": "서울"}) == Placement("stores", "seoul", "shop-0")
    assert shop.locate("visits", {"region": None}) == Placement("stores", "daejeon", "shop-1")


@pytest.mark.parametrize(("age", "bucket"), [(10, "teens"), (19, "teens"), (20, "twenties"), (99, "thirties")])
def test_a_key_is_located_by_range(shop: ShardMap, age: int, bucket: str) -> None:
    assert shop.locate("members", {"age": age}).bucket == bucket


def test_a_vertical_table_needs_no_key(shop: ShardMap) -> None:
    assert shop.locate("invoices") == Placement("billing", "all", "billing-0")


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ("users", {}, "'users' is sharded by id, not by nothing"),
        ("users", {"user_id": 5}, "'users' is sharded by id, not by user_id"),
        ("users", [1, 2], "'users' is sharded by id: 2 values were given"),
        ("users", {"id": 1.5}, "a float cannot be a shard key"),
        ("stores", {"region": "부산"}, "no bucket of keyspace 'stores' takes the key '부산'"),
        ("members", {"age": 9}, "no bucket of keyspace 'members' takes the key 9"),
        ("members", {"age": "15"}, "'15' cannot be compared with the ranges' int"),
        ("members", {"age": None}, "takes the key None"),
    ],
)
def test_a_key_that_has_no_place_is_refused(shop: ShardMap, table: str, key: object, message: str) -> None:
    with pytest.raises(MissingKey, match=message) as refused:
        shop.locate(table, key)  # type: ignore[arg-type]
    assert refused.value.table == table


def test_unknown_names_come_with_the_known_ones(shop: ShardMap) -> None:
    with pytest.raises(UnknownTable, match=r"the table 'user' .*did you mean 'users'.*countries, invoices"):
        shop.table("user")
    with pytest.raises(UnknownTable, match=r"no keyspace 'order'.*did you mean 'orders'. it has billing, members"):
        shop.keyspace("order")
    with pytest.raises(UnknownTable, match=r"no shard 'shop-2'.*it has billing-0, shop-0, shop-1"):
        shop.shard("shop-2")
    with pytest.raises(UnknownTable, match="is a reference table"):
        shop.locate("countries", {"code": "KR"})


# --- writing


def test_a_map_survives_yaml_json_pickle_and_copy(shop: ShardMap) -> None:
    published = shop.with_version(7)
    assert ShardMap.parse(published.dump()) == published
    assert ShardMap.from_json(published.to_json()) == published
    assert pickle.loads(pickle.dumps(published)) == published
    assert copy.deepcopy(published) == published


def test_a_replica_may_carry_a_weight(shop: ShardMap) -> None:
    first, second = shop.shards["shop-0"].replicas
    assert [shop.shards["shop-0"].weight(each) for each in (first, second)] == [1, 1]
    weighted = ShardMap.parse(SHOP.replace(f"{second}]", f"{{url: {second}, weight: 3}}]"))
    assert weighted.shards["shop-0"].replicas == (first, second)
    assert [weighted.shards["shop-0"].weight(each) for each in (first, second)] == [1, 3]
    assert weighted != shop
    assert ShardMap.parse(weighted.dump()) == weighted
    assert ShardMap.from_json(weighted.to_json()) == weighted
    assert shop.diff(weighted).lines == (f"shard shop-0: weight of {second} 1 -> 3",)
    assert shop.diff(weighted).with_effect(Effect.CHANGES) == shop.diff(weighted).lines
    assert ShardMap.parse(SHOP.replace(f"{second}]", f"{{url: {second}}}]")) == shop
    assert ShardMap.parse(SHOP.replace(f"{second}]", f"{{url: {second}, weight: 1}}]")) == shop


def test_yaml_is_readable(shop: ShardMap) -> None:
    text = shop.dump()
    assert "서울" in text
    assert "shop-0: 0-2047" in text


@pytest.mark.parametrize(
    ("values", "probe"),
    [
        ([42, 43], 42),
        (["42", "43"], "42"),
        (["01234", "12:30", "1e3", "NO", "null", "true", "2024-01-31", "~", ""], "01234"),
        (["서울", "대구\n", " padded ", "'quoted'", "émoji 🛫"], "서울"),
        ([date(2024, 1, 31), date(1, 1, 1)], date(2024, 1, 31)),
        ([datetime(2024, 1, 31, 12, 30, 0, 5), datetime(2024, 1, 31)], datetime(2024, 1, 31, 12, 30, 0, 5)),
        ([None, 1], None),
        ([b"\x00\xff"], b"\x00\xff"),
        ([UUID(int=5)], UUID(int=5)),
        ([Decimal("1.50"), Decimal("-0.0")], Decimal("1.5")),
    ],
)
def test_key_values_keep_their_type_in_every_form(values: list[object], probe: object) -> None:
    listed = _with_partition({"by": "list", "buckets": {"x": values[:1], "y": values[1:] or ["other"]}})
    pinned = _with_partition({"by": "hash", "buckets": 16, "exceptions": dict.fromkeys(values, "x")})
    for original in (listed, pinned):
        for again in (ShardMap.parse(original.dump()), ShardMap.from_json(original.to_json())):
            assert again == original
            assert again.locate("t", [probe]).bucket == "x"


def test_42_and_its_text_share_one_canonical_text_but_not_one_list() -> None:
    as_number = _with_partition({"by": "list", "buckets": {"x": [42], "y": [7]}})
    partition = as_number.keyspaces["k"].partition
    assert isinstance(partition, ListPartition)
    assert partition.values["x"] == (42,)
    assert type(ShardMap.parse(as_number.dump()).keyspaces["k"].partition.values["x"][0]) is int  # type: ignore[union-attr]


def _with_partition(partition: dict[str, object]) -> ShardMap:
    buckets = ["0-15", "x"] if partition["by"] == "hash" else ["x", "y"]
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "c",
            "keyspaces": {"k": {"partition": partition, "tables": {"t": "key"}, "placement": {"a": buckets}}},
            "shards": {"a": {"master": "mysql://h/a"}},
        }
    )


def test_a_json_text_of_another_kind_is_refused() -> None:
    for text in (b"\x00", "[]", "5", "{", '{"$pairs": 5}', '{"$pairs": [[[], 1]]}', '{"$date": "x"}', "null"):
        with pytest.raises(InvalidShardMap):
            ShardMap.from_json(text)


# --- changing


def test_moving_buckets_makes_a_new_map(shop: ShardMap) -> None:
    moved = shop.with_placement("orders", dict.fromkeys(range(10), "shop-1"))
    assert moved.locate("users", {"id": None}).shard == "shop-1"
    assert shop.locate("users", {"id": None}).shard == "shop-0"
    assert shop.diff(moved).lines == ("keyspace orders: 10 buckets shop-0 -> shop-1: 0-9",)
    assert moved.diff(shop).lines == ("keyspace orders: 10 buckets shop-1 -> shop-0: 0-9",)


def test_a_placement_on_nothing_is_refused(shop: ShardMap) -> None:
    with pytest.raises(InvalidShardMap, match="there is no shard 'shop-9'"):
        shop.with_placement("orders", {5: "shop-9"})
    with pytest.raises(InvalidShardMap, match="no bucket 5000"):
        shop.with_placement("orders", {5000: "shop-1"})
    with pytest.raises(UnknownTable):
        shop.with_placement("nothing", {})


def test_a_shard_that_holds_buckets_cannot_be_dropped(shop: ShardMap) -> None:
    with pytest.raises(InvalidShardMap, match="there is no shard 'shop-1'"):
        shop.with_shards({"shop-0": shop.shard("shop-0"), "billing-0": shop.shard("billing-0")})


def test_jobs_at_work_are_part_of_the_map(shop: ShardMap) -> None:
    move = Move("7", "orders", (1, 2, 3), "shop-0", "shop-1")
    moving = shop.with_moves([move])
    assert moving.moves_of("orders") == (move,)
    assert moving.moves_of("stores") == ()
    assert ShardMap.parse(moving.dump()) == moving
    assert shop.diff(moving).lines == ("move 7 added",)
    assert moving.diff(shop.with_moves([Move("7", "orders", (1,), "shop-0", "shop-1")])).lines == ("move 7 changed",)


def test_a_diff_names_every_kind_of_change(shop: ShardMap) -> None:
    changed = ShardMap.parse(
        SHOP.replace("buckets: 4096", "buckets: 4096, exceptions: {42: hot}")
        .replace('shop-1: "2048-4095"', 'shop-1: "2048-4095, hot"')
        .replace("order_lines: user_id", "order_lines: line_id, carts: user_id")
        .replace("    ids: generated\n", "")
        .replace("    reference: [countries]\n    ids", "    ids")
        .replace(", replication: native", "")
        .replace("10.0.0.4", "10.0.0.5")
        .replace("  billing:\n", "  invoicing:\n")
        + "  spare: {master: mysql://10.0.9.9/shop}\n"
    )
    assert shop.diff(changed).lines == (
        "shard spare added",
        "shard shop-0: replica mysql://10.0.0.5:3306/shop added",
        "shard shop-0: replica mysql://10.0.0.4:3306/shop removed",
        "shard shop-1: replication native -> relay",
        "keyspace invoicing added",
        "keyspace billing removed",
        "keyspace orders: the partition changes: rows would have to move",
        "keyspace orders: table carts added",
        "keyspace orders: generated ids off",
        "table order_lines: keyed by line_id, was user_id: rows would have to move",
        "table invoices: vertical in billing -> vertical in invoicing, all rows stay where they are",
        "table payments: vertical in billing -> vertical in invoicing, all rows stay where they are",
    )
    assert not shop.diff(shop.with_version(99))


@pytest.mark.parametrize(
    ("old", "new", "stay"),
    [
        ("by: hash, buckets: 4096", "by: hash, buckets: 2048", False),
        # 42 is in bucket 136, on shop-0, where "own" is too; 1 is on shop-1
        ("by: hash, buckets: 4096", "by: hash, buckets: 4096, exceptions: {42: own}", True),
        ("by: hash, buckets: 4096", "by: hash, buckets: 4096, exceptions: {1: own}", False),
        ("by: hash, buckets: 4096", "by: hash, buckets: 4096, normalize: lower", False),
        ("daejeon: [대전, null]}", "daejeon: [대전, null]}, normalize: lower", False),
        ("{seoul: [서울], daegu: [대구]", "{seoul: [서울, 인천], daegu: [대구]", True),
        ("{seoul: [서울], daegu: [대구]", "{seoul: [서울, 대구], daegu: [x]", False),
        ("daejeon: [대전, null]", "daejeon: [대전]", False),
        ("daegu: [대구], daejeon: [대전, null]", "daegu: [대구, null], daejeon: [대전]", True),
        ("teens: [10, 20]", "teens: [0, 20]", True),
        ("twenties: [20, 30], thirties: [30, null]", "twenties: [20, 40], thirties: [40, null]", True),
        ("teens: [10, 20], twenties: [20, 30]", "teens: [10, 25], twenties: [25, 30]", False),
        ("thirties: [30, null]", "thirties: [30, 99]", False),
    ],
)
def test_a_partition_may_change_where_no_row_has_to_move(shop: ShardMap, old: str, new: str, stay: bool) -> None:
    text = SHOP.replace(old, new).replace('"0-2047"', '"0-2047, own"' if "own" in new else '"0-2047"')
    changed = ShardMap.parse(text.replace('"2048-4095"', "[]" if "2048" in new else '"2048-4095"'))
    assert bool(shop.diff(changed).with_effect(Effect.RELOCATES)) is not stay
    assert len(shop.diff(changed).lines) >= 1


def test_a_normalization_is_part_of_the_map(shop: ShardMap) -> None:
    text = SHOP.replace("by: hash, buckets: 4096", "by: hash, buckets: 4096, normalize: lower")
    text = text.replace("daejeon: [대전, null]}", "daejeon: [대전, null]}, normalize: lower")
    normalized = ShardMap.parse(text)
    assert [normalized.keyspace(name).normalize for name in ("orders", "stores", "members", "billing")] == [
        Normalization.LOWER,
        Normalization.LOWER,
        None,
        None,
    ]
    for again in (ShardMap.parse(normalized.dump()), ShardMap.from_json(normalized.to_json())):
        assert again == normalized
    assert not normalized.diff(ShardMap.parse(normalized.dump()))
    assert normalized.diff(shop).with_effect(Effect.RELOCATES)
    assert "normalize" not in shop.dump()
    assert replace(normalized.keyspace("orders"), name="x").normalize is Normalization.LOWER


def test_a_map_on_one_shard_may_be_cut_up_anew(shop: ShardMap) -> None:
    one = ShardMap.parse(SHOP.replace("2048-4095", "").replace('shop-1: ""', "shop-1: []").replace("0-2047", "0-4095"))
    other = ShardMap.parse(one.dump().replace("buckets: 4096", "buckets: 64").replace("0-4095", "0-63"))
    assert one.diff(other).with_effect(Effect.RELOCATES) == ()
    normalized = ShardMap.parse(one.dump().replace("buckets: 4096", "buckets: 4096\n      normalize: lower"))
    assert one.diff(normalized).with_effect(Effect.RELOCATES) == ()
    # not while its buckets are on their way to another
    moves = [Move("7", "orders", (1,), "shop-0", "shop-1")]
    for changed in (other, normalized):
        assert changed.keyspace("orders").partition != one.keyspace("orders").partition
        assert one.with_moves(moves).diff(changed.with_moves(moves)).with_effect(Effect.RELOCATES)


@pytest.mark.parametrize(("by", "stay"), [("hash, buckets: 4", True), ("directory, buckets: [x, y], home: a", False)])
def test_a_normalization_may_come_to_keys_on_one_shard_unless_they_are_filed(by: str, stay: bool) -> None:
    placement = "0-3" if stay else "x, y"
    text = f"""
format: 1
cluster: c
keyspaces: {{k: {{partition: {{by: {by}}}, tables: {{t: k}}, placement: {{a: "{placement}"}}}}}}
shards: {{a: {{master: "mysql://h/a"}}}}
"""
    before, after = ShardMap.parse(text), ShardMap.parse(text.replace(by, f"{by}, normalize: lower"))
    for one, other in ((before, after), (after, before)):
        assert bool(one.diff(other).with_effect(Effect.RELOCATES)) is not stay


def test_a_reference_table_comes_to_a_shard_by_copying(shop: ShardMap) -> None:
    changed = ShardMap.parse(
        SHOP.replace("tables: [invoices, payments]", "tables: [invoices, payments]\n    reference: [countries]")
    )
    assert shop.diff(changed).with_effect(Effect.RELOCATES) == (
        "reference table countries: has to be copied to billing-0 first",
    )


def test_the_hash_partition_of_a_map_is_format_1(shop: ShardMap) -> None:
    partition = shop.keyspaces["orders"].partition
    assert isinstance(partition, HashPartition)
    assert partition.count == 4096
