"""May this start go ahead, and on which GPUs? Asked before anything is downloaded or spawned (OC-POOL-3002)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import NOT_FETCHED, PreparedEngine
from pool_managerd.core.demand.together import NO_RULES, Together
from pool_managerd.core.gpu.accounts import DeviceAccount, without
from pool_managerd.core.gpu.allocation import Allocation, AllocationRequest, Split, allocate
from pool_managerd.core.gpu.devices import DeviceScan, DeviceSnapshot
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.gpu.mask_gpus import ResolvedMask
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.gpu.tensor_parallel import configured_split
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord
from pool_managerd.core.lifecycle import Phase, sleeps_evicted
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.core.memory.measurements import Measurements
from pool_managerd.core.narration import size
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.supervision.gpu.barred import require_some_left, require_together
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.gpu.sleepers import Sleepers
from pool_managerd.supervision.gpu.watch import objection, require_scan
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Facts

MEASUREMENT = "footprint"
ADOPTION_SCAN_S = 3.0


class Sizer(Protocol):
    """Reads what a start will need. Raises PoolError for what the configuration must change."""

    async def __call__(self, pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs: ...


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """``cpu_allowed``: a machine without any GPU runs engines on its CPU (profile dev)."""

    cpu_allowed: bool = False
    fit: Literal["enforce", "warn", "off"] = "enforce"


class Admission:
    """Decides over starts, and learns from engines that run what the next start will need.

    ``together`` are the rules on which pools may be loaded at the same time that are in force.
    """

    def __init__(
        self, gpus: Gpus, sizer: Sizer, free_ram: Callable[[], int], facts: Facts, rules: AdmissionRules,
        together: Together = NO_RULES,
    ) -> None:  # fmt: skip
        self.together = together
        self.sleepers = Sleepers(gpus, facts)
        self._gpus, self._sizer, self._free_ram, self._facts, self._rules = gpus, sizer, free_ram, facts, rules
        self._known = Measurements()
        self._held: dict[str, tuple[int, dict[str, int]]] = {}
        gpus.watch.listen(self.learn)

    def restore(self) -> None:
        """What an earlier daemon learnt; after the state was opened."""
        rows = self._facts.facts(MEASUREMENT).get("all", {}).get("rows", [])
        self._known = Measurements.from_rows(row for row in rows if isinstance(row, list))

    async def admit(self, pool: Pool, epoch: int) -> tuple[Allocation | None, LaunchEstimator]:
        """Reserve GPUs for launch ``epoch``: what it was allocated, None when it runs on the CPU, and what it was estimated by.

        Raises NodeError (GPU_REQUIRED, GPU_UNAVAILABLE, GPU_NOT_SHARED, NOT_TOGETHER, INSUFFICIENT_VRAM, INSUFFICIENT_RAM)
        and SpecError for a mask or split that cannot be.
        """
        sizing = await self._size(pool)
        scan = await self._scan()
        # From here to the reservation nothing is awaited: two starts cannot see the same memory free.
        memory, sleeper = self._gpus.memory, self._gpus.sleeper(pool)
        accounts = memory.accounts() if sleeper is None else memory.accounts_beside(sleeper)
        found, mask = self._decide(pool, epoch, scan, sizing, memory.ledger, accounts)
        if found is not None:
            if sleeper is not None:
                memory.ledger.lend(sleeper, pool.instance_id)
            if mask is not None and not self._missing(scan):
                self._gpus.mask_gpus.remember(pool.pool_id, mask)
            memory.begin(pool.instance_id, epoch)
            self._gpus.refresh()
        return found, sizing

    def restore_launch(self, launch: LaunchRecord) -> None:
        """Reserve again what an engine has that an earlier daemon left running. Called before anything starts."""
        if launch.reserved_bytes:
            self.sleepers.restore(launch)

    async def adopt(self, launch: LaunchRecord) -> Allocation | None:
        """The GPUs that such a launch runs on, as they are now; None when it runs on none.

        One that is not listed is among them: the next scan says that it is gone. A driver that does not answer is not waited for.
        """
        if not launch.device_uuids:
            return None
        try:
            async with asyncio.timeout(ADOPTION_SCAN_S):
                scan = await self._scan()
        except TimeoutError:  # what runs there goes on, whatever the driver does
            scan = self._gpus.watch.scan
        held = {uuid: launch.reserved_bytes.get(uuid, 0) for uuid in launch.device_uuids}
        unlisted = (DeviceSnapshot(-1, uuid, reserved, 0) for uuid, reserved in held.items())
        return Allocation(in_pci_order([scan.device(unseen.uuid) or unseen for unseen in unlisted]), held)

    async def forecast(self, pool: Pool, inputs: LaunchInputs | None = None) -> tuple[str, tuple[str, ...]]:
        """On which GPUs a start would run now, and what it would hold there; also of a model that is not fetched yet, where its
        headers are known. ``inputs`` are what it will need, if they are known already. Reserves nothing. Raises as ``admit``.
        """
        sizing = await self._size(pool, ahead=True) if inputs is None else LaunchEstimator(inputs, self._known)
        scan = await self._scan()
        memory, i = self._gpus.memory, pool.instance
        accounts = memory.accounts_without(pool.instance_id) if i.vram_pending else memory.accounts()
        found, _ = self._decide(pool, i.epoch + 1, scan, sizing, memory.ledger.copy(), accounts)
        if found is None:
            return "on the CPU, as there is no GPU", sizing.estimate(0).explain()
        parts = (f"{size(found.bytes_by_device[d.uuid])} on GPU {d.label} ({d.name})" for d in found.devices)
        return " and ".join(parts), sizing.estimate_on(found.devices, found.shares).explain()

    async def room_for(self, pool: Pool) -> None:
        """Raises PoolError where there is no room for this instance beside all others that run, and where nobody knows.

        Another instance of its pool counts by what it is seen to hold where it sleeps.
        """
        sizing = await self._size(pool)
        inputs, why = sizing.inputs, None
        if self._rules.fit != "enforce":
            why = f"gpu.fit is {self._rules.fit}"
        elif not (inputs.weights_bytes or inputs.configured_bytes or inputs.divides_equally):
            why = "the size of its model is not known"
        if why is not None:
            raise NodeError(f"cannot tell whether two engines of pool {pool.pool_id} fit: {why}", pool_id=pool.pool_id)
        scan, memory, sleeper = await self._scan(), self._gpus.memory, self._gpus.sleeper(pool)
        accounts = memory.accounts() if sleeper is None else memory.accounts_beside(sleeper)
        self._decide(pool, pool.instance.epoch + 1, scan, sizing, memory.ledger.copy(), accounts)

    async def trial(self, pool: Pool) -> Callable[[Collection[InstanceId]], PoolError | None]:
        """What a start of the pool would be refused for if these other instances were gone, as of now. Raises as ``admit`` where
        that does not depend on others. One that sleeps is woken where it is.
        """
        sizing = await self._size(pool)
        scan = await self._scan()

        def objection(gone: Collection[InstanceId]) -> PoolError | None:
            memory = self._gpus.memory
            accounts, ledger = dict(memory.accounts()), memory.ledger.copy()
            for instance in gone:
                accounts = {uuid: without(account, instance) for uuid, account in accounts.items()}
                ledger.release(instance, sys.maxsize)
            try:
                if sleeps_evicted(pool.state) and (due := ledger.due(pool.instance_id)) is not None:
                    require_together(pool, self._gpus.pools(), self.together, gone)
                    return self.sleepers.barred(pool) or ledger.objection(due, accounts)
                self._decide(pool, pool.instance.epoch + 1, scan, sizing, ledger, accounts, gone)
            except PoolError as problem:
                return problem
            return None

        return objection

    def _ram_of(self, gone: Collection[InstanceId]) -> int:
        """What they were estimated to need of RAM where there is no GPU."""
        sizings = (pool.launch.sizing for pool in self._gpus.pools() if pool.instance_id in gone)
        return sum(sizing.estimate(0).host.size_bytes for sizing in sizings if sizing is not None)

    def _decide(
        self,
        pool: Pool,
        epoch: int,
        scan: DeviceScan,
        sizing: LaunchEstimator,
        ledger: Ledger,
        accounts: Mapping[str, DeviceAccount],
        gone: Collection[InstanceId] = (),
    ) -> tuple[Allocation | None, ResolvedMask | None]:
        require_together(pool, self._gpus.pools(), self.together, gone)
        if scan.no_gpus:
            self._require_cpu_allowed(pool.pool_id, scan)
            self._check_ram(pool, sizing, 0, self._ram_of(gone))
            return None, None
        require_scan(scan, pool.pool_id)
        if not all(d.unified for d in scan.devices):  # else the ledger has it all
            self._check_ram(pool, sizing, 1)
        mask = self._resolve_mask(pool, scan)
        left = {uuid: one.kept_free for uuid, one in accounts.items() if one.kept_free is not None and one.kept_free.whole}
        require_some_left(pool.pool_id, self._usable(scan) if mask is None else mask.devices, left, masked=mask is not None)
        try:
            found = allocate(sizing, self._request(pool, epoch, scan, sizing, mask, left), ledger, accounts)
        except NodeError as problem:
            problem.retriable = problem.retriable or self._may_come_back(scan)
            raise
        notices = mask.notices if mask is not None else ()
        if mask is not None and mask.mask.has_indices and (missing := self._missing(scan)):
            meant = ", ".join(f"{d.label} ({d.uuid})" for d in mask.devices)
            notices = (*notices, f"The mask {mask.mask} means GPU {meant} for this start only: {missing}, so indices may move")
        return replace(found, notices=(*notices, *found.notices)), mask

    def _usable(self, scan: DeviceScan) -> list[DeviceSnapshot]:
        return [d for d in scan.devices if d.usable and self._gpus.watch.effective_health(d.uuid).usable]

    def _may_come_back(self, scan: DeviceScan) -> bool:
        """A GPU is not there, or out of use: what never fits on the others may fit on that one."""
        out_of_use = (not (d.readable and self._gpus.watch.effective_health(d.uuid).usable) for d in scan.devices)
        return self._missing(scan) is not None or any(out_of_use)

    def _missing(self, scan: DeviceScan) -> str | None:
        """Why this is not every GPU there should be, None when it is."""
        listed = sum(d.parent_uuid is None for d in scan.devices)
        if scan.missing:
            return f"the driver lists {listed} of its {listed + scan.missing} GPUs"
        named = [
            item
            for other in self._gpus.pools()
            if (mask := other.definition.mask) is not None
            for item in mask.items
            if isinstance(item, int)
        ]
        if max(named, default=-1) >= max((d.id for d in scan.devices), default=-1) + 1:
            return f"the configuration names GPU {max(named)}, and {listed} {'is' if listed == 1 else 'are'} listed"
        return None

    async def _scan(self) -> DeviceScan:
        """A fresh one. Where the last periodic scan found no GPU at all, that one: none appears while an engine restarts."""
        return self._gpus.watch.scan if self._gpus.watch.scan.no_gpus else await self._gpus.watch.rescan()

    async def _size(self, pool: Pool, *, ahead: bool = False) -> LaunchEstimator:
        submitted = pool.submitted if isinstance(pool.submitted, PreparedEngine) else None
        inputs = await self._sizer(pool.config, submitted)
        if not (inputs.fetched or ahead):  # a download takes hours: nothing is reserved for it, and nobody makes room
            raise NodeError("cannot start it yet: its model was not fetched", code=NOT_FETCHED, pool_id=pool.pool_id)
        if self._rules.fit == "off" and not inputs.divides_equally:  # what such an engine takes is a setting, no estimate
            nothing = LaunchInputs(inputs.engine_version, inputs.model_key, inputs.settings, overhead_bytes=0)
            return LaunchEstimator(nothing, Measurements())
        return LaunchEstimator(inputs, self._known)

    def learn(self) -> None:
        """After every scan: what ready pools hold, at first as what loading took. The next start of its kind reserves that."""
        measured, new = self._gpus.memory.measured(), False
        for pool in self._gpus.pools():
            i = pool.instance
            held = measured.get(pool.instance_id)
            if (
                held is None
                or not pool.current
                or i.phase is not Phase.READY
                or i.ready_since is None
                or self._held.get(pool.pool_id) == (i.epoch, held)
            ):
                continue
            if self._gpus.watch.scan.taken_at >= i.ready_since:  # an older scan may have seen it half loaded
                new = self._observe(pool.pool_id, pool.launch, held) or new
        if new:
            self._facts.note_fact(MEASUREMENT, "all", {"rows": self._known.to_rows()})

    def _observe(self, pool_id: str, launch: Launch, held: dict[str, int]) -> bool:
        """True when that was news."""
        allocation, sizing = launch.allocation, launch.sizing
        if allocation is None or sizing is None or sizing.inputs.configured_bytes is not None or sizing.inputs.divides_equally:
            return False
        per_gpu = [held.get(d.uuid, 0) for d in allocation.devices]
        if not all(per_gpu):
            return False
        loaded = self._held.get(pool_id, (0, {}))[0] != launch.epoch
        self._held[pool_id] = launch.epoch, held
        key = sizing.key(allocation.shares, allocation.devices[0].name)
        before = self._known.get(key)
        return self._known.observe(key, per_gpu, loaded=loaded) != before

    def measured(self, pool_id: str) -> dict[str, int] | None:
        """What the pool's latest ready launch was last seen to hold, by GPU UUID; None before that was seen."""
        found = self._held.get(pool_id)
        return None if found is None else found[1]

    def forget(self, pool_id: str) -> None:
        """The pool is gone."""
        self._held.pop(pool_id, None)

    # --- inside ---

    def _require_cpu_allowed(self, pool_id: str, scan: DeviceScan) -> None:
        if not self._rules.cpu_allowed:
            why = scan.problem.message if scan.problem is not None else "the driver lists none"
            raise NodeError(
                f"GPU-only enforcement: no NVIDIA GPU was found ({why}), so pool {pool_id} is not started",
                code="GPU_REQUIRED", status=503, retriable=False, pool_id=pool_id,
                hint="install the NVIDIA driver, or use 'profile: dev' to try engines on the CPU",
            )  # fmt: skip

    def _check_ram(self, pool: Pool, sizing: LaunchEstimator, n_devices: int, freed: int = 0) -> None:
        """RAM, too, is not reserved twice: what other pools that are just loading will need is not free."""
        needed = sizing.estimate(n_devices).host.size_bytes
        if self._rules.fit != "enforce" or not needed:
            return
        loading = [p for p in self._gpus.pools() if p is not pool and p.instance.phase in (Phase.STAGING, Phase.STARTING)]
        reserved = sum(p.launch.sizing.estimate(n_devices).host.size_bytes for p in loading if p.launch.sizing is not None)
        free = max(0, self._free_ram() + freed - reserved)
        if needed > free:
            raise NodeError(
                f"cannot start pool {pool.pool_id}: it needs {size(needed)} of RAM and {size(free)} are available",
                code="INSUFFICIENT_RAM", status=503, pool_id=pool.pool_id,
                hint="end other programs, lower ctx or slots, or raise the memory limit of the daemon's container",
                details={"needed_bytes": needed, "free_bytes": free},
            )  # fmt: skip

    def _request(
        self, pool: Pool, epoch: int, scan: DeviceScan, sizing: LaunchEstimator, mask: ResolvedMask | None, left: Collection[str]
    ) -> AllocationRequest:
        usable = tuple(d for d in self._usable(scan) if d.uuid not in left)
        exclusive = pool.config is not None and pool.config.exclusive
        devices = mask.devices if mask is not None else None
        split: Split = pool.config.tensor_split if pool.config is not None else None
        if pool.config is None and devices is None:
            split = configured_split(sizing.inputs)
        elif pool.config is None and devices is not None and len(shares := sizing.inputs.shares) == len(devices) > 1:
            devices, split = in_pci_order(devices), shares  # as the engine will see them
        return AllocationRequest(
            pool.instance_id, epoch, usable, devices, split, exclusive, enforce=self._rules.fit == "enforce",
            reserved_by_masks=self._gpus.reserved_by_masks(pool),
        )  # fmt: skip

    def _resolve_mask(self, pool: Pool, scan: DeviceScan) -> ResolvedMask | None:
        """The mask and its devices, each of which may be used; None without a mask."""
        mask = pool.definition.required_mask()
        if mask is None:
            return None
        found = self._gpus.mask_gpus.resolve(pool.pool_id, mask, scan.devices)
        for device in found.devices:
            health = self._gpus.watch.effective_health(device.uuid)
            if not health.usable:
                raise objection(health, pool.pool_id)
        return found
