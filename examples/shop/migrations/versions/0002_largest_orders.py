"""An index for the largest orders."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("orders_by_total", "orders", ["total"])


def downgrade() -> None:
    op.drop_index("orders_by_total", "orders")
