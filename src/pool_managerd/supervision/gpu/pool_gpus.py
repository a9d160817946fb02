"""The GPUs as the pools of this node meet them: quarantine, reservations, memory that is seen free, fields for placement."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager

from pool_managerd.core.crash_diagnosis import Incident
from pool_managerd.core.gpu.accounts import DeviceAccount, without
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.gpu.kept_free import KeptFree
from pool_managerd.core.gpu.masks import what_exists
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle.phase import AFTER_FAILURE, ENDING, IDLE
from pool_managerd.core.registry import Registry
from pool_managerd.errors import PoolError
from pool_managerd.supervision.gpu.mask_gpus import MaskGpus
from pool_managerd.supervision.gpu.memory import GpuMemory, Leftover
from pool_managerd.supervision.gpu.registry_fields import GpuFields
from pool_managerd.supervision.gpu.turns import Turns
from pool_managerd.supervision.gpu.watch import GpuWatch
from pool_managerd.supervision.gpu.yields import Yields
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Clock, Emit

_AWAY = ("nvml_unavailable", "no_driver")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.5
CLOSING_WAIT_S = 5.0
"""A daemon that ends waits no longer than this for memory: what is still held then is for the next one to see."""


class Gpus:
    """One per node. ``attach`` gives it the pools before anything starts. ``closing``: the node is shutting down;
    ``hurry``: at once.
    """

    def __init__(self, watch: GpuWatch, registry: Registry, clock: Clock, mask_gpus: MaskGpus, yields: Yields) -> None:
        self.watch, self.mask_gpus, self.yields = watch, mask_gpus, yields
        self._registry, self._clock = registry, clock
        self._pools: Callable[[], Iterable[Pool]] = tuple
        self._post: Callable[[Pool, ev.Event], None] = _nobody
        self.memory = GpuMemory(lambda: watch.scan, self.pools, yields)
        self._left: frozenset[tuple[str, bool, KeptFree | None]] = frozenset()
        self._on_kept_free: Callable[[], None] = lambda: None
        yields.on_change = self.refresh
        self._usable: frozenset[str] = frozenset()
        self._fields = GpuFields({})
        self._published: dict[str, tuple[str, ...]] = {}
        self._scans: set[asyncio.Task[DeviceScan]] = set()
        self._turns = Turns()
        self.closing = self.hurry = False
        watch.listen(self._after_scan)
        watch.listen(self.memory.accounts)  # in a slice of the loop of its own: the others find it made
        watch.listen(self.refresh)

    def attach(self, pools: Callable[[], Iterable[Pool]], post: Callable[[Pool, ev.Event], None]) -> None:
        self._pools, self._post = pools, post

    def pools(self) -> Iterable[Pool]:
        """The pools of this node; of one that is being replaced both instances."""
        return self._pools()

    def incidents(self, uuids: Collection[str]) -> list[Incident]:
        """What these GPUs met in the last seconds: the evidence of an engine that has just ended on them."""
        return self.watch.recent(uuids)

    def wake(self) -> None:
        """Something has come or gone: scan now, where there are GPUs that it could be on."""
        if not self.watch.scan.no_gpus:
            self.watch.wake()

    def release(self, instance_id: InstanceId, epoch: int) -> None:
        """Give a launch's reservation back; what others see free changes at once."""
        if self.memory.ledger.release(instance_id, epoch):
            self.refresh()
            self.watch.wake()

    def forget(self, pool_id: str) -> None:
        """The pool is gone: what its processes still hold is foreign from now on, and its mask means nothing any more."""
        self.memory.forget(pool_id)
        self.mask_gpus.forget(pool_id)
        self._published.pop(pool_id, None)
        self.refresh()

    def load_of(self, uuids: Collection[str]) -> tuple[int | None, int]:
        """Of these GPUs, as the last scan saw them: the utilisation of the busiest in percent, VRAM in use in bytes."""
        seen = [d for d in self.watch.scan.devices if d.uuid in uuids and d.readable] if not self.watch.scan.stale else []
        loads = [d.utilization_percent for d in seen if d.utilization_percent is not None]
        return max(loads, default=None), sum(d.vram_used_bytes for d in seen)

    # --- what is to be free for others ---

    def shortfalls(self, gone: Collection[InstanceId] = ()) -> dict[str, KeptFree]:
        """GPUs, by UUID, on which instances other than those that are ``gone`` hold what is to be free, and why it is."""
        found: dict[str, KeptFree] = {}
        for uuid, one in self.memory.accounts().items():
            left = one
            for instance in gone:
                left = without(left, instance)
            if left.kept_free is not None and left.shortfall_bytes:
                found[uuid] = left.kept_free
        return found

    def on_kept_free(self, call: Callable[[], None]) -> None:
        """To be called when it is another GPU, or for another reason."""
        self._on_kept_free = call

    def leases_on(self, pool_id: str) -> int:
        """How many are held of it."""
        return self._registry.get_active_leases(pool_id)

    # --- of one that sleeps ---

    def sleeper(self, pool: Pool) -> InstanceId | None:
        """The other instance of the pool, where that sleeps and lends its memory."""
        others = (one for one in self._pools() if one.pool_id == pool.pool_id and one.instance_id != pool.instance_id)
        return next((one.instance_id for one in others if one.instance.phase is Phase.SLEEPING), None)

    def turn(self, uuids: Collection[str]) -> AbstractAsyncContextManager[object]:
        """Going to sleep and waking up are done one after the other on each GPU: at once, some engines crash."""
        return self._turns.of(uuids)

    async def in_the_way(self, pool: Pool) -> str | None:
        """Who holds what an instance that is to wake has reserved, or borrows it; None when a fresh scan shows nobody."""
        if (reservation := self.memory.ledger.due(pool.instance_id)) is None:
            return None
        await self.watch.rescan()
        accounts = self.memory.accounts()
        for uuid, reserved in reservation.bytes_by_device.items():
            if uuid in accounts and (others := without(accounts[uuid], pool.instance_id)).available_bytes < reserved:
                return f"{others.holders()} on GPU {others.device.label}"
        return None

    # --- after a stop ---

    async def wait_until_free(self, pool: Pool, epoch: int, deadline_s: float, emit: Emit) -> None:
        """Post VramFree once the engine's memory is seen free, past the deadline VramHeld with the holder.

        From then on every scan of the watch looks for it, too. Where processes are not attributable, their death has to do at
        the deadline. Ends without a word when the pool has moved on to another launch.
        """
        gap, since = FIRST_PAUSE_S, self._clock.monotonic()

        def impatient() -> bool:
            return self._clock.monotonic() - since >= self._patience_s(deadline_s)

        while pool.instance.epoch == epoch and pool.instance.vram_pending:
            scanned = await self._scan_unless(impatient)
            left = self.memory.leftover(pool.instance_id, epoch) if scanned else Leftover("the GPU driver does not answer")
            if left.holder is None or (impatient() and not left.certain):
                _tell_uncertain(pool, left, emit)
                self._post(pool, ev.VramFree(epoch))
                return
            if impatient():
                self._post(pool, ev.VramHeld(epoch, left.holder))
                return
            await pause(self._clock, gap)
            gap = min(gap * 1.5, LONGEST_PAUSE_S)

    def _patience_s(self, deadline_s: float) -> float:
        """How long memory is waited for before its holder is named. A node that closes has little time."""
        if self.hurry or (self.closing and self.watch.scan.stale):
            return 0.0
        return min(deadline_s, CLOSING_WAIT_S) if self.closing else deadline_s

    async def _scan_unless(self, impatient: Callable[[], bool]) -> bool:
        """True after a scan; one that takes longer than anybody waits is left to itself, for a shutdown's sake."""
        scan = asyncio.create_task(self.watch.rescan())
        self._scans.add(scan)
        scan.add_done_callback(self._scans.discard)
        while not scan.done():
            await asyncio.wait({scan}, timeout=LONGEST_PAUSE_S)
            if impatient() and not scan.done():
                return False
        scan.result()
        return True

    # --- after every scan ---

    def _after_scan(self) -> None:
        scan = self.watch.scan
        usable = frozenset(d.uuid for d in scan.devices if d.usable)
        if scan.stale:  # a driver that was away altogether comes back with GPUs that are new to its pools
            usable = frozenset() if scan.problem is not None and scan.problem.code in _AWAY else self._usable
        appeared, self._usable = usable - self._usable, usable
        objections = {h.uuid: self._objection(h.uuid) for h in self.watch.known()}
        for pool in self._pools():
            state, i = pool.state, pool.instance
            self._reconsider(pool, objections)
            if i.vram_pending and i.phase is Phase.FAILED and self.memory.leftover(pool.instance_id, i.epoch).holder is None:
                self._post(pool, ev.VramFree(i.epoch))
            waits = i.phase is Phase.FAILED and state.retry and state.reason in ("gpu_required", "config_error")
            if waits and appeared and self._may_start_now(pool, appeared):
                self._post(pool, ev.Start(origin="gpus"))

    def _may_start_now(self, pool: Pool, appeared: frozenset[str]) -> bool:
        """True when a GPU that it waited for may be among those that appeared: any, or one that its mask means."""
        mask = pool.definition.mask
        if mask is None:
            return pool.state.reason == "gpu_required"
        try:
            found = self.mask_gpus.resolve(pool.pool_id, mask, self.watch.scan.devices).devices
        except PoolError:
            return False
        return any(d.uuid in appeared for d in found)

    def _reconsider(self, pool: Pool, objections: Mapping[str, tuple[str, bool] | None]) -> None:
        """Quarantine a pool when a GPU that it runs on, or must run on, is not to be used; end that when it is again."""
        state, i, bad = pool.state, pool.instance, []
        for uuid in self.devices_of(pool):
            found = objections[uuid] if uuid in objections else self._objection(uuid)
            if found is not None:
                bad.append(found)
        if not bad:
            if state.quarantined:
                self._post(pool, ev.EndQuarantine())
            return
        lost, why = any(is_lost for _, is_lost in bad), "; ".join(why for why, _ in bad)
        ends = lost and i.has_process and i.phase not in ENDING
        if not state.quarantined or ends or (state.last_error != why and i.phase not in AFTER_FAILURE):
            self._post(pool, ev.Quarantine(why, lost))

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

    def devices_of(self, pool: Pool) -> tuple[str, ...]:
        """UUIDs that the pool runs on; while it does not run, those that its mask demands. Empty: it is free to choose."""
        allocation = pool.launch.allocation
        if allocation is not None and pool.instance.phase not in IDLE:
            return tuple(d.uuid for d in allocation.devices)
        mask = pool.definition.mask
        if mask is None or pool.config is None:  # a submitted engine may come with another mask: its start will tell
            return ()
        try:
            return tuple(d.uuid for d in self.mask_gpus.resolve(pool.pool_id, mask, self.watch.scan.devices).devices)
        except PoolError:  # a GPU that it ran on is gone, or its start will say what is wrong with the mask
            return tuple(d.uuid for d in allocation.devices) if allocation is not None else ()

    def reserved_by_masks(self, pool: Pool) -> frozenset[str]:
        """Devices in masks of other pools that have reserved nothing yet and are to run: left to them where others will do."""
        found: set[str] = set()
        for other in self._pools():
            state, definition = other.state, other.definition
            waiting = self.memory.ledger.get(other.instance_id) is None and not (state.held or state.desired.stays_down)
            if other is not pool and waiting and definition.mask is not None and not definition.external:
                found.update(self.devices_of(other))
        return frozenset(found)

    # --- for placement ---

    def refresh(self) -> None:
        """What placement reads of each pool's GPUs; a pool for which nothing has changed is left alone."""
        accounts = self.memory.accounts()
        left = frozenset((uuid, one.shortfall_bytes > 0, one.kept_free) for uuid, one in accounts.items() if one.kept_free)
        if left != self._left:
            self._left = left
            self._on_kept_free()
        if accounts is not self._fields.accounts:
            self._fields, self._published = GpuFields(accounts), {}
        for pool in self._pools():
            if not pool.current:
                continue
            seen = self._seen_by(pool, accounts)
            if self._published.get(pool.pool_id) == seen:
                continue
            self._published[pool.pool_id] = seen
            fields = self._fields.of(pool.pool_id, seen)
            entry = self._registry.get(pool.pool_id)
            if entry is not None and any(getattr(entry, name) != value for name, value in fields.items()):
                self._registry.publish(pool.pool_id, **fields)

    def _seen_by(self, pool: Pool, accounts: Mapping[str, DeviceAccount]) -> tuple[str, ...]:
        """The devices that the pool runs on or may be allocated, in PCI order."""
        wanted = self.devices_of(pool)
        if wanted:
            return tuple(uuid for uuid in accounts if uuid in wanted)
        if pool.definition.mask is not None or pool.definition.external:
            return ()
        return tuple(uuid for uuid, account in accounts.items() if account.device.usable)


def _nobody(pool: Pool, event: ev.Event) -> None:
    """Before ``attach`` there are no pools."""


def _tell_uncertain(pool: Pool, left: Leftover, emit: Emit) -> None:
    if not left.certain:
        why = f"processes are not attributable ({left.holder or 'its use fell'})"
        human = f"GPU memory of pool '{pool.pool_id}' counts as free: its engine is dead, and {why}"
        emit("notice", human, level="warn", confidence="low")
