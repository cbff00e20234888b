"""Any legal log comes out whole and in order, however it is cut; any other is refused and never hangs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.errors import BadEvent, Interrupted, PreconditionFailed, RelayError
from shardkit.gtid import Flavour, MySQLGtid, MySQLPosition
from shardkit_cdc import events
from shardkit_cdc import wire as wire_module
from shardkit_cdc.events import Event, Format, with_length
from shardkit_cdc.payload import payloads
from shardkit_cdc.query import Query
from shardkit_cdc.statement import outline
from shardkit_cdc.table_map import TableMap
from shardkit_cdc.transactions import Assembler, Outcome, Transaction
from shardkit_cdc.wire import EventReader
from tests.binlog_bytes import event, format_event, mariadb_gtid, mysql_gtid, query, sealed, table_map, write_rows, xid

UUID = "11111111-1111-1111-1111-111111111111"


@dataclass(frozen=True)
class Group:
    """One transaction as a server would log it."""

    images: tuple[tuple[int, bytes], ...]
    end: str
    statement: str = ""

    def events(self, flavour: Flavour, number: int) -> Iterator[Event]:
        lone = bool(self.statement) and not self.images
        if flavour is Flavour.MARIADB:
            yield mariadb_gtid(0, number, flags=1 if lone else 0)
        else:
            yield mysql_gtid(UUID, number)
            if not lone:
                yield query("shop", "BEGIN")
        if self.statement:
            yield query("shop", self.statement)
        if lone:
            return
        for table, image in self.images:
            yield table_map(bytes([table]) + bytes(5), "shop", f"t{table}")
            yield write_rows(bytes([table]) + bytes(5), image)
        yield xid() if self.end == "xid" else query("shop", self.end)


GROUPS = st.builds(
    Group,
    st.lists(st.tuples(st.integers(1, 3), st.binary(max_size=60)), max_size=6).map(tuple),
    st.sampled_from(["xid", "COMMIT", "ROLLBACK"]),
    st.sampled_from(["", "", "CREATE TABLE u (id INT)"]),
)


@settings(deadline=None)
@given(st.sampled_from(Flavour), st.lists(GROUPS, max_size=8), st.integers(1, 300))
def test_every_group_comes_out_once_whole_and_in_order(flavour: Flavour, groups: list[Group], part_bytes: int) -> None:
    assembler = Assembler(flavour, part_bytes=part_bytes)
    parts: list[Transaction] = []
    for number, group in enumerate(groups, 1):
        logged = list(group.events(flavour, number))
        for each in logged:
            found = assembler.push(each)
            if found is not None:
                parts.append(found)
                assert not found.last or each is logged[-1], "the group ended before its end"
        assert parts[-1].last
    whole: dict[str, list[Transaction]] = {}
    for part in parts:
        whole.setdefault(str(part.gtid), []).append(part)
    assert len(whole) == len(groups)
    for group, (_, found) in zip(groups, whole.items(), strict=True):
        assert [part.first for part in found] == [True] + [False] * (len(found) - 1)
        assert [part.last for part in found] == [False] * (len(found) - 1) + [True]
        images = [rows.event.data[29:] for part in found for rows in part.rows]
        assert images == [image for _, image in group.images]
        assert len(found[0].statements) == bool(group.statement)
        rolled_back = group.end == "ROLLBACK" and not (group.statement and not group.images)
        assert (found[-1].outcome is Outcome.ROLLBACK) is rolled_back


class Wire:
    """A connection that delivers bytes in pieces of any sizes."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data = data
        self._sizes = sizes

    def receive(self) -> bytes:
        if not self._data:
            raise Interrupted("the connection was closed")
        size = self._sizes.pop() if self._sizes else 1 << 17
        piece, self._data = self._data[:size], self._data[size:]
        return piece


def packets(logged: Sequence[Event]) -> bytes:
    raws = [format_event(), *map(sealed, logged)]
    return b"".join(
        (len(raw) + 1).to_bytes(3, "little") + bytes([number % 256, 0]) + raw for number, raw in enumerate(raws)
    )


