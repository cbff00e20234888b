"""That a normalization takes for one key whatever each collation of its list takes for one, proved by the weights.

Two texts are equal to a collation where their weights are (of a collation with several levels: where at least their
primary weights are), but for trailing blanks where it pads. So what is proved, for the whole alphabet: characters of
one weight are one normalized; the weights of a text are those of its characters, one after another; and no two
sequences of weights run together into the same. Then equal texts are equal normalized, too.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytest

from shardkit.normalization import ALPHABET, COLLATIONS, Normalization, narrow
from shardkit.testing.database import LocalDatabaseServer

LOWER = Normalization.LOWER
TEXTS = [chr(code) for first, last in ALPHABET for code in range(ord(first), ord(last) + 1)]
ASCII = [text for text in TEXTS if text.isascii()]
SPELLINGS = [
    "Kim",
    "KIM",
    "kim",
    "kim  ",
    " kim",
    "KI M",
    "서울",
    "서울 ",
    "서울A",
    "서울a",
    "金A",
    "金a ",
    "",
    " ",
    "ij",
    "Y",
]


class Weights:
    """The weights of texts on one server."""

    def __init__(self, server: LocalDatabaseServer, flavour: str) -> None:
        self.connection: Any = server.connect("normalization")
        self._level = " LEVEL 1" if flavour == "mariadb" else ""
        column = "full_collation_name" if flavour == "mariadb" else "collation_name"
        table = "collation_character_set_applicability" if flavour == "mariadb" else "collations"
        self.collations = frozenset(
            str(name) for (name,) in self.rows(f"SELECT {column} FROM information_schema.{table}")
        )

    def rows(self, query: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(query, values or None)
            return list(cursor.fetchall())

    def close(self) -> None:
        self.connection.close()

    def fill(self, texts: Sequence[str]) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute("DROP TABLE IF EXISTS texts")
            cursor.execute("CREATE TABLE texts (n INT PRIMARY KEY, t VARCHAR(20) CHARACTER SET utf8mb4)")
            for start in range(0, len(texts), 2000):
                rows = list(enumerate(texts[start : start + 2000], start))
                cursor.executemany("INSERT INTO texts VALUES (%s, %s)", rows)
        self.connection.commit()

    def primary(self, collation: str, *, ascii_only: bool) -> list[bytes]:
        """The primary weights of the texts that were filled in."""
        charset = collation.partition("_")[0]
        only = "WHERE t = CONVERT(t USING ascii)" if ascii_only else ""
        query = (
            f"SELECT WEIGHT_STRING(CONVERT(t USING {charset}) COLLATE {collation}{self._level}) FROM texts {only}"
            " ORDER BY n"
        )
        several = "_0900_as_" in collation
        return [_first_level(weight) if several else bytes(weight) for (weight,) in self.rows(query)]


def _first_level(weight: bytes) -> bytes:
    """MySQL puts 0000 between levels."""
    for place in range(0, len(weight) - 1, 2):
        if weight[place : place + 2] == b"\0\0":
            return weight[:place]
    return weight


@pytest.fixture(scope="module")
def weights(database_server: LocalDatabaseServer, flavour: str) -> Iterator[Weights]:
    database_server.execute("CREATE DATABASE normalization")
    made = Weights(database_server, flavour)
    yield made
    made.close()
    database_server.execute("DROP DATABASE normalization")


def _pairs() -> list[str]:
    """All pairs of ASCII, and pairs and triples of all kinds."""
    some = random.Random(1)
    others = TEXTS[len(ASCII) :]
    mixed = [some.choice(ASCII) + some.choice(others) for _ in range(4000)]
    mixed += [some.choice(others) + some.choice(ASCII) for _ in range(4000)]
    mixed += [some.choice(others) + some.choice(others) for _ in range(8000)]
    mixed += ["".join(some.choices(ASCII, k=3)) for _ in range(8000)]
    mixed += ["".join(some.choices(TEXTS, k=3)) for _ in range(4000)]
    return [one + other for one in ASCII for other in ASCII] + mixed


def _faults(weights: Weights, collations: Collection[str]) -> dict[str, str]:
    """What keeps the proof from being one: collation -> why."""
    faults = {}
    own: dict[str, dict[str, bytes]] = {}
    weights.fill(TEXTS)
    for collation in collations:
        texts = ASCII if narrow(collation) else TEXTS
        own[collation] = dict(zip(texts, weights.primary(collation, ascii_only=narrow(collation)), strict=True))
        groups = defaultdict(set)
        for text, weight in own[collation].items():
            # a blank alone would be stripped
            groups[weight].add(LOWER.text(text + "."))
        if mixed := [sorted(group) for group in groups.values() if len(group) > 1]:
            faults[collation] = f"takes for one: {mixed[:3]}"
        elif b"" in groups:
            faults[collation] = "has no weight for a character"
        elif common := _ambiguous(set(groups)):
            faults[collation] = f"has weights that run together: {common.hex()}"
    pairs = _pairs()
    weights.fill(pairs)
    for collation in collations:
        ascii_only = narrow(collation)
        texts = [pair for pair in pairs if pair.isascii()] if ascii_only else pairs
        for text, weight in zip(texts, weights.primary(collation, ascii_only=ascii_only), strict=True):
            if weight != b"".join(own[collation][character] for character in text):
                faults.setdefault(collation, f"weighs {text!r} as another than its characters")
    return faults


def _ambiguous(words: set[bytes]) -> bytes | None:
    """Two sequences of words that make the same bytes, by what is left over (the test of Sardinas and Patterson)."""
    rests = defaultdict(set)
    for word in words:
        for end in range(1, len(word)):
            rests[word[:end]].add(word[end:])
    seen: set[bytes] = set()
    dangling = {rest for word in words for rest in rests.get(word, ())}
    while dangling:
        if common := dangling & words:
            return common.pop()
        seen |= dangling
        following = {rest for each in dangling for rest in rests.get(each, ())}
        following |= {each[end:] for each in dangling for end in range(1, len(each)) if each[:end] in words}
        dangling = following - seen
    return None


def test_every_collation_of_the_list_keeps_to_it(weights: Weights) -> None:
    known = sorted(weights.collations & COLLATIONS - {"binary"})
    assert len(known) > 15
    assert _faults(weights, known) == {}


def test_the_proof_finds_collations_with_rules_of_their_own(weights: Weights) -> None:
    """Otherwise it could not fail."""
    found = _faults(weights, ["utf8mb4_lithuanian_ci", "utf8mb4_roman_ci", "utf8mb4_danish_ci", "utf8mb4_spanish2_ci"])
    assert found == {
        "utf8mb4_lithuanian_ci": "takes for one: [['i.', 'y.']]",
        "utf8mb4_roman_ci": "takes for one: [['i.', 'j.'], ['u.', 'v.']]",
        "utf8mb4_danish_ci": "weighs 'AA' as another than its characters",
        "utf8mb4_spanish2_ci": "weighs 'CH' as another than its characters",
    }
    assert not COLLATIONS & found.keys()


def test_no_weights_run_together() -> None:
    assert _ambiguous({b"a", b"ab", b"ba"}) is not None  # aba
    assert _ambiguous({b"a", b"ab", b"abb"}) is None


def test_what_the_database_takes_for_equal_is_equal_normalized(weights: Weights) -> None:
    """The same by comparison, in columns, with what the weights do not say: padding."""
    for collation in sorted(weights.collations & COLLATIONS - {"binary"}):
        spellings = [text for text in SPELLINGS if text.isascii()] if narrow(collation) else SPELLINGS
        with weights.connection.cursor() as cursor:
            cursor.execute("DROP TABLE IF EXISTS spelled")
            charset = collation.partition("_")[0]
            cursor.execute(f"CREATE TABLE spelled (t VARCHAR(20) CHARACTER SET {charset} COLLATE {collation})")
            cursor.executemany("INSERT INTO spelled VALUES (%s)", [(text,) for text in spellings])
        equal = weights.rows("SELECT one.t, other.t FROM spelled one JOIN spelled other ON one.t = other.t")
        assert len(equal) >= len(spellings)
        assert [pair for pair in equal if LOWER.text(pair[0]) != LOWER.text(pair[1])] == [], collation
        if collation.endswith("_ci"):
            assert ("Kim", "KIM") in equal, collation
        if not any(word in collation for word in ("nopad", "0900")):
            assert ("kim", "kim  ") in equal, collation


def test_the_servers_default_is_in_the_list(weights: Weights) -> None:
    ((default,),) = weights.rows("SELECT @@collation_server")
    assert LOWER.fits(default)
