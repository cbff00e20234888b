"""A shop over shards: an asyncio web application with ordinary SQLAlchemy in its handlers.

``shardkit migrate upgrade`` makes the tables; ``uvicorn app:app`` serves. `SHARDKIT_MAP` names another shard map
(``zookeeper://zk1:2181/shop``).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from models import Country, Order, User
from sqlalchemy import func, select
from sqlalchemy.orm import joinedload, selectinload
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from shardkit import async_sessionmaker, create_cluster
from shardkit.errors import ShardUnreachable, StaleShardMap


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """One cluster for the life of the process."""
    source = os.environ.get("SHARDKIT_MAP") or Path(__file__).with_name("shardmap.yaml")
    async with create_cluster(source) as cluster:
        app.state.cluster = cluster
        app.state.session = async_sessionmaker(cluster, expire_on_commit=False)
        yield


async def add_user(request: Request) -> JSONResponse:
    """POST /users {"name": ..., "country": "kr"}"""
    body = await request.json()
    async with request.app.state.session.begin() as session:
        user = User(name=body["name"], country_code=body["country"])
        session.add(user)  # the id, and with it the shard, is decided at flush
    shard = request.app.state.cluster.locate("users", id=user.id).shard
    return JSONResponse({"id": user.id, "shard": shard}, status_code=201)


async def add_order(request: Request) -> JSONResponse:
    """POST /users/7/orders {"item": ..., "total": ...}"""
    body = await request.json()
    async with request.app.state.session.begin() as session:
        order = Order(user_id=request.path_params["user_id"], item=body["item"], total=body["total"])
        session.add(order)  # goes to its user's shard
    return JSONResponse(_order(order), status_code=201)


async def show_user(request: Request) -> JSONResponse:
    """GET /users/7: one shard, three tables of which one is a reference table"""
    of_user = (
        select(User)
        .where(User.id == request.path_params["user_id"])
        .options(selectinload(User.orders), joinedload(User.country))
    )
    async with request.app.state.session() as session:
        user = await session.scalar(of_user)
    if user is None:
        return JSONResponse({"error": "no such user"}, status_code=404)
    orders = [_order(order) for order in user.orders]
    return JSONResponse({"id": user.id, "name": user.name, "country": user.country.name, "orders": orders})


async def largest_orders(request: Request) -> JSONResponse:
    """GET /orders/largest?limit=10: all shards, merged"""
    largest = select(Order).order_by(Order.total.desc(), Order.id).limit(int(request.query_params.get("limit", "10")))
    async with request.app.state.session() as session:
        orders = (await session.scalars(largest)).all()
        in_all = await session.scalar(select(func.count()).select_from(Order))
    return JSONResponse({"orders": [_order(order) for order in orders], "of": in_all})


async def countries(request: Request) -> JSONResponse:
    """GET /countries: a reference table is read on one shard"""
    async with request.app.state.session() as session:
        rows = await session.scalars(select(Country).order_by(Country.code))
        return JSONResponse({country.code: country.name for country in rows})


async def try_again(_request: Request, error: Exception) -> JSONResponse:
    """A bucket is moving, or a shard's server is away: other keys are served meanwhile."""
    return JSONResponse({"error": str(error)}, status_code=503, headers={"Retry-After": "1"})


def _order(order: Order) -> dict[str, Any]:
    return {"id": order.id, "user": order.user_id, "item": order.item, "total": order.total}


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/users", add_user, methods=["POST"]),
        Route("/users/{user_id:int}", show_user),
        Route("/users/{user_id:int}/orders", add_order, methods=["POST"]),
        Route("/orders/largest", largest_orders),
        Route("/countries", countries),
    ],
    exception_handlers={StaleShardMap: try_again, ShardUnreachable: try_again},
)
