"""The fence: what makes a shard itself refuse writes to buckets that it does not own.

Every shard that takes part in a move has the table ``shardkit_ownership``, with a row for each bucket of the keyspace,
and triggers on the keyspace's tables which read the row of the bucket written, with a shared lock that lasts until the
writer's transaction ends. So an exclusive lock on the row waits for every open writer and lets no later one pass, raw
SQL included; and a row that does not say ``owned`` refuses the write.

The triggers run before the change, so that their error comes before all others (a moved parent row would else be a
foreign key's fault). Where the key is AUTO_INCREMENT or generated they run after it: before, such a key is 0 or not yet
computed, and its bucket would be another one. An error undoes the statement all the same.

A job's own connections carry the user variable ``@shardkit_coordinator`` and are let through: each transaction that
they write begins by locking the job's row and comparing its token (`shardkit.rebalance.cutover.Lease`).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import pymysql

from shardkit.errors import PreconditionFailed, RebalanceError
from shardkit.partition import Bucket, format_buckets
from shardkit.rebalance.servers import DDL_LOCK_SECONDS, LockWait, Server, code_of, in_list
from shardkit.rebalance.tables import Table, quoted, text_literal
from shardkit.shardmap import Keyspace

PREFIX = "shardkit_"
SQLSTATE = "45S01"
ERRNO = 1644  # ER_SIGNAL_EXCEPTION
#: What a SIGNAL's MESSAGE_TEXT holds; more is an error of its own.
MESSAGE_CHARACTERS = 128
#: Seconds over which DDL is tried without waiting for the table at all.
IMPATIENT_SECONDS = 5.0
_NO_TRIGGERS_BESIDE_LOG = 1419  # ER_BINLOG_CREATE_ROUTINE_NEED_SUPER


class Owned(StrEnum):
    """What a shard's row says about a bucket."""

    OWNED = "owned"
    IMPORTING = "importing"
    FROZEN = "frozen"
    MOVED = "moved"


@dataclass(frozen=True, slots=True)
class Ownership:
    """One row of ``shardkit_ownership``.

    :param epoch: only grows, whichever shard the bucket is on.
    """

    state: Owned
    epoch: int
    moved_to: str | None
    job: str | None


# --- triggers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trigger:
    """One trigger of the fence. Its name ends in a digest: another body is another trigger."""

    table: str
    timing: str
    event: str
    body: str

    @property
    def name(self) -> str:
        """At most 64 characters, like every identifier."""
        digest = zlib.crc32(f"{self.table} {self.timing} {self.body}".encode())
        return f"{PREFIX}fence_{self.event[:3].lower()}_{self.table[:36]}_{digest:08x}"

    @property
    def create(self) -> str:
        """The statement that makes it."""
        return (
            f"CREATE TRIGGER {quoted(self.name)} {self.timing} {self.event} ON {quoted(self.table)}"
            f" FOR EACH ROW {self.body}"
        )


def triggers_of(keyspace: Keyspace, table: Table) -> tuple[Trigger, ...]:
    """The three triggers that fence one table."""
    new, old = (table.bucket(keyspace.partition, row) for row in ("NEW", "OLD"))
    new_outside, old_outside = (table.outside(keyspace.partition, row) for row in ("NEW", "OLD"))
    key = [table.column(name) for name in table.key]
    timing = "AFTER" if any(column.auto_increment or column.generated for column in key) else "BEFORE"
    return (
        Trigger(table.name, timing, "INSERT", _body(keyspace.name, [new], new_outside)),
        Trigger(
            table.name,
            timing,
            "UPDATE",
            _body(keyspace.name, [old, new], new_outside and f"{new_outside} AND NOT {old_outside}"),
        ),
        Trigger(table.name, "BEFORE", "DELETE", _body(keyspace.name, [old])),
    )


def _body(keyspace: str, buckets: Sequence[str], outside: str | None = None) -> str:
    """:param outside: SQL that is true where the write makes a row that no bucket may take, as its key is outside the
    normalization's alphabet: it would stay where it is when the buckets of its equals move."""
    checks = "" if outside is None else f"IF {outside} THEN {_refusal_outside(keyspace)} END IF; "
    checks += _check(keyspace, buckets[0])
    for bucket in buckets[1:]:
        checks += f" IF NOT (({bucket}) <=> shardkit_bucket) THEN {_check(keyspace, bucket)} END IF;"
    # The job's own connections, which write rows by the thousand, get past the first test without a variable declared.
    return (
        "IF @shardkit_coordinator IS NULL THEN BEGIN"
        " DECLARE shardkit_bucket VARCHAR(63) CHARACTER SET ascii COLLATE ascii_bin;"
        " DECLARE shardkit_state VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin;"
        " DECLARE shardkit_moved_to VARCHAR(63) CHARACTER SET ascii COLLATE ascii_bin;"
        f" DECLARE shardkit_text VARCHAR({MESSAGE_CHARACTERS}) CHARACTER SET ascii COLLATE ascii_bin;"
        " DECLARE CONTINUE HANDLER FOR NOT FOUND SET shardkit_state = NULL;"
        f" {checks} END; END IF"
    )


