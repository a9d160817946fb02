"""The GPUs of this node as readers and machines see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool_managerd.core.gpu.accounts import DeviceAccount, physical_gpu
from pool_managerd.core.gpu.devices import DeviceScan, DeviceSnapshot
from pool_managerd.core.gpu.health import GpuHealth
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.lifecycle import view
from pool_managerd.core.lifecycle.phase import IDLE
from pool_managerd.core.registry import Registry
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.gpu.registry_fields import exclusive_gpus
from pool_managerd.supervision.protocols import Clock


def devices_view(gpus: Gpus, clock: Clock, ram: tuple[int, int], *, simulated: bool) -> dict[str, Any]:
    """Every device with who holds what of it; those that are gone and not forgotten included. ``ram``: available, total."""
    scan = gpus.watch.scan
    age_ms = _age_ms(scan, clock)
    accounts = gpus.memory.accounts()
    kept = exclusive_gpus(accounts.values())
    rows = [device_row(d, gpus.watch.effective_health(d.uuid), accounts[d.uuid], kept) for d in in_pci_order(scan.devices)]
    present = {d.uuid for d in scan.devices}
    rows += [_gone_row(h) for h in gpus.watch.known() if h.uuid not in present and (h.cordoned or not h.healthy)]
    return {
        "taken_at_ms": None if age_ms is None else clock.wall_ms() - age_ms, "age_ms": age_ms,
        "stale": scan.stale, "problem": _problem(scan),
        "driver_version": scan.driver_version, "cuda_version": scan.cuda_version, "simulated": simulated,
        "revision": gpus.watch.revision, "ram_available_bytes": ram[0], "ram_total_bytes": ram[1], "devices": rows,
    }  # fmt: skip


def yields_view(gpus: Gpus) -> list[dict[str, Any]]:
    """GPUs that a person has left to others, with the pools that are still there."""
    there = [pool for pool in gpus.pools() if pool.instance.phase not in IDLE]
    return [
        {
            "device": one.label, "uuid": one.uuid, "since_ms": one.since_ms, "until_ms": one.until_ms,
            "pools": [
                {
                    "pool_id": pool.pool_id, "state": view(pool.state).state,
                    "in_flight": gpus.leases_on(pool.pool_id),
                }
                for pool in there
                if one.uuid in pool.launch.device_uuids
            ],
        }
        for one in gpus.yields.all()
    ]  # fmt: skip


def snapshots_view(registry: Registry, gpus: Gpus, clock: Clock) -> dict[str, Any]:
    """Every pool at one instant, and how old what it says of its GPUs is; ``version`` grows with every change."""
    scan = gpus.watch.scan
    age_ms, wall_ms = _age_ms(scan, clock), clock.wall_ms()
    return {
        "version": registry.revision, "taken_at_ms": wall_ms, "devices_stale": scan.stale and not scan.no_gpus,
        "devices_taken_at_ms": None if age_ms is None else wall_ms - age_ms, "devices_age_ms": age_ms,
        "devices_problem": None if scan.no_gpus else _problem(scan),
        "pools": [snapshot.to_dict() for snapshot in registry.snapshots()],
    }  # fmt: skip


def device_row(d: DeviceSnapshot, health: GpuHealth, account: DeviceAccount, kept: Mapping[str, str]) -> dict[str, Any]:
    """One device; ``kept`` says which pool has which GPU to itself. What one holds that cannot be read is not known."""
    known, open_ = d.readable, d.usable and physical_gpu(d) not in kept
    unreadable = None if health.unreadable is None else f"it cannot be read: {health.unreadable}"
    reason = health.state.reason or unreadable
    return {
        "id": d.id, "device": d.label, "uuid": d.uuid, "name": d.name, "pci_bus_id": d.pci_bus_id,
        "compute_capability": d.compute_capability, "parent_uuid": d.parent_uuid, "mig_enabled": d.mig_enabled,
        "vram_total_bytes": d.vram_total_bytes, "readable": known,
        "vram_free_bytes": d.vram_free_bytes if known else None, "vram_used_bytes": d.vram_used_bytes if known else None,
        "vram_driver_bytes": d.vram_reserved_bytes, "vram_available_bytes": account.available_bytes if open_ else 0,
        "kept_for": kept.get(physical_gpu(d)),
        "state": health.state.name, "cordoned": health.cordoned, "reason": reason, "remedy": health.remedy if reason else None,
        "temperature_c": d.temperature_c, "power_watts": d.power_watts, "utilization_percent": d.utilization_percent,
        "ecc_uncorrected": d.ecc_uncorrected, "numa_node": d.numa_node, "nvlink_peers": list(d.nvlink_peers),
        "reservations": [
            {
                "pool_id": u.instance_id.pool_id, "replica_id": u.instance_id.replica_id, "reserved_bytes": u.reserved_bytes,
                "used_bytes": u.measured_bytes if known else None,
                "estimated_bytes": u.used_bytes if known and u.inferred else None, "exclusive": u.exclusive, "pids": list(u.pids),
            }
            for u in account.usages
        ],
        "foreign": [
            {"pid": p.pid, "name": p.name, "kind": p.kind, "vram_bytes": p.vram_bytes, "certain": p.certain, "ended": p.ended}
            for p in account.foreign
        ],
        "foreign_bytes": account.foreign_bytes,
    }  # fmt: skip


def device_named(view: dict[str, Any], name: str) -> dict[str, Any]:
    """The row of ``view`` that ``name`` (index, label or UUID) means; of one that was just forgotten, what is left to say."""
    rows: list[dict[str, Any]] = view["devices"]
    found = next((row for row in rows if name.lower() in (row["device"].lower(), row["uuid"].lower())), None)
    return found or _gone_row(GpuHealth(name, name))


def _gone_row(h: GpuHealth) -> dict[str, Any]:
    gone = DeviceSnapshot(-1, h.uuid, 0, 0, name="gone", error="it is no longer there")
    return {**device_row(gone, h, DeviceAccount(gone), {}), "device": h.label}


def _age_ms(scan: DeviceScan, clock: Clock) -> int | None:
    return max(0, round((clock.monotonic() - scan.taken_at) * 1000)) if scan.taken_at else None


def _problem(scan: DeviceScan) -> dict[str, Any] | None:
    if scan.problem is None:
        return None
    return {"code": scan.problem.code, "message": scan.problem.message, "hint": scan.problem.hint}
