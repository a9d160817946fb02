"""What was measured on, and whether it was quiet."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

QUIET_LOAD = 0.7
QUIET_SHARE = 0.03
_LOOK_S = 5.0


def describe() -> str:
    """Cores, CPU, kernel and Python in one line."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = models[0] if models else platform.machine()
    return f"{os.cpu_count()} cores, {cpu}, Linux {platform.release()}, Python {platform.python_version()}"


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


class Quiet:
    """Waits for a quiet machine, for ``budget_s`` in all; then it goes on and the load is told with the figures."""

    def __init__(self, budget_s: float) -> None:
        self._left = budget_s

    def wait(self) -> float:
        """The load at which it goes on: low, or only the echo of the row before, with the processors idle by now."""
        while load() >= QUIET_LOAD and self._left > 0:
            self._left -= _LOOK_S
            if _busy_share(_LOOK_S) < QUIET_SHARE:
                break
        return load()


def _busy_share(seconds: float) -> float:
    """How much of the processors' time was used during the next ``seconds``."""
    before = _jiffies()
    time.sleep(seconds)
    after = _jiffies()
    return 1 - (after[0] - before[0]) / max(1, after[1] - before[1])


def _jiffies() -> tuple[int, int]:
    """(idle, all) of all processors since boot."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)
