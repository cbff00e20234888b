"""Metrics, by Prometheus' names. Nothing is registered on import: a daemon makes a set of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Commits take a fsync or two: half a millisecond to seconds.
_COMMIT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class RouterMetrics:
    """What the sessions of one cluster count, in this process. Nothing on the path of a statement for one shard.

    :param registry: where the metrics are registered; a new one by default.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self.scattered = Counter(
            "shardkit_router_scattered_reads",
            "Reads that asked several shards, by the first table that they name.",
            ("table",),
            registry=self.registry,
        )
        self.late = Counter(
            "shardkit_router_deadlines_exceeded",
            "Statements killed at their deadline.",
            ("shard",),
            registry=self.registry,
        )
        self.missing = Counter(
            "shardkit_router_missing_shards",
            "Times that a read went without a shard (shardkit_partial_ok).",
            ("shard",),
            registry=self.registry,
        )
        self.commits = Counter(
            "shardkit_router_commits_over_shards",
            "Two-phase commits: done, pending (decided, a shard yet to be told), unknown, failed (nothing is durable).",
            ("outcome",),
            registry=self.registry,
        )

        self.replica_reads = Counter(
            "shardkit_router_replica_transactions",
            "Transactions that read a shard on one of its replicas.",
            ("shard",),
            registry=self.registry,
        )
        self.lost_replicas = Counter(
            "shardkit_router_lost_replicas",
            "Connections to replicas that were lost in the middle of a read, which then went elsewhere.",
            ("shard",),
            registry=self.registry,
        )
        self.master_reads = Counter(
            "shardkit_router_master_fallbacks",
            "Transactions that would have read a shard on a replica, and read its master: no_replica, lag, token.",
            ("shard", "reason"),
            registry=self.registry,
        )


class RelayMetrics:
    """What the relay counts, per hop.

    :param registry: where the metrics are registered; a new one by default.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        hop = ("hop",)
        self.transactions = Counter(
            "shardkit_relay_transactions", "Source transactions applied.", hop, registry=self.registry
        )
        self.rows = Counter("shardkit_relay_rows", "Row events applied.", hop, registry=self.registry)
        self.bytes = Counter("shardkit_relay_bytes", "Bytes of row events applied.", hop, registry=self.registry)
        self.commit_seconds = Histogram(
            "shardkit_relay_commit_seconds",
            "Time of the target's COMMIT.",
            hop,
            registry=self.registry,
            buckets=_COMMIT_BUCKETS,
        )
        self.batch = Gauge(
            "shardkit_relay_batch_transactions",
            "Source transactions in the last target transaction.",
            hop,
            registry=self.registry,
        )
        self.queue_bytes = Gauge(
            "shardkit_relay_queue_bytes", "Bytes read and not yet applied.", hop, registry=self.registry
        )
        self.lag_seconds = Gauge(
            "shardkit_relay_lag_seconds",
            "Age of the newest source transaction applied, when it was applied.",
            hop,
            registry=self.registry,
        )
        self.restarts = Counter(
            "shardkit_relay_restarts", "Starts after an error.", ("hop", "reason"), registry=self.registry
        )
        self.position_info = Gauge(
            "shardkit_relay_position_info",
            "Always 1: the position is a label.",
            ("hop", "gtid"),
            registry=self.registry,
        )
        self.apply_info = Gauge(
            "shardkit_relay_apply_info",
            "1 for the path in use: row events (raw) or statements (sql).",
            ("hop", "path"),
            registry=self.registry,
        )
