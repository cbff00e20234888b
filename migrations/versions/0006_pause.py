"""Which relay hops into this database are paused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    name = sa.String(190).with_variant(mysql.VARCHAR(190, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
    label = sa.String(190).with_variant(mysql.VARCHAR(190, charset="utf8mb4"), "mysql", "mariadb")
    op.create_table(
        "shardkit_pause",
        sa.Column("hop", name, primary_key=True, comment="hop:<name>"),
        sa.Column("paused_by", label, nullable=False, comment="user and machine"),
        sa.Column("paused_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("shardkit_pause")
