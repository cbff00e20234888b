"""Rebalance: who owns which bucket, the oldest map version that is still taken, and a job's cursors.

No rows are written here: each server runs this by itself, and a row written on a master would arrive on its replicas
a second time.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    states = ("owned", "importing", "frozen", "moved")
    state = sa.String(16).with_variant(mysql.ENUM(*states, charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
    keys = sa.Text().with_variant(mysql.MEDIUMTEXT(charset="utf8mb4"), "mysql", "mariadb")
    op.create_table(
        "shardkit_ownership",
        sa.Column("keyspace", _ascii(63), primary_key=True),
        sa.Column("bucket", _ascii(63), primary_key=True, comment="a number, or a name"),
        sa.Column("state", state, nullable=False, comment="owned, importing, frozen or moved"),
        sa.Column("epoch", sa.BigInteger, nullable=False, comment="only grows, whichever shard owns the bucket"),
        sa.Column("moved_to", _ascii(63), comment="the shard to go to"),
        sa.Column("job", _ascii(64), comment="the rebalance job at work on it"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )
    op.create_table(
        "shardkit_map_version",
        sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False, comment="always 1"),
        sa.Column("min_map_version", sa.BigInteger, nullable=False, comment="statements of older maps are not sent"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )
    op.create_table(
        "shardkit_job",
        sa.Column("job", _ascii(64), primary_key=True),
        sa.Column("coordinator", _ascii(32), nullable=False, comment="token of the process at work on it"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )
    op.create_table(
        "shardkit_job_cursor",
        sa.Column("job", _ascii(64), primary_key=True),
        sa.Column("phase", _ascii(16), primary_key=True, comment="copy, clean or undo"),
        sa.Column("table_name", sa.String(64), primary_key=True),
        sa.Column("last_key", keys, comment="primary key done last, as JSON list of SQL literals"),
        sa.Column("row_count", sa.BigInteger, nullable=False),
        sa.Column("finished", sa.SmallInteger, nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
        if_not_exists=True,
    )
    op.create_table(
        "shardkit_journal",
        sa.Column("job", _ascii(64), primary_key=True),
        sa.Column("event", _ascii(16), primary_key=True, comment="frozen, activated, opened, cleaned or cancelled"),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("noted_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    for table in ("journal", "job_cursor", "job", "map_version", "ownership"):
        op.drop_table(f"shardkit_{table}")
