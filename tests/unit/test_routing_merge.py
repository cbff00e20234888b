"""Merging rows of shards: lazily, in order, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa

from shardkit.errors import RoutingError
from shardkit.routing.anatomy import dialect_of
from shardkit.routing.combining import Aggregate, Average, Combine, Deviation, Extreme, Groups, Total
from shardkit.routing.formulas import Call, Constant, Place, greater, unequal
from shardkit.routing.merge import MergePlan, merge_rows
from shardkit.routing.sorting import Comparison, SortKey, comparable, sort_column

SELECT = sa.select(sa.literal(1))
UP = SortKey(1, Comparison.NUMBER)
DOWN = SortKey(1, Comparison.NUMBER, descending=True, nulls_first=False)


def merged(plan: MergePlan, *streams: Any) -> list[Any]:
    return list(merge_rows(plan, streams))


def test_sorted_streams_are_merged_and_hidden_columns_taken_off() -> None:
    plan = MergePlan(SELECT, 1, (UP,))
    assert merged(plan, [("a", None), ("c", 3)], [("b", 1), ("d", 4)]) == [("a",), ("b",), ("c",), ("d",)]


def test_descending_puts_nulls_last() -> None:
    plan = MergePlan(SELECT, 1, (DOWN,))
    assert merged(plan, [("c", 3), ("a", None)], [("d", 4), ("b", 1)]) == [("d",), ("c",), ("b",), ("a",)]


def test_equal_rows_keep_the_order_of_their_shards() -> None:
    assert merged(MergePlan(SELECT, 1, (UP,)), [("a", 1)], [("b", 1)]) == [("a",), ("b",)]


def test_no_shard_is_read_further_than_needed() -> None:
    read: list[int] = []

    def stream(start: int) -> Iterator[tuple[Any, ...]]:
        for n in range(start, 1000, 2):
            read.append(n)
            yield (n, n)

    plan = MergePlan(SELECT, 1, (UP,), limit=3, offset=1)
    assert merged(plan, stream(0), stream(1)) == [(1,), (2,), (3,)]
    assert len(read) <= 6


def test_a_limit_of_nothing_reads_nothing() -> None:
    def stream() -> Iterator[tuple[Any, ...]]:
        raise AssertionError("read")
        yield ()

    assert merged(MergePlan(SELECT, 1, limit=0), stream()) == []


def test_text_goes_on_with_blanks_where_the_collation_pads() -> None:
    def key(text: bytes) -> bytes:
        return b"\x01 " + text

    plan = MergePlan(SELECT, 1, (SortKey(1, Comparison.WEIGHTS),), (SortKey(1, Comparison.WEIGHTS),))
    rows = merged(plan, [("tab", key(b"a\t")), ("a", key(b"a"))], [("a ", key(b"a ")), ("ab", key(b"ab"))])
    assert rows == [("tab",), ("a",), ("ab",)]


def test_text_of_a_collation_of_several_levels_is_refused() -> None:
    plan = MergePlan(SELECT, 1, (SortKey(1, Comparison.WEIGHTS),))
    with pytest.raises(RoutingError, match="several levels"):
        merged(plan, [("a", b"\xff")], [("b", b"\xff")])


def test_a_value_that_the_type_did_not_promise_is_refused() -> None:
    with pytest.raises(RoutingError, match="a str where a number"):
        merged(MergePlan(SELECT, 1, (UP,)), [("a", "10")], [("b", "9")])


@pytest.mark.parametrize("collation", ["NOCASE", "RTRIM"])
def test_sqlites_own_collations(collation: str) -> None:
    """Sorted and told apart as the database does it, letters outside of ASCII among them."""
    texts = ["b", "B", "a ", "A", "a", "Ä", "ä", "a  b", "a b", "", " ", "_", "[", None]
    table = sa.Table("t", sa.MetaData(), sa.Column("x", sa.String(9, collation=collation)))
    column, comparison = sort_column(table.c.x, dialect_of("sqlite"))
    engine = sa.create_engine("sqlite://")
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), [{"x": text} for text in texts])
        for one, other, less, same in connection.execute(
            sa.text("SELECT a.x, b.x, a.x < b.x, a.x = b.x FROM t a, t b WHERE a.x IS NOT NULL AND b.x IS NOT NULL")
        ):
            select = sa.select(column).where(table.c.x.collate("BINARY") == sa.bindparam("text"))
            keys = [comparable(connection.scalar(select, {"text": text}), comparison) for text in (one, other)]
            assert (keys[0] < keys[1], keys[0] == keys[1]) == (bool(less), bool(same)), (one, other)
    engine.dispose()


def test_sqlite_sorts_by_storage_class() -> None:
    plan = MergePlan(SELECT, 1, (SortKey(1, Comparison.SQLITE),))
    rows = [(n, value) for n, value in enumerate([None, 1, 1.5, "", "Z", "a", b"", b"a"])]
    assert merged(plan, rows[::2], rows[1::2]) == [(n,) for n in range(8)]


def one(combine: Combine) -> MergePlan:
    return MergePlan(SELECT, 1, groups=Groups((), (combine,)))


def test_sums_are_exact() -> None:
    half = Decimal("12345678901234567890123456789012345678.01")
    whole = Decimal("24691357802469135780246913578024691356.02")
    assert merged(one(Total(Aggregate.SUM, 0, 1)), [(half, half)], [(half, half)]) == [(whole,)]
    assert merged(one(Total(Aggregate.SUM, 0, 1)), [(None, None)], [(Decimal("0.10"), Decimal("0.10"))]) == [
        (Decimal("0.10"),)
    ]
    assert merged(one(Total(Aggregate.SUM, 0, 1)), [(None, None)], [(None, None)]) == [(None,)]


def test_an_average_is_not_the_average_of_averages() -> None:
    plan = one(Average(0, 1, 2, 3))
    rows = (
        [(Decimal("1.0000"), Decimal("1.0000"), Decimal(1), 1)],
        [(Decimal("4.0000"), Decimal("4.0000"), Decimal(8), 2)],
    )
    assert merged(plan, *rows) == [(Decimal("3.0000"),)]


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(5, 3, "1.6667"), (-5, 3, "-1.6667"), (1, 3, "0.3333"), (1, 32, "0.0313"), (-1, 32, "-0.0313")],
)
def test_an_average_is_rounded_as_mysql_rounds(total: int, count: int, expected: str) -> None:
    sample = Decimal("0.0000")
    plan = one(Average(0, 1, 2, 3))
    rows = [(sample, sample, Decimal(total), count - 1)], [(sample, sample, Decimal(0), 1)]
    assert [str(value) for (value,) in merged(plan, *rows)] == [expected]


def test_the_least_is_chosen_by_the_hidden_column() -> None:
    plan = one(Extreme(False, 0, 1, 2, Comparison.BYTES))
    assert merged(plan, [("B", "B", b"2")], [("a", "a", b"1")], [(None, None, None)]) == [("a",)]


def test_what_coalesce_put_there_stands_only_when_all_are_null() -> None:
    assert merged(one(Total(Aggregate.SUM, 0, 1)), [(0, None)], [(0, None)]) == [(0,)]
    assert merged(one(Total(Aggregate.SUM, 0, 1)), [(0, None)], [(7, 7)]) == [(7,)]


def test_groups_meet_and_are_filtered_sorted_and_cut() -> None:
    groups = Groups(
        (SortKey(2, Comparison.NUMBER),), (Total(Aggregate.COUNT, 1, 3),), (Call(greater, (Place(3), Constant(1))),)
    )
    plan = MergePlan(SELECT, 2, (SortKey(3, Comparison.NUMBER, descending=True),), groups=groups, limit=2)
    rows = [("x", 1, 1, 1), ("y", 1, 2, 1)], [("x", 2, 1, 2), ("z", 4, 3, 4)], [("n", 5, None, 5)]
    assert merged(plan, *rows) == [("n", 5), ("z", 4)]


def test_having_compares_null_with_nothing() -> None:
    groups = Groups((), (Total(Aggregate.SUM, 0, 1),), (Call(unequal, (Place(1), Constant(1))),))
    assert merged(MergePlan(SELECT, 1, groups=groups), [(None, None)], [(None, None)]) == []


def test_the_steps_are_said_in_order() -> None:
    plan = MergePlan(SELECT, 1, (UP,), (UP,), limit=3, offset=1)
    assert plan.steps == ("drop equal rows", "merge sorted rows", "skip 1", "take 3")


def test_rows_that_are_sorted_otherwise_are_not_merged() -> None:
    with pytest.raises(RoutingError, match="sorted its rows otherwise"):
        merged(MergePlan(SELECT, 1, (UP,)), [("a", 1), ("b", 3), ("c", 2)], [("d", 2), ("e", 2)])


def test_means_that_are_large_and_differ_little() -> None:
    whole = [None] * 5
    parts = [(0, 2, Decimal(2 * 10**20), 0.0, 0), (0, 2, Decimal(2 * 10**20 + 2), 0.0, 0)]
    Deviation("VAR_POP", None, 0, 1, 2, 3, 4, 4, sample=False, root=False).put(parts, whole)
    assert whole[0] == 0.25
