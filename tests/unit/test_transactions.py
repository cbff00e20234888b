"""Where groups begin and end, on both server families, from bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shardkit.errors import BadEvent
from shardkit.gtid import Flavour
from shardkit_cdc import events
from shardkit_cdc.events import Event
from shardkit_cdc.transactions import Assembler, Outcome, Transaction
from tests.binlog_bytes import event, mariadb_gtid, mysql_gtid, query, table_map, write_rows, xa_prepare, xid

UUID = "11111111-1111-1111-1111-111111111111"
ID = b"\x2a" + bytes(5)
STANDALONE = 0x01
ROWS = [table_map(ID, "shop", "t"), write_rows(ID, b"one")]


def assembled(flavour: Flavour, *parts: Event, part_bytes: int = 1 << 20) -> list[Transaction]:
    assembler = Assembler(flavour, part_bytes=part_bytes)
    return [found for part in parts if (found := assembler.push(part)) is not None]


def mariadb(*parts: Event) -> list[Transaction]:
    return assembled(Flavour.MARIADB, *parts)


def mysql(*parts: Event) -> list[Transaction]:
    return assembled(Flavour.MYSQL, *parts)


def test_rows_up_to_xid_are_one_transaction() -> None:
    (found,) = mariadb(mariadb_gtid(0, 5), event(events.MARIADB_ANNOTATE_ROWS, b"INSERT"), *ROWS, xid())
    assert str(found.gtid) == "0-11-5"
    assert [rows.table.qualified for rows in found.rows] == ["shop.t"]
    assert (found.first, found.last, found.outcome) == (True, True, Outcome.COMMIT)
    (found,) = mysql(mysql_gtid(UUID, 5), query("shop", "BEGIN"), *ROWS, xid())
    assert str(found.gtid) == f"{UUID}:5"
    assert len(found.rows) == 1


def test_nothing_comes_out_before_the_groups_end() -> None:
    assert mariadb(mariadb_gtid(0, 5), *ROWS) == []
    assert mysql(mysql_gtid(UUID, 5), query("shop", "BEGIN"), *ROWS) == []


def test_a_sequence_ends_with_a_commit_query() -> None:
    (found,) = mariadb(mariadb_gtid(0, 5), *ROWS, query("shop", "COMMIT"))
    assert found.outcome is Outcome.COMMIT
    assert len(found.rows) == 1


@pytest.mark.parametrize("begin", [[mariadb_gtid(0, 5)], [mysql_gtid(UUID, 5), query("shop", "BEGIN")]])
def test_a_rolled_back_group_says_so(begin: Sequence[Event]) -> None:
    flavour = Flavour.MARIADB if begin[0].kind == events.MARIADB_GTID else Flavour.MYSQL
    (found,) = assembled(flavour, *begin, *ROWS, query("shop", "ROLLBACK"))
    assert found.outcome is Outcome.ROLLBACK


def test_a_schema_change_is_a_group_by_itself() -> None:
    for found in (
        mariadb(mariadb_gtid(0, 5, flags=STANDALONE), query("shop", "ALTER TABLE t ADD n INT")),
        mysql(mysql_gtid(UUID, 5), query("shop", "ALTER TABLE t ADD n INT")),
    ):
        assert [each.text for each in found[0].statements] == [b"ALTER TABLE t ADD n INT"]
        assert found[0].last


def test_create_table_select_is_a_schema_change_with_rows() -> None:
    (found,) = mariadb(mariadb_gtid(0, 5), query("shop", "CREATE TABLE u (id INT)"), *ROWS, xid())
    assert (len(found.statements), len(found.rows)) == (1, 1)
    (found,) = mysql(
        mysql_gtid(UUID, 5),
        query("shop", "BEGIN"),
        query("shop", "CREATE TABLE u (id INT) START TRANSACTION"),
        *ROWS,
        xid(),
    )
    assert (len(found.statements), len(found.rows)) == (1, 1)


def test_savepoints_leave_nothing_behind() -> None:
    (found,) = mariadb(mariadb_gtid(0, 5), query("shop", "SAVEPOINT `s`"), *ROWS, xid())
    assert (found.statements, len(found.rows)) == ([], 1)


def test_a_rollback_to_a_savepoint_is_refused() -> None:
    with pytest.raises(BadEvent, match="savepoint"):
        mariadb(mariadb_gtid(0, 5), query("shop", "SAVEPOINT `s`"), *ROWS, query("shop", "ROLLBACK TO `s`"))


def test_a_big_transaction_comes_in_parts() -> None:
    begin = [mariadb_gtid(0, 5), table_map(ID, "shop", "t")]
    rows = [write_rows(ID, b"x" * 100, flags=0) for _ in range(10)]
    found = assembled(Flavour.MARIADB, *begin, *rows, xid(), mariadb_gtid(0, 6), *ROWS, xid(), part_bytes=300)
    *parts, last, after = found
    assert [part.first for part in [*parts, last]] == [True] + [False] * len(parts)
    assert [part.last for part in [*parts, last]] == [False] * len(parts) + [True]
    assert sum(len(part.rows) for part in [*parts, last]) == 10
    assert {str(part.gtid) for part in [*parts, last]} == {"0-11-5"}
    assert (str(after.gtid), after.first, after.last) == ("0-11-6", True, True)


def test_xa_branches() -> None:
    flags, more = 0x40, b"\x01\x00\x00\x00\x01\x00a"
    (found,) = mariadb(mariadb_gtid(0, 5, flags=flags, more=more), *ROWS, query("", "XA END X'61',X'',1"), xa_prepare())
    assert (found.outcome, found.xid) == (Outcome.PREPARE, "x'61',x'',1")
    (found,) = mysql(
        mysql_gtid(UUID, 5), query("", "XA START X'61',X'',1"), *ROWS, query("", "XA END X'61',X'',1"), xa_prepare()
    )
    assert (found.outcome, found.xid, len(found.rows)) == (Outcome.PREPARE, "x'61',x'',1", 1)
    (found,) = mysql(
        mysql_gtid(UUID, 5), query("", "XA START X'61',X'',1"), *ROWS, query("", "XA END X'61',X'',1"),
        xa_prepare(one_phase=True),
    )  # fmt: skip
    assert found.outcome is Outcome.COMMIT
    for begin, family in ((mariadb_gtid(0, 6, flags=STANDALONE), mariadb), (mysql_gtid(UUID, 6), mysql)):
        (found,) = family(begin, query("", "XA COMMIT X'61',X'',1"))
        assert (found.outcome, found.xid) == (Outcome.XA_COMMIT, "x'61',x'',1")
        (found,) = family(begin, query("", "XA ROLLBACK X'61',X'',1"))
        assert found.outcome is Outcome.XA_ROLLBACK


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([xid()], "outside"),
        ([mariadb_gtid(0, 5), mariadb_gtid(0, 6)], "before the one at hand has ended"),
        ([*ROWS], "outside"),
        ([mariadb_gtid(0, 5), write_rows(ID, b"x")], "table map"),
        ([mariadb_gtid(0, 5, flags=STANDALONE), *ROWS], "outside"),
        ([query("shop", "ALTER TABLE t ADD n INT")], "GTID"),
        ([event(events.ANONYMOUS_GTID, bytes(42))], "gtid_mode"),
        ([mysql_gtid(UUID, 1)], "family"),
        ([event(events.TRANSACTION_PAYLOAD, bytes(42))], "binlog_transaction_compression"),
        ([mariadb_gtid(0, 5), event(events.INCIDENT, b"\x01\x00")], "incident"),
        ([mariadb_gtid(0, 5), event(events.EXECUTE_LOAD_QUERY, bytes(40))], "binlog_format"),
        ([event(99, b"")], "unknown kind 99"),
    ],
)
def test_what_no_server_writes_is_refused(parts: list[Event], says: str) -> None:
    with pytest.raises(BadEvent, match=says):
        mariadb(*parts)


def test_placeholder_rows_are_nothing() -> None:
    (found,) = mysql(
        mysql_gtid(UUID, 5), query("shop", "BEGIN"), write_rows(events.DUMMY_TABLE_ID, b"", kind=30), *ROWS, xid()
    )
    assert len(found.rows) == 1


def test_equal_table_maps_are_one_object() -> None:
    first, second = mariadb(mariadb_gtid(0, 5), *ROWS, xid(), mariadb_gtid(0, 6), *ROWS, xid())
    assert first.rows[0].table is second.rows[0].table
