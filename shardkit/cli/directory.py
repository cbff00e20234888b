"""``shardkit directory``: which bucket the keys of a keyspace by directory are in."""

from __future__ import annotations

import rich_click as click

from shardkit.cli.options import map_option, map_store, output_option
from shardkit.cli.output import Output

# what they use imports SQLAlchemy: inside the commands, so that --help is quick


@click.group()
def directory() -> None:
    """The lookup tables of keyspaces by directory."""


@directory.command()
@click.argument("table")
@click.argument("key", metavar="KEY=VALUE")
@click.argument("bucket")
@map_option
@output_option
def assign(table: str, key: str, bucket: str, map_source: str, out: Output) -> None:
    """Decide which BUCKET a new key of TABLE is to be in, before its first row is written.

    The value is taken for what it looks like; 'KEY:str=5' says otherwise. A key that is in a bucket already stays
    there.
    """
    from shardkit.cli.where import in_words, key_of
    from shardkit.cluster import create_cluster

    with create_cluster(map_source) as cluster:
        (given,) = key_of(cluster.map.table(table), (key,))
        place = cluster.assign(table, given.value, bucket)
    out.result({"table": table, "key": given.value, "type": given.type, "bucket": place.bucket, "shard": place.shard})
    out.done(f"{table} {given.column}={given.value!r} is in bucket {place.bucket}, on {place.shard}")
    if given.assumed:
        out.note(f"{given.column} was taken for {in_words(given.type)}; {given.column}:TYPE= says otherwise")


@directory.command()
@click.argument("keyspace")
@click.option("--dry-run", is_flag=True, help="Only look. Exits with 3 if keys are missing.")
@map_option
@output_option
def fill(keyspace: str, dry_run: bool, map_source: str, out: Output) -> int:
    """Enter the keys of rows that were written past shardkit, each where its rows are.

    For a database that existed before its shard map. Reads every table of the KEYSPACE once. Safe beside running
    clients, and safe to repeat. Exit code 1 when keys have rows where no entry can lead to.
    """
    from shardkit.adoption.filing import filer
    from shardkit.credentials import from_environment

    with map_store(map_source) as store:
        shard_map = store.load()
    with filer(shard_map, shard_map.keyspace(keyspace), from_environment()) as made:
        found = made.look()
        entered = 0 if dry_run else made.fill(found)
    out.result({"keys": found.keys, "missing": found.missing, "entered": entered, "astray": found.astray})
    for sentence in found.astray:
        out.warning(sentence)
    if dry_run:
        out.line(f"{found.missing} of {found.keys} keys that have rows are not in the directory")
    else:
        out.done(f"{found.keys} keys have rows; {entered} were entered")
    return 1 if found.astray else 3 if dry_run and found.missing else 0
