"""Reading every GPU through NVML into plain values. Runs in the worker: standard library and pynvml only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pool_managerd.host.process_facts import ProcessFacts

_UNINITIALIZED, _NOT_FOUND, _NO_DRIVER, _LOST, _NEEDS_RESET, _MISMATCH = 1, 6, 9, 15, 16, 18
_OF_THE_DRIVER = (_UNINITIALIZED, _NO_DRIVER, _MISMATCH)
_READINGS = 3
_MAX_LINKS = 36
_LINKS_FRESH_S = 60.0
_RENEW_S = 60.0


class Unreadable(Exception):
    """A GPU that does not answer; its words are the reason."""


class NvmlReader:
    """``nvml`` is the binding, initialised. ``on_handle`` hears of every whole GPU that answers, before it is listed."""

    def __init__(self, nvml: Any, on_handle: Callable[[Any, str, str], None]) -> None:
        self._nvml, self._on_handle = nvml, on_handle
        self._simulated = hasattr(nvml.nvmlLib, "simulatedPidsAreOuter")
        self._names = {v: k.removeprefix("NVML_ERROR_") for k, v in vars(nvml).items() if k.startswith("NVML_ERROR_")}
        self._links: dict[str, set[str]] = {}
        self._links_at = 0.0
        self._since = time.monotonic()
        self.processes = self._process_facts()

    def scan(self) -> dict[str, Any]:
        """Everything about every GPU. Raises NVMLError when the driver as a whole does not answer.

        ``renew`` in the answer asks for a fresh process: a GPU that is lost comes back only to one.
        """
        nvml = self._nvml
        if self._simulated:
            self.processes = self._process_facts()
        self.processes.begin()
        devices = self._devices()
        whole = [d for d in devices if "parent_uuid" not in d]
        self._add_links([d for d in whole if "error" not in d])
        lost = [d for d in whole if "error" in d]
        aged = time.monotonic() - self._since > _RENEW_S
        driver, cuda = self._maybe(nvml.nvmlSystemGetDriverVersion), self._maybe(nvml.nvmlSystemGetCudaDriverVersion_v2)
        return {
            "devices": [{k: v for k, v in d.items() if not k.startswith("_")} for d in devices],
            "driver_version": driver,
            "cuda_version": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None,
            "renew": bool(lost) and (aged or len(lost) == len(whole)),
        }

    def _process_facts(self) -> ProcessFacts:
        return ProcessFacts(bool(self._nvml.nvmlLib.simulatedPidsAreOuter()) if self._simulated else None)

    def _devices(self) -> list[dict[str, Any]]:
        """Every GPU and MIG instance, read again if GPUs came, went or moved meanwhile: a mixed list calls sound ones lost."""
        devices: list[dict[str, Any]] = []
        for _ in range(_READINGS):
            devices = [device for index in range(self._nvml.nvmlDeviceGetCount()) for device in self._gpu(index)]
            if [d.get("uuid") for d in devices if "parent_uuid" not in d] == self._listing():
                break
        return devices

    def _listing(self) -> list[str | None]:
        """The UUIDs of the GPUs in the driver's order, None for one that does not tell."""
        found: list[str | None] = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                found.append(self._ask(self._nvml.nvmlDeviceGetUUID, self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)))
            except Unreadable:
                found.append(None)
        return found

    # --- one device ---

    def _gpu(self, index: int) -> Iterator[dict[str, Any]]:
        """The GPU at ``index``, then its MIG instances."""
        found: dict[str, Any] = {"id": index}
        try:
            handle = self._ask(self._nvml.nvmlDeviceGetHandleByIndex, index)
            found["uuid"] = uuid = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
            pci = self._ask(self._nvml.nvmlDeviceGetPciInfo, handle)
            found["pci_bus_id"] = _text(pci.busId)
            found["_handle"] = handle
            mode = self._maybe(self._nvml.nvmlDeviceGetMigMode, handle)
            found["mig_enabled"] = bool(mode and mode[0])
            found.update(self._facts(handle, processes=not found["mig_enabled"]))
            found["numa_node"] = self._numa(handle, pci)
            found.update(self._health(handle))
            self._on_handle(handle, uuid, found["pci_bus_id"])
        except Unreadable as why:
            yield {**found, "error": str(why)}
            return
        yield found
        if found["mig_enabled"]:
            yield from self._instances(found)

    def _instances(self, parent: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for index in range(self._most_instances(parent["_handle"])):
            found: dict[str, Any] = {"id": parent["id"], "parent_uuid": parent["uuid"], "pci_bus_id": parent["pci_bus_id"]}
            try:
                handle = self._maybe(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, parent["_handle"], index)
                if handle is None:
                    continue  # the places of instances that do not exist
                found["uuid"] = self._ask(self._nvml.nvmlDeviceGetUUID, handle)
                found["numa_node"] = parent["numa_node"]
                found.update(self._facts(handle, processes=True))
                for inherited in ("compute_capability", "reset_pending", "persistence_mode"):
                    found[inherited] = found.get(inherited) or parent.get(inherited)
            except Unreadable as why:
                if "uuid" not in found:
                    continue
                found["error"] = str(why)
            yield found

    def _most_instances(self, handle: Any) -> int:
        try:
            return self._maybe(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        except Unreadable:  # lost since a moment ago: the next scan says so
            return 0

    def _facts(self, handle: Any, *, processes: bool) -> dict[str, Any]:
        total, free, reserved = self._memory(handle)
        capability = self._maybe(self._nvml.nvmlDeviceGetCudaComputeCapability, handle)
        listed = [*self._processes(handle)] if processes else []  # those of a GPU in MIG mode are its instances'
        return {
            "name": self._maybe(self._nvml.nvmlDeviceGetName, handle) or "",
            "vram_total_bytes": total, "vram_free_bytes": free, "vram_reserved_bytes": reserved,
            "compute_capability": f"{capability[0]}.{capability[1]}" if capability else None,
            "processes": listed,
        }  # fmt: skip

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        """Total, free and reserved. Where a GPU has no memory of its own it uses the machine's."""
        get = self._nvml.nvmlDeviceGetMemoryInfo
        for version in (self._nvml.nvmlMemory_v2, None):
            memory = self._maybe(get, handle, version)
            if memory is not None:
                return memory.total, memory.free, getattr(memory, "reserved", 0)
        return _system_memory()

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
            "persistence_mode": None if persistence is None else bool(persistence),
        }

    def _processes(self, handle: Any) -> Iterator[list[Any]]:
        """As lists, in the order of DeviceProcess's fields. A program may be listed as compute and graphics: once then."""
        seen = set()
        for kind, get in (
            ("compute", self._nvml.nvmlDeviceGetComputeRunningProcesses),
            ("graphics", self._nvml.nvmlDeviceGetGraphicsRunningProcesses),
        ):
            for process in self._maybe(get, handle) or ():
                if process.pid in seen:
                    continue
                seen.add(process.pid)
                facts = self.processes.describe(process.pid)
                name = facts.get("name") or self._maybe(self._nvml.nvmlSystemGetProcessName, process.pid)
                yield [
                    facts["pid"], name and _text(name)[:200], process.usedGpuMemory, kind, facts["certain"],
                    facts.get("start_ticks"), facts.get("nonce"), facts.get("ancestors", []),
                ]  # fmt: skip

    def _numa(self, handle: Any, pci: Any) -> int | None:
        """Of the bus: NVML's own number is that of the GPU's memory where the processor can address it."""
        if self._simulated:
            node = self._maybe(self._nvml.nvmlDeviceGetNumaNodeId, handle)
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
        """What must be answered. Raises Unreadable, or NVMLError when the driver as a whole is gone."""
        try:
            return call(*args)
        except self._nvml.NVMLError as error:
            if error.value in _OF_THE_DRIVER:
                raise
            raise Unreadable(self.error_name(error.value)) from None

    def _maybe(self, call: Callable[..., Any], *args: Any) -> Any:
        """What may be unsupported or not permitted: None then. Raises like ``_ask`` for a GPU that is lost."""
        try:
            return call(*args)
        except self._nvml.NVMLError as error:
            if error.value in _OF_THE_DRIVER:
                raise
            if error.value in (_LOST, _NEEDS_RESET):
                raise Unreadable(self.error_name(error.value)) from None
            return None


def _system_memory() -> tuple[int, int, int]:
    figures = dict.fromkeys(("MemTotal", "MemAvailable"), 0)
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in figures:
            figures[key] = int(rest.split()[0]) * 1024
    return figures["MemTotal"], figures["MemAvailable"], 0


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
