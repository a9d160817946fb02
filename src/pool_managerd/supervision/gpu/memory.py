"""Who holds which GPU memory, and when an ended engine's memory is seen free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.gpu.ledger import DeviceAccount, Ledger, account, who
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.gpu.owners import EngineMark, Owner, owners
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.narration import size

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver

Engine = tuple[InstanceId, int, int, str, int, bool]


def instance_of(driver: PoolDriver) -> InstanceId:
    """The instance whose launch the pool's GPUs are about."""
    return InstanceId(driver.pool_id, driver.instance.replica_id)


BLIND_SLACK_BYTES = 64 << 20
BLIND_SLACK = 0.25
"""How far used memory may stay above what it was before the launch and still count as given back: guesses who holds what,
where pids cannot be matched, go by the promises, which are rarely used to the full."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """What of an ended engine is still on the GPUs. ``holder`` says so to people, None when nothing is left.

    ``certain`` is false where pids cannot be matched and only the fall of used memory was judged.
    """

    holder: str | None
    certain: bool = True


class GpuMemory:
    """The ledger beside the latest scan. ``drivers`` gives the pools whose engines own processes."""

    def __init__(self, scan: Callable[[], DeviceScan], drivers: Callable[[], Iterable[PoolDriver]]) -> None:
        self.ledger = Ledger()
        self._scan, self._drivers = scan, drivers
        self._owners: dict[int, Owner] = {}
        self._foreign_before: dict[InstanceId, dict[str, int]] = {}
        self._unmatched_before: dict[InstanceId, dict[str, int]] = {}
        self._guessed: dict[InstanceId, dict[str, dict[InstanceId, int]]] = {}
        self._matched: set[InstanceId] = set()
        self._looked_at: DeviceScan | None = None
        self._held: object = None
        self._made: tuple[object, dict[str, DeviceAccount]] | None = None

    def accounts(self) -> dict[str, DeviceAccount]:
        """Every device's memory, divided, by UUID in PCI order, as of the latest scan. The same object while nothing changed."""
        scan, engines = self._scan(), self._engines()
        if scan is not self._looked_at:
            self._looked_at, before = scan, self._held
            self._held = tuple((d.uuid, d.vram_free_bytes, d.processes, d.readable, d.mig_enabled) for d in scan.devices)
            if self._held != before:
                self._made = None
        key = (self.ledger.version, engines)
        if self._made is None or self._made[0] != key:
            marks = [EngineMark(*engine[:5]) for engine in engines]
            running = self._running(engines)
            self._owners = owners((p for d in scan.devices for p in d.processes), marks, self._owners)
            by_pid = {pid: owner.instance_id for pid, owner in self._owners.items()}
            self._matched.update(by_pid.values())
            self._made = key, account(in_pci_order(scan.devices), self.ledger.all(), by_pid, running)
            self._remember_guesses(running, self._made[1])
        return self._made[1]

    def accounts_without(self, instance_id: InstanceId) -> dict[str, DeviceAccount]:
        """As a new start of the pool will meet them: what its ended engine still holds is a stranger's then."""
        self.accounts()
        owned = {pid: owner.instance_id for pid, owner in self._owners.items() if owner.instance_id != instance_id}
        others = [reservation for reservation in self.ledger.all() if reservation.instance_id != instance_id]
        return account(in_pci_order(self._scan().devices), others, owned, self._running(self._engines()))

    def _remember_guesses(self, running: Iterable[InstanceId], accounts: Mapping[str, DeviceAccount]) -> None:
        """What each pool was taken to use while one ran: once its engine is dead, its memory must not pass for another's."""
        found = {uuid: {u.instance_id: u.inferred_bytes for u in one.usages if u.inferred} for uuid, one in accounts.items()}
        guesses = {uuid: by_pool for uuid, by_pool in found.items() if by_pool}
        for instance_id in running:
            if guesses or instance_id in self._guessed:
                self._guessed[instance_id] = guesses

    def used(self) -> dict[InstanceId, dict[str, int]]:
        """What every instance's processes hold, by instance and device UUID; what is only guessed is left out."""
        found: dict[InstanceId, dict[str, int]] = {}
        for uuid, one in self.accounts().items():
            for usage in one.usages:
                if usage.measured_bytes:
                    found.setdefault(usage.instance_id, {})[uuid] = usage.measured_bytes
        return found

    def remember_before(self, instance_id: InstanceId) -> None:
        """How much was foreign before this launch, for where our processes cannot be told from others'."""
        self._matched.discard(instance_id)
        self._guessed.pop(instance_id, None)
        accounts = self.accounts()
        self._foreign_before[instance_id] = {uuid: one.foreign_bytes for uuid, one in accounts.items()}
        self._unmatched_before[instance_id] = {
            uuid: one.unattributable_bytes - one.inferred_bytes for uuid, one in accounts.items()
        }

    def forget(self, instance_id: InstanceId) -> None:
        reservation = self.ledger.get(instance_id)
        if reservation is not None:
            self.ledger.release(instance_id, reservation.epoch)
        for known in (self._foreign_before, self._unmatched_before, self._guessed):
            known.pop(instance_id, None)
        self._matched.discard(instance_id)

    def leftover(self, instance_id: InstanceId) -> Leftover:
        """What the latest scan still shows of the pool's ended engine, on the devices that it was promised."""
        scan, reservation = self._scan(), self.ledger.get(instance_id)
        if scan.problem is not None:
            hint = f" ({scan.problem.hint})" if scan.problem.hint else ""
            return Leftover(f"the GPUs cannot be scanned: {scan.problem.message}{hint}")
        accounts = self.accounts()
        # A GPU that cannot be read shows what was known last: it is quarantined, and looked at anew before it is used again.
        fresh = [d for d in scan.devices if d.error is None]
        mine = [d for d in fresh if reservation is None or d.uuid in reservation.bytes_by_device]
        unreadable = next((d for d in mine if d.unreadable is not None), None)
        if unreadable is not None:
            return Leftover(f"GPU {unreadable.label} cannot be read: {unreadable.unreadable}")
        held = [p for d in fresh for p in d.processes if p.pid in self._owners and self._owners[p.pid].instance_id == instance_id]
        if held:
            holders = sorted({f"{who(p)}, {size(p.vram_bytes or 0)}" for p in held})
            return Leftover(f"it is held by {'; '.join(holders)}")
        if instance_id in self._matched:
            return Leftover(None)
        # Its processes were never among those listed. Perhaps it never used a GPU; perhaps they cannot be matched here.
        risen = [d for d in mine if accounts[d.uuid].unattributable_bytes > self._explained_bytes(instance_id, d.uuid)]
        if risen:
            shown = ", ".join(f"GPU {d.label} {size(d.vram_used_bytes)} in use" for d in risen)
            return Leftover(f"its use has not fallen ({shown}, more than before the start)", certain=False)
        return Leftover(None, certain=all(accounts[d.uuid].attributable for d in mine))

    def _explained_bytes(self, instance_id: InstanceId, uuid: str) -> int:
        """Of the memory that may be anybody's: what was so before the launch, what was others' while it ran, and some slack."""
        guessed = dict(self._guessed.get(instance_id, {}).get(uuid, {}))
        own = guessed.pop(instance_id, 0)
        before = self._unmatched_before.get(instance_id, {}).get(uuid, 0)
        return before + sum(guessed.values()) + max(BLIND_SLACK_BYTES, int(own * BLIND_SLACK))

    def _running(self, engines: Iterable[Engine]) -> dict[InstanceId, dict[str, int]]:
        """The pools whose engines run, with what was foreign on each device before their launch."""
        return {key: self._foreign_before.get(key, {}) for key, *_, runs in engines if runs}

    def _engines(self) -> tuple[Engine, ...]:
        """Instance, epoch, pid, nonce and shim of engines that run (last: True), and of ended ones whose memory is yet held."""
        return tuple(
            (instance_of(driver), i.epoch, process.pid, process.nonce, process.shim_pid, i.has_process)
            for driver in self._drivers()
            if (process := driver.launch.process) is not None
            and ((i := driver.instance).has_process or i.phase is Phase.STOPPING or i.vram_pending)
        )
