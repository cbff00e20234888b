"""A shop on one SQLite database with all rows, and the same rows spread over shards: what the router is compared on."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import StaticPool

from shardkit.routing.merge import merge_rows
from shardkit.routing.planner import Planner
from shardkit.routing.route import Route, RouteOptions
from shardkit.shardmap import ShardMap

MAP: Mapping[str, Any] = {
    "format": 1,
    "cluster": "shop",
    "keyspaces": {
        "orders": {
            "partition": {"by": "hash", "buckets": 16},
            "tables": {"users": "id", "orders": "user_id", "lines": "user_id"},
            "reference": ["countries", "currencies"],
            "placement": {"s0": "0-1, 6-7, 12-13", "s1": "2-3, 8-9, 14", "s2": "4-5, 10-11, 15"},
        },
        "reads": {
            "partition": {"by": "hash", "buckets": 8},
            "tables": {"reads": ["tenant", "day"]},
            "placement": {"s0": "0-2", "s1": "3-5", "s2": "6-7"},
        },
        "stores": {
            "partition": {"by": "list", "buckets": {"north": ["seoul", "incheon"], "south": ["busan"], "rest": [None]}},
            "tables": {"stores": "region", "visits": "region"},
            "placement": {"s0": ["north"], "s1": ["south"], "s2": ["rest"]},
        },
        "members": {
            "partition": {"by": "range", "buckets": {"teens": [None, 20], "twenties": [20, 30], "older": [30, None]}},
            "tables": {"members": "age"},
            "placement": {"s0": ["teens"], "s1": ["twenties"], "s2": ["older"]},
        },
        "billing": {"tables": ["invoices", "payments"], "placement": "s3"},
    },
    "shards": {name: {"master": f"mysql://10.0.0.{n}:3306/shop"} for n, name in enumerate(("s0", "s1", "s2", "s3"), 1)},
}


def shop_map(**changes: Any) -> ShardMap:
    """The map of the shop."""
    return ShardMap.parse({**MAP, **changes})


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str | None] = mapped_column(sa.String(20))
    age: Mapped[int | None]
    country: Mapped[str | None] = mapped_column(sa.String(2))
    balance: Mapped[Decimal | None] = mapped_column(sa.Numeric(10, 2))
    born: Mapped[date | None]
    orders: Mapped[list[Order]] = relationship(
        primaryjoin="User.id == foreign(Order.user_id)", order_by="Order.id", back_populates="user"
    )


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_id: Mapped[int | None]
    amount: Mapped[int | None]
    note: Mapped[str | None] = mapped_column(sa.String(20))
    giver: Mapped[int | None]
    user: Mapped[User | None] = relationship(primaryjoin="User.id == foreign(Order.user_id)", back_populates="orders")
    present_of: Mapped[User | None] = relationship(primaryjoin="User.id == foreign(Order.giver)", viewonly=True)


class Line(Base):
    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_id: Mapped[int | None]
    order_id: Mapped[int | None]
    price: Mapped[Decimal | None] = mapped_column(sa.Numeric(10, 2))


class Country(Base):
    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(sa.String(2), primary_key=True)
    title: Mapped[str | None] = mapped_column(sa.String(20))


class Currency(Base):
    __tablename__ = "currencies"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(sa.String(3))
    changed: Mapped[datetime] = mapped_column(server_default=sa.func.now())


class Read(Base):
    __tablename__ = "reads"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant: Mapped[int | None]
    day: Mapped[int | None]
    value: Mapped[int | None]


class Store(Base):
    __tablename__ = "stores"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    region: Mapped[str | None] = mapped_column(sa.String(20))
    size: Mapped[int | None]


class Visit(Base):
    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    region: Mapped[str | None] = mapped_column(sa.String(20))
    store_id: Mapped[int | None]


class Member(Base):
    __tablename__ = "members"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    age: Mapped[int | None]
    name: Mapped[str | None] = mapped_column(sa.String(20))


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    user_id: Mapped[int | None]


class Payment(Base):
    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    invoice_id: Mapped[int | None]


def memory_engine() -> sa.Engine:
    """An empty SQLite database in memory, with the functions that a shard has."""
    made = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})

    @event.listens_for(made, "connect")
    def connect(connection: Any, record: Any) -> None:
        connection.create_function(
            "crc32", 1, lambda text: None if text is None else zlib.crc32(str(text).encode()), deterministic=True
        )

    return made


def engine() -> sa.Engine:
    """An empty shop in memory."""
    made = memory_engine()
    Base.metadata.create_all(made)
    return made


class Shop:
    """One database with all rows, and one for each shard with its own."""

    def __init__(self, shard_map: ShardMap | None = None) -> None:
        self.map = shard_map or shop_map()
        self.planner = Planner(self.map, dialect_name="sqlite")
        self.whole = engine()
        self.shards = {name: engine() for name in self.map.shards}

    def close(self) -> None:
        for each in (self.whole, *self.shards.values()):
            each.dispose()

    # --- rows

    def fill(self, rows: Mapping[type[Base], Sequence[Mapping[str, Any]]]) -> None:
        """Put rows where they belong."""
        for model, values in rows.items():
            table: Any = model.__table__
            info = self.map.table(table.name)
            if not values:
                continue
            with self.whole.begin() as connection:
                connection.execute(table.insert(), list(values))
            by_shard: dict[str, list[Mapping[str, Any]]] = {}
            for row in values:
                if info.kind == "reference":
                    homes = info.shards
                elif info.kind == "vertical":
                    homes = (info.keyspace.placement["all"],)
                else:
                    homes = (self.map.locate(table.name, [row[column] for column in info.key]).shard,)
                for home in homes:
                    by_shard.setdefault(home, []).append(row)
            for shard, own in by_shard.items():
                with self.shards[shard].begin() as connection:
                    connection.execute(table.insert(), own)

    def copy_to(self, shard: str, model: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
        """Put rows where they do not belong: what a rebalance job has copied."""
        with self.shards[shard].begin() as connection:
            connection.execute(sa.insert(model.__table__), list(rows))

    # --- statements

    def route(self, statement: Any, parameters: Any = None, **options: Any) -> Route:
        return self.planner.plan(statement, parameters, RouteOptions(**options))

    def over_shards(self, statement: Any, parameters: Any = None, **options: Any) -> list[tuple[Any, ...]]:
        """The merged rows of a SELECT."""
        route = self.route(statement, parameters, **options)
        if route.first is None:
            return self.answer(route)
        answers = [
            feed.values_of(row[0] for row in self.over_shards(feed.statement, parameters)) for feed in route.first.feeds
        ]
        return self.over_shards(route.first.fed(answers), parameters, **options)

    def answer(self, route: Route) -> list[tuple[Any, ...]]:
        unique = route.merge is None or route.merge.unique
        streams = [
            list(_rows(self.shards[shard], route.statement_for(shard), route.parameters_for(shard), unique=unique))
            for shard in route.shards
        ]
        if route.merge is not None:
            rows = list(merge_rows(route.merge, streams))
            return list(dict.fromkeys(rows)) if _repeats(route.statement) else rows
        assert len(streams) <= 1, "several shards without a merge"
        return streams[0] if streams else []

    def at_once(self, statement: Any, parameters: Any = None) -> list[tuple[Any, ...]]:
        """The rows that one database gives."""
        return list(_rows(self.whole, statement, parameters))

    def change(self, statement: Any, parameters: Any = None, **options: Any) -> Route:
        """Execute a write on the shards, and on the one database."""
        route = self.route(statement, parameters, **options)
        for shard in route.shards:
            with self.shards[shard].begin() as connection:
                connection.execute(_core(route.statement_for(shard)), route.parameters_for(shard))
        with self.whole.begin() as connection:
            connection.execute(_core(statement), parameters)
        return route

    def contents(self, model: type[Base]) -> tuple[Counter[Any], Counter[Any]]:
        """All rows of a table: over the shards, and at once."""
        statement = sa.select(model.__table__)
        info = self.map.table(model.__table__.name)
        spread = info.shards[:1] if info.kind == "reference" else info.shards
        over: Counter[Any] = Counter()
        for shard in spread:
            over.update(_rows(self.shards[shard], statement, None))
        return over, Counter(_rows(self.whole, statement, None))


def _core(statement: Any) -> Any:
    return statement


def _rows(engine: sa.Engine, statement: Any, parameters: Any, *, unique: bool = True) -> Iterator[tuple[Any, ...]]:
    with Session(engine) as session:
        result = session.execute(statement, parameters)
        if result._unique_filter_state is not None:
            if unique:
                result = result.unique()
            else:
                result._unique_filter_state = None
        for row in result.all():
            yield tuple(_plain(each) for each in row)


def _repeats(statement: Any) -> bool:
    """Whether joined collections repeat rows, so that ``unique()`` has to be asked for."""
    return any(
        "joined" in str(strategy) or "contains_eager" in str(strategy)
        for option in getattr(statement, "_with_options", ())
        for element in getattr(option, "context", ())
        for strategy in (element.strategy, element.local_opts)
    )


def _plain(value: Any) -> Any:
    """An object as its columns, its loaded collections included: comparable, and free of its session."""
    if not isinstance(value, Base):
        return value
    state = sa.inspect(value)
    columns = tuple((each.key, getattr(value, each.key)) for each in state.mapper.column_attrs)
    loaded = []
    for relation in state.mapper.relationships:
        if relation.key in state.dict:
            related = getattr(value, relation.key)
            members = related if isinstance(related, list) else [related]
            loaded.append((relation.key, tuple(None if m is None else m.id for m in members)))
    return (type(value).__name__, columns, tuple(loaded))


ROWS: Mapping[type[Base], Sequence[Mapping[str, Any]]] = {
    User: [
        {
            "id": n,
            "name": None if n % 7 == 3 else ("ann", "Bob", "bob", "Zoë", "zoe", "", " x")[n % 7],
            "age": None if n % 5 == 0 else 10 + n % 4,
            "country": (None, "kr", "de", "fr", "xx")[n % 5],
            "balance": None if n % 6 == 0 else Decimal(n) / 4,
            "born": None if n % 4 == 0 else date(1990 + n % 3, 1 + n % 12, 1),
        }
        for n in range(24)
    ],
    Order: [
        {
            "id": n,
            "user_id": None if n % 9 == 0 else n % 26,
            "amount": None if n % 8 == 0 else n % 6,
            "note": (None, "a", "b", "A")[n % 4],
            "giver": None if n % 3 else (n * 5) % 24,
        }
        for n in range(60)
    ],
    Line: [{"id": n, "user_id": (n % 20) % 26, "order_id": n % 20, "price": Decimal(n % 9) / 2} for n in range(40)],
    Country: [{"code": "kr", "title": "Korea"}, {"code": "de", "title": "Germany"}, {"code": "no", "title": None}],
    Read: [
        {"id": n, "tenant": None if n % 11 == 0 else n % 5, "day": None if n % 7 == 0 else n % 4, "value": n % 6}
        for n in range(40)
    ],
    Store: [{"id": n, "region": ("seoul", "incheon", "busan", None)[n % 4], "size": n % 3} for n in range(12)],
    Visit: [{"id": n, "region": ("seoul", "incheon", "busan", None)[n % 4], "store_id": n % 12} for n in range(30)],
    Member: [{"id": n, "age": None if n % 8 == 0 else 8 + n, "name": f"m{n % 5}"} for n in range(40)],
    Invoice: [{"id": n, "user_id": n % 24} for n in range(10)],
    Payment: [{"id": n, "invoice_id": n % 10} for n in range(15)],
}
