"""What of a GPU's memory is for others than pools: always, for a while, or while somebody's program runs there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pool_managerd.core.gpu.devices import DeviceProcess, DeviceSnapshot


@dataclass(frozen=True, slots=True)
class KeptFree:
    """``size_bytes`` beside what others hold already; None: all of it, so that nothing of ours runs there. ``why`` says so to
    people, and ``remedy`` how that ends.
    """

    size_bytes: int | None
    why: str
    remedy: str = ""

    @property
    def whole(self) -> bool:
        return self.size_bytes is None


@dataclass(frozen=True, slots=True)
class FreeRules:
    """``size_bytes`` of every GPU stay free. One on which a program runs whose name is like one of ``programs`` is left to it."""

    size_bytes: int = 0
    programs: tuple[str, ...] = ()


def kept_free(
    devices: Sequence[DeviceSnapshot], rules: FreeRules, yielded: Mapping[str, KeptFree], ours: Collection[int]
) -> dict[str, KeptFree]:
    """By UUID. ``yielded`` are GPUs that a person has given away; what is so of a GPU is so of its MIG instances. ``ours`` are
    the pids of our engines.
    """
    found = {d.uuid: KeptFree(rules.size_bytes, "gpu.keep_free_mib") for d in devices} if rules.size_bytes else {}
    for device in devices:
        program = _program(device.processes, rules.programs, ours)
        if program is not None:
            found[device.uuid] = KeptFree(None, f"{program} runs there", "it is taken back when that has ended")
    found.update({d.uuid: yielded[d.uuid] for d in devices if d.uuid in yielded})
    parents = {d.uuid: d.parent_uuid for d in devices if d.parent_uuid is not None}
    found.update({uuid: one for uuid, parent in parents.items() if (one := found.get(parent)) is not None and one.whole})
    return found


def _program(processes: Iterable[DeviceProcess], patterns: Sequence[str], ours: Collection[int]) -> str | None:
    """The name of the first of ``processes`` that is meant."""
    for process in processes:
        name = (process.name or "").rpartition("/")[2]
        if name and not (process.certain and process.pid in ours) and any(fnmatchcase(name, pattern) for pattern in patterns):
            return name
    return None
