"""``python -m tests.corpus [--flavour mysql] [--most 3000] DIRECTORY``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from tests.corpus.running import Corpus, Tally, files, seconds_since
from tests.relay_fixtures import servers

console = Console(highlight=False)


def main() -> int:
    """Run a directory's statements and say what came of them; exit code 1 where master and copies differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.corpus", description=__doc__)
    parser.add_argument("directory", type=Path, help="holds .sql and .test files, at any depth")
    parser.add_argument("--flavour", choices=("mariadb", "mysql"), default="mariadb")
    parser.add_argument("--most", type=int, default=5_000, help="statements, after which no further file is begun")
    parser.add_argument("--least", type=int, default=1, help="fewer statements than this are a failure")
    given = parser.parse_args()
    if not files(given.directory):
        parser.error(f"no .sql and no .test file is in {given.directory}")
    begun = time.monotonic()
    with servers(given.flavour, 4) as started:
        corpus = Corpus(started)
        try:
            with console.status("") as status:
                tally = corpus.run(given.directory, most=given.most, watch=Watch(status))
        finally:
            corpus.close()
    show(tally, f"{given.flavour}, {seconds_since(begun)}")
    if tally.executed < given.least:
        console.print(f"fewer than {given.least} statements were executed")
    return 1 if tally.faults or tally.executed < given.least else 0


class Watch:
    """Shows how far a run is, and its faults as they come."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._told = 0

    def __call__(self, file: Path, tally: Tally) -> None:
        """A file is begun."""
        for fault in tally.faults[self._told :]:
            console.print(f"so far: {fault}", soft_wrap=True, markup=False)
        self._told = len(tally.faults)
        self._status.update(f"{file.name}: {tally.executed:,} statements executed, {self._told} faults")


def show(tally: Tally, title: str) -> None:
    """Print what came of a run."""
    table = Table(box=None, title=title, title_justify="left", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{tally.executed:,}", "statements executed")
    table.add_row(f"{tally.changing:,}", "of them more than reads")
    table.add_row(
        f"{tally.failed.total():,}", "refused by the master (tests of errors, other versions, what was skipped)"
    )
    table.add_row(f"{tally.compared:,}", "times master, staging and replica were compared")
    table.add_row(f"{len(tally.faults):,}", "times they differed, or a hop stopped, and native replication did not")
    table.add_row(f"{len(tally.shared):,}", "times native replication did as well: the log is not what the master did")
    table.add_row(f"{len(tally.native):,}", "times native replication alone did")
    console.print(table)
    skipped = Table(box=None, title=f"\n{tally.skipped.total():,} skipped", title_justify="left", show_header=False)
    skipped.add_column(justify="right")
    skipped.add_column()
    for reason, count in tally.skipped.most_common():
        skipped.add_row(f"{count:,}", reason)
    console.print(skipped)
    for word, each in (("native alone", tally.native), ("both", tally.shared), ("FAULT", tally.faults)):
        for text in each:
            console.print(f"{word}: {text}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
