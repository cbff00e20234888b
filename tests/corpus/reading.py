"""Files of statements -> statements. Pure.

``.sql`` is what the mysql client reads. ``.test`` is the language of mysqltest (MariaDB Knowledge Base, "mysqltest";
MySQL's "The MySQL Test Framework"): SQL between commands for the client. Only what is plain SQL comes out; commands,
and what a command's block or text holds, come out with the reason why they are not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile


@dataclass(frozen=True, slots=True)
class Found:
    """One piece of a file.

    :param line: where it begins, counted from 1.
    :param text: without its delimiter.
    :param skipped: why it is no statement to run; empty for one that is.
    """

    line: int
    text: str
    skipped: str = ""


#: Commands about other clients: all statements run on one connection, which changes what they do, not whether
#: master and copies agree.
_CLIENTS = re.compile(
    "connect|connection|disconnect|change_user|reset_connection|dirty_close|send_quit|send_shutdown|shutdown_server"
    "|sync_slave_with_master|sync_with_master|save_master_pos|wait_for_slave_to_stop"
)
_WITH_STATEMENT = re.compile("evalp?|query|query_vertical|query_horizontal|send|send_eval|reap")
_WITH_TEXT = re.compile("perl|write_file|append_file")
_OTHER = re.compile(
    "let|inc|dec|expr|if|while|end|source|exec|exec_in_background|execw|system|die|exit|skip|assert|write_line"
    r"|(copy|move|remove|append|cat|diff|list)_files?\w*|list_files\w*|file_exists|mkdir|rmdir|force-\w+|chmod"
)
#: Commands that only say how the client prints, waits or expects errors: no statement is lost with them.
_SILENT = re.compile(
    r"(disable|enable)_\w+|echo|error|delimiter|horizontal_results|vertical_results|(partially_)?sorted_result"
    r"|lowercase_result|replace_\w+|result_format|character_set|ping|sleep|real_sleep|start_timer|end_timer|require"
    "|query_get_value|output"
)
_COMMANDS = (_WITH_TEXT, _CLIENTS, _WITH_STATEMENT, _OTHER, _SILENT)
_WORD = re.compile(r"\s*([A-Za-z_][\w-]*)")
_OPENS_BLOCK = re.compile(r"\s*(?:if|while)\s*\(", re.IGNORECASE)


def pieces(text: str, *, commands: bool) -> Iterator[Found]:
    """The pieces of a file, in its order.

    :param commands: whether it is in the language of mysqltest; else it is plain SQL.
    """
    return _Reader(text, commands=commands).pieces()


class _Reader:
    def __init__(self, text: str, *, commands: bool) -> None:
        self._lines = text.splitlines(keepends=True)
        self._commands = commands
        self._at = 0
        self._delimiter = ";"
        self._parsing = True

    def pieces(self) -> Iterator[Found]:
        while self._at < len(self._lines):
            line = self._lines[self._at]
            bare = line.strip()
            if not bare or bare.startswith("#") or (not self._commands and re.match(r"--(\s|$)", bare)):
                self._at += 1
            elif bare.lower().startswith("delimiter ") and not self._commands:
                self._at += 1
                self._delimiter = bare.split(None, 1)[1].strip()
            elif self._commands and bare.startswith("--"):
                self._at += 1
                yield from self._command(bare[2:].strip(), self._at)
            elif self._commands and _OPENS_BLOCK.match(line):
                yield self._block()
            elif self._commands and bare in {"{", "}"}:
                self._at += 1
            else:
                yield from self._statement()

    def _statement(self) -> Iterator[Found]:
        begun = self._at + 1
        text, ended = self._until_delimiter()
        word = _WORD.match(text)
        name = word[1].lower() if word else ""
        if self._commands and any(kind.fullmatch(name) for kind in _COMMANDS):
            yield from self._command(text.strip(), begun)
        elif not self._parsing or not text.strip():
            return
        elif not ended:
            yield Found(begun, text, "not ended by its delimiter")
        elif self._commands and re.search(r"(?<!@)\$\w", text):
            yield Found(begun, text, "holds a variable of mysqltest")
        else:
            yield Found(begun, text.strip())

    def _command(self, text: str, line: int) -> Iterator[Found]:
        word = _WORD.match(text)
        name = word[1].lower() if word else ""
        if name == "delimiter":
            self._delimiter = text.split(None, 1)[1].strip() if len(text.split(None, 1)) > 1 else ";"
        elif name == "disable_parsing":
            self._parsing = False
        elif name == "enable_parsing":
            self._parsing = True
        elif _WITH_TEXT.fullmatch(name):
            words = text.split()
            end = words[-1] if len(words) > (1 if name == "perl" else 2) else "EOF"
            body = takewhile(lambda each: each.strip() != end, self._lines[self._at :])
            self._at += sum(1 for _ in body) + 1
            yield Found(line, text, "a program or a file of mysqltest")
        elif _CLIENTS.fullmatch(name):
            yield Found(line, text, "another client")
        elif _WITH_STATEMENT.fullmatch(name):
            yield Found(line, text, "mysqltest fills it in or sends it ahead")
        elif _OTHER.fullmatch(name):
            yield Found(line, text, "a command of mysqltest")

    def _block(self) -> Found:
        """Pass over ``if (...) { ... }`` and ``while (...) { ... }``."""
        begun, depth, opened = self._at + 1, 0, False
        taken = []
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            taken.append(line)
            bare = line.split("#")[0].strip()
            depth += (bare.endswith("{")) - (bare.startswith("}"))
            opened = opened or bare.endswith("{")
            if opened and depth <= 0:
                break
        return Found(begun, "".join(taken), "a block of mysqltest")

    def _until_delimiter(self) -> tuple[str, bool]:
        """Text up to the delimiter, quotes and comments respected; the rest of its last line is read next."""
        taken: list[str] = []
        quote = ""
        while self._at < len(self._lines):
            line = self._lines[self._at]
            if not quote and taken and self._commands and line.lstrip().startswith("#"):
                self._at += 1
                continue
            at = 0
            while at < len(line):
                if quote:
                    closes = line.startswith(quote, at)
                    at += 2 if quote in "'\"" and line[at] == "\\" else len(quote) if closes else 1
                    quote = "" if closes else quote
                elif line.startswith(self._delimiter, at):
                    taken.append(line[:at])
                    rest = line[at + len(self._delimiter) :]
                    if rest.strip():
                        self._lines[self._at] = rest
                    else:
                        self._at += 1
                    return "".join(taken), True
                elif line.startswith("/*", at):
                    quote, at = "*/", at + 2
                elif line[at] == "#" or re.match(r"--(\s|$)", line[at:]):
                    at = len(line)
                else:
                    quote = line[at] if line[at] in "'\"`" else ""
                    at += 1
            taken.append(line)
            self._at += 1
        return "".join(taken), False
