"""A frozen copy of one pool's row, for placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pool_managerd.core.registry.types import DeviceShare, PerfHints
from pool_managerd.errors import SpecError

_PLAIN = {"str": str, "bool": bool, "int": int, "float": float}


# The one list of a pool's fields: the registry keeps them in it, and the API documents them from it, notes included.
@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    """One pool, with all that SPEC §3 and §5.5 name. Of several devices these are sums.

    Absent facts are None, null in JSON; readers tolerate fields added later.
    """

    pool_id: str
    node_id: str | None = None
    """The node's host name."""
    replica_id: str | None = None
    state: str
    live: bool
    ready: bool
    draining: bool
    active_leases: int
    slots_total: int | None = None
    slots_free: int | None = None
    engine: str | None = None
    engine_version: str | None = None
    engine_digest: str | None = None
    engine_catalog_id: str | None = None
    model_id: str | None = None
    model_ref: str | None = None
    models_available: tuple[str, ...] = ()
    """What a request may ask for here."""
    device_mask: str | None = None
    """The devices that the pool may use, as configured; null: all."""
    vram_total_bytes: int | None = None
    vram_free_bytes: int | None = None
    """Measured, of the devices that can be read."""
    vram_available_bytes: int | None = None
    """May still be reserved for this pool."""
    vram_reserved_bytes: int | None = None
    """Reserved for this pool."""
    vram_used_bytes: int | None = None
    """What its engine holds; null where the driver does not tell."""
    devices: tuple[DeviceShare, ...]
    compute_capability: str | None = None
    """The least of its devices."""
    perf_hints: PerfHints | None = None
    last_error: str | None = None
    last_heartbeat_ms: int | None = None
    version: str | None = None
    """Of the pool's configuration, where somebody counts them."""
    crash_count: int = 0
    restart_count: int = 0
    circuit_state: str = "closed"
    ctx_max: int | None = None
    """Tokens of context, over all slots together."""
    max_tokens_out: int | None = None
    """The engine's own limit of an answer; null: none but what is left of the slot's context."""
    quant: str | None = None
    sampler_profile_version: str | None = None

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
        shares, hints = raw.get("devices"), raw.get("perf_hints")
        values = _typed(cls, raw)
        values["devices"] = tuple(_share(s) for s in shares if isinstance(s, Mapping)) if isinstance(shares, list) else ()
        values["perf_hints"] = _hints(hints) if isinstance(hints, Mapping) else None
        values["models_available"] = _texts(raw.get("models_available"))
        return replace(unknown(pool_id), **values)


def unknown(pool_id: str) -> PoolSnapshot:
    """A pool of which nothing is known yet."""
    return PoolSnapshot(
        pool_id=pool_id, state="uninitialized", live=False, ready=False, draining=False, active_leases=0, devices=()
    )


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
