"""The servers' own replication: how a replica stands, and whom it follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.failover.servers import Server, fault_in_the_end, fault_of
from shardkit.gtid import Flavour, Position, parse_position
from shardkit.topology import Endpoint

#: Seconds that MySQL's appliers get to note how far they are: they do so every 300 ms (replica_checkpoint_period).
_SETTLE_SECONDS = 1.0
#: Seconds that MySQL waits for it (SLAVE_WAIT_GROUP_DONE in its rpl_replica.cc), and some to answer.
_REST_OF_A_TRANSACTION_SECONDS = 75.0
_PAUSE = 0.02  # seconds between two looks


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
    if following(server) is None:
        return
    _stop(server)
    server.rows(f"RESET {'SLAVE' if server.flavour is Flavour.MARIADB else 'REPLICA'} ALL")


def follow_all(replicas: Sequence[Endpoint], master: Endpoint, credentials: CredentialSource) -> dict[Endpoint, str]:
    """Have replicas follow the new master.

    :returns: why, for each that does not.
    """
    if not replicas:
        return {}
    with ThreadPoolExecutor(len(replicas)) as pool:
        faults = pool.map(lambda replica: _follow(replica, master, credentials), replicas)
        return {replica: fault for replica, fault in zip(replicas, faults, strict=True) if fault}


def _follow(replica: Endpoint, master: Endpoint, credentials: CredentialSource) -> str:
    """Why it does not; empty where it does."""

    def ask(server: Server) -> str:
        follow(server, master)
        return fault_in_the_end(lambda: _not_following(server))

    return fault_of(replica, credentials, ask)


def _not_following(server: Server) -> str:
    now = following(server)
    if now is None:
        return "it follows nobody"
    return "" if now.running else now.error or "its replication does not start"


def follow(server: Server, source: Endpoint) -> None:
    """Follow another server by GTID, with the account that the old one was followed with. Running it again is safe."""
    if server.flavour is Flavour.MARIADB:
        _stop(server)
        server.rows(
            "CHANGE MASTER TO MASTER_HOST = %s, MASTER_PORT = %s, MASTER_USE_GTID = slave_pos", source.host, source.port
        )
        server.rows("START SLAVE")
        return
    server.rows("STOP REPLICA IO_THREAD")
    if any(row["Auto_Position"] != 1 for row in server.named_rows("SHOW REPLICA STATUS")):
        _stop(server)
        server.rows("CHANGE REPLICATION SOURCE TO SOURCE_AUTO_POSITION = 1")
    server.rows("CHANGE REPLICATION SOURCE TO SOURCE_HOST = %s, SOURCE_PORT = %s", source.host, source.port)
    server.rows("START REPLICA")


def _stop(server: Server) -> None:
    """Neither receive nor apply.

    MySQL's STOP REPLICA waits up to a minute for the rest of a transaction that came in part, which a master that has
    died never sends. Killing the appliers before it rolls the part back at once; nothing is lost by that: what is not
    applied as a whole is not in this server's GTIDs. Where this account may not kill them (it takes SYSTEM_USER), the
    minute is waited for.
    """
    if server.flavour is Flavour.MARIADB:
        server.rows("STOP SLAVE")
        return
    server.rows("STOP REPLICA IO_THREAD")
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not _applied_all(server) and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    if not _applied_all(server):
        with suppress(PreconditionFailed):
            for applier in server.appliers():
                server.kill(applier)
    server.patiently("STOP REPLICA", seconds=_REST_OF_A_TRANSACTION_SECONDS)


def _applied_all(server: Server) -> bool:
    """Whether the applier of MySQL stands where its receiver stands: not within a transaction."""
    found = server.named_rows("SHOW REPLICA STATUS")
    return all(
        row["Replica_SQL_Running"] == "No"
        or (row["Relay_Source_Log_File"], row["Exec_Source_Log_Pos"])
        == (row["Source_Log_File"], row["Read_Source_Log_Pos"])
        for row in found
    )
