"""Leases as remote callers see them: by id, on a ready pool, told to its actor. The counting is the registry's.

What ``take``, ``prolong`` and ``give_back`` acknowledge is there after the daemon's death, too; ``allocate``, ``renew`` and
``release`` do not wait for that.
"""

from __future__ import annotations

from typing import Any

from pool_managerd.core.lifecycle import view
from pool_managerd.core.redaction import masked_text
from pool_managerd.core.registry import Registry
from pool_managerd.errors import RequestError, SpecError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.protocols import Clock, LeaseKeeper

MAX_TTL_MS = 7 * 86_400_000


class Leases:
    """Synchronous from check to grant, so that no drain can come in between."""

    def __init__(self, pools: Pools, registry: Registry, clock: Clock, keeper: LeaseKeeper) -> None:
        self._pools = pools
        self._registry = registry
        self._clock = clock
        self._keeper = keeper

    async def take(self, pool: Pool, holder: str | None, ttl_ms: int | None, key: str | None = None) -> dict[str, Any]:
        """As ``allocate``, durably. Raises NodeError STATE_UNWRITABLE; nothing was given then."""
        return await self.confirmed(pool, self.allocate(pool, holder, ttl_ms, key), key)

    async def confirmed(self, pool: Pool, given: dict[str, Any], key: str | None = None) -> dict[str, Any]:
        """``given`` by ``allocate``, once it is durable. Raises NodeError STATE_UNWRITABLE; it is taken back then."""
        try:
            await self._keeper.kept()
        except BaseException:  # a caller that went away has no lease either, unless it names its request
            if key is None:
                self.release(pool, given["lease_id"])
            raise
        return given

    def check_ttl(self, ttl_ms: int | None) -> None:
        """Raises SpecError for one that no lease can have."""
        if ttl_ms is not None:
            self._expiry(ttl_ms)

    async def prolong(self, pool: Pool, lease_id: str, ttl_ms: int) -> dict[str, Any]:
        """As ``renew``, durably."""
        renewed = self.renew(pool, lease_id, ttl_ms)
        await self._keeper.kept()
        return renewed

    async def give_back(self, pool: Pool, lease_id: str) -> dict[str, Any]:
        """As ``release``, durably."""
        released = self.release(pool, lease_id)
        await self._keeper.kept()
        return released

    def allocate(self, pool: Pool, holder: str | None, ttl_ms: int | None, key: str | None = None) -> dict[str, Any]:
        """Raises RequestError POOL_UNREADY, POOL_DRAINING or NO_FREE_SLOTS; SpecError for a wrong ``ttl_ms``."""
        pool_id, seen = pool.pool_id, view(pool.state)
        if not seen.ready and self._pools.precedence.has(pool_id):
            raise RequestError(
                f"cannot lease pool {pool_id}: it is being reloaded ({seen.state})", status=409 if seen.draining else 503,
                code="POOL_DRAINING" if seen.draining else "POOL_UNREADY", pool_id=pool_id, retriable=True,
                hint="wait for its reload to end, or acquire it, which waits",
            )  # fmt: skip
        if not seen.ready and not seen.draining:
            raise RequestError(
                f"cannot lease pool {pool_id}: it is {seen.state}",
                code="POOL_UNREADY", status=503, pool_id=pool_id, retriable=True,
                hint=pool.state.last_error or "start it, or wait until it is ready",
            )  # fmt: skip
        expires_at = None if ttl_ms is None else self._expiry(ttl_ms)
        given_at_ms = self._clock.wall_ms()
        lease = self._registry.grant(pool_id, holder=holder, given_at_ms=given_at_ms, expires_at=expires_at, key=key)
        self._pools.leases_changed(pool_id, expiry=expires_at is not None)
        active = self._registry.get_active_leases(pool_id)
        epoch, url = self._place(pool, lease.lease_id)
        return {"lease_id": lease.lease_id, "active_leases": active, "url": url, "epoch": epoch}

    def renew(self, pool: Pool, lease_id: str, ttl_ms: int) -> dict[str, Any]:
        self._registry.renew(pool.pool_id, lease_id, self._expiry(ttl_ms))
        self._pools.leases_changed(pool.pool_id, expiry=True)
        return {"lease_id": lease_id, "active_leases": self._registry.get_active_leases(pool.pool_id)}

    def release(self, pool: Pool, lease_id: str) -> dict[str, Any]:
        active = self._registry.release(pool.pool_id, lease_id)
        self._pools.leases_changed(pool.pool_id)
        return {"active_leases": active}

    def held_by(self, pool: Pool, prefix: str) -> list[str]:
        """Ids of the leases whose holder's name begins so."""
        leases = self._registry.leases(pool.pool_id)
        return [lease.lease_id for lease in leases if (lease.holder or "").startswith(prefix)]

    def _place(self, pool: Pool, lease_id: str) -> tuple[int | None, str | None]:
        """The launch that the lease is on, and where its engine is: while one is replaced there are two."""
        epoch, other = self._registry.epoch_of(pool.pool_id, lease_id), self._pools.replacements.find(pool.pool_id)
        engine = (other if other is not None and other.instance.epoch == epoch else pool).launch.prepared
        return epoch, None if engine is None else masked_text(engine.url)

    def _expiry(self, ttl_ms: int) -> float:
        if isinstance(ttl_ms, bool) or not 0 < ttl_ms <= MAX_TTL_MS:
            raise SpecError(f"cannot use ttl_ms {ttl_ms}: it must be from 1 to {MAX_TTL_MS} (7 days)")
        return self._clock.monotonic() + ttl_ms / 1000
