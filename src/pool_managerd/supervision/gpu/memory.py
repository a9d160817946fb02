"""Who holds which GPU memory, and when an ended engine's memory is seen free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.gpu.ledger import DeviceAccount, Ledger, account, who
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.gpu.owners import EngineMark, Owner, owners
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.narration import size
from pool_managerd.supervision.pool import Pool

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
    """The ledger beside the latest scan. ``pools`` gives the pools whose engines own processes."""

    def __init__(self, scan: Callable[[], DeviceScan], pools: Callable[[], Iterable[Pool]]) -> None:
        self.ledger = Ledger()
        self._scan, self._pools = scan, pools
        self._owners: dict[int, Owner] = {}
        self._foreign_before: dict[str, dict[str, int]] = {}
        self._unmatched_before: dict[str, dict[str, int]] = {}
        self._guessed: dict[str, dict[str, dict[str, int]]] = {}
        self._matched: set[str] = set()
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
            marks = [EngineMark(*engine[:4]) for engine in engines]
            running = self._running(engines)
            self._owners = owners((p for d in scan.devices for p in d.processes), marks, self._owners)
            by_pid = {pid: owner.pool_id for pid, owner in self._owners.items()}
            self._matched.update(by_pid.values())
            self._made = key, account(in_pci_order(scan.devices), self.ledger.all(), by_pid, running)
            self._remember_guesses(running, self._made[1])
        return self._made[1]

    def accounts_without(self, pool_id: str) -> dict[str, DeviceAccount]:
        """As a new start of the pool will meet them: what its ended engine still holds is a stranger's then."""
        self.accounts()
        owned = {pid: owner.pool_id for pid, owner in self._owners.items() if owner.pool_id != pool_id}
        others = [reservation for reservation in self.ledger.all() if reservation.pool_id != pool_id]
        return account(in_pci_order(self._scan().devices), others, owned, self._running(self._engines()))

    def _remember_guesses(self, running: Iterable[str], accounts: Mapping[str, DeviceAccount]) -> None:
        """What each pool was taken to use while one ran: once its engine is dead, its memory must not pass for another's."""
        found = {uuid: {h.pool_id: h.used_bytes or 0 for h in one.holdings if h.guessed} for uuid, one in accounts.items()}
        guesses = {uuid: by_pool for uuid, by_pool in found.items() if by_pool}
        for pool_id in running:
            if guesses or pool_id in self._guessed:
                self._guessed[pool_id] = guesses

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
        self._guessed.pop(pool_id, None)
        accounts = self.accounts()
        self._foreign_before[pool_id] = {uuid: one.foreign_bytes for uuid, one in accounts.items()}
        self._unmatched_before[pool_id] = {
            uuid: one.unmatched_bytes - sum(h.used_bytes or 0 for h in one.holdings if h.guessed)
            for uuid, one in accounts.items()
        }

    def forget(self, pool_id: str) -> None:
        reservation = self.ledger.get(pool_id)
        if reservation is not None:
            self.ledger.release(pool_id, reservation.epoch)
        for known in (self._foreign_before, self._unmatched_before, self._guessed):
            known.pop(pool_id, None)
        self._matched.discard(pool_id)

    def leftover(self, pool_id: str) -> Leftover:
        """What the latest scan still shows of the pool's ended engine, on the devices that it was promised."""
        scan, reservation = self._scan(), self.ledger.get(pool_id)
        if scan.problem is not None:
            hint = f" ({scan.problem.hint})" if scan.problem.hint else ""
            return Leftover(f"the GPUs cannot be scanned: {scan.problem.message}{hint}")
        accounts = self.accounts()
        # A GPU that cannot be read shows what was known last: it is quarantined, and looked at anew before it is used again.
        fresh = [d for d in scan.devices if d.error is None]
        mine = [d for d in fresh if reservation is None or d.uuid in reservation.bytes_by_device]
        unclear = next((d for d in mine if d.unclear is not None), None)
        if unclear is not None:
            return Leftover(f"GPU {unclear.label} cannot be read: {unclear.unclear}")
        held = [p for d in fresh for p in d.processes if p.pid in self._owners and self._owners[p.pid].pool_id == pool_id]
        if held:
            holders = sorted({f"{who(p)}, {size(p.vram_bytes or 0)}" for p in held})
            return Leftover(f"it is held by {'; '.join(holders)}")
        if pool_id in self._matched:
            return Leftover(None)
        # Its processes were never among those listed. Perhaps it never used a GPU; perhaps they cannot be matched here.
        risen = [d for d in mine if accounts[d.uuid].unmatched_bytes > self._explained_bytes(pool_id, d.uuid)]
        if risen:
            shown = ", ".join(f"GPU {d.label} {size(d.vram_used_bytes)} in use" for d in risen)
            return Leftover(f"its use has not fallen ({shown}, more than before the start)", certain=False)
        return Leftover(None, certain=not any(accounts[d.uuid].blind for d in mine))

    def _explained_bytes(self, pool_id: str, uuid: str) -> int:
        """Of the memory that may be anybody's: what was so before the launch, what was others' while it ran, and some slack."""
        guessed = dict(self._guessed.get(pool_id, {}).get(uuid, {}))
        own = guessed.pop(pool_id, 0)
        before = self._unmatched_before.get(pool_id, {}).get(uuid, 0)
        return before + sum(guessed.values()) + max(BLIND_SLACK_BYTES, int(own * BLIND_SLACK))

    def _running(self, engines: Iterable[tuple[str, int, str, int, bool]]) -> dict[str, dict[str, int]]:
        """The pools whose engines run, with what was foreign on each device before their launch."""
        return {pool_id: self._foreign_before.get(pool_id, {}) for pool_id, *_, runs in engines if runs}

    def _engines(self) -> tuple[tuple[str, int, str, int, bool], ...]:
        """Pool, pid, nonce and shim of engines that run (last: True), and of ended ones whose memory is not yet seen free."""
        return tuple(
            (pool.pool_id, process.pid, process.nonce, process.shim_pid, i.has_process)
            for pool in self._pools()
            if (process := pool.launch.process) is not None
            and ((i := pool.instance).has_process or i.phase is Phase.STOPPING or i.vram_pending)
        )
