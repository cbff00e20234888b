"""``shardkit map``: show, check, publish and compare shard maps, and make the first one from a database."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option, yes_option
from shardkit.cli.output import Column, Output, count
from shardkit.topology import Role

if TYPE_CHECKING:
    from shardkit.mapdiff import MapDiff
    from shardkit.mapstore import MapStore
    from shardkit.partition import Bucket, Partition
    from shardkit.shardmap import Keyspace, ShardMap
    from shardkit.topology import Shard

# the errors and the map import SQLAlchemy: inside the commands, so that --help is quick


@click.group(name="map")
def map_() -> None:
    """Show, check, publish and compare shard maps."""


@map_.command()
@map_option
@click.option("--version", type=int, metavar="N", help="An earlier version, from the history.")
@click.option("--yaml", "as_yaml", is_flag=True, help="As YAML, to be edited and applied.")
@output_option
def show(map_source: str, version: int | None, as_yaml: bool, out: Output) -> None:
    """Show the published map."""
    from shardkit.mapschema import document_of

    with map_store(map_source) as store:
        shown = store.load() if version is None else store.load_version(version)
        out.result({"source": store.source, "version": shown.version, "map": document_of(shown)})
    if as_yaml:
        out.text(shown.dump())
        return
    out.line(f"cluster {shown.cluster}, map version {shown.version}", style="bold")
    out.table(
        ["keyspace", "by", Column("buckets", right=True), "tables", "reference"],
        [_keyspace_row(keyspace) for keyspace in shown.keyspaces.values()],
    )
    out.table(
        ["keyspace", "shard", "holds", Column("buckets", right=True), "values"],
        [row for keyspace in shown.keyspaces.values() for row in _placement_rows(keyspace)],
    )
    weights = any(shard.weights for shard in shown.shards.values())
    out.table(
        ["shard", "role", Column("endpoint", whole=True), *([Column("weight", right=True)] if weights else [])],
        [row for shard in shown.shards.values() for row in _endpoint_rows(shard, weights=weights)],
    )
    if shown.moves:
        out.table(
            ["job", "keyspace", "from", "to", Column("buckets", right=True)],
            [(move.job, move.keyspace, move.source, move.target, len(move.buckets)) for move in shown.moves],
            title="moving",
        )


def _endpoint_rows(shard: Shard, *, weights: bool) -> Iterator[tuple[object, ...]]:
    for role, endpoint in shard.endpoints():
        row = (shard.name, role, endpoint)
        yield (*row, shard.weight(endpoint) if role is Role.REPLICA else None) if weights else row


def _keyspace_row(keyspace: Keyspace) -> tuple[object, ...]:
    partition = keyspace.partition
    tables = (f"{table} by {', '.join(key)}" if key else table for table, key in keyspace.tables.items())
    return (
        keyspace.name,
        "whole tables" if partition is None else _by(partition),
        None if partition is None else count(len(partition.buckets)),
        ", ".join(tables),
        ", ".join(keyspace.reference),
    )


def _by(partition: Partition) -> str:
    return partition.by if partition.normalize is None else f"{partition.by}, normalize: {partition.normalize}"


#: Of bucket names and of a bucket's values, what a table shows; ``--yaml`` shows all.
_MOST_CHARACTERS = 48
_MOST_VALUES = 5


def _placement_rows(keyspace: Keyspace) -> Iterator[tuple[object, ...]]:
    """What each shard holds, in the map's own notation."""
    from shardkit.partition import format_buckets

    for shard in keyspace.shards:
        if keyspace.partition is None:
            yield keyspace.name, shard, "whole tables", None, None
            continue
        buckets = keyspace.buckets_on(shard)
        held = format_buckets(buckets)
        if len(held) > _MOST_CHARACTERS:
            held = f"{held[:_MOST_CHARACTERS].rpartition(', ')[0]}, ..."
        yield keyspace.name, shard, held, count(len(buckets)), _values_of(keyspace.partition, buckets)


def _values_of(partition: Partition, buckets: Iterable[Bucket]) -> str | None:
    """The key values of named buckets, where the map lists them: ``seoul: 서울, 인천; south: NULL``."""
    from shardkit.partition import ListPartition, RangePartition

    if isinstance(partition, ListPartition):
        return "; ".join(f"{bucket}: {_some(partition.values[str(bucket)])}" for bucket in buckets)
    if isinstance(partition, RangePartition):
        bounds = ((bucket, *partition.bounds[str(bucket)]) for bucket in buckets)
        return "; ".join(f"{bucket}: {_span(low, high)}" for bucket, low, high in bounds)
    return None


def _some(values: Sequence[object]) -> str:
    shown = ", ".join("NULL" if value is None else str(value) for value in values[:_MOST_VALUES])
    return shown if len(values) <= _MOST_VALUES else f"{shown}, ... ({len(values)})"


def _span(low: object, high: object) -> str:
    """A range's lower end belongs to it, its upper end does not."""
    if low is None:
        return "all" if high is None else f"below {high}"
    return f"from {low}" if high is None else f"from {low} to below {high}"


