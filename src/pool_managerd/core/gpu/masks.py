"""Which GPUs a pool may use: parsing, checking against what exists, and what the engine is shown (SPEC §5.2, §5.3).

An engine sees its mask alone, by UUID and in PCI order, so that nothing of it changes when an index does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.errors import SpecError

MAX_ITEMS = 64
_MAX_SHOWN = 80
_INDEX = re.compile(r"(?:GPU)?(\d{1,4})", re.ASCII | re.IGNORECASE)
_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z/-]{1,80}", re.ASCII)


@dataclass(frozen=True, slots=True)
class DeviceMask:
    """GPU indices and UUIDs, in the order given. No mask at all (None elsewhere) means no restriction."""

    items: tuple[int | str, ...]

    @classmethod
    def parse(cls, text: str) -> DeviceMask:
        """``"0,1"``, ``"GPU0,GPU1"``, GPU UUIDs, MIG UUIDs (B-DEVICE-001, 002). Raises SpecError naming the part at fault."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) > MAX_ITEMS:
            raise _refused(text, f"it names more than {MAX_ITEMS} devices")
        items = tuple(_item(part, text) for part in parts)
        written = [str(item).lower() for item in items]
        for item in items:
            if written.count(str(item).lower()) > 1:
                raise _refused(text, f"it names {item} twice")
        if len({str(item).upper().startswith("MIG-") for item in items}) > 1:
            raise _mixed(text)
        return cls(items)

    @property
    def has_indices(self) -> bool:
        """UUIDs mean the same GPUs for good; indices move."""
        return any(isinstance(item, int) for item in self.items)

    def __str__(self) -> str:
        return ",".join(map(str, self.items))

    def validate_against_discovered(self, devices: Sequence[DeviceSnapshot]) -> None:
        """Raises SpecError for a device that does not exist, listing what does (B-DEVICE-003, 004)."""
        self.resolve(devices)

    def resolve(self, devices: Sequence[DeviceSnapshot]) -> tuple[DeviceSnapshot, ...]:
        """The named devices in PCI order. Raises SpecError for unknown, doubly named or mixed ones."""
        return in_pci_order(self.find(devices))

    def find(self, devices: Sequence[DeviceSnapshot]) -> tuple[DeviceSnapshot, ...]:
        """As ``resolve``, in the order of the mask."""
        found = [self._find(item, devices) for item in self.items]
        named: dict[str, int | str] = {}
        for item, device in zip(self.items, found, strict=True):
            if device.uuid in named:
                raise _refused(str(self), f"{named[device.uuid]} and {item} are the same device")
            named[device.uuid] = item
        if len({device.parent_uuid is None for device in found}) > 1:
            raise _mixed(str(self))
        return tuple(found)

    def to_cuda_visible_devices(self, devices: Sequence[DeviceSnapshot] | None = None) -> str:
        """The value of CUDA_VISIBLE_DEVICES (B-DEVICE-005).

        With the ``devices`` of a scan: UUIDs in PCI order. Without: as given, which is stable only while no GPU comes or goes.
        """
        if devices is None:
            return str(self)
        return cuda_visible_devices(self.resolve(devices))

    def _find(self, item: int | str, devices: Sequence[DeviceSnapshot]) -> DeviceSnapshot:
        if isinstance(item, str):
            match = next((d for d in devices if d.uuid.lower() == item.lower()), None)
        else:
            match = next((d for d in devices if d.parent_uuid is None and d.id == item), None)
        if match is None:
            raise _refused(str(self), f"there is no device {item}; {what_exists(devices)}")
        if match.mig_enabled:
            instances = [d.uuid for d in devices if d.parent_uuid == match.uuid]
            use = f"name its instances: {', '.join(instances)}" if instances else "create MIG instances, or turn MIG off"
            raise _refused(str(self), f"GPU {item} is in MIG mode and cannot be used as a whole", use)
        return match


def cuda_visible_devices(devices: Iterable[DeviceSnapshot]) -> str:
    """UUIDs in PCI order: what CUDA_VISIBLE_DEVICES is set to."""
    return ",".join(device.uuid for device in in_pci_order(devices))


def cuda_environment(visible: str) -> dict[str, str]:
    """The variables that show an engine the ``visible`` devices alone, counted in PCI order (B-DEVICE-012)."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def in_pci_order(devices: Iterable[DeviceSnapshot]) -> tuple[DeviceSnapshot, ...]:
    """The order that CUDA_DEVICE_ORDER=PCI_BUS_ID gives; MIG instances of one GPU by UUID."""
    return tuple(sorted(devices, key=lambda d: (d.pci_bus_id.lower(), d.id, d.uuid)))


def _item(part: str, text: str) -> int | str:
    if not part:
        raise _refused(text, "it has an empty part" if text.strip() else "it is empty", "leave `devices` out to allow all GPUs")
    if index := _INDEX.fullmatch(part):
        return int(index[1])
    if _UUID.fullmatch(part):
        return part
    if part.startswith("-"):
        raise _refused(text, f"{part} is negative")
    raise _refused(text, f"{part[:80]!r} is neither an index nor a GPU or MIG UUID")


def what_exists(devices: Sequence[DeviceSnapshot]) -> str:
    """The devices that a mask may name, as the end of a sentence."""
    if not devices:
        return "no GPU was found"
    return "there are " + ", ".join(f"{d.label} ({d.name or d.uuid})" for d in in_pci_order(devices))


def _mixed(mask: str) -> SpecError:
    return _refused(mask, "it mixes MIG instances with whole GPUs", "give the pool one kind of device")


def _refused(mask: str, why: str, hint: str = "write `devices: [0, 1]`, or UUIDs as `nvidia-smi -L` shows them") -> SpecError:
    shown = mask if len(mask) <= _MAX_SHOWN else mask[:_MAX_SHOWN] + "…"
    return SpecError(f"cannot use the device mask {shown!r}: {why}", code="INVALID_PARAMS", hint=hint)
