"""What has to hold before buckets may move, looked up on the servers. All faults found are told at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.normalization import ALPHABET_IN_WORDS
from shardkit.partition import DirectoryPartition
from shardkit.rebalance.fence import Owned, describe, read_ownership, triggers_on
from shardkit.rebalance.plan import Transfer
from shardkit.rebalance.servers import Row, Server, in_list
from shardkit.rebalance.tables import Table, key_kind, moving_tables, quoted, read_table
from shardkit.rebalance.verify import digest
from shardkit.shardmap import Keyspace, ShardMap
from shardkit.topology import ReplicationKind, Role, Shard

_ON_MASTERS = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "INDEX", "TRIGGER"})
#: To see and to close the connections of clients that work by an older map, and to see prepared transactions.
_EVERYWHERE = {
    "mariadb": frozenset({"PROCESS", "CONNECTION ADMIN"}),
    "mysql": frozenset({"PROCESS", "CONNECTION_ADMIN"}),
}
_ON_MYSQL_MASTERS = frozenset({"XA_RECOVER_ADMIN"})
_FLOATING = frozenset({"float", "double"})


def check(
    shard_map: ShardMap, transfer: Transfer, credentials: CredentialSource, *, job: str | None = None
) -> list[str]:
    """Look at both shards of a transfer.

    :param job: the job that has begun it already.
    :returns: what is worth knowing before it starts.
    :raises PreconditionFailed: with every reason not to start.
    """
    keyspace = shard_map.keyspace(transfer.keyspace)
    source, target = shard_map.shard(transfer.source), shard_map.shard(transfer.target)
    _refuse(transfer, list(_before_connecting(keyspace, source, target)))
    with ExitStack() as stack:
        here, there = (
            stack.enter_context(closing(Server(shard.name, Role.MASTER, shard.master, credentials)))
            for shard in (source, target)
        )
        tables = moving_tables(here, keyspace)
        faults = [
            *_servers(here, there),
            *(fault for table in tables for fault in _keys(here, keyspace, table)),
            *_tables(here, tables),
            *_tables(there, tables),
            *_definitions(here, there, tables),
            *reference_faults(here, there, keyspace),
            *_ownership(here, there, transfer, job),
        ]
        for shard in (source, target):
            faults += _followers(shard, credentials)
        _refuse(transfer, faults)
        return list(_notes(tables, keyspace, target))


def _refuse(transfer: Transfer, faults: Sequence[str]) -> None:
    if faults:
        count = len(faults)
        raise PreconditionFailed(
            f"{transfer.keyspace} cannot move from {transfer.source} to {transfer.target}: "
            + (faults[0] if count == 1 else f"{count} reasons:\n  " + "\n  ".join(faults)),
            hint="mend this first; nothing was changed",
        )


def _before_connecting(keyspace: Keyspace, source: Shard, target: Shard) -> Iterator[str]:
    if isinstance(keyspace.partition, DirectoryPartition):
        yield "the keyspace is partitioned by a directory, which cannot be moved yet"
    for shard in (source, target):
        if shard.master.dialect != "mysql":
            yield f"shard {shard.name} is a SQLite file; moves are between MariaDB or MySQL servers only"


def _servers(source: Server, target: Server) -> Iterator[str]:
    if source.flavour != target.flavour:
        yield (
            f"{source.shard} is {source.flavour} and {target.shard} is {target.flavour}: rows are copied as one server "
            "writes them, for a server of the same kind"
        )
    for server in (source, target):
        log_bin, binlog_format, read_only = server.row("SELECT @@log_bin, @@binlog_format, @@read_only")
        if str(read_only) not in {"0", "OFF"}:
            yield f"{server} is read-only: a master has to take writes"
        if str(log_bin) not in {"0", "OFF"} and binlog_format != "ROW":
            yield f"{server} logs in {binlog_format} format: set binlog_format = ROW"
        wanted = _ON_MASTERS | _EVERYWHERE[server.flavour]
        yield from _privileges(server, wanted | _ON_MYSQL_MASTERS if server.flavour == "mysql" else wanted)


def _privileges(server: Server, wanted: frozenset[str]) -> Iterator[str]:
    """Privileges that neither a global nor a schema grant gives. Nothing where they may come through a role."""
    user = (
        "CONCAT('''', SUBSTRING_INDEX(CURRENT_USER(), '@', 1), '''@''', SUBSTRING_INDEX(CURRENT_USER(), '@', -1), '''')"
    )
    held = {
        str(privilege).upper()
        for (privilege,) in server.rows(
            f"SELECT privilege_type FROM information_schema.user_privileges WHERE grantee = {user} UNION "
            f"SELECT privilege_type FROM information_schema.schema_privileges WHERE grantee = {user}"
            " AND DATABASE() LIKE table_schema"
        )
    }
    if server.row("SELECT CURRENT_ROLE()")[0] not in {None, "", "NONE"} or "SUPER" in held:
        return
    lacking = sorted(wanted - held)
    if lacking:
        yield f"{server}: the account lacks {', '.join(lacking)}: grant it, on {server.database}.* or on *.*"


def _tables(server: Server, tables: Sequence[Table]) -> Iterator[str]:
    names = [table.name for table in tables]
    there = {
        str(name): (str(engine), str(kind))
        for name, engine, kind in server.rows(
            "SELECT table_name, engine, table_type FROM information_schema.tables"
            f" WHERE table_schema = DATABASE() AND table_name IN {in_list(names)}",
            *names,
        )
    }
    for table in tables:
        if table.name not in there:
            continue  # on the target: it is going to be made
        engine, kind = there[table.name]
        if kind != "BASE TABLE":
            yield f"{server}: {table.name} is a {kind.lower()}: only plain tables move"
        elif engine != "InnoDB":
            yield f"{server}: {table.name} is kept by {engine}: only InnoDB has the row locks that the fence needs"
    foreign = [trigger for trigger in triggers_on(server, names) if not trigger.ours]
    for name in dict.fromkeys(trigger.table for trigger in foreign):
        own = ", ".join(trigger.name for trigger in foreign if trigger.table == name)
        yield f"{server}: {name} has triggers of its own ({own}), which a copy would fire"
    yield from _foreign_keys(server, names)


def _keys(server: Server, keyspace: Keyspace, table: Table) -> Iterator[str]:
    if not table.primary:
        yield f"{server}: {table.name} has no primary key"
    for name in table.primary:
        if table.column(name).data_type in _FLOATING:
            yield f"{server}: the primary key of {table.name} is a {table.column(name).data_type}, which is not exact"
    for name in table.key:
        try:
            key_kind(table, table.column(name))
        except PreconditionFailed as error:
            yield f"{server}: {error.message}"
    if keyspace.partition is None:
        return
    yield from outside_alphabet_faults(server, keyspace, table)
    key = {name.lower() for name in table.key}
    for index in (table.primary, *(index.columns for index in table.unique)):
        counted = [name for name in index if table.column(name).auto_increment]
        if counted and not key & {name.lower() for name in index} and not keyspace.generated_ids:
            yield (
                f"{server}: {table.name}.{counted[0]} is AUTO_INCREMENT, so unique only on each shard: two shards give "
                "the same number; take ids that are unique everywhere ('ids: generated')"
            )


def outside_alphabet_faults(server: Server, keyspace: Keyspace, table: Table) -> Iterator[str]:
    """Rows whose keys the normalization does not know: they do not move, and those that the collation takes for their
    equals might."""
    if keyspace.normalize is None:
        return
    try:
        condition = table.outside(keyspace.partition)
    except PreconditionFailed:
        return  # of a type that cannot be a key, which has been said
    if condition is None:
        return
    (count,) = server.row(f"SELECT COUNT(*) FROM {quoted(table.name)} WHERE {condition}")
    if count:
        yield (
            f"{server}: {count} rows of {table.name} have keys with characters that 'normalize: {keyspace.normalize}' "
            f"does not know (it knows {ALPHABET_IN_WORDS}): they are in no bucket; change these keys"
        )


def _foreign_keys(server: Server, names: Sequence[str]) -> Iterator[str]:
    for constraint, table, parent in server.rows(
        "SELECT constraint_name, table_name, referenced_table_name FROM information_schema.referential_constraints"
        " WHERE constraint_schema = DATABASE()"
    ):
        if (table in names) != (parent in names):
            yield (
                f"{server}: foreign key {constraint} ties {table} to {parent}, and only one of them moves: drop it, or "
                "put both into one keyspace"
            )


def _definitions(source: Server, target: Server, tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        ours, theirs = definition(source, table.name), definition(target, table.name)
        if theirs is None:
            continue
        differing = sorted(set(_lines(ours or "")) ^ set(_lines(theirs)))
        if differing:
            yield (
                f"table {table.name} differs between {source.shard} and {target.shard}: "
                f"{'; '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}"
            )


def definition(server: Server, table: str) -> str | None:
    """The table's CREATE TABLE without its AUTO_INCREMENT counter; None where there is no such table."""
    if not server.rows(
        "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s", table
    ):
        return None
    text = str(server.row(f"SHOW CREATE TABLE {quoted(table)}")[1])
    head, bracket, tail = text.rpartition(")")
    words = (word for word in tail.split(" ") if not word.startswith("AUTO_INCREMENT="))
    return head + bracket + " ".join(words)