@map_.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--connect", is_flag=True, help="Look into the databases too: are the tables and key columns there?")
@output_option
def validate(file: Path, connect: bool, out: Output) -> int:
    """Check a map FILE: every fault is named with its line and its fix.

    Exit code 3 when --connect finds that the databases do not fit the map, 4 when the map itself is refused.
    """
    from shardkit.shardmap import ShardMap

    checked = ShardMap.load(file)
    findings: list[str] = []
    if connect:
        from shardkit.adoption.fit import misfits
        from shardkit.credentials import from_environment

        findings = misfits(checked, from_environment())
    out.result(
        {
            "file": str(file),
            "cluster": checked.cluster,
            "keyspaces": list(checked.keyspaces),
            "shards": list(checked.shards),
            "findings": findings,
        }
    )
    for finding in findings:
        out.line(finding)
    if findings:
        out.warning(f"the databases do not fit {file}: {_counted(len(findings), 'finding')}")
        return 3
    out.done(
        f"{file} is good: cluster {checked.cluster}, {_counted(len(checked.keyspaces), 'keyspace')}, "
        f"{_counted(len(checked.tables), 'table')}, {_counted(len(checked.shards), 'shard')}"
    )
    return 0


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@map_.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@map_option
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option(
    "--force-placement",
    is_flag=True,
    help="Publish although rows would be looked for where they are not. For rows that were moved by other means.",
)
@yes_option
@output_option
def apply(file: Path, map_source: str, dry_run: bool, force_placement: bool, yes: bool, out: Output) -> None:
    """Publish the map in FILE as the next version.

    Nothing is written when somebody else has published meanwhile, or when FILE was made from an older version.
    Buckets are not moved by this: 'shardkit rebalance' moves the rows, then the buckets.
    """
    from shardkit.errors import MapNotFound
    from shardkit.shardmap import ShardMap

    new = ShardMap.load(file)
    with map_store(map_source) as store:
        _refuse_own_file(file, store)
        try:
            current = store.load()
        except MapNotFound:
            if not dry_run:
                new = store.publish(new, expected_version=0)
            out.result({"published": not dry_run, "version": new.version if not dry_run else 1, "changes": []})
            out.done(f"{'would publish' if dry_run else 'published'} the first map of cluster {new.cluster}, version 1")
            return
        _refuse_old_file(file, new, current)
        new = new.with_moves(new.moves or current.moves)
        diff = current.diff(new)
        changes = [{"effect": change.effect.value, "change": change.line} for change in diff.changes]
        if not diff:
            out.result({"published": False, "version": current.version, "changes": []})
            out.line(f"nothing changes: version {current.version} of {store.source} is this map")
            return
        if dry_run:
            out.result({"published": False, "version": current.version, "changes": changes})
            for line in diff.lines:
                out.line(line)
            return
        _agree(diff, store, out, force_placement=force_placement, yes=yes)
        published = store.publish(new, expected_version=current.version)
        out.result({"published": True, "version": published.version, "changes": changes})
        out.done(f"published version {published.version} of the map of cluster {new.cluster}")


def _refuse_own_file(file: Path, store: MapStore) -> None:
    from shardkit.errors import PreconditionFailed
    from shardkit.mapstore import FileMapStore

    if isinstance(store, FileMapStore) and file.absolute() == store.path:
        raise PreconditionFailed(
            f"{file} is the published map itself",
            hint="edit a copy and apply that; a change in place is seen by nobody before its version is raised",
        )


def _refuse_old_file(file: Path, new: ShardMap, current: ShardMap) -> None:
    """A file without a version counts as made from the current one."""
    from shardkit.errors import MapConflict

    if new.version not in {0, current.version}:
        raise MapConflict(
            f"{file} was made from version {new.version}, but version {current.version} is published: "
            "nothing was written",
            hint="make the change again in what 'shardkit map show --yaml' prints",
        )


def _agree(diff: MapDiff, store: MapStore, out: Output, *, force_placement: bool, yes: bool) -> None:
    """Refuse what loses sight of rows; ask before what takes something away."""
    from shardkit.errors import PreconditionFailed
    from shardkit.mapdiff import Effect

    relocating = diff.with_effect(Effect.RELOCATES)
    if relocating and not force_placement:
        more = f", and {len(relocating) - 1} more" if len(relocating) > 1 else ""
        raise PreconditionFailed(
            f"rows would be looked for where they are not ({relocating[0]}{more}); nothing was written",
            hint="move them with 'shardkit rebalance plan'; or give --force-placement when the rows are there already",
        )
    if not relocating and not diff.with_effect(Effect.REMOVES):
        for line in diff.lines:
            out.line(line)
        return
    clients = len(store.clients())
    used = f" to {clients} running {'process' if clients == 1 else 'processes'}" if clients else ""
    plan = [f"{'careful: ' if change.effect is Effect.RELOCATES else ''}{change.line}" for change in diff.changes]
    out.confirm(f"Publish this{used}?", yes=yes, plan=plan)


