"""One-shard transparency: SQLAlchemy's own ORM suite with the stock Session, with ours, and with a second, empty shard.

What passes with the stock Session has to pass with ours, apart from the tests that `exceptions` names. The suite is
that of the installed SQLAlchemy, fetched into a cache directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from rich.console import Console
from rich.table import Table

from tests.transparency.exceptions import EXCEPTIONS, LEFT_OUT

console = Console(highlight=False)

MOST_EXCEPTIONS = 20
SUITE = "test/orm"
#: No suite to be had; the Makefile says so, and goes on.
NOT_FETCHED = 3


@dataclass
class Run:
    """What one run of the suite came to.

    :param outcomes: test -> passed, failed or skipped.
    :param counters: how often each part of the router was at work.
    """

    outcomes: dict[str, str]
    counters: Counter[str]

    @property
    def passed(self) -> set[str]:
        """The tests that passed."""
        return {test for test, outcome in self.outcomes.items() if outcome == "passed"}


def main() -> int:
    """Run the suite three times and compare."""
    suite = fetched()
    if suite is None:
        return NOT_FETCHED
    runs = {mode: run(suite, mode) for mode in ("stock", "one", "two")}
    faults = [*faults_of(runs)]
    print_table(runs)
    for fault in faults:
        console.print(f"FAULT: {fault}", soft_wrap=True, markup=False)
    return 1 if faults else 0


def fetched() -> Path | None:
    """The suite of the installed SQLAlchemy."""
    name = f"sqlalchemy-{sqlalchemy.__version__}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardkit"
    suite = cache / name
    if (suite / SUITE).is_dir():
        return suite
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = ["--no-binary", "sqlalchemy", f"sqlalchemy=={sqlalchemy.__version__}", "--dest", scratch]
        done = subprocess.run([*command, *wanted], check=False, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if not archives:
            console.print(f"the source of {name} cannot be fetched:\n{done.stderr.strip()}", markup=False)
            return None
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
        (Path(scratch) / name).rename(suite)
    return suite


def run(suite: Path, mode: str) -> Run:
    """Run the suite with one kind of session."""
    console.print(f"{SUITE} of SQLAlchemy {sqlalchemy.__version__}: {_NAMES[mode]} ...")
    with tempfile.TemporaryDirectory() as report:
        command = [sys.executable, "-m", "pytest", "-p", "tests.transparency.plugin", "-p", "no:cacheprovider", SUITE]
        left_out = [f"--ignore={module}" for module in LEFT_OUT]
        quiet = [
            "-q",
            "--tb=no",
            "--no-header",
            "--no-summary",
            "--maxfail=100000",
            "-n",
            os.environ.get("WORKERS", "2"),
        ]
        here = Path(__file__).parents[2]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{here}{os.pathsep}{suite}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TRANSPARENCY": mode,
            "TRANSPARENCY_REPORT": report,
        }
        done = subprocess.run(
            [*command, *left_out, *quiet], cwd=suite, env=environment, check=False, capture_output=True, text=True
        )
        written = Path(report) / "outcomes.json"
        if not written.exists():
            sys.exit(f"the suite did not run:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        counters: Counter[str] = Counter()
        for each in Path(report).glob("counters-*.json"):
            counters.update(json.loads(each.read_text(encoding="utf-8")))
        return Run(json.loads(written.read_text(encoding="utf-8")), counters)


_NAMES = {"stock": "stock Session", "one": "ours, one shard", "two": "ours, and a second, empty shard"}


def faults_of(runs: dict[str, Run]) -> list[str]:
    """What must not be."""
    faults = []
    if len(EXCEPTIONS) > MOST_EXCEPTIONS:
        faults.append(f"{len(EXCEPTIONS)} exceptions are named, and at most {MOST_EXCEPTIONS} may be")
    stock = runs["stock"].passed
    if len(stock) < 4000:
        faults.append(f"only {len(stock)} tests pass with the stock Session: something is wrong with the suite")
    for mode in ("one", "two"):
        ours = runs[mode]
        failed = stock - ours.passed
        faults += [f"{_NAMES[mode]}: fails {test}" for test in sorted(failed - set(EXCEPTIONS))]
        faults += [
            f"{_NAMES[mode]}: passes, and is named an exception: {test}" for test in sorted(EXCEPTIONS.keys() - failed)
        ]
        faults += [f"{_NAMES[mode]}: never at work: {name}" for name in _AT_WORK if not ours.counters[name]]
        if ours.counters["stock sessions"]:
            faults.append(f"{_NAMES[mode]}: {ours.counters['stock sessions']} sessions were not ours")
    return faults


#: What has to have happened in the runs with our sessions.
_AT_WORK = ("sessions", "statements planned", "endpoints chosen")


def print_table(runs: dict[str, Run]) -> None:
    """Say what came out."""
    table = Table(box=None, title_justify="left")
    table.add_column("")
    for heading in ("passed", "failed", *_AT_WORK):
        table.add_column(heading, justify="right")
    stock = runs["stock"].passed
    for mode, each in runs.items():
        counted = ["" if mode == "stock" else f"{each.counters[name]:,}" for name in _AT_WORK]
        table.add_row(_NAMES[mode], f"{len(each.passed & stock):,}", f"{len(stock - each.passed):,}", *counted)
    console.print(table)
    refused = runs["two"].counters["sent to the sole shard"]
    console.print(f"\nWith a second shard {refused:,} statements went to the only shard that holds anything.")
    console.print(f"\n{len(EXCEPTIONS)} exceptions:")
    for test, reason in (*EXCEPTIONS.items(), *LEFT_OUT.items()):
        console.print(f"  {test.removeprefix(SUITE + '/')}\n      {reason}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
