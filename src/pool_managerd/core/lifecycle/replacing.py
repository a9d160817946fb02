"""One instance takes another's place: what passes from the one to the other, and which launches are whose.

Both have a state of their own meanwhile, and ``step`` is what changes each. A candidate has one launch, and as many more as are
allowed for want of a free port; should it fail, that is final.
"""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle.instance import Instance
from pool_managerd.core.lifecycle.policy import Policy
from pool_managerd.core.lifecycle.pool import Desired, PoolState

_REPLICAS = ("r0", "r1")


def candidate_beside(pool: PoolState, instance: InstanceId, p: Policy) -> tuple[PoolState, PoolState]:
    """``pool``, whose engine is ``instance``, and its candidate: the other replica, down, with epochs that are its alone."""
    latest, launches = max(pool.last_epoch, pool.active.epoch), 1 + p.port_retries  # the pool's own may be started meanwhile
    other = InstanceId(pool.pool_id, next(name for name in _REPLICAS if name != instance.replica_id))
    candidate = PoolState(Instance(other, latest), desired=Desired.ON_DEMAND, retry=False)
    return replace(pool, last_epoch=latest + launches), candidate


def in_place_of(old: PoolState, new: PoolState) -> PoolState:
    """``new`` as the pool, with what outlives a launch: counters, hold, and that no epoch is used twice."""
    return replace(
        new, desired=Desired.WANTED, held=old.held, retry=True, proven=True, has_run=True,
        crash_count=old.crash_count + new.crash_count, restart_count=old.restart_count + new.restart_count,
        last_epoch=max(old.last_epoch, old.active.epoch, new.last_epoch),
    )  # fmt: skip
