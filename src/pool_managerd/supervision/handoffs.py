"""External engines, announced by a handoff file: attached to, probed, never signalled (SPEC §12, DESIGN §7)."""

from __future__ import annotations

from pool_managerd.core.artifacts import AttachedEngine, PreparedEngine
from pool_managerd.core.handoff import Handoff
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools


def _is_ours(pool: Pool) -> bool:
    return pool.config is not None or pool.instance.has_process or isinstance(pool.submitted, PreparedEngine)


class HandoffIntake:
    """Registers a pool per announced engine; a pool whose engine is run here is never taken over."""

    def __init__(self, pools: Pools, events: EventLog) -> None:
        self._pools = pools
        self._events = events

    def on_handoff(self, found: Handoff, duration_ms: float) -> None:
        known = self._pools.find(found.pool_id)
        outcome, level = "success", "info"
        human = f"Pool '{found.pool_id}' was announced by a handoff file"
        if known is not None and _is_ours(known):
            outcome, level = "error", "warn"
            human = f"The handoff file of pool '{found.pool_id}' was ignored: the pool's engine is run here"
        else:
            try:
                pool = known or self._pools.add(found.pool_id)
            except PoolError as problem:
                self.on_error(found.path, problem.message)
                return
            definition = self._pools.definitions.with_engine(found.pool_id, pool.definition, attached_engine(found))
            if pool.state.desired.stays_down or pool.state.held:
                human = f"{human}; it stays down until it is started"
                self._pools.post(found.pool_id, ev.Tick(), definition)
            else:
                self._pools.post(found.pool_id, ev.Stop())
                self._pools.post(found.pool_id, ev.Start(origin="handoff"), definition)
        self._events.emit(
            "handoff",
            human,
            level=level,
            pool_id=found.pool_id,
            outcome=outcome,
            duration_ms=round(duration_ms, 1),
            path=found.path,
        )

    def on_error(self, path: str, message: str) -> None:
        self._events.emit("handoff", message, level="warn", outcome="error", duration_ms=0, path=path)


def attached_engine(found: Handoff) -> AttachedEngine:
    """Its mask is stored, not validated (DESIGN §7)."""
    return AttachedEngine(
        found.pool_id, found.url, found.engine, found.engine_version or "unknown", found.replica_id, model_path=found.model_path,
        device_mask=found.device_mask, slots_total=found.slots_total or 1,
    )  # fmt: skip
