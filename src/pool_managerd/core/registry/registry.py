"""The registry: getters, setters and lease accounting per pool, by the names the seeds fix (ORCH-3503, B-REG-*).

Not thread-safe by itself: like every asyncio object it belongs to one loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from pool_managerd.core.health import HealthStatus
from pool_managerd.core.registry.entry import LaunchLeases, PoolEntry
from pool_managerd.core.registry.snapshot import PoolSnapshot, unknown
from pool_managerd.core.registry.types import KeptLeases, Lease, LeaseChange, PerfHints
from pool_managerd.errors import RequestError, SpecError

INT32_MAX = 2**31 - 1
_UPDATABLE = ("engine_version", "device_mask", "slots_total", "slots_free", "perf_hints")


class Registry:
    """Pools by id. A setter on an unknown pool creates it with defaults; a getter never does.

    ``clock_ms`` gives unix milliseconds, for heartbeats only. ``salt`` makes lease ids unique across restarts.
    ``on_lease`` is called with every change of a lease that has an id.
    """

    def __init__(
        self, clock_ms: Callable[[], int], salt: str = "", on_lease: Callable[[LeaseChange], None] = lambda change: None
    ) -> None:
        self._clock_ms = clock_ms
        self._salt = salt
        self._on_lease = on_lease
        self._entries: dict[str, PoolEntry] = {}
        self._revision = 0

    @property
    def revision(self) -> int:
        """Grows with every change: two snapshots of one revision are equal."""
        return self._revision

    # --- pools ---

    def register(self, pool_id: str) -> bool:
        """True when the pool is new (B-REG-080)."""
        if pool_id in self._entries:
            return False
        self._change(pool_id)
        return True

    def deregister(self, pool_id: str) -> bool:
        """True when the pool existed (B-REG-083)."""
        entry = self._entries.get(pool_id)
        for epoch in list(entry.leases) if entry is not None else ():
            self.end_leases(pool_id, epoch)
        self._entries.pop(pool_id, None)
        self._revision += entry is not None
        return entry is not None

    def get(self, pool_id: str) -> PoolSnapshot | None:
        entry = self._entries.get(pool_id)
        return None if entry is None else entry.snapshot()

    def pool_ids(self) -> list[str]:
        return sorted(self._entries)

    def snapshots(self) -> list[PoolSnapshot]:
        """Every pool, sorted by id (B-REG-120)."""
        return [self._entries[pool_id].snapshot() for pool_id in sorted(self._entries)]

    def update(self, pool_id: str, fields: Mapping[str, Any]) -> None:
        """Merge only the given fields (B-REG-110). Raises SpecError for a field that cannot be updated."""
        unknown = sorted(set(fields) - set(_UPDATABLE))
        if unknown:
            raise SpecError(f"cannot update {', '.join(unknown)}: only {', '.join(_UPDATABLE)} can be")
        known = self._known(pool_id)
        self.publish(
            pool_id, **{name: fields[name] for name in ("engine_version", "device_mask", "perf_hints") if name in fields}
        )
        if "slots_total" in fields or "slots_free" in fields:
            self.set_slots(pool_id, fields.get("slots_total", known.slots_total), fields.get("slots_free", known.slots_free))

    def publish(self, pool_id: str, **fields: Any) -> None:
        """Set several fields at once, atomically for every reader of this loop; ``epoch`` is the launch of the leases to come."""
        entry = self._change(pool_id)
        entry.epoch = fields.pop("epoch", entry.epoch)
        entry.known = replace(entry.known, **fields)

    # --- fields ---

    def set_health(self, pool_id: str, live: bool | HealthStatus, ready: bool = False) -> None:
        status = live if isinstance(live, HealthStatus) else HealthStatus(live, ready)
        self.publish(pool_id, live=status.live, ready=status.ready)

    def get_health(self, pool_id: str) -> HealthStatus | None:
        known = self._known(pool_id)
        return HealthStatus(known.live, known.ready) if pool_id in self._entries else None

    def set_last_error(self, pool_id: str, error: str | None) -> None:
        self.publish(pool_id, last_error=error)

    def get_last_error(self, pool_id: str) -> str | None:
        return self._known(pool_id).last_error

    def set_heartbeat(self, pool_id: str, unix_ms: int) -> None:
        self.publish(pool_id, last_heartbeat_ms=unix_ms)

    def get_heartbeat(self, pool_id: str) -> int | None:
        return self._known(pool_id).last_heartbeat_ms

    def set_version(self, pool_id: str, version: str) -> None:
        self.publish(pool_id, version=version)

    def get_version(self, pool_id: str) -> str | None:
        return self._known(pool_id).version

    def set_engine_version(self, pool_id: str, engine_version: str) -> None:
        self.publish(pool_id, engine_version=engine_version)

    def get_engine_version(self, pool_id: str) -> str | None:
        return self._known(pool_id).engine_version

    def set_engine_meta(
        self, pool_id: str, version: str | None = None, digest: str | None = None, catalog_id: str | None = None
    ) -> None:
        """Overwrites only what is supplied (B-REG-040..045)."""
        given = {"engine_version": version, "engine_digest": digest, "engine_catalog_id": catalog_id}
        self.publish(pool_id, **{name: value for name, value in given.items() if value is not None})

    def set_device_mask(self, pool_id: str, device_mask: str | None) -> None:
        """None means no restriction (B-REG-052)."""
        self.publish(pool_id, device_mask=device_mask)

    def get_device_mask(self, pool_id: str) -> str | None:
        return self._known(pool_id).device_mask

    def set_slots(self, pool_id: str, total: int | None, free: int | None) -> None:
        """``free`` is clamped into 0..``total`` (B-REG-060..064)."""
        total = None if total is None else max(0, total)
        bounded = free if free is None or total is None else min(free, total)
        self.publish(pool_id, slots_total=total, slots_free=None if bounded is None else max(0, bounded))

    def get_slots(self, pool_id: str) -> tuple[int | None, int | None]:
        """(total, free), (None, None) for an unknown pool."""
        entry = self._entries.get(pool_id)
        return (entry.known.slots_total, entry.slots_free) if entry else (None, None)

    def set_perf_hints(self, pool_id: str, hints: PerfHints | None) -> None:
        self.publish(pool_id, perf_hints=hints)

    def set_draining(self, pool_id: str, draining: bool) -> None:
        self.publish(pool_id, draining=draining)

    def get_draining(self, pool_id: str) -> bool:
        """False for an unknown pool."""
        return self._known(pool_id).draining

    def register_ready_from_handoff(self, pool_id: str, handoff: Mapping[str, Any]) -> None:
        """A healthy engine announced itself: live and ready, last_error and draining cleared (B-REG-100..107).

        ``handoff`` is its file's JSON object. Other keys are ignored, and a value of another type counts as absent.
        """
        texts = {name: handoff.get(name) for name in ("engine", "engine_version", "device_mask")}
        self.publish(
            pool_id, live=True, ready=True, state="ready", draining=False, last_error=None, last_heartbeat_ms=self._clock_ms(),
            **{name: value for name, value in texts.items() if isinstance(value, str)},
        )  # fmt: skip
        total, free = (n if type(n := handoff.get(name)) is int else None for name in ("slots_total", "slots_free"))
        if total is not None or free is not None:
            self.set_slots(pool_id, total, free)

    # --- leases ---

    def allocate_lease(self, pool_id: str) -> int:
        """One more unit in flight; the new count. Raises RequestError POOL_DRAINING or NO_FREE_SLOTS (SPEC §4)."""
        entry = self._change(pool_id)
        self._admit(entry)
        entry.leases.setdefault(entry.epoch, LaunchLeases()).counted += 1
        return entry.active_leases

    def release_lease(self, pool_id: str) -> int:
        """One unit less, never below 0, of the oldest launch that has one; the new count (ORCH-3502)."""
        entry = self._change(pool_id)
        oldest = min((epoch for epoch, launch in entry.leases.items() if launch.counted), default=None)
        if oldest is not None:
            entry.leases[oldest].counted -= 1
        return entry.active_leases

    def get_active_leases(self, pool_id: str) -> int:
        """0 for an unknown pool."""
        entry = self._entries.get(pool_id)
        return entry.active_leases if entry else 0

    def leases_on(self, pool_id: str, epoch: int) -> int:
        """Those that launch ``epoch`` has in flight: while an engine is replaced, the other's do not count."""
        entry = self._entries.get(pool_id)
        return entry.leases_on(epoch) if entry else 0

    def grant(
        self, pool_id: str, *, holder: str | None = None, given_at_ms: int = 0, expires_at: float | None = None,
        key: str | None = None,
    ) -> Lease:  # fmt: skip
        """A lease with an id, so that releasing it twice counts once; with a ``key``, the one that was given for it before,
        as long as that lasts. Raises as ``allocate_lease``.
        """
        entry = self._change(pool_id)
        if key is not None and (known := next((lease for lease in self.leases(pool_id) if lease.key == key), None)) is not None:
            return known  # perhaps on a launch that another one has replaced
        self._admit(entry)
        entry.leases_given += 1
        lease = Lease(f"{entry.lease_prefix}-{entry.leases_given:x}", holder, given_at_ms, expires_at, key)
        entry.leases.setdefault(entry.epoch, LaunchLeases()).by_id[lease.lease_id] = lease
        self._on_lease(LeaseChange(pool_id, entry.epoch, lease.lease_id, lease, new=True))
        return lease

    def restore_leases(self, kept: KeptLeases, epochs: Collection[int]) -> None:
        """Go on with what an earlier daemon gave: those on launches that go on, too; the others ended with theirs."""
        entry = self._change(kept.pool_id)
        prefix, _, number = kept.newest_id.rpartition("-")
        entry.lease_prefix, entry.leases_given = prefix, int(number, 16)
        for given_on, lease in kept.leases:
            if given_on in epochs:
                entry.leases.setdefault(given_on, LaunchLeases()).by_id[lease.lease_id] = lease
            else:
                self._on_lease(LeaseChange(kept.pool_id, given_on, lease.lease_id, None))

    def renew(self, pool_id: str, lease_id: str, expires_at: float | None) -> Lease:
        """A new end for a lease that is still active; RequestError LEASE_NOT_FOUND otherwise."""
        entry = self._entries.get(pool_id)
        found = None if entry is None else entry.find(lease_id)
        if found is None:
            raise self._no_lease(pool_id, lease_id)
        epoch, launch = found
        lease = launch.by_id[lease_id] = replace(launch.by_id[lease_id], expires_at=expires_at)
        self._on_lease(LeaseChange(pool_id, epoch, lease_id, lease))
        return lease

    def release(self, pool_id: str, lease_id: str) -> int:
        """Idempotent for every id that was ever given; RequestError LEASE_NOT_FOUND for any other."""
        entry = self._entries.get(pool_id)
        if entry is None or not self._was_given(entry, lease_id):
            raise self._no_lease(pool_id, lease_id)
        if (found := entry.find(lease_id)) is not None:
            epoch, launch = found
            del launch.by_id[lease_id]
            self._revision += 1
            self._on_lease(LeaseChange(pool_id, epoch, lease_id, None))
        return entry.active_leases

    def expire(self, pool_id: str, epoch: int, now: float) -> list[Lease]:
        """Ends the leases on launch ``epoch`` whose time is over and returns them."""
        over = [lease for lease in self._on(pool_id, epoch) if lease.expires_at is not None and lease.expires_at <= now]
        for lease in over:
            self.release(pool_id, lease.lease_id)
        return over

    def next_expiry(self, pool_id: str, epoch: int) -> float | None:
        """When the next lease on launch ``epoch`` runs out."""
        return min((lease.expires_at for lease in self._on(pool_id, epoch) if lease.expires_at is not None), default=None)

    def leases(self, pool_id: str) -> list[Lease]:
        """Those with an id, in the order in which they were given; none of an unknown pool."""
        entry = self._entries.get(pool_id)
        return [lease for launch in entry.leases.values() for lease in launch.by_id.values()] if entry else []

    def epoch_of(self, pool_id: str, lease_id: str) -> int | None:
        """The launch that the lease is on; None when it is over, or never was."""
        entry = self._entries.get(pool_id)
        found = None if entry is None else entry.find(lease_id)
        return None if found is None else found[0]

    def end_leases(self, pool_id: str, epoch: int) -> int:
        """Launch ``epoch`` is gone and its leases with it, those of no other; how many there were."""
        entry = self._entries.get(pool_id)
        if entry is None:
            return 0
        ended = entry.leases_on(epoch)
        for lease_id in entry.leases.pop(epoch, LaunchLeases()).by_id:
            self._on_lease(LeaseChange(pool_id, epoch, lease_id, None))
        self._revision += bool(ended)
        return ended

    def _on(self, pool_id: str, epoch: int) -> list[Lease]:
        entry = self._entries.get(pool_id)
        launch = None if entry is None else entry.leases.get(epoch)
        return [] if launch is None else list(launch.by_id.values())

    def _admit(self, entry: PoolEntry) -> None:
        known = entry.known
        if known.draining:
            raise RequestError(
                f"cannot lease pool {known.pool_id}: it is draining", code="POOL_DRAINING", status=409, pool_id=known.pool_id,
                hint="use another pool, or undrain this one",
            )  # fmt: skip
        limit = known.slots_total if known.slots_total is not None else INT32_MAX
        if entry.leases_on(entry.epoch) >= limit:
            raise RequestError(
                f"cannot lease pool {known.pool_id}: all {limit} slots are in use", code="NO_FREE_SLOTS", status=409,
                pool_id=known.pool_id, retriable=True, hint="wait for a lease to end, or raise 'slots' of the pool",
            )  # fmt: skip

    def _was_given(self, entry: PoolEntry, lease_id: str) -> bool:
        prefix, dash, number = lease_id.rpartition("-")
        if not dash or prefix != entry.lease_prefix or not 0 < len(number) <= 16 or number != number.lower():
            return False
        try:
            return 0 < int(number, 16) <= entry.leases_given
        except ValueError:
            return False

    def _no_lease(self, pool_id: str, lease_id: str) -> RequestError:
        return RequestError(
            f"lease {lease_id[:64]!r} not found on pool {pool_id}", code="LEASE_NOT_FOUND", status=404, pool_id=pool_id
        )

    def _change(self, pool_id: str) -> PoolEntry:
        self._revision += 1
        entry = self._entries.get(pool_id)
        if entry is None:
            seed = f"{self._salt}:{pool_id}:{self._revision}"
            prefix = hashlib.blake2b(seed.encode(), digest_size=6).hexdigest()
            entry = self._entries[pool_id] = PoolEntry(unknown(pool_id), prefix)
        return entry

    def _known(self, pool_id: str) -> PoolSnapshot:
        """What was set; nothing of an unknown pool."""
        entry = self._entries.get(pool_id)
        return unknown(pool_id) if entry is None else entry.known
