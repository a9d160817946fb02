"""In which order the reloads of an apply are done: what frees memory comes before what needs more, so that more of them fit."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.config.plan import Action, Plan, Step
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.core.memory.measurements import Measurements
from pool_managerd.errors import PoolError
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


async def in_order(plan: Plan, pools: Pools, services: Services) -> Plan:
    """Reloads that are known to need less than what runs come first, those that are known to need more last; else the order of
    the file stays.
    """
    reloads = [step for step in plan.steps if step.action is Action.RELOAD]
    if len(reloads) < 2:
        return plan
    ranks = {step.pool_id: await _rank(step, pools, services) for step in reloads}
    sorted_reloads = iter(sorted(reloads, key=lambda step: ranks[step.pool_id]))
    steps = (next(sorted_reloads) if step.action is Action.RELOAD else step for step in plan.steps)
    return replace(plan, steps=tuple(steps))


async def _rank(step: Step, pools: Pools, services: Services) -> int:
    """-1 for one that frees memory, 1 for one that needs more, 0 for one of which that is not known, and where it is the same.

    Estimate is compared with estimate: what the present one was measured to hold says nothing of the other.
    """
    pool = pools.get(step.pool_id)
    launch, new = pool.launch, step.config if step.said else pool.config
    if new is None or pool.config is None:
        return 0
    try:
        before = await services.sizer(pool.config, None) if launch.sizing is None else launch.sizing.inputs
        after = await services.sizer(new, None)
    except PoolError:  # its reload will say so
        return 0
    now, then = _needs(before, launch), _needs(after, launch)
    return 0 if now is None or then is None else (then > now) - (then < now)


def _needs(inputs: LaunchInputs, launch: Launch) -> int | None:
    """On the GPUs of ``launch``, or in RAM where it has none; None where no size of the model is known."""
    if not (inputs.weights_bytes or inputs.configured_bytes or inputs.divides_equally):
        return None
    estimator = LaunchEstimator(inputs, Measurements())
    if launch.allocation is None:
        return estimator.estimate(0).host.size_bytes
    devices, shares = launch.allocation.devices, launch.allocation.shares
    return sum(estimator.estimate_on(devices, shares).per_device(shares or (1 / len(devices),) * len(devices)))
