"""The documented accounts are enough for everything that the relay does."""

from __future__ import annotations

import re
from pathlib import Path

from shardkit.credentials import fixed
from shardkit_cdc.heartbeat import Heartbeat
from shardkit_cdc.relay import Hop, State
from tests.relay_chain import Chain, wait_for

pytest_plugins = ["tests.relay_fixtures"]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "relay.md"


def documented(flavour: str, database: str) -> list[str]:
    """The statements that the page gives, for this database and without a password."""
    (block,) = re.findall(rf"```sql {flavour}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    text = block.replace("shop.*", f"{database}.*").replace("'secret'", "''")
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def test_the_documented_privileges_are_enough(chain: Chain) -> None:
    for server in chain.servers:
        for statement in documented(server.flavour, chain.database):
            server.execute(statement)
        server.execute("SET GLOBAL log_bin_trust_function_creators = ON")
    chain.master.execute("CREATE USER app@'%' IDENTIFIED BY ''")
    chain.master.execute(f"GRANT ALL ON {chain.database}.* TO app@'%'")
    account = fixed("relay", "")
    heartbeat = Heartbeat(chain.shard, chain.master.endpoint(chain.database), account)
    try:
        for spec in chain.specs:
            chain.run(Hop(spec, account, cluster="test", runner="pytest", options=chain.options))
        chain.run_task(heartbeat)
        chain.sql(
            "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
            "CREATE TABLE log (id INT)",
            "CREATE DEFINER=app@'%' TRIGGER noted AFTER INSERT ON t FOR EACH ROW INSERT INTO log VALUES (NEW.id)",
            "CREATE DEFINER=app@'%' VIEW v AS SELECT COUNT(*) AS n FROM t",
            "CREATE DEFINER=app@'%' FUNCTION twice (n INT) RETURNS INT DETERMINISTIC RETURN 2 * n",
            "INSERT INTO t VALUES (1, 2)",
            "ALTER TABLE t ADD at TIMESTAMP DEFAULT CURRENT_TIMESTAMP",
        )
        chain.settle()
        wait_for(
            lambda: bool(chain.last.execute("SELECT beat FROM shardkit_heartbeat", database=chain.database)),
            "the heartbeat arrives",
        )
        # A second runner may end the first one's connection.
        chain.run(Hop(chain.specs[1], account, cluster="test", runner="another", options=chain.options))
        first = chain.hops.pop(1)
        chain.sql("INSERT INTO t (id) VALUES (2)")
        chain.settle()
        wait_for(lambda: first.report.state is State.FENCED, "the first runner notices")
        assert "another" in str(first.report.error)
        chain.assert_equal()
    finally:
        chain.stop()
        for server in chain.servers:
            server.execute("DROP USER relay@'%'")
            server.execute("SET GLOBAL log_bin_trust_function_creators = OFF")
        chain.master.execute("DROP USER app@'%'")
