"""A unit of work that is run again when the databases ask for it, and never when it may have been committed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, overload

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from shardkit.errors import PartRolledBack, StaleReadError, StaleShardMap

P = ParamSpec("P")
R = TypeVar("R")

_FIRST_PAUSE = 0.02  # seconds
_LONGEST_PAUSE = 1.0
# by number (MySQL: share/messages_to_clients.txt; MariaDB: sql/share/errmsg-utf8.txt): lock wait timeout, deadlock,
# MariaDB's "record has changed", and the two with which a server has rolled back an XA branch
_ROLLED_BACK = frozenset({1205, 1213, 1020, 1613, 1614})


@overload
def retry(
    factory: async_sessionmaker[AsyncSession], *, within: float = ...
) -> Callable[[Callable[Concatenate[AsyncSession, P], Awaitable[R]]], Callable[P, Awaitable[R]]]: ...
@overload
def retry(
    factory: sessionmaker[Any], *, within: float = ...
) -> Callable[[Callable[Concatenate[Session, P], R]], Callable[P, R]]: ...
def retry(factory: Any, *, within: float = 15.0) -> Any:
    """Make a function a unit of work: it is given a new session as its first argument, and committed when it returns.

    It is run from its beginning again, with another session, after a deadlock, a lock that was waited for in vain, rows
    that are being moved to another shard, an object that a replica showed older than it is (`StaleReadError`), and a
    connection that was lost before COMMIT was sent. Never after a COMMIT whose answer was lost: nobody knows whether it
    happened (`CommitUnknown`, or the driver's own error of one shard).
    So what the function does besides its session's work has to bear being done twice::

        @shardkit.retry(Session)
        def transfer(session, source, target, amount):
            session.get_one(Account, source, with_for_update=True).amount -= amount
            session.get_one(Account, target, with_for_update=True).amount += amount

        transfer(1, 2, 100)

    :param factory: made by `shardkit.sessionmaker`, or by `shardkit.async_sessionmaker` for an ``async`` function.
    :param within: seconds from the first attempt after which the last error is raised.
    """
    asynchronous = isinstance(factory, async_sessionmaker)

    def decorate(work: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(work)
        def run(*arguments: Any, **options: Any) -> Any:
            pauses = _pauses(within)
            seen: dict[str, Any] = {}
            while True:
                with factory(**seen) as session:
                    may_repeat = is_retryable
                    try:
                        answer = work(session, *arguments, **options)
                        session.flush()
                        may_repeat = _is_rolled_back
                        session.commit()
                    except Exception as error:
                        committed = session.committed
                        session.rollback()
                        seen = _seen(error, session)
                        pause = next(pauses, None) if may_repeat(error) and not committed else None
                        if pause is None:
                            raise
                    else:
                        return answer
                time.sleep(pause)

        @wraps(work)
        async def run_async(*arguments: Any, **options: Any) -> Any:
            pauses = _pauses(within)
            seen: dict[str, Any] = {}
            while True:
                async with factory(**seen) as session:
                    may_repeat = is_retryable
                    try:
                        answer = await work(session, *arguments, **options)
                        await session.flush()
                        may_repeat = _is_rolled_back
                        await session.commit()
                    except Exception as error:
                        committed = session.sync_session.committed
                        await session.rollback()
                        seen = _seen(error, session.sync_session)
                        pause = next(pauses, None) if may_repeat(error) and not committed else None
                        if pause is None:
                            raise
                    else:
                        return answer
                await asyncio.sleep(pause)

        return run_async if asynchronous else run

    return decorate


def _seen(error: BaseException, session: Any) -> dict[str, Any]:
    """Options of the next session: after a replica has shown what is past, it sees what the master has."""
    return {"token": session.token} if isinstance(error, StaleReadError) else {}


def is_retryable(error: BaseException) -> bool:
    """Whether a transaction that failed with this before its COMMIT was sent may be run again, from its beginning."""
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    return lost or _is_rolled_back(error)


def _is_rolled_back(error: BaseException) -> bool:
    """Whether the error itself says that nothing has been committed."""
    if isinstance(error, StaleShardMap | StaleReadError | PartRolledBack):
        return True
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    return bool(error.orig.args) and error.orig.args[0] in _ROLLED_BACK


def _pauses(within: float) -> Iterator[float]:
    """Seconds to wait before each further attempt: longer each time, and never the same for two that got in each
    other's way."""
    end = time.monotonic() + within
    longest = _FIRST_PAUSE
    while (left := end - time.monotonic()) > 0:
        yield min(left, random.uniform(longest / 2, longest))  # noqa: S311 - spread, not secrecy
        longest = min(longest * 2, _LONGEST_PAUSE)
