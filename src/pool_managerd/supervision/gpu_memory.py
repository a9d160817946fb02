"""Who holds which GPU memory, and when an ended engine's memory is seen free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pool_managerd.core.device_masks import in_pci_order
from pool_managerd.core.devices import DeviceScan
from pool_managerd.core.gpu_owners import EngineMark, Owner, owners
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.narration import size
from pool_managerd.core.reservations import DeviceAccount, Ledger, account, who

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver

BLIND_SLACK_BYTES = 64 << 20
"""How far used memory may stay above what it was before the launch and still count as given back."""


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
        self._foreign_before: dict[str, dict[str, int]] = {}
        self._matched: set[str] = set()
        self._looked_at: DeviceScan | None = None
        self._held: object = None
        self._made: tuple[object, dict[str, DeviceAccount]] | None = None

    def accounts(self) -> dict[str, DeviceAccount]:
        """Every device's memory, divided, by UUID in PCI order, as of the latest scan. The same object while nothing changed."""
        scan, marks = self._scan(), self._marks()
        if scan is not self._looked_at:
            self._looked_at, before = scan, self._held
            self._held = tuple((d.uuid, d.vram_free_bytes, d.processes, d.error, d.mig_enabled) for d in scan.devices)
            if self._held != before:
                self._made = None
        running = {d.pool_id: self._foreign_before.get(d.pool_id, {}) for d in self._drivers() if d.instance.has_process}
        key = (self.ledger.version, tuple(marks), tuple(running))
        if self._made is None or self._made[0] != key:
            self._owners = owners((p for d in scan.devices for p in d.processes), marks, self._owners)
            by_pid = {pid: owner.pool_id for pid, owner in self._owners.items()}
            self._matched.update(by_pid.values())
            self._made = key, account(in_pci_order(scan.devices), self.ledger.all(), by_pid, running)
        return self._made[1]

    def used(self) -> dict[str, dict[str, int]]:
        """What every pool's processes hold, by pool and device UUID; what is only guessed is left out."""
        found: dict[str, dict[str, int]] = {}
        for uuid, one in self.accounts().items():
            for holding in one.holdings:
                if holding.used_bytes and not holding.guessed:
                    found.setdefault(holding.pool_id, {})[uuid] = holding.used_bytes
        return found

    def remember_before(self, pool_id: str) -> None:
        """How much was foreign before this launch, for where our processes cannot be told from others'."""
        self._matched.discard(pool_id)
        self._foreign_before[pool_id] = {uuid: one.foreign_bytes for uuid, one in self.accounts().items()}

    def forget(self, pool_id: str) -> None:
        reservation = self.ledger.get(pool_id)
        if reservation is not None:
            self.ledger.release(pool_id, reservation.epoch)
        self._foreign_before.pop(pool_id, None)
        self._matched.discard(pool_id)

    def leftover(self, pool_id: str) -> Leftover:
        """What the latest scan still shows of the pool's ended engine, on the devices that it was promised."""
        scan, reservation = self._scan(), self.ledger.get(pool_id)
        if scan.problem is not None:
            return Leftover(f"the GPUs cannot be looked at: {scan.problem.message}")
        self.accounts()
        # A GPU that cannot be read shows what was known last: it is quarantined, and looked at anew before it is used again.
        fresh = [d for d in scan.devices if d.error is None]
        mine = [d for d in fresh if reservation is None or d.uuid in reservation.bytes_by_device]
        held = [p for d in fresh for p in d.processes if p.pid in self._owners and self._owners[p.pid].pool_id == pool_id]
        if held:
            holders = sorted({f"{who(p)}, {size(p.vram_bytes or 0)}" for p in held})
            return Leftover(f"it is held by {'; '.join(holders)}")
        if pool_id in self._matched:
            return Leftover(None)
        # Its processes were never among those listed. Perhaps it never used a GPU; perhaps they cannot be matched here.
        risen = [d for d in mine if d.vram_used_bytes > self._explained_bytes(pool_id, d.uuid) + BLIND_SLACK_BYTES]
        if risen:
            shown = ", ".join(f"GPU {d.label} {size(d.vram_used_bytes)} in use" for d in risen)
            return Leftover(f"its use has not fallen ({shown}, more than before the start)", certain=False)
        unnamed = any(not p.certain for d in mine for p in d.processes)
        return Leftover(None, certain=not unnamed)

    def _explained_bytes(self, pool_id: str, uuid: str) -> int:
        """What was foreign before the launch, and what others are promised."""
        others = (r for r in self.ledger.all() if r.pool_id != pool_id)
        return self._foreign_before.get(pool_id, {}).get(uuid, 0) + sum(r.bytes_by_device.get(uuid, 0) for r in others)

    def _marks(self) -> list[EngineMark]:
        """Engines that run, and ended ones whose memory is not yet seen free."""
        found = []
        for driver in self._drivers():
            i, process = driver.instance, driver.launch.process
            if process is not None and (i.has_process or i.phase is Phase.STOPPING or i.vram_pending):
                found.append(EngineMark(driver.pool_id, process.pid, process.nonce))
        return found
