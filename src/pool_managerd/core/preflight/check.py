"""Preflight itself: every check of the facts, its findings put in order."""

from __future__ import annotations

from dataclasses import replace

from pool_managerd.core.preflight.facts import HostFacts, Wants
from pool_managerd.core.preflight.findings import FAIL, GPU_REQUIRED, LEVELS, OVERRIDDEN, Finding
from pool_managerd.core.preflight.gpus import gpu_findings
from pool_managerd.core.preflight.machine import machine_findings
from pool_managerd.core.preflight.tools import tool_findings


def check(facts: HostFacts, wants: Wants) -> tuple[Finding, ...]:
    """Deterministic: the worst level first, then by code and subject. What ``wants.allow`` names is overridden, not hidden."""
    every = (*gpu_findings(facts, wants), *tool_findings(facts, wants), *machine_findings(facts, wants))
    found = {_allowed(finding, wants.allow) for finding in every}
    return tuple(sorted(found, key=lambda f: (LEVELS.index(f.level), f.code, f.subject, f.message)))


def _allowed(finding: Finding, allow: frozenset[str]) -> Finding:
    named = not allow.isdisjoint({finding.code, f"{finding.code}:{finding.subject}"})
    if finding.level == FAIL and named and finding.code != GPU_REQUIRED:
        return replace(finding, level=OVERRIDDEN)
    return finding
