"""What placement reads of each pool's GPUs: the registry's fields about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pool_managerd.core.gpu.accounts import DeviceAccount, InstanceUsage, physical_gpu
from pool_managerd.core.registry import DeviceShare


class GpuFields:
    """The fields of all pools, of one scan; pools that see the same devices and hold nothing share theirs."""

    def __init__(self, accounts: Mapping[str, DeviceAccount]) -> None:
        self.accounts = accounts
        self._exclusive = exclusive_gpus(accounts.values())
        self._held: dict[str, dict[str, list[InstanceUsage]]] = {}
        for uuid, account in accounts.items():
            for usage in account.usages:
                self._held.setdefault(usage.instance_id.pool_id, {}).setdefault(uuid, []).append(usage)
        self._made: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(self, pool_id: str, uuids: tuple[str, ...]) -> dict[str, Any]:
        """For the pool that sees ``uuids``; None throughout where it sees none."""
        found = self._made.get(uuids)
        if found is None:
            found = self._made[uuids] = _summed(tuple(_share(self.accounts[uuid], self._exclusive) for uuid in uuids))
        held = self._held.get(pool_id)
        return found if held is None else self._with(found, held)

    def _with(self, others: dict[str, Any], held: Mapping[str, Sequence[InstanceUsage]]) -> dict[str, Any]:
        """What others see, and the part of the pool itself: of all its instances."""
        shares = list(others["devices"])
        available, reserved, used = others["vram_available_bytes"], 0, others["vram_used_bytes"]
        for index, share in enumerate(shares):
            usages = held.get(share.uuid)
            if usages is None:
                continue
            account = self.accounts[share.uuid]
            exclusive = any(usage.exclusive for usage in usages)
            own = account.available_bytes if exclusive and account.device.usable else share.vram_available_bytes
            measured = [u.measured_bytes for u in usages if u.measured_bytes is not None]
            held_bytes = sum(measured) if account.device.usable and len(measured) == len(usages) else None
            reserved_here = sum(usage.reserved_bytes for usage in usages)
            shares[index] = DeviceShare(
                share.id, share.device, share.uuid, share.compute_capability, share.vram_total_bytes, share.vram_free_bytes,
                own, reserved_here, held_bytes,
            )  # fmt: skip
            available += own - share.vram_available_bytes
            reserved += reserved_here
            used = None if used is None or held_bytes is None else used + held_bytes
        sums = {"vram_available_bytes": available, "vram_reserved_bytes": reserved if shares else None, "vram_used_bytes": used}
        return {**others, "devices": tuple(shares), **sums}


def exclusive_gpus(accounts: Iterable[DeviceAccount]) -> dict[str, str]:
    """The physical GPUs where no other pool may reserve anything, by UUID, and the exclusive pool that is there."""
    return {physical_gpu(a.device): u.instance_id.pool_id for a in accounts for u in a.usages if u.exclusive}


def _share(account: DeviceAccount, exclusive: Mapping[str, str]) -> DeviceShare:
    """A device as a pool meets it that holds nothing there."""
    d = account.device
    free = d.vram_free_bytes if d.readable else None
    available = account.available_bytes if d.usable and physical_gpu(d) not in exclusive else 0
    return DeviceShare(
        d.id, d.label, d.uuid, d.compute_capability, d.vram_total_bytes, free, available, 0, 0 if d.usable else None
    )


def _summed(shares: tuple[DeviceShare, ...]) -> dict[str, Any]:
    """Of somebody who holds nothing there."""
    capabilities = [s.compute_capability for s in shares if s.compute_capability]
    free = [s.vram_free_bytes for s in shares if s.vram_free_bytes is not None]
    return {
        "devices": shares,
        "vram_total_bytes": sum(s.vram_total_bytes for s in shares) if shares else None,
        "vram_free_bytes": sum(free) if free else None,
        "vram_available_bytes": sum(s.vram_available_bytes for s in shares) if shares else None,
        "vram_reserved_bytes": 0 if shares else None,
        "vram_used_bytes": 0 if shares and all(s.vram_used_bytes is not None for s in shares) else None,
        "compute_capability": min(capabilities, key=_as_numbers, default=None),
    }


def _as_numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".") if part.isdigit())
