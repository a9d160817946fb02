"""Reading every GPU through NVML into plain values. Runs in the worker: standard library and pynvml only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pool_managerd.host.memory import available_ram_bytes, total_ram_bytes
from pool_managerd.host.processes import Processes

_UNINITIALIZED, _INVALID, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND, _NO_DRIVER = 1, 2, 3, 4, 6, 9
_NO_FUNCTION, _LOST, _NEEDS_RESET, _MISMATCH, _OTHER_VERSION = 13, 15, 16, 18, 25
_OF_THE_DRIVER = (_UNINITIALIZED, _NO_DRIVER, _MISMATCH)
_BROKEN = (_LOST, _NEEDS_RESET)
_ABSENT = (_INVALID, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND, _NO_FUNCTION, _OTHER_VERSION)
_READINGS = 3
_DRIVERS_LIST = Path("/proc/driver/nvidia/gpus")
_GET_RECOVERY_ACTION = 230  # NVML_FI_DEV_GET_GPU_RECOVERY_ACTION; older bindings do not name it
_MAX_LINKS = 36
_LINKS_FRESH_S = 60.0
_RENEW_S = 60.0


class Unreadable(Exception):
    """A GPU that does not answer; its words are the reason. ``lost``: it is broken. ``surely``: asking again tells the same."""

    def __init__(self, why: str, *, lost: bool, surely: bool) -> None:
        super().__init__(why)
        self.lost, self.surely = lost, surely


class NvmlReader:
    """``nvml`` is the binding, initialised. ``on_handle`` hears of every whole GPU that answers, at each scan."""

    def __init__(self, nvml: Any, on_handle: Callable[[Any, str, str], None]) -> None:
        self._nvml, self._on_handle = nvml, on_handle
        self._simulated = hasattr(nvml.nvmlLib, "simulatedPidsAreOuter")
        self._names = {v: k.removeprefix("NVML_ERROR_") for k, v in vars(nvml).items() if k.startswith("NVML_ERROR_")}
        self._links: dict[str, set[str]] = {}
        self._links_at = 0.0
        self._since = time.monotonic()
        self.processes = self._process_facts()

    def scan(self) -> dict[str, Any] | None:
        """Everything about every GPU; None while they change faster than they can be read. Raises NVMLError when the driver
        as a whole does not answer.

        ``renew`` in the answer asks for a fresh process: a GPU that is lost comes back only to one.
        """
        nvml = self._nvml
        if self._simulated:
            self.processes = self._process_facts()
        self.processes.begin()
        devices = self._devices()
        if devices is None:
            return None
        whole = [d for d in devices if "parent_uuid" not in d]
        sound = [d for d in whole if _is_sound(d)]
        for device in sound:
            self._on_handle(device["_handle"], device["uuid"], device["pci_bus_id"])
        self._add_links(sound)
        aged = time.monotonic() - self._since > _RENEW_S
        driver, cuda = self._maybe(nvml.nvmlSystemGetDriverVersion), self._maybe(nvml.nvmlSystemGetCudaDriverVersion_v2)
        return {
            "devices": [{k: v for k, v in d.items() if not k.startswith("_")} for d in devices],
            "driver_version": driver,
            "cuda_version": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
            "cards": self._cards(),
            "renew": bool(whole and not sound) or (aged and not all(_is_sound(d) for d in devices)),
        }

    def _cards(self) -> int | None:
        """How many GPUs the driver has initialised, by its own list; None where that cannot be read."""
        if self._simulated:
            return int(self._nvml.nvmlLib.simulatedCards())
        try:
            return sum(1 for _ in _DRIVERS_LIST.iterdir())
        except OSError:
            return None

    def _process_facts(self) -> Processes:
        if self._simulated:
            return Processes(bool(self._nvml.nvmlLib.simulatedPidsAreOuter()))
        return Processes(version=self._maybe(self._nvml.nvmlSystemGetDriverVersion) or "")

    def _devices(self) -> list[dict[str, Any]] | None:
        """Every GPU and MIG instance. Read again when a call failed as none should, and when devices came, went or moved
        meanwhile: one transient error, or a mixed list, would call sound ones lost. None when the list was mixed each time.
        """
        for left in reversed(range(_READINGS)):
            try:
                gpus = [self._gpu(index) for index in range(self._nvml.nvmlDeviceGetCount())]
                unmoved = self._nvml.nvmlDeviceGetCount() == len(gpus) and all(self._is_still(*gpu) for gpu in gpus)
            except self._nvml.NVMLError as error:
                if error.value in _OF_THE_DRIVER or not left:
                    raise
                continue
            devices = [device for gpu in gpus for device in gpu]
            if unmoved and (not left or all(d.get("_surely", True) for d in devices)):
                return devices
        return None

    def _is_still(self, whole: dict[str, Any], *instances: dict[str, Any]) -> bool:
        """Is the GPU still at its index, partitioned alike? Of one that could not be read: is it still there?"""
        uuid = None
        try:
            handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, whole["id"])
            uuid = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
            if not _is_sound(whole):
                return bool(uuid == whole.get("uuid"))
            mode = self._mig_mode(handle)
            there = [self._must(self._nvml.nvmlDeviceGetUUID, h) for h in self._instance_handles(handle)] if mode else []
        except Unreadable:
            return not _is_sound(whole) and uuid == whole.get("uuid")
        return (uuid, mode, there) == (whole["uuid"], whole["mig_enabled"], [d["uuid"] for d in instances])

    # --- one device ---

    def _gpu(self, index: int) -> list[dict[str, Any]]:
        """The GPU at ``index``, then its MIG instances."""
        found: dict[str, Any] = {"id": index}
        try:
            handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)
            found["uuid"] = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
            pci = self._known(self._nvml.nvmlDeviceGetPciInfo, handle)
            found["pci_bus_id"] = "" if pci is None else _text(pci.busId)  # a GPU inside the processor is on no bus
            found["_handle"] = handle
            mode = self._mig_mode(handle)
            found.update(self._facts(handle, processes=not mode))
            found["numa_node"] = self._numa(handle, pci)
            found.update(self._health(handle))
            instances = [self._instance(h, found) for h in self._instance_handles(handle)] if mode else []
        except Unreadable as why:
            return [{**found, "error" if why.lost else "unreadable": str(why), "_surely": why.surely}]
        except self._nvml.NVMLError as error:
            return [{**found, **self._unreadable(error)}]
        return [{**found, "mig_enabled": mode}, *instances]

    def _unreadable(self, error: Any) -> dict[str, Any]:
        """The mark of a device about which a call failed that engines depend on. Raises NVMLError when the driver is gone."""
        if error.value in _OF_THE_DRIVER:
            raise error
        return {"unreadable": self.error_name(error.value), "_surely": False}

    def _mig_mode(self, handle: Any) -> bool:
        mode = self._known(self._nvml.nvmlDeviceGetMigMode, handle)
        return bool(mode and mode[0])

    def _instance_handles(self, gpu: Any) -> Iterator[Any]:
        for index in range(self._known(self._nvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0):
            handle = self._known(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, index)
            if handle is not None:  # the places of instances that do not exist
                yield handle

    def _instance(self, handle: Any, parent: dict[str, Any]) -> dict[str, Any]:
        """One that does not answer is broken with its GPU."""
        found: dict[str, Any] = {"id": parent["id"], "parent_uuid": parent["uuid"], "pci_bus_id": parent["pci_bus_id"]}
        found["uuid"] = self._must(self._nvml.nvmlDeviceGetUUID, handle)
        found["numa_node"] = parent["numa_node"]
        try:
            found.update(self._facts(handle, processes=True))
        except self._nvml.NVMLError as error:
            return {**found, **self._unreadable(error)}
        for inherited in ("compute_capability", "reset_pending", "persistence_mode"):
            found[inherited] = found.get(inherited) or parent.get(inherited)
        return found

    def _facts(self, handle: Any, *, processes: bool) -> dict[str, Any]:
        total, free, reserved, unified = self._memory(handle)
        capability = self._maybe(self._nvml.nvmlDeviceGetCudaComputeCapability, handle)
        listed = [*self._processes(handle)] if processes else []  # those of a GPU in MIG mode are its instances'
        return {
            "name": self._maybe(self._nvml.nvmlDeviceGetName, handle) or "",
            "vram_total_bytes": total, "vram_free_bytes": free, "vram_reserved_bytes": reserved, "unified": unified,
            "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
            "processes": listed,
        }  # fmt: skip

    def _memory(self, handle: Any) -> tuple[int, int, int, bool]:
        """Total, free, reserved, and whether they are the machine's: a GPU that has no memory of its own uses that."""
        get = self._nvml.nvmlDeviceGetMemoryInfo
        memory = self._known(get, handle, self._nvml.nvmlMemory_v2)
        if memory is None:  # a driver before 510
            try:
                memory = self._must(get, handle)
            except self._nvml.NVMLError as error:
                if error.value == _NOT_SUPPORTED:
                    return total_ram_bytes(), available_ram_bytes(), 0, True
                if error.value == _NO_PERMISSION:  # as of a whole GPU in MIG mode: nothing of it is known to be free
                    return 0, 0, 0, False
                raise
        return memory.total, memory.free, getattr(memory, "reserved", 0), False

    def _health(self, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        power = self._maybe(nvml.nvmlDeviceGetPowerUsage, handle)
        load = self._maybe(nvml.nvmlDeviceGetUtilizationRates, handle)
        persistence = self._maybe(nvml.nvmlDeviceGetPersistenceMode, handle)
        rows = self._maybe(nvml.nvmlDeviceGetRemappedRows, handle)
        pages = self._maybe(nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
        return {
            "temperature_c": self._maybe(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            "power_watts": None if power is None else power / 1000,
            "utilization_percent": None if load is None else load.gpu,
            "ecc_uncorrected": self._maybe(nvml.nvmlDeviceGetTotalEccErrors, handle, 1, 0),
            "reset_pending": bool((rows and rows[2]) or pages),
            "recovery_action": self._recovery_action(handle),
            "persistence_mode": None if persistence is None else bool(persistence),
        }

    def _recovery_action(self, handle: Any) -> int | None:
        """What the driver asks for, from 570 on; None from one that does not say."""
        values = self._maybe(self._nvml.nvmlDeviceGetFieldValues, handle, [_GET_RECOVERY_ACTION])
        return int(values[0].value.uiVal) if values and values[0].nvmlReturn == 0 else None

    def _processes(self, handle: Any) -> Iterator[list[Any]]:
        """As lists, in the order of DeviceProcess's fields. A program may be listed as compute and graphics: once then."""
        seen = set()
        for kind in ("Compute", "Graphics"):
            for process in self._running(kind, handle):
                if process.pid in seen:
                    continue
                seen.add(process.pid)
                known = self.processes.describe(process.pid)
                name = known.get("name") or self._maybe(self._nvml.nvmlSystemGetProcessName, process.pid)
                held = process.usedGpuMemory or None  # a listed process holds something: 0 is what drivers say that do not know
                yield [
                    known["pid"], name and _text(name)[:200], held, kind.lower(), known["certain"],
                    known.get("start_ticks"), known.get("nonce"), known.get("ancestors", []), known.get("ended", False),
                ]  # fmt: skip

    def _running(self, kind: str, handle: Any) -> list[Any]:
        """The newest form that the driver has; none at all from one that is older than they are."""
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        for get in (getattr(self._nvml, name), getattr(self._nvml, f"{name}_v2")):
            try:
                return self._must(get, handle) or []
            except self._nvml.NVMLError as error:
                if error.value not in _ABSENT:
                    raise
                if error.value != _NO_FUNCTION:
                    break
        return []

    def _numa(self, handle: Any, pci: Any) -> int | None:
        """Of the bus: NVML's own number is that of the GPU's memory where the processor can address it."""
        if self._simulated:
            node = self._maybe(self._nvml.nvmlDeviceGetNumaNodeId, handle)
        elif pci is None:
            node = None
        else:
            path = Path(f"/sys/bus/pci/devices/{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0/numa_node")
            try:
                node = int(path.read_text())
            except (OSError, ValueError):
                node = None
        return None if node is None or node < 0 else node

    # --- NVLink ---

    def _add_links(self, devices: list[dict[str, Any]]) -> None:
        """Peers are the GPUs at the other ends, and those behind the same switch. Links change rarely."""
        if {d["uuid"] for d in devices} != self._links.keys() or time.monotonic() - self._links_at > _LINKS_FRESH_S:
            self._links = {d["uuid"]: self._ends(d["_handle"]) for d in devices}
            self._links_at = time.monotonic()
        by_pci = {d["pci_bus_id"]: d["uuid"] for d in devices}
        for device in devices:
            ends = self._links[device["uuid"]]
            peers = {by_pci[end] for end in ends if end in by_pci}
            switches = ends - by_pci.keys()
            peers.update(other for other, theirs in self._links.items() if switches & theirs)
            device["nvlink_peers"] = sorted(peers - {device["uuid"]})

    def _ends(self, handle: Any) -> set[str]:
        found = set()
        try:
            for link in range(_MAX_LINKS):
                state = self._maybe(self._nvml.nvmlDeviceGetNvLinkState, handle, link)
                if state is None:
                    break
                end = self._maybe(self._nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link) if state else None
                if end is not None:
                    found.add(_text(end.busId))
        except Unreadable:
            return set()
        return found

    # --- asking ---

    def error_name(self, code: int) -> str:
        return f"{self._names.get(code, 'error')} ({code})"

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """Which GPU it is: one that does not tell is Unreadable, and not lost for that: another user's GPU answers that it may
        not be opened, a busy driver that it was too slow. Raises NVMLError when the driver as a whole is gone.
        """
        try:
            return self._must(call, *args)
        except self._nvml.NVMLError as error:
            if error.value in _OF_THE_DRIVER:
                raise
            raise Unreadable(self.error_name(error.value), lost=False, surely=error.value == _NO_PERMISSION) from None

    def _must(self, call: Callable[..., Any], *args: Any) -> Any:
        """What must be answered. Raises Unreadable for a GPU that is broken, NVMLError for anything else."""
        try:
            return call(*args)
        except self._nvml.NVMLLibraryMismatchError:  # the binding's own word for a function that the driver lacks
            raise self._nvml.NVMLError(_NO_FUNCTION) from None
        except self._nvml.NVMLError as error:
            if error.value in _BROKEN:
                raise Unreadable(self.error_name(error.value), lost=True, surely=True) from None
            raise

    def _known(self, call: Callable[..., Any], *args: Any) -> Any:
        """What engines depend on: None only where the driver says that it is not there. Raises like ``_must``."""
        try:
            return self._must(call, *args)
        except self._nvml.NVMLError as error:
            if error.value not in _ABSENT:
                raise
            return None

    def _maybe(self, call: Callable[..., Any], *args: Any) -> Any:
        """What may be missing: None for any reason but a GPU that is broken (Unreadable) or a driver that is gone."""
        try:
            return self._must(call, *args)
        except self._nvml.NVMLError as error:
            if error.value in _OF_THE_DRIVER:
                raise
            return None


def _is_sound(device: dict[str, Any]) -> bool:
    return "error" not in device and "unreadable" not in device


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
