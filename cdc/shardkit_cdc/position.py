"""A hop's position in its target: the row, the take-over, and the compare-and-set that fences.

The position is written in the target transaction that it describes. Its first statement moves the row from where this
runner left it; anything but one row changed means that another runner has taken over, and nothing of the transaction
stays. ZooKeeper decides who should run; this decides who can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pymysql

from shardkit import own_tables
from shardkit.errors import Fenced, Interrupted, PreconditionFailed
from shardkit.gtid import Flavour, Position, parse_position
from shardkit_cdc.connection import code_of

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]

#: How long a killed runner's connection may take to roll back, in seconds, before the take-over is tried again.
LOCK_TIMEOUT = 30
_NO_SUCH_THREAD = 1094

_TABLE = own_tables.position.name
_COLUMNS = tuple(column.name for column in own_tables.position.columns)
_NOW = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS UNSIGNED)"


@dataclass(frozen=True, slots=True)
class HopRow:
    """One row of the position table; the columns are described in `shardkit.own_tables.position`."""

    hop: str
    epoch: int
    counter: int
    gtid: str
    source: str
    runner: str
    connection_id: int
    ddl_gtid: str
    ddl_origin: str
    ddl_number: int
    error: str
    updated_at: int


def read_row(connection: Connection, key: str) -> HopRow | None:
    """The row as it is committed now; None when the hop never ran into this target."""
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {', '.join(_COLUMNS)} FROM {_TABLE} WHERE hop = %s", (key,))
        found = cursor.fetchone()
    return None if found is None else HopRow(*found)


def insert_row(connection: Connection, key: str, *, gtid: str, source: str, ddl_origin: str, epoch: int = 0) -> None:
    """Begin a hop at a position. The caller has made sure that the target holds exactly the data of that position.

    :param epoch: above that of every runner before, where there may have been some.
    """
    values: Mapping[str, str | int] = {
        "hop": key,
        "epoch": epoch,
        "counter": 0,
        "gtid": gtid,
        "source": source,
        "runner": "",
        "connection_id": 0,
        "ddl_gtid": "",
        "ddl_origin": ddl_origin,
        "ddl_number": 0,
        "error": "",
    }
    names, marks = ", ".join(values), ", ".join(["%s"] * len(values))
    with connection.cursor() as cursor:
        cursor.execute(f"INSERT INTO {_TABLE} ({names}, updated_at) VALUES ({marks}, {_NOW})", tuple(values.values()))


def lock_name(database: str, key: str) -> str:
    """The user lock that a hop's runner holds on its target for as long as its connection lives.

    Unlike a connection id in a row it cannot outlive the connection, nor name another one after a restart.
    """
    return "shardkit:hop:" + hashlib.sha1(f"{database}\0{key}".encode(), usedforsecurity=False).hexdigest()


def is_held(connection: Connection, lock: str) -> bool:
    """Whether a runner's connection holds the hop's lock now."""
    return _holder(connection, lock) is not None


def _holder(connection: Connection, lock: str) -> int | None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT IS_USED_LOCK(%s)", (lock,))
        found: Sequence[int | None] = cursor.fetchone() or (None,)
    return found[0]


class Claim:
    """One runner's hold on a hop: its epoch, and the position up to which it has applied the source's log."""

    def __init__(self, connection: Connection, flavour: Flavour, row: HopRow, *, history: str | None) -> None:
        self._connection = connection
        self._history = own_tables.HISTORY_PREFIX + history if history is not None else None
        self.key = row.hop
        self.source = row.source
        self.epoch = row.epoch
        self.position: Position = parse_position(flavour, row.gtid)
        self._text = row.gtid  # as it stands in the row: what the compare-and-set compares
        self.ddl_gtid = row.ddl_gtid
        self.ddl_origin = row.ddl_origin
        self.ddl_number = row.ddl_number

    @classmethod
    def take(
        cls,
        connection: Connection,
        flavour: Flavour,
        *,
        database: str,
        key: str,
        runner: str,
        history: str | None,
        expected_epoch: int | None = None,
        source: str | None = None,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> Claim:
        """Take the hop over: end the old runner's connection, wait until it is gone, raise the epoch.

        :param runner: who this is, for people.
        :param history: the shard whose master's log the hop reads; None when it reads another server's.
        :param expected_epoch: of a runner that only lost its connection: the epoch that it still holds.
        :param source: the identity of the server whose log is about to be applied.
        :raises Fenced: when the epoch is another one, or is raised by somebody else at this very time.
        :raises Interrupted: when the old connection does not end in time (it may be rolling back a lot), or the
            position has become one of another source.
        :raises PreconditionFailed: a promotion has taken it.
        """
        lock = lock_name(database, key)
        with connection.cursor() as cursor:
            row = read_row(connection, key)
            if row is None:
                raise Fenced("its position row is gone")
            if expected_epoch is not None and row.epoch != expected_epoch:
                raise _taken_over(row)
            if source is not None:
                refuse_promoted(row, source if history is not None else None)
            if source is not None and row.source != source:
                raise Interrupted(f"its position is one of {row.source} now, not of {source}")
            end_old_runner(connection, lock)
            cursor.execute("SELECT GET_LOCK(%s, %s)", (lock, lock_timeout))
            if cursor.fetchone() != (1,):
                raise Interrupted(
                    f"the old runner's connection ({row.runner}) has not ended after {lock_timeout:.0f} s"
                )
            connection.rollback()
            changed = cursor.execute(
                f"UPDATE {_TABLE} SET epoch = epoch + 1, counter = counter + 1, runner = %s, "
                f"connection_id = CONNECTION_ID(), error = '', updated_at = {_NOW} WHERE hop = %s AND epoch = %s",
                (runner[:190], key, row.epoch),
            )
            found = read_row(connection, key)
            if changed != 1 or found is None:
                connection.rollback()
                if found is not None:
                    refuse_promoted(found)
                raise Fenced("another runner took over at the same time")
            connection.commit()
        return cls(connection, flavour, found, history=history)

    def begin(self, after: Position) -> None:
        """The first statement of a target transaction: move the position, or find out that it is not ours any more.

        :raises Fenced: another runner has moved it or raised the epoch. The transaction has been rolled back.
        :raises PreconditionFailed: a promotion has.
        """
        with self._connection.cursor() as cursor:
            changed = cursor.execute(
                f"UPDATE {_TABLE} SET counter = counter + 1, gtid = %s, ddl_gtid = '', updated_at = {_NOW} "
                "WHERE hop = %s AND epoch = %s AND gtid = %s",
                (str(after), self.key, self.epoch, self._text),
            )
        if changed != 1:
            self._connection.rollback()
            row = read_row(self._connection, self.key)
            self._connection.rollback()
            raise _taken_over(row)

    def finish(self, after: Position) -> None:
        """The last statements: note the master's history where this hop reads it, and commit."""
        if self._history is not None:
            self._note_history(after)
        self._connection.commit()
        self.position, self._text = after, str(after)
        self.ddl_gtid = ""

    def _note_history(self, after: Position) -> None:
        # Last on purpose: in this server's own log everything before it is applied, and what follows is not.
        with self._connection.cursor() as cursor:
            changed = cursor.execute(
                f"UPDATE {_TABLE} SET counter = counter + 1, gtid = %s, source = %s, updated_at = {_NOW} "
                "WHERE hop = %s",
                (str(after), self.source, self._history),
            )
        if not changed and self._history is not None:
            insert_row(self._connection, self._history, gtid=str(after), source=self.source, ddl_origin="")

    def intend(self, gtid: str) -> int:
        """Note durably that a schema change is about to run; its number among this hop's changes on this target.

        :param gtid: the change's, or whatever the next runner has to find of it.
        """
        return self._note_change(gtid, self.ddl_number + 1)

    def withdraw(self) -> None:
        """Note durably that the schema change that was intended did not run."""
        self._note_change("", self.ddl_number)

    def _note_change(self, gtid: str, number: int) -> int:
        with self._connection.cursor() as cursor:
            changed = cursor.execute(
                f"UPDATE {_TABLE} SET counter = counter + 1, ddl_gtid = %s, ddl_number = %s, updated_at = {_NOW} "
                "WHERE hop = %s AND epoch = %s AND gtid = %s",
                (gtid, number, self.key, self.epoch, self._text),
            )
        if changed != 1:
            self._connection.rollback()
            row = read_row(self._connection, self.key)
            self._connection.rollback()
            raise _taken_over(row)
        self._connection.commit()
        self.ddl_gtid, self.ddl_number = gtid, number
        return number