def _lines(definition_text: str) -> list[str]:
    return [line.strip().rstrip(",") for line in definition_text.splitlines()]


def reference_faults(source: Server, target: Server, keyspace: Keyspace) -> Iterator[str]:
    """Reference tables that are not the same on both shards."""
    for name in keyspace.reference:
        if definition(target, name) is None:
            yield f"reference table {name} is missing on {target.shard}: load it there first"
            continue
        table = read_table(source, name)
        if [column.name for column in table.columns] != [column.name for column in read_table(target, name).columns]:
            yield f"reference table {name} has other columns on {target.shard}"
        elif digest(source, table, "TRUE", by_key=False) != digest(target, table, "TRUE", by_key=False):
            yield f"reference table {name} differs between {source.shard} and {target.shard}: make them equal first"


def _ownership(source: Server, target: Server, transfer: Transfer, job: str | None) -> Iterator[str]:
    for server, wanted in ((source, {Owned.OWNED}), (target, {Owned.MOVED})):
        if not has_table(server, "shardkit_ownership"):
            continue
        rows = read_ownership(server, transfer.keyspace, transfer.buckets)
        wrong = [
            bucket
            for bucket in transfer.buckets
            if (row := rows.get(str(bucket))) is not None
            and row.state not in wanted
            and (job is None or row.job != job)
        ]
        if wrong:
            row = rows[str(wrong[0])]
            yield (
                f"{server}: the fence says that bucket {describe(wrong)} is {row.state}"
                f"{f' (job {row.job})' if row.job else ''}, the map says otherwise"
            )


