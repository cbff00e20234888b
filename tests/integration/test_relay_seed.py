"""Filling a target from a snapshot: under load, byte for byte, and the hop goes on exactly behind it."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from shardkit.credentials import fixed
from shardkit.errors import PartlyApplied, PreconditionFailed
from shardkit.gtid import Flavour
from shardkit.shardmap import ShardMap
from shardkit.testing.database import LocalDatabaseServer
from shardkit_cdc.relay import State
from shardkit_cdc.seed import Found, Seeded, seed
from shardkit_cdc.verify import verify
from tests.integration.test_relay_replay import COLUMNS, GENERATED, PECULIAR
from tests.relay_chain import Chain, relay_command, wait_for

pytest_plugins = ["tests.relay_fixtures"]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "seed-and-verify.md"


def agreed(_: Found) -> None:
    """Yes, empty it."""


def fill(chain: Chain, index: int = 0, **options: object) -> Seeded:
    return seed(chain.specs[index], chain.master.credentials, **{"confirm": agreed, "patience": 20.0} | options)


@contextmanager
def load(chain: Chain, *, workers: int = 3, xa: bool = True) -> Iterator[None]:
    """Clients that insert, change and delete rows of ``accounts`` and ``moves``, some by XA, until the end."""
    stop = threading.Event()
    errors: list[Exception] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        try:
            connection = chain.master.connect(chain.database, autocommit=True)
            with connection, connection.cursor() as cursor:
                while not stop.is_set():
                    account = number + workers * dice.randrange(200)  # each works on rows of its own
                    branch = xa and dice.random() < 0.1
                    name = f"'{chain.database}-{number}-{dice.random()}'"
                    cursor.execute(f"XA START {name}" if branch else "BEGIN")
                    cursor.execute("INSERT INTO moves (account, amount) VALUES (%s, 1)", (account,))
                    cursor.execute("UPDATE accounts SET balance = balance + 1 WHERE id = %s", (account,))
                    if dice.random() < 0.2:
                        cursor.execute("DELETE FROM accounts WHERE id = %s", (account,))
                        cursor.execute("INSERT INTO accounts VALUES (%s, 0, 'again')", (account,))
                    if branch:
                        cursor.execute(f"XA END {name}")
                        cursor.execute(f"XA PREPARE {name}")
                        cursor.execute(f"XA COMMIT {name}")
                    else:
                        cursor.execute("COMMIT")
                    stop.wait(0.003)  # else a busy machine's relay never catches up with them
        except Exception as error:  # noqa: BLE001 - asserted below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def bank(chain: Chain, rows: int = 20_000) -> None:
    chain.sql(
        "CREATE TABLE accounts (id INT PRIMARY KEY, balance BIGINT, note VARCHAR(40), KEY (note))",
        "CREATE TABLE moves (id BIGINT AUTO_INCREMENT PRIMARY KEY, account INT, amount INT, "
        "FOREIGN KEY (account) REFERENCES accounts (id) ON DELETE CASCADE)",
    )
    for start in range(0, rows, 5000):
        values = ", ".join(f"({number}, {number % 7}, 'account {number}')" for number in range(start, start + 5000))
        chain.sql(f"INSERT INTO accounts VALUES {values}")


def test_a_target_filled_under_load_goes_on_right_after_the_snapshot(pair: Chain) -> None:
    bank(pair)
    with load(pair):
        done = fill(pair)
        assert done.rows >= 20_000
        assert done.held < 1
        pair.run(pair.hop(0))
        wait_for(lambda: pair.hops[0].report.transactions > 200, lambda: f"it follows: {pair.hops[0].report}")
    pair.settle()
    pair.assert_equal()


def test_staging_from_the_master_and_a_replica_from_staging_under_load(chain: Chain) -> None:
    bank(chain)
    with load(chain):
        fill(chain, 0, jobs=2)
        chain.run(chain.hop(0))
        wait_for(lambda: chain.hops[0].report.transactions > 50, "staging follows")
        fill(chain, 1, jobs=2)
        first = chain.reached(chain.last)
        assert str(first)
        chain.run(chain.hop(1))
        wait_for(lambda: chain.hops[1].report.transactions > 50, "the replica follows")
    chain.settle()
    chain.assert_equal()
    assert chain.reached(chain.last).covers(first)


def test_a_staging_database_that_was_filled_may_be_read_from_the_start(chain: Chain) -> None:
    bank(chain, 5000)
    fill(chain, 0)
    chain.start()
    chain.settle()
    chain.assert_equal()


def test_replicas_follow_a_staging_database_that_is_filled_anew(chain: Chain) -> None:
    bank(chain, 5000)
    chain.start()
    chain.settle()
    replica = chain.hops.pop(1)
    with load(chain, xa=False):
        fill(chain, 0, jobs=2)
    chain.stop()
    assert replica.report.error is None
    chain.start()
    chain.settle()
    chain.assert_equal()


def test_every_type_arrives_as_it_was_written(pair: Chain) -> None:
    names = ", ".join(definition.split()[0] for definition, _, _ in COLUMNS)
    insert = f"INSERT INTO types ({names}) VALUES"
    pair.sql(
        "SET sql_mode = 'NO_AUTO_VALUE_ON_ZERO'",
        f"CREATE TABLE types ({', '.join(definition for definition, _, _ in COLUMNS)}, {GENERATED})",
        f"{insert} ({', '.join(extreme for _, extreme, _ in COLUMNS)})",
        f"{insert} (2{', NULL' * (len(COLUMNS) - 1)})",
        f"{insert} ({', '.join(small for _, _, small in COLUMNS)})",
        "CREATE TABLE odd (id INT AUTO_INCREMENT PRIMARY KEY, day DATE NOT NULL DEFAULT '0000-00-00', at DATETIME, "
        "stamp TIMESTAMP NULL, size ENUM('s', 'm'), quoted VARCHAR(99))",
        "INSERT INTO odd VALUES (0, '0000-00-00', '0000-00-00', '0000-00-00', '', 'it''s \\\\ \"%s\" \\0 \\Z'), "
        "(-1, '2026-00-00', NULL, NULL, NULL, '😀')",
        "CREATE TABLE words (k VARCHAR(20) COLLATE utf8mb4_bin, b VARBINARY(20), n DECIMAL(10, 3), "
        "PRIMARY KEY (k, b, n))",
        "INSERT INTO words VALUES ('a', x'00', 1.5), ('A', x'FF', -1.5), ('가', '', 0)",
        "CREATE TABLE reals (id INT PRIMARY KEY, f FLOAT, d DOUBLE)",
        "INSERT INTO reals VALUES (1, 0.1, 0.1), (2, 16777217, 1e-300), (3, 1.17549e-38, 1.7976931348623157e308)",
        "CREATE TABLE loose (a INT, b VARCHAR(10))",
        "INSERT INTO loose VALUES (1, 'x'), (1, 'x'), (2, NULL)",
    )
    fill(pair)
    pair.assert_equal()
    hexes = ", ".join(f"HEX({definition.split()[0]})" for definition, _, _ in COLUMNS)
    query = f"SELECT {hexes}, clock6, stamp6, exact, plus_one, minus_one FROM types ORDER BY id"
    master, copy = [server.execute(query, database=pair.database) for server in pair.servers]
    assert len(master) == 3
    assert copy == master
    pair.run(pair.hop(0))
    pair.sql("UPDATE types SET medium = 7", "DELETE FROM odd WHERE id = 0", "UPDATE reals SET f = 2 WHERE id = 2")
    pair.settle()
    pair.assert_equal()


def test_what_only_one_family_has(pair: Chain) -> None:
    pair.sql(*PECULIAR[pair.flavour])
    if pair.flavour is Flavour.MARIADB:
        pair.sql(
            "CREATE TABLE dated (id INT PRIMARY KEY, n INT, a TIMESTAMP(6) GENERATED ALWAYS AS ROW START, "
            "b TIMESTAMP(6) GENERATED ALWAYS AS ROW END, PERIOD FOR SYSTEM_TIME (a, b)) WITH SYSTEM VERSIONING",
            "INSERT INTO dated (id, n) VALUES (1, 1), (2, 2)",
            "UPDATE dated SET n = 3",
            "DELETE FROM dated WHERE id = 2",
            "CREATE TABLE numbered (id BIGINT DEFAULT NEXTVAL(counter) PRIMARY KEY)",
        )
    fill(pair)
    pair.assert_equal()
    if pair.flavour is Flavour.MARIADB:
        history = "SELECT id, n, a, b FROM dated FOR SYSTEM_TIME ALL ORDER BY a, id"
        master, copy = [server.execute(history, database=pair.database) for server in pair.servers]
        assert len(master) == 4
        assert copy == master
        counts = [server.execute("SELECT * FROM counter", database=pair.database) for server in pair.servers]
        assert counts[0] == counts[1]
    pair.run(pair.hop(0))
    if pair.flavour is Flavour.MARIADB:
        pair.sql("UPDATE dated SET n = 4", "UPDATE versioned SET n = 5", "SELECT NEXTVAL(counter)")
    pair.settle()
    pair.assert_equal()


def test_rows_that_are_older_than_a_check(pair: Chain) -> None:
    if pair.flavour is not Flavour.MARIADB:
        pytest.skip("MySQL has no switch for it")
    pair.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, n INT CHECK (n > 0))",
        "SET check_constraint_checks = 0",
        "INSERT INTO t VALUES (1, 0)",
    )
    fill(pair)
    pair.assert_equal()


def test_views_triggers_routines_and_foreign_keys(pair: Chain) -> None:
    pair.sql(
        "CREATE TABLE zparent (id INT PRIMARY KEY, n INT)",
        "CREATE TABLE child (id INT PRIMARY KEY, parent INT, FOREIGN KEY (parent) REFERENCES zparent (id))",
        "CREATE TABLE log (n INT)",
        "CREATE FUNCTION twice (n INT) RETURNS INT DETERMINISTIC RETURN 2 * n",
        "CREATE PROCEDURE p () SELECT '가'",
        "CREATE VIEW z_base AS SELECT id, twice(n) AS n FROM zparent",
        "CREATE VIEW a_above AS SELECT SUM(n) AS total FROM z_base",
        "CREATE TRIGGER one AFTER INSERT ON zparent FOR EACH ROW INSERT INTO log VALUES (NEW.n)",
        "CREATE TRIGGER a_two AFTER INSERT ON zparent FOR EACH ROW FOLLOWS one INSERT INTO log VALUES (-NEW.n)",
        "INSERT INTO zparent VALUES (1, 1), (2, 2)",
        "INSERT INTO child VALUES (1, 2)",
    )
    fill(pair)
    pair.assert_equal()
    assert pair.last.execute("SELECT total FROM a_above", database=pair.database) == [(6,)]
    assert pair.last.execute("SELECT COUNT(*) FROM log", database=pair.database) == [(4,)]
    pair.run(pair.hop(0))
    pair.sql("INSERT INTO zparent VALUES (3, 3)", "DROP TRIGGER one", "DROP VIEW a_above")
    pair.settle()
    pair.assert_equal()


def test_the_rows_of_shardkits_own_tables_that_belong_to_the_data_are_copied(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.settle()
    pair.stop()
    for table in ("heartbeat", "ownership"):
        pair.master.execute(f"DROP TABLE IF EXISTS shardkit_{table}", database=pair.database)
        made = pair.last.execute(f"SHOW CREATE TABLE shardkit_{table}", database=pair.database)[0][1]
        pair.master.execute(made, database=pair.database)
    pair.sql(
        "INSERT INTO shardkit_heartbeat VALUES ('shop-0', 5, 6)",
        "INSERT INTO shardkit_ownership VALUES ('users', '7', 'owned', 3, NULL, NULL)",
    )
    pair.sql("INSERT INTO shardkit_ownership VALUES ('users', '1', 'owned', 3, NULL, NULL)", server=pair.last)
    fill(pair)
    for table in ("heartbeat", "ownership"):
        master, copy = [
            server.execute(f"SELECT * FROM shardkit_{table}", database=pair.database) for server in pair.servers
        ]
        assert copy == master != []


# --- what stands in the way


def test_a_target_with_foreign_tables_is_refused(pair: Chain) -> None:
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    pair.sql("CREATE TABLE precious (id INT PRIMARY KEY)", server=pair.last)
    with pytest.raises(PreconditionFailed, match="precious") as caught:
        fill(pair)
    assert "DROP DATABASE" in str(caught.value.hint)
    assert pair.last.execute("SHOW TABLES", database=pair.database) == [("precious",)]


def test_a_seed_that_was_cut_short_is_known_and_begun_anew(pair: Chain) -> None:
    bank(pair)

    class Cut:
        def begin(self, table: str, estimate: int) -> None: ...
        def end(self, table: str) -> None: ...
        def advance(self, *_: object) -> None:
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        fill(pair, progress=Cut())
    assert pair.last.execute("SELECT COUNT(*) FROM accounts", database=pair.database)[0][0] > 0
    pair.run(pair.hop(0))
    error = pair.failed()
    assert "being filled" in str(error)
    assert pair.hops[0].report.state is State.BLOCKED  # and tried again, until it is filled
    found: list[Found] = []
    fill(pair, confirm=found.append)
    assert found[0].unfinished
    wait_for(lambda: pair.hops[0].report.state is State.RUNNING, "the hop begins by itself")
    pair.settle()
    pair.assert_equal()


def test_nothing_is_emptied_when_the_answer_is_no(pair: Chain) -> None:
    pair.run(pair.hop(0))
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    pair.settle()

    def no(found: Found) -> None:
        assert found.filled
        assert found.runner == "pytest"
        raise PreconditionFailed("no")

    with pytest.raises(PreconditionFailed, match="no"):
        fill(pair, confirm=no)
    pair.sql("INSERT INTO t VALUES (2)")
    pair.settle()  # the hop still runs
    pair.assert_equal()


def test_a_running_hop_is_fenced_before_its_target_is_emptied(pair: Chain) -> None:
    pair.run(pair.hop(0))
    bank(pair, 5000)
    pair.settle()
    pair.sql("DELETE FROM accounts WHERE id > 4000", server=pair.last)
    with load(pair):
        fill(pair)
    hop = pair.hops[0]
    # It may have come back while the target was being filled: then it waits, and looks again.
    wait_for(lambda: hop.report.state is State.FENCED, lambda: f"the hop is fenced: {hop.report}")
    pair.stop()
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def test_a_prepared_branch_is_waited_for(pair: Chain) -> None:
    bank(pair, 5000)
    connection = pair.master.connect(pair.database, autocommit=True)
    with connection, connection.cursor() as cursor:
        name = f"'{pair.database}'"
        for statement in (f"XA START {name}", "UPDATE accounts SET balance = 77 WHERE id = 5", f"XA END {name}"):
            cursor.execute(statement)
        cursor.execute(f"XA PREPARE {name}")
        with pytest.raises(PreconditionFailed, match="prepared") as caught:
            fill(pair, patience=0.5)
        assert "XA RECOVER" in str(caught.value.hint)
        timer = threading.Timer(1, cursor.execute, (f"XA COMMIT {name}",))
        timer.start()
        fill(pair)
        timer.join()
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()
    assert pair.last.execute("SELECT balance FROM accounts WHERE id = 5", database=pair.database) == [(77,)]


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE accounts ADD extra INT FIRST", "RENAME TABLE accounts TO old, twin TO accounts", "TRUNCATE accounts"],
)
def test_a_table_that_is_changed_while_it_is_copied_stops_the_seed(pair: Chain, change: str) -> None:
    pair.sql("CREATE TABLE accounts (id INT PRIMARY KEY, balance INT, note TEXT)", "CREATE TABLE twin LIKE accounts")
    values = ", ".join(f"({number}, 0, REPEAT('x', 1000))" for number in range(5000))
    pair.sql(f"INSERT INTO accounts VALUES {values}")
    changed = threading.Event()

    class Change:
        def begin(self, table: str, _: int) -> None:
            if table == "accounts":  # behind the snapshot, before its rows
                threading.Event().wait(1.1)  # creation times are whole seconds
                pair.sql(change)
                changed.set()

        def advance(self, table: str, rows: int) -> None: ...
        def end(self, table: str) -> None: ...

    with pytest.raises(PartlyApplied, match=r"accounts|twin") as caught:
        fill(pair, progress=Change())
    assert changed.is_set()
    assert caught.value.exit_code == 5
    fill(pair)
    pair.run(pair.hop(0))
    pair.settle()
    pair.assert_equal()


def test_a_table_without_transactions_is_refused(pair: Chain) -> None:
    pair.sql("CREATE TABLE plain (n INT) ENGINE=MyISAM")
    with pytest.raises(PreconditionFailed, match="MyISAM") as caught:
        fill(pair)
    assert "ENGINE=InnoDB" in str(caught.value.hint)
    assert pair.last.execute("SHOW TABLES", database=pair.database) == []


def test_global_settings_that_are_meant_for_applications_do_not_reach_the_relay(own_pair: Chain) -> None:
    pair = own_pair
    pair.sql("CREATE TABLE t (id INT PRIMARY KEY, n INT)", *(f"INSERT INTO t VALUES ({n}, 0)" for n in range(50)))
    read_only = "tx_read_only" if pair.flavour is Flavour.MARIADB else "transaction_read_only"
    hostile = {"sql_select_limit": 3, "max_join_size": 2, "completion_type": 1}
    places = [(server, name) for server in pair.servers for name in hostile] + [(pair.last, read_only)]
    before = [server.execute(f"SELECT @@global.{name}")[0][0] for server, name in places]
    for server, name in places:
        server.execute(f"SET GLOBAL {name} = {hostile.get(name, 1)}")
    try:
        assert fill(pair).rows == 50
        pair.start()
        pair.sql("UPDATE t SET n = n + 1", "ALTER TABLE t ADD COLUMN m INT DEFAULT 5", "DELETE FROM t WHERE id > 40")
        pair.settle()
        found = verify(pair.specs[0], pair.master.credentials)
        assert (found.rows, found.differences) == (41 + 1, [])  # settle() has written a row
    finally:
        for (server, name), value in zip(places, before, strict=True):
            server.execute(f"SET GLOBAL {name} = %s", value)
    pair.assert_equal()


def test_a_replica_of_a_staging_database_that_nobody_filled(chain: Chain) -> None:
    chain.sql("CREATE TABLE t (id INT PRIMARY KEY)")
    with pytest.raises(PreconditionFailed, match="no relay has filled it yet"):
        fill(chain, 1)
    assert chain.last.execute("SHOW TABLES", database=chain.database) == []


# --- the command line and the documented accounts

shardkit = partial(relay_command, seconds=120)


def test_rows_of_a_table_with_a_column_that_has_a_name_of_the_comparisons_own(pair: Chain) -> None:
    """GROUP BY takes a column before an alias."""
    pair.sql(
        "CREATE TABLE t (id INT PRIMARY KEY, part INT, checksum INT, n INT)",
        "INSERT INTO t VALUES " + ", ".join(f"({number}, 1, 1, {number})" for number in range(300)),
    )
    fill(pair)
    pair.sql("SET sql_log_bin = 0", "UPDATE t SET n = -1 WHERE id % 9 = 0", server=pair.last)
    fill(pair)
    assert pair.last.execute("SELECT COUNT(*) FROM t WHERE n <> id", database=pair.database) == [(0,)]


def map_file(chain: Chain, path: Path) -> str:
    master, staging, *replicas = [server.endpoint(chain.database).url for server in chain.servers]
    document = {
        "format": 1,
        "cluster": "seedtest",
        "version": 1,
        "keyspaces": {"all": {"tables": ["t"], "placement": chain.shard}},
        "shards": {chain.shard: {"master": master, "staging": staging, "replicas": replicas}},
    }
    path.write_text(ShardMap.parse(document).dump())
    return f"file:{path}"


def test_on_the_command_line(chain: Chain, tmp_path: Path) -> None:
    bank(chain, 5000)
    source = map_file(chain, tmp_path / "map.yaml")
    words = ("seed", "--map", source, "--shard", "shop-0")
    done = shardkit(*words, "--staging", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seeded"]["rows"] == 5000
    assert "rows/s" in done.stderr or "copy accounts" in done.stderr
    done = shardkit(*words, "--replica", "1", "--from", "master")
    assert done.returncode == 4
    assert "reads" in done.stderr
    done = shardkit(*words, "--replica", "1")
    assert done.returncode == 0, done.stderr
    assert "filled" in done.stdout
    done = shardkit(*words, chain.last.endpoint(chain.database).url)
    assert done.returncode == 4  # nobody to ask
    assert "rows that are equal are kept" in done.stderr
    assert "--yes" in done.stderr
    done = shardkit(*words, chain.last.endpoint(chain.database).url, "--yes", "--from", "staging")
    assert done.returncode == 0, done.stderr
    done = shardkit(*words, chain.master.endpoint(chain.database).url, "--yes")
    assert done.returncode == 4
    assert "master" in done.stderr
    assert shardkit(*words).returncode == 2
    chain.start()
    chain.settle()
    chain.assert_equal()


def grants(server: LocalDatabaseServer, database: str) -> list[str]:
    """What the two pages give to the relay's account."""
    found: list[str] = []
    for page in (PAGE.with_name("relay.md"), PAGE):
        block = page.read_text().split(f"```sql {server.flavour}\n")[1].split("```")[0]
        text = block.replace("shop.*", f"{database}.*").replace("'secret'", "''")
        found += [statement.strip() for statement in text.split(";") if statement.strip()]
    return found


def test_the_documented_privileges_are_enough(pair: Chain) -> None:
    def as_root(statement: str) -> None:
        for server in pair.servers:
            server.execute(statement)

    for server in pair.servers:
        for statement in grants(server, pair.database):
            server.execute(statement)
    as_root("SET GLOBAL log_bin_trust_function_creators = ON")
    try:
        pair.sql(
            "CREATE TABLE t (id INT PRIMARY KEY, n INT)",
            "CREATE VIEW v AS SELECT * FROM t",
            "CREATE FUNCTION twice (n INT) RETURNS INT DETERMINISTIC RETURN 2 * n",
            "CREATE TRIGGER noted BEFORE INSERT ON t FOR EACH ROW SET NEW.n = 5",
        )
        if pair.flavour is Flavour.MYSQL:
            as_root("GRANT SYSTEM_USER ON *.* TO relay@'%'")  # relay.md: where objects belong to such definers
        seed(pair.specs[0], fixed("relay", ""))
        pair.assert_equal()
    finally:
        as_root("DROP USER relay@'%'")
        as_root("SET GLOBAL log_bin_trust_function_creators = OFF")
