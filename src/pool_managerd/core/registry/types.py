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
    """What placement may expect of the pool: metrics measured on this node, smoothed (EWMA), and the model's quantisations."""

    perf_tokens_per_s: float | None = None
    first_token_ms: float | None = None
    quantizations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """One GPU that a pool runs on or may be placed on, as this pool meets it.

    ``vram_free_bytes`` is measured, None where the GPU cannot be read; ``vram_available_bytes`` may still be reserved to the
    pool. It has ``vram_reserved_bytes`` reserved and holds ``vram_used_bytes``, None where the driver does not tell.
    """

    id: int
    device: str
    uuid: str
    compute_capability: str | None
    vram_total_bytes: int
    vram_free_bytes: int | None
    vram_available_bytes: int
    vram_reserved_bytes: int = 0
    vram_used_bytes: int | None = None


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
