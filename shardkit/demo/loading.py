"""Putting the flight data into the cluster through the session factory, as an application would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from shardkit.cluster import Cluster
from shardkit.demo import data
from shardkit.demo.models import Airline, Airport, Base, DailyVisits, Flight, Plane, Weather
from shardkit.session import sessionmaker

#: Rows of one INSERT and of one transaction.
BATCH = 2_000
#: Told after each batch: how many rows of which table are in.
Progress = Callable[[str, int], None]


def load(cluster: Cluster, progress: Progress, *, month: int | None = None) -> dict[str, int]:
    """Load everything, or one month of flights with their visits and weather.

    :returns: rows by table.
    """
    factory = sessionmaker(cluster)
    rows = {
        "airlines": _insert(factory, Airline, data.airlines(), progress),
        "airports": _insert(factory, Airport, data.airports(), progress),
        "planes": _insert(factory, Plane, data.planes(), progress),
        "weather": _insert(factory, Weather, data.weather(month), progress),
    }
    rows["daily_visits"] = _insert_by_shard(
        cluster, factory, DailyVisits, data.daily_visits(data.flights(month)), "airport", progress
    )
    rows["flights"] = _insert_by_shard(cluster, factory, Flight, data.flights(month), "tailnum", progress)
    return rows


def _insert(factory: Callable[[], Session], model: type[Base], rows: Iterable[data.Row], progress: Progress) -> int:
    count = 0
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH)):
        with factory() as session, session.begin():
            # without render_nulls, SQLAlchemy sends a statement for each pattern of missing values
            session.execute(insert(model), batch, execution_options={"render_nulls": True})
        count += len(batch)
        progress(model.__tablename__, len(batch))
    return count


def _insert_by_shard(
    cluster: Cluster,
    factory: Callable[[], Session],
    model: type[Base],
    rows: Iterable[data.Row],
    key: str,
    progress: Progress,
) -> int:
    """Each transaction holds rows of one shard, so that it is an ordinary transaction of one database."""
    return sum(
        _insert(factory, model, batch, progress) for batch in batches_by_shard(cluster, model.__tablename__, rows, key)
    )


def batches_by_shard(cluster: Cluster, table: str, rows: Iterable[data.Row], key: str) -> Iterator[list[data.Row]]:
    """Sort rows into batches of one shard each."""
    waiting: dict[str, list[data.Row]] = {}
    shard_of: dict[Any, str] = {}
    for row in rows:
        value = row[key]
        if value not in shard_of:
            shard_of[value] = cluster.locate(table, **{key: value}).shard
        batch = waiting.setdefault(shard_of[value], [])
        batch.append(row)
        if len(batch) == BATCH:
            yield waiting.pop(shard_of[value])
    yield from waiting.values()
