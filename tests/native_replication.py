"""Local servers that follow one another by their own replication."""

from __future__ import annotations

from shardkit.testing.database import LocalDatabaseServer


def follow(replica: LocalDatabaseServer, master: LocalDatabaseServer) -> None:
    """Native replication, by GTID."""
    login = f"_HOST = '{master.host}', %s_PORT = {master.port}, %s_USER = '{master.user}', %s_PASSWORD = "
    login += f"'{master.password}'"
    if replica.flavour == "mariadb":
        replica.execute(f"CHANGE MASTER TO MASTER{login % (('MASTER',) * 3)}, MASTER_USE_GTID = slave_pos")
        replica.execute("START SLAVE")
    else:
        replica.execute("RESET BINARY LOGS AND GTIDS")
        names = ("SOURCE",) * 3
        replica.execute(
            f"CHANGE REPLICATION SOURCE TO SOURCE{login % names}, SOURCE_AUTO_POSITION = 1, GET_SOURCE_PUBLIC_KEY = 1"
        )
        replica.execute("START REPLICA")