def _refusal_outside(keyspace: str) -> str:
    # not in the words of the other refusal, after which the transaction is run again on a newer map
    text = text_literal(
        f"shardkit refuses this key: 'normalize' of keyspace {keyspace} does not know a character of it"
    )
    return (
        f"SET shardkit_text = LEFT({text}, {MESSAGE_CHARACTERS});"
        f" SIGNAL SQLSTATE '{SQLSTATE}' SET MESSAGE_TEXT = shardkit_text, MYSQL_ERRNO = {ERRNO};"
    )


def _check(keyspace: str, bucket: str) -> str:
    # A row that no bucket takes (a list partition's stray value) is none of the fence's business: it cannot move.
    return (
        f"SET shardkit_bucket = {bucket};"
        " IF shardkit_bucket IS NOT NULL THEN"
        " SELECT state, moved_to INTO shardkit_state, shardkit_moved_to FROM shardkit_ownership"
        f" WHERE keyspace = {text_literal(keyspace)} AND bucket = shardkit_bucket LOCK IN SHARE MODE;"
        " IF shardkit_state IS NULL OR shardkit_state <> 'owned' THEN"
        " SET shardkit_text = LEFT(CONCAT('shardkit: bucket ', shardkit_bucket, "
        f"{text_literal(f' of keyspace {keyspace} is ')}, COALESCE(shardkit_state, 'unknown here'),"
        f" COALESCE(CONCAT('; moved_to=', shardkit_moved_to), '')), {MESSAGE_CHARACTERS});"
        f" SIGNAL SQLSTATE '{SQLSTATE}' SET MESSAGE_TEXT = shardkit_text, MYSQL_ERRNO = {ERRNO};"
        " END IF; END IF;"
    )


@dataclass(frozen=True, slots=True)
class Found:
    """A trigger that stands on a table."""

    table: str
    name: str
    event: str

    @property
    def ours(self) -> bool:
        """Whether it belongs to the fence."""
        return self.name.startswith(f"{PREFIX}fence_")


def triggers_on(server: Server, tables: Iterable[str]) -> tuple[Found, ...]:
    """Every trigger on these tables."""
    names = list(tables)
    return tuple(
        Found(str(table), str(trigger), str(event))
        for table, trigger, event in server.rows(
            "SELECT event_object_table, trigger_name, event_manipulation FROM information_schema.triggers"
            f" WHERE trigger_schema = DATABASE() AND event_object_table IN {in_list(names)}",
            *names,
        )
    )


def install(
    server: Server, keyspace: Keyspace, tables: Sequence[Table], wait: Callable[[float], None], *, patience: float
) -> None:
    """Have exactly today's triggers on every table. New ones are made before old ones go: the fence never opens.

    :param wait: called with the seconds to wait between two tries.
    :param patience: seconds over which a table is tried again.
    :raises RebalanceError: when open transactions keep a table's metadata lock for longer.
    :raises PreconditionFailed: when the account may not make triggers.
    """
    there = triggers_on(server, [table.name for table in tables])
    for table in tables:
        wanted = {trigger.name: trigger for trigger in triggers_of(keyspace, table)}
        found = {trigger.name for trigger in there if trigger.table == table.name and trigger.ours}
        for name in wanted.keys() - found:
            change_table(server, wanted[name].create, table.name, wait, patience)
        for name in found - wanted.keys():
            change_table(server, f"DROP TRIGGER IF EXISTS {quoted(name)}", table.name, wait, patience)


def missing_triggers(server: Server, keyspace: Keyspace, tables: Sequence[Table]) -> tuple[str, ...]:
    """The fence's triggers that are not there (any more). One that another version of shardkit has made will do."""
    there = {(trigger.table, trigger.event) for trigger in triggers_on(server, keyspace.tables) if trigger.ours}
    return tuple(
        trigger.name
        for table in tables
        for trigger in triggers_of(keyspace, table)
        if (trigger.table, trigger.event) not in there
    )


