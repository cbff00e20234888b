"""Tokens in cookies: what a browser has written its next request sees, in Starlette and in Flask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from http.cookies import SimpleCookie
from typing import Any

import flask
import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.orm import scoped_session
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import shardkit
from shardkit.contrib.cookies import TokenCookie
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

    def __init__(self, ask: Callable[[str, str], tuple[str, list[str]]]) -> None:
        self._ask = ask
        self.cookies: dict[str, str] = {}

    def get(self, path: str) -> str:
        text, set_cookies = self.send(path)
        self.take(set_cookies)
        return text

    def send(self, path: str) -> tuple[str, list[str]]:
        """A request whose answer has not come yet: it comes with `take`."""
        return self._ask(path, "; ".join(f"{name}={value}" for name, value in self.cookies.items()))

    def take(self, set_cookies: list[str]) -> None:
        for set_cookie in set_cookies:
            for name, morsel in SimpleCookie(set_cookie).items():
                assert morsel["httponly"]
                assert morsel["samesite"].lower() == "lax"
                assert morsel["path"] == "/"
                if morsel["max-age"] == "0":
                    self.cookies.pop(name, None)
                else:
                    self.cookies[name] = morsel.value


def starlette_browser(factory: Any, user: int) -> Browser:
    statement = select(User.name).where(User.id == user)

    def read(_request: Request) -> PlainTextResponse:  # in a thread of its own
        with factory() as session:
            return PlainTextResponse(session.scalars(statement).one())

    def read_open(_request: Request) -> PlainTextResponse:
        session = factory()
        return PlainTextResponse(session.scalars(statement).one(), background=BackgroundTask(session.close))

    def write(_request: Request) -> PlainTextResponse:
        with factory.begin() as session:
            session.get_one(User, user, with_for_update=True).age = 30
        return PlainTextResponse("written")

    app = Starlette(routes=[Route("/read", read), Route("/read-open", read_open), Route("/write", write)])
    app.add_middleware(TokenMiddleware, secret=SECRET)

    def ask(path: str, cookie: str) -> tuple[str, list[str]]:
        async def whole() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
                return await client.get(path, headers={"cookie": cookie} if cookie else {})

        answer = asyncio.run(whole())
        assert answer.status_code == 200
        return answer.text, answer.headers.get_list("set-cookie")

    return Browser(ask)


def flask_browser(factory: Any, user: int, others: Sequence[int] = ()) -> Browser:
    statement = select(User.name).where(User.id == user)
    app = flask.Flask("shop")
    app.config["SECRET_KEY"] = SECRET
    ShardkitTokens(app)
    scoped = scoped_session(factory)
    app.teardown_appcontext(lambda _error: scoped.remove())

    @app.get("/read")
    def read() -> str:
        with factory() as session:
            return str(session.scalars(statement).one())

    @app.get("/read-open")
    def read_open() -> str:
        return str(scoped.scalars(statement).one())

    @app.get("/stream")
    def stream() -> flask.Response:
        every = select(User.id).where(User.id.in_([user, *others]))
        session = factory()
        rows = iter(session.scalars(every.execution_options(shardkit_read_from="master", yield_per=2)))
        first = next(rows)

        def rest() -> Iterator[str]:
            with session:
                yield f"{first} "
                yield from (f"{each} " for each in rows)

        return flask.Response(rest())

    @app.get("/write")
    def write() -> str:
        with factory.begin() as session:
            session.get_one(User, user, with_for_update=True).age = 30
        return "written"

    def ask(path: str, cookie: str) -> tuple[str, list[str]]:
        answer = app.test_client(use_cookies=False).get(path, headers={"cookie": cookie} if cookie else {})
        assert answer.status_code == 200
        return answer.text, answer.headers.getlist("set-cookie")

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
    browser.cookies["shardkit_token_w0"] = cookie
    assert browser.get("/read").startswith("replica")


@pytest.mark.parametrize("browser_of", [starlette_browser, flask_browser])
def test_an_answer_that_is_overtaken_takes_nothing_back(replicated: ReplicatedShop, browser_of: Any) -> None:
    replicated.catch_up()
    browser = browser_of(shardkit.sessionmaker(replicated.cluster), replicated.user)
    slow, late = browser.send("/read")
    assert slow.startswith("replica")
    assert late
    assert browser.get("/write") == "written"
    assert browser.get("/read") == "master"
    browser.take(late)
    assert browser.get("/read") == "master"


@pytest.mark.parametrize("browser_of", [starlette_browser, flask_browser])
def test_an_answer_without_news_has_no_cookie(replicated: ReplicatedShop, browser_of: Any) -> None:
    replicated.catch_up()
    browser = browser_of(shardkit.sessionmaker(replicated.cluster), replicated.user)
    assert browser.get("/write") == "written"
    replicated.catch_up()
    assert browser.get("/read").startswith("replica")
    assert browser.send("/read")[1] == []


@pytest.mark.parametrize("browser_of", [starlette_browser, flask_browser])
def test_an_answer_holds_what_all_cookies_held(replicated: ReplicatedShop, browser_of: Any) -> None:
    browser = browser_of(shardkit.sessionmaker(replicated.cluster), replicated.user)
    old = Token({"elsewhere": Mark(0, None)}), Token({"nowhere": Mark(0, None)})
    browser.cookies = {
        f"shardkit_token_{end}": token.dumps(SECRET) for end, token in zip(("w1", "r0"), old, strict=True)
    }
    assert browser.get("/write") == "written"
    ((name, value),) = browser.cookies.items()
    assert name in {"shardkit_token_w0", "shardkit_token_w2", "shardkit_token_w3"}
    assert {"elsewhere", "nowhere", "shop-0"} <= set(Token.loads(value, SECRET).marks)


def test_all_cookies_together_are_short() -> None:
    cookie, long = TokenCookie(SECRET), Token({f"shard-{n}-{n * n}": Mark(n, None) for n in range(500)})
    cookies: dict[str, str] = {}
    for wrote in (True, False):
        for _ in range(100):
            with carrying() as carrier:
                carrier.wrote = wrote
                carrier.change(long.merged)
                answer = cookie.answer(carrier, {}, asks=False)
            assert answer is not None
            cookies[answer.name] = answer.value
    assert len(cookies) == 6
    assert len("; ".join(f"{name}={value}" for name, value in cookies.items())) <= 4096
    assert cookie.read(cookies).mark("shard-0-0") == Mark(-1, None)


def put_back(replicated: ReplicatedShop, write: Callable[[], Any]) -> Callable[[], None]:
    """Have the replicas catch up with a write; calling the answer takes them back to before it."""
    replicated.catch_up()
    column = "SELECT gtid FROM shardkit_position"
    before = [replicated.shop.execute(replica, column)[0][0] for replica in replicated.replicas]
    write()
    replicated.catch_up()

    def back() -> None:
        for replica, gtid in zip(replicated.replicas, before, strict=True):
            replicated.shop.execute(replica, f"UPDATE shardkit_position SET gtid = '{gtid}'")

    return back


@pytest.mark.parametrize("browser_of", [starlette_browser, flask_browser])
def test_a_session_that_is_open_tells_what_it_saw_on_a_replica(replicated: ReplicatedShop, browser_of: Any) -> None:
    factory = shardkit.sessionmaker(replicated.cluster)
    mine, theirs = browser_of(factory, replicated.user), browser_of(factory, replicated.user)
    back = put_back(replicated, lambda: theirs.get("/write"))
    assert mine.get("/read-open").startswith("replica")
    back()
    assert mine.get("/read-open") == "master"
    assert mine.get("/read") == "master"


@pytest.mark.parametrize(("browser_of", "asks"), [(starlette_browser, False), (flask_browser, True)])
def test_a_session_that_is_open_tells_what_it_saw_on_a_master(
    replicated: ReplicatedShop, browser_of: Any, asks: bool
) -> None:
    browser = browser_of(shardkit.sessionmaker(replicated.cluster), replicated.user)
    replicated.catch_up()
    replicated.beat(600, 600)
    wait_until(lambda: replicated.fresh() == set())
    replicated.shop.execute(replicated.shop.masters["shop-0"], "UPDATE users SET age = 7")
    assert browser.get("/read-open") == "master"
    replicated.beat(0, 0)
    wait_until(lambda: replicated.fresh() == {0, 1})
    assert browser.get("/read-open") == "master"
    replicated.catch_up()
    assert browser.get("/read-open").startswith("replica") is asks  # else until a transaction ends before its answer
    assert browser.get("/read").startswith("replica") is asks
    replicated.catch_up()
    assert browser.get("/read").startswith("replica")


def test_a_stream_is_not_disturbed(replicated: ReplicatedShop) -> None:
    _, *others = replicated.shop.users_on("shop-0", 30)
    for user in others:
        replicated.shop.execute(
            replicated.shop.masters["shop-0"], f"INSERT INTO users (id, name) VALUES ({user}, 'master')"
        )
    replicated.catch_up()
    browser = flask_browser(shardkit.sessionmaker(replicated.cluster), replicated.user, others)
    assert {int(each) for each in browser.get("/stream").split()} == {replicated.user, *others}
    assert browser.get("/read") == "master"


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
