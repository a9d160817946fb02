"""How much RAM this process may still use: the machine's, or its control group's where that is less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pool_managerd.core.cgroups import memory_groups

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2⁶³ for no limit


def available_ram_bytes(root: Path = Path("/")) -> int:
    """What could be allocated now without swapping. ``root`` stands before /proc and /sys. Raises OSError, ValueError."""
    free = meminfo(_read(root, "proc/meminfo"))["MemAvailable"]
    for limit, used in _limits(root):
        free = min(free, limit - used)
    return max(0, free)


def total_ram_bytes(root: Path = Path("/")) -> int:
    """The machine's RAM, or the least limit of the control groups that this process is in. Raises OSError, ValueError."""
    return min([meminfo(_read(root, "proc/meminfo"))["MemTotal"], *(limit for limit, _ in _limits(root))])


def meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes. Raises ValueError when the two numbers that matter are not there."""
    found = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[key] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    if not {"MemTotal", "MemAvailable"} <= found.keys():
        raise ValueError("cannot read the machine's memory: /proc/meminfo has no MemTotal or MemAvailable")
    return found


def group_use(current: str, stat: str, *, inactive_file: str) -> int:
    """What of a group's use cannot be taken back at once: page cache that is not in use can."""
    fields = dict(line.partition(" ")[::2] for line in stat.splitlines())
    return max(0, int(current) - int(fields.get(inactive_file, 0)))


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every limited group from ours up to the top. Unreadable ones limit nothing that we know of."""
    v1, v2 = memory_groups(_read(root, "proc/self/cgroup"))
    places = [
        (v1, "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        (v2, "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
    ]
    for path, mount, (limit_file, use_file, inactive_file) in places:
        if path is None:
            continue
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            try:
                limit = _read(root, f"{mount}/{place}/{limit_file}").strip()
                if limit == "max" or int(limit) >= _UNLIMITED:
                    continue
                used = group_use(
                    _read(root, f"{mount}/{place}/{use_file}"), _read(root, f"{mount}/{place}/memory.stat"),
                    inactive_file=inactive_file,
                )  # fmt: skip
            except (OSError, ValueError):
                continue
            yield int(limit), used


def _read(root: Path, path: str) -> str:
    with (root / path).open() as file:
        return file.read(65_536)
