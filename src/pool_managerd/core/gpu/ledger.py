"""Who holds, or has been promised, how much of which GPU (DESIGN §3, §8 rule 2).

VRAM is promised before it is used. What others hold counts; what a pool holds beyond its promise counts too. So for
every GPU: what the driver keeps + what foreigners hold + what pools are promised ≤ what there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pool_managerd.core.gpu.devices import DeviceProcess, DeviceSnapshot
from pool_managerd.core.gpu.masks import cuda_environment, cuda_visible_devices
from pool_managerd.core.narration import size
from pool_managerd.errors import NodeError

SOME_PROCESS_BYTES = 16 << 20
"""Used memory that no process explains is foreign from here on; below it is the driver's rounding."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What launch ``epoch`` of a pool is promised, in bytes by device UUID. ``exclusive``: it shares with nobody."""

    pool_id: str
    epoch: int
    bytes_by_device: Mapping[str, int]
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """The devices that one launch was given, in PCI order, and its promise on each in bytes by UUID.

    ``shares`` say which part of the model each of several devices carries. The engine is told them, as what it would
    choose by itself is not what was promised. ``notices`` are for people.
    """

    devices: tuple[DeviceSnapshot, ...]
    bytes_by_device: Mapping[str, int]
    shares: tuple[float, ...] = ()
    notices: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Shows an engine these devices alone, by UUID."""
        return cuda_environment(cuda_visible_devices(self.devices))


@dataclass(frozen=True, slots=True)
class Holding:
    """One pool's part of one device. ``used_bytes`` is None where the driver does not tell, ``guessed`` where its pids cannot
    be matched and it is taken to use what it was promised."""

    pool_id: str
    reserved_bytes: int
    used_bytes: int | None
    pids: tuple[int, ...] = ()
    exclusive: bool = False
    guessed: bool = False

    @property
    def measured_bytes(self) -> int | None:
        """What the driver says of its processes; None where it does not."""
        return None if self.guessed else self.used_bytes

    @property
    def counted_bytes(self) -> int:
        return max(self.reserved_bytes, self.used_bytes or 0)


@dataclass(frozen=True, slots=True)
class DeviceAccount:
    """One device's memory, divided: the driver's, pools', foreigners', and what may still be reserved."""

    device: DeviceSnapshot
    holdings: tuple[Holding, ...] = ()
    foreign: tuple[DeviceProcess, ...] = ()
    foreign_bytes: int = 0

    @property
    def available_bytes(self) -> int:
        """What may still be reserved."""
        d = self.device
        taken = d.vram_reserved_bytes + self.foreign_bytes + sum(h.counted_bytes for h in self.holdings)
        return max(0, d.vram_total_bytes - taken)

    @property
    def unnamed_bytes(self) -> int:
        """What no listed process explains."""
        return max(0, self.foreign_bytes - sum(p.vram_bytes or 0 for p in self.foreign))

    @property
    def unmatched_bytes(self) -> int:
        """What may be anybody's: held by no process that is listed with a pid of ours or of a known stranger."""
        guessed = sum(h.used_bytes or 0 for h in self.holdings if h.guessed)
        named = sum(p.vram_bytes or 0 for p in self.foreign if p.certain)
        return max(0, self.foreign_bytes + guessed - named)

    @property
    def blind(self) -> bool:
        """True where memory is held and no pid tells by whom, as in most containers."""
        unsure = any(not p.certain for p in self.device.processes)
        return unsure or (self.unmatched_bytes >= SOME_PROCESS_BYTES and not self.device.processes)

    def holders(self) -> str:
        """Who has the rest, for people."""
        parts = [f"pool {h.pool_id} {size(h.counted_bytes)}" for h in self.holdings]
        parts += [f"{who(p)} {size(p.vram_bytes)}" if p.vram_bytes is not None else who(p) for p in self.foreign]
        if self.unnamed_bytes >= SOME_PROCESS_BYTES:
            parts.append(f"processes that cannot be seen {size(self.unnamed_bytes)}")
        if self.device.vram_reserved_bytes:
            parts.append(f"the driver {size(self.device.vram_reserved_bytes)}")
        return ", ".join(parts) or "nobody"


