"""Decisions of transactions over shards, and the janitor that finishes what a dead client left prepared.

A transaction that wrote several shards prepares an XA branch on all but one of them. The last one, the *decider*, takes
part with an ordinary transaction, into which a row of ``shardkit_decision`` is written: the decider's COMMIT is the
decision for all. A branch that its client left prepared is committed where that row stands, and rolled back where it
does not, behind a tombstone under the same primary key: client and janitor can never both have their way.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from shardkit.errors import TransactionError

logger = logging.getLogger(__name__)

#: XA's formatID of every branch that shardkit makes; branches of others are left alone.
FORMAT_ID = 0x5348
#: gtrid and bqual hold at most 64 bytes each (MariaDB and MySQL manuals, "XA Transactions").
XID_PART_BYTES = 64
TABLE = "shardkit_decision"
_PREFIX = "shardkit"

# server errors, by number (MySQL: share/messages_to_clients.txt; MariaDB: sql/share/errmsg-utf8.txt)
_DUPLICATE = 1062
_LOCK_WAIT_TIMEOUT = 1205
_XA_UNKNOWN = 1397  # XAER_NOTA: no such branch, or, on MariaDB, its owner is still connected
_NO_SUCH_THREAD = 1094

_ATTEMPTS = 20
_ATTEMPT_SECONDS = 0.05


class Verdict(StrEnum):
    """What a row of ``shardkit_decision`` says."""

    COMMIT = "commit"
    ABORT = "abort"


#: For how long rows of ``shardkit_decision`` are kept.
_KEPT_DAYS = {Verdict.COMMIT: 2, Verdict.ABORT: 30}
_BATCH = 1000


class Outcome(StrEnum):
    """What the janitor did with one branch."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNDECIDED = "undecided"  # its client is in the middle of deciding: looked at again later
    GONE = "gone"  # somebody else finished it


@dataclass(frozen=True, slots=True)
class BranchId:
    """The name of one XA branch: whoever finds it prepared can tell who decides over it.

    :param decider: the shard whose database holds the decision.
    :param transaction: 16 hexadecimal digits, the same for all branches of a transaction.
    :param shard: the shard of this branch.
    :param connection: the server's id of the connection that owns the branch.
    :param deciding: the id, on the decider's server, of the connection that is to commit the decision.
    """

    decider: str
    transaction: str
    shard: str
    connection: int
    deciding: int

    @property
    def literal(self) -> str:
        """As XA statements take it: ``X'...',X'...',21320``."""
        gtrid = f"{_PREFIX}.{self.decider}.{self.transaction}".encode()
        bqual = f"{self.shard}.{self.connection}.{self.deciding}".encode()
        for part in (gtrid, bqual):
            if len(part) > XID_PART_BYTES:
                raise TransactionError(
                    f"the shard names {self.decider!r} and {self.shard!r} are too long for a transaction over shards",
                    hint="name shards with at most 38 characters",
                )
        return f"X'{gtrid.hex()}',X'{bqual.hex()}',{FORMAT_ID}"

    @classmethod
    def parse(cls, format_id: int, gtrid_length: int, data: bytes) -> BranchId | None:
        """Read a row of ``XA RECOVER``; None for a branch that shardkit did not make."""
        if format_id != FORMAT_ID:
            return None
        gtrid, bqual = data[:gtrid_length].decode("latin-1"), data[gtrid_length:].decode("latin-1")
        prefix, _, rest = gtrid.partition(".")
        decider, _, transaction = rest.rpartition(".")
        owner, _, deciding = bqual.rpartition(".")
        shard, _, connection = owner.rpartition(".")
        if prefix != _PREFIX or not decider or not shard or not (connection.isdecimal() and deciding.isdecimal()):
            return None
        return cls(decider, transaction, shard, int(connection), int(deciding))


def new_transaction() -> str:
    """A name for a transaction over shards: 64 random bits."""
    return secrets.token_hex(8)


class Cursor(Protocol):
    """What this module needs of a DBAPI cursor (PEP 249)."""

    def execute(self, statement: str, parameters: Any = ..., /) -> Any:
        """Run one statement."""

    def fetchall(self) -> Any:
        """The rows of its result."""

    def close(self) -> None:
        """Let go of it."""


class Connection(Protocol):
    """What this module needs of a DBAPI connection in autocommit mode."""

    def cursor(self) -> Any:
        """A `Cursor`."""

    def close(self) -> None:
        """Hang up."""


