"""Who holds which GPU memory, and when an ended engine's memory is seen free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
        self._before: dict[str, dict[str, int]] = {}

    def accounts(self) -> dict[str, DeviceAccount]:
        """Every device's memory, divided, by UUID, as of the latest scan."""
        self.attribute()
        by_pid = {pid: owner.pool_id for pid, owner in self._owners.items()}
        running = {d.pool_id for d in self._drivers() if d.instance.has_process}
        return account(self._scan().devices, self.ledger.all(), by_pid, running)

    def attribute(self) -> None:
        """Learn from the latest scan whose processes are listed; to be done while they can still be asked."""
        listed = [p for d in self._scan().devices for p in d.processes]
        self._owners = owners(listed, self._marks(), self._owners)

    def used_by(self, pool_id: str) -> dict[str, int]:
        """What the pool's processes hold by device UUID; devices where that is unknown or nothing are left out."""
        found: dict[str, int] = {}
        for uuid, one in self.accounts().items():
            for holding in one.holdings:
                if holding.pool_id == pool_id and holding.used_bytes:
                    found[uuid] = holding.used_bytes
        return found

    def remember_before(self, pool_id: str, uuids: Iterable[str]) -> None:
        """How much was used before this launch, for where only the fall of used memory can be judged."""
        now = {d.uuid: d.vram_used_bytes for d in self._scan().devices}
        self._before[pool_id] = {uuid: now[uuid] for uuid in uuids if uuid in now}

    def forget(self, pool_id: str) -> None:
        reservation = self.ledger.get(pool_id)
        if reservation is not None:
            self.ledger.release(pool_id, reservation.epoch)
        self._before.pop(pool_id, None)

    def leftover(self, pool_id: str) -> Leftover:
        """What the latest scan still shows of the pool's ended engine, on the devices that it was promised."""
        scan, reservation = self._scan(), self.ledger.get(pool_id)
        if scan.problem is not None:
            return Leftover(f"the GPUs cannot be looked at: {scan.problem.message}")
        self.attribute()
        # A GPU that cannot be read shows what was known last: it is quarantined, and looked at anew before it is used again.
        fresh = [d for d in scan.devices if d.error is None]
        mine = [d for d in fresh if reservation is None or d.uuid in reservation.bytes_by_device]
        held = [p for d in fresh for p in d.processes if p.pid in self._owners and self._owners[p.pid].pool_id == pool_id]
        if held:
            holders = sorted({f"{who(p)}, {size(p.vram_bytes or 0)}" for p in held})
            return Leftover(f"it is held by {'; '.join(holders)}")
        blind = [d for d in mine if any(not p.certain for p in d.processes)]
        before = self._before.get(pool_id, {})
        risen = [d for d in blind if d.vram_used_bytes > before.get(d.uuid, 0) + BLIND_SLACK_BYTES]
        if risen:
            shown = ", ".join(f"GPU {d.label} {size(d.vram_used_bytes)} in use" for d in risen)
            return Leftover(f"its use has not fallen ({shown}, more than before the start)", certain=False)
        return Leftover(None, certain=not blind)

    def _marks(self) -> list[EngineMark]:
        """Engines that run, and ended ones whose memory is not yet seen free."""
        found = []
        for driver in self._drivers():
            i, process = driver.instance, driver.launch.process
            if process is not None and (i.has_process or i.phase is Phase.STOPPING or i.vram_pending):
                found.append(EngineMark(driver.pool_id, process.pid, process.nonce))
        return found