@dataclass
class Ledger:
    """The promises of this node. Asking and promising are one call: two starts cannot both pass. ``version`` counts changes."""

    _by_pool: dict[str, Reservation] = field(default_factory=dict)
    version: int = 0

    def copy(self) -> Ledger:
        """Another ledger with the same promises, to try things on."""
        return Ledger(dict(self._by_pool))

    def get(self, pool_id: str) -> Reservation | None:
        return self._by_pool.get(pool_id)

    def all(self) -> list[Reservation]:
        return [self._by_pool[pool_id] for pool_id in sorted(self._by_pool)]

    def reserve(self, wanted: Reservation, accounts: Mapping[str, DeviceAccount]) -> None:
        """Promise it, replacing what the same pool was promised before.

        ``accounts`` (by UUID, from ``account``) must be made of this ledger and a fresh scan. Raises NodeError
        INSUFFICIENT_VRAM with needed, free and who holds the rest; GPU_NOT_SHARED when somebody is exclusive there.
        """
        if (error := self.objection(wanted, accounts)) is not None:
            raise error
        self._by_pool[wanted.pool_id] = wanted
        self.version += 1

    def objection(self, wanted: Reservation, accounts: Mapping[str, DeviceAccount]) -> NodeError | None:
        """The error that ``reserve`` would raise now; asking changes nothing."""
        for uuid, needed in wanted.bytes_by_device.items():
            here = without(accounts[uuid], wanted.pool_id)
            near = [without(a, wanted.pool_id) for a in accounts.values() if board(a.device) == board(here.device)]
            if (shy := _sharing_objection(wanted, here.device, near)) is not None:
                return shy
            if needed > here.available_bytes:
                return insufficient(wanted.pool_id, here.device, needed, here.available_bytes, here.holders())
        return None

    def release(self, pool_id: str, epoch: int) -> bool:
        """Give a launch's promise back; a newer launch's stays. True when there was one."""
        found = self._by_pool.get(pool_id)
        if found is None or found.epoch > epoch:
            return False
        del self._by_pool[pool_id]
        self.version += 1
        return True


def account(
    devices: Sequence[DeviceSnapshot],
    reservations: Iterable[Reservation],
    owners: Mapping[int, str],
    running: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, DeviceAccount]:
    """Every device's memory, divided, by UUID. ``owners`` says which pool a pid belongs to.

    ``running``: the pools whose engines run, with what was foreign on each device just before their launch.
    """
    promised = list(reservations)
    return {d.uuid: _account_one(d, promised, owners, running or {}) for d in devices}


def _account_one(
    d: DeviceSnapshot, promised: list[Reservation], owners: Mapping[int, str], running: Mapping[str, Mapping[str, int]]
) -> DeviceAccount:
    here = [r for r in promised if d.uuid in r.bytes_by_device]
    if d.error is not None or d.mig_enabled:  # its figures are old, or those of its instances
        return DeviceAccount(d, tuple(Holding(r.pool_id, r.bytes_by_device[d.uuid], None, (), r.exclusive) for r in here))
    ours: dict[str, list[DeviceProcess]] = {}
    foreign: list[DeviceProcess] = []
    for process in d.processes:
        owner = owners.get(process.pid) if process.certain else None
        foreign.append(process) if owner is None else ours.setdefault(owner, []).append(process)
    used = {pool: _sum(found) for pool, found in ours.items()}
    rest = max(0, d.vram_used_bytes - sum(b or 0 for b in used.values()))
    guesses = _guesses(d, [r for r in here if used.get(r.pool_id) is None and r.pool_id in running], running, rest)
    reserved = {r.pool_id: r for r in here}
    holdings = tuple(
        Holding(
            pool_id, reserved[pool_id].bytes_by_device[d.uuid] if pool_id in reserved else 0,
            guesses.get(pool_id, used.get(pool_id)), tuple(sorted(p.pid for p in ours.get(pool_id, ()))),
            pool_id in reserved and reserved[pool_id].exclusive, pool_id in guesses,
        )
        for pool_id in sorted(reserved.keys() | ours.keys())
    )  # fmt: skip
    return DeviceAccount(d, holdings, tuple(sorted(foreign, key=lambda p: p.pid)), rest - sum(guesses.values()))


