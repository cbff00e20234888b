"""Tokens: what they hold, what they ask of a replica, and how they travel."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.drivers import gtid_in
from shardkit.errors import InvalidToken
from shardkit.gtid import Flavour, MariaDBPosition, MySQLPosition, Position, parse_position
from shardkit.replicas.balance import Spill
from shardkit.replicas.positions import PositionQuery
from shardkit.replicas.token import LONGEST, Mark, Token

UUID = "3e11fa47-71ca-11e1-9e33-c80aa9429562"
OTHER = "4e11fa47-71ca-11e1-9e33-c80aa9429562"


def at(text: str | None, epoch: int = 0) -> Mark:
    if text is None:
        return Mark(epoch, None)
    return Mark(epoch, parse_position(Flavour.MYSQL if ":" in text else Flavour.MARIADB, text))


def applied(text: str) -> Position:
    position = at(text).position
    assert position is not None
    return position


@pytest.mark.parametrize(
    ("mark", "epoch", "position", "covered"),
    [
        (at("0-1-5"), 0, "0-1-5", True),
        (at("0-1-5"), 0, "0-2-9", True),
        (at("0-1-5"), 0, "0-1-4", False),
        (at("0-1-5"), 0, "1-1-9", False),
        (at("0-1-5"), 1, "0-1-9", False),
        (at("0-1-5", 1), 0, "0-1-9", False),
        (at(f"{UUID}:5"), 0, f"{UUID}:1-5", True),
        (at(f"{UUID}:1-5"), 0, f"{UUID}:1-4", False),
        (at(f"{UUID}:5"), 0, f"{OTHER}:1-9", False),
        (at(f"{UUID}:5"), 0, "0-1-9", False),
        (at(None), 0, "0-1-9", False),
    ],
)
def test_a_replica_may_answer_where_it_has_all_of_it(mark: Mark, epoch: int, position: str, covered: bool) -> None:
    assert mark.covered_by(epoch, applied(position)) is covered
    assert not mark.covered_by(epoch, None)


def test_a_token_only_rises() -> None:
    token = Token().raised("a", at("0-1-5")).raised("a", at("0-1-3"))
    assert token.mark("a") == at("0-1-5")
    assert token.raised("a", at("0-1-5")) is token
    assert token.raised("a", at("1-1-2")).mark("a") == at("0-1-5,1-1-2")
    assert token.mark("b") is None
    gaps = Token().raised("a", at(f"{UUID}:1-5")).raised("a", at(f"{UUID}:9"))
    assert gaps.mark("a") == at(f"{UUID}:1-5:9")


def test_what_is_not_known_asks_for_the_master_until_the_master_was_asked() -> None:
    token = Token().raised("a", at(None)).raised("a", at("0-1-5"))
    assert token.mark("a") == at(None)
    assert token.replaced("a", at("0-1-6")).mark("a") == at("0-1-6")


def test_a_commit_says_nothing_of_other_replication_domains() -> None:
    token = Token().raised("a", at("0-1-5,7-1-9")).replaced("a", at("0-1-6"))
    assert token.mark("a") == at("0-1-6,7-1-9")
    assert token.replaced("a", at("0-1-8,7-1-11")).mark("a") == at("0-1-8,7-1-11")
    assert token.replaced("a", at("0-2-1", 1)).mark("a") == at("0-2-1", 1)


def test_a_later_master_counts_more() -> None:
    token = Token().raised("a", at("0-1-900")).raised("a", at("0-2-5", 1))
    assert token.mark("a") == at("0-2-5", 1)
    assert token.raised("a", at("0-1-999", 0)).mark("a") == at("0-2-5", 1)
    assert token.replaced("a", at("0-1-999", 0)) is token


def test_tokens_of_two_are_merged() -> None:
    one = Token().raised("a", at("0-1-5")).raised("b", at("0-1-7"))
    other = Token().raised("a", at("0-1-6")).raised("c", at("0-1-1"))
    merged = one.merged(other)
    assert {shard: merged.mark(shard) for shard in "abc"} == {"a": at("0-1-6"), "b": at("0-1-7"), "c": at("0-1-1")}


def test_what_a_shortened_token_does_not_name_stays_unknown_in_what_it_is_merged_with() -> None:
    low = Token().raised("a", at("0-1-5", 2)).raised("b", at("0-1-3"))
    cut = Token({"b": at("0-1-9")}, others_on_master=True)
    for merged in (low.merged(cut), cut.merged(low)):
        assert merged.mark("a") == at(None, 2)
        assert merged.mark("b") == at("0-1-9")
        assert merged.others_on_master


_marks = st.builds(
    Mark,
    st.integers(0, 3),
    st.one_of(
        st.none(),
        st.builds(lambda d, s, n: MariaDBPosition.parse(f"{d}-{s}-{n}"), *[st.integers(0, 2**32)] * 3),
        st.builds(lambda u, n: MySQLPosition.parse(f"{u}:1-{n}"), st.uuids(), st.integers(1, 2**60)),
    ),
)


@given(st.dictionaries(st.text(min_size=1, max_size=63), _marks, max_size=5), st.sampled_from([None, "secret"]))
def test_what_is_written_is_read_again(marks: dict[str, Mark], secret: str | None) -> None:
    token = Token(marks)
    text = token.dumps(secret)
    assert Token.loads(text, secret) == token
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.=")


@given(st.one_of(st.text(), st.binary().map(lambda data: data.decode("latin-1"))))
def test_anything_else_is_refused(text: str) -> None:
    for given_text in (text, "1" + text):
        with pytest.raises(InvalidToken):
            Token.loads(given_text)


def test_a_signature_has_to_fit() -> None:
    token = Token().raised("a", at("0-1-5"))
    signed = token.dumps("one")
    for text, secret in ((signed, "other"), (token.dumps(), "one"), (signed[:-1], "one"), ("x" + signed, "one")):
        with pytest.raises(InvalidToken):
            Token.loads(text, secret)


def test_a_token_of_many_shards_stays_short_and_asks_for_masters() -> None:
    token = Token()
    for number in range(500):
        token = token.raised(f"shard-{number}", at(f"{UUID[:-4]}{number:04}:1-{number * 7919 + 1}"))
    text = token.dumps("secret")
    assert len(text) <= LONGEST
    read = Token.loads(text, "secret")
    assert read.others_on_master
    assert read.mark("shard-499") == token.mark("shard-499")
    forgotten = read.mark("shard-0")
    assert forgotten is not None
    assert forgotten.position is None
    assert Token().merged(read).others_on_master


@pytest.mark.parametrize(
    ("message", "gtid"),
    [
        (b"\x00\x16\x00\x14\tlast_gtid\x0a0-28825-10", None),  # cut off
        (b"\x00\x16\x00\x14\tlast_gtid\t0-28825-1", "0-28825-1"),
        (b"\x04Rows\x16\x00\x14\tlast_gtid\t0-28825-1", "0-28825-1"),
        (b"\x00\x11\x00\x0f\nautocommit\x03OFF", None),
        (b"\x00\x0c\x00\x0a\tlast_gtid\x00", None),
        (b"\x00*\x03(\x00&edd8a436-eab5-11f1-ada5-02fc00000001:1", "edd8a436-eab5-11f1-ada5-02fc00000001:1"),
        (
            b"\x005\x05\t\x08________\x03(\x00&edd8a436-eab5-11f1-ada5-02fc00000001:4",
            "edd8a436-eab5-11f1-ada5-02fc00000001:4",
        ),
        (b"\x00", None),
        (b"", None),
    ],
)
def test_the_id_in_an_ok_packet(message: bytes, gtid: str | None) -> None:
    assert gtid_in(message) == gtid


@given(st.binary(max_size=60))
def test_no_packet_makes_it_fail(message: bytes) -> None:
    gtid_in(message)


def test_of_several_ids_of_a_domain_the_newest_counts() -> None:
    query = PositionQuery("", in_snapshot=True)
    assert query.read("0-1-7,0-1-9,2-1-1,0-1-8") == MariaDBPosition.parse("0-1-9,2-1-1")
    assert query.read(b"") is None
    assert query.read(None) is None


def test_only_so_much_spills_to_the_master() -> None:
    now = 0.0
    spill = Spill(0.2, lambda: now)
    for _ in range(80):
        spill.on_replica()
    assert [spill.to_master() for _ in range(30)].count(True) == 22  # a fifth of all, those that spill among them
    now = 60.0
    assert spill.to_master()  # of a few reads a share says nothing
    assert all(Spill(1.0).to_master() for _ in range(100))
