"""Groups of GPUs for a pool without a mask: enough room, close together, and always the same answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.masks import in_pci_order

MAX_COMBINATIONS = 5_000

Group = tuple[DeviceSnapshot, ...]


def best_first(devices: Sequence[DeviceSnapshot], available: Mapping[str, int], width: int) -> list[Group]:
    """Groups of ``width`` devices, best first: NVLink neighbours, then one NUMA node, then most room, then PCI order.

    One device: the one with most room. MIG instances are never grouped. Where the groups are too many to rank
    all of them, those around each device's best neighbours are ranked.
    """
    ordered = in_pci_order(d for d in devices if d.usable)
    if width == 1:
        return sorted(((d,) for d in ordered), key=lambda group: -available.get(group[0].uuid, 0))
    whole = [d for d in ordered if d.parent_uuid is None]
    if width > len(whole):
        return []
    found = list(combinations(whole, width)) if _few(len(whole), width) else _around_each(whole, available, width)
    return sorted(found, key=lambda group: _rank(group, available))


def _rank(group: Group, available: Mapping[str, int]) -> tuple[int, int, int, int]:
    linked = sum(b.uuid in a.nvlink_peers or a.uuid in b.nvlink_peers for a, b in combinations(group, 2))
    near = sum(a.numa_node is not None and a.numa_node == b.numa_node for a, b in combinations(group, 2))
    room = [available.get(d.uuid, 0) for d in group]
    return (-linked, -near, -min(room), -sum(room))


def _few(n: int, width: int) -> bool:
    total = 1
    for i in range(min(width, n - width)):
        total = total * (n - i) // (i + 1)
    return total <= MAX_COMBINATIONS


def _around_each(devices: Sequence[DeviceSnapshot], available: Mapping[str, int], width: int) -> list[Group]:
    """One group per device: it and those that rank best with it."""
    found: dict[tuple[str, ...], Group] = {}
    for seed in devices:
        others = sorted((d for d in devices if d is not seed), key=lambda d: _rank((seed, d), available))
        group = in_pci_order((seed, *others[: width - 1]))
        found[tuple(d.uuid for d in group)] = group
    return list(found.values())