def change_table(server: Server, ddl: str, table: str, wait: Callable[[float], None], patience: float) -> None:
    """Run DDL that needs a table for itself, giving way to open transactions instead of stalling everybody behind us.

    DDL that waits makes everybody else wait, and can make a transaction that has read the table and now writes it a
    deadlock's victim. MariaDB can try without waiting, so that is done for a while first; MySQL's least is a second.

    :raises RebalanceError: after ``patience`` seconds of tries.
    """
    started = time.monotonic()
    pause = 0.01
    while True:
        elapsed = time.monotonic() - started
        patient = server.flavour == "mysql" or elapsed >= min(IMPATIENT_SECONDS, patience / 2)
        server.run(f"SET SESSION lock_wait_timeout = {DDL_LOCK_SECONDS if patient else 0}")
        try:
            server.run(ddl)
        except LockWait:
            if elapsed >= patience:
                raise RebalanceError(
                    f"{server}: table {table} has been in use by open transactions for {patience:.0f} s",
                    hint="end the long transactions there (SHOW PROCESSLIST), then run the same command again",
                ) from None
            wait(pause)
            pause = min(pause * 2, 2.0) if patient else 0.01
        except pymysql.MySQLError as error:
            if code_of(error)[0] == _NO_TRIGGERS_BESIDE_LOG:
                raise PreconditionFailed(
                    f"{server}: the account may not create triggers while the binary log is on",
                    hint="SET GLOBAL log_bin_trust_function_creators = 1 there, or use an account with SUPER",
                ) from error
            raise
        else:
            return
        finally:
            server.run(f"SET SESSION lock_wait_timeout = {DDL_LOCK_SECONDS}")


# --- ownership rows ----------------------------------------------------------------------------------------------


def read_ownership(server: Server, keyspace: str, buckets: Iterable[Bucket] | None = None) -> dict[str, Ownership]:
    """The rows of a keyspace (or of some buckets), by the bucket's name. No locks."""
    found = server.rows(
        "SELECT bucket, state, epoch, moved_to, job FROM shardkit_ownership WHERE keyspace = %s", keyspace
    )
    wanted = None if buckets is None else {str(bucket) for bucket in buckets}
    return {
        str(bucket): Ownership(Owned(state), int(epoch), moved_to, job)
        for bucket, state, epoch, moved_to, job in found
        if wanted is None or str(bucket) in wanted
    }


def complete_ownership(server: Server, keyspace: Keyspace) -> None:
    """Add the rows that are missing, as the map places the buckets."""
    there = read_ownership(server, keyspace.name)
    rows = [
        (keyspace.name, str(bucket), "owned" if holder == server.shard else "moved", holder)
        for bucket, holder in keyspace.placement.items()
        if str(bucket) not in there
    ]
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        values = [(name, bucket, state, None if state == "owned" else holder) for name, bucket, state, holder in part]
        server.run(
            "INSERT IGNORE INTO shardkit_ownership (keyspace, bucket, state, epoch, moved_to) VALUES "
            + ",".join(["(%s, %s, %s, 0, %s)"] * len(values)),
            *(field for row in values for field in row),
        )


def change_ownership(
    server: Server,
    keyspace: str,
    buckets: Sequence[Bucket],
    *,
    was: Iterable[Owned],
    to: Owned,
    epoch: int | None = None,
    moved_to: str | None = None,
    job: str | None,
) -> int:
    """Set the rows of buckets, inside the caller's transaction. The exclusive locks wait for open writers.

    :param was: the states that a row may be in before; a row that is already as wanted counts as done.
    :param epoch: the new epoch; None keeps each row's own.
    :returns: how many rows were changed.
    :raises LockWait: open transactions hold a bucket.
    :raises RebalanceError: when a row is in another state, or belongs to another job.
    """
    names = [str(bucket) for bucket in buckets]
    rows = server.rows(
        "SELECT bucket, state, epoch, moved_to, job FROM shardkit_ownership"
        f" WHERE keyspace = %s AND bucket IN {in_list(names)} FOR UPDATE",
        keyspace,
        *names,
    )
    found = {str(bucket): Ownership(Owned(state), int(now), there, by) for bucket, state, now, there, by in rows}
    allowed = set(was)
    due: list[str] = []
    for name in names:
        row = found.get(name)
        if row is not None and row.state is to and row.job == job and epoch in {None, row.epoch}:
            continue
        if row is None or row.state not in allowed or row.job not in {None, job}:
            raise unexpected(server, keyspace, name, row, allowed)
        due.append(name)
    if due:
        server.run(
            "UPDATE shardkit_ownership SET state = %s, epoch = COALESCE(%s, epoch), moved_to = %s, job = %s"
            f" WHERE keyspace = %s AND bucket IN {in_list(due)}",
            to.value,
            epoch,
            moved_to,
            job,
            keyspace,
            *due,
        )
    return len(due)


def unexpected(
    server: Server, keyspace: str, bucket: str, row: Ownership | None, wanted: Iterable[Owned]
) -> RebalanceError:
    """The error for a row of ``shardkit_ownership`` that is not what the map and the job say."""
    wanted_text = " or ".join(sorted(wanted))
    found = "has no row" if row is None else f"is {row.state}" + (f" (job {row.job})" if row.job else "")
    return RebalanceError(
        f"{server}: bucket {bucket} of keyspace {keyspace} {found} in shardkit_ownership, expected {wanted_text}",
        hint="the fence and the shard map disagree: see 'The fence and the map disagree' in docs/how-to/rebalance.md",
    )


def describe(buckets: Sequence[Bucket]) -> str:
    """Buckets for a message, cut where they are many."""
    text = format_buckets(buckets)
    return text if len(text) <= 60 else f"{text[:57]}..."
