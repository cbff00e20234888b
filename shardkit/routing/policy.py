"""Reads over several shards: allowed, warned about, or refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shardkit.errors import ScatterRefused
from shardkit.routing.route import RouteOptions
from shardkit.routing.shapes import Shape

_lock = threading.Lock()
_forbidding = 0


@contextmanager
def no_scatter() -> Iterator[None]:
    """Meanwhile no statement of this process reads several shards, unless it says ``shardkit_scatter=True``.

    For tests. What would have read them raises `ScatterRefused`, whatever ``scatter=`` its session was made with.
    """
    global _forbidding
    with _lock:
        _forbidding += 1
    try:
        yield
    finally:
        with _lock:
            _forbidding -= 1


def check_policy(shape: Shape, options: RouteOptions, shards: int) -> str | None:
    """What to warn about when a statement reads several shards.

    :raises ScatterRefused: when it must not.
    """
    table = next((info for info in shape.infos if info.kind == "sharded"), None)
    name, key = (table.name, table.key) if table else (None, ())
    what = f"{name} is read on {shards} shards: nothing pins {' and '.join(key)}"
    if options.scatter is False or (options.scatter is None and (options.policy == "refuse" or _forbidding)):
        raise ScatterRefused(
            what, hint="add a condition on the key, or shardkit_scatter=True", table=name, key=key, shards=shards
        )
    return what if options.scatter is None and options.policy == "warn" else None
