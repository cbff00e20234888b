"""The relay's tables: positions, heartbeat, prepared XA branches.

Columns are written out here, not taken from the models: a revision describes one moment and never changes.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _ascii(length: int) -> sa.String:
    return sa.String(length).with_variant(
        mysql.VARCHAR(length, charset="ascii", collation="ascii_bin"), "mysql", "mariadb"
    )


def upgrade() -> None:
    gtids = sa.Text().with_variant(mysql.MEDIUMTEXT(charset="ascii", collation="ascii_bin"), "mysql", "mariadb")
    words = sa.Text().with_variant(mysql.TEXT(charset="utf8mb4"), "mysql", "mariadb")
    label = sa.String(190).with_variant(mysql.VARCHAR(190, charset="utf8mb4"), "mysql", "mariadb")
    op.create_table(
        "shardkit_position",
        sa.Column("hop", _ascii(190), primary_key=True, comment="hop:<name> or history:<shard>"),
        sa.Column("epoch", sa.BigInteger, nullable=False, comment="raised by each runner that takes over"),
        sa.Column("counter", sa.BigInteger, nullable=False, comment="target transactions so far"),
        sa.Column("gtid", gtids, nullable=False, comment="position in the source's log"),
        sa.Column("source", _ascii(64), nullable=False, comment="whose log: the source's identity"),
        sa.Column("runner", label, nullable=False),
        sa.Column("connection_id", sa.BigInteger, nullable=False, comment="of the runner, on this server"),
        sa.Column("ddl_gtid", _ascii(128), nullable=False, comment="schema change begun and not yet noted as done"),
        sa.Column("ddl_origin", _ascii(64), nullable=False, comment="GTID domain or UUID of this hop's schema changes"),
        sa.Column("ddl_number", sa.BigInteger, nullable=False, comment="number of the last one begun"),
        sa.Column("error", words, nullable=False, comment="why the hop stopped; empty while all is well"),
        sa.Column("updated_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )
    op.create_table(
        "shardkit_heartbeat",
        sa.Column("shard", _ascii(190), primary_key=True),
        sa.Column("beat", sa.BigInteger, nullable=False, comment="counts up"),
        sa.Column("written_at", sa.BigInteger, nullable=False, comment="microseconds since the epoch, UTC"),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )
    op.create_table(
        "shardkit_prepared",
        sa.Column("hop", _ascii(190), primary_key=True),
        sa.Column("xid", _ascii(300), primary_key=True),
        sa.Column("part", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("gtid", _ascii(128), nullable=False),
        sa.Column("events", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb"), nullable=False),
        mysql_engine="InnoDB",
        mariadb_engine="InnoDB",
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("shardkit_prepared")
    op.drop_table("shardkit_heartbeat")
    op.drop_table("shardkit_position")
