"""The GPUs as the pools of this node meet them: quarantine, promises, memory that is seen free, figures for placement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.gpu.ledger import DeviceAccount
from pool_managerd.core.gpu.masks import what_exists
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.serving import KEEP_THEIR_ERROR
from pool_managerd.core.registry import Registry
from pool_managerd.errors import PoolError
from pool_managerd.supervision.gpu.bindings import Bindings
from pool_managerd.supervision.gpu.memory import GpuMemory, Leftover, instance_of
from pool_managerd.supervision.gpu.watch import GpuWatch
from pool_managerd.supervision.protocols import Clock
from pool_managerd.supervision.publishing import GpuFigures

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver

_AWAY = ("nvml_unavailable", "no_driver")
FIRST_LOOK_S, SLOWEST_LOOK_S = 0.005, 0.5
CLOSING_WAIT_S = 5.0
"""A daemon that ends waits no longer than this for memory: what is still held then is for the next one to see."""


class Gpus:
    """One per node. ``attach`` gives it the pools before anything starts. ``closing``: the node is shutting down;
    ``hurry``: at once.
    """

    def __init__(self, watch: GpuWatch, registry: Registry, clock: Clock, bindings: Bindings) -> None:
        self.watch, self.bindings = watch, bindings
        self._registry, self._clock = registry, clock
        self._drivers: Callable[[], Iterable[PoolDriver]] = tuple
        self.memory = GpuMemory(lambda: watch.scan, self.drivers)
        self._usable: frozenset[str] = frozenset()
        self._shown_of: dict[str, DeviceAccount] | None = None
        self._shown: dict[str, tuple[str, ...]] = {}
        self._figures = GpuFigures({})
        self._looks: set[asyncio.Task[DeviceScan]] = set()
        self.closing = self.hurry = False
        watch.listen(self._after_look)
        watch.listen(self.memory.accounts)  # in a slice of the loop of its own: the others find it made
        watch.listen(self.refresh)

    def attach(self, drivers: Callable[[], Iterable[PoolDriver]]) -> None:
        self._drivers = drivers

    def drivers(self) -> Iterable[PoolDriver]:
        """The pools of this node."""
        return self._drivers()

    def release(self, pool_id: str, epoch: int) -> None:
        """Give a launch's promise back; what others see free changes at once."""
        if self.memory.ledger.release(InstanceId(pool_id), epoch):
            self.refresh()
            self.watch.wake()

    def forget(self, pool_id: str) -> None:
        """The pool is gone: what its processes still hold is foreign from now on, and its mask means nothing any more."""
        self.memory.forget(InstanceId(pool_id))
        self.bindings.forget(pool_id)
        self._shown.pop(pool_id, None)
        self.refresh()

    # --- after a stop ---

    async def wait_until_free(self, driver: PoolDriver, epoch: int, deadline_s: float) -> None:
        """Post VramFree once the engine's memory is seen free, past the deadline VramHeld with the holder.

        From then on every look of the watch looks for it, too. Where pids cannot be matched, the death of the processes has
        to do at the deadline. Ends without a word when the pool has moved on to another launch.
        """
        pause, since = FIRST_LOOK_S, self._clock.monotonic()

        def impatient() -> bool:
            return self._clock.monotonic() - since >= self._patience_s(deadline_s)

        while driver.instance.epoch == epoch and driver.instance.vram_pending:
            looked = await self._look_unless(impatient)
            left = self.memory.leftover(instance_of(driver)) if looked else Leftover("the GPU driver does not answer")
            if left.holder is None or (impatient() and not left.certain):
                self._tell_uncertain(driver, left)
                driver.post(ev.VramFree(epoch))
                return
            if impatient():
                driver.post(ev.VramHeld(epoch, left.holder))
                return
            await self._sleep(pause)
            pause = min(pause * 1.5, SLOWEST_LOOK_S)

    def _patience_s(self, deadline_s: float) -> float:
        """How long memory is waited for before its holder is named. A node that closes has little time."""
        if self.hurry or (self.closing and self.watch.scan.stale):
            return 0.0
        return min(deadline_s, CLOSING_WAIT_S) if self.closing else deadline_s

    async def _look_unless(self, impatient: Callable[[], bool]) -> bool:
        """True after a look at the GPUs; one that takes longer than anybody waits is left to itself, for a shutdown's sake."""
        look = asyncio.create_task(self.watch.rescan())
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)
        while not look.done():
            await asyncio.wait({look}, timeout=SLOWEST_LOOK_S)
            if impatient() and not look.done():
                return False
        look.result()
        return True

    async def _sleep(self, seconds: float) -> None:
        over = asyncio.Event()
        alarm = self._clock.call_at(self._clock.monotonic() + seconds, over.set)
        try:
            await over.wait()
        finally:
            alarm.cancel()

    def _tell_uncertain(self, driver: PoolDriver, left: Leftover) -> None:
        if not left.certain:
            why = left.holder or "its use fell"
            human = (
                f"GPU memory of pool '{driver.pool_id}' counts as free: its engine is dead, and pids cannot be matched ({why})"
            )
            driver.emit("notice", human, level="warn", confidence="low")

    # --- after every look ---

    def _after_look(self) -> None:
        scan = self.watch.scan
        usable = frozenset(d.uuid for d in scan.devices if d.usable)
        if scan.stale:  # a driver that was away altogether comes back with GPUs that are new to its pools
            usable = frozenset() if scan.problem is not None and scan.problem.code in _AWAY else self._usable
        appeared, self._usable = usable - self._usable, usable
        objections = {h.uuid: self._objection(h.uuid) for h in self.watch.known()}
        for driver in self._drivers():
            i = driver.instance
            self._reconsider(driver, objections)
            if i.vram_pending and i.phase is Phase.FAILED and self.memory.leftover(instance_of(driver)).holder is None:
                driver.post(ev.VramFree(i.epoch))
            waits = i.phase is Phase.FAILED and i.retry and i.reason in ("gpu_required", "config_error")
            if waits and appeared and self._may_start_now(driver, appeared):
                driver.post(ev.Start(origin="gpus"))

    def _may_start_now(self, driver: PoolDriver, appeared: frozenset[str]) -> bool:
        """True when a GPU that it waited for may be among those that appeared: any, or one that its mask means."""
        mask = driver.mask
        if mask is None:
            return driver.instance.reason == "gpu_required"
        try:
            bound = self.bindings.bound(driver.pool_id, mask, self.watch.scan.devices).devices
        except PoolError:
            return False
        return any(d.uuid in appeared for d in bound)

    def _reconsider(self, driver: PoolDriver, objections: Mapping[str, tuple[str, bool] | None]) -> None:
        """Quarantine a pool when a GPU that it runs on, or must run on, is not to be used; end that when it is again."""
        i, bad = driver.instance, []
        for uuid in self.devices_of(driver):
            found = objections[uuid] if uuid in objections else self._objection(uuid)
            if found is not None:
                bad.append(found)
        if not bad:
            if i.quarantined:
                driver.post(ev.EndQuarantine())
            return
        lost, why = any(is_lost for _, is_lost in bad), "; ".join(why for why, _ in bad)
        ends = lost and i.has_process and i.phase not in (Phase.STOPPING, Phase.FAILED)
        if not i.quarantined or ends or (i.last_error != why and i.phase not in KEEP_THEIR_ERROR):
            driver.post(ev.Quarantine(why, lost))

    def _objection(self, uuid: str) -> tuple[str, bool] | None:
        """Why nothing may run on the device, and whether what runs there cannot go on; None when all is well."""
        health = self.watch.effective_health(uuid)
        if not health.healthy:
            return health.objection, health.lost
        device = self.watch.scan.device(uuid)
        if device is None and not self.watch.scan.stale:
            return f"the device {uuid} is no longer there; {what_exists(self.watch.scan.devices)}", True
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
        if mask is None or driver.config is None:  # a submitted engine may come with another mask: its start will tell
            return ()
        try:
            return tuple(d.uuid for d in self.bindings.bound(driver.pool_id, mask, self.watch.scan.devices).devices)
        except PoolError:  # a GPU that it ran on is gone, or its start will say what is wrong with the mask
            return tuple(d.uuid for d in assignment.devices) if assignment is not None else ()

    def reserved_by_masks(self, driver: PoolDriver) -> frozenset[str]:
        """Devices that the masks of other pools name which hold nothing yet and are to run: left to them where others will do."""
        found: set[str] = set()
        for other in self._drivers():
            i = other.instance
            waiting = self.memory.ledger.get(instance_of(other)) is None and not (i.held or i.drained)
            if other is not driver and waiting and other.mask is not None and not other.external:
                found.update(self.devices_of(other))
        return frozenset(found)

    # --- figures ---

    def refresh(self) -> None:
        """What placement reads of each pool's GPUs; a pool whose figures have not changed is left alone."""
        accounts = self.memory.accounts()
        if accounts is not self._shown_of:
            self._shown_of, self._shown, self._figures = accounts, {}, GpuFigures(accounts)
        for driver in self._drivers():
            seen = self._seen_by(driver, accounts)
            if self._shown.get(driver.pool_id) == seen:
                continue
            self._shown[driver.pool_id] = seen
            fields = self._figures.of(driver.pool_id, seen)
            entry = self._registry.get(driver.pool_id)
            if entry is not None and any(getattr(entry, name) != value for name, value in fields.items()):
                self._registry.publish(driver.pool_id, **fields)

    def _seen_by(self, driver: PoolDriver, accounts: Mapping[str, DeviceAccount]) -> tuple[str, ...]:
        """The devices that the pool runs on or may be placed on, in PCI order."""
        wanted = self.devices_of(driver)
        if wanted:
            return tuple(uuid for uuid in accounts if uuid in wanted)
        if driver.mask is not None or driver.external:
            return ()
        return tuple(uuid for uuid, account in accounts.items() if account.device.usable)