def read_all(wire: Wire) -> list[Event]:
    reader = EventReader(wire.receive, "server:3306")
    found: list[Event] = []
    with suppress(Interrupted):
        while True:
            found += reader.read()
    return found


@settings(deadline=None)
@given(st.lists(GROUPS, max_size=5), st.lists(st.integers(1, 200), max_size=60), st.sampled_from([1, 30, 1 << 17]))
def test_events_come_out_whole_however_the_bytes_are_cut(groups: list[Group], sizes: list[int], piece: int) -> None:
    logged = [each for number, group in enumerate(groups, 1) for each in group.events(Flavour.MARIADB, number)]
    with patch.object(wire_module, "PIECE_BYTES", piece):  # small: every event takes the way of the long ones too
        found = read_all(Wire(packets(logged), sizes))
    assert [(event.kind, with_length(event.data)) for event in found] == [(each.kind, each.data) for each in logged]


@settings(deadline=None)
@given(st.lists(GROUPS, min_size=1, max_size=3), st.data())
def test_a_fault_comes_after_the_events_before_it(groups: list[Group], data: st.DataObject) -> None:
    logged = [each for number, group in enumerate(groups, 1) for each in group.events(Flavour.MARIADB, number)]
    at = data.draw(st.integers(0, len(logged) - 1))
    spoiled = bytearray(sealed(logged[at]))
    spoiled[-1] ^= 1
    raws = [format_event(), *map(sealed, logged[:at]), bytes(spoiled), *map(sealed, logged[at + 1 :])]
    stream = b"".join((len(raw) + 1).to_bytes(3, "little") + b"\0\0" + raw for raw in raws)
    reader = EventReader(Wire(stream, []).receive, "server:3306")
    found: list[Event] = []

    def read_on() -> None:
        while True:
            found.extend(reader.read())

    with pytest.raises(BadEvent, match="CRC32"):
        read_on()
    assert len(found) == at


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=20))
def test_arbitrary_bytes_on_the_wire_end_with_one_kind_of_error(data: bytes, sizes: list[int]) -> None:
    for stream in (data, packets([]) + data):
        with suppress(RelayError, PreconditionFailed):
            read_all(Wire(stream, list(sizes)))


def test_long_events_are_handed_over_one_at_a_time() -> None:
    """A thousand of them in a row must not gather in memory."""
    logged = [write_rows(b"\x01" + bytes(5), bytes([number]) * 300_000) for number in range(8)]
    reader = EventReader(Wire(packets(logged), []).receive, "server:3306")
    sizes = []
    with suppress(Interrupted):
        while True:
            sizes.append(len(reader.read()))
    assert sum(sizes) == 8
    assert max(sizes) == 1


def test_an_event_of_several_packets() -> None:
    big = sealed(write_rows(b"\x01" + bytes(5), b"x" * (0xFFFFFF + 1000)))
    body = b"\0" + big
    stream = packets([]) + b"\xff\xff\xff\0" + body[:0xFFFFFF]
    rest = body[0xFFFFFF:]
    stream += len(rest).to_bytes(3, "little") + b"\1" + rest
    (found,) = read_all(Wire(stream, []))
    assert len(found.data) == len(big) - 4


@settings(deadline=None)
@given(st.lists(GROUPS, min_size=1, max_size=5), st.integers(50, 2000))
def test_payloads_hold_every_row_event_once_in_order_behind_its_map(groups: list[Group], usual: int) -> None:
    assembler = Assembler(Flavour.MARIADB)
    found = [
        transaction
        for number, group in enumerate(groups, 1)
        for each in group.events(Flavour.MARIADB, number)
        if (transaction := assembler.push(each)) is not None
    ]
    rows = [row for transaction in found for row in transaction.rows]
    images: list[bytes] = []
    for payload in payloads(rows, largest=1 << 20, usual=usual):
        maps: set[bytes] = set()
        at = 0
        while at < len(payload):
            size = int.from_bytes(payload[at + 9 : at + 13], "little")
            each = payload[at : at + size]
            at += size
            if each[4] == events.TABLE_MAP:
                maps.add(each[19:25])
            else:
                assert each[19:25] in maps
                images.append(each[29:])
                assert bool(each[25] & events.STMT_END) is (at == len(payload))
    assert images == [row.event.data[29:] for row in rows]


