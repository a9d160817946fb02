"""What ``GET /snapshots`` answers: all that whoever places requests reads."""

from __future__ import annotations

from pydantic import Field

from pool_managerd.api.schemas import Answer, PoolHead, ScanTrouble


class PerfHints(Answer):
    """What may be expected of the pool: measured on this node and smoothed, and the quantisations of its model."""

    perf_tokens_per_s: float | None = None
    first_token_ms: float | None = None
    quantizations: list[str]


class DeviceShare(Answer):
    """A device that the pool runs on or may be placed on, as this pool meets it."""

    id: int = Field(description="The index; a MIG instance has its GPU's.")
    device: str = Field(description="The index of a GPU, the UUID of a MIG instance.")
    uuid: str
    compute_capability: str | None = None
    vram_total_bytes: int
    vram_free_bytes: int | None = Field(description="Measured; null while the device cannot be read.")
    vram_available_bytes: int = Field(description="May still be reserved for this pool.")
    vram_reserved_bytes: int = Field(0, description="Reserved for this pool.")
    vram_used_bytes: int | None = Field(None, description="What this pool's engine holds; null where the driver does not tell.")


class PoolSnapshot(PoolHead):
    """One pool. Of several devices these are sums."""

    node_id: str | None = Field(None, description="The node's host name.")
    replica_id: str | None = None
    engine_digest: str | None = None
    engine_catalog_id: str | None = None
    models_available: list[str] = Field([], description="What a request may ask for here.")
    device_mask: str | None = Field(None, description="The devices that the pool may use, as configured; null: all.")
    vram_total_bytes: int | None = None
    vram_free_bytes: int | None = Field(None, description="Measured, of the devices that can be read.")
    vram_available_bytes: int | None = Field(None, description="May still be reserved for this pool.")
    vram_reserved_bytes: int | None = Field(None, description="Reserved for this pool.")
    vram_used_bytes: int | None = Field(None, description="What its engine holds; null where the driver does not tell.")
    devices: list[DeviceShare]
    compute_capability: str | None = Field(None, description="The least of its devices.")
    perf_hints: PerfHints | None = None
    last_error: str | None = None
    last_heartbeat_ms: int | None = None
    version: str | None = Field(None, description="Of the pool's configuration, where somebody counts them.")
    crash_count: int = 0
    restart_count: int = 0
    circuit_state: str | None = None
    ctx_max: int | None = Field(None, description="Tokens of context, over all slots together.")
    max_tokens_out: int | None = Field(
        None, description="The engine's own limit of an answer; null: none but what is left of the slot's context."
    )
    quant: str | None = None
    sampler_profile_version: str | None = None


class Snapshots(Answer):
    """Every pool at one instant. What it says of devices is of ``devices_taken_at_ms``; stale ones are the last known."""

    version: int = Field(description="Grows with every change.")
    taken_at_ms: int
    devices_stale: bool = Field(description="True while the GPUs of this node cannot be scanned.")
    devices_taken_at_ms: int | None = None
    devices_age_ms: int | None = None
    devices_problem: ScanTrouble | None = None
    pools: list[PoolSnapshot]
