"""Alembic over every shard.

An application's ``env.py`` calls `run_migrations`; ``shardkit migrate`` is a command line for `Fleet`.
"""

from shardkit.migrate.environment import run_migrations
from shardkit.migrate.fleet import Fleet
from shardkit.migrate.report import CheckReport, Ending, MigrationReport, ShardCheck, ShardResult, Standing, State
from shardkit.migrate.tree import Tree

__all__ = [
    "CheckReport",
    "Ending",
    "Fleet",
    "MigrationReport",
    "ShardCheck",
    "ShardResult",
    "Standing",
    "State",
    "Tree",
    "run_migrations",
]
