"""Normalizations: what makes the spellings of one string key, to the database, one key to the partition as well.

A collation that ignores case takes 'Kim' and 'KIM' for one key, one that pads takes 'Kim' and 'Kim ' for one. A
partition hashes, lists or files the normalized text, so that all of them have one bucket. For that a normalization must
never tell apart what the collation takes for equal. What a collation does with all of Unicode nobody can promise ('é'
is 'e' to most, and a soft hyphen is nothing), so there is an alphabet; a text with any other character has no bucket:
no row with it can be inserted, and a read for it asks every shard. `COLLATIONS` are those that were proved to keep to
it, by their weights for the whole alphabet (tests/integration/test_normalization.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from itertools import product
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

#: The characters that a normalized key may hold, first and last of each span: printable ASCII, Hangul syllables, and
#: the ideographs of CJK (the first block of them).
ALPHABET: Final = ((" ", "~"), ("\uac00", "\ud7a3"), ("\u4e00", "\u9fff"))
ALPHABET_IN_WORDS: Final = "printable ASCII, Hangul syllables and CJK ideographs"

_CLASS: Final = "[^" + "".join(f"{first}-{last}" for first, last in ALPHABET) + "]"  # the same for every engine below
_OUTSIDE: Final = re.compile(_CLASS)


class Normalization(StrEnum):
    """The normalizations that a map can declare (``normalize``)."""

    #: In lower case, without trailing blanks.
    LOWER = "lower"

    def text(self, text: str) -> str:
        """The normalized form of a key's text.

        :raises TypeError: for a character outside the alphabet.
        """
        stranger = _OUTSIDE.search(text)
        if stranger is not None:
            raise TypeError(
                f"the character {stranger[0]!a} is outside what 'normalize: {self}' knows ({ALPHABET_IN_WORDS}), and a "
                "collation may take it for another"
            )
        return text.lower().rstrip(" ")

    def expression(self, text: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
        """`text` in SQL; NULL for a text outside the alphabet.

        :param text: an expression in utf8mb4.
        """
        return _Lower(text)

    def outside(self, text: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        """True where a text, which is not NULL, is outside the alphabet."""
        return sa.and_(text.is_not(None), _Lower(text).is_(None))

    def fits(self, collation: str) -> bool:
        """Whether this never tells apart two texts, of the alphabet, that the collation takes for equal."""
        return collation.lower() in COLLATIONS


def narrow(name: str) -> bool:
    """Whether of the alphabet only ASCII can be stored: the character set has no more.

    :param name: of a collation, or of a character set.
    """
    return name.lower().partition("_")[0] in {"ascii", "latin1"}


class _Lower(FunctionElement[str]):
    """A text in lower case without trailing blanks, NULL where it is outside the alphabet."""

    type = sa.String()
    inherit_cache = True


@compiles(_Lower)
def _lower_sql(element: _Lower, compiler: SQLCompiler, **kw: Any) -> str:
    text = compiler.process(element.clauses, **kw)
    if compiler.dialect.name == "sqlite":
        return f"CASE WHEN {text} GLOB '*{_CLASS}*' THEN NULL ELSE rtrim(lower({text}), ' ') END"
    # in hexadecimal, for connections whose character set lacks such characters; with a collation of its own, for those
    # that have lower case of their own (Turkish)
    text = f"{text} COLLATE utf8mb4_bin"
    outside = f"({text}) REGEXP _utf8mb4 x'{_CLASS.encode().hex()}'"
    return f"CASE WHEN {outside} THEN NULL ELSE trim(TRAILING ' ' FROM lower({text})) END"


def _collations() -> Iterator[str]:
    """Without a language's own rules, which make one of two letters (roman: i and j) or two of one."""
    for charset in ("utf8mb4", "utf8mb3", "utf8"):
        yield from (f"{charset}_{name}" for name in ("bin", "general_ci", "unicode_ci", "unicode_520_ci"))
        yield from (f"{charset}_{name}" for name in ("nopad_bin", "general_nopad_ci", "unicode_nopad_ci"))
        yield f"{charset}_unicode_520_nopad_ci"
        for pad, accents, case in product(("", "nopad_"), ("ai", "as"), ("ci", "cs")):
            yield f"{charset}_uca1400_{pad}{accents}_{case}"
    yield from (f"utf8mb4_0900_{name}" for name in ("ai_ci", "as_ci", "as_cs", "bin"))
    for charset, name in (("latin1", "swedish"), ("ascii", "general")):
        yield from (f"{charset}_{rest}" for rest in ("bin", "nopad_bin", f"{name}_ci", f"{name}_nopad_ci"))


#: Of MySQL and MariaDB, in lower case; an old server calls utf8mb3 utf8.
COLLATIONS: Final = frozenset({"binary", *_collations()})
