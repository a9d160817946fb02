"""What a GPU's error means for an engine that ended about then: evidence, and a class where it is the cause."""

from __future__ import annotations

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import Incident
from pool_managerd.core.crash_report import Evidence, Source
from pool_managerd.core.gpu.devices import DeviceIncident
from pool_managerd.core.gpu.xid import Verdict, meaning

_ECC_XIDS = frozenset({48, 64, 94, 95, 140, 171, 172})
_CONSEQUENCE = 45
"""What the driver notes of any program that ends, or is ended, while it works: no cause."""


def as_incident(seen: DeviceIncident, label: str) -> Incident:
    """Of the GPU that is called ``label``; without an Xid it is an uncorrectable memory error."""
    source = Source.KERNEL_LOG if seen.source == Source.KERNEL_LOG else Source.NVML
    if seen.xid is None:
        text = seen.text or "an uncorrectable memory error"
        return Incident(Evidence(source, f"GPU {label} reported {text}"), CrashClass.ECC)
    found = meaning(seen.xid, seen.text)
    crash = None
    if seen.xid in _ECC_XIDS:
        crash = CrashClass.ECC
    elif found.verdict is Verdict.FATAL and found.lost:
        crash = CrashClass.DRIVER_RESET
    elif found.verdict is Verdict.APPLICATION and seen.xid != _CONSEQUENCE:
        crash = CrashClass.CUDA
    return Incident(Evidence(source, f"GPU {label} reported Xid {seen.xid}: {found.what}"), crash)
