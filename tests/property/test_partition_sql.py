"""The bucket of a key is the same in Python and in SQL: on SQLite, and on the server of this run's flavour."""

# ruff: noqa: DTZ001 - key columns store no time zone

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql

from shardkit.normalization import ALPHABET, Normalization
from shardkit.partition import (
    Bucket,
    HashPartition,
    KeyColumn,
    KeyType,
    ListPartition,
    Partition,
    RangePartition,
    canonical_text,
    key_type_of,
    outside_alphabet,
)
from shardkit.testing.database import LocalDatabaseServer

SQLITE, SERVER = "sqlite", "server"
EXAMPLES = settings(max_examples=12, deadline=None)


def _characters(codec: str) -> st.SearchStrategy[str]:
    return st.characters(codec=codec, exclude_categories=["Cs"], exclude_characters="\x00")


@dataclass(frozen=True)
class Column:
    """A key column and the values that it can hold. Collations: binary, as keys need them."""

    type: Any
    values: st.SearchStrategy[Any]
    kind: KeyType
    only: str = ""

    def type_on(self, flavour: str) -> Any:
        return self.type(flavour) if callable(self.type) and not isinstance(self.type, type) else self.type


def _utf8(flavour: str) -> Any:
    collation = {"mariadb": "utf8mb4_nopad_bin", "mysql": "utf8mb4_0900_bin"}.get(flavour)
    return sa.String(40, collation=collation)


COLUMNS = {
    "integer": Column(sa.BigInteger(), st.integers(-(2**63), 2**63 - 1), KeyType.INTEGER),
    "unsigned": Column(mysql.BIGINT(unsigned=True), st.integers(0, 2**64 - 1), KeyType.INTEGER, SERVER),
    "boolean": Column(sa.Boolean(), st.booleans(), KeyType.INTEGER),
    "text": Column(_utf8, st.text(_characters("utf-8"), max_size=40), KeyType.STRING),
    # MySQL's latin1 is Windows' cp1252 with five characters more
    "latin1": Column(
        mysql.VARCHAR(40, charset="latin1", collation="latin1_bin"),
        st.text(_characters("latin-1").filter(lambda c: not "\x7f" <= c <= "\x9f"), max_size=40).map(
            lambda s: s + "€é"[: 40 - len(s)]
        ),
        KeyType.STRING,
        SERVER,
    ),
    "enumeration": Column(sa.Enum("서울", "대구", "a b"), st.sampled_from(["서울", "대구", "a b"]), KeyType.STRING),
    "uuid": Column(sa.Uuid(), st.uuids(version=4), KeyType.UUID),
    "bytes": Column(
        sa.LargeBinary().with_variant(mysql.VARBINARY(40), "mysql", "mariadb"), st.binary(max_size=40), KeyType.BYTES
    ),
    "date": Column(sa.Date(), st.dates(date(1000, 1, 1)), KeyType.DATE),
    "datetime": Column(
        sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb"),
        st.datetimes(datetime(1000, 1, 1)),
        KeyType.DATETIME,
    ),
    "decimal": Column(sa.Numeric(24, 6), st.decimals(-(10**17), 10**17, places=6), KeyType.DECIMAL, SERVER),
    # SQLite has no decimals: they are numbers in double precision
    "small decimal": Column(sa.Numeric(10, 2), st.decimals(-(10**7), 10**7, places=2), KeyType.DECIMAL),
}


@pytest.fixture(scope="module")
def sqlite() -> Iterator[sa.Engine]:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.create_function("crc32", 1, lambda text: None if text is None else zlib.crc32(str(text).encode()))

    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def server(database_server: LocalDatabaseServer) -> Iterator[sa.Engine]:
    database_server.execute("CREATE DATABASE partition_sql")
    engine = sa.create_engine(database_server.dsn("partition_sql"))
    yield engine
    engine.dispose()
    database_server.execute("DROP DATABASE partition_sql")


