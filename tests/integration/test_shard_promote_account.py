"""A promotion with the privileges that its documentation lists, and without one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from shardkit.credentials import Credentials
from shardkit.testing.database import LocalDatabaseServer
from shardkit.topology import ReplicationKind
from tests.conftest import FLAVOUR
from tests.faults.lists import SHARD
from tests.promotion_stage import APP, DATABASE, SECRET, Stage, open_stage, refused, wait_until

pytestmark = [getattr(pytest.mark, FLAVOUR)]

OPS = "ops"
#: docs/how-to/promote.md, "The account".
GRANTS = {
    "mariadb": ("READ_ONLY ADMIN", "PROCESS", "CONNECTION ADMIN", "CREATE USER", "BINLOG ADMIN"),
    "mysql": ("SYSTEM_VARIABLES_ADMIN", "CONNECTION_ADMIN", "PROCESS", "XA_RECOVER_ADMIN", "CREATE USER"),
}[FLAVOUR]
FOR_NATIVE = {
    "mariadb": ("REPLICATION SLAVE ADMIN", "SLAVE MONITOR", "RELOAD"),
    "mysql": ("REPLICATION_SLAVE_ADMIN", "REPLICATION CLIENT", "RELOAD"),
}[FLAVOUR]

FOR_RELAY = {"mariadb": ("BINLOG REPLAY",), "mysql": ()}[FLAVOUR]

#: The relay of these tests is root's.
_TO_END_ROOTS_CONNECTIONS = ("SYSTEM_USER",) if FLAVOUR == "mysql" else ()


@pytest.fixture(scope="module", params=[ReplicationKind.RELAY, ReplicationKind.NATIVE])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with open_stage(request.param, tmp_path_factory.mktemp("account")) as made:
        native = made.kind is ReplicationKind.NATIVE
        grants = ", ".join(GRANTS + (FOR_NATIVE if native else FOR_RELAY + _TO_END_ROOTS_CONNECTIONS))
        endpoints = [made.shard.master] if native else [each for _, each in made.shard.endpoints()]
        for endpoint in endpoints:  # with native replication the master's accounts are the replicas', too
            server = made.server_at(endpoint)
            server.create_user(OPS, OPS, grants=f"{grants} ON *.*")
            server.execute(f"GRANT ALL PRIVILEGES ON {DATABASE}.* TO '{OPS}'")
            server.execute(f"GRANT SELECT ON mysql.* TO '{OPS}'")
        for number in range(2):
            wait_until(lambda number=number: bool(made.replica(number).execute(f"SHOW GRANTS FOR '{OPS}'")))
        made.account = Credentials(OPS, OPS)
        yield made


@pytest.mark.parametrize("privilege", [*GRANTS, *FOR_NATIVE, *FOR_RELAY])
def test_without_one_of_them_nothing_is_begun(stage: Stage, privilege: str) -> None:
    if privilege in FOR_NATIVE and stage.kind is ReplicationKind.RELAY:
        pytest.skip("of native replication only")
    if privilege in FOR_RELAY and stage.kind is ReplicationKind.NATIVE:
        pytest.skip("of the relay only")
    places = stage.shard.replicas if privilege in FOR_NATIVE + FOR_RELAY else (stage.shard.master,)
    before = stage.source.read_text()
    for endpoint in places:
        on_this_server(stage.server_at(endpoint), f"REVOKE {privilege} ON *.* FROM '{OPS}'")
    try:
        code, document, _ = stage.run("promote", SHARD, "--yes", "--app-user", APP)
    finally:
        for endpoint in places:
            on_this_server(stage.server_at(endpoint), f"GRANT {privilege} ON *.* TO '{OPS}'")
    assert code == 4, document
    assert privilege in document["error"]["message"]
    assert stage.source.read_text() == before
    assert stage.master.execute("SELECT @@global.read_only") == [(0,)]
    stage.master.connect(DATABASE, user=APP, password=SECRET).close()  # its account is not locked


def on_this_server(server: LocalDatabaseServer, statement: str) -> None:
    """And on none of those that follow it."""
    with closing(server.connect(autocommit=True)) as connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_log_bin = 0")
        cursor.execute(statement)


def test_with_them_it_comes_about(stage: Stage) -> None:
    old = stage.shard.master
    document = stage.promoted("--app-user", APP)
    assert stage.shard.master.url == document["new"] != old.url
    assert refused(stage.server_at(old))
    assert not refused(stage.server_at(stage.shard.master))
    assert len(stage.shard.replicas) == 1
