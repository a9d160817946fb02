"""What /proc tells of the processes that a GPU lists. Runs in the worker: standard library only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NONCE_VARIABLE = b"POOL_MANAGERD_NONCE="
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: the same number in every Linux kernel
_TRANSLATES_SINCE = [535, 113]
_MAX_ANCESTORS = 32
_MAX_ENVIRON_BYTES = 1 << 20


class Processes:
    """Turns the driver's pids into ours, and says what is known of those processes.

    A driver since 535.113 counts in the pid namespace of whoever asks and leaves out who is not in it: its pids are ours.
    An older one counts in the initial namespace. Ours is that one exactly when its inode is the fixed number
    that the kernel gives to the initial namespace; nothing else proves it (a nested pid 1 is like any other). In a
    nested one a pid of the driver can be ours only if this /proc belongs to an outer namespace: then the ``NSpid``
    line of its status holds both numbers. Everything else stays the driver's number, and is not certain.

    ``version`` is the driver's. ``outer`` is a simulated driver's word on whether it counts as an outer namespace would,
    None for a real one.
    """

    def __init__(self, outer: bool | None = None, proc: Path = Path("/proc"), version: str = "") -> None:
        self._proc = proc
        self._namespace = _namespace(proc / "self")
        self._depth = len(self._nspid("self"))
        if outer is not None:
            self._same = not outer
        else:
            self._same = self._namespace == _INITIAL_PID_NAMESPACE or translates_pids(version)
        driver_sees_proc = outer or _namespace(proc / "1") == _INITIAL_PID_NAMESPACE
        self._mapped = not self._same and self._depth > 1 and driver_sees_proc
        self._known: dict[tuple[str, int], str | None] = {}
        self._seen: set[tuple[str, int]] = set()
        self._stats: dict[str, tuple[str, int] | None] = {}

    def begin(self) -> None:
        """A new scan: what was read of /proc in the last one is read again; what cannot change is kept."""
        self._known = {key: nonce for key, nonce in self._known.items() if key in self._seen}
        self._seen.clear()
        self._stats.clear()

    def describe(self, driver_pid: int) -> dict[str, Any]:
        """``pid``, ``certain``, ``ended`` when it is no more, else ``start_ticks``, ``nonce``, ``ancestors`` and ``name``."""
        pid = self._ours(str(driver_pid)) if self._mapped else driver_pid if self._same else None
        if pid is None:
            return {"pid": driver_pid, "certain": False}
        found: dict[str, Any] = {"pid": pid, "certain": True}
        at = str(driver_pid)
        stat = self._stat(at)
        if stat is not None:
            found["start_ticks"] = stat[1]
            found["nonce"] = self._nonce(at, stat[1])
            found["ancestors"] = self._ancestors(stat[0])
            found["name"] = text_of(self._proc / at / "comm")
        else:
            found["ended"] = True
        return found

    def _ours(self, at: str) -> int | None:
        """The pid in our namespace. One in a namespace nested in ours has more numbers than we can tell apart."""
        numbers = self._nspid(at)
        if len(numbers) != self._depth or _namespace(self._proc / at) != self._namespace:
            return None
        return numbers[-1]

    def _nspid(self, at: str) -> list[int]:
        for line in text_of(self._proc / at / "status").splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
        return []

    def _stat(self, at: str) -> tuple[str, int] | None:
        """Parent and start time, in clock ticks since boot; None for one that has ended."""
        if at not in self._stats:
            fields = text_of(self._proc / at / "stat").rpartition(")")[2].split()
            self._stats[at] = (fields[1], int(fields[19])) if len(fields) > 19 else None
        return self._stats[at]

    def _ancestors(self, parent: str) -> list[int]:
        found: list[int] = []
        while parent not in ("0", "1") and len(found) < _MAX_ANCESTORS:
            pid = self._ours(parent) if self._mapped else int(parent)
            stat = self._stat(parent)
            if pid is None or stat is None:
                break
            found.append(pid)
            parent = stat[0]
        return found

    def _nonce(self, at: str, start_ticks: int) -> str | None:
        key = (at, start_ticks)
        self._seen.add(key)
        if self._known.get(key) is None:  # an environment that was empty in the middle of an exec is asked again
            self._known[key] = self._read_nonce(at)
        return self._known[key]

    def _read_nonce(self, at: str) -> str | None:
        try:
            with (self._proc / at / "environ").open("rb") as file:
                variables = file.read(_MAX_ENVIRON_BYTES).split(b"\0")
        except OSError:
            return None
        for variable in variables:
            if variable.startswith(NONCE_VARIABLE):
                return variable[len(NONCE_VARIABLE) :].decode("ascii", "replace")[:64]
        return None


def translates_pids(version: str) -> bool:
    """True of a driver that tells pids as whoever asks counts them (535.113 and newer)."""
    numbers = [int(part) for part in version.split(".")[:2] if part.isdecimal()]
    return numbers >= _TRANSLATES_SINCE


def _namespace(process: Path) -> int | None:
    try:
        return (process / "ns" / "pid").stat().st_ino
    except OSError:
        return None


def text_of(path: Path, max_bytes: int = 65_536) -> str:
    """What the file says; nothing for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes).decode(errors="replace").rstrip("\n")
    except OSError:
        return ""
