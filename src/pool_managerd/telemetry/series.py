"""Every metric series of the daemon as data: names, types and label sets are a contract (SPEC §13, OC-METRICS-7101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

DURATION_BUCKETS_MS = (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000, 600000)
BACKOFF_BUCKETS_MS = (500, 1000, 2000, 4000, 8000, 16000, 32000, 60000)

# How many different values a label may take (SPEC §13.1); further ones are counted as "other". Pool ids are bounded by the
# live pools and devices by the devices that exist instead, routes and statuses by the route table.
LABEL_BUDGETS = {
    "engine": 4, "reason": 16, "crash_reason": 32, "crash_class": 32, "class": 2, "outcome": 4, "state": 16, "xid": 32,
    "measured_with": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """One metric family. ``source_key`` names the field of a pool's status, or of a device, that a gauge shows."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    source_key: str = ""
    buckets: tuple[int, ...] = DURATION_BUCKETS_MS


PRELOAD_SUCCESS = Series("preload_success_total", "counter", ("pool_id", "engine"), "Preloads that ended with a ready pool.")
PRELOAD_FAILURE = Series("preload_failure_total", "counter", ("pool_id", "reason"), "Preloads that failed, by reason.")
PRELOAD_DURATION = Series(
    "preload_duration_ms", "histogram", ("pool_id", "outcome"), "From the start of a preload to its end, in ms."
)
CRASHES = Series("crashes_total", "counter", ("pool_id", "crash_class"), "Failures of running engines, by class.")
RESTARTS = Series("restart_total", "counter", ("pool_id",), "Times a pool's engine was started again; the first start is none.")
RESTARTS_SCHEDULED = Series(
    "restart_scheduled_total", "counter", ("pool_id", "crash_reason"), "Restarts scheduled with a backoff, by cause."
)
BACKOFF_DELAY = Series(
    "backoff_delay_ms",
    "histogram",
    ("pool_id", "crash_reason"),
    "Delay before a scheduled restart, in ms.",
    buckets=BACKOFF_BUCKETS_MS,
)
BREAKER_OPENED = Series(
    "circuit_breaker_open_total", "counter", ("pool_id", "class"), "Times that a circuit breaker opened: general or cuda."
)
STORMS = Series("restart_storm_total", "counter", ("pool_id",), "Times that a storm of restarts began.")
RELOAD_DURATION = Series(
    "reload_duration_ms", "histogram", ("pool_id",), "From the acceptance of a reload to its end, good or bad, in ms."
)
RELOAD_SUCCESS = Series("reload_success_total", "counter", ("pool_id",), "Reloads whose new engine stayed.")
RELOAD_FAILURE = Series(
    "reload_failure_total",
    "counter",
    ("pool_id", "reason"),
    "Reloads after which what ran before ran again, or nothing, by reason.",
)
SLOTS_SAVED = Series("slots_saved_total", "counter", ("pool_id",), "Slots whose cache was saved before a stop.")
SLOTS_SAVED_BYTES = Series("slots_saved_bytes_total", "counter", ("pool_id",), "Bytes that were written for them.")
SLOTS_RESTORED = Series("slots_restored_total", "counter", ("pool_id",), "Slots that were given back to an engine, proven.")
CACHE_LOST = Series(
    "cache_lost_total", "counter", ("pool_id", "reason"),
    "Times that what an engine had read was not kept: budget, busy, different, error, timeout or unproven.",
)  # fmt: skip
DRAIN_DURATION = Series("drain_duration_ms", "histogram", ("pool_id",), "From the start of a drain to the stop, in ms.")
HEALTH_CHECKS = Series(
    "pool_health_checks_total", "counter", ("pool_id", "outcome"), "Health probes: success, error, timeout, or discarded."
)
HANDOFF_FILES = Series(
    "pool_handoff_files_processed_total", "counter", ("pool_id", "outcome"), "Handoff files read from the runtime directory."
)
HANDOFF_DURATION = Series(
    "pool_handoff_processing_duration_ms", "histogram", ("pool_id",), "Time to process one handoff file, in ms."
)
HTTP_REQUESTS = Series("http_requests_total", "counter", ("route", "method", "status"), "Requests answered by the control API.")

