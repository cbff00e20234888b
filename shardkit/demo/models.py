"""The demo's tables: plain SQLAlchemy models. Nothing here knows that they are sharded."""

from __future__ import annotations

from datetime import date, datetime

from sqlalchemy import BigInteger, DateTime, Double, Index, SmallInteger, String
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# A string key must compare byte by byte and must not be padded: two keys that the database takes for one and shardkit
# for two would be on two shards. The two flavours name that collation differently.
KEY_COLLATION = {"mariadb": "utf8mb4_nopad_bin", "mysql": "utf8mb4_0900_bin"}


def code(length: int) -> String:
    """A short string that can be a shard key on every database."""
    text = String(length)
    for dialect, collation in KEY_COLLATION.items():
        text = text.with_variant(mysql.VARCHAR(length, charset="utf8mb4", collation=collation), dialect)
    return text


class Base(DeclarativeBase):
    """The demo's tables."""


class Airline(Base):
    """A reference table: on every shard."""

    __tablename__ = "airlines"
    carrier: Mapped[str] = mapped_column(code(2), primary_key=True)
    name: Mapped[str] = mapped_column(String(80))


class Airport(Base):
    """A reference table: on every shard."""

    __tablename__ = "airports"
    faa: Mapped[str] = mapped_column(code(4), primary_key=True)
    name: Mapped[str] = mapped_column(String(80))
    lat: Mapped[float] = mapped_column(Double())
    lon: Mapped[float] = mapped_column(Double())
    alt: Mapped[int]
    tz: Mapped[int] = mapped_column(SmallInteger)
    dst: Mapped[str] = mapped_column(String(1))
    tzone: Mapped[str | None] = mapped_column(String(40))


class Plane(Base):
    """A reference table: on every shard."""

    __tablename__ = "planes"
    tailnum: Mapped[str] = mapped_column(code(6), primary_key=True)
    year: Mapped[int | None] = mapped_column(SmallInteger)
    type: Mapped[str] = mapped_column(String(40))
    manufacturer: Mapped[str] = mapped_column(String(40))
    model: Mapped[str] = mapped_column(String(40))
    engines: Mapped[int] = mapped_column(SmallInteger)
    seats: Mapped[int] = mapped_column(SmallInteger)
    speed: Mapped[int | None] = mapped_column(SmallInteger)
    engine: Mapped[str] = mapped_column(String(20))


class Flight(Base):
    """Sharded by the hash of the tail number; a flight without one has the key NULL."""

    __tablename__ = "flights"
    __table_args__ = (Index("flights_by_tail", "tailnum", "time_hour"),)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    tailnum: Mapped[str | None] = mapped_column(code(6))
    year: Mapped[int] = mapped_column(SmallInteger)
    month: Mapped[int] = mapped_column(SmallInteger)
    day: Mapped[int] = mapped_column(SmallInteger)
    dep_time: Mapped[int | None] = mapped_column(SmallInteger)
    sched_dep_time: Mapped[int] = mapped_column(SmallInteger)
    dep_delay: Mapped[int | None] = mapped_column(SmallInteger)
    arr_time: Mapped[int | None] = mapped_column(SmallInteger)
    sched_arr_time: Mapped[int] = mapped_column(SmallInteger)
    arr_delay: Mapped[int | None] = mapped_column(SmallInteger)
    carrier: Mapped[str] = mapped_column(code(2))
    flight: Mapped[int]
    origin: Mapped[str] = mapped_column(code(4))
    dest: Mapped[str] = mapped_column(code(4))
    air_time: Mapped[int | None] = mapped_column(SmallInteger)
    distance: Mapped[int]
    time_hour: Mapped[datetime] = mapped_column(DateTime)


class DailyVisits(Base):
    """Sharded by a list of airports: the reference design's sharding by region."""

    __tablename__ = "daily_visits"
    airport: Mapped[str] = mapped_column(code(4), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    flights: Mapped[int]


class Weather(Base):
    """A whole table on one shard: vertical sharding."""

    __tablename__ = "weather"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    origin: Mapped[str] = mapped_column(code(4))
    time_hour: Mapped[datetime] = mapped_column(DateTime)
    temp: Mapped[float | None] = mapped_column(Double())
    dewp: Mapped[float | None] = mapped_column(Double())
    humid: Mapped[float | None] = mapped_column(Double())
    wind_dir: Mapped[int | None] = mapped_column(SmallInteger)
    wind_speed: Mapped[float | None] = mapped_column(Double())
    wind_gust: Mapped[float | None] = mapped_column(Double())
    precip: Mapped[float | None] = mapped_column(Double())
    pressure: Mapped[float | None] = mapped_column(Double())
    visib: Mapped[float | None] = mapped_column(Double())
