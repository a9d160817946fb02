"""What a pool's GPU indices meant when it first started: a mask follows its GPUs when the numbering changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.errors import NodeError


@dataclass(frozen=True, slots=True)
class MaskGpu:
    """The GPU that an index of a mask stands for."""

    uuid: str
    pci_bus_id: str


@dataclass(frozen=True, slots=True)
class ResolvedMask:
    """A mask on this machine: its devices in the mask's order. ``gpus`` is what its indices mean, to be remembered; ``notices``
    are human-readable.
    """

    mask: DeviceMask
    devices: tuple[DeviceSnapshot, ...]
    gpus: Mapping[int, MaskGpu]
    notices: tuple[str, ...] = ()


def resolve(mask: DeviceMask, devices: Sequence[DeviceSnapshot], known: Mapping[int, MaskGpu]) -> ResolvedMask:
    """The devices of ``mask``, in its order.

    Indices that are known from before stay with their GPU, or with its slot when it was replaced.

    Raises SpecError for what does not exist, NodeError GPU_UNAVAILABLE for a known GPU that is gone.
    """
    gpus: dict[int, MaskGpu] = {}
    notices: list[str] = []
    moved: list[str] = []
    items: list[int | str] = []
    for item in mask.items:
        before = known.get(item) if isinstance(item, int) else None
        if isinstance(item, str) or before is None:
            items.append(item)
            continue
        device = _find(item, before, devices, mask)
        items.append(device.uuid)
        gpus[item] = MaskGpu(device.uuid, device.pci_bus_id)
        if device.uuid != before.uuid:
            slot = before.pci_bus_id
            notices.append(f"GPU {item} of the mask {mask} was replaced in its slot {slot}; the pool uses the new one")
        elif device.id != item:
            moved.append(f"{item} is {device.id} now")
    if moved:
        notices.append(f"The GPUs of the mask {mask} are counted anew ({', '.join(moved)}); the pool stays on them")
    found = replace(mask, items=tuple(items)).find(devices)
    for item in mask.items:
        if isinstance(item, int) and item not in gpus:
            new = next(d for d in found if d.id == item)
            gpus[item] = MaskGpu(new.uuid, new.pci_bus_id)
    return ResolvedMask(mask, found, gpus, tuple(notices))


def _find(index: int, before: MaskGpu, devices: Sequence[DeviceSnapshot], mask: DeviceMask) -> DeviceSnapshot:
    same = next((d for d in devices if d.uuid == before.uuid), None)
    slot = next((d for d in devices if d.parent_uuid is None and before.pci_bus_id and d.pci_bus_id == before.pci_bus_id), None)
    found = same or slot
    if found is not None:
        return found
    there = ", ".join(f"{d.id} is {d.uuid}" for d in devices if d.parent_uuid is None) or "none is left"
    raise NodeError(
        f"cannot use the device mask {str(mask)!r}: GPU {index} was {before.uuid} at {before.pci_bus_id}, which is gone"
        f" ({there})",
        code="GPU_UNAVAILABLE",
        hint="bring the GPU back, or name another one in `devices`; a UUID says which one is meant",
    )
