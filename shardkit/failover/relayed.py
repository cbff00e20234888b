"""The relay's copies of a shard: those that its old master filled go on from the new master's log.

A copy can do so when it has exactly what the new master had before its first own write: then the new master's log from
there on is all that it lacks. Its position row is moved to that place, and with it the history that says whose
positions it has; copies behind it (staging's replicas) get both through its own log, in order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.failover.servers import FOLLOW_SECONDS, Server, fault_in_the_end, fault_of
from shardkit.failover.standing import PROMOTED, position_of
from shardkit.gtid import MariaDBPosition, Position, parse_position
from shardkit.topology import Endpoint, Role, Shard
from shardkit_cdc import preflight
from shardkit_cdc.position import insert_row, lock_name, read_row

_PAUSE = 0.01  # seconds between two looks
#: Seconds that a killed runner's schema change gets to end.
_END_SECONDS = 10.0
#: Transactions of a master that cannot be asked, or that wrote although it was closed: more than it can have had.
_ROOM = 1_000_000
_TABLE = own_tables.position.name


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where the new master's log begins to be the shard's.

    :param source: the new master's identity.
    :param position: in its own log.
    :param has: what it had of the old master's log then.
    :param before: whose log ``has`` is a position of: the old master's identity.
    :param epoch: of the shard, from the new master on.
    :param within_change: a schema change was under way on the new master when it was taken out of the relay.
    """

    source: str
    position: Position
    has: Position
    before: str
    epoch: int
    within_change: bool

    @classmethod
    def note(cls, server: Server, shard: Shard, epoch: int, *, has: Position) -> Beginning:
        """Find it on a new master that is out of replication and not opened yet, and note it there.

        A later attempt of the same promotion finds the note: the new master may be open by then.
        """
        source = preflight.ask(server.connection, server.endpoint).identity
        key = PROMOTED + shard.name
        noted = read_row(server.connection, key)
        if noted is None or (noted.epoch, noted.source) != (epoch, source):
            _raise_numbers(server, shard, has)
            position = server.end_of_log
            server.rows(f"DELETE FROM {_TABLE} WHERE hop = %s", key)
            insert_row(server.connection, key, gtid=str(position), source=source, ddl_origin="", epoch=epoch)
        else:
            position = parse_position(server.flavour, noted.gtid)
        hop = read_row(server.connection, own_tables.HOP_PREFIX + shard.name)
        history = read_row(server.connection, own_tables.HISTORY_PREFIX + shard.name)
        return cls(
            source,
            position,
            has,
            before=history.source if history is not None else "",
            epoch=epoch,
            within_change=hop is not None and bool(hop.ddl_gtid),
        )

    def is_reached(self, position: Position) -> bool:
        """Whether a copy that stands there in the old master's log holds what the new master held, and no more.

        More is what was written to the old master past its closing: the new one does not have it.
        """
        return position.covers(self.has) and self.has.covers(position)


def follow_all(
    firsts: Sequence[Endpoint],
    behind: Sequence[Endpoint],
    shard: Shard,
    beginning: Beginning,
    credentials: CredentialSource,
) -> dict[Endpoint, str]:
    """Have copies go on from the new master.

    :param firsts: those that read its log from now on.
    :param behind: those that read the log of the first of them, as before.
    :returns: why, for each that does not.
    """
    every = [*firsts, *behind]
    if not every:
        return {}
    if beginning.within_change:
        return dict.fromkeys(every, "a schema change was under way on the new master, which may have it or not")
    with ThreadPoolExecutor(len(every)) as pool:
        moved = [pool.submit(_follow, each, shard, beginning, credentials) for each in firsts]
        faults = {each: future.result() for each, future in zip(firsts, moved, strict=True)}
        if any(faults.values()) and behind:
            faults |= dict.fromkeys(behind, f"{firsts[0]}, which fills it, does not follow the new master")
        else:
            come = [pool.submit(_has_come, each, shard, beginning, credentials) for each in behind]
            faults |= {each: future.result() for each, future in zip(behind, come, strict=True)}
    return {each: fault for each, fault in faults.items() if fault}


def freeze(server: Server, shard: Shard, epoch: int) -> None:
    """Let nothing of the old master's log come any more. Running it again is safe.

    :raises pymysql.OperationalError: the runner's transaction does not end in time.
    :raises PreconditionFailed: its schema change does not.
    """
    _end_runner(server, shard)
    # the runner's compare-and-set fails from here on, and a new one finds a source that is not its own
    server.rows(
        f"UPDATE {_TABLE} SET epoch = epoch + 1, source = %s, runner = %s WHERE hop = %s",
        f"{PROMOTED}{epoch}",
        own_tables.PROMOTED_BY,
        own_tables.HOP_PREFIX + shard.name,
    )
    # a schema change holds no lock on the row: killed, it may still come to its end, and be logged
    deadline = time.monotonic() + _END_SECONDS
    while _end_runner(server, shard):
        if time.monotonic() >= deadline:
            raise PreconditionFailed(
                f"{server.endpoint}: what the relay was doing there has not ended in {_END_SECONDS:.0f} s",
                hint="wait for it, then run the same command again",
            )
        time.sleep(_PAUSE)


