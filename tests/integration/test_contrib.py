"""Tokens in cookies: what a browser has written its next request sees, in Starlette and in Flask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Any

import flask
import httpx
import pytest
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import shardkit
from shardkit.contrib.flask import ShardkitTokens
from shardkit.contrib.starlette import TokenMiddleware
from shardkit.errors import PreconditionFailed
from shardkit.replicas.token import Mark, Token
from shardkit.session.carrying import carrying
from tests.integration.conftest import FLAVOUR, Shop, empty
from tests.integration.shop import User
from tests.integration.test_cluster import wait_until
from tests.integration.test_replica_reads import ReplicatedShop

pytestmark = getattr(pytest.mark, FLAVOUR)
SECRET = "a long random text"


@pytest.fixture
def replicated(server_shop: Shop, request: pytest.FixtureRequest) -> ReplicatedShop:
    """Two databases that stand for replicas: they have what `catch_up` says."""
    replicas = request.getfixturevalue("server_replicas")
    for replica in replicas:
        empty(request.getfixturevalue("database_server"), replica)
    made = ReplicatedShop(server_shop, replicas, max_lag=60.0)
    made.beat(0, 0)
    wait_until(lambda: made.fresh() == {0, 1})
    return made


class Browser:
    """Sends requests, and keeps cookies."""

    def __init__(self, ask: Callable[[str, str], tuple[str, str | None]]) -> None:
        self._ask = ask
        self.cookies: dict[str, str] = {}

    def get(self, path: str) -> str:
        header = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        text, set_cookie = self._ask(path, header)
        if set_cookie is not None:
            for name, morsel in SimpleCookie(set_cookie).items():
                assert morsel["httponly"]
                assert morsel["samesite"].lower() == "lax"
                assert morsel["path"] == "/"
                self.cookies[name] = morsel.value
        return text


def starlette_browser(factory: Any, user: int) -> Browser:
    def read(_request: Request) -> PlainTextResponse:  # in a thread of its own
        with factory() as session:
            return PlainTextResponse(session.scalars(select(User.name).where(User.id == user)).one())

    def write(_request: Request) -> PlainTextResponse:
        with factory.begin() as session:
            session.get_one(User, user, with_for_update=True).age = 30
        return PlainTextResponse("written")

    app = Starlette(routes=[Route("/read", read), Route("/write", write)])
    app.add_middleware(TokenMiddleware, secret=SECRET)

    def ask(path: str, cookie: str) -> tuple[str, str | None]:
        async def whole() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
                return await client.get(path, headers={"cookie": cookie} if cookie else {})

        answer = asyncio.run(whole())
        assert answer.status_code == 200
        return answer.text, answer.headers.get("set-cookie")

    return Browser(ask)


def flask_browser(factory: Any, user: int) -> Browser:
    app = flask.Flask("shop")
    app.config["SECRET_KEY"] = SECRET
    ShardkitTokens(app)

    @app.get("/read")
    def read() -> str:
        with factory() as session:
            return str(session.scalars(select(User.name).where(User.id == user)).one())

    @app.get("/write")
    def write() -> str:
        with factory.begin() as session:
            session.get_one(User, user, with_for_update=True).age = 30
        return "written"

    def ask(path: str, cookie: str) -> tuple[str, str | None]:
        answer = app.test_client(use_cookies=False).get(path, headers={"cookie": cookie} if cookie else {})
        assert answer.status_code == 200
        return answer.text, answer.headers.get("set-cookie")

    return Browser(ask)


@pytest.mark.parametrize("browser_of", [starlette_browser, flask_browser])
def test_a_browser_sees_what_it_has_written(replicated: ReplicatedShop, browser_of: Any) -> None:
    factory = shardkit.sessionmaker(replicated.cluster)
    mine, theirs = browser_of(factory, replicated.user), browser_of(factory, replicated.user)
    assert mine.get("/read").startswith("replica")
    assert mine.get("/write") == "written"
    assert mine.get("/read") == "master"
    assert theirs.get("/read").startswith("replica")
    replicated.catch_up()
    assert mine.get("/read").startswith("replica")


@pytest.mark.parametrize("browser_of", [starlette_browser, flask_browser])
@pytest.mark.parametrize("cookie", ["", "x", "1eNqLjgUAARUAuQ.forged", Token({"shop-0": Mark(0, None)}).dumps("other")])
def test_a_cookie_of_somebody_else_is_left_aside(replicated: ReplicatedShop, browser_of: Any, cookie: str) -> None:
    browser = browser_of(shardkit.sessionmaker(replicated.cluster), replicated.user)
    browser.cookies["shardkit_token"] = cookie
    assert browser.get("/read").startswith("replica")


def test_a_secret_has_to_be_there() -> None:
    with pytest.raises(PreconditionFailed, match="secret is empty"):
        ShardkitTokens(flask.Flask("shop"))
    with pytest.raises(PreconditionFailed, match="secret is empty"):
        TokenMiddleware(Starlette(), secret="")


def test_work_carries_its_token_through_its_sessions(replicated: ReplicatedShop) -> None:
    factory = shardkit.sessionmaker(replicated.cluster)
    statement = select(User.name).where(User.id == replicated.user)
    with carrying() as carrier:
        with factory.begin() as session:
            session.get_one(User, replicated.user, with_for_update=True).age = 4
        assert carrier.changed
        with factory() as session:
            assert session.scalars(statement).one() == "master"
    with factory() as session:
        assert session.scalars(statement).one().startswith("replica")
    with carrying(Token.loads(carrier.token.dumps())), factory() as session:
        assert session.scalars(statement).one() == "master"
    with factory(token=carrier.token) as session:
        assert session.scalars(statement).one() == "master"


def test_tokens_in_asyncio(replicated: ReplicatedShop) -> None:
    statement = select(User.name).where(User.id == replicated.user)

    async def whole() -> None:
        shop = replicated.shop
        async with shop.open(shop.map({"shop-0": replicated.replicas}), max_lag=60.0) as cluster:
            await asyncio.to_thread(cluster.health.wait)
            factory = shardkit.async_sessionmaker(cluster)
            async with factory() as session:
                assert (await session.scalars(statement)).one().startswith("replica")
                await session.rollback()
                (await session.get_one(User, replicated.user, with_for_update=True)).age = 5
                await session.commit()
                token = session.token  # type: ignore[attr-defined] # AsyncClusterSession's
                assert token.mark("shop-0").position is not None
                assert (await session.scalars(statement)).one() == "master"
            async with factory(token=token) as session:
                assert (await session.scalars(statement)).one() == "master"
            replicated.catch_up()
            async with factory(token=token) as session:
                assert (await session.scalars(statement)).one().startswith("replica")

    asyncio.run(whole())
