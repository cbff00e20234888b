"""Many-to-many relationships over shards: rows of the table between stand where their keys say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload
from sqlalchemy.orm.exc import StaleDataError

import shardkit
from shardkit.cluster import Cluster
from shardkit.errors import KeyChange, MissingKey, SecondShardWritten
from shardkit.shardmap import ShardMap
from tests.integration.conftest import Shop
from tests.integration.shop import SHARDS, shop_document


class Library(DeclarativeBase):
    """Tables of their own."""

    type_annotation_map = {int: sa.BigInteger().with_variant(sa.Integer, "sqlite"), str: sa.String(50)}  # noqa: RUF012


def _number(name: str, *, key: bool = True) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=key)


reader_topics = sa.Table("reader_topics", Library.metadata, _number("reader_id"), _number("topic_id"))
topic_moods = sa.Table("topic_moods", Library.metadata, _number("topic_id"), _number("mood_id"))
shelf_topics = sa.Table("shelf_topics", Library.metadata, _number("reader_id"), _number("number"), _number("topic_id"))
strays = sa.Table("strays", Library.metadata, _number("reader_id"), _number("mood_id"), _number("home", key=False))


class Topic(Library):
    """A reference table."""

    __tablename__ = "topics"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="")
    moods: Mapped[list[Mood]] = relationship(
        secondary=topic_moods,
        primaryjoin="Topic.id == topic_moods.c.topic_id",
        secondaryjoin="Mood.id == topic_moods.c.mood_id",
    )


class Mood(Library):
    """A reference table."""

    __tablename__ = "moods"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Reader(Library):
    """Sharded."""

    __tablename__ = "readers"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(default="")
    topics: Mapped[list[Topic]] = relationship(
        secondary=reader_topics,
        primaryjoin="Reader.id == reader_topics.c.reader_id",
        secondaryjoin="Topic.id == reader_topics.c.topic_id",
        order_by="Topic.id",
        backref="readers",
    )
    strays: Mapped[list[Mood]] = relationship(
        secondary=strays, primaryjoin="Reader.id == strays.c.reader_id", secondaryjoin="Mood.id == strays.c.mood_id"
    )


class Shelf(Library):
    """Sharded by its reader; the primary key holds more than that."""

    __tablename__ = "shelves"
    reader_id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    topics: Mapped[list[Topic]] = relationship(
        secondary=shelf_topics,
        primaryjoin="and_(Shelf.reader_id == shelf_topics.c.reader_id, Shelf.number == shelf_topics.c.number)",
        secondaryjoin="Topic.id == shelf_topics.c.topic_id",
        passive_updates=False,
    )


def library_map(shop: Shop) -> ShardMap:
    document = shop_document({shard: {"master": master.url} for shard, master in shop.masters.items()})
    orders = document["keyspaces"]["orders"]
    orders["tables"] |= {"readers": "id", "reader_topics": "reader_id", "strays": "home"}
    orders["tables"] |= {"shelves": "reader_id", "shelf_topics": "reader_id"}
    orders["reference"] += ["topics", "moods", "topic_moods"]
    return ShardMap.parse(document)


@pytest.fixture
def cluster(shop: Shop) -> Iterator[Cluster]:
    with shop.open(library_map(shop)) as opened:
        opened.create_all(Library.metadata)
        yield opened
        for shard in SHARDS:
            Library.metadata.drop_all(opened.engine(shard))


@pytest.fixture
def session(shop: Shop, cluster: Cluster) -> Iterator[Session]:
    atomic = "best_effort" if shop.kind == "sqlite" else "atomic"
    with shardkit.sessionmaker(cluster, transactions=atomic)() as opened:
        yield opened


@pytest.fixture
def readers(shop: Shop, session: Session) -> dict[str, Reader]:
    """One on each shard, who read three topics."""
    topics = [Topic(id=number) for number in (1, 2, 3)]
    made = {shard: Reader(id=shop.users_on(shard, 1)[0], topics=topics) for shard in SHARDS}
    session.add_all([*made.values(), Mood(id=1), Mood(id=2)])
    session.commit()
    return made


def between(shop: Shop, readers: dict[str, Reader]) -> dict[str, list[int]]:
    """The topics of each shard's reader; every row has to be on its reader's shard."""
    found = shop.where("reader_topics", "reader_id, topic_id")
    assert all(row[0] == readers[shard].id for shard, rows in found.items() for row in rows)
    return {shard: [topic for _, topic in rows] for shard, rows in found.items()}


def test_rows_stand_where_their_keys_say(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    first, second, third = readers.values()
    assert between(shop, readers) == {shard: [1, 2, 3] for shard in SHARDS}
    session.expire_all()
    assert [[topic.id for topic in reader.topics] for reader in readers.values()] == [[1, 2, 3]] * 3
    first.topics.remove(session.get_one(Topic, 2))
    second.topics.clear()
    third.topics.append(Topic(id=4))
    session.commit()
    assert between(shop, readers) == dict(zip(SHARDS, ([1, 3], [], [1, 2, 3, 4]), strict=True))
    session.expire_all()
    loaded = session.scalars(sa.select(Reader).options(selectinload(Reader.topics)).order_by(Reader.id)).all()
    assert {reader.id: [topic.id for topic in reader.topics] for reader in loaded} == {
        first.id: [1, 3],
        second.id: [],
        third.id: [1, 2, 3, 4],
    }


def test_from_the_other_side(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    topic = Topic(id=9)
    topic.readers = list(readers.values())  # type: ignore[attr-defined]
    session.add(topic)
    session.commit()
    assert between(shop, readers) == {shard: [1, 2, 3, 9] for shard in SHARDS}
    session.delete(topic)
    session.commit()
    assert between(shop, readers) == {shard: [1, 2, 3] for shard in SHARDS}


def test_in_a_savepoint(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    if shop.kind == "sqlite":
        pytest.skip("its driver begins too late for savepoints")
    first, second, _ = readers.values()
    with session.begin_nested() as savepoint:
        first.topics, second.topics = [], []
        session.flush()
        savepoint.rollback()
    with session.begin_nested():
        first.topics.remove(session.get_one(Topic, 1))
    session.commit()
    assert between(shop, readers) == dict(zip(SHARDS, ([2, 3], [1, 2, 3], [1, 2, 3]), strict=True))


def test_a_reader_who_is_deleted_takes_them_along(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    for reader in readers.values():
        session.delete(reader)
    session.commit()
    assert shop.where("reader_topics", "topic_id") == {shard: [] for shard in SHARDS}


def test_readers_of_one_shard_are_deleted_at_once(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    """Also those who were taken out of their relationships before."""
    more = [Reader(id=number, topics=readers[SHARDS[0]].topics) for number in shop.users_on(SHARDS[0], 5)[1:]]
    session.add_all(more)
    session.commit()
    sent: list[Any] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("DELETE FROM readers"):
            sent.append(parameters)

    with session.no_autoflush:
        for reader in more:
            reader.topics.clear()
            session.delete(reader)
    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        session.commit()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert [len(parameters) for parameters in sent] == [4]
    assert shop.rows(SHARDS[0], "readers", "id") == [(readers[SHARDS[0]].id,)]


def test_a_reference_table_between_reference_tables(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    topic = session.get_one(Topic, 1)
    topic.moods = list(session.scalars(sa.select(Mood)))
    session.commit()
    assert shop.where("topic_moods", "topic_id, mood_id") == {shard: [(1, 1), (1, 2)] for shard in SHARDS}
    topic.moods.pop()
    session.commit()
    assert len({tuple(rows) for rows in shop.where("topic_moods", "mood_id").values()}) == 1


def test_rows_that_are_gone_are_missed(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    """As a plain session misses them."""
    for reader in readers.values():
        assert len(reader.topics) == 3
    shop.execute(shop.masters[SHARDS[1]], "DELETE FROM reader_topics WHERE topic_id = 1")
    for reader in readers.values():
        del reader.topics[0]
    with pytest.raises(StaleDataError, match=r"expected to delete 3 row\(s\); Only 2 were matched"):
        session.flush()
    session.rollback()
    assert between(shop, readers)[SHARDS[0]] == [1, 2, 3]


def test_a_row_without_a_key_is_refused(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    reader = next(iter(readers.values()))
    reader.name = "other"
    reader.strays = [session.get_one(Mood, 1)]
    with pytest.raises(MissingKey, match="strays"):
        session.flush()
    session.rollback()
    assert shop.where("strays", "mood_id") == {shard: [] for shard in SHARDS}
    assert shop.rows(SHARDS[0], "readers", "name") == [("",)]


def test_they_count_as_written(cluster: Cluster, session: Session, readers: dict[str, Reader]) -> None:
    """Under ``single`` a second shard is refused, also where nothing but rows between is written."""
    ids = [reader.id for reader in readers.values()]
    with shardkit.sessionmaker(cluster, transactions="single")() as single:
        one, other, _ = (single.get_one(Reader, number) for number in ids)
        one.topics.pop()
        single.flush()
        other.topics.pop()
        with pytest.raises(SecondShardWritten):
            single.flush()


@pytest.mark.parametrize("renames", [False, True])
def test_a_watched_topic_is_written_where_its_handler_changes_it(
    shop: Shop, cluster: Cluster, session: Session, readers: dict[str, Reader], renames: bool
) -> None:
    """And not because a handler might."""

    def before_update(_mapper: Any, _connection: Any, topic: Topic) -> None:
        if renames:
            topic.name = "read"

    reader = readers[SHARDS[1]]
    reader.topics = []
    session.commit()
    reader_id = reader.id
    session.close()
    sa.event.listen(Topic, "before_update", before_update)
    try:
        with shardkit.sessionmaker(cluster, transactions="best_effort" if renames else "single")() as own:
            loaded = own.get_one(Reader, reader_id)
            loaded.topics.append(own.get_one(Topic, 1))
            own.commit()
    finally:
        sa.event.remove(Topic, "before_update", before_update)
    assert shop.where("reader_topics", "topic_id")[SHARDS[1]] == [1]
    assert shop.where("topics", "name") == {shard: ["", "", "read" if renames else ""] for shard in SHARDS}


def test_a_primary_key_that_changes_is_refused(session: Session, readers: dict[str, Reader]) -> None:
    reader = next(iter(readers.values()))
    reader.id = 10**6
    with pytest.raises(KeyChange):
        session.flush()


def test_under_asyncio(shop: Shop, session: Session, readers: dict[str, Reader]) -> None:
    ids = [reader.id for reader in readers.values()]
    session.close()

    async def work() -> None:
        sessions = partial(shardkit.async_sessionmaker, transactions="best_effort")
        async with shop.open(library_map(shop)) as cluster, sessions(cluster)() as own:
            for number in ids:
                reader = await own.get_one(Reader, number, options=[selectinload(Reader.topics)])
                reader.topics.append(await own.merge(Topic(id=7)))
            await own.commit()

    asyncio.run(work())
    assert shop.where("reader_topics", "topic_id") == {shard: [1, 2, 3, 7] for shard in SHARDS}


def test_a_primary_key_that_changes_beside_the_shard_key(
    shop: Shop, session: Session, readers: dict[str, Reader]
) -> None:
    """The ORM then sets all columns of the rows between, the key among them."""
    shelves = [Shelf(reader_id=reader.id, number=1, topics=reader.topics) for reader in readers.values()]
    session.add_all(shelves)
    session.commit()
    for shelf in shelves:
        shelf.number = 2
    session.commit()
    assert shop.where("shelf_topics", "reader_id, number, topic_id") == {
        shard: [(reader.id, 2, topic) for topic in (1, 2, 3)] for shard, reader in readers.items()
    }
    shelves[0].reader_id = shelves[1].reader_id
    with pytest.raises(KeyChange):
        session.flush()
