"""Which of the machine's GPUs this node may use at all: what its configuration says, and what it was granted itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pool_managerd.core.gpu.devices import DeviceSnapshot

_NO_MORE = ("-1", "none", "nodevfiles")
"""CUDA takes nothing that stands behind one of these."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """GPUs by index, UUID or the beginning of one; ``source`` says whose word it is. No items: none at all."""

    source: str
    items: tuple[str, ...]

    @classmethod
    def of_variable(cls, value: str | None) -> Restriction | None:
        """What CUDA_VISIBLE_DEVICES of the daemon itself says; None when it is not set."""
        if value is None:
            return None
        items: list[str] = []
        for item in (part.strip() for part in value.split(",")):
            if not item or item.lower() in _NO_MORE:
                break
            items.append(item)
        return cls("CUDA_VISIBLE_DEVICES of the daemon", tuple(items))

    def allows(self, device: DeviceSnapshot) -> bool:
        """A whole GPU brings its MIG instances; an instance brings its GPU, which is not used as a whole."""
        return any(_names(item, device) for item in self.items)

    def __str__(self) -> str:
        return f"{self.source} names {', '.join(self.items) or 'none'}"


def restrictions(configured: Iterable[int | str], granted: str | None) -> tuple[Restriction, ...]:
    """What ``gpu.devices`` says, and what a scheduler or a unit file ``granted`` the daemon by its CUDA_VISIBLE_DEVICES."""
    written = tuple(map(str, configured))
    found = (Restriction("gpu.devices", written) if written else None, Restriction.of_variable(granted))
    return tuple(rule for rule in found if rule is not None)


def visible(devices: Iterable[DeviceSnapshot], restrictions: Iterable[Restriction]) -> tuple[DeviceSnapshot, ...]:
    """Those that every restriction allows. Indices stay those of the machine."""
    rules = tuple(restrictions)
    found = [d for d in devices if all(rule.allows(d) for rule in rules)]
    if not rules:
        return tuple(found)
    there = {d.uuid for d in found}
    parents = {d.parent_uuid for d in found if d.parent_uuid is not None} - there
    return tuple(d for d in devices if d.uuid in there or d.uuid in parents)


def _names(item: str, device: DeviceSnapshot) -> bool:
    if item.removeprefix("GPU").isdecimal():
        return device.id == int(item.removeprefix("GPU"))
    wanted = item.lower()
    if len(wanted) <= len("GPU-"):
        return False
    return device.uuid.lower().startswith(wanted) or (device.parent_uuid or "").lower().startswith(wanted)
