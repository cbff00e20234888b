"""Run the benchmarks, print a table, and write ``bench.json``.

Each module beside this one that `PARTS` names has ``run() -> list[dict]``: one dict for each measure, with ``name``
(which begins with the module's), ``value``, ``unit``, ``target``, ``rival`` and ``ok`` (None where there is no target).
A ``run(quick=...)`` takes small sizes too. A missed target is said loudly and is not a failure; a benchmark that
crashes is one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]

PARTS = ("router", "replicas", "relay", "loads", "rebalance")
FIELDS = ("name", "value", "unit", "target", "rival", "ok")
RESULTS = Path("bench.json")


def main(words: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    :returns: 0, or 1 when a benchmark crashed.
    """
    here = [part for part in PARTS if find_spec(f"tests.benchmarks.{part}") is not None]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Run the benchmarks.")
    parser.add_argument(
        "--only", action="append", choices=here, metavar="PART", help=f"one of {', '.join(here)}; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that they run, not for figures")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE", help="where the rows are written")
    options = parser.parse_args(words)

    console = Console(highlight=False, markup=False)
    rows: list[Row] = []
    crashed: list[str] = []
    for part in options.only or here:
        console.print(f"{part}: measuring ...")
        started = time.monotonic()
        try:
            rows += checked(part, measured(import_module(f"tests.benchmarks.{part}").run, quick=options.quick))
        except Exception:  # noqa: BLE001 - the others are still worth measuring; told below, and in the exit code
            traceback.print_exc()
            crashed.append(part)
        console.print(f"{part}: {time.monotonic() - started:.0f} s")
    options.output.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report(console, rows, crashed, quick=options.quick)
    console.print(f"{len(rows)} rows are in {options.output}")
    return 1 if crashed else 0


def measured(run: Callable[..., list[Row]], *, quick: bool) -> list[Row]:
    """The rows of one part."""
    if "quick" in inspect.signature(run).parameters:
        return run(quick=quick)
    return run()


def checked(part: str, rows: Iterable[Row]) -> list[Row]:
    """The rows, if they are of the agreed form.

    :raises ValueError: naming the row that is not.
    """
    found = list(rows)
    for row in found:
        if set(row) != set(FIELDS):
            raise ValueError(f"{part}: a row has {sorted(row)}, not {sorted(FIELDS)}: {row}")
        if not str(row["name"]).startswith(part):
            raise ValueError(f"{part}: a row's name has to begin with {part!r}: {row['name']!r}")
        if row["ok"] not in {True, False, None}:
            raise ValueError(f"{part}: ok is True, False or None: {row}")
    return found


def report(console: Console, rows: Sequence[Row], crashed: Sequence[str], *, quick: bool) -> None:
    """The table, and below it what was missed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for field, justify in zip(FIELDS, ("left", "right", "left", "left", "left", "left"), strict=True):
        table.add_column(field, justify=justify, overflow="fold")  # type: ignore[arg-type]  # rich spells them out
    for row in rows:
        word, style = {True: ("yes", "green"), False: ("MISSED", "bold red"), None: ("-", "")}[row["ok"]]
        value = f"{row['value']:,}" if isinstance(row["value"], int | float) else str(row["value"])
        cells = [Text(str(row["name"])), Text(value), *(Text(_cell(row[field])) for field in FIELDS[2:5])]
        table.add_row(*cells, Text(word, style=style))
    console.print(table)
    for row in rows:
        if row["ok"] is False:
            missed = f"TARGET MISSED: {row['name']}: {row['value']} {row['unit']}, target {row['target']}"
            console.print(Text(missed, style="bold red"), soft_wrap=True)
    for part in crashed:
        console.print(Text(f"CRASHED: {part}: no figures; the traceback is above", style="bold red"))
    if quick:
        console.print("quick sizes: these figures say that the benchmarks run, and nothing else")


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