GAUGES = (
    Series("pool_ready", "gauge", ("pool_id",), "1 while the pool serves and takes new leases.", source_key="ready"),
    Series(
        "pool_slots_total", "gauge", ("pool_id",), "Requests the pool's engine serves at the same time.", source_key="slots_total"
    ),
    Series("queue_depth", "gauge", ("pool_id",), "Requests that wait for a slot of the pool.", source_key="waiting"),
    Series("pool_slots_free", "gauge", ("pool_id",), "Slots that no lease holds.", source_key="slots_free"),
    Series("slots_total", "gauge", ("pool_id",), "The same as pool_slots_total.", source_key="slots_total"),
    Series("slots_free", "gauge", ("pool_id",), "The same as pool_slots_free.", source_key="slots_free"),
    Series("active_leases", "gauge", ("pool_id",), "Leases that are held now.", source_key="active_leases"),
    Series(
        "pool_vram_total_bytes",
        "gauge",
        ("pool_id",),
        "VRAM of the devices that the pool may use.",
        source_key="vram_total_bytes",
    ),
    Series(
        "pool_vram_free_bytes",
        "gauge",
        ("pool_id",),
        "Free VRAM of those of them that can be read.",
        source_key="vram_free_bytes",
    ),
    Series(
        "restart_rate", "gauge", ("pool_id",), "Restarts within supervision.restart_limit.window_ms.", source_key="restart_rate"
    ),
)
BREAKER_STATE = Series("circuit_breaker_state", "gauge", ("pool_id", "class"), "0 closed, 1 open, 2 half-open; general or cuda.")
FIRST_TOKEN = Series(
    "pool_first_token_ms", "gauge", ("pool_id", "measured_with"), "Time to the first token, in ms, by bench or smoothed warm-up."
)
TOKENS_PER_S = Series(
    "pool_tokens_per_s", "gauge", ("pool_id", "measured_with"), "Tokens per second of one request, by bench or smoothed warm-up."
)
POOL_STATE = Series("pool_state", "gauge", ("pool_id", "state"), "1 for the state the pool is in.", source_key="state")

DRIVER_RESETS = Series("driver_reset_total", "counter", ("device",), "Resets of the GPU, or of its driver, that were seen.")
XIDS = Series("gpu_xid_total", "counter", ("device", "xid"), "Xid errors that the driver reported, by number.")
_HELD = ("engine", "engine_version", "pool_id", "replica_id", "device")
VRAM_USED = Series("vram_used_bytes", "gauge", _HELD, "VRAM that the pool's engine holds on the device, as measured.")
GPU_UTILIZATION = Series("gpu_utilization", "gauge", _HELD, "How busy the device is, in percent; all that use it count.")
VRAM_RESERVED = Series("vram_reserved_bytes", "gauge", ("device",), "VRAM that is reserved for pools.")
QUARANTINED = Series("device_quarantined", "gauge", ("device",), "1 while nothing is started on the device because it failed.")
GPU_INFO = Series("gpu_info", "gauge", ("device", "uuid", "name", "pci_bus_id"), "Always 1; the labels say which GPU it is.")
DEVICE_FIELDS = (
    Series("vram_total_bytes", "gauge", ("device",), "VRAM of the device.", source_key="vram_total_bytes"),
    Series(
        "vram_free_bytes",
        "gauge",
        ("device",),
        "VRAM that nobody holds; none while it cannot be read.",
        source_key="vram_free_bytes",
    ),
    Series("gpu_temperature_celsius", "gauge", ("device",), "Temperature of the GPU.", source_key="temperature_c"),
    Series("gpu_power_watts", "gauge", ("device",), "Power that the GPU draws.", source_key="power_watts"),
    Series(
        "gpu_ecc_uncorrected", "gauge", ("device",), "Memory errors since the driver was loaded.", source_key="ecc_uncorrected"
    ),
)
DEVICE_GAUGES = (*DEVICE_FIELDS, VRAM_RESERVED, QUARANTINED, GPU_INFO, VRAM_USED, GPU_UTILIZATION)
DEVICES_STALE = Series("devices_stale", "gauge", (), "1 while the devices cannot be read: their series show the last known.")
DEVICE_SCAN_AGE = Series("device_scan_age_ms", "gauge", (), "How long ago the devices were last read.", source_key="age_ms")
RAM_AVAILABLE = Series("ram_available_bytes", "gauge", (), "RAM for new engines.", source_key="ram_available_bytes")
BUILD_INFO = Series(
    "pool_managerd_build_info", "gauge", ("version", "python_version"), "Always 1; the labels say which daemon runs on what."
)
NODE_GAUGES = (DEVICES_STALE, DEVICE_SCAN_AGE, RAM_AVAILABLE)
STATE_DEGRADED = Series("state_degraded", "gauge", (), "1 while the state cannot be written: changes are refused until it can.")