def has_table(server: Server, table: str) -> bool:
    """Whether the server's database has this table."""
    found: list[Row] = server.rows(
        "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s", table
    )
    return bool(found)


def _followers(shard: Shard, credentials: CredentialSource) -> Iterator[str]:
    """Replicas and staging: reachable, and not firing triggers for rows that are replicated."""
    for role, endpoint in shard.endpoints():
        if role is Role.MASTER:
            continue
        with closing(Server(shard.name, role, endpoint, credentials)) as server:
            if role is Role.REPLICA:
                yield from _privileges(server, _EVERYWHERE[server.flavour])
            if server.flavour == "mariadb":
                setting = str(server.row("SELECT @@global.slave_run_triggers_for_rbr")[0])
                if setting not in {"NO", "0"}:
                    yield f"{server}: slave_run_triggers_for_rbr is {setting}: set it to NO: rows fire triggers there"


def _notes(tables: Sequence[Table], keyspace: Keyspace, target: Shard) -> Iterator[str]:
    for table in tables:
        for index in table.unique:
            if keyspace.partition is not None and not set(table.key) & set(index.columns):
                yield (
                    f"{table.name}: {', '.join(index.columns)} is unique on each shard only: a row with the same value "
                    f"on {target.name} stops the job"
                )
    if target.name not in keyspace.shards and keyspace.reference:
        yield (
            f"{target.name} is new to {keyspace.name}: changes to {', '.join(keyspace.reference)} reach it only after "
            "the move; make none until then"
        )
    if target.replication is ReplicationKind.NATIVE:
        yield f"{target.name}: native replication carries the copied rows; watch its lag"
