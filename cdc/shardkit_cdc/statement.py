"""What a logged statement does, and to which tables: enough to replay it, leave it out, or stop. Pure.

Not a parser: the names that a statement works on stand at its head, behind a few fixed words; bodies of views,
triggers and routines are not looked into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise


class Effect(Enum):
    """What a statement is to the relay."""

    #: Creates, changes or drops tables, views, triggers, routines: replayed.
    SCHEMA = auto()
    #: CREATE, ALTER or DROP DATABASE.
    DATABASE = auto()
    #: Changes rows by itself, in statement format: refused.
    ROWS = auto()
    #: Accounts, maintenance, events, temporary tables: belongs to one server, not to the data.
    SERVER = auto()
    #: Marks inside a transaction without an effect of their own.
    MARK = auto()
    #: ROLLBACK TO: rows before it may be undone.
    PARTIAL_ROLLBACK = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Name:
    """A name as the statement has it; ``database`` is None where the default database is meant."""

    database: str | None
    name: str


@dataclass(frozen=True, slots=True)
class Statement:
    """The outline of one statement.

    :param verb: its first word, in upper case.
    :param kind: of SCHEMA and DATABASE statements what they work on: ``TABLE``, ``VIEW``, ``DATABASE`` ...
    :param names: the objects worked on; for triggers and indexes their table.
    :param mentioned: every database that stands in front of a dot anywhere in the text.
    """

    effect: Effect
    verb: str
    kind: str = ""
    names: tuple[Name, ...] = ()
    mentioned: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Token:
    """A word, a quoted name, a literal or a sign, with its place in the text."""

    text: str
    start: int
    end: int
    quoted: bool = False
    literal: bool = False

    @property
    def word(self) -> str:
        return "" if self.quoted or self.literal else self.text.upper()


_TOKEN = re.compile(
    r"""
    (?P<space>\s+|--(?=[\s]|$)[^\n]*|\#[^\n]*)
  | (?P<executable>/\*M?!\d*)
  | (?P<comment>/\*.*?(?:\*/|$))
  | (?P<close>\*/)
  | (?P<backtick>`(?:[^`]|``)*`)
  | (?P<double>"(?:[^"\\]|\\.|"")*")
  | (?P<single>'(?:[^'\\]|\\.|'')*')
  | (?P<name>[\w$\x80-\U0010ffff\udc80-\udcff]+)
  | (?P<sign>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def tokens(text: str, *, ansi_quotes: bool = False) -> Iterator[Token]:
    """Cut a statement into tokens; comments are left out, but what stands in executable comments is not."""
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup
        if kind in {"space", "comment", "executable", "close"}:
            continue
        raw = match.group()
        if kind == "backtick" or (kind == "double" and ansi_quotes):
            quote = raw[0]
            yield Token(raw[1:-1].replace(quote * 2, quote), match.start(), match.end(), quoted=True)
        elif kind in {"single", "double"}:
            yield Token(raw, match.start(), match.end(), literal=True)
        else:
            yield Token(raw, match.start(), match.end())


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ROW_VERBS = _words("INSERT UPDATE DELETE REPLACE LOAD CALL DO SELECT WITH SET IMPORT HANDLER")
_SERVER_VERBS = _words(
    "GRANT REVOKE FLUSH ANALYZE OPTIMIZE REPAIR CHECK CHECKSUM CACHE INSTALL UNINSTALL RESET SHUTDOWN PURGE CHANGE "
    "START STOP"
)
_MARK_VERBS = _words("SAVEPOINT RELEASE BEGIN COMMIT XA")
_SERVER_KINDS = _words("USER ROLE SERVER EVENT TABLESPACE UNDO LOGFILE RESOURCE INSTANCE SPATIAL REFERENCE")
_OBJECT_KINDS = _words("TABLE INDEX VIEW TRIGGER PROCEDURE FUNCTION SEQUENCE LIBRARY PACKAGE DATABASE SCHEMA")
#: Words that may stand between CREATE, ALTER or DROP and the kind of object.
_BEFORE_KIND = _words(
    "OR REPLACE TEMPORARY UNIQUE FULLTEXT SPATIAL ONLINE OFFLINE IGNORE AGGREGATE SQL SECURITY INVOKER DEFINER "
    "UNDEFINED MERGE TEMPTABLE MATERIALIZED VECTOR JSON RELATIONAL DUALITY EXTERNAL"
)


class _Reader:
    """Walks over a statement's tokens."""

    def __init__(self, text: str, ansi_quotes: bool) -> None:
        self.all = list(tokens(text, ansi_quotes=ansi_quotes))
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        """The word at hand in upper case; a sign stands for itself; empty for names in quotes, literals and the end."""
        return self.all[self.at + ahead].word if self.at + ahead < len(self.all) else ""

    def done(self) -> bool:
        return self.at >= len(self.all)

    def skip(self, *words: str) -> bool:
        """Pass over these words if they stand here in this order."""
        if all(self.peek(index) == word for index, word in enumerate(words)):
            self.at += len(words)
            return True
        return False

    def name(self) -> Name | None:
        if self.done() or self.all[self.at].literal:
            return None
        first = self.all[self.at].text
        self.at += 1
        if self.peek() == "." and self.at + 1 < len(self.all):
            second = self.all[self.at + 1].text
            self.at += 2
            return Name(first, second)
        return Name(None, first)

    def find(self, *words: str) -> bool:
        """Go to just behind the next place where these words stand outside parentheses."""
        depth = 0
        while not self.done():
            if depth == 0 and self.skip(*words):
                return True
            depth += {"(": 1, ")": -1}.get(self.peek(), 0)
            self.at += 1
        return False

    def mentioned(self) -> frozenset[str]:
        return frozenset(token.text for token, after in pairwise(self.all) if after.word == "." and not token.literal)


def outline(text: str, *, ansi_quotes: bool = False) -> Statement:
    """Say what a statement does.

    :param text: the statement; bytes that are no UTF-8 as surrogate escapes.
    :param ansi_quotes: whether double quotes enclose names in the statement's SQL mode.
    """
    reader = _Reader(text, ansi_quotes)
    if reader.skip("SET", "STATEMENT"):
        reader.find("FOR")
    verb = reader.peek()
    reader.at += 1
    mentioned = reader.mentioned()
    if verb in {"CREATE", "ALTER", "DROP", "RENAME", "TRUNCATE"}:
        return _schema(reader, verb, mentioned)
    if verb == "ROLLBACK":
        return Statement(Effect.PARTIAL_ROLLBACK if reader.find("TO") else Effect.MARK, verb, mentioned=mentioned)
    if verb == "SET" and reader.peek() in {"PASSWORD", "ROLE", "DEFAULT"}:
        return Statement(Effect.SERVER, verb, mentioned=mentioned)
    for verbs, effect in (
        (_ROW_VERBS, Effect.ROWS),
        (_SERVER_VERBS, Effect.SERVER),
        (_MARK_VERBS, Effect.MARK),
    ):
        if verb in verbs:
            return Statement(effect, verb, mentioned=mentioned)
    return Statement(Effect.UNKNOWN, verb, mentioned=mentioned)


def _schema(reader: _Reader, verb: str, mentioned: frozenset[str]) -> Statement:
    temporary = False
    if verb == "TRUNCATE":
        reader.skip("TABLE")
        kind = "TABLE"
    else:
        found, temporary = _kind(reader)
        if found is None:
            return Statement(Effect.UNKNOWN, verb, mentioned=mentioned)
        kind = found
    if kind in _SERVER_KINDS or (temporary and kind in {"TABLE", "SEQUENCE"}):
        return Statement(Effect.SERVER, verb, kind, mentioned=mentioned)
    if kind in {"DATABASE", "SCHEMA"}:
        _conditions(reader)
        name = reader.name()
        # ALTER DATABASE without a name works on the default database.
        named = name is not None and name.name.upper() not in {"CHARACTER", "CHARSET", "COLLATE", "DEFAULT", "COMMENT"}
        return Statement(Effect.DATABASE, verb, "DATABASE", (name,) if name and named else (), mentioned)
    return Statement(Effect.SCHEMA, verb, kind, tuple(_objects(reader, verb, kind)), mentioned)


def _kind(reader: _Reader) -> tuple[str | None, bool]:
    """The kind of object behind CREATE, ALTER, DROP or RENAME, and whether it is temporary."""
    temporary = False
    while not reader.done():
        word = reader.peek()
        if reader.skip("DEFINER", "=") or reader.skip("ALGORITHM", "="):
            _account(reader)
        elif word in _SERVER_KINDS and not (word == "SPATIAL" and reader.peek(1) == "INDEX"):
            return word, temporary
        elif word in _OBJECT_KINDS:
            reader.at += 1
            if word == "PACKAGE":
                reader.skip("BODY")
            return word, temporary
        elif word == "TABLES":
            reader.at += 1
            return "TABLE", temporary
        elif word in _BEFORE_KIND:
            temporary = temporary or word == "TEMPORARY"
            reader.at += 1
        else:
            return None, temporary
    return None, temporary


def _account(reader: _Reader) -> None:
    """Pass over a DEFINER's ``user@host``, CURRENT_USER(), or an algorithm's name."""
    reader.at += 1
    if reader.skip("(", ")"):
        return
    if reader.skip("@"):
        reader.at += 1


def _conditions(reader: _Reader) -> None:
    reader.skip("IF", "NOT", "EXISTS")
    reader.skip("IF", "EXISTS")


def _objects(reader: _Reader, verb: str, kind: str) -> Iterator[Name]:
    _conditions(reader)
    if kind in {"INDEX", "TRIGGER"} and not (kind == "TRIGGER" and verb == "DROP"):
        yield from _table_behind_on(reader)
        return
    yield from _one(reader)
    if verb == "RENAME":
        while reader.find("TO"):
            yield from _one(reader)
            if not reader.skip(","):
                return
            yield from _one(reader)
    elif verb == "DROP":
        while reader.skip(","):
            yield from _one(reader)
    elif verb == "ALTER" and kind == "TABLE":
        yield from _moved(reader)


def _one(reader: _Reader) -> Iterator[Name]:
    name = reader.name()
    if name is not None:
        yield name


def _table_behind_on(reader: _Reader) -> Iterator[Name]:
    own = reader.name()
    if not reader.find("ON"):
        return
    table = reader.name()
    if table is None:
        return
    yield table
    # A trigger may name its database itself.
    if own is not None and own.database is not None and table.database is None:
        yield Name(own.database, table.name)


def _moved(reader: _Reader) -> Iterator[Name]:
    """The further tables of ALTER TABLE: RENAME TO another name, EXCHANGE PARTITION WITH TABLE."""
    while not reader.done():
        if reader.skip("RENAME"):
            if reader.peek() in {"COLUMN", "INDEX", "KEY", "CONSTRAINT"}:
                continue
            if not reader.skip("TO"):
                reader.skip("AS")
                reader.skip("=")
            yield from _one(reader)
        elif reader.skip("EXCHANGE", "PARTITION"):
            if reader.find("TABLE"):
                yield from _one(reader)
        else:
            reader.at += 1


def renamed(text: str, database: str, other: str, *, ansi_quotes: bool = False) -> str:
    """The statement with every ``database.`` in front of a name replaced by ``other.``."""
    every = list(tokens(text, ansi_quotes=ansi_quotes))
    pieces: list[str] = []
    done = 0
    for token, after in pairwise(every):
        if token.text == database and after.word == "." and not token.literal:
            pieces += [text[done : token.start], "`" + other.replace("`", "``") + "`"]
            done = token.end
    return "".join([*pieces, text[done:]])
