"""What a GPU's error means for an engine that ended about then."""

from __future__ import annotations

import pytest

from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_report import Source
from pool_managerd.core.gpu.devices import DeviceIncident
from pool_managerd.core.gpu.incidents import as_incident


@pytest.mark.parametrize(
    ("xid", "text", "told", "crash"),
    [
        (79, "", "Xid 79: the GPU has fallen off the bus", CrashClass.DRIVER_RESET),
        (48, "", "Xid 48: an uncorrectable memory error (double bit) occurred", CrashClass.ECC),
        (31, "", "Xid 31: a program touched GPU memory that is not its own", CrashClass.CUDA),
        (45, "", "Xid 45: a program's GPU work was removed when it ended", None),
        (154, "to 0x4 (Drain and Reset)", "Xid 154: the driver asks for a recovery (Drain and Reset)", None),
        (None, "", "an uncorrectable memory error", CrashClass.ECC),
        (None, "2 uncorrectable errors", "2 uncorrectable errors", CrashClass.ECC),
    ],
)
def test_an_incident_is_evidence_and_a_cause_where_it_can_be_one(
    xid: int | None, text: str, told: str, crash: CrashClass | None
) -> None:
    found = as_incident(DeviceIncident(xid, "kernel_log", "GPU-1", text=text), "3")
    assert (found.evidence.text, found.evidence.source, found.crash) == (f"GPU 3 reported {told}", Source.KERNEL_LOG, crash)


def test_what_was_not_read_in_the_kernels_log_was_told_by_the_driver() -> None:
    assert as_incident(DeviceIncident(79, "nvml", "GPU-1"), "0").evidence.source is Source.NVML
