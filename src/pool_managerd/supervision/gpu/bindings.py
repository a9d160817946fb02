"""What the indices in pools' masks mean, remembered durably: a mask follows its GPUs (core/gpu/bindings.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pool_managerd.core.gpu.bindings import Binding, Bound, bind
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.supervision.protocols import Facts

FACT = "device_binding"


class Bindings:
    """By pool. A pool that comes with another mask begins anew."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[str, dict[str, Any]] = {}

    def restore(self) -> None:
        """What an earlier daemon bound; after the state was opened."""
        self._known = dict(self._facts.facts(FACT))

    def bound(self, pool_id: str, mask: DeviceMask, devices: Sequence[DeviceSnapshot]) -> Bound:
        """The devices that the pool's mask means now. Remembers nothing. Raises SpecError as ``bind``."""
        raw = self._known.get(pool_id, {})
        items = raw.get("items", {}) if raw.get("mask") == str(mask) else {}
        return bind(mask, devices, {int(index): Binding(*pair) for index, pair in items.items()})

    def remember(self, pool_id: str, mask: DeviceMask, bound: Bound) -> None:
        """From now on the mask's indices mean these devices. Not to be called while GPUs are missing: indices have moved then."""
        items = {str(index): [b.uuid, b.pci_bus_id] for index, b in bound.bindings.items()}
        new = {"mask": str(mask), "items": items}
        if new != self._known.get(pool_id):
            self._known[pool_id] = new
            self._facts.note_fact(FACT, pool_id, new)

    def forget(self, pool_id: str) -> None:
        """The pool is gone."""
        if self._known.pop(pool_id, None) is not None:
            self._facts.note_fact(FACT, pool_id, None)
