"""The GPUs as the pools of this node meet them: quarantine, promises, memory that is seen free, figures for placement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pool_managerd.core.device_masks import in_pci_order
from pool_managerd.core.device_trust import DeviceTrust, Trust
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


class Gpus:
    """One per node. ``attach`` gives it the pools before anything starts."""

    def __init__(self, watch: GpuWatch, registry: Registry, clock: Clock) -> None:
        self.watch = watch
        self._registry, self._clock = registry, clock
        self._drivers: Callable[[], Iterable[PoolDriver]] = tuple
        self.memory = GpuMemory(lambda: watch.scan, self.drivers)
        self._had_gpus = False
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

    # --- after a stop ---

    async def wait_until_free(self, driver: PoolDriver, epoch: int, deadline_s: float) -> None:
        """Post VramFree once the engine's memory is seen free; past the deadline VramHeld with the holder, and go on looking.

        Ends without a word when the pool has moved on to another launch.
        """
        pause, since, told = FIRST_LOOK_S, self._clock.monotonic(), False
        while driver.instance.epoch == epoch and driver.instance.vram_pending:
            await self.watch.look()
            left = self.memory.leftover(driver.pool_id)
            if left.holder is None:
                self._tell_uncertain(driver, left.certain)
                driver.post(ev.VramFree(epoch))
                return
            if not told and self._clock.monotonic() - since >= deadline_s:
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
        bad = [t for t in map(self.watch.trust_in, self.devices_of(driver)) if t.state is not Trust.OK]
        i, lost = driver.instance, any(t.lost and t.state is Trust.QUARANTINED for t in bad)
        if bad and (not i.quarantined or (lost and i.has_process and i.phase is not Phase.STOPPING)):
            driver.post(ev.Quarantine(_why(bad), lost))
        elif not bad and i.quarantined:
            driver.post(ev.EndQuarantine())

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


def _why(bad: list[DeviceTrust]) -> str:
    return "; ".join(t.objection for t in bad)


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
