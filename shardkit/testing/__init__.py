"""Local servers with throw-away data, a fault proxy, and a pytest plugin: for our tests and for our users' tests.

Nothing is imported until it is used, so that the pytest plugin costs nothing where it is not needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit.testing.cluster import LocalCluster
    from shardkit.testing.mariadb import LocalMariaDB
    from shardkit.testing.mysql import LocalMySQL
    from shardkit.testing.ports import free_port
    from shardkit.testing.proxy import TcpProxy
    from shardkit.testing.server import LocalServer, start_together
    from shardkit.testing.zookeeper import LocalZooKeeper

__all__ = [
    "LocalCluster",
    "LocalMariaDB",
    "LocalMySQL",
    "LocalServer",
    "LocalZooKeeper",
    "TcpProxy",
    "free_port",
    "start_together",
]

_WHERE = {
    "LocalCluster": "cluster",
    "LocalMariaDB": "mariadb",
    "LocalMySQL": "mysql",
    "LocalServer": "server",
    "LocalZooKeeper": "zookeeper",
    "TcpProxy": "proxy",
    "free_port": "ports",
    "start_together": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"shardkit.testing.{_WHERE[name]}"), name)
