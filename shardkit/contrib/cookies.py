"""The cookies that carry a browser's token from one request to the next."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import Connection

from shardkit.errors import InvalidToken, PreconditionFailed
from shardkit.replicas.token import Mark, Token
from shardkit.session.carrying import Carrier
from shardkit.session.transacting import TransactingSession

logger = logging.getLogger(__name__)

#: What the names of answers' cookies end in. Answers that have written do not share names with those that have only
#: read, so that a slow read never takes the place of a write.
_WRITTEN: Final = ("_w0", "_w1", "_w2", "_w3")
_SEEN: Final = ("_r0", "_r1")
#: Bytes of one cookie, its name included: all of them fit into the 4 KiB that servers and proxies take at the least.
_LONGEST: Final = 4096 // (len(_WRITTEN) + len(_SEEN)) - len("=; ")
#: Reading a transaction that another thread works on may fail; so often it is tried.
_TRIES: Final = 3


class Answer(NamedTuple):
    """What an answer does to the browser's cookies.

    :param name: of the cookie that it sets.
    :param removed: names of cookies whose tokens it holds, too.
    """

    name: str
    value: str
    removed: tuple[str, ...]


@dataclass(frozen=True)
class TokenCookie:
    """How a token is kept in cookies.

    A browser's answers may overtake one another, and the last cookie of a name is the one that it keeps. So each answer
    takes a name that its request did not bring, and a request brings all of them: their tokens are merged.

    :param secret: signs them: a browser must not make up positions that no replica ever reaches.
    :param name: what the cookies' names begin with.
    :param max_age: seconds that the browser keeps it after the last answer; longer than replicas may be behind.
    :param same_site: ``lax``, ``strict`` or ``none``.
    """

    secret: str | bytes
    name: str = "shardkit_token"
    max_age: int = 600
    same_site: Literal["lax", "strict", "none"] = "lax"

    def __post_init__(self) -> None:
        if not self.secret:
            raise PreconditionFailed("the cookie's secret is empty", hint="give a long random text, kept as a secret")

    def read(self, cookies: Mapping[str, str]) -> Token:
        """The token in a request; an empty one where there is none, or none of ours."""
        token = Token()
        for name in self._brought(cookies):
            try:
                token = token.merged(Token.loads(cookies[name], self.secret))
            except InvalidToken as error:
                logger.info("the cookie %s is left aside: %s", name, error.message)
        return token

    def answer(self, carrier: Carrier, cookies: Mapping[str, str], *, asks: bool) -> Answer | None:
        """What an answer tells the browser; None where its request has learned nothing that it did not bring.

        :param cookies: that the request brought.
        :param asks: whether masters may be asked for their positions, on connections of this thread.
        """
        _take_in_open_sessions(carrier, asks=asks)
        if not carrier.changed or carrier.token == self.read(cookies):
            return None
        brought = self._brought(cookies)
        names = [self.name + ending for ending in (_WRITTEN if carrier.wrote else _SEEN)]
        name = secrets.choice([name for name in names if name not in brought] or names)
        value = carrier.token.dumps(self.secret, longest=_LONGEST - len(name))
        # what a write has told stays until the next one: another answer that only read may yet take this one's name
        held = brought if carrier.wrote else [each for each in brought if each.endswith(_SEEN)]
        return Answer(name, value, tuple(each for each in held if each != name))

    def _brought(self, cookies: Mapping[str, str]) -> list[str]:
        return [name for name in (self.name + ending for ending in (*_WRITTEN, *_SEEN)) if name in cookies]


# --- what sessions that are still open have seen


def _take_in_open_sessions(carrier: Carrier, *, asks: bool) -> None:
    """Transactions tell what they have seen as they end, and some end after the answer."""
    for session, thread in carrier.sessions():
        # another thread may be at work on its connection, as an event loop may on that of an asyncio session
        mine = asks and not session.asynchronous and thread == threading.get_ident()
        before = carrier.token.marks
        for shard, mark, all_of_it in _seen_by(session, mine=mine):
            carrier.note(shard, mark, all_of_it=all_of_it, instead_of=before.get(shard))


def _seen_by(session: TransactingSession, *, mine: bool) -> list[tuple[str, Mark, bool]]:
    for _ in range(_TRIES):
        with suppress(RuntimeError):  # a dictionary grew meanwhile
            return list(session.seen_so_far(lambda connection: mine and _is_idle(connection)))
    logger.info("what a session at work has seen is not in the cookie")
    return []


def _is_idle(connection: Connection) -> bool:
    """Whether no rows are on their way: a question would drop those of a stream. False where that is not known."""
    if connection.closed or connection.invalidated:
        return False
    driver: Any = connection.connection.driver_connection
    if not hasattr(driver, "_result"):  # only PyMySQL tells
        return False
    return not getattr(driver._result, "unbuffered_active", False)  # noqa: SLF001
