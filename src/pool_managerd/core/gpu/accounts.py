"""Every GPU's memory, divided: the driver's, instances', unmanaged processes', what is kept free, and what may be reserved.

VRAM is reserved before it is used. What unmanaged processes hold counts; what an instance holds beyond its reservation
counts too. So for every GPU: what the driver keeps + what unmanaged processes hold + what is reserved ≤ what there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pool_managerd.core.gpu.devices import DeviceProcess, DeviceSnapshot
from pool_managerd.core.gpu.kept_free import KeptFree
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.narration import size

SOME_PROCESS_BYTES = 16 << 20
"""Used memory that no process explains is somebody's from here on; below it is the driver's rounding."""

Running = Mapping[InstanceId, Mapping[str, int]]
"""The instances whose engines run, with the foreign bytes on each device (by UUID) just before their launch."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """What launch ``epoch`` of an instance may use, in bytes by device UUID.

    ``exclusive``: it shares with no other pool, but with another replica of its own.
    """

    instance_id: InstanceId
    epoch: int
    bytes_by_device: Mapping[str, int]
    exclusive: bool = False


@dataclass(frozen=True, slots=True)
class InstanceUsage:
    """One instance's part of one device. ``used_bytes`` is None where the driver does not tell; ``inferred`` where its pids
    cannot be attributed and it is taken to use what it has reserved."""

    instance_id: InstanceId
    reserved_bytes: int
    used_bytes: int | None
    pids: tuple[int, ...] = ()
    exclusive: bool = False
    inferred: bool = False

    @property
    def measured_bytes(self) -> int | None:
        """What the driver says of its processes; None where it does not."""
        return None if self.inferred else self.used_bytes

    @property
    def inferred_bytes(self) -> int:
        """What it is taken to use where the driver does not tell."""
        return (self.used_bytes or 0) if self.inferred else 0

    @property
    def counted_bytes(self) -> int:
        return max(self.reserved_bytes, self.used_bytes or 0)


@dataclass(frozen=True, slots=True)
class DeviceAccount:
    """One device's memory, divided: the driver's, instances', unmanaged processes' (``foreign``), what is kept free for others
    (``kept_free``), and what may be reserved.
    """

    device: DeviceSnapshot
    usages: tuple[InstanceUsage, ...] = ()
    foreign: tuple[DeviceProcess, ...] = ()
    foreign_bytes: int = 0
    kept_free: KeptFree | None = None

    @property
    def kept_free_bytes(self) -> int:
        """As much of that as there is beside what the driver and others hold."""
        rest = max(0, self.device.vram_total_bytes - self.device.vram_reserved_bytes - self.foreign_bytes)
        if self.kept_free is None:
            return 0
        return rest if self.kept_free.size_bytes is None else min(rest, self.kept_free.size_bytes)

    @property
    def _left_bytes(self) -> int:
        """What may still be reserved; below 0: what instances have too much."""
        d = self.device
        taken = d.vram_reserved_bytes + self.foreign_bytes + sum(u.counted_bytes for u in self.usages)
        return d.vram_total_bytes - taken - self.kept_free_bytes

    @property
    def available_bytes(self) -> int:
        """What may still be reserved."""
        return max(0, self._left_bytes)

    @property
    def shortfall_bytes(self) -> int:
        """What instances hold, or have reserved, of what is to be free."""
        return 0 if self.kept_free is None else max(0, -self._left_bytes)

    @property
    def unlisted_bytes(self) -> int:
        """What no listed process explains."""
        return max(0, self.foreign_bytes - sum(p.vram_bytes or 0 for p in self.foreign))

    @property
    def inferred_bytes(self) -> int:
        """What instances are taken to use whose processes are not attributable."""
        return sum(u.inferred_bytes for u in self.usages)

    @property
    def unattributable_bytes(self) -> int:
        """What may be anybody's: held by no process that is listed with a pid of ours or of a known unmanaged process."""
        known = sum(p.vram_bytes or 0 for p in self.foreign if p.certain)
        return max(0, self.foreign_bytes + self.inferred_bytes - known)

    @property
    def attributable(self) -> bool:
        """False where memory is held and no pid tells by whom, as in most containers."""
        if any(not p.certain for p in self.device.processes):
            return False
        return bool(self.device.processes) or self.unattributable_bytes < SOME_PROCESS_BYTES

    def holders(self) -> str:
        """Who has the rest, human-readable."""
        parts = [f"pool {u.instance_id.pool_id} {size(u.counted_bytes)}" for u in self.usages]
        parts += [f"{who(p)} {size(p.vram_bytes)}" if p.vram_bytes is not None else who(p) for p in self.foreign]
        if self.unlisted_bytes >= SOME_PROCESS_BYTES:
            parts.append(f"processes that cannot be seen {size(self.unlisted_bytes)}")
        if self.kept_free is not None:
            parts.append(f"kept free {size(self.kept_free_bytes)} ({self.kept_free.why})")
        if self.device.vram_reserved_bytes:
            parts.append(f"the driver {size(self.device.vram_reserved_bytes)}")
        return ", ".join(parts) or "nobody"


