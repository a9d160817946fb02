"""What everybody is told of a pool: the registry, the log, the next daemon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pool_managerd.core.baselines import Baseline
from pool_managerd.core.lifecycle import Phase, PoolState, outline, view
from pool_managerd.core.lifecycle.events import Event
from pool_managerd.core.lifecycle.phase import LOADING
from pool_managerd.core.redaction import masked_text
from pool_managerd.core.registry import PerfHints
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Emit
from pool_managerd.supervision.services import Services


class Publishing:
    """Called by the pool's actor alone. Of an instance that is not the pool's current one nobody is told anything here."""

    def __init__(self, pool: Pool, emit: Emit, services: Services) -> None:
        self._pool, self._emit, self._s = pool, emit, services
        self._shown = outline(pool.state)

    def stepped(self, before: PoolState, event: Event, *, defined_anew: bool) -> bool:
        """The pool's state was ``before``; true when there is something in it that others go by and did not know."""
        shown, self._shown = self._shown, outline(self._pool.state)
        changed = self._shown != shown or defined_anew
        if self._pool.current:
            self._s.histories.note(self._pool.pool_id, self._pool.state.history)
            if changed:
                self.publish()
                self._tell_transition(view(before).state, event)
        return changed

    def publish(self) -> None:
        """To the registry, in one step."""
        pool = self._pool
        if not pool.current:
            return
        fields = registry_fields(pool, self._s.clock.wall_ms(), self._s.node_id, self._s.models.id_of)
        self._s.registry.publish(pool.pool_id, **fields)
        if pool.instance.phase not in LOADING:
            self._s.gate.leave(pool.pool_id)
        if pool.instance.phase is not Phase.ATTACHED:
            self._s.silent.discard(pool.pool_id)

    def keep_counters(self) -> None:
        """For the next daemon."""
        state = self._pool.state
        if self._pool.current:
            self._s.records.note_counters(state.pool_id, state.crash_count, state.restart_count)

    def took_place(self) -> None:
        """The pool's instance is another one from now on, whatever was shown before."""
        self._shown = outline(self._pool.state)
        self.publish()
        self._s.histories.note(self._pool.pool_id, self._pool.state.history)
        self.keep_counters()

    def _tell_transition(self, was: str, event: Event) -> None:
        state = view(self._pool.state).state
        if state != was:
            fields = {"from_state": was, "to_state": state, "reason": self._pool.state.reason, "event": type(event).__name__}
            self._emit("transition", f"Pool '{self._pool.pool_id}' is {state} now (was {was})", level="debug", **fields)


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
    replica_id = pool.instance_id.replica_id
    context: dict[str, Any] = {"engine": engine, "restart_count": pool.state.restart_count, "replica_id": replica_id}
    if (prepared := pool.launch.prepared) is not None:
        context |= {
            "engine": prepared.engine, "engine_version": prepared.engine_version, "model_id": prepared.model_id,
            "device_mask": prepared.device_mask,
        }  # fmt: skip
    return context
