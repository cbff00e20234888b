"""Session factories: the two lines of an application that change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, get_args
from weakref import WeakSet

from sqlalchemy import orm
from sqlalchemy.ext import asyncio as sa_asyncio

from shardkit.cluster import Cluster
from shardkit.errors import ShardkitError
from shardkit.routing.route import ScatterPolicy
from shardkit.session.asynchronous import AsyncClusterSession
from shardkit.session.session import ClusterSession
from shardkit.session.transacting import GivenConnections, ReadFrom
from shardkit.session.transaction import CommitMode

logger = logging.getLogger(__name__)

_told: WeakSet[Cluster] = WeakSet()


def sessionmaker(
    cluster: Cluster,
    *,
    read_from: ReadFrom = "replica",
    transactions: str = "atomic",
    scatter: ScatterPolicy = "allow",
    connections: GivenConnections | None = None,
    recheck: bool = True,
    class_: type[orm.Session] = ClusterSession,
    **session_options: Any,
) -> orm.sessionmaker[ClusterSession]:
    """A `sqlalchemy.orm.sessionmaker` whose sessions go to the shards of a cluster.

    :param read_from: ``replica``: reads go to a replica that is near enough and has all that this session has written
        and seen (`ClusterSession.token`), until the transaction writes to that shard; or ``master``.
    :param transactions: what a transaction that writes to several shards does. ``atomic``: it is committed on all of
        them or on none, by two-phase commit; SQLite has none, and falls back to best_effort. ``best_effort``: shards
        commit one after the other, a failure between them raises `PartialCommit`. ``single``: writing to a second
        shard raises `SecondShardWritten` and rolls back. A transaction on one shard is an ordinary one in each of them.
    :param scatter: what a read over several shards does: ``allow``, ``warn`` (a `ScatterWarning`) or ``refuse``.
    :param connections: connections to the shards' masters that are used instead of the cluster's own, by shard; a
        shard without one cannot be used. A transaction that has begun on one of them before stays its owner's, as
        ``join_transaction_mode=`` says; several of them are committed as under best_effort. For tests that roll back
        (`shardkit.testing.rollback`).
    :param recheck: whether objects that were read from a replica are compared with their rows on the master before they
        are written; without, an acknowledged change that the replica had not yet can be lost.
    :param class_: a `sqlalchemy.orm.Session` subclass of the application.
    :param session_options: as for `sqlalchemy.orm.sessionmaker`: ``expire_on_commit=``, ``info=``, ...
    :raises ShardkitError: for an option that a cluster's sessions cannot have.
    """
    check_options(read_from, transactions, scatter, session_options)
    return orm.sessionmaker(
        class_=_cluster_class(class_),
        cluster=cluster,
        read_from=read_from,
        transactions=_possible(cluster, transactions),
        scatter=scatter,
        connections=connections,
        recheck=recheck,
        **session_options,
    )


def async_sessionmaker(
    cluster: Cluster,
    *,
    read_from: ReadFrom = "replica",
    transactions: str = "atomic",
    scatter: ScatterPolicy = "allow",
    connections: GivenConnections | None = None,
    recheck: bool = True,
    class_: type[sa_asyncio.AsyncSession] = AsyncClusterSession,
    sync_session_class: type[orm.Session] = ClusterSession,
    **session_options: Any,
) -> sa_asyncio.async_sessionmaker[sa_asyncio.AsyncSession]:
    """`sessionmaker` for asyncio: a `sqlalchemy.ext.asyncio.async_sessionmaker`. The same code runs inside."""
    check_options(read_from, transactions, scatter, session_options)
    return sa_asyncio.async_sessionmaker(
        class_=class_,
        sync_session_class=_cluster_class(sync_session_class),
        cluster=cluster,
        read_from=read_from,
        transactions=_possible(cluster, transactions),
        scatter=scatter,
        connections=connections,
        recheck=recheck,
        asynchronous=True,
        **session_options,
    )


def _possible(cluster: Cluster, transactions: str) -> str:
    """What the cluster's databases can do: SQLite has no two-phase commit, which is said once."""
    if transactions != CommitMode.ATOMIC or cluster.view.planner.dialect_name != "sqlite":
        return transactions
    if cluster not in _told and len(cluster.map.shards) > 1:
        _told.add(cluster)
        logger.warning(
            "SQLite has no two-phase commit: on %s, a transaction that writes to several shards commits them one after "
            "the other, and raises PartialCommit when one of them fails",
            cluster.map.cluster,
        )
    return CommitMode.BEST_EFFORT


def _cluster_class(given: type[orm.Session]) -> type[ClusterSession]:
    if issubclass(given, ClusterSession):
        return given
    return type(given.__name__, (given, ClusterSession), {})


def check_options(read_from: str, transactions: str, scatter: str, session_options: Mapping[str, Any]) -> None:
    """:raises ShardkitError: naming the option and what it may be."""
    for name, value, allowed in (
        ("read_from", read_from, get_args(ReadFrom)),
        ("transactions", transactions, tuple(CommitMode)),
        ("scatter", scatter, get_args(ScatterPolicy)),
    ):
        if value not in allowed:
            raise ShardkitError(f"{name}={value!r} is not known", hint=f"it is one of {', '.join(allowed)}")
    for name in ("bind", "binds", "twophase"):
        if session_options.get(name):
            raise ShardkitError(
                f"{name}= is not an option of a cluster's sessions: the shard map says where tables are",
                hint="take it out; databases outside the map need a sessionmaker of their own",
            )
