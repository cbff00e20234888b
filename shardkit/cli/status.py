"""``shardkit status``: the cluster at a glance."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option
from shardkit.cli.output import Column, Output
from shardkit.topology import DEFAULT_WEIGHT, Endpoint, Role

if TYPE_CHECKING:
    from shardkit.credentials import CredentialSource
    from shardkit.engines import Engines
    from shardkit.mapstore import ClientState, MapStore
    from shardkit.shardmap import ShardMap
    from shardkit_cdc.livestate import LiveState
    from shardkit_cdc.status import HopStatus

_AT_ONCE = 16
_SERVER_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 5, "write_timeout": 5}  # seconds


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One database, as it answered.

    :param seconds: to connect and to ask.
    :param lag_seconds: how far its data are behind the master's; None for masters, and where nobody relays.
    :param relay: the state of the hop that fills it; None where there is none.
    :param selects: the SELECTs that its server has run since it was started, whoever sent them.
    :param reads_per_second: of them, since the look before; None at the first.
    :param share_of_reads: of the reads of its shard's master and replicas, from 0 to 1.
    :param weight: of a replica, in the shard map; None for the other roles.
    :param live: how the relay's host sees it; None where no relay tells.
    """

    shard: str
    role: str
    endpoint: str
    reachable: bool
    version: str | None = None
    writable: bool | None = None
    seconds: float | None = None
    relay: str | None = None
    lag_seconds: float | None = None
    behind: int | None = None
    position: str | None = None
    error: str | None = None
    selects: int | None = None
    reads_per_second: float | None = None
    share_of_reads: float | None = None
    weight: int | None = None
    live: LiveState | None = None


@click.command()
@click.option(
    "--watch",
    type=click.FloatRange(min=0.2),
    is_flag=False,
    flag_value=2.0,
    metavar="[SECONDS]",
    help="Look again every so many seconds (2), with the reads since the last look. Ends with Ctrl-C.",
)
@map_option
@output_option
def status(watch: float | None, map_source: str, out: Output) -> int:
    """Every shard's databases: role, reachable or not, lag; and the map that processes run on.

    Exit code 1 when a database does not answer or a relay hop has failed.
    """
    if watch is None:
        return _look_and_show(map_source, out)
    if out.as_json:
        raise click.UsageError("--json prints one document: leave --watch away, and run it again and again")
    before: Look | None = None
    while True:
        with map_store(map_source) as store:
            databases = look(store.load(), _credentials(store.load()))
        now = Look(time.monotonic(), databases)
        click.clear()  # nothing where this is no terminal
        _show(map_source, out, databases if before is None else with_reads(before, now))
        before = now
        time.sleep(watch)


def _credentials(shard_map: ShardMap) -> CredentialSource:
    from shardkit.credentials import from_environment

    credentials = from_environment()
    for shard in shard_map.shards.values():
        credentials(shard.master)  # without a user there is nothing to ask for, and one error says so
    return credentials


def _look_and_show(map_source: str, out: Output) -> int:
    with map_store(map_source) as store:
        shard_map = store.load()
    return _show(map_source, out, look(shard_map, _credentials(shard_map)))


