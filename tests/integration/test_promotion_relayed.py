"""Promotion of a relayed shard that is cut short, begun twice, or leaves copies behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shardkit import own_tables
from shardkit.errors import Interrupted, MapConflict, PartlyApplied, PreconditionFailed, ShardkitError
from shardkit.failover import make_plan, promote
from shardkit.failover.servers import Server
from shardkit.failover.standing import position_of
from shardkit.gtid import Flavour
from shardkit.mapstore import open_store
from shardkit.topology import Endpoint, ReplicationKind, Role
from shardkit_cdc.connection import connect
from shardkit_cdc.position import Claim
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD
from tests.promotion_stage import DATABASE, Stage, open_stage, wait_until

pytestmark = [getattr(pytest.mark, FLAVOUR)]

HOP = own_tables.HOP_PREFIX + SHARD
module: Any = __import__("shardkit.failover.promote", fromlist=["_Run"])


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with open_stage(ReplicationKind.RELAY, tmp_path) as made:
        yield made


def test_a_runner_does_not_take_over_what_a_promotion_has_taken(stage: Stage) -> None:
    """It had looked at the row just before."""
    stage.relay.stop()
    target: Endpoint = stage.shard.replicas[0]
    ((source,),) = stage.server_at(target).execute(
        f"SELECT source FROM shardkit_position WHERE hop = '{HOP}'", database=DATABASE
    )
    words: dict[str, Any] = {"database": DATABASE, "key": HOP, "runner": "test", "history": None}
    with closing(connect(target, stage.local.credentials)) as connection:
        for moved_by, error in ((own_tables.PROMOTED_BY, PreconditionFailed), ("somebody", Interrupted)):
            stage.server_at(target).execute(
                f"UPDATE shardkit_position SET source = 'mariadb:77', runner = '{moved_by}' WHERE hop = '{HOP}'",
                database=DATABASE,
            )
            connection.rollback()
            with pytest.raises(error):
                Claim.take(connection, Flavour(FLAVOUR), **words, source=source)
