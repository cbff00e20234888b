"""Carrying a promotion out. Whatever stops it, the same command goes on; what was closed in vain is opened again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pymysql

from shardkit.credentials import CredentialSource
from shardkit.decisions import Janitor
from shardkit.errors import MapConflict, PartlyApplied, PreconditionFailed, ShardkitError
from shardkit.failover import native, relayed
from shardkit.failover.candidate import detach, prepared_here, wait_for
from shardkit.failover.fence import Connector, Fence
from shardkit.failover.plan import Loss, Plan, loss_of
from shardkit.failover.servers import Server
from shardkit.failover.standing import PROMOTED, Standing, look, position_of, stand
from shardkit.gtid import Position
from shardkit.mapstore import MapStore
from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint, ReplicationKind, Role
from shardkit_cdc import own_schema
from shardkit_cdc.position import lock_name

#: Seconds that each wait may take.
TIMEOUT = 30.0
#: Seconds that another promotion gets to end: the servers notice that one was killed.
_ALONE_SECONDS = 3
_MOST_CONFLICTS = 5


@dataclass(frozen=True, slots=True)
class Promotion:
    """What a promotion did.

    :param final_position: where the old master's log ends; empty where it could not be asked.
    :param has_position: what the new master has of it.
    :param ended_connections: connections to the old master that were ended.
    :param ended_branches: prepared transactions that were ended there: name -> how.
    :param closed_seconds: from the first refused write to the published map.
    :param removed: endpoints that left the map -> why.
    :param loss: None where the old master could be asked: then nothing is lost.
    :param undecided: XA branches that the new master knows of and not how they end.
    """

    shard: str
    old: str
    new: str
    epoch: int
    map_version: int
    final_position: str
    has_position: str
    ended_connections: int
    ended_branches: Mapping[str, str]
    closed_seconds: float
    follow: tuple[str, ...]
    removed: Mapping[str, str]
    loss: Loss | None = None
    undecided: tuple[str, ...] = ()


def promote(
    store: MapStore,
    credentials: CredentialSource,
    plan: Plan,
    *,
    timeout: float = TIMEOUT,
    say: Callable[[str], None] = lambda _text: None,
) -> Promotion:
    """Carry out a plan.

    :param timeout: seconds that each wait may take.
    :param say: told each step as it begins.
    :raises PreconditionFailed: nothing was changed, or all of it was undone.
    :raises PartlyApplied: the same call goes on.
    """
    return _Run(store, credentials, plan, timeout, say).run()


class _Run:
    def __init__(
        self,
        store: MapStore,
        credentials: CredentialSource,
        plan: Plan,
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self._store = store
        self._credentials = credentials
        self._plan = plan
        self._timeout = timeout
        self._say = say
        self._shard = plan.shard
        self._closed_at = 0.0
        self._may_have_let_go = False
        self._ended_connections = 0
        self._ended_branches: dict[str, str] = {}

    def run(self) -> Promotion:
        with ExitStack() as stack:
            self._be_alone(stack)
            candidate = stack.enter_context(Server(self._plan.candidate.endpoint, self._credentials))
            if self._plan.loss is not None:
                return self._without_old_master(candidate)
            master = stack.enter_context(Server(self._shard.master, self._credentials))
            return self._with_old_master(master, candidate)

    def _be_alone(self, stack: ExitStack) -> None:
        """Keep other promotions of the shard away, and see that none has been at work since the plan was made.

        :raises PreconditionFailed: nothing was changed.
        """
        plan, shard = self._plan, self._shard
        places = {each: role for role, each in shard.endpoints()}
        asked = [plan.candidate.endpoint, *plan.follow, *(() if plan.loss is not None else (shard.master,))]
        now: list[Standing] = []
        for endpoint in sorted(asked, key=lambda each: each.url):
            server = stack.enter_context(Server(endpoint, self._credentials))
            lock = lock_name(endpoint.database, PROMOTED + shard.name)
            if server.row("SELECT GET_LOCK(%s, %s)", lock, _ALONE_SECONDS) != (1,):
                raise PreconditionFailed(
                    f"another promotion of shard {shard.name} is at work; this one has changed nothing",
                    hint="wait until it has ended, then see 'shardkit shard list'",
                )
            now.append(stand(server, shard, places[endpoint]))
        begun = {each.endpoint for each in now if each.begun} - {plan.candidate.endpoint}
        fed = next(each.fed for each in now if each.endpoint == plan.candidate.endpoint)
        if begun or fed != plan.candidate.fed or self._store.load().shards.get(shard.name) != shard:
            raise PreconditionFailed(
                f"shard {shard.name} has been changed, or another promotion of it begun, since this one was planned; "
                "this one has changed nothing",
                hint="see 'shardkit shard list', then run the command again",
            )

    # --- the old master answers

    def _with_old_master(self, master: Server, candidate: Server) -> Promotion:
        fed = self._plan.candidate.fed
        self._come_up(master, candidate, fed=fed)
        if fed:
            own_schema.upgrade(master.endpoint, self._credentials)
        fence = Fence(master, self._shard.name, self._plan.version + 1, self._plan.locks)
        try:
            final = self._closed(fence, fed=fed)
            self._say(f"the old master's final position is {final}; waiting until {candidate.endpoint} has it")
            has = self._wait(candidate, final)
            self._may_have_let_go = True
            detach(candidate, self._shard, self._plan.after.epoch)
        except BaseException as error:
            self._undo(fence, candidate, error)
            raise
        return self._finish(candidate, final=final, has=str(has))

    def _come_up(self, master: Server, candidate: Server, *, fed: bool) -> None:
        """Before anything is closed: the candidate has to be near."""
        now = master.end_of_log
        if fed:
            self._say(f"waiting until {candidate.endpoint} is near {self._shard.master}")
            self._wait(candidate, now)
            return
        has = position_of(candidate, self._shard, self._plan.candidate.role)
        if has is None or not has.covers(now):
            raise PreconditionFailed(
                f"{candidate.endpoint} has been taken out of replication at {has or 'nothing'}, and the master has "
                f"gone on to {now}: nothing brings it further",
                hint="stop the old master and give --force, which loses what it has had since"
                if self._plan.candidate.begun
                else "fill it again, or promote another one",
            )

    def _closed(self, fence: Fence, *, fed: bool) -> Position:
        self._say(f"closing {self._shard.master}")
        self._closed_at = time.monotonic()
        self._ended_connections = fence.close(timeout=self._timeout, note_version=fed)
        masters = self._masters()
        while True:
            ended = fence.resolve(masters, self._credentials, timeout=self._timeout)
            self._ended_branches |= {branch.transaction: str(outcome) for branch, outcome in ended.items()}
            if not fed or self._shard.replication is ReplicationKind.NATIVE:
                return fence.final_position()
            fence.mark_the_end()
            if not fence.resolve(masters, self._credentials, timeout=self._timeout):
                return fence.final_position()

    def _masters(self) -> dict[str, Endpoint]:
        return {name: shard.master for name, shard in self._store.load().shards.items()}

    def _wait(self, candidate: Server, wanted: Position) -> Position:
        return wait_for(candidate, self._shard, self._plan.candidate.role, wanted, timeout=self._timeout)

    def _undo(self, fence: Fence, candidate: Server, error: BaseException) -> None:
        """Open the old master again, unless the candidate may have let go of it already."""
        try:
            if self._plan.candidate.fed and self._may_have_let_go and not self._is_fed(candidate.endpoint):
                raise PartlyApplied(
                    f"{self._shard.master} is closed and {candidate.endpoint} follows it no more, but is not yet the "
                    f"master: {error}",
                    hint="run the same command again: it goes on from there",
                ) from error
            if not self._plan.candidate.fed:  # an earlier run closed it: this one leaves it so
                raise PartlyApplied(
                    f"{self._shard.master} is closed, and {candidate.endpoint} is not yet the master: {error}",
                    hint="run the same command again: it goes on from there",
                ) from error
            fence.open_again(self._store.load().version)
        except (ShardkitError, pymysql.MySQLError) as failure:
            if isinstance(failure, PartlyApplied):
                raise
            raise PartlyApplied(
                f"{self._shard.master} may be closed to writes, and could not be opened again: {error}; {failure}",
                hint="run the same command again; to go back instead see docs/how-to/promote.md",
            ) from error
        self._say(f"{self._shard.master} takes writes again")

    def _is_fed(self, candidate: Endpoint) -> bool:
        return look([replace(self._shard, replicas=(candidate,), staging=None)], self._credentials)[-1].fed

    # --- the old master does not answer

    def _without_old_master(self, candidate: Server) -> Promotion:
        wanted = self._most_known()
        self._closed_at = time.monotonic()
        if wanted is not None and self._plan.candidate.fed:
            self._say(f"waiting until {candidate.endpoint} has what any server knows of the old master: {wanted}")
            self._wait(candidate, wanted)
        self._take_off(candidate)
        standings = look([self._shard], self._credentials)[1:]
        now = next(each for each in standings if each.endpoint == candidate.endpoint)
        loss = loss_of(standings, now)
        return self._finish(candidate, final=None, has=loss.has_position, loss=loss)

    def _take_off(self, candidate: Server) -> None:
        """The relay may still reach a master that we do not: what staging has from now on is the end."""
        staging = self._plan.staging
        try:
            if staging is not None:
                with Server(staging, self._credentials) as server:
                    end = self._freeze(server, candidate)
                if end is not None and self._plan.candidate.fed:
                    self._wait(candidate, end)
            detach(candidate, self._shard, self._plan.after.epoch)
        except (ShardkitError, pymysql.MySQLError) as error:
            raise PartlyApplied(
                f"{staging or candidate.endpoint} may have been taken off {self._shard.master}, and "
                f"{candidate.endpoint} is not the master yet: {error}",
                hint="run the same command again: it goes on from there",
            ) from error

    def _freeze(self, staging: Server, candidate: Server) -> Position | None:
        """Take staging off the old master; where that one's log ends there, which the candidate may not have yet."""
        begun = stand(candidate, self._shard, self._plan.candidate.role).begun
        if begun and relayed.has_begun(staging, self._shard, begun):
            return None  # an attempt before this one has had it go on from the candidate: it had everything by then
        relayed.freeze(staging, self._shard, self._plan.after.epoch)
        return position_of(staging, self._shard, Role.STAGING)

    def _most_known(self) -> Position | None:
        best: Position | None = None
        for each in look([self._shard], self._credentials)[1:]:
            if each.known is not None and (best is None or each.known.covers(best)):
                best = each.known
        return best

    # --- the new master

    def _finish(self, candidate: Server, *, final: Position | None, has: str, loss: Loss | None = None) -> Promotion:
        try:
            self._say(f"opening {candidate.endpoint}")
            undecided = self._end_what_was_prepared(candidate) if loss is not None else ()
            faults = self._relay_from(candidate)
            candidate.open_to_writes()
            plan = self._plan
            if self._shard.replication is ReplicationKind.NATIVE:
                faults = native.follow_all(plan.keeps, candidate.endpoint, self._credentials)
            plan = replace(
                plan,
                keeps=tuple(each for each in plan.keeps if each not in faults),
                staging=None if plan.staging in faults else plan.staging,
            )
            published = self._publish(plan)
        except (ShardkitError, pymysql.MySQLError) as error:
            raise PartlyApplied(
                f"{candidate.endpoint} was opened, or nearly so, and is not yet in the map: {error}",
                hint="run the same command again: it goes on from there",
            ) from error
        removed = {str(each): "it does not follow the new master" for each in self._plan.removes}
        removed |= {str(each): fault for each, fault in faults.items()}
        removed[str(self._shard.master)] = "the old master"
        return Promotion(
            shard=self._shard.name,
            old=str(self._shard.master),
            new=str(candidate.endpoint),
            epoch=plan.after.epoch,
            map_version=published.version,
            final_position=str(final or ""),
            has_position=has,
            ended_connections=self._ended_connections,
            ended_branches=self._ended_branches,
            closed_seconds=round(time.monotonic() - self._closed_at, 3),
            follow=tuple(map(str, plan.follow)),
            removed=removed,
            loss=loss,
            undecided=undecided,
        )

    def _relay_from(self, candidate: Server) -> dict[Endpoint, str]:
        """Before it is opened: whatever is written to it then is in its log behind where the copies begin."""
        plan = self._plan
        if self._shard.replication is ReplicationKind.NATIVE:
            return {}
        has = position_of(candidate, self._shard, plan.candidate.role)
        if has is None:
            return dict.fromkeys(plan.follow, f"{candidate.endpoint} does not say what it has of the old master's log")
        beginning = relayed.Beginning.note(candidate, self._shard, plan.after.epoch, has=has)
        first, behind = ((plan.staging,), plan.keeps) if plan.staging is not None else (plan.keeps, ())
        return relayed.follow_all(first, behind, self._shard, beginning, self._credentials)

    def _end_what_was_prepared(self, candidate: Server) -> tuple[str, ...]:
        """What clients left prepared on a master that died: native replication has brought the branches here."""
        if self._shard.replication is ReplicationKind.RELAY:
            epoch = self._plan.after.epoch
            found = prepared_here(candidate, self._shard, epoch)
            if self._plan.staging is not None:
                with Server(self._plan.staging, self._credentials) as staging:
                    found += prepared_here(staging, self._shard, epoch)
            return tuple(dict.fromkeys(found))
        candidate.open_to_ourselves()
        masters = {**self._masters(), self._shard.name: candidate.endpoint}
        janitor = Janitor(Connector(masters, self._credentials))
        ended = janitor.sweep([self._shard.name], patient=False)
        self._ended_branches |= {branch.transaction: str(outcome) for branch, outcome in ended.items()}
        return tuple(branch.transaction for branch in janitor.prepared(self._shard.name))

    def _publish(self, plan: Plan) -> ShardMap:
        self._say("publishing the map")
        for _ in range(_MOST_CONFLICTS):
            current = self._store.load()
            if current.shards.get(self._shard.name) != self._shard:
                raise MapConflict(
                    f"the map's shard {self._shard.name} has been changed meanwhile: it is not published over",
                    hint="see 'shardkit map history'",
                )
            changed = current.with_shards({**current.shards, self._shard.name: plan.after})
            try:
                return self._store.publish(changed, expected_version=current.version)
            except MapConflict:
                continue
        raise MapConflict("the map is changed all the time: it could not be published")
