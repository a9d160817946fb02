"""Answers, for the OpenAPI document; what comes in is in bodies.py.

The models are built when first used (``defer_build``): most serve the document alone, and the daemon starts without them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pool_managerd.api.crash_schemas import LastCrash
from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.registry import PoolSnapshot


class Answer(BaseModel):
    """An answer: the keys named here stay, later versions may add some."""

    model_config = ConfigDict(extra="allow", defer_build=True)


class ErrorEnvelope(Answer):
    """Every error has this shape. ``error`` repeats ``message`` for older callers."""

    code: str
    message: str
    error: str
    retriable: bool
    correlation_id: str
    hint: str | None = None
    retry_after_ms: int | None = None
    pool_id: str | None = None
    engine: str | None = None
    details: dict[str, Any] | None = None


class Health(Answer):
    status: str = Field(description="ok, or degraded: the state cannot be written, and changes are refused until it can.")
    version: str


class PoolProblem(Answer):
    pool_id: str
    state: str


class Ready(Answer):
    ready: bool
    pools: list[PoolProblem] = Field(description="The pools that are not ready.")


class Beside(Answer):
    replica_id: str
    role: str = Field(description="`candidate`: it is tried, nobody knows of it yet; `retiring`: it ends with its last lease.")
    state: str
    epoch: int
    active_leases: int
    pid: int | None = None
    url: str | None = None


class PoolStatus(Answer):
    pool_id: str
    state: str
    live: bool
    ready: bool
    draining: bool
    active_leases: int
    slots_total: int | None = None
    slots_free: int | None = None
    engine: str | None = None
    engine_version: str | None = None
    model_id: str | None = None
    model_ref: str | None = None
    model_path: str | None = None
    device_mask: str | None = None
    replica_id: str | None = None
    crash_count: int = 0
    restart_count: int = 0
    last_error: str | None = None
    last_crash: LastCrash | None = Field(None, description="The newest crash report, without the log's end.")
    last_heartbeat_ms: int | None = None
    circuit_state: str | None = Field(None, description="closed, open or half_open: of both circuits together.")
    circuits: dict[str, str] = Field(default_factory=dict, description="The same of each: `general`, and `cuda` for CUDA errors.")
    restart_rate: int = Field(0, description="Restarts within `supervision.restart_limit.window_ms`.")
    pid: int | None = None
    url: str | None = None
    isolation: str | None = None
    last_probe: str | None = None
    reason: str | None = None
    activity: dict[str, Any] | None = Field(
        None, description="`verdict`: idle, busy, hung, unkillable or unknown; `why` says what it rests on."
    )
    outdated: list[str] = Field(
        default_factory=list, description="What the engine still runs as it was at its start: a restart applies the present one."
    )
    hung: bool = False
    desired: Desired = Field(Desired.WANTED, description="What was asked for last; demand starts what is on_demand or evicted.")
    held: bool = False
    drained: bool = False
    reload: str | None = Field(
        None, description="How far a reload is: staging, loading, draining, switching, gating, committing or undoing."
    )
    waiting: int = Field(0, description="Requests that wait for a slot of it (`acquire`).")
    idle_ms: int | None = Field(None, description="How long it has had no request; null while it has one, or is not ready.")
    unapplied: str | None = Field(None, description="Why what the file says of it is not in force; null where it is.")
    reloaded: list[str] = Field(
        default_factory=list, description="The keys that reloads have changed: they are not what the file says."
    )
    beside: Beside | None = Field(None, description="The pool's other engine, while one takes the other's place.")
    next_restart_at_ms: int | None = None
    preload: dict[str, Any] | None = None
    drain: dict[str, Any] | None = Field(
        None, description="While it drains: `left`, of it `requests` that the engine counts, and `remaining_ms` to the deadline."
    )
    perf: dict[str, Any] | None = Field(
        None, description="What tells most of how fast it is: a bench, else its warm-ups; `measured_with` says which."
    )
    baselines: list[dict[str, Any]] = Field(
        default_factory=list, description="All that was measured of this engine version with this model on these GPUs."
    )
    cache: dict[str, Any] | None = Field(
        None,
        description="`restored_slots`, `restored_tokens`: given back to this launch of what its slots held before its last stop;"
        " `lost`: what was not saved then, or not given back, and why. Null for an engine that keeps nothing; its numbers are"
        " null until they are known, and for an engine that an earlier daemon has launched: nobody knows what that was given.",
    )


class PoolHealth(Answer):
    live: bool
    ready: bool
    draining: bool
    metrics: dict[str, Any]


class Preloaded(Answer):
    pool_id: str
    pid: int | None = None
    handoff_path: str | None = None


class OperationAnswer(Answer):
    operation_id: str
    kind: str
    pool_id: str | None = None
    status: str
    outcome: dict[str, Any] | None = None
    progress: dict[str, Any] | None = Field(None, description="While it runs, of some kinds: `done`, `total` and `human`.")


class ReloadAnswer(Answer):
    """With ``dry_run`` the plan, else the operation. The forecast is null where nothing was measured yet; its spread is half of
    what it has varied by.
    """

    pool_id: str
    operation_id: str | None = None
    status: str | None = None
    outcome: dict[str, Any] | None = None
    strategy: str | None = None
    why: str | None = Field(None, description="Why it is this strategy.")
    changes: list[Any] | None = Field(None, description="{key, old, new} for each that is not the same.")
    steps: list[str] | None = None
    forecast_downtime_ms: int | None = None
    forecast_spread_ms: int | None = None
    forecast_duration_ms: int | None = None
    vram: dict[str, Any] | None = Field(None, description="where it would run, and what it needs.")


class PurgeAnswer(Answer):
    """With ``dry_run`` what would be done, else the operation, whose outcome has ``removed`` and ``freed_bytes``."""

    pool_id: str
    operation_id: str | None = None
    status: str | None = None
    outcome: dict[str, Any] | None = None
    stops_by: str | None = Field(None, description="How an engine that runs would be ended: drain or stop.")
    would_remove: list[Any] | None = Field(None, description="{path, bytes} of each directory.")
    would_free_bytes: int | None = None


class LeaseGiven(Answer):
    lease_id: str
    active_leases: int
    url: str | None = Field(None, description="The engine that the lease is on: requests under it go there.")


class LeaseCount(Answer):
    active_leases: int


class Lease(Answer):
    lease_id: str
    holder: str | None = None
    given_at_ms: int | None = None
    expires_at_ms: int | None = None


class Command(Answer):
    pool_id: str
    argv: list[str]
    env: dict[str, str]
    cwd: str | None = None


class Registered(Answer):
    pool_id: str
    registered: bool


class ExplainedProblem(Answer):
    """What stands in the way of a start, and the remedy."""

    message: str
    hint: str | None = None
    code: str | None = None


class Explanation(Answer):
    """``blockers`` are the messages of ``problems``."""

    pool_id: str
    would: str
    steps: list[Any]
    blockers: list[Any]
    problems: list[ExplainedProblem] = []


class Capabilities(Answer):
    """What this daemon can do."""


class ScanTrouble(Answer):
    """Why the devices are not what they are now."""

    code: str
    message: str
    hint: str | None = None


class Snapshots(Answer):
    """Every pool at one instant. What it says of devices is of ``devices_taken_at_ms``; stale ones are the last known."""

    model_config = ConfigDict(use_attribute_docstrings=True)  # of the registry's own types

    version: int = Field(description="Grows with every change.")
    taken_at_ms: int
    devices_stale: bool = Field(description="True while the GPUs of this node cannot be scanned.")
    devices_taken_at_ms: int | None = None
    devices_age_ms: int | None = None
    devices_problem: ScanTrouble | None = None
    pools: list[PoolSnapshot]


class DeviceReservation(Answer):
    """What one pool has reserved of a device. ``used_bytes`` is measured, null where the driver does not tell; what it is taken
    to hold is in ``estimated_bytes`` then.
    """

    pool_id: str
    replica_id: str = Field("r0", description="Two while the pool is being replaced: each reserves for itself.")
    reserved_bytes: int
    used_bytes: int | None = None
    estimated_bytes: int | None = None
    exclusive: bool = False
    pids: list[int] = []


class ForeignProcess(Answer):
    """A process on a device that is not an engine of this daemon. Where not ``certain``, ``pid`` is the driver's number."""

    pid: int
    name: str | None = None
    kind: str | None = None
    vram_bytes: int | None = None
    certain: bool = True
    ended: bool = Field(False, description="The process is no more, and its memory was not given back.")


