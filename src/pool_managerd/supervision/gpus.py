"""The GPUs as the pools of this node meet them: quarantine, promises, memory that is seen free, figures for placement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pool_managerd.core.device_masks import in_pci_order
from pool_managerd.core.device_trust import Trust
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.registry import DeviceShare, Registry
from pool_managerd.core.reservations import DeviceAccount
from pool_managerd.errors import SpecError
from pool_managerd.supervision.gpu_memory import GpuMemory
from pool_managerd.supervision.gpu_watch import GpuWatch
from pool_managerd.supervision.protocols import Clock

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver

FIRST_LOOK_S, SLOWEST_LOOK_S = 0.005, 0.5
CLOSING_WAIT_S = 5.0
"""A daemon that ends waits no longer than this for memory: what is still held then is for the next one to see."""


class Gpus:
    """One per node. ``attach`` gives it the pools before anything starts. ``closing``: the node is shutting down."""

    def __init__(self, watch: GpuWatch, registry: Registry, clock: Clock) -> None:
        self.watch = watch
        self._registry, self._clock = registry, clock
        self._drivers: Callable[[], Iterable[PoolDriver]] = tuple
        self.memory = GpuMemory(lambda: watch.scan, self.drivers)
        self._had_gpus = False
        self.closing = False
        watch.listen(self._after_look)

    def attach(self, drivers: Callable[[], Iterable[PoolDriver]]) -> None:
        self._drivers = drivers

    def drivers(self) -> Iterable[PoolDriver]:
        """The pools of this node."""
        return self._drivers()

    def release(self, pool_id: str, epoch: int) -> None:
        """Give a launch's promise back; what others see free changes at once."""
        if self.memory.ledger.release(pool_id, epoch):
            self.refresh()

    def forget(self, pool_id: str) -> None:
        """The pool is gone. What its processes still hold is foreign from now on."""
        self.memory.forget(pool_id)
        self.refresh()

    # --- after a stop ---

    async def wait_until_free(self, driver: PoolDriver, epoch: int, deadline_s: float) -> None:
        """Post VramFree once the engine's memory is seen free; past the deadline VramHeld with the holder, and go on looking.

        Ends without a word when the pool has moved on to another launch.
        """
        pause, since, told = FIRST_LOOK_S, self._clock.monotonic(), False
        deadline_s = min(deadline_s, CLOSING_WAIT_S) if self.closing else deadline_s
        while driver.instance.epoch == epoch and driver.instance.vram_pending:
            await self.watch.look()
            left = self.memory.leftover(driver.pool_id)
            if left.holder is None:
                self._tell_uncertain(driver, left.certain)
                driver.post(ev.VramFree(epoch))
                return
            blind = self.closing and self.watch.scan.stale  # nobody will look later on, either
            if not told and (blind or self._clock.monotonic() - since >= deadline_s):
                told = True
                driver.post(ev.VramHeld(epoch, left.holder))
            await self._sleep(pause)
            pause = min(pause * 1.5, SLOWEST_LOOK_S if not told else SLOWEST_LOOK_S * 4)

    async def _sleep(self, seconds: float) -> None:
        over = asyncio.Event()
        alarm = self._clock.call_at(self._clock.monotonic() + seconds, over.set)
        try:
            await over.wait()
        finally:
            alarm.cancel()

    def _tell_uncertain(self, driver: PoolDriver, certain: bool) -> None:
        if not certain:
            human = (
                f"GPU memory of pool '{driver.pool_id}' counts as free because its use fell:"
                " pids of another namespace cannot be matched"
            )
            driver.emit("notice", human, level="warn", confidence="low")

    # --- after every look ---

    def _after_look(self) -> None:
        self.memory.attribute()
        appeared, self._had_gpus = not self._had_gpus and not self.watch.scan.no_gpus, not self.watch.scan.no_gpus
        for driver in self._drivers():
            self._reconsider(driver)
            if appeared and driver.instance.phase is Phase.FAILED and driver.instance.reason == "gpu_required":
                driver.post(ev.Start(retry=driver.instance.retry, origin="gpus"))  # the driver was loaded after us
        self.refresh()

    def _reconsider(self, driver: PoolDriver) -> None:
        """Quarantine a pool when a GPU that it runs on, or must run on, is not to be used; end that when it is again."""
        bad = [found for found in map(self._objection, self.devices_of(driver)) if found is not None]
        i, lost = driver.instance, any(is_lost for _, is_lost in bad)
        if bad and (not i.quarantined or (lost and i.has_process and i.phase is not Phase.STOPPING)):
            driver.post(ev.Quarantine("; ".join(why for why, _ in bad), lost))
        elif not bad and i.quarantined:
            driver.post(ev.EndQuarantine())

    def _objection(self, uuid: str) -> tuple[str, bool] | None:
        """Why nothing may run on the device, and whether what runs there cannot go on; None when all is well."""
        trust = self.watch.standing(uuid)
        if trust.state is not Trust.OK:
            return trust.objection, trust.lost and trust.state is Trust.QUARANTINED
        device = next((d for d in self.watch.scan.devices if d.uuid == uuid), None)
        if device is not None and device.mig_enabled:
            return f"GPU {device.label} is in MIG mode now: name one of its instances in `devices`, or turn MIG off", True
        return None

    def devices_of(self, driver: PoolDriver) -> tuple[str, ...]:
        """UUIDs that the pool runs on; while it does not run, those that its mask demands. Empty: it is free to choose."""
        assignment = driver.launch.assignment
        idle = driver.instance.phase in (Phase.DOWN, Phase.FAILED, Phase.BACKOFF, Phase.OPEN)
        if assignment is not None and not idle:
            return tuple(d.uuid for d in assignment.devices)
        mask = driver.mask
        if mask is None:
            return ()
        if assignment is not None:
            return tuple(d.uuid for d in assignment.devices)
        try:
            return tuple(d.uuid for d in mask.resolve(self.watch.scan.devices))
        except SpecError:
            return ()  # its start will say what is wrong with the mask

    def spoken_for(self, driver: PoolDriver) -> frozenset[str]:
        """Devices that the masks of other pools name which hold nothing yet and are to run: left to them where others will do."""
        found: set[str] = set()
        for other in self._drivers():
            i = other.instance
            waiting = self.memory.ledger.get(other.pool_id) is None and not (i.held or i.drained)
            if other is not driver and waiting and other.mask is not None and not other.external:
                found.update(self.devices_of(other))
        return frozenset(found)

    # --- figures ---

    def refresh(self) -> None:
        """What placement reads of each pool's GPUs; a pool whose figures have not changed is left alone."""
        accounts = self.memory.accounts()
        for driver in self._drivers():
            fields = _figures(self._seen_by(driver, accounts))
            entry = self._registry.get(driver.pool_id)
            if entry is not None and any(getattr(entry, name) != value for name, value in fields.items()):
                self._registry.publish(driver.pool_id, **fields)

    def _seen_by(self, driver: PoolDriver, accounts: dict[str, DeviceAccount]) -> list[DeviceAccount]:
        """The devices that the pool runs on or may be placed on."""
        uuids = self.devices_of(driver)
        if not uuids and driver.mask is None and not driver.external:
            uuids = tuple(d.uuid for d in self.watch.scan.devices if d.usable)
        return [accounts[d.uuid] for d in in_pci_order(self.watch.scan.devices) if d.uuid in uuids and d.uuid in accounts]


def _figures(accounts: list[DeviceAccount]) -> dict[str, Any]:
    """The registry's fields of a pool's GPUs; None throughout where there are none."""
    capabilities = [a.device.compute_capability for a in accounts if a.device.compute_capability]
    shares = tuple(
        DeviceShare(
            a.device.id, a.device.label, a.device.uuid, a.device.compute_capability, a.device.vram_total_bytes,
            a.device.vram_free_bytes, a.available_bytes,
        )
        for a in accounts
    )  # fmt: skip
    return {
        "devices": shares,
        "vram_total_bytes": sum(s.vram_total_bytes for s in shares) if shares else None,
        "vram_free_bytes": sum(s.vram_free_bytes for s in shares) if shares else None,
        "vram_available_bytes": sum(s.vram_available_bytes for s in shares) if shares else None,
        "compute_capability": min(capabilities, key=_as_numbers, default=None),
    }


def _as_numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdigit())
