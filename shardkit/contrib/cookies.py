"""The cookie that carries a browser's token from one request to the next."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from shardkit.errors import InvalidToken, PreconditionFailed
from shardkit.replicas.token import Token

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCookie:
    """How a token is kept in a cookie.

    :param secret: signs it: a browser must not make up positions that no replica ever reaches.
    :param name: the cookie's name.
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

    def read(self, value: str | None) -> Token:
        """The token in a request; an empty one where there is none, or none of ours."""
        if not value:
            return Token()
        try:
            return Token.loads(value, self.secret)
        except InvalidToken as error:
            logger.info("the cookie %s is left aside: %s", self.name, error.message)
            return Token()

    def write(self, token: Token) -> str:
        """The cookie's value for an answer."""
        return token.dumps(self.secret)
