"""Tokens that accompany a piece of work, such as one web request, through all the sessions that it opens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from shardkit.replicas.token import Mark, Token

if TYPE_CHECKING:
    from shardkit.session.transacting import TransactingSession


class Carrier:
    """The token of one piece of work. Its sessions begin with it and add to it; threads may share it.

    :param token: what whoever began the work has written and seen.
    """

    def __init__(self, token: Token | None = None) -> None:
        self._token = token or Token()
        self._lock = threading.Lock()
        self._sessions: WeakKeyDictionary[TransactingSession, int] = WeakKeyDictionary()
        #: Whether a session has added to the token.
        self.changed = False
        #: Whether a session has committed what it wrote.
        self.wrote = False

    @property
    def token(self) -> Token:
        """What has been written and seen so far."""
        return self._token

    def change(self, how: Callable[[Token], Token]) -> None:
        """Take note of more."""
        with self._lock:
            after = how(self._token)
            self.changed = self.changed or after is not self._token
            self._token = after

    def note(self, shard: str, mark: Mark, *, all_of_it: bool, instead_of: Mark | None) -> None:
        """Take note of what a session has written or seen.

        :param all_of_it: whether the mark covers everything that the session has written and seen on the shard.
        :param instead_of: what the session had found noted here before: covered, too, if it still is what is noted.
        """

        def noted(token: Token) -> Token:
            covers = all_of_it and token.marks.get(shard) is instead_of
            return (Token.replaced if covers else Token.raised)(token, shard, mark)

        self.change(noted)

    def join(self, session: TransactingSession) -> None:
        """A session begins a transaction, in this thread."""
        with self._lock:
            self._sessions[session] = threading.get_ident()

    def sessions(self) -> list[tuple[TransactingSession, int]]:
        """The sessions that have begun transactions and still exist, and the threads in which they last did."""
        with self._lock:
            return list(self._sessions.items())


_current: ContextVar[Carrier | None] = ContextVar("shardkit_token_carrier", default=None)


def current_carrier() -> Carrier | None:
    """The carrier of the work that is being done here; None where none is."""
    return _current.get()


@contextmanager
def carrying(token: Token | None = None) -> Iterator[Carrier]:
    """Have every session that is made in here begin with this token, and add to it what it writes and sees.

    ::

        with carrying(Token.loads(message["token"])) as carrier:
            handle(message)
        answer["token"] = carrier.token.dumps()
    """
    carrier = Carrier(token)
    reset = _current.set(carrier)
    try:
        yield carrier
    finally:
        _current.reset(reset)
