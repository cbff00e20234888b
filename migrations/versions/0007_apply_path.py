"""How the rows of each relay hop reach this database."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    name = sa.String(190).with_variant(mysql.VARCHAR(190, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
    word = sa.String(8).with_variant(mysql.VARCHAR(8, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
    text = sa.Text().with_variant(mysql.TEXT(charset="utf8mb4"), "mysql", "mariadb")
    op.create_table(
        "shardkit_apply_path",
        sa.Column("hop", name, primary_key=True, comment="hop:<name>"),
        sa.Column("path", word, nullable=False, comment="raw or sql"),
        sa.Column("reason", text, nullable=False, comment="why it is not raw"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("shardkit_apply_path")
