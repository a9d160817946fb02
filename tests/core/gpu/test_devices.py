"""What a scan found, and what follows from it at once."""

from __future__ import annotations

import pytest

from pool_managerd.core.gpu.devices import DeviceScan, ScanProblem
from tests.core.gpus import GIB, gpu, mig


def test_a_device_is_found_by_its_uuid() -> None:
    scan = DeviceScan((gpu(0), gpu(1)))
    assert scan.device("GPU-00000001") == gpu(1) and scan.device("GPU-7") is None


def test_a_machine_has_no_gpus_only_where_that_is_known() -> None:
    assert DeviceScan().no_gpus and not DeviceScan((gpu(0),)).no_gpus
    assert DeviceScan(problem=ScanProblem("nvml_unavailable", "")).no_gpus
    assert not DeviceScan(problem=ScanProblem("nvml_hung", "")).no_gpus
    assert not DeviceScan((gpu(0),), problem=ScanProblem("nvml_unavailable", "")).no_gpus


def test_what_the_driver_keeps_is_not_used_and_nothing_is_less_than_nothing() -> None:
    assert gpu(0, 24, free_gib=20, vram_reserved_bytes=GIB).vram_used_bytes == 3 * GIB
    assert gpu(0, 24, free_gib=24, vram_reserved_bytes=GIB).vram_used_bytes == 0


@pytest.mark.parametrize(
    ("capability", "contains"), [("8.0", True), ("7.5", False), ("12.0", True), (None, False), ("x.y", False)]
)
def test_memory_errors_are_contained_from_capability_8_on(capability: str | None, contains: bool) -> None:
    assert gpu(0, compute_capability=capability).contains_errors is contains


def test_a_gpu_in_mig_mode_is_used_through_its_instances_alone() -> None:
    parent = gpu(0, mig_enabled=True)
    assert not parent.usable and mig(parent, 1).usable and (parent.label, mig(parent, 1).label) == ("0", "MIG-0-1")
    assert not gpu(0, error="lost").usable and not gpu(0, unreadable="unknown").readable
