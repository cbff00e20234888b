"""How far replicas are behind, and whether that is near enough to read from them. Pure decisions."""

from __future__ import annotations

from dataclasses import dataclass

from shardkit.gtid import Position

#: A replica that was out comes back once its lag is under this part of the limit: no flapping at the limit itself.
BACK_UNDER = 0.8


@dataclass(frozen=True, slots=True)
class Reading:
    """What the poller saw of one replica.

    :param lag: seconds since the newest heartbeat that the replica holds was written; None: it holds none, which
        counts as infinitely far behind.
    :param position: the position in its master's log that its data has reached at least; None where it has none.
    :param epoch: of the shard, whose master's log the position is of.
    :param taken_at: when, on this process's monotonic clock.
    :param error: why it could not be asked; empty when it could.
    """

    lag: float | None
    position: Position | None
    taken_at: float
    error: str = ""
    epoch: int = 0


def is_fresh(reading: Reading | None, *, was_fresh: bool, max_lag: float, now: float, stale_after: float) -> bool:
    """Whether a replica may serve reads.

    :param was_fresh: the answer before: a replica that was out has to be well under the limit to come back.
    :param max_lag: seconds.
    :param now: on the clock of ``Reading.taken_at``.
    :param stale_after: seconds after which a reading says nothing any more.
    """
    if reading is None or reading.lag is None or reading.error or now - reading.taken_at > stale_after:
        return False
    return reading.lag <= (max_lag if was_fresh else max_lag * BACK_UNDER)
