"""Leases as remote callers see them: by id, on a ready pool, told to its driver. The counting is the registry's."""

from __future__ import annotations

from typing import Any

from pool_managerd.core.lifecycle import view
from pool_managerd.core.registry import Registry
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.supervision.driver import PoolDriver
from pool_managerd.supervision.protocols import Clock

MAX_TTL_MS = 7 * 86_400_000


class Leases:
    """Synchronous from check to grant, so that no drain can come in between."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock

    def allocate(self, driver: PoolDriver, holder: str | None, ttl_ms: int | None) -> dict[str, Any]:
        """Raises RequestError POOL_UNREADY, POOL_DRAINING or NO_FREE_SLOTS; SpecError for a wrong ``ttl_ms``."""
        pool_id, seen = driver.pool_id, view(driver.instance)
        if not seen.ready and not seen.draining:
            raise RequestError(
                f"cannot lease pool {pool_id}: it is {seen.state}",
                code="POOL_UNREADY", status=503, pool_id=pool_id, retriable=True,
                hint=driver.instance.last_error or "start it, or wait until it is ready",
            )  # fmt: skip
        expires_at = None if ttl_ms is None else self._expiry(ttl_ms)
        lease = self._registry.grant(pool_id, holder=holder, given_at_ms=self._clock.wall_ms(), expires_at=expires_at)
        driver.leases_changed(expiry=expires_at is not None)
        return {"lease_id": lease.lease_id, "active_leases": self._registry.get_active_leases(pool_id)}

    def renew(self, driver: PoolDriver, lease_id: str, ttl_ms: int) -> dict[str, Any]:
        self._registry.renew(driver.pool_id, lease_id, self._expiry(ttl_ms))
        driver.leases_changed(expiry=True)
        return {"lease_id": lease_id, "active_leases": self._registry.get_active_leases(driver.pool_id)}

    def release(self, driver: PoolDriver, lease_id: str) -> dict[str, Any]:
        active = self._registry.release(driver.pool_id, lease_id)
        driver.leases_changed()
        return {"active_leases": active}

    def _expiry(self, ttl_ms: int) -> float:
        if isinstance(ttl_ms, bool) or not 0 < ttl_ms <= MAX_TTL_MS:
            raise SpecError(f"cannot use ttl_ms {ttl_ms}: it must be from 1 to {MAX_TTL_MS} (7 days)")
        return self._clock.monotonic() + ttl_ms / 1000