class Rows:
    """A table of keys, and what the database says of them."""

    def __init__(self, engine: sa.Engine, name: str, columns: Sequence[Column], flavour: str) -> None:
        self.engine = engine
        self.table = sa.Table(
            name.replace(" ", "_"),
            sa.MetaData(),
            sa.Column("row_id", sa.Integer, primary_key=True, autoincrement=False),
            *(sa.Column(f"key_{index}", column.type_on(flavour)) for index, column in enumerate(columns)),
        )
        self.kinds = [column.kind for column in columns]
        self.names = [column.name for column in self.table.columns[1:]]  # type: ignore[index]
        assert [key_type_of(self.table.c[name].type) for name in self.names] == self.kinds
        self.table.drop(engine, checkfirst=True)
        self.table.create(engine)

    @property
    def key_columns(self) -> list[KeyColumn]:
        return [KeyColumn(self.table.c[name], kind) for name, kind in zip(self.names, self.kinds, strict=True)]

    def fill(self, keys: Sequence[tuple[Any, ...]]) -> None:
        with self.engine.begin() as connection:
            connection.execute(self.table.delete())
            rows = [{"row_id": index, **dict(zip(self.names, key, strict=True))} for index, key in enumerate(keys)]
            connection.execute(self.table.insert(), rows)

    def ask(self, *expressions: sa.ColumnElement[Any], literal: bool = False) -> list[tuple[Any, ...]]:
        """Each row's values of the expressions, in the order of the rows."""
        query: Any = sa.select(*expressions).select_from(self.table).order_by(self.table.c.row_id)
        with self.engine.connect() as connection:
            if literal:
                text = str(query.compile(self.engine, compile_kwargs={"literal_binds": True}))
                return [tuple(row) for row in connection.exec_driver_sql(text)]
            return [tuple(row) for row in connection.execute(query)]

    def check(self, partition: Partition, keys: Sequence[tuple[Any, ...]], chosen: Sequence[Sequence[Bucket]]) -> None:
        """Predicates over sets of buckets that make up the whole: true for exactly the rows of their buckets."""
        self.fill(keys)
        predicates = [partition.predicate(self.key_columns, buckets) for buckets in chosen]
        for literal in (False, True):
            for key, answers in zip(keys, self.ask(*predicates, literal=literal), strict=True):
                bucket = partition.bucket_of(key)
                assert None not in answers
                assert [bool(answer) for answer in answers] == [bucket in buckets for buckets in chosen], (key, bucket)


@pytest.fixture(scope="module", params=[SQLITE, SERVER])
def flavour_and_engine(request: pytest.FixtureRequest, flavour: str) -> tuple[str, sa.Engine]:
    if request.param == SQLITE:
        return "sqlite", request.getfixturevalue("sqlite")
    return flavour, request.getfixturevalue("server")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "column" in metafunc.fixturenames:
        metafunc.parametrize("column", list(COLUMNS))


@pytest.fixture
def rows(column: str, flavour_and_engine: tuple[str, sa.Engine]) -> Rows:
    flavour, engine = flavour_and_engine
    if COLUMNS[column].only == SERVER and flavour == "sqlite":
        pytest.skip("SQLite has no such column")
    return Rows(engine, column, [COLUMNS[column]], flavour)


def _keys(column: str) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    return st.lists(st.one_of(st.none(), COLUMNS[column].values).map(lambda value: (value,)), min_size=1, max_size=30)


def test_the_hash_bucket_of_every_type(rows: Rows, column: str) -> None:
    """Also: NULL is bucket 0, and predicates over a split of the buckets take every row exactly once."""

    @EXAMPLES
    @given(_keys(column), st.integers(1, 5000), st.data())
    def law(keys: list[tuple[Any, ...]], count: int, data: st.DataObject) -> None:
        partition = HashPartition(count)
        cut = data.draw(st.integers(0, count))
        rows.check(partition, keys, [range(cut), range(cut, count)])
        for literal in (False, True):
            answers = rows.ask(partition.bucket_expression(rows.key_columns), literal=literal)
            assert [bucket for (bucket,) in answers] == [partition.bucket_of(key) for key in keys]

    law()


