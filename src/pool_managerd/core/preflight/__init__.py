"""May it run here? Facts and wants go in, findings with their remedies come out; nothing is looked up (SPEC §7)."""

from pool_managerd.core.preflight.check import check
from pool_managerd.core.preflight.facts import Folder, HostFacts, PoolWants, Wants
from pool_managerd.core.preflight.findings import Finding, Report, assert_gpu_only, assert_passed
from pool_managerd.core.preflight.ports import daemon_port, shared_ports
from pool_managerd.core.preflight.tools import missing_tools

__all__ = [
    "Finding",
    "Folder",
    "HostFacts",
    "PoolWants",
    "Report",
    "Wants",
    "assert_gpu_only",
    "assert_passed",
    "check",
    "daemon_port",
    "missing_tools",
    "shared_ports",
]
