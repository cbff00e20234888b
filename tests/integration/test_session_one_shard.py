"""A cluster of one shard: the session is SQLAlchemy's own, nothing is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, relationship

import shardkit
from shardkit.shardmap import ShardMap


class Base(DeclarativeBase):
    """An application's tables; the shard map names two of them."""


tags = sa.Table(
    "tags",
    Base.metadata,
    sa.Column("book_id", sa.ForeignKey("books.id"), primary_key=True),
    sa.Column("word_id", sa.ForeignKey("words.id"), primary_key=True),
)


class Book(Base):
    """Sharded by its id in the map, which the database makes up."""

    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    words: Mapped[list[Word]] = relationship(secondary=tags)
    pages: Mapped[list[Page]] = relationship(back_populates="book")


class Word(Base):
    """A table that the map does not name."""

    __tablename__ = "words"
    id: Mapped[int] = mapped_column(primary_key=True)
    word: Mapped[str]


class Page(Base):
    """Sharded by its book."""

    __tablename__ = "pages"
    id: Mapped[int] = mapped_column(primary_key=True)
    book_id: Mapped[int | None] = mapped_column(sa.ForeignKey("books.id"))
    book: Mapped[Book | None] = relationship(back_populates="pages")


class Counted(Base):
    """Mapped to a query."""

    __table__ = (
        select(Book.id.label("id"), func.count(Page.id).label("pages")).join(Page).group_by(Book.id).subquery("counted")
    )
    __mapper_args__ = {"primary_key": [__table__.c.id]}  # noqa: RUF012


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    document = {
        "format": 1,
        "cluster": "books",
        "keyspaces": {
            "books": {
                "partition": {"by": "hash", "buckets": 4},
                "tables": {"books": "id", "pages": "book_id"},
                "placement": {"only": "0-3"},
            }
        },
        "shards": {"only": {"master": f"sqlite:///{tmp_path}/only.db"}},
    }
    with shardkit.create_cluster(ShardMap.parse(document)) as cluster:
        Base.metadata.create_all(cluster.engine("only"))
        with shardkit.sessionmaker(cluster, transactions="single")() as session:
            yield session


def test_ids_of_the_database_and_many_to_many_tables_work(session: Session) -> None:
    session.add(Book(title="a", words=[Word(word="x"), Word(word="y")], pages=[Page(), Page()]))
    session.commit()
    book = session.scalars(select(Book)).one()
    assert sorted(word.word for word in book.words) == ["x", "y"]
    assert sa.inspect(book).identity_key == (Book, (1,), None)
    book.words.pop()
    session.commit()
    assert session.scalar(select(func.count()).select_from(tags)) == 1


def test_nothing_is_refused(session: Session) -> None:
    session.execute(insert(Book), [{"title": "a"}, {"title": "b"}])
    session.execute(update(Book).values(title=Book.title + "!"))
    book = session.get_one(Book, 1)
    page = Page(book=book)
    session.add(page)
    session.commit()
    page.book = session.get_one(Book, 2)
    session.commit()
    assert page.book_id == 2
    assert session.execute(text("SELECT count(*) FROM books, words")).scalar() == 0
    other = aliased(Book)
    assert session.execute(select(Book.title, func.row_number().over()).join(other, other.id != Book.id)).all()
    assert session.connection().scalar(text("SELECT count(*) FROM books")) == 2
    assert session.query(Book).filter_by(title="a!").one() is book
    assert str(session.query(Book)).startswith("SELECT")
    page.book = None
    session.commit()


def test_classes_that_are_no_tables_are_read(session: Session) -> None:
    session.add(Book(title="a", pages=[Page(), Page()]))
    session.commit()
    assert session.get_one(Counted, 1).pages == 2
    assert [counted.pages for counted in session.scalars(select(Counted))] == [2]


def test_savepoints_expiry_merge_and_delete(session: Session) -> None:
    book = Book(title="a")
    session.add(book)
    session.flush()
    with session.begin_nested() as savepoint:
        book.title = "b"
        session.flush()
        savepoint.rollback()
    session.commit()
    assert book.title == "a"
    merged = session.merge(Book(id=book.id, title="c"))
    assert merged is book
    session.flush()
    session.refresh(book)
    assert book.title == "c"
    session.delete(book)
    session.commit()
    assert session.scalars(select(Book)).all() == []


def test_parameters_are_looked_at_when_they_are_sent(session: Session) -> None:
    book = Book(title="a")
    session.add(book)
    session.commit()
    session.expunge(book)
    with pytest.raises(sa.exc.StatementError, match="detached"):
        session.scalars(select(Page).where(Page.book == book))


def test_rows_that_lack_a_column_are_the_error_that_sqlalchemy_makes_of_them(session: Session) -> None:
    with pytest.raises(StatementError, match="'title', in parameter group 1"):
        session.execute(insert(Book.__table__), [{"id": 1, "title": "a"}, {"id": 2}])
