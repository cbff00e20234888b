"""The questions that the demo asks the cluster, each an ordinary SQLAlchemy statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import Select, func, select

from shardkit.demo.models import Airline, DailyVisits, Flight, Plane, Weather


@dataclass(frozen=True)
class Question:
    """One question: what is asked, how, and how an answer row reads."""

    text: str
    statement: Select[*tuple[Any, ...]]
    show: Callable[[Any], str]


def questions() -> Iterator[Question]:
    """One by key, one over all shards with ORDER BY and LIMIT, a count, a list key, a join, and a whole table."""
    yield Question(
        "Where did the plane N14228 fly first?",
        select(Flight).where(Flight.tailnum == "N14228").order_by(Flight.time_hour, Flight.id).limit(3),
        lambda row: _flight(row[0]),
    )
    yield Question(
        "Which flights left latest?",
        select(Flight).where(Flight.dep_delay.is_not(None)).order_by(Flight.dep_delay.desc(), Flight.id).limit(5),
        lambda row: f"{_flight(row[0])}, {row[0].dep_delay} minutes late",
    )
    yield Question(
        "How many flights were there?",
        select(func.count()).select_from(Flight),
        lambda row: f"{row[0]:,}",
    )
    yield Question(
        "How many of them have no tail number? (NULL is a key like any other)",
        select(func.count()).select_from(Flight).where(Flight.tailnum.is_(None)),
        lambda row: f"{row[0]:,}",
    )
    yield Question(
        "Who flew N14228, and what plane is it? (planes and airlines are on every shard)",
        select(Plane.manufacturer, Plane.model, Airline.name)
        .select_from(Flight)
        .join(Plane, Plane.tailnum == Flight.tailnum)
        .join(Airline, Airline.carrier == Flight.carrier)
        .where(Flight.tailnum == "N14228")
        .limit(1),
        lambda row: f"{row[2]}: {row[0]} {row[1]}",
    )
    yield Question(
        "How busy was Los Angeles on Independence Day?",
        select(DailyVisits.flights).where(DailyVisits.airport == "LAX", DailyVisits.day == date(2013, 7, 4)),
        lambda row: f"{row[0]} flights",
    )
    yield Question(
        "When was it coldest?",
        select(Weather.origin, Weather.time_hour, Weather.temp)
        .where(Weather.temp.is_not(None))
        .order_by(Weather.temp, Weather.id)
        .limit(1),
        lambda row: f"{row[1]:%d %B, %H:00} UTC at {row[0]}: {row[2]} °F",
    )


def _flight(flight: Flight) -> str:
    number = f"{flight.carrier} {flight.flight}"
    return f"{flight.year}-{flight.month:02}-{flight.day:02} {number} {flight.origin} -> {flight.dest}"