def _show(map_source: str, out: Output, databases: Sequence[EndpointStatus]) -> int:
    with map_store(map_source) as store:
        shard_map = store.load()
        source = store.source
        clients = store.clients()
        databases = _with_live_states(store, databases)
    out.result(
        {
            "source": source,
            "cluster": shard_map.cluster,
            "map_version": shard_map.version,
            "clients": clients,
            "moves": shard_map.moves,
            "databases": databases,
        }
    )
    out.line(f"cluster {shard_map.cluster}, map version {shard_map.version} ({source})", style="bold")
    out.line(_clients_line(clients, shard_map.version))
    for client in clients:
        if client.version < shard_map.version:
            out.line(f"  {client.host}, process {client.pid}: map version {client.version}")
    servers = Counter(server_name(database.version) for database in databases if database.version is not None)
    if len(servers) == 1:
        out.line(f"servers: {next(iter(servers))}")
    heads: list[str | Column] = [
        "shard",
        "role",
        Column("address", whole=True),
        "state",
        Column("lag s", right=True),
        Column("behind", right=True),
    ]
    reads = any(database.reads_per_second is not None for database in databases)
    weights = any(database.weight not in {None, DEFAULT_WEIGHT} for database in databases)
    heads += [Column("weight", right=True)] if weights else []
    heads += [Column("reads/s", right=True), Column("share", right=True)] if reads else []
    out.table(
        heads if len(servers) <= 1 else [*heads, "server"],
        [_row(database, weights=weights, reads=reads, server=len(servers) > 1) for database in databases],
    )
    for move in shard_map.moves:
        out.line(f"job {move.job} moves {len(move.buckets)} buckets of {move.keyspace}: {move.source} -> {move.target}")
    if note := relay_note(database.relay for database in databases):
        out.note(note)
    for database in databases:
        if database.error:
            out.warning(database.error)
    unwell = {"failed", "needs reseed", "no source"}
    return 0 if all(database.reachable and database.relay not in unwell for database in databases) else 1


def _with_live_states(store: MapStore, databases: Sequence[EndpointStatus]) -> list[EndpointStatus]:
    from shardkit.mapstore import ZooKeeperMapStore
    from shardkit_cdc.livestate import live_states

    live = live_states(store) if isinstance(store, ZooKeeperMapStore) else {}
    return [replace(database, live=live.get(database.endpoint)) for database in databases]


def _clients_line(clients: Sequence[ClientState], current: int) -> str:
    if not clients:
        return "no application has announced itself"
    versions = Counter(client.version for client in clients)
    behind = sum(number for version, number in versions.items() if version < current)
    line = f"{len(clients)} running {'process' if len(clients) == 1 else 'processes'}"
    return f"{line}, {behind} on an older map" if behind else f"{line}, all on this map"


def _row(database: EndpointStatus, *, weights: bool, reads: bool, server: bool) -> tuple[object, ...]:
    relay = None if database.relay is None else relay_state(database.relay)
    live, lag = database.live, database.lag_seconds
    if database.reachable:
        state = "up" if relay is None else f"up, {relay}"
    elif live is not None and live.reachable:
        state, lag = "unreachable from here, up for the relay", live.lag_seconds
    else:
        state = "unreachable"
    row: tuple[object, ...] = (
        database.shard,
        database.role,
        Endpoint.parse(database.endpoint).address,
        state,
        None if lag is None else f"{lag:.2f}",
        database.behind,
    )
    if weights:
        row = (*row, database.weight)
    if reads:
        rate, share = database.reads_per_second, database.share_of_reads
        row = (*row, None if rate is None else f"{rate:,.0f}", None if share is None else f"{share:.0%}")
    return (*row, database.version and server_name(database.version)) if server else row


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one look.

    :param at: on this process's monotonic clock.
    """

    at: float
    databases: Sequence[EndpointStatus]


def with_reads(before: Look, now: Look) -> list[EndpointStatus]:
    """The later look, with the reads since the earlier one. A server that was started anew has none to tell."""
    counted = {database.endpoint: database.selects for database in before.databases}
    reads: dict[str, int] = {}
    for database in now.databases:
        earlier = counted.get(database.endpoint)
        if database.selects is not None and earlier is not None and database.selects >= earlier:
            reads[database.endpoint] = database.selects - earlier
    serving = [database for database in now.databases if database.role != Role.STAGING]
    total = Counter[str]()
    for database in serving:
        total[database.shard] += reads.get(database.endpoint, 0)
    seconds = max(0.001, now.at - before.at)
    return [
        database
        if database.endpoint not in reads
        else replace(
            database,
            reads_per_second=round(reads[database.endpoint] / seconds, 1),
            share_of_reads=reads[database.endpoint] / total[database.shard]
            if database in serving and total[database.shard]
            else None,
        )
        for database in now.databases
    ]


def server_name(version: str) -> str:
    """``MariaDB 10.11.19`` of ``10.11.19-MariaDB-ubu2204-log``; ``MySQL 8.4.6`` of ``8.4.6-0ubuntu1``."""
    if version.startswith("SQLite"):
        return version
    return f"{'MariaDB' if 'mariadb' in version.lower() else 'MySQL'} {version.partition('-')[0]}"


def relay_state(state: str) -> str:
    """A hop's state in words."""
    return "relay not started" if state == "new" else f"relay {state}"


