"""Sessions over the shards of a cluster."""

from __future__ import annotations

from shardkit.session.factory import async_sessionmaker, sessionmaker
from shardkit.session.retrying import is_retryable, retry
from shardkit.session.session import ClusterSession
from shardkit.session.statements import ScatterWarning

__all__ = ["ClusterSession", "ScatterWarning", "async_sessionmaker", "is_retryable", "retry", "sessionmaker"]
