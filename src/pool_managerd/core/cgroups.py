"""Control groups as the kernel writes about them."""

from __future__ import annotations


def memory_groups(text: str) -> tuple[str | None, str | None]:
    """The paths of the v1 memory group and the v2 group in a /proc/PID/cgroup."""
    v1 = v2 = None
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            v1 = path
        elif number == "0" and not controllers:
            v2 = path
    return v1, v2


def counted(text: str, key: str) -> int | None:
    """The number behind ``key`` in a file of ``key number`` lines, such as memory.events; None where it is not there."""
    for line in text.splitlines():
        name, _, number = line.partition(" ")
        if name == key and number.isdecimal() and number.isascii():
            return int(number[:20])
    return None
