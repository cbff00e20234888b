"""Sharding, read off-loading and change data capture for SQLAlchemy applications on MySQL and MariaDB.

The public names are imported when they are first used: the pytest plugin is loaded into every pytest run of an
environment that has shardkit, and the command line wants to answer ``--help`` at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardkit import errors
    from shardkit.cluster import Cluster, create_cluster
    from shardkit.credentials import Credentials, CredentialSource, fixed, from_environment
    from shardkit.errors import ShardkitError
    from shardkit.routing.route import Route
    from shardkit.session import ClusterSession, ScatterWarning, async_sessionmaker, is_retryable, retry, sessionmaker
    from shardkit.shardmap import Placement, ShardMap
    from shardkit.topology import Endpoint, Role, Shard

__all__ = [
    "Cluster",
    "ClusterSession",
    "CredentialSource",
    "Credentials",
    "Endpoint",
    "Placement",
    "Role",
    "Route",
    "ScatterWarning",
    "Shard",
    "ShardMap",
    "ShardkitError",
    "Token",
    "async_sessionmaker",
    "create_cluster",
    "errors",
    "fixed",
    "from_environment",
    "is_retryable",
    "retry",
    "sessionmaker",
]

_WHERE = {
    "Cluster": "cluster",
    "ClusterSession": "session",
    "CredentialSource": "credentials",
    "Credentials": "credentials",
    "Endpoint": "topology",
    "Placement": "shardmap",
    "Role": "topology",
    "Route": "routing.route",
    "ScatterWarning": "session",
    "Shard": "topology",
    "ShardMap": "shardmap",
    "ShardkitError": "errors",
    "Token": "replicas.token",
    "async_sessionmaker": "session",
    "create_cluster": "cluster",
    "fixed": "credentials",
    "from_environment": "credentials",
    "is_retryable": "session",
    "retry": "session",
    "sessionmaker": "session",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("shardkit.errors")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
