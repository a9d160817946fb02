"""A frozen copy of one pool's row, for placement and for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pool_managerd.core.registry.entry import PoolEntry
from pool_managerd.core.registry.types import DeviceShare, PerfHints


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All that SPEC §3 and §5.5 name. Absent facts are None; readers tolerate fields added later."""

    pool_id: str
    state: str
    live: bool
    ready: bool
    draining: bool
    active_leases: int
    slots_total: int | None
    slots_free: int | None
    engine: str | None
    engine_version: str | None
    engine_digest: str | None
    engine_catalog_id: str | None
    model_id: str | None
    model_ref: str | None
    device_mask: str | None
    vram_total_bytes: int | None
    vram_free_bytes: int | None
    vram_available_bytes: int | None
    devices: tuple[DeviceShare, ...]
    compute_capability: str | None
    perf_hints: PerfHints | None
    last_error: str | None
    last_heartbeat_ms: int | None
    version: str | None
    crash_count: int
    restart_count: int
    circuit_state: str
    ctx_max: int | None
    quant: str | None
    sampler_profile_version: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def snapshot_of(entry: PoolEntry) -> PoolSnapshot:
    values: dict[str, Any] = {name: getattr(entry, name, None) for name in PoolSnapshot.__dataclass_fields__}
    values |= {"live": entry.health.live, "ready": entry.health.ready}
    return PoolSnapshot(**values)
