"""Processes that a measurement starts, looks at and ends: by pid, checked before any signal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0, every_s: float = 0.02) -> None:
    """Return once ``condition`` holds. Raises TimeoutError naming ``what``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(every_s)


@contextlib.contextmanager
def running(
    argv: Sequence[str], log: Path, *, stop: signal.Signals = signal.SIGTERM, cwd: Path | None = None, patience_s: float = 30.0
) -> Iterator[subprocess.Popen[bytes]]:
    """``argv`` as a child until the block ends; then ``stop``, and SIGKILL when that takes longer than ``patience_s``."""
    with log.open("ab") as output:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, start_new_session=True)
    try:
        yield child
    finally:
        end(child, stop, patience_s)


def end(child: subprocess.Popen[bytes], stop: signal.Signals = signal.SIGTERM, patience_s: float = 30.0) -> None:
    """Ask a child to end, then make it. It is not reaped before, so the pid is its own."""
    if child.poll() is None:
        child.send_signal(stop)
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def kill_checked(pid: int, marker: str) -> int:
    """SIGKILL to ``pid`` if ``marker`` stands in its command line; CLOCK_MONOTONIC in ns right before.

    Raises ProcessLookupError when it is another process, or none.
    """
    pidfd = os.pidfd_open(pid)
    try:
        if marker not in command_line(pid):
            raise ProcessLookupError(f"process {pid} is not the one that was started here")
        at = time.monotonic_ns()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return at
    finally:
        os.close(pidfd)


def sweep(directory: Path) -> list[str]:
    """Kill whatever still runs from ``directory``; what that was. Nothing, when all went well."""
    found = []
    for pid in all_pids():
        line = command_line(pid)
        if str(directory) in line and pid != os.getpid():
            with contextlib.suppress(OSError):
                kill_checked(pid, str(directory))
                found.append(f"{pid} {line}")
    return found


def all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def tree(root: int) -> list[int]:
    """``root`` and its descendants."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        with contextlib.suppress(OSError):
            children.setdefault(int(_stat(pid)[1]), []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def pss_bytes(pid: int) -> int:
    """Proportional set size; 0 for a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of the processes so far."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = _stat(pid)
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def cpu_seconds_with_children(pid: int) -> float:
    """User and system time of a process and of all its children that have ended."""
    return sum(map(int, _stat(pid)[11:15])) / TICKS


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name: state, ppid, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
