"""Who holds which GPU memory, and when an ended engine's memory is seen free.

Three things are known, and each is one value. The ledger: what is reserved. The usage: the latest scan, divided among the
reservations and the engines of then; it is made anew when one of the three has changed, and never changed itself. And for
each launch what the GPUs were like before it and while it ran: where the driver names no process (in most containers), only
a fall of used memory to what it was before shows that an ended engine has given its memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from pool_managerd.core.gpu.accounts import DeviceAccount, Reservation, account, who
from pool_managerd.core.gpu.devices import NOT_SCANNED, DeviceScan
from pool_managerd.core.gpu.kept_free import FreeRules
from pool_managerd.core.gpu.ledger import Ledger
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.gpu.owners import EngineMark, Owner, owners
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.narration import size
from pool_managerd.supervision.gpu.yields import Yields
from pool_managerd.supervision.pool import Pool

Engines = Iterable[tuple[EngineMark, bool]]
SLACK_BYTES = 64 << 20
SLACK = 0.25
"""How far used memory may stay above what it was before the launch and still count as given back: where processes are not
attributable, who holds what is inferred from the reservations, which are rarely used to the full."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What of an ended engine is still on the GPUs. ``holder`` says so, human-readable; None when nothing is left.

    ``certain`` is false where processes are not attributable and only the fall of used memory was seen.
    """

    holder: str | None
    certain: bool = True


@dataclass(frozen=True, slots=True)
class GpuUsage:
    """Who holds which GPU memory as of ``scan``. ``accounts``: every device's memory, divided, by UUID in PCI order, by the
    ``rules`` on what is to be free.

    ``engines`` are those that run (True), and ended ones whose memory is not yet seen free; ``owners`` the listed pids
    that are theirs, kept from scan to scan, as a process that has ended can no longer be asked whose it was.
    """

    scan: DeviceScan = NOT_SCANNED
    ledger_version: int = -1
    engines: tuple[tuple[EngineMark, bool], ...] = ()
    owners: Mapping[int, Owner] = field(default_factory=dict)
    accounts: Mapping[str, DeviceAccount] = field(default_factory=dict)
    rules: tuple[int, FreeRules] = (0, FreeRules())

    def same_memory(self, scan: DeviceScan) -> bool:
        """True when nothing has changed in ``scan`` that the accounts are made of."""
        return scan is self.scan or _held(scan) == _held(self.scan)


@dataclass(frozen=True, slots=True)
class LaunchMemory:
    """What is remembered of the GPUs for one launch, by device UUID, until the next launch of its instance.

    ``foreign_before`` and ``unattributable_before`` are bytes just before it. ``inferred``: what each instance was taken to
    use while this one ran; once it has ended, its memory must not pass for another's. ``attributed``: a listed process was
    its own, so that the list can be relied on.
    """

    foreign_before: Mapping[str, int] = field(default_factory=dict)
    unattributable_before: Mapping[str, int] = field(default_factory=dict)
    inferred: Mapping[str, Mapping[InstanceId, int]] = field(default_factory=dict)
    attributed: bool = False

    def explained_bytes(self, instance_id: InstanceId, uuid: str) -> int:
        """Of the memory that may be anybody's: what was so before the launch, what was others' while it ran, and some slack."""
        inferred = self.inferred.get(uuid, {})
        others = sum(part for other, part in inferred.items() if other != instance_id)
        slack = max(SLACK_BYTES, int(inferred.get(instance_id, 0) * SLACK))
        return self.unattributable_before.get(uuid, 0) + others + slack


class GpuMemory:
    """The ledger beside the latest scan. ``pools`` gives the pools whose engines own processes, ``yields`` what is to be free."""

    def __init__(self, scan: Callable[[], DeviceScan], pools: Callable[[], Iterable[Pool]], yields: Yields) -> None:
        self.ledger = Ledger()
        self._scan, self._pools, self._yields = scan, pools, yields
        self._usage = GpuUsage()
        self._launches: dict[tuple[InstanceId, int], LaunchMemory] = {}

    def accounts(self) -> Mapping[str, DeviceAccount]:
        """Every device's memory, divided, by UUID in PCI order, as of now. The same object while nothing changed."""
        return self._now().accounts

    def accounts_without(self, instance_id: InstanceId) -> Mapping[str, DeviceAccount]:
        """As a new start of the instance will meet them: what its ended engine still holds is foreign then."""
        usage = self._now()
        owned = {pid: owner.instance_id for pid, owner in usage.owners.items() if owner.instance_id != instance_id}
        others = [reservation for reservation in self.ledger.all() if reservation.instance_id != instance_id]
        return self._account(usage.scan, others, owned, usage.engines)

    def accounts_beside(self, sleeper: InstanceId) -> Mapping[str, DeviceAccount]:
        """As one will meet them that may borrow what ``sleeper`` has reserved: it counts by what it is seen to hold."""
        usage = self._now()
        owned = {pid: owner.instance_id for pid, owner in usage.owners.items()}
        others = [reservation for reservation in self.ledger.all() if reservation.instance_id != sleeper]
        return self._account(usage.scan, others, owned, usage.engines)

    def measured(self) -> dict[InstanceId, dict[str, int]]:
        """What every instance's processes hold in bytes, by device UUID; what is only inferred is left out."""
        found: dict[InstanceId, dict[str, int]] = {}
        for uuid, one in self.accounts().items():
            for usage in one.usages:
                if usage.measured_bytes:
                    found.setdefault(usage.instance_id, {})[uuid] = usage.measured_bytes
        return found

    def begin(self, instance_id: InstanceId, epoch: int) -> None:
        """A launch is about to begin: what the GPUs are like before it is remembered, and its instance's last one forgotten."""
        accounts = self.accounts()
        self._launches = {key: known for key, known in self._launches.items() if key[0] != instance_id}
        self._launches[instance_id, epoch] = LaunchMemory(
            {uuid: one.foreign_bytes for uuid, one in accounts.items()},
            {uuid: one.unattributable_bytes - one.inferred_bytes for uuid, one in accounts.items()},
        )

    def forget(self, pool_id: str) -> None:
        """The pool is gone, with all that its instances have reserved."""
        for reservation in self.ledger.all():
            if reservation.instance_id.pool_id == pool_id:
                self.ledger.release(reservation.instance_id, reservation.epoch)
        self._launches = {key: known for key, known in self._launches.items() if key[0].pool_id != pool_id}

    def leftover(self, instance_id: InstanceId, epoch: int) -> Leftover:
        """What the latest scan still shows of a launch whose engine has ended, on the devices that it had reserved."""
        usage, reservation = self._now(), self.ledger.get(instance_id)
        if (problem := usage.scan.problem) is not None:
            hint = f" ({problem.hint})" if problem.hint else ""
            return Leftover(f"the GPUs cannot be scanned: {problem.message}{hint}")
        # A GPU with an error shows what was known last: it is quarantined, and scanned anew before it is used again.
        fresh = [d for d in usage.scan.devices if d.error is None]
        mine = [d for d in fresh if reservation is None or d.uuid in reservation.bytes_by_device]
        unreadable = next((d for d in mine if d.unreadable is not None), None)
        if unreadable is not None:
            return Leftover(f"GPU {unreadable.label} cannot be read: {unreadable.unreadable}")
        launch = instance_id, epoch
        own = {pid for pid, owner in usage.owners.items() if (owner.instance_id, owner.epoch) == launch}
        if held := [p for d in fresh for p in d.processes if p.pid in own]:
            holders = sorted({f"{who(p)}, {size(p.vram_bytes or 0)}" for p in held})
            return Leftover(f"it is held by {'; '.join(holders)}")
        known = self._launches.get(launch, LaunchMemory())
        if known.attributed:
            return Leftover(None)
        # Its processes were never among those listed. Perhaps it never used a GPU; perhaps they are not attributable here.
        accounts = usage.accounts
        risen = [d for d in mine if accounts[d.uuid].unattributable_bytes > known.explained_bytes(instance_id, d.uuid)]
        if risen:
            shown = ", ".join(f"GPU {d.label} {size(d.vram_used_bytes)} in use" for d in risen)
            return Leftover(f"its use has not fallen ({shown}, more than before the start)", certain=False)
        return Leftover(None, certain=all(accounts[d.uuid].attributable for d in mine))

    # --- inside ---

    def _now(self) -> GpuUsage:
        """Made anew when the scan, the ledger or the engines have changed."""
        scan, last = self._scan(), self._usage
        engines = self._engines() if scan.devices else ()  # nobody holds anything where there is nothing
        known, rules = (self.ledger.version, engines), (self._yields.version, self._yields.rules())
        if known == (last.ledger_version, last.engines) and rules == last.rules and last.same_memory(scan):
            if scan is not last.scan:
                self._usage = replace(last, scan=scan)
            return self._usage
        owned = owners((p for d in scan.devices for p in d.processes), (mark for mark, _ in engines), last.owners)
        by_pid = {pid: owner.instance_id for pid, owner in owned.items()}
        accounts = self._account(scan, self.ledger.all(), by_pid, engines)
        self._usage = GpuUsage(scan, self.ledger.version, engines, owned, accounts, rules)
        self._remember(self._usage)
        return self._usage

    def _account(
        self, scan: DeviceScan, reserved: Iterable[Reservation], owned: Mapping[int, InstanceId], engines: Engines
    ) -> dict[str, DeviceAccount]:
        devices = in_pci_order(scan.devices)
        return account(devices, reserved, owned, self._running(engines), self._yields.kept_free(devices, owned.keys()))

    def _remember(self, usage: GpuUsage) -> None:
        """What must still be known of each launch when its engine has ended."""
        for launch in {(owner.instance_id, owner.epoch) for owner in usage.owners.values()}:
            known = self._launches.get(launch, LaunchMemory())
            if not known.attributed:
                self._launches[launch] = replace(known, attributed=True)
        found = {
            uuid: {u.instance_id: u.inferred_bytes for u in one.usages if u.inferred} for uuid, one in usage.accounts.items()
        }
        inferred = {uuid: parts for uuid, parts in found.items() if parts}
        for mark, runs in usage.engines:
            known = self._launches.get((mark.instance_id, mark.epoch), LaunchMemory())
            if runs and known.inferred != inferred:
                self._launches[mark.instance_id, mark.epoch] = replace(known, inferred=inferred)

    def _running(self, engines: Engines) -> dict[InstanceId, Mapping[str, int]]:
        """The instances whose engines run, with the foreign bytes on each device before their launch."""
        none = LaunchMemory()
        return {
            mark.instance_id: self._launches.get((mark.instance_id, mark.epoch), none).foreign_before
            for mark, runs in engines
            if runs
        }

    def _engines(self) -> tuple[tuple[EngineMark, bool], ...]:
        return tuple(
            (EngineMark(pool.instance_id, i.epoch, process.pid, process.nonce, process.shim_pid), i.has_process)
            for pool in self._pools()
            if (process := pool.launch.process) is not None
            and ((i := pool.instance).has_process or i.phase is Phase.STOPPING or i.vram_pending)
        )


def _held(scan: DeviceScan) -> tuple[object, ...]:
    return tuple((d.uuid, d.vram_free_bytes, d.processes, d.readable, d.mig_enabled) for d in scan.devices)
