"""The asyncio side of sessions: what an `AsyncSession` has beyond SQLAlchemy's own."""

from __future__ import annotations

from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncSession

from shardkit.replicas.token import Token
from shardkit.session.session import ClusterSession


class AsyncClusterSession(AsyncSession):
    """A `sqlalchemy.ext.asyncio.AsyncSession` over the shards of a cluster, made by `shardkit.async_sessionmaker`."""

    @property
    def token(self) -> Token:
        """`ClusterSession.token`."""
        return cast("ClusterSession", self.sync_session).token

    async def move(self, instance: object, key: Any) -> None:
        """`ClusterSession.move`."""
        await self.run_sync(lambda session: cast("ClusterSession", session).move(instance, key))
