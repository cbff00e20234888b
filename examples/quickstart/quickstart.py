"""Two shards on this machine, without a server: ``python quickstart.py``.

Makes ``shop-0.db`` and ``shop-1.db`` in the current directory, and replaces them when run again.
"""

from __future__ import annotations

from pathlib import Path

from models import Base, Order, User
from sqlalchemy import func, select

from shardkit import create_cluster, sessionmaker

NAMES = ["김민준", "이서연", "박도윤", "최서윤", "정예준", "강지우", "조하준", "윤하은"]


def main() -> None:
    """Write eight users with two orders each, then ask."""
    with create_cluster(Path(__file__).with_name("shardmap.yaml")) as cluster:
        Session = sessionmaker(cluster)  # noqa: N806 - a factory of sessions, as SQLAlchemy's documentation writes it
        cluster.drop_all(Base.metadata)
        cluster.create_all(Base.metadata)

        for number, name in enumerate(NAMES, start=5):  # by their hash 5 to 7 are on one shard, 8 to 12 on the other
            with Session.begin() as session:  # each transaction writes to one shard: its user's
                user = User(id=number, name=name)
                user.orders = [Order(id=number * 10 + one, total=number * 100 + one) for one in range(2)]
                session.add(user)

        of_one = select(Order).where(Order.user_id == 5)
        largest = select(Order).order_by(Order.total.desc()).limit(3)
        how_many = select(func.count()).select_from(Order)
        with Session() as session:
            print(f"user 5 lives on {cluster.locate('users', id=5).shard}")
            print("orders of user 5:", [order.id for order in session.scalars(of_one)], "-", where(cluster, of_one))
            print("largest orders:", [order.id for order in session.scalars(largest)], "-", where(cluster, largest))
            print("how many:", session.scalar(how_many), "-", where(cluster, how_many))


def where(cluster, statement) -> str:
    """The shards that a statement goes to."""
    return f"asked on {', '.join(cluster.explain(statement).shards)}"


if __name__ == "__main__":
    main()