@map_.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@map_option
@click.option("--from", "old", type=int, metavar="N", help="Compare from this version, instead of the published one.")
@click.option("--to", "new", type=int, metavar="N", help="Compare to this version, instead of FILE.")
@output_option
def diff(file: Path | None, map_source: str, old: int | None, new: int | None, out: Output) -> int:
    """What would change from the published map to FILE, or between two versions. Exit code 3 when they differ."""
    from shardkit.shardmap import ShardMap

    if file is not None and new is not None:
        raise click.UsageError("give FILE or --to, not both")
    if file is None and new is None and old is None:
        raise click.UsageError("say what to compare: FILE, --from N or --to N")
    with map_store(map_source) as store:
        before = store.load() if old is None else store.load_version(old)
        if file is not None:
            after = ShardMap.load(file)
            after = after.with_moves(after.moves or before.moves)
        else:
            after = store.load() if new is None else store.load_version(new)
    difference = before.diff(after)
    out.result(
        {
            "from": before.version,
            "to": after.version if file is None else str(file),
            "changes": [{"effect": change.effect.value, "change": change.line} for change in difference.changes],
        }
    )
    for line in difference.lines:
        out.line(line)
    if not difference:
        out.line("no difference")
    return 3 if difference else 0


@map_.command()
@map_option
@click.option("-n", "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="The last so many.")
@output_option
def history(map_source: str, limit: int, out: Output) -> None:
    """The versions published, newest first: when, by whom, and what changed."""
    from shardkit.errors import MapNotFound

    rows: list[dict[str, Any]] = []
    with map_store(map_source) as store:
        entries = store.history(limit + 1)
        before: ShardMap | None = None
        for entry in entries:
            try:
                version = store.load_version(entry.version)
            except MapNotFound:  # dropped meanwhile
                continue
            changes = () if before is None else before.diff(version).lines
            first = before is None and entry.version > 1
            rows.append(
                {
                    "version": entry.version,
                    "published_at": entry.published_at,
                    "published_by": entry.published_by,
                    "changes": None if first else changes,
                }
            )
            before = version
    rows = rows[-limit:][::-1]
    out.result({"versions": rows})
    out.table(
        [Column("version", right=True), "published (UTC)", "by", "changes"],
        [
            (
                row["version"],
                row["published_at"].strftime("%Y-%m-%d %H:%M:%S"),
                row["published_by"],
                _summary(row["changes"], first=row["version"] == 1),
            )
            for row in rows
        ],
    )


def _summary(changes: tuple[str, ...] | None, *, first: bool) -> str:
    if first:
        return "the first map"
    if changes is None:
        return ""
    if not changes:
        return "nothing but the version"
    return changes[0] + (f", and {len(changes) - 1} more" if len(changes) > 1 else "")


@map_.command()
@click.option(
    "--from",
    "url",
    required=True,
    metavar="URL",
    help="The database: mysql://host:3306/database or sqlite:///file.db; user and password as everywhere "
    "(SHARDKIT_USER, SHARDKIT_PASSWORD), or in the URL.",
)
@click.option("-o", "--output", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file.")
@click.option("--cluster", metavar="NAME", help="The cluster's name; the database's unless given.")
@click.option("--key", "keys", multiple=True, metavar="TABLE.COLUMN", help="Shard by this key; may be repeated.")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@output_option
def init(url: str, file: Path | None, cluster: str | None, keys: tuple[str, ...], force: bool, out: Output) -> None:
    """Propose a map for an existing database, which becomes the first shard.

    Reads its tables and proposes keyspaces and keys, each with the reason; names what sharding would break. Nothing is
    changed in the database.
    """
    from shardkit.adoption import propose_map
    from shardkit.errors import PreconditionFailed

    if file is not None and file.exists() and not force:
        raise PreconditionFailed(f"{file} exists", hint="choose another name, or give --force to overwrite it")
    proposal = propose_map(url, cluster=cluster, keys=keys)
    if file is not None:
        try:
            file.write_text(proposal.text, encoding="utf-8")
        except OSError as error:
            raise PreconditionFailed(
                f"{file} cannot be written: {error.strerror}", hint="choose another place"
            ) from None
    out.result(
        {"file": None if file is None else str(file), "map": proposal.document, "hazards": list(proposal.hazards)}
    )
    if file is None:
        out.text(proposal.text)
        return
    out.table(
        ["keyspace", "table", "key", Column("rows", right=True), "why"],
        [
            (
                choice.keyspace,
                choice.table,
                choice.key,
                None if choice.rows is None else f"~{count(choice.rows)}",
                choice.why,
            )
            for choice in proposal.choices
        ],
    )
    for hazard in proposal.hazards:
        out.warning(hazard)
    out.done(f"wrote {file}; read it, then 'shardkit map apply {file} --map SOURCE'")
