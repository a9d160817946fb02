"""Preflight itself: every check of the facts, its findings put in order."""

from __future__ import annotations

from pool_managerd.core.preflight.facts import HostFacts, Wants
from pool_managerd.core.preflight.findings import Finding, settled
from pool_managerd.core.preflight.gpus import gpu_findings
from pool_managerd.core.preflight.machine import machine_findings
from pool_managerd.core.preflight.tools import tool_findings


def check(facts: HostFacts, wants: Wants) -> tuple[Finding, ...]:
    """Deterministic: the worst level first, then by code and subject. What ``wants.allow`` names is overridden, not hidden."""
    found = [*gpu_findings(facts, wants), *tool_findings(facts, wants), *machine_findings(facts, wants)]
    return settled(found, wants.allow)
