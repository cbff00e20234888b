"""Which database takes a master's place, what will happen, and what stands in the way. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from shardkit.credentials import CredentialSource
from shardkit.errors import PreconditionFailed
from shardkit.failover.fence import Account, accounts, foreign_branches, writers_past_read_only
from shardkit.failover.privileges import require
from shardkit.failover.servers import Server
from shardkit.failover.standing import Standing, look
from shardkit.gtid import Flavour, Position
from shardkit.migrate.lock import LockKind, lock_name
from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint, ReplicationKind, Role, Shard
from shardkit_cdc import preflight


@dataclass(frozen=True, slots=True)
class Loss:
    """What is known of an old master that cannot be asked any more, against what is to take its place.

    :param known_position: the most of its log that any server has.
    :param known_by: which server.
    :param known_at: when its last heartbeat was written that any server has, microseconds since the epoch.
    :param has_position: what the candidate has.
    :param missing: how many transactions it lacks of those that are known.
    """

    known_position: str
    known_by: str
    known_at: int | None
    has_position: str
    missing: int

    @property
    def lines(self) -> tuple[str, ...]:
        """For people."""
        beat = "no heartbeat" if self.known_at is None else f"heartbeat of {_time_of(self.known_at)}"
        known = f"{self.known_position or 'none'}, on {self.known_by}, {beat}"
        return (
            f"the last position of the old master that any server knows: {known}",
            f"the new master has: {self.has_position or 'nothing'}; of the known {self.missing} are missing",
            f"LOST: whatever the old master committed after {self.has_position or 'its beginning'}",
        )


@dataclass(frozen=True)
class Plan:
    """A promotion that is about to happen.

    :param shard: as the map has it.
    :param version: of the map.
    :param keeps: replicas that will follow the new master, directly or through staging.
    :param staging: the staging database, where it will follow the new master.
    :param removes: what leaves the map, the old master first.
    :param locks: accounts that are locked on the old master.
    :param loss: None where the old master can be asked.
    """

    shard: Shard
    version: int
    old: Standing
    candidate: Standing
    keeps: tuple[Endpoint, ...]
    removes: tuple[Endpoint, ...]
    staging: Endpoint | None = None
    locks: tuple[Account, ...] = ()
    loss: Loss | None = None
    warnings: tuple[str, ...] = ()

    @property
    def after(self) -> Shard:
        """The shard as it will stand in the map."""
        return replace(
            self.shard,
            master=self.candidate.endpoint,
            staging=self.staging,
            replicas=self.keeps,
            weights={each: weight for each, weight in self.shard.weights.items() if each in self.keeps},
            epoch=self.shard.epoch + 1,
        )

    @property
    def follow(self) -> tuple[Endpoint, ...]:
        """What will stay in the map beside the new master."""
        return ((self.staging,) if self.staging is not None else ()) + self.keeps

    @property
    def lines(self) -> tuple[str, ...]:
        """What will happen, for people."""
        old, new = self.shard.master, self.candidate.endpoint
        native = self.shard.replication is ReplicationKind.NATIVE
        rest = [each for each in self.removes if each != old]
        how = "its servers' own replication" if native else "the relay"
        fence = [
            f"close the old master {old}: read-only, every connection to its server ended"
            + (f", locked: {', '.join(map(str, self.locks))}" if self.locks else ""),
            f"end prepared transactions there, read its final position, wait until {new} has it through {how}",
        ]
        lost = [f"the old master {old} is NOT closed: it does not answer", *(self.loss.lines if self.loss else ())]
        return (
            f"shard {self.shard.name}, epoch {self.shard.epoch} -> {self.shard.epoch + 1}",
            *(fence if self.loss is None else lost),
            f"open {new} ({self.candidate.role}) to writes and publish it as the master",
            *(f"{each} follows it from then on" for each in ([self.staging] if self.staging else self.keeps)),
            *(f"{each} follows {self.staging}, as before" for each in (self.keeps if self.staging else ())),
            f"{old} leaves the map",
            *(f"{each} leaves the map: {self._why_out}" for each in rest),
        )

    @property
    def _why_out(self) -> str:
        if self.shard.replication is ReplicationKind.NATIVE:
            return "it cannot follow the new master"
        return "it cannot go on from the new master; fill it again ('shardkit relay seed'), then put it back"


def _time_of(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(sep=" ", timespec="seconds")


def make_plan(
    shard_map: ShardMap,
    name: str,
    credentials: CredentialSource,
    *,
    wanted: str | None = None,
    force: bool = False,
    app_users: Sequence[str] = (),
) -> Plan:
    """Work out a promotion.

    :param wanted: the endpoint to promote, as URL or ``host:port``; by default the most advanced replica, or the
        staging database where there is no replica.
    :param force: go on although the old master does not answer.
    :param app_users: accounts to be locked on the old master: ``user`` or ``user@host``.
    :raises PreconditionFailed: naming what stands in the way.
    """
    shard = shard_map.shard(name)
    _refuse_what_cannot_be(shard_map, shard)
    standings = look([shard], credentials)
    old, others = standings[0], standings[1:]
    candidate = _chosen(shard, others, wanted)
    _refuse_candidate(shard_map, shard, candidate)
    staging, keeps, warnings = _followers(shard, others, candidate, credentials)
    plan = Plan(
        shard,
        shard_map.version,
        old,
        candidate,
        keeps,
        tuple(each for _, each in shard.endpoints() if each not in {candidate.endpoint, staging, *keeps}),
        staging,
        warnings=tuple(warnings),
    )
    if old.reachable:
        return _with_old_master(plan, credentials, app_users)
    loss = loss_of(others, candidate)
    if not force:
        raise PreconditionFailed(
            f"the master of shard {name} does not answer ({old.error}); " + "; ".join(loss.lines),
            hint="bring it back; or give --force and lose that",
        )
    return replace(plan, loss=loss)


def loss_of(others: Sequence[Standing], candidate: Standing) -> Loss:
    """What is known of the log of a master that cannot be asked."""
    best = candidate
    for each in others:
        if each.known is not None and (best.known is None or _ahead(each.known, best.known)):
            best = each
    beats = [each.beat_at for each in others if each.beat_at is not None]
    missing = 0
    if best.known is not None:
        missing = best.known.ahead_of(candidate.position) if candidate.position is not None else -1
    return Loss(
        known_position=str(best.known or ""),
        known_by=best.endpoint.address,
        known_at=max(beats, default=None),
        has_position=str(candidate.position or ""),
        missing=missing,
    )


def _ahead(one: Position, other: Position) -> bool:
    return one.covers(other) and not other.covers(one)


def _refuse_what_cannot_be(shard_map: ShardMap, shard: Shard) -> None:
    if shard.master.dialect != "mysql":
        raise PreconditionFailed(f"shard {shard.name} is on {shard.master.dialect}: nothing can be promoted there")
    if jobs := [move.job for move in shard_map.moves if shard.name in {move.source, move.target}]:
        raise PreconditionFailed(
            f"rebalance job {jobs[0]} is at work on shard {shard.name}",
            hint="let it finish, or cancel it: shardkit rebalance status",
        )
    beside = [
        other.name
        for other in shard_map.shards.values()
        if other.name != shard.name and other.master.address == shard.master.address
    ]
    if beside:
        raise PreconditionFailed(
            f"the server {shard.master.address} holds the master of {', '.join(beside)}, too, and would be closed",
            hint="move those shards to a server of their own first",
        )


def _chosen(shard: Shard, others: Sequence[Standing], wanted: str | None) -> Standing:
    for each in others:
        if each.begun:
            if wanted is not None and wanted not in {each.endpoint.url, each.endpoint.address}:
                raise PreconditionFailed(
                    f"{each.endpoint} is about to be the master of shard {shard.name}: a promotion has begun so",
                    hint="finish that: promote the same endpoint again",
                )
            return each
    if wanted is not None:
        for each in others:
            if wanted in {each.endpoint.url, each.endpoint.address}:
                if each.error or not each.reachable:
                    raise PreconditionFailed(f"{each.endpoint} cannot be promoted: {each.error}")
                return each
        raise PreconditionFailed(
            f"{wanted} is no replica and no staging database of shard {shard.name}",
            hint="see 'shardkit shard list'",
        )
    replicas = [each for each in others if each.role is Role.REPLICA]
    able = [each for each in replicas or others if each.reachable and each.position is not None]
    if not able:
        faults = "; ".join(f"{each.endpoint.address}: {each.error or 'it has no position'}" for each in others)
        raise PreconditionFailed(
            f"shard {shard.name} has nobody to promote ({faults or 'neither replicas nor a staging database'})",
            hint="see 'shardkit shard list'",
        )
    best = able[0]
    for each in able[1:]:
        if each.known is not None and best.known is not None and _ahead(each.known, best.known):
            best = each
    for each in able:  # a promotion that was cut short has taken it out of replication already
        if not each.fed and best.known is not None and each.known is not None and each.known.covers(best.known):
            return each
    return best


def _refuse_candidate(shard_map: ShardMap, shard: Shard, candidate: Standing) -> None:
    where = candidate.endpoint
    if candidate.position is None:
        raise PreconditionFailed(
            f"{where} has no position in the log of its master: it may hold anything",
            hint="see 'shardkit shard list', and 'shardkit relay status'",
        )
    if shard.replication is not ReplicationKind.NATIVE:
        return
    for other in shard_map.shards.values():
        if other.name != shard.name and any(each.address == where.address for _, each in other.endpoints()):
            raise PreconditionFailed(
                f"the server {where.address} serves shard {other.name}, too: its replication would be ended",
                hint="promote a replica on a server of its own",
            )


def _followers(
    shard: Shard, others: Sequence[Standing], candidate: Standing, credentials: CredentialSource
) -> tuple[Endpoint | None, tuple[Endpoint, ...], list[str]]:
    """The staging database and the replicas that can follow the new master, and why the rest cannot."""
    native = shard.replication is ReplicationKind.NATIVE
    with Server(candidate.endpoint, credentials) as server:
        require(server, opens=True, follows=native)
        if not server.is_on("log_bin"):
            raise PreconditionFailed(
                f"{candidate.endpoint.address} keeps no binary log: as a master it could not be followed",
                hint="log_bin=ON (needs a restart)",
            )
        fault = _unfit_to_be_followed(server, native=native)
    rest = [
        each for each in others if each.endpoint != candidate.endpoint and not (native and each.role is Role.STAGING)
    ]
    if not rest:
        return None, (), []
    if fault:
        return None, (), [f"{candidate.endpoint.address} {fault}: nobody can follow it"]
    able = [each for each in rest if each.reachable and (native or each.flavour is candidate.flavour)]
    lost = [f"{each.endpoint.address} {_why_not(each)}: it leaves the map" for each in rest if each not in able]
    staging = next((each.endpoint for each in able if each.role is Role.STAGING), None)
    replicas = tuple(each.endpoint for each in able if each.role is Role.REPLICA)
    if replicas and staging is None and shard.staging not in {None, candidate.endpoint}:
        lost.append(f"{shard.staging} filled the other replicas: without it they leave the map")
        replicas = ()
    for endpoint in replicas if native else [staging] if staging is not None else replicas:
        with Server(endpoint, credentials) as server:
            require(server, follows=native, takes_over=not native)
    return staging, replicas, lost


def _unfit_to_be_followed(server: Server, *, native: bool) -> str:
    """What of a server's settings keeps others from following it; empty where nothing does."""
    if not native:
        faults = preflight.source_faults(preflight.ask(server.connection, server.endpoint))
        return "; ".join(f"{fault} ({setting})" for fault, setting in faults).removeprefix("it ")
    variable = "log_slave_updates" if server.flavour is Flavour.MARIADB else "log_replica_updates"
    return "" if server.is_on(variable) else f"does not log what it has from its master ({variable} is off)"


