"""Which shards a tree runs on, which of its revisions each of them gets, and which tables it may compare. No I/O.

A keyspace's migrations run on every shard that hosts it: all of them hold all of its tables. A tree without keyspaces
runs on every shard. A tree that serves several keyspaces gives each a branch labelled with the keyspace's name
(``branch_labels = ("orders",)``): a shard gets the branches of the keyspaces that it hosts, and the unlabelled ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError

from shardkit.errors import PreconditionFailed, UnknownTable
from shardkit.shardmap import ShardMap

OWN_PREFIX = "shardkit_"
HEADS = frozenset({"head", "heads"})


@dataclass(frozen=True, slots=True)
class Scope:
    """One shard as a tree sees it.

    :param keyspaces: those of the tree's keyspaces that the shard hosts.
    :param tables: the tables of these keyspaces.
    :param labels: every keyspace of the map: which branch labels are keyspaces.
    :param named: every table that the map names.
    :param narrowed: the tree runs for one keyspace alone.
    """

    shard: str
    keyspaces: tuple[str, ...]
    tables: frozenset[str]
    labels: frozenset[str]
    named: frozenset[str]
    narrowed: bool = False

    def compares(self, table: str | None) -> bool:
        """Whether models and database are compared for this table."""
        return table in self.tables

    def unplaced(self, tables: Iterable[str]) -> tuple[str, ...]:
        """The tables that no keyspace names, of those given."""
        return tuple(sorted(table for table in tables if table not in self.named))


def scopes(shardmap: ShardMap, *, keyspace: str | None = None, shards: Sequence[str] = ()) -> tuple[Scope, ...]:
    """The shards to run on, in the map's order.

    :param keyspace: only the shards that host it, and only its tables.
    :param shards: only these.
    :raises UnknownTable: for a keyspace or shard that the map does not name, or a shard without the keyspace.
    """
    spaces = (shardmap.keyspace(keyspace),) if keyspace else tuple(shardmap.keyspaces.values())
    for name in shards:
        shardmap.shard(name)
        if keyspace and name not in spaces[0].shards:
            raise UnknownTable(
                f"shard {name!r} hosts nothing of keyspace {keyspace!r}",
                hint=f"it is on {', '.join(spaces[0].shards)}",
            )
    found = []
    for name in shardmap.shards:
        here = tuple(space for space in spaces if name in space.shards)
        if (keyspace and not here) or (shards and name not in shards):
            continue
        found.append(
            Scope(
                shard=name,
                keyspaces=tuple(space.name for space in here),
                tables=frozenset(table for space in here for table in (*space.tables, *space.reference)),
                labels=frozenset(shardmap.keyspaces),
                named=frozenset(shardmap.tables),
                narrowed=keyspace is not None,
            )
        )
    return tuple(found)


def refuse_while_moving(shardmap: ShardMap, scopes_: Iterable[Scope]) -> None:
    """A rebalance job copies rows between tables of one shape: no DDL while it runs.

    :raises PreconditionFailed: naming the job.
    """
    concerned = {keyspace for scope in scopes_ for keyspace in scope.keyspaces}
    for move in shardmap.moves:
        if move.keyspace in concerned:
            raise PreconditionFailed(
                f"rebalance job {move.job} is moving buckets of keyspace {move.keyspace!r} from {move.source} to "
                f"{move.target}: its tables must not change meanwhile",
                hint=f"wait until it is done (`shardkit rebalance status {move.job}`), or cancel it",
            )


def targets(script: ScriptDirectory, scope: Scope, revision: str) -> tuple[str, ...]:
    """The revisions that a shard is to reach when asked for ``revision``.

    ``head`` and ``heads`` are the heads of the branches that belong on the shard. Any other revision is itself, or
    nothing where it lies on the branch of a keyspace that the shard does not host.

    :raises PreconditionFailed: for a revision that the tree does not have.
    """
    try:
        if revision in HEADS:
            heads = (script.get_revision(head) for head in script.get_heads())
            return tuple(head.revision for head in heads if head is not None and _belongs(head, scope))
        if revision == "base" and scope.narrowed:
            labels = {label for one in script.walk_revisions() for label in one.branch_labels}
            if branches := labels.intersection(scope.keyspaces):
                return tuple(f"{branch}@base" for branch in sorted(branches))
        if revision == "base" or _is_relative(revision):
            return (revision,)
        found = script.get_revisions(revision)
    except (CommandError, RevisionError) as error:
        raise PreconditionFailed(
            f"the tree has no revision {revision!r}: {error}", hint="`alembic history` lists them"
        ) from None
    return (revision,) if all(one is None or _belongs(one, scope) for one in found) else ()


def _is_relative(revision: str) -> bool:
    return revision[:1] in {"+", "-"} and revision[1:].isdigit()


def _belongs(revision: Script, scope: Scope) -> bool:
    of_keyspaces = scope.labels.intersection(revision.branch_labels or ())
    return not of_keyspaces or not of_keyspaces.isdisjoint(scope.keyspaces)


def pending(
    script: ScriptDirectory, current: Sequence[str], target: Sequence[str], *, downgrade: bool = False
) -> tuple[str, ...]:
    """The revisions between where a shard stands and its targets, in the order in which they will run, or be reverted.

    :raises PreconditionFailed: when there is no way, e.g. from a revision that the tree does not have.
    """
    steps: list[str] = []
    here = tuple(current)
    try:
        for one in target:
            if downgrade:
                path = list(script.iterate_revisions(here, one, select_for_downgrade=True))
            else:
                path = list(reversed(list(script.iterate_revisions(one, here, implicit_base=True))))
            steps.extend(step.revision for step in path if step.revision not in steps)
    except (CommandError, RevisionError) as error:
        raise PreconditionFailed(
            f"{', '.join(current) or 'base'} -> {', '.join(target)} is no way through the tree: {error}",
            hint="the shard was migrated by another tree, or by a newer one: check --config, and version_table in "
            "[shardkit] where two trees meet on a shard",
        ) from None
    return tuple(steps)


def offline_range(script: ScriptDirectory, current: Sequence[str], target: str) -> str:
    """``start:end`` for Alembic's offline mode.

    :raises PreconditionFailed: where offline SQL cannot begin at this shard's place.
    """
    if not current:
        return target
    below = {step.revision for step in script.iterate_revisions(target, "base")}
    starts = [revision for revision in current if revision in below]
    if len(starts) != 1:
        raise PreconditionFailed(
            f"offline SQL for {target} cannot begin at {', '.join(current)}",
            hint="it can be written along one branch only: run this upgrade online",
        )
    return f"{starts[0]}:{target}"
