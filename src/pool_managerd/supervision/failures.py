"""What a failure is to the lifecycle, and to whoever asked for the start."""

from __future__ import annotations

from collections.abc import Sequence

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import Diagnosis, Incident, LaunchLog, diagnose
from pool_managerd.core.crash_report import remediation
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError, SpecError
from pool_managerd.supervision.launch import Launch

LOG_TAIL_LINES = 20
_REASONS = {
    "GPU_REQUIRED": "gpu_required", "GPU_UNAVAILABLE": "gpu_required", "GPU_NOT_SHARED": "insufficient_vram",
    "INSUFFICIENT_VRAM": "insufficient_vram", "INSUFFICIENT_RAM": "insufficient_ram",
    "NOT_TOGETHER": "not_together", "GPU_YIELDED": "insufficient_vram",
}  # fmt: skip


def ending(
    record: ExitRecord, log: LaunchLog, prepared: PreparedEngine, *, was_ready: bool, ready_at: int = 0,
    incidents: Sequence[Incident] = (), ruled_out: CrashClass | None = None,
) -> Diagnosis:  # fmt: skip
    """Why ``prepared`` ended. ``log`` is that of this launch alone; ``incidents`` are what its GPUs met just before."""
    return diagnose(
        record, log, prepared.engine, graceful=prepared.verbatim, was_ready=was_ready, ready_at=ready_at, incidents=incidents,
        ruled_out=ruled_out,
    )  # fmt: skip


def exit_event(epoch: int, record: ExitRecord, why: Diagnosis) -> ev.Exited:
    """The exit record as an event; last_error texts are those of SPEC §8.5."""
    return ev.Exited(
        epoch, code=record.code, signal=record.signal, summary=why.summary, crash=why.crash, evidence=why.quoted,
        port_conflict=why.crash is CrashClass.PORT_CONFLICT, graceful=why.crash is CrashClass.GRACEFUL,
        stopped=record.stopped_by_us,
    )  # fmt: skip


def failure(error: PoolError) -> tuple[str, bool, str]:
    """(text, retriable, reason of SPEC §2.3) of a staging or spawn error."""
    reason = _REASONS.get(error.code)
    if reason is None:
        reason = "config_error" if isinstance(error, SpecError) else "preload_failed"
    hint = f" ({error.hint})" if error.hint else ""
    if error.code == "INSUFFICIENT_VRAM":  # GPUs come and go: the pool is tried again, whoever asks is told what is so now
        return error.message + hint, True, reason
    retriable = error.retriable if isinstance(error, NodeError | RequestError) else not isinstance(error, SpecError)
    return error.message + hint, retriable, reason


def on_demand(problem: PoolError) -> PoolError:
    """``problem`` as it is told to somebody who named a model that there is: what is wrong with its pool is not their request."""
    if not isinstance(problem, SpecError) and problem.code != SpecError.code:
        return problem
    code = "PRELOAD_FAILED" if problem.code == SpecError.code else problem.code
    return EngineError(
        problem.message, code=code, status=500, pool_id=problem.pool_id, hint=problem.hint, retriable=False,
        details=problem.details,
    )  # fmt: skip


def operation_error(pool_id: str, last_error: str | None, launch: Launch, tried_as: str | None = None) -> EngineError:
    """What the caller of a failed start is told: always 500, with the cause's code and hint, and the log's end (DESIGN §7).

    Of an engine that came up and ended the hint is the remedy of its crash; ``tried_as`` is the replica of a reload's candidate.
    """
    cause, why = launch.cause, launch.diagnosis
    hint = cause.hint if cause is not None else remediation(why.remedy, pool_id, tried_as).sentence if why is not None else None
    text = last_error or "the start was given up"
    message = text if text.startswith("preload failed") else f"preload failed: {text}"
    code = cause.code if cause is not None else "PRELOAD_FAILED"
    return EngineError(
        message,
        code=code,
        status=500,
        pool_id=pool_id,
        hint=hint,
        retriable=cause is not None and failure(cause)[1] and (cause.retriable or not isinstance(cause, NodeError)),
        details={"log_tail": list(launch.log_tail)} if launch.log_tail else None,
    )
