"""Killing the relay in the middle of writes, and proving that nothing was lost and nothing came twice."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, update

from shardkit.cli.output import Column, Output
from shardkit.cluster import Cluster
from shardkit.demo import data
from shardkit.demo.models import Flight
from shardkit.demo.pipeline import Pipeline
from shardkit.demo.relay_process import RelayProcess
from shardkit.session import sessionmaker

#: Rows that the writer adds have numbers from here on: the real flights are numbered below.
FIRST_NEW = 1_000_000
WRITING_SECONDS = 1.5


@dataclass
class _Writer:
    """Inserts and updates through the session factory until it is told to stop."""

    cluster: Cluster
    tails: list[str]
    sample: data.Row = field(default_factory=lambda: next(data.flights()))
    transactions: int = 0
    error: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="demo-writer")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        factory = sessionmaker(self.cluster)
        try:
            while not self._stop.is_set():
                tail = self.tails[self.transactions % len(self.tails)]
                with factory() as session, session.begin():
                    session.add(Flight(**{**self.sample, "id": FIRST_NEW + self.transactions, "tailnum": tail}))
                    session.execute(
                        update(Flight).where(Flight.tailnum == tail).values(distance=Flight.distance + 1),
                        execution_options={"synchronize_session": False},
                    )
                self.transactions += 1
        except BaseException as error:  # noqa: BLE001 - raised where the writer is stopped
            self.error = error


def kill_relay_while_writing(cluster: Cluster, pipeline: Pipeline, relay: RelayProcess, out: Output) -> dict[str, Any]:
    """Write, kill the relay, go on writing, start the relay, and compare every database.

    :raises DifferencesFound: when they are not equal.
    """
    with sessionmaker(cluster)() as session:
        tails = list(session.scalars(select(Flight.tailnum).where(Flight.tailnum.is_not(None)).distinct().limit(200)))
    writer = _Writer(cluster, [tail for tail in tails if tail is not None])
    with out.progress() as progress:
        writing = progress.task("Writing to both masters", unit="transactions")
        writer.start()
        try:
            time.sleep(WRITING_SECONDS)
            relay.kill()
            progress.line(f"    relay killed (SIGKILL) after {writer.transactions:,} transactions; writing goes on")
            time.sleep(WRITING_SECONDS)
            relay.start()
            progress.line(f"    relay started again after {writer.transactions:,} transactions")
            time.sleep(WRITING_SECONDS)
        finally:
            writer.stop()
        writing.at(writer.transactions)
        writing.finish()
        waiting = progress.task("Waiting for the replicas", unit="")
        pipeline.wait_until_level()
        waiting.finish()
    _show_checksums(pipeline, out)
    return {"transactions": writer.transactions, "arrived": _arrived(cluster, writer.transactions)}


def _arrived(cluster: Cluster, expected: int) -> int:
    statement = select(func.count()).select_from(Flight).where(Flight.id >= FIRST_NEW)
    with sessionmaker(cluster, read_from="replica")() as session:
        count = session.scalar(statement) or 0
    if count != expected:
        raise AssertionError(f"{expected} flights were added, the replicas have {count}")
    return count


def _show_checksums(pipeline: Pipeline, out: Output) -> None:
    out.line()
    out.line("CHECKSUM TABLE on every database:", style="bold")
    for checksums in pipeline.checksums():
        out.table(
            [checksums.shard, *(Column(label, right=True) for label in checksums.by_endpoint), ""],
            [
                (table, *(sums[index] for sums in checksums.by_endpoint.values()), "equal")
                for index, table in enumerate(checksums.tables)
            ],
        )