class Device(Answer):
    """A GPU or MIG instance, also one that is gone and was not forgotten."""

    id: int = Field(description="The index that nvidia-smi counts, -1 when it is gone; a MIG instance has its GPU's.")
    device: str = Field(description="Its name: the index; the UUID of a MIG instance, and of a GPU whose index another one has.")
    uuid: str
    name: str
    readable: bool = Field(True, description="False when it cannot be read: what it holds is not known.")
    state: str = Field(description="ok, quarantined or probation")
    cordoned: bool
    vram_total_bytes: int
    vram_free_bytes: int | None = Field(description="That nobody holds; null while it cannot be read.")
    vram_used_bytes: int | None = Field(description="That processes hold; null while it cannot be read.")
    vram_available_bytes: int = Field(description="That may still be reserved.")
    kept_for: str | None = Field(None, description="The exclusive pool that has it, and its siblings, to itself.")
    reservations: list[DeviceReservation]
    foreign: list[ForeignProcess] = Field(
        description="Unmanaged processes there; our engines, too, where pids cannot be attributed."
    )
    foreign_bytes: int = Field(description="What others than the pools hold of it.")
    vram_driver_bytes: int = Field(0, description="What the driver keeps for itself.")
    reason: str | None = None
    remedy: str | None = None
    pci_bus_id: str | None = None
    parent_uuid: str | None = None
    mig_enabled: bool = False
    compute_capability: str | None = None
    temperature_c: int | None = None
    power_watts: float | None = None
    utilization_percent: int | None = None
    ecc_uncorrected: int | None = None
    numa_node: int | None = None
    nvlink_peers: list[str] = []


class Devices(Answer):
    """All devices at one moment. Stale ones are the last known, and ``problem`` says why."""

    taken_at_ms: int | None
    age_ms: int | None
    stale: bool
    simulated: bool
    revision: int
    devices: list[Device]
    problem: ScanTrouble | None = None
    driver_version: str | None = None
    cuda_version: str | None = None
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None


class PreflightFinding(Answer):
    """One thing that was checked. ``remedy``: commands or configuration lines that can be pasted."""

    code: str
    level: str = Field(description="ok, warn, fail or overridden")
    subject: str
    message: str
    remedy: list[str]


class Preflight(Answer):
    """``ok`` is false when a finding fails."""

    ok: bool
    profile: str
    findings: list[PreflightFinding]