KINDS = sorted(
    events.ROWS
    | set(events.COMPRESSED_ROWS)
    | {events.QUERY, events.XID, events.TABLE_MAP, events.GTID, events.GTID_TAGGED, events.MARIADB_GTID}
    | {events.MARIADB_QUERY_COMPRESSED, events.XA_PREPARE, events.USER_VAR, 77}
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(Flavour), st.lists(st.tuples(st.sampled_from(KINDS), st.binary(max_size=80)), max_size=12))
def test_arbitrary_events_are_taken_or_refused_with_one_error(flavour: Flavour, parts: list[tuple[int, bytes]]) -> None:
    assembler = Assembler(flavour)
    with suppress(BadEvent):
        for kind, body in parts:
            assembler.push(event(kind, body))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(Flavour), st.lists(GROUPS, min_size=1, max_size=3), st.data())
def test_a_log_with_damaged_events_is_taken_or_refused_with_one_error(
    flavour: Flavour, groups: list[Group], data: st.DataObject
) -> None:
    logged = [each for number, group in enumerate(groups, 1) for each in group.events(flavour, number)]
    at = data.draw(st.integers(0, len(logged) - 1))
    damaged = bytearray(logged[at].data)
    cut = data.draw(st.integers(19, len(damaged)))
    flip = data.draw(st.integers(19, len(damaged) - 1)) if len(damaged) > 19 else None
    if flip is not None:
        damaged[flip] ^= data.draw(st.integers(1, 255))
    logged[at] = Event(logged[at].kind, bytes(damaged[:cut]))
    assembler = Assembler(flavour)
    with suppress(BadEvent):
        for each in logged:
            transaction = assembler.push(each)
            for rows in transaction.rows if transaction else ():
                with suppress(BadEvent):
                    rows.table.columns()


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_with_one_error(raw: bytes) -> None:
    form = Format.parse(format_event())
    for read in (
        lambda: Format.parse(raw),
        lambda: events.checked_event(raw, form),
        lambda: TableMap.parse(event(events.TABLE_MAP, raw)).columns(),
        lambda: Query.parse(event(events.QUERY, raw)),
        lambda: events.mariadb_group(event(events.MARIADB_GTID, raw)),
        lambda: events.mysql_group(event(events.GTID, raw)),
        lambda: events.mysql_group(event(events.GTID_TAGGED, raw)),
        lambda: events.leading_text(event(30, raw)),
    ):
        with suppress(BadEvent):
            read()


@given(st.binary(max_size=60), st.integers(0, 10**6), st.integers(1, 255))
def test_no_changed_byte_passes_the_checksum(body: bytes, place: int, change: int) -> None:
    raw = bytearray(sealed(event(events.XID, body)))
    raw[place % len(raw)] ^= change
    form = Format.parse(format_event())
    try:
        events.checked_event(bytes(raw), form)
    except BadEvent:
        return
    raise AssertionError("a changed event was taken")


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=200))
def test_any_text_has_an_outline(text: str) -> None:
    outline(text)
    outline(text, ansi_quotes=True)


@given(st.lists(st.integers(1, 40), max_size=40))
def test_a_gtid_set_is_the_set_of_its_transactions(numbers: list[int]) -> None:
    position = MySQLPosition()
    for number in numbers:
        position = position.advanced([MySQLGtid(UUID, number)])
    assert position == MySQLPosition().advanced(MySQLGtid(UUID, number) for number in numbers)
    assert MySQLPosition.parse(str(position)) == position
    assert position.ahead_of(MySQLPosition()) == len(set(numbers))
    for number in range(1, 42):
        assert position.covers(MySQLPosition.parse(f"{UUID}:{number}")) is (number in numbers)
