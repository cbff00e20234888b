"""Users, their orders, and countries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    countries = op.create_table(
        "countries",
        sa.Column("code", sa.String(2), primary_key=True),
        sa.Column("name", sa.String(50), nullable=False),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(50), nullable=False),
        sa.Column("country_code", sa.String(2), sa.ForeignKey("countries.code"), nullable=False),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("user_id", sa.BigInteger, sa.ForeignKey("users.id"), nullable=False),
        sa.Column("item", sa.String(100), nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
    )
    # every shard runs this, so every shard has the same countries
    op.bulk_insert(countries, [{"code": "jp", "name": "Japan"}, {"code": "kr", "name": "Korea"}])


def downgrade() -> None:
    op.drop_table("orders")
    op.drop_table("users")
    op.drop_table("countries")
