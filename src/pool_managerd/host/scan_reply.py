"""From the worker's words to the project's values, and what each failure means for the operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pool_managerd.core.gpu.devices import (
    NO_MEMORY_TOLD,
    NOT_PERMITTED,
    PLACEHOLDER,
    DeviceIncident,
    DeviceProcess,
    DeviceScan,
    DeviceSnapshot,
    ScanProblem,
)

_LIBRARY_NOT_FOUND, _MISMATCH, _NO_DRIVER, _UNKNOWN = 12, 18, 9, 999
_MAY_BE_RETRIED = (_LIBRARY_NOT_FOUND, _NO_DRIVER)
_SAME_EVENT_S = 3.0
_NEEDS_ITS_TEXT = 154  # the recovery action that the driver asks for is in the text alone
_MAX_REMEMBERED = 256


def problem_of(reply: Mapping[str, Any]) -> ScanProblem:
    """Why the driver told nothing, from a reply that is not ok."""
    code, text = reply.get("nvml"), str(reply.get("text", ""))[:400]
    if reply.get("changing"):
        return ScanProblem(
            "nvml_error", "GPUs or MIG instances came or went each time that they were read",
            "wait until nobody partitions them any more; nvidia-smi -L lists them",
        )  # fmt: skip
    if reply.get("unforeseen"):
        return ScanProblem(
            "nvml_error", f"this NVIDIA driver cannot be asked: {text}",
            "update the driver, or the Python package nvidia-ml-py, so that they fit each other",
        )  # fmt: skip
    if code is None:
        return ScanProblem("nvml_error", text, "install it: pip install nvidia-ml-py")
    if code == _LIBRARY_NOT_FOUND and reply.get("driver_files"):
        return ScanProblem(
            "nvml_error", "the NVIDIA kernel driver is here, but its library libnvidia-ml.so.1 is not found",
            "install the library of the same version; in a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )  # fmt: skip
    if code == _LIBRARY_NOT_FOUND:
        return ScanProblem(
            "nvml_unavailable", "there is no NVIDIA driver library (libnvidia-ml.so.1) on this machine",
            "install the NVIDIA driver; if it is installed, put its folder on LD_LIBRARY_PATH",
        )  # fmt: skip
    if code == _MISMATCH:
        return ScanProblem(
            "driver_mismatch", "the NVIDIA library and the loaded kernel module are of different versions",
            "reboot, or reload the nvidia kernel module, so that library and kernel module have one version",
        )  # fmt: skip
    if code == _NO_DRIVER:
        return ScanProblem(
            "no_driver", "the NVIDIA kernel module is not loaded",
            "load it (modprobe nvidia) and see dmesg for why it was not; in a virtual machine see that the GPU is passed on",
        )  # fmt: skip
    hint = "run nvidia-smi; see dmesg | grep -i nvrm for the cause"
    if code == _UNKNOWN:
        hint = f"in a container recreate it: systemctl daemon-reload on the host takes its GPUs away; elsewhere {hint}"
    return ScanProblem("nvml_error", f"the NVIDIA driver answered: {text} ({code})", hint)


def wants_renewal(reply: Mapping[str, Any]) -> bool:
    """True when only a new process can do better: this one has loaded a library, or holds devices, of the past."""
    if reply.get("ok"):
        return bool(reply["scan"].get("renew"))
    return reply.get("nvml") not in (None, *_MAY_BE_RETRIED) or not reply.get("at_init", True)


def scan_of(reply: Mapping[str, Any], taken_at: float, before: Iterable[DeviceSnapshot]) -> DeviceScan:
    """Raises KeyError, TypeError or ValueError for what no worker of this version says."""
    raw = reply["scan"]
    devices = [_device(d) for d in raw["devices"]]
    if not all(d.readable for d in devices):
        devices = _with_memory_of(devices, list(before))
    listed = sum(d.parent_uuid is None for d in devices)
    missing = max(0, (raw.get("cards") or 0) - listed)
    return DeviceScan(tuple(devices), taken_at, raw["driver_version"], raw["cuda_version"], missing=missing)


def incident_of(raw: Mapping[str, Any]) -> DeviceIncident:
    return DeviceIncident(raw["xid"], raw["source"], raw.get("uuid"), raw.get("pci_bus_id"), raw.get("text", ""))


def _device(raw: dict[str, Any]) -> DeviceSnapshot:
    raw["processes"] = tuple(_process(p) for p in raw.get("processes", ()))
    raw["nvlink_peers"] = tuple(raw.get("nvlink_peers", ()))
    raw.setdefault("uuid", "")
    if str(raw.get("unreadable", "")).startswith("NO_PERMISSION"):
        raw["unreadable"] = NOT_PERMITTED
    elif not raw.get("vram_total_bytes") and "error" not in raw and "unreadable" not in raw and not raw.get("mig_enabled"):
        raw["unreadable"] = NO_MEMORY_TOLD
    raw.setdefault("vram_total_bytes", 0)
    raw.setdefault("vram_free_bytes", 0)
    return DeviceSnapshot(**raw)


def _process(words: list[Any]) -> DeviceProcess:
    pid, name, vram, kind, certain, start_ticks, nonce, ancestors, ended = words
    return DeviceProcess(pid, name, vram, kind, certain, start_ticks, nonce, tuple(ancestors), ended)


def _with_memory_of(devices: list[DeviceSnapshot], before: list[DeviceSnapshot]) -> list[DeviceSnapshot]:
    """A device that cannot be read keeps its identity, its last known memory, and its MIG instances."""
    present = {d.uuid for d in devices if d.uuid}
    known = {d.uuid: d for d in before}
    by_index = {d.id: d for d in before if d.parent_uuid is None and d.uuid not in present}
    found: list[DeviceSnapshot] = []
    for device in devices:
        if device.readable:
            found.append(device)
            continue
        old = known.get(device.uuid) if device.uuid else by_index.get(device.id)
        if old is None:
            found.append(device if device.uuid else replace(device, uuid=f"{PLACEHOLDER}{device.id}"))
            continue
        instances = [d for d in before if d.parent_uuid == old.uuid and d.uuid not in present]
        found.extend(_silent(d, device) for d in [old, *instances])
    return found


def _silent(old: DeviceSnapshot, now: DeviceSnapshot) -> DeviceSnapshot:
    """What changes by the second is not known of it any more."""
    return replace(
        old, id=now.id, error=now.error, unreadable=now.unreadable, temperature_c=None, power_watts=None, utilization_percent=None
    )


class IncidentFilter:
    """One GPU error is told of twice, by NVML and by the kernel's log: it is passed on once.

    It remembers who told of what: the same source may repeat itself, another one says nothing new.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], tuple[str, float]] = {}

    def is_news(self, incident: DeviceIncident, now: float) -> bool:
        """False for what another source told of a moment ago."""
        if incident.xid is None or incident.pci_bus_id is None:
            return True
        key = (_slot(incident.pci_bus_id), incident.xid)
        source, at = self._told.get(key, (incident.source, now))
        if source != incident.source and now - at < _SAME_EVENT_S:
            return incident.xid == _NEEDS_ITS_TEXT and bool(incident.text)
        if len(self._told) >= _MAX_REMEMBERED:
            self._told.clear()
        self._told[key] = (incident.source, now)
        return True


def _slot(pci_bus_id: str) -> str:
    """``00000000:01:00.0`` and ``0000:01:00`` are one slot."""
    domain, _, rest = pci_bus_id.lower().partition(".")[0].partition(":")
    return f"{domain.lstrip('0')}:{rest}"
