"""alembic environment of shardkit's own tables.

Run by `shardkit.own_tables.upgrade`, which brings the connection and holds the lock. Logging is left as it is.
"""

from alembic import context

from shardkit.own_tables import VERSION_TABLE, metadata

if context.is_offline_mode():
    raise SystemExit("shardkit's own tables are made through a connection: use `shardkit migrate upgrade --internal`")

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
