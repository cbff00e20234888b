"""The servers' own replication: how a replica stands, and whom it follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shardkit.errors import PreconditionFailed
from shardkit.failover.servers import Server
from shardkit.gtid import Flavour, Position, parse_position
from shardkit.topology import Endpoint


@dataclass(frozen=True, slots=True)
class Following:
    """What a replica says of its source.

    :param source: ``host:port``.
    :param received: the position that it has the log up to, applied or not.
    :param running: whether it receives and applies.
    :param error: what its replication last stopped at.
    """

    source: str
    received: Position | None
    running: bool
    error: str


def following(server: Server) -> Following | None:
    """Whom this server follows; None where it follows nobody.

    :raises PreconditionFailed: when it follows several.
    """
    mariadb = server.flavour is Flavour.MARIADB
    found = server.named_rows("SHOW ALL SLAVES STATUS" if mariadb else "SHOW REPLICA STATUS")
    if not found:
        return None
    if len(found) > 1 or found[0].get("Connection_name") or found[0].get("Channel_Name"):
        raise PreconditionFailed(
            f"{server.endpoint.address} follows several servers, or one by a named channel",
            hint="promote a replica with one source and the unnamed channel",
        )
    return _read(found[0], mariadb=mariadb)


def _read(row: dict[str, Any], *, mariadb: bool) -> Following:
    source, replica = ("Master", "Slave") if mariadb else ("Source", "Replica")
    received = str(row["Gtid_IO_Pos" if mariadb else "Retrieved_Gtid_Set"] or "")
    flavour = Flavour.MARIADB if mariadb else Flavour.MYSQL
    return Following(
        source=f"{row[f'{source}_Host']}:{row[f'{source}_Port']}",
        received=parse_position(flavour, received) if received else None,
        running=row[f"{replica}_IO_Running"] == "Yes" and row[f"{replica}_SQL_Running"] == "Yes",
        error=str(row["Last_IO_Error"] or row["Last_SQL_Error"] or ""),
    )


def stop_following(server: Server) -> None:
    """Follow nobody any more. What was received and not applied is dropped. Running it again is safe."""
    word = "SLAVE" if server.flavour is Flavour.MARIADB else "REPLICA"
    if following(server) is not None:
        server.rows(f"STOP {word}")
        server.rows(f"RESET {word} ALL")


def follow(server: Server, source: Endpoint) -> None:
    """Follow another server by GTID, with the account that the old one was followed with. Running it again is safe."""
    if server.flavour is Flavour.MARIADB:
        server.rows("STOP SLAVE")
        server.rows(
            "CHANGE MASTER TO MASTER_HOST = %s, MASTER_PORT = %s, MASTER_USE_GTID = slave_pos", source.host, source.port
        )
        server.rows("START SLAVE")
        return
    server.rows("STOP REPLICA")
    server.rows(
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST = %s, SOURCE_PORT = %s, SOURCE_AUTO_POSITION = 1",
        source.host,
        source.port,
    )
    server.rows("START REPLICA")