def _guesses(
    d: DeviceSnapshot, unmatched: list[Reservation], running: Mapping[str, Mapping[str, int]], rest: int
) -> dict[str, int]:
    """Where the driver's list does not show our engines (in a container, say): what of the unexplained ``rest`` is theirs.

    Never what was foreign before they were launched, never more than the promise. A guess counts no less
    than a promise, so it cannot make room; it only keeps our own memory from counting twice.
    """
    if rest < SOME_PROCESS_BYTES or not unmatched:
        return {}
    left = max(0, rest - min(running[r.pool_id].get(d.uuid, 0) for r in unmatched))
    found: dict[str, int] = {}
    for r in sorted(unmatched, key=lambda r: (running[r.pool_id].get(d.uuid, 0), r.pool_id)):
        found[r.pool_id] = min(left, r.bytes_by_device[d.uuid])
        left -= found[r.pool_id]
    return found


def without(account: DeviceAccount, pool_id: str) -> DeviceAccount:
    """The same device as others see it: without what ``pool_id`` holds."""
    left = tuple(h for h in account.holdings if h.pool_id != pool_id)
    return DeviceAccount(account.device, left, account.foreign, account.foreign_bytes)


def board(device: DeviceSnapshot) -> str:
    """The piece of hardware: the siblings of a MIG instance are on the same one."""
    return device.parent_uuid or device.uuid


def _sharing_objection(wanted: Reservation, device: DeviceSnapshot, near: Sequence[DeviceAccount]) -> NodeError | None:
    """Exclusive means the whole piece of hardware. ``near`` is everything on it but the pool's own."""
    others = [h for a in near for h in a.holdings]
    foreign = [p for a in near for p in a.foreign if p.kind == "compute"]
    shy = next((h for h in others if h.exclusive), None)
    if shy is not None:
        return _not_shared(wanted.pool_id, device, f"pool {shy.pool_id} is exclusive there", "use another GPU, or stop it")
    if wanted.exclusive and (others or foreign):
        whom = f"pool {others[0].pool_id}" if others else who(foreign[0])
        return _not_shared(wanted.pool_id, device, f"the pool is exclusive and {whom} is there", "stop it, or use another GPU")
    return None


def who(process: DeviceProcess) -> str:
    """``pid 4711 (python)``; a pid of another namespace is said to be one."""
    name = f" ({process.name})" if process.name else ""
    if process.ended:
        return f"pid {process.pid}{name}, which has ended and did not give it back"
    return f"pid {process.pid}{name}" if process.certain else f"driver's pid {process.pid}{name}"


def insufficient(pool_id: str, device: DeviceSnapshot, needed: int, free: int, holders: str) -> NodeError:
    """The error of a start that does not fit, with what stands in its way."""
    start, where = f"cannot start pool {pool_id}: it needs {size(needed)} on", f"GPU {device.label} ({device.name})"
    usable = device.vram_total_bytes - device.vram_reserved_bytes
    if needed > usable:
        text = f"{start} one GPU, and {where} has {size(usable)} when it is empty"
        hint = "set `tensor_split: auto` to use several GPUs, lower ctx or slots, or use a smaller quantisation"
    else:
        total = size(device.vram_total_bytes)
        text = f"{start} {where}, where {size(free)} of {total} may still be reserved; the rest is held by {holders}"
        hint = "free memory there, use another GPU, or lower ctx or slots"
    return NodeError(
        text, code="INSUFFICIENT_VRAM", status=503, pool_id=pool_id, hint=hint,
        details={"device": device.label, "uuid": device.uuid, "needed_bytes": needed, "free_bytes": free},
    )  # fmt: skip


def _not_shared(pool_id: str, device: DeviceSnapshot, why: str, hint: str) -> NodeError:
    return NodeError(
        f"cannot start pool {pool_id} on GPU {device.label}: {why}", code="GPU_NOT_SHARED", status=503, pool_id=pool_id, hint=hint
    )


def _sum(processes: list[DeviceProcess]) -> int | None:
    known = [p.vram_bytes for p in processes if p.vram_bytes is not None]
    return sum(known) if known else None
