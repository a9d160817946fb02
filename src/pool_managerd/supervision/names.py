"""What requests call a model by: a pool's id, the name that it is served under, or one of its aliases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pool_managerd.core.lifecycle import view
from pool_managerd.core.lifecycle.phase import RISING
from pool_managerd.core.registry import Registry
from pool_managerd.errors import RequestError
from pool_managerd.supervision.pool import Pool


class Names:
    """Of the pools that there are now."""

    def __init__(self, pools: Callable[[], Iterable[Pool]], registry: Registry) -> None:
        self._pools, self._registry = pools, registry

    def of(self, pool: Pool) -> tuple[str, ...]:
        """All that it answers to, its id first."""
        config = pool.config
        if config is None:
            return (pool.pool_id,)
        served = () if config.served_name is None else (config.served_name,)
        return tuple(dict.fromkeys((pool.pool_id, *served, *config.other_names)))

    def of_engine(self, pool: Pool) -> list[str]:
        """What its engine itself is asked for the model by, where it insists on that: the first one will do."""
        config = pool.config
        if config is None:
            return []
        own = config.model if config.provisioning.mode == "external" else pool.pool_id
        return [config.served_name or own]

    def resolve(self, model: str) -> list[Pool]:
        """The pools for ``model``: the one of that id, or all that have the name, the one that serves it soonest first.

        Raises RequestError MODEL_NOT_FOUND with the names that there are.
        """
        pools = list(self._pools())
        if (exact := next((pool for pool in pools if pool.pool_id == model), None)) is not None:
            return [exact]
        named = [pool for pool in pools if model in self.of(pool)]
        if not named:
            known = ", ".join(sorted({name for pool in pools for name in self.of(pool)})) or "none"
            raise RequestError(
                f"model {model[:80]!r} not found", code="MODEL_NOT_FOUND", status=404, hint=f"models here: {known[:400]}",
            )  # fmt: skip
        return sorted(named, key=self._rank)

    def _rank(self, pool: Pool) -> tuple[int, int, str]:
        """One with a free slot, with the fewest leases; else one that loads; else one that may be started."""
        seen, leases = view(pool.state), self._registry.get_active_leases(pool.pool_id)
        total, free = self._registry.get_slots(pool.pool_id)
        if seen.ready:
            return (0 if total is None or free else 1), leases, pool.pool_id
        down = 4 if pool.state.desired.stays_down or pool.state.held else 3
        return (2 if pool.instance.phase in RISING else down), leases, pool.pool_id
