"""How the pools of a node come up: first what an earlier daemon has left running, then what is wanted besides.

What was left is reserved again before anything else may be promised its memory, and adopted by its pool. What belongs to no pool
any more is stopped before others start, as it may hold what they need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pool_managerd import failpoints
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.launch_record import LeftEngine
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
    left, replaced = _taken_over(pools, services.adoption.left().values(), reloads)
    both = [*left.values(), *replaced.values()]
    _restore_promises(pools, services, both, leases)
    for pool_id, engine in left.items():
        pools.post(pool_id, ev.Adopt(engine.launch.epoch, engine.launch.instance.replica_id))
        failpoints.reach("boot.adopting")
    for pool_id, engine in replaced.items():
        pools.replacements.adopt(pools.get(pool_id), engine.launch)
    for ended in await services.adoption.clear({engine.launch.instance for engine in both}):
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
        found = left.get(operation.pool_id)
        stays = (pool := pools.find(operation.pool_id)) is not None and not pool.state.desired.stays_down
        if operation.goal in ("down", "drained") and stays and found is not None and found.exit is None:
            return False  # somebody has wanted it up since, or it was to make room: what runs goes on
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


def _taken_over(
    pools: Pools, found: Iterable[LeftEngine], reloads: UndoneReloads
) -> tuple[dict[str, LeftEngine], dict[str, LeftEngine]]:
    """By pool id, the engine that goes on as the pool's, and one that it had replaced and that drains still.

    What a reload launched that was not done is neither.
    """
    undone, done, left, replaced = reloads.epochs(), reloads.replaced(), dict[str, LeftEngine](), dict[str, LeftEngine]()
    for engine in sorted(found, key=lambda engine: engine.launch.epoch):
        pool_id, epoch = engine.launch.instance.pool_id, engine.launch.epoch
        if _may_go_on(pools.find(pool_id)) and epoch <= undone.get(pool_id, epoch):
            (replaced if done.get(pool_id) == epoch else left)[pool_id] = engine
    return left, replaced


def _restore_promises(pools: Pools, services: Services, engines: Iterable[LeftEngine], leases: Iterable[KeptLeases]) -> None:
    """Leases, memory and ports of what goes on, before anything else may be promised them."""
    launches = [engine.launch for engine in engines]
    for kept in leases:
        services.registry.restore_leases(kept, {launch.epoch for launch in launches if launch.instance.pool_id == kept.pool_id})
    failpoints.reach("boot.leases")
    for launch in launches:
        services.admission.restore_launch(launch)
        if pools.get(launch.instance.pool_id).config is not None:
            services.engines.claim(launch.instance, launch.port)


def _may_go_on(pool: Pool | None) -> bool:
    """What no pool has, and what policy does not allow any more, is stopped. Secrets that were not kept stop nothing."""
    barred = None if pool is None else pool.definition.barred
    return pool is not None and (barred is None or barred.code == "SECRETS_NOT_KEPT")
