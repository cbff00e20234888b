"""A small shop over three shards, for tests of sessions: on SQLite files, or in databases of one server.

What stands on which shard is read through plain connections of our own, never through the code under test.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from shardkit.shardmap import ShardMap
from shardkit.topology import Endpoint

SHARDS = ("shop-0", "shop-1", "shop-2")
KEY_COLLATION = {"mariadb": "utf8mb4_nopad_bin", "mysql": "utf8mb4_0900_bin"}


class Base(DeclarativeBase):
    """The shop's tables. Nothing here knows that they are sharded."""

    type_annotation_map = {int: sa.BigInteger().with_variant(sa.Integer, "sqlite"), str: sa.String(100)}  # noqa: RUF012


class User(Base):
    """Sharded by its primary key."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]
    age: Mapped[int | None]
    bio: Mapped[str | None] = mapped_column(deferred=True)
    orders: Mapped[list[Order]] = relationship(back_populates="user", order_by="Order.id", cascade="all, delete-orphan")


class Order(Base):
    """Sharded by its user: the primary key does not say where an order is."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_id: Mapped[int] = mapped_column(sa.ForeignKey("users.id"))
    item: Mapped[str]
    amount: Mapped[int] = mapped_column(default=1)
    country_code: Mapped[str | None] = mapped_column(sa.String(2))
    user: Mapped[User] = relationship(back_populates="orders")
    country: Mapped[Country | None] = relationship(
        primaryjoin="foreign(Order.country_code) == Country.code", viewonly=True
    )


class Message(Base):
    """Sharded by its sender; the recipient may live elsewhere."""

    __tablename__ = "messages"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sender_id: Mapped[int]
    recipient_id: Mapped[int]
    text: Mapped[str]
    sender: Mapped[User] = relationship(primaryjoin="foreign(Message.sender_id) == User.id", viewonly=True)
    recipient: Mapped[User] = relationship(primaryjoin="foreign(Message.recipient_id) == User.id", viewonly=True)


class Note(Base):
    """Sharded by its owner, with an id that shardkit makes."""

    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int]
    text: Mapped[str]


class Country(Base):
    """A reference table."""

    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(sa.String(2), primary_key=True)
    name: Mapped[str]


class Invoice(Base):
    """A vertical table: whole, on the last shard."""

    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]


def key_text(length: int) -> sa.String:
    """A string that can be a shard key on every database."""
    text = sa.String(length)
    for dialect, collation in KEY_COLLATION.items():
        text = text.with_variant(mysql.VARCHAR(length, charset="utf8mb4", collation=collation), dialect)
    return text


class Visit(Base):
    """Sharded by region, as a list."""

    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    region: Mapped[str] = mapped_column(key_text(20))
    count: Mapped[int]


def shop_document(endpoints: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The shop's shard map, over these shards: name -> master, staging, replicas as URLs."""
    first, second, third = endpoints
    return {
        "format": 1,
        "cluster": "shop",
        "keyspaces": {
            "orders": {
                "partition": {"by": "hash", "buckets": 60},
                "tables": {"users": "id", "orders": "user_id", "messages": "sender_id"},
                "reference": ["countries"],
                "placement": {first: "0-19", second: "20-39", third: "40-59"},
            },
            "notes": {
                "partition": {"by": "hash", "buckets": 60},
                "tables": {"notes": "owner_id"},
                "ids": "generated",
                "placement": {first: "0-19", second: "20-39", third: "40-59"},
            },
            "visits": {
                "partition": {
                    "by": "list",
                    "buckets": {"seoul": ["서울"], "daegu": ["대구"], "rest": ["대전", "부산"]},
                },
                "tables": {"visits": "region"},
                "placement": {first: ["seoul"], second: ["daegu"], third: ["rest"]},
            },
            "billing": {"tables": ["invoices"], "placement": third},
        },
        "shards": dict(endpoints),
    }


@dataclass
class Databases:
    """The shop's databases, seen from outside.

    :ivar masters: shard -> its master.
    :ivar connect: opens a plain DBAPI connection to an endpoint.
    """

    masters: Mapping[str, Endpoint]
    connect: Callable[[Endpoint], Any]

    def map(self, replicas: Mapping[str, list[Endpoint]] | None = None) -> ShardMap:
        """The shop over these databases."""
        return ShardMap.parse(
            shop_document(
                {
                    shard: {
                        "master": master.url,
                        "replicas": [replica.url for replica in (replicas or {}).get(shard, [])],
                    }
                    for shard, master in self.masters.items()
                }
            )
        )

    def execute(self, endpoint: Endpoint, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement on a connection of its own, committed."""
        with closing(self.connect(endpoint)) as connection:
            cursor = connection.cursor()
            cursor.execute(sql)
            rows = list(cursor.fetchall())
            connection.commit()
            return rows

    def rows(self, shard: str, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
        """What stands in a table of one shard, in order."""
        return sorted(tuple(row) for row in self.execute(self.masters[shard], f"SELECT {columns} FROM {table}"))

    def where(self, table: str, columns: str = "id") -> dict[str, list[Any]]:
        """Shard -> what stands in its table; single columns as plain values."""
        found = {shard: self.rows(shard, table, columns) for shard in self.masters}
        if "," in columns or columns == "*":
            return dict(found)
        return {shard: [row[0] for row in rows] for shard, rows in found.items()}


def sqlite_databases(directory: Any) -> Databases:
    """Three SQLite files."""
    masters = {shard: Endpoint("", 0, str(directory / f"{shard}.db"), "sqlite") for shard in SHARDS}
    return Databases(masters, lambda endpoint: sqlite3.connect(endpoint.database))
