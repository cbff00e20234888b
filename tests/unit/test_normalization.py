"""Normalized keys: one key in all its spellings, wherever keys are compared."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import insert, or_, select, tuple_, update
from sqlalchemy.dialects import mysql

from shardkit.adoption.hazards import key_hazards
from shardkit.adoption.tables import ColumnFacts, TableFacts
from shardkit.errors import CrossShardJoin, MissingKey
from shardkit.normalization import ALPHABET, COLLATIONS, Normalization
from shardkit.partition import DirectoryPartition, HashPartition, KeyType, ListPartition
from shardkit.rebalance.fence import MESSAGE_CHARACTERS, triggers_of
from shardkit.rebalance.tables import Column, Table
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.keyvalues import Untrusted, exact_kind, reader_of
from shardkit.routing.planner import plan
from shardkit.routing.route import Route, RouteOptions
from shardkit.shardmap import Keyspace, ShardMap

LOWER = Normalization.LOWER
OUTSIDE = ["é", "Kim\t", "\n", "\x00", "\x7f", "\xa0", "\u1112", "\u3000", "\u212a", "가́", "\U00020000", "🛫"]


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Kim", "kim"),
        ("KIM  ", "kim"),
        (" kim", " kim"),
        ("", ""),
        ("   ", ""),
        ("서울 A", "서울 a"),
        ("金", "金"),
        ("".join(map(chr, range(32, 127))), "".join(map(chr, range(32, 127))).lower()),
        *((end, end) for _, end in ALPHABET),
    ],
)
def test_in_lower_case_without_trailing_blanks(text: str, normalized: str) -> None:
    assert LOWER.text(text) == LOWER.text(normalized) == normalized


@pytest.mark.parametrize("text", OUTSIDE)
def test_other_characters_are_unknown(text: str) -> None:
    with pytest.raises(TypeError, match="outside what 'normalize: lower' knows") as refused:
        LOWER.text(f"private{text}")
    assert "private" not in str(refused.value)


def test_the_collations_that_it_fits() -> None:
    for collation in (
        "utf8mb4_general_ci",
        "utf8mb4_0900_ai_ci",
        "UTF8MB4_UCA1400_AI_CI",
        "latin1_swedish_ci",
        "utf8mb4_bin",
    ):
        assert LOWER.fits(collation), collation
    for collation in ("utf8mb4_lithuanian_ci", "utf8mb4_roman_ci", "utf8mb4_lv_0900_ai_ci", "utf8mb4_danish_ci"):
        assert not LOWER.fits(collation), collation
    assert {collation.lower() for collation in COLLATIONS} == COLLATIONS


# --- buckets -----------------------------------------------------------------------------------------------------


def test_the_spellings_of_a_key_share_its_bucket() -> None:
    hashed = HashPartition(4096, {("VIP",): "own"}, LOWER)
    assert {hashed.bucket_of((name,)) for name in ("Kim", "KIM ", "kim")} == {HashPartition().bucket_of(("kim",))}
    assert hashed.bucket_of(("vip  ",)) == "own"
    assert hashed.bucket_of((None,)) == 0
    listed = ListPartition({"x": ["Seoul"], "y": ["서울", None]}, LOWER)
    assert [listed.bucket_of((name,)) for name in ("SEOUL ", "서울 ", None, "busan")] == ["x", "y", "y", None]
    asked: list[str] = []
    directory = DirectoryPartition(("x",), "home", "k", lambda _, text: asked.append(text) or "x", LOWER)
    assert directory.bucket_of(("ACME ",)) == "x"
    assert asked == ["acme"]
    for partition in (hashed, listed, directory):
        with pytest.raises(TypeError, match="outside"):
            partition.bucket_of(("é",))


def test_parts_of_other_types_count_as_they_are() -> None:
    plain, normalized = HashPartition(), HashPartition(normalize=LOWER)
    for key in ((5,), (5, "kim"), (b"Kim ", None), (None, None)):
        assert normalized.bucket_of(key) == plain.bucket_of(key)
    assert normalized.bucket_of((5, "KIM ")) == plain.bucket_of((5, "kim"))


# --- readers -----------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    Red = "red"


def test_what_is_read_is_normalized() -> None:
    dialect = dialect_of("mysql")
    for column_type in (
        sa.String(10),
        sa.Text(),
        sa.CHAR(10),
        sa.String(10, collation="utf8mb4_general_ci"),
        mysql.VARCHAR(10, charset="latin1", collation="latin1_swedish_ci"),
    ):
        read = reader_of(column_type, dialect, LOWER)
        assert read is not None
        assert read("KIM ") == "kim"
        assert read(None) is None
        for value in (5, "é", "kim\t"):
            assert isinstance(read(value), Untrusted), value
    too_long = reader_of(sa.String(3), dialect, LOWER)
    assert too_long is not None
    assert isinstance(too_long("kim "), Untrusted)
    enumeration = reader_of(sa.Enum(Colour), dialect, LOWER)
    assert enumeration is not None
    assert enumeration(Colour.Red) == "red"
    number = reader_of(sa.Integer(), dialect, LOWER)
    assert number is not None
    assert number(5) == 5


@pytest.mark.parametrize("declared", [{"collation": "latin1_swedish_ci"}, {"charset": "latin1"}, {"charset": "ascii"}])
def test_what_a_character_set_lacks_is_not_trusted(declared: dict[str, str]) -> None:
    read = reader_of(mysql.VARCHAR(10, **declared), dialect_of("mysql"), LOWER)
    assert read is not None
    assert read("KIM") == "kim"
    assert isinstance(read("서울"), Untrusted)


@pytest.mark.parametrize(
    ("collation", "dialect", "fits"),
    [
        (None, "mysql", True),
        ("utf8mb4_0900_ai_ci", "mysql", True),
        ("utf8mb4_lithuanian_ci", "mysql", False),
        ("utf8mb4_roman_ci", "mysql", False),
        (None, "sqlite", True),
        ("NOCASE", "sqlite", True),
        ("RTRIM", "sqlite", True),
        ("mine", "sqlite", False),
    ],
)
def test_a_declared_collation_has_to_fit(collation: str | None, dialect: str, fits: bool) -> None:
    made = sa.String(10, collation=collation)
    assert (reader_of(made, dialect_of(dialect), LOWER) is not None) is fits
    kind = exact_kind(made, dialect_of(dialect), is_key=True, normalize=LOWER)
    assert (kind is KeyType.STRING) is fits


# --- routes ------------------------------------------------------------------------------------------------------

METADATA = sa.MetaData()
users = sa.Table("users", METADATA, sa.Column("name", sa.String(20), primary_key=True), sa.Column("note", sa.String(9)))
orders = sa.Table(
    "orders",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("user_name", sa.String(20, collation="utf8mb4_general_ci")),
    sa.Column("exact", sa.String(20, collation="utf8mb4_0900_bin")),
)
others = sa.Table("others", METADATA, sa.Column("name", sa.String(20), primary_key=True))
pairs = sa.Table(
    "pairs",
    METADATA,
    sa.Column("tenant", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("code", sa.String(20), primary_key=True),
)
PLACES = {f"s{n}": f"{n * 16}-{n * 16 + 15}" for n in range(4)}
MAP = ShardMap.parse(
    {
        "format": 1,
        "cluster": "c",
        "keyspaces": {
            "users": {
                "partition": {"by": "hash", "buckets": 64, "normalize": "lower"},
                "tables": {"users": "name", "orders": "user_name"},
                "placement": PLACES,
            },
            "others": {
                "partition": {"by": "hash", "buckets": 64},
                "tables": {"others": "name"},
                "placement": PLACES,
            },
            "pairs": {
                "partition": {"by": "hash", "buckets": 64, "normalize": "lower"},
                "tables": {"pairs": ["tenant", "code"]},
                "placement": PLACES,
            },
        },
        "shards": {shard: {"master": f"mysql://h/{shard}"} for shard in PLACES},
    }
)


def routed(statement: Any, parameters: Any = None, options: Mapping[str, Any] | None = None) -> Route:
    return plan(statement, parameters, MAP, RouteOptions(**(options or {})))


def bucket(*key: Any, keyspace: str = "users") -> Any:
    partition = MAP.keyspace(keyspace).partition
    assert partition is not None
    return partition.bucket_of(key)


KIM, LEE = bucket("kim"), bucket("lee")
NAME = users.c.name


@pytest.mark.parametrize(
    ("where", "buckets"),
    [
        (NAME == "KIM ", {KIM}),
        (sa.and_(NAME == "Kim", NAME == "KIM"), {KIM}),
        (sa.and_(NAME.in_(["Kim", "Lee"]), NAME.in_(["LEE ", "park"])), {LEE}),
        (NAME.in_(["Kim", "KIM", "kim ", "LEE"]), {KIM, LEE}),
        (or_(NAME == "Kim", NAME == "LEE"), {KIM, LEE}),
        (sa.and_(NAME == "Kim", NAME == "LEE"), set()),
        # the collation's order is its own: '_' may stand before the letters
        (sa.and_(NAME == "kim", NAME < "_"), {KIM}),
        (sa.and_(NAME == "KIM", NAME >= "a", NAME.between("z", "zz")), {KIM}),
        (or_(sa.and_(NAME == "kim", NAME > "z"), NAME == "LEE"), {KIM, LEE}),
        (NAME > "z", None),
        (NAME == "é", None),
        (NAME.in_(["é", "kim"]), None),
        (sa.and_(NAME == "é", NAME == "KIM"), {KIM}),
        (NAME.is_(None), {0}),
        (NAME == 5, None),
    ],
)
def test_what_a_condition_pins(where: Any, buckets: set[Any] | None) -> None:
    assert routed(select(users).where(where)).buckets == buckets


def test_a_range_still_rejects_null() -> None:
    """So an outer join that it stands on is an inner one."""
    joined = select(users.c.note).select_from(orders.outerjoin(users, orders.c.user_name == NAME))
    assert routed(joined.where(NAME > "a", orders.c.user_name == "KIM")).buckets == {KIM}


def test_equality_travels_between_normalized_keys_only() -> None:
    joined = select(users, orders.c.id).join(orders, orders.c.user_name == NAME)
    assert routed(joined.where(orders.c.user_name == "KIM ")).buckets == {KIM}
    assert len(routed(joined).shards) == 4
    other = select(users).join(others, others.c.name == NAME)
    with pytest.raises(CrossShardJoin):
        routed(other)
    # the other key's bucket is that of its very spelling, which this does not tell
    with pytest.raises(CrossShardJoin):
        routed(other.where(NAME == "Kim"))
    exact = select(users).join(orders, orders.c.exact == NAME).where(orders.c.exact == "Kim")
    with pytest.raises(CrossShardJoin):
        routed(exact)


def test_the_string_parts_of_a_composite_key() -> None:
    both = tuple_(pairs.c.tenant, pairs.c.code)
    wanted = bucket(1, "a", keyspace="pairs")
    assert routed(select(pairs).where(pairs.c.tenant == 1, pairs.c.code == "A ")).buckets == {wanted}
    assert routed(select(pairs).where(both.in_([(1, "A"), (1, "a ")]), pairs.c.code == "a")).buckets == {wanted}
    assert routed(insert(pairs).values(tenant=1, code="A")).buckets == {wanted}


def test_rows_go_to_the_bucket_of_their_key_and_stay_as_they_are() -> None:
    statement = insert(users).values(name="KIM ", note="x")
    found = routed(statement)
    assert found.buckets == {KIM}
    assert found.statement is statement
    many = routed(insert(users), [{"name": "Kim"}, {"name": "kim"}, {"name": "LEE"}])
    assert many.buckets == {KIM, LEE}
    assert routed(update(users).where(NAME == "KIM").values(note="y")).buckets == {KIM}
    assert routed(select(users), options={"key": {"name": "KIM"}}).buckets == {KIM}
    for statement in (insert(users).values(name="é"), insert(users).values([{"name": "kim"}, {"name": "é"}])):
        with pytest.raises(MissingKey, match=r"users\.name may be stored as another: the character") as refused:
            routed(statement)
        assert "use keys of printable ASCII" in str(refused.value.hint)
    with pytest.raises(MissingKey, match="says nothing about its bucket: the character"):
        routed(select(users), options={"key": {"name": "é"}})
    with pytest.raises(MissingKey, match="outside what"):
        MAP.locate("users", ["é"])
    assert MAP.locate("users", ["KIM "]).bucket == KIM


# --- hazards and the fence ---------------------------------------------------------------------------------------


def said(collation: str | None, normalize: Normalization | None, column_type: Any = None) -> str:
    column = ColumnFacts("k", column_type or sa.String(10), False, False, collation)
    return " ".join(key_hazards(TableFacts("t", {"k": column}), column, normalize))


def test_the_hazard_of_a_collation_names_both_fixes_and_goes_with_one() -> None:
    for collation in ("utf8mb4_general_ci", "utf8mb4_0900_ai_ci", "utf8mb4_bin"):
        for fix in ("a binary collation without padding", "'normalize: lower' in the map"):
            assert fix in said(collation, None)
        assert said(collation, LOWER) == ""
    assert "'normalize: lower' in the map" not in said("utf8mb4_roman_ci", None)
    assert "utf8mb4_roman_ci is not known to take for the same only what" in said("utf8mb4_roman_ci", LOWER)
    assert said("utf8mb4_nopad_bin", LOWER) == said("utf8mb4_nopad_bin", None) == ""
    assert said(None, LOWER) == ""


def test_blanks_that_a_type_drops_do_not_matter() -> None:
    assert "pads what is stored" in said("utf8mb4_nopad_bin", None, sa.CHAR(10))
    assert said("utf8mb4_nopad_bin", LOWER, sa.CHAR(10)) == ""
    assert "pads what is stored" in said(None, LOWER, sa.BINARY(10))


def test_the_fence_lets_no_row_in_that_no_bucket_takes() -> None:
    made = Table("t", ("a",), (Column("a", "varchar", "utf8mb4", False, False, "mariadb"),), ("a",), ())
    space = "a-keyspace-of-sixty-three-characters-which-is-all-that-a-name-has"[:63]
    bodies = {
        normalize: [
            one.body for one in triggers_of(Keyspace(space, HashPartition(8, {}, normalize), {"t": ("a",)}, {}), made)
        ]
        for normalize in (None, LOWER)
    }
    assert not any("normalize" in body for body in bodies[None])
    into, change, out = bodies[LOWER]
    assert "'normalize'" in into.replace("''", "'")
    assert "OLD" not in into
    assert "AND NOT" in change
    assert "refuses this key" not in out
    assert f", {MESSAGE_CHARACTERS})" in into


@pytest.mark.parametrize("collation", ["BINARY", "NOCASE", "RTRIM"])
def test_what_sqlite_takes_for_equal_is_equal_normalized(collation: str) -> None:
    engine = sa.create_engine("sqlite://")
    texts = [
        f"{one}{other}" for one in ("", "k", "K", "[", "{", "서") for other in ("", " ", "  ", "a", "A", "@", "`", "울")
    ]
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE TABLE t (k TEXT COLLATE {collation})")
        connection.exec_driver_sql("INSERT INTO t VALUES (?)", [(text,) for text in texts])
        equal = connection.exec_driver_sql("SELECT one.k, other.k FROM t one JOIN t other ON one.k = other.k").all()
    assert len(equal) > len(texts) or collation == "BINARY"
    assert all(LOWER.text(one) == LOWER.text(other) for one, other in equal)
