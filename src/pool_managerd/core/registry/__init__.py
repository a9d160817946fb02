"""What placement reads: per pool health, capacity, leases and versions (ORCH-3501, SPEC §3–4)."""

from pool_managerd.core.registry.registry import Registry
from pool_managerd.core.registry.snapshot import PoolSnapshot
from pool_managerd.core.registry.types import DeviceShare, KeptLeases, Lease, LeaseChange, PerfHints

__all__ = ["DeviceShare", "KeptLeases", "Lease", "LeaseChange", "PerfHints", "PoolSnapshot", "Registry"]
