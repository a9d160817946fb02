"""What ended an engine: its class, how that is known, and what to do. From its exit record, its log and what its GPUs met."""

from __future__ import annotations

import signal as signals
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.crash import CrashClass, of_a_child, signal_name
from pool_managerd.core.crash_evidence import Cause, find_cause
from pool_managerd.core.crash_report import Evidence, Source, default_remedy

LATE_LINES = 1_000
"""Of an engine that was ready once only so many of its last lines can name why it ended: earlier ones did not end it."""
OOM_OF_HOST, OOM_OF_SHARED, OOM_OF_ENGINE = "host", "shared", "engine"
_GPU_CLASSES = frozenset({
    CrashClass.CUDA, CrashClass.VRAM_OOM, CrashClass.ECC, CrashClass.DRIVER_RESET, CrashClass.DRIVER_MISMATCH,
})  # fmt: skip
_OF_AN_ABORT = _GPU_CLASSES | {CrashClass.HUNG}
"""What a process that gives itself up by SIGABRT may say of why; one that dies of SIGSEGV may have met such an error before."""


@dataclass(frozen=True, slots=True)
class LaunchLog:
    """The lines of one launch, oldest first, and where each begins in what it wrote, in bytes."""

    lines: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()

    def offset(self, at: int | None) -> int | None:
        return self.offsets[at] if at is not None and at < len(self.offsets) else None


@dataclass(frozen=True, slots=True)
class Incident:
    """What a GPU of the engine met shortly before. ``crash``: what that makes of the engine's end, None for nothing."""

    evidence: Evidence
    crash: CrashClass | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """``summary`` is the short text of SPEC §8.5; ``quoted`` the line of the log that says most; ``remedy`` a code."""

    crash: CrashClass
    summary: str
    evidence: tuple[Evidence, ...] = ()
    remedy: str = ""
    quoted: str = ""

    def port_taken(self, port: int, who: str) -> Diagnosis:
        """As it is when ``who``, another program, is seen to hold its port."""
        seen = Evidence(Source.PROBE, f"port {port} is held by {who or 'another program'}")
        remedy = default_remedy(CrashClass.PORT_CONFLICT)
        return replace(self, crash=CrashClass.PORT_CONFLICT, evidence=(*self.evidence, seen), remedy=remedy)


def diagnose(
    record: ExitRecord, log: LaunchLog, engine: str, *, graceful: bool = False, was_ready: bool = False, ready_at: int = 0,
    incidents: Sequence[Incident] = (), ruled_out: CrashClass | None = None,
) -> Diagnosis:  # fmt: skip
    """Why ``engine`` ended. A deterministic class is given only to one that was never ready: another start may go well else.

    ``ready_at``: so many bytes it had written when it was ready; what it said before did not end it. ``ruled_out``: not of this
    class, whatever its log says.
    """
    first = max(len(log.lines) - LATE_LINES, bisect_left(log.offsets, ready_at), 0) if was_ready else 0
    cause = find_cause(log.lines[first:], engine, ruled_out=ruled_out)
    at = None if cause.at is None else cause.at + first
    crash, summary, remedy = _class_of(record, cause, graceful, was_ready, incidents)
    evidence = [Evidence(Source.EXIT_RECORD, _ending(record))]
    if cause.named:
        evidence.append(Evidence(Source.LOG, cause.text, log.offset(at)))
    evidence += [*_oom_evidence(record), *(incident.evidence for incident in incidents)]
    return Diagnosis(crash, summary, tuple(evidence), remedy or default_remedy(crash), cause.text)


def _class_of(
    record: ExitRecord, cause: Cause, graceful: bool, was_ready: bool, incidents: Sequence[Incident]
) -> tuple[CrashClass, str, str]:
    """Class, summary and remedy, the surest evidence first."""
    name = signal_name(_signal_of(record))
    summary = f"exit_code={record.code}" if record.signal is None else f"signal {name}"
    if out_of_memory(record):
        return CrashClass.OUT_OF_MEMORY, "out_of_memory", ""
    if not record.known:
        return CrashClass.UNKNOWN, "the exit record was lost", ""
    if record.code == 0 and graceful and was_ready:
        return CrashClass.GRACEFUL, summary, ""
    of_gpu = next((incident.crash for incident in incidents if incident.crash is not None), None)
    said = cause.crash
    if said is not None and (not said.deterministic or not was_ready) and _may_say(name, said):
        worse = said is CrashClass.CUDA and of_gpu in (CrashClass.ECC, CrashClass.DRIVER_RESET)
        return (of_gpu, summary, "") if worse and of_gpu is not None else (said, summary, cause.remedy)
    if of_gpu is not None:
        return of_gpu, summary, ""
    if name == "SIGILL" and not was_ready:
        why = "this engine build uses CPU instructions that this machine lacks; use another build"
        return CrashClass.ILLEGAL_INSTRUCTION, f"{summary}: {why}", ""
    if name:
        remedy = "find_killer" if name == "SIGKILL" else "read_log" if name in ("SIGTERM", "SIGINT", "SIGHUP") else ""
        return CrashClass.SIGNAL, summary, remedy
    early = "run_in_foreground" if record.code == 0 and not was_ready else ""
    return CrashClass.PROCESS_EXIT, summary, (cause.remedy if said is None else "") or early


def _signal_of(record: ExitRecord) -> int | None:
    """What ended it, or its child where it is a wrapper that tells of it."""
    return of_a_child(record.code) if record.signal is None else record.signal


def _may_say(name: str | None, said: CrashClass) -> bool:
    """Whether a line of its log can be why it ended so: an exit by itself always, a signal only where the two go together."""
    if name is None:
        return True
    if name in ("SIGABRT", "SIGQUIT"):
        return said in _OF_AN_ABORT
    return name in ("SIGSEGV", "SIGBUS") and said in _GPU_CLASSES


def out_of_memory(record: ExitRecord) -> bool:
    """Whether the kernel's OOM killer ended it. Of what others share with it a kill counts only with SIGKILL not of ours."""
    if record.oom_line:
        return True  # the kernel's own words, with a pid of the engine's
    if not record.oom_kills:
        return False
    ours = record.oom_scope in (None, OOM_OF_ENGINE)
    return ours or (_signal_of(record) == signals.SIGKILL and not record.stopped_by_us)


def _ending(record: ExitRecord) -> str:
    if not record.known:
        return "the record of its end was lost"
    how = f"exit code {record.code}" if record.signal is None else f"{signal_name(record.signal)} (signal {record.signal})"
    if record.stopped_by_us:
        return f"{how}, after a stop was asked for"
    if (child := signal_name(of_a_child(record.code))) is not None:
        return f"{how}, as a shell ends whose child died of {child}"
    return f"{how}, by itself" if record.signal is None else f"{how}, not sent by the daemon"


def _oom_evidence(record: ExitRecord) -> list[Evidence]:
    found = [Evidence(Source.KERNEL_LOG, record.oom_line)] if record.oom_line else []
    if record.oom_kills:
        where = {
            OOM_OF_SHARED: "in the memory cgroup that it shares with others, about when it ended",
            OOM_OF_HOST: "on this machine, about when it ended; which process was killed, the counter does not say",
        }.get(record.oom_scope or "", "in its own memory cgroup")
        found.append(Evidence(Source.CGROUP, f"the kernel killed {record.oom_kills} for want of memory {where}"))
    return found
