"""A migration on a master arrives on its staging database and replica; shardkit's notes of it stay where they are."""

from __future__ import annotations

from pathlib import Path

from shardkit.shardmap import ShardMap
from tests.integration.migration_tree import MigrationTree
from tests.relay_chain import Chain

pytest_plugins = ["tests.relay_fixtures"]


def one_shard(chain: Chain) -> ShardMap:
    return ShardMap.parse(
        {
            "format": 1,
            "cluster": "shop",
            "keyspaces": {"people": {"tables": ["users", "notes"], "placement": chain.shard}},
            "shards": {chain.shard: {"master": chain.master.endpoint(chain.database).url}},
        }
    )


def test_a_migration_travels_to_staging_and_replica_and_its_notes_do_not(chain: Chain, tmp_path: Path) -> None:
    tree = MigrationTree(tmp_path)
    tree.revision(
        "r1",
        None,
        """
        op.create_table("users", sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))
        op.execute("INSERT INTO users VALUES (1, 'ann'), (2, 'bob')")
        op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True))
        op.execute("UPDATE users SET name = 'eve' WHERE id = 2")
        """,
    )
    tree.revision("r2", "r1", 'op.add_column("users", sa.Column("age", sa.Integer))\nraise RuntimeError("stop here")')
    chain.start()
    fleet = tree.fleet(one_shard(chain), credentials=chain.master.credentials)

    assert "stop here" in str(fleet.upgrade().failure())
    chain.settle()

    for server in chain.servers:
        rows = server.execute("SELECT id, name, age FROM users ORDER BY id", database=chain.database)
        assert rows == [(1, "ann", None), (2, "eve", None)]
    notes = [
        server.execute("SELECT COUNT(*) FROM shardkit_migration_steps", database=chain.database)[0][0]
        for server in chain.servers
    ]
    assert notes == [2, 0, 0]
