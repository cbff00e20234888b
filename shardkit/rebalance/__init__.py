"""Moving buckets between shards: plans, jobs, and what keeps them safe."""

from __future__ import annotations

from shardkit.rebalance.coordinator import Observer, Settings
from shardkit.rebalance.job import Job, Progress, State
from shardkit.rebalance.plan import Add, Drain, Even, MoveBuckets, Plan, Split, Transfer, Wish
from shardkit.rebalance.planning import apply_plan, cancel_job, list_jobs, plan_move

__all__ = [
    "Add",
    "Drain",
    "Even",
    "Job",
    "MoveBuckets",
    "Observer",
    "Plan",
    "Progress",
    "Settings",
    "Split",
    "State",
    "Transfer",
    "Wish",
    "apply_plan",
    "cancel_job",
    "list_jobs",
    "plan_move",
]
