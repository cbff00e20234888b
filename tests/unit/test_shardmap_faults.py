"""A refused map names the line and the fix, for every fault at once."""

# ruff: noqa: E501 - a fault and its whole message stand on one line, to be read side by side

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardkit.errors import InvalidShardMap
from shardkit.shardmap import ShardMap

GOOD = """\
format: 1
cluster: shop
keyspaces:
  orders:
    partition: {by: hash, buckets: 16}
    tables: {users: id, orders: user_id}
    reference: [countries]
    placement: {a: "0-7", b: "8-15"}
shards:
  a: {master: mysql://h/a}
  b: {master: mysql://h/b}
"""
HASH = "by: hash, buckets: 16"
PLACED = '{a: "0-7", b: "8-15"}'


def faults(text: str) -> tuple[str, ...]:
    with pytest.raises(InvalidShardMap) as refused:
        ShardMap.parse(text, source="map.yaml")
    assert str(refused.value).startswith("map.yaml: the shard map has ")
    return refused.value.problems


def test_the_map_that_the_faults_are_put_into_is_good() -> None:
    ShardMap.parse(GOOD)


NAME = "use letters, digits, '_', '-' and '.', at most 63"
KINDS = "must be {by: hash, list, range or directory, ...}"
RANGES_CANNOT = (
    "line 5: keyspaces.orders.partition.normalize: a range partition cannot normalize: its ranges follow the bytes of the "
    "texts, another order than the collation's; use hash, list or directory, or a binary collation without padding"
)
OUTSIDE = (
    "line 5: keyspaces.orders.partition.exceptions.é: 'é': the character '\\xe9' is outside what 'normalize: lower' knows "
    "(printable ASCII, Hangul syllables and CJK ideographs), and a collation may take it for another"
)
FAULTS = [
    # structure
    ("format: 1", "format: 2", "line 1: format: this shardkit reads format 1, not 2"),
    ("format: 1\n", "", "line 1: the map: 'format' is missing"),
    ("cluster: shop", "cluster: 5", "line 2: cluster: must be a name in quotes or without, not 5"),
    ("cluster: shop", "cluster: my shop", f"line 2: cluster: 'my shop' is not a name: {NAME}"),
    (
        "cluster: shop",
        "cluster: shop\nversion: -1",
        "line 3: version: must be a whole number from 0; publishing raises it, not -1",
    ),
    ("cluster: shop", "cluster: shop\ncluster: x", "line 3: cluster: stands here twice: keep one"),
    (
        "    reference",
        "    refrence",
        "line 7: keyspaces.orders.refrence: is not a field of the map: remove it or mend its spelling",
    ),
    (f"    placement: {PLACED}\n", "", "line 4: keyspaces.orders: 'placement' is missing"),
    ("  orders:\n", "  0 rders:\n", f"line 4: keyspaces.0 rders: '0 rders' is not a name: {NAME}"),
    ("  orders:\n", "  5:\n", f"line 4: keyspaces.5: 5 is not a name: {NAME}, in quotes"),
    (HASH, "by: hsh", f"line 5: keyspaces.orders.partition: {KINDS}, not {{'by': 'hsh'}}"),
    (HASH, "buckets: 16", f"line 5: keyspaces.orders.partition: {KINDS}, not {{'buckets': 16}}"),
    (
        HASH,
        "by: hash, buckets: many",
        "line 5: keyspaces.orders.partition.buckets: must be the number of buckets, from 1 to 65536, not 'many'",
    ),
    (
        HASH,
        "by: hash, buckets: 0",
        "line 5: keyspaces.orders.partition.buckets: must be the number of buckets, from 1 to 65536, not 0",
    ),
    (
        HASH,
        "by: list, buckets: [x]",
        "line 5: keyspaces.orders.partition.buckets: must be {bucket: [value, value]}, not ['x']",
    ),
    (
        HASH,
        "by: range, buckets: {x: [1, 2, 3]}",
        "line 5: keyspaces.orders.partition.buckets.x: must be {bucket: [low, high]}, null for an open end, not [1, 2, 3]",
    ),
    (HASH, "by: directory, buckets: [x]", "line 5: keyspaces.orders.partition: 'home' is missing"),
    (
        "{users: id, orders: user_id}",
        "5",
        "line 6: keyspaces.orders.tables: must be {table: key_column}; in a vertical keyspace a list [table, table], not 5",
    ),
    (
        "{users: id, orders: user_id}",
        "{users: 3}",
        "line 6: keyspaces.orders.tables.users: must be the key's column, or a list of columns: text, quoted where it is a number, not 3",
    ),
    (
        "{users: id, orders: user_id}",
        "{users: [id, 3]}",
        "line 6: keyspaces.orders.tables.users.1: must be the name of a column: quote it, not 3",
    ),
    (
        "[countries]",
        "countries",
        "line 7: keyspaces.orders.reference: must be a list of tables: [countries], not 'countries'",
    ),
    (
        PLACED,
        "{a: 5}",
        'line 8: keyspaces.orders.placement.a: must be buckets: "0-2047, 3000" or a list of numbers, spans and names, not 5',
    ),
    (
        PLACED,
        "{a: [1, {}]}",
        "line 8: keyspaces.orders.placement.a.1: must be a bucket: a number, a span or a name, not {}",
    ),
    (
        "{master: mysql://h/a}",
        "{master: 5}",
        "line 10: shards.a.master: must be an endpoint: mysql://host:3306/database, not 5",
    ),
    (
        "{master: mysql://h/a}",
        "mysql://h/a",
        "line 10: shards.a: must be {master: mysql://host:3306/database}, with staging and replicas where there are, not 'mysql://h/a'",
    ),
    ("{master: mysql://h/a}", "{}", "line 10: shards.a: 'master' is missing"),
    # text
    (GOOD, "", "the map: is empty: start with 'format: 1'"),
    (GOOD, "- 1", "line 1: the map: must be fields: format, cluster, keyspaces, shards, not [1]"),
    ("format: 1", "\tformat: 1", "line 1: the map: is not YAML: found character '\\t' that cannot start any token"),
    ("format: 1", "format: [1", "line 2: the map: is not YAML: expected ',' or ']', but got ':'"),
    ("cluster: shop", "cluster: \x01", "line 2: the map: is not YAML: special characters are not allowed"),
    ("cluster: shop", "cluster: shop\n? [a]\n: 1", "line 3: the map: has a key that is not a single value"),
    ("cluster: shop", f"cluster: {'[' * 3000}", "the map: is nested too deeply"),
    ("cluster: shop", "cluster: &a [*a]", "the map: is nested too deeply"),
    # keyspaces and tables
    (
        "{users: id, orders: user_id}",
        "[users, orders]",
        "line 6: keyspaces.orders.tables: a horizontal keyspace names each table's key: write {table: key_column}",
    ),
    (
        f"    partition: {{{HASH}}}\n",
        "",
        "line 5: keyspaces.orders.tables: tables with keys need a partition: add 'partition: {by: hash}', or write the tables as a list",
    ),
    (
        "    tables: {users: id, orders: user_id}\n    reference: [countries]",
        "    tables: {}",
        "line 6: keyspaces.orders.tables: names no table",
    ),
    (
        "orders: user_id}",
        "orders: [user_id, region]}",
        "line 6: keyspaces.orders.tables.orders: has 2 key columns, users has 1: tables of a keyspace share one key",
    ),
    (
        "orders: user_id}",
        "orders: [user_id, user_id]}",
        "line 6: keyspaces.orders.tables.orders: needs key columns, each once",
    ),
    ("orders: user_id}", "orders: []}", "line 6: keyspaces.orders.tables.orders: needs key columns, each once"),
    ("orders: user_id}", "'': user_id}", "line 6: keyspaces.orders.tables.: a table has no name"),
    (
        "[countries]",
        "[users]",
        "line 7: keyspaces.orders.reference.0: 'users' is sharded in keyspace 'orders': it cannot be a reference table too",
    ),
    (
        "shards:",
        "  other: {tables: [users], placement: a}\nshards:",
        "line 9: keyspaces.other.tables.users: is in keyspace 'orders' already: keep one",
    ),
    # hash
    (
        HASH,
        f"{HASH}, exceptions: {{1.5: x}}",
        "line 5: keyspaces.orders.partition.exceptions.1.5: 1.5: a float cannot be a shard key",
    ),
    (
        HASH,
        f"{HASH}, exceptions: {{1: x, one: y}}",
        "line 5: keyspaces.orders.partition.exceptions: mixes integers and strings: key values are of the column's one type; quote strings",
    ),
    (
        HASH,
        f"{HASH}, exceptions: {{1: '7'}}",
        "line 5: keyspaces.orders.partition.buckets.7: the bucket name '7' reads like numbered buckets: put a letter into it",
    ),
    # list
    (
        HASH,
        "by: list, buckets: {x: [p], y: [p]}",
        "line 5: keyspaces.orders.partition.buckets.y.0: the value 'p' is in bucket 'x' already: keep one",
    ),
    (
        HASH,
        "by: list, buckets: {x: [SE, true]}",
        "line 5: keyspaces.orders.partition.buckets: mixes strings and booleans: key values are of the column's one type; quote strings",
    ),
    (
        HASH,
        "by: list, buckets: {x: [2024-01-01T00:00:00Z]}",
        "line 5: keyspaces.orders.partition.buckets.x: datetime.datetime(2024, 1, 1, 0, 0, t...: a datetime with a time zone cannot be a shard key: DATETIME columns store none",
    ),
    (
        HASH,
        "by: list, buckets: {x: [2024-13-01]}",
        "line 5: keyspaces.orders.partition.buckets.x.0: '2024-13-01' cannot be read: month must be in 1..12; quote it if it is text",
    ),
    (
        HASH,
        "by: list, buckets: {0-5: [p]}",
        "line 5: keyspaces.orders.partition.buckets.0-5: the bucket name '0-5' reads like numbered buckets: put a letter into it",
    ),
    # range
    (
        HASH,
        "by: range, buckets: {x: [1, 5], y: [6, null]}",
        "line 5: keyspaces.orders.partition.buckets.y: leaves a gap: 'x' ends before 5, this starts at 6",
    ),
    (
        HASH,
        "by: range, buckets: {x: [1, 5], y: [4, 9]}",
        "line 5: keyspaces.orders.partition.buckets.y: overlaps 'x', which ends before 5: start at 5",
    ),
    (
        HASH,
        "by: range, buckets: {x: [5, 5]}",
        "line 5: keyspaces.orders.partition.buckets.x: [5, 5) is empty: the low end must be below the high end",
    ),
    (
        HASH,
        "by: range, buckets: {x: [1, 5], y: [null, 1]}",
        "line 5: keyspaces.orders.partition.buckets.y: only the first range may be open below: order the ranges from low to high",
    ),
    (
        HASH,
        "by: range, buckets: {x: [1, null], y: [7, 9]}",
        "line 5: keyspaces.orders.partition.buckets.y: comes after 'x', which is open above: order the ranges from low to high",
    ),
    (
        HASH,
        "by: range, buckets: {x: [1, z]}",
        "line 5: keyspaces.orders.partition.buckets: mixes integers and strings: key values are of the column's one type; quote strings",
    ),
    (
        HASH,
        "by: range, buckets: {x: [false, true]}",
        "line 5: keyspaces.orders.partition.buckets: a range begins and ends at integers, strings, dates or date-times",
    ),
    (HASH, "by: range, buckets: {x: [1, 2]}", None),
    # directory
    (
        HASH,
        "by: directory, buckets: [x], home: z",
        "line 5: keyspaces.orders.partition.home: there is no shard 'z': the map has a, b",
    ),
    # placement
    (
        PLACED,
        '{a: "0-7", b: "9-14"}',
        "line 8: keyspaces.orders.placement: buckets 8, 15 are on no shard: place every bucket once",
    ),
    (
        PLACED,
        '{a: "0-7", b: "7-15"}',
        "line 8: keyspaces.orders.placement.b: bucket 7 is placed on a already: place every bucket once",
    ),
    (
        PLACED,
        '{a: "0-7", b: "8-15", c: []}',
        "line 8: keyspaces.orders.placement.c: there is no shard 'c': the map has a, b",
    ),
    (
        PLACED,
        '{a: "0-7", b: "8-16"}',
        "line 8: keyspaces.orders.placement.b: the partition has no bucket 16: it has 0-15",
    ),
    (PLACED, '{a: "7-0", b: "8-15"}', "line 8: keyspaces.orders.placement.a: the span '7-0' runs backwards: write 0-7"),
    (
        PLACED,
        '{a: "0-7,", b: "8-15"}',
        "line 8: keyspaces.orders.placement.a: '0-7,' has an empty part: write buckets as 0-2047, 3000, name",
    ),
    (PLACED, "a", "line 8: keyspaces.orders.placement: say which shard has which buckets: {shard: buckets}"),
    (
        "shards:",
        "  other: {tables: [x], placement: {a: all}}\nshards:",
        "line 9: keyspaces.other.placement: a vertical keyspace lives on one shard: write 'placement: shard-name'",
    ),
    (
        "shards:",
        "  other: {tables: [x], placement: c}\nshards:",
        "line 9: keyspaces.other.placement: there is no shard 'c': the map has a, b",
    ),
    # endpoints
    (
        "mysql://h/b",
        "mysql://root:pw@h/b",
        "line 11: shards.b.master: an endpoint carries no user and no password: take them out, set SHARDKIT_USER and SHARDKIT_PASSWORD",
    ),
    (
        "mysql://h/b",
        "mysql+pymysql://h/b",
        "line 11: shards.b.master: 'mysql+pymysql://h/b' names a driver: write mysql://..., each process chooses its own",
    ),
    (
        "mysql://h/b",
        "mysql://h/a",
        "line 11: shards.b.master: mysql://h:3306/a already serves a as master: give each its own database",
    ),
    (
        "mysql://h/b",
        "mysql://h:99999/b",
        "line 11: shards.b.master: 'mysql://h:99999/b' has a port that is not a number from 1 to 65535",
    ),
    (
        "mysql://h/b",
        "h",
        "line 11: shards.b.master: 'h' is not an endpoint: write mysql://host:3306/database or sqlite:///file.db",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [5]}",
        "line 10: shards.a.replicas.0: must be an endpoint, or {url: mysql://host:3306/database, weight: 3}, not 5",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{weight: 2}]}",
        "line 10: shards.a.replicas.0: 'url' is missing",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{url: mysql://h/r, weight: -1}]}",
        "line 10: shards.a.replicas.0.weight: must be a whole number from 0 (no reads) to 256, not -1",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{url: mysql://h/r, weight: 257}]}",
        "line 10: shards.a.replicas.0.weight: must be a whole number from 0 (no reads) to 256, not 257",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{url: mysql://h/r, weight: 0.5}]}",
        "line 10: shards.a.replicas.0.weight: must be a whole number from 0 (no reads) to 256, not 0.5",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{url: mysql://h/r, wieght: 2}]}",
        "line 10: shards.a.replicas.0.wieght: is not a field of the map: remove it or mend its spelling",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{url: 7}]}",
        "line 10: shards.a.replicas.0.url: must be an endpoint: mysql://host:3306/database, not 7",
    ),
    (
        "{master: mysql://h/a}",
        "{master: mysql://h/a, replicas: [{url: h}]}",
        "line 10: shards.a.replicas.0.url: 'h' is not an endpoint: write mysql://host:3306/database or sqlite:///file.db",
    ),
    (
        "{master: mysql://h/a}",
        "{master: {url: mysql://h/a, weight: 2}}",
        "line 10: shards.a.master: must be an endpoint: mysql://host:3306/database, not {'url': 'mysql://h/a', 'weight': 2}",
    ),
    # moves
    (
        HASH,
        "by: hash, buckets: 16, normalize: upper",
        "line 5: keyspaces.orders.partition.normalize: must be 'lower', or left out, not 'upper'",
    ),
    (
        HASH,
        "by: hash, buckets: 16, exceptions: {Vip: x, 'VIP ': y}, normalize: lower",
        "line 5: keyspaces.orders.partition.exceptions.VIP : is the same key as 'Vip' to 'normalize': keep one",
    ),
    (
        HASH,
        "by: hash, buckets: 16, exceptions: {é: x}, normalize: lower",
        OUTSIDE,
    ),
    (
        HASH,
        "by: list, buckets: {x: [seoul], y: [busan, Seoul]}, normalize: lower",
        "line 5: keyspaces.orders.partition.buckets.y.1: the value 'Seoul' is in bucket 'x' already: keep one",
    ),
    (
        HASH,
        "by: range, buckets: {x: [null, m], y: [m, null]}, normalize: lower",
        RANGES_CANNOT,
    ),
    (
        "shards:",
        "moves: [{job: '1', keyspace: none, buckets: '1', source: a, target: b}]\nshards:",
        "line 9: moves.0.keyspace: there is no keyspace 'none'",
    ),
    (
        "shards:",
        "moves: [{job: '1', keyspace: orders, buckets: '1', source: a, target: c}]\nshards:",
        "line 9: moves.0.target: there is no shard 'c': the map has a, b",
    ),
    (
        "shards:",
        "moves: [{job: '1', keyspace: orders, buckets: '16', source: a, target: b}]\nshards:",
        "line 9: moves.0.buckets: bucket 16 is on neither end of the move",
    ),
]