def note_error(connection: Connection, key: str, epoch: int, text: str) -> None:
    """Leave word in the row of why the hop stopped, as long as it is still ours."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"UPDATE {_TABLE} SET error = %s, updated_at = {_NOW} WHERE hop = %s AND epoch = %s",
            (text[:4000], key, epoch),
        )
    connection.commit()


def end_old_runner(connection: Connection, lock: str) -> None:
    """Kill the connection that holds a hop's lock; nothing where there is none."""
    held = _holder(connection, lock)
    if held is None:
        return
    with connection.cursor() as cursor:
        try:
            cursor.execute(f"KILL {int(held)}")
        except pymysql.MySQLError as error:
            if code_of(error) != _NO_SUCH_THREAD:  # it may have ended by itself
                raise


def refuse_promoted(row: HopRow, source: str | None = None) -> None:
    """See that no promotion is at work on the hop.

    :param source: the identity of a master whose log would do, the new one's; None of a hop that reads no master: a
        staging database may have become one that it goes on reading by the old map.
    :raises PreconditionFailed: until the map names the new master; then another hop reads that one.
    """
    if row.runner == own_tables.PROMOTED_BY and row.source != source:
        raise PreconditionFailed(
            "a promotion has taken its target over; it ends with a map that names the new master",
            hint="if it was cut short, run the same shardkit shard promote again",
        )


def _taken_over(row: HopRow | None) -> Fenced:
    if row is not None:
        refuse_promoted(row)
    now = f"epoch {row.epoch} of {row.runner or 'nobody'} at {row.gtid or 'the beginning'}" if row else "no row"
    return Fenced(
        f"another runner has taken over: the position row now says {now}",
        hint="let one `shardkit relay run` serve this hop; with a map in ZooKeeper several daemons share the hops",
    )
