"""What the indices in pools' masks mean, remembered durably: a mask follows its GPUs (core/gpu/mask_gpus.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.mask_gpus import MaskGpu, ResolvedMask, resolve
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.supervision.protocols import Facts

FACT = "device_binding"


class MaskGpus:
    """By pool. A pool that comes with another mask begins anew."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[str, dict[str, Any]] = {}

    def restore(self) -> None:
        """What an earlier daemon remembered; after the state was opened."""
        self._known = dict(self._facts.facts(FACT))

    def resolve(self, pool_id: str, mask: DeviceMask, devices: Sequence[DeviceSnapshot]) -> ResolvedMask:
        """The devices that the pool's mask means now. Remembers nothing. Raises as the function of that name."""
        raw = self._known.get(pool_id, {})
        items = raw.get("items", {}) if raw.get("mask") == str(mask) else {}
        return resolve(mask, devices, {int(index): MaskGpu(*pair) for index, pair in items.items()})

    def remember(self, pool_id: str, found: ResolvedMask) -> None:
        """From now on the mask's indices mean these devices. Not to be called while GPUs are missing: indices have moved then."""
        items = {str(index): [gpu.uuid, gpu.pci_bus_id] for index, gpu in found.gpus.items()}
        new = {"mask": str(found.mask), "items": items}
        if new != self._known.get(pool_id):
            self._known[pool_id] = new
            self._facts.note_fact(FACT, pool_id, new)

    def forget(self, pool_id: str) -> None:
        """The pool is gone."""
        if self._known.pop(pool_id, None) is not None:
            self._facts.note_fact(FACT, pool_id, None)
