"""What /proc says about a process. Stdlib only: the shims use it too. A process that is gone reads as None."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import NamedTuple

NONCE_VARIABLE = "POOL_MANAGERD_NONCE"
_MAX_BYTES = 4 << 20
_MAX_DESCENDANTS = 4096
_MAX_THREADS = 256
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_EXIT_CODE = 49  # field 52, counted from the state


class Stat(NamedTuple):
    """The fields of /proc/PID/stat that identify a process; ``start_ticks`` counts since boot (field 22)."""

    state: str
    parent_pid: int
    start_ticks: int


def stat(pid: int) -> Stat | None:
    """The state of ``pid``, or None when there is no such process."""
    fields = _stat_fields(pid)
    return None if fields is None else Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


class Usage(NamedTuple):
    """What a process has used; ``cpu_ticks`` counts its ended children, too, in `TICKS_PER_S`."""

    state: str
    start_ticks: int
    cpu_ticks: int
    rss_bytes: int


def usage(pid: int) -> Usage | None:
    """What ``pid`` has used so far, or None when there is no such process."""
    fields = _stat_fields(pid)
    if fields is None:
        return None
    return Usage(fields[0].decode(), int(fields[19]), sum(map(int, fields[11:15])), int(fields[21]) * _PAGE_BYTES)


def moved_bytes(pid: int) -> int | None:
    """Bytes that ``pid`` has read and written, from a disk or a cache; None when that is not shown."""
    data = _read(pid, "io")
    if data is None:
        return None
    counts = dict(line.split(b": ") for line in data.splitlines())
    return sum(int(counts.get(name, 0)) for name in (b"rchar", b"wchar", b"read_bytes"))


def blocked(pid: int) -> str | None:
    """Where in the kernel ``pid`` or a thread of it sleeps uninterruptibly (``nfs_wait``), empty when that is not shown.

    None when none does.
    """
    try:
        tasks = os.listdir(f"/proc/{pid}/task")[:_MAX_THREADS]
    except OSError:
        return None
    for task in tasks:
        fields = _stat_fields(pid, f"task/{task}/stat")
        if fields is not None and fields[0] == b"D":
            where = (_read(pid, f"task/{task}/wchan") or b"").decode("ascii", "replace").strip()
            return "" if where == "0" else where
    return None


def start_ticks(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot; with the pid and the boot id it names one process only."""
    found = stat(pid)
    return None if found is None else found.start_ticks


def started_at(ticks: int) -> float:
    """The monotonic second of a process's start. Ticks count while the machine is suspended, monotonic time does not."""
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / TICKS_PER_S
    return time.monotonic() - ago


def is_running(pid: int, ticks: int) -> bool:
    """True when ``pid`` is the very process that started at ``ticks`` and has not ended (a zombie has)."""
    found = stat(pid)
    return found is not None and found.start_ticks == ticks and found.state not in "ZX"


def wait_status(pid: int, ticks: int) -> int | None:
    """How the very process that started at ``ticks`` ended, as waitpid(2) will tell, while nobody has collected it.

    None where that is not known: to who may not see it 0 is shown, which therefore says nothing.
    """
    fields = _stat_fields(pid)
    if fields is None or fields[0] != b"Z" or int(fields[19]) != ticks or len(fields) <= _EXIT_CODE:
        return None
    return int(fields[_EXIT_CODE]) or None


def name(pid: int) -> str | None:
    """The process's short name (/proc/PID/comm)."""
    data = _read(pid, "comm")
    return None if data is None else data.rstrip(b"\n").decode("utf-8", "replace")


def nonce(pid: int) -> str | None:
    """The instance nonce in the process's environment, if it has one that we may read."""
    return environment(pid).get(NONCE_VARIABLE)


def environment(pid: int) -> dict[str, str]:
    """What the process was started with, as far as it has left that in place and we may read it."""
    entries = (_read(pid, "environ") or b"").split(b"\0")
    pairs = (entry.decode("utf-8", "surrogateescape").partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def command_line(pid: int) -> list[str]:
    """The words that the process was started with, as far as it has left them in place."""
    words = (_read(pid, "cmdline") or b"").split(b"\0")
    return [word.decode("utf-8", "surrogateescape") for word in words if word]


def status(pid: int) -> dict[str, str] | None:
    """The fields of /proc/PID/status by name."""
    data = _read(pid, "status")
    if data is None:
        return None
    pairs = (line.partition(":") for line in data.decode("utf-8", "replace").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def uids(pid: int) -> set[int]:
    """Real, effective, saved and file system uid of ``pid``; empty when it is gone."""
    return {int(uid) for uid in (status(pid) or {}).get("Uid", "").split()}


def is_resource_tracker(pid: int) -> bool:
    """Whether it is Python's own, which unlinks the shared memory of a program whose processes have all ended."""
    return b"from multiprocessing.resource_tracker import main" in (_read(pid, "cmdline") or b"")


def children(pid: int) -> list[int]:
    """The pids of the processes that any thread of ``pid`` started, zombies included."""
    if _read(os.getpid(), f"task/{os.getpid()}/children") is None:  # a kernel without CONFIG_PROC_CHILDREN
        return [other for other in pids() if (seen := stat(other)) is not None and seen.parent_pid == pid]
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [int(child) for task in tasks for child in (_read(pid, f"task/{task}/children") or b"").split()]


def descendants(pid: int) -> dict[int, int]:
    """Pid and start ticks of what ``pid`` forked, of every generation, the dead left out."""
    found: dict[int, int] = {}
    pending = [pid]
    while pending and len(found) < _MAX_DESCENDANTS:
        for child in children(pending.pop()):
            seen = stat(child)
            if child not in found and seen is not None and seen.state not in "ZX":
                found[child] = seen.start_ticks
                pending.append(child)
    return found


def pids() -> list[int]:
    """Every process of this pid namespace."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def is_ours() -> bool:
    """Whether /proc is there and shows this pid namespace; in another's the same numbers are other processes."""
    try:
        return os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return False


@cache
def boot_id() -> str:
    """A name for the running boot of this machine: pids and start times mean nothing in another one."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(64).decode("ascii").strip()


def _stat_fields(pid: int, entry: str = "stat") -> list[bytes] | None:
    """From the state on: the name in parentheses may hold spaces and parentheses itself, what follows the last is regular."""
    data = _read(pid, entry)
    fields = [] if data is None else data[data.rfind(b")") + 2 :].split()
    return fields if len(fields) > 21 else None


def _read(pid: int, entry: str) -> bytes | None:
    try:
        fd = os.open(f"/proc/{pid}/{entry}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        chunks = []
        size = 0
        while size < _MAX_BYTES and (chunk := os.read(fd, 65536)):
            chunks.append(chunk)
            size += len(chunk)
        return b"".join(chunks)
    except OSError:
        return None
    finally:
        os.close(fd)
