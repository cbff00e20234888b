"""``python -m tests.killed_seed``: a seed in a process of its own that kills itself with SIGKILL on the way.

The specification comes on standard input as JSON: ``source``, ``target`` (URLs), ``user``, ``password`` and ``point``:

- ``transaction``: between two of a table's transactions
- ``statement``: inside one, its statement sent
- ``table``: between two tables
"""

from __future__ import annotations

import json
import os
import signal
import sys

from shardkit.credentials import fixed
from shardkit.topology import Endpoint, Role
from shardkit_cdc import row_copy
from shardkit_cdc.database import Database
from shardkit_cdc.relay import HopSpec
from shardkit_cdc.seed import seed

#: Small enough that the tests' tables take many transactions.
STATEMENT_BYTES = 4000
#: Rows, or statements, before the end.
ENOUGH = 20_000


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Progress that ends the process where it is asked to."""

    def __init__(self, point: str) -> None:
        self._point = point
        self._done = 0

    def begin(self, table: str, estimate: int) -> None: ...

    def advance(self, _: str, rows: int) -> None:
        self._done += rows
        if self._point == "transaction" and self._done > ENOUGH:
            die()

    def end(self, _: str) -> None:
        if self._point == "table" and self._done > ENOUGH:
            die()


def main() -> None:
    given = json.load(sys.stdin)
    row_copy.STATEMENT_BYTES = STATEMENT_BYTES
    if given["point"] == "statement":
        run, sent = Database.run, 0

        def counted(database: Database, sql: str | bytes, *values: object) -> int:
            nonlocal sent
            changed = run(database, sql, *values)
            if isinstance(sql, bytes) and sql.startswith(b"INSERT"):
                sent += changed
            if sent > ENOUGH:
                die()
            return changed

        Database.run = counted  # type: ignore[method-assign]
    source, target = (Endpoint.parse(given[end]) for end in ("source", "target"))
    spec = HopSpec("shop-0", source, target, Role.STAGING, True)
    seed(spec, fixed(given["user"], given["password"]), confirm=lambda _found: None, progress=Killer(given["point"]))


if __name__ == "__main__":
    main()
