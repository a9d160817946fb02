"""What the registry and the log are told of an instance, in one step each."""

from __future__ import annotations

from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.core.health import HealthStatus
from pool_managerd.core.lifecycle import Instance, Phase, view
from pool_managerd.core.registry import PerfHints
from pool_managerd.supervision.workers import Launch


def registry_fields(i: Instance, launch: Launch, config: PoolConfig | None, wall_ms: int) -> dict[str, Any]:
    """All fields of the registry entry that follow from the instance and its present launch."""
    seen, prepared = view(i), launch.prepared
    shape = launch.sizing.facts.shape if launch.sizing is not None else None
    fields: dict[str, Any] = {
        "health": HealthStatus(seen.live, seen.ready), "state": seen.state, "draining": seen.draining,
        "last_error": i.last_error, "crash_count": i.crash_count, "restart_count": i.restart_count,
        "circuit_state": "open" if i.phase is Phase.OPEN else "closed", "last_heartbeat_ms": wall_ms,
    }  # fmt: skip
    if config is not None:
        fields |= {
            "engine": config.engine, "quant": config.quant or (shape.quantization if shape is not None else None),
            "model_ref": config.model, "sampler_profile_version": config.sampler_profile_version,
        }  # fmt: skip
    if prepared is not None:
        fields |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask, "slots_total": prepared.slots_total,
            "ctx_max": prepared.ctx or (shape.ctx_train if shape is not None else None),
        }  # fmt: skip
    if launch.first_token_ms is not None:
        fields["perf_hints"] = PerfHints(launch.tokens_per_s, launch.first_token_ms)
    return fields


def log_context(i: Instance, launch: Launch, config: PoolConfig | None) -> dict[str, Any]:
    """The fields that every line about a pool carries (SPEC §14)."""
    context: dict[str, Any] = {"engine": config.engine if config else None, "restart_count": i.restart_count}
    if (prepared := launch.prepared) is not None:
        context |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask, "replica_id": prepared.replica_id,
        }  # fmt: skip
    return context
