"""One pool's row: plain data with the few rules that keep it true."""

from __future__ import annotations

from dataclasses import dataclass, field

from pool_managerd.core.health import HealthStatus
from pool_managerd.core.registry.types import DeviceShare, Lease, PerfHints


@dataclass(slots=True)
class LaunchLeases:
    """The leases of one launch, with which they end: ``counted`` by the seeds' counter calls, ``by_id`` by all others."""

    counted: int = 0
    by_id: dict[str, Lease] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counted + len(self.by_id)


@dataclass(slots=True)
class PoolEntry:
    """All fields of SPEC §3.1. ``version`` is the configuration's, not the engine's.

    ``epoch`` is the launch that new leases are given on; ``leases`` are those of every launch that has any.
    """

    pool_id: str
    born: int = 0
    node_id: str | None = None
    replica_id: str | None = None
    epoch: int = 0
    health: HealthStatus = field(default_factory=HealthStatus)
    last_heartbeat_ms: int | None = None
    version: str | None = None
    last_error: str | None = None
    engine: str | None = None
    engine_version: str | None = None
    engine_digest: str | None = None
    engine_catalog_id: str | None = None
    model_id: str | None = None
    model_ref: str | None = None
    device_mask: str | None = None
    slots_total: int | None = None
    reported_free: int | None = None
    perf_hints: PerfHints | None = None
    draining: bool = False
    vram_total_bytes: int | None = None
    vram_free_bytes: int | None = None
    vram_available_bytes: int | None = None
    vram_reserved_bytes: int | None = None
    vram_used_bytes: int | None = None
    devices: tuple[DeviceShare, ...] = ()
    compute_capability: str | None = None
    crash_count: int = 0
    restart_count: int = 0
    state: str = "uninitialized"
    circuit_state: str = "closed"
    ctx_max: int | None = None
    max_tokens_out: int | None = None
    quant: str | None = None
    sampler_profile_version: str | None = None
    leases: dict[int, LaunchLeases] = field(default_factory=dict)
    leases_given: int = 0

    @property
    def models_available(self) -> tuple[str, ...]:
        """What a request may ask for here: an engine serves one model."""
        return () if self.model_id is None else (self.model_id,)

    @property
    def active_leases(self) -> int:
        """On all launches: while an engine is replaced, its last leases are still in flight beside the new one's."""
        return sum(launch.total for launch in self.leases.values())

    def leases_on(self, epoch: int) -> int:
        """In flight on launch ``epoch``."""
        found = self.leases.get(epoch)
        return 0 if found is None else found.total

    def find(self, lease_id: str) -> LaunchLeases | None:
        """The launch that the lease is on; None when it is over, or never was."""
        return next((launch for launch in self.leases.values() if lease_id in launch.by_id), None)

    @property
    def slots_free(self) -> int | None:
        """What the engine reported free, never more than the leases leave over."""
        if self.slots_total is None:
            return self.reported_free
        left = self.slots_total - self.leases_on(self.epoch)
        reported = self.slots_total if self.reported_free is None else self.reported_free
        return max(0, min(left, reported))
