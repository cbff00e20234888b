"""shardkit's own tables at an endpoint of a hop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pymysql
import sqlalchemy as sa

from shardkit import own_tables
from shardkit.credentials import CredentialSource
from shardkit.topology import Endpoint
from shardkit_cdc.connection import connect

if TYPE_CHECKING:
    Connection = pymysql.Connection[Any]


def exists(connection: Connection) -> bool:
    """Whether the database has a position table."""
    with connection.cursor() as cursor:
        cursor.execute("SHOW TABLES LIKE %s", (own_tables.position.name,))
        return cursor.fetchone() is not None


def upgrade(endpoint: Endpoint, credentials: CredentialSource) -> None:
    """Bring shardkit's own tables there up to date.

    :raises PreconditionFailed: when the account may not, or a newer shardkit has been there.
    """
    engine = sa.create_engine(
        "mysql+pymysql://", creator=lambda: connect(endpoint, credentials), poolclass=sa.pool.NullPool
    )
    try:
        own_tables.upgrade(engine)
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, pymysql.MySQLError):
            raise error.orig from error
        raise
    finally:
        engine.dispose()