DOWNLOADS = Series(
    "model_downloads_total", "counter", ("outcome", "reason"),
    "Downloads of models that ended: success, cancelled or error, by the error's code in lower case.",
)  # fmt: skip
DOWNLOADED_BYTES = Series("model_download_bytes_total", "counter", (), "Bytes of models that came over the network.")
VERIFICATIONS = Series(
    "catalog_verifications_total", "counter", ("result", "reason"),
    "Models that were hashed and compared: pass or fail, in a start or by verify.",
)  # fmt: skip
VERIFY_DURATION = Series("model_verify_duration_ms", "histogram", ("result",), "Time to hash a model and compare it, in ms.")
GC_BYTES = Series(
    "model_gc_bytes_total", "counter", (), "Bytes that were deleted from the cache of models as nobody needed them."
)
CACHE_BYTES = Series("model_cache_bytes", "gauge", (), "What the cache of models takes, parts of downloads included.")
CATALOG_ENTRIES = Series(
    "catalog_entries_total", "gauge", ("state",), "Models in the cache: active, or retired as nobody has needed them for long."
)

LOOP_LAG = Series("loop_lag_seconds", "gauge", (), "By how much the daemon's event loop was late at most, in the last minute.")
CONFIG_READ = Series("config_reread_total", "counter", ("outcome",), "Times that SIGHUP or --watch had the file read again.")
CONFIG_APPLIED = Series(
    "config_apply_total", "counter", ("outcome",),
    "Configurations that were to be applied: applied, unchanged, failed (for a pool at least), or refused as a whole.",
)  # fmt: skip

FIRST_TOKEN_BUCKETS_MS = (50, 100, 150, 200, 300, 500, 750, 1000, 1500, 2000, 3000, 10_000, 60_000)
DECODE_BUCKETS_MS = (250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12000, 60_000)
_REQUEST = ("engine", "pool_id")
GATEWAY_REQUESTS = Series(
    "gateway_requests_total", "counter", ("pool_id", "path", "status"), "Answered requests of clients; pool_id none: of no pool."
)
TASKS_STARTED = Series("tasks_started_total", "counter", _REQUEST, "Requests that were passed on to an engine.")
TASKS_CANCELED = Series("tasks_canceled_total", "counter", (*_REQUEST, "reason"), "Requests that a client gave up.")
TASKS_REJECTED = Series("tasks_rejected_total", "counter", ("reason",), "Requests that got no engine, by the error's code.")
ADMISSION_LATENCY = Series("latency_admission_ms", "histogram", _REQUEST, "From a request's arrival to its slot, load included.")
FIRST_BYTE = Series(
    "latency_first_token_ms", "histogram", _REQUEST, "From a request's arrival to the first of its answer.",
    buckets=FIRST_TOKEN_BUCKETS_MS,
)  # fmt: skip
DECODE_LATENCY = Series(
    "latency_decode_ms", "histogram", _REQUEST, "From the first of a stream to its end.", buckets=DECODE_BUCKETS_MS
)
TOKENS_IN = Series("tokens_in_total", "counter", _REQUEST, "Tokens of prompts, as engines counted them; cached ones included.")
TOKENS_CACHED = Series("tokens_cached_total", "counter", _REQUEST, "Of these, what engines had in their caches.")
TOKENS_OUT = Series("tokens_out_total", "counter", _REQUEST, "Tokens of answers, as engines counted them.")
GATEWAY = (
    GATEWAY_REQUESTS, TASKS_STARTED, TASKS_CANCELED, TASKS_REJECTED, ADMISSION_LATENCY, FIRST_BYTE, DECODE_LATENCY, TOKENS_IN,
    TOKENS_CACHED, TOKENS_OUT,
)  # fmt: skip
"""Those that the gateway serves, on its own port."""

