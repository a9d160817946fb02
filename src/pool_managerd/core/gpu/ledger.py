"""Which instance has reserved how much of which GPU (DESIGN §3, §8 rule 2).

The key is the instance: two replicas of one pool, while one replaces the other, have a reservation each, and both count.
A replica runs one launch at a time, so a later epoch of the same instance takes the place of the earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pool_managerd.core.gpu.accounts import DeviceAccount, Reservation, physical_gpu, who, without
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.narration import size
from pool_managerd.errors import NodeError


@dataclass
class Ledger:
    """What is reserved here. Asking and reserving are one call: two starts cannot both pass. ``version`` counts changes.

    An instance that sleeps can lend what it has reserved to the one that is to replace it (``lend``). When that ends it has it
    again in the same step, so that nobody else is ever given any of it. One that sleeps to make room leaves what it does not
    hold to anybody (``leave``), and has it again only where it is still free (``retake``).
    """

    _by_instance: dict[InstanceId, Reservation] = field(default_factory=dict)
    version: int = 0
    _lent: dict[InstanceId, tuple[Reservation, InstanceId | None]] = field(default_factory=dict)
    """What each had, and to whom it has lent that; None: left to anybody."""

    def copy(self) -> Ledger:
        """Another ledger with the same reservations, to try things on."""
        return Ledger(dict(self._by_instance), _lent=dict(self._lent))

    def get(self, instance_id: InstanceId) -> Reservation | None:
        return self._by_instance.get(instance_id)

    def all(self) -> list[Reservation]:
        return [self._by_instance[instance_id] for instance_id in sorted(self._by_instance)]

    def reserve(self, wanted: Reservation, accounts: Mapping[str, DeviceAccount]) -> None:
        """Reserve it, in the place of what an earlier launch of the same instance had.

        ``accounts`` (by UUID, from ``account``) must be made of this ledger and a fresh scan. Raises NodeError
        INSUFFICIENT_VRAM with needed, free and who holds the rest; GPU_NOT_SHARED when somebody is exclusive there.
        """
        if (error := self.objection(wanted, accounts)) is not None:
            raise error
        self._lent.pop(wanted.instance_id, None)
        self._by_instance[wanted.instance_id] = wanted
        self.version += 1

    def restore(self, kept: Reservation) -> None:
        """Reserve again what a launch has that an earlier daemon began: its engine holds it, whatever else there is."""
        self._lent.pop(kept.instance_id, None)
        self._by_instance[kept.instance_id] = kept
        self.version += 1

    def objection(self, wanted: Reservation, accounts: Mapping[str, DeviceAccount]) -> NodeError | None:
        """The error that ``reserve`` would raise now; asking changes nothing."""
        for uuid, needed in wanted.bytes_by_device.items():
            here = without(accounts[uuid], wanted.instance_id)
            near = [a for a in accounts.values() if physical_gpu(a.device) == physical_gpu(here.device)]
            if (error := _sharing_objection(wanted, here.device, near)) is not None:
                return error
            if needed > here.available_bytes:
                return insufficient(wanted.instance_id.pool_id, here.device, needed, here.available_bytes, here.holders())
        return None

    def release(self, instance_id: InstanceId, epoch: int) -> bool:
        """Give a launch's reservation back; a later launch's stays. True when there was one."""
        found = self._by_instance.get(instance_id)
        if found is None or found.epoch > epoch:
            return False
        del self._by_instance[instance_id]
        self._lent.pop(instance_id, None)
        for lender, (had, borrower) in list(self._lent.items()):
            if borrower == instance_id:
                del self._lent[lender]
                self._by_instance[lender] = had
        self.version += 1
        return True

    def lend(self, lender: InstanceId, borrower: InstanceId) -> None:
        """What ``borrower`` has reserved is a part of what ``lender`` had, as far as that goes, until it is released."""
        has, takes = self.due(lender), self._by_instance.get(borrower)
        if has is None or takes is None:
            return
        self._lent[lender] = has, borrower
        kept = {uuid: max(0, part - takes.bytes_by_device.get(uuid, 0)) for uuid, part in has.bytes_by_device.items()}
        self._by_instance[lender] = replace(has, bytes_by_device=kept)
        self.version += 1

    def leave(self, instance_id: InstanceId, epoch: int, holds: Mapping[str, int]) -> None:
        """Of what that launch has reserved it keeps what it ``holds``, until it retakes it."""
        has = self._by_instance.get(instance_id)
        if has is None or has.epoch != epoch or instance_id in self._lent:
            return
        kept = {uuid: min(part, holds.get(uuid, 0)) for uuid, part in has.bytes_by_device.items()}
        self._lent[instance_id] = has, None
        self._by_instance[instance_id] = replace(has, bytes_by_device=kept)
        self.version += 1

    def has_left(self, instance_id: InstanceId) -> bool:
        """It has left some of it to anybody."""
        return instance_id in self._lent and self._lent[instance_id][1] is None

    def retake(self, instance_id: InstanceId, accounts: Mapping[str, DeviceAccount]) -> None:
        """Reserve again what it had left. Raises NodeError as ``reserve``."""
        if self.has_left(instance_id):
            self.reserve(self._lent[instance_id][0], accounts)

    def due(self, instance_id: InstanceId) -> Reservation | None:
        """What it has reserved when all that it has lent is its own again."""
        lent = self._lent.get(instance_id)
        return self._by_instance.get(instance_id) if lent is None else lent[0]


def _sharing_objection(wanted: Reservation, device: DeviceSnapshot, near: Sequence[DeviceAccount]) -> NodeError | None:
    """Exclusive means the whole piece of hardware; ``near`` is everything on it. Replicas of one pool do share."""
    pool_id = wanted.instance_id.pool_id
    others = [u for a in near for u in a.usages if u.instance_id.pool_id != pool_id]
    foreign = [p for a in near for p in a.foreign if p.kind == "compute"]
    exclusive = next((u.instance_id.pool_id for u in others if u.exclusive), None)
    if exclusive is not None:
        return _not_shared(pool_id, device, f"pool {exclusive} is exclusive there", "use another GPU, or stop it")
    if wanted.exclusive and (others or foreign):
        whom = f"pool {others[0].instance_id.pool_id}" if others else who(foreign[0])
        return _not_shared(pool_id, device, f"the pool is exclusive and {whom} is there", "stop it, or use another GPU")
    return None


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
        text, code="INSUFFICIENT_VRAM", status=503, pool_id=pool_id, hint=hint, retriable=needed <= usable,
        details={"device": device.label, "uuid": device.uuid, "needed_bytes": needed, "free_bytes": free},
    )  # fmt: skip


def _not_shared(pool_id: str, device: DeviceSnapshot, why: str, hint: str) -> NodeError:
    return NodeError(
        f"cannot start pool {pool_id} on GPU {device.label}: {why}", code="GPU_NOT_SHARED", status=503, pool_id=pool_id, hint=hint
    )
