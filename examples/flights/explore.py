"""Where did a plane go? Reads the cluster that ``shardkit demo --keep`` leaves running."""

import os
import sys

from sqlalchemy import func, select

from shardkit import ShardkitError, create_cluster, sessionmaker
from shardkit.demo.models import Airport, Flight


def main(tail: str) -> None:
    """Print the plane's destinations, most frequent first."""
    source = os.environ.get("SHARDKIT_MAP")
    if source is None:
        sys.exit("SHARDKIT_MAP is not set: run 'shardkit demo --keep' and the export line that it prints")
    with create_cluster(source, driver="mariadb+pymysql") as cluster:
        session_factory = sessionmaker(cluster, read_from="replica")
        trips = (
            select(Airport.name, func.count())
            .select_from(Flight)
            .join(Airport, Airport.faa == Flight.dest)  # airports are on every shard
            .where(Flight.tailnum == tail)
            .group_by(Airport.name)
            .order_by(func.count().desc(), Airport.name)
        )
        print(f"{tail} is on {cluster.locate('flights', tailnum=tail).shard}")
        with session_factory() as session:
            destinations = session.execute(trips).all()
        for airport, count in destinations or [("no flight in 2013", 0)]:
            print(f"{count:6,}  {airport}")


if __name__ == "__main__":
    try:
        main(sys.argv[1] if len(sys.argv) > 1 else "N14228")
    except ShardkitError as error:
        sys.exit(f"error: {error}")
