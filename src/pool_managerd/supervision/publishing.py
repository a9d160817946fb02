"""What the registry and the log are told of a pool, in one step each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pool_managerd.core.baselines import Baseline
from pool_managerd.core.lifecycle import view
from pool_managerd.core.redaction import masked_text
from pool_managerd.core.registry import PerfHints
from pool_managerd.supervision.pool import Pool


def registry_fields(pool: Pool, wall_ms: int, node_id: str, model_id_of: Callable[[str], str]) -> dict[str, Any]:
    """All fields of the registry entry that follow from the definition, the lifecycle and the present launch.

    What the configuration knows is known before the first start: a mask is no result of one (B-REG-040s).
    """
    state, launch, config = pool.state, pool.launch, pool.config
    seen, prepared = view(state), launch.prepared
    shape = launch.sizing.inputs.shape if launch.sizing is not None else None
    fields: dict[str, Any] = {
        "live": seen.live, "ready": seen.ready, "state": seen.state, "draining": seen.draining,
        "last_error": state.last_error, "crash_count": state.crash_count, "restart_count": state.restart_count,
        "circuit_state": state.history.circuit.value, "last_heartbeat_ms": wall_ms,
        "node_id": node_id, "replica_id": pool.instance_id.replica_id, "epoch": state.active.epoch,
    }  # fmt: skip
    quant = shape.quantization if shape is not None else None
    if config is not None:
        quant = config.quant or quant
        fields |= {
            "engine": config.engine, "model_ref": masked_text(config.model),
            "model_id": model_id_of(config.model), "ctx_max": config.ctx,
            "device_mask": None if config.mask is None else str(config.mask),
            "sampler_profile_version": config.sampler_profile_version,
        }  # fmt: skip
    if config is not None or quant is not None:
        fields["quant"] = quant
    if prepared is not None:
        fields |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask, "slots_total": prepared.slots_total,
            "ctx_max": prepared.ctx or (shape.ctx_train if shape is not None else None),
        }  # fmt: skip
    if launch.measured or quant is not None:
        fields["perf_hints"] = _hints(launch.measured, quant)
    return fields


def _hints(measured: tuple[Baseline, ...], quant: str | None) -> PerfHints:
    quantizations = (quant,) if quant is not None else ()
    if not measured:
        return PerfHints(quantizations=quantizations)
    best = measured[0]
    return PerfHints(best.tokens_per_s, best.first_token_ms, quantizations, best.measured_with, best.measured_at_ms)


def log_context(pool: Pool) -> dict[str, Any]:
    """The fields that every line about a pool carries (SPEC §14)."""
    engine = pool.config.engine if pool.config is not None else None
    context: dict[str, Any] = {"engine": engine, "restart_count": pool.state.restart_count}
    if (prepared := pool.launch.prepared) is not None:
        context |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask, "replica_id": prepared.replica_id,
        }  # fmt: skip
    return context
