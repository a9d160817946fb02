"""What callers of the node ask of its configuration while it runs: a part of the façade."""

from __future__ import annotations

from typing import Any

from pool_managerd.config import Config, PolicyConfig
from pool_managerd.supervision.apply import Applies, ApplyOptions
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.wiring.adapters import Adapters


class ApplyCalls:
    """Mixed into ``PoolManager``, whose parts these are."""

    config: Config
    _a: Adapters
    _pools: Pools
    _applies: Applies

    async def plan_apply(self, config: Config, *, prune: bool = False) -> dict[str, Any]:
        """What ``apply`` would do to which pools, in order, and how long it would take; nothing happens.

        ``pools`` has those that change: ``action`` (add, remove, keep, take_over, start, restart, reload), ``changes``,
        ``restarts``, the forecast of a reload, and ``problem`` where something is in its way now. ``at_once`` are keys that are
        taken over without touching a pool, ``waiting`` those that need another start of the daemon, ``by_hand`` pools that stay
        what a reload has made of them. Raises RequestError.
        """
        return await self._applies.plan(config, prune=prune)

    async def apply(self, config: Config, options: ApplyOptions | None = None) -> Operation:
        """Have ``config`` in force, touching only the pools that it changes; those that it does not name go with ``prune`` alone.

        Each pool by itself: what fails with one leaves the others as they are, and the operation has failed. Paths in it are
        those of the configuration that the node was made with. Raises RequestError OPERATION_IN_PROGRESS, PLAN_CHANGED.
        """
        return await self._applies.begin(config, options or ApplyOptions())

    def use_policy(self, policy: PolicyConfig) -> None:
        """What may be fetched and run from now on; what runs goes on."""
        self.use_config(self.config.model_copy(update={"policy": policy}))

    def use_config(self, config: Config) -> None:
        """For ``apply``: what is in force from now on. It touches no pool."""
        self.config = config
        self._pools.use_config(config)
        self._a.use_config(config)