def _end_runner(server: Server, shard: Shard) -> bool:
    """Kill the connection of a hop's runner; false where there is none."""
    key = own_tables.HOP_PREFIX + shard.name
    (holder,) = server.row("SELECT IS_USED_LOCK(%s)", lock_name(server.endpoint.database, key))
    if holder is not None:
        server.kill(int(holder))  # its transaction would hold the row
    return holder is not None


def _raise_numbers(server: Server, shard: Shard, has: Position) -> None:
    """Have a new master on MariaDB number its transactions above all of the old master's.

    MariaDB's positions of one domain are compared by number, whoever wrote them. A copy that is left behind, and put
    back into the map, would pass for one that has what the new master has written since.
    """
    own = server.end_of_log
    if not isinstance(has, MariaDBPosition) or not isinstance(own, MariaDBPosition):
        return
    for domain, gtid in has.domains.items():
        if domain in own.domains and own.domains[domain].sequence >= gtid.sequence + _ROOM:
            continue
        server.rows(f"SET SESSION gtid_domain_id = {domain}, gtid_seq_no = {gtid.sequence + 2 * _ROOM}")
        server.rows(f"UPDATE {_TABLE} SET counter = counter + 1 WHERE hop = %s", own_tables.HOP_PREFIX + shard.name)
    server.rows("SET SESSION gtid_domain_id = DEFAULT")


def _follow(endpoint: Endpoint, shard: Shard, beginning: Beginning, credentials: CredentialSource) -> str:
    """Why it does not; empty where it does."""
    return fault_of(endpoint, credentials, lambda server: fault_in_the_end(lambda: _moved(server, shard, beginning)))


def _moved(server: Server, shard: Shard, beginning: Beginning) -> str:
    """Move the position of a copy's hop into the new master's log; why not, where it cannot be moved (yet)."""
    hop, history = own_tables.HOP_PREFIX + shard.name, own_tables.HISTORY_PREFIX + shard.name
    row = read_row(server.connection, hop)
    if row is None:
        return "it has no position"
    if row.source == beginning.source and has_begun(server, shard, beginning.source, beginning.position):
        return ""  # an attempt before this one has moved it
    if fault := _not_there(server, shard, beginning):
        return fault
    _end_runner(server, shard)
    server.rows("BEGIN")
    try:
        stands = server.named_rows(f"SELECT * FROM {_TABLE} WHERE hop IN (%s, %s) FOR UPDATE", hop, history)
        if fault := _not_there(server, shard, beginning):
            return fault
        if any(each["ddl_gtid"] for each in stands):
            return "it stands within a schema change"
        for each in stands:
            server.rows(
                f"UPDATE {_TABLE} SET epoch = epoch + 1, counter = counter + 1, source = %s, gtid = %s, error = '', "
                "runner = %s WHERE hop = %s",
                beginning.source,
                str(beginning.position),
                own_tables.PROMOTED_BY,
                each["hop"],
            )
        # how these end nobody will say any more, and the new master may have branches of the same names
        server.rows(
            f"UPDATE {own_tables.prepared.name} SET hop = %s WHERE hop = %s", left_prepared(shard, beginning.epoch), hop
        )
        server.rows("COMMIT")
    finally:
        server.rows("ROLLBACK")
    return ""


def _not_there(server: Server, shard: Shard, beginning: Beginning) -> str:
    """Why a copy does not hold what the new master held; empty where it does."""
    position = position_of(server, shard, Role.REPLICA)
    history = read_row(server.connection, own_tables.HISTORY_PREFIX + shard.name)
    if history is not None and history.source != beginning.before:
        return f"its position is one of {history.source}, the new master's was one of {beginning.before}"
    if position is None or not beginning.is_reached(position):
        return f"it stands at {position or 'nothing'}, the new master took over at {beginning.has}"
    return ""


def _has_come(endpoint: Endpoint, shard: Shard, beginning: Beginning, credentials: CredentialSource) -> str:
    """Why a copy that is filled by another does not have the new master's history; empty where it does."""
    late = f"it has not come up in {FOLLOW_SECONDS:.0f} s: put it back when it has"

    def look(server: Server) -> str:
        return "" if has_begun(server, shard, beginning.source, beginning.position) else late

    return fault_of(endpoint, credentials, lambda server: fault_in_the_end(lambda: look(server)))


def has_begun(server: Server, shard: Shard, source: str, position: Position | None = None) -> bool:
    """Whether the positions that a copy tells are the new master's, and not those of an earlier time as a master."""
    row = read_row(server.connection, own_tables.HISTORY_PREFIX + shard.name)
    if row is None or row.source != source:
        return False
    return position is None or parse_position(server.flavour, row.gtid).covers(position)


def left_prepared(shard: Shard, epoch: int) -> str:
    """The hop under whose name XA branches are kept that a master left prepared when it died."""
    return f"{PROMOTED}{epoch}:{shard.name}"