def _why_not(standing: Standing) -> str:
    return "is of another server family" if standing.reachable else "does not answer"


def _with_old_master(plan: Plan, credentials: CredentialSource, app_users: Sequence[str]) -> Plan:
    if plan.old.error:
        raise PreconditionFailed(f"the master of shard {plan.shard.name}: {plan.old.error}")
    if plan.old.flavour is not plan.candidate.flavour:
        raise PreconditionFailed(f"{plan.shard.master} and {plan.candidate.endpoint} are of different server families")
    locks: list[Account] = []
    warnings = list(plan.warnings)
    with Server(plan.shard.master, credentials) as server:
        require(server, closes=True, locks=bool(app_users), follows=False)
        for user in app_users:
            found = accounts(server, user)
            if not found:
                raise PreconditionFailed(f"{plan.shard.master.address} has no account {user}", hint="mend --app-user")
            locks += found
        own = credentials(plan.shard.master).user
        if own in {account.user for account in locks}:
            raise PreconditionFailed(
                f"--app-user {own} is the account that shardkit itself uses: locked, it could not go on",
                hint="give shardkit an account of its own (SHARDKIT_USER)",
            )
        if number := foreign_branches(server):
            raise PreconditionFailed(
                f"{number} XA branches that are not shardkit's stand prepared on {plan.shard.master.address}",
                hint="commit or roll them back by hand (XA RECOVER)",
            )
        for kind in LockKind:
            (holder,) = server.row("SELECT IS_USED_LOCK(%s)", lock_name(kind, plan.shard.master.database))
            if holder is not None:
                raise PreconditionFailed(
                    f"a migration is at work on shard {plan.shard.name}", hint="let it finish: shardkit migrate status"
                )
        locked = {account.user for account in locks}
        warnings += [
            f"{user} is connected and may write to a read-only server: shardkit's sessions are kept off by the map's "
            "version, other programs are not" + ("" if user == own else f" (--app-user {user} locks it)")
            for user in writers_past_read_only(server)
            if user not in locked
        ]
    return replace(plan, locks=tuple(locks), warnings=tuple(warnings))
