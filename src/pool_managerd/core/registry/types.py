"""Small values of the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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


@dataclass(frozen=True, slots=True)
class Handoff:
    """What a handoff file says of a healthy engine. Absent fields stay None (B-REG-107)."""

    url: str = ""
    engine: str | None = None
    engine_version: str | None = None
    device_mask: str | None = None
    slots_total: int | None = None
    slots_free: int | None = None
    replica_id: str | None = None
    model_path: str | None = None

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any]) -> Handoff:
        """From a handoff's JSON object; unknown keys are ignored and wrong types are taken as absent (reader rule)."""

        def text(key: str) -> str | None:
            value = raw.get(key)
            return value if isinstance(value, str) else None

        def number(key: str) -> int | None:
            value = raw.get(key)
            return value if isinstance(value, int) and not isinstance(value, bool) else None

        model = raw.get("model")
        path = model.get("path") if isinstance(model, Mapping) else None
        return cls(
            url=text("url") or "",
            engine=text("engine"),
            engine_version=text("engine_version"),
            device_mask=text("device_mask"),
            slots_total=number("slots_total"),
            slots_free=number("slots_free"),
            replica_id=text("replica_id"),
            model_path=path if isinstance(path, str) else None,
        )
