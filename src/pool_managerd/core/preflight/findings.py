"""What a preflight says: findings, in a fixed order, and the one that can never be waved through."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pool_managerd.errors import NodeError

OK, WARN, FAIL, OVERRIDDEN = "ok", "warn", "fail", "overridden"
LEVELS = (FAIL, OVERRIDDEN, WARN, OK)
GPU_REQUIRED = "gpu_required"
NO_CUDA = "GPU-only enforcement: nvcc/nvidia-smi not found, so no engine is started on this machine"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``remedy``: commands and configuration lines to paste, in order."""

    code: str
    level: str
    subject: str
    message: str
    remedy: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of one look, the worst first."""

    profile: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True when nothing fails; what was overridden does not."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == FAIL)

    @property
    def overridden(self) -> tuple[Finding, ...]:
        """What would fail, had the configuration not allowed it: to be recorded."""
        return tuple(finding for finding in self.findings if finding.level == OVERRIDDEN)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "profile": self.profile, "findings": [asdict(finding) for finding in self.findings]}


def assert_gpu_only(cuda_available: bool) -> None:
    """Raises NodeError GPU_REQUIRED at once when no CUDA is found: there is no CPU attempt (ORCH-1102, B-PREFLIGHT-010..013)."""
    if not cuda_available:
        raise NodeError(
            NO_CUDA, code="GPU_REQUIRED", status=503, retriable=False,
            hint="install the NVIDIA driver, or use 'profile: dev' to try engines on the CPU",
        )  # fmt: skip


def assert_passed(report: Report, pool_id: str | None = None) -> None:
    """Raises NodeError naming every finding that fails, the remedies as its hint."""
    if report.ok:
        return
    gpu = any(finding.code == GPU_REQUIRED for finding in report.failed)
    raise NodeError(
        "cannot start it on this machine: " + "; ".join(finding.message for finding in report.failed),
        code="GPU_REQUIRED" if gpu else "PREFLIGHT_FAILED", status=503, retriable=not gpu, pool_id=pool_id,
        hint="; ".join(line for finding in report.failed for line in finding.remedy) or None,
        details={"findings": [asdict(finding) for finding in report.failed]},
    )  # fmt: skip