@pytest.mark.parametrize(("part", "fault", "problem"), FAULTS)
def test_a_fault_is_named_with_its_line(part: str, fault: str, problem: str | None) -> None:
    assert part in GOOD
    text = GOOD.replace(part, fault)
    if problem is None:
        text = text.replace("{users: id, orders: user_id}", "{users: id}").replace(PLACED, "{a: [x]}")
        ShardMap.parse(text)
    else:
        assert problem in faults(text)


def test_one_fault_is_said_once() -> None:
    """A field that may have several forms gives one message, not one for each form."""
    for part, fault in ((PLACED, "{a: 5}"), ("{users: id, orders: user_id}", "5"), ("{master: mysql://h/a}", "5")):
        assert len(faults(GOOD.replace(part, fault))) == 1


def test_all_faults_are_named_at_once_in_the_order_of_lines() -> None:
    text = GOOD.replace("{master: mysql://h/b}", "{master: mysql://root@h/b}").replace('"8-15"', '"7-14"')
    found = faults(text)
    assert [problem.split(":")[0] for problem in found] == ["line 8", "line 8", "line 11"]


def test_a_map_that_is_too_large_is_refused_before_it_is_read() -> None:
    assert "is over 512 KiB" in faults(GOOD + "#" + "x" * 512 * 1024)[0]


def test_repeated_aliases_do_not_fill_the_memory() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert faults(bomb) == ("the map: is nested too deeply",)


def test_an_alias_may_repeat_a_part() -> None:
    text = GOOD.replace("reference: [countries]", "reference: &r [countries]").replace(
        "shards:",
        "  more: {partition: {by: list, buckets: {x: [1]}}, tables: {t: id}, reference: *r, placement: {a: x}}\nshards:",
    )
    assert ShardMap.parse(text).table("countries").shards == ("a", "b")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidShardMap, match="cannot be read: No such file"):
        ShardMap.load(tmp_path / "none.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(GOOD.replace("countries", "l\xe4nder").encode("latin-1"))
    with pytest.raises(InvalidShardMap, match="is not UTF-8"):
        ShardMap.load(latin)
    with pytest.raises(InvalidShardMap, match="cannot be read: Is a directory"):
        ShardMap.load(os.fspath(tmp_path))
