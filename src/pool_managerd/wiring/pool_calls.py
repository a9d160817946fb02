"""What callers of the node ask of a pool beside its life: a part of the façade."""

from __future__ import annotations

from typing import Any

from pool_managerd.core.bench import BenchRequest
from pool_managerd.core.purge import PurgeRequest
from pool_managerd.supervision.bench import Benches
from pool_managerd.supervision.leases import Leases
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.purge import Purges


class PoolCalls:
    """Mixed into ``PoolManager``, whose parts these are."""

    _pools: Pools
    _leases: Leases
    _benches: Benches
    _purges: Purges

    # --- measuring ---

    async def bench(self, request: BenchRequest) -> Operation:
        """Measure a ready pool on purpose, with a lease on every slot meanwhile; kept as its baseline beside its warm-ups.

        The operation's outcome has ``alone`` and ``full`` (null of a pool with one slot), each with ``first_token_ms_p50``,
        ``between_tokens_ms_p50`` and ``_p99``, ``tokens_per_s``, ``tokens_per_s_total`` and ``prompt_tokens_per_s``, beside what
        it was measured with, and in ``longer_bench`` which earlier one stays the baseline, as its requests were longer. It is
        over within 10 minutes. Raises SpecError, RequestError POOL_IN_USE, POOL_UNREADY, OPERATION_IN_PROGRESS or
        POOL_NOT_FOUND.
        """
        return await self._benches.begin(request)

    def cancel_bench(self, pool_id: str) -> Operation:
        """Break off the bench that is under way. Raises RequestError when there is none."""
        return self._benches.cancel(pool_id)

    # --- purging ---

    async def purge(self, request: PurgeRequest) -> Operation:
        """Stop the pool and delete what is kept on disk for it (SPEC §10.3); it is uninitialized then, and stays down.

        The operation's outcome has ``removed`` and ``freed_bytes``. Raises SpecError, RequestError POOL_IN_USE, NOT_OURS,
        OPERATION_IN_PROGRESS or POOL_NOT_FOUND.
        """
        return await self._purges.begin(request)

    async def plan_purge(self, request: PurgeRequest) -> dict[str, Any]:
        """What ``purge`` would stop and free; nothing happens. Raises as ``purge``."""
        return await self._purges.plan(request)

    # --- leases ---

    def allocate_lease(self, pool_id: str, holder: str | None = None, ttl_ms: int | None = None) -> dict[str, Any]:
        """One slot of a ready pool. Raises RequestError POOL_DRAINING, NO_FREE_SLOTS, POOL_UNREADY or POOL_NOT_FOUND."""
        return self._leases.allocate(self._pools.get(pool_id), holder, ttl_ms)

    def renew_lease(self, pool_id: str, lease_id: str, ttl_ms: int) -> dict[str, Any]:
        """A new end, ``ttl_ms`` from now (7 days at most). Raises RequestError LEASE_NOT_FOUND for a lease that is over."""
        return self._leases.renew(self._pools.get(pool_id), lease_id, ttl_ms)

    def release_lease(self, pool_id: str, lease_id: str) -> dict[str, Any]:
        """Idempotent; RequestError LEASE_NOT_FOUND for an id that was never given."""
        return self._leases.release(self._pools.get(pool_id), lease_id)

    async def take_lease(
        self, pool_id: str, holder: str | None = None, ttl_ms: int | None = None, *, key: str | None = None
    ) -> dict[str, Any]:
        """As ``allocate_lease``, and it is there after the daemon's death, too. ``key``: the same one again gives the same lease.

        Raises NodeError STATE_UNWRITABLE as well.
        """
        return await self._leases.take(self._pools.get(pool_id), holder, ttl_ms, key)

    async def prolong_lease(self, pool_id: str, lease_id: str, ttl_ms: int) -> dict[str, Any]:
        """As ``renew_lease``, durably."""
        return await self._leases.prolong(self._pools.get(pool_id), lease_id, ttl_ms)

    async def give_lease_back(self, pool_id: str, lease_id: str) -> dict[str, Any]:
        """As ``release_lease``, durably."""
        return await self._leases.give_back(self._pools.get(pool_id), lease_id)
