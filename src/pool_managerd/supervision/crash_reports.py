"""One pool's crashes, told: from what its lifecycle decides and what is known of the launch, a report each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import Diagnosis, LaunchLog
from pool_managerd.core.crash_report import UNDECIDED, UNDONE, CrashReport, Evidence, Source, default_remedy, remediation
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.errors import PoolError
from pool_managerd.supervision.failures import LOG_TAIL_LINES
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Emit
from pool_managerd.supervision.services import Services

_DECISIONS = ("breaker", "gave_up", "backoff", "start_owed", "restart", "start", "stopped")
"""What is said of what follows a failure, the most telling first."""


class CrashReports:
    """Called by the pool's actor alone: ``decided`` with the effects of every step, before they are started."""

    def __init__(self, pool: Pool, emit: Emit, services: Services) -> None:
        self._pool, self._emit, self._s = pool, emit, services
        self._action = UNDECIDED
        self._open: CrashReport | None = None

    def decided(self, effects: Iterable[do.Effect]) -> None:
        """What is done about a crash of this step, or of an earlier one of which that was not known yet."""
        action = _action_of(effects)
        self._action = action or UNDECIDED
        if action is not None and self._open is not None:
            self._s.crashes.put(replace(self._open, action=action))
            self._open = None

    def exited(self, said: do.Say) -> dict[str, Any]:
        """The process has ended by itself, as ``said``; the report's part in the event that tells it."""
        launch, fields = self._pool.launch, said.fields
        crash = CrashClass(str(fields["crash_class"]))
        why = launch.diagnosis or Diagnosis(crash, str(fields["last_error"]))
        report = self._report(crash, why.evidence, why.remedy)
        code, name, uptime = fields.get("exit_code"), fields.get("signal"), fields.get("uptime_seconds")
        return self._publish(replace(
            report, human=said.human, summary=why.summary, last_error=str(fields["last_error"]), log_tail=launch.log_tail,
            exit_code=code if isinstance(code, int) else None, signal=str(name) if name else None,
            uptime_seconds=uptime if isinstance(uptime, float) else None,
        ))  # fmt: skip

    def failed(self, effect: do.ReportCrash) -> None:
        """The process, which runs still, is ended because of ``effect``: a crash, which is told here."""
        pool, launch, started_at = self._pool, self._pool.launch, self._pool.instance.started_at
        seen = self._s.gpus.incidents(launch.device_uuids)
        evidence = (Evidence(Source.PROBE, effect.error), *(incident.evidence for incident in seen))
        tail = launch_log(self._s, pool.instance_id, launch.log_mark).lines[-LOG_TAIL_LINES:]
        remedy = "startup_too_slow" if effect.crash is CrashClass.HEALTH_FAILURE and pool.instance.ready_since is None else ""
        uptime = None if started_at is None else round(self._s.clock.monotonic() - started_at, 3)
        human = f"Engine of pool '{pool.pool_id}' is ended: {effect.error}"
        told = self._publish(replace(
            self._report(effect.crash, evidence, remedy), summary=effect.crash.value.replace("_", " "), last_error=effect.error,
            human=human, log_tail=tail, uptime_seconds=uptime,
        ))  # fmt: skip
        self._emit(
            "crash", human, level="error", crash_class=effect.crash.value, crash_count=pool.state.crash_count,
            last_error=effect.error, uptime_seconds=uptime, exit_code=None, signal=None, **told,
        )  # fmt: skip

    def _report(self, crash: CrashClass, evidence: tuple[Evidence, ...], remedy: str) -> CrashReport:
        """What is the same for all."""
        pool, engine = self._pool, self._pool.launch.prepared
        name, version = ("", "") if engine is None else (engine.engine, engine.engine_version)
        tried = pool.tried_as
        return CrashReport(
            pool.pool_id, pool.launch.epoch, self._s.clock.wall_ms(), crash, replica_id=pool.instance_id.replica_id,
            evidence=evidence, remedy=remediation(remedy or default_remedy(crash), pool.pool_id, tried),
            action=self._action if tried is None else UNDONE, engine=name, engine_version=version, candidate=tried is not None,
        )  # fmt: skip

    def _publish(self, report: CrashReport) -> dict[str, Any]:
        if report.candidate:
            report = replace(report, human=f"Candidate {report.replica_id} of a reload: {report.human}")
        kept = self._s.crashes.put(report)
        self._open = kept if kept.action == UNDECIDED else None
        told = kept.to_json()
        return {name: told[name] for name in ("summary", "evidence", "remediation", "action", "log_tail")}


def launch_log(s: Services, instance: InstanceId, mark: Mapping[int, int]) -> LaunchLog:
    """What the launch that began at ``mark`` has written, without secrets and endless words; nothing where it cannot be read."""
    try:
        log = s.files.launch_log(instance, mark)
    except PoolError:
        return LaunchLog()
    return replace(log, lines=tuple(map(s.events.clean, log.lines)))


def written(s: Services, instance: InstanceId, mark: Mapping[int, int]) -> int:
    """How many bytes that launch has written; 0 where it cannot be seen."""
    try:
        now = s.files.log_mark(instance)
    except PoolError:
        return 0
    return sum(max(0, size - mark.get(part, 0)) for part, size in now.items())


def _action_of(effects: Iterable[do.Effect]) -> str | None:
    """What is done next, in a few words; None where the step decides nothing of that."""
    says = [effect for effect in effects if isinstance(effect, do.Say)]
    said = {say.action: say.human for say in says if say.action != "breaker" or say.fields.get("new_state") == "open"}
    action = next((action for action in _DECISIONS if action in said), None)
    if action is None or action == "breaker":
        return said.get("breaker")
    return said[action].partition("; ")[2] or said[action]
