"""Positions of both server families: read, written, advanced, compared."""

from __future__ import annotations

import pytest

from shardkit.gtid import Flavour, MariaDBGtid, MariaDBPosition, MySQLGtid, MySQLPosition, parse_position

A = "11111111-1111-1111-1111-111111111111"
B = "22222222-2222-2222-2222-222222222222"


@pytest.mark.parametrize("text", ["", "0-1-100", "0-1-100,7-2-3"])
def test_mariadb_positions_are_written_as_they_were_read(text: str) -> None:
    assert str(parse_position(Flavour.MARIADB, text)) == text


def test_a_mariadb_position_keeps_the_last_transaction_of_each_domain() -> None:
    position = MariaDBPosition.parse("0-1-5").advanced(
        [MariaDBGtid(0, 2, 6), MariaDBGtid(9, 2, 1), MariaDBGtid(0, 2, 7)]
    )
    assert str(position) == "0-2-7,9-2-1"


def test_mariadb_positions_compare_per_domain() -> None:
    here = MariaDBPosition.parse("0-2-7,9-2-1")
    assert here.covers(MariaDBPosition.parse("0-1-7"))
    assert here.covers(MariaDBPosition.parse(""))
    assert not here.covers(MariaDBPosition.parse("0-1-8"))
    assert not here.covers(MariaDBPosition.parse("4-1-1"))
    assert here.ahead_of(MariaDBPosition.parse("0-1-5")) == 3


@pytest.mark.parametrize("text", ["0-1", "0-1-x", "-1-2-3", "0-1-5,0-2-6", "a", "0-1-5;"])
def test_what_is_no_mariadb_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"GTID|domain"):
        MariaDBPosition.parse(text)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("", ""),
        (f"{A}:1-5", f"{A}:1-5"),
        (f"{A}:1-5:7:9-11,\n{B}:1", f"{A}:1-5:7:9-11,{B}:1"),
        (f"{A.upper()}:3:1-2", f"{A}:1-3"),
        (f"{A}:1-5:Blue:1-3", f"{A}:1-5,{A}:blue:1-3"),
    ],
)
def test_mysql_sets_are_read_and_written_in_one_form(text: str, written: str) -> None:
    assert str(parse_position(Flavour.MYSQL, text)) == written
    assert MySQLPosition.parse(written) == MySQLPosition.parse(text)


def test_a_mysql_set_grows_and_closes_its_gaps() -> None:
    position = MySQLPosition.parse(f"{A}:1-5").advanced([MySQLGtid(A, 6), MySQLGtid(A, 9), MySQLGtid(B, 1)])
    assert str(position) == f"{A}:1-6:9,{B}:1"
    assert str(position.advanced([MySQLGtid(A, 8), MySQLGtid(A, 7), MySQLGtid(A, 10)])) == f"{A}:1-10,{B}:1"


def test_mysql_sets_compare_as_sets() -> None:
    here = MySQLPosition.parse(f"{A}:1-6:9,{B}:1")
    assert here.covers(MySQLPosition.parse(f"{A}:2-3:9"))
    assert here.covers(MySQLPosition.parse(""))
    assert not here.covers(MySQLPosition.parse(f"{A}:6-7"))
    assert not here.covers(MySQLPosition.parse(f"{A}:blue:1"))
    assert here.ahead_of(MySQLPosition.parse(f"{A}:1-2:8-9")) == 5


@pytest.mark.parametrize("text", ["nonsense", A, f"{A}:0-5", f"{A}:5-1", f"{A}:x-y", f"{A}:1-2-3"])
def test_what_is_no_mysql_set_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"GTID|interval"):
        MySQLPosition.parse(text)


def test_positions_of_two_families_never_cover_each_other() -> None:
    assert not MySQLPosition.parse("").covers(MariaDBPosition.parse(""))
    assert not MariaDBPosition.parse("").covers(MySQLPosition.parse(""))
    with pytest.raises(TypeError):
        MariaDBPosition().advanced([MySQLGtid(A, 1)])
    with pytest.raises(TypeError):
        MySQLPosition().advanced([MariaDBGtid(0, 1, 1)])


def test_the_wire_form_of_a_set() -> None:
    assert MySQLPosition.parse("").encoded() == bytes(8)
    plain = MySQLPosition.parse(f"{A}:1-5:7").encoded()
    assert plain == (
        (1).to_bytes(8, "little") + b"\x11" * 16 + (2).to_bytes(8, "little")
        + b"".join(number.to_bytes(8, "little") for number in (1, 6, 7, 8))
    )  # fmt: skip


def test_the_wire_form_of_a_set_with_tags() -> None:
    tagged = MySQLPosition.parse(f"{A}:1,{A}:blue:2").encoded()
    head = (1 << 56 | 2 << 8 | 1).to_bytes(8, "little")
    one = b"\x11" * 16 + b"\x00" + b"".join(number.to_bytes(8, "little") for number in (1, 1, 2))
    two = b"\x11" * 16 + b"\x08blue" + b"".join(number.to_bytes(8, "little") for number in (1, 2, 3))
    assert tagged == head + one + two
