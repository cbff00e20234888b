"""What commands print: tables and lines for people, one JSON document for programs, and questions before harm.

Results go to standard output, everything else (progress, notes, questions, errors) to standard error. With ``--json``
standard output is exactly one JSON document. Nothing here imports a database driver: ``shardkit --help`` has to be
quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import date, datetime
from enum import Enum
from typing import Any, Final, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shardkit.cli.progress import Progress

NOTHING = "-"
#: An error has to fit on one screen: more lines of detail than this are counted, not shown.
MOST_DETAILS = 12


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column.

    :param right: align to the right, for numbers.
    :param style: a rich style for the cells.
    :param whole: never cut or wrapped: addresses, which are copied.
    """

    name: str
    right: bool = False
    style: str = ""
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the command line shows it: what and where, the details, and the fix.

    :param kind: the error's class, for ``--json``.
    :param details: single faults, one a line.
    """

    message: str
    hint: str | None = None
    details: tuple[str, ...] = ()
    exit_code: int = 1
    kind: str = "Error"
    title: str = "error"


class Output:
    """What one command prints, in the form that its user asked for.

    :param as_json: print `result` as JSON and leave out tables and lines.
    """

    def __init__(self, *, as_json: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.as_json = as_json
        self._stdout = Console(file=stdout or sys.stdout, highlight=False, markup=False, emoji=False)
        self._stderr = Console(file=stderr or sys.stderr, highlight=False, markup=False, emoji=False)

    # --- results

    def result(self, data: object) -> None:
        """The command's whole result, printed with ``--json`` only. Call it once."""
        if self.as_json:
            print(json_text(data), file=self._stdout.file)

    def line(self, text: str = "", *, style: str = "") -> None:
        """One line for people."""
        if not self.as_json:
            _print(self._stdout, Text(text, style=style))

    def done(self, text: str) -> None:
        """The last line of a command that changed something."""
        self.line(text, style="green")

    def table(self, columns: Sequence[str | Column], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """A table for people; aligned plain text, never cut, where standard output is not a terminal."""
        if self.as_json:
            return
        heads = [Column(column) if isinstance(column, str) else column for column in columns]
        cells = [[_cell(value) for value in row] for row in rows]
        if not self._stdout.is_terminal or _too_wide(heads, cells, self._stdout.width):
            print("\n".join(_plain_table(heads, cells, title)), file=self._stdout.file)
            return
        table = Table(
            box=box.SIMPLE_HEAD,
            title=title or None,
            title_justify="left",
            title_style="bold",
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for head in heads:
            table.add_column(
                head.name,
                justify="right" if head.right else "left",
                style=head.style or None,
                overflow="fold",
                no_wrap=head.whole,
            )
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        self._stdout.print()
        self._stdout.print(table)
        self._stdout.print()

    def text(self, text: str) -> None:
        """Text as it is (YAML, SQL), byte for byte."""
        if not self.as_json:
            self._stdout.file.write(text if text.endswith("\n") else f"{text}\n")

    # --- beside the result

    def note(self, text: str) -> None:
        """Something worth knowing, on standard error."""
        _print(self._stderr, Text(text, style="dim"))

    def warning(self, text: str) -> None:
        """Something that may go wrong, on standard error."""
        _print(self._stderr, Text.assemble(("warning: ", "yellow"), text))

    def progress(self) -> Progress:
        """Progress bars on standard error; plain lines now and then where that is not a terminal.

        ``with out.progress() as progress: task = progress.task("copy flights", total=336_776, unit="rows")``
        """
        return Progress(self._stderr)

    def failure(self, failure: Failure) -> None:
        """An error, on one screen; with ``--json`` also ``{"error": ...}`` as the result."""
        if self.as_json:
            print(json_text(_failure_document(failure)), file=self._stdout.file)
            return
        hidden = len(failure.details) - MOST_DETAILS
        details = [*failure.details[:MOST_DETAILS], *([f"... and {hidden} more"] if hidden > 0 else [])]
        if not self._stderr.is_terminal:
            lines = [f"{failure.title}: {failure.message}", *(f"  {line}" for line in details)]
            print("\n".join([*lines, *([f"fix: {failure.hint}"] if failure.hint else [])]), file=self._stderr.file)
            return
        body = Text(failure.message)
        for line in details:
            body.append(f"\n  {line}")
        if failure.hint:
            body.append("\n\nfix: ", style="bold green").append(failure.hint)
        self._stderr.print(Panel(body, title=failure.title, title_align="left", border_style="red"))

    # --- questions

    def confirm(self, question: str, *, yes: bool, plan: Sequence[str] = ()) -> None:
        """Show what a destructive command is about to do, and ask; ``--yes`` answers before it is asked.

        :param plan: one line for each thing that is going to happen.
        :raises PreconditionFailed: when the answer is no, or nobody is there to answer. Nothing has happened then.
        """
        from shardkit.errors import PreconditionFailed  # keeps SQLAlchemy out of --help

        for line in plan:
            _print(self._stderr, Text(f"  {line}"))
        if yes:
            return
        if not sys.stdin.isatty():
            raise PreconditionFailed(
                "nothing was changed: there is no terminal to ask on", hint="give --yes to go ahead"
            )
        self._stderr.print(Text(f"{question} [y/N] ", style="bold"), end="")
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise PreconditionFailed("nothing was changed: the answer was not yes")


def _print(console: Console, text: Text) -> None:
    """Wrapped between words on a terminal; a line is a line everywhere else."""
    console.print(text, soft_wrap=not console.is_terminal)


def _failure_document(failure: Failure) -> dict[str, object]:
    return {
        "error": {
            "type": failure.kind,
            "message": failure.message,
            "details": failure.details,
            "hint": failure.hint,
            "exit_code": failure.exit_code,
        }
    }


def json_text(data: object) -> str:
    """Indented JSON; dates in ISO form, dataclasses as objects."""
    return json.dumps(_jsonable(data), ensure_ascii=False, indent=2)


def _jsonable(value: Any) -> Any:
    match value:
        case Enum():
            return value.value
        case None | bool() | int() | float() | str():
            return value
        case datetime() | date():
            return value.isoformat()
        case bytes():
            return value.hex()
        case Mapping():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _jsonable(asdict(value))
        case Iterable():
            return [_jsonable(item) for item in value]
        case _:
            return str(value)


def count(number: int) -> str:
    """``336,776``"""
    return f"{number:,}"


def _cell(value: object) -> str:
    return NOTHING if value is None or value == "" else str(value)


def _too_wide(heads: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> bool:
    """Whether whole columns leave the others less than their heads need: then the terminal may wrap lines itself."""
    needed = sum(
        max(cell_len(cell) for cell in (head.name, *(row[index] for row in rows if head.whole)))
        for index, head in enumerate(heads)
    )
    return any(head.whole for head in heads) and needed + _GAP * (len(heads) - 1) > width


#: What rich puts between two columns: padding and the place of a divider.
_GAP: Final = 2


def _plain_table(heads: Sequence[Column], rows: Sequence[Sequence[str]], title: str) -> Iterable[str]:
    lines = [[head.name.upper() for head in heads], *rows]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(heads))]
    if title:
        yield title
    for line in lines:
        padded = (_padded(cell, width, head) for cell, width, head in zip(line, widths, heads, strict=True))
        yield "  ".join(padded).rstrip()


def _padded(cell: str, width: int, head: Column) -> str:
    space = " " * (width - cell_len(cell))
    return space + cell if head.right else cell + space
