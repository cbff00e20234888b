"""Alembic's environment: which shards, connections and locks is shardkit's business."""

from models import Base

from shardkit.migrate import run_migrations

run_migrations(target_metadata=Base.metadata)
