"""A frozen copy of one pool's row, for placement and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pool_managerd.core.registry.entry import PoolEntry
from pool_managerd.core.registry.types import DeviceShare, PerfHints
from pool_managerd.errors import SpecError

_PLAIN = {"str": str, "bool": bool, "int": int, "float": float}


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All that SPEC §3 and §5.5 name. Absent facts are None; readers tolerate fields added later.

    ``max_tokens_out`` is None where an engine puts no limit of its own on an answer, which is so for all that run here.
    """

    pool_id: str
    node_id: str | None
    replica_id: str | None
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
    models_available: tuple[str, ...]
    device_mask: str | None
    vram_total_bytes: int | None
    vram_free_bytes: int | None
    vram_available_bytes: int | None
    vram_reserved_bytes: int | None
    vram_used_bytes: int | None
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
    max_tokens_out: int | None
    quant: str | None
    sampler_profile_version: str | None

    @property
    def vram_room_bytes(self) -> int | None:
        """What is free for this pool: what may still be reserved, and what was reserved for it and is not used yet."""
        if self.vram_available_bytes is None:
            return self.vram_free_bytes
        if self.vram_reserved_bytes is None or self.vram_used_bytes is None:
            return self.vram_available_bytes
        return self.vram_available_bytes + max(0, self.vram_reserved_bytes - self.vram_used_bytes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PoolSnapshot:
        """What ``to_dict`` gave, through JSON and from any version: unknown keys are ignored, others may be absent.

        A value of another type counts as absent. Raises SpecError when the pool has no id.
        """
        pool_id = raw.get("pool_id")
        if not isinstance(pool_id, str):
            raise SpecError("cannot read a pool's snapshot: it has no pool_id")
        blank = snapshot_of(PoolEntry(pool_id))
        values = {name: getattr(blank, name) for name in cls.__dataclass_fields__}
        shares, hints = raw.get("devices"), raw.get("perf_hints")
        values |= _typed(cls, raw)
        values["devices"] = tuple(_share(s) for s in shares if isinstance(s, Mapping)) if isinstance(shares, list) else ()
        values["perf_hints"] = _hints(hints) if isinstance(hints, Mapping) else None
        values["models_available"] = _texts(raw.get("models_available"))
        return cls(**values)


def snapshot_of(entry: PoolEntry) -> PoolSnapshot:
    values: dict[str, Any] = {name: getattr(entry, name, None) for name in PoolSnapshot.__dataclass_fields__}
    values |= {"live": entry.health.live, "ready": entry.health.ready}
    return PoolSnapshot(**values)


def _share(raw: Mapping[str, Any]) -> DeviceShare:
    blank: dict[str, Any] = {"id": -1, "device": "", "uuid": "", "compute_capability": None}
    blank |= {"vram_total_bytes": 0, "vram_free_bytes": None, "vram_available_bytes": 0}
    return DeviceShare(**(blank | _typed(DeviceShare, raw)))


def _hints(raw: Mapping[str, Any]) -> PerfHints:
    return PerfHints(quantizations=_texts(raw.get("quantizations")), **_typed(PerfHints, raw))


def _texts(names: object) -> tuple[str, ...]:
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()


def _typed(shape: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ``raw`` that are plain fields of the dataclass ``shape``, and of the type written there."""
    found = {}
    for name, field in shape.__dataclass_fields__.items():
        wanted = _PLAIN.get(field.type.partition(" ")[0])
        value = raw.get(name)
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is not None and type(value) is wanted:
            found[name] = value
    return found
