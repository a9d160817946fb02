"""Small values of the registry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """One unit of work in flight. ``expires_at`` is a monotonic second, None for a lease that lasts until released.

    ``key`` is the caller's own name for its request: the same one again means the same lease, and no second one.
    """

    lease_id: str
    holder: str | None = None
    given_at_ms: int = 0
    expires_at: float | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseChange:
    """Lease ``lease_id`` on launch ``epoch`` is as it is now; None when it is over. ``new``: it was given just now."""

    pool_id: str
    epoch: int
    lease_id: str
    lease: Lease | None
    new: bool = False


@dataclass(frozen=True, slots=True)
class KeptLeases:
    """A pool's leases, by the epoch of the launch that each is on, and the id that was given last."""

    pool_id: str
    newest_id: str
    leases: tuple[tuple[int, Lease], ...] = ()


@dataclass(frozen=True, slots=True)
class PerfHints:
    """What may be expected of the pool: measured on this node, and the quantisations of its model."""

    perf_tokens_per_s: float | None = None
    first_token_ms: float | None = None
    quantizations: tuple[str, ...] = ()
    measured_with: str | None = None
    """What the two were measured with: warm-ups, smoothed (EWMA), tell little; a bench tells more."""
    measured_at_ms: int | None = None


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
