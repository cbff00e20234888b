"""Where a database says how far it has its master's log: as SQL, for each kind of server and replication."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from sqlalchemy.engine import Dialect

from shardkit import own_tables
from shardkit.gtid import Flavour, MariaDBGtid, MariaDBPosition, Position, family_of, parse_position
from shardkit.replicas.token import Mark
from shardkit.topology import ReplicationKind, Role


@dataclass(frozen=True, slots=True)
class PositionQuery:
    """How to ask one database for its position.

    :param expression: an SQL expression for it, as text.
    :param in_snapshot: whether the expression belongs to the snapshot of the transaction that asks: it then tells the
        position of the data which the same transaction sees. Else it is a little behind what can be seen, or ahead.
    """

    expression: str
    in_snapshot: bool

    def read(self, text: str | bytes | None) -> Position | None:
        """The position; None where the database does not have one."""
        return _read(text) if text else None


class Told(NamedTuple):
    """A position as a server told it.

    :param query: reads its text.
    :param all_of_it: whether it covers everything that was written and seen before.
    """

    shard: str
    epoch: int
    query: PositionQuery
    text: Any
    all_of_it: bool

    @property
    def mark(self) -> Mark:
        """The position, read."""
        return Mark(self.epoch, self.query.read(self.text))


@lru_cache(maxsize=1024)
def _read(text: str | bytes) -> Position:
    found = text.decode() if isinstance(text, bytes) else text
    # A replica may be of another family than the master whose position it holds.
    return _newest(found) if family_of(found) is Flavour.MARIADB else parse_position(Flavour.MYSQL, found)


def flavour_of(dialect: Dialect) -> Flavour:
    """Which family the server of an engine belongs to, once the engine has connected."""
    return Flavour.MARIADB if getattr(dialect, "is_mariadb", False) else Flavour.MYSQL


@lru_cache(maxsize=1024)
def position_query(shard: str, role: Role, replication: ReplicationKind, flavour: Flavour) -> PositionQuery:
    """How to ask an endpoint for its position in the log of the shard's master."""
    if role is Role.MASTER:
        # written before the engine commits on MariaDB (sql/log.cc), so never behind what can be seen
        variable = "@@global.gtid_binlog_pos" if flavour is Flavour.MARIADB else "@@global.gtid_executed"
        return PositionQuery(variable, in_snapshot=False)
    if replication is ReplicationKind.RELAY:
        table = own_tables.position.name
        where = f"hop = '{own_tables.HISTORY_PREFIX}{shard}'"
        return PositionQuery(f"(SELECT gtid FROM {table} WHERE {where})", in_snapshot=True)
    if flavour is Flavour.MARIADB:
        # the table that MariaDB's applier writes in each transaction (MariaDB Knowledge Base, "gtid_slave_pos table")
        entry = "CONCAT_WS('-', domain_id, server_id, seq_no)"
        table = f"(SELECT GROUP_CONCAT({entry}) FROM mysql.gtid_slave_pos)"
        return PositionQuery(table, in_snapshot=True)
    return PositionQuery("@@global.gtid_executed", in_snapshot=False)


def _newest(text: str) -> MariaDBPosition:
    """A MariaDB position; of several ids of one domain the newest counts."""
    newest: dict[int, MariaDBGtid] = {}
    for part in text.replace("\n", "").split(","):
        (gtid,) = MariaDBPosition.parse(part).domains.values()
        if gtid.domain not in newest or newest[gtid.domain].sequence < gtid.sequence:
            newest[gtid.domain] = gtid
    return MariaDBPosition(newest)
