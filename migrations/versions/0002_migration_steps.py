"""Notes of an application's migrations, so that a revision that stopped in the middle can be taken up again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    words = sa.Text().with_variant(mysql.TEXT(charset="utf8mb4"), "mysql", "mariadb")
    op.create_table(
        "shardkit_migration_steps",
        sa.Column("version_table", _ascii(64), primary_key=True, comment="the application's tree"),
        sa.Column("ordinal", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("revision", _ascii(64), nullable=False),
        sa.Column("direction", _ascii(8), nullable=False, comment="up or down"),
        sa.Column("state", _ascii(8), nullable=False, comment="started, done or failed"),
        sa.Column("statement_digest", _ascii(32)),
        sa.Column("values_digest", _ascii(32)),
        sa.Column("statement", words, comment="its first characters"),
        sa.Column("row_count", sa.BigInteger),
        sa.Column("last_row_id", sa.BigInteger),
        sa.Column("error", words),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("shardkit_migration_steps")
