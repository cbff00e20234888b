"""The SQL that rebalance writes: cursors along a primary key, the fence's triggers."""

from __future__ import annotations

import pytest

from shardkit.errors import PreconditionFailed
from shardkit.partition import HashPartition, ListPartition, RangePartition
from shardkit.rebalance.copy import show_key, statements
from shardkit.rebalance.fence import MESSAGE_CHARACTERS, triggers_of
from shardkit.rebalance.tables import Column, Table, text_literal
from shardkit.shardmap import Keyspace


def column(name: str, data_type: str = "bigint", *, counted: bool = False, generated: bool = False) -> Column:
    charset = "utf8mb4" if "char" in data_type else None
    return Column(name, data_type, charset, generated, counted, "mariadb")


def table(*columns: Column, primary: tuple[str, ...] = ("a",), key: tuple[str, ...] = ("a",)) -> Table:
    return Table("t`x", key, columns, primary, ())


def test_a_cursor_is_compared_column_by_column_as_indexes_can() -> None:
    one = table(column("a"))
    assert one.after(None) == one.upto(None) == "TRUE"
    assert one.after(("5",)) == "((`a`>5))"
    two = table(column("a"), column("b"), primary=("a", "b"))
    assert two.after(("5", "'x'")) == "((`a`>5) OR (`a`=5 AND `b`>'x'))"
    assert two.upto(("5", "'x'")) == "((`a`<5) OR (`a`=5 AND `b`<='x'))"
    assert two.one_of([("5", "6"), ("7", "8")]) == "((`a`=5 AND `b`=6) OR (`a`=7 AND `b`=8))"


def test_names_and_texts_are_quoted() -> None:
    assert table(column("a`b")).insert_head == "INSERT INTO `t``x` (`a``b`) VALUES "
    assert text_literal("it's \\ here") == "'it''s \\\\ here'"


def test_generated_columns_are_not_copied() -> None:
    made = table(column("a"), column("g", generated=True))
    assert made.insert_head == "INSERT INTO `t``x` (`a`) VALUES "
    assert "`g`" not in made.row_expression


def test_rows_are_put_into_statements_of_the_size_asked_for() -> None:
    made = table(column("a"))
    rows = [b"(" + str(number).encode() * 10 + b")" for number in range(9)]
    parts = list(statements(made, rows, 80))
    assert all(len(part) <= 80 for part in parts)
    assert b",".join(part.removeprefix(made.insert_head.encode()) for part in parts) == b",".join(rows)
    assert list(statements(made, [b"(" + b"x" * 200 + b")"], 80)) == [
        made.insert_head.encode() + b"(" + b"x" * 200 + b")"
    ]
    assert list(statements(made, [], 80)) == []


def test_keys_are_shown_as_people_write_them() -> None:
    made = table(column("a", "varchar"), column("b"), column("c", "varbinary"), primary=("a", "b", "c"))
    assert show_key(made, ("_utf8mb4 X'EC849CEC9AB8'", "7", "X'00FF'")) == "a='서울', b=7, c=0x00ff"


def test_a_key_whose_bucket_the_database_cannot_tell_is_refused() -> None:
    for data_type, why in (("float", "no exact text"), ("timestamp", "time zone")):
        with pytest.raises(PreconditionFailed, match=why):
            table(column("a", data_type)).bucket(HashPartition(8))


@pytest.mark.parametrize(
    ("key", "timing"),
    [(column("a"), "BEFORE"), (column("a", counted=True), "AFTER"), (column("a", generated=True), "AFTER")],
)
def test_the_fence_looks_at_a_row_once_its_key_is_settled(key: Column, timing: str) -> None:
    space = Keyspace("orders", HashPartition(8), {"t": ("a",)}, {})
    insert, update, delete = triggers_of(space, table(key))
    assert [(one.timing, one.event) for one in (insert, update, delete)] == [
        (timing, "INSERT"),
        (timing, "UPDATE"),
        ("BEFORE", "DELETE"),
    ]
    assert "NEW.`a`" in insert.body
    assert "OLD." not in insert.body
    assert "OLD.`a`" in update.body
    assert "NEW.`a`" in update.body
    assert "OLD.`a`" in delete.body
    assert all("LOCK IN SHARE MODE" in one.body for one in (insert, update, delete))


@pytest.mark.parametrize(
    "partition",
    [
        HashPartition(4096, {("42",): "hot-1"}),
        ListPartition({"seoul": ["서울", None], "daegu": ["it's"]}),
        RangePartition({"low": (None, 10), "high": (10, None)}),
        None,
    ],
    ids=["hash", "list", "range", "vertical"],
)
def test_trigger_names_fit_and_change_with_their_bodies(partition: HashPartition | None) -> None:
    data_type = "bigint" if isinstance(partition, RangePartition) else "varchar"
    key = () if partition is None else ("a",)
    long = Table("t" * 64, key, (column("a", data_type),), ("a",), ())
    made = triggers_of(Keyspace("k" * 63, partition, {"t" * 64: key}, {}), long)
    other = triggers_of(Keyspace("k" * 62, partition, {"t" * 64: key}, {}), long)
    assert len({one.name for one in (*made, *other)}) == 6
    assert all(len(one.name) <= 64 for one in made)
    assert str(MESSAGE_CHARACTERS) in made[0].body
