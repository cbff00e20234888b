"""``shardkit migrate``: Alembic's commands over every shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import rich_click as click

from shardkit.cli.failures import explain
from shardkit.cli.frame import INTERRUPTED
from shardkit.cli.options import map_store, output_option, yes_option
from shardkit.cli.output import Column, Output
from shardkit.credentials import from_environment
from shardkit.errors import PartlyApplied, ShardkitError
from shardkit.migrate.connect import PARALLEL
from shardkit.migrate.environment import LOCK_TIMEOUT
from shardkit.migrate.fleet import Fleet
from shardkit.migrate.own import upgrade_own_tables
from shardkit.migrate.report import Ending, MigrationReport, Standing
from shardkit.migrate.tree import Tree

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def migrate() -> None:
    """Alembic over every shard: the same revision files, the same commands, a table of who stands where.

    Start with `alembic init migrations`, and let env.py say
    `from shardkit.migrate import run_migrations; run_migrations(target_metadata=Base.metadata)`.
    """


def _tree_options(command: F) -> F:
    """What every command says about the tree and its shards."""
    for option in reversed(
        (
            click.option(
                "--map",
                "map_source",
                metavar="SOURCE",
                envvar="SHARDKIT_MAP",
                show_envvar=True,
                help="The shard map; by default the one that [shardkit] in alembic.ini names.",
            ),
            click.option(
                "-c",
                "--config",
                default="alembic.ini",
                show_default=True,
                metavar="FILE",
                help="The tree's alembic.ini or pyproject.toml.",
            ),
            click.option("-n", "--name", default="alembic", show_default=True, help="The section of alembic.ini."),
            click.option("--keyspace", metavar="NAME", help="Only the shards of this keyspace, and only its tables."),
            click.option("--shard", "shards", multiple=True, metavar="NAME", help="Only this shard. Repeatable."),
            output_option,
        )
    ):
        command = option(command)
    return command


def _change_options(command: F) -> F:
    """What `upgrade` and `downgrade` share."""
    for option in reversed(
        (
            click.option("--first", metavar="SHARD", help="Migrate this one alone first; stop if it fails."),
            click.option(
                "--parallel", type=click.IntRange(1), default=PARALLEL, show_default=True, help="Shards at a time."
            ),
            click.option("--keep-going", is_flag=True, help="Begin the other shards although one has failed."),
            click.option(
                "--wait",
                type=click.FloatRange(0),
                default=0.0,
                metavar="SECONDS",
                help="Wait for another migration, rather than refuse at once.",
            ),
            click.option(
                "--lock-timeout",
                type=click.IntRange(1),
                default=LOCK_TIMEOUT,
                show_default=True,
                metavar="SECONDS",
                help="How long DDL waits for older transactions; the application's statements queue behind it.",
            ),
            click.option(
                "--restart-revision",
                is_flag=True,
                help="Run a revision that stopped in the middle from its first statement: you have undone it by hand.",
            ),
            click.option("--dry-run", is_flag=True, help="Show what would run where, and change nothing."),
        )
    ):
        command = option(command)
    return command


@migrate.command()
@click.argument("revision", default="heads")
@_tree_options
@_change_options
@click.option("--sql", is_flag=True, help="Print what would run as SQL, and change nothing.")
@click.option("--internal", is_flag=True, help="shardkit's own tables, on masters, staging databases and replicas.")
def upgrade(out: Output, revision: str, sql: bool, internal: bool, **options: Any) -> int:
    """Bring every shard to REVISION (the heads by default).

    A shard that fails keeps a precise note of how far it came; the same command goes on from there.
    """
    if internal:
        return _upgrade_own_tables(out, options)
    if sql:
        with _fleet(options) as fleet:
            _print_sql(out, fleet.offline_sql(revision))
        return 0
    return _change(out, "upgrade", revision, options)


@migrate.command(context_settings={"ignore_unknown_options": True})  # so that -1 is a revision
@click.argument("revision")
@_tree_options
@_change_options
@yes_option
def downgrade(out: Output, revision: str, yes: bool, **options: Any) -> int:
    """Take every shard back to REVISION (-1, base, or an identifier). Tables and columns may be dropped."""
    if not options["dry_run"]:
        with _fleet(options) as fleet:
            standings = fleet.current(revision, downgrade=True)
        plan = [f"{one.shard}: {one.problem or 'revert ' + (', '.join(one.pending) or 'nothing')}" for one in standings]
        out.confirm(f"Take {len(plan)} shards back to {revision}?", yes=yes, plan=plan)
    return _change(out, "downgrade", revision, options)


@migrate.command()
@_tree_options
def current(out: Output, **options: Any) -> int:
    """Where each shard stands."""
    with _fleet(options) as fleet:
        standings = fleet.current()
        out.result({"cluster": fleet.cluster, "shards": [standing.document() for standing in standings]})
    _print_standings(out, standings)
    unknown = [standing for standing in standings if standing.problem is not None]
    return 4 if unknown else 0


@migrate.command()
@_tree_options
def check(out: Output, **options: Any) -> int:
    """Compare every shard with the revisions and with the models. Exits with 3 where they differ."""
    with _fleet(options) as fleet:
        report = fleet.check()
    out.result(report.document())
    rows = [
        (one.standing.shard, difference)
        for one in report.checks
        for difference in (*one.differences, *([one.error] if one.error else []))
    ]
    if rows:
        out.table(["shard", "difference"], rows)
    else:
        out.done(f"{len(report.checks)} shards are as the revisions and the models say")
    return _end(out, report.failure())


@migrate.command()
@_tree_options
@click.option("-m", "--message", metavar="TEXT", help="What the revision does; part of its file name.")
@click.option("--autogenerate", is_flag=True, help="Fill it with what the models have and the shard has not.")
@click.option("--head", metavar="REVISION", default="head", help="The revision to follow, or BRANCH@head.")
@click.option("--splice", is_flag=True, help="Allow a --head that is not a head.")
@click.option("--branch-label", metavar="LABEL", help="Begin a branch; a keyspace's name makes it that keyspace's.")
@click.option("--version-path", metavar="DIR", help="Which of version_locations to write to.")
@click.option("--rev-id", metavar="ID", help="The identifier, rather than a generated one.")
@click.option("--depends-on", multiple=True, metavar="REVISION", help="Revisions that have to come first.")
def revision(out: Output, shards: Sequence[str], depends_on: Sequence[str], **options: Any) -> int:
    """Write a new revision file. With --autogenerate the models are compared with the first shard, or --shard."""
    if len(shards) > 1:
        raise click.UsageError("the models are compared with one shard: give --shard once")
    names = ("message", "autogenerate", "head", "splice", "branch_label", "version_path", "rev_id")
    with _fleet({**options, "shards": ()}) as fleet:
        wanted = {**{name: options[name] for name in names}, "depends_on": list(depends_on) or None}
        files = fleet.new_revision(shards[0] if shards else None, **wanted)
    out.result({"files": files})
    for file in files:
        out.done(f"wrote {file}")
    return 0


# --- what they share


@contextmanager
def _fleet(
    options: Mapping[str, Any], listen: Callable[[str, Mapping[str, Any]], None] | None = None
) -> Iterator[Fleet]:
    tree = Tree.load(options["config"], section=options["name"])
    source = options["map_source"] or tree.settings.map_source
    if source is None:
        raise click.UsageError("no shard map is named: give --map, set SHARDKIT_MAP, or set map in [shardkit]")
    changing = {name: options[name] for name in ("parallel", "lock_timeout", "wait") if name in options}
    with map_store(source) as store:
        yield Fleet(store, tree, keyspace=options["keyspace"], shards=options["shards"], listen=listen, **changing)


def _change(out: Output, command: str, revision: str, options: Mapping[str, Any]) -> int:
    if options["dry_run"]:
        with _fleet(options) as fleet:
            standings = fleet.current(revision, downgrade=command == "downgrade")
            out.result({"cluster": fleet.cluster, "shards": [standing.document() for standing in standings]})
        _print_standings(out, standings)
        return 4 if any(standing.problem is not None for standing in standings) else 0

    def tell(shard: str, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "revision":
                progress.line(f"{shard}: {event['revision']} begins")
            case "statement" if event["skipped"]:
                progress.line(f"{shard}: done before: {event['statement'][:80]}")
            case "applied":
                progress.line(f"{shard}: {event['revision']} is done")

    with out.progress() as progress, _fleet(options, tell) as fleet:
        report = getattr(fleet, command)(
            revision,
            first=options["first"],
            keep_going=options["keep_going"],
            restart_revision=options["restart_revision"],
        )
    out.result(report.document())
    _print_report(out, report)
    code = _end(out, report.failure())
    return INTERRUPTED if report.interrupted else code


def _upgrade_own_tables(out: Output, options: Mapping[str, Any]) -> int:
    if options["map_source"] is None:
        raise click.UsageError("no shard map is named: give --map or set SHARDKIT_MAP")
    with map_store(options["map_source"]) as store:
        places = upgrade_own_tables(
            store.load(), from_environment(), shards=options["shards"], parallel=options["parallel"]
        )
    out.result([place.document() for place in places])
    out.table(
        ["shard", "role", "endpoint", Column("own tables")],
        [(place.shard, place.role, place.endpoint, place.error or "up to date") for place in places],
    )
    failed = [place for place in places if place.error is not None]
    if not failed:
        return 0
    kind = ShardkitError if len(failed) == len(places) else PartlyApplied
    return _end(out, kind(f"{len(failed)} of {len(places)} databases could not be migrated"))


def _print_standings(out: Output, standings: Sequence[Standing]) -> None:
    out.table(
        ["shard", "revision", "state", "detail"],
        [(one.shard, ", ".join(one.revisions), one.state, one.detail) for one in standings],
    )


def _print_report(out: Output, report: MigrationReport) -> None:
    out.table(
        ["shard", "from", "to", "result", Column("seconds", right=True), "detail"],
        [
            (
                one.shard,
                ", ".join(one.before),
                ", ".join(one.standing.revisions),
                one.ending,
                f"{one.seconds:.1f}",
                one.standing.detail if one.ending is not Ending.DONE else f"{len(one.applied)} applied",
            )
            for one in report.results
        ],
    )


def _print_sql(out: Output, per_shard: Mapping[str, str]) -> None:
    out.result(per_shard)
    same: dict[str, list[str]] = {}
    for shard, text in per_shard.items():
        same.setdefault(text, []).append(shard)
    for text, shards in same.items():
        out.text(f"-- shards: {', '.join(shards)}\n{text or '-- nothing to do'}\n")


def _end(out: Output, failure: ShardkitError | None) -> int:
    """The exit code; for people also the failure. With --json the document has told it already."""
    if failure is None:
        return 0
    if not out.as_json:
        out.failure(explain(failure))
    return failure.exit_code
