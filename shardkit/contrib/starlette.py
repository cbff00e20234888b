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
    """Carry tokens in a signed cookie.

    ::

        app.add_middleware(TokenMiddleware, secret=settings.secret)

    Sessions made in a request begin with the browser's token. What they write and see before the answer begins goes
    into the cookie; what a background task or the rest of a streamed answer writes does not.

    :param secret: signs the cookie; see `TokenCookie`, as for the other options.
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
        with carrying(self._cookie.read(connection.cookies.get(self._cookie.name))) as carrier:

            async def send_with_cookie(message: Message) -> None:
                if message["type"] == "http.response.start" and carrier.changed:
                    secure = connection.url.scheme == "https"
                    headers = MutableHeaders(scope=message)
                    headers.append("set-cookie", self._header(self._cookie.write(carrier.token), secure=secure))
                await send(message)

            await self._app(scope, receive, send_with_cookie)

    def _header(self, value: str, *, secure: bool) -> str:
        cookie: SimpleCookie = SimpleCookie()
        cookie[self._cookie.name] = value
        morsel: Any = cookie[self._cookie.name]
        morsel["path"] = "/"
        morsel["max-age"] = self._cookie.max_age
        morsel["httponly"] = True
        morsel["samesite"] = self._cookie.same_site
        morsel["secure"] = secure
        return str(morsel.OutputString())
