"""A pytest plugin for SQLAlchemy's own test suite: every session is one of ours, on a cluster over the test's engine.

Loaded before the suite's modules are imported, so that what they import is ours already. ``TRANSPARENCY`` says how:

- ``stock``: nothing is replaced.
- ``one``: on a cluster of one shard.
- ``two``: on a cluster with a second shard that holds nothing: all tables stand on the first. Statements are then
  planned in full.

``TRANSPARENCY_REPORT`` names the directory that outcomes and counters are written to.
"""

from __future__ import annotations

import json
import os
import re
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.orm import session as session_module
from sqlalchemy.testing import config

import shardkit
from shardkit.cluster import Cluster
from shardkit.routing import planner as planner_module
from shardkit.session import transaction as transaction_module
from shardkit.session.session import ClusterSession
from shardkit.shardmap import ShardMap, TableInfo

MODE = os.environ.get("TRANSPARENCY", "one")

#: How often each part of the router was at work.
COUNTERS = Counter[str]()
#: Test -> what became of it. Its class may carry the name and version of the database.
OUTCOMES: dict[str, str] = {}
_DATABASE = re.compile(r"_sqlite\+pysqlite_[\d_]+(?=::)")


class AnyTable(ShardMap):
    """A map that knows every table there is: on the first shard."""

    def table(self, name: str) -> TableInfo:
        return TableInfo(name, "vertical", (self.keyspaces["all"],))


def _map() -> ShardMap:
    shards = {"first": {"master": "sqlite:///first.db"}}
    if MODE == "two":
        shards["second"] = {"master": "sqlite:///second.db"}
    return AnyTable.parse(
        {
            "format": 1,
            "cluster": "suite",
            "keyspaces": {"all": {"tables": ["one"], "placement": "first"}},
            "shards": shards,
        }
    )


_clusters: weakref.WeakKeyDictionary[sa.Engine, Cluster] = weakref.WeakKeyDictionary()


def cluster_of(engine: sa.Engine) -> Cluster:
    """The cluster whose first shard is this engine."""
    if engine not in _clusters:
        engines = {("first", "master"): engine}
        if MODE == "two":
            engines["second", "master"] = sa.create_engine("sqlite://")
        _clusters[engine] = shardkit.create_cluster(_map(), engines=engines)
    return _clusters[engine]


class SuiteSession(ClusterSession):
    """A session that takes a bind as `sqlalchemy.orm.Session` does, and is one of ours."""

    def __init__(self, bind: Any = None, **options: Any) -> None:
        COUNTERS["sessions"] += 1
        given = config.db if bind is None else bind
        connections = {"first": given} if isinstance(given, sa.Connection) else None
        if connections:
            options["connections"] = connections
        super().__init__(cluster_of(given.engine), transactions="best_effort", **options)
        self.bind = bind


SuiteSession.__name__ = "Session"  # it stands in the names of tests


def _counted(owner: type[Any], name: str, counter: str) -> None:
    original = getattr(owner, name)

    def count(*arguments: Any, **options: Any) -> Any:
        COUNTERS[counter] += 1
        return original(*arguments, **options)

    setattr(owner, name, count)


def _replace() -> None:
    stock = session_module.Session
    original = stock.__init__

    def construct(self: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(self, ClusterSession):
            COUNTERS["stock sessions"] += 1
        original(self, *arguments, **options)

    stock.__init__ = construct  # type: ignore[method-assign]
    orm.Session = session_module.Session = SuiteSession  # type: ignore[misc]
    orm.sessionmaker.__init__.__kwdefaults__["class_"] = SuiteSession
    _counted(planner_module.Planner, "plan", "statements planned")
    if MODE == "two":
        _counted(planner_module.Planner, "_on_the_only", "sent to the sole shard")
    _counted(transaction_module.ClusterTransaction, "bind_for", "endpoints chosen")


if MODE != "stock":
    _replace()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the worst that happened to a test in its setup, its call and its teardown."""
    test = _DATABASE.sub("", report.nodeid)
    if report.outcome != "passed" or report.when == "call":
        OUTCOMES[test] = "failed" if "failed" in {report.outcome, OUTCOMES.get(test)} else report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each process writes down what it counted; the one that hears from all, what became of the tests."""
    if report := os.environ.get("TRANSPARENCY_REPORT"):
        directory = Path(report)
        (directory / f"counters-{os.getpid()}.json").write_text(json.dumps(COUNTERS), encoding="utf-8")
        if not hasattr(session.config, "workerinput"):
            (directory / "outcomes.json").write_text(json.dumps(OUTCOMES), encoding="utf-8")
