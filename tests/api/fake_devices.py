"""Two GPUs as a node reports them: one shared by two pools and a stranger, one empty."""

from __future__ import annotations

from typing import Any

from pool_managerd.errors import RequestError

Json = dict[str, Any]
MIB = 1 << 20
UUID_0 = "GPU-11111111-2222-3333-4444-555555555555"
UUID_1 = "GPU-66666666-7777-8888-9999-000000000000"


def device(index: int = 0, **changes: Any) -> Json:
    """An idle 24 GB card."""
    return {
        "id": index, "device": str(index), "uuid": UUID_0 if index == 0 else UUID_1, "name": "NVIDIA GeForce RTX 4090",
        "pci_bus_id": f"00000000:0{index + 1}:00.0", "compute_capability": "8.9", "parent_uuid": None, "mig_enabled": False,
        "vram_total_bytes": 24_564 * MIB, "vram_free_bytes": 24_064 * MIB, "vram_used_bytes": 0, "vram_driver_bytes": 500 * MIB,
        "vram_available_bytes": 24_064 * MIB, "readable": True, "kept_for": None,
        "state": "ok", "cordoned": False, "reason": None, "remedy": None,
        "temperature_c": 41, "power_watts": 23.5, "utilization_percent": 0, "ecc_uncorrected": None, "numa_node": 0,
        "nvlink_peers": [], "reservations": [], "foreign": [], "foreign_bytes": 0,
    } | changes  # fmt: skip


def busy_device(**changes: Any) -> Json:
    """The first card: 8 GiB of 10 in use by ``demo``, 4 GiB promised to ``late``, 1 GiB held by somebody's python."""
    reservations = [
        {"pool_id": "demo", "reserved_bytes": 10_240 * MIB, "used_bytes": 8_192 * MIB, "exclusive": False, "pids": [4242]},
        {"pool_id": "late", "reserved_bytes": 4_096 * MIB, "used_bytes": 0, "exclusive": False, "pids": []},
    ]
    foreign = [{"pid": 999, "name": "python3", "kind": "compute", "vram_bytes": 1_024 * MIB, "certain": True}]
    return device(
        vram_free_bytes=14_848 * MIB, vram_used_bytes=9_216 * MIB, vram_available_bytes=8_704 * MIB, temperature_c=61,
        power_watts=287.4, utilization_percent=98, ecc_uncorrected=0, reservations=reservations, foreign=foreign,
        foreign_bytes=1_024 * MIB,
    ) | changes  # fmt: skip


def lost_device(**changes: Any) -> Json:
    """The first card as it is told of when it cannot be read: what ``demo`` was promised is known, and how large it is."""
    reservations = [{"pool_id": "demo", "reserved_bytes": 10_240 * MIB, "used_bytes": None, "exclusive": False, "pids": []}]
    return device(
        readable=False, vram_free_bytes=None, vram_used_bytes=None, vram_available_bytes=0, temperature_c=None,
        power_watts=None, utilization_percent=None, state="quarantined", reason="it is lost: GPU_IS_LOST (15)",
        remedy="reboot the machine", reservations=reservations,
    ) | changes  # fmt: skip


def gone_device(**changes: Any) -> Json:
    """A card that is not listed any more."""
    nothing = {"vram_total_bytes": 0, "vram_driver_bytes": 0, "reservations": [], "name": "gone", "pci_bus_id": ""}
    told = {"id": -1, "uuid": "GPU-gone", "reason": "it is lost: it is no longer there"}
    return lost_device(**(nothing | told | changes))


def devices(*rows: Json, **changes: Any) -> Json:
    """The whole answer; without ``rows`` the busy card and an idle one."""
    return {
        "taken_at_ms": 1_795_000_000_000, "age_ms": 1_200, "stale": False, "problem": None, "driver_version": "570.86.15",
        "cuda_version": "12.8", "simulated": False, "revision": 7, "devices": list(rows) or [busy_device(), device(1)],
        "ram_total_bytes": 65_536 * MIB, "ram_available_bytes": 40_960 * MIB,
    } | changes  # fmt: skip


class FakeDevices:
    """The device half of the fake node's façade."""

    def __init__(self) -> None:
        self.answer = devices()
        self.device_calls: list[tuple[str, str]] = []
        self.findings: list[Json] = [
            {"code": "gpus", "level": "ok", "subject": "GPU 0", "message": "NVIDIA GeForce RTX 4090", "remedy": []}
        ]

    def devices(self) -> Json:
        return self.answer

    def _mark(self, call: str, wanted: str, cordoned: bool) -> Json:
        self.device_calls.append((call, wanted))
        for row in self.answer["devices"]:
            if wanted in (row["device"], row["uuid"], f"GPU{row['id']}"):
                row["cordoned"] = cordoned
                found: Json = row
                return found
        known = ", ".join(row["device"] for row in self.answer["devices"])
        raise RequestError(f"device {wanted} not found: there are {known}", code="DEVICE_NOT_FOUND", status=404)

    async def cordon(self, device: str) -> Json:
        return self._mark("cordon", device, True)

    async def uncordon(self, device: str) -> Json:
        return self._mark("uncordon", device, False)

    async def release_devices(self) -> Json:
        self.device_calls.append(("release", ""))
        problem = {"code": "released", "message": "cannot see the GPUs: they were let go", "hint": "pool-managerd devices resume"}
        self.answer |= {"stale": True, "problem": problem}
        return self.answer

    async def resume_devices(self) -> Json:
        self.device_calls.append(("resume", ""))
        self.answer |= {"stale": False, "problem": None}
        return self.answer

    async def preflight(self) -> Json:
        return {"ok": True, "profile": "home", "findings": self.findings}