def test_pinned_keys_of_every_type(rows: Rows, column: str) -> None:
    @EXAMPLES
    @given(_keys(column), st.data())
    def law(keys: list[tuple[Any, ...]], data: st.DataObject) -> None:
        pinned = data.draw(st.lists(st.sampled_from(keys), max_size=3))
        exceptions = {(_as_in_a_map(key[0]),): f"own-{index % 2}" for index, key in enumerate(pinned)}
        partition = HashPartition(16, exceptions)
        cut = data.draw(st.integers(0, 16))
        rows.check(partition, keys, [[*range(cut), "own-0"], [*range(cut, 16), "own-1"]])

    law()


def test_lists_of_every_type(rows: Rows, column: str) -> None:
    @EXAMPLES
    @given(_keys(column))
    def law(keys: list[tuple[Any, ...]]) -> None:
        values = list({canonical_text(value): _as_in_a_map(value) for (value,) in keys}.values())
        partition = ListPartition({"x": values[::2], "y": values[1::2], "z": []})
        rows.check(partition, keys, [["x"], ["y"], ["x", "z"], []])

    law()


def _as_in_a_map(value: Any) -> Any:
    """YAML has no UUIDs, bytes and decimals: a map holds their canonical text."""
    return canonical_text(value) if isinstance(value, UUID | bytes | Decimal) else value


@pytest.mark.parametrize("kind", ["integer", "text", "date", "datetime"])
def test_ranges(kind: str, flavour_and_engine: tuple[str, sa.Engine]) -> None:
    flavour, engine = flavour_and_engine
    rows = Rows(engine, f"range_{kind}", [COLUMNS[kind]], flavour)

    @EXAMPLES
    @given(_keys(kind), st.sets(COLUMNS[kind].values, min_size=1, max_size=4))
    def law(keys: list[tuple[Any, ...]], cuts: set[Any]) -> None:
        first, *others = sorted(cuts, key=lambda cut: cut.encode() if isinstance(cut, str) else cut)
        ends = [None, first, *others, None]
        bounds = {f"r{index}": (low, ends[index + 1]) for index, low in enumerate(ends[:-1])}
        names = list(bounds)
        rows.check(RangePartition(bounds), keys, [names[::2], names[1::2]])
        closed = RangePartition({"only": (first, others[-1] if others else None)})
        rows.check(closed, keys, [["only"], []])

    law()


