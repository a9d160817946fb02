"""GPUs for tests, made in one line."""

from __future__ import annotations

from typing import Any

from pool_managerd.core.gpu.devices import DeviceProcess, DeviceSnapshot

GIB = 1 << 30
MIB = 1 << 20


def gpu(index: int, gib: float = 24, *, free_gib: float | None = None, **changes: Any) -> DeviceSnapshot:
    """GPU ``index`` with ``gib`` of memory; free follows from its processes unless given."""
    total = int(gib * GIB)
    held = sum(p.vram_bytes or 0 for p in changes.get("processes", ()))
    reserved = changes.get("vram_reserved_bytes", 0)
    free = max(0, total - held - reserved) if free_gib is None else int(free_gib * GIB)
    facts: dict[str, Any] = {
        "uuid": f"GPU-{index:08d}", "name": "NVIDIA Test", "pci_bus_id": f"00000000:{index + 1:02x}:00.0",
        "compute_capability": "8.6",
    }  # fmt: skip
    return DeviceSnapshot(id=index, vram_total_bytes=total, vram_free_bytes=free, **{**facts, **changes})


def mig(parent: DeviceSnapshot, number: int, gib: float = 10) -> DeviceSnapshot:
    """Instance ``number`` of a GPU in MIG mode."""
    size = int(gib * GIB)
    return DeviceSnapshot(parent.id, f"MIG-{parent.id}-{number}", size, size, "8.0", "MIG 1g.10gb", parent.pci_bus_id,
                          parent_uuid=parent.uuid)  # fmt: skip


def process(pid: int, gib: float | None = 1.0, **changes: Any) -> DeviceProcess:
    return DeviceProcess(pid, changes.pop("name", "python"), None if gib is None else int(gib * GIB), **changes)
