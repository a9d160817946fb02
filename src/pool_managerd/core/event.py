"""What happened, as one value for everybody: the log, the metrics, the event stream, the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

EVENT_TYPES: Mapping[str, str] = MappingProxyType({
    "adopt": "an engine that ran already was taken over", "adopting": "an engine that ran already was found",
    "apply_finished": "a configuration was applied, or not as a whole", "apply_started": "a configuration is being applied",
    "attach": "an engine that somebody else runs is probed from now on", "backoff": "a restart is due, and when",
    "bench_failed": "a pool was not measured",
    "bench_progress": "how far a bench is", "bench_started": "a pool is measured; all its slots are leased",
    "bench_succeeded": "a pool was measured", "breaker": "the circuit breaker opened, closed, or lets one start through",
    "cache_lost": "what an engine had read of its prompts was not saved, or not given back, and why",
    "cache_removed": "a saved slot made room for another one",
    "cache_restored": "an engine was given back what it had read, with a proof",
    "cache_saved": "what an engine has read was saved before its stop",
    "config_reread": "the configuration was read again, or could not be",
    "cordon": "nothing new starts on a GPU",
    "crash": "an engine failed, and how",
    "busy": "an engine works and answers no probes",
    "device_clear": "a GPU can be read again", "device_quarantined": "a GPU is out of use",
    "device_reset": "a GPU answers again and is on probation", "device_restored": "a GPU is used again",
    "device_scan": "the GPUs that were found, or why none can be read", "device_unclear": "a GPU cannot be read",
    "devices_released": "the driver's library was released", "devices_resumed": "the driver's library is in use again",
    "died": "an engine's process is gone", "evicted": "a pool made room, was idle, or was not waited for any more",
    "drain_finished": "a drain ended, and whether leases were cut off",
    "drain_progress": "what a drain still waits for, and until when at the latest",
    "drain_started": "a pool takes no new leases", "exit": "an engine that may end did so",
    "gap": "to a reader that resumes: not everything since then is kept", "gave_up": "no further start",
    "gateway_ended": "the gateway's process ended, and is started again",
    "gateway_started": "the gateway runs", "gateway_taken_over": "the gateway of an earlier daemon goes on",
    "handoff": "a handoff file announced an engine, or was wrong", "hold": "nothing of the pool starts by itself",
    "internal_error": "a fault of pool-managerd itself", "lease_expired": "a lease ran out",
    "not_adopted": "an engine that ran already was not taken over", "notice": "something worth knowing",
    "oom_storm": "a pool runs out of memory again and again", "operation": "an operation ended",
    "pool_removed": "a pool was forgotten", "port_conflict": "another program took the port",
    "preflight": "a finding about this machine", "preload_failed": "a start failed, and why",
    "preload_succeeded": "a pool became ready", "quarantine": "one of the pool's GPUs is out of use",
    "primed": "an engine has read the pool's prime prompt",
    "purged": "what was kept of a pool on disk is deleted",
    "quarantine_over": "the pool's GPUs are used again", "recovered": "a hung or busy engine answers again",
    "ready_again": "an engine that was ready before is ready again",
    "release": "a hold ended", "reload_failed": "a reload was given up or undone",
    "reload_started": "a pool is to run something else",
    "reload_succeeded": "a pool runs something else now", "reload_undone": "a daemon before had not finished a reload",
    "restart": "an engine is started again",
    "restart_delayed": "a restart waits: there were too many within the window", "sleep": "an engine is put to sleep",
    "asleep": "an engine sleeps", "sleep_failed": "an engine did not fall asleep and is woken",
    "no_room_to_wake": "what a sleeping engine had is another's now: it sleeps on",
    "spawn": "an engine's process runs", "staged": "model and engine are in place", "staging": "how far the model is verified",
    "fetch": "how far a model is fetched", "fetched": "a model was fetched",
    "model_removed": "a model was deleted from the cache", "model_pinned": "a model was pinned, or is not any more",
    "models_gc": "what nobody needs was deleted from the cache of models",
    "download": "the download of a model ended, and how", "model_verified": "a model was hashed and compared",
    "start": "a start began", "start_owed": "a start waits: a hold, a quarantine, an open breaker, a failure",
    "state_degraded": "changes cannot be made durable", "state_recovered": "changes are durable again",
    "state_renewed": "harmed state was written anew from memory", "stop": "an engine is being stopped",
    "stop_failed": "a process survived SIGKILL", "stopped": "a pool is down",
    "stopped_outside": "somebody had the engine's shim stop it",
    "storm": "a pool is restarted again and again", "survivor": "an engine of a dead daemon was ended",
    "transition": "a pool's state changed", "uncordon": "a GPU may be used again", "undrain": "a drain was taken back",
    "unhealthy": "a pool is not ready any more, and why", "vram_held": "memory of an ended engine is not seen free",
    "wake": "an engine is woken", "warming": "an engine gets its first prompt", "warmup": "how fast the first answer was",
    "warmup_failed": "the first prompt was not answered", "xid": "the driver reported a GPU error",
    "yield": "a GPU is left to others", "yield_over": "a GPU that was left to others is used again",
})  # fmt: skip
"""What can happen, by the type of the event."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: ``human`` is one sentence, ``fields`` the same for machines (SPEC §14).

    ``id`` grows with every event of the node, over restarts of its daemon too. ``ts_ms`` is unix time, ``type`` is one of
    EVENT_TYPES, ``level`` is debug, info, warn, error or critical, ``pool_id`` is None for what concerns the node. ``journal``
    false: for metrics only.
    """

    id: int
    ts_ms: int
    type: str
    level: str
    pool_id: str | None
    human: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    journal: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data: ``fields`` beside the rest."""
        head = {
            "id": self.id,
            "ts_ms": self.ts_ms,
            "type": self.type,
            "level": self.level,
            "pool_id": self.pool_id,
            "human": self.human,
        }
        return {**self.fields, **head}
