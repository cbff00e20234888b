"""Flask: what a browser has written, its next request sees, whichever replica and process serves it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Literal

from flask import Flask, Response, g, request

from shardkit.contrib.cookies import TokenCookie
from shardkit.session.carrying import carrying, current_carrier

_STACK = "_shardkit_token"


class ShardkitTokens:
    """Carry tokens in signed cookies.

    ::

        ShardkitTokens(app)

    Sessions made in a request begin with the browser's token. What they write and see before the answer begins goes
    into a cookie, also where they are closed at teardown; what they commit there does not.

    :param app: the application; or `init_app` later.
    :param secret: signs the cookies; the application's ``SECRET_KEY`` by default. See `TokenCookie`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        secret: str | bytes | None = None,
        name: str = "shardkit_token",
        max_age: int = 600,
        same_site: Literal["lax", "strict", "none"] = "lax",
    ) -> None:
        self._secret = secret
        self._name = name
        self._max_age = max_age
        self._same_site: Literal["lax", "strict", "none"] = same_site
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Take part in an application's requests.

        :raises PreconditionFailed: when there is no secret.
        """
        secret = self._secret or app.config.get("SECRET_KEY") or ""
        cookie = TokenCookie(secret, self._name, self._max_age, self._same_site)

        def begin() -> None:
            stack = ExitStack()
            stack.enter_context(carrying(cookie.read(request.cookies)))
            setattr(g, _STACK, stack)

        def answer(response: Response) -> Response:
            carrier = current_carrier()
            told = None if carrier is None else cookie.answer(carrier, request.cookies, asks=True)
            if told is not None:
                kept = [(told.name, told.value, cookie.max_age), *((name, "", 0) for name in told.removed)]
                for name, value, age in kept:
                    response.set_cookie(
                        name,
                        value,
                        max_age=age,
                        secure=request.is_secure,
                        httponly=True,
                        samesite=cookie.same_site.capitalize(),
                    )
            return response

        def end(_error: BaseException | None) -> None:
            stack: ExitStack | None = g.pop(_STACK, None)
            if stack is not None:
                stack.close()

        app.before_request(begin)
        app.after_request(answer)
        app.teardown_request(end)