def relay_note(states: Iterable[str | None]) -> str | None:
    """How to start the relays that do not run; None where all do."""
    found = Counter(states)
    idle = [
        f"{found[state]} {word}" for state, word in (("new", "not started"), ("stopped", "stopped")) if found[state]
    ]
    return f"relays: {', '.join(idle)}; 'shardkit relay run' fills these databases" if idle else None


def look(shard_map: ShardMap, credentials: CredentialSource) -> list[EndpointStatus]:
    """Ask every endpoint of the map, all at once; one that does not answer costs a few seconds."""
    from shardkit.engines import Engines, EngineSettings

    places = [
        _Place(shard.name, role, number, endpoint, shard.weight(endpoint) if role is Role.REPLICA else None)
        for shard in shard_map.shards.values()
        for role in Role
        for number, endpoint in enumerate(shard.with_role(role))
    ]
    hops = _hops(shard_map, credentials)
    engines = {
        "mysql": Engines(EngineSettings(credentials, options={"connect_args": _SERVER_TIMEOUTS})),
        "sqlite": Engines(EngineSettings(credentials)),
    }
    try:
        with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(places))) as pool:
            return list(
                pool.map(lambda place: _ask(place, engines[place.endpoint.dialect], hops.get(place.endpoint)), places)
            )
    finally:
        for some in engines.values():
            some.dispose()


@dataclass(frozen=True, slots=True)
class _Place:
    shard: str
    role: Role
    number: int
    endpoint: Endpoint
    weight: int | None


def _hops(shard_map: ShardMap, credentials: CredentialSource) -> Mapping[Endpoint, HopStatus]:
    """The relay hops by the endpoint that they fill."""
    from shardkit_cdc.daemon import hops_of
    from shardkit_cdc.status import hop_status

    shards = [shard for shard in shard_map.shards.values() if shard.master.dialect != "sqlite"]
    targets = [spec.target for shard in shards for spec in hops_of(shard)]
    return dict(zip(targets, hop_status(shards, credentials), strict=True))


def _ask(place: _Place, engines: Engines, hop: HopStatus | None) -> EndpointStatus:
    from sqlalchemy.exc import SQLAlchemyError

    from shardkit.errors import ShardkitError

    shown = EndpointStatus(place.shard, str(place.role), str(place.endpoint), reachable=False, weight=place.weight)
    began = time.monotonic()
    try:
        version, writable, selects = _answer(place, engines)
    except (ShardkitError, SQLAlchemyError) as error:
        return replace(shown, error=str(error))
    shown = replace(
        shown,
        reachable=True,
        version=version,
        writable=writable,
        seconds=round(time.monotonic() - began, 4),
        selects=selects,
    )
    if hop is None:
        return shown
    return replace(
        shown,
        relay=hop.state,
        lag_seconds=hop.lag_seconds,
        behind=hop.behind,
        position=hop.position or None,
        error=hop.error or None,
    )


def _answer(place: _Place, engines: Engines) -> tuple[str, bool, int | None]:
    """The server's version, whether it takes writes, and how many SELECTs it has run."""
    from shardkit.errors import PreconditionFailed

    endpoint = place.endpoint
    if endpoint.dialect == "sqlite" and not Path(endpoint.database).exists():
        raise PreconditionFailed(f"there is no file {endpoint.database}", hint="check the path in the shard map")
    with engines.sync(place.shard, place.role, endpoint, place.number).connect() as connection:
        if endpoint.dialect == "sqlite":
            return f"SQLite {connection.exec_driver_sql('SELECT sqlite_version()').scalar_one()}", True, None
        version, read_only = connection.exec_driver_sql("SELECT VERSION(), @@read_only").one()
        _, selects = connection.exec_driver_sql("SHOW GLOBAL STATUS LIKE 'Com_select'").one()
        return str(version), not read_only, int(selects)
