"""Who holds a listening TCP port: the proof that a health answer came from our own engine."""

from __future__ import annotations

import os
from pathlib import Path

_LISTEN = "0A"


def owns_port(pid: int, port: int) -> bool | None:
    """True when ``pid``, its session or a descendant holds the listening ``port``; False when another process does.

    None when it cannot be seen (no such listener in this network namespace, or its holder's descriptors are not
    readable). The look costs one pass over /proc and is made once per launch.
    """
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    if _holds(pid, inodes):
        return True
    family = _family(pid)
    if any(_holds(member, inodes) for member in family):
        return True
    others = (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in family)
    return False if any(_holds(other, inodes) for other in others) else None


def _listening_inodes(port: int) -> set[str]:
    suffix = f":{port:04X}"
    found: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            parts = line.split()
            if len(parts) > 9 and parts[1].endswith(suffix) and parts[3] == _LISTEN:
                found.add(f"socket:[{parts[9]}]")
    return found


def _family(pid: int) -> set[int]:
    """The engine, everything in its session, and every descendant."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)], sessions[int(name)] = int(fields[1]), int(fields[3])
    family = {member for member, session in sessions.items() if session == pid} | {pid}
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return family


def _holds(pid: int, inodes: set[str]) -> bool:
    try:
        return any(_link(f"/proc/{pid}/fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
