"""A native replica beside the relay's: what it cannot replay either is the server's fault, not the relay's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pymysql

from shardkit.testing.database import LocalDatabaseServer
from tests.native_replication import follow

#: Seconds that it may take to catch up.
PATIENCE = 60.0


class NativeReplica:
    """Follows a master with the server's own replication.

    :param server: a server without data.
    """

    def __init__(self, server: LocalDatabaseServer, master: LocalDatabaseServer) -> None:
        self.server = server
        self._master = master
        self._mariadb = server.flavour == "mariadb"
        if self._mariadb:
            # By default it takes DROP TABLE for DROP TABLE IF EXISTS, and more of the kind: too kind a judge.
            server.execute("SET GLOBAL slave_ddl_exec_mode = 'STRICT'")
        follow(server, master)

    def trouble(self) -> str:
        """Wait until it has all that the master has logged; what keeps it from that, empty for nothing."""
        end = str(self._master.execute(f"SELECT @@global.{self._variable}")[0][0]).replace("\n", "")
        wait = "MASTER_GTID_WAIT" if self._mariadb else "WAIT_FOR_EXECUTED_GTID_SET"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.server.execute(f"SELECT {wait}(%s, 0.2)", end) == [(0,)]:
                return ""
            status = self._status()
            if status["running"] != "Yes":
                return f"native replication stopped: {status['error']}"
        return f"native replication does not catch up in {PATIENCE:.0f} s"

    def begin_anew(self, database: str) -> None:
        """Leave out all that it does not have, and follow from here, with an empty database."""
        end = str(self._master.execute(f"SELECT @@global.{self._variable}")[0][0]).replace("\n", "")
        self.server.execute("STOP SLAVE" if self._mariadb else "STOP REPLICA")
        if self._mariadb:
            self.server.execute("RESET MASTER")
            self.server.execute("SET GLOBAL gtid_slave_pos = %s", end)
        else:
            self.server.execute("RESET BINARY LOGS AND GTIDS")
            self.server.execute("SET GLOBAL gtid_purged = %s", end)
        self.server.execute(f"CREATE DATABASE IF NOT EXISTS {database} CHARACTER SET utf8mb4")
        self.server.execute("START SLAVE" if self._mariadb else "START REPLICA")

    @property
    def _variable(self) -> str:
        return "gtid_binlog_pos" if self._mariadb else "gtid_executed"

    def _status(self) -> Mapping[str, Any]:
        connection = self.server.connect(cursorclass=pymysql.cursors.DictCursor)
        with connection, connection.cursor() as cursor:
            cursor.execute("SHOW SLAVE STATUS" if self._mariadb else "SHOW REPLICA STATUS")
            row = cursor.fetchone() or {}
        name = "Slave" if self._mariadb else "Replica"
        return {"running": row.get(f"{name}_SQL_Running"), "error": row.get("Last_SQL_Error")}
