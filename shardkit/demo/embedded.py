"""``shardkit demo --embedded``: the routing half on two SQLite files and a map in a file."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from shardkit.cli.output import Output
from shardkit.cluster import create_cluster
from shardkit.demo import data
from shardkit.demo.answers import ask_all
from shardkit.demo.layout import flights_map
from shardkit.demo.loading import load
from shardkit.demo.models import Base
from shardkit.topology import Endpoint, Shard

#: One month is enough to see the routes, and loads in seconds.
MONTH = 7


def run(out: Output, *, keep: bool) -> None:
    """Load July into two SQLite shards and ask the questions.

    :param keep: leave the folder with the databases and the map, and say where it is.
    """
    folder = Path(tempfile.mkdtemp(prefix="shardkit-demo-"))
    try:
        _run(out, folder)
        if keep:
            out.line()
            out.line(f"The databases and the map are in {folder}")
            out.line(f"    shardkit where flights tailnum=N14228 --map {folder / 'shardmap.yaml'}")
    finally:
        if not keep:
            shutil.rmtree(folder)


def _run(out: Output, folder: Path) -> None:
    shards = {
        name: Shard(name, Endpoint("", 0, str(folder / f"{name}.db"), "sqlite")) for name in ("flights-0", "flights-1")
    }
    written = folder / "shardmap.yaml"
    written.write_text(flights_map(shards).dump(), encoding="utf-8")
    with create_cluster(f"file:{written}") as cluster:
        cluster.create_all(Base.metadata)
        with out.progress() as progress:
            task = progress.task("Loading the flights of July 2013 into two SQLite shards", unit="rows")
            rows = load(cluster, lambda _table, count: task.advance(count), month=MONTH)
            task.finish()
        counts = ", ".join(f"{count:,} {table}" for table, count in rows.items())
        out.line(f"Loaded {counts}.")
        answers = ask_all(cluster, out, read_from="master")
    out.result({"rows": rows, "answers": answers})
    out.line()
    out.line(f"The whole data are {data.FLIGHTS:,} flights: 'shardkit demo' runs them on real servers.", style="dim")
