"""What is looked at while a pool drains: the requests of clients without a lease, and what there is to tell of it."""

from __future__ import annotations

from pool_managerd.core import narration
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.supervision.in_flight import GAP_S, in_hand, requests_of
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.reports import Reports
from pool_managerd.supervision.services import Services

TOLD_S, UNCHANGED_S = 1.0, 5.0
"""So long after the last one it is told again: that less is left, and that nothing has changed."""
_PATIENCE = 0.1
"""Of the time that it drains already: a long drain is told of more and more rarely."""


async def watch_drain(pool: Pool, actor: Reports, services: Services, epoch: int) -> None:
    """Until launch ``epoch`` drains no more. Requests that the engine was seen to have are asked for until there are none."""
    clock, told_at, told = services.clock, services.clock.monotonic(), in_hand(pool, services.registry)
    while _drains(pool, epoch):
        if pool.launch.requests:
            left = await requests_of(pool, services, unheard=pool.launch.requests)
            if actor.learn(epoch, requests=left) and not left:
                actor.post(ev.LeasesChanged(services.registry.leases_on(pool.pool_id, epoch)))
        now, left = clock.monotonic(), in_hand(pool, services.registry)
        since_s = now - told_at
        rarely_s = (now - (pool.instance.drain_since or now)) * _PATIENCE
        if left and since_s >= max(TOLD_S if left != told else UNCHANGED_S, rarely_s):
            told_at, told = now, left
            _tell(pool, actor, now, left)
        await pause(clock, GAP_S if pool.launch.requests else TOLD_S)
    actor.learn(epoch, requests=0)  # a drain that was taken back leaves nothing to go by


def _drains(pool: Pool, epoch: int) -> bool:
    return pool.instance.epoch == epoch and pool.instance.phase is Phase.DRAINING


def _tell(pool: Pool, actor: Reports, now: float, left: int) -> None:
    left_s = max(0.0, (pool.instance.deadline or now) - now)
    what, until = narration.count(left, "request"), narration.duration(left_s)
    human = f"Pool '{pool.pool_id}' is draining; {what} left, {until} to the deadline"
    actor.emit("drain_progress", human, left=left, remaining_ms=round(left_s * 1000))
