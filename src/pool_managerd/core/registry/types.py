"""Small values of the registry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """One unit of work in flight. ``expires_at`` is a monotonic second, None for a lease that lasts until released."""

    lease_id: str
    holder: str | None = None
    given_at_ms: int = 0
    expires_at: float | None = None


@dataclass(frozen=True, slots=True)
class PerfHints:
    """What may be expected of the pool: measured on this node and smoothed (EWMA), and the quantisations of its model."""

    perf_tokens_per_s: float | None = None
    first_token_ms: float | None = None
    quantizations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A device that the pool runs on or may be placed on, as this pool meets it."""

    id: int
    """The index; a MIG instance has its GPU's."""
    device: str
    """The index of a GPU, the UUID of a MIG instance."""
    uuid: str
    compute_capability: str | None
    vram_total_bytes: int
    vram_free_bytes: int | None
    """Measured; null while the device cannot be read."""
    vram_available_bytes: int
    """May still be reserved for this pool."""
    vram_reserved_bytes: int = 0
    """Reserved for this pool."""
    vram_used_bytes: int | None = None
    """What this pool's engine holds; null where the driver does not tell."""
