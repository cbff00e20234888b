"""Sharding, read off-loading and change data capture for SQLAlchemy applications on MySQL and MariaDB."""

from __future__ import annotations

from shardkit.cluster import Cluster, create_cluster
from shardkit.credentials import Credentials, CredentialSource, fixed, from_environment
from shardkit.errors import ShardkitError
from shardkit.routing.route import Route
from shardkit.session import ClusterSession, ScatterWarning, async_sessionmaker, sessionmaker
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
    "async_sessionmaker",
    "create_cluster",
    "fixed",
    "from_environment",
    "sessionmaker",
]
