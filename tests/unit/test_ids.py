"""Ids: unique, in order of time, over processes, restarts and clocks that step."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from shardkit.errors import PreconditionFailed
from shardkit.ids import EPOCH_MS, RESERVE_MS, ClockWentBack, FileLease, IdGenerator

NOW = EPOCH_MS + 1_000_000


class Lease:
    """A worker number in memory."""

    def __init__(self, number: int = 7, reserved_until: int = 0) -> None:
        self.number = number
        self.reserved_until = reserved_until
        self.reserved: list[int] = []

    def reserve(self, until_ms: int) -> None:
        self.reserved.append(until_ms)

    def close(self) -> None:
        self.reserved.append(-1)


class Clock:
    """A clock that moves only by sleeping."""

    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(1, round(seconds * 1000))


def generator(lease: Lease, clock: Clock) -> IdGenerator:
    return IdGenerator(lambda: lease, clock, clock.sleep)


def _gone(_: int) -> None:
    raise PreconditionFailed("gone")


def test_an_id_holds_time_worker_and_sequence() -> None:
    clock = Clock()
    ids = generator(Lease(7), clock)
    first, second = ids.next_id(), ids.next_id()
    assert first >> 22 == NOW - EPOCH_MS
    assert first >> 12 & 1023 == 7
    assert (first & 4095, second & 4095) == (0, 1)
    assert second < 2**63


def test_a_full_millisecond_goes_on_in_the_next() -> None:
    clock = Clock()
    ids = generator(Lease(), clock)
    issued = [ids.next_id() for _ in range(10_000)]
    assert issued == sorted(set(issued))
    assert clock.now == NOW + 2


def test_nothing_is_issued_beyond_what_was_reserved() -> None:
    clock, lease = Clock(), Lease()
    ids = generator(lease, clock)
    ids.next_id()
    assert lease.reserved == [NOW + RESERVE_MS]
    clock.now += RESERVE_MS
    ids.next_id()
    assert lease.reserved == [NOW + RESERVE_MS]
    clock.now += 1
    ids.next_id()
    assert lease.reserved == [NOW + RESERVE_MS, NOW + 2 * RESERVE_MS + 1]


def test_a_lost_lease_issues_nothing() -> None:
    clock, lease = Clock(), Lease()
    ids = generator(lease, clock)
    ids.next_id()

    lease.reserve = _gone  # type: ignore[method-assign]
    clock.now += RESERVE_MS + 1
    with pytest.raises(PreconditionFailed):
        ids.next_id()


def test_after_a_lost_lease_another_number_is_taken() -> None:
    clock = Clock()
    leases = [Lease(1), Lease(2)]
    ids = IdGenerator(lambda: leases.pop(0), clock, clock.sleep)
    leases[0].reserve = _gone  # type: ignore[method-assign]
    with pytest.raises(PreconditionFailed):
        ids.next_id()
    assert ids.next_id() >> 12 & 1023 == 2


def test_a_number_used_before_begins_after_what_its_last_holder_reserved() -> None:
    clock = Clock()
    ids = generator(Lease(reserved_until=NOW + 50), clock)
    assert ids.next_id() >> 22 == NOW + 51 - EPOCH_MS


def test_a_small_step_back_is_waited_out() -> None:
    clock = Clock()
    ids = generator(Lease(), clock)
    first = ids.next_id()
    clock.now -= 500
    assert ids.next_id() > first


def test_a_large_step_back_is_an_error() -> None:
    clock = Clock()
    ids = generator(Lease(), clock)
    ids.next_id()
    clock.now -= 60_000
    with pytest.raises(ClockWentBack, match=r"60\.0 s"):
        ids.next_id()


def test_two_leases_in_one_directory_have_different_numbers(tmp_path: Path) -> None:
    first, second = FileLease(tmp_path), FileLease(tmp_path)
    assert first.number != second.number
    first.close()
    second.close()


def test_a_number_given_back_is_leased_again_and_remembers_its_reservation(tmp_path: Path) -> None:
    first = FileLease(tmp_path)
    number = first.number
    first.reserve(12345)
    first.close()
    again = FileLease(tmp_path)
    assert (again.number, again.reserved_until) == (number, 12345)
    again.close()


def _issue(directory: Path, count: int, queue: multiprocessing.Queue[list[int]]) -> None:
    ids = IdGenerator(lambda: FileLease(directory))
    queue.put([ids.next_id() for _ in range(count)])


def test_ids_of_eight_processes_are_unique(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[list[int]] = context.Queue()
    processes = [context.Process(target=_issue, args=(tmp_path, 2000, queue)) for _ in range(8)]
    for process in processes:
        process.start()
    issued = [number for _ in processes for number in queue.get(timeout=30)]
    for process in processes:
        process.join()
    assert len(set(issued)) == 16_000


def test_a_child_process_takes_a_number_of_its_own(tmp_path: Path) -> None:
    ids = IdGenerator(lambda: FileLease(tmp_path))
    mine = ids.next_id() >> 12 & 1023
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[int] = context.Queue()
    child = context.Process(target=lambda: queue.put(ids.next_id() >> 12 & 1023))
    child.start()
    assert queue.get(timeout=10) != mine
    child.join()
