"""What a failure is to the lifecycle, and to whoever asked for the start."""

from __future__ import annotations

from collections.abc import Sequence

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_evidence import named_cause
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.ending import signal_name
from pool_managerd.errors import EngineError, NodeError, PoolError, SpecError

LOG_TAIL_LINES = 20
_REASONS = {
    "GPU_REQUIRED": "gpu_required", "GPU_UNAVAILABLE": "gpu_required", "GPU_NOT_SHARED": "insufficient_vram",
    "INSUFFICIENT_VRAM": "insufficient_vram", "INSUFFICIENT_RAM": "insufficient_ram",
}  # fmt: skip
_PORT_TAKEN = ("address already in use", "couldn't bind", "failed to bind", "bind: ")


def exit_event(epoch: int, record: ExitRecord, lines: list[str], prepared: PreparedEngine | None) -> ev.Exited:
    """The exit record as an event; last_error texts are those of SPEC §8.5. ``lines`` are those of this launch alone."""
    name = signal_name(record.signal)
    crash = CrashClass.PROCESS_EXIT
    if record.oom_kills:
        crash, summary = CrashClass.OUT_OF_MEMORY, "out_of_memory"
    elif name == "SIGILL":
        crash = CrashClass.ILLEGAL_INSTRUCTION
        summary = "signal SIGILL: this engine build uses CPU instructions that this machine lacks; use another build"
    elif name:
        crash, summary = CrashClass.SIGNAL, f"signal {name}"
    elif record.code is None:
        crash, summary = CrashClass.UNKNOWN, "the exit record was lost"
    else:
        summary = f"exit_code={record.code}"
    text = "\n".join(lines[-LOG_TAIL_LINES:]).lower()
    taken = record.code not in (None, 0) and any(sign in text for sign in _PORT_TAKEN)
    return ev.Exited(
        epoch, code=record.code, signal=record.signal, summary=summary, crash=crash, port_conflict=taken,
        evidence=named_cause(lines, prepared.engine if prepared is not None else ""),
        graceful=record.code == 0 and prepared is not None and prepared.verbatim, stopped=record.stopped_by_us,
    )  # fmt: skip


def failure(error: PoolError) -> tuple[str, bool, str]:
    """(text, retriable, reason of SPEC §2.3) of a staging or spawn error."""
    reason = _REASONS.get(error.code)
    if reason is None:
        reason = "config_error" if isinstance(error, SpecError) else "preload_failed"
    hint = f" ({error.hint})" if error.hint else ""
    retriable = error.retriable if isinstance(error, NodeError) else not isinstance(error, SpecError)
    return error.message + hint, retriable, reason


def operation_error(pool_id: str, last_error: str | None, cause: PoolError | None, log_tail: Sequence[str]) -> EngineError:
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
        details={"log_tail": list(log_tail)} if log_tail else None,
    )
