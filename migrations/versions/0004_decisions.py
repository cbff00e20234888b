"""Decisions of transactions over shards."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    op.create_table(
        "shardkit_decision",
        sa.Column("transaction_id", _ascii(64), primary_key=True),
        sa.Column("verdict", _ascii(8), nullable=False, comment="commit, or abort: the janitor's tombstone"),
        sa.Column("decided_at", sa.DateTime, nullable=False, server_default=sa.func.now(), index=True),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("shardkit_decision")
