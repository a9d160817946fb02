"""How the pools of a node come up: first what an earlier daemon has left running, then what is wanted besides.

What was left is reserved again before anything else may be promised its memory, and adopted by its pool. What belongs to no pool
any more is stopped before others start, as it may hold what they need.
"""

from __future__ import annotations

from collections.abc import Sequence

from pool_managerd import failpoints
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.registry import KeptLeases
from pool_managerd.supervision import measured
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.undone_reloads import UndoneReloads


async def boot(pools: Pools, services: Services, stored: dict[str, StoredPool], leases: Sequence[KeptLeases] = ()) -> None:
    """Raises NodeError when the runtime directory or the state cannot be used."""
    measured.restore(services)
    await pools.restore(stored)
    reloads = UndoneReloads(pools, services)
    reloads.restore()
    failpoints.reach("boot.restored")
    undone, found = reloads.epochs(), services.adoption.left()
    left = {
        pool_id: engine for pool_id, engine in found.items()
        if _may_go_on(pools.find(pool_id)) and engine.launch.epoch <= undone.get(pool_id, engine.launch.epoch)
    }  # fmt: skip
    for kept in leases:
        services.registry.restore_leases(kept, left[kept.pool_id].launch.epoch if kept.pool_id in left else None)
    failpoints.reach("boot.leases")
    for pool_id, engine in left.items():
        services.admission.restore_launch(engine.launch)
        if pools.get(pool_id).config is not None:
            services.engines.claim(engine.launch.instance, engine.launch.port)
        pools.post(pool_id, ev.Adopt(engine.launch.epoch))
        failpoints.reach("boot.adopting")
    for ended in await services.adoption.clear(left.keys()):
        services.events.emit(
            "survivor", ended.human, level="warn", pool_id=ended.pool_id, outcome=ended.outcome, pid=ended.pid
        )  # fmt: skip
    failpoints.reach("boot.cleared")
    started = set[str]()
    for pool in pools.all():
        wanted = pool.state.desired is Desired.WANTED and not pool.state.held and pool.definition.barred is None
        if wanted and pool.pool_id not in left:
            await pools.request(pool, "start", ev.Start(origin="boot"), "up")
            started.add(pool.pool_id)

    failpoints.reach("boot.started")

    def goes_on(operation: Operation) -> bool:
        """What an engine that was left leads to, or a start; what else was to be done is done, or not known."""
        if operation.kind == "reload" and reloads.is_committed(operation):
            pools.operations.finish(operation, {"pool_id": operation.pool_id, "rolled_back": False})
            return True
        awaited = operation.goal in ("now", "down") or operation.pool_id in started | left.keys()
        if not (awaited and operation.goal and pools.find(operation.pool_id)):
            return False
        if operation.goal == "down" and operation.pool_id in started:  # what was to end is gone; what runs is another launch
            pools.operations.finish(operation, {"pool_id": operation.pool_id})
            return True
        pools.resume(operation)
        return True

    pools.operations.resume(goes_on)
    await reloads.forget()


def _may_go_on(pool: Pool | None) -> bool:
    """What no pool has, and what policy does not allow any more, is stopped. Secrets that were not kept stop nothing."""
    barred = None if pool is None else pool.definition.barred
    return pool is not None and (barred is None or barred.code == "SECRETS_NOT_KEPT")
