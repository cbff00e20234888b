"""Statements on several shards at once: in threads for a Session, as tasks for an AsyncSession."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.util import await_only, greenlet_spawn

T = TypeVar("T")

#: How many shards one statement of an asyncio session asks at the same time. More wait their turn.
MAX_FAN_OUT = 16
#: Threads for the statements over several shards of all sessions of this process. More shards wait their turn.
MAX_THREADS = 64


class Workers:
    """The threads that help sessions ask several shards at once. A child process has its own."""

    def __init__(self, threads: int = MAX_THREADS) -> None:
        self._limit = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pid != os.getpid():
            self._pool = ThreadPoolExecutor(self._limit, thread_name_prefix="shardkit-shard")
            self._pid = os.getpid()
        return self._pool

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Every call's answer, in order. The first error is raised once all have ended."""
        pool = self._threads()
        futures: list[Future[T]] = [pool.submit(call) for call in calls[1:]]
        first: Future[T] = Future()
        try:
            first.set_result(calls[0]())
        except BaseException as error:  # noqa: BLE001 - raised below, after the others have ended
            first.set_exception(error)
        wait(futures)
        return [future.result() for future in (first, *futures)]


_workers = Workers()


def run_in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run calls at once, one of them in this thread."""
    return _workers.run(calls)


def run_in_tasks(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run calls at once as tasks; inside the greenlet of an AsyncSession."""

    async def gather() -> list[Any]:
        turn = asyncio.Semaphore(MAX_FAN_OUT)

        async def one(call: Callable[[], T]) -> T:
            async with turn:
                return await greenlet_spawn(call)

        return await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)

    answers: list[Any] = await_only(gather())
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


def run_in_turn(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run calls one after the other."""
    return [call() for call in calls]


def runner_for(
    connections: Sequence[Connection], *, asynchronous: bool
) -> Callable[[Sequence[Callable[[], T]]], list[T]]:
    """How statements on these connections run together.

    SQLite is asked in turn: its work is this process's own, and its connections may be bound to this thread.
    """
    if any(connection.dialect.name == "sqlite" for connection in connections):
        return run_in_turn
    return run_in_tasks if asynchronous else run_in_threads


def pause(seconds: float, *, asynchronous: bool) -> None:
    """Sleep, without stopping an event loop."""
    if asynchronous:
        await_only(asyncio.sleep(seconds))
    else:
        time.sleep(seconds)


def run_blocking(call: Callable[[], T], *, asynchronous: bool) -> T:
    """A call that waits for something other than a database, without stopping an event loop."""
    if not asynchronous:
        return call()

    async def in_thread() -> T:
        return await asyncio.to_thread(call)

    answer: T = await_only(in_thread())
    return answer
