"""Which bucket each key of a keyspace by directory is in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    op.create_table(
        "shardkit_directory",
        sa.Column("keyspace", _ascii(63), primary_key=True),
        sa.Column("key_text", sa.VARBINARY(512), primary_key=True, comment="canonical text of the key, UTF-8"),
        sa.Column("bucket", _ascii(63), nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("shardkit_directory")
