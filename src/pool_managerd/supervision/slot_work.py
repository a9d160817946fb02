"""The work of one pool's launches on its slots, started by effects: its outcome is an event."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.narration import shortened
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.reports import Reports
from pool_managerd.supervision.services import Services


async def slot_work(effect: do.SlotEffect, pool: Pool, actor: Reports, services: Services) -> None:
    """Save what they hold before the engine is stopped, or give it back before it is ready."""
    epoch = effect.epoch
    if isinstance(effect, do.SaveCache):
        await services.slots.save(pool, actor.emit)
        actor.post(ev.CacheSaved(epoch))
        return
    actor.learn(epoch, step="restore")
    found = await services.slots.restore(pool, actor.emit)
    lost = shortened(services.events.redactor.text(found.lost))  # an engine's words may be among it
    found = replace(found, lost=lost)
    actor.learn(epoch, restored=found)
    actor.post(ev.CacheRestored(epoch, found.slots))
