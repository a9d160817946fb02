"""The work behind effects: stage, spawn, probe, warm up. Each returns the event that tells its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import aiohttp

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine, ResolvedModel
from pool_managerd.core.crash_evidence import named_cause
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.masks import DeviceMask, cuda_environment
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import signal_name
from pool_managerd.core.memory.estimator import LaunchEstimator
from pool_managerd.errors import EngineError, NodeError, PoolError, SpecError
from pool_managerd.supervision.protocols import Process
from pool_managerd.supervision.services import Services

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver

_REASONS = {
    "GPU_REQUIRED": "gpu_required", "GPU_UNAVAILABLE": "gpu_required", "GPU_NOT_SHARED": "insufficient_vram",
    "INSUFFICIENT_VRAM": "insufficient_vram", "INSUFFICIENT_RAM": "insufficient_ram",
}  # fmt: skip
LOG_TAIL_LINES = 20
_PORT_TAKEN = ("address already in use", "couldn't bind", "failed to bind", "bind: ")


@dataclass
class Launch:
    """What belongs to one pool's present launch. ``cause`` is the error behind the latest failure.

    ``assignment`` and ``sizing`` are what its GPUs were promised by, ``held`` what it was last
    seen to hold since it became ready. ``log_mark`` is where its part of the log begins, ``log_tail`` the end of that part,
    read once when the engine has ended.
    """

    prepared: PreparedEngine | None = None
    assignment: Allocation | None = None
    sizing: LaunchEstimator | None = None
    held: dict[str, int] | None = None
    process: Process | None = None
    cause: PoolError | None = None
    handoff_path: str | None = None
    log_mark: dict[int, int] = field(default_factory=dict)
    log_tail: list[str] = field(default_factory=list)
    step: str = ""
    progress: tuple[int, int] = (0, 0)
    tokens_per_s: float | None = None
    first_token_ms: float | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


async def stage(
    driver: PoolDriver, epoch: int, launch: Launch, s: Services, on_progress: Callable[[int, int], None]
) -> tuple[PreparedEngine, ResolvedModel | None]:
    """policy → GPUs and memory → model → engine (SPEC §2.4). Raises PoolError."""
    pool, submitted, external = driver.config, driver.submitted, driver.external
    if not external:
        for finding in (await s.preflight(driver.pool_id)).overridden:
            driver.emit("preflight", f"Overridden by the configuration: {finding.message}", level="warn", code=finding.code)
        if pool is not None or submitted is not None:
            launch.step = "memory"
            launch.assignment = await s.admission.admit(driver, epoch)
    if submitted is not None:
        return replace(_shown_its_devices(submitted, launch.assignment), verbatim=True), None
    if pool is None:
        raise SpecError(
            "cannot start a pool that has neither a configuration nor a submitted engine", code="POOL_NOT_CONFIGURED", status=409
        )
    model = None
    if not external:
        launch.step = "model"
        model = await s.models.ensure_present(pool.model, pool.checksums, progress=on_progress)
    launch.step = "engine"
    return await s.engines.prepare(pool, model, launch.assignment), model


def _shown_its_devices(submitted: PreparedEngine, assignment: Allocation | None) -> PreparedEngine:
    """A submitted engine runs verbatim, but sees the GPUs that it was given and no others (SPEC §6.1)."""
    if submitted.attach_url is not None:
        return submitted
    if assignment is not None:
        shown = assignment.environment()
        given = submitted.env.get("CUDA_VISIBLE_DEVICES")
        notes = (
            (f"CUDA_VISIBLE_DEVICES={given} was replaced: the engine sees the GPUs that were reserved for it",) if given else ()
        )
        uuids = tuple(d.uuid for d in assignment.devices)
        return replace(submitted, env={**submitted.env, **shown}, device_uuids=uuids, warnings=(*submitted.warnings, *notes))
    if submitted.device_mask is None:
        return submitted
    shown = cuda_environment(DeviceMask.parse(submitted.device_mask).to_cuda_visible_devices())
    return replace(submitted, env={**submitted.env, **shown})


async def probe(launch: Launch, epoch: int, timeout_s: float, s: Services) -> tuple[ev.Event, ProbeResult]:
    """One health probe. An answer counts only while the port is held by our own process (invariant 3)."""
    prepared = launch.prepared
    if prepared is None:
        return ev.ProbeMissed(epoch, "had no engine to ask"), ProbeResult(ProbeOutcome.ERROR, "had no engine to ask")
    result = await s.prober.probe(prepared.url + prepared.health_path, timeout_s)
    if launch.process is not None:
        found = await s.listener(launch.process.pid, prepared.host, prepared.port)
        if found.owner == "other":
            reason = f"was answered by another program: port {prepared.port} is not held by this engine but by {found.who}"
            return ev.ProbeMissed(epoch, reason, conclusive=True), ProbeResult(ProbeOutcome.ERROR, reason)
        if result.ok and found.owner == "nobody":
            result = ProbeResult(ProbeOutcome.ERROR, f"was answered, but nothing listens on port {prepared.port} any more")
    if result.ok:
        return ev.ProbeSucceeded(epoch), result
    if result.outcome is ProbeOutcome.DISCARDED:
        return ev.ProbeDiscarded(epoch), result
    return ev.ProbeMissed(epoch, result.reason), result


async def warm_up(launch: Launch, epoch: int, timeout_s: float, s: Services) -> ev.Event:
    """Measure the first token and the rate, and fold them into the baseline (EWMA)."""
    if launch.prepared is None:
        return ev.WarmupFailed(epoch, "there is no engine")
    try:
        first_ms, rate = await s.prober.warm_up(launch.prepared, timeout_s)
    except TimeoutError:
        return ev.WarmupFailed(epoch, f"no answer within {timeout_s:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as problem:
        return ev.WarmupFailed(epoch, str(problem) or type(problem).__name__)
    e = launch.prepared
    smoothed = s.baselines.observe((e.engine_version, e.model_id or "", e.device_mask or ""), first_ms, rate)
    launch.first_token_ms, launch.tokens_per_s = smoothed.first_token_ms, smoothed.tokens_per_s
    what = "first token after" if e.warmup == "completion" else f"{e.warmup} after"
    human = f"Pool '{e.pool_id}' answered its warm-up: {what} {first_ms:.0f} ms, {rate:.1f} tokens/s"
    s.events.emit("warmup", human, pool_id=e.pool_id, first_token_ms=round(first_ms, 1), tokens_per_s=round(rate, 2))
    return ev.WarmedUp(epoch)


def exit_event(epoch: int, record: ExitRecord, lines: list[str], prepared: PreparedEngine | None) -> ev.Exited:
    """The exit record as an event; last_error texts are those of SPEC §8.5. ``lines`` are those of this launch alone."""
    name = signal_name(record.signal)
    if record.oom_kills:
        summary = "out_of_memory"
    elif name == "SIGILL":
        summary = "signal SIGILL: this engine build uses CPU instructions that this machine lacks; use another build"
    elif name:
        summary = f"signal {name}"
    else:
        summary = f"exit_code={record.code}" if record.code is not None else "the exit record was lost"
    text = "\n".join(lines[-LOG_TAIL_LINES:]).lower()
    taken = record.code not in (None, 0) and any(sign in text for sign in _PORT_TAKEN)
    return ev.Exited(
        epoch, code=record.code, signal=record.signal, summary=summary, port_conflict=taken,
        evidence=named_cause(lines, prepared.engine if prepared is not None else ""),
        graceful=record.code == 0 and prepared is not None and prepared.verbatim,
    )  # fmt: skip


def failure(error: PoolError) -> tuple[str, bool, str]:
    """(text, retriable, reason of SPEC §2.3) of a staging or spawn error."""
    reason = _REASONS.get(error.code)
    if reason is None:
        reason = "config_error" if isinstance(error, SpecError) else "preload_failed"
    hint = f" ({error.hint})" if error.hint else ""
    retriable = error.retriable if isinstance(error, NodeError) else not isinstance(error, SpecError)
    return error.message + hint, retriable, reason


def operation_error(pool_id: str, last_error: str | None, cause: PoolError | None, log_tail: list[str]) -> EngineError:
    """What the caller of a failed start is told: always 500, with the cause's code and hint, and the log's end (DESIGN §7)."""
    text = last_error or "the start was given up"
    message = text if text.startswith("preload failed") else f"preload failed: {text}"
    code = cause.code if cause is not None else "PRELOAD_FAILED"
    return EngineError(
        message,
        code=code,
        status=500,
        pool_id=pool_id,
        hint=cause.hint if cause else None,
        retriable=cause is not None and failure(cause)[1],
        details={"log_tail": log_tail} if log_tail else None,
    )