def _rows(connection: Connection, statement: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    with closing(connection.cursor()) as cursor:
        cursor.execute(statement, parameters)
        return list(cursor.fetchall())


def _error_number(error: Exception) -> int | None:
    return error.args[0] if error.args and isinstance(error.args[0], int) else None


def prepared_branches(connection: Connection) -> Iterator[BranchId]:
    """The branches of shardkit's that stand prepared on a server.

    MySQL asks for the privilege ``XA_RECOVER_ADMIN``.
    """
    for format_id, gtrid_length, _, data in _rows(connection, "XA RECOVER"):
        raw = data if isinstance(data, bytes) else str(data).encode("latin-1")
        branch = BranchId.parse(format_id, gtrid_length, raw)
        if branch is not None:
            yield branch


def verdict(connection: Connection, transaction: str) -> Verdict | None:
    """What the decider's database says about a transaction; None while it says nothing."""
    rows = _rows(connection, f"SELECT verdict FROM {TABLE} WHERE transaction_id = %s", (transaction,))
    return Verdict(rows[0][0]) if rows else None


def abort_undecided(connection: Connection, transaction: str) -> Verdict | None:
    """Put a tombstone where a decision would go, unless there is one.

    :returns: what holds from now on; None when the client is deciding right now (its row is not yet committed).
    """
    try:
        _rows(connection, "SET SESSION innodb_lock_wait_timeout = 1")
        _rows(
            connection,
            f"INSERT INTO {TABLE} (transaction_id, verdict) VALUES (%s, %s)",
            (transaction, Verdict.ABORT.value),
        )
    except Exception as error:
        if _error_number(error) == _DUPLICATE:
            return verdict(connection, transaction)
        if _error_number(error) == _LOCK_WAIT_TIMEOUT:
            return None
        raise
    return Verdict.ABORT


def _forget(connection: Connection, which: Verdict, days: int, but: Collection[str]) -> int:
    deleted = 0
    while True:
        old = _rows(
            connection,
            f"SELECT transaction_id FROM {TABLE} "
            "WHERE decided_at < NOW() - INTERVAL %s DAY AND verdict = %s ORDER BY decided_at LIMIT %s",
            (days, which.value, _BATCH + len(but)),
        )
        names = [name for (name,) in old if name not in but][:_BATCH]
        if not names:
            return deleted
        _rows(
            connection, f"DELETE FROM {TABLE} WHERE transaction_id IN ({', '.join(['%s'] * len(names))})", tuple(names)
        )
        deleted += len(names)


class Janitor:
    """Finishes prepared branches whose client has gone: one pass over all masters at a time.

    A branch is touched only when it was seen in the pass before too, so that living transactions are left in peace.
    That is a courtesy, not what makes it safe: the decision row is.

    :param connect: shard -> a new DBAPI connection in autocommit mode to its master's database.
    """

    def __init__(self, connect: Callable[[str], Connection]) -> None:
        self._connect = connect
        self._seen: frozenset[BranchId] = frozenset()

    def sweep(self, shards: Iterable[str], *, patient: bool = True) -> Mapping[BranchId, Outcome]:
        """Look at the prepared branches of these shards once.

        :param patient: leave alone what was not there in the last pass.
        :returns: what became of each branch that was not left alone.
        """
        here = set(shards)
        found: dict[BranchId, None] = {}
        for shard in here:
            found |= dict.fromkeys(self.prepared(shard))
        due = [branch for branch in found if branch in self._seen or not patient]
        self._seen = frozenset(found)
        return {branch: self._finish(branch) for branch in due}

    def prepared(self, shard: str) -> list[BranchId]:
        """The branches of a shard that stand prepared now. Its server may hold those of others, too."""
        with closing(self._connect(shard)) as connection:
            return [branch for branch in prepared_branches(connection) if branch.shard == shard]

    def forget(self, shards: Iterable[str]) -> int:
        """Delete old rows of ``shardkit_decision`` that no prepared branch of any shard asks for any more.

        Decisions are kept for two days, so that a replica which is promoted knows them; tombstones for thirty, so that
        a client which stood still comes back to find them.

        :param shards: every master of the cluster: one that cannot be asked may hold a branch, and is an error.
        :returns: how many were deleted.
        """
        masters = list(shards)
        asked_for: set[str] = set()
        for shard in masters:
            with closing(self._connect(shard)) as connection:
                asked_for.update(branch.transaction for branch in prepared_branches(connection))
        deleted = 0
        for shard in masters:
            with closing(self._connect(shard)) as connection:
                for which, days in _KEPT_DAYS.items():
                    deleted += _forget(connection, which, days, asked_for)
        return deleted

    def _finish(self, branch: BranchId) -> Outcome:
        with closing(self._connect(branch.decider)) as connection:
            decided = verdict(connection, branch.transaction) or abort_undecided(connection, branch.transaction)
            if decided is None:  # somebody holds the decision and does not commit it: a client that stands still
                self._disconnect(connection, branch.deciding)
                decided = abort_undecided(connection, branch.transaction)
        if decided is None:
            logger.warning(
                "transaction %s stands prepared on %s, and a client of %s holds its decision without committing it: "
                "closing its connection takes PROCESS and CONNECTION ADMIN (MySQL: CONNECTION_ADMIN)",
                branch.transaction,
                branch.shard,
                branch.decider,
            )
            return Outcome.UNDECIDED
        with closing(self._connect(branch.shard)) as connection:
            outcome = self._end(connection, branch, decided)
        logger.warning(
            "a transaction over shards was left prepared on %s: %s, as %s decided (transaction %s)",
            branch.shard,
            outcome,
            branch.decider,
            branch.transaction,
        )
        return outcome

    def _end(self, connection: Connection, branch: BranchId, decided: Verdict) -> Outcome:
        statement = f"XA {'COMMIT' if decided is Verdict.COMMIT else 'ROLLBACK'} {branch.literal}"
        done = Outcome.COMMITTED if decided is Verdict.COMMIT else Outcome.ROLLED_BACK
        for attempt in range(_ATTEMPTS):
            try:
                _rows(connection, statement)
            except Exception as error:
                if _error_number(error) != _XA_UNKNOWN:
                    raise
            else:
                return done
            if branch not in set(prepared_branches(connection)):
                return Outcome.GONE
            # MariaDB lets nobody else end a branch while its owner is connected, and says "unknown" (1397)
            if attempt == 0:
                self._disconnect(connection, branch.connection)
            time.sleep(_ATTEMPT_SECONDS)  # the server takes a moment to let go
        return Outcome.UNDECIDED

    @staticmethod
    def _disconnect(connection: Connection, owner: int) -> None:
        """End a client's connection to the database at hand. Ids begin anew when a server is started again."""
        if not _rows(
            connection, "SELECT 1 FROM information_schema.PROCESSLIST WHERE ID = %s AND DB = DATABASE()", (owner,)
        ):
            return
        try:
            _rows(connection, f"KILL {owner:d}")
        except Exception as error:
            if _error_number(error) != _NO_SUCH_THREAD:
                raise