COUNTED = (
    PRELOAD_SUCCESS,
    PRELOAD_FAILURE,
    PRELOAD_DURATION,
    CRASHES,
    RESTARTS,
    RESTARTS_SCHEDULED,
    BACKOFF_DELAY,
    BREAKER_OPENED,
    STORMS,
    DRAIN_DURATION,
    SLOTS_SAVED,
    SLOTS_SAVED_BYTES,
    SLOTS_RESTORED,
    CACHE_LOST,
    RELOAD_DURATION,
    RELOAD_SUCCESS,
    RELOAD_FAILURE,
    HEALTH_CHECKS,
    HANDOFF_FILES,
    HANDOFF_DURATION,
    HTTP_REQUESTS,
    DRIVER_RESETS,
    XIDS,
    CONFIG_READ,
    CONFIG_APPLIED,
    DOWNLOADS,
    DOWNLOADED_BYTES,
    VERIFICATIONS,
    VERIFY_DURATION,
    GC_BYTES,
)
ALL = (
    *GAUGES,
    POOL_STATE,
    BREAKER_STATE,
    FIRST_TOKEN,
    TOKENS_PER_S,
    *DEVICE_GAUGES,
    *NODE_GAUGES,
    STATE_DEGRADED,
    LOOP_LAG,
    CACHE_BYTES,
    CATALOG_ENTRIES,
    BUILD_INFO,
    *COUNTED,
)


_TABLE = ("| Name | Type | Labels | Meaning |", "|---|---|---|---|")


def markdown() -> str:
    """The reference page of the metrics, generated from this table."""
    lines = [
        "# Metrics",
        "",
        "Served as Prometheus text at `/metrics`, and on `daemon.metrics_bind` when that is set. `telemetry.labels` of the",
        "configuration go on every series as further labels. A pool's series vanish with the pool, a device's with the device;",
        "`device` is the index that `nvidia-smi` counts, or the UUID of a MIG instance or of a GPU that is gone and whose index",
        "another one has now. Of a GPU that is gone `device_quarantined` and `gpu_info` stay; what cannot be read has no sample.",
        "",
        *_TABLE,
    ]
    lines += [f"| `{s.name}` | {s.kind} | {', '.join(f'`{label}`' for label in s.labels)} | {s.help} |" for s in ALL]
    lines += ["", "The gateway serves these at `/metrics` of its own port:", "", *_TABLE]
    lines += [f"| `{s.name}` | {s.kind} | {', '.join(f'`{label}`' for label in s.labels)} | {s.help} |" for s in GATEWAY]
    lines += [
        "",
        f"Buckets of durations (ms): {', '.join(map(str, DURATION_BUCKETS_MS))}.",
        f"Buckets of `backoff_delay_ms`: {', '.join(map(str, BACKOFF_BUCKETS_MS))}.",
        "",
        "A label takes at most this many values; further ones are counted as `other`: "
        + ", ".join(f"`{label}` {budget}" for label, budget in sorted(LABEL_BUDGETS.items()))
        + ". `pool_id` and `device` are bounded by the pools and devices that exist.",
        "",
    ]
    return "\n".join(lines)
