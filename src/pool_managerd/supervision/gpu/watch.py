"""Watching the GPUs: the latest scan, the health of each device, Xid events, cordons."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pool_managerd.core.crash_diagnosis import Incident
from pool_managerd.core.gpu import health
from pool_managerd.core.gpu.devices import NOT_PERMITTED, NOT_SCANNED, PLACEHOLDER, DeviceIncident, DeviceScan, DeviceSnapshot
from pool_managerd.core.gpu.health import GpuHealth, Probation, Quarantined
from pool_managerd.core.gpu.incidents import as_incident
from pool_managerd.core.gpu.xid import Verdict, meaning
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu.stored_health import from_stored, to_stored
from pool_managerd.supervision.protocols import Clock, DeviceMonitor, Facts

FACT = "device"
START_QUIET_S = 0.5
MAX_EARLY = 64
RECENT_S = 15.0
"""So long an error of a GPU is taken for the cause of the end of an engine on it."""


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """``interval_s`` between periodic scans. A quarantine of another ``boot_id`` is over: the machine was reset since."""

    interval_s: float = 10.0
    boot_id: str = ""


class GpuWatch:
    """The latest scan and the health of every device. ``listen``ers are called after everything that changes them."""

    def __init__(self, monitor: DeviceMonitor, clock: Clock, events: EventLog, facts: Facts, settings: WatchSettings) -> None:
        self.scan: DeviceScan = NOT_SCANNED
        self.revision = 0
        self._monitor, self._clock, self._events, self._facts, self._settings = monitor, clock, events, facts, settings
        self._health: dict[str, GpuHealth] = {}
        self._listeners: list[Callable[[], object]] = []
        self._wake = asyncio.Event()
        self._periodic_due = False
        self._early: dict[tuple[str | None, int], DeviceIncident] = {}
        self._recent: deque[tuple[float, str, Incident]] = deque(maxlen=MAX_EARLY)

    def listen(self, call: Callable[[], object]) -> None:
        self._listeners.append(call)

    def restore(self) -> None:
        """What an earlier daemon knew of the devices; after the state was opened, before the first scan."""
        for uuid, raw in self._facts.facts(FACT).items():
            self._health[uuid] = from_stored(uuid, raw, self._settings.boot_id)

    async def run(self) -> None:
        """Scan again and again until cancelled. Only scans an interval apart are periodic, however often one is woken.

        The first waits a moment, so that the node can answer before a driver is loaded; whoever starts a pool scans
        for itself.
        """
        last: float | None = None
        await self._rest(START_QUIET_S)
        while True:
            self._wake.clear()  # before the scan: what is heard of during it deserves another one
            now = self._clock.monotonic()
            periodic = last is None or now - last >= self._settings.interval_s
            last = now if periodic else last
            try:
                await self.rescan(periodic=periodic)
            except Exception as problem:  # noqa: BLE001 - the task's boundary: nobody scans the GPUs when it ends
                self._tell_broken(problem)
            await self._rest(self._settings.interval_s)

    async def _rest(self, seconds: float) -> None:
        """Until woken, at the longest ``seconds``."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def wake(self) -> None:
        """Scan at once: an engine came or went, or something was heard of a GPU."""
        self._wake.set()

    async def rescan(self, *, periodic: bool = False) -> DeviceScan:
        """A fresh scan. With a ``problem`` it holds what was known last; no health changes then."""
        self._periodic_due |= periodic  # its answer may be shared with others, and be weighed when they have it
        scan = await self._monitor.scan()
        if scan is not self.scan and scan.taken_at >= self.scan.taken_at:  # else others had it, or began later and were faster
            await self._take(scan)
        self._periodic_due &= not periodic
        return self.scan

    async def _take(self, scan: DeviceScan) -> None:
        before, self.scan = self.scan, scan
        self.revision += 1
        self._tell_problem(before, scan)
        if not scan.stale:
            self._weigh_scan(scan, self._periodic_due)
            self._periodic_due = False
        if not (scan.no_gpus and before.no_gpus):
            for call in self._listeners:
                self._tell(call)
                await asyncio.sleep(0)  # each in a slice of the loop of its own

    def _weigh_scan(self, scan: DeviceScan, periodic: bool) -> None:
        early, self._early = self._early, {}
        for (_, xid), incident in early.items():
            device = self._device_of(incident)
            if device is not None:  # otherwise it is gone: a GPU that comes there later is weighed by what it does then
                self._update(health.after_xid(self.health_of(device.uuid), meaning(xid, incident.text), xid))
        present, labels = {d.uuid: d for d in scan.devices}, {d.label for d in scan.devices}
        for uuid in sorted(present.keys() | self._health.keys()):
            known, device = self.health_of(uuid), present.get(uuid)
            if device is None and (uuid.startswith(PLACEHOLDER) or known.parent in present):
                self._forget(known)  # a MIG instance that was taken down is no broken hardware
                continue
            if device is None and known.label in labels:
                known = replace(known, label=uuid)  # its index is another GPU's now
            self._update(health.after_scan(known, device, periodic=periodic))

    def _forget(self, known: GpuHealth) -> None:
        """Nothing is known of it any more but a cordon."""
        if known.cordoned:
            self._health[known.uuid] = GpuHealth(known.uuid, known.label, cordoned=True, parent=known.parent)
        else:
            self._health.pop(known.uuid, None)

    # --- health ---

    def health_of(self, uuid: str) -> GpuHealth:
        """Of the device itself; a healthy one where nothing is known."""
        found = self._health.get(uuid)
        if found is not None:
            return found
        device = self.scan.device(uuid)
        return GpuHealth(uuid) if device is None else GpuHealth(uuid, device.label, parent=device.parent_uuid)

    def effective_health(self, uuid: str) -> GpuHealth:
        """What counts for whoever wants to use the device: the worse of its own health and, for a MIG instance, its GPU's."""
        own = self.health_of(uuid)
        if own.parent is None:
            return own
        parent = replace(self.health_of(own.parent), uuid=uuid)
        if not parent.healthy or own.usable:
            return own if parent.usable else parent
        return own

    def known(self) -> list[GpuHealth]:
        """The health of every device, those that are gone included."""
        return [self._health[uuid] for uuid in sorted(self._health)]

    def on_incident(self, incident: DeviceIncident) -> None:
        """An Xid or ECC event: programs at fault are noted, a GPU at fault is quarantined, anything else looked into."""
        if (device := self._device_of(incident)) is not None:
            self._recent.append((self._clock.monotonic(), device.uuid, as_incident(incident, device.label)))
        if incident.xid is None or self._weigh(incident, incident.xid) is not Verdict.APPLICATION:
            self.wake()

    def recent(self, uuids: Collection[str]) -> list[Incident]:
        """What was heard of these devices, or of the GPUs that they are part of, in the last seconds, oldest first."""
        since = self._clock.monotonic() - RECENT_S
        wanted = {uuid for name in uuids if (d := self.scan.device(name)) is not None for uuid in (d.uuid, d.parent_uuid)}
        return [incident for at, uuid, incident in self._recent if at >= since and uuid in wanted]

    def _weigh(self, incident: DeviceIncident, xid: int) -> Verdict:
        device, found = self._device_of(incident), meaning(xid, incident.text)
        label = device.label if device else incident.pci_bus_id or incident.uuid or "?"
        level = "error" if found.verdict is Verdict.FATAL else "warn"
        self._events.emit("xid", f"GPU {label} reported Xid {xid}: {found.what}", level=level, device=label, xid=xid,
                          verdict=found.verdict.value, source=incident.source, text=incident.text[:200])  # fmt: skip
        if device is not None and (found.verdict is Verdict.FATAL or found.contained or found.withdrawn):
            self._update(health.after_xid(self.health_of(device.uuid), found, xid))
            self._tell_listeners()
        elif found.verdict is Verdict.FATAL and self.scan.stale and len(self._early) < MAX_EARLY:
            self._early[incident.uuid or incident.pci_bus_id, xid] = incident  # weighed when a scan says which GPU that is
        return found.verdict

    async def cordon(self, name: str) -> None:
        """No start is placed there from now on. Durable. Raises RequestError DEVICE_NOT_FOUND, NodeError."""
        await self._decide(name, lambda t: replace(t, cordoned=True), f"GPU {name} is cordoned: nothing new starts on it")

    async def uncordon(self, name: str) -> None:
        """An operator overrides what is known: cordon, quarantine and probation end. Durable."""
        await self._decide(name, health.override, f"GPU {name} may be used again, an operator says")

    async def release(self) -> None:
        """Release NVML, so that the driver can be replaced. Nothing starts until ``resume``. Raises NodeError when stuck."""
        try:
            await self._monitor.release()
        except NodeError:
            self.wake()  # it was not released after all
            raise
        self._events.emit("devices_released", "The GPU driver's library was released; nothing starts until it is reinitialised")
        await self.rescan()

    async def resume(self) -> None:
        await self._monitor.resume()
        self._events.emit("devices_resumed", "The GPU driver's library is in use again")
        await self.rescan()

    def find(self, name: str) -> DeviceSnapshot:
        """By index, UUID or label. Raises RequestError DEVICE_NOT_FOUND listing what exists."""
        for device in self.scan.devices:
            if name.lower() in (device.uuid.lower(), device.label.lower()):
                return device
        there = ", ".join(d.label for d in self.scan.devices) or "none"
        raise RequestError(f"device {name[:80]} not found", code="DEVICE_NOT_FOUND", status=404, hint=f"there are: {there}")

    def _named(self, name: str) -> GpuHealth:
        """Also a device that is gone, by its UUID: its cordon can be lifted."""
        gone = next((h for h in self._health.values() if h.uuid.lower() == name.lower()), None)
        return gone or self.health_of(self.find(name).uuid)

    async def _decide(self, name: str, change: Callable[[GpuHealth], GpuHealth], human: str) -> None:
        if not self.scan.devices:
            await self.rescan()
        asked = self._named(name)
        await self._facts.put_fact(FACT, asked.uuid, to_stored(change(asked), self._settings.boot_id))
        now = self.health_of(asked.uuid)
        # What was learnt while the disk was written counts: a cordon is added to it, an override was not given for it.
        new = change(now) if type(now.state) is type(asked.state) else replace(now, cordoned=change(now).cordoned)
        if new.cordoned or self.scan.device(new.uuid) is not None:
            self._update(new)
        else:
            self._forget(new)
        self._events.emit("cordon" if new.cordoned else "uncordon", human, device=new.label, uuid=new.uuid)
        self._tell_listeners()

    def _update(self, new: GpuHealth) -> None:
        old = self._health.get(new.uuid, GpuHealth(new.uuid, new.label))
        if new == self._health.get(new.uuid):
            return
        self._health[new.uuid] = new
        if to_stored(old, "") != to_stored(new, ""):
            self._facts.note_fact(FACT, new.uuid, to_stored(new, self._settings.boot_id))
        self._tell_readability(old, new)
        if (new.state.name, new.state.reason) == (old.state.name, old.state.reason):
            return
        fields: dict[str, Any] = {"device": new.label, "uuid": new.uuid, "reason": new.state.reason, "remedy": new.remedy}
        if isinstance(new.state, Quarantined):
            human = f"GPU {new.label} is quarantined: {new.state.reason}"
            self._events.emit("device_quarantined", human, level="error", lost=new.lost, **fields)
        elif isinstance(new.state, Probation) and isinstance(old.state, Quarantined):
            self._events.emit("device_reset", f"GPU {new.label} answers again and is on probation", level="warn", **fields)
        elif new.healthy:
            self._events.emit("device_restored", f"GPU {new.label} is used again", device=new.label, uuid=new.uuid)

    def _tell_readability(self, old: GpuHealth, new: GpuHealth) -> None:
        fields: dict[str, Any] = {"device": new.label, "uuid": new.uuid}
        if new.unreadable is not None and old.unreadable is None:
            human = f"GPU {new.label} cannot be read: {new.unreadable}; nothing new starts on it, what runs there goes on"
            level = "warn" if new.unreadable == NOT_PERMITTED else "error"
            self._events.emit("device_unclear", human, level=level, reason=new.unreadable, **fields)
        elif new.unreadable is None and old.unreadable is not None and not isinstance(new.state, Quarantined):
            self._events.emit("device_clear", f"GPU {new.label} can be read again", **fields)

    # --- inside ---

    def _device_of(self, incident: DeviceIncident) -> DeviceSnapshot | None:
        for device in self.scan.devices:
            if incident.uuid is not None and device.uuid == incident.uuid:
                return device
            if incident.pci_bus_id and device.parent_uuid is None and _same_slot(device.pci_bus_id, incident.pci_bus_id):
                return device
        return None

    def _tell_problem(self, before: DeviceScan, now: DeviceScan) -> None:
        if now.problem is not None and (before.problem is None or before.problem.code != now.problem.code):
            quiet = now.no_gpus or now.problem.code == "released"
            self._events.emit("device_scan", f"The GPUs cannot be scanned: {now.problem.message}",
                              level="debug" if quiet else "error", code=now.problem.code, hint=now.problem.hint)  # fmt: skip
        elif now.problem is None and before.problem is not None:
            found = ", ".join(f"{d.label} ({d.name})" for d in now.devices) or "none"
            human = f"GPUs found: {found}"
            self._events.emit("device_scan", human, code="ok", driver_version=now.driver_version, cuda_version=now.cuda_version)

    def _tell_listeners(self) -> None:
        for call in self._listeners:
            self._tell(call)

    def _tell(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as problem:  # noqa: BLE001 - a boundary: one listener's fault must not keep the others from it
            self._tell_broken(problem)

    def _tell_broken(self, problem: Exception) -> None:
        self._events.emit("internal_error", f"Internal error while scanning the GPUs: {problem!r}", level="critical")


def require_scan(scan: DeviceScan, pool_id: str) -> None:
    """Raises NodeError GPU_UNAVAILABLE unless ``scan`` may be relied on: what cannot be seen is not used."""
    if scan.problem is not None:
        raise NodeError(
            f"cannot start pool {pool_id}: the GPUs cannot be scanned: {scan.problem.message}",
            code="GPU_UNAVAILABLE", status=503, pool_id=pool_id, hint=scan.problem.hint or None,
        )  # fmt: skip


def objection(known: GpuHealth, pool_id: str) -> PoolError:
    """The error of a start on a device that is not to be used."""
    return NodeError(
        f"cannot start pool {pool_id}: {known.problem}", code="GPU_UNAVAILABLE", status=503, pool_id=pool_id, hint=known.remedy,
    )  # fmt: skip


def _same_slot(full: str, partial: str) -> bool:
    """The kernel log writes ``0000:01:00``, NVML ``00000000:01:00.0``."""

    def slot(text: str) -> tuple[int, ...]:
        head, _, _ = text.lower().partition(".")
        return tuple(int(part, 16) for part in head.split(":"))

    try:
        return slot(full) == slot(partial)
    except ValueError:
        return False