def account(
    devices: Sequence[DeviceSnapshot],
    reservations: Iterable[Reservation],
    owners: Mapping[int, InstanceId],
    running: Running | None = None,
    kept_free: Mapping[str, KeptFree] | None = None,
) -> dict[str, DeviceAccount]:
    """Every device's memory, divided, by UUID. ``owners`` says which instance a pid belongs to."""
    reserved, free = list(reservations), kept_free or {}
    return {d.uuid: replace(_account_one(d, reserved, owners, running or {}), kept_free=free.get(d.uuid)) for d in devices}


def _account_one(
    d: DeviceSnapshot, reservations: list[Reservation], owners: Mapping[int, InstanceId], running: Running
) -> DeviceAccount:
    here = {r.instance_id: r for r in reservations if d.uuid in r.bytes_by_device}
    if d.error is not None or d.mig_enabled:  # what it tells is old, or its instances'
        return DeviceAccount(
            d, tuple(InstanceUsage(key, r.bytes_by_device[d.uuid], None, (), r.exclusive) for key, r in here.items())
        )
    ours: dict[InstanceId, list[DeviceProcess]] = {}
    foreign: list[DeviceProcess] = []
    for process in d.processes:
        owner = owners.get(process.pid) if process.certain else None
        foreign.append(process) if owner is None else ours.setdefault(owner, []).append(process)
    used = {instance_id: _sum(found) for instance_id, found in ours.items()}
    rest = max(0, d.vram_used_bytes - sum(b or 0 for b in used.values()))
    inferred = _infer(d, [r for key, r in here.items() if used.get(key) is None and key in running], running, rest)
    usages = []
    for key in sorted(here.keys() | ours.keys()):
        reserved, pids = here.get(key), tuple(sorted(p.pid for p in ours.get(key, ())))
        usages.append(InstanceUsage(
            key, reserved.bytes_by_device[d.uuid] if reserved is not None else 0, inferred.get(key, used.get(key)), pids,
            reserved is not None and reserved.exclusive, key in inferred,
        ))  # fmt: skip
    foreign.sort(key=lambda p: p.pid)
    return DeviceAccount(d, tuple(usages), tuple(foreign), rest - sum(inferred.values()))


def _infer(d: DeviceSnapshot, unattributed: list[Reservation], running: Running, rest: int) -> dict[InstanceId, int]:
    """Where the driver's list does not show our engines (in a container, say): what of the unexplained ``rest`` is theirs.

    Never what was foreign before they were launched, never more than is reserved. What is inferred counts no less than a
    reservation, so it cannot make room; it only keeps our own memory from counting twice.
    """
    if rest < SOME_PROCESS_BYTES or not unattributed:
        return {}

    def before(r: Reservation) -> int:
        return running[r.instance_id].get(d.uuid, 0)

    left = max(0, rest - min(map(before, unattributed)))
    found: dict[InstanceId, int] = {}
    for r in sorted(unattributed, key=lambda r: (before(r), r.instance_id)):
        found[r.instance_id] = min(left, r.bytes_by_device[d.uuid])
        left -= found[r.instance_id]
    return found


def without(account: DeviceAccount, instance_id: InstanceId) -> DeviceAccount:
    """The same device as others see it: without what the instance holds."""
    return replace(account, usages=tuple(u for u in account.usages if u.instance_id != instance_id))


def physical_gpu(device: DeviceSnapshot) -> str:
    """The UUID of the piece of hardware: the siblings of a MIG instance are on the same one."""
    return device.parent_uuid or device.uuid


def who(process: DeviceProcess) -> str:
    """``pid 4711 (python)``; a pid of another namespace is said to be one."""
    name = f" ({process.name})" if process.name else ""
    if process.ended:
        return f"pid {process.pid}{name}, which has ended and did not give it back"
    return f"pid {process.pid}{name}" if process.certain else f"driver's pid {process.pid}{name}"


def _sum(processes: list[DeviceProcess]) -> int | None:
    known = [p.vram_bytes for p in processes if p.vram_bytes is not None]
    return sum(known) if known else None
