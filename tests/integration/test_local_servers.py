"""The servers of shardkit.testing: started, stopped, crashed, paused, and never left behind."""

from __future__ import annotations

from shardkit.testing import LocalZooKeeper
from shardkit.testing.database import LocalDatabaseServer


def test_a_database_server_logs_rows_with_full_metadata(database_server: LocalDatabaseServer) -> None:
    (row,) = database_server.execute("SELECT @@log_bin, @@binlog_format, @@binlog_row_image, @@binlog_row_metadata")
    assert row == (1, "ROW", "FULL", "FULL")


def test_a_fresh_database_is_empty(database_server: LocalDatabaseServer, fresh_database: str) -> None:
    assert database_server.execute("SHOW TABLES", database=fresh_database) == []


def test_zookeeper_serves(zookeeper: LocalZooKeeper) -> None:
    assert "Mode: standalone" in zookeeper.ask("srvr")
