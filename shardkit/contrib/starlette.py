"""Starlette and FastAPI: what a browser has written, its next request sees, whichever replica and process serves it."""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import Any, Literal

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardkit.contrib.cookies import TokenCookie
from shardkit.session.carrying import carrying


class TokenMiddleware:
    """Carry tokens in signed cookies.

    ::

        app.add_middleware(TokenMiddleware, secret=settings.secret)

    Sessions made in a request begin with the browser's token. What they write and see before the answer begins goes
    into a cookie; what a background task or the rest of a streamed answer writes or sees does not. Where a transaction
    is still open that has read a shard's master, the browser's next requests read that shard on its master.

    :param secret: signs the cookies; see `TokenCookie`, as for the other options.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        secret: str | bytes,
        name: str = "shardkit_token",
        max_age: int = 600,
        same_site: Literal["lax", "strict", "none"] = "lax",
    ) -> None:
        self._app = app
        self._cookie = TokenCookie(secret, name, max_age, same_site)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        with carrying(self._cookie.read(connection.cookies)) as carrier:

            async def send_with_cookie(message: Message) -> None:
                if message["type"] == "http.response.start":
                    # threads may be at work on connections, and this is the event loop: nothing is asked
                    answer = self._cookie.answer(carrier, connection.cookies, asks=False)
                    if answer is not None:
                        secure = connection.url.scheme == "https"
                        headers = MutableHeaders(scope=message)
                        age = self._cookie.max_age
                        headers.append("set-cookie", self._header(answer.name, answer.value, age, secure=secure))
                        for name in answer.removed:
                            headers.append("set-cookie", self._header(name, "", 0, secure=secure))
                await send(message)

            await self._app(scope, receive, send_with_cookie)

    def _header(self, name: str, value: str, max_age: int, *, secure: bool) -> str:
        cookie: SimpleCookie = SimpleCookie()
        cookie[name] = value
        morsel: Any = cookie[name]
        morsel["path"] = "/"
        morsel["max-age"] = max_age
        morsel["httponly"] = True
        morsel["samesite"] = self._cookie.same_site
        morsel["secure"] = secure
        return str(morsel.OutputString())