@pytest.mark.parametrize("pair", [("integer", "text"), ("uuid", "date"), ("bytes", "integer"), ("text", "text")])
def test_composite_keys(pair: tuple[str, str], flavour_and_engine: tuple[str, sa.Engine]) -> None:
    flavour, engine = flavour_and_engine
    columns = [COLUMNS[name] for name in pair]
    rows = Rows(engine, "_and_".join(pair), columns, flavour)

    @EXAMPLES
    @given(
        st.lists(st.tuples(*(st.one_of(st.none(), column.values) for column in columns)), min_size=1, max_size=30),
        st.integers(1, 5000),
    )
    def law(keys: list[tuple[Any, ...]], count: int) -> None:
        partition = HashPartition(count)
        rows.check(partition, keys, [range(count // 2), range(count // 2, count)])

    law()


def test_a_trigger_finds_the_same_bucket(server: sa.Engine, flavour: str) -> None:
    """The expression has no SQLAlchemy type there, and the connection that fires it may use another character set."""
    partition = HashPartition(64, {("pinned",): "own"})
    collation = _utf8(flavour).collation
    table = f"CREATE TABLE triggered (name VARCHAR(40) COLLATE {collation}, bucket INT, pinned INT)"
    new = [KeyColumn(sa.literal_column("NEW.name"), KeyType.STRING)]
    number, pinned = (
        str(expression.compile(server, compile_kwargs={"literal_binds": True}))
        for expression in (partition.bucket_expression(new), partition.predicate(new, ["own"]))
    )
    with server.begin() as connection:
        for statement in (
            table,
            f"CREATE TRIGGER t BEFORE INSERT ON triggered FOR EACH ROW SET NEW.bucket={number}, NEW.pinned={pinned}",
            "SET NAMES latin1",
            "INSERT INTO triggered (name) VALUES (_utf8mb4 '서울'), ('pinned'), ('Pinned'), (NULL), (''), ('a ')",
            "SET NAMES utf8mb4",
        ):
            connection.exec_driver_sql(statement)
        found = connection.exec_driver_sql("SELECT name, bucket, pinned FROM triggered").all()
    plain = HashPartition(64)
    assert [tuple(row) for row in found] == [
        (name, plain.bucket_of((name,)), int(name == "pinned")) for name in ("서울", "pinned", "Pinned", None, "", "a ")
    ]


def test_the_connections_character_set_does_not_matter(server: sa.Engine, flavour: str) -> None:
    rows = Rows(server, "connections", [COLUMNS["text"]], flavour)
    keys = [("서울",), ("é",), ("🛫",), ("a",)]
    rows.fill(keys)
    partition = HashPartition(5000)
    bucket = partition.bucket_expression(rows.key_columns).compile(server, compile_kwargs={"literal_binds": True})
    with server.connect() as connection:
        for charset in ("latin1", "utf8mb3", "utf8mb4"):
            connection.exec_driver_sql(f"SET NAMES {charset}")
            found = connection.exec_driver_sql(f"SELECT {bucket} FROM connections ORDER BY row_id").scalars().all()
            assert found == [partition.bucket_of(key) for key in keys], charset
        connection.exec_driver_sql("SET NAMES utf8mb4")


def test_a_number_pinned_on_a_text_column_pins_that_text_only(server: sa.Engine, flavour: str) -> None:
    """SQL would find '42abc' equal to 42."""
    rows = Rows(server, "numbers", [COLUMNS["text"]], flavour)
    keys = [("42",), ("42abc",), ("042",), ("42.0",)]
    rows.check(HashPartition(8, {(42,): "own"}), keys, [["own"], range(8)])
    rows.check(ListPartition({"x": [42]}), keys, [["x"], []])


# --- normalized keys ---------------------------------------------------------------------------------------------

LOWER = Normalization.LOWER
_INSIDE = st.one_of(*(st.characters(min_codepoint=ord(first), max_codepoint=ord(last)) for first, last in ALPHABET))
#: Kelvin's sign and the dotted I have lower cases in ASCII, the soft hyphen has no weight, two jamo make 가.
_STRANGERS = st.sampled_from("\u212a\u0130\u00ad\u1100\u1161\u0301\u3000é\t\n\x7fß🛫")
_SPELLINGS = st.sampled_from(["Kim", "KIM", "kim ", "kim", " kim", "k i m", "서울", "서울 ", "K_m", "[", "^", "]-", ""])
_TEXTS = st.one_of(
    _SPELLINGS,
    st.text(st.one_of(_INSIDE, st.sampled_from("aAzZ [`{@ ")), max_size=30),
    st.text(st.one_of(_INSIDE, _STRANGERS), max_size=12),
    st.text(_characters("utf-8"), max_size=12),
)


def _normalized_column(name: str, flavour: str) -> Column:
    collation = name if flavour in ("mariadb", "mysql") else None
    return Column(lambda _: sa.String(40, collation=collation), _TEXTS, KeyType.STRING)


def _bucket(partition: Partition, key: tuple[Any, ...]) -> Bucket | None:
    """None for a key outside the alphabet, too: in SQL it has no bucket, and to Python it is none."""
    try:
        return partition.bucket_of(key)
    except TypeError:
        return None


@pytest.mark.parametrize("collation", ["utf8mb4_general_ci", "utf8mb4_unicode_520_ci", "utf8mb4_bin"])
def test_the_bucket_of_a_normalized_key(collation: str, flavour_and_engine: tuple[str, sa.Engine]) -> None:
    flavour, engine = flavour_and_engine
    rows = Rows(engine, f"normalized_{collation}", [_normalized_column(collation, flavour)], flavour)

    @EXAMPLES
    @given(st.lists(st.one_of(st.none(), _TEXTS), min_size=1, max_size=30), st.integers(1, 5000), st.data())
    def law(texts: list[str | None], count: int, data: st.DataObject) -> None:
        keys = [(text,) for text in texts]
        known = [key for key in keys if _bucket(HashPartition(normalize=LOWER), key) is not None]
        pinned = data.draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
        values = list(dict.fromkeys(LOWER.text(text) for (text,) in known if text is not None))
        hashed = HashPartition(count, dict.fromkeys(pinned, "own"), LOWER)
        listed = ListPartition({"x": values[::2], "y": [value.upper() + " " for value in values[1::2]]}, LOWER)
        rows.fill(keys)
        buckets = [[*range(count // 2), "own"], range(count // 2, count)]
        conditions = [hashed.predicate(rows.key_columns, some) for some in buckets]
        conditions += [listed.predicate(rows.key_columns, [name]) for name in ("x", "y")]
        outside = outside_alphabet(rows.key_columns, LOWER)
        assert outside is not None
        number = HashPartition(count, normalize=LOWER).bucket_expression(rows.key_columns)
        for literal in (False, True):
            found = rows.ask(number, *conditions, outside, literal=literal)
            for key, (in_sql, *answers) in zip(keys, found, strict=True):
                assert in_sql == _bucket(HashPartition(count, normalize=LOWER), key), key
                here, in_list = _bucket(hashed, key), _bucket(listed, key)
                wanted = [here in buckets[0], here in buckets[1], in_list == "x", in_list == "y", here is None]
                assert None not in answers
                assert [bool(answer) for answer in answers] == wanted, key

    law()


def test_the_bucket_of_a_key_with_normalized_parts(flavour_and_engine: tuple[str, sa.Engine]) -> None:
    """Parts of other types count as without the normalization."""
    flavour, engine = flavour_and_engine
    columns = [_normalized_column("utf8mb4_general_ci", flavour), COLUMNS["uuid"], COLUMNS["integer"]]
    rows = Rows(engine, "normalized_parts", columns, flavour)
    partition = HashPartition(1000, normalize=LOWER)

    @EXAMPLES
    @given(st.lists(st.tuples(*(st.one_of(st.none(), column.values) for column in columns)), min_size=1, max_size=20))
    def law(keys: list[tuple[Any, ...]]) -> None:
        rows.fill(keys)
        found = rows.ask(
            partition.bucket_expression(rows.key_columns), partition.predicate(rows.key_columns, range(1000))
        )
        assert [bucket for bucket, _ in found] == [_bucket(partition, key) for key in keys]
        assert [bool(inside) for _, inside in found] == [_bucket(partition, key) is not None for key in keys]

    law()


def test_a_trigger_finds_the_bucket_of_a_normalized_key(server: sa.Engine) -> None:
    partition = HashPartition(64, {("서울",): "own"}, LOWER)
    new = [KeyColumn(sa.literal_column("NEW.name"), KeyType.STRING)]
    number, pinned = (
        str(expression.compile(server, compile_kwargs={"literal_binds": True}))
        for expression in (partition.bucket_expression(new), partition.predicate(new, ["own"]))
    )
    trigger = "CREATE TRIGGER t2 BEFORE INSERT ON triggered_too FOR EACH ROW SET"
    names = ["Kim", "KIM ", "kim", "서울", "서울 ", "é", "\u212a", None]
    with server.begin() as connection:
        for statement in (
            "CREATE TABLE triggered_too (name VARCHAR(40) COLLATE utf8mb4_general_ci, bucket INT, pinned INT)",
            f"{trigger} NEW.bucket={number}, NEW.pinned={pinned}",
            "SET NAMES latin1",
            "INSERT INTO triggered_too (name) VALUES "
            + ", ".join("(NULL)" if name is None else f"(_utf8mb4 x'{name.encode().hex()}')" for name in names),
            "SET NAMES utf8mb4",
        ):
            connection.exec_driver_sql(statement)
        found = connection.exec_driver_sql("SELECT bucket, pinned FROM triggered_too").all()
    plain = HashPartition(64, normalize=LOWER)
    assert [tuple(row) for row in found] == [
        (_bucket(plain, (name,)), int(name in ("서울", "서울 "))) for name in names
    ]
    assert found[0] == found[1] == found[2]
