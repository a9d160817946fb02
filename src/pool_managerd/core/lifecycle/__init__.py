"""The lifecycle of a pool: ``step(pool, event, now, policy) -> (pool, effects)``. Sans-IO (DESIGN §3)."""

from pool_managerd.core.lifecycle.instance import After, Instance
from pool_managerd.core.lifecycle.phase import Phase
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState
from pool_managerd.core.lifecycle.table import TABLE, next_timer, step
from pool_managerd.core.lifecycle.view import View, outline, sleeps_evicted, validate, view

__all__ = [
    "TABLE", "After", "Desired", "Instance", "Phase", "Policy", "PoolState", "View", "next_timer", "outline",
    "sleeps_evicted", "step", "validate", "view",
]  # fmt: skip
