"""Moving a tenth of the flights to the other shard, and looking at every row afterwards."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import func, select

from shardkit.cli.output import Output
from shardkit.cli.progress import Progress, Task
from shardkit.cluster import Cluster
from shardkit.demo.models import Flight
from shardkit.demo.pipeline import Pipeline
from shardkit.errors import DifferencesFound
from shardkit.partition import Bucket
from shardkit.rebalance import Job, MoveBuckets, apply_plan, plan_move
from shardkit.rebalance import Progress as JobProgress

#: Where a row is (the shard) and what is in it (a checksum of its columns).
Row = tuple[str, int]


class _Shown:
    """Shows a job's progress as bars, one for each stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Task | None = None
        self._label = ""

    def entered(self, job: Job) -> None:
        """The job is in another state."""
        self._end()
        self._label = f"    {job.state}"

    def progressed(self, job: Job, progress: JobProgress) -> None:  # noqa: ARG002 - the protocol's signature
        """So many rows are copied, compared or deleted."""
        if self._task is None:
            self._task = self._progress.task(self._label, total=progress.total, unit="rows")
        self._task.at(progress.done)

    def noted(self, job: Job, text: str) -> None:  # noqa: ARG002 - the protocol's signature
        """Something worth a line."""
        self._progress.line(f"    {text}")

    def _end(self) -> None:
        if self._task is not None:
            self._task.finish()
            self._task = None


def move_a_tenth(cluster: Cluster, pipeline: Pipeline, out: Output) -> dict[str, Any]:
    """Move buckets that hold a tenth of the flights, then compare all rows with what they were.

    :raises DifferencesFound: when a row is lost, doubled, changed, or not where the map says.
    """
    source, target = cluster.map.keyspaces["flights"].shards
    before = _rows(cluster)
    buckets, expected = _a_tenth(cluster, source)
    plan = plan_move(cluster, MoveBuckets(tuple(buckets), target), keyspace="flights")
    out.line(f"Moving {len(buckets)} buckets with {expected:,} flights from {source} to {target}:", style="bold")
    with out.progress() as progress:
        apply_plan(cluster, plan, observer=_Shown(progress))
        waiting = progress.task("Waiting for the replicas", unit="")
        pipeline.wait_until_level()
        waiting.finish()
    cluster.refresh()
    moved = _compare(before, _rows(cluster), cluster)
    pipeline.checksums()
    out.line(
        f"All {len(before):,} flights are there once, unchanged, and on the shard that the map names "
        f"(version {cluster.map.version}); {moved:,} of them have moved. Master, staging and replicas are equal."
    )
    return {"rows": len(before), "moved": moved}


def _a_tenth(cluster: Cluster, source: str) -> tuple[list[Bucket], int]:
    keyspace = cluster.map.keyspaces["flights"]
    partition = keyspace.partition
    if partition is None:
        raise TypeError("the flights are sharded by hash")
    per_tail = select(Flight.tailnum, func.count()).group_by(Flight.tailnum)
    weights: Counter[Bucket | None] = Counter()
    total = 0
    for shard in keyspace.shards:
        with cluster.engine(shard).connect() as connection:
            for tail, count in connection.execute(per_tail):
                weights[partition.bucket_of((tail,))] += count
                total += count
    chosen: list[Bucket] = []
    held = 0
    for bucket in reversed(keyspace.buckets_on(source)):
        if held >= total // 10:
            break
        chosen.append(bucket)
        held += weights[bucket]
    return chosen[::-1], held


def _rows(cluster: Cluster) -> dict[int, Row]:
    """Every flight, read from the masters themselves, past the router.

    :raises DifferencesFound: when a flight is on two shards.
    """
    columns = [func.coalesce(column, "-") for column in Flight.__table__.columns]
    statement = select(Flight.id, func.crc32(func.concat_ws("|", *columns)))
    rows: dict[int, Row] = {}
    for shard in cluster.map.keyspaces["flights"].shards:
        with cluster.engine(shard).connect() as connection:
            for number, checksum in connection.execute(statement):
                if number in rows:
                    raise DifferencesFound(f"flight {number} is on {rows[number][0]} and on {shard}")
                rows[number] = (shard, checksum)
    return rows


def _compare(before: dict[int, Row], after: dict[int, Row], cluster: Cluster) -> int:
    if before.keys() != after.keys():
        raise DifferencesFound(f"{len(before.keys() ^ after.keys())} flights were lost or made up")
    changed = [number for number, (_, checksum) in before.items() if after[number][1] != checksum]
    if changed:
        raise DifferencesFound(f"{len(changed)} flights have changed on the way")
    for shard in cluster.map.keyspaces["flights"].shards:
        with cluster.engine(shard).connect() as connection:
            tails = connection.scalars(select(Flight.tailnum).distinct())
            strays = [tail for tail in tails if cluster.locate("flights", tailnum=tail).shard != shard]
        if strays:
            raise DifferencesFound(f"{shard} still has flights of {len(strays)} planes that belong elsewhere")
    return sum(before[number][0] != shard for number, (shard, _) in after.items())
