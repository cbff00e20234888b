"""The shop's tables. Which of them are sharded, and by what, stands in the shard map."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    """The shop's tables."""


class Country(Base):
    """A reference table: the same rows on every shard, so that any user can be joined with it."""

    __tablename__ = "countries"
    code: Mapped[str] = mapped_column(String(2), primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


class User(Base):
    """Sharded by its id."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    country_code: Mapped[str] = mapped_column(ForeignKey("countries.code"))
    orders: Mapped[list[Order]] = relationship(back_populates="user", order_by="Order.id")
    country: Mapped[Country] = relationship()


class Order(Base):
    """Sharded by its user: a user's orders live beside the user."""

    __tablename__ = "orders"
    __table_args__ = (Index("orders_by_total", "total"),)
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    user_id: Mapped[int] = mapped_column(BigInteger, ForeignKey("users.id"))
    item: Mapped[str] = mapped_column(String(100))
    total: Mapped[int]
    user: Mapped[User] = relationship(back_populates="orders")
